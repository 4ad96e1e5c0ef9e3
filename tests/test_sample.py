import argparse
import math

import pytest
import torch

import sample as sample_script
from degrade import (BlurringPath, ColdPath, ConstantBNR, Path, blur, dct2, degrade, frequencies,
                     idct2)
from exact import gaussian_heads, gaussian_images, m_of, points_heads, power_law
from loss import disentangled_loss
from model import Denoiser, UNet
from sample import (churn_step, curvature, generate, multistep_times, plain_image, sample, solve,
                    step, time_steps)
from study.common import seed_noise
from study.strip import rows_of
from util import UserError

H = W = 32
SPECTRUM = power_law(H, W)
SOLVERS = ["euler", "heun", "multistep"]
ORDERS = [("euler", 1), ("heun", 2), ("multistep", 2)]
COLOUR = {"mean": [0.2, -0.1, 0.4], "cov": [[0.3, 0.1, 0.], [0.1, 0.2, 0.05], [0., 0.05, 0.1]]}


def normals(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def drawn(*args, **kw):
    return torch.cat(list(generate(*args, **kw)))


# Gaussian data, whose flow is known

def gains(solver, times, path, spectrum=SPECTRUM):
    """What the sampler with exact heads multiplies each frequency by: [H, W].

    The heads are diagonal and linear, so one image with a 1 in every frequency shows all of them.
    """
    x = idct2(torch.ones(1, 1, *spectrum.shape, dtype=torch.float64))
    return dct2(solve(gaussian_heads(spectrum), path, x, times, solver))[0, 0]


def orders(solver, path, spectrum, steps):
    """The orders at which the error at t_min falls between these numbers of steps."""
    def variance(t):
        alpha, sigma = path.levels(t)
        return m_of(alpha, *spectrum.shape)[0, 0] ** 2 * spectrum + sigma ** 2
    exact = (variance(0.002) / variance(80.)).sqrt()
    error = [(gains(solver, time_steps(n)[:-1], path, spectrum) - exact).norm() for n in steps]
    return [math.log2(coarse / fine) for coarse, fine in zip(error, error[1:])]


@pytest.mark.parametrize("bnr", [0, 0.5, 2])
@pytest.mark.parametrize("solver, order", ORDERS)
def test_order_of_convergence(solver, order, bnr):
    found = orders(solver, ConstantBNR(bnr), SPECTRUM, (72, 144, 288))
    assert min(found) > order - 0.15
    assert max(found) < order + 0.15 or solver == "multistep"   # its third order shows in part


@pytest.mark.parametrize("solver, order", ORDERS)
def test_order_of_convergence_on_the_blurring_path(solver, order):
    found = orders(solver, BlurringPath(), power_law(8, 8), (288, 576, 1152))
    assert min(found) > order - 0.15
    assert max(found) < order + 0.15 or solver == "multistep"


def frechet(solver, steps, path):
    return (80 * gains(solver, time_steps(steps), path).abs() - SPECTRUM.sqrt()).square().sum()


def test_multistep_beats_heun_at_equal_evaluations():
    path = ConstantBNR(0.5)
    assert frechet("multistep", 35, path) <= frechet("heun", 18, path) / 4


def test_eulers_error_grows_with_bnr():
    distances = [frechet("euler", 36, ConstantBNR(bnr)) for bnr in (0, 0.5, 2)]
    assert distances == sorted(distances)


def test_the_blurring_path_needs_more_steps():
    """Table 4 and Figure 5 in miniature: what Heun's steps alone leave, with exact heads."""
    for steps in (18, 36):
        hot, warm, far, blurring = (
            frechet("heun", steps, path)
            for path in (ConstantBNR(0), ConstantBNR(0.5), ConstantBNR(10), BlurringPath()))
        assert min(blurring, far) > 5 * warm > 5 * hot


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_have_the_datas_variance(solver):
    assert frechet(solver, 200, ConstantBNR(0.5)) < 1e-3 * SPECTRUM.sum()


# Steps

def edm_algorithm_2(denoise, latents, steps, churn, noises):
    """Algorithm 2 of Karras et al. (2206.00364), written from the paper; at S_noise = 1 and with no
    bound on the churned levels."""
    i = torch.arange(steps, dtype=torch.float64)
    t = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t = t.tolist() + [0.]
    x = t[0] * latents
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
def test_bnr_0_with_heun_is_edms_algorithm_2(churn):
    latents, noises = normals(2, 3, 8, 8), normals(18, 2, 3, 8, 8, seed=1)

    def denoise(x, t):                                          # any denoiser, linear or not
        return torch.tanh(x / (1 + t)) + 0.1 * x.flip(-1) / (1 + t)

    def net(x, alpha, sigma):
        assert alpha == 0
        return denoise(x, sigma), torch.zeros_like(x)
    edm = edm_algorithm_2(denoise, latents, 18, churn, iter(noises))
    draws = iter(noises)
    ours = sample(net, ConstantBNR(0), latents, churn=churn, noise=lambda: next(draws))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, edm, rtol=0, atol=1e-10)


