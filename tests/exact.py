"""Exact networks for data whose posterior is known: what the tests use instead of trained ones."""
import torch

from degrade import append_dims, blur, dct2, frequencies, idct2


def normals(*shape, seed=0):
    """Unit normals, float64, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def square_root(a):
    """The principal square root of a matrix, by Denman and Beavers' iteration: no eigenvalues."""
    root = a
    inverse = torch.eye(len(a), dtype=a.dtype)
    for _ in range(60):
        root, inverse = (root + inverse.inverse()) / 2, (inverse + root.inverse()) / 2
    return root


def power_law(h, w, total=0.25):
    """S = A / lam with total variance `total` a pixel, [h, w]. The mean's S is the next one's."""
    lam = frequencies(h, w).clone()
    lam[0, 0] = lam[0, 1]
    return total * (1 / lam) / (1 / lam).mean()


def m_of(alpha, h, w):
    """M(alpha) from its definition, float64 [B, 1, h, w]; B is 1 for a number."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return torch.exp(-frequencies(h, w) * alpha ** 2 / 2)


def gaussian_images(n, c, spectrum, generator):
    """Images whose DCT coefficients are independent, of variances `spectrum` [H, W]."""
    z = torch.randn(n, c, *spectrum.shape, dtype=torch.float64, generator=generator)
    return idct2(spectrum.sqrt() * z)


def gaussian_heads(spectrum):
    """Equation (6): the exact heads for such images."""
    def net(x, alpha, sigma):
        m = m_of(alpha, *spectrum.shape)
        sigma = append_dims(sigma, x, torch.float64)
        gain = m * spectrum / (m ** 2 * spectrum + sigma ** 2)                  # (6)
        u = dct2(x.double())
        return idct2(m * gain * u), idct2((1 - m) * gain * u)                   # (6)
    return net


def points_heads(points):
    """The exact heads for equally likely points [N, C, H, W]: a softmax over them."""
    def net(x, alpha, sigma):
        blurry = blur(points, alpha)
        distance = (x[:, None] - blurry).square().sum((2, 3, 4))                # [B, N]
        p = torch.softmax(-distance / (2 * sigma ** 2), 1)
        d = torch.einsum("bn,nchw->bchw", p, blurry)
        r = torch.einsum("bn,nchw->bchw", p, points - blurry)
        return d, r
    return net


def mixture_posterior(means, spectrum, u, m, variance):
    """Of x0 with independent DCT coefficients of variances `spectrum` around one of several means
    [K, H, W], equally likely, given u = M x0 + noise: the weights [B, K], and each component's
    mean [B, K, H, W] and variance [H, W]."""
    off = u - m * means                                                         # [B, K, H, W]
    total = m ** 2 * spectrum + variance
    weights = torch.softmax(-(off.square() / total).sum((2, 3)) / 2, 1)
    return weights, means + m * spectrum / total * off, spectrum * variance / total


def mixture_heads(means, spectrum):
    """The exact heads for such images, of one channel. They are not linear."""
    def net(x, alpha, sigma):
        m = m_of(alpha, *spectrum.shape)
        weights, of_each, _ = mixture_posterior(means, spectrum, dct2(x.double()), m, sigma ** 2)
        u0 = torch.einsum("bk,bkhw->bhw", weights, of_each)[:, None]
        return idct2(m * u0), idct2((1 - m) * u0)
    return net
