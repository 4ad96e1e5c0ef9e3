"""Draws from p(x0 | y) by ancestral steps, encoding, and their command line, on data whose
posterior is known."""
import math

import numpy as np
import pytest
import torch

import sample as program
from degrade import (BlurringSchedule, ColdSchedule, ConstantBNR, blur, dct2, degrade, frequencies,
                     idct2)
from exact import (gaussian_heads, gaussian_images, m_of, mixture_heads, mixture_posterior, normals,
                   power_law)
from runs import command_line, refused, save_model
from sample import ancestral, ancestral_step, encode, generate, restoring_schedule, sample
from study import restore as study
from util.checkpoint import load_model
from util.cli import UserError
from util.images import read_image, save_image, to_uint8

H = 4
W = 5
PIXELS = torch.eye(H * W, dtype=torch.float64)


# Gaussian data


def even(high, low, n):
    """n steps, even in ln sigma."""
    return high * (low / high) ** torch.linspace(0, 1, n + 1, dtype=torch.float64)


def blur_matrix(alpha):
    """Blur by alpha pixels as a matrix on the pixels of an image: [H W, H W]."""
    return blur(PIXELS.reshape(-1, 1, H, W), alpha).reshape(H * W, H * W).T


def covariance():
    """Of Gaussian images whose frequencies are not independent: [H W, H W]."""
    root = normals(H * W, H * W, seed=3) / 6
    return root @ root.T + 0.02 * PIXELS


def matrix_heads(c):
    """The exact heads for Gaussian images of covariance c, by Bayes' rule on their pixels."""
    def net(x, alpha, sigma):
        b = blur_matrix(alpha)
        noisy = b @ c @ b.T + sigma ** 2 * PIXELS
        x0_hat = c @ b.T @ torch.linalg.solve(noisy, x.reshape(-1, H * W).T)    # [H W, B]
        d = (b @ x0_hat).T.reshape(x.shape)
        return d, x0_hat.T.reshape(x.shape) - d
    return net


def law_of_draws(net, schedule, times):
    """What ancestral steps with linear heads make of a given y: the matrix [H W, H W] that their
    mean multiplies y by, and their covariance. One image carries one pixel of y, or one pixel of
    the noise of one step."""
    pixels = PIXELS.reshape(-1, 1, H, W)
    count = H * W * len(times)
    x = torch.zeros(count, 1, H, W, dtype=torch.float64)
    x[:H * W] = pixels
    drawn = 0

    def randn():
        nonlocal drawn
        drawn += 1
        noise = torch.zeros_like(x)
        noise[drawn * H * W:(drawn + 1) * H * W] = pixels
        return noise
    out = ancestral(net, schedule, x, times, randn).reshape(count, H * W).T
    noises = out[:, H * W:]
    return out[:, :H * W], noises @ noises.T


def posterior(c, schedule, high, low):
    """The same for the state at level low, given that at level high."""
    alpha, sigma = schedule.levels(low)
    alpha_y, sigma_y = schedule.levels(high)
    b = blur_matrix(alpha)
    more = blur_matrix((alpha_y ** 2 - alpha ** 2).sqrt())
    state = b @ c @ b.T + sigma ** 2 * PIXELS
    fresh = sigma_y ** 2 * PIXELS - sigma ** 2 * more @ more.T     # the forward process is Markov
    gain = state @ more.T @ (more @ state @ more.T + fresh).inverse()
    return gain, state - gain @ more @ state


@pytest.mark.parametrize("schedule", [ConstantBNR(0), ConstantBNR(0.8), ConstantBNR(5),
                                      BlurringSchedule()])
def test_draws_have_the_posteriors_mean_and_covariance(schedule):
    """The mean is exact at any number of steps. The covariance is of second order."""
    c = covariance()
    expected_mean, expected_covariance = posterior(c, schedule, 0.6, 0.02)
    errors = []
    for n in (20, 40, 80):
        mean, cov = law_of_draws(matrix_heads(c), schedule, even(0.6, 0.02, n))
        assert torch.allclose(mean, expected_mean, rtol=0, atol=1e-10)
        errors.append((cov - expected_covariance).norm() / expected_covariance.norm())
    assert errors[0] < 0.05 and errors[2] < 0.01
    if isinstance(schedule, ConstantBNR):       # the other takes more steps to show its order
        assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.35)


