"""What the network predicts: residual, x0 or noise, at BNR 0.5. The paper's Table 5 in small.

    python -m study.parameterizations --data c10/train

It trains the networks with train.py, in the folder --runs, or continues those that are there.
"""
from functools import cache, partial

from model import PARAMETERIZATIONS
from study.common import (QUICK, REFERENCES, RESOLUTIONS, Cells, Measure, deviation, drawn,
                          groups, mean, parser, plotted, references, top_bands, trained)
from util import add_device_option, number


def options():
    p = parser("parameterizations", "The distance of samples to the data for three "
                                    "parameterizations at BNR 0.5: the paper's Table 5.")
    a = p.add_argument
    a("--data", default="leaves", help="as for train.py (default leaves)")
    a("--preset", default="tiny", choices=RESOLUTIONS, help="as for train.py (default tiny)")
    a("--duration", type=number(float, 0.01), default=240., help="kimg (default 240)")
    a("--runs", default="runs", help="folder of the networks' runs (default runs)")
    a("--seeds", type=number(int, 0), nargs="+", default=[0, 1], help="default 0 1")
    a("--nfe", type=number(int, 1), nargs="+", default=[9, 35],
      help="network evaluations of Heun; it takes odd numbers, so one fewer where even (default "
           "9 35)")
    a("--samples", type=number(int, 50), default=5000, help="a cell (default 5000)")
    add_device_option(p)
    args = p.parse_args()
    args.nfe = [n - 1 + n % 2 for n in args.nfe]
    if args.quick:
        args.duration, args.seeds, args.samples, args.nfe = 0.032, [0], 50, [3]
        args.runs = f"{args.runs}/quick"
    return p, args


def compute(args, cells):
    resolution = RESOLUTIONS[args.preset]
    count = args.samples if args.quick else REFERENCES
    measure = cache(lambda: Measure(references(args.data, resolution, count), args.device))
    for seed in args.seeds:
        for param in PARAMETERIZATIONS:
            # the run of `residual` is the one that study.sweep --single 0.5 trains
            name = f"0.5-{seed}" if param == "residual" else f"{param}-{seed}"
            checkpoint = partial(trained, f"{args.runs}/{name}", "--data", args.data, "--preset",
                                 args.preset, "--duration", args.duration, "--device", args.device,
                                 "--bnr", "0.5", "--seed", seed, "--param", param,
                                 *(QUICK if args.quick else ()))
            for nfe in args.nfe:
                key = dict(data=args.data, preset=args.preset, kimg=args.duration, param=param,
                           seed=seed, nfe=nfe, samples=args.samples)
                if not cells.find(**key):
                    measure(), checkpoint()     # here, so that the cell's seconds are its own
                cell = cells.compute(key, lambda: measure()(drawn(
                    checkpoint(), range(args.samples), args.device, steps=(nfe + 1) // 2)))
                print(f"{param}-{seed}, NFE {nfe}: {cell['distance']:.1f}, power {top_bands(cell)}",
                      flush=True)


def comparable(cells):
    """Title and cells of each table: of one data set, preset, and so on."""
    for values, some in groups(cells.cells, "data", "preset", "samples", "kimg").items():
        data, preset, samples, kimg = values
        yield f"{data}, {preset}, {kimg:g} kimg, {samples} samples", some


def table(cells):
    for title, some in comparable(cells):
        by_cell = groups(some, "param", "nfe")
        nfes = sorted({nfe for _, nfe in by_cell})
        print(f"\n{title}: mean distance and standard deviation over seeds\n"
              f"{'':10}" + "".join(f"{f'NFE {n}':>18}" for n in nfes))
        for param in PARAMETERIZATIONS:
            found = [[c["distance"] for c in by_cell.get((param, n), [])] for n in nfes]
            print(f"{param:10}" + "".join(
                f"{f'{mean(d):.1f} +- {deviation(d)}' if d else '-':>18}" for d in found))


def draw_plot(cells):
    """A panel for each table: points are seeds, lines their means."""
    def draw(plt):
        tables = list(comparable(cells))
        figure, axes = plt.subplots(1, len(tables), squeeze=False, figsize=(6 * len(tables), 4))
        for a, (title, some) in zip(axes[0], tables):
            for (param,), same in groups(some, "param").items():
                nfes = sorted({c["nfe"] for c in same})
                means = [mean([c["distance"] for c in same if c["nfe"] == n]) for n in nfes]
                line, = a.plot(nfes, means, label=param)
                a.plot([c["nfe"] for c in same], [c["distance"] for c in same], ".",
                       color=line.get_color())
            a.set(xlabel="NFE", ylabel="Frechet distance", title=title)
            a.legend()
        return figure
    plotted(cells.png, draw)


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "parameterizations")
        if not args.plot_only:
            compute(args, cells)
        table(cells)
        draw_plot(cells)


if __name__ == "__main__":
    main()
