import math

import pytest
import torch

from degrade import BlurNoisePath, blur, dct2, degrade, frequencies, idct2
from exact import as_model, gaussian_heads, gaussian_pictures, m_of, points_heads, power_law
from sample import climb, generate, integral, sample, seed_noise, solve, time_steps

H = W = 32
SPECTRUM = power_law(H, W)


def gains(solver, steps, bnr, to_zero=False, spectrum=SPECTRUM):
    """What the sampler with exact heads multiplies each frequency by, from its start of variance t_max^2: [H, W].

    The heads are diagonal and linear, so one picture with a 1 in every frequency shows all of them.
    """
    path, times = BlurNoisePath(bnr), time_steps(steps)
    x = idct2(torch.ones(1, 1, *spectrum.shape, dtype=torch.float64))
    return dct2(solve(gaussian_heads(spectrum, path), path, x, times if to_zero else times[:-1], solver))[0, 0]


def exact_gains(bnr):
    variance = lambda t: m_of(bnr * t, H, W)[0, 0] ** 2 * SPECTRUM + t ** 2
    return (variance(0.002) / variance(80.)).sqrt()


@pytest.mark.parametrize("bnr", [0, 0.5, 2])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_order_of_convergence(solver, order, bnr):
    error = [((gains(solver, n, bnr) - exact_gains(bnr)) * 80).square().sum().sqrt() for n in (72, 144, 288)]
    for coarse, fine in zip(error, error[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def frechet(solver, steps, bnr):
    return (80 * gains(solver, steps, bnr, to_zero=True).abs() - SPECTRUM.sqrt()).square().sum().item()


def test_multistep_beats_heun_at_equal_evaluations():
    assert frechet("multistep", 35, 0.5) <= frechet("heun", 18, 0.5) / 4


def test_eulers_error_grows_with_bnr():
    distances = [frechet("euler", 36, bnr) for bnr in (0, 0.5, 2)]
    assert distances == sorted(distances)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_samples_have_the_datas_variance(solver):
    assert frechet(solver, 200, 0.5) < 1e-3 * SPECTRUM.sum()


def edm_algorithm_2(denoise, latents, steps, churn, noises):
    """Algorithm 2 of Karras et al. (2206.00364), written from the paper; at S_noise = 1 and with no bound on the churned levels."""
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
    latents = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    noises = torch.randn(18, 2, 3, 8, 8, dtype=torch.float64)
    denoise = lambda x, t: torch.tanh(x / (1 + t)) + 0.1 * x.flip(-1) / (1 + t)                 # any denoiser, linear or not
    edm = edm_algorithm_2(denoise, latents, 18, churn, iter(noises))
    draws = iter(noises)
    ours = sample(lambda x, t: (denoise(x, t), torch.zeros_like(x)), BlurNoisePath(0), latents, churn=churn, noise=lambda: next(draws))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, edm, rtol=0, atol=1e-10)


def test_without_noise_a_step_is_cold_diffusions_algorithm_2():
    x, path = torch.randn(2, 3, 8, 12, dtype=torch.float64), BlurNoisePath(math.inf)
    restore = lambda x, t: torch.tanh(x) * (1 + t)
    net = lambda x, t: (x, restore(x, t) - x)                   # D = x, as sigma = 0 has it
    times = torch.tensor([6., 3., 1., 0.], dtype=torch.float64)
    ours, cold = solve(net, path, x, times, "euler"), x
    for t, s in zip(times[:-1], times[1:]):
        estimate = restore(cold, t)
        cold = cold - blur(estimate, t) + blur(estimate, s)
    torch.testing.assert_close(ours, cold, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_step_of_no_length_returns_the_state_whatever_the_heads_answer(solver):
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    net = lambda x, t: (x.sin(), x.cos())
    assert torch.equal(solve(net, BlurNoisePath(0.5), x, torch.tensor([2., 2.]), solver), x)


@pytest.mark.parametrize("bnr", [0, 0.5, 2])
def test_churn_leaves_the_marginals_exact(bnr):
    """From x at t, known x0, (4) gives mean M_that x0 and variance sigma_that^2 in every frequency: those of (1) at t_hat."""
    path, t, t_hat, n = BlurNoisePath(bnr), 0.7, 0.9, 20_000
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 1, 6, 4, dtype=torch.float64, generator=g)
    noise, fresh = torch.randn(2, n, 1, 6, 4, dtype=torch.float64, generator=g)
    x = degrade(x0.expand(n, -1, -1, -1), t, path, noise)[0]
    u = dct2(climb(x, t, t_hat, path, fresh))
    m = torch.exp(-frequencies(6, 4) * (bnr * t_hat) ** 2 / 2)
    assert ((u.mean(0) - m * dct2(x0[0])) / (t_hat / math.sqrt(n))).abs().max() < 4.5
    assert (u.var(0) / t_hat ** 2 - 1).abs().max() < 4.5 * math.sqrt(2 / n)


def test_churn_climbs_where_both_attenuations_underflow():
    x = torch.ones(1, 1, 64, 64, dtype=torch.float64)
    assert climb(x, 70., 80., BlurNoisePath(10), torch.ones_like(x)).isfinite().all()


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_churn_samples_the_gaussian(solver):
    spectrum, path, n = power_law(6, 6), BlurNoisePath(0.5), 4000
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(n, 1, 6, 6, dtype=torch.float64, generator=g)
    x = sample(gaussian_heads(spectrum, path), path, draw(), steps=200, solver=solver, churn=40, noise=draw)
    assert (dct2(x).var(0) / spectrum - 1).abs().max() < (0.15 if solver == "heun" else 0.25)  # 5 standard errors are 0.11; Euler's own is the rest


def test_churn_keeps_to_its_levels():
    drawn = []
    def noise():
        drawn.append(1)
        return torch.zeros(1, 1, 4, 4)
    net = lambda x, t: (x * 0, x * 0)
    sample(net, BlurNoisePath(0.5), torch.zeros(1, 1, 4, 4), steps=18, churn=40, s_min=0.05, s_max=50, noise=noise)
    assert len(drawn) == sum(0.05 <= t <= 50 for t in time_steps(18))


@pytest.mark.parametrize("bnr", [0.5, 2])
def test_the_integral_of_multistep_is_the_closed_form(bnr):
    x = torch.zeros(1, 1, 8, 16, dtype=torch.float64)
    c = frequencies(8, 16) * bnr ** 2 / 2
    primitive = lambda q: -torch.exp(-c * q ** 2) / q - torch.sqrt(math.pi * c) * torch.erf(c.sqrt() * q)
    t = time_steps(6).tolist()
    for a, b in zip(t[:-2], t[1:-1]):
        torch.testing.assert_close(integral(a, b, BlurNoisePath(bnr), x), primitive(a) - primitive(b), rtol=1e-6, atol=1e-9 / b)


def test_multistep_is_exact_where_the_estimate_is_linear():
    """dy = x0_hat d(M / sigma) with x0_hat = a + k l, integrated finely by a rule of its own."""
    path, x = BlurNoisePath(0.5), torch.randn(1, 1, 8, 8, dtype=torch.float64)
    a, k = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64)
    net = lambda x, t: (a - k * math.log(t), torch.zeros_like(x))
    times = torch.tensor([5., 3., 1.5], dtype=torch.float64)
    ours = solve(net, path, x, times, "multistep")
    m = lambda q: torch.exp(-frequencies(8, 8) * (0.5 * q) ** 2 / 2)
    first = 3 / 5 * dct2(x) + (m(3.) - 3 / 5 * m(5.)) * dct2(net(x, 5.)[0])
    q = torch.logspace(math.log10(3), math.log10(1.5), 4001, dtype=torch.float64)
    y = torch.stack([m(v) / v for v in q.tolist()])
    estimate = torch.stack([dct2(net(x, v)[0])[0, 0] for v in ((q[1:] * q[:-1]).sqrt()).tolist()])
    torch.testing.assert_close(dct2(ours), first / 3 * 1.5 + 1.5 * (estimate * y.diff(dim=0)).sum(0), rtol=1e-6, atol=1e-6)


