"""A user's own data, schedule, network, loss, optimizer and log function."""
import contextlib
import copy
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from data import Images
from degrade import ColdSchedule, ConstantBNR, Schedule
from loss import disentangled_loss
from model import Denoiser, NoiseDenoiser
from runs import (ROOT, indented_blocks, latents, log_of, options, pictures, same_run, same_state,
                  seen_by)
from sample import generate, sampling_schedule
from util.checkpoint import load_model, read_checkpoint
from util.cli import UserError
from util.images import read_image


class Square(Schedule):
    def alpha(self, sigma):
        return sigma ** 2


class CNN(torch.nn.Sequential):
    def forward(self, x, c_noise, augment=None, label=None):
        level = c_noise[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return super().forward(torch.cat([x, level], 1))


def small_cnn(**given) -> Denoiser:
    torch.manual_seed(0)
    first = torch.nn.Conv2d(3 + 1, 16, 3, padding=1)
    last = torch.nn.Conv2d(16, 2 * 3, 3, padding=1)
    return Denoiser(CNN(first, torch.nn.SiLU(), last), **given)


def short(out, text="", **given):
    """16 images, of four steps."""
    return options(out, f"--duration 0.016 {text}", **given)


def four_samples(net, schedule, channels=3) -> torch.Tensor:
    x = torch.cat(list(generate(net, schedule, (channels, 8, 8), range(4), steps=3)))
    assert x.shape == (4, channels, 8, 8) and x.dtype == torch.float64 and x.isfinite().all()
    return x


# A schedule

def test_a_schedule(tmp_path):
    """Its model loads, for its network is the project's. Its schedule is not, which one line
    says."""
    levels = []

    def watched(net, x0, alpha, sigma, *others):
        levels.append((alpha, sigma))
        return disentangled_loss(net, x0, alpha, sigma, *others)

    ema = train.train(short(tmp_path), latents(), Square(), loss=watched)
    assert len(levels) == 4
    for alpha, sigma in levels:
        assert torch.equal(alpha, sigma ** 2)
    net, checkpoint = load_model(tmp_path / "ema.pt")
    assert torch.equal(four_samples(net, Square()), four_samples(ema, Square()))
    with pytest.raises(UserError, match="'Square' is not one of this project: give it to generate"):
        sampling_schedule(checkpoint)


# A network

def test_a_network(tmp_path):
    """It trains in training mode, also where it was loaded; and it loads again, to sample and to
    resume."""
    net = small_cnn().eval()
    before = small_cnn().state_dict()
    ema = train.train(short(tmp_path / "run"), latents(), net=net)
    assert net.training and not ema.training
    assert not any(torch.equal(v, before[name]) for name, v in net.state_dict().items())
    loaded, _ = load_model(tmp_path / "run/ema.pt", net=small_cnn())
    bnr = ConstantBNR(0.5)
    assert torch.equal(four_samples(loaded, bnr), four_samples(ema, bnr))
    longer = options(tmp_path / "run", "--duration 0.032")
    with pytest.raises(UserError, match="frozen.*requires_grad_"):
        train.train(longer, latents(), net=loaded)
    train.train(longer, latents(), net=loaded.requires_grad_(True))
    train.train(options(tmp_path / "whole", "--duration 0.032"), latents(), net=small_cnn())
    assert same_run(tmp_path / "run", tmp_path / "whole")


class Changed(CNN):
    """A network whose output is changed."""

    def __init__(self, change):
        super().__init__(torch.nn.Conv2d(4, 6, 3, padding=1))
        self.change = change

    def forward(self, x, c_noise, augment=None, label=None):
        return self.change(super().forward(x, c_noise))


WRONG_NETWORKS = {
    "a class": (CNN, "give a model.Denoiser, not type"),
    "no Denoiser": (small_cnn().unet, "give a model.Denoiser, not CNN"),
    "another shape": (Denoiser(Changed(torch.Tensor.sum)), r"must be \[2, 6, 8, 8\], and not"),
    "no gradient": (Denoiser(Changed(torch.Tensor.detach)), "no gradient"),
    "no number": (Denoiser(Changed(torch.Tensor.logit)), "not finite"),
    "two arguments": (Denoiser(torch.nn.Conv2d(3, 6, 1)), r"called as unet\(x, c_noise, augment, ")}


@pytest.mark.parametrize("kind", WRONG_NETWORKS)
def test_what_is_no_network_is_one_line_before_anything_is_written(kind, tmp_path):
    net, message = WRONG_NETWORKS[kind]
    with pytest.raises(UserError, match=message) as e:
        train.train(short(tmp_path / "run"), latents(), net=net)
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


class Labeled(torch.nn.Module):
    def __init__(self, classes, known):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 1)
        self.labels = torch.nn.Embedding(known, 1)
        self.classes = classes

    def forward(self, x, c_noise, augment=None, label=None):
        self.activation = self.conv(x) + self.labels(label)[:, :, None, None]   # for a look
        return self.activation


