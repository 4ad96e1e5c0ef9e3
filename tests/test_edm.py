"""EDM's networks in small: read without executing anything, converted, sampled, trained further.

edm-tiny-*.pkl were written by EDM's own classes and filled with random numbers; edm-tiny-*.npz has
what those classes answer.
"""
import io
import os
import pickle
import sys
import tracemalloc
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import sample
import train
from data import Images
from model import Denoiser, UNet
from runs import command_line, refused
from study import edm
from util.checkpoint import load_model, start_from
from util.cli import UserError
from util.datasets import CIFAR10_CLASSES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Both files, converted from the command line: {"uncond": its edm.pt, "cond": the same}."""
    folder = tmp_path_factory.mktemp("edm")
    files = {}
    for kind in ("uncond", "cond"):
        files[kind] = folder / f"{kind}.pt"
        command_line(edm.main, HERE / f"edm-tiny-{kind}.pkl", "--out", files[kind])
    return files


def golden(kind):
    """x, sigma, what EDM's network answers, and the labels or None."""
    z = np.load(HERE / f"edm-tiny-{kind}.npz")
    return [torch.from_numpy(z[name]) if name in z else None
            for name in ("x", "sigma", "d", "label")]


def assert_is_edms(net, kind, alpha=0):
    """D is EDM's output, and R is 0."""
    x, sigma, expected, label = golden(kind)
    for augment in (None, torch.zeros(4, 9)):
        d, r = net(x, alpha * sigma, sigma, augment, label)
        torch.testing.assert_close(d, expected, rtol=0, atol=1e-5)
        assert not r.any()


# The converted network


@pytest.mark.parametrize("kind", ["uncond", "cond"])
def test_a_converted_network_gives_edms_own_output(converted, kind):
    net, checkpoint = load_model(converted[kind])
    assert_is_edms(net, kind)
    assert not net.unet.last.weight[3:].any() and not net.unet.last.bias[3:].any()
    x, sigma, expected, label = golden(kind)
    d, _ = net(x, 0, sigma, torch.ones(4, 9), label)            # it has the layer of augmentation
    assert (d - expected).abs().max() > 1e-3
    assert checkpoint["config"]["bnr"] == 0 and checkpoint["config"]["unet"]["dropout"] == 0.13
    assert checkpoint["data"]["classes"][:net.classes] == [str(i) for i in range(net.classes)]


def test_it_is_sampled_from_the_command_line(converted, tmp_path, capsys):
    grids = []
    for label in "34":
        command_line(sample.main, "--ckpt", converted["cond"], "--class", label, "--device",
            "cpu", "--seeds", "0-1", "--out", tmp_path / label)
        assert "heun, 18 steps, NFE 35" in capsys.readouterr().out
        grids.append((tmp_path / f"{label}-grid.png").read_bytes())
    assert grids[0] != grids[1]


@pytest.mark.parametrize("kind, bnr, cond", [("uncond", "any", []), ("cond", 0, ["--cond"])])
def test_it_is_trained_further_from_where_edm_left_it(converted, tmp_path, kind, bnr, cond):
    """With a learning rate of 0, after one step it is still EDM's, for every ratio and class."""
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    classes = list("0123456789") if cond else ["all"]
    data = Images(images, torch.arange(20) % len(classes), classes)
    args = ["--init-from", converted[kind], "--out", tmp_path / "run", "--bnr", bnr, *cond,
            "--lr", 0, "--duration", 0.004, "--batch", 4, "--device", "cpu", "--sample-steps", 1,
            "--resolution", 16, "--channels", 8, "--mult", 1, 2, "--blocks", 1, "--attention", 8,
            "--augment", 0.12]
    train.train(train.options([str(arg) for arg in args]), data)
    net, _ = load_model(tmp_path / "run/ema.pt")
    assert_is_edms(net, kind, alpha=0 if cond else 3)           # the head R is still zero


