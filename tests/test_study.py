"""The study: paths, spectra, parameterizations, cold, blind, classes, and the distance from the manifold."""
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import degrade as degrade_script
import sample as sample_script
import train
from data import Pictures, normalize, to_uint8
from degrade import BlurNoisePath, BlurringPath, blur, cut_offs, dct2, degrade, frequencies, idct2, level_range, spectrum
from exact import as_model, gaussian_heads, gaussian_pictures, m_of, points_heads, power_law
from loss import disentangled_loss, training_levels
from model import Denoiser, UNet, residual_size
from sample import climb, generate, integral, load_model, manifold, plain, read_level, sample, solve, time_steps

COLD, BLURRING = BlurNoisePath(math.inf), BlurringPath()
COLOUR = {"mean": [0.2, -0.1, 0.4], "cov": [[0.3, 0.1, 0.], [0.1, 0.2, 0.05], [0., 0.05, 0.1]]}
SMALL = dict(channels=8, mult=(1, 2), blocks=1, attention=(4,), resolution=8)


def test_the_blurring_path_is_hoogeboom_and_salimans_schedule():
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)  # their time: signal cos, noise sin, blur 20 sin^2, all of pi u / 2
    alpha, sigma = BLURRING.levels(torch.tan(math.pi * u / 2))
    torch.testing.assert_close(alpha, 20 * torch.sin(math.pi * u / 2) ** 2)
    torch.testing.assert_close(sigma, torch.sin(math.pi * u / 2) / torch.cos(math.pi * u / 2))
    assert (alpha / sigma).max().item() == pytest.approx(10) and sigma[(alpha / sigma).argmax()].item() == pytest.approx(1)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_order_of_convergence_on_the_blurring_path(solver, order):
    """Against the exact gain sqrt of (M^2 S + sigma^2) at the end over that at the start."""
    s, error = power_law(16, 16), []
    variance = lambda t: m_of(BLURRING.levels(t)[0], 16, 16)[0, 0] ** 2 * s + t ** 2
    for n in (288, 576, 1152):                                  # multistep comes to its order late on this path
        x = idct2(torch.ones(1, 1, 16, 16, dtype=torch.float64))
        gain = dct2(solve(gaussian_heads(s, BLURRING), BLURRING, x, time_steps(n)[:-1], solver))[0, 0]
        error.append(80 * (gain - (variance(0.002) / variance(80.)).sqrt()).square().sum().sqrt())
    for coarse, fine in zip(error, error[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_the_blurring_path_needs_more_steps():
    """Table 4 and Figure 5 in miniature: the Frechet distance that Heun's steps alone leave, with exact heads; -s shows it."""
    s = power_law(32, 32)
    x = idct2(torch.ones(1, 1, 32, 32, dtype=torch.float64))
    paths = {**{f"BNR {b}": BlurNoisePath(b) for b in (0, 0.5, 2, 10)}, "blurring": BLURRING}
    distance = {}
    for steps in (9, 18, 36):
        for name, path in paths.items():
            gain = dct2(solve(gaussian_heads(s, path), path, x, time_steps(steps)))[0, 0]
            distance[steps, name] = (80 * gain.abs() - s.sqrt()).square().sum().item()
        print("\n" * (steps == 9) + f"NFE {2 * steps - 1}: " + ", ".join(f"{name} {distance[steps, name]:.3g}" for name in paths))
    for steps in (18, 36):
        assert min(distance[steps, "blurring"], distance[steps, "BNR 10"]) > 5 * distance[steps, "BNR 0.5"] > 5 * distance[steps, "BNR 0"]


def test_multisteps_integral_on_the_blurring_path():
    x, a, b = torch.zeros(1, 1, 8, 16, dtype=torch.float64), 3., 0.5
    q = torch.logspace(math.log10(a), math.log10(b), 20001, dtype=torch.float64)
    values = torch.exp(-frequencies(8, 16) * (20 * q ** 2 / (1 + q ** 2))[:, None, None] ** 2 / 2) / q[:, None, None]
    torch.testing.assert_close(integral(a, b, BLURRING, x), -torch.trapezoid(values, q.log(), dim=0), rtol=1e-6, atol=1e-9)


def test_churn_on_the_blurring_path_leaves_the_marginals_exact():
    t, t_hat, n, g = 0.7, 0.9, 20_000, torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 1, 6, 4, dtype=torch.float64, generator=g)
    noise, fresh = torch.randn(2, n, 1, 6, 4, dtype=torch.float64, generator=g)
    u = dct2(climb(degrade(x0.expand(n, -1, -1, -1), t, BLURRING, noise)[0], t, t_hat, BLURRING, fresh))
    m = torch.exp(-frequencies(6, 4) * (20 * t_hat ** 2 / (1 + t_hat ** 2)) ** 2 / 2)
    assert ((u.mean(0) - m * dct2(x0[0])) / (t_hat / math.sqrt(n))).abs().max() < 4.5
    assert (u.var(0) / t_hat ** 2 - 1).abs().max() < 4.5 * math.sqrt(2 / n)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_a_finite_data_set_comes_back_on_the_blurring_path(solver):
    g = torch.Generator().manual_seed(0)
    points = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=g) * 2 - 1
    x = sample(points_heads(points, BLURRING), BLURRING, torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=g), 200, solver)
    distance, nearest = (x[:, None] - points[None]).abs().amax((2, 3, 4)).min(1)
    assert distance.max() < 1e-3 and len(set(nearest.tolist())) > 1


