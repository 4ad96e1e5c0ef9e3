"""The README's section "To swap a part", from outside, each part in a few lines of the user's."""
import argparse
import contextlib
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import degrade
import train
from data import Images
from model import Denoiser, NoiseDenoiser, load_model
from sample import generate, sampling_path
from util import UserError, read_checkpoint

ROOT = Path(__file__).parent.parent
SHORT = """--channels 8 --attention 4 --batch 4 --warmup 0 --log-every 0.016 --sample-steps 2
           --device cpu""".split()


def options(out, duration=0.016, resolution=8):
    given = {"--out": out, "--duration": duration, "--resolution": resolution}
    return train.options([*SHORT, *(str(word) for pair in given.items() for word in pair)])


def noise_images(channels=3, classes=("all",)):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (20, channels, 8, 8), dtype=torch.uint8, generator=g)
    return Images(x, torch.arange(20) % len(classes), classes, "noise")


def four_samples(net, path, channels=3):
    x = torch.cat(list(generate(net, path, (channels, 8, 8), range(4), steps=3)))
    assert x.shape == (4, channels, 8, 8) and x.dtype == torch.float64 and x.isfinite().all()
    return x


# A path

class Square(degrade.Path):
    def levels(self, t):
        return t ** 2, t


def test_a_path(tmp_path, monkeypatch):
    used = []

    def watched(net, x0, alpha, sigma, *args, original=train.disentangled_loss):
        used.append((alpha, sigma))
        return original(net, x0, alpha, sigma, *args)
    monkeypatch.setattr(train, "disentangled_loss", watched)
    ema = train.train(options(tmp_path), noise_images(), Square())
    four_samples(ema, Square())
    assert len(used) == 4 and all(torch.equal(alpha, sigma ** 2) for alpha, sigma in used)


def test_a_model_of_ones_own_path_loads(tmp_path):
    """Its network is the project's. Its path is not, which the command line says."""
    ema = train.train(options(tmp_path), noise_images(), Square())
    net, checkpoint = load_model(tmp_path / "ema.pt")
    assert torch.equal(four_samples(net, Square()), four_samples(ema, Square()))
    with pytest.raises(UserError, match="'Square' is not this project's: give it to generate"):
        sampling_path(checkpoint)


# A network

