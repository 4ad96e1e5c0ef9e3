"""Long runs that survive: kills, damaged and hostile files, several processes. The long versions:
python -m pytest -m slow."""
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
from data import load
from fid import read_statistics
from model import build, load_model
from sample import sampling_path
from util import UserError, seed_for

ROOT = Path(__file__).parent.parent
SMALL = """--device cpu --resolution 8 --channels 8 --mult 1 2 --attention 4 --batch 4 --warmup 0
           --log-every 0.004 --sample-steps 1 --dropout 0""".split()
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
ALONE.pop("WORLD_SIZE", None)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(10):
        (folder / f"{i}.png").write_bytes(encoded(i))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    out = tmp_path_factory.mktemp("trained")
    train.train(train.options(options(out / "run", images, "--duration", 0.008)))
    return out / "run"


def encoded(seed, size=8, kind="png"):
    """An image file of noise, as bytes."""
    file = io.BytesIO()
    array = np.random.RandomState(seed).randint(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def options(out, images, *args):
    return ["--data", str(images), "--out", str(out), *SMALL, *map(str, args)]


def command(out, images, *args, two=False):
    start = TORCHRUN if two else [sys.executable]
    return [*start, str(ROOT / "train.py"), *options(out, images, *args)]


@contextlib.contextmanager
def started(words):
    """A process that is gone with the block, however that ends."""
    process = subprocess.Popen(words, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(words, env=ALONE, **kw):
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=300, **kw)


def finish(words, **kw):
    done = ended(words, **kw)
    assert done.returncode == 0, done.stderr[-2000:]


def run(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, args)])
    module.main()


def tensors(path):
    """The tensors of a checkpoint, and all of it."""
    checkpoint = torch.load(path, weights_only=True)
    found = {(part, k): v for part in ("weights", "net", "ema")
             for k, v in checkpoint.get(part, {}).items()}
    return found, checkpoint


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(path, after=0):
    """The log's complete lines after that many images; none where there is no log."""
    found = []
    for line in open(path) if path.exists() else ():
        if line.endswith("\n") and json.loads(line)["kimg"] > after / 1000:
            found.append(json.loads(line))
    return found


def wait_for_line(out, process):
    while not lines(out / "log.jsonl"):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


# Kills and repetition

@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_comes_to_the_same_weights(kills, tmp_path, images,
                                                                           monkeypatch):
    """SIGKILL any time, with a checkpoint every second step so that many fall into saving; each
    loses two steps at most."""
    r, cut, every = random.Random(0), tmp_path / "cut", ["--snapshot-every", 0.008]
    killed = seen = 0
    while killed < kills:
        before = seen
        with started(command(cut, images, "--duration", 1000, *every)) as process:
            while not lines(cut / "log.jsonl", before) and process.poll() is None \
                    and r.random() < 0.999:                     # a few die before the first step
                time.sleep(0.01)
            time.sleep(r.uniform(0, 1))
            assert process.poll() is None, process.stdout.read()
            process.kill()
        killed += 1
        if (cut / "ema.pt").exists():
            load_model(cut / "ema.pt")
        if (cut / "state.pt").exists():
            seen = tensors(cut / "state.pt")[1]["seen"]
            logged = lines(cut / "log.jsonl")
            assert not logged or round(logged[-1]["kimg"] * 250) - seen // 4 <= 2
    duration = seen / 1000 + 0.012
    for out in ("cut", "whole"):
        run(monkeypatch, train, *options(tmp_path / out, images, "--duration", duration, *every))
    for name in ("state.pt", "ema.pt"):
        assert same(tensors(cut / name)[0], tensors(tmp_path / "whole" / name)[0])
    logs = [[{k: line[k] for k in ("step", "denoise", "deblur", "lr")}
             for line in lines(tmp_path / out / "log.jsonl")] for out in ("cut", "whole")]
    steps = list(range(1, round(duration * 250) + 1))           # of four images each
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == steps


BOTH = """
import sys, train, sample
words, i = sys.argv, sys.argv.index("then")
for program, sys.argv in ((train, words[:i]), (sample, words[i:])):
    program.main()
"""


def test_two_runs_of_a_command_are_the_same_to_the_bit(tmp_path, images, monkeypatch):
    """A training and a drawing: once in a process of their own, once in this."""
    extra = "--duration 0.04 --augment 0.5 --dropout 0.3 --seed 5".split()
    draw = "--ckpt run/ema.pt --device cpu --seeds 0-9 --steps 3 --churn 2".split()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    finish([sys.executable, "-c", BOTH, *options("run", images, *extra), "then", *draw],
           cwd=tmp_path / "a", env={**ALONE, "PYTHONPATH": str(ROOT)})
    monkeypatch.chdir(tmp_path / "b")
    run(monkeypatch, train, *options("run", images, *extra))
    run(monkeypatch, sample, *draw)
    for file in ("run/ema.pt", "run/state.pt", "run/grid-000000.040.png", "samples-grid.png",
                 "samples/000007.png"):
        a, b = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert a == b, file