def test_the_spectrum_is_what_the_pictures_were_made_with():
    s = power_law(32, 24, total=0.5)
    x = gaussian_pictures(400, 3, s, torch.Generator().manual_seed(0))
    lam, power = spectrum(x)
    a = (s * frequencies(32, 24))[1, 0]
    assert torch.all(lam.diff() > 0) and len(lam) > 8
    assert ((lam * power).log() - a.log()).abs().max() < 0.1 and np.polyfit(lam.log(), power.log(), 1)[0] == pytest.approx(-1, abs=0.02)
    assert spectrum(torch.randn(400, 3, 32, 24, dtype=torch.float64))[1].numpy() == pytest.approx(1, rel=0.1)              # white noise is flat


def test_both_cut_offs_coincide_at_one_over_the_root_of_a():
    lam = torch.logspace(-3, 2, 50, dtype=torch.float64)
    a, times = 0.27, [0.05, 0.3, 1.7]
    white, black, orange, blue = (torch.tensor(c) for c in ((1., 1, 1), (-1., -1, -1), (1., 0.4, -1), (-1., 0, 1)))
    share = lambda bnr, colour: torch.stack(cut_offs(lam, a / lam, 32, 32, bnr, times)).sub(colour[:, None, None]).abs().amax(1).lt(1e-6).double().mean((1, 2))
    both = share(a ** -0.5, white) + share(a ** -0.5, black)
    assert (both > 0.99).all() and (share(a ** -0.5, black).diff() > 0).all()
    for bnr, colour in ((0.5 * a ** -0.5, orange), (2 * a ** -0.5, blue)):
        assert (share(bnr, colour) > 0).any() and (share(bnr, white) + share(bnr, black) + share(bnr, colour)).min() > 0.999


