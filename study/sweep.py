"""One network for every ratio, sampled at each: the paper's Table 3, Figure 5 and Table 4 in small.

    python -m study.sweep --data c10/train                    # distance against BNR (Table 3)
    python -m study.sweep --data c10/train --steps            # and against NFE (Figure 5)
    python -m study.sweep --data c10/train --path blurring    # and along that path (Table 4)
    python -m study.sweep --data c10/train --single 0 0.5 2   # beside networks of one ratio

It trains the networks with train.py, in the folder --runs, or continues those that are there.
"""
from itertools import product

from model import load_model
from study.common import Cells, Measure, deviation, drawn, parser, plotted, references, trained
from study.common import RESOLUTIONS, mean, top_bands
from util import UserError, add_device_option, number

RATIOS = [0, 0.1, 0.3, 0.5, 0.65, 1, 2, 10]


def options():
    p = parser("sweep", "The distance of samples to the data against BNR, from networks trained "
                        "with --bnr any: the paper's Table 3. With --steps its Figure 5, with "
                        "--path blurring its Table 4.")
    a = p.add_argument
    a("--data", default="leaves", help="as for train.py (default leaves)")
    a("--preset", default="tiny", choices=RESOLUTIONS, help="as for train.py (default tiny)")
    a("--duration", type=number(float, 0.01), default=240., help="kimg (default 240)")
    a("--runs", default="runs", help="folder of the networks' runs (default runs)")
    a("--ckpt", nargs="+", help="networks of --bnr any that are trained already; trains none")
    a("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2],
      help="of training, a network each (default 0 1 2)")
    a("--single", type=number(float, 0), nargs="*", default=[],
      help="networks of one ratio beside them: their ratios (default none)")
    a("--bnr", type=number(float, 0, 10), nargs="+", default=RATIOS,
      help="ratios to sample at (default the paper's eight)")
    a("--path", choices=["blurring"], help="sample along this path as well")
    a("--steps", action="store_true",
      help="Heun, multistep and Euler at BNR 0, 0.5 and 2, unless given, and NFE 9, 18 and 35")
    a("--nfe", type=number(int, 1), nargs="+", default=[35],
      help="network evaluations; Heun takes odd numbers, so one fewer where even (default 35)")
    a("--solvers", nargs="+", choices=["euler", "heun", "multistep"], default=["heun"],
      help="default heun")
    a("--samples", type=number(int, 50), default=5000, help="a cell (default 5000)")
    a("--draws", type=number(int, 1), default=1, help="draws of samples a cell (default 1)")
    add_device_option(p)
    args = p.parse_args()
    if args.steps:
        args.solvers, args.nfe = ["heun", "multistep", "euler"], [9, 18, 35]
        args.bnr = [0, 0.5, 2] if args.bnr is RATIOS else args.bnr
    if args.quick:
        args.duration, args.seeds, args.bnr, args.samples = 0.064, [0], [0, 2], 50
        args.nfe, args.runs = [2, 3], f"{args.runs}/quick"
    return p, args


def networks(args):
    """(name, seed, kimg, checkpoint, ratios to sample at) of every network, trained when needed."""
    for filename in args.ckpt or ():
        _, checkpoint = load_model(filename)
        seed, kimg = checkpoint["options"]["seed"], checkpoint["seen"] / 1000
        yield "any", seed, kimg, filename, args.bnr
    for seed in args.seeds if not args.ckpt else ():
        for bnr in ("any", *args.single):
            name = bnr if bnr == "any" else f"{bnr:g}"
            filename = trained(f"{args.runs}/{name}-{seed}", "--data", args.data, "--preset",
                               args.preset, "--duration", args.duration, "--device", args.device,
                               "--bnr", name, "--seed", seed)
            yield name, seed, args.duration, filename, args.bnr if bnr == "any" else [None]


def compute(args, cells):
    measure = None
    for network, seed, kimg, checkpoint, ratios in networks(args):
        curves = [(bnr, None) for bnr in ratios]
        curves += [(None, args.path)] if args.path and network == "any" else []
        for (bnr, path), (solver, nfe, steps) in product(curves, settings(args)):
            for draw in range(args.draws):
                key = dict(data=args.data, preset=args.preset, kimg=kimg, network=network,
                           seed=seed, bnr=bnr, path=path, solver=solver, nfe=nfe, draw=draw,
                           samples=args.samples)
                if not cells.find(**key) and measure is None:
                    measure = references_of(args, cells)
                seeds = range(draw * args.samples, (draw + 1) * args.samples)
                cell = cells.compute(key, lambda: measure(drawn(
                    checkpoint, seeds, args.device, bnr=bnr, path=path, solver=solver,
                    steps=steps)))
                print(row(cell), flush=True)


