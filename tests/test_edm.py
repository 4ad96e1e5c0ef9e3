"""EDM's networks in small: read without executing anything, converted, sampled, trained further.

edm-tiny-*.pkl were written by EDM's own classes and filled with random numbers; edm-tiny-*.npz has
what those classes answer."""
import io
import json
import os
import pickle
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from data import CIFAR10_CLASSES, Images
from model import UNet, load_model
from study import edm, warmup
from util import UserError

HERE = Path(__file__).parent
TINY = """--device cpu --resolution 16 --channels 8 --mult 1 2 --blocks 1 --attention 8 --batch 4
          --warmup 0 --sample-steps 1 --dropout 0 --augment 0.12""".split()


def run(monkeypatch, main, *args):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])
    main()


def refused(monkeypatch, capsys, file, *words):
    """python -m study.edm ends with one line that has these words, and writes nothing."""
    out = file.with_suffix(".pt")
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, edm.main, file, "--out", out)
    printed = capsys.readouterr().err
    assert e.value.code == 2 and len(printed.strip().splitlines()) == 1, printed
    assert all(w in printed for w in (file.name, *words)), printed
    assert not out.exists()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Both files, converted from the command line: {"uncond": its edm.pt, "cond": the same}."""
    folder, patch = tmp_path_factory.mktemp("edm"), pytest.MonkeyPatch()
    files = {}
    for kind in ("uncond", "cond"):
        files[kind] = folder / f"{kind}.pt"
        run(patch, edm.main, HERE / f"edm-tiny-{kind}.pkl", "--out", files[kind])
    patch.undo()
    return files


def golden(kind):
    """x, sigma, EDM's answer, and the labels or None."""
    z = np.load(HERE / f"edm-tiny-{kind}.npz")
    return [torch.from_numpy(z[k]) if k in z else None for k in ("x", "sigma", "d", "label")]


# The answers

@pytest.mark.parametrize("kind", ["uncond", "cond"])
def test_a_converted_network_gives_edms_own_answers(converted, kind):
    net, checkpoint = load_model(converted[kind])
    x, sigma, expected, label = golden(kind)
    for augment in (None, torch.zeros(4, 9)):
        d, r = net(x, 0, sigma, augment, label)
        torch.testing.assert_close(d, expected, rtol=0, atol=1e-5)
        assert not r.any()
    assert not net.unet.last.weight[3:].any() and not net.unet.last.bias[3:].any()
    d, _ = net(x, 0, sigma, torch.ones(4, 9), label)            # it has that layer
    assert (d - expected).abs().max() > 1e-3
    config = checkpoint["config"]
    assert config["bnr"] == 0 and config["unet"]["dropout"] == 0.13
    assert checkpoint["data"]["classes"][:net.classes] == [str(i) for i in range(net.classes)]


def test_it_is_sampled_from_the_command_line(converted, tmp_path, monkeypatch, capsys):
    def draw(name, kind, *args):
        run(monkeypatch, sample.main, "--ckpt", converted[kind], "--device", "cpu",
            "--seeds", "0-1", "--out", tmp_path / name, *args)
        return (tmp_path / f"{name}-grid.png").read_bytes()
    draw("plain", "uncond")
    assert "heun 18 steps, NFE 35" in capsys.readouterr().out
    three, four = (draw(c, "cond", "--steps", 2, "--class", c) for c in "34")
    assert three != four
    with pytest.raises(SystemExit):
        draw("x", "cond", "--class", "10")


# Files made here, in EDM's format

SMALL = dict(channels=8, mult=[1, 1], blocks=1, attention=[8], resolution=16)