def test_the_spectrum_from_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "set").mkdir()
    for i in range(20):
        x = to_uint8(gaussian_pictures(1, 3, power_law(16, 16, 0.05), torch.Generator().manual_seed(i)))
        Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(tmp_path / f"set/{i}.png")
    monkeypatch.setattr(sys, "argv", ["degrade.py", "--data", str(tmp_path / "set"), "--resolution", "16", "--out", str(tmp_path / "d.png"), "--bnr", "1", "3"])
    degrade_script.main()
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [list(map(float, r)) for r in table if len(r) == 5 and r[0][0].isdigit()]
    for f, s, sigma, alpha, bnr in rows:
        assert (sigma, alpha, bnr) == pytest.approx((s ** 0.5, 1 / f, 1 / (f * s ** 0.5)), rel=0.01)
    slope = next(float(r[-1][2:]) for r in table if r[:2] == ["power", "falls"])
    assert slope == pytest.approx(2, abs=0.15) and rows[0][4] == pytest.approx((power_law(16, 16, 0.05) * frequencies(16, 16))[1, 0].item() ** -0.5, rel=0.2)
    assert Image.open(tmp_path / "d-spectrum.png").height < Image.open(tmp_path / "d.png").height


class Answer(torch.nn.Module):
    """A network that answers a fixed picture for each output channel, and remembers what it was asked."""
    in_channels, classes = 3, 0

    def __init__(self, out_channels):
        super().__init__()
        self.out_channels = out_channels
        self.f = torch.randn(out_channels, 8, 8, generator=torch.Generator().manual_seed(0))

    def forward(self, x, c_noise, augment=None, label=None):
        self.asked = x, c_noise
        return self.f.expand(len(x), -1, -1, -1)


@pytest.mark.parametrize("path", [BlurNoisePath(0), BlurNoisePath(0.5), BLURRING])
def test_the_x0_parameterization_by_hand(path):
    net, x = Denoiser(Answer(3), path, param="x0"), torch.randn(2, 3, 8, 8)
    for s in (0.05, 3.):
        d, r = net(x, s)
        total, alpha = s ** 2 + 0.25, path.levels(s)[0]
        x0_hat = 0.25 / total * x + (s ** 2 * 0.25 / total + 0.25 * residual_size(alpha, x).float() ** 2).sqrt() * net.unet.f
        torch.testing.assert_close(d + r, x0_hat)
        torch.testing.assert_close(d, blur(x0_hat, alpha))
        torch.testing.assert_close(net.unet.asked[0], x / math.sqrt(total))
    if path.levels(1.)[0] == 0:
        assert r.abs().max() < 1e-6                             # EDM itself


@pytest.mark.parametrize("path", [BlurNoisePath(0.5), BLURRING])
def test_the_noise_parameterization_by_hand(path):
    net, x, t = Denoiser(Answer(6), path, param="noise"), torch.randn(2, 3, 8, 8), torch.tensor([0.05, 3.])
    d, r = net(x, t)
    torch.testing.assert_close(d, x - t[:, None, None, None] * net.unet.f[:3])
    torch.testing.assert_close(r, 0.5 * residual_size(path.levels(t.double())[0], x).float() * net.unet.f[3:])


@pytest.mark.parametrize("param", ["residual", "x0"])
def test_a_cold_networks_blurry_picture_is_what_it_got(param):
    net, x = Denoiser(Answer(6 if param == "residual" else 3), COLD, param=param, colour=COLOUR), torch.randn(2, 3, 8, 8)
    d, r = net(x, torch.tensor([0.3, 4.]))
    assert torch.equal(d, x)
    torch.testing.assert_close(r, 0.5 * residual_size(torch.tensor([0.3, 4.]), x).float() * net.unet.f[-3:])
    assert net.unet.asked[1].tolist() == pytest.approx([math.log(0.3) / 4, math.log(4.) / 4])


def test_the_cold_loss_is_one_where_nothing_is_learned():
    """On pictures of power 1 / lam and total variance sd^2 the residual has the size that the loss divides by, at every level."""
    s, g = power_law(8, 12), torch.Generator().manual_seed(0)
    s[0, 0] = 0
    s = s * 0.25 / s.mean()
    x0 = gaussian_pictures(20_000, 1, s, g)
    for t in (0.1, 1., 8.):
        denoise, deblur = disentangled_loss(lambda x, t: (x, 0 * x), x0, COLD, t, torch.zeros_like(x0))
        assert deblur.mean().item() == pytest.approx(1, rel=0.02) and not denoise.any()
    undo = lambda x, t: (x, idct2((1 / m_of(t, 8, 12) - 1) * dct2(x)))                          # blur alone can be undone exactly
    assert disentangled_loss(undo, x0, COLD, 1., torch.zeros_like(x0))[1].max() < 1e-12
    levels = torch.tensor([0.1, 1.]).repeat(10_000)
    assert disentangled_loss(lambda x, t: (x, 0 * x), x0, COLD, levels, torch.zeros_like(x0))[1].mean().item() == pytest.approx(1, rel=0.02)


