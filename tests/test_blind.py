"""Blind diffusion: the reader, the sampler that is told no level, and the program."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from data import leaves
from degrade import BlurringPath, ConstantBNR, dct2, expand_level, frequencies, idct2
from exact import gaussian_heads, m_of, power_law
from sample import seed_noise, solve, time_steps
from study import blind
from study.blind import Reader, draw, solve_blind
from study.common import digest
from util import UserError, save_grid, to_uint8

PATHS = [ConstantBNR(0), ConstantBNR(0.5), BlurringPath()]


def low_rank(h, w, share=0.05):
    """The power law on the lowest share of the frequencies, and nothing above."""
    lam = frequencies(h, w)
    limit = lam.flatten().sort().values[math.ceil(share * h * w) - 1]
    return torch.where(lam <= limit, power_law(h, w), 0.)


SPECTRUM = low_rank(32, 32)


def exact_reader(x):
    """Where the data have no power, there is noise alone."""
    return dct2(x.double())[:, :, SPECTRUM == 0].square().mean((1, 2)).sqrt()


def unit_noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
@pytest.mark.parametrize("off", [0.5, 1., 2.])
def test_exact_heads_and_an_exact_reader_keep_to_the_schedule_from_any_start(solver, off):
    """The levels stay what they were read as at the start, times the schedule's ratios."""
    readings = []
    x = off * 80 * unit_noise(8, 3, 32, 32)
    solve_blind(gaussian_heads(SPECTRUM), exact_reader, ConstantBNR(0.5), x, time_steps(18), solver,
                watch=lambda t, sigma: readings.append((sigma / t).log()))
    assert len(readings) == 18
    log_ratios = torch.stack(readings)                          # [18, B]
    assert (log_ratios - math.log(off)).abs().max() < 0.04      # 2,900 numbers read it to 1.3 %
    assert (log_ratios - log_ratios[0]).abs().max() < 1e-6


@pytest.mark.parametrize("path", PATHS[:2])
def test_a_wrong_start_gives_the_images_of_a_right_one(path):
    """Told the schedule's levels, half and twice the noise end far from it."""
    x, steps = 80 * unit_noise(24, 3, 32, 32), time_steps(12)
    net, data = gaussian_heads(SPECTRUM), SPECTRUM > 0

    def power(x):
        return (dct2(x)[:, :, data].square().mean((0, 1)) / SPECTRUM[data]).mean().item()
    for off in (0.5, 2.):
        told = solve(net, path, off * x, steps)
        read = solve_blind(net, exact_reader, path, off * x, steps)
        right = solve(net, path, x, steps)
        assert abs(power(read) / power(right) - 1) < 0.05 < abs(power(told) / power(right) - 1)


