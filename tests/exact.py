"""Exact networks for data whose posterior is known: what the tests put in the place of a trained one."""
from types import SimpleNamespace

import torch

from degrade import blur, dct2, frequencies, idct2


def power_law(h, w, total=0.25):
    """S = A / lam with total variance `total` a pixel, the mean aside: A's own level for the mean's frequency."""
    lam = frequencies(h, w).clone()
    lam[0, 0] = lam[0, 1]
    return total * (1 / lam) / (1 / lam).mean()


def m_of(alpha, h, w):
    return torch.exp(-frequencies(h, w) * torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1, 1, 1) ** 2 / 2)


def gaussian_heads(spectrum, path):
    """Equation (6): the exact heads for independent DCT coefficients of variance spectrum [H, W]."""
    def net(x, t):
        alpha, sigma = path.levels(torch.as_tensor(t, dtype=torch.float64))
        m, sigma = m_of(alpha, *spectrum.shape), sigma.reshape(-1, 1, 1, 1)
        gain = m * spectrum / (m ** 2 * spectrum + sigma ** 2)
        u = dct2(x.double())
        return idct2(m * gain * u), idct2((1 - m) * gain * u)
    return net


def as_model(net, path, classes=0, blind=False, colour=None):
    """net with what sample.generate asks of a Denoiser."""
    net.path, net.unet, net.blind, net.colour = path, SimpleNamespace(classes=classes), blind, colour
    return net


def points_heads(points, path):
    """The exact heads for a data set of a few equally likely points [N, C, H, W]: a softmax over them."""
    def net(x, t):
        alpha, sigma = path.levels(float(t))
        blurry = blur(points, alpha)
        distance = (x[:, None] - blurry[None]).square().sum((2, 3, 4))                          # [B, N]
        p = torch.softmax(-distance / (2 * sigma ** 2), 1)
        return torch.einsum("bn,nchw->bchw", p, blurry), torch.einsum("bn,nchw->bchw", p, points - blurry)
    return net


def gaussian_pictures(n, c, spectrum, generator):
    return idct2(spectrum.sqrt() * torch.randn(n, c, *spectrum.shape, dtype=torch.float64, generator=generator))