def test_weights_fit_another_resolution_with_the_same_levels(converted):
    size = dict(channels=8, mult=(1, 2), blocks=1, resolution=32, augment_dim=9)
    net = Denoiser(UNet(3, 6, **size, attention=(16,)))
    start_from(net, converted["uncond"])
    assert_is_edms(net.eval(), "uncond")
    with pytest.raises(UserError, match="does not fit this network: .*attention.norm.weight"):
        start_from(Denoiser(UNet(3, 6, **size, attention=(32,))), converted["uncond"])


# Files made here, in EDM's format

SMALL = dict(channels=8, mult=[1, 1], blocks=1, attention=[8], resolution=16)


def record(class_name, **state):
    r = edm.Record()
    r.__dict__.update(class_name=class_name, _parameters={}, _modules={}, _init_args=(), **state)
    return r


def network(unet=SMALL, classes=0, **changes):
    """A file's EDMPrecond with random numbers. unet: keywords of model.UNet; changes: of SongUNet's
    keywords, where None leaves one out."""
    settings = dict(img_resolution=unet["resolution"], in_channels=3, out_channels=3,
                    label_dim=classes, model_channels=unet["channels"], channel_mult=unet["mult"],
                    num_blocks=unet["blocks"], attn_resolutions=unet["attention"])
    settings.update(changes)
    settings = {name: value for name, value in settings.items() if value is not None}
    song_unet = record("SongUNet", _init_kwargs=settings)
    with torch.device("meta"):
        state = UNet(3, 3, **unet, classes=classes).state_dict()
    for name, value in state.items():
        layer, leaf = name.rsplit(".", 1)
        module = song_unet
        for part in edm.layer_names(unet)[layer].split("."):
            module = module._modules.setdefault(part, record("Layer"))
        module._parameters[leaf] = torch.nn.Parameter(0.1 * torch.randn(value.shape))
    net = record("EDMPrecond", sigma_data=0.5)
    net._modules["model"] = song_unet
    return net


def _reconstruct_persistent_obj(meta):
    raise AssertionError("stands in a file for EDM's function of this name")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class EDMsPickler(pickle.Pickler):
    """Pickles a Record as EDM's torch_utils.persistence does its classes."""

    def reducer_override(self, obj):
        if not isinstance(obj, edm.Record):
            return NotImplemented
        state = {name: value for name, value in obj.__dict__.items() if name != "class_name"}
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit",
                "class_name": obj.class_name, "state": state}
        return _reconstruct_persistent_obj, (meta,)


def write(file, net):
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    modules = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": module}
    with mock.patch.dict(sys.modules, modules), open(file, "wb") as f:
        EDMsPickler(f).dump({"ema": net})
    return file


@pytest.mark.parametrize("resolution, classes, names, steps", [
    (32, 10, CIFAR10_CLASSES, 18), (32, 0, ["all"], 18), (64, 3, ["0", "1", "2"], 40)])
def test_steps_and_class_names_follow_from_the_size(tmp_path, resolution, classes, names, steps):
    """And what a file does not say is EDM's default: here 4 blocks a level, attention at 16."""
    unet = dict(channels=8, mult=[1, 1, 1], blocks=4, attention=[16], resolution=resolution)
    net = network(unet, classes, num_blocks=None, attn_resolutions=None)
    checkpoint = edm.convert(write(tmp_path / "edm-some.pkl", net))
    assert checkpoint["options"]["sample_steps"] == steps
    assert checkpoint["options"]["resolution"] == resolution
    assert checkpoint["data"]["classes"] == names
    assert checkpoint["config"]["unet"] == {**unet, "in_channels": 3, "out_channels": 6,
                                            "dropout": 0.1, "augment_dim": 0, "classes": classes}


# What is refused, in one line


def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, capsys):
    whole = (HERE / "edm-tiny-cond.pkl").read_bytes()
    for content in (b"", b"no pickle", whole[:-1000], whole[:100_000]):
        (tmp_path / "a.pkl").write_bytes(content)
        line = refused(capsys, edm.main, tmp_path / "a.pkl", "--out", tmp_path / "a.pt")
        assert "a.pkl is none of EDM's networks, or it is damaged" in line
        assert not (tmp_path / "a.pt").exists()


def not_converted(file, words):
    """edm.convert raises one line that has these words and the file's name."""
    with pytest.raises(UserError) as e:
        edm.convert(file)
    message = str(e.value)
    assert "\n" not in message and file.name in message and words in message, message