def test_without_noise_a_step_is_cold_diffusions_algorithm_2():
    x = normals(2, 3, 8, 12)
    restore = lambda x, t: torch.tanh(x) * (1 + t)
    net = lambda x, alpha, sigma: (x, restore(x, alpha) - x)    # D = x, as there is no noise
    times = torch.tensor([6., 3., 1., 0.], dtype=torch.float64)
    ours, cold = solve(net, ColdPath(), x, times, "euler"), x
    for t, s in zip(times[:-1], times[1:]):
        estimate = restore(cold, t)
        cold = cold - blur(estimate, t) + blur(estimate, s)
    torch.testing.assert_close(ours, cold, rtol=0, atol=1e-10)


def test_a_step_of_no_length_returns_the_state_whatever_the_heads_answer():
    x, t = normals(1, 1, 8, 8), torch.tensor(2., dtype=torch.float64)
    assert torch.equal(step(x, x.sin(), x.cos(), t, t, ConstantBNR(0.5)), x)


# Multistep

@pytest.mark.parametrize("bnr", [0.5, 2])
def test_what_a_linear_estimate_adds_is_the_closed_form(bnr):
    """sigma_s k ((l_s - l_t) M_s / sigma_s - J) + m ((l_s - l_t) - 1 + sigma_s / sigma_t), with
    J, the integral of M e^l dl, by the error function."""
    c, path = frequencies(8, 16) * bnr ** 2 / 2, ConstantBNR(bnr)

    def primitive(q):
        root = torch.sqrt(math.pi * c) * torch.erf(c.sqrt() * q)
        return -torch.exp(-c * q ** 2) / q - root
    values = normals(2, 2, 1, 1, 8, 16)                         # x0_hat and e, twice
    t_before, t, s = 4., 2.5, 1.5
    history = [(torch.tensor(-math.log(q), dtype=torch.float64), v)
               for q, v in zip((t, t_before), values)]
    ours = dct2(curvature(history, *(torch.tensor(v, dtype=torch.float64) for v in (t, s)), path))
    k, m = (values[0] - values[1]) / math.log(t_before / t)
    dl, j = math.log(t / s), primitive(t) - primitive(s)
    closed = k * (dl * torch.exp(-c * s ** 2) - s * j) + m * (dl - 1 + s / t)
    torch.testing.assert_close(ours, closed, rtol=1e-4, atol=1e-6)


