"""A GPU's code without a GPU: on a stand-in for another device (other_device.py), and what follows
from the device elsewhere."""
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
import train
from data import Images
from degrade import ConstantBNR, dct2
from fid import mean_and_covariance
from loss import disentangled_loss
from model import PARAMETERIZATIONS, Denoiser, UNet
from other_device import OTHER, OtherDevice
from runs import ROOT, latents, log_of, options, pictures, same, seen_by, steps_of, words
from util.checkpoint import load_model, read_checkpoint
from util.cli import UserError, progress
from util.inception import InceptionV3

SIDES = {"cifar10": 32, "ffhq64": 64, "church128": 128}
HALF = ConstantBNR(0.5)


class SkippingAdam(torch.optim.Adam):
    """Adam with what a fused one does on a GPU, and not here: where found_inf is 1, the gradients
    do not reach the weights."""
    _step_supports_amp_scaling = True

    def step(self):
        is_bad = self.__dict__.pop("found_inf", torch.zeros(()))
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = torch.where(is_bad > 0, 0, p.grad)
        super().step()


def trained_on(device, args, data, **parts):
    args.device = str(device)
    parts.setdefault("optimizer", partial(SkippingAdam, lr=args.lr))
    return train.train(args, data, **parts)


# Everything runs on another device, and gives what it gives on the CPU


def trained(out, preset: str, device) -> list:
    """The log's lines of two runs, the second of which resumes the first, of a preset's network
    that is an eighth as wide, with one block a level."""
    side = SIDES[preset]
    x = torch.randn(6, 3, side, side, generator=torch.Generator().manual_seed(0)) / 2
    data = Images(x, torch.arange(6) % 2, ("a", "b"), latents=True)             # draws no grid
    line = ["--preset", preset, "--channels", "16", "--blocks", "1", "--batch", "2", "--cond",
            "--batch-gpu", "1", "--augment", "0.5", "--warmup", "0", "--log-every", "0.002",
            "--precision", "fp32", "--no-compile", "--snapshot-every", "0", "--out", str(out)]
    for duration in ("0.002", "0.004"):
        trained_on(device, train.options([*line, "--duration", duration]), data)
    return log_of(out)


def drawn(ckpt, side: int, device) -> torch.Tensor:
    """One image of each way of sampling."""
    net, _ = load_model(ckpt, device)
    images = []
    for more in (dict(churn=1.), dict(solver="multistep"), dict(solver="ancestral"),
                 dict(init=torch.zeros(1, 3, side, side), level=1.)):
        images += sample.generate(net, HALF, (3, side, side), [0], steps=2, **more)
    return torch.cat(images)