def impulses(n, side):
    """A function whose i-th call returns noise that image i alone has, 1 in every frequency: of
    images 0 to n."""
    drawn = 0

    def randn():
        nonlocal drawn
        drawn += 1
        u = torch.zeros(1 + n, 1, side, side, dtype=torch.float64)
        u[drawn] = 1
        return idct2(u)
    return randn


def test_eighteen_evaluations_draw_images_with_the_posteriors_variance():
    """By the time steps that sample takes, for photographs' spectrum: total variance within 7 %."""
    spectrum = power_law(16, 16)
    n = 18
    for alpha, sigma in ((1., 0.1), (1., 0.3), (0.5, 0.3), (2., 0.4), (0., 0.3)):
        randn = impulses(n, 16)
        z = randn()                                             # y has no share in the variance
        y = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
        out = sample(gaussian_heads(spectrum), ConstantBNR(alpha / sigma), z, n, y=y, level=sigma,
                     solver="ancestral", randn=randn)
        m = m_of(alpha, 16, 16)[0, 0]
        expected = spectrum * sigma ** 2 / (m ** 2 * spectrum + sigma ** 2)
        variance = dct2(out[1:]).square().sum((0, 1))
        assert variance.sum() == pytest.approx(expected.sum().item(), rel=0.07)
        assert (variance > 0.8 * expected).all()


# Heads that disagree, and data that are not Gaussian


def test_heads_that_disagree_lead_where_the_reverse_process_leads():
    """Per frequency, with D = q u and x0_hat = p u: mean and variance by Runge-Kutta."""
    lam = frequencies(3, 3)
    schedule = ConstantBNR(0.7)
    high = 1.
    low = 0.05

    def m_at(sigma):
        return torch.exp(-lam * (0.7 * sigma) ** 2 / 2)

    def net(x, alpha, sigma):
        u = dct2(x)
        d = idct2(0.8 / (1 + sigma) * u)
        return d, idct2(0.5 * u) - d

    def slopes(sigma, mean, variance):
        d_ln_m = -lam * 0.7 ** 2 * sigma
        a = 2 * (d_ln_m * m_at(sigma) * 0.5 + (1 - 0.8 / (1 + sigma)) / sigma) - d_ln_m
        return a * mean, 2 * a * variance - (2 * sigma - 2 * d_ln_m * sigma ** 2)

    mean = torch.ones(3, 3, dtype=torch.float64)
    variance = torch.zeros(3, 3, dtype=torch.float64)
    levels = even(high, low, 2000).tolist()
    for t, s in zip(levels, levels[1:]):                        # the midpoint rule
        h = s - t
        d_mean, d_variance = slopes(t, mean, variance)
        middle = slopes(t + h / 2, mean + h / 2 * d_mean, variance + h / 2 * d_variance)
        mean = mean + h * middle[0]
        variance = variance + h * middle[1]

    n = 400
    x = torch.zeros(1 + n, 1, 3, 3, dtype=torch.float64)
    x[0] = 1
    out = dct2(ancestral(net, schedule, idct2(x), even(high, low, n), impulses(n, 3)))[:, 0]
    assert torch.allclose(out[0], mean, rtol=0.02)
    assert torch.allclose(out[1:].square().sum(0), variance, rtol=0.02)