def test_cold_levels_are_uniform_in_their_logarithm():
    torch.manual_seed(0)
    z = training_levels((100_000, 1, 1, 4), COLD).log()
    low, high = math.log(0.1), math.log(4)
    assert low <= z.min() < low + 0.01 and high - 0.01 < z.max() <= high and z.mean().item() == pytest.approx((low + high) / 2, abs=0.02)
    assert level_range(COLD, 12, 20) == (0.1, 20) and level_range(BLURRING, 12, 20) == (0.002, 80)


def test_cold_sampling_starts_from_plain_pictures_of_the_datas_colours():
    x = plain(torch.randn(20_000, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), **COLOUR)
    assert x.shape == (20_000, 3, 4, 6) and torch.equal(x, x[:, :, :1, :1].expand_as(x))
    torch.testing.assert_close(x[:, :, 0, 0].mean(0), torch.tensor(COLOUR["mean"]).double(), rtol=0, atol=0.015)
    torch.testing.assert_close(x[:, :, 0, 0].T.cov(), torch.tensor(COLOUR["cov"]).double(), rtol=0, atol=0.015)
    assert torch.allclose(plain(torch.randn(2, 3, 4, 4), COLOUR["mean"], [[0.] * 3] * 3), torch.tensor(COLOUR["mean"])[:, None, None])


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_cold_sampling_with_one_picture_to_know_ends_there(solver):
    """Heads that know x0 move any start to itself plus what blur took of x0: the high frequencies are x0's, the colour is the start's."""
    x0 = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    net = lambda x, t: (x, x0 - x)
    seen = []
    x = sample(net, COLD, torch.randn(4, 3, 8, 12), solver=solver, steps=6, colour=COLOUR, watch=lambda t, x, d, r: seen.append((t, x)))
    assert [t for t, _ in seen] == pytest.approx(time_steps(6, 0.1, 12)[:-1].tolist())
    expected = dct2(seen[0][1]) + (1 - m_of(12., 8, 12)) * dct2(x0)
    torch.testing.assert_close(dct2(x), expected, rtol=0, atol=1e-10)


def test_a_blind_network_is_told_nothing_of_the_level():
    torch.manual_seed(0)
    net, x = Denoiser(Answer(6), BlurNoisePath(0.5), blind=True), torch.randn(2, 3, 8, 8)
    x[1] *= 100
    d, r = net(x, torch.tensor([0.1, 30.]))
    rho = (x.square().mean((1, 2, 3)) + 1e-6).sqrt()[:, None, None, None]
    torch.testing.assert_close(d, x - rho * net.unet.f[:3])
    torch.testing.assert_close(r, 0.5 * net.unet.f[3:].expand_as(r))
    torch.testing.assert_close(net.unet.asked[0], x / rho)
    assert len(set(net.unet.asked[1].tolist())) == 1 and all(torch.equal(a, b) for a, b in zip(net(x, 5.), (d, r)))


def low_rank(h, w, share=0.02):
    """A power law on the lowest share of the frequencies, nothing above."""
    lam, s = frequencies(h, w), power_law(h, w)
    return torch.where(lam <= lam.flatten().sort().values[math.ceil(share * h * w) - 1], s, 0.)