@pytest.mark.filterwarnings("ignore:.*no-op")
@pytest.mark.parametrize("preset", SIDES)
def test_training_resuming_and_sampling_leave_nothing_on_the_cpu(preset, tmp_path):
    ckpt = tmp_path / "other/ema.pt"
    with OtherDevice():
        log = trained(tmp_path / "other", preset, OTHER)
        images = drawn(ckpt, SIDES[preset], OTHER)
        assert images.device == OTHER
        images = images.cpu()
    assert [line["step"] for line in log] == [1, 2]
    if preset == "cifar10":                                     # and compute what a CPU does
        expected = trained(tmp_path / "cpu", preset, "cpu")
        for name in ("denoise", "deblur"):
            for a, b in zip(log, expected):
                assert a[name] == pytest.approx(b[name], rel=1e-3)
        expected = drawn(ckpt, SIDES[preset], "cpu")
        assert (images - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*no-op")
@pytest.mark.parametrize("more", ["--bnr any --param noise", "--bnr inf --param x0",
                                  "--schedule blurring"])
def test_other_schedules_and_parameterizations_leave_nothing_on_the_cpu(more, tmp_path):
    with OtherDevice():
        trained_on(OTHER, options(tmp_path / "run", f"{more} --duration 0.008"), pictures())
    assert len(list((tmp_path / "run").glob("grid-*.png"))) == 1
    trained_on("cpu", options(tmp_path / "run", f"{more} --duration 0.016"), pictures())
    assert seen_by(tmp_path / "run") == 16                      # a run moves between devices


def test_features_of_fid_are_computed_where_the_network_is():
    torch.manual_seed(0)
    net = InceptionV3().eval().requires_grad_(False)
    images = pictures().images[:3]
    expected, _, _ = mean_and_covariance([images], net)
    with OtherDevice() as device:
        mean, _, n = mean_and_covariance([images], net.to(OTHER))
        with pytest.raises(RuntimeError, match="on the CPU and on the other"):
            net.Conv2d_1a_3x3.conv(torch.zeros(1, 3, 9, 9))     # the stand-in does its work
    assert n == 3 and device.waits
    assert np.abs(mean - expected).max() < 1e-4 * np.abs(expected).max()


# The CPU does not wait for a GPU


def test_a_step_of_training_does_not_wait(tmp_path):
    """Whatever the number of steps, the CPU waits as often: for the log and the last checkpoint."""
    waits = []
    for steps in (1, 2, 6):                                     # the first computes what is cached
        args = options(tmp_path / str(steps), f"--duration {steps * 0.004} --log-every 1000 "
                                              "--augment 0.5 --snapshot-every 0")
        with OtherDevice() as device:
            trained_on(OTHER, args, latents())
        waits.append(device.waits)
    assert waits[1] == waits[2]
    assert any(place.startswith("train.py") for place in waits[1])              # it notes some


@pytest.mark.parametrize("more", [dict(), dict(churn=1.), dict(solver="euler"),
                                  dict(solver="multistep"), dict(solver="ancestral")])
def test_a_step_of_sampling_does_not_wait(more):
    net = Denoiser(UNet(3, 6, channels=8, mult=(1, 2), blocks=1, attention=(4,), resolution=8))
    waits = []
    with OtherDevice() as device:
        net = net.to(OTHER)
        for steps in (2, 2, 6):                                 # the first computes what is cached
            device.waits.clear()
            list(sample.generate(net, HALF, (3, 8, 8), range(4), steps=steps, **more))
            waits.append(list(device.waits))
    assert len(waits[1]) == 1 and waits[1] == waits[2]          # is the image finite?


# A step that is not finite


class Poisoned(Denoiser):
    """A small network whose output is NaN in some of its calls."""

    def __init__(self, calls):
        torch.manual_seed(0)
        super().__init__(UNet(3, 6, channels=8, mult=(1,), blocks=1, attention=(8,), resolution=8))
        self.poisoned_calls = calls
        self.calls = 0

    def forward(self, *args, **kwargs):
        d, r = super().forward(*args, **kwargs)
        self.calls += self.training
        return (d * float("nan"), r) if self.calls in self.poisoned_calls else (d, r)


def run_with_nans(tmp_path, device, calls, **parts):
    """Eight steps, with a log line and a checkpoint after each second one."""
    args = options(tmp_path / "run", "--duration 0.032 --log-every 0.008 --snapshot-every 0.008")
    with OtherDevice():
        return trained_on(device, args, latents(), net=Poisoned(calls), **parts)


@pytest.mark.parametrize("calls", [{3}, {3, 4, 6, 8}])
def test_on_a_gpu_single_steps_that_are_not_finite_are_skipped(calls, tmp_path, capsys):
    run_with_nans(tmp_path, OTHER, calls)
    assert capsys.readouterr().err.count("is skipped: its loss or gradient is not f") == len(calls)
    assert seen_by(tmp_path / "run") == 32
    losses = [line["denoise"] for line in log_of(tmp_path / "run")]
    assert all(loss is None or loss < 1e3 for loss in losses)
    assert (None in losses) == (calls != {3})                   # a line of skipped steps alone
    state = read_checkpoint(tmp_path / "run/state.pt")          # and load_model refuses NaN
    assert all(value.isfinite().all() for value in state["net"].values())


@pytest.mark.parametrize("calls", [{3, 4, 5}, {4, 5, 6}])
def test_on_a_gpu_the_third_such_step_in_a_row_ends_the_run(calls, tmp_path):
    """At the latest before the next checkpoint: of steps 2, 4, 6 and 8, that of 6 does not come."""
    with pytest.raises(UserError, match=f"is not finite at step {max(calls)}, .* --precision fp32"):
        run_with_nans(tmp_path, OTHER, calls)
    assert seen_by(tmp_path / "run") == 16 and len(log_of(tmp_path / "run")) == 2


def test_on_a_cpu_and_with_other_optimizers_the_first_one_ends_the_run(tmp_path):
    for device, parts in (("cpu", {}), (OTHER, {"optimizer": torch.optim.Adam})):
        with pytest.raises(UserError, match="is not finite at step 3"):
            run_with_nans(tmp_path / str(device), device, {3}, **parts)


def test_a_fused_optimizer_skips_the_step_and_nothing_of_it_stays():
    """As if there had been no such step: the weights, and Adam's moments and count of steps."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 7, generator=generator)
    states = []
    for order in ([0, 1, None, 2, None, 3], [0, 1, 2, 3]):
        net = torch.nn.Linear(7, 1, bias=False)
        torch.nn.init.ones_(net.weight)
        optimizer = train.adam(net.parameters(), 0.1)
        finite = train.FiniteCheck(net, optimizer, OTHER)
        for step, i in enumerate(order, 1):
            net.weight.grad = torch.full((1, 7), float("inf"))
            if i is not None:
                net.weight.grad = gradients[None, i]
            finite.check(torch.ones(3, 4), step)
            optimizer.step()
        finite.read()
        states.append({"weight": net.weight.detach(), **optimizer.state[net.weight]})
    assert same(*states)


# Sampling's files and options


class Recorder(Denoiser):
    """A network that notes the sizes of its batches."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 6, 1))
        self.sizes = set()

    def forward(self, x, *args, **kwargs):
        self.sizes.add(len(x))
        return x.float(), 0 * x.float()


@pytest.mark.parametrize("seeds, compiled, sizes", [
    (range(7), True, {3}), (range(7), False, {3, 1}), (range(2), True, {2})])
def test_a_compiled_network_sees_one_size_of_batches(seeds, compiled, sizes, tmp_path):
    net = Recorder()
    args = SimpleNamespace(out=str(tmp_path / "s"), seeds=seeds, batch=3, compile=compiled,
                           device="cpu")
    sample.draw_images(args, net, HALF, {"shape": [3, 8, 8]}, {"steps": 2})
    assert net.sizes == sizes
    names = sorted(path.name for path in (tmp_path / "s").glob("*.png"))
    assert names == [f"{seed:06d}.png" for seed in seeds]


class Blocking(Recorder):
    """In the way of the image that it is drawing."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x, *args, **kwargs):
        self.name.mkdir(exist_ok=True)
        return super().forward(x, *args, **kwargs)


@pytest.mark.parametrize("seed", [0, 5])
def test_an_image_that_cannot_be_written_is_an_error(seed, tmp_path):
    """Whichever thread writes it, in the first batch and in the last."""
    args = SimpleNamespace(out=str(tmp_path / "s"), seeds=range(6), batch=2, compile=False,
                           device="cpu")
    net = Blocking(tmp_path / f"s/{seed:06d}.png")
    with pytest.raises(OSError, match=f"{seed:06d}.png"):
        sample.draw_images(args, net, HALF, {"shape": [3, 8, 8]}, {"steps": 1})
    assert not list(tmp_path.glob("s/*.part"))


class SeesTF32(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 1)

    def forward(self, x, c_noise, augment=None, label=None):
        self.allowed = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
        return self.conv(x)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_tf32_is_for_the_network_alone(precision, tmp_path):
    trained_on("cpu", options(tmp_path / "run", "--duration 0.004"), latents(),
               net=Denoiser(SeesTF32()))
    net, _ = load_model(tmp_path / "run/ema.pt", precision=precision, net=Denoiser(SeesTF32()))
    net(torch.zeros(1, 3, 8, 8), 1., 1.)
    expected = precision == "tf32"
    assert net.unet.allowed == (expected, expected)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


# Clocks, clusters


@pytest.mark.parametrize("minutes, steps", [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6])])
def test_snapshots_by_the_clock(minutes, steps, tmp_path, monkeypatch):
    """By a clock on which each step takes a minute."""
    clock = [0.]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def slow_loss(*args):
        clock[0] += 60
        return disentangled_loss(*args)
    args = options(tmp_path / "run", "--duration 0.024 --log-every 1000 --snapshot-every 0 "
                                     f"--snapshot-minutes {minutes}")
    trained_on("cpu", args, latents(), loss=slow_loss)
    assert steps_of(tmp_path / "run") == steps                  # each checkpoint has a line


def test_without_a_terminal_a_bar_writes_every_30_seconds(capsys):
    list(progress(range(10 ** 6)))                              # takes longer than tqdm's 0.1 s
    assert capsys.readouterr().err.count("\r") == 2             # at the beginning and the end
    bar = progress(total=1)
    assert bar.mininterval == 30
    bar.close()


SRUN = """#!/bin/bash
# two processes on this machine
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids="$pids $!"
done
echo $pids > $FOLDER/pids
code=0
for pid in $pids; do
    wait $pid
    last=$?
    [ $last -gt $code ] && code=$last
done
exit $code
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo localhost || echo "$@" > $FOLDER/scontrol
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no SIGUSR1")
def test_the_pages_slurm_script_saves_and_queues_itself_again(tmp_path, images):
    page = (ROOT / "docs/long-runs.md").read_text()
    script, = [block for block in re.findall("(?:    .*\n)+", page) if "#SBATCH" in block]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    more = " ".join(words(tmp_path / "run", "--duration 1000", data=images))
    script = script.replace("29500", str(port))
    script = script.replace("--data cifar10 --bnr 0.5 --out run", more)
    assert more in script and str(port) in script
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job", textwrap.dedent(script))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "FOLDER": str(tmp_path), "SLURM_NTASKS": "2",
                   "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(tmp_path / "job", cwd=ROOT, env=environment, stderr=subprocess.PIPE,
                           text=True)
    until = time.time() + 300
    while not (tmp_path / "run/ema.pt").exists() and time.time() < until:
        time.sleep(0.2)
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    errors = job.communicate(timeout=300)[1]
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n", errors
    assert errors.count("stopped and saved at") == 1
    assert seen_by(tmp_path / "run") == 4 * steps_of(tmp_path / "run")[-1]


# torch.export


@pytest.mark.parametrize("param", PARAMETERIZATIONS)
def test_a_network_is_exported_for_any_batch_and_stays_as_it_was(param):
    torch.manual_seed(0)
    kind = PARAMETERIZATIONS[param]
    unet = UNet(3, 3 * kind.heads, channels=8, mult=(1, 2), blocks=1, attention=(4,), resolution=8,
                classes=2)
    net = kind(unet).eval().requires_grad_(False)

    def inputs(n):
        level = torch.linspace(0.1, 3, n)
        return torch.randn(n, 3, 8, 8), level / 2, level, None, torch.arange(n) % 2
    batch = {0: torch.export.Dim("batch", max=1024)}
    program = torch.export.export(net, inputs(3), dynamic_shapes=(batch, batch, batch, None, batch),
                                  strict=False)
    x = inputs(5)
    for ours, exported in zip(net(*x), program.module()(*x)):
        assert type(ours) is torch.Tensor and torch.allclose(ours, exported, atol=1e-6)
    assert type(dct2(x[0])) is torch.Tensor                     # no tensor of the trace is cached
