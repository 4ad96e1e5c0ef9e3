"""The sampler on data whose flow is known, beside EDM's and Cold Diffusion's algorithms.

The tests of `multistep` alone stand in a section of their own, and so do those of churn.
"""
import math
from functools import partial

import pytest
import torch

from degrade import (BlurringSchedule, ColdSchedule, ConstantBNR, Schedule, blur, dct2, degrade,
                     frequencies, idct2)
from exact import (gaussian_heads, gaussian_images, m_of, mixture_heads, normals, points_heads,
                   power_law, square_root)
from sample import (churn_step, euler, generate, heun, integrate, multistep,
                    multistep_times, plain_image, sample, step, time_steps)
from util.cli import UserError

SOLVERS = ["euler", "heun", "multistep"]
SPECTRUM = power_law(16, 16)
MEAN_COLOR = {"mean": [0.2, -0.1, 0.4],
              "cov": [[0.3, 0.1, 0.], [0.1, 0.2, 0.05], [0., 0.05, 0.1]]}


def drawn(*args, **kw):
    return torch.cat(list(generate(*args, **kw)))


def zeros(x, alpha, sigma):
    return torch.zeros_like(x), torch.zeros_like(x)


# Gaussian data, whose flow is known


def gains(solver, times, schedule, spectrum=SPECTRUM):
    """What the sampler with exact heads multiplies each frequency by: [H, W].

    The heads are diagonal and linear, so one image with a 1 in every frequency shows all of them.
    """
    x = idct2(torch.ones(1, 1, *spectrum.shape, dtype=torch.float64))
    return dct2(solver(gaussian_heads(spectrum), schedule, x, times))[0, 0]


def exact_gains(schedule, spectrum, high, low):
    """The same for the flow itself, from level high to low: the ratio of standard deviations."""
    variances = []
    for t in (low, high):
        alpha, sigma = schedule.levels(t)
        variances.append(m_of(alpha, *spectrum.shape)[0, 0] ** 2 * spectrum + sigma ** 2)
    return (variances[0] / variances[1]).sqrt()


def orders(errors):
    """The orders at which errors fall that belong to doubled numbers of steps."""
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]


@pytest.mark.parametrize("solver", [euler, heun, multistep])
def test_samples_have_the_datas_variance(solver):
    samples = 80 * gains(solver, time_steps(200), ConstantBNR(0.5))             # deviations
    assert (samples - SPECTRUM.sqrt()).square().sum() < 1e-3 * SPECTRUM.sum()


# Other people's algorithms


def edm_algorithm_2(denoise, z, steps, churn, noises):
    """Algorithm 2 of Karras et al. (2206.00364), written from the paper; at S_noise = 1 and with no
    bound on the churned levels."""
    i = torch.arange(steps, dtype=torch.float64)
    t = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t = t.tolist() + [0.]
    x = t[0] * z
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1)
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat ** 2 - t[i] ** 2) * next(noises)
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_prime) / 2
    return x


@pytest.mark.parametrize("churn", [0, 5, 40])
def test_heun_at_bnr_0_is_edms_algorithm_2(churn):
    z = normals(2, 3, 8, 8)
    noises = normals(18, 2, 3, 8, 8, seed=1)

    def denoise(x, t):                                          # any denoiser, linear or not
        return torch.tanh(x / (1 + t)) + 0.1 * x.flip(-1) / (1 + t)

    def net(x, alpha, sigma):
        assert alpha == 0
        return denoise(x, sigma), torch.zeros_like(x)
    edm = edm_algorithm_2(denoise, z, 18, churn, iter(noises))
    ours = sample(net, ConstantBNR(0), z, churn=churn, randn=partial(next, iter(noises)))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, edm, rtol=0, atol=1e-10)