def test_multisteps_last_step_is_the_estimate_itself():
    x, last = torch.randn(1, 1, 4, 4, dtype=torch.float64), []
    net = lambda x, t: (x.sin().float(), x.cos().float())
    ours = solve(net, BlurNoisePath(0.5), x, torch.tensor([3., 1., 0.]), "multistep", watch=lambda t, x, d, r: last.append((d, r)))
    assert ours.dtype == last[-1][0].dtype == torch.float64     # whatever type the network answers in
    assert torch.equal(ours, sum(last[-1]))


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
@pytest.mark.parametrize("bnr", [0, 0.5, 2])
def test_a_finite_data_set_comes_back(solver, bnr):
    g = torch.Generator().manual_seed(0)
    points = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=g) * 2 - 1
    path = BlurNoisePath(bnr)
    latents = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=g)
    x = sample(points_heads(points, path), path, latents, steps=40, solver=solver)
    distance, nearest = (x[:, None] - points[None]).abs().amax((2, 3, 4)).min(1)
    assert distance.max() < 1e-3 and len(set(nearest.tolist())) > 1


def test_time_steps_are_edms():
    t = time_steps(18)
    assert t.dtype == torch.float64 and len(t) == 19 and t[-1] == 0
    assert t[0].item() == pytest.approx(80, rel=1e-12) and t[17].item() == pytest.approx(0.002, rel=1e-12)
    assert t[5].item() == pytest.approx((80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, rel=1e-12)
    assert time_steps(1).tolist() == pytest.approx([80, 0])


def test_network_evaluations():
    for solver, nfe in (("euler", 18), ("heun", 35), ("multistep", 18)):
        asked = []
        def net(x, t):
            asked.append(float(t))
            assert x.dtype == torch.float64
            return x * 0, x * 0
        sample(net, BlurNoisePath(0.5), torch.zeros(1, 1, 4, 4), solver=solver)
        assert len(asked) == nfe and min(asked) > 0


def test_what_makes_no_sense_is_refused():
    x, net = torch.zeros(1, 1, 4, 4), lambda x, t: (x, x)
    for kw, words in ((dict(solver="rk4"), "euler, heun or multistep"), (dict(solver="multistep", churn=1.), "no churn")):
        with pytest.raises(ValueError, match=words):
            sample(net, BlurNoisePath(0.5), x, **kw)
    with pytest.raises(ValueError, match="path with noise"):
        solve(net, BlurNoisePath(math.inf), x, time_steps(4), "multistep")
    with pytest.raises(ValueError, match="give colour"):
        sample(net, BlurNoisePath(math.inf), x)


def test_a_seeds_noise_does_not_see_its_batch():
    alone, batch = seed_noise([7], (3, 5, 5)), seed_noise(range(64), (3, 5, 5))
    for _ in range(3):
        assert torch.equal(alone()[0], batch()[7])


def test_a_seeds_picture_does_not_see_its_batch():
    spectrum = power_law(8, 8)
    net = as_model(gaussian_heads(spectrum, BlurNoisePath(0.5)), BlurNoisePath(0.5))
    draw = lambda seeds, batch: torch.cat(list(generate(net, (3, 8, 8), seeds, "cpu", batch, churn=10)))
    torch.testing.assert_close(draw([7], 1)[0], draw(list(range(64)), 64)[7], rtol=0, atol=1e-9)
    torch.testing.assert_close(draw(list(range(10)), 3)[7], draw([7], 1)[0], rtol=0, atol=1e-9)


def test_a_picture_degraded_a_little_comes_back_near():
    spectrum, path = power_law(16, 16), BlurNoisePath(0.5)
    net = as_model(gaussian_heads(spectrum, path), path)
    x0 = gaussian_pictures(1, 3, spectrum, torch.Generator().manual_seed(0))
    near, far = (torch.cat(list(generate(net, (3, 16, 16), [0, 1], "cpu", init=x0, level=level))) for level in (0.05, 5.))
    assert (near - x0).std() < 0.1 < (far - x0).std()