def network(u=SMALL, classes=0, **changes):
    """A file's EDMPrecond with random numbers. u: keywords of model.UNet; changes: of SongUNet's
    keywords, where None leaves one out."""
    kwargs = dict(img_resolution=u["resolution"], in_channels=3, out_channels=3,
                  label_dim=classes, model_channels=u["channels"], channel_mult=u["mult"],
                  num_blocks=u["blocks"], attn_resolutions=u["attention"])
    kwargs = {k: v for k, v in {**kwargs, **changes}.items() if v is not None}
    unet = record("SongUNet", _init_kwargs=kwargs)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in UNet(3, 3, **u, classes=classes).state_dict().items()}
    for name, shape in shapes.items():
        layer, leaf = name.rsplit(".", 1)
        place = unet
        for part in edm.layer_names(u)[layer].split("."):
            place = place._modules.setdefault(part, record("Layer"))
        place._parameters[leaf] = torch.nn.Parameter(0.1 * torch.randn(shape))
    net = record("EDMPrecond", sigma_data=0.5)
    net._modules["model"] = unet
    return net


def record(class_name, **state):
    r = edm.Record()
    r.__dict__.update(class_name=class_name, _parameters={}, _modules={}, _init_args=(), **state)
    return r


def reconstruct(meta):
    raise AssertionError("stands in a file for EDM's function of this name")


def write(file, net, monkeypatch):
    """Pickles it as EDM's torch_utils.persistence does."""
    fake = types.ModuleType("torch_utils.persistence")
    fake._reconstruct_persistent_obj = reconstruct
    monkeypatch.setattr(reconstruct, "__module__", "torch_utils.persistence")
    monkeypatch.setattr(reconstruct, "__qualname__", "_reconstruct_persistent_obj")
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", fake)

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj):
            if not isinstance(obj, edm.Record):
                return NotImplemented
            state = {k: v for k, v in obj.__dict__.items() if k != "class_name"}
            return reconstruct, ({"type": "class", "version": 6, "module_src": "raise SystemExit",
                                  "class_name": obj.class_name, "state": state},)
    with open(file, "wb") as f:
        Pickler(f).dump({"ema": net})
    return file


@pytest.mark.parametrize("resolution, classes, names, steps", [
    (32, 10, CIFAR10_CLASSES, 18), (32, 0, ["all"], 18), (64, 3, ["0", "1", "2"], 40)])
def test_steps_and_class_names_follow_from_the_size(tmp_path, monkeypatch, resolution, classes,
                                                    names, steps):
    """And what a file does not say is EDM's default: here 4 blocks a level, attention at 16."""
    u = dict(channels=8, mult=[1, 1, 1], blocks=4, attention=[16], resolution=resolution)
    net = network(u, classes, num_blocks=None, attn_resolutions=None)
    file = write(tmp_path / "edm-some.pkl", net, monkeypatch)
    run(monkeypatch, edm.main, file, "--out", tmp_path / "edm.pt")
    loaded, checkpoint = load_model(tmp_path / "edm.pt")
    assert checkpoint["options"]["sample_steps"] == steps and loaded.classes == classes
    assert checkpoint["options"]["resolution"] == resolution
    assert checkpoint["data"]["classes"] == names
    place = net._modules["model"]._modules["dec"]._modules["16x16_block4"]._modules["proj"]
    ours = loaded.unet.decoder[4 if resolution == 64 else 10].attention.out
    assert torch.equal(ours.weight, place._parameters["weight"])


@pytest.mark.parametrize("setting, value", [
    ("embedding_type", "fourier"), ("encoder_type", "residual"), ("decoder_type", "skip"),
    ("channel_mult_noise", 2), ("resample_filter", [1, 3, 3, 1]), ("channel_mult_emb", 3),
    ("label_dropout", 0.1), ("channels_per_head", 64)])
def test_a_setting_that_ddpmpp_does_not_have_is_refused_by_name(tmp_path, monkeypatch, capsys,
                                                                setting, value):
    file = write(tmp_path / "ncsnpp.pkl", network(**{setting: value}), monkeypatch)
    refused(monkeypatch, capsys, file, f"{setting}", f"is {value!r}")


@pytest.mark.parametrize("whole, name", [(False, "DhariwalUNet"), (True, "VPPrecond")])
def test_another_network_is_refused_by_name(tmp_path, monkeypatch, capsys, whole, name):
    net = network()
    (net if whole else net._modules["model"]).class_name = name
    refused(monkeypatch, capsys, write(tmp_path / "adm.pkl", net, monkeypatch), name)


# Hostile and damaged files