def test_without_noise_a_step_is_cold_diffusions_algorithm_2():
    x = normals(2, 3, 8, 12)

    def restore(x, t):
        return torch.tanh(x) * (1 + t)

    def net(x, alpha, sigma):
        return x, restore(x, alpha) - x                         # D = x, as there is no noise
    times = torch.tensor([6., 3., 1., 0.], dtype=torch.float64)
    cold = x
    for t, s in zip(times[:-1], times[1:]):
        estimate = restore(cold, t)
        cold = cold - blur(estimate, t) + blur(estimate, s)
    torch.testing.assert_close(euler(net, ColdSchedule(), x, times), cold, rtol=0, atol=1e-10)


def test_a_step_of_no_length_returns_the_state_whatever_the_heads_are():
    x = normals(1, 1, 8, 8)
    t = torch.tensor(2., dtype=torch.float64)
    assert torch.equal(step(x, x.sin(), x.cos(), t, t, ConstantBNR(0.5)), x)


# Multistep: closed forms, and heads that disagree on purpose


def heads_that_disagree(spectrum):
    """Exact heads, each with an error of its own: D is not the blurred D + R, as with trained
    heads. The errors are smooth in x and in the level."""
    exact = gaussian_heads(spectrum)

    def net(x, alpha, sigma):
        d, r = exact(x, alpha, sigma)
        return d + 0.3 * sigma * torch.sin(x.flip(-1)), r + 0.2 * torch.cos(x.flip(-2))
    return net


