import argparse
import contextlib
import copy
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

import data
import sample
import train
import util
from data import Images, epoch, leaves, shuffled
from degrade import BlurringPath, ColdPath, ConstantBNR, degrade
from loss import disentangled_loss
from model import PARAMETERIZATIONS, Denoiser, UNet, load_model
from sample import sampling_path
from study import strip
from util import Parser, UserError, locked, normalize, seed_for, signals_noted

ROOT = Path(__file__).parent.parent
NETWORK = "--resolution 8 --channels 8 --mult 1 2 --attention 4 --device cpu".split()
SMALL = NETWORK + """--batch 4 --warmup 0 --log-every 0.016 --snapshot-every 0.032
                     --sample-steps 2""".split()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        write_noise(folder / f"{i}.png", i)
    return str(folder)


def write_noise(filename, seed, shape=(8, 8, 3)):
    array = np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)
    Image.fromarray(array).save(filename)


def tensor_of_noise(n, *shape):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    return Images(x, name="noise", latents=True)


def run(monkeypatch, *args, main=train.main):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    main()


def small(monkeypatch, data, out, *args):
    run(monkeypatch, "--data", data, "--out", out, *SMALL, *args)


def small_options(out, *args):
    return train.options([*SMALL, "--out", str(out), *map(str, args)])


def weights(out, name="ema.pt"):
    """The tensors of a checkpoint, and all of it."""
    state = torch.load(f"{out}/{name}", weights_only=True)
    parts = [state.get(part, {}) for part in ("weights", "net", "ema")]
    return {k: v for part in parts for k, v in part.items()}, state


def log_of(out):
    return [json.loads(line) for line in open(out / "log.jsonl")]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(capsys, call, *words):
    with pytest.raises(SystemExit) as e:
        call()
    printed = capsys.readouterr().err
    last = printed.strip().splitlines()[-1]
    assert e.value.code == 2 and all(w in last for w in words), printed
    assert "Traceback" not in printed
    return last


def watch_loss(monkeypatch):
    """A list that receives the loss's arguments and results, in the order of the calls."""
    calls = []

    def watched(*args, original=train.disentangled_loss):
        terms = original(*args)
        calls.append((args, terms))
        return terms
    monkeypatch.setattr(train, "disentangled_loss", watched)
    return calls


# What is learned, and what repeats