def test_sigma_hat_tracks_sigma_where_the_data_have_few_dimensions():
    """Exact heads on degraded pictures: 64 of 3 x 32 x 32. With full rank sigma_hat^2 = sigma^2 - MMSE / d; -s shows both."""
    path, g, shown = BlurNoisePath(0.5), torch.Generator().manual_seed(0), []
    for sigma in (0.02, 0.1, 0.5, 2., 10., 80.):
        read = []
        for s in (low_rank(32, 32), power_law(32, 32)):
            x0 = gaussian_pictures(64, 3, s, g)
            x = degrade(x0, sigma, path, torch.randn(x0.shape, dtype=torch.float64, generator=g))[0]
            read.append(read_level(x, gaussian_heads(s, path)(x, sigma)[0]).mean().item())
        m = m_of(0.5 * sigma, 32, 32)[0, 0] ** 2
        mmse = (m * s * sigma ** 2 / (m * s + sigma ** 2)).mean()                               # of the full rank, a pixel
        assert read[0] == pytest.approx(sigma, rel=0.02)
        assert read[1] == pytest.approx((sigma ** 2 - mmse.item()) ** 0.5, rel=0.02)
        shown.append((sigma, *read))
    print("\n   sigma   2 % of the frequencies   all of them")
    for row in shown:
        print("{:8.4g}{:25.4f}{:14.4f}".format(*row))
    assert shown[0][2] < 0.7 * shown[0][1]


def knowing_nothing(s, path):
    """Exact heads that read the level themselves: where S is 0 there is noise alone."""
    def net(x, t):
        asked.append(t)
        u = dct2(x)
        sigma = u[:, :, s == 0].square().mean((1, 2)).sqrt()
        heads = [gaussian_heads(s, path)(x[i:i + 1], sigma[i]) for i in range(len(x))]
        return torch.cat([d for d, _ in heads]), torch.cat([r for _, r in heads])
    asked = []
    return net


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_blind_sampler_keeps_to_its_schedule_and_corrects_a_wrong_start(solver):
    s, path = low_rank(32, 32), BlurNoisePath(0.5)
    latents = torch.randn(64, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net, read = knowing_nothing(s, path), []
    x = sample(net, path, latents, steps=18, solver=solver, blind=True, watch=lambda t, x, d, r: read.append((t, read_level(x, d).mean().item())))
    for t, sigma_hat in read:
        assert sigma_hat == pytest.approx(t, rel=0.02)
    # a start with half the noise that the schedule thinks: reading the level makes nearly the same pictures of it, the schedule does not
    half = [solve(net, path, 40 * latents, time_steps(18), solver, blind=b) for b in (True, False)]
    off = [(dct2(y)[:, :, s == 0].std() / (dct2(x)[:, :, s > 0].std())).item() for y in half]
    assert off[0] < 1e-3
    wrong = [(dct2(y) - dct2(x))[:, :, s > 0].std() / dct2(x)[:, :, s > 0].std() for y in half]
    assert wrong[0] < 0.3 * wrong[1]


@pytest.mark.parametrize("path", [BlurNoisePath(2), BLURRING])
def test_a_blind_step_by_hand(path):
    """From the level that is read, down by the schedule's ratio, whatever the schedule thinks."""
    net = lambda x, t: (0.6 * x.sin(), 0.2 * x)                 # heads of no use, told nothing
    x, s = torch.randn(2, 3, 8, 8, dtype=torch.float64), []
    x[1] *= 5
    for picture in x:
        d, r = net(picture, None)
        high = (picture - d).square().mean().sqrt().item()
        low = high * 1 / 3
        m = lambda sigma: m_of(path.levels(sigma)[0], 8, 8)[0, 0]
        move = lambda x0_hat, n_hat: picture + idct2((m(low) - m(high)) * dct2(x0_hat)) + (low - high) * n_hat
        euler = move(d + r, (picture - d) / high)
        d2, r2 = net(euler, None)
        s.append((euler, move((d + r + d2 + r2) / 2, ((picture - d) / high + (euler - d2) / low) / 2)))
    for i, solver in enumerate(("euler", "heun")):
        ours = solve(net, path, x, torch.tensor([3., 1.], dtype=torch.float64), solver, blind=True)
        torch.testing.assert_close(ours, torch.stack([pair[i] for pair in s]))
    ours = torch.cat(list(generate(as_model(net, path, blind=True), (3, 8, 8), [4], "cpu", init=x[:1], level=3., steps=2, solver="euler")))
    start = degrade(x[:1], 3., path, torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))[None])[0]
    torch.testing.assert_close(ours, solve(net, path, start, time_steps(2, t_max=3.), "euler", blind=True))
    latents = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))[None]
    ours = torch.cat(list(generate(as_model(net, path, blind=True), (3, 8, 8), [4], "cpu", steps=3)))
    torch.testing.assert_close(ours, solve(net, path, 80 * latents, time_steps(3), blind=True))