def test_what_quadratic_estimates_add_is_their_integral():
    """x0_hat and e quadratic in l, each with its own coefficients: the integrals of both, less
    their values at t, on a fine grid of sigma itself."""
    path, (t, s) = ConstantBNR(0.5), torch.tensor([2.5, 1.5], dtype=torch.float64)
    coefficients = normals(3, 2, 1, 1, 8, 16)
    value = lambda l: coefficients[0] + l * coefficients[1] + l ** 2 * coefficients[2]
    history = [(-q.log(), value(-q.log())) for q in torch.tensor([2.5, 4., 7.]).double()]
    q = torch.linspace(2.5, 1.5, 2001, dtype=torch.float64)
    m = m_of(0.5 * q, 8, 16) / q[:, None, None, None]           # [2001, 1, H, W]
    moved = torch.stack([value(l) for l in -(q[1:] * q[:-1]).sqrt().log()]) - history[0][1]
    of_x0, of_e = moved[:, 0, :, 0], moved[:, 1, :, 0]          # [2000, 1, H, W]
    integral = (of_x0 * m.diff(dim=0) + of_e * (1 / q).diff()[:, None, None, None]).sum(0)
    ours = dct2(curvature(history, t, s, path))[0]
    torch.testing.assert_close(ours, s * integral, rtol=1e-4, atol=1e-6)


class OwnParameter(Path):
    """Another path in a parameter of its own, 0 < u < 1: sigma = tan(pi u / 2)."""

    def __init__(self, path):
        self.path = path

    def levels(self, u):
        return self.path.levels(torch.tan(math.pi / 2 * u))

    def t_range(self, h, w):
        return tuple(2 / math.pi * math.atan(t) for t in self.path.t_range(h, w))


PATHS = [ConstantBNR(0), ConstantBNR(0.5), ConstantBNR(2), ConstantBNR(10), BlurringPath(),
         OwnParameter(ConstantBNR(0.5)), OwnParameter(BlurringPath())]


@pytest.mark.parametrize("path", [ConstantBNR(0.5), BlurringPath(), ColdPath()])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_sampler_does_not_see_the_paths_parameter(path, solver):
    """One curve has the same steps, the same churn and the same image, whatever its t is."""
    if solver == "multistep" and isinstance(path, ColdPath):
        return
    x, net = normals(2, 3, 8, 8), heads_that_disagree(power_law(8, 8))
    if isinstance(path, ColdPath):
        net = lambda x, alpha, sigma: (x, 0.2 * torch.cos(x.flip(-2)))
    ways = [{}, {"init": 0.1 * normals(1, 3, 8, 8), "level": 2.}]
    ways += [] if solver == "multistep" else [{"churn": 4., "s_max": 5., "noise": lambda: x}]
    for way in ways:
        ours, other = (sample(net, p, x, 6, COLOUR, solver=solver, **way)
                       for p in (path, OwnParameter(path)))
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


def test_training_levels_do_not_see_the_paths_parameter():
    for path in (ConstantBNR(0.5), BlurringPath()):
        torch.manual_seed(0)
        ours = path.training_levels(100, 8, 8)
        torch.manual_seed(0)
        torch.testing.assert_close(OwnParameter(path).training_levels(100, 8, 8), ours)


def rms_error(solver, steps, path, side):
    """Over the pixels of Gaussian images of power 1 / lam, a quarter of it in the mean."""
    lam = frequencies(side, side)
    s = torch.where(lam > 0, 1 / lam, 0)
    s = 0.1875 * s * side ** 2 / s.sum()
    s[0, 0] = 0.0625 * side ** 2
    end = 80 * (s / (m_of(80 * path.bnr, side, side)[0, 0] ** 2 * s + 80 ** 2)).sqrt()
    times = multistep_times(steps, side, side) if solver == "multistep" else time_steps(steps)
    return (80 * gains(solver, times, path, s) - 80 * end / 80).square().mean().sqrt()


@pytest.mark.parametrize("bnr", [0, 0.5])
@pytest.mark.parametrize("side", [16, 32, 64])
def test_twelve_evaluations_of_multistep_are_as_good_as_heuns_35(side, bnr):
    path = ConstantBNR(bnr)
    assert rms_error("multistep", 12, path, side) <= rms_error("heun", 18, path, side)