def test_four_images_are_learned_by_heart():
    """The loss at fixed levels falls to a small share of what knowing nothing costs, in both
    heads."""
    torch.manual_seed(0)
    x0, path = normalize(leaves(4, 8)), ConstantBNR(2)
    net = Denoiser(UNet(3, 6, channels=32, mult=(1, 2), blocks=1, attention=(4,), resolution=8))
    optimizer = torch.optim.Adam(net.parameters())
    t = torch.tensor([0.2, 0.4, 0.6, 0.8]).repeat(16)
    fixed = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def losses(x0, t, noise):
        return disentangled_loss(net, x0, *path.levels(t), noise, net.sigma_data)

    def score():
        return torch.stack([v.mean() for v in losses(x0.repeat_interleave(16, 0), t, fixed)])
    before = score().detach()
    for i in range(250):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 * (1 - i / 250))
        levels, noise = torch.rand(32) * 0.8 + 0.1, torch.randn(32, 3, 8, 8)
        terms = losses(x0.repeat(8, 1, 1, 1), levels, noise)
        (sum(terms).mean() * x0[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (score() < 0.1 * before).all()


@pytest.mark.parametrize("extra", ["", "--dropout 0.3 --augment 0.5", "--bnr any"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, images, monkeypatch, extra):
    small(monkeypatch, images, tmp_path / "whole", "--duration", 0.096, *extra.split())
    for duration in (0.032, 0.096):
        small(monkeypatch, images, tmp_path / "parts", "--duration", duration, *extra.split())
    for name in ("ema.pt", "state.pt"):
        assert same(weights(tmp_path / "whole", name)[0], weights(tmp_path / "parts", name)[0])
    unet = weights(tmp_path / "whole")[1]["config"]["unet"]
    asked = (0.3, 9) if "dropout" in extra else (0, 0)
    assert (unet["dropout"], unet["augment_dim"]) == asked
    assert unet.get("ratio", False) == ("any" in extra)
    logs = [log_of(tmp_path / d) for d in ("whole", "parts")]
    steps = [[line["step"] for line in log] for log in logs]
    assert steps[0] == steps[1] == [4, 8, 12, 16, 20, 24]
    assert [line["denoise"] for line in logs[0]] == [line["denoise"] for line in logs[1]]


class Cut(Exception):
    pass


def test_a_run_cut_between_checkpoints_repeats_from_the_last(tmp_path, images, monkeypatch):
    small(monkeypatch, images, tmp_path / "whole", "--duration", 0.096)

    def cut(args, seen, *others, original=train.summary):
        if seen == 80:
            raise Cut
        return original(args, seen, *others)
    with monkeypatch.context() as m, pytest.raises(Cut):
        m.setattr(train, "summary", cut)
        small(m, images, tmp_path / "cut", "--duration", 0.096)
    assert weights(tmp_path / "cut")[1]["seen"] == 64
    small(monkeypatch, images, tmp_path / "cut", "--duration", 0.096)
    assert same(weights(tmp_path / "whole")[0], weights(tmp_path / "cut")[0])
    assert [line["step"] for line in log_of(tmp_path / "cut")] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_step_saves_and_resumes_bit_for_bit(tmp_path, images, monkeypatch, name):
    script = [sys.executable, str(ROOT / "train.py"), "--data", images, "--out",
              str(tmp_path / "cut"), *SMALL, "--snapshot-every", "0", "--duration", "100"]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log = tmp_path / "cut/log.jsonl"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + getattr(signal, name)
    assert "stopped and saved at" in printed and "Traceback" not in printed
    seen = weights(tmp_path / "cut")[1]["seen"]
    assert 0 < seen < 100_000
    for out in ("cut", "other"):            # interrupted at seen and not, up to the same image
        small(monkeypatch, images, tmp_path / out, "--duration", (seen + 16) / 1000,
              "--snapshot-every", 0)
    cut, other = (weights(tmp_path / out, "state.pt")[0] for out in ("cut", "other"))
    assert same(cut, other)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_second_signal_ends_at_once(name):
    """The first is only noted, and the signal has its own meaning again."""
    number = getattr(signal, name)
    before = signal.signal(number, lambda *args: None)
    try:
        own = signal.getsignal(number)
        with signals_noted() as signals:
            os.kill(os.getpid(), number)
            assert signals == [number] and signal.getsignal(number) == signal.SIG_DFL
        assert signal.getsignal(number) == own
    finally:
        signal.signal(number, before)


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_noted() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_full_disk_leaves_the_old_checkpoint_and_training_continues(tmp_path, images, monkeypatch,
                                                                      capsys):
    import resource
    out = tmp_path / "run"
    small(monkeypatch, images, out, "--duration", 0.032)
    before = {name: (out / name).read_bytes() for name in ("ema.pt", "state.pt")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))      # no file may grow beyond
    try:
        refused(capsys, lambda: small(monkeypatch, images, out, "--duration", 0.096),
                "last checkpoint could not be saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not list(out.glob("*.part"))
    assert [line["step"] for line in log_of(out)] == [4, 8, 12, 16, 20, 24]     # it continued
    small(monkeypatch, images, out, "--duration", 0.096)
    assert weights(out)[1]["seen"] == 96


def test_a_full_disk_costs_a_log_line_only(tmp_path, images, monkeypatch, capsys):
    small(monkeypatch, images, tmp_path / "whole", "--duration", 0.064)

    def dumps(line):
        lines.append(line)
        if len(lines) == 2:
            raise OSError(28, "No space left on device")
        return json.dumps(line)
    lines, plain = [], dict(dump=json.dump, loads=json.loads)
    monkeypatch.setattr(train, "json", argparse.Namespace(dumps=dumps, **plain))
    small(monkeypatch, images, tmp_path / "full", "--duration", 0.064)
    printed = capsys.readouterr().err
    assert printed.count("a log line could not be written (No space left on device)") == 1
    assert [line["step"] for line in log_of(tmp_path / "full")] == [4, 12, 16]
    whole, full = (weights(tmp_path / out, "state.pt")[0] for out in ("whole", "full"))
    assert same(whole, full)


def test_a_full_disk_costs_a_grid_only(tmp_path, images, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "save_grid", full)
    small(monkeypatch, images, tmp_path, "--duration", 0.064)
    assert "a grid could not be written (No space" in capsys.readouterr().err
    assert weights(tmp_path)[1]["seen"] == 64


def test_the_first_checkpoint_on_a_full_disk_leaves_nothing_half(tmp_path, images, monkeypatch,
                                                                 capsys):
    """No state.pt without ema.pt, whichever of them does not fit, and no word of a previous one."""
    import resource
    out = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (20_000, 300_000):                             # neither fits; ema.pt fits
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            refused(capsys, lambda: small(monkeypatch, images, out, "--duration", 0.008),
                    "the last checkpoint could not be saved: make room")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        names = {f.name for f in out.iterdir()}
        assert names == {".lock", "log.jsonl", "options.json"}
    small(monkeypatch, images, out, "--duration", 0.008)
    assert 20_000 < (out / "ema.pt").stat().st_size < 300_000
    assert (out / "state.pt").stat().st_size > 300_000


@pytest.mark.parametrize("full", [1, 2])
def test_checkpoints_are_saved_together_or_not_at_all(tmp_path, monkeypatch, capsys, full):
    calls = []

    def fsync(file):
        calls.append(file)
        if len(calls) == full:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", fsync)
    files = {tmp_path / "a.pt": {"x": 1}, tmp_path / "b.pt": {"x": 2}}
    assert not util.save_checkpoints(files) and not list(tmp_path.iterdir())
    printed = capsys.readouterr().err
    assert "a.pt and " in printed and "b.pt could not be written (No space left on" in printed
    assert util.save_checkpoints(files) and all(name.exists() for name in files)


def test_what_is_no_file_is_not_replaced_and_a_link_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/full", tmp_path / "pipe"):
        with pytest.raises(UserError, match="is a device or a pipe"):
            util.save_checkpoints({name: {}})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "elsewhere/a.png")
    for _ in range(2):
        util.save_grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "elsewhere/a.png").is_file()
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_has_one_run_at_a_time(tmp_path, images, monkeypatch, capsys):
    with locked(tmp_path / "run"):
        refused(capsys, lambda: small(monkeypatch, images, tmp_path / "run", "--duration", 0.016),
                "run is in use by another run")
    assert not (tmp_path / "run").exists()                      # nothing was written there
    small(monkeypatch, images, tmp_path / "run", "--duration", 0.016)

    killed = [tmp_path / "run" / name for name in ("ema.pt.0123abcd.part", "mine.part")]
    for file in killed:
        file.write_bytes(b"")

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    with monkeypatch.context() as m:
        m.setattr("fcntl.flock", no_locks)                      # as on some network disks
        small(monkeypatch, images, tmp_path / "run", "--duration", 0.032)
    assert "cannot be locked ([Errno 38] Function not implemented)" in capsys.readouterr().err
    assert weights(tmp_path / "run")[1]["seen"] == 32
    assert [file.exists() for file in killed] == [True, True]   # another run may be at its own
    small(monkeypatch, images, tmp_path / "run", "--duration", 0.048)
    assert [file.exists() for file in killed] == [False, True]


def test_data_may_move_but_not_change(tmp_path, images, monkeypatch, capsys):
    small(monkeypatch, images, tmp_path / "run", "--duration", 0.016)
    moved = tmp_path / "elsewhere/under-another-name"
    moved.parent.mkdir()
    Path(images).rename(moved)
    small(monkeypatch, f"{moved}/", tmp_path / "run", "--duration", 0.032)
    assert weights(tmp_path / "run")[1]["seen"] == 32
    (moved / "0.png").rename(moved / "x.png")                   # two images change places
    (moved / "1.png").rename(moved / "0.png")
    (moved / "x.png").rename(moved / "1.png")
    refused(capsys, lambda: small(monkeypatch, moved, tmp_path / "run", "--duration", 0.064),
            "holds a run with images' digest")


def test_precision_may_change_and_an_old_state_may_lack_what_is_new(tmp_path, images, monkeypatch):
    out = tmp_path / "run"
    small(monkeypatch, images, out, "--duration", 0.008, "--precision", "bf16")
    small(monkeypatch, images, out, "--duration", 0.016, "--precision", "fp32")
    assert weights(out)[1]["options"]["precision"] == "fp32" and weights(out)[1]["seen"] == 16
    state = torch.load(out / "state.pt", weights_only=True)
    for part, names in (("options", ["keep_every", "precision", "augment"]), ("config", ["levels"]),
                        ("data", ["digest", "latents"])):
        for name in names:
            del state[part][name]
    torch.save(state, out / "state.pt")
    small(monkeypatch, images, out, "--duration", 0.032)
    assert weights(out)[1]["seen"] == 32


def test_a_damaged_options_file_is_one_line(tmp_path, images, monkeypatch, capsys):
    small(monkeypatch, images, tmp_path / "run", "--duration", 0.016, "--path", "blurring")
    stored = json.loads((tmp_path / "run/options.json").read_text())
    resume = ["--resume", tmp_path / "run", "--device", "cpu"]
    refused(capsys, lambda: run(monkeypatch, *resume, "--bnr", 0.5), "--bnr", "--path")
    for change, words in (({"batch": "x"}, "--batch: must be"), ({"preset": "x"}, "no run")):
        (tmp_path / "run/options.json").write_text(json.dumps({**stored, **change}))
        refused(capsys, lambda: run(monkeypatch, *resume), words)
    for text in ("{", "5", "null", '{"bogus": 5}'):
        (tmp_path / "run/options.json").write_text(text)
        refused(capsys, lambda: run(monkeypatch, *resume), "it holds no run")


def test_a_run_goes_on_longer_with_another_learning_rate_and_keeps_snapshots(tmp_path, images,
                                                                             monkeypatch, capsys):
    extra = "--bnr inf --seed 3 --keep-every 0.016 --snapshot-every 0 --duration".split()
    small(monkeypatch, images, tmp_path / "whole", *extra, 0.064)
    small(monkeypatch, images, tmp_path / "parts", *extra, 0.032)
    small(monkeypatch, images, tmp_path / "parts", *extra, 0.064)
    printed = capsys.readouterr().out.splitlines()
    assert any("from 0.032 to 0.064 kimg" in line for line in printed)
    whole, parts = (weights(tmp_path / out, "state.pt") for out in ("whole", "parts"))
    assert same(whole[0], parts[0])
    assert printed[-1] == f"python sample.py --ckpt {tmp_path}/parts/ema.pt"
    kept = sorted(f.name for f in (tmp_path / "parts").glob("ema-*"))
    assert kept == [f"ema-000000.0{k}.pt" for k in (16, 32, 48, 64)]
    assert weights(tmp_path / "parts", "ema-000000.048.pt")[1]["seen"] == 48
    assert same(weights(tmp_path / "parts", kept[-1])[0], weights(tmp_path / "parts")[0])
    small(monkeypatch, images, tmp_path / "parts", *extra, 0.08, "--lr", 0.005)
    assert log_of(tmp_path / "parts")[-1]["lr"] == 0.005
    refused(capsys, lambda: small(monkeypatch, images, tmp_path / "parts", "--bnr", "inf"),
            "--seed 3, not 0")
    resume = ["--resume", tmp_path / "parts", "--device", "cpu"]
    run(monkeypatch, *resume, "--duration", 0.096)              # with the rate that it had last
    assert [line["lr"] for line in log_of(tmp_path / "parts")[-2:]] == [0.005, 0.005]
    for args, words in ((["--seed", 4], "--seed 3, not 4"), (["--out", "x"], "two folders")):
        refused(capsys, lambda: run(monkeypatch, *resume, *args), words)


def test_output_that_cannot_be_written_ends_nothing(capsys):
    """A reader that has gone is noted like a signal; a full disk does not matter."""
    reading, writing = os.pipe()
    os.close(reading)
    closed = open(writing, "w", buffering=1)
    with signals_noted() as signals:
        for _ in range(2):
            util.say("a line", closed)
    assert signals == [13, 13]
    util.say("a line", closed)
    assert len(signals) == 2
    with contextlib.suppress(OSError):
        closed.close()
    if Path("/dev/full").exists():
        full = open("/dev/full", "w", buffering=1)
        util.say("a line", full)
        with contextlib.suppress(OSError):
            full.close()


def test_a_signal_that_comes_while_processes_agree_counts_in_the_next_step(monkeypatch):
    """Or one process would stop, and the others wait for it."""
    signals = []
    monkeypatch.setattr(util, "world_size", lambda: 2)
    monkeypatch.setattr(util.dist, "all_reduce", lambda *args: signals.append(15))
    assert not util.any_rank(signals) and signals == [15]
    assert util.any_rank(signals)


def test_a_run_whose_output_is_closed_saves_and_ends(tmp_path, images):
    script = [sys.executable, str(ROOT / "train.py"), "--data", images, "--out",
              str(tmp_path / "run"), *SMALL, "--snapshot-every", "0", "--duration", "1000"]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()                                   # the header
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + 13
    assert 0 < weights(tmp_path / "run")[1]["seen"] < 10 ** 6


def test_out_of_memory_is_one_line(capsys):
    refused(capsys, lambda: allocate(2 ** 60), "out of memory", "--batch-gpu")
    with pytest.raises(RuntimeError, match="negative"):
        allocate(-1)


def allocate(size):
    with Parser().one_line_errors():
        torch.empty(size, dtype=torch.uint8)


@pytest.mark.parametrize("extra", ["", "--augment 1"])
def test_accumulation_changes_nothing_but_rounding(tmp_path, images, monkeypatch, extra):
    extra = ["--duration", 0.016, *extra.split()]
    small(monkeypatch, images, tmp_path / "whole", *extra)
    small(monkeypatch, images, tmp_path / "parts", "--batch-gpu", 1, *extra)
    logs = [log_of(tmp_path / d)[0] for d in ("whole", "parts")]
    assert logs[0]["denoise"] == pytest.approx(logs[1]["denoise"], rel=1e-4)
    states = [weights(tmp_path / d, "state.pt")[1]["optimizer"] for d in ("whole", "parts")]
    first = [torch.cat([v["exp_avg"].flatten() for v in s["state"].values()]) for s in states]
    assert (first[0] - first[1]).norm() < 1e-3 * first[0].norm()


# A step and its parts

def test_a_step_is_the_recipes(tmp_path, images, monkeypatch):
    """The first step by hand: what is drawn, the gradient of the loss summed over pixels and
    averaged over the batch, Adam, the EMA."""
    drawn, asked, grids = watch_loss(monkeypatch), [], []

    def watched(x, p, *part, original=train.augment):
        asked.append((x, p))
        return original(x, p, *part)

    def look(filename, run, path, net):
        grids.append((net.training, {k: v.clone() for k, v in net.state_dict().items()}))
        # otherwise each step's graph would be kept
        assert all(p.is_leaf and not p.requires_grad for p in net.parameters())
    monkeypatch.setattr(train, "augment", watched)
    monkeypatch.setattr(train, "draw_grid", look)
    extra = "--augment 0.3 --seed 3 --bnr 2 --lr 1e-2".split()
    small(monkeypatch, images, tmp_path, "--duration", 0.008, "--snapshot-every", 0.004, *extra)
    (_, x0, alpha, sigma, noise, _), (_, _, _, sigma2, noise2, _) = (args for args, _ in drawn)
    assert not torch.equal(sigma, sigma2) and not torch.equal(noise, noise2)    # a step's own
    assert torch.equal(alpha, 2 * sigma)
    assert asked[0][1] == 0.3 and asked[0][0].min() >= -1 and asked[0][0].max() <= 1
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["config"]["unet"] == dict(
        in_channels=3, out_channels=6, channels=8, mult=[1, 2], blocks=1, attention=[4],
        dropout=0.0, augment_dim=9, resolution=8, classes=0)
    group = state["optimizer"]["param_groups"][0]
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    small(monkeypatch, images, tmp_path / "one", "--duration", 0.004, *extra)
    state = torch.load(tmp_path / "one/state.pt", weights_only=True)
    torch.manual_seed(seed_for("weights", 3))
    net = train.build(state["config"])
    torch.manual_seed(seed_for("step", 3, 0))
    labels = train.augment(asked[0][0], 0.3)[1]
    losses = disentangled_loss(lambda x, alpha, sigma: net(x, alpha, sigma, labels),
                               x0, alpha, sigma, noise, 0.5)
    (sum(losses).sum() * 192 / 4).backward()
    moments = state["optimizer"]["state"]
    before = dict(net.named_parameters())
    assert labels.any() and before["unet.from_augment.weight"].grad.any()
    for i, p in enumerate(before.values()):
        torch.testing.assert_close(moments[i]["exp_avg"], 0.1 * p.grad, rtol=1e-3, atol=1e-7)
    ema = torch.load(tmp_path / "one/ema.pt", weights_only=True)["weights"]
    share = 1 - 0.5 ** (4 / 0.2)                                # half-life 4 / 20 images after 4
    for k, v in state["net"].items():
        start = before[k].detach()
        torch.testing.assert_close(ema[k], start + share * (v - start), rtol=1e-5, atol=1e-7)
        assert torch.equal(ema[k], state["ema"][k]) and torch.equal(grids[-1][1][k], ema[k])
    assert not any(training for training, _ in grids)
    assert any(not torch.equal(ema[k], state["net"][k]) for k in ema)


def test_weights_noise_and_order_have_seeds_of_their_own(tmp_path, monkeypatch):
    seeds = [seed_for(purpose, seed, i) for purpose in ("weights", "step", "epoch")
             for seed in range(3) for i in range(3)]
    assert len(set(seeds)) == 27 and all(0 <= s < 2 ** 63 for s in seeds)
    drawn, started = watch_loss(monkeypatch), []

    def build(config, original=train.build):
        started.append(torch.initial_seed())
        return original(config)
    monkeypatch.setattr(train, "build", build)
    train.train(small_options(tmp_path, "--duration", 0.004), tensor_of_noise(10, 3, 8, 8))
    noise = drawn[0][0][4]

    def first_noise(seed):
        torch.manual_seed(seed)
        torch.randn(4)                                          # the levels come first
        return torch.randn(4, 3, 8, 8)
    assert started == [seed_for("weights", 0)]
    assert torch.equal(noise, first_noise(seed_for("step", 0, 0)))
    for other in (0, started[0], seed_for("epoch", 0, 0)):
        assert not torch.equal(noise, first_noise(other))
        g = torch.Generator().manual_seed(other)
        own = other == seed_for("epoch", 0, 0)
        assert torch.equal(epoch(0, 1000, 0), torch.randperm(1000, generator=g)) == own


def test_the_network_is_told_the_levels_of_each_image(tmp_path, monkeypatch):
    """--bnr any: what reaches the unet is the image at the levels that it is told, in parts too."""
    drawn, told = watch_loss(monkeypatch), []

    def watched(*args, original=train.parts):
        path, net, config = original(*args)
        net.unet.register_forward_pre_hook(
            lambda unet, args, kw: told.append((args, kw)) if unet.training else None,
            with_kwargs=True)
        return path, net, config
    monkeypatch.setattr(train, "parts", watched)
    options = "--bnr any --batch 16 --batch-gpu 8 --duration 0.064".split()
    train.train(small_options(tmp_path, *options), tensor_of_noise(50, 3, 8, 8))
    assert len(drawn) == len(told) == 8
    ratios = []
    for ((_, x0, alpha, sigma, noise, _), _), ((x, c_noise, *_), kw) in zip(drawn, told):
        ratios += (alpha / sigma).tolist()
        torch.testing.assert_close(kw["ratio"], 4 * alpha / (alpha + sigma))
        torch.testing.assert_close(c_noise, sigma.log() / 4)
        for i in range(8):
            seen, _ = degrade(x0[i:i + 1], alpha[i].item(), sigma[i].item(), noise[i:i + 1])
            seen = seen / math.sqrt(sigma[i].item() ** 2 + 0.25)
            torch.testing.assert_close(x[i:i + 1], seen, rtol=1e-4, atol=1e-5)
            assert (kw["ratio"][i] == 0) == (alpha[i] == 0)
    blurred = [r for r in ratios if r]
    assert 4 <= len(ratios) - len(blurred) <= 32 and len(set(blurred)) == len(blurred)
    assert 0.0999 < min(blurred) < 0.5 and 2 < max(blurred) < 10.001


def test_the_networks_sigma_data_is_the_losses(tmp_path, monkeypatch):
    drawn = watch_loss(monkeypatch)
    unet = UNet(3, 6, channels=8, mult=(1, 2), blocks=1, attention=(4,), resolution=8)
    torch.nn.init.normal_(unet.last.weight, std=0.1)
    net = Denoiser(unet, sigma_data=1.)
    options = small_options(tmp_path, "--duration", 0.008, "--lr", 0)
    train.train(options, tensor_of_noise(10, 3, 8, 8), net=net)
    for (_, x0, alpha, sigma, noise, sigma_data), terms in drawn:
        assert sigma_data == 1
        x, blurry = degrade(x0, alpha, sigma, noise)
        with torch.no_grad():
            heads = net(x, alpha, sigma)
        for term, head, target in zip(terms, heads, (blurry, x0 - blurry)):
            weight = (sigma ** 2 + 1) / sigma ** 2
            expected = weight * (head - target).square().mean((1, 2, 3))
            torch.testing.assert_close(term.detach(), expected)
    assert len(drawn) == 2


def test_the_ema_has_its_half_life_in_images(tmp_path, images, monkeypatch):
    """One step at a time: ema' = ema + (1 - 2^(-batch / half-life)) (net' - ema), the half-life at
    most a twentieth of what was seen."""
    extra = "--ema 0.016 --snapshot-every 0".split()
    small(monkeypatch, images, tmp_path, "--duration", 0.36, *extra)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    small(monkeypatch, images, tmp_path, "--duration", 0.364, *extra)
    after = torch.load(tmp_path / "state.pt", weights_only=True)
    assert after["seen"] == 364
    share = 1 - 0.5 ** (4 / 16)             # 364 / 20 = 18.2 images would be longer than the 16
    for k, v in state["ema"].items():
        expected = v + share * (after["net"][k] - v)
        torch.testing.assert_close(after["ema"][k], expected, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_warms_up_linearly(tmp_path, images, monkeypatch):
    small(monkeypatch, images, tmp_path, *"--duration 0.064 --warmup 0.032 --lr 0.004".split())
    rates = [line["lr"] for line in log_of(tmp_path)]
    assert rates == pytest.approx([0.002, 0.004, 0.004, 0.004])


def test_every_image_is_seen_once_an_epoch():
    stream = torch.cat([shuffled(start, 4, 10, 0) for start in range(0, 40, 4)])
    for e in range(4):
        assert sorted(stream[e * 10:e * 10 + 10].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:20].tolist()
    assert torch.equal(torch.cat([shuffled(0, 25, 10, 0), shuffled(25, 15, 10, 0)]), stream)


def test_training_tells_the_network_each_images_class(tmp_path, monkeypatch):
    for name, shade in (("black", 0), ("white", 255)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            plain = np.full((8, 8, 3), shade, np.uint8)
            Image.fromarray(plain).save(tmp_path / "set" / name / f"{i}.png")
    drawn = watch_loss(monkeypatch)
    options = """--cond --channels 8 --mult 1 --attention --resolution 8 --batch 8 --batch-gpu 4
                 --duration 0.016 --sample-steps 1 --device cpu""".split()
    run(monkeypatch, "--data", tmp_path / "set", "--out", tmp_path / "run", *options)
    assert len(drawn) == 4
    for (net, x0, *_), _ in drawn:
        assert torch.equal(x0.mean((1, 2, 3)), 2. * net.keywords["label"] - 1)


@pytest.mark.parametrize("extra", ["--cond --augment 0.5 --batch-gpu 2", "--bnr any",
                                   "--bnr inf --param x0", "--path blurring --param noise"])
def test_a_step_leaves_nothing_on_the_cpu(extra, tmp_path, monkeypatch):
    """The GPU's code on torch's meta device, where mixing it with the CPU fails as on a GPU.
    autocast, pinned memory and the fused Adam, which it has not, are replaced."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kw: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    args, device = small_options(tmp_path, *extra.split()), torch.device("meta")
    data = Images(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.arange(10) % 2, ("a", "b"))
    path, net, _ = train.parts(args, data, None, None)
    net = net.to(device, memory_format=torch.channels_last).train()
    ema, optimizer = copy.deepcopy(net), torch.optim.Adam(net.parameters())
    batch = train.draw_batch(args, path, data.images, data.labels, 0, device)
    records = train.backward(args, net, batch, 0, bf16=True)
    optimizer.step()
    train.update_ema(args, ema, net, 4)
    assert records.shape == (3, 4) and records.device == device
    assert all(v.device == device for v in batch.values() if v is not None)
    with pytest.raises(RuntimeError, match="meta"):
        train.backward(args, net, {**batch, "x0": torch.zeros(4, 3, 8, 8)}, 0, bf16=True)


@pytest.mark.parametrize("bnr", [0.5, "inf"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_step(tmp_path, images, monkeypatch, capsys,
                                                          what, bnr):
    """The message names the step and the loss by level; the checkpoint and the weights stay."""
    out, calls, stepped = tmp_path / "run", [], []
    extra = ["--bnr", bnr, "--duration"]
    small(monkeypatch, images, out, *extra, 0.032)
    before = (out / "ema.pt").read_bytes()

    def poisoned(net, x0, alpha, *args, original=train.disentangled_loss):
        denoise, deblur = original(net, x0, alpha, *args)
        calls.append(1)
        if len(calls) == 3:
            low = alpha.argmin()
            poison = torch.zeros(len(alpha)).index_fill(0, low, math.inf) if what == "loss" else \
                (deblur - deblur.detach()).sqrt()               # 0, with a slope that is not finite
            deblur = deblur + poison
        return denoise, deblur
    monkeypatch.setattr(train, "disentangled_loss", poisoned)
    monkeypatch.setattr(train, "update_ema", lambda *args: stepped.append(1))
    last = refused(capsys, lambda: small(monkeypatch, images, out, *extra, 0.064),
                   "the loss or its gradient is not finite at step 11", ": {'denoise': ",
                   "try a lower --lr, or --precision fp32")
    assert ("'deblur_by_level': [inf, " in last) == (what == "loss") and len(stepped) == 2
    assert (out / "ema.pt").read_bytes() == before


def test_a_torn_log_line_is_dropped(tmp_path, images, monkeypatch):
    small(monkeypatch, images, tmp_path / "run", "--duration", 0.032)
    with open(tmp_path / "run/log.jsonl", "ab") as f:
        f.write(b'{"a": 1}\n[]\n\xff\xfe{"kimg"\n{"kimg": "x"}\n{"kimg": 0.0')
    small(monkeypatch, images, tmp_path / "run", "--duration", 0.064)
    assert [line["step"] for line in log_of(tmp_path / "run")] == [4, 8, 12, 16]


def test_log_lines_split_the_loss_by_quartile_of_the_levels(monkeypatch):
    t = torch.exp(-1.2 + 1.2 * torch.tensor([-0.75, -0.6, 0.6, 0.75, -2., -0.3, 0.3, 2.]))
    denoise = torch.tensor([1., 2, 3, 4, 3, 4, 5, 6])
    records = torch.stack([t, denoise, torch.zeros(8)])
    args = argparse.Namespace(batch=4, device="cpu")
    line = train.summary(args, 8, [records[:, :3], records[:, 3:]], 0.1, time.time() - 2)
    assert line["denoise_by_level"] == [2, 3, 4, 5]
    assert line["denoise"] == 3.5 and line["deblur"] == 0
    assert line["step"] == 2 and line["images_per_s"] == pytest.approx(4, rel=0.1)
    monkeypatch.setattr(time, "time", lambda: 5.)               # a clock that stands still
    one = train.summary(args, 8, [records[:, :1]], 0.1, 5.)
    assert one["denoise_by_level"] == [1, None, None, None] and one["images_per_s"] > 0


# From the command line

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Leaves, the whole way from the command line: what the README's first command does, made
    short."""
    out = tmp_path_factory.mktemp("trained")
    options = """--device cpu --duration 0.256 --out run --sample-steps 3 --resolution 8
                 --attention 4""".split()
    script = [sys.executable, str(ROOT / "train.py"), *options]
    subprocess.run(script, cwd=out, check=True, capture_output=True)
    return out


def test_a_run_leaves_what_the_documentation_says(trained):
    names = {f.name for f in (trained / "run").iterdir()}
    assert names == {"ema.pt", "state.pt", "log.jsonl", "options.json", ".lock",
                     "grid-000000.256.png"}
    assert json.load(open(trained / "run/options.json"))["bnr"] == 0.5
    checkpoint = torch.load(trained / "run/ema.pt", weights_only=True)
    assert checkpoint["data"]["name"] == "leaves"
    assert checkpoint["config"]["bnr"] == 0.5 and checkpoint["seen"] == 256
    assert Image.open(trained / "run/grid-000000.256.png").size == (8 * 66, 8 * 66)


def test_sampling_from_the_command_line(trained, monkeypatch, capsys):
    def draw(*args):
        run(monkeypatch, "--ckpt", trained / "run/ema.pt", "--device", "cpu", "--steps", 4, *args,
            main=sample.main)
        return capsys.readouterr().out

    def image(folder, name="000007.png"):
        return np.asarray(Image.open(trained / folder / name)).astype(int)
    assert "NFE 7" in draw("--seeds", "0-9", "--out", trained / "all/", "--churn", 1)
    names = sorted(f.name for f in (trained / "all").iterdir())
    assert names == [f"{i:06d}.png" for i in range(10)]
    assert Image.open(trained / "all-grid.png").size == (4 * 66, 3 * 66)
    draw("--seeds", "7", "--out", trained / "one", "--churn", 1)
    draw("--seeds", "5,6-7,60-63", "--out", trained / "some", "--churn", 1, "--batch", 2)
    for other in ("one", "some"):
        assert abs(image("all") - image(other)).max() <= 1
    draw("--seeds", "7", "--out", trained / "calm")
    draw("--seeds", "7", "--out", trained / "late", "--churn", 1, "--s-max", 0.1)
    different = {(trained / d / "000007.png").read_bytes() for d in ("one", "calm", "late")}
    assert len(different) == 3
    draw("--out", trained / "new/s", "--solver", "multistep")
    assert (trained / "new/s-grid.png").exists() and (trained / "new/s/000063.png").exists()
    draw("--init", trained / "all/000000.png", "--level", 0.02, "--seeds", "0",
         "--out", trained / "back")
    difference = image("all", "000000.png") - image("back", "000000.png")
    assert abs(difference).mean() < 8       # a hundredth of the range in, about that out


def test_options_of_sampling_that_make_no_sense(trained, tmp_path, monkeypatch, capsys):
    def draw(*args):
        run(monkeypatch, "--ckpt", trained / "run/ema.pt", "--device", "cpu", "--steps", 2,
            "--out", tmp_path / "s", *args, main=sample.main)
    for args, words in ((["--s-min", 1], "belong to --churn"),
                        (["--churn", 1, "--s-min", 5, "--s-max", 1], "--s-min 5 is above")):
        refused(capsys, lambda: draw(*args), words)
    draw("--seeds", 3)
    draw("--init", tmp_path / "s/000003.png", "--seeds", "2-4")         # into the same folder
    assert {f.name for f in (tmp_path / "s").iterdir()} == {f"{i:06d}.png" for i in (2, 3, 4)}


@pytest.mark.parametrize("script", [train, sample])
def test_no_option_is_taken_by_torchrun(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.M))
    assert {"--batch", "--device"} <= options
    for option in options:
        parsed = get_args_parser().parse_args(["--nproc_per_node=2", "x.py", option, "1"])
        assert parsed.training_script_args == [option, "1"]


def test_lists_of_seeds():
    assert sample.seed_list("7,0-2,5-6") == [7, 0, 1, 2, 5, 6]
    with pytest.raises(argparse.ArgumentTypeError, match="at most 10 million"):
        sample.seed_list("7,0-99999999999")


def test_an_interrupted_drawing_keeps_what_is_drawn(trained, tmp_path, monkeypatch, capsys):
    def interrupted(*args, original=sample.generate, **kw):
        yield next(original(*args, **kw))
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "generate", interrupted)
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, "--ckpt", trained / "run/ema.pt", "--device", "cpu", "--steps", 2,
            "--batch", 4, "--out", tmp_path / "s", main=sample.main)
    assert e.value.code == 130 and "interrupted; what is written" in capsys.readouterr().err
    assert len(list((tmp_path / "s").iterdir())) == 4


