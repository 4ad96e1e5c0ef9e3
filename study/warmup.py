"""The short cut: a hot network turned warm with train.py --init-from. Not in the paper.

    python -m study.warmup --data c10/train

Hot for T kimg, then at BNR 0.5 for T / 4 and T / 2, beside networks of BNR 0.5 and of BNR 0 from
scratch for T and for as long as both. It trains the networks with train.py, in the folder --runs,
or continues those that are there.
"""
from functools import cache, partial
from pathlib import Path

from study.common import (QUICK, REFERENCES, RESOLUTIONS, Cells, Measure, deviation, digest, drawn,
                          groups, mean, parser, plotted, references, top_bands, trained)
from util import UserError, add_device_option, atomic_write, number, read_checkpoint


def options():
    p = parser("warmup", "The distance of samples to the data for a hot network turned warm, "
                         "beside warm and hot ones from scratch.")
    a = p.add_argument
    a("--data", default="leaves", help="as for train.py (default leaves)")
    a("--preset", default="tiny", choices=RESOLUTIONS, help="as for train.py (default tiny)")
    a("--duration", type=number(float, 0.01), default=60., help="T, kimg (default 60)")
    a("--lr", type=number(float, 0, 1), nargs="+", default=[1e-3, 2e-3],
      help="learning rates after the start from the hot network (default 1e-3 2e-3)")
    a("--runs", default="runs", help="folder of the networks' runs (default runs)")
    a("--seeds", type=number(int, 0), nargs="+", default=[0, 1], help="default 0 1")
    a("--samples", type=number(int, 50), default=1000,
      help="a cell, by multistep with NFE 18 (default 1000)")
    add_device_option(p)
    args = p.parse_args()
    if args.quick:
        args.duration, args.seeds, args.samples, args.lr = 0.064, [0], 50, [1e-3]
        args.runs = f"{args.runs}/quick"
    return p, args


def compute(args, cells):
    count = args.samples if args.quick else REFERENCES
    measure = cache(lambda: Measure(references(args.data, RESOLUTIONS[args.preset], count),
                                    args.device))
    for seed in args.seeds:
        for name, total, checkpoint in networks(args, seed):
            key = dict(data=args.data, preset=args.preset, hot_kimg=args.duration, network=name,
                       total_kimg=total, seed=seed, samples=args.samples)
            if not cells.find(**key):
                measure(), checkpoint()         # here, so that the cell's seconds are its own

            def value():
                images = drawn(checkpoint(), range(args.samples), args.device, steps=18,
                               solver="multistep")
                return {**measure()(images), "checkpoint": digest(checkpoint())}
            cell = cells.compute(key, value)
            print(f"{name}, {total:g} kimg, seed {seed}: {cell['distance']:.1f}, power "
                  f"{top_bands(cell)}", flush=True)


def networks(args, seed):
    """(name, kimg in all, function) of each network and moment. The function returns the checkpoint
    of that moment, and trains what is missing."""
    t = args.duration
    folder = f"{args.runs}/warmup-{args.data.replace('/', '-')}-{args.preset}-{t:g}-{seed}"

    def train(out, moments, *options):
        return [partial(trained_for, kimg, moments, f"{folder}/{out}", "--data", args.data,
                        "--preset", args.preset, "--device", args.device, "--seed", seed,
                        *(QUICK if args.quick else ()), *options) for kimg in moments]
    totals = [t, 1.25 * t, 1.5 * t]
    hot, *longer = train("hot", totals, "--bnr", 0)
    for total, network in zip(totals, [hot, *longer]):
        yield "hot", total, network
    for lr in args.lr:
        moments = [0.25 * t, 0.5 * t]
        options = ["--bnr", 0.5, "--init-from", f"{folder}/hot/ema-{t:g}.pt", "--lr", lr]
        for kimg, warm in zip(moments, train(f"{lr:g}", moments, *options)):
            yield f"hot, then warm at {lr:g}", t + kimg, lambda: (hot(), warm())[1]
    for total, network in zip(totals, train("warm", totals, "--bnr", 0.5)):
        yield "warm", total, network


def trained_for(kimg, moments, out, *options):
    """The ema.pt of a run in the folder out at so many kimg. The run is trained from moment to
    moment, and the checkpoint of each is kept, since the run goes on. UserError where it was not
    kept and the run has gone on."""
    for moment in (m for m in moments if m <= kimg):
        kept = Path(out) / f"ema-{moment:g}.pt"
        if not kept.exists():
            ema = Path(trained(out, *options, "--duration", moment))
            checkpoint = read_checkpoint(ema)
            if checkpoint["seen"] >= 1000 * moment + checkpoint["options"]["batch"]:
                raise UserError(f"{out} was trained for longer than {moment:g} kimg, and {kept} is "
                                "not there: remove the folder")
            with atomic_write(kept) as f:
                f.write(ema.read_bytes())
    return str(kept)


def comparable(cells):
    """Title and cells of each table: of one data set, preset, and so on."""
    by_values = groups(cells.cells, "data", "preset", "samples", "hot_kimg")
    for (data, preset, samples, t), some in sorted(by_values.items()):
        yield f"{data}, {preset}, T = {t:g} kimg, {samples} samples", 1.5 * t, some


def table(cells):
    """Seeds differ by more than the networks do, so the column `less` compares within each seed."""
    for title, longest, some in comparable(cells):
        by_network = groups(some, "network", "total_kimg")
        scratch = {c["seed"]: c["distance"] for c in by_network.get(("warm", longest), [])}
        print(f"\n{title}; mean and standard deviation over seeds; less: than warm from scratch "
              f"for {longest:g} kimg\n{'':26}{'kimg':>6}{'distance':>16}{'less':>16}   power, seed "
              "by seed")
        for (name, total), found in sorted(by_network.items()):
            values = [c["distance"] for c in found]
            gains = [scratch[c["seed"]] - c["distance"] for c in found if c["seed"] in scratch]
            columns = [f"{mean(v):.1f} +- {deviation(v)}" if v else "-" for v in (values, gains)]
            print(f"{name:26}{total:>6g}" + "".join(f"{c:>16}" for c in columns) + "   "
                  + "; ".join(map(top_bands, found)))


def draw_plot(cells):
    """Distance against the kimg in all. A line a network and seed: seeds differ by more."""
    tables = list(comparable(cells))

    def draw(plt):
        figure, axes = plt.subplots(1, len(tables), figsize=(7 * len(tables), 4.5), squeeze=False)
        for axis, (title, _, some) in zip(axes[0], tables):
            names = sorted({c["network"] for c in some})
            for (name, seed), same in sorted(groups(some, "network", "seed").items()):
                points = sorted((c["total_kimg"], c["distance"]) for c in same)
                first = seed == min(c["seed"] for c in some)
                axis.plot(*zip(*points), ".-", color=f"C{names.index(name)}",
                          label=name if first else None)
            axis.set(xlabel="kimg in all", ylabel="Frechet distance", title=title)
            axis.legend()
        return figure
    plotted(cells.png, draw)


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "warmup")
        if not args.plot_only:
            compute(args, cells)
        table(cells)
        draw_plot(cells)


if __name__ == "__main__":
    main()