@pytest.mark.parametrize("low, high", [(0.002, 80.), (0.1, 30.)])
@pytest.mark.parametrize("n", [1, 2, 6, 9, 12, 18])
def test_multisteps_levels_fall_from_the_start_to_0_evenly_in_their_own_scale(low, high, n):
    t = multistep_times(n, 16, 16, low, high)
    assert len(t) == n + 1 and t[0] == high and t[-1] == 0 and (t.diff() < 0).all()
    steps = torch.log1p(24 / t[1:-1]).diff()                    # 1.5 times the side
    assert len(steps) < 2 or (steps / steps.mean() - 1).abs().max() < 1e-6


def heads_that_disagree(spectrum):
    """Exact heads, each with an error of its own: D is not the blurred D + R, as with trained
    heads. The errors are smooth in x and in the level."""
    exact = gaussian_heads(spectrum)

    def net(x, alpha, sigma):
        d, r = exact(x, alpha, sigma)
        return d + 0.3 * sigma * torch.sin(x.flip(-1)), r + 0.2 * torch.cos(x.flip(-2))
    return net


def runge_kutta(net, path, x, t, s, n):
    """The flow (2) from t to s in n steps of the classical fourth order, in ln sigma."""
    small = 1e-5

    def slope(l, x):
        alpha, sigma = path.levels(l.exp())
        above, below = (m_of(path.levels((l + d).exp())[0], *x.shape[-2:]) for d in (small, -small))
        d, r = net(x, alpha, sigma)
        return idct2((above - below) / (2 * small) * dct2(d + r)) + x - d
    levels = torch.linspace(math.log(t), math.log(s), n + 1, dtype=torch.float64)
    for l, h in zip(levels, levels.diff()):
        k1 = slope(l, x)
        k2 = slope(l + h / 2, x + h / 2 * k1)
        k3 = slope(l + h / 2, x + h / 2 * k2)
        k4 = slope(l + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("path", PATHS[:5])
def test_samplers_agree_on_heads_that_disagree(path):
    """With more steps every sampler comes to the flow's end at its order, though D is not the
    blurred D + R: a multistep that forgets this e, or its slope, does not."""
    spectrum, x = power_law(8, 8), 5 * normals(2, 1, 8, 8)
    net, steps = heads_that_disagree(spectrum), (50, 100, 200)
    times = [time_steps(n, 0.05, 5.)[:-1] for n in steps]
    end = runge_kutta(net, path, x, 5., 0.05, 100)
    error = lambda y: ((y - end).norm() / end.norm()).item()
    for (solver, order), last in zip(ORDERS, (0.03, 0.001, 0.001)):
        errors = [error(solve(net, path, x, t, solver)) for t in times]
        assert errors[-1] < last, solver
        for coarse, fine in zip(errors, errors[1:]):
            assert math.log2(coarse / fine) > order - 0.3 or fine < 2e-5, solver


def test_multisteps_last_step_is_the_estimate_itself():
    x, seen = normals(1, 1, 4, 4), []
    net = lambda x, alpha, sigma: (x.sin().float(), x.cos().float())
    ours = solve(net, ConstantBNR(0.5), x, torch.tensor([3., 1., 0.]), "multistep",
                 watch=lambda t, x, d, r: seen.append((d, r)))
    assert ours.dtype == seen[-1][0].dtype == torch.float64     # whatever the network answers in
    assert torch.equal(ours, sum(seen[-1]))


# Churn

@pytest.mark.parametrize("path", [ConstantBNR(0), ConstantBNR(0.5), ConstantBNR(2), BlurringPath()])
def test_churn_leaves_the_marginals_exact(path):
    """From x at t, known x0, (4) gives mean M_that x0 and variance sigma_that^2 in every frequency:
    those of (1) at t_hat."""
    t, t_hat, n = 0.7, 0.9, 20_000
    x0, noise, fresh = normals(1, 1, 6, 4), normals(n, 1, 6, 4, seed=1), normals(n, 1, 6, 4, seed=2)
    x, _ = degrade(x0.expand(n, -1, -1, -1), *path.levels(t), noise)
    u = dct2(churn_step(x, t, t_hat, path, fresh))
    mean = m_of(path.levels(t_hat)[0], 6, 4)[0] * dct2(x0[0])
    assert ((u.mean(0) - mean) / (t_hat / math.sqrt(n))).abs().max() < 4.5
    assert (u.var(0) / t_hat ** 2 - 1).abs().max() < 4.5 * math.sqrt(2 / n)


def test_churn_climbs_where_both_attenuations_underflow():
    x = torch.ones(1, 1, 64, 64, dtype=torch.float64)
    assert churn_step(x, 70., 80., ConstantBNR(10), torch.ones_like(x)).isfinite().all()


@pytest.mark.parametrize("solver, tolerance", [("heun", 0.15), ("euler", 0.25)])
def test_churn_samples_the_gaussian(solver, tolerance):
    """5 standard errors are 0.11; Euler's own error is the rest."""
    spectrum, g = power_law(6, 6), torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(4000, 1, 6, 6, dtype=torch.float64, generator=g)
    x = sample(gaussian_heads(spectrum), ConstantBNR(0.5), draw(), steps=60, solver=solver,
               churn=12, noise=draw)
    assert (dct2(x).var(0) / spectrum - 1).abs().max() < tolerance


def test_churn_keeps_to_its_levels():
    drawn, x = [], torch.zeros(1, 1, 4, 4)

    def noise():
        drawn.append(1)
        return x
    net = lambda x, alpha, sigma: (x * 0, x * 0)
    sample(net, ConstantBNR(0.5), x, steps=18, churn=40, s_min=0.05, s_max=50, noise=noise)
    assert len(drawn) == sum(0.05 <= t <= 50 for t in time_steps(18))


# Whole samplings

@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("path, steps", [
    (ConstantBNR(0), 40), (ConstantBNR(0.5), 40), (ConstantBNR(2), 40), (BlurringPath(), 200)])
def test_a_finite_data_set_comes_back(solver, path, steps):
    g = torch.Generator().manual_seed(0)
    points = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=g) * 2 - 1
    latents = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=g)
    x = sample(points_heads(points), path, latents, steps, solver=solver)
    distance, nearest = (x[:, None] - points[None]).abs().amax((2, 3, 4)).min(1)
    assert distance.max() < 1e-3 and len(set(nearest.tolist())) > 1