def test_draws_fall_into_the_components_of_a_mixture_as_often_as_they_should():
    means = 0.4 * normals(3, 4, 4, seed=5)
    spectrum = power_law(4, 4, total=0.02)

    net = mixture_heads(means, spectrum)
    alpha = 0.6
    sigma = 0.8
    m = m_of(alpha, 4, 4)
    u = m * (0.45 * means[0] + 0.35 * means[1] + 0.2 * means[2])                # between them
    weights, of_each, variance = mixture_posterior(means, spectrum, u, m, sigma ** 2)
    n = 3000
    out = torch.cat(list(generate(net, ConstantBNR(alpha / sigma), (1, 4, 4), range(n), "cpu", n,
                                  y=idct2(u), level=sigma, solver="ancestral", steps=36)))
    u0 = dct2(out)                                                              # [n, 1, 4, 4]
    distances = ((u0 - of_each).square() / variance).sum((2, 3))                # [n, 3]
    component = distances.argmin(1)
    shares = component.bincount(minlength=3) / n
    assert 0.15 < weights.min() and weights.max() < 0.6
    assert shares.tolist() == pytest.approx(weights[0].tolist(), abs=0.03)
    for k in range(3):
        of_k = u0[component == k, 0]
        error = (of_k.mean(0) - of_each[0, k]).abs() / (variance[0, 0] / len(of_k)).sqrt()
        assert error.max() < 6
        assert (of_k.var(0) / variance[0, 0]).mean() == pytest.approx(1, abs=0.08)


def test_a_step_of_no_length_returns_the_state_whatever_the_heads_are():
    x, d, x0_hat, ahead, noise = normals(5, 2, 3, 8, 8)
    same = ancestral_step(x, d, x0_hat, ahead, 2., 2., ConstantBNR(0.5), noise)
    assert torch.allclose(same, x, atol=1e-12)


def test_one_step_is_the_posterior_mean_and_the_flow_is_one_point():
    net = gaussian_heads(power_law(8, 8))
    schedule = ConstantBNR(2)
    y = normals(1, 3, 8, 8)
    options = {"y": y, "level": 0.3}
    alpha, sigma = schedule.levels(0.3)

    def restored(**more):
        return torch.cat(list(generate(net, schedule, (3, 8, 8), range(3), "cpu", **options,
                                       **more)))
    mean = restored(solver="ancestral", steps=1)
    assert torch.allclose(mean, sum(net(y, alpha, sigma)).expand(3, -1, -1, -1))
    assert restored(solver="heun").var(0).max() < 1e-20
    draws = restored(solver="ancestral")
    assert draws.var(0).mean() > 1e-3
    alone = next(generate(net, schedule, (3, 8, 8), [1], "cpu", solver="ancestral", **options))
    assert torch.allclose(alone, draws[1:2])                    # not of its batch


# Encoding


@pytest.mark.parametrize("schedule", [ConstantBNR(0), ConstantBNR(0.5)])
def test_an_encoded_image_is_sampled_again(schedule):
    spectrum = power_law(8, 8)
    net = gaussian_heads(spectrum)
    x0 = gaussian_images(2, 1, spectrum, torch.Generator().manual_seed(0))

    def round_trip(steps):
        return sample(net, schedule, encode(net, schedule, x0, steps), steps) - x0
    assert round_trip(18).square().mean().sqrt() < 2 / 255
    assert round_trip(40).square().mean().sqrt() < 0.2 / 255
    assert round_trip(1000).abs().max() < 1e-6


def test_z_is_unit_normal_and_what_the_flow_says():
    spectrum = power_law(8, 8)
    schedule = ConstantBNR(0.5)
    x0 = gaussian_images(50, 1, spectrum, torch.Generator().manual_seed(0))
    z = encode(gaussian_heads(spectrum), schedule, x0, 400)
    expected = dct2(x0) / spectrum.sqrt() * (1 + m_of(40, 8, 8)[0, 0] ** 2 * spectrum / 80 ** 2)
    assert torch.allclose(dct2(z), expected, atol=2e-3)
    with pytest.raises(UserError, match="encode needs a schedule with noise"):
        encode(gaussian_heads(spectrum), ColdSchedule(), x0)


# Ranges


def test_sigma_min_and_sigma_max_replace_the_schedules_range():
    class Narrow(ConstantBNR):
        def sigma_range(self, h, w):
            return 0.01, 20.
    net = gaussian_heads(power_law(8, 8))
    z = normals(2, 1, 8, 8)
    for solver in ("heun", "multistep"):
        wide = sample(net, ConstantBNR(0.5), z, solver=solver)
        outside = sample(net, ConstantBNR(0.5), z, solver=solver, sigma_min=0.01, sigma_max=20.)
        assert torch.equal(outside, sample(net, Narrow(0.5), z, solver=solver))
        assert not torch.equal(outside, wide)
    with pytest.raises(UserError, match="not from level 0.01 to 20"):
        sample(net, ConstantBNR(0.5), z, sigma_min=20., sigma_max=0.01)


