import math

import pytest
import torch
import torch.nn.functional as F

from degrade import (AnyBNR, BlurringPath, ColdPath, ConstantBNR, Path, blur, check_path, dct2,
                     degrade, expand_level, frequencies, idct2, levels_of, make_path)
from util import UserError

KINDS = [(torch.float32, 3e-6), (torch.float64, 1e-13)]


def image(dtype=torch.float64, h=12, w=20, b=2):
    return torch.randn(b, 3, h, w, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype, tolerance", KINDS)
def test_dct2_is_the_double_sum(dtype, tolerance):
    h, w = 5, 7
    x = image(dtype, h, w)
    u = dct2(x)
    assert u.dtype == dtype
    for k in range(h):
        for l in range(w):
            scale = math.sqrt((1 if k == 0 else 2) / h) * math.sqrt((1 if l == 0 else 2) / w)
            wave = [[math.cos(math.pi * k * (2 * i + 1) / (2 * h))
                     * math.cos(math.pi * l * (2 * j + 1) / (2 * w)) for j in range(w)]
                    for i in range(h)]
            direct = (x.double() * torch.tensor(wave, dtype=torch.float64)).sum((-2, -1))
            torch.testing.assert_close(u[..., k, l].double(), scale * direct, rtol=0,
                                       atol=tolerance)
    torch.testing.assert_close(idct2(u), x, rtol=0, atol=tolerance)


def test_frequencies_are_the_eigenvalues_of_the_laplacian_for_smooth_waves():
    h, w, i, j = 512, 256, 3, 2
    u = torch.zeros(h, w, dtype=torch.float64)
    u[i, j] = 1
    x = idct2(u)
    laplacian = -(x.roll(1, 0) + x.roll(-1, 0) + x.roll(1, 1) + x.roll(-1, 1) - 4 * x)[1:-1, 1:-1]
    expected = frequencies(h, w)[i, j] * x[1:-1, 1:-1]
    torch.testing.assert_close(laplacian, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_blur_is_exact(dtype, tolerance, autocast):
    x = image(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(blur(x, 0), x, rtol=0, atol=tolerance)
        torch.testing.assert_close(blur(blur(x, 1.2), 0.9), blur(x, 1.5), rtol=0, atol=tolerance)
        torch.testing.assert_close(blur(x, 3.).mean((2, 3)), x.mean((2, 3)), rtol=0, atol=tolerance)
        mean = x.mean((2, 3), keepdim=True).expand_as(x)
        for far in (1e3, math.inf):
            torch.testing.assert_close(blur(x, far), mean, rtol=0, atol=tolerance)
        assert blur(x, 1.).dtype == dtype


def test_blur_is_a_gaussian_of_alpha_pixels_with_reflecting_borders():
    x, alpha = image(h=24, w=32), 2.
    k = torch.arange(-16, 17, dtype=torch.float64)
    kernel = torch.exp(-k ** 2 / (2 * alpha ** 2)) / (alpha * math.sqrt(2 * math.pi))
    # the half-sample reflection of a DCT-II
    wide = torch.cat([x[..., :16].flip(-1), x, x[..., -16:].flip(-1)], -1)
    tall = torch.cat([wide[..., :16, :].flip(-2), wide, wide[..., -16:, :].flip(-2)], -2)
    direct = F.conv2d(tall.flatten(0, 1)[:, None], (kernel[:, None] * kernel)[None, None])
    direct = direct.reshape(x.shape)
    torch.testing.assert_close(blur(x, alpha), direct, rtol=0, atol=1e-8)


def test_blur_never_drops_below_float32():
    assert blur(image().bfloat16(), 1.).dtype == torch.float32
    x = image(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = blur(x, 1.)
    assert torch.equal(low, blur(x, 1.))


def test_a_blur_made_in_inference_mode_can_be_trained_through_later():
    with torch.inference_mode():
        blur(torch.zeros(1, 1, 9, 11), 1.)
    x = torch.randn(1, 1, 9, 11, requires_grad=True)
    blur(x, 1.).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))      # the mean is kept


@pytest.mark.parametrize("bnr", [0, 0.5, 2])
def test_degrade_is_equation_1(bnr):
    x0, noise = image(), torch.randn(2, 3, 12, 20, dtype=torch.float64)
    for t in (0.3, torch.tensor(0.3), torch.tensor([0.3, 4.])):
        x, blurry = degrade(x0, *ConstantBNR(bnr).levels(t), noise)
        for i, level in enumerate(torch.as_tensor(t, dtype=torch.float64).expand(2).tolist()):
            m = torch.exp(-frequencies(12, 20) * (bnr * level) ** 2 / 2)
            # to the rounding of float32 levels
            torch.testing.assert_close(dct2(blurry[i]), m * dct2(x0[i]), rtol=0, atol=1e-6)
            torch.testing.assert_close(x[i] - blurry[i], level * noise[i], rtol=0, atol=1e-6)
    t = torch.tensor([0.3, 4.], dtype=torch.float64)
    assert degrade(x0.float(), bnr * t, t, noise.float())[0].dtype == torch.float32


def test_paths():
    assert ConstantBNR(0.5).levels(4.) == (2., 4.)
    assert ConstantBNR(0).levels(4.) == (0., 4.)
    assert ColdPath().levels(4.) == (4., 0.)
    t = torch.tensor([0., 4.])
    assert [v.tolist() for v in ColdPath().levels(t)] == [[0., 4.], [0., 0.]]
    x0 = image()
    assert torch.equal(degrade(x0, *ColdPath().levels(2.), torch.randn_like(x0))[0], blur(x0, 2.))
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(UserError, match="BNR"):
            ConstantBNR(bad)
    for path in (ConstantBNR(2), BlurringPath()):
        assert path.t_range(12, 20) == (0.002, 80)
    assert ColdPath().t_range(12, 20) == (0.1, 20)


def test_the_blurring_path_is_hoogeboom_and_salimans_schedule():
    # their time: signal cos, noise sin, blur 20 sin^2, all of pi u / 2
    u = math.pi / 2 * torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    alpha, sigma = BlurringPath().levels(torch.tan(u))
    torch.testing.assert_close(alpha, 20 * torch.sin(u) ** 2)
    torch.testing.assert_close(sigma, torch.sin(u) / torch.cos(u))
    ratio = alpha / sigma
    assert ratio.max().item() == pytest.approx(10)
    assert sigma[ratio.argmax()].item() == pytest.approx(1)


def test_make_path():
    assert make_path(0.5).bnr == 0.5 and isinstance(make_path(math.inf), ColdPath)
    assert isinstance(make_path("any"), AnyBNR)
    assert isinstance(make_path(0.5, "blurring"), BlurringPath)
    for bad in (("0.5", None), (-1, None), (math.nan, None), (0.5, "circle")):
        with pytest.raises(UserError):
            make_path(*bad)


def test_training_levels_are_log_normal():
    torch.manual_seed(0)
    for path in (ConstantBNR(0.5), BlurringPath(), AnyBNR()):
        alpha, sigma = path.training_levels(100_000, 1, 1)
        z = sigma.log()
        assert z.mean().item() == pytest.approx(-1.2, abs=0.02)
        assert z.std().item() == pytest.approx(1.2, abs=0.02)
        if not isinstance(path, AnyBNR):
            assert torch.equal(alpha, path.levels(sigma)[0])


def test_the_law_of_training_levels_has_one_home():
    class Wide(ConstantBNR):
        P_mean, P_std = 0., 2.
    torch.manual_seed(0)
    z = Wide(1).training_levels(100_000, 1, 1)[1].log()
    assert (z.mean().item(), z.std().item()) == pytest.approx((0, 2), abs=0.03)


def test_cold_levels_are_uniform_in_their_logarithm():
    torch.manual_seed(0)
    alpha, sigma = ColdPath().training_levels(100_000, 1, 4)
    z, low, high = alpha.log(), math.log(0.1), math.log(4)
    assert low <= z.min() < low + 0.01 and high - 0.01 < z.max() <= high
    assert z.mean().item() == pytest.approx((low + high) / 2, abs=0.02) and not sigma.any()


def test_any_draws_a_ratio_for_each_image():
    """One in four exactly 0, the others log-uniform on [0.1, 10], whatever the noise."""
    torch.manual_seed(0)
    alpha, sigma = AnyBNR().training_levels(100_000, 8, 8)
    ratio = (alpha / sigma).double()
    assert (ratio == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    z = ratio[ratio > 0].log10()
    assert -1 - 1e-5 <= z.min() < -0.99 and 0.99 < z.max() <= 1 + 1e-5
    assert z.mean().item() == pytest.approx(0, abs=0.01)
    assert z.std().item() == pytest.approx(2 / math.sqrt(12), abs=0.01)
    together = torch.stack([ratio.clamp(max=1), sigma.log().double()])
    assert torch.corrcoef(together)[0, 1].abs() < 0.02


def test_a_path_of_ones_own_needs_levels_alone():
    class Square(Path):
        def levels(self, t):
            return t ** 2, t
    alpha, sigma = Square().training_levels(10, 8, 8)
    assert torch.equal(alpha, sigma ** 2) and Square().t_range(8, 8) == (0.002, 80)
    with pytest.raises(NotImplementedError):
        Path().levels(1.)


@pytest.mark.parametrize("levels, t_range, words", [
    (lambda t: (0.5 * t, t + 0.1), (0.002, 80), "at t = 0"),
    (lambda t: (t / (1 + t ** 2), t), (0.002, 80), "must not fall"),
    (lambda t: (t, t.sin()), (0.002, 80), "sigma must rise"),
    (lambda t: (t, t.clamp(max=20)), (0.002, 80), "sigma must rise"),
    (lambda t: (t, t / (t < 1)), (0.002, 80), "finite"),
    (lambda t: (t, (t - 1).clamp(min=0)), (0.002, 80), "sigma must rise with t, or be 0"),
    (lambda t: (0., 0.), (0.002, 80), "sigma must rise with t, or be 0"),
    (lambda t: (0., math.tan(t)), (0.002, 80), "training_levels fails"),
    (lambda t: t, (0.002, 80), "fails"),
    (lambda t: (t, t), (80, 0.002), "t_range"),
    (lambda t: (t, t), (0., 80), "t_range"),
    (lambda t: (t, t), (0.002, math.inf), "t_range|finite")])
def test_a_path_that_breaks_the_contract_is_one_line(levels, t_range, words):
    class Mine(Path):
        pass
    Mine.levels, Mine.t_range = staticmethod(levels), lambda self, h, w: t_range
    with pytest.raises(UserError, match=f"^the path Mine cannot be used: .*({words})") as e:
        check_path(Mine(), 8, 8)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("drawn", [
    lambda n: (torch.rand(n), torch.randn(n)), lambda n: (torch.ones(n, 1), torch.ones(n, 1)),
    lambda n: (torch.ones(n), torch.full((n,), math.nan)), lambda n: torch.ones(n),
    lambda n: (torch.zeros(n), torch.zeros(n)), lambda n: (0.5, 1.), lambda n: None])
def test_training_levels_that_break_the_contract_are_one_line(drawn):
    class Mine(ConstantBNR):
        def training_levels(self, n, h, w, device=None):
            return drawn(n)
    before = torch.random.get_rng_state()
    with pytest.raises(UserError, match="^the path Mine cannot be used: .*training_levels") as e:
        check_path(Mine(0.5), 8, 8)
    assert "\n" not in str(e.value)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_class_in_the_place_of_a_path_is_one_line():
    with pytest.raises(UserError, match=r"BlurringPath is a class: give a path, BlurringPath\(\)"):
        check_path(BlurringPath, 8, 8)


def test_paths_that_keep_the_contract_pass():
    class Numbers(Path):                                        # what does not depend on t
        def levels(self, t):
            return 0., t
    for path in (ConstantBNR(0), ConstantBNR(10), BlurringPath(), ColdPath(), AnyBNR(), Numbers()):
        check_path(path, 8, 12)
    alpha, sigma = Numbers().training_levels(5, 8, 8)
    assert not alpha.any() and alpha.shape == sigma.shape == (5,)
    alpha, sigma = levels_of(Numbers(), torch.tensor([1., 2.]))
    assert alpha.tolist() == [0, 0] and alpha.dtype == sigma.dtype == torch.float64


def test_a_level_takes_type_and_place_from_its_image_without_a_copy():
    x = torch.zeros(2, 3, 4, 4)
    level = expand_level(torch.tensor([1., 2.]), x)
    assert level.shape == (2, 1, 1, 1) and level.dtype == torch.float32
    assert expand_level(2, x, torch.float64).dtype == torch.float64
    assert expand_level(2, x.to("meta")).device.type == "meta"