def test_time_steps_are_edms():
    t = time_steps(18)
    assert t.dtype == torch.float64 and len(t) == 19 and t[-1] == 0
    expected = (80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert t[[0, 5, 17]].tolist() == pytest.approx([80, expected, 0.002], rel=1e-12)
    assert time_steps(1).tolist() == pytest.approx([80, 0])


@pytest.mark.parametrize("solver, nfe", [("euler", 18), ("heun", 35), ("multistep", 12)])
def test_network_evaluations(solver, nfe):
    asked = []

    def net(x, alpha, sigma):
        asked.append(sigma.item())
        assert x.dtype == alpha.dtype == sigma.dtype == torch.float64
        return x * 0, x * 0
    sample(net, ConstantBNR(0.5), torch.zeros(1, 1, 4, 4), solver=solver)
    assert len(asked) == nfe and min(asked) > 0


@pytest.mark.parametrize("path, local_ratio", [
    (ConstantBNR(0), lambda sigma: 0 * sigma), (ConstantBNR(0.3), lambda sigma: 0.3 + 0 * sigma),
    (BlurringPath(), lambda sigma: 20 * sigma / (1 + sigma ** 2))])
@pytest.mark.parametrize("churn", [0, 3])
def test_a_network_for_every_ratio_is_told_the_levels_that_training_told_it(path, local_ratio,
                                                                            churn):
    """c_noise = ln(sigma) / 4 and 4 b = 4 r / (1 + r), r = alpha / sigma, at every evaluation. For
    training, tests/test_train.py reads the same two from a run."""
    torch.manual_seed(0)
    net, told = Denoiser(UNet(3, 6, channels=8, mult=(1,), blocks=0, attention=(), ratio=True)), []
    net.unet.register_forward_pre_hook(
        lambda unet, args, kw: told.append((args[1], kw["ratio"])), with_kwargs=True)
    drawn(net.eval(), path, (3, 8, 8), range(2), "cpu", steps=4, churn=churn)
    t = time_steps(4)[:-1]
    t_hat = t * (1 + min(churn / 4, math.sqrt(2) - 1))
    sigma = torch.stack([t_hat, t.roll(-1)], 1).flatten()[:-1]  # Heun: t_hat and s of each step
    c_noise, ratio = (torch.stack(values).double() for values in zip(*told))
    r = local_ratio(sigma)
    for ours, expected in ((c_noise, sigma.log() / 4), (ratio, 4 * r / (1 + r))):
        torch.testing.assert_close(ours, expected[:, None].expand(7, 2), rtol=1e-6, atol=1e-7)


def test_what_makes_no_sense_is_refused():
    x, net, path = torch.zeros(1, 1, 4, 4), lambda x, *a: (x, x), ConstantBNR(0.5)
    with pytest.raises(UserError, match="euler, heun or multistep, not rk4"):
        sample(net, path, x, solver="rk4")
    with pytest.raises(UserError, match="no churn"):
        sample(net, path, x, solver="multistep", churn=1.)
    with pytest.raises(UserError, match="path with noise"):
        solve(net, ColdPath(), x, time_steps(4), "multistep")
    with pytest.raises(UserError, match="give its colour"):
        sample(net, ColdPath(), x)
    for times in ([2., 2.], [1., 2.], [1.], [1., -1.]):
        with pytest.raises(UserError, match="must fall"):
            solve(net, path, x, torch.tensor(times))
    for init in (torch.zeros(1, 3, 4, 4), torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4).byte(),
                 torch.full((1, 1, 4, 4), 255.)):
        with pytest.raises(UserError, match="init must be float"):
            sample(net, path, x, init=init, level=1.)
    for way in ({"level": 1.}, {"init": torch.zeros(1, 1, 4, 4)}, {"steps": 0}, {"steps": 2.5}):
        with pytest.raises(UserError, match="steps must be an int .* init and level go together"):
            sample(net, path, x, **way)
    with pytest.raises(UserError, match="led to an image that is not finite"):
        sample(lambda x, alpha, sigma: (x / (sigma < 1), 0 * x), path, x)


