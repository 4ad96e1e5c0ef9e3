"""Long runs survive: signals, kills, full disks, several processes, damaged and hostile files. The
long versions: python -m pytest -m slow."""
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

import sample
import train
from data import load, seed_for
from fid import read_statistics
from model import build
from runs import (ROOT, command_line, encoded, largest_file, latents, options, pictures, same_run,
                  same_state, seen_by, steps_of, words)
from util.checkpoint import load_model, read_checkpoint
from util.cli import UserError, say
from util.distributed import signals_noted
from util.files import atomic_write
from util.run import locked

ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ALONE.pop("WORLD_SIZE", None)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
TRAIN = str(ROOT / "train.py")


def with_default_interrupt():
    """In a process that is started: nohup and shells in the background leave Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def started(line):
    """A process that is gone with the block, and its children, however that ends."""
    process = subprocess.Popen(line, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, preexec_fn=with_default_interrupt)
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in (*children_of(process), process.pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def children_of(process) -> list:
    """Their numbers; none where there is no /proc."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        return []
    return [int(pid) for pid in children.read_text().split()]


def finished(line, folder) -> str:
    """What the program prints that runs in this folder and succeeds."""
    done = subprocess.run(line, cwd=folder, env=ALONE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def lines_after(log, seen) -> list:
    """The complete lines of a log after that many images; none where there is no log."""
    lines = []
    if log.exists():
        for text in log.read_text().splitlines(keepends=True):
            if text.endswith("\n") and json.loads(text)["kimg"] > seen / 1000:
                lines.append(json.loads(text))
    return lines


def wait_for_line(run, process):
    while not lines_after(run / "log.jsonl", 0):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


# Signals, kills and repetition

@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_step_saves_and_resumes_bit_for_bit(name, tmp_path, images):
    number = getattr(signal, name)
    text = f"--data {images} --dropout 0.3 --augment 0.5 --snapshot-every 0 --duration"
    with started([sys.executable, TRAIN, *words(tmp_path / "cut", text), "100"]) as process:
        wait_for_line(tmp_path / "cut", process)
        process.send_signal(number)
        printed = process.communicate(timeout=100)[0]
    assert process.returncode == 128 + number
    assert "stopped and saved at" in printed and "Traceback" not in printed
    seen = seen_by(tmp_path / "cut")
    assert 0 < seen < 100_000
    for out in ("cut", "whole"):
        train.train(options(tmp_path / out, f"{text} {(seen + 16) / 1000}"))
    assert same_state(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_second_signal_ends_at_once(name):
    """The first is only noted, and then the signal has its own meaning again. One that is ignored,
    as under nohup, stays so."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals_noted() as signals:
            os.kill(os.getpid(), number)
            assert signals == []
        signal.signal(number, print)
        with signals_noted() as signals:
            os.kill(os.getpid(), number)
            assert signals == [number] and signal.getsignal(number) == signal.SIG_DFL
        assert signal.getsignal(number) == print
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_comes_to_the_same_weights(kills, tmp_path, images):
    """SIGKILL any time, with a checkpoint every second step so that many fall into saving; each
    loses two steps at most."""
    r = random.Random(0)
    cut = tmp_path / "cut"
    text = f"--data {images} --log-every 0.004 --snapshot-every 0.008 --sample-steps 1 --duration"
    seen = 0
    for _ in range(kills):
        with started([sys.executable, TRAIN, *words(cut, text), "1000"]) as process:
            while not lines_after(cut / "log.jsonl", seen) and process.poll() is None \
                    and r.random() < 0.999:                     # a few die before the first step
                time.sleep(0.01)
            time.sleep(r.uniform(0, 1))
            assert process.poll() is None, process.stdout.read()
            process.kill()
        if (cut / "ema.pt").exists():
            load_model(cut / "ema.pt")
        if (cut / "state.pt").exists():
            seen = read_checkpoint(cut / "state.pt")["seen"]
            assert len(lines_after(cut / "log.jsonl", seen)) <= 2
    duration = seen / 1000 + 0.012
    for out in ("cut", "whole"):
        train.train(options(tmp_path / out, f"{text} {duration}"))
    assert same_run(cut, tmp_path / "whole")
    assert steps_of(cut) == list(range(1, round(duration * 250) + 1))           # of four images


# A full disk, and files that are in use

def test_a_full_disk_does_not_end_a_run(tmp_path, images, capsys):
    """It costs the log lines, the grid and the checkpoint of its time, one warning each."""
    data = load(str(images))
    train.train(options(tmp_path / "whole", duration=0.064), data)
    full = contextlib.ExitStack()

    def fill_and_empty(line):
        if line["step"] == 4:
            full.enter_context(largest_file(0))
        if line["step"] == 12:
            full.close()

    with full:
        train.train(options(tmp_path / "full", duration=0.064), data, on_log=fill_and_empty)
    printed = capsys.readouterr().err
    for what, times in (("a log line", 2), ("a grid", 1), ("state.pt", 1), ("ema.pt", 1)):
        assert printed.count(f"{what} could not be written (File too large)") == times
    assert steps_of(tmp_path / "full") == [4, 16]
    assert same_state(tmp_path / "full", tmp_path / "whole")


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error_and_the_old_one_stays(tmp_path):
    run = tmp_path / "run"
    for duration in (0.032, 0.096):         # of which the first starts with an empty folder
        before = {file: file.read_bytes() for file in run.glob("*.pt")}
        with largest_file(20_000), pytest.raises(UserError, match="make room and start the same"):
            train.train(options(run, duration=duration), latents())
        assert {file: file.read_bytes() for file in run.glob("*.pt")} == before
        assert not list(run.glob("*.part"))
        assert steps_of(run)[-1] == duration * 250              # it went on to its end
        train.train(options(run, duration=duration), latents())
        assert seen_by(run) == duration * 1000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_ends_nothing():
    full = open("/dev/full", "w")
    say("a line", full)
    with contextlib.suppress(OSError):
        full.close()


def test_what_is_no_file_is_not_replaced_and_a_link_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/null", tmp_path / "pipe"):
        with pytest.raises(UserError, match="is a device or a pipe"), atomic_write(name):
            pass
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/file")
    for text in ("first", "second"):
        with atomic_write(tmp_path / "link", "w") as f:
            f.write(text)
        assert (tmp_path / "elsewhere/file").read_text() == text
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.rglob("*.part"))


def test_a_folder_has_one_run_at_a_time(tmp_path):
    run = tmp_path / "run"
    with locked(run), pytest.raises(UserError, match="run is in use by another run"):
        train.train(options(run, duration=0.016), latents())
    assert not run.exists()                                     # nothing was written there
    run.mkdir()
    of_a_killed_run = run / "ema.pt.0123abcd.part"
    somebodys = run / "mine.part"
    for file in (of_a_killed_run, somebodys):
        file.touch()
    train.train(options(run, duration=0.016), latents())
    assert somebodys.exists() and not of_a_killed_run.exists()


# Several processes

TWO = """
import os, sys
import torch
import sample, train
from data import Images
from model import Denoiser

def run(main, *line):
    sys.argv = ["program.py", *line]
    main()

run(train.main, *{training!r})
run(sample.main, *{drawing!r})
if os.environ["RANK"] == "0":
    os.remove("samples/000004.png")
run(sample.main, *{drawing!r})                                  # it goes on
x = torch.arange(20 * 192).reshape(20, 3, 8, 8).remainder(255).byte()
net = Denoiser(torch.nn.Conv2d(3, 6, 1))
net.unet.forward = lambda x, *others, conv=net.unet.forward: conv(x)
net.unused = torch.nn.Parameter(torch.ones(1))
train.train(train.options({own!r}), Images(x), net=net)
"""
TRAINING = "--batch-gpu 1 --augment 0.5 --bnr any --duration 0.02 --log-every 0.004"
DRAWING = "--ckpt {trained}/ema.pt --device cpu --seeds 3-9 --steps 3 --churn 1 --out"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("trained")
    train.train(options(run, duration=0.008), pictures())
    return run


@pytest.fixture(scope="module")
def by_two(tmp_path_factory, images, trained):
    """A folder in which two processes, of one torchrun, have trained, drawn samples, and trained a
    network of one's own that leaves out a parameter."""
    folder = tmp_path_factory.mktemp("two")
    drawing = DRAWING.format(trained=trained).split()
    script = TWO.format(training=words("run", TRAINING, data=images), drawing=[*drawing, "samples"],
                        own=words("own", "--duration 0.008"))
    (folder / "two.py").write_text(script)
    printed = finished([*TORCHRUN, "two.py"], folder)
    (folder / "printed").write_text(printed)
    return folder


def test_two_processes_train_as_one(by_two, tmp_path, images):
    """With accumulation and augmentation, five steps: the weights to 1e-4 of their change, in L2,
    the mean gradients that Adam keeps to 1e-3, and the log."""
    train.train(options(tmp_path, TRAINING, data=images))
    one = read_checkpoint(tmp_path / "state.pt")
    two = read_checkpoint(by_two / "run/state.pt")
    assert one["seen"] == two["seen"] == 20
    torch.manual_seed(seed_for("weights", 0))
    start = build(one["config"]).state_dict()

    def distance(a, b) -> float:
        return math.sqrt(sum((a[name] - b[name]).square().sum() for name in start))

    assert 0 < distance(one["net"], two["net"]) <= 1e-4 * distance(one["net"], start)
    means = []
    for state in (one, two):
        moments = state["optimizer"]["state"].values()
        means.append(torch.cat([of_p["exp_avg"].flatten() for of_p in moments]))
    assert (means[0] - means[1]).norm() <= 1e-3 * means[0].norm()
    for a, b in zip(lines_after(tmp_path / "log.jsonl", 0),
                    lines_after(by_two / "run/log.jsonl", 0), strict=True):
        assert a["step"] == b["step"]
        assert a["denoise_by_level"] == pytest.approx(b["denoise_by_level"], rel=1e-3)


def test_two_processes_draw_the_same_images_as_one(by_two, trained, tmp_path):
    """And go on with a draw of which an image is missing."""
    command_line(sample.main, *DRAWING.format(trained=trained).split(), tmp_path / "samples")
    names = [f"samples/{seed:06d}.png" for seed in range(3, 10)]
    for folder in (tmp_path, by_two):
        assert sorted(folder.glob("samples/*.png")) == [folder / name for name in names]
    for name in [*names, "samples-grid.png"]:
        one = np.asarray(Image.open(tmp_path / name)).astype(int)
        two = np.asarray(Image.open(by_two / name))
        assert abs(one - two).max() <= 1


def test_an_own_script_under_torchrun_trains_each_run_once(by_two):
    """It needs no process group of its own; the processes share the batch of each run."""
    printed = (by_two / "printed").read_text()
    for batch in ("batch 4, 1 at a time, on 2 x cpu", "batch 4, on 2 x cpu"):
        assert printed.count(batch) == 1
    assert steps_of(by_two / "own") == [2]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_all_processes_stop_and_save_together(tmp_path, images):
    """Whichever of them gets the signal."""
    line = words(tmp_path, "--duration 1000 --snapshot-every 0", data=images)
    with started([*TORCHRUN, TRAIN, *line]) as process:
        wait_for_line(tmp_path, process)
        os.kill(children_of(process)[1], signal.SIGTERM)
        printed = process.communicate(timeout=100)[0]
    assert "stopped and saved" in printed and process.returncode != 0
    assert seen_by(tmp_path) == 4 * steps_of(tmp_path)[-1]


# Damaged and hostile files

def write_good_files(folder) -> dict:
    """A file of each kind in folder -> {kind: the function that reads it}."""
    with zipfile.ZipFile(folder / "a.zip", "w") as z, tarfile.open(folder / "a.tar", "w") as t, \
            tarfile.open(folder / "a.tgz", "w:gz") as g:
        for i in range(3):
            z.writestr(f"c/{i}.png", encoded(i), zipfile.ZIP_DEFLATED)
            for archive in (t, g):
                member = tarfile.TarInfo(f"c/{i}.png")
                member.size = len(encoded(i))
                archive.addfile(member, io.BytesIO(encoded(i)))
    array = pictures().images.permute(0, 2, 3, 1).numpy()
    np.save(folder / "a.npy", array)
    np.savez_compressed(folder / "a.npz", images=array, labels=np.arange(20))
    train.train(options(folder / "run", duration=0.004), latents())
    (folder / "run/ema.pt").rename(folder / "a.pt")
    return {"zip": load, "tar": load, "tgz": load, "npy": load, "npz": load, "pt": load_model}


def mutated(good: bytes, r: random.Random) -> bytes:
    """A good file cut, overwritten, shortened or lengthened, mostly where headers are."""
    b = bytearray(good)
    ends = (r.randrange(len(b)), r.randrange(min(len(b), 600)), -r.randrange(min(len(b), 2000)))
    i = r.choice(ends) % len(b)
    n = r.randrange(1, 64)
    change = r.choice(["cut", "overwrite", "shorten", "lengthen"])
    if change == "cut":
        del b[i:]
    elif change == "overwrite":
        b[i:i + n] = r.randbytes(n)
    elif change == "shorten":
        del b[i:i + n]
    else:
        b[i:i] = r.randbytes(n)
    return bytes(b)


@pytest.mark.parametrize("files", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_files_give_a_right_answer_or_one_line(files, tmp_path, capsys):
    """Seeded mutations of each kind: UserError, and no other exception."""
    for kind, read in write_good_files(tmp_path).items():
        good = (tmp_path / f"a.{kind}").read_bytes()
        right = read(str(tmp_path / f"a.{kind}"))
        refusals = 0
        for seed in range(files):
            file = tmp_path / f"m.{kind}"
            file.write_bytes(mutated(good, random.Random(seed)))
            try:
                answer = read(str(file))
            except UserError as e:
                refusals += 1
                assert "\n" not in str(e), (kind, seed)
            except BaseException as e:
                pytest.fail(f"{kind}, seed {seed}: {e!r}")
            else:
                if kind == "zip":                               # whose checksums leave no choice
                    for image in answer.images:
                        assert (image == right.images).all((1, 2, 3)).any(), seed
        assert refusals > 0, kind


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
            link.type = kind
            link.linkname = target
            t.addfile(link)
    for name, links in (("a.zip", 1), ("a.tar", 2)):
        assert len(load(str(tmp_path / name)).images) == 1
        assert capsys.readouterr().err.count("skipped link") == links


def write_zip_that_claims(filename, size, **members):
    """A zip whose directory says that its last member unpacks to this size."""
    with zipfile.ZipFile(filename, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(name.replace("_", "."), content)
        z.filelist[-1].file_size = size


def test_what_unpacks_to_a_hundred_times_its_size_is_refused(tmp_path):
    """By what its headers claim, before any of it is read."""
    array = io.BytesIO()
    np.save(array, np.zeros((1, 8, 8), np.uint8))
    write_zip_that_claims(tmp_path / "a.zip", 2 ** 30, a_png=encoded(0), b_png=encoded(1))
    write_zip_that_claims(tmp_path / "a.npz", 2 ** 30, x_npy=array.getvalue())
    member = tarfile.TarInfo("a.png")
    member.size = 2 ** 30
    (tmp_path / "a.tar").write_bytes(member.tobuf() + bytes(1024))
    member.name = "head"                                        # of the next member
    member.type = tarfile.XHDTYPE
    with gzip.open(tmp_path / "head.tgz", "wb") as f:
        f.write(member.tobuf() + bytes(1024))
    for name in ("a.zip", "a.npz", "a.tar", "head.tgz"):
        with pytest.raises(UserError, match="unpacks to 1.0 GiB"):
            load(str(tmp_path / name))


class Bomb:
    """Makes a folder as it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_no_file_runs_code(tmp_path, trained):
    bomb = Bomb(tmp_path / "unpickled")
    checkpoint = torch.load(trained / "ema.pt", weights_only=True)
    torch.save({**checkpoint, "extra": bomb}, tmp_path / "a.pt")
    array = np.array([bomb], dtype=object)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", mu=array, sigma=np.eye(3))
    for read, name in ((load_model, "a.pt"), (load, "a.npy"), (load, "a.npz"),
                       (read_statistics, "a.npz")):
        with pytest.raises(UserError):
            read(tmp_path / name)
    assert not (tmp_path / "unpickled").exists()


def test_a_checkpoint_is_loaded_strictly_and_with_finite_weights_or_not_at_all(trained, tmp_path):
    good = torch.load(trained / "ema.pt", weights_only=True)
    name = "unet.first.weight"
    weight = good["weights"][name]
    not_finite = weight.clone()
    not_finite[-1] = math.nan
    missing = {key: value for key, value in good["weights"].items() if key != name}
    wider = {**good["config"], "unet": {**good["config"]["unet"], "channels": 10 ** 6}}
    for bad, message in (
            ({**good, "weights": {**good["weights"], name: not_finite}}, "not finite"),
            ({**good, "weights": {**good["weights"], name: weight[:1]}}, "size mismatch"),
            ({**good, "weights": {**good["weights"], "unet.more": weight}}, "Unexpected key"),
            ({**good, "weights": missing}, "Missing key"),
            ({**good, "config": wider}, "size mismatch"),
            ({**good, "config": {}}, "missing or damaged"),
            ([], "is not a model")):
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(UserError, match=message) as e:
            load_model(tmp_path / "bad.pt")
        assert "\n" not in str(e.value)

    with zipfile.ZipFile(trained / "ema.pt") as plain, \
            zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for member in plain.infolist():
            small.writestr(member.filename, plain.read(member))
    with pytest.raises(UserError, match="not a checkpoint"):    # it could be a decompression bomb
        load_model(tmp_path / "small.pt")
    with pytest.raises(UserError, match="is a folder: give the ema.pt of a run"):
        load_model(tmp_path)


def test_a_damaged_run_is_one_line(trained, tmp_path):
    state = torch.load(trained / "state.pt", weights_only=True)
    optimizer = state["optimizer"]
    short = {i: {**moments, "exp_avg": torch.zeros(1)} for i, moments in optimizer["state"].items()}
    for part, damage in (("net", {}), ("net", 3), ("seen", "a"), ("seen", -4), ("optimizer", 3),
                         ("optimizer", {**optimizer, "state": short}), ("options", None)):
        torch.save({**state, part: damage}, tmp_path / "state.pt")
        with pytest.raises(UserError, match="does not fit this network|is not a state of train.py"):
            train.train(options(tmp_path, duration=0.016), pictures())
    (tmp_path / "state.pt").write_text("hello")
    with pytest.raises(UserError, match="is not a checkpoint of this project"):
        train.train(options(tmp_path, duration=0.016), pictures())
    assert (tmp_path / "state.pt").read_text() == "hello"
    (tmp_path / "state.pt").rename(tmp_path / "ema.pt")
    with pytest.raises(UserError, match="holds a model, but no state.pt to resume from"):
        train.train(options(tmp_path, duration=0.016), pictures())


def test_damaged_options_are_one_line(trained, tmp_path, capsys):
    stored = json.loads((trained / "options.json").read_text())
    texts = {"{": "holds no run", "5": "holds no run", "null": "holds no run", "{}": "holds no run"}
    for name, value in (("preset", "x"), ("batch", "x"), ("lr", float("nan")), ("mult", "2 a"),
                        ("mult", ["a"]), ("precision", "fp8"), ("schedule", "slow"),
                        ("cond", "yes"), ("duration", -1), ("attention", {"a": 1}),
                        ("channels", 8.5)):
        texts[json.dumps({**stored, name: value})] = f"--{name}"
    for text, message in texts.items():
        (tmp_path / "options.json").write_text(text)
        with pytest.raises(SystemExit):
            train.options(["--resume", str(tmp_path)])
        assert message in capsys.readouterr().err.splitlines()[-1]