def settings(args):
    """Solver, NFE and steps. Heun evaluates twice a step, but once in the last."""
    found = []
    for nfe, solver in product(args.nfe, args.solvers):
        steps = (nfe + 1) // 2 if solver == "heun" else nfe
        found.append((solver, 2 * steps - 1 if solver == "heun" else steps, steps))
    return found


def references_of(args, cells):
    """The measure, and its floor: as many other images of the data set."""
    resolution, n = RESOLUTIONS[args.preset], args.samples
    measure = Measure(references(args.data, resolution, n), args.device)
    floor = cells.compute(dict(data=args.data, preset=args.preset, network="floor", samples=n),
                          lambda: measure(references(args.data, resolution, n, skip=n)))
    print(row(floor), flush=True)
    return measure


def row(cell):
    if cell["network"] == "floor":
        return f"{'floor':24}{cell['distance']:10.1f}   power {top_bands(cell)}"
    curve = cell["path"] or ("" if cell["bnr"] is None else f"BNR {cell['bnr']:g}")
    name = f"{cell['network']}-{cell['seed']} {curve}"
    return (f"{name:24}{cell['distance']:10.1f}   power {top_bands(cell)}   {cell['solver']} "
            f"NFE {cell['nfe']}")


def table(cells):
    """Means over the seeds of the networks for every ratio, and both spreads."""
    found = [c for c in cells.cells if c["network"] == "any"]
    curves = sorted({(c["bnr"] is None, c["bnr"] or 0, c["path"] or "") for c in found})
    for solver, nfe in sorted({(c["solver"], c["nfe"]) for c in found}):
        print(f"\n{solver}, NFE {nfe}: mean, standard deviation over seeds; over draws")
        for blurring, bnr, path in curves:
            some = cells.find(network="any", solver=solver, nfe=nfe, path=path or None,
                              bnr=None if blurring else bnr)
            if some:
                first = [c["distance"] for c in some if c["draw"] == 0]
                by_seed = [[c["distance"] for c in some if c["seed"] == s]
                           for s in {c["seed"] for c in some}]
                spread = next((deviation(d) for d in by_seed if len(d) > 1), "-")
                print(f"{path or f'BNR {bnr:g}':12}{mean(first):9.1f} +- {deviation(first)}; "
                      f"{spread}")


def draw_plot(cells):
    """Left: distance against BNR. Right: against NFE, a curve a ratio and solver, where there are
    several NFEs. Points are seeds and draws, lines their means."""
    def draw(plt):
        found = [c for c in cells.cells if c["network"] == "any" and c["bnr"] is not None]
        nfes = sorted({c["nfe"] for c in found})
        figure, axes = plt.subplots(1, 2 if len(nfes) > 1 else 1, squeeze=False,
                                    figsize=(11 if len(nfes) > 1 else 6, 4))
        by_ratio, by_nfe = axes[0, 0], axes[0, -1]
        for solver in sorted({c["solver"] for c in found}):
            some = [c for c in found if c["solver"] == solver and c["nfe"] == nfes[-1]]
            plot_means(by_ratio, some, "bnr", f"{solver}, NFE {nfes[-1]}")
            for bnr in sorted({c["bnr"] for c in found}) if len(nfes) > 1 else ():
                some = [c for c in found if c["solver"] == solver and c["bnr"] == bnr]
                plot_means(by_nfe, some, "nfe", f"{solver}, BNR {bnr:g}")
        single = [c for c in cells.cells if c["network"] not in ("any", "floor")]
        by_ratio.plot([float(c["network"]) for c in single], [c["distance"] for c in single], "x",
                      color="black", label="networks of one ratio")
        by_ratio.set(xlabel="BNR", ylabel="Frechet distance")
        by_ratio.set_xscale("symlog", linthresh=0.1)
        by_ratio.legend()
        if len(nfes) > 1:
            by_nfe.set(xlabel="NFE", ylabel="Frechet distance")
            by_nfe.legend(fontsize="small")
        return figure
    plotted(cells.png, draw)


def plot_means(axes, cells, x, label):
    places = sorted({c[x] for c in cells})
    means = [mean([c["distance"] for c in cells if c[x] == p]) for p in places]
    line, = axes.plot(places, means, label=label)
    axes.plot([c[x] for c in cells], [c["distance"] for c in cells], ".", color=line.get_color())


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "sweep")
        if not args.plot_only:
            compute(args, cells)
        if not cells.cells:
            raise UserError(f"{cells.file} has no results yet: leave out --plot-only")
        table(cells)
        draw_plot(cells)


if __name__ == "__main__":
    main()
