"""Small runs of train.py for the tests: how they start, and what they leave."""
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import Images
from util.checkpoint import read_checkpoint

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


def same_state(a, b) -> bool:
    """Whether two folders hold the same weights, EMA, moments and number of images, to the bit."""
    old = read_checkpoint(f"{a}/state.pt")
    new = read_checkpoint(f"{b}/state.pt")
    states_agree = all(same(old[part], new[part]) for part in ("net", "ema", "optimizer", "seen"))
    old_model = read_checkpoint(f"{a}/ema.pt")
    new_model = read_checkpoint(f"{b}/ema.pt")
    return states_agree and same(old_model["weights"], new_model["weights"])


def same_run(a, b) -> bool:
    """The same, with the same log."""
    return same_state(a, b) and log_of(a) == log_of(b)
