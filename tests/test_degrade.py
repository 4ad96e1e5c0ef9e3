import math

import pytest
import torch
import torch.nn.functional as F

from degrade import BlurNoisePath, blur, dct2, degrade, frequencies, idct2

KINDS = [(torch.float32, 3e-6), (torch.float64, 1e-13)]


def picture(dtype=torch.float64, h=12, w=20, b=2):
    return torch.randn(b, 3, h, w, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype, tolerance", KINDS)
def test_dct2_is_the_double_sum(dtype, tolerance):
    h, w = 5, 7
    x = picture(dtype, h, w)
    u = dct2(x)
    assert u.dtype == dtype
    for k in range(h):
        for l in range(w):
            scale = math.sqrt((1 if k == 0 else 2) / h) * math.sqrt((1 if l == 0 else 2) / w)
            direct = sum(x[..., i, j].double() * math.cos(math.pi * k * (2 * i + 1) / (2 * h)) * math.cos(math.pi * l * (2 * j + 1) / (2 * w))
                         for i in range(h) for j in range(w))
            torch.testing.assert_close(u[..., k, l].double(), scale * direct, rtol=0, atol=tolerance)
    torch.testing.assert_close(idct2(u), x, rtol=0, atol=tolerance)


def test_frequencies_are_the_eigenvalues_of_the_laplacian_for_smooth_waves():
    h, w, i, j = 512, 256, 3, 2
    u = torch.zeros(h, w, dtype=torch.float64)
    u[i, j] = 1
    x = idct2(u)
    laplacian = -(x.roll(1, 0) + x.roll(-1, 0) + x.roll(1, 1) + x.roll(-1, 1) - 4 * x)[1:-1, 1:-1]
    torch.testing.assert_close(laplacian, frequencies(h, w)[i, j] * x[1:-1, 1:-1], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_blur_is_exact(dtype, tolerance, autocast):
    x = picture(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(blur(x, 0), x, rtol=0, atol=tolerance)
        torch.testing.assert_close(blur(blur(x, 1.2), 0.9), blur(x, 1.5), rtol=0, atol=tolerance)
        torch.testing.assert_close(blur(x, 3.).mean((2, 3)), x.mean((2, 3)), rtol=0, atol=tolerance)
        mean = x.mean((2, 3), keepdim=True).expand_as(x)
        for far in (1e3, math.inf):
            torch.testing.assert_close(blur(x, far), mean, rtol=0, atol=tolerance)
        assert blur(x, 1.).dtype == dtype


def test_blur_is_a_gaussian_of_alpha_pixels_with_reflecting_borders():
    x, alpha = picture(h=24, w=32), 2.
    k = torch.arange(-16, 17, dtype=torch.float64)
    kernel = torch.exp(-k ** 2 / (2 * alpha ** 2)) / (alpha * math.sqrt(2 * math.pi))
    wide = torch.cat([x[..., :16].flip(-1), x, x[..., -16:].flip(-1)], -1)                      # the half-sample reflection of a DCT-II
    tall = torch.cat([wide[..., :16, :].flip(-2), wide, wide[..., -16:, :].flip(-2)], -2)
    direct = F.conv2d(tall.flatten(0, 1)[:, None], (kernel[:, None] * kernel)[None, None]).reshape(x.shape)
    torch.testing.assert_close(blur(x, alpha), direct, rtol=0, atol=1e-8)


def test_blur_never_drops_below_float32():
    assert blur(picture().bfloat16(), 1.).dtype == torch.float32
    x = picture(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = blur(x, 1.)
    assert torch.equal(low, blur(x, 1.))


def test_a_blur_made_in_inference_mode_can_be_trained_through_later():
    with torch.inference_mode():
        blur(torch.zeros(1, 1, 9, 11), 1.)
    x = torch.randn(1, 1, 9, 11, requires_grad=True)
    blur(x, 1.).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))      # the mean is kept, so every pixel counts once


@pytest.mark.parametrize("bnr", [0, 0.5, 2])
def test_degrade_is_equation_1(bnr):
    x0, noise, path = picture(), torch.randn(2, 3, 12, 20, dtype=torch.float64), BlurNoisePath(bnr)
    for t in (0.3, torch.tensor(0.3), torch.tensor([0.3, 4.])):
        x, blurry = degrade(x0, t, path, noise)
        for i, level in enumerate(torch.as_tensor(t, dtype=torch.float64).expand(2).tolist()):
            m = torch.exp(-frequencies(12, 20) * (bnr * level) ** 2 / 2)
            torch.testing.assert_close(dct2(blurry[i]), m * dct2(x0[i]), rtol=0, atol=1e-6)     # the float32 level's rounding
            torch.testing.assert_close(x[i] - blurry[i], level * noise[i], rtol=0, atol=1e-6)
    assert degrade(x0.float(), torch.tensor([0.3, 4.], dtype=torch.float64), path, noise.float())[0].dtype == torch.float32


def test_paths():
    assert BlurNoisePath(0.5).levels(4.) == (2., 4.)
    assert BlurNoisePath(0).levels(4.) == (0., 4.)
    assert BlurNoisePath(math.inf).levels(4.) == (4., 0.)
    t = torch.tensor([0., 4.])
    assert [v.tolist() for v in BlurNoisePath(math.inf).levels(t)] == [[0., 4.], [0., 0.]]
    x0 = picture()
    assert torch.equal(degrade(x0, 2., BlurNoisePath(math.inf), torch.randn_like(x0))[0], blur(x0, 2.))
    for bad in (-1, math.nan):
        with pytest.raises(ValueError, match="BNR"):
            BlurNoisePath(bad)

    class Curve:
        def levels(self, t):
            return 20 * t ** 2 / (1 + t ** 2), t
    assert torch.equal(degrade(x0, 1., Curve(), torch.zeros_like(x0))[0], blur(x0, 10.))
