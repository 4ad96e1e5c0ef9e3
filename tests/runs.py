"""Small runs of train.py and draws of sample.py for the tests: how they start, and what they
leave."""
import contextlib
import io
import json
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from data import Images
from model import build
from util.checkpoint import read_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
SMALL = """--resolution 8 --channels 8 --mult 1 2 --attention 4 --device cpu --batch 4 --warmup 0
           --log-every 0.016 --snapshot-every 0.032 --sample-steps 2""".split()


def words(out, text="", **given) -> list:
    """A command line of train.py: SMALL, --name value of each given, and the options in text."""
    line = [*SMALL, "--out", str(out)]
    for name, value in given.items():
        line += ["--" + name.replace("_", "-"), str(value)]
    return line + text.split()


def options(out, text="", **given):
    return train.options(words(out, text, **given))


def command_line(main, *line):
    """main() of a program with this command line."""
    before = sys.argv
    sys.argv = ["program.py", *map(str, line)]
    try:
        main()
    finally:
        sys.argv = before


def refused(capsys, main, *line) -> str:
    """The one line, with exit code 2, that the program answers to this command line."""
    with pytest.raises(SystemExit) as e:
        command_line(main, *line)
    printed = capsys.readouterr().err
    assert e.value.code == 2 and "Traceback" not in printed, printed
    return printed.strip().splitlines()[-1]


def draw(checkpoint, out, *line) -> None:
    """sample.py with two steps of Heun."""
    command_line(sample.main, "--ckpt", checkpoint, "--device", "cpu", "--steps", 2, "--out", out,
                 *line)


@contextlib.contextmanager
def largest_file(size):
    """Within, no file of this process may grow beyond this size, as on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def indented_blocks(page: str) -> list:
    """The blocks of code of a page of Markdown, without their indent."""
    blocks = [[]]
    for line in page.splitlines():
        if line.startswith("    ") or not line and blocks[-1]:
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [textwrap.dedent("\n".join(lines)) + "\n" for lines in blocks]


def save_model(filename, bnr="any", schedule=None, classes=0):
    """Saves a network of random weights for images of 3 x 8 x 8 as train.py does. Returns
    filename."""
    torch.manual_seed(0)
    unet = {"in_channels": 3, "out_channels": 6, "channels": 8, "mult": [1], "blocks": 1,
            "resolution": 8, "attention": [], "dropout": 0., "augment_dim": 0, "classes": classes,
            "ratio": bnr == "any"}
    config = {"bnr": bnr, "schedule": schedule, "param": "residual", "sigma_data": 0.5,
              "unet": unet, "mean_color": None}
    if bnr == math.inf:
        config["mean_color"] = {"mean": [0.] * 3, "cov": torch.eye(3).tolist()}
    net = build(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    data = {"name": "noise", "shape": [3, 8, 8], "classes": ["a", "b"][:classes] or ["all"],
            "latents": False}
    Path(filename).parent.mkdir(exist_ok=True)
    save_checkpoint(str(filename), {"weights": net.state_dict(), "config": config, "data": data,
                                    "options": {"sample_steps": 2}, "seen": 0})
    return filename


def pictures(channels=3, classes=("all",)) -> Images:
    """20 images of noise, uint8, whose classes take turns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (20, channels, 8, 8), dtype=torch.uint8, generator=generator)
    return Images(x, torch.arange(20) % len(classes), classes, "noise")


def latents(channels=3) -> Images:
    """10 images of noise, floats. Their runs draw no grid, which takes longer than 50 steps."""
    x = torch.randn(10, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return Images(x / 2, name="noise", latents=True)


def encoded(seed, kind="png", shape=(8, 8, 3)) -> bytes:
    """An image file of noise."""
    file = io.BytesIO()
    array = np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def log_of(out) -> list:
    """The lines of a run's log, without the speed."""
    lines = []
    for text in Path(out, "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        del line["images_per_s"]
        lines.append(line)
    return lines


def steps_of(out) -> list:
    return [line["step"] for line in log_of(out)]


def seen_by(out) -> int:
    return read_checkpoint(f"{out}/ema.pt")["seen"]


def same(a, b) -> bool:
    """Whether two nested dicts hold the same tensors, to the bit, and the same values."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def state_of(file) -> dict:
    """What a state.pt holds of a run: its weights, EMA, moments and number of images."""
    state = read_checkpoint(file)
    return {part: state[part] for part in ("net", "ema", "optimizer", "seen")}


def same_state(a, b) -> bool:
    """Whether two folders hold the same state and the same model, to the bit."""
    old_model = read_checkpoint(f"{a}/ema.pt")
    new_model = read_checkpoint(f"{b}/ema.pt")
    return same(state_of(f"{a}/state.pt"), state_of(f"{b}/state.pt")) \
        and same(old_model["weights"], new_model["weights"])


def same_run(a, b) -> bool:
    """The same, with the same log."""
    return same_state(a, b) and log_of(a) == log_of(b)