@pytest.mark.parametrize("net, text, message", [
    (small_cnn(), "--cond", "has 0 classes and the run 3"),
    (Denoiser(Labeled(3, 3)), "", "has 3 classes and the run 0"),
    (Denoiser(Labeled(3, 2)), "--cond", "fails on x of .*index out of range"),
    (Denoiser(Labeled(3, 3)), "--cond", None)])
def test_a_network_with_classes_and_cond_go_together(net, text, message, tmp_path):
    """It is tried with the last class."""
    expected = contextlib.nullcontext()
    if message:
        expected = pytest.raises(UserError, match=message)
    with expected:
        train.train(short(tmp_path / "run", text), pictures(classes="abc"), net=net)
    assert (tmp_path / "run").exists() == (message is None)


def test_a_network_may_have_buffers_and_frozen_and_unused_parameters(tmp_path, capsys):
    """The EMA takes over the buffers as they are."""
    net = small_cnn()
    net.unet.insert(1, torch.nn.BatchNorm2d(16))
    net.unet[0].requires_grad_(False)
    net.unet.unused = torch.nn.Parameter(torch.ones(3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ema = train.train(short(tmp_path), latents(), net=net).state_dict()
    unchanged = {name for name, value in ema.items() if torch.equal(value, before[name])}
    assert unchanged == {"unet.0.weight", "unet.0.bias", "unet.unused"}
    assert "592 of them frozen" in capsys.readouterr().out
    assert torch.equal(ema["unet.1.running_mean"], net.unet[1].running_mean)
    assert net.unet[1].num_batches_tracked == 4                 # not by the trial beforehand


# Networks of any kind

class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x, c_noise, augment=None, label=None):
        return self.conv(x)


class Tied(Convolution):
    def __init__(self):
        super().__init__()
        self.more = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.last.weight = self.more.weight

    def forward(self, x, *others, **more):
        return self.last(self.more(self.conv(x)).relu())


class Masked(Convolution):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((64, 64), -torch.inf).triu(1))

    def forward(self, x, *others, **more):
        return self.conv((torch.softmax(self.mask, 1) @ x.flatten(2).mT).mT.reshape(x.shape))


class Viewing(Convolution):
    def __init__(self):
        super().__init__()
        self.deep = nn.Conv2d(6, 6, 3, padding=1, bias=False)

    def forward(self, x, *others, **more):
        return self.deep(self.conv(x)).view(len(x), -1).view(len(x), 6, 8, 8)


class Normed(Convolution):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x, *others, **more):
        return F.dropout(self.norm(self.conv(x)), 0.1)           # also in eval mode: it is random


class Stated(Convolution):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        self.version = state["version"]


class Half(Convolution):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.conv.to(dtype)

    def forward(self, x, *others, **more):
        return self.conv(x.to(self.conv.weight.dtype))


class HardHalf(Half):
    def forward(self, x, *others, **more):
        return self.conv(x.bfloat16())                           # fails with weights of float32


class Late(Convolution):
    def forward(self, x, *others, **more):
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(1))
        return self.scale * self.conv(x)


class Hidden(Convolution):
    scale = 1.

    def forward(self, x, *others, **more):
        if self.training:
            self.scale = self.scale + 1                          # state_dict() does not have it
        return self.scale * self.conv(x)