# Several processes

def test_two_processes_train_as_one(tmp_path, images, monkeypatch):
    """With accumulation and augmentation, five steps: the weights to 1e-4 of their change, in L2,
    the mean gradients that Adam keeps to 1e-3, and the log."""
    words = [images, *"--batch-gpu 1 --augment 0.5 --bnr any --duration 0.02".split()]
    run(monkeypatch, train, *options(tmp_path / "one", *words))
    finish(command(tmp_path / "two", *words, two=True))
    ends = [tensors(tmp_path / name / "state.pt") for name in ("one", "two")]
    a, b = (torch.cat([moments["exp_avg"].flatten() for moments in
                       state["optimizer"]["state"].values()]) for _, state in ends)
    assert a.norm() > 0 and (a - b).norm() <= 1e-3 * a.norm()
    torch.manual_seed(seed_for("weights", 0))
    start = {("net", k): v for k, v in build(ends[0][1]["config"]).state_dict().items()}

    def distance(a, b):
        return math.sqrt(sum((a[k] - b[k]).square().sum() for k in start))
    (one, _), (two, facts) = ends
    assert 0 < distance(one, two) <= 1e-4 * distance(one, start)
    assert facts["seen"] == 20
    a, b = (lines(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in b] == [1, 2, 3, 4, 5]
    for x, y in zip(a, b):
        for key in ("denoise", "denoise_by_level"):
            assert x[key] == pytest.approx(y[key], rel=1e-3)


def test_two_processes_draw_the_same_images_as_one(tmp_path, trained, monkeypatch):
    draw = ["--ckpt", str(trained / "ema.pt"),
            *"--device cpu --seeds 3-9 --steps 3 --churn 1 --out".split()]
    run(monkeypatch, sample, *draw, tmp_path / "one")
    finish([*TORCHRUN, str(ROOT / "sample.py"), *draw, str(tmp_path / "two")])
    names = [f"{i:06d}.png" for i in range(3, 10)]
    for out in ("one", "two"):
        assert sorted(f.name for f in (tmp_path / out).iterdir()) == names
    for file in [f"/{name}" for name in names] + ["-grid.png"]:
        a, b = (np.asarray(Image.open(f"{tmp_path / out}{file}")) for out in ("one", "two"))
        assert abs(a.astype(int) - b).max() <= 1


def children_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(c) for c in children.split()]


needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")


@needs_proc
def test_all_processes_stop_and_save_together(tmp_path, images):
    """Whichever of them gets the signal."""
    out, extra = tmp_path / "run", "--duration 1000 --snapshot-every 0".split()
    with started(command(out, images, *extra, two=True)) as process:
        wait_for_line(out, process)
        os.kill(children_of(process)[1], signal.SIGTERM)
        printed = process.communicate(timeout=100)[0]
    assert "stopped and saved" in printed and process.returncode != 0
    seen = round(lines(out / "log.jsonl")[-1]["kimg"] * 1000)
    assert tensors(out / "state.pt")[1]["seen"] == seen


@needs_proc
@pytest.mark.slow
def test_when_one_process_dies_the_others_end(tmp_path, images):
    out, extra = tmp_path / "run", "--duration 1000 --snapshot-every 0".split()
    with started(command(out, images, *extra, two=True)) as process:
        wait_for_line(out, process)
        children = children_of(process)
        assert len(children) == 2
        os.kill(children[1], signal.SIGKILL)
        printed = process.communicate(timeout=100)[0]
    assert process.returncode != 0 and "SIGKILL" in printed
    assert not any(Path(f"/proc/{c}").exists() for c in children)


@pytest.mark.slow
def test_an_error_of_several_processes_is_said(tmp_path, images):
    out = tmp_path / "run"
    done = ended(command(out, images, "--duration", 0.04, "--batch", 5, two=True))
    assert done.returncode != 0 and not out.exists()
    assert "--batch 5 does not divide into 2 processes" in done.stderr


# Untrusted files