def test_the_class_is_one_embedding_added_to_the_levels():
    torch.manual_seed(0)
    unet = UNet(3, 6, **SMALL, classes=5)
    got = []
    unet.embed.register_forward_pre_hook(lambda m, x: got.append(x[0]))
    x, c_noise, label = torch.randn(5, 3, 8, 8), torch.full((5,), 0.3), torch.tensor([4, 1, 0, 1, 3])
    torch.nn.init.normal_(unet.from_label.bias)
    unet(x, c_noise, label=label)
    plain_unet = UNet(3, 6, **SMALL)
    plain_unet.embed.register_forward_pre_hook(lambda m, x: got.append(x[0]))
    plain_unet(x, c_noise)
    columns = torch.stack([unet.from_label.weight[:, i] * math.sqrt(5) + unet.from_label.bias for i in label])
    torch.testing.assert_close(got[0], got[1] + columns)


def test_a_class_is_learned_and_asked_for():
    """Two classes, black and white: sampled by class, each comes out in its own shade."""
    torch.manual_seed(0)
    path = BlurNoisePath(0.5)
    net = Denoiser(UNet(1, 2, **SMALL, classes=2), path)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        label = torch.randint(2, (32,))
        x0 = (2. * label - 1)[:, None, None, None].expand(-1, 1, 8, 8)
        sum(disentangled_loss(lambda x, t: net(x, t, label=label), x0, path)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for label, seeds, shade in ((0, [5, 6], [-1, -1]), (1, [5, 6], [1, 1]), (None, [4, 5, 6], [-1, 1, -1])):
        x = torch.cat(list(generate(net.eval(), (1, 8, 8), seeds, "cpu", batch=2, label=label, steps=8)))
        assert x.mean((1, 2, 3)).tolist() == pytest.approx(shade, abs=0.2)


def test_training_tells_the_network_each_pictures_class(tmp_path, monkeypatch):
    for name, shade in (("black", 0), ("white", 255)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    seen = []

    def watched(net, x0, path, t, noise, original=train.disentangled_loss):
        seen.append((x0.mean((1, 2, 3)), net.keywords["label"]))
        return original(net, x0, path, t, noise)
    monkeypatch.setattr(train, "disentangled_loss", watched)
    options = "--cond --channels 8 --mult 1 --attention --resolution 8 --batch 8 --batch-gpu 4 --duration 0.016 --sample-steps 1 --device cpu".split()
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "run"), *options])
    train.main()
    assert len(seen) == 4 and all(torch.equal(x0, 2. * label - 1) for x0, label in seen)
    compared = []
    monkeypatch.setattr(sample_script, "manifold", lambda net, pictures, *args, **kw: compared.append((pictures, kw["label"])) or [])
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(tmp_path / "run/ema.pt"), "--device", "cpu", "--manifold", "100", "--class", "white"])
    sample_script.main()
    assert len(compared[0][0]) == 4 and (compared[0][0] == 255).all() and compared[0][1] == 1