class Lazy(Convolution):
    def __init__(self):
        super().__init__()
        self.conv = nn.LazyConv2d(6, 3, padding=1)


class Single(Convolution):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x, *others, **more):
        y = self.conv(x)
        return y + self.norm(y.mean((2, 3)))[:, :, None, None]


@pytest.mark.parametrize("kind", [Tied, Masked, Viewing, Normed, Stated, Half, HardHalf])
def test_a_network_that_trains_can_be_loaded_and_samples(kind, tmp_path):
    for duration in (0.008, 0.016):
        args = options(tmp_path, duration=duration)
        ema = train.train(args, latents(), net=Denoiser(kind()))
    net, checkpoint = load_model(tmp_path / "ema.pt", net=Denoiser(kind()))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for model in (ema, net):
        torch.manual_seed(0)
        outputs.append(torch.cat(model(x, 0.5, 1.)))
    assert torch.equal(*outputs)
    images = list(generate(net, ConstantBNR(0.5), (3, 8, 8), range(2), steps=3))
    assert images[0].isfinite().all()
    if kind is Tied:
        assert net.unet.last.weight is net.unet.more.weight


@pytest.mark.parametrize("kind, text, message", [
    (Late, "", "Unexpected key"), (Lazy, "", "uninitialized"),
    (Hidden, "", "another one when it is loaded"),
    (Single, "--batch-gpu 1", "more than 1 value per channel")])
def test_a_network_that_cannot_be_loaded_again_is_refused_before_the_run(kind, text, message,
                                                                         tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=message) as e:
        train.train(short(out, text), latents(), net=Denoiser(kind()))
    assert "\n" not in str(e.value) and not out.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_16_bit_weights_is_float32(dtype, tmp_path):
    """As the recursion in float64 gives it; in 16 bits it would stand still."""
    net = Denoiser(Half(dtype))
    start = copy.deepcopy(net)
    weights = [net.unet.conv.weight.double().clone()]

    def note(line):
        weights.append(net.unet.conv.weight.double().clone())
    optimizer = partial(torch.optim.SGD, lr=1e-4)
    args = options(tmp_path, "--log-every 0.004", duration=0.4, ema=0.02)
    train.train(args, latents(), net=net, optimizer=optimizer, on_log=note)
    average = weights[0]
    for step, weight in enumerate(weights[1:], 1):
        decay = 0.5 ** (4 / min(20, 0.05 * 4 * step))
        average = decay * average + (1 - decay) * weight
    whole = read_checkpoint(tmp_path / "state.pt")
    saved = whole["ema"]["unet.conv.weight"]
    assert saved.dtype == torch.float32 and len(weights) == 101
    assert (weights[-1] - weights[0]).abs().max() > 0.01
    assert (saved - average).abs().max() < 1e-6
    for duration in (0.2, 0.4):
        args = options(tmp_path / "parts", duration=duration, ema=0.02)
        train.train(args, latents(), net=copy.deepcopy(start), optimizer=optimizer)
    parts = read_checkpoint(tmp_path / "parts/state.pt")
    assert torch.equal(parts["ema"]["unet.conv.weight"], whole["ema"]["unet.conv.weight"])


# Optimizers

class GrowingDecay(torch.optim.SGD):
    """It keeps a number in its group of parameters, as Prodigy does."""

    def step(self):
        for group in self.param_groups:
            group["weight_decay"] += 0.01
        super().step()


OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=1e-4, momentum=0.9, nesterov=True),
    "plain": partial(torch.optim.SGD, lr=1e-4),
    "fused": partial(torch.optim.AdamW, lr=1e-3, fused=True, amsgrad=True),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-3),
    "rprop": partial(torch.optim.Rprop, lr=1e-4),
    "growing": partial(GrowingDecay, lr=1e-4),
    "asgd": partial(torch.optim.ASGD, lr=1e-4),
    "numpy": partial(torch.optim.SGD, lr=np.float64(1e-4), momentum=0.5),
    "tensor": partial(torch.optim.Adam, lr=torch.tensor(1e-3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_resumes_to_the_bit(name, tmp_path):
    for folder, durations in (("whole", [0.04]), ("parts", [0.02, 0.04])):
        for duration in durations:
            train.train(options(tmp_path / folder, duration=duration), latents(),
                        optimizer=OPTIMIZERS[name])
    assert same_state(tmp_path / "whole", tmp_path / "parts")


def test_resuming_takes_the_new_learning_rate_of_each_group(tmp_path):
    def in_two_groups(parameters, lr):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 10 * lr}, {"params": others}], lr,
                               momentum=0.9)
    for duration, lr in ((0.008, 1e-4), (0.016, 1e-5)):
        train.train(options(tmp_path, duration=duration), latents(),
                    optimizer=partial(in_two_groups, lr=lr))
    groups = read_checkpoint(tmp_path / "state.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-5])


# A loss, an optimizer, and what happens at a log line

def doubled(net, x0, alpha, sigma, noise, sigma_data):
    assert sigma_data == 0.7
    denoise, deblur = disentangled_loss(net, x0, alpha, sigma, noise, sigma_data)
    return 2 * denoise, 2 * deblur


def test_a_loss_and_an_optimizer(tmp_path):
    """Half the rate of SGD on twice the loss is the same run. The loss gets the network's
    sigma_data."""
    runs = {"plain": (disentangled_loss, 2e-5), "doubled": (doubled, 1e-5)}
    for out, (loss, lr) in runs.items():
        train.train(short(tmp_path / out), latents(), loss=loss,
                    net=small_cnn(sigma_data=0.7), optimizer=partial(torch.optim.SGD, lr=lr))
    plain, double = (read_checkpoint(tmp_path / out / "state.pt") for out in runs)
    assert not torch.equal(plain["net"]["unet.0.weight"], small_cnn().state_dict()["unet.0.weight"])
    for name, value in plain["net"].items():
        torch.testing.assert_close(double["net"][name], value)
    [line] = log_of(tmp_path / "plain")
    [twice] = log_of(tmp_path / "doubled")
    assert twice["denoise"] == pytest.approx(2 * line["denoise"], abs=3e-5)


def test_the_learning_rate_warms_up_linearly(tmp_path):
    """Each group of parameters to its own; the log has the first's."""
    def two_groups(parameters):
        first, *others = parameters
        return torch.optim.SGD([{"params": others, "lr": 0.004}, {"params": [first], "lr": 0.}])

    net = small_cnn()
    before = net.unet[0].weight.clone()
    args = options(tmp_path, "--duration 0.024 --warmup 0.016 --log-every 0.004")
    train.train(args, latents(), net=net, optimizer=two_groups)
    rates = [line["lr"] for line in log_of(tmp_path)]
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004, 0.004])
    assert torch.equal(net.unet[0].weight, before)


def test_what_happens_at_a_log_line(tmp_path):
    """It gets the lines of log.jsonl."""
    lines = []
    train.train(short(tmp_path, "--log-every 0.004"), latents(), on_log=lines.append)
    assert len(lines) == 4
    assert lines == [json.loads(text) for text in open(tmp_path / "log.jsonl")]


# Resuming