def runge_kutta(net, schedule, x, t, s, n):
    """The flow (2) from t to s in n steps of the classical fourth order, in l = ln sigma."""
    small = 1e-5

    def m_at(l):
        alpha, _ = schedule.levels(l.exp())
        return m_of(alpha, *x.shape[-2:])

    def slope(l, x):
        d, r = net(x, *schedule.levels(l.exp()))
        dm_dl = (m_at(l + small) - m_at(l - small)) / (2 * small)
        return idct2(dm_dl * dct2(d + r)) + x - d
    levels = torch.linspace(math.log(t), math.log(s), n + 1, dtype=torch.float64)
    for l, h in zip(levels, levels.diff()):
        k1 = slope(l, x)
        k2 = slope(l + h / 2, x + h / 2 * k1)
        k3 = slope(l + h / 2, x + h / 2 * k2)
        k4 = slope(l + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("schedule", [ConstantBNR(0), ConstantBNR(0.5), ConstantBNR(2),
                                      ConstantBNR(10), BlurringSchedule()])
def test_samplers_agree_on_heads_that_disagree(schedule):
    """With more steps every sampler comes to the converged solution at its order, though D is not
    the blurred D + R: a multistep that forgets this e, or its slope, does not."""
    net = heads_that_disagree(power_law(8, 8))
    x = 5 * normals(2, 1, 8, 8)
    converged = runge_kutta(net, schedule, x, 5., 0.05, 100)
    for solver, order, last in ((euler, 1, 0.03), (heun, 2, 0.001), (multistep, 2, 0.001)):
        errors = []
        for n in (50, 100, 200):
            y = solver(net, schedule, x, time_steps(n, 0.05, 5.)[:-1])
            errors.append(((y - converged).norm() / converged.norm()).item())
        assert errors[-1] < last, solver
        for order_here, fine in zip(orders(errors), errors[1:]):
            assert order_here > order - 0.3 or fine < 2e-5, solver


def test_a_step_with_quadratic_estimates_is_their_integral():
    """x0_hat and e quadratic in l, each with its own coefficients, through three evaluations of
    which one is at the end of the step, as the corrector has it: the integrals on a fine grid."""
    coefficients = normals(3, 2, 1, 1, 8, 16)

    def estimates(sigma):
        l = -sigma.log()
        return coefficients[0] + l * coefficients[1] + l ** 2 * coefficients[2]
    levels = torch.tensor([1.5, 2.5, 4.], dtype=torch.float64)
    grid = torch.linspace(2.5, 1.5, 2001, dtype=torch.float64)
    middles = (grid[1:] * grid[:-1]).sqrt()
    of_x0_hat, of_e = torch.stack([estimates(sigma) for sigma in middles], 1)[:, :, 0, 0]
    d_blurred = (m_of(0.5 * grid, 8, 16)[:, 0] / grid[:, None, None]).diff(dim=0)
    d_noise = (1 / grid).diff()[:, None, None]
    integral = (of_x0_hat * d_blurred + of_e * d_noise).sum(0)
    u = normals(1, 1, 8, 16, seed=1)
    nodes = [(-sigma.log(), estimates(sigma)) for sigma in levels]
    ours = integrate(u, levels[1], levels[0], nodes, ConstantBNR(0.5))
    torch.testing.assert_close(ours[0, 0], 1.5 * (u[0, 0] / 2.5 + integral), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bnr", [0, 0.5, 2])
def test_multistep_on_a_mixture_of_gaussians_has_order_3_at_least(bnr):
    """Heads that are exact and not linear. Its corrector makes it one order better than the three
    evaluations of the predictor. Without it, or with a wrong sign in it, the order is below 3."""
    net = mixture_heads(0.5 * normals(20, 8, 8, seed=5), power_law(8, 8, total=0.02))
    schedule = ConstantBNR(bnr)
    x = 10 * normals(4, 1, 8, 8, seed=3)
    converged = runge_kutta(net, schedule, x, 10., 0.05, 800)
    errors = []
    for n in (24, 48, 96):
        ours = multistep(net, schedule, x, time_steps(n, 0.05, 10.)[:-1])
        errors.append((ours - converged).norm().item())
    assert orders(errors)[0] > 2.9 and errors[1] < 0.003 and errors[2] < 2e-4


def test_multistep_draws_each_component_of_a_mixture_as_often_as_it_should():
    means = 0.5 * normals(3, 4, 4, seed=5)
    spectrum = power_law(4, 4, total=0.02)
    n = 3000
    out = sample(mixture_heads(means, spectrum), ConstantBNR(0.5), normals(n, 1, 4, 4),
                 solver="multistep")
    off = dct2(out) - means                                                     # [n, 3, 4, 4]
    component = (off.square() / spectrum).sum((2, 3)).argmin(1)
    shares = component.bincount(minlength=3) / n
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    inside = off[torch.arange(n), component]                                    # [n, 4, 4]
    assert (inside.var(0) / spectrum).mean() == pytest.approx(1, abs=0.08)


def test_multisteps_last_step_is_the_estimate_itself():
    x = normals(1, 1, 4, 4)
    seen = []

    def net(x, alpha, sigma):
        return x.sin().float(), x.cos().float()
    ours = multistep(net, ConstantBNR(0.5), x, torch.tensor([3., 1., 0.]),
                     watch=lambda t, x, d, r: seen.append((d, r)))
    d, r = seen[-1]
    assert ours.dtype == d.dtype == torch.float64               # whatever the network's type is
    assert torch.equal(ours, d + r)


@pytest.mark.parametrize("low, high", [(0.002, 80.), (0.1, 30.)])
@pytest.mark.parametrize("n", [1, 2, 6, 9, 12, 18])
def test_multisteps_levels_fall_from_the_start_to_0_evenly_in_their_own_scale(low, high, n):
    t = multistep_times(n, 16, 16, ConstantBNR(10), low, high)
    assert len(t) == n + 1 and t[0] == high and t[-1] == 0 and (t.diff() < 0).all()
    steps = torch.log1p(16 / t[:-1]).diff()                     # 4 times the root of the side
    assert len(steps) < 2 or (steps / steps.mean() - 1).abs().max() < 1e-6
    # no more blur at the last than 0.8 / n pixels, but where the range of levels ends
    assert n == 1 or t[-2] < 1.001 * low or 10 * t[-2] <= 0.8 / n + 1e-9


def rms_error(solver, times, schedule, side):
    """Of samples to the converged solution, over the pixels of Gaussian images of power 1 / lam, a
    quarter of it in the mean."""
    lam = frequencies(side, side)
    spectrum = torch.where(lam > 0, 1 / lam, 0)
    spectrum = 0.1875 * spectrum * side ** 2 / spectrum.sum()
    spectrum[0, 0] = 0.0625 * side ** 2
    error = gains(solver, times, schedule, spectrum) - exact_gains(schedule, spectrum, 80., 0.)
    return 80 * error.square().mean().sqrt()


@pytest.mark.parametrize("bnr, n", [(0, 8), (0.5, 8), (2, 12)])
@pytest.mark.parametrize("side", [16, 32])
def test_few_evaluations_of_multistep_are_as_good_as_heuns_35(side, bnr, n):
    schedule = ConstantBNR(bnr)
    ours = rms_error(multistep, multistep_times(n, side, side, schedule), schedule, side)
    assert ours <= rms_error(heun, time_steps(18), schedule, side)


# Churn


@pytest.mark.parametrize("schedule", [ConstantBNR(0), ConstantBNR(0.5), ConstantBNR(2),
                                      BlurringSchedule()])
def test_churn_leaves_the_marginals_exact(schedule):
    """From x at t, known x0, (4) gives mean M_that x0 and variance sigma_that^2 in every frequency:
    those of (1) at t_hat."""
    t, t_hat, n = 0.7, 0.9, 20_000
    x0 = normals(1, 1, 6, 4)
    noise = normals(n, 1, 6, 4, seed=1)
    fresh = normals(n, 1, 6, 4, seed=2)
    x, _ = degrade(x0.expand(n, -1, -1, -1), *schedule.levels(t), noise)
    u = dct2(churn_step(x, t, t_hat, schedule, fresh))
    mean = m_of(schedule.levels(t_hat)[0], 6, 4)[0] * dct2(x0[0])
    assert ((u.mean(0) - mean) / (t_hat / math.sqrt(n))).abs().max() < 4.5
    assert (u.var(0) / t_hat ** 2 - 1).abs().max() < 4.5 * math.sqrt(2 / n)


def test_churn_climbs_where_both_attenuations_underflow():
    x = torch.ones(1, 1, 64, 64, dtype=torch.float64)
    assert churn_step(x, 70., 80., ConstantBNR(10), torch.ones_like(x)).isfinite().all()


def test_churn_keeps_to_its_levels_and_fresh_noise_to_its_standard_deviation():
    """With D = 0 at BNR 0 the first step down from t_hat leaves x s / t_hat."""
    fresh = normals(1, 1, 4, 4)
    states = []
    calls = []

    def randn():
        calls.append(1)
        return fresh
    sample(zeros, ConstantBNR(0), 0 * fresh, 18, churn=40, s_min=0.05, s_max=50, s_noise=1.5,
           randn=randn, watch=lambda t, x, d, r: states.append((t, x)))
    churned = [t for t in time_steps(18).tolist() if 0.05 <= t <= 50]
    assert len(calls) == len(churned) < 18
    t_hat, x = next((t, x) for t, x in states if x.any())
    assert t_hat == pytest.approx(math.sqrt(2) * churned[0])
    torch.testing.assert_close(x, 1.5 * math.sqrt(t_hat ** 2 - churned[0] ** 2) * fresh)


# Whole samplings


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule, steps", [(ConstantBNR(0), 40), (ConstantBNR(0.5), 40),
                                             (ConstantBNR(2), 40), (BlurringSchedule(), 200)])