def seeds_of_fuzz(folder):
    """For each kind of file a good one and what reads it."""
    with zipfile.ZipFile(folder / "a.zip", "w") as z, tarfile.open(folder / "a.tar", "w") as t, \
            tarfile.open(folder / "a.tgz", "w:gz") as g:
        for i in range(3):
            z.writestr(f"c/{i}.png", encoded(i), zipfile.ZIP_DEFLATED)
            for archive, kind in ((t, "png"), (g, "jpeg")):
                member = tarfile.TarInfo(f"c/{i}.{kind}")
                member.size = len(encoded(i, kind=kind))
                archive.addfile(member, io.BytesIO(encoded(i, kind=kind)))
    np.savez_compressed(folder / "a.npz", mu=np.arange(12.), sigma=np.eye(12), num=3, source="x",
                        resize="tf1", weights="f")
    pixels = np.tile(np.arange(192, dtype=np.uint8), 3).reshape(3, 3, 8, 8)
    np.save(folder / "a.npy", pixels.transpose(0, 2, 3, 1))
    train.train(train.options(options(folder / "run", folder / "a.zip", "--duration", 0.004)))
    (folder / "run/ema.pt").rename(folder / "a.pt")
    return {"zip": load, "tar": load, "tgz": load, "npz": lambda f: read_statistics(Path(f)),
            "npy": load, "pt": load_model}


def mutated(good, r):
    """A good file cut, overwritten, shortened, lengthened or with a piece repeated, mostly where
    headers are."""
    b = bytearray(good)

    def place():
        return r.choice([r.randrange(len(b)), r.randrange(min(len(b), 600)),
                         len(b) - 1 - r.randrange(min(len(b), 2000))])
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


def is_right(kind, answer, folder):
    """Whether a good file of seeds_of_fuzz was read as it was written."""
    if kind == "pt":
        saved = torch.load(folder / "a.pt", weights_only=True)["weights"]
        return same(answer[0].state_dict(), saved)
    if kind == "npz":
        return (np.asarray(answer["mu"]) == np.arange(12)).all()
    if kind == "npy":
        return answer.images.flatten().tolist() == list(range(192)) * 3
    files = [io.BytesIO(encoded(i, kind="jpeg" if kind == "tgz" else "png")) for i in range(3)]
    images = np.stack([np.asarray(Image.open(f)) for f in files]).transpose(0, 3, 1, 2)
    return np.array_equal(answer.images, images)


class Hang(BaseException):
    pass


@pytest.mark.parametrize("files", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_files_give_a_right_answer_or_one_line(files, tmp_path, monkeypatch, capsys):
    """1,000 seeded mutations of each kind: no other exception, none over 20 s, the process below
    2 GiB more than before."""
    import resource
    monkeypatch.setattr(fid, "WIDTH", 12)

    def ring(number, frame):
        raise Hang

    def memory():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss               # KiB
    before, handler = memory(), signal.signal(signal.SIGALRM, ring)
    try:
        for kind, read in seeds_of_fuzz(tmp_path).items():
            good, answers = (tmp_path / f"a.{kind}").read_bytes(), 0
            right = read(str(tmp_path / f"a.{kind}"))
            assert is_right(kind, right, tmp_path)
            for seed in (735, *range(files)):                   # 735: a zip with an empty name
                file = tmp_path / f"m.{kind}"
                file.write_bytes(mutated(good, random.Random(seed)))
                signal.alarm(20)
                try:
                    answer = read(str(file))
                    answers += 1
                    if kind == "zip":                           # whose checksums leave no choice
                        assert all((image == right.images).all((1, 2, 3)).any()
                                   for image in answer.images), seed
                except UserError as e:
                    assert "\n" not in str(e), (kind, seed)
                except BaseException as e:
                    pytest.fail(f"{kind}, seed {seed}: {e!r}")
                finally:
                    signal.alarm(0)
            assert answers <= files, kind                       # some damage was done
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert memory() - before < 2 * 2 ** 20


def test_links_in_archives_are_not_followed(tmp_path, capsys):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(9))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("good.png", encoded(0))
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        z.writestr(link, str(secret))
    with tarfile.open(tmp_path / "a.tar", "w") as t:
        t.add(secret, "good.png")
        for kind, target in ((tarfile.SYMTYPE, str(secret)), (tarfile.LNKTYPE, "good.png")):
            link = tarfile.TarInfo(f"link{kind}.png")
            link.type, link.linkname = kind, target
            t.addfile(link)
    for name, links in (("a.zip", 1), ("a.tar", 2)):
        found = load(str(tmp_path / name))
        assert len(found.images) == 1
        assert capsys.readouterr().err.count("skipped link") == links


