import math

import pytest
import torch
import torch.nn.functional as F

from degrade import (AnyBNR, BlurringSchedule, ColdSchedule, ConstantBNR, Schedule, blur,
                     check_schedule, dct2, degrade, idct2, level_to_t, make_schedule)
from exact import m_of, normals
from util.cli import UserError

TOLERANCES = [(torch.float32, 3e-6), (torch.float64, 1e-13)]


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# The DCT and blur


def waves(n):
    """The orthonormal DCT-II from its definition: row k is sqrt(2 / n) cos(pi k (2 i + 1) / 2 n),
    but 1 / sqrt(n) for k = 0."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n):
        for i in range(n):
            matrix[k, i] = math.sqrt(2 / n) * math.cos(math.pi * k * (2 * i + 1) / (2 * n))
    matrix[0] = math.sqrt(1 / n)
    return matrix


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_dct2_is_the_double_sum_and_idct2_its_inverse(dtype, tolerance):
    x = normals(2, 3, 5, 7).to(dtype)
    u = dct2(x)
    direct = torch.einsum("ki,lj,bcij->bckl", waves(5), waves(7), x.double())
    close(u, direct.to(dtype), tolerance)
    close(idct2(u), x, tolerance)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("autocast", [False, True])
def test_blur_is_the_identity_at_0_adds_in_squares_and_leaves_the_mean(dtype, tolerance, autocast):
    x = normals(2, 3, 12, 20).to(dtype)
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        close(blur(x, 0), x, tolerance)
        close(blur(blur(x, 1.2), 0.9), blur(x, 1.5), tolerance)
        close(blur(x, 3.).mean((2, 3)), x.mean((2, 3)), tolerance)
        close(blur(x, 1e3), mean, tolerance)
        close(blur(x, math.inf), mean, tolerance)
        assert blur(x.bfloat16(), 1.).dtype == torch.float32


def test_blur_is_a_gaussian_of_alpha_pixels_with_reflecting_borders():
    x = normals(2, 3, 24, 32)
    alpha = 2.
    k = torch.arange(-16, 17, dtype=torch.float64)
    kernel = torch.exp(-k ** 2 / (2 * alpha ** 2)) / (alpha * math.sqrt(2 * math.pi))
    # the half-sample reflection of a DCT-II
    wide = torch.cat([x[..., :16].flip(-1), x, x[..., -16:].flip(-1)], -1)
    tall = torch.cat([wide[..., :16, :].flip(-2), wide, wide[..., -16:, :].flip(-2)], -2)
    direct = F.conv2d(tall.flatten(0, 1)[:, None], (kernel[:, None] * kernel)[None, None])
    close(blur(x, alpha), direct.reshape(x.shape), 1e-8)


def test_a_blur_made_in_inference_mode_can_be_trained_through_later():
    with torch.inference_mode():
        blur(torch.zeros(1, 1, 9, 11), 1.)
    x = torch.randn(1, 1, 9, 11, requires_grad=True)
    blur(x, 1.).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))      # blur does not change the sum


@pytest.mark.parametrize("bnr", [0, 0.5, 2])
@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3), torch.tensor([0.3, 4.])])
def test_degrade_is_equation_1(bnr, t):
    x0 = normals(2, 3, 12, 20)
    noise = normals(2, 3, 12, 20, seed=1)
    x, blurry = degrade(x0, *ConstantBNR(bnr).levels(t), noise)
    levels = torch.as_tensor(t, dtype=torch.float64).expand(2)
    close(dct2(blurry), m_of(bnr * levels, 12, 20) * dct2(x0), 1e-13)
    close(x - blurry, levels[:, None, None, None] * noise, 1e-13)


# Schedules


def test_the_levels_of_each_schedule():
    t = torch.tensor([0., 4.])
    for schedule, alpha, sigma in ((ConstantBNR(0.5), [0, 2], [0, 4]), (AnyBNR(), [0, 2], [0, 4]),
                                   (ConstantBNR(0), [0, 0], [0, 4]),
                                   (ColdSchedule(), [0, 4], [0, 0])):
        levels = schedule.levels(t)
        assert [v.tolist() for v in levels] == [alpha, sigma]
        assert [v.dtype for v in levels] == [torch.float64] * 2
        assert [v.item() for v in schedule.levels(4.)] == [alpha[1], sigma[1]]
        assert torch.equal(level_to_t(*levels), t)
    assert ConstantBNR(2).sigma_range(12, 20) == (0.002, 80)
    assert ColdSchedule().sigma_range(12, 20) == (0.1, 20)


def test_the_blurring_schedule_is_hoogeboom_and_salimans():
    # their time u: signal cos, noise sin, blur 20 sin^2, all of pi u / 2
    angle = math.pi / 2 * torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    alpha, sigma = BlurringSchedule().levels(torch.tan(angle))
    torch.testing.assert_close(alpha, 20 * torch.sin(angle) ** 2)
    torch.testing.assert_close(sigma, torch.sin(angle) / torch.cos(angle))
    ratio = alpha / sigma
    assert ratio.max().item() == pytest.approx(10)
    assert sigma[ratio.argmax()].item() == pytest.approx(1)


def test_a_schedule_is_made_from_what_a_checkpoint_or_a_command_line_says():
    assert make_schedule(0.5).bnr == 0.5
    assert type(make_schedule(math.inf)) is ColdSchedule
    assert type(make_schedule("any")) is AnyBNR
    assert type(make_schedule(0.5, "blurring")) is BlurringSchedule
    for bnr in ("0.5", -1, math.nan, -math.inf):
        with pytest.raises(UserError, match="BNR must be a number from 0"):
            make_schedule(bnr)
    with pytest.raises(UserError, match="'circle' is not one of this project"):
        make_schedule(0.5, "circle")


def test_training_noise_is_log_normal():
    class Wide(ConstantBNR):
        P_mean = 0.
        P_std = 2.
    torch.manual_seed(0)
    for schedule, mean, std in ((ConstantBNR(0.5), -1.2, 1.2), (BlurringSchedule(), -1.2, 1.2),
                                (AnyBNR(), -1.2, 1.2), (Wide(1), 0, 2)):
        alpha, sigma = schedule.training_levels(100_000, 1, 1)
        ln_sigma = sigma.log()
        assert ln_sigma.mean().item() == pytest.approx(mean, abs=0.03)
        assert ln_sigma.std().item() == pytest.approx(std, abs=0.03)
        if type(schedule) is not AnyBNR:
            torch.testing.assert_close(alpha, schedule.levels(sigma)[0].float())


def test_cold_training_levels_are_uniform_in_their_logarithm():
    torch.manual_seed(0)
    alpha, sigma = ColdSchedule().training_levels(100_000, 1, 4)
    share = (alpha / 0.1).log() / math.log(4 / 0.1)             # from 0 to 1
    assert torch.histc(share, 10, 0, 1).div(100_000).tolist() == pytest.approx([0.1] * 10, abs=0.01)
    assert not sigma.any()


def test_any_draws_a_ratio_for_each_image():
    """One in four exactly 0, the others log-uniform on [0.1, 10], whatever the noise."""
    torch.manual_seed(0)
    alpha, sigma = AnyBNR().training_levels(100_000, 8, 8)
    ratio = (alpha / sigma).double()
    assert (ratio == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    z = ratio[ratio > 0].log10()
    assert z.abs().max() <= 1 + 1e-5
    assert torch.histc(z, 10, -1, 1).div(len(z)).tolist() == pytest.approx([0.1] * 10, abs=0.01)
    ratio_and_noise = torch.stack([ratio.clamp(max=1), sigma.log().double()])
    assert torch.corrcoef(ratio_and_noise)[0, 1].abs() < 0.02


# The contract of a schedule of one's own


class Square(Schedule):
    def alpha(self, sigma):
        return sigma ** 2


class NoBlur(Schedule):
    def alpha(self, sigma):
        return 0.


def test_a_schedule_of_ones_own_needs_alpha_alone():
    for schedule in (Square(), NoBlur(), ConstantBNR(10), BlurringSchedule(), ColdSchedule(),
                     AnyBNR()):
        check_schedule(schedule, 8, 12)
    torch.manual_seed(0)
    alpha, sigma = Square().training_levels(10, 8, 8)
    assert torch.equal(alpha, sigma ** 2)
    alpha, sigma = NoBlur().levels(torch.tensor([1., 2.]))
    assert alpha.tolist() == [0, 0] and sigma.tolist() == [1, 2]


@pytest.mark.parametrize("alpha, sigma_range, words", [
    (lambda sigma: sigma + 0.1, (0.002, 80), r"no blur: alpha\(0\) = 0"),
    (lambda sigma: sigma / (1 + sigma ** 2), (0.002, 80), "alpha must not fall"),
    (lambda sigma: sigma / (sigma < 1), (0.002, 80), "alpha must be finite"),
    (lambda sigma: math.sin(sigma), (0.002, 80), "fails"),
    (lambda sigma: None, (0.002, 80), "fails"),
    (lambda sigma: sigma, (80, 0.002), "sigma_range must rise"),
    (lambda sigma: sigma, (0., 80), "sigma_range must rise"),
    (lambda sigma: sigma, (0.002, math.inf), "sigma_range must rise")])
def test_a_schedule_that_breaks_the_contract_is_one_line(alpha, sigma_range, words):
    class Mine(Schedule):
        def alpha(self, sigma):
            return alpha(sigma)

        def sigma_range(self, h, w):
            return sigma_range
    with pytest.raises(UserError, match=f"^the schedule Mine cannot be used: .*{words}") as e:
        check_schedule(Mine(), 8, 8)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("levels", [
    (torch.rand(1000), torch.full((1000,), -1.)), (torch.ones(1000, 1), torch.ones(1000, 1)),
    (torch.ones(1000), torch.full((1000,), math.nan)), (torch.zeros(1000), torch.zeros(1000)),
    (0.5, 1.), None])
def test_training_levels_that_break_the_contract_are_one_line(levels):
    class Mine(Square):
        def training_levels(self, n, h, w, device=None):
            torch.rand(n)
            return levels
    before = torch.random.get_rng_state()
    with pytest.raises(UserError, match="^the schedule Mine cannot be used: .*training_levels"):
        check_schedule(Mine(), 8, 8)
    assert torch.equal(torch.random.get_rng_state(), before)    # the check draws no one's numbers


def test_what_is_no_schedule_yet_is_one_line():
    with pytest.raises(UserError, match=r"Square is a class: give a schedule, Square\(\)"):
        check_schedule(Square, 8, 8)
    with pytest.raises(UserError, match="the schedule Schedule cannot be used: .*NotImplemented"):
        check_schedule(Schedule(), 8, 8)