def test_a_finite_data_set_comes_back(solver, schedule, steps):
    points = normals(4, 3, 8, 8).clamp(-1, 1)
    x = sample(points_heads(points), schedule, normals(16, 3, 8, 8), steps, solver=solver)
    distance, nearest = (x[:, None] - points).abs().amax((2, 3, 4)).min(1)
    assert distance.max() < 1e-3 and len(set(nearest.tolist())) > 1


@pytest.mark.parametrize("solver, nfe", [("euler", 18), ("heun", 35), ("multistep", 12),
                                         ("ancestral", 18)])
def test_network_evaluations(solver, nfe):
    levels = []

    def net(x, alpha, sigma):
        levels.append(sigma.item())
        assert x.dtype == alpha.dtype == sigma.dtype == torch.float64
        return zeros(x, alpha, sigma)
    sample(net, ConstantBNR(0.5), torch.zeros(1, 1, 4, 4), solver=solver)
    assert len(levels) == nfe and min(levels) > 0


class FallingBlur(Schedule):
    def alpha(self, sigma):
        return sigma / (1 + sigma ** 2)


def not_finite(x, alpha, sigma):
    return x / (sigma < 1), 0 * x


@pytest.mark.parametrize("net, schedule, options, words", [
    (zeros, ConstantBNR(0.5), {"solver": "rk4"}, "multistep or ancestral, not rk4"),
    (zeros, ConstantBNR(0.5), {"solver": "multistep", "churn": 1.}, "noise and no churn"),
    (zeros, ColdSchedule(), {"solver": "multistep", "mean_color": {"mean": [0.], "cov": [[0.]]}},
     "noise and no churn"),
    (zeros, ColdSchedule(), {}, "give its mean_color"),
    (zeros, FallingBlur(), {}, "FallingBlur cannot be used: .*must not fall"),
    (not_finite, ConstantBNR(0.5), {}, "image that is not finite"),
    (zeros, ConstantBNR(0.5), {"level": 1.}, "steps must be an int .* init and level go together"),
    (zeros, ConstantBNR(0.5), {"init": torch.zeros(1, 1, 4, 4)}, "init and level go together"),
    (zeros, ConstantBNR(0.5), {"steps": 0}, "steps must be an int"),
    (zeros, ConstantBNR(0.5), {"steps": 2.5}, "steps must be an int"),
    (zeros, ConstantBNR(0.5), {"init": torch.zeros(1, 3, 4, 4), "level": 1.}, "init must be float"),
    (zeros, ConstantBNR(0.5), {"init": torch.zeros(1, 1, 4, 4).byte(), "level": 1.},
     "init must be float"),
    (zeros, ConstantBNR(0.5), {"init": torch.full((1, 1, 4, 4), 255.), "level": 1.},
     "init must be float")])