def test_what_unpacks_to_a_hundred_times_its_size_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "UNPACK_LIMIT", 2 ** 20)          # or the test would write gigabytes
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.png", bytes(2 ** 21))
    member = tarfile.TarInfo("a.png")
    member.size = 2 ** 30
    (tmp_path / "a.tar").write_bytes(member.tobuf() + bytes(1024))      # it claims so, and is read
    member.name, member.type = "head", tarfile.XHDTYPE                  # no further
    with gzip.open(tmp_path / "head.tgz", "wb") as f:
        f.write(member.tobuf() + bytes(1024))
    large = np.zeros((2 ** 21, 1, 1), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(12), sigma=np.zeros((3000, 3000)))
    np.savez_compressed(tmp_path / "b.npz", large)
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED) as z, \
            pytest.warns(UserWarning, match="Duplicate"):
        for array in (np.zeros((1, 8, 8), np.uint8), large):
            file = io.BytesIO()
            np.save(file, array)
            z.writestr("arr_0.npy", file.getvalue())
    for read, name in ((load, "a.zip"), (load, "a.tar"), (load, "head.tgz"), (load, "c.npz"),
                       (read_statistics, "a.npz"), (load, "b.npz")):
        with pytest.raises(UserError, match="unpacks to"):
            read(str(tmp_path / name) if read is load else tmp_path / name)


HOSTILE = [
    ("unet", "channels", 10 ** 9), ("unet", "channels", "8"), ("unet", "channels", 0),
    ("unet", "channels", 2), ("unet", "blocks", 10 ** 9), ("unet", "mult", [1] * 10 ** 5),
    ("unet", "mult", ["a"]), ("unet", "mult", [10 ** 9, 1]), ("unet", "mult", [0, 1]),
    ("unet", "classes", 10 ** 9), ("unet", "augment_dim", -1), ("unet", "in_channels", 1),
    ("unet", "dropout", "a"), ("unet", "dropout", 7.),
    ("config", "bnr", -1.), ("config", "bnr", "0.5"), ("config", "bnr", 1e300),
    ("config", "bnr", math.nan), ("config", "bnr", [0.5]),
    ("config", "path", "circle"), ("config", "path", 3), ("config", "sigma_data", math.inf),
    ("config", "sigma_data", "x"), ("config", "param", "v"), ("config", "unet", None),
    ("data", "shape", [3, 10 ** 6, 10 ** 6]), ("data", "shape", [3, 8]),
    ("data", "shape", [3, -8, 8]), ("data", "shape", [3, 8., 8.]), ("data", "shape", [1, 8, 8]),
    ("data", "shape", [3, 7, 8]), ("data", "classes", 3),
    ("options", "sample_steps", 0), ("options", "sample_steps", 10 ** 8),
    ("options", "sample_steps", "18"),
    ("checkpoint", "options", []), ("checkpoint", "data", None)]


@pytest.mark.parametrize("where, key, value", HOSTILE)
def test_a_checkpoint_is_checked_before_it_is_built(where, key, value, trained, tmp_path):
    checkpoint = torch.load(trained / "ema.pt", weights_only=True)
    sampling_path(load_model(trained / "ema.pt")[1])
    parts = {**checkpoint, "unet": checkpoint["config"]["unet"], "checkpoint": checkpoint}
    parts[where][key] = value
    torch.save(checkpoint, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="not a model of this project|BNR must be|not this project"):
        sampling_path(load_model(tmp_path / "bad.pt")[1])


