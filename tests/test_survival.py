"""Long runs that survive: kills, damaged and hostile files, several processes. The long versions: python -m pytest -m slow."""
import contextlib
import gzip
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
import sample
import train
from data import UserError, load
from fid import read_array, read_statistics
from model import build
from sample import load_model

ROOT = Path(__file__).parent.parent
SMALL = "--device cpu --resolution 8 --channels 8 --mult 1 2 --attention 4 --batch 4 --warmup 0 --log-every 0.004 --sample-steps 1 --dropout 0".split()
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
ALONE.pop("WORLD_SIZE", None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def command(out, pictures, *args, script="train.py", processes=None):
    start = [sys.executable] + (["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes else [])
    return [*start, str(ROOT / script), "--data", str(pictures), "--out", str(out), *SMALL, *map(str, args)]


@contextlib.contextmanager
def started(words):
    """A process, gone with the block however that ends."""
    process = subprocess.Popen(words, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(words, **kw):
    done = subprocess.run(words, capture_output=True, text=True, env=ALONE, timeout=300, **kw)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def tensors(path):
    checkpoint = torch.load(path, weights_only=True)
    return {(part, k): v for part in ("weights", "net", "ema") for k, v in checkpoint.get(part, {}).items()}, checkpoint


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_comes_to_the_same_weights(kills, tmp_path, pictures):
    """SIGKILL any time, with a checkpoint every second step so that many fall into saving; each loses two steps at most."""
    r, steps = random.Random(0), lambda kimg: round(kimg * 1000 / 4)
    killed = seen = 0
    while killed < kills:
        before = seen
        with started(command(tmp_path / "cut", pictures, "--duration", 1000, "--snapshot-every", 0.008)) as process:
            while not lines(tmp_path / "cut/log.jsonl", before) and process.poll() is None and r.random() < 0.999:
                time.sleep(0.01)                                # a few are killed before the first step
            time.sleep(r.uniform(0, 1))
            assert process.poll() is None, process.stdout.read()
            process.kill()
        killed += 1
        if (tmp_path / "cut/ema.pt").exists():
            load_model(tmp_path / "cut/ema.pt")
        if (tmp_path / "cut/state.pt").exists():
            seen = tensors(tmp_path / "cut/state.pt")[1]["seen"]
            logged = lines(tmp_path / "cut/log.jsonl", 0)
            assert not logged or steps(logged[-1]["kimg"]) - seen // 4 <= 2
    duration = seen / 1000 + 0.012
    for out in ("cut", "whole"):
        finish(command(tmp_path / out, pictures, "--duration", duration, "--snapshot-every", 0.008))
    assert same(tensors(tmp_path / "cut/state.pt")[0], tensors(tmp_path / "whole/state.pt")[0])
    assert same(tensors(tmp_path / "cut/ema.pt")[0], tensors(tmp_path / "whole/ema.pt")[0])
    logs = [[{k: line[k] for k in ("step", "denoise", "deblur", "lr")} for line in lines(tmp_path / out / "log.jsonl", 0)] for out in ("cut", "whole")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(1, math.ceil(duration * 250) + 1))


def lines(path, after):
    """The log's whole lines behind that many pictures; none where there is no log."""
    found = []
    for line in open(path) if path.exists() else ():
        if line.endswith("\n") and json.loads(line)["kimg"] > after / 1000:
            found.append(json.loads(line))
    return found


def test_a_second_signal_ends_at_once(tmp_path, pictures):
    """In a step that takes seconds, the first of which has not ended when both have come."""
    with started(command(tmp_path / "run", pictures, "--duration", 1000, "--snapshot-every", 0, "--batch", 4096, "--log-every", 4)) as process:
        while not (tmp_path / "run/log.jsonl").exists():
            time.sleep(0.02)
        time.sleep(0.5)
        process.terminate()
        time.sleep(0.2)
        process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM
    assert not (tmp_path / "run/state.pt").exists()


def test_two_runs_of_a_command_are_the_same_to_the_bit(tmp_path, pictures):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        finish(command("run", pictures, "--duration", 0.04, "--augment", 0.5, "--dropout", 0.3, "--seed", 5), cwd=tmp_path / name)
        finish([sys.executable, str(ROOT / "sample.py"), "--ckpt", "run/ema.pt", "--device", "cpu", "--seeds", "0-9", "--steps", "3", "--churn", "2"],
               cwd=tmp_path / name)
    for file in ("run/ema.pt", "run/state.pt", "run/grid-000000.png", "samples-grid.png", "samples/000007.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("options", [[], ["--batch-gpu", 1, "--augment", 0.5, "--bnr", 2]])
def test_two_processes_have_the_gradients_of_one(tmp_path, pictures, options):
    """Of the first step, to 1e-5 relative: Adam's first moment is a tenth of them."""
    for name, processes in (("one", None), ("two", 2)):
        finish(command(tmp_path / name, pictures, "--duration", 0.004, "--snapshot-every", 0, *options, processes=processes))
    one, two = (torch.cat([s["exp_avg"].flatten() for s in tensors(tmp_path / f"{n}/state.pt")[1]["optimizer"]["state"].values()]) for n in ("one", "two"))
    assert (one - two).norm() <= 1e-5 * one.norm() and one.norm() > 0


def test_two_processes_train_as_one(tmp_path, pictures):
    """Weights after five steps to 1e-4 of their change, in L2, with accumulation and augmentation; and the log."""
    for name, processes in (("one", None), ("two", 2)):
        finish(command(tmp_path / name, pictures, "--duration", 0.02, "--snapshot-every", 0, "--batch-gpu", 1, "--augment", 0.5, "--bnr", 2,
                       processes=processes))
    one, two = (tensors(tmp_path / f"{n}/state.pt") for n in ("one", "two"))
    torch.manual_seed(0)
    start = {("net", k): v for k, v in build(one[1]["config"]).state_dict().items()}
    norm = lambda a, b: math.sqrt(sum((a[k] - b[k]).square().sum() for k in start))
    assert norm(one[0], two[0]) <= 1e-4 * norm(one[0], start)
    assert two[1]["seen"] == 20
    a, b = (lines(tmp_path / f"{n}/log.jsonl", 0) for n in ("one", "two"))
    assert [x["step"] for x in b] == [1, 2, 3, 4, 5]
    for x, y in zip(a, b):
        assert x["denoise"] == pytest.approx(y["denoise"], rel=1e-3) and x["denoise_by_level"] == pytest.approx(y["denoise_by_level"], rel=1e-3)


def test_two_processes_draw_the_same_pictures_as_one(tmp_path, pictures):
    finish(command(tmp_path / "run", pictures, "--duration", 0.04))
    draw = [str(ROOT / "sample.py"), "--ckpt", str(tmp_path / "run/ema.pt"), "--device", "cpu", "--seeds", "3-9", "--steps", "3", "--churn", "1", "--out"]
    finish([sys.executable, *draw, str(tmp_path / "one")])
    finish([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *draw, str(tmp_path / "two")])
    files = sorted(f.name for f in (tmp_path / "one").iterdir())
    assert files == sorted(f.name for f in (tmp_path / "two").iterdir()) == [f"{i:06d}.png" for i in range(3, 10)]
    for a, b in [(tmp_path / "one" / f, tmp_path / "two" / f) for f in files] + [(tmp_path / "one-grid.png", tmp_path / "two-grid.png")]:
        assert abs(np.asarray(Image.open(a)).astype(int) - np.asarray(Image.open(b))).max() <= 1


def children_of(process):
    return [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_all_processes_stop_and_save_together(tmp_path, pictures):
    """Whichever of them the signal comes to."""
    with started(command(tmp_path / "run", pictures, "--duration", 1000, "--snapshot-every", 0, processes=2)) as process:
        while not lines(tmp_path / "run/log.jsonl", 0):
            time.sleep(0.05)
        os.kill(children_of(process)[1], signal.SIGTERM)
        printed = process.communicate(timeout=100)[0]
    assert "stopped and saved" in printed and process.returncode != 0
    assert tensors(tmp_path / "run/state.pt")[1]["seen"] == round(lines(tmp_path / "run/log.jsonl", 0)[-1]["kimg"] * 1000)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_when_one_process_dies_the_others_end(tmp_path, pictures):
    with started(command(tmp_path / "run", pictures, "--duration", 1000, "--snapshot-every", 0, processes=2)) as process:
        while not lines(tmp_path / "run/log.jsonl", 0):
            time.sleep(0.05)
        children = children_of(process)
        assert len(children) == 2
        os.kill(children[1], signal.SIGKILL)
        printed = process.communicate(timeout=100)[0]
    assert process.returncode != 0 and "SIGKILL" in printed
    assert not any(Path(f"/proc/{c}").exists() for c in children)


def test_an_error_of_several_processes_is_said_once(tmp_path, pictures):
    done = subprocess.run(command(tmp_path / "run", pictures, "--duration", 0.04, "--batch", 5, processes=2), env=ALONE, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and done.stderr.count("--batch 5 does not divide into 2 processes") == 1 and not (tmp_path / "run").exists()
    done = subprocess.run(command(tmp_path / "run", tmp_path / "none", processes=2), env=ALONE, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and done.stderr.count("does not exist") == 1 and "closed by peer" not in done.stderr


# Untrusted files

def png(seed, size=8, kind="png"):
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size, size, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def seeds_of_fuzz(folder):
    """For each kind of file a whole one and what reads it."""
    with zipfile.ZipFile(folder / "a.zip", "w") as z, tarfile.open(folder / "a.tar", "w") as t, tarfile.open(folder / "a.tgz", "w:gz") as g:
        for i in range(3):
            z.writestr(f"c/{i}.png", png(i), zipfile.ZIP_DEFLATED)
            for archive, kind in ((t, "png"), (g, "jpeg")):
                member = tarfile.TarInfo(f"c/{i}.{kind}")
                member.size = len(png(i, kind=kind))
                archive.addfile(member, io.BytesIO(png(i, kind=kind)))
    np.savez_compressed(folder / "a.npz", mu=np.zeros(12), sigma=np.eye(12), num=3, source="x", resize="tf1", weights="f")
    np.save(folder / "a.npy", np.zeros((3, 8, 8, 3), np.uint8))
    finish(command(folder / "run", folder / "a.zip", "--duration", 0.004))
    (folder / "run/ema.pt").rename(folder / "a.pt")
    return {"zip": load, "tar": load, "tgz": load, "npz": lambda f: read_statistics(Path(f)), "npy": lambda f: read_array(Path(f)), "pt": load_model}


def mutated(whole, r):
    """whole cut, overwritten, shortened, lengthened or with a piece repeated, mostly where headers are."""
    b = bytearray(whole)
    place = lambda: r.choice([r.randrange(len(b)), r.randrange(min(len(b), 600)), len(b) - 1 - r.randrange(min(len(b), 2000))])
    i, j, n = place(), place(), r.randrange(1, 64)
    kind = r.randrange(5)
    if kind == 0:
        del b[r.randrange(len(b)):]
    elif kind == 1:
        for _ in range(r.randrange(1, 8)):
            b[place()] = r.randrange(256)
    elif kind == 2:
        del b[i:i + n]
    elif kind == 3:
        b[i:i] = r.randbytes(n)
    else:
        b[i:i + n] = b[j:j + n]
    return bytes(b)


class Hang(BaseException):
    pass


@pytest.mark.parametrize("files", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_files_give_a_right_answer_or_one_line(files, tmp_path, monkeypatch, capsys):
    """1,000 seeded mutations of each kind: no other exception, none over 20 s, the process below 2 GiB more than before."""
    import resource
    monkeypatch.setattr(fid, "WIDTH", 12)

    def ring(number, frame):
        raise Hang
    before, memory = signal.signal(signal.SIGALRM, ring), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for kind, read in seeds_of_fuzz(tmp_path).items():
            whole, answers = (tmp_path / f"a.{kind}").read_bytes(), 0
            read(str(tmp_path / f"a.{kind}"))
            for seed in (735, *range(files)):                   # 735: a zip with a name of no length
                file = tmp_path / f"m.{kind}"
                file.write_bytes(mutated(whole, random.Random(seed)))
                signal.alarm(20)
                try:
                    read(str(file))
                    answers += 1
                except UserError as e:
                    assert "\n" not in str(e), (kind, seed)
                except BaseException as e:
                    pytest.fail(f"{kind}, seed {seed}: {e!r}")
                finally:
                    signal.alarm(0)
            assert answers <= files, kind                       # some damage was done
    finally:
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2 * 2 ** 20


def test_links_in_archives_are_not_followed(tmp_path, capsys):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("good.png", png(0))
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        z.writestr(link, str(secret))
    with tarfile.open(tmp_path / "a.tar", "w") as t:
        t.add(secret, "good.png")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind}.png")
            link.type, link.linkname = kind, str(secret) if kind == tarfile.SYMTYPE else "good.png"
            t.addfile(link)
    for name, links in (("a.zip", 1), ("a.tar", 2)):
        found = load(str(tmp_path / name))
        assert len(found.pictures) == 1 and len(found.skipped) == links
        assert "a link in an archive" in capsys.readouterr().err


def test_what_unpacks_to_a_hundred_times_its_size_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROOM", 2 ** 20)                  # or the test would write gigabytes
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.png", bytes(2 ** 21))
    member = tarfile.TarInfo("a.png")
    member.size = 2 ** 30
    (tmp_path / "a.tar").write_bytes(member.tobuf() + bytes(1024))                              # it says so, and is read no further
    member.name, member.type = "head", tarfile.XHDTYPE
    with gzip.open(tmp_path / "head.tgz", "wb") as f:
        f.write(member.tobuf() + bytes(1024))
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(12), sigma=np.zeros((2 ** 9, 2 ** 9)))
    np.savez_compressed(tmp_path / "b.npz", np.zeros((2 ** 21, 1, 1), np.uint8))
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED) as z, pytest.warns(UserWarning, match="Duplicate"):
        for shape in ((1, 8, 8), (2 ** 21, 1, 1)):
            array = io.BytesIO()
            np.save(array, np.zeros(shape, np.uint8))
            z.writestr("arr_0.npy", array.getvalue())
    for read in (lambda: load(str(tmp_path / "a.zip")), lambda: load(str(tmp_path / "a.tar")), lambda: load(str(tmp_path / "head.tgz")),
                 lambda: read_array(tmp_path / "c.npz"), lambda: read_statistics(tmp_path / "a.npz"),
                 lambda: read_array(tmp_path / "b.npz")):
        with pytest.raises(UserError, match="unpacks to"):
            read()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    out = tmp_path_factory.mktemp("trained")
    finish(command(out / "run", pictures, "--duration", 0.008))
    return out / "run"


@pytest.mark.parametrize("where, key, value", [
    ("unet", "channels", 10 ** 9), ("unet", "channels", "8"), ("unet", "blocks", 10 ** 9), ("unet", "mult", [1] * 10 ** 5), ("unet", "mult", ["a"]),
    ("unet", "mult", [10 ** 9, 1]), ("unet", "classes", 10 ** 9), ("unet", "augment_dim", -1), ("unet", "in_channels", 1), ("config", "bnr", -1.),
    ("unet", "channels", 0), ("unet", "channels", 2), ("unet", "mult", [0, 1]), ("unet", "dropout", "a"), ("unet", "dropout", 7.), ("config", "sigma_data", math.inf),
    ("config", "bnr", "0.5"), ("config", "bnr", 1e300), ("config", "bnr", math.inf), ("config", "path", "circle"), ("config", "sigma_data", "x"),
    ("config", "param", "v"), ("config", "unet", None), ("data", "shape", [3, 10 ** 6, 10 ** 6]), ("data", "shape", [3, 8]), ("data", "shape", [3, -8, 8]), ("data", "shape", [3, 8., 8.]), ("options", "sample_steps", 0), ("options", "sample_steps", 10 ** 8), ("options", "resolution", 9),
    ("data", "shape", [1, 8, 8]), ("data", "shape", [3, 7, 8]), ("data", "classes", 3), ("data", "classes", [3]), ("options", "sample_steps", "18"),
    ("options", "data", 3), ("checkpoint", "options", []), ("checkpoint", "data", None)])
def test_a_checkpoint_is_checked_before_it_is_built(where, key, value, trained, tmp_path):
    checkpoint = torch.load(trained / "ema.pt", weights_only=True)
    load_model(trained / "ema.pt")
    {"unet": checkpoint["config"]["unet"], "config": checkpoint["config"], "checkpoint": checkpoint}.get(where, checkpoint.get(where))[key] = value
    torch.save(checkpoint, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="is no model of this project"):
        load_model(tmp_path / "bad.pt")


def test_weights_are_what_the_file_holds(trained, tmp_path):
    checkpoint = torch.load(trained / "ema.pt", weights_only=True)
    name = next(k for k, v in checkpoint["weights"].items() if v.ndim == 4)
    for change in (lambda v: v.long(), lambda v: v.to_sparse(), lambda v: v.to("meta"), lambda v: v.double(), lambda v: 3, lambda v: v[:1]):
        torch.save({**checkpoint, "weights": {**checkpoint["weights"], name: change(checkpoint["weights"][name])}}, tmp_path / "bad.pt")
        with pytest.raises(UserError, match="is no"):
            load_model(tmp_path / "bad.pt")
    wide = {"in_channels": 3, "out_channels": 6, "channels": 4096, "mult": [16], "blocks": 1, "attention": [], "resolution": 8}
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in build({**checkpoint["config"], "unet": wide}).state_dict().items()}
    spread = {k: torch.zeros(()).expand(s) for k, s in shapes.items()}                          # one number each, of terabytes in all
    torch.save({**checkpoint, "config": {**checkpoint["config"], "unet": wide}, "weights": spread}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="larger than the file"):
        load_model(tmp_path / "bad.pt")
    with zipfile.ZipFile(trained / "ema.pt") as plain, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for i in plain.infolist():
            small.writestr(i.filename, plain.read(i))
    with pytest.raises(UserError, match="no checkpoint"):
        load_model(tmp_path / "small.pt")


def test_a_damaged_state_is_one_line(trained, pictures, tmp_path, monkeypatch, capsys):
    state = torch.load(trained / "state.pt", weights_only=True)
    small = {**state["optimizer"], "state": {k: {**v, "exp_avg": torch.zeros(1)} for k, v in state["optimizer"]["state"].items()}}
    for name, change in (("net", {}), ("optimizer", small), ("optimizer", 3), ("net", 3), ("seen", "a"), ("seen", -4)):
        (tmp_path / "run").mkdir(exist_ok=True)
        torch.save({**state, name: change}, tmp_path / "run/state.pt")
        monkeypatch.setattr(sys, "argv", command(tmp_path / "run", pictures, "--duration", 0.016)[1:])
        with pytest.raises(SystemExit) as e:
            train.main()
        assert e.value.code == 2 and "does not fit this network" in capsys.readouterr().err.splitlines()[-1]


def test_statistics_files_run_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pickled"),)
    np.savez(tmp_path / "a.npz", mu=np.array([Bomb()], dtype=object), sigma=np.eye(3))
    with pytest.raises(UserError, match="cannot be read"):
        read_statistics(tmp_path / "a.npz")
    assert not (tmp_path / "pickled").exists()


# Numbers

def run(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, args)])
    module.main()


def test_a_learning_rate_of_0_leaves_the_weights(tmp_path, pictures, monkeypatch):
    run(monkeypatch, train, *command(tmp_path / "run", pictures, "--duration", 0.012, "--lr", 0)[2:])
    state = tensors(tmp_path / "run/state.pt")
    torch.manual_seed(0)
    assert all(torch.equal(state[0]["net", k], v) for k, v in build(state[1]["config"]).state_dict().items())


def test_one_picture_is_enough(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(png(0))
    for name, options in (("warm", []), ("cold", ["--bnr", "inf"])):
        run(monkeypatch, train, *command(tmp_path / name, tmp_path / "set", "--duration", 0.008, *options)[2:])
        assert tensors(tmp_path / name / "ema.pt")[1]["data"]["count"] == 1


def test_a_resolution_of_7(tmp_path, pictures, monkeypatch, capsys):
    odd = [w for w in command(tmp_path / "run", pictures, "--duration", 0.008)[2:]]
    odd[odd.index("--resolution") + 1] = "7"
    with pytest.raises(SystemExit):
        run(monkeypatch, train, *odd)
    assert "7 x 7 do not divide by 2" in capsys.readouterr().err
    run(monkeypatch, train, *odd, "--mult", 1, "--attention", 7)
    run(monkeypatch, sample, "--ckpt", tmp_path / "run/ema.pt", "--seeds", "0-3", "--steps", 2, "--out", tmp_path / "s")
    assert Image.open(tmp_path / "s/000003.png").size == (7, 7)


@pytest.mark.slow
def test_65536_seeds(tmp_path, trained, monkeypatch, capsys):
    run(monkeypatch, sample, "--ckpt", trained / "ema.pt", "--device", "cpu", "--seeds", "0-65535", "--steps", 1, "--batch", 512, "--out", tmp_path / "s")
    assert len(list((tmp_path / "s").iterdir())) == 65536 and "65536 pictures" in capsys.readouterr().out