def test_a_sampling_that_makes_no_sense_is_refused(net, schedule, options, words):
    with pytest.raises(UserError, match=words):
        sample(net, schedule, torch.ones(1, 1, 4, 4), **options)


@pytest.mark.parametrize("times", [[2., 2.], [1., 2.], [1.], [1., -1.]])
@pytest.mark.parametrize("solver", [euler, heun, multistep])
def test_times_that_do_not_fall_are_refused(solver, times):
    with pytest.raises(UserError, match="must fall"):
        solver(zeros, ConstantBNR(0.5), torch.zeros(1, 1, 4, 4), times)


# An image a seed


def test_each_seed_has_a_generator_of_its_own_whatever_its_batch():
    """For the start and for churn. With D = 0 and R = 0 at BNR 0, what is drawn is what is seen."""
    seen = []
    drawn(zeros, ConstantBNR(0), (3, 5, 5), range(4, 9), "cpu", batch=2, steps=2, solver="euler",
          churn=1., watch=lambda t, x, d, r: seen.append(x))
    generator = torch.Generator().manual_seed(7)                # the second of the second batch
    draw = partial(torch.randn, 3, 5, 5, dtype=torch.float64, generator=generator)
    t_hat = math.sqrt(2) * 80
    x = 80 * draw() + math.sqrt(t_hat ** 2 - 80 ** 2) * draw()
    torch.testing.assert_close(seen[2][1], x)
    torch.testing.assert_close(seen[3][1], x * 0.002 / t_hat + 0.002 * draw())