class FallingBlur(Path):
    def levels(self, t):
        return t / (1 + t ** 2), t


def test_sampling_looks_at_its_path_first():
    with pytest.raises(UserError, match="FallingBlur cannot be used: .*must not fall"):
        sample(lambda x, *a: (x, x), FallingBlur(), torch.zeros(1, 1, 4, 4), 4, churn=1.)


def test_fresh_noise_has_the_standard_deviation_that_is_asked_for():
    """D = x and R = 0 leave a hot state alone, so that what churn adds is what is seen."""
    x, times = torch.zeros(1, 1, 4, 4, dtype=torch.float64), torch.tensor([2., 1.])
    net, fresh = lambda x, *a: (x, 0 * x), normals(1, 1, 4, 4)
    got = [solve(net, ConstantBNR(0), x, times, churn=1., s_noise=s, noise=lambda: fresh)
           for s in (1., 1.5)]
    torch.testing.assert_close(got[0], math.sqrt((2 * math.sqrt(2)) ** 2 - 2 ** 2) * fresh)
    torch.testing.assert_close(got[1], 1.5 * got[0])


@pytest.mark.parametrize("path", [ConstantBNR(0.5), ColdPath()])
def test_nothing_of_the_sampler_stays_on_the_cpu(path, monkeypatch):
    """As on a GPU: a tensor of the CPU cannot be mixed with those of torch's meta device, which
    hold no numbers to look at."""
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: torch.ones(x.shape).bool())
    with torch.device("meta"):
        net = Denoiser(UNet(3, 6, channels=8, mult=(1,), blocks=1, attention=(8,), classes=2))
    cold = isinstance(path, ColdPath)
    ways = [dict(solver=s, steps=4) for s in SOLVERS if not (cold and s == "multistep")]
    ways += [dict(ways[-1], init=torch.zeros(1, 3, 8, 8), level=1.)]
    ways += [] if cold else [dict(steps=4, churn=2.), dict(solver="multistep", steps=12)]
    for way in ways:
        x, = generate(net, path, (3, 8, 8), range(2), "meta", colour=COLOUR, **way)
        assert x.is_meta and x.shape == (2, 3, 8, 8) and x.dtype == torch.float64


