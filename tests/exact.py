"""Exact networks for data whose posterior is known: what the tests use instead of trained ones."""
import torch

from degrade import blur, dct2, expand_level, frequencies, idct2


def power_law(h, w, total=0.25):
    """S = A / lam with total variance `total` a pixel. The mean's S is the next one's."""
    lam = frequencies(h, w).clone()
    lam[0, 0] = lam[0, 1]
    return total * (1 / lam) / (1 / lam).mean()


def m_of(alpha, h, w):
    alpha = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return torch.exp(-frequencies(h, w) * alpha ** 2 / 2)


def gaussian_heads(spectrum):
    """Equation (6): the exact heads for independent DCT coefficients, spectrum [H, W]."""
    def net(x, alpha, sigma):
        m, sigma = m_of(alpha, *spectrum.shape), expand_level(sigma, x, torch.float64)
        gain = m * spectrum / (m ** 2 * spectrum + sigma ** 2)                  # (6)
        u = dct2(x.double())
        return idct2(m * gain * u), idct2((1 - m) * gain * u)                   # (6)
    return net


def points_heads(points):
    """The exact heads for equally likely points [N, C, H, W]: a softmax over them."""
    def net(x, alpha, sigma):
        blurry = blur(points, alpha)
        distance = (x[:, None] - blurry[None]).square().sum((2, 3, 4))          # [B, N]
        p = torch.softmax(-distance / (2 * sigma ** 2), 1)
        return tuple(torch.einsum("bn,nchw->bchw", p, v) for v in (blurry, points - blurry))
    return net


def gaussian_images(n, c, spectrum, generator):
    noise = torch.randn(n, c, *spectrum.shape, dtype=torch.float64, generator=generator)
    return idct2(spectrum.sqrt() * noise)
