"""The losses of runs, from their log.jsonl: both terms, whole and by quartile of the levels.

    python -m study.curves run/ run2/

What it draws is kept in the results, so that the figure can be drawn again when the runs are gone.
"""
import contextlib
import json
from pathlib import Path

import numpy as np

from study.common import Cells, column, digest, fits, label_lines, listed, parser, run
from util.cli import UserError
from util.run import stored_options

TERMS = ["denoise", "deblur"]
POINTS = 200                                    # of a run, at most
NAMED = ["data", "preset", "bnr", "schedule", "param", "seed", "batch", "lr"]   # of its options
QUARTILES = [(float, None)]                     # None: no such level was drawn
LINE = {"kimg": float, "denoise": float, "deblur": float, "denoise_by_level": QUARTILES,
        "deblur_by_level": QUARTILES}
FIELDS = [{"run": str, "kimg": float, "log": {name: [kind] for name, kind in LINE.items()}}]


def options():
    p = parser("curves", "The losses of one or several runs: both terms, whole and by quartile of "
                         "the levels that were drawn, lowest first.")
    p.add_argument("runs", nargs="*", help="folders of train.py (default run)")
    return p, p.parse_args()


def compute(args, cells: Cells) -> list:
    """The cells of the runs that are asked for, made again where a log has changed."""
    shown = []
    for folder in args.runs or ["run"]:
        lines = read_log(folder)
        shown.append(cells.compute(lambda: losses(folder, lines), run=str(Path(folder)),
                                   kimg=lines[-1]["kimg"], sha256=digest(log_file(folder))))
    return shown


def log_file(folder: str) -> Path:
    return Path(folder) / "log.jsonl"


def read_log(folder: str) -> list:
    """The lines of a run's log. UserError where there are none."""
    filename = log_file(folder)
    if not filename.exists():
        raise UserError(f"{filename} does not exist: give a folder of train.py")
    lines = []
    for text in filename.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):   # the last line may be incomplete
            line = json.loads(text)
            if fits(line, LINE):
                lines.append(line)
    if not lines:
        raise UserError(f"{filename} has no line of losses yet: train a little longer")
    return lines


def losses(folder: str, lines: list) -> dict:
    """At most POINTS lines of a log, the last among them, as lists; and the run's options."""
    every = -(-len(lines) // POINTS)
    lines = lines[::-1][::every][::-1]
    return {"options": named_options(folder), "log": {name: column(lines, name) for name in LINE}}


def named_options(folder: str) -> dict:
    """Those of a run's options that tell it from others; none where they cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        options = stored_options(folder)
        return {name: options.get(name) for name in NAMED}
    return {}


def last_losses(cell: dict, term: str) -> list:
    """A term in the last line of the log: whole, then by quartile. NaN: no such level."""
    log = cell["log"]
    quartiles = np.array(log[f"{term}_by_level"][-1], float)
    return [log[term][-1], *quartiles]


def latest(cells: list) -> list:
    """Of each run the cell that was computed last."""
    return list({cell["run"]: cell for cell in cells}.values())


def table(cells: list) -> None:
    print("\nthe last line of each log: the loss, and by quartile of the levels, lowest first")
    print(f"{'run':20}{'kimg':>9}  " + listed(TERMS, "45", "").rstrip())
    for cell in latest(cells):
        values = [*last_losses(cell, "denoise"), *last_losses(cell, "deblur")]
        print(f"{cell['run']:20}{cell['kimg']:9g}  " + listed(values, "<9.4f", ""))


def draw_losses(plt, cells: list):
    """Both terms by kimg, a line a run."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, term in zip(panels, TERMS):
        ends = []
        for i, cell in enumerate(latest(cells)):
            color = f"C{i % 10}"
            axes.plot(cell["log"]["kimg"], cell["log"][term], color=color, lw=1.5)
            ends.append((np.mean(cell["log"][term][-20:]), Path(cell["run"]).name, color))
        if term == "denoise":                                   # the first steps are far above
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.set(xlabel="kimg", title=f"{term}: loss")
        label_lines(axes, ends)
    return figure


def main():
    p, args = options()
    run(p, args, "curves", FIELDS, compute, table, {"": draw_losses})


if __name__ == "__main__":
    main()