def test_another_network_is_refused_by_name(tmp_path):
    net = network()
    net._modules["model"].class_name = "DhariwalUNet"
    not_converted(write(tmp_path / "adm.pkl", net), "'DhariwalUNet', and not EDM's SongUNet")
    net.class_name = "VPPrecond"
    not_converted(write(tmp_path / "vp.pkl", net), "'VPPrecond', and not EDM's EDMPrecond")


@pytest.mark.parametrize("changes, words", [
    (dict(embedding_type="fourier"), "embedding_type is 'fourier'"),
    (dict(encoder_type="residual"), "encoder_type is 'residual'"),
    (dict(resample_filter=[1, 3, 3, 1]), "resample_filter is [1, 3, 3, 1]"),
    (dict(channels_per_head=64), "'channels_per_head' is"),
    (dict(model_channels=2048), "larger than the file"),
    (dict(channel_mult=[1] * 100), "mult"), (dict(num_blocks=2), "16x16_block1"),
    (dict(in_channels=1), "in_channels")])
def test_settings_that_ddpmpp_or_the_weights_do_not_have_are_refused(tmp_path, changes, words):
    not_converted(write(tmp_path / "claim.pkl", network(**changes)), words)


@pytest.mark.parametrize("value, words", [
    (torch.zeros(3), "a weight is"), (torch.full((32, 8), torch.nan), "not finite"),
    (torch.zeros(32, 8).half(), "torch.HalfStorage"), (torch.zeros(1, 1).expand(32, 8), "weight"),
    (None, "map_layer0.weight")])
def test_a_weight_that_does_not_fit_is_refused(tmp_path, value, words):
    net = network()
    net._modules["model"]._modules["map_layer0"]._parameters["weight"] = value
    not_converted(write(tmp_path / "misfit.pkl", net), words)


# Hostile and damaged files


class Call:
    """Pickles as a call, which pickle.load makes."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(flag):
    """Objects that create the file `flag` when pickle loads them, and the name to show."""
    command = f"touch {flag}"
    text = f"open({str(flag)!r}, 'w')"
    inner = pickle.dumps(Call(os.system, command))
    zipped = io.BytesIO()
    torch.save(Call(os.system, command), zipped)
    system = f"{os.system.__module__}.system"
    return {"os.system": (Call(os.system, command), system),
            "eval": (Call(eval, text), "builtins.eval"),
            "a payload": (Call(torch.storage._load_from_bytes, inner), system),
            "a zipped payload": (Call(torch.storage._load_from_bytes, zipped.getvalue()), ""),
            "a network's part": ({"_modules": {"model": Call(exec, text)}}, "builtins.exec")}


@pytest.mark.parametrize("kind", hostile(Path("flag")))
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path, kind):
    flag = tmp_path / "flag"
    evil, name = hostile(flag)[kind]
    file = tmp_path / "evil.pkl"
    file.write_bytes(pickle.dumps({"ema": evil}))
    if kind != "a zipped payload":                              # so the file is what it says
        try:
            pickle.loads(file.read_bytes())
        except Exception:
            pass
        assert flag.exists()
        flag.unlink()
    not_converted(file, name)
    assert not flag.exists()


BOMBS = {"a string of 2^40 bytes": b"\x80\x04\x8e" + (2 ** 40).to_bytes(8, "little") + b"x.",
         "a string of 2^31 bytes": b"\x80\x04B" + (2 ** 31).to_bytes(4, "little") + b"x.",
         "place 2^27 of the memo": b"\x80\x04Nr" + (2 ** 27).to_bytes(4, "little") + b".",
         "a frame of 2^40 bytes": b"\x80\x04\x95" + (2 ** 40).to_bytes(8, "little") + b"N."}


@pytest.mark.parametrize("kind", BOMBS)
def test_nothing_larger_than_the_file_is_allocated(tmp_path, kind):
    (tmp_path / "bomb.pkl").write_bytes(BOMBS[kind])
    tracemalloc.start()
    not_converted(tmp_path / "bomb.pkl", "damaged")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 ** 20                                       # of Python itself