class Call:
    """Pickles as a call, which pickle.load makes."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(flag):
    """Objects that create the file `flag` when pickle loads them, and the name that betrays."""
    command, text = f"touch {flag}", f"open({str(flag)!r}, 'w')"
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
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path, monkeypatch,
                                                                       capsys, kind):
    flag, file = tmp_path / "flag", tmp_path / "evil.pkl"
    evil, name = hostile(flag)[kind]
    file.write_bytes(pickle.dumps({"ema": evil}))
    if kind != "a zipped payload":                              # so the file is what it says
        try:
            pickle.loads(file.read_bytes())
        except Exception:
            pass
        assert flag.exists()
        flag.unlink()
    refused(monkeypatch, capsys, file, name)
    assert not flag.exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.7, 0.999])
def test_a_truncated_file_gives_one_line(tmp_path, monkeypatch, capsys, share):
    data = (HERE / "edm-tiny-cond.pkl").read_bytes()
    (tmp_path / "part.pkl").write_bytes(data[:int(share * len(data))])
    refused(monkeypatch, capsys, tmp_path / "part.pkl", "damaged")


def with_weight(value):
    net = network()
    net._modules["model"]._modules["map_layer0"]._parameters["weight"] = value
    return net


@pytest.mark.parametrize("value, words", [
    (torch.zeros(3), "a weight is"), (torch.full((32, 8), torch.nan), "not finite"),
    (torch.zeros(32, 8).half(), "torch.HalfStorage"), (torch.zeros(1, 1).expand(32, 8), "weight"),
    (None, "map_layer0.weight"), (7, "no attribute")])
def test_a_weight_that_does_not_fit_is_refused(tmp_path, monkeypatch, capsys, value, words):
    file = write(tmp_path / "misfit.pkl", with_weight(value), monkeypatch)
    refused(monkeypatch, capsys, file, words)


@pytest.mark.parametrize("changes, words", [
    (dict(model_channels=2048), "larger than the file"),
    (dict(label_dim=10 ** 12), "larger than the file"),
    (dict(channel_mult=[1] * 100), "mult"), (dict(attn_resolutions=["8"]), "attn_resolutions"),
    (dict(num_blocks=2), "16x16_block1"),
    (dict(dropout=float("nan")), "dropout"), (dict(in_channels=1), "in_channels")])
def test_settings_that_do_not_fit_the_weights_are_refused(tmp_path, monkeypatch, capsys, changes,
                                                          words):
    file = write(tmp_path / "claim.pkl", network(**changes), monkeypatch)
    refused(monkeypatch, capsys, file, words)


def test_a_module_within_itself_and_one_too_many_are_refused(tmp_path, monkeypatch, capsys):
    net = network()
    unet = net._modules["model"]
    unet._modules["more"] = record("Layer")
    unet._modules["more"]._parameters["weight"] = torch.zeros(1)
    refused(monkeypatch, capsys, write(tmp_path / "more.pkl", net, monkeypatch), "more.weight")
    unet._modules["more"] = unet._modules["enc"]
    refused(monkeypatch, capsys, write(tmp_path / "twice.pkl", net, monkeypatch), "twice")


BOMBS = {"a string of 2^40 bytes": b"\x80\x04\x8e" + (2 ** 40).to_bytes(8, "little") + b"x.",
         "a string of 2^31 bytes": b"\x80\x04B" + (2 ** 31).to_bytes(4, "little") + b"x.",
         "place 2^27 of the memo": b"\x80\x04Nr" + (2 ** 27).to_bytes(4, "little") + b".",
         "a frame of 2^40 bytes": b"\x80\x04\x95" + (2 ** 40).to_bytes(8, "little") + b"N."}


@pytest.mark.parametrize("kind", BOMBS)
def test_nothing_larger_than_the_file_is_allocated(tmp_path, kind):
    file = tmp_path / "bomb.pkl"
    file.write_bytes(BOMBS[kind])
    tracemalloc.start()
    with pytest.raises(UserError, match="damaged"):
        edm.convert(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 ** 20                                       # of Python itself


def test_a_storage_that_claims_more_than_it_has_is_refused():
    file = io.BytesIO()
    typed = torch.storage.TypedStorage(wrap_storage=torch.arange(300.).untyped_storage(),
                                       dtype=torch.float32, _internal=True)
    torch.save(typed, file, _use_new_zipfile_serialization=False)
    data = file.getvalue()
    assert edm.storage(data) == torch.arange(300.).numpy().tobytes()
    count = (300).to_bytes(2, "little")
    assert data.count(count) >= 2
    for broken in (data.replace(count, (301).to_bytes(2, "little")), data[:-4], data + b"more"):
        with pytest.raises(ValueError, match="storage"):
            edm.storage(broken)


# Trained further

def noise(resolution=16, classes=("all",)):
    x = torch.randint(0, 256, (20, 3, resolution, resolution), dtype=torch.uint8,
                      generator=torch.Generator().manual_seed(0))
    return Images(x, torch.arange(20) % len(classes), classes, "noise")


def tune(out, start, duration, *args, data=None):
    """A training of 4 images a step that starts from a checkpoint. Returns its state.pt."""
    options = train.options([*TINY, "--out", str(out), "--init-from", str(start), "--duration",
                             str(duration), *map(str, args)])
    train.train(options, data or noise())
    return torch.load(out / "state.pt", weights_only=True)


@pytest.mark.parametrize("bnr", ["0.5", "any"])
def test_a_fine_tuned_network_starts_as_edms_and_resumes_without_it(tmp_path, converted, bnr):
    x, sigma, expected, _ = golden("uncond")
    source = tmp_path / "edm.pt"
    source.write_bytes(converted["uncond"].read_bytes())
    state = tune(tmp_path / "still", source, 0.004, "--bnr", bnr, "--lr", 0)
    assert state["options"]["init_from"] == str(source)
    assert {v["step"].item() for v in state["optimizer"]["state"].values()} == {1}
    net, _ = load_model(tmp_path / "still/ema.pt")
    d, r = net(x, 0 if bnr == "0.5" else 3 * sigma, sigma)
    torch.testing.assert_close(d, expected, rtol=0, atol=1e-5)
    assert not r.any()                                          # no row of that head is trained yet

    whole = tune(tmp_path / "whole", source, 0.016, "--bnr", bnr)
    tune(tmp_path / "run", source, 0.008, "--bnr", bnr)
    source.unlink()
    resumed = tune(tmp_path / "run", source, 0.016, "--bnr", bnr)
    assert resumed["seen"] == 16
    for part in ("net", "ema"):
        assert all(torch.equal(v, whole[part][k]) for k, v in resumed[part].items())
    assert resumed["net"]["unet.last.weight"][3:].any()         # now it is


def test_a_conditional_network_keeps_its_classes_by_name(tmp_path, converted):
    source, cond = converted["cond"], ["--lr", 0, "--bnr", 0, "--cond"]
    x, sigma, expected, label = golden("cond")
    tune(tmp_path / "ten", source, 0.004, *cond, data=noise(classes=list("0123456789")))
    net, _ = load_model(tmp_path / "ten/ema.pt")
    torch.testing.assert_close(net(x, 0, sigma, label=label)[0], expected, rtol=0, atol=1e-5)

    tune(tmp_path / "two", source, 0.004, *cond, data=noise(classes=["new", "7"]))
    old, _ = load_model(source)
    net, _ = load_model(tmp_path / "two/ema.pt")
    torch.testing.assert_close(net(x, 0, sigma, label=torch.ones_like(label)),
                               old(x, 0, sigma, label=torch.full_like(label, 7)))
    with pytest.raises(UserError, match="cond.pt does not fit this network: .*from_label"):
        tune(tmp_path / "none", source, 0.004, "--bnr", 0)


def test_another_resolution_starts_where_its_levels_fit(tmp_path, converted):
    source, old = converted["uncond"], torch.load(converted["uncond"], weights_only=True)["weights"]
    big = ["--resolution", 32, "--lr", 0]
    state = tune(tmp_path / "big", source, 0.004, *big, "--attention", 16, data=noise(32))
    assert all(torch.equal(v, old[k]) for k, v in state["net"].items())
    with pytest.raises(UserError, match="does not fit this network: .*attention.norm.weight"):
        tune(tmp_path / "x", source, 0.004, *big, "--attention", 32, data=noise(32))


# The short cut, measured

def test_each_network_is_measured_at_its_times_and_tuned_from_the_hot_one_at_t(tmp_path,
                                                                               monkeypatch):
    """With a train.py that writes what it was asked for, and a measure that reads it."""
    asked, measured = [], []

    def trained(out, *options):
        words = dict(zip(options[::2], options[1::2]))
        start = words.get("--init-from")
        before = Path(start).read_text() if start else ""
        text = f"{before}{words['--bnr']} for {words['--duration']:g}; "
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "ema.pt").write_text(text)
        checkpoint = {"seen": 1000 * words["--duration"], "options": {"batch": 16}}
        monkeypatch.setattr(warmup, "read_checkpoint", lambda _: checkpoint)
        asked.append((words["--seed"], text, words.get("--lr")))
        return f"{out}/ema.pt"

    def measure(text):
        measured.append(text)
        return {"distance": 1., "power": [1., 1., 1.]}
    monkeypatch.setattr(warmup, "trained", trained)
    monkeypatch.setattr(warmup, "drawn", lambda file, *_, **__: Path(file).read_text())
    monkeypatch.setattr(warmup, "references", lambda *_: None)
    monkeypatch.setattr(warmup, "Measure", lambda *_: measure)
    args = ["--duration", 8, "--lr", 1e-3, "--runs", tmp_path / "runs", "--results", tmp_path]
    run(monkeypatch, warmup.main, *args)
    one = ["0 for 8; ", "0 for 10; ", "0 for 12; ", "0 for 8; 0.5 for 2; ", "0 for 8; 0.5 for 4; ",
           "0.5 for 8; ", "0.5 for 10; ", "0.5 for 12; "]
    assert measured == one * 2 and [text for _, text, _ in asked] == one * 2
    assert [seed for seed, *_ in asked] == [0] * 8 + [1] * 8
    assert [lr for *_, lr in asked] == ([None] * 3 + [1e-3] * 2 + [None] * 3) * 2
    run(monkeypatch, warmup.main, *args)                        # all of it is there
    assert len(measured) == len(asked) == 16
    lines = (tmp_path / "warmup.jsonl").read_text().splitlines(True)
    (tmp_path / "warmup.jsonl").write_text("".join(lines[2:]))  # hot at 8 and at 10 are missing
    for kept in (tmp_path / "runs").glob("*-8-0/hot/ema-*.pt"):
        kept.unlink()
    checkpoint = {"seen": 12000, "options": {"batch": 16}}      # where the run is
    monkeypatch.setattr(warmup, "trained", lambda out, *_: f"{out}/ema.pt")
    monkeypatch.setattr(warmup, "read_checkpoint", lambda _: checkpoint)
    with pytest.raises(SystemExit):
        run(monkeypatch, warmup.main, *args)
    assert len(measured) == 16


def test_the_table_compares_within_a_seed(tmp_path, monkeypatch, capsys):
    distances = {("hot", 8): 300, ("hot, then warm at 0.001", 10): 260, ("warm", 12): 250}
    with open(tmp_path / "warmup.jsonl", "w") as f:
        for (name, total), distance in distances.items():
            for seed, gain in ((0, 0), (1, 20 + distance / 10)):
                cell = dict(hot_kimg=8, network=name, total_kimg=total, seed=seed, power=[1, 1, 2],
                            distance=distance + gain, data="set", preset="tiny", samples=50)
                f.write(json.dumps(cell) + "\n")
                f.write(json.dumps({**cell, "data": "other", "distance": 1.}) + "\n")
    run(monkeypatch, warmup.main, "--plot-only", "--results", tmp_path)
    table = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for row in ("hot, then warm at 0.001 10 283.0 +- 32.5 -10.5 +- 0.7 1.00",
                "warm 12 272.5 +- 31.8 0.0 +- 0.0 1.00"):
        assert any(line.startswith(row) for line in table)