def test_weights_are_what_the_file_holds(trained, tmp_path):
    checkpoint, bad = torch.load(trained / "ema.pt", weights_only=True), tmp_path / "bad.pt"
    weights = checkpoint["weights"]
    name = next(k for k, v in weights.items() if v.ndim == 4)
    for change in (lambda v: v.long(), lambda v: v.to_sparse(), lambda v: v.to("meta"),
                   lambda v: v.double(), lambda v: 3, lambda v: v[:1]):
        torch.save({**checkpoint, "weights": {**weights, name: change(weights[name])}}, bad)
        with pytest.raises(UserError, match="is not a"):
            load_model(bad)
    wide = dict(in_channels=3, out_channels=6, channels=4096, mult=[16], blocks=1, attention=[],
                resolution=8)
    config = {**checkpoint["config"], "unet": wide}
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in build(config).state_dict().items()}
    # one number each, of terabytes in all
    spread = {k: torch.zeros(()).expand(shape) for k, shape in shapes.items()}
    torch.save({**checkpoint, "config": config, "weights": spread}, bad)
    with pytest.raises(UserError, match="larger than the file"):
        load_model(bad)
    with zipfile.ZipFile(trained / "ema.pt") as plain, \
            zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for i in plain.infolist():
            small.writestr(i.filename, plain.read(i))
    with pytest.raises(UserError, match="not a checkpoint"):
        load_model(tmp_path / "small.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value, trained, tmp_path):
    checkpoint = torch.load(trained / "ema.pt", weights_only=True)
    list(checkpoint["weights"].values())[-1].view(-1)[-1] = value
    torch.save(checkpoint, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="not finite"):
        load_model(tmp_path / "bad.pt")


def test_a_damaged_state_is_one_line(trained, images, tmp_path, monkeypatch, capsys):
    state = torch.load(trained / "state.pt", weights_only=True)
    optimizer = state["optimizer"]
    small = {k: {**v, "exp_avg": torch.zeros(1)} for k, v in optimizer["state"].items()}
    sparse = {k: {**v, "exp_avg": v["exp_avg"].to_sparse()} for k, v in optimizer["state"].items()}
    (tmp_path / "run").mkdir()
    for name, change in (("net", {}), ("optimizer", {**optimizer, "state": small}),
                         ("optimizer", {**optimizer, "state": sparse}), ("optimizer", 3),
                         ("net", 3), ("seen", "a"), ("seen", -4)):
        torch.save({**state, name: change}, tmp_path / "run/state.pt")
        with pytest.raises(SystemExit) as e:
            run(monkeypatch, train, *options(tmp_path / "run", images, "--duration", 0.016))
        last = capsys.readouterr().err.splitlines()[-1]
        assert e.value.code == 2 and ("does not fit this network" in last
                                      or "is not a state of train.py" in last)


def test_moments_with_other_strides_get_those_of_the_weights(trained, images, tmp_path,
                                                             monkeypatch):
    """A fused Adam goes through memory by the weights' strides: one number, expanded, would end at
    once, and a transposed tensor would be read in another order."""
    state = torch.load(trained / "state.pt", weights_only=True)
    ends = []
    for change in (lambda v: v, lambda v: v.mT.contiguous().mT if v.ndim > 1 else v):
        (tmp_path / "run").mkdir(exist_ok=True)
        moments = {k: {**v, "exp_avg": change(v["exp_avg"])}
                   for k, v in state["optimizer"]["state"].items()}
        torch.save({**state, "optimizer": {**state["optimizer"], "state": moments}},
                   tmp_path / "run/state.pt")
        run(monkeypatch, train, *options(tmp_path / "run", images, "--duration", 0.016))
        ends.append(tensors(tmp_path / "run/state.pt")[0])
    assert same(*ends)


def test_statistics_files_run_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pickled"),)
    np.savez(tmp_path / "a.npz", mu=np.array([Bomb()], dtype=object), sigma=np.eye(3))
    with pytest.raises(UserError, match="cannot be read"):
        read_statistics(tmp_path / "a.npz")
    assert not (tmp_path / "pickled").exists()


# Numbers

def test_a_learning_rate_of_0_leaves_the_weights(tmp_path, images, monkeypatch):
    run(monkeypatch, train, *options(tmp_path / "run", images, "--duration", 0.012, "--lr", 0))
    found, state = tensors(tmp_path / "run/state.pt")
    torch.manual_seed(seed_for("weights", 0))
    start = build(state["config"]).state_dict()
    assert all(torch.equal(found["net", k], v) for k, v in start.items())


def test_one_image_is_enough(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(encoded(0))
    for bnr in ("0.5", "inf", "any"):
        out = tmp_path / bnr
        run(monkeypatch, train, *options(out, tmp_path / "set", "--duration", 0.008, "--bnr", bnr))
        assert tensors(out / "ema.pt")[1]["data"]["count"] == 1


def test_a_resolution_of_7(tmp_path, images, monkeypatch, capsys):
    odd = options(tmp_path / "run", images, "--duration", 0.008, "--resolution", 7)
    with pytest.raises(SystemExit):
        run(monkeypatch, train, *odd)
    assert "--attention 4: the levels have sides of 7, 3" in capsys.readouterr().err
    run(monkeypatch, train, *odd, "--mult", 1, "--attention", 7)
    draw = "--seeds 0-3 --steps 2 --device cpu".split()
    run(monkeypatch, sample, "--ckpt", tmp_path / "run/ema.pt", "--out", tmp_path / "s", *draw)
    assert Image.open(tmp_path / "s/000003.png").size == (7, 7)


@pytest.mark.slow
def test_65536_seeds(tmp_path, trained, monkeypatch, capsys):
    draw = "--device cpu --seeds 0-65535 --steps 1 --batch 512".split()
    run(monkeypatch, sample, "--ckpt", trained / "ema.pt", "--out", tmp_path / "s", *draw)
    assert len(list((tmp_path / "s").iterdir())) == 65536
    assert "65536 images" in capsys.readouterr().out