# The command line


@pytest.fixture
def degraded(tmp_path):
    """A file of a blurred and noisy image."""
    x, _ = degrade(normals(1, 3, 8, 8) / 3, 1., 0.1, normals(1, 3, 8, 8, seed=1))
    save_image(to_uint8(x)[0], tmp_path / "y.png")
    np.save(tmp_path / "y.npy", x[0].float().numpy())
    return tmp_path


def restore(folder, ckpt, *more, y="y.png", blur=1, noise=0.1):
    command_line(program.main, "--ckpt", ckpt, "--device", "cpu", "--out", folder / "out",
                 "--seeds", "0-2", "--restore", folder / y, "--blur", blur, "--noise", noise, *more)


def test_restore_draws_an_image_a_seed_and_shows_the_input_first(degraded, capsys):
    restore(degraded, save_model(degraded / "any.pt"))
    out = degraded / "out"
    assert capsys.readouterr().out.splitlines()[-1] == \
        (f"3 images in {out}/, all, after the given one, in {out}-grid.png; ancestral, 18 steps, "
         "NFE 18 (network evaluations per image)")
    files = sorted((degraded / "out").glob("*.png"))
    images = [read_image(name, 3, 8, 8) for name in files]
    assert len(images) == 3 and not torch.equal(images[0], images[1])
    grid = read_image(degraded / "out-grid.png", 3, 132, 132)
    side = 8 * 8                                # each image is enlarged, with a border of a pixel
    y = read_image(degraded / "y.png", 3, 8, 8)
    for image, (top, left) in zip([y, *images], ((1, 1), (1, 67), (67, 1), (67, 67))):
        assert torch.equal(grid[:, :, top:top + side:8, left:left + side:8], image)


def test_the_mean_is_one_evaluation_and_npy_is_not_clipped(degraded):
    ckpt = save_model(degraded / "any.pt")
    net, _ = load_model(ckpt)
    y = torch.from_numpy(np.load(degraded / "y.npy"))[None]
    y[0, 0, 0, 0] = 1.5
    np.save(degraded / "y.npy", y[0].numpy())
    restore(degraded, ckpt, "--mean", y="y.npy")
    d, r = net(y.double(), torch.tensor(1.).double(), torch.tensor(0.1).double())
    [file] = (degraded / "out").glob("*.png")
    assert torch.equal(read_image(file, 3, 8, 8), to_uint8(d.double() + r.double()))


def test_init_is_in_the_grid_too(degraded):
    command_line(program.main, "--ckpt", save_model(degraded / "any.pt"), "--device", "cpu",
                 "--out", degraded / "out", "--seeds", "0", "--init", degraded / "y.png")
    grid = read_image(degraded / "out-grid.png", 3, 66, 132)
    assert torch.equal(grid[:, :, 1:65:8, 1:65:8], read_image(degraded / "y.png", 3, 8, 8))


@pytest.mark.parametrize("bnr, schedule, blur, noise, same_as", [
    ("any", None, 2., 0.4, ConstantBNR(5)), ("any", None, 0., 0.4, ConstantBNR(0)),
    (0.5, None, 0.201, 0.4, ConstantBNR(0.5)), (0, None, 0., 0.4, ConstantBNR(0)),
    (None, "blurring", 10., 1., BlurringSchedule()), (math.inf, None, 2., 0., ColdSchedule())])
def test_the_schedule_goes_through_the_images_levels(bnr, schedule, blur, noise, same_as):
    found = restoring_schedule({"config": {"bnr": bnr, "schedule": schedule}}, blur, noise)
    assert type(found) is type(same_as)
    assert torch.equal(torch.stack(found.levels(0.7)), torch.stack(same_as.levels(0.7)))