def test_a_class_needs_a_model_with_classes_and_the_level_a_place():
    for kw in (dict(param="noise", colour=COLOUR), dict(blind=True, colour=COLOUR), dict(colour={"mean": [0.], "cov": [[1.]]})):
        with pytest.raises(ValueError, match="cold"):
            Denoiser(Answer(6), COLD, **kw)
    with pytest.raises(ValueError, match="give the mean"):
        Denoiser(Answer(6), COLD)
    with pytest.raises(ValueError, match="blind"):
        Denoiser(Answer(3), BLURRING, param="x0", blind=True)
    with pytest.raises(ValueError, match="param is"):
        Denoiser(Answer(6), BLURRING, param="score")
    with pytest.raises(ValueError, match="1 heads"):
        Denoiser(Answer(6), BLURRING, param="x0")
    for solver, churn in (("multistep", 0), ("heun", 1)):
        with pytest.raises(ValueError, match="knows its level"):
            solve(None, BLURRING, torch.zeros(1, 1, 4, 4), time_steps(3), solver, churn, blind=True)


@pytest.mark.parametrize("path", [BlurNoisePath(0), BlurNoisePath(0.5), BlurNoisePath(2), BLURRING])
def test_exact_heads_do_not_leave_the_manifold(path):
    """The distance at every level is what chance gives; of heads that forget the residual, or answer a quarter too much, it is not."""
    s = power_law(8, 8, total=0.04)
    pictures = to_uint8(gaussian_pictures(4000, 1, s, torch.Generator().manual_seed(1)))
    exact = gaussian_heads(s, path)
    rows = list(manifold(as_model(exact, path), pictures, "cpu", 2000, batch=1000, steps=60))
    assert len(rows) == 61 and [t for t, *_ in rows] == pytest.approx(time_steps(60).tolist())
    for t, distance, floor in rows:
        assert distance < 4 * floor, t
    wrong = lambda x, t: (1.25 * exact(x, t)[0], exact(x, t)[1])
    rows = list(manifold(as_model(wrong, path), pictures, "cpu", 2000, batch=1000, steps=60))
    assert rows[-1][1] > 10 * rows[-1][2]


@pytest.mark.parametrize("octave", [0, 1, 2])
def test_the_manifolds_distance_sees_each_octave(octave):
    """A model of pictures that lack one octave of frequencies, 1 to 2, 2 to 4 or from 4 on, times the lowest."""
    s, path = power_law(8, 8, total=0.04), BlurNoisePath(0.5)
    pictures = to_uint8(gaussian_pictures(4000, 1, s, torch.Generator().manual_seed(1)))
    k = (frequencies(8, 8) / frequencies(8, 8)[0, 1]).sqrt() + 1e-9
    without = torch.where((k >= 2 ** octave) & ((k < 2 ** (octave + 1)) | (octave == 2)), 1e-9, s)
    *_, (t, distance, floor) = manifold(as_model(gaussian_heads(without, path), path), pictures, "cpu", 2000, batch=2000, steps=40)
    assert t == 0 and distance > 2 and distance > 10 * floor


def test_the_manifolds_distance_is_the_closed_form():
    """Heads that answer nothing leave x = V (what blur does not touch) + noise / sigma: two Gaussians with known variances."""
    s, path, n = power_law(8, 8, total=0.04), BlurNoisePath(0.5), 4000
    pictures = to_uint8(gaussian_pictures(n, 1, s, torch.Generator().manual_seed(1)))
    none = lambda x, t: (0 * x, 0 * x)                          # n_hat = x / sigma: the state is sigma times the latents
    for t, distance, floor in manifold(as_model(none, path), pictures, "cpu", n, batch=n, steps=6):
        m = m_of(0.5 * t, 8, 8)[0, 0] ** 2
        by_frequency = (((m * s + t ** 2).sqrt() - t) ** 2 / (s + t ** 2)).flatten()            # s: of the directions, in expectation
        lam = frequencies(8, 8).flatten()
        total = by_frequency[0]                                 # the mean's own direction, then eight in each octave, its mean in expectation
        for low in (1, 2, 4, 8):
            k = (lam / lam[1]).sqrt() + 1e-9
            inside = (k >= low) & (k < 2 * low)
            total = total + by_frequency[inside].mean() * min(8, inside.sum())
        assert abs(distance - floor - total) < 0.25 * total + floor, t