def test_bad_options(trained, images, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "leaves", lambda n, size: torch.zeros(n, 3, size, size).byte())
    cases = [
        (["--bnr", "-1"], ["--bnr", "-1"]),
        (["--bnr", "nan"], ["--bnr", "nan"]),
        (["--bnr", "half"], ["--bnr", "half"]),
        (["--bnr", "inf", "--param", "noise"], ["--param noise", "--bnr inf has none"]),
        (["--bnr", "1", "--path", "blurring"], ["--path", "--bnr"]),
        (["--bnr", "any", "--path", "blurring"], ["--path", "--bnr"]),
        (["--cond"], ["--cond", "leaves"]),
        (["--data", tmp_path / "empty"], ["contains no image that can be read"]),
        (["--data", tmp_path / "none"], ["does not exist"]),
        (["--data", Path(images) / "0.png"], ["is one image"]),
        (["--resolution", "15"], ["15 x 15 do not divide by 2"]),
        (["--unknown", "1"], ["--unknown"]),
        (["--batch", "10", "--batch-gpu", "4"], ["--batch 10", "--batch-gpu 4"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--lr", "nan"], ["--lr"]),
        (["--channels", "10"], ["30", "multiple of 4"]),
        (["--attention", "7"], ["--attention 7", "16, 8"]),
        (["--attention", "8", "7"], ["--attention 7:"]),
        (["--duration", "0"], ["--duration: must be"]),
        (["--duration", "x"], ["--duration: must be a number", "'x'"]),
        (["--data", ""], ["--data must not be empty"]),
        (["--init-from", ""], ["--init-from must not be empty"]),
        (["--data", tmp_path / "pipe"], ["pipe is a device or a pipe"]),
        (["--data", "/dev/zero"], ["/dev/zero is a device or a pipe"]),
        (["--init-from", tmp_path / "pipe"], ["pipe is a device or a pipe"]),
        (["--resume", tmp_path / "empty"], ["it holds no run"])]
    os.mkfifo(tmp_path / "pipe")
    common = ["--out", tmp_path / "new", "--device", "cpu"]
    for args, words in cases:
        refused(capsys, lambda: run(monkeypatch, *common, *args), *words)
        assert not (tmp_path / "new").exists()
    refused(capsys, lambda: run(monkeypatch, "--out", ""), "--out must not be empty")


def test_a_run_is_not_overwritten_by_another(trained, tmp_path, monkeypatch, capsys):
    before = {f: f.read_bytes() for f in (trained / "run").iterdir()}
    monkeypatch.chdir(trained)
    for args, words in (("--bnr 0 --resolution 8 --attention 4", "--bnr 0.5, not 0.0"),
                        ("", "--resolution 8, not 16")):
        refused(capsys, lambda: run(monkeypatch, "--device", "cpu", *args.split()), words)
    assert {f: f.read_bytes() for f in (trained / "run").iterdir()} == before
    (tmp_path / "text").mkdir()
    (tmp_path / "text/state.pt").write_text("hello")
    refused(capsys, lambda: run(monkeypatch, "--device", "cpu", "--out", tmp_path / "text"),
            "is not a checkpoint of this project")
    assert (tmp_path / "text/state.pt").read_text() == "hello"


def test_bad_checkpoints(trained, tmp_path, monkeypatch, capsys):
    good, text = trained / "run/ema.pt", tmp_path / "text.pt"
    text.write_text("hello")

    def bad(words, ckpt, *args):
        refused(capsys, lambda: run(monkeypatch, "--ckpt", ckpt, "--device", "cpu",
                                    "--out", tmp_path / "out", *args, main=sample.main), *words)
    bad(["text.pt is not a checkpoint"], text)
    bad(["does not exist"], tmp_path / "none.pt")
    checkpoint = torch.load(good, weights_only=True)
    for name, change in (("shape", lambda c: c["config"]["unet"].update(channels=32)),
                         ("config", lambda c: c.pop("config")),
                         ("huge", lambda c: c["config"]["unet"].update(channels=10 ** 6)),
                         ("unknown", lambda c: c["config"]["unet"].update(depth=3))):
        config = {**checkpoint["config"], "unet": dict(checkpoint["config"]["unet"])}
        changed = {**checkpoint, "config": config}
        change(changed)
        torch.save(changed, tmp_path / f"{name}.pt")
        words = ["a part of it is missing or damaged"] if name in ("config", "unknown") else []
        bad([f"{name}.pt is not a model of this project", *words], tmp_path / f"{name}.pt")
    for seeds in ("x", "-3", "5-2,7", "1-", "9" * 30):
        bad(["--seeds", "must be like 0-63"], good, f"--seeds={seeds}")
    bad(["take the ema.pt"], trained / "run/state.pt")
    bad(["--level is for --init"], good, "--level", 2)

    def early(*args, **kw):
        pytest.fail("it drew before it looked where to write")
    monkeypatch.setattr(sample, "generate", early)
    bad(["exists"], good, "--out", text)
    bad(["is not an image that can be read"], good, "--init", text)
    os.mkfifo(tmp_path / "pipe")
    bad(["pipe is a device or a pipe"], tmp_path / "pipe")
    bad(["pipe is a device or a pipe"], good, "--init", tmp_path / "pipe")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    bad(["no churn"], good, "--solver", "multistep", "--churn", "3")


def test_a_model_loads_as_it_was_saved(trained):
    net, checkpoint = load_model(trained / "run/ema.pt")
    saved = torch.load(trained / "run/ema.pt", weights_only=True)["weights"]
    assert same(dict(net.state_dict()), saved) and not net.training
    assert checkpoint["data"]["shape"] == [3, 8, 8]


def test_grey_images_train_and_sample(tmp_path, monkeypatch, capsys):
    (tmp_path / "grey").mkdir()
    for i in range(4):
        write_noise(tmp_path / f"grey/{i}.png", i, (12, 8))
    small(monkeypatch, tmp_path / "grey", tmp_path / "run",
          *"--duration 0.016 --resolution 0 --attention".split())
    run(monkeypatch, "--ckpt", tmp_path / "run/ema.pt", "--out", tmp_path / "s",
        *"--seeds 0 --steps 2 --device cpu".split(), main=sample.main)
    made = Image.open(tmp_path / "s/000000.png")
    assert made.size == (8, 12) and made.mode == "L"


def test_four_channel_latents_train_and_sample(tmp_path, monkeypatch):
    """Float data stay as they are, and the samples are .npy files."""
    data = tensor_of_noise(20, 4, 8, 8)
    drawn = watch_loss(monkeypatch)
    ema = train.train(small_options(tmp_path / "run", "--duration", 0.016), data)
    for (_, x0, *_), _ in drawn:
        assert all((x == data.images).all((1, 2, 3)).any() for x in x0)
    assert not list((tmp_path / "run").glob("*.png"))
    net, checkpoint = load_model(tmp_path / "run/ema.pt")
    assert same(net.state_dict(), ema.state_dict()) and checkpoint["data"]["shape"] == [4, 8, 8]
    std = data.images.double().std((0, 2, 3), unbiased=False)
    assert checkpoint["data"]["std"] == pytest.approx(std.tolist())
    run(monkeypatch, "--ckpt", tmp_path / "run/ema.pt", "--out", tmp_path / "s",
        *"--seeds 0-3 --steps 2 --device cpu".split(), main=sample.main)
    assert sorted(f.name for f in (tmp_path / "s").iterdir()) == [f"{i:06d}.npy" for i in range(4)]
    latents = np.stack([np.load(tmp_path / f"s/{i:06d}.npy") for i in range(4)])
    assert latents.shape == (4, 4, 8, 8) and latents.dtype == np.float32
    drawn = sample.generate(net, ConstantBNR(0.5), (4, 8, 8), range(4), steps=2)
    np.testing.assert_allclose(latents, torch.cat(list(drawn)).numpy(), rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "s-grid.png").exists()


@pytest.mark.parametrize("script, made", [("degrade.py", "degrade.png")])
def test_every_file_runs_by_itself(tmp_path, script, made):
    name, *args = script.split()
    done = subprocess.run([sys.executable, str(ROOT / name), *args], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and done.stderr == ""
    assert made is None or Image.open(tmp_path / made).size[0] > 100


@pytest.fixture
def two_classes(tmp_path):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(8):
            write_noise(tmp_path / "set" / name / f"{i}.png", i)
    return tmp_path / "set"


@pytest.mark.parametrize("options", [
    "--path blurring", "--param x0", "--param noise", "--bnr inf", "--bnr inf --param x0",
    "--cond --augment 0.2"])
def test_each_variant_from_the_command_line(options, two_classes, tmp_path, monkeypatch, capsys):
    options = options.split()
    small(monkeypatch, two_classes, tmp_path / "run", "--duration", 0.008, *options)
    net, checkpoint = load_model(tmp_path / "run/ema.pt")
    path, cold = sampling_path(checkpoint), "inf" in options
    warm = BlurringPath if "--path" in options else ConstantBNR
    assert type(path) is (ColdPath if cold else warm)
    param = options[-1] if "--param" in options else "residual"
    assert type(net) is PARAMETERIZATIONS[param] and net.classes == 2 * ("--cond" in options)

    def draw(*args, out="s"):
        run(monkeypatch, "--ckpt", tmp_path / "run/ema.pt", "--device", "cpu", "--out",
            tmp_path / out, *args, main=sample.main)

    def bad(*args, words=()):
        refused(capsys, lambda: draw(*args), *words)
    draw("--seeds", "0-3", "--steps", 3, "--churn", 1)
    assert len(list((tmp_path / "s").glob("*.png"))) == 4
    if cold:
        for level in (0.05, 9):
            bad("--init", two_classes / "a/0.png", "--level", level,
                words=["above 0.1 and at most 8"])
        draw("--init", two_classes / "a/0.png", "--seeds", 0, out="back")
        assert [f.name for f in (tmp_path / "back").iterdir()] == ["000000.png"]
        files = [np.asarray(Image.open(f)) for f in two_classes.rglob("*.png")]
        x = normalize(torch.from_numpy(np.stack(files))).mean((1, 2)).double()
        colour = checkpoint["config"]["colour"]
        assert colour["mean"] == pytest.approx(x.mean(0).tolist(), abs=1e-6)
        cov = np.cov(x.T.numpy(), bias=True)
        assert np.array(colour["cov"]) == pytest.approx(cov, abs=1e-6)
        bad("--solver", "multistep", words=["multistep"])
    if net.classes:
        draw("--seeds", "0-3", "--steps", 3, "--class", "b", "--churn", 1, out="b")
        a, b = ([(tmp_path / d / f"00000{i}.png").read_bytes() for i in range(4)] for d in "sb")
        assert a[1::2] == b[1::2] and a[0] != b[0]      # odd seeds have class 1, b, unless asked
        bad("--class", "c", words=["a, b"])
    else:
        bad("--class", "b", words=["--cond"])


def test_one_network_for_every_ratio_from_the_command_line(trained, two_classes, tmp_path,
                                                           monkeypatch, capsys):
    ckpt = tmp_path / "run/ema.pt"
    small(monkeypatch, two_classes, tmp_path / "run", "--duration", 0.032, "--bnr", "any")
    net, checkpoint = load_model(ckpt)
    assert net.told_ratio and checkpoint["config"]["bnr"] == "any"
    assert sampling_path(checkpoint).bnr == 0.5

    def draw(out, *args, ckpt=ckpt):
        run(monkeypatch, "--ckpt", ckpt, "--device", "cpu", "--steps", 2, "--out", tmp_path / out,
            *args, main=sample.main)
        return (tmp_path / out).with_name(f"{out}-grid.png")
    grid = (tmp_path / "run/grid-000000.032.png").read_bytes()
    as_training = ["--solver", "multistep", "--steps", 12]
    assert draw("plain", *as_training).read_bytes() == grid
    assert draw("half", *as_training, "--bnr", 0.5).read_bytes() == grid
    others = [draw("s", *args.split()).read_bytes()
              for args in ("--bnr 0", "--bnr 10", "--path blurring")]
    assert len({grid, *others}) == 4
    run(monkeypatch, "--ckpt", ckpt, "--device", "cpu", "--steps", 2, "--bnr", 0, 0.5, 2, "--out",
        tmp_path / "film.png", main=strip.main)
    height = Image.open(tmp_path / "film.png").height
    assert height == 16 + 3 * 4 * 66                            # four rows a ratio
    refused(capsys, lambda: run(monkeypatch, "--ckpt", ckpt, "--bnr", 0, "--path", "blurring",
                                main=strip.main), "--bnr and --path are two ways")
    for args, words in (("--bnr 11", "--bnr 11: the model knows ratios from 0 to 10"),
                        ("--bnr 1 --path blurring", "--bnr and --path are two ways"),
                        ("--bnr 0 --path blurring", "--bnr and --path are two ways"),
                        ("--bnr nan", "--bnr: must be a number of at least 0"),
                        ("--bnr 0 1", "unrecognized arguments: 1")):
        refused(capsys, lambda: draw("s", *args.split()), words)
    for args in ("--bnr 0", "--bnr 0.5", "--path blurring"):
        refused(capsys, lambda: draw("s", *args.split(), ckpt=trained / "run/ema.pt"),
                "--bnr and --path are for a model trained with --bnr any")


def test_a_run_starts_from_another_models_weights(images, tmp_path, monkeypatch, capsys):
    """The ratio's layer, which is new, starts at zero."""
    hot, out = tmp_path / "hot", tmp_path / "any"
    small(monkeypatch, images, hot, "--bnr", 0, "--duration", 0.032, "--lr", 0.01)
    extra = ["--bnr", "any", "--lr", 0, "--init-from", hot / "ema.pt", "--duration"]
    small(monkeypatch, images, out, *extra, 0.004)
    old = weights(hot)[0]
    for part in ("net", "ema"):
        new = weights(out, "state.pt")[1][part]
        assert new.keys() - old.keys() == {"unet.from_ratio.weight"}
        for name, v in new.items():
            assert torch.equal(v, old.get(name, torch.zeros_like(v)))
    (hot / "ema.pt").rename(hot / "away.pt")                    # to resume it is not needed
    small(monkeypatch, images, out, *extra, 0.008)
    assert weights(out)[1]["seen"] == 8
    wide = ["--channels", 16, "--init-from", hot / "away.pt"]
    last = refused(capsys, lambda: small(monkeypatch, images, tmp_path / "wide", *wide),
                   "away.pt does not fit this network")
    assert "size mismatch" in last and not (tmp_path / "wide").exists()


def test_colour_of_one_image():
    white = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    assert Images(white).colour() == {"mean": [1.], "cov": [[0.]]}


def test_presets_are_the_recipes_table():
    """Every number of the README's table, read from it."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    head = next(i for i, row in enumerate(rows) if "`church128`" in row)
    table = {row[0]: row[1:] for row in rows[head + 1:head + 11]}

    def cells(words, column):
        return next(v[column] for k, v in table.items() if words in k)

    def numbers(text):
        return [float(n) for n in re.findall(r"[\d.]+(?:e-?\d+)?", text)]
    for column, preset in enumerate(p.strip("`") for p in rows[head][1:]):
        o = train.options(["--preset", preset, "--data", "x"])
        unit = 1000 if "Mimg" in cells("warm-up", column) else 1
        assert numbers(cells("images", column)) == [o.resolution] * 2
        assert numbers(cells("width", column)) == o.mult
        side = o.resolution
        attention = train.unet_config(o, 3, side, side, 0)["attention"]
        assert numbers(cells("attention", column)) == [o.blocks, *attention]
        assert numbers(cells("batch", column)) == [o.batch, o.lr]
        assert numbers(cells("warm-up", column)) == [o.warmup / unit, o.duration / unit]
        found = numbers(cells("dropout", column))
        assert (found + [0, 0])[:2] == [o.dropout, o.augment]
        assert numbers(cells("half-life", column)) == [o.ema]
        assert numbers(cells("sampling", column)) == [2 * o.sample_steps - 1]
    other = vars(train.options(["--data", "cifar10"]))
    assert other == {**vars(train.options(["--preset", "cifar10"])), "data": "cifar10"}


def test_attention_is_at_a_level_that_exists_or_refused():
    def sides(words):
        args = train.options(words.split())
        return train.unet_config(args, 3, args.resolution, args.resolution, 0)["attention"]
    for words, expected in (("", [8]), ("--resolution 32", [16]), ("--attention", []),
                            ("--resolution 32 --mult 1 1 1", [16]),
                            ("--preset cifar10 --mult 1", [32]), ("--attention 16 8", [16, 8])):
        assert sides(words) == expected, words
    with pytest.raises(UserError, match="--attention 8: the levels have sides of 32, 16"):
        sides("--resolution 32 --attention 8")


def test_presets_have_the_papers_sizes():
    with torch.device("meta"):
        for name, count in (("cifar10", 55_740_806), ("ffhq64", 61_809_030), ("tiny", 423_870)):
            args = train.options(["--preset", name])
            unet = UNet(**train.unet_config(args, 3, args.resolution, args.resolution, 0))
            assert sum(p.numel() for p in unet.parameters()) == count


SHARED = ROOT.parent / "shared/data/cifar10-train-jpeg.tar.xz"


@pytest.mark.skipif(not SHARED.exists(), reason="the photographs are not beside this checkout")
def test_photographs_train(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    with tarfile.open(SHARED) as tar:
        for _, member in zip(range(300), tar):
            if member.isfile():
                (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / member.name).write_bytes(tar.extractfile(member).read())
    options = """--preset tiny --channels 16 --duration 1.5 --device cpu --log-every 0.5
                 --warmup 0.5 --sample-steps 4""".split()
    run(monkeypatch, "--data", folder, "--out", tmp_path / "run", *options)
    lines = log_of(tmp_path / "run")
    assert lines[-1]["denoise"] < 0.95 * lines[0]["denoise"]
    assert os.path.exists(tmp_path / "run/ema.pt")