@pytest.mark.parametrize("bnr, blur, noise, words", [
    ("any", 2, 0.1, "a blur of at most 1 pixels, not 2"), ("any", 1, 0, "knows noise above 0"),
    (0.5, 1, 0.1, "knows a blur of 0.05 pixels with noise 0.1, not 1 with 0.1"),
    (0.5, 1, 0, "a blur of 0 pixels with noise 0, not 1 with 0"),
    (math.inf, 1, 0.1, "knows a blur of 1 pixels with noise 0, not 1 with 0.1")])
def test_levels_that_the_network_does_not_know_are_one_line(bnr, blur, noise, words):
    with pytest.raises(UserError, match=words):
        restoring_schedule({"config": {"bnr": bnr, "schedule": None}}, blur, noise)


def test_a_cold_network_restores_what_is_only_blurred(degraded):
    restore(degraded, save_model(degraded / "cold.pt", math.inf), noise=0)
    images = [file.read_bytes() for file in (degraded / "out").glob("*.png")]
    assert len(images) == 3 and len(set(images)) == 1           # without noise there is one answer


@pytest.mark.parametrize("more, words", [
    (["--steps", "2", "--solver", "heun"], "takes none of"), (["--bnr", "2"], "takes none of"),
    (["--restore", "large.png"], "9 x 8 pixels, and must have 8 x 8"),
    (["--restore", "ints.npy"], "has int64 [3, 8, 8], and must have finite floats [3, 8, 8]"),
    (["--restore", "text.npy"], "text.npy is not an array"),
    (["--restore", "absent.npy"], "absent.npy: No such file"),
    (["--blur", "0.01", "--noise", "0.001"], "not from level 0.001 to 0.002")])
def test_what_cannot_be_restored_is_one_line(degraded, capsys, monkeypatch, more, words):
    monkeypatch.chdir(degraded)
    save_image(torch.zeros(3, 8, 9, dtype=torch.uint8), "large.png")
    np.save("ints.npy", np.zeros((3, 8, 8), dtype=int))
    (degraded / "text.npy").write_text("no array")
    line = refused(capsys, program.main, "--ckpt", save_model("any.pt"), "--device", "cpu",
                   "--restore", "y.png", "--blur", 1, "--noise", 0.1, *more)
    assert words in line


def test_the_range_of_levels_is_an_option(degraded):
    ckpt = save_model(degraded / "any.pt")
    command_line(program.main, "--ckpt", ckpt, "--device", "cpu", "--out", degraded / "out",
                 "--seeds", "0", "--sigma-min", "0.01", "--sigma-max", "5", "--steps", "3")
    net, _ = load_model(ckpt)
    x = next(generate(net, ConstantBNR(0.5), (3, 8, 8), [0], steps=3, sigma_min=0.01, sigma_max=5.))
    assert torch.equal(read_image(degraded / "out/000000.png", 3, 8, 8), to_uint8(x))


def test_blur_and_noise_belong_to_restore(degraded, capsys):
    line = refused(capsys, program.main, "--ckpt", save_model(degraded / "any.pt"), "--blur", 1)
    assert "belong to --restore" in line


# The study's program


def test_the_wiener_filter_is_the_posterior_mean_of_gaussian_images():
    spectrum = power_law(4, 4)
    generator = torch.Generator().manual_seed(0)
    x0 = 0.3 + gaussian_images(400, 3, spectrum, generator)
    others = 0.3 + gaussian_images(40000, 3, spectrum, generator)
    y = study.degraded(x0, 0.7, 0.2, "cpu")
    levels = torch.tensor([0.7, 0.2], dtype=torch.float64)
    d, r = gaussian_heads(spectrum)(y - 0.3, *levels)
    restored = study.wiener(y, others, 0.7, 0.2)
    assert (restored - 0.3 - d - r).square().mean() < 1e-3 * (restored - x0).square().mean()


def test_a_network_of_one_ratio_is_tried_at_that_ratio():
    config = {"bnr": 0.5, "schedule": None, "mean_color": None}
    assert study.levels_of({"config": config}) == [(0.05, 0.1), (0.15, 0.3), (0.2, 0.4)]
    with pytest.raises(UserError, match="with noise, which --bnr inf does not have"):
        study.levels_of({"config": {"bnr": math.inf, "schedule": None, "mean_color": {"mean": 0}}})
