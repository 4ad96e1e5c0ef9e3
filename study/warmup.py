"""The short cut: a hot network turned warm with train.py --init-from. Not in the paper.

    python -m study.warmup --data c10/train

Hot for T kimg, then at BNR 0.5 for T / 4 and T / 2, beside networks of BNR 0.5 and of BNR 0 from
scratch for T and for T + T / 2. It trains the networks with train.py, in the folder --runs, or
continues those that are there.
"""
from pathlib import Path

from study.common import Cells, Measure, deviation, drawn, parser, plotted, references, trained
from study.common import REFERENCES, RESOLUTIONS, mean, top_bands
from util import add_device_option, atomic_write, number


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
    t, measure = args.duration, None
    for seed in args.seeds:
        folder = f"{args.runs}/warmup-{t:g}-{seed}"
        hot = f"{folder}/hot"
        # name, folder, options, and kimg of its training at which it is measured, growing
        networks = [("hot", hot, ["--bnr", 0], [t, 1.5 * t])]
        for lr in args.lr:
            start = ["--bnr", 0.5, "--init-from", f"{hot}/ema-{t:g}.pt", "--lr", lr]
            networks.append((f"hot, then warm at {lr:g}", f"{folder}/{lr:g}", start,
                             [0.25 * t, 0.5 * t]))
        networks.append(("warm", f"{folder}/warm", ["--bnr", 0.5], [t, 1.5 * t]))
        for name, out, extra, durations in networks:
            for kimg in durations:
                checkpoint = trained_for(kimg, out, "--data", args.data, "--preset", args.preset,
                                         "--device", args.device, "--seed", seed, *extra)
                total = kimg + t if "then" in name else kimg
                key = dict(data=args.data, preset=args.preset, hot_kimg=t, network=name,
                           total_kimg=total, seed=seed, samples=args.samples)
                if not cells.find(**key) and measure is None:
                    count = args.samples if args.quick else REFERENCES
                    measure = Measure(references(args.data, RESOLUTIONS[args.preset], count),
                                      args.device)
                cell = cells.compute(key, lambda: measure(drawn(
                    checkpoint, range(args.samples), args.device, steps=18, solver="multistep")))
                print(f"{name}, {total:g} kimg, seed {seed}: {cell['distance']:.1f}, power "
                      f"{top_bands(cell)}", flush=True)


def trained_for(kimg, out, *options):
    """A copy of the ema.pt of that moment, which stays when the run in the folder out goes on."""
    kept = Path(out) / f"ema-{kimg:g}.pt"
    if not kept.exists():
        ema = Path(trained(out, *options, "--duration", kimg))
        with atomic_write(kept) as f:
            f.write(ema.read_bytes())
    return str(kept)


def table(cells):
    """Seeds differ by more than the networks do, so the column `less` compares within each seed."""
    for t in sorted({c["hot_kimg"] for c in cells.cells}):
        scratch = {c["seed"]: c["distance"]
                   for c in cells.find(hot_kimg=t, network="warm", total_kimg=1.5 * t)}
        print(f"\nT = {t:g} kimg; mean and standard deviation over seeds; less: than warm from "
              f"scratch for {1.5 * t:g} kimg\n{'':26}{'kimg':>6}{'distance':>16}{'less':>16}   "
              "power, seed by seed")
        for name, total in rows(cells, t):
            found = cells.find(hot_kimg=t, network=name, total_kimg=total)
            values = [c["distance"] for c in found]
            gains = [scratch[c["seed"]] - c["distance"] for c in found if c["seed"] in scratch]
            columns = [f"{mean(v):.1f} +- {deviation(v)}" if v else "-" for v in (values, gains)]
            print(f"{name:26}{total:>6g}" + "".join(f"{c:>16}" for c in columns) + "   "
                  + "; ".join(map(top_bands, found)))


def rows(cells, t):
    return sorted({(c["network"], c["total_kimg"]) for c in cells.find(hot_kimg=t)})


def draw_plot(cells):
    def draw(plt):
        times = sorted({c["hot_kimg"] for c in cells.cells})
        figure, axes = plt.subplots(1, len(times), figsize=(6 * len(times), 4), squeeze=False)
        for axis, t in zip(axes[0], times):
            for name in sorted({name for name, _ in rows(cells, t)}):
                points = [(c["total_kimg"], c["distance"])
                          for c in cells.find(hot_kimg=t, network=name)]
                totals = sorted({total for total, _ in points})
                means = [mean([d for other, d in points if other == total]) for total in totals]
                line, = axis.plot(totals, means, label=name)
                axis.plot(*zip(*points), ".", color=line.get_color())
            axis.set(xlabel="kimg in all", ylabel="Frechet distance", title=f"T = {t:g} kimg")
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
