"""What the network predicts: residual, x0 or noise, at BNR 0.5. The paper's Table 5 in small.

    python -m study.parameterizations --data c10/train

It trains the networks with train.py, in the folder --runs, or continues those that are there.
"""
from model import PARAMETERIZATIONS
from study.common import Cells, Measure, deviation, drawn, parser, plotted, references, trained
from study.common import RESOLUTIONS, mean, top_bands
from util import UserError, add_device_option, number


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
      help="of Heun, odd numbers (default 9 35)")
    a("--samples", type=number(int, 50), default=5000, help="a cell (default 5000)")
    add_device_option(p)
    args = p.parse_args()
    if args.quick:
        args.duration, args.seeds, args.samples, args.nfe = 0.064, [0], 50, [3]
        args.runs = f"{args.runs}/quick"
    return p, args


def compute(args, cells):
    measure = None
    for seed in args.seeds:
        for param in PARAMETERIZATIONS:
            # the run of `residual` is the one that study.sweep --single 0.5 trains
            name = f"0.5-{seed}" if param == "residual" else f"{param}-{seed}"
            checkpoint = trained(f"{args.runs}/{name}", "--data", args.data, "--preset",
                                 args.preset, "--duration", args.duration, "--device", args.device,
                                 "--bnr", "0.5", "--seed", seed, "--param", param)
            for nfe in args.nfe:
                key = dict(data=args.data, preset=args.preset, kimg=args.duration, param=param,
                           seed=seed, nfe=nfe, samples=args.samples)
                if not cells.find(**key) and measure is None:
                    reference = references(args.data, RESOLUTIONS[args.preset], args.samples)
                    measure = Measure(reference, args.device)
                cell = cells.compute(key, lambda: measure(drawn(
                    checkpoint, range(args.samples), args.device, steps=(nfe + 1) // 2)))
                print(f"{param}-{seed}, NFE {nfe}: {cell['distance']:.1f}, power {top_bands(cell)}",
                      flush=True)


def table(cells):
    nfes = sorted({c["nfe"] for c in cells.cells})
    print("\nmean and standard deviation over seeds\n"
          f"{'':10}" + "".join(f"{f'NFE {n}':>18}" for n in nfes))
    for param in PARAMETERIZATIONS:
        found = [[c["distance"] for c in cells.find(param=param, nfe=n)] for n in nfes]
        print(f"{param:10}" + "".join(f"{f'{mean(d):.1f} +- {deviation(d)}':>18}" for d in found))


def draw_plot(cells):
    def draw(plt):
        figure, axes = plt.subplots(figsize=(6, 4))
        for param in PARAMETERIZATIONS:
            found = cells.find(param=param)
            nfes = sorted({c["nfe"] for c in found})
            means = [mean([c["distance"] for c in found if c["nfe"] == n]) for n in nfes]
            line, = axes.plot(nfes, means, label=param)
            axes.plot([c["nfe"] for c in found], [c["distance"] for c in found], ".",
                      color=line.get_color())
        axes.set(xlabel="NFE", ylabel="Frechet distance")
        axes.legend()
        return figure
    plotted(cells.png, draw)


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "parameterizations")
        if not args.plot_only:
            compute(args, cells)
        if not cells.cells:
            raise UserError(f"{cells.file} has no results yet: leave out --plot-only")
        table(cells)
        draw_plot(cells)


if __name__ == "__main__":
    main()