class Shades:
    """Exact heads for two classes of one flat image each, black and white."""
    classes = 2

    def __call__(self, x, alpha, sigma, label):
        shade = (2. * label - 1)[:, None, None, None].expand_as(x)
        return shade, torch.zeros_like(x)


def test_a_class_is_asked_for_or_classes_take_turns():
    draw = partial(drawn, Shades(), ConstantBNR(0.5), (1, 8, 8), device="cpu", batch=2, steps=8)
    for label, seeds, shades in ((0, [5, 6], [-1, -1]), (1, [5, 6], [1, 1]),
                                 (None, [4, 5, 6], [-1, 1, -1])):
        x = draw(seeds, label=label)
        assert x.mean((1, 2, 3)).tolist() == pytest.approx(shades)
    for label in (2, -1, "a", True):
        with pytest.raises(UserError, match=f"label {label!r} is no int below 2, the"):
            draw([0], label=label)
    with pytest.raises(UserError, match="label 0 is no int below 0, the"):
        drawn(zeros, ConstantBNR(0), (1, 8, 8), [0], "cpu", label=0)


def test_seeds_and_batches_that_cannot_be_are_refused():
    for seeds, batch, words in (([2 ** 32], 64, "seeds"), (5, 64, "batch must be"),
                                ([0], 0, "batch must be")):
        with pytest.raises(UserError, match=words):
            drawn(zeros, ConstantBNR(0.5), (3, 8, 8), seeds, batch=batch)


def test_an_image_of_ones_own_is_degraded_to_the_level_and_comes_back_near():
    spectrum = power_law(16, 16)
    x0 = gaussian_images(1, 3, spectrum, torch.Generator().manual_seed(0))
    z = normals(2, 3, 16, 16)
    schedule = ConstantBNR(0.5)
    distances = []
    for level in (0.05, 5.):
        states = []
        x = sample(gaussian_heads(spectrum), schedule, z, init=x0, level=level,
                   watch=lambda t, x, d, r: states.append((t, x)))
        first_level, first = states[0]
        expected, _ = degrade(x0.expand_as(z), *schedule.levels(level), z)
        assert first_level == pytest.approx(level)
        torch.testing.assert_close(first, expected)
        distances.append((x - x0).std())
    assert distances[0] < 0.1 < distances[1]


# Cold


def test_cold_sampling_starts_from_plain_images_of_the_datas_colors():
    """Whatever signs the eigenvectors of a color's covariance are given."""
    z = normals(5, 3, 4, 6)
    mean = torch.tensor(MEAN_COLOR["mean"]).double()
    root = square_root(torch.tensor(MEAN_COLOR["cov"]).double())
    colors = mean + z.sum((2, 3)) / math.sqrt(4 * 6) @ root     # [5, 3]
    expected = colors[:, :, None, None].expand_as(z)
    torch.testing.assert_close(plain_image(z, **MEAN_COLOR), expected)
    one_color = plain_image(z, MEAN_COLOR["mean"], [[0.] * 3] * 3)
    torch.testing.assert_close(one_color, mean[:, None, None].expand_as(z))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_cold_sampling_with_one_image_to_know_ends_there(solver):
    """Heads that know x0 move any start to itself plus what blur took of x0: the high frequencies
    are x0's, the color is the start's."""
    x0 = normals(1, 3, 8, 12)
    z = normals(4, 3, 8, 12, seed=1)
    seen = []
    x = sample(lambda x, alpha, sigma: (x, x0 - x), ColdSchedule(), z, 6, MEAN_COLOR, solver=solver,
               watch=lambda t, x, d, r: seen.append((t, x)))
    assert [t for t, _ in seen] == pytest.approx(time_steps(6, 0.1, 12)[:-1].tolist())
    plain = plain_image(z, **MEAN_COLOR)
    torch.testing.assert_close(seen[0][1], plain)
    expected = dct2(plain) + (1 - m_of(12., 8, 12)) * dct2(x0)
    torch.testing.assert_close(dct2(x), expected, rtol=0, atol=1e-10)
