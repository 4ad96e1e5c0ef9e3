"""Blind diffusion: the reader, the sampler that is not given the level, and the program's pairs."""
import json
import math

import pytest
import torch

from degrade import BlurringSchedule, ConstantBNR, append_dims, dct2, frequencies
from exact import gaussian_heads, normals, power_law
from runs import command_line, options, pictures, refused
from sample import heun, seeded_randn, time_steps
from study import blind
from study.blind import Reader, blind_heun, draw
from train import train


def low_rank(h, w, share=0.05):
    """The power law on the lowest share of the frequencies, and nothing above."""
    lam = frequencies(h, w)
    limit = lam.flatten().sort().values[math.ceil(share * h * w) - 1]
    return torch.where(lam <= limit, power_law(h, w), 0.)


@pytest.mark.parametrize("schedule", [ConstantBNR(0), ConstantBNR(0.5)])
@pytest.mark.parametrize("off", [0.5, 2.])
def test_a_wrong_start_ends_as_a_right_one_where_the_level_is_read(off, schedule):
    """Given the schedule's levels, half and twice the noise end far from it."""
    spectrum = low_rank(32, 32)
    net = gaussian_heads(spectrum)
    x = 80 * normals(24, 3, 32, 32)
    times = time_steps(12)

    def read(x):                                # where the data have no power, there is noise alone
        return dct2(x.double())[:, :, spectrum == 0].square().mean((1, 2)).sqrt()

    def power(x):
        data = spectrum > 0
        return (dct2(x)[:, :, data].square().mean((0, 1)) / spectrum[data]).mean().item()
    right = power(heun(net, schedule, x, times))
    given = power(heun(net, schedule, off * x, times))
    assert abs(power(blind_heun(net, read, schedule, off * x, times)) / right - 1) < 0.05
    assert abs(given / right - 1) > 0.05


@pytest.mark.parametrize("schedule", [ConstantBNR(0), ConstantBNR(0.5), BlurringSchedule()])
def test_a_reader_that_answers_the_schedules_level_gives_heuns_images(schedule):
    """With heads that disagree, and nowhere linear. And of the schedule only ratios count."""
    def net(x, alpha, sigma):
        scale = 1 + append_dims(sigma, x)
        return (x / scale).tanh(), (x.flip(-1) / scale).sin()
    times = time_steps(7)
    x = 80 * normals(3, 2, 8, 12)
    for scale in (1, 7):
        levels = iter(times.tolist())

        def read(x):
            return torch.full((len(x),), next(levels), dtype=torch.float64)
        ours = blind_heun(net, read, schedule, x, scale * times)
        torch.testing.assert_close(ours, heun(net, schedule, x, times), rtol=0, atol=1e-9)


def test_the_reader_is_a_function_of_each_image_alone_and_scales_with_it():
    torch.manual_seed(0)
    reader = Reader(3)
    x = normals(5, 3, 8, 8) + 0.3
    together = reader(x)
    assert together.shape == (5,) and together.dtype == torch.float64 and together.std() > 0
    alone = torch.cat([reader(image) for image in x.split(1)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=0)
    for c in (1e-3, 160.):
        torch.testing.assert_close(reader(c * x), c * together, rtol=1e-5, atol=0)


def test_a_trained_reader_reads_images_that_it_has_not_seen():
    """Images of two flat halves; a reading that ignores the image has an error of about 3."""
    color = 255 * torch.rand(600, 3, 1, 2, generator=torch.Generator().manual_seed(0))
    images = color.byte().repeat_interleave(8, 2).repeat_interleave(4, 3)       # [600, 3, 8, 8]
    schedule = ConstantBNR(0.5)
    reader = blind.train_reader(images[:500], schedule, 6, "cpu", batch=32, lr=2e-3)
    errors = blind.reading_errors(reader, schedule, images[500:], "cpu")
    assert [level for level, _, _ in errors] == blind.LEVELS
    for level, bias, spread in errors:
        assert math.hypot(bias, spread) < (0.15 if level >= 1 else 0.7), (level, bias, spread)


def test_added_noise_and_a_wrong_start_reach_both_samplers():
    """With D = 0 and R = 0 a step multiplies x by the ratio of the levels."""
    times = time_steps(6)[:-1]                  # the last step would end at 0
    randn = seeded_randn([3, 4], (3, 4, 4))
    first = randn()
    added = times[2] * math.sqrt(1.25) * randn()
    for read in (None, lambda x: torch.full((len(x),), 2., dtype=torch.float64)):
        x = draw(lambda x, alpha, sigma: (0 * x, 0 * x), read, ConstantBNR(0), (3, 4, 4), [3, 4],
                 times, start=0.7, half_way=1.5)
        torch.testing.assert_close(x, (0.7 * times[2] * first + added) * times[5] / times[2])


def test_samples_are_paired_like_with_like(tmp_path, capsys):
    cell = {"kind": "samples", "network": "any", "seed": 0, "kimg": 60, "reader_kimg": 80,
            "curve": "BNR 0", "nfe": 35, "start": 1., "half_way": 1., "draw": 0, "samples": 50,
            "power": [1.] * 3, "data": "c10"}
    others = [{}, {"data": "leaves"}, {"samples": 90}, {"reader_kimg": 40}, {"nfe": 17},
              {"start": 2.}, {"half_way": 1.5}, {"curve": "BNR 2"}, {"network": "0.5"}]
    cells = [{**cell, "draw": 1, "blind": True, "distance": 1.}]            # without a partner
    for i, other in enumerate(others):
        cells.append({**cell, **other, "blind": False, "distance": 100. * (i + 1)})
        cells.append({**cell, **other, "blind": True, "distance": 107. * (i + 1)})
    (tmp_path / "blind.jsonl").write_text("\n".join(map(json.dumps, cells)))
    command_line(blind.main, "--plot-only", "--results", tmp_path)
    rows = [row for row in capsys.readouterr().out.splitlines() if "noise x" in row]
    bands = "1.00 1.00 1.00"
    expected = [f"{100. * i}; {107. * i}; {7. * i:+} +- -; power of the first: {bands}; {bands}"
                for i in range(1, 10)]
    assert sorted(row.split(": ", 1)[1] for row in rows) == sorted(expected)


@pytest.mark.parametrize("more", ["--bnr inf", "--bnr 0 --cond"])
def test_what_has_no_reader_is_refused_in_one_line(tmp_path, capsys, more):
    train(options(tmp_path / "run", f"{more} --duration 0.004"), pictures(classes=("a", "b")))
    line = refused(capsys, blind.main, "--device", "cpu", "--results", tmp_path, "--ckpt",
                   tmp_path / "run/ema.pt")
    assert "a reader is for models of noise, without classes" in line