def test_a_level_misread_once_is_corrected_in_the_next_step():
    calls = []

    def misreads(x):
        calls.append(1)
        return exact_reader(x) * (1.5 if len(calls) == 6 else 1)
    readings = []
    solve_blind(gaussian_heads(SPECTRUM), misreads, ConstantBNR(0.5), 80 * unit_noise(4, 3, 32, 32),
                time_steps(18), watch=lambda t, sigma: readings.append((sigma / t).mean().item()))
    assert readings[5] == pytest.approx(1.5, rel=0.02)
    assert [*readings[:5], *readings[6:]] == pytest.approx([1] * 17, rel=0.02)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_a_reader_that_answers_the_told_level_gives_the_told_samplers_images(solver, path):
    """With heads that disagree, and nowhere linear."""
    def net(x, alpha, sigma):
        scale = 1 + expand_level(sigma, x)
        return (x / scale).tanh(), (x.flip(-1) / scale).sin()
    times, x = time_steps(7), 80 * unit_noise(3, 2, 8, 12)
    answers = iter(times.tolist())

    def told(x):
        return torch.full((len(x),), next(answers), dtype=torch.float64)
    ours = solve_blind(net, told, path, x, times, solver)
    torch.testing.assert_close(ours, solve(net, path, x, times, solver), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_a_step_by_hand_for_each_image_from_its_own_level(solver, path):
    """The reading says where a step starts; of the schedule only ratios count."""
    def net(x, alpha, sigma):
        alpha, sigma = (expand_level(v, x) for v in (alpha, sigma))
        return 0.6 * (x + sigma).sin(), 0.2 * x + alpha

    def read(x):
        return 0.1 + x.abs().amax((1, 2, 3))
    images = unit_noise(2, 3, 8, 8) * torch.tensor([1., 5.])[:, None, None, None]
    expected = []
    for x in images.split(1):
        high = read(x).item()
        low = high / 3
        alpha_high, alpha_low = (path.levels(v)[0] for v in (high, low))
        m_high, m_low = (m_of(a, 8, 8) for a in (alpha_high, alpha_low))

        def move(x0_hat, n_hat):
            return x + idct2((m_low - m_high) * dct2(x0_hat)) + (low - high) * n_hat
        d, r = net(x, alpha_high, high)
        euler = move(d + r, (x - d) / high)
        if solver == "heun":
            d2, r2 = net(euler, alpha_low, low)
            n2 = (euler - d2) / low
            expected.append(move((d + r + d2 + r2) / 2, ((x - d) / high + n2) / 2))
        else:                                                   # multistep starts with Euler
            expected.append(euler)
    for scale in (1, 7):
        times = torch.tensor([3., 1.], dtype=torch.float64) * scale
        ours = solve_blind(net, read, path, images, times, solver)
        torch.testing.assert_close(ours, torch.cat(expected))


def test_the_reader_is_a_function_of_each_image_alone_and_scales_with_it():
    torch.manual_seed(0)
    reader, x = Reader(3), unit_noise(5, 3, 8, 8) + 0.3
    together = reader(x)
    assert together.shape == (5,) and together.dtype == torch.float64 and together.std() > 0
    torch.testing.assert_close(torch.cat([reader(image) for image in x.split(1)]), together,
                               rtol=1e-5, atol=0)
    for c in (1e-3, 7., 160.):
        torch.testing.assert_close(reader(c * x), c * together, rtol=1e-5, atol=0)


def test_a_trained_reader_reads_images_that_it_has_not_seen():
    """Images of two flat halves; a reading that ignores the image has an error of about 3."""
    colour = 255 * torch.rand(600, 3, 1, 2, generator=torch.Generator().manual_seed(0))
    images = colour.byte().repeat_interleave(8, 2).repeat_interleave(4, 3)      # [600, 3, 8, 8]
    path = ConstantBNR(0.5)
    reader = blind.train_reader(images[:500], path, 6, "cpu", batch=32, lr=2e-3)
    errors = blind.reading_errors(reader, path, images[500:], "cpu")
    assert [level for level, _, _ in errors] == blind.LEVELS
    for level, bias, spread in errors:
        assert math.hypot(bias, spread) < (0.15 if level >= 1 else 0.7), (level, bias, spread)


def test_added_noise_and_a_wrong_start_reach_both_samplers(monkeypatch):
    """With D = 0 and R = 0 a step multiplies x by the ratio of the levels."""
    net, shape, path = lambda x, alpha, sigma: (0 * x, 0 * x), (3, 4, 4), ConstantBNR(0)
    ends = []
    monkeypatch.setattr(blind, "to_uint8", lambda x: ends.append(x) or to_uint8(x))
    monkeypatch.setattr(blind, "time_steps", lambda *a: time_steps(*a)[:-1])
    noise = seed_noise([3, 4], shape)
    first, second = noise(), noise()
    t = time_steps(6)
    for read in (None, lambda x: torch.full((len(x),), 2., dtype=torch.float64)):
        draw(net, read, path, shape, [3, 4], 6, start=0.7, half_way=1.5)
        added = t[3] * math.sqrt(1.25) * second
        expected = (0.7 * t[3] * first + added) * t[5] / t[3]
        torch.testing.assert_close(ends.pop(), expected)


SMALL = "--preset tiny --channels 8 --mult 1 --attention --resolution 8 --batch 4 --augment 0 " \
        "--duration 0.008 --sample-steps 2 --snapshot-every 0 --device cpu".split()


def trained(folder, *options):
    (folder / "data").mkdir()
    for i, image in enumerate(leaves(60, 8)):
        save_grid(image[None], str(folder / f"data/{i}.png"))
    train.train(train.options(["--data", str(folder / "data"), "--out", str(folder / "run"),
                               *SMALL, *options]))
    return folder / "run/ema.pt"


def go(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["blind.py", "--device", "cpu", *map(str, argv)])
    blind.main()


def refusal(monkeypatch, capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        go(monkeypatch, *argv)
    assert stopped.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m")]


@pytest.fixture
def small_measure(monkeypatch):
    """A measure without the packages of the study: mean and power of the pixels."""
    class Measure:
        def __init__(self, reference, device):
            self.mean = reference.float().mean()

        def __call__(self, images):
            assert images.shape[1:] == (3, 8, 8)
            return {"distance": abs(images.float().mean() - self.mean).item(), "power": [1.] * 3}
    monkeypatch.setattr(blind, "Measure", Measure)


def test_the_tables_from_the_command_line(tmp_path, monkeypatch, capsys, small_measure):
    monkeypatch.chdir(tmp_path)
    checkpoint = trained(tmp_path, "--bnr", "any")
    quick = ["--quick", "--ckpt", checkpoint, "--bnr", 0.5, "--results", tmp_path / "results"]
    go(monkeypatch, *quick)
    printed = capsys.readouterr().out
    file = tmp_path / "results/quick/blind.jsonl"
    cells = [json.loads(line) for line in file.read_text().splitlines()]
    assert {c["curve"] for c in cells if c["kind"] == "reading"} == {"BNR 0.5", "BNR 2"}
    samples = [c for c in cells if c["kind"] == "samples"]
    assert len(samples) == 2 * 6                    # told, blind; starts
    assert all(len(c["levels"]) == (2 if c["blind"] else 0) for c in samples if c["half_way"] == 1)
    for words in ("not seen: mean, spread", "over the schedule's", "told; blind; blind - told",
                  "x 0.5 at the start", "x 1.5 half-way"):
        assert printed.count(words) >= 1, words
    before = file.read_bytes()
    go(monkeypatch, "--quick", "--results", tmp_path / "results", "--plot-only")
    again = capsys.readouterr().out
    assert file.read_bytes() == before
    first, second = ([line for line in text.splitlines() if ".png" not in line]
                     for text in (printed, again))
    assert len(second) > 30 and first[-len(second):] == second


def test_tables_keep_unlike_cells_apart(tmp_path, monkeypatch, capsys):
    cell = dict(kind="samples", network="any", seed=0, kimg=60, reader_kimg=80, curve="BNR 0",
                nfe=35, start=1., half_way=1., draw=0, levels=[[1., 0., 0.1]], power=[1.] * 3)
    with open(tmp_path / "blind.jsonl", "w") as f:
        for i, more in enumerate([{"data": "leaves", "samples": 50}, {"data": "c10", "samples": 50},
                                  {"data": "c10", "samples": 90},
                                  {"data": "c10", "samples": 50, "reader_kimg": 40}]):
            for blind_one in (False, True):
                more.update(blind=blind_one, distance=100. * (i + 1) + 7 * blind_one)
                f.write(json.dumps({**cell, **more}) + "\n")
    go(monkeypatch, "--plot-only", "--results", tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NFE")]
    assert [row.split()[4:] for row in rows] == [f"{d}; {d + 7}; +7.0 +- -".split()
                                                 for d in (100., 200., 300., 400.)]


def test_told_and_blind_samples_are_paired_like_with_like():
    cells = [dict(seed=seed, draw=draw, curve=curve, nfe=nfe, start=start, half_way=1., blind=b)
             for seed in (0, 1) for draw in (0, 1) for curve in ("BNR 0", "BNR 2")
             for nfe in (9, 35) for start in (1., 2.) for b in (True, False)]
    pairs = blind.pairs_of(cells[:-1])                          # the last blind one has no partner
    assert len(pairs) == len(cells) // 2 - 1
    assert all({**told, "blind": True} == other for told, other in pairs)


def noting(function, given):
    def noted(*args):
        given.append(next(a for a in args if isinstance(a, torch.Tensor)))
        return function(*args)
    return noted


def test_a_reader_is_kept_as_plain_tensors_and_samples(tmp_path, monkeypatch, capsys):
    checkpoint = trained(tmp_path, "--bnr", "0.5")
    given = []
    for name in ("train_reader", "reading_errors"):             # which images each of them gets
        monkeypatch.setattr(blind, name, noting(getattr(blind, name), given))
    go(monkeypatch, "--ckpt", checkpoint, "--duration", 0.256)
    trained_on, tested_on = ({image.numpy().tobytes() for image in images} for images in given)
    assert len(trained_on) == 54 and len(tested_on) == 6 and not trained_on & tested_on
    assert "BNR 0.5: read sigma over sigma" in capsys.readouterr().out
    file = tmp_path / "run/blind.pt"
    kept = torch.load(file, weights_only=True)
    assert sum(v.numel() for v in kept["reader"].values()) < 100_000
    model = SimpleNamespace(file=file, shape=[3, 8, 8], curve="BNR 0.5", digest=digest(checkpoint))
    blind.load_reader(model)
    x = unit_noise(2, 3, 8, 8)
    fresh = Reader(3)
    fresh.load_state_dict(kept["reader"])
    assert torch.equal(model.reader(x), fresh(x)) and model.errors == kept["errors"]
    assert model.duration == 0.256
    go(monkeypatch, "--ckpt", checkpoint, "--sample", "--seeds", "0-3", "--steps", 3)
    assert (tmp_path / "run/blind-grid.png").exists()
    assert torch.load(file, weights_only=True)["errors"] == model.errors       # not trained again

    for other in ({"curve": "BNR 2"}, {"digest": "another model"}):
        with pytest.raises(UserError, match="not a reader of BNR"):
            blind.load_reader(SimpleNamespace(**{**vars(model), **other}))
    for damage in (b"", file.read_bytes()[:5000]):
        file.write_bytes(damage)
        line, = refusal(monkeypatch, capsys, "--ckpt", checkpoint, "--sample")
        assert "blind.pt" in line and "damaged" in line
    torch.save({"reader": {"last.bias": torch.zeros(1)}}, file)
    line, = refusal(monkeypatch, capsys, "--ckpt", checkpoint, "--sample")
    assert "not a reader" in line


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    checkpoint = trained(tmp_path, "--bnr", "inf")
    line, = refusal(monkeypatch, capsys, "--ckpt", checkpoint)
    assert "no noise to read" in line
    for argv, words in ((["--bnr", 1, "--path", "blurring"], "two ways"),
                        (["--bnr", 1, 2], "give one"), (["--ckpt", tmp_path / "no.pt"], "no.pt")):
        line, = refusal(monkeypatch, capsys, "--ckpt", checkpoint, *argv)
        assert words in line
    line, = refusal(monkeypatch, capsys)
    assert "--ckpt is needed" in line