def test_a_class_is_asked_for_by_its_name_alone():
    parser = argparse.ArgumentParser()
    sample_script.sampler_options(parser)
    checkpoint = {"config": {"bnr": 0.5}, "options": {"sample_steps": 2},
                  "data": {"classes": ["5", "0"]}}

    def options(label):
        args, net = parser.parse_args(["--class", label]), argparse.Namespace(classes=2)
        return sample_script.sampler(args, net, checkpoint)[0]
    assert options("0")["label"] == 1
    with pytest.raises(UserError, match="--class 1: the classes are 5, 0"):
        options("1")


def test_the_studys_noise_is_that_of_generate():
    """At the start and in churn: with D = 0 and R = 0, what is drawn is what comes out."""
    net, noise, seen = lambda x, *levels: (0 * x, 0 * x), seed_noise([7], (3, 5, 5)), []
    drawn(net, ConstantBNR(0), (3, 5, 5), [7], "cpu", steps=2, solver="euler", churn=1.,
          watch=lambda t, x, *heads: seen.append(x))
    climb = math.sqrt(2) - 1
    first, second, third = noise(), noise(), noise()
    expected = 80 * (first + math.sqrt((1 + climb) ** 2 - 1) * second)
    torch.testing.assert_close(seen[0], expected)
    x = expected * 0.002 / (80 * (1 + climb)) + 0.002 * math.sqrt((1 + climb) ** 2 - 1) * third
    torch.testing.assert_close(seen[1], x)


@pytest.mark.parametrize("classes, label", [(0, 0), (2, 2), (2, -1), (2, "a"), (2, True)])
def test_a_label_that_the_network_does_not_know_is_refused(classes, label):
    net = Denoiser(UNet(1, 2, channels=8, mult=(1,), blocks=0, attention=(), classes=classes))
    with pytest.raises(UserError, match=f"label {label!r} is no int below {classes}, the"):
        drawn(net, ConstantBNR(0), (1, 8, 8), [0], label=label, steps=1)


def test_a_seeds_image_does_not_see_its_batch():
    def draw(seeds, batch):
        net = gaussian_heads(power_law(8, 8))
        return drawn(net, ConstantBNR(0.5), (3, 8, 8), seeds, "cpu", batch, churn=10)
    alone = draw([7], 1)[0]
    for some in (draw(range(64), 64), draw(range(10), 3)):
        torch.testing.assert_close(some[7], alone, rtol=0, atol=1e-9)


def test_an_image_degraded_a_little_comes_back_near():
    spectrum = power_law(16, 16)
    x0 = gaussian_images(1, 3, spectrum, torch.Generator().manual_seed(0))
    near, far = (drawn(gaussian_heads(spectrum), ConstantBNR(0.5), (3, 16, 16), [0, 1], "cpu",
                       init=x0, level=level) for level in (0.05, 5.))
    assert (near - x0).std() < 0.1 < (far - x0).std()