def test_other_parts_do_not_resume_a_run(tmp_path):
    """Nor do other images, labels or classes. The data's name may change."""
    class Other(Square):
        pass

    class Narrow(Square):
        P_std = 0.5
    Narrow.__name__ = "Square"

    class Same(Denoiser):
        def precondition(self, x, f, s):
            return super().precondition(x, f, s)

    data = pictures()
    train.train(short(tmp_path / "run"), data, Square(), small_cnn())
    train.train(short(tmp_path / "bnr"), latents(), ConstantBNR(2))
    longer = options(tmp_path / "run", "--duration 0.032")

    def refused(message, data=data, schedule=Square(), net=None, **others):
        with pytest.raises(UserError, match=message):
            train.train(longer, data, schedule, net or small_cnn(), **others)

    refused("a run with schedule Square, not Other", schedule=Other())
    refused("a run with training_range .*, not", schedule=Narrow())
    refused("sigma_data 0.5, not 0.7", net=small_cnn(sigma_data=0.7))
    refused("precondition Denoiser.*, not Noise", net=NoiseDenoiser(small_cnn().unet))
    refused("precondition Denoiser.*, not .*Same", net=Same(small_cnn().unet))
    refused("loss disentangled_loss, not doubled", loss=doubled)
    refused("optimizer Adam, not SGD", optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(UserError, match="a run with sampling_levels"):
        train.train(options(tmp_path / "bnr", "--duration 0.032"), latents(), ConstantBNR(0.1))

    images = pictures()
    images.images[[0, 1]] = images.images[[1, 0]]
    refused("a run with images' digest", data=images)
    refused("a run with images' digest", data=pictures(classes="ab"))
    refused("images' count 20, not 10.*--init-from", data=Images(data.images[:10]))
    refused("a run with images' classes", data=Images(data.images, classes=["every"]))
    train.train(longer, Images(data.images, name="moved"), Square(), small_cnn())
    assert seen_by(tmp_path / "run") == 32


# Data from a tensor

@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_tensor_of_images(channels, tmp_path):
    """It has a resolution of its own: --resolution is of image files."""
    ema = train.train(short(tmp_path, "--resolution 16"), pictures(channels))
    net, checkpoint = load_model(tmp_path / "ema.pt")
    schedule = sampling_schedule(checkpoint)
    assert torch.equal(four_samples(net, schedule, channels), four_samples(ema, schedule, channels))
    assert checkpoint["data"] == pictures(channels).facts()
    assert checkpoint["options"]["data"] == "noise"             # not the default, leaves


def test_a_range_and_a_scale_that_do_not_fit_are_warnings(tmp_path, capsys):
    """The schedule's range to the training levels, the latents' scale to the network."""
    class Far(Square):
        def sigma_range(self, h, w):
            return 1., 80.

    def warning(name, data=latents(), schedule=None, net=None) -> str:
        train.train(short(tmp_path / name), data, schedule, net)
        printed = capsys.readouterr().err
        return printed[printed.find("warning"):]

    assert "is the schedule's sigma_range right?" in warning("far", schedule=Far())
    large = Images(6 * latents().images, latents=True)
    assert "expects mean 0, standard deviation 0.5: scale the latents" in warning("large", large)
    assert "scale" not in warning("fits", large, net=small_cnn(sigma_data=3.))
    for schedule in (Square(), ConstantBNR(0), ColdSchedule()):
        assert "sigma_range" not in warning(type(schedule).__name__, schedule=schedule)


def test_what_is_no_data_and_no_schedule_is_one_line_before_anything_is_written(tmp_path):
    class Falling(Schedule):
        def alpha(self, sigma):
            return sigma / (1 + sigma ** 2)

    for data, schedule, message in (
            (latents().images, None, "give a data.Images, not Tensor"),
            (latents(), Square, r"Square is a class: give a schedule, Square\(\)"),
            (latents(), Falling(), "the schedule Falling cannot be used: alpha must not fall")):
        with pytest.raises(UserError, match=message):
            train.train(short(tmp_path / "run"), data, schedule)
    assert not (tmp_path / "run").exists()


def test_the_random_state_of_a_script_is_as_before_and_no_grad_does_not_matter(tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with torch.no_grad():
        train.train(short(tmp_path / "a"), latents())
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.randn(3), expected)
    with_graph = Images((latents().images * torch.ones(1, requires_grad=True)), latents=True)
    train.train(short(tmp_path / "b"), with_graph)


# All of them

@pytest.mark.parametrize("first_line", ["import torch\n", "import torch, train\n"])
def test_the_readmes_code_runs_as_it_stands(first_line, tmp_path):
    code, = (block for block in indented_blocks((ROOT / "README.md").read_text())
             if block.startswith(first_line))
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    if "train" in first_line:
        weights = read_checkpoint(tmp_path / "run-swap/ema.pt")["weights"]
        assert all(value.isfinite().all() for value in weights.values())
    else:
        assert read_image(tmp_path / "sixteen.png", 3, 264, 264).unique().numel() > 100
