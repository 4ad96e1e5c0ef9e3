"""The losses of runs, from their log.jsonl: both terms, whole and by quartile of the levels.

    python -m study.curves run/ run2/

What it draws is kept in the results, so that the plot can be made again when the runs are gone.
"""
import json
from pathlib import Path

import numpy as np

from study.common import Cells, digest, parser, plotted
from util import UserError

TERMS = ["denoise", "deblur"]
POINTS = 200                                    # of a run, at most
NAMED = ["data", "preset", "bnr", "path", "param", "seed", "batch", "lr"]       # of its options


def options():
    p = parser("curves", "The losses of one or several runs: both terms, whole and by quartile of "
                         "the levels that were drawn, lowest first.")
    p.add_argument("runs", nargs="*", help="folders of train.py (default run)")
    p.add_argument("--out", type=Path, help="the plot (default study/results/curves.png)")
    return p, p.parse_args()


def compute(args, cells):
    """The cells of the runs that are asked for, made again where a log has changed."""
    found = []
    for run in args.runs or ["run"]:
        lines = log_of(run)
        key = {"run": str(Path(run)), "kimg": lines[-1]["kimg"], "sha256": digest(log_file(run))}
        found.append(cells.compute(key, lambda: losses(run, lines)))
    return found


def log_file(run):
    return Path(run) / "log.jsonl"


def log_of(run):
    """The lines of a run's log. UserError where there are none."""
    filename = log_file(run)
    if not filename.exists():
        raise UserError(f"{filename} does not exist: give a folder of train.py")
    lines = []
    for line in filename.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:                                      # the last line may be incomplete
            break
    if not lines:
        raise UserError(f"{filename} is empty: train a little longer")
    return lines


def losses(run, lines):
    """At most POINTS lines of a log, the last among them, as lists; and the run's options."""
    every = -(-len(lines) // POINTS)
    lines = lines[::-1][::every][::-1]
    options = json.loads((Path(run) / "options.json").read_text())
    columns = ["kimg", *TERMS, *(f"{term}_by_level" for term in TERMS)]
    return {"options": {name: options.get(name) for name in NAMED},
            "log": {name: [line[name] for line in lines] for name in columns}}


def series(cell, term):
    """The five columns of a term, whole and quartiles: float [5, lines]. NaN: no such level."""
    whole, quartiles = (np.array(cell["log"][name], float) for name in (term, f"{term}_by_level"))
    return np.vstack([whole[None], quartiles.T])


def table(shown):
    print("\nthe last line of each log: the loss, and by quartile of the levels, lowest first")
    print(f"{'run':20}{'kimg':>9}  " + "".join(f"{term:9}{'':36}" for term in TERMS).rstrip())
    for cell in shown:
        values = np.concatenate([series(cell, term)[:, -1] for term in TERMS])
        print(f"{cell['run']:20}{cell['kimg']:9g}  " + "".join(f"{v:<9.4f}" for v in values))


def draw_plot(filename, shown):
    """A row for each term: whole, then the quartiles of the levels. A line a run."""
    def draw(plt):
        names = ["all levels", "lowest quarter", "second", "third", "highest quarter"]
        figure, axes = plt.subplots(2, 5, figsize=(16, 6), sharex=True)
        for row, term in zip(axes, TERMS):
            for i, (a, name) in enumerate(zip(row, names)):
                for cell in shown:
                    a.plot(cell["log"]["kimg"], series(cell, term)[i], label=cell["run"])
                a.set(title=f"{term}, {name}")
        for a in axes[1]:
            a.set_xlabel("kimg")
        axes[0, 0].legend()
        return figure
    plotted(filename, draw)


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "curves")
        shown = latest(cells.cells) if args.plot_only else compute(args, cells)
        table(shown)
        draw_plot(args.out or cells.png, shown)


def latest(cells):
    """Of each run the cell that was computed last."""
    return list({c["run"]: c for c in cells}.values())


if __name__ == "__main__":
    main()