def test_a_film_strip_shows_the_same_seed_along_each_path():
    """Four rows a ratio: the state over sqrt(1 + sigma^2), D, 4 R and D + R of every step."""
    torch.manual_seed(0)
    unet = UNet(3, 6, channels=8, mult=(1,), blocks=0, attention=(), ratio=True)
    torch.nn.init.normal_(unet.last.weight, std=0.1)
    net, paths = Denoiser(unet).eval(), [ConstantBNR(bnr) for bnr in (0, 0.5, 2)]
    rows, times = rows_of(net, paths, [3, 8, 8], [5], "cpu", steps=3)
    assert times == pytest.approx(time_steps(3)[:-1].tolist())
    for bnr, path in zip((0, 0.5, 2), paths):
        states = []
        drawn(net, path, (3, 8, 8), [5], steps=3, watch=lambda *state: states.append(state))
        for name, value in (("x", lambda t, x, d, r: x / math.sqrt(1 + t ** 2)),
                            ("D", lambda t, x, d, r: d), ("4 R", lambda t, x, d, r: 4 * r),
                            ("D + R", lambda t, x, d, r: d + r)):
            label, images = rows.pop(0)
            assert label == f"BNR {bnr:g}: {name}"
            expected = torch.cat([value(*state) for state in states])
            torch.testing.assert_close(torch.stack(images), expected)
    assert not rows


# Cold

def test_cold_sampling_starts_from_plain_images_of_the_datas_colours(monkeypatch):
    x = plain_image(normals(20_000, 3, 4, 6), **COLOUR)
    assert x.shape == (20_000, 3, 4, 6) and torch.equal(x, x[:, :, :1, :1].expand_as(x))
    mean, cov = (torch.tensor(COLOUR[name]).double() for name in ("mean", "cov"))
    torch.testing.assert_close(x[:, :, 0, 0].mean(0), mean, rtol=0, atol=0.015)
    torch.testing.assert_close(x[:, :, 0, 0].T.cov(), cov, rtol=0, atol=0.015)
    one = plain_image(normals(2, 3, 4, 4), COLOUR["mean"], [[0.] * 3] * 3)
    torch.testing.assert_close(one, mean[:, None, None].expand_as(one))

    def with_other_signs(a, original=torch.linalg.eigh):        # as another LAPACK may choose
        values, vectors = original(a)
        return values, -vectors
    monkeypatch.setattr(torch.linalg, "eigh", with_other_signs)
    torch.testing.assert_close(plain_image(normals(20_000, 3, 4, 6), **COLOUR), x)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_cold_sampling_with_one_image_to_know_ends_there(solver):
    """Heads that know x0 move any start to itself plus what blur took of x0: the high frequencies
    are x0's, the colour is the start's."""
    x0, seen = normals(1, 3, 8, 12), []
    net = lambda x, alpha, sigma: (x, x0 - x)
    x = sample(net, ColdPath(), normals(4, 3, 8, 12, seed=1), 6, solver=solver, colour=COLOUR,
               watch=lambda t, x, d, r: seen.append((t, x)))
    assert [t for t, _ in seen] == pytest.approx(time_steps(6, 0.1, 12)[:-1].tolist())
    start = seen[0][1]
    torch.testing.assert_close(start, plain_image(normals(4, 3, 8, 12, seed=1), **COLOUR))
    expected = dct2(start) + (1 - m_of(12., 8, 12)) * dct2(x0)
    torch.testing.assert_close(dct2(x), expected, rtol=0, atol=1e-10)


# Classes

def test_a_class_is_learned_and_asked_for():
    """Two classes, black and white: sampled by class, each comes out in its own shade."""
    torch.manual_seed(0)
    path, size = ConstantBNR(0.5), dict(channels=8, mult=(1,), blocks=1, attention=())
    net = Denoiser(UNet(1, 2, **size, resolution=8, classes=2))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        label = torch.randint(2, (32,))
        x0 = (2. * label - 1)[:, None, None, None].expand(-1, 1, 8, 8)
        alpha, sigma = path.training_levels(32, 8, 8)
        heads = lambda x, alpha, sigma: net(x, alpha, sigma, label=label)
        terms = disentangled_loss(heads, x0, alpha, sigma, torch.randn(32, 1, 8, 8), 0.5)
        sum(terms).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for label, seeds, shade in ((0, [5, 6], [-1, -1]), (1, [5, 6], [1, 1]),
                                (None, [4, 5, 6], [-1, 1, -1])):
        x = drawn(net.eval(), path, (1, 8, 8), seeds, batch=2, label=label, steps=8)
        assert x.mean((1, 2, 3)).tolist() == pytest.approx(shade, abs=0.2)