@pytest.mark.parametrize("options", [["--path", "blurring"], ["--param", "x0"], ["--param", "noise"], ["--bnr", "inf"], ["--bnr", "inf", "--param", "x0"],
                                     ["--blind"], ["--cond", "--augment", "0.2"]])
def test_each_of_the_studys_models_from_the_command_line(options, tmp_path, monkeypatch, capsys):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.random.RandomState(i).randint(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    def go(module, *args):
        monkeypatch.setattr(sys, "argv", ["x.py", "--device", "cpu", *map(str, args)])
        module.main()
        return capsys.readouterr().out
    common = "--channels 8 --mult 1 2 --attention 4 --resolution 8 --batch 4 --duration 0.008 --sample-steps 2 --snapshot-every 0".split()
    go(train, "--data", tmp_path / "set", "--out", tmp_path / "run", *common, *options)
    net, checkpoint = load_model(tmp_path / "run/ema.pt")
    ckpt = ["--ckpt", tmp_path / "run/ema.pt"]
    assert (net.path.cold, isinstance(net.path, BlurringPath)) == ("inf" in options, "blurring" in options)
    assert (net.param, net.blind, net.unet.classes) == (options[-1] if "--param" in options else "residual", "--blind" in options, 2 * ("--cond" in options))
    churn = [] if net.blind else ["--churn", 1]
    printed = go(sample_script, *ckpt, "--seeds", "0-3", "--steps", 3, "--out", tmp_path / "s", *churn)
    assert printed.count("sigma_hat") == (3 if net.blind else 0) and len(list((tmp_path / "s").iterdir())) == 4
    printed = go(sample_script, *ckpt, "--manifold", 100, "--steps", 3, *(["--class", "a"] if net.unet.classes else []))
    assert len([line for line in printed.splitlines() if len(line.split()) == 3]) == 5
    def refused(*args):
        with pytest.raises(SystemExit) as e:
            go(sample_script, *ckpt, "--out", tmp_path / "s", *args)
        assert e.value.code == 2
        return capsys.readouterr().err
    if net.path.cold:
        for level in (0.05, 9):
            assert "above 0.1 and up to 8, pixels" in refused("--init", tmp_path / "set/a/0.png", "--level", level)
        x = normalize(torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in (tmp_path / "set").rglob("*.png")]))).mean((1, 2)).double()
        assert net.colour["mean"] == pytest.approx(x.mean(0).tolist(), abs=1e-6)
        assert np.array(net.colour["cov"]) == pytest.approx(np.cov(x.T.numpy(), bias=True), abs=1e-6)
    if net.path.cold or net.blind:
        assert "multistep" in refused("--solver", "multistep")
    if net.blind:
        assert "--churn" in refused("--churn", 1)
    assert "--manifold" in refused("--manifold", 100, "--strip")
    if net.unet.classes:
        assert "give --class" in refused("--manifold", 100)
        go(sample_script, *ckpt, "--seeds", "0-3", "--steps", 3, "--out", tmp_path / "b", "--class", "b", "--churn", 1)
        a, b = ([(tmp_path / d / f"00000{i}.png").read_bytes() for i in range(4)] for d in "sb")
        assert a[1::2] == b[1::2]                               # odd seeds have class 1, b, unless another is asked for
        assert "a, b" in refused("--class", "c")
    else:
        assert "--cond" in refused("--class", "b")


def test_colour_of_one_picture():
    one = Pictures(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8), torch.zeros(1), ["x"], "x").colour()
    assert one == {"mean": [1.], "cov": [[0.]]}