class CNN(torch.nn.Sequential):
    def forward(self, x, c_noise, augment=None, label=None):
        level = c_noise[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return super().forward(torch.cat([x, level], 1))


def small_cnn():
    torch.manual_seed(0)
    first = torch.nn.Conv2d(3 + 1, 16, 3, padding=1)
    last = torch.nn.Conv2d(16, 2 * 3, 3, padding=1)
    return Denoiser(CNN(first, torch.nn.SiLU(), last))


def test_a_network(tmp_path):
    """It trains in training mode, also where it was loaded; and it loads again, to sample."""
    net, before = small_cnn().eval(), small_cnn().state_dict()
    ema = train.train(options(tmp_path), noise_images(), net=net)
    assert net.training and not ema.training
    assert not any(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    x = four_samples(ema, degrade.ConstantBNR(0.5))
    loaded, checkpoint = load_model(tmp_path / "ema.pt", net=small_cnn())
    assert torch.equal(four_samples(loaded, degrade.ConstantBNR(0.5)), x)
    assert checkpoint["options"]["data"] == "noise"             # not the default, leaves
    with pytest.raises(UserError, match="a network of your own"):
        load_model(tmp_path / "ema.pt")
    with pytest.raises(UserError, match="frozen.*requires_grad_"):
        train.train(options(tmp_path, 0.032), noise_images(), net=loaded)
    train.train(options(tmp_path, 0.032), noise_images(), net=loaded.requires_grad_(True))
    resumed = read_checkpoint(tmp_path / "ema.pt")
    train.train(options(tmp_path / "whole", 0.032), noise_images(), net=small_cnn())
    whole = read_checkpoint(tmp_path / "whole/ema.pt")
    assert resumed["seen"] == whole["seen"] == 32
    assert all(torch.equal(v, resumed["weights"][k]) for k, v in whole["weights"].items())


class Labelled(CNN):
    classes = 2


@pytest.mark.parametrize("net, cond, words", [
    (CNN, True, "has 0 classes and the run 2"), (Labelled, False, "has 2 classes and the run 0"),
    (Labelled, True, None)])
def test_a_network_with_classes_and_cond_go_together(tmp_path, net, cond, words):
    args = options(tmp_path / "run")
    args.cond = cond
    net = Denoiser(net(torch.nn.Conv2d(4, 6, 3, padding=1)))
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        train.train(args, noise_images(classes=("a", "b")), net=net)
    assert (tmp_path / "run").exists() == (words is None)


def test_an_output_of_another_shape_is_refused(tmp_path):
    net = Denoiser(CNN(torch.nn.Conv2d(4, 6, 3)))               # two pixels less
    with pytest.raises(UserError, match="output must be"):
        train.train(options(tmp_path / "run"), noise_images(), net=net)
    assert not (tmp_path / "run").exists()                      # nothing was written


class Wrong(CNN):
    """A network whose answer f is changed, or whose other half is."""
    def __init__(self, change):
        super().__init__(torch.nn.Conv2d(4, 6, 3, padding=1))
        self.change = change

    def forward(self, x, c_noise, augment=None, label=None):
        return self.change(super().forward(x, c_noise))


WRONG = {
    "class": (Wrong, "give a model.Denoiser, not type"),
    "raw": (small_cnn().unet, "give a model.Denoiser, not CNN"),
    "detached": (Denoiser(Wrong(torch.Tensor.detach)), "no gradient"),
    "int": (Denoiser(Wrong(torch.Tensor.long)), r"must be \[2, 6, 8, 8\], and not torch.int64"),
    "complex": (Denoiser(Wrong(lambda f: f + 0j)), "must be .* and not torch.complex64"),
    "nan": (Denoiser(Wrong(lambda f: f / 0)), "not finite"),
    "weight norm": (Denoiser(torch.nn.utils.weight_norm(torch.nn.Conv2d(3, 6, 1))), "deepcopy"),
    "in place": (Denoiser(Wrong(lambda f: f.sigmoid().mul_(2).exp().add_(1))), "in-?place"),
    "two arguments": (Denoiser(torch.nn.Conv2d(3, 6, 1)), "called as unet\\(x, c_noise, augment, ")}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_network_is_one_line_before_anything_is_written(name, tmp_path):
    net, words = WRONG[name]
    with pytest.raises(UserError, match=words) as e:
        train.train(options(tmp_path / "run"), noise_images(), net=net)
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_what_is_no_data_and_no_path_is_one_line_before_anything_is_written(tmp_path):
    class Falling(degrade.Path):
        def levels(self, t):
            return 1 / (1 + t), t
    x = noise_images().images
    for parts, words in (((x,), "give a data.Images, not Tensor"),
                         ((noise_images(), Square), r"Square is a class: give a path, Square\(\)"),
                         ((noise_images(), Falling()), "the path Falling cannot be used")):
        with pytest.raises(UserError, match=words):
            train.train(options(tmp_path / "run"), *parts)
    with pytest.raises(UserError, match=r"must be a torch.uint8 tensor .*\[20, 8, 8, 3\]"):
        Images(x.permute(0, 2, 3, 1))
    assert not (tmp_path / "run").exists()


def parts_of_the_page():
    """The classes of docs/own-parts.md: Tangent, a path up to t = 1, and FromDiffusers."""
    lines = (ROOT / "docs/own-parts.md").read_text().splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    ") or not line)
    found = {"Path": degrade.Path, "math": math, "torch": torch}
    exec(code, found)
    return found["Tangent"], found["FromDiffusers"]


def test_a_path_in_a_parameter_of_its_own(tmp_path):
    """It is trained at the levels of the same curve with t = sigma, to float32's rounding of tan,
    and sampled at the same steps. Another law of training levels does not resume the run."""
    tangent, _ = parts_of_the_page()
    ema, same = (train.train(options(tmp_path / name), noise_images(), path)
                 for name, path in (("own", tangent()), ("sigma", degrade.ConstantBNR(0.5))))
    for ours, theirs in zip(ema.parameters(), same.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    for way in ({}, {"solver": "multistep"}, {"churn": 2., "s_max": 50.}):
        x, y = (torch.cat(list(generate(ema, path, (3, 8, 8), range(4), steps=3, **way)))
                for path in (tangent(), degrade.ConstantBNR(0.5)))
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)

    class Narrow(tangent):
        P_std = 0.5
    Narrow.__name__ = tangent.__name__
    with pytest.raises(UserError, match="a run with trained"):
        train.train(options(tmp_path / "own", 0.032), noise_images(), Narrow())


class Answer(torch.nn.Module):
    """Like one of diffusers' networks: it takes steps up to 1000 and answers an object."""

    def __init__(self):
        super().__init__()
        self.conv, self.steps = torch.nn.Conv2d(3, 6, 1), []

    def forward(self, x, step, label=None):
        self.steps += step.tolist()
        return argparse.Namespace(sample=self.conv(x))


def test_a_network_that_answers_an_object(tmp_path):
    _, wrapper = parts_of_the_page()
    wrong = Answer()
    wrong.forward = lambda x, c_noise, augment=None, label=None: argparse.Namespace(sample=x)
    with pytest.raises(UserError, match="must be .*, and not Namespace"):
        train.train(options(tmp_path / "run"), noise_images(), net=Denoiser(wrong))
    assert not (tmp_path / "run").exists()
    net = Denoiser(wrapper(Answer()))
    four_samples(train.train(options(tmp_path / "run"), noise_images(), net=net),
                 degrade.ConstantBNR(0.5))
    assert -1600 < min(net.unet.net.steps) < -300 and 0 < max(net.unet.net.steps) < 1200


class Embedded(torch.nn.Module):
    """A network with labels that keeps an activation, as some do for a later look."""

    def __init__(self, classes, known):
        super().__init__()
        self.conv, self.labels = torch.nn.Conv2d(3, 6, 1), torch.nn.Embedding(known, 1)
        self.classes = classes

    def forward(self, x, c_noise, augment=None, label=None):
        self.kept = self.conv(x) + self.labels(label)[:, :, None, None]
        return self.kept


def test_a_network_is_tried_with_its_last_class_and_as_a_copy(tmp_path):
    args = options(tmp_path / "run")
    args.cond = True
    with pytest.raises(UserError, match="the network fails on x of .*index out of range"):
        train.train(args, noise_images(classes="abc"), net=Denoiser(Embedded(3, 2)))
    assert not (tmp_path / "run").exists()
    train.train(args, noise_images(classes="abc"), net=Denoiser(Embedded(3, 3)))


def test_a_path_that_works_in_place_is_that_of_its_copies(tmp_path):
    class InPlace(degrade.Path):
        def levels(self, t):
            return t.mul_(2), 1 * t

    class Copies(degrade.Path):
        def levels(self, t):
            return 2 * t, 2 * t
    ema = train.train(options(tmp_path), noise_images(), Copies())
    assert torch.equal(four_samples(ema, InPlace()), four_samples(ema, Copies()))


def test_a_forgotten_t_range_is_a_warning(tmp_path, capsys):
    class Exponential(degrade.Path):
        def levels(self, t):
            return 0 * t, torch.expm1(t)
    train.train(options(tmp_path / "a"), noise_images(), Exponential())
    assert "is the path's t_range right?" in capsys.readouterr().err
    for path in (Square(), degrade.ConstantBNR(0), degrade.ColdPath(), degrade.BlurringPath()):
        train.train(options(tmp_path / type(path).__name__), noise_images(), path)
        assert "t_range" not in capsys.readouterr().err


@pytest.mark.parametrize("sigma_data", [0, -1, math.nan, torch.ones(3, 1, 1)])
def test_an_impossible_sigma_data_is_refused(sigma_data):
    with pytest.raises(UserError, match="sigma_data must be a number above 0"):
        Denoiser(small_cnn().unet, sigma_data)


def test_the_ema_has_the_networks_buffers(tmp_path):
    net = small_cnn()
    net.unet.insert(1, torch.nn.BatchNorm2d(16))
    ema = train.train(options(tmp_path), noise_images(), net=net)
    assert net.unet[1].running_mean.any()
    assert torch.equal(ema.unet[1].running_mean, net.unet[1].running_mean)
    assert net.unet[1].num_batches_tracked == 4                 # not by the trial beforehand


def test_a_run_with_parts_of_ones_own_resumes(tmp_path):
    for out, duration in (("whole", 0.016), ("parts", 0.008), ("parts", 0.016)):
        train.train(options(tmp_path / out, duration), noise_images(), Square(), small_cnn())
    whole, parts = (read_checkpoint(tmp_path / out / "ema.pt") for out in ("whole", "parts"))
    assert whole["seen"] == parts["seen"] == 16
    assert all(torch.equal(v, parts["weights"][k]) for k, v in whole["weights"].items())


# Data from a tensor

@pytest.mark.parametrize("channels, scale", [(3, 127.5), (1, 127.5), (4, 1)])
def test_a_tensor_of_images(tmp_path, channels, scale, capsys):
    images = noise_images(channels)
    if scale == 1:                          # which is not what the network expects
        images = Images(3 * torch.randn(20, channels, 8, 8), name="noise", latents=True)
    ema = train.train(options(tmp_path), images)
    x = four_samples(ema, degrade.ConstantBNR(0.5), channels)
    net, checkpoint = load_model(tmp_path / "ema.pt")
    assert torch.equal(four_samples(net, sampling_path(checkpoint), channels), x)
    facts, std = checkpoint["data"], images.images.double().std((0, 2, 3), unbiased=False)
    assert (facts["name"], facts["count"], facts["shape"]) == ("noise", 20, [channels, 8, 8])
    assert facts["std"] == pytest.approx((std / scale).tolist(), rel=1e-6)
    assert any(tmp_path.glob("grid-*.png")) == (scale != 1)     # not of latents
    assert ("expects mean 0, standard deviation 0.5" in capsys.readouterr().err) == (scale == 1)


def test_a_tensor_has_a_resolution_of_its_own(tmp_path):
    """--resolution is of image files: that of the preset, 16, does not matter here."""
    train.train(options(tmp_path, resolution=16), noise_images())
    assert load_model(tmp_path / "ema.pt")[1]["data"]["shape"] == [3, 8, 8]


# All of them

def test_the_readmes_code_runs_as_it_stands(tmp_path):
    section = (ROOT / "README.md").read_text().split("## To swap a part\n")[1].split("\n## ")[0]
    block = [line for line in section.splitlines() if line.startswith("    ")]
    check = "assert samples.shape == (4, 3, 16, 16) and samples.isfinite().all()"
    code = "\n".join([textwrap.dedent("\n".join(block)), check])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run-swap/3.png").exists()
    assert len(block) <= 24                 # 20 of the parts, 4 to save and go on
    assert read_checkpoint(tmp_path / "run-swap/ema.pt")["seen"] == 2000


SCRIPT = """
import torch, train
from data import Images
from model import Denoiser
x = torch.arange(20 * 192).reshape(20, 3, 8, 8).remainder(255).byte()
net = Denoiser(torch.nn.Conv2d(3, 6, 1))
net.unet.forward = lambda x, *others, conv=net.unet.forward: conv(x)
net.unused = torch.nn.Parameter(torch.ones(1))
train.train(train.options({args!r}), Images(x))
train.train(train.options({args!r} + ["--out", "own"]), Images(x), net=net)
"""


def test_an_own_script_under_torchrun_trains_each_run_once(tmp_path):
    """Without a process group of its own: two processes share the batch of a run, and another run
    follows, whose network leaves out a parameter."""
    words = [*SHORT, "--resolution", "8", "--duration", "0.008", "--out", "run"]
    (tmp_path / "own.py").write_text(SCRIPT.format(args=words))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           "--standalone", "own.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters") == done.stdout.count("batch 4 as 2 x 2 on 2 x cpu") == 2
    for out in ("run", "own"):
        assert len((tmp_path / out / "log.jsonl").read_text().splitlines()) == 1


def test_a_network_may_have_frozen_and_unused_parameters(tmp_path, capsys):
    net, before = small_cnn(), small_cnn().state_dict()
    net.unet[0].requires_grad_(False)
    net.unet.unused = before["unet.unused"] = torch.nn.Parameter(torch.ones(3))
    ema = train.train(options(tmp_path), noise_images(), net=net)
    same = {k for k, v in ema.state_dict().items() if torch.equal(v, before[k])}
    assert {"unet.0.weight", "unet.0.bias", "unet.unused"} == same
    assert "1,465 parameters, 592 of them frozen" in capsys.readouterr().out


def test_other_parts_do_not_resume_a_run(tmp_path):
    class Other(Square):
        pass
    train.train(options(tmp_path / "path"), noise_images(), Square())
    with pytest.raises(UserError, match="a run with path Square, not Other"):
        train.train(options(tmp_path / "path", 0.032), noise_images(), Other())
    train.train(options(tmp_path / "net"), noise_images(), net=small_cnn())
    with pytest.raises(UserError, match="sigma_data 0.5, not 0.7"):
        train.train(options(tmp_path / "net", 0.032), noise_images(),
                    net=Denoiser(small_cnn().unet, sigma_data=0.7))

    class Same(Denoiser):
        def answers(self, x, f, s):
            return super().answers(x, f, s)
    for kind in (NoiseDenoiser, Same):
        net = kind(small_cnn().unet)
        with pytest.raises(UserError, match=f"answers Denoiser.*, not {kind.__name__}"):
            train.train(options(tmp_path / "net", 0.032), noise_images(), net=net)


def test_the_levels_of_a_path_and_the_images_are_compared_on_resuming(tmp_path):
    """Another ratio of the same class; an image in another place; two labels exchanged."""
    train.train(options(tmp_path), noise_images(), degrade.ConstantBNR(2))
    with pytest.raises(UserError, match="a run with levels"):
        train.train(options(tmp_path, 0.032), noise_images(), degrade.ConstantBNR(0.1))
    images, labels, named = noise_images(), noise_images(classes=("a", "b")), noise_images()
    named.classes = ["every"]
    images.images[[0, 1]] = images.images[[1, 0]]
    labels.labels[[0, 1]] = labels.labels[[1, 0]]
    for other in (images, labels):
        with pytest.raises(UserError, match="a run with images' digest"):
            train.train(options(tmp_path, 0.032), other, degrade.ConstantBNR(2))
    with pytest.raises(UserError, match="a run with images' classes"):
        train.train(options(tmp_path, 0.032), named, degrade.ConstantBNR(2))
    images = noise_images()
    images.name = "moved"
    train.train(options(tmp_path, 0.032), images, degrade.ConstantBNR(2))
    assert read_checkpoint(tmp_path / "ema.pt")["seen"] == 32


def test_a_path_without_noise_starts_from_the_datas_colours(tmp_path):
    train.train(options(tmp_path), noise_images(), degrade.ColdPath())
    assert (tmp_path / "grid-000000.016.png").exists()
    assert read_checkpoint(tmp_path / "ema.pt")["config"]["colour"] == noise_images().colour()
