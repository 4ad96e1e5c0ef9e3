"""Blind diffusion: the reader, the sampler that is told no level, and the program."""
import json
import math
import sys

import pytest
import torch

import train
from data import Images, leaves
from degrade import BlurringPath, ConstantBNR, dct2, expand_level, frequencies, idct2
from exact import gaussian_heads, m_of, power_law
from sample import solve, time_steps
from study.common import seed_noise
from study import blind
from study.blind import Reader, draw, solve_blind
from util import to_uint8

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


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("off", [0.5, 2.])
def test_a_wrong_start_keeps_to_its_own_level_and_ends_as_a_right_one(off, path):
    """Told the schedule's levels, half and twice the noise end far from it."""
    x, steps, readings = 80 * unit_noise(24, 3, 32, 32), time_steps(12), []
    net, data = gaussian_heads(SPECTRUM), SPECTRUM > 0

    def power(x):
        return (dct2(x)[:, :, data].square().mean((0, 1)) / SPECTRUM[data]).mean().item()
    right, told = solve(net, path, x, steps), solve(net, path, off * x, steps)
    read = solve_blind(net, exact_reader, path, off * x, steps,
                       lambda t, sigma: readings.append((sigma / t).log()))
    assert abs(power(read) / power(right) - 1) < 0.05 < abs(power(told) / power(right) - 1)
    log_ratios = torch.stack(readings)                          # [12, B]
    assert (log_ratios - math.log(off)).abs().max() < 0.04      # 2,900 numbers read it to 1.3 %
    assert (log_ratios - log_ratios[0]).abs().max() < 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_a_reader_that_answers_the_told_level_gives_the_told_samplers_images(path):
    """With heads that disagree, and nowhere linear."""
    def net(x, alpha, sigma):
        scale = 1 + expand_level(sigma, x)
        return (x / scale).tanh(), (x.flip(-1) / scale).sin()
    times, x = time_steps(7), 80 * unit_noise(3, 2, 8, 12)
    answers = iter(times.tolist())

    def told(x):
        return torch.full((len(x),), next(answers), dtype=torch.float64)
    ours = solve_blind(net, told, path, x, times)
    torch.testing.assert_close(ours, solve(net, path, x, times, "heun"), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_a_step_by_hand_for_each_image_from_its_own_level(path):
    """The reading says where a step starts; of the schedule only ratios count."""
    def net(x, alpha, sigma):
        alpha, sigma = (expand_level(v, x) for v in (alpha, sigma))
        return 0.6 * (x + sigma).sin(), 0.2 * x + alpha

    def read(x):
        return 0.1 + x.abs().amax((1, 2, 3))
    images, expected = unit_noise(2, 3, 8, 8) * torch.tensor([1., 5.])[:, None, None, None], []
    for x in images.split(1):
        high = read(x).item()
        low = high / 3
        (alpha_high, _), (alpha_low, _) = path.levels(high), path.levels(low)
        m_high, m_low = (m_of(a, 8, 8) for a in (alpha_high, alpha_low))

        def move(x0_hat, n_hat):
            return x + idct2((m_low - m_high) * dct2(x0_hat)) + (low - high) * n_hat
        d, r = net(x, alpha_high, high)
        euler = move(d + r, (x - d) / high)
        d2, r2 = net(euler, alpha_low, low)
        expected.append(move((d + r + d2 + r2) / 2, ((x - d) / high + (euler - d2) / low) / 2))
    for scale in (1, 7):
        times = torch.tensor([3., 1.], dtype=torch.float64) * scale
        torch.testing.assert_close(solve_blind(net, read, path, images, times), torch.cat(expected))


def test_the_reader_is_a_function_of_each_image_alone_and_scales_with_it():
    torch.manual_seed(0)
    reader, x = Reader(3), unit_noise(5, 3, 8, 8) + 0.3
    together = reader(x)
    assert together.shape == (5,) and together.dtype == torch.float64 and together.std() > 0
    torch.testing.assert_close(torch.cat([reader(image) for image in x.split(1)]), together,
                               rtol=1e-5, atol=0)
    for c in (1e-3, 160.):
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
        torch.testing.assert_close(ends.pop(), (0.7 * t[3] * first + added) * t[5] / t[3])


# The program

def go(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["blind.py", "--device", "cpu", *map(str, argv)])
    blind.main()


def trained(folder, *options):
    small = "--preset tiny --channels 8 --mult 1 --attention --batch 4 --duration 0.008 " \
            "--sample-steps 2 --snapshot-every 0 --device cpu".split()
    images = Images(leaves(60, 8), torch.arange(60) % 2, ["a", "b"], "mine")
    train.train(train.options(["--out", str(folder / "run"), *small, *options]), images)
    return folder / "run/ema.pt", images


def test_the_table_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Without the packages of the study: the measure is the mean of the pixels."""
    monkeypatch.chdir(tmp_path)
    checkpoint, images = trained(tmp_path, "--bnr", "any")
    monkeypatch.setattr(blind, "load_once", lambda *_: images)
    monkeypatch.setattr(blind, "references", lambda *_: images.images)
    monkeypatch.setattr(blind, "Measure", lambda reference, _: lambda x: {
        "distance": abs(x.float().mean() - reference.float().mean()).item(), "power": [1.] * 3})
    given = []
    for name, at in (("train_reader", 0), ("reading_errors", 2)):
        def noted(*args, original=getattr(blind, name), at=at):
            given.append({image.numpy().tobytes() for image in args[at]})
            return original(*args)
        monkeypatch.setattr(blind, name, noted)
    go(monkeypatch, "--quick", "--ckpt", checkpoint, "--bnr", 0.5, "--results", tmp_path)
    first, (seen, unseen) = capsys.readouterr().out.splitlines(), given
    assert len(seen) == 54 and len(unseen) == 6 and not seen & unseen
    file = tmp_path / "quick/blind.jsonl"
    cells = [json.loads(line) for line in file.read_text().splitlines()]
    samples = [c for c in cells if c["kind"] == "samples"]
    assert len(samples) == 2 * (2 + 1)                          # told, blind; draws, wrong noise
    assert all(len(c["levels"]) == (2 if c["blind"] else 0) for c in samples if c["half_way"] == 1)
    before = file.read_bytes()
    go(monkeypatch, "--quick", "--ckpt", checkpoint, "--bnr", 0.5, "--results", tmp_path)
    again = capsys.readouterr().out.splitlines()
    assert file.read_bytes() == before and len(given) == 2      # nothing is computed again
    assert again == first[-len(again):] and sum("noise x" in row for row in again) == 2


def test_unlike_cells_stay_apart_and_told_and_blind_are_paired_like_with_like(tmp_path, monkeypatch,
                                                                              capsys):
    cell = dict(kind="samples", network="any", seed=0, kimg=60, reader_kimg=80, curve="BNR 0",
                nfe=35, start=1., half_way=1., draw=0, levels=[[1., 0., 0.1]], power=[1.] * 3,
                samples=50, data="c10")
    others = [{}, {"data": "leaves"}, {"samples": 90}, {"reader_kimg": 40}, {"nfe": 17},
              {"start": 2.}, {"half_way": 1.5}, {"curve": "BNR 2"}, {"network": "0.5"}]
    with open(tmp_path / "blind.jsonl", "w") as f:
        for i, other in enumerate(others):
            for more in (dict(blind=False), dict(blind=True, distance=107. * (i + 1))):
                f.write(json.dumps({**cell, "distance": 100. * (i + 1), **other, **more}) + "\n")
        for draw_of_one in (dict(draw=1, distance=1., blind=True), dict(seed=1, distance=2.,
                                                                        blind=False)):
            f.write(json.dumps({**cell, **draw_of_one}) + "\n")             # without a partner
    go(monkeypatch, "--plot-only", "--results", tmp_path)
    rows = [row for row in capsys.readouterr().out.splitlines() if "noise x" in row]
    rows = [row.split(": ", 1)[1] for row in rows]
    assert sorted(rows) == sorted(f"{100. * i}; {107. * i}; {7. * i:+} +- -; power of the first: "
                                  "1.00 1.00 1.00; 1.00 1.00 1.00" for i in range(1, 10))


@pytest.mark.parametrize("options", [["--bnr", "inf"], ["--bnr", "0", "--cond"]])
def test_what_has_no_reader_is_refused_in_one_line(tmp_path, monkeypatch, capsys, options):
    checkpoint, _ = trained(tmp_path, *options)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        go(monkeypatch, "--ckpt", checkpoint, "--results", tmp_path)
    assert stopped.value.code == 2
    assert "a reader is for models of noise, without classes" in capsys.readouterr().err
