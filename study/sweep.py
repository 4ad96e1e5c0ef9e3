"""One network for every ratio, sampled at each: the paper's Table 3, Figure 5 and Table 4 in small.

    python -m study.sweep --data c10/train                    # distance against BNR (Table 3)
    python -m study.sweep --data c10/train --steps            # and against NFE (Figure 5)
    python -m study.sweep --data c10/train --path blurring    # and along that path (Table 4)
    python -m study.sweep --data c10/train --single 0 0.5 2   # beside networks of one ratio

It trains the networks with train.py, in the folder --runs, or continues those that are there.
"""
from functools import cache, partial
from itertools import product

import numpy as np

from model import load_model
from study.common import (QUICK, REFERENCES, RESOLUTIONS, Cells, Measure, deviation, digest,
                          digest_of, drawn, groups, mean, parser, plotted, precision, references,
                          steps_of, trained)
from util import UserError, add_device_option, number

RATIOS = [0, 0.1, 0.3, 0.5, 0.65, 1, 2, 10]


def options():
    p = parser("sweep", "The distance of samples to the data against BNR, from networks trained "
                        "with --bnr any: the paper's Table 3. With --steps its Figure 5, with "
                        "--path blurring its Table 4.")
    a = p.add_argument
    a("--data", help="as for train.py (default leaves, or what --ckpt was trained on)")
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
    a("--fid", action="store_true", help="FID to the same images, instead of the study's distance; "
      "its weights are kept in data/")
    a("--draws", type=number(int, 1), default=1, help="draws of samples a cell (default 1)")
    add_device_option(p)
    args = p.parse_args()
    if args.steps:
        args.solvers, args.nfe = ["heun", "multistep", "euler"], [9, 18, 35]
        args.bnr = [0, 0.5, 2] if args.bnr is RATIOS else args.bnr
    if args.quick:
        args.duration, args.seeds, args.bnr, args.samples = 0.032, [0], [0, 2], 50
        args.nfe, args.runs = [2, 3] if args.steps else [3], f"{args.runs}/quick"
    return p, args


def networks(args):
    """(name, kimg, seed, function, ratios to sample at) of every network. The function returns its
    checkpoint, and trains it when needed."""
    for filename in args.ckpt or ():
        _, checkpoint = load_model(filename)
        yield ("any", checkpoint["seen"] / 1000, checkpoint["options"]["seed"], lambda: filename,
               args.bnr)
    for seed in args.seeds if not args.ckpt else ():
        for bnr in ("any", *args.single):
            name = bnr if bnr == "any" else f"{bnr:g}"
            train = partial(trained, f"{args.runs}/{name}-{seed}", "--data", args.data, "--preset",
                            args.preset, "--duration", args.duration, "--device", args.device,
                            "--bnr", name, "--seed", seed, *(QUICK if args.quick else ()))
            yield name, args.duration, seed, train, args.bnr if bnr == "any" else [None]


def check_models(args):
    """Before anything is computed: the models of --ckpt, and the data that they say. UserError."""
    resolution = RESOLUTIONS[args.preset]
    for filename in args.ckpt or ():
        _, checkpoint = load_model(filename)
        if checkpoint["config"]["bnr"] != "any":
            raise UserError(f"{filename} is a model of one path: --ckpt takes those of --bnr any")
        if checkpoint["data"]["shape"][1:] != [resolution] * 2:
            raise UserError(f"{filename} makes images of {checkpoint['data']['shape']}, and preset "
                            f"{args.preset} has {resolution} x {resolution}: give --preset")
        args.data = args.data or checkpoint["options"]["data"]
    args.data = args.data or "leaves"


def compute(args, cells):
    check_models(args)
    n = args.samples if args.quick else REFERENCES
    reference = references(args.data, RESOLUTIONS[args.preset], n)
    shared = dict(data=args.data, preset=args.preset, samples=args.samples,
                  measure=name_of_measure(args), images=digest_of(reference))
    measure = cache(lambda: measure_of(args, cells, reference, shared))
    for network, kimg, seed, checkpoint, ratios in networks(args):
        curves = [(bnr, None) for bnr in ratios]
        curves += [(None, args.path)] if args.path and network == "any" else []
        for (bnr, path), (solver, nfe, steps) in product(curves, settings(args)):
            for draw in range(args.draws):
                key = dict(**shared, kimg=kimg, network=network, seed=seed, bnr=bnr, path=path,
                           solver=solver, nfe=nfe, draw=draw,
                           **({"checkpoint": digest(checkpoint())} if args.ckpt else {}))
                if not cells.find(**key):
                    measure(), checkpoint()     # here, so that the cell's seconds are its own

                def value():
                    seeds = range(draw * args.samples, (draw + 1) * args.samples)
                    images = drawn(checkpoint(), seeds, args.device, bnr=bnr, path=path,
                                   solver=solver, steps=steps)
                    return {**measure()(images), "checkpoint": digest(checkpoint()),
                            "precision": precision(args.device)}
                print(row(cells.compute(key, value)), flush=True)


def settings(args):
    """Solver, NFE and steps."""
    found = []
    for nfe, solver in product(args.nfe, args.solvers):
        steps = steps_of(solver, nfe)
        found.append((solver, 2 * steps - 1 if solver == "heun" else steps, steps))
    return found


def measure_of(args, cells, reference, shared):
    """The measure, and its floor: as many other images of the data set."""
    measure = Measure(reference, args.device, args.fid)
    others = partial(references, args.data, RESOLUTIONS[args.preset], args.samples, len(reference))
    floor = cells.compute({**shared, "network": "floor"}, lambda: measure(others()))
    print(row(floor), flush=True)
    return measure


def name_of_measure(args):
    """None: the study's own, as in results that have no such field."""
    return "FID" if args.fid else None


def row(cell):
    if cell["network"] == "floor":
        return line("floor: other images", [cell], "")
    network = f"{cell['network']}-{cell['seed']}"
    return line(f"{network} {curve(cell)}", [cell], f"{cell['solver']} NFE {cell['nfe']}")


def line(name, cells, note):
    power = " ".join(f"{v:.2f}" for v in np.mean([c["power"][-3:] for c in cells], 0))
    distance = mean([c["distance"] for c in cells])
    return f"{name:24}{distance:10.1f}   power {power}   {note}".rstrip()


def curve(cell):
    return cell["path"] or ("" if cell["bnr"] is None else f"BNR {cell['bnr']:g}")


def comparable(cells):
    """Title, floor and the other cells of each table: of the same images, preset, and so on."""
    of_networks = [c for c in cells.cells if c["network"] != "floor"]
    for values, some in groups(of_networks, "data", "preset", "samples", "kimg", "measure",
                               "images").items():
        data, preset, samples, kimg, measure, images = values
        title = f"{data}, {preset}, {kimg:g} kimg, {samples} samples"
        title += f", {measure}" if measure else ""
        yield title, cells.find(network="floor", data=data, preset=preset, samples=samples,
                                measure=measure, images=images), some


def table(cells):
    """For each solver and NFE the means over the seeds of the networks for every ratio, with both
    spreads; then the networks of one ratio."""
    for title, floor, some in comparable(cells):
        print(f"\n{title}: mean distance, power in the top three bands, standard deviation over "
              "seeds / over draws")
        print(*map(row, floor), sep="\n")
        by_setting = groups([c for c in some if c["network"] == "any"], "solver", "nfe")
        for (solver, nfe), same in sorted(by_setting.items()):
            print(f"{solver}, NFE {nfe}")
            curves = groups(same, "path", "bnr")
            for (path, bnr), drawn_ones in sorted(
                    curves.items(), key=lambda item: (item[0][0] or "", item[0][1] or 0)):
                by_seed = groups(drawn_ones, "seed", "checkpoint").values()
                first = [c for c in drawn_ones if c["draw"] == 0]
                over_seeds = deviation([c["distance"] for c in first])
                print(line(curve(first[0]), first, f"+- {over_seeds} / {over_draws(by_seed)}"))
        for cell in some:
            if cell["network"] != "any":
                print(row(cell))


def over_draws(by_seed):
    """The standard deviation over draws, in words: the root of its mean square over the seeds."""
    some = [np.var([c["distance"] for c in cells], ddof=1) for cells in by_seed if len(cells) > 1]
    return f"{np.sqrt(np.mean(some)):.1f}" if some else "-"


def draw_plot(cells):
    """A row for each table. Left: distance against BNR, at the largest NFE of each solver. Right:
    against NFE, a line a ratio and solver. Thin: a line a seed and draw; thick: their means."""
    tables = list(comparable(cells))

    def draw(plt):
        figure, axes = plt.subplots(len(tables), 2, squeeze=False, layout="constrained",
                                    figsize=(12, 4.5 * len(tables)))
        for (by_ratio, by_nfe), (title, floor, some) in zip(axes, tables):
            for (solver,), same in groups(some, "solver").items():
                of_ratios = [c for c in same if c["network"] == "any" and c["bnr"] is not None]
                top = max(c["nfe"] for c in same)
                plot_at_ratios(by_ratio, [c for c in same if c["nfe"] == top], f"{solver} {top}")
                for (bnr,), of_one in sorted(groups(of_ratios, "bnr").items()):
                    if len({c["nfe"] for c in of_one}) > 1:
                        plot_means(by_nfe, of_one, "nfe", f"{solver}, BNR {bnr:g}")
            for cell in floor:
                by_ratio.axhline(cell["distance"], color="grey", ls=":", label="floor")
            by_ratio.set(xlabel="BNR", ylabel="Frechet distance", title=title)
            by_ratio.set_xscale("symlog", linthresh=0.1)
            by_ratio.set_xlim(-0.02, 15)
            by_nfe.set_visible(bool(by_nfe.lines))
            by_nfe.set(xlabel="NFE", ylabel="Frechet distance",
                       xticks=sorted({c["nfe"] for c in some}))
            for a in (by_ratio, by_nfe):
                if a.lines:
                    a.legend(fontsize="small")
        return figure
    if tables:                                                  # more than a floor
        plotted(cells.png, draw)


def plot_at_ratios(axes, cells, label):
    of_ratios = [c for c in cells if c["network"] == "any" and c["bnr"] is not None]
    color = plot_means(axes, of_ratios, "bnr", label)
    single = [c for c in cells if c["network"] != "any"]
    if single:
        axes.plot([float(c["network"]) for c in single], [c["distance"] for c in single], "x",
                  color=color, label=f"{label}, networks of one ratio")
    for (path,), of_path in groups([c for c in cells if c["path"]], "path").items():
        axes.axhline(mean([c["distance"] for c in of_path]), color=color, ls="--",
                     label=f"{label}, {path} path")


def plot_means(axes, cells, x, label):
    """A line of the means and a thin one of each seed and draw, in the colour that is returned."""
    places = sorted({c[x] for c in cells})
    means = [mean([c["distance"] for c in cells if c[x] == place]) for place in places]
    drawn_line, = axes.plot(places, means, label=label, lw=2)
    color = drawn_line.get_color()
    for of_one in groups(cells, "seed", "checkpoint", "draw").values():
        points = sorted((c[x], c["distance"]) for c in of_one)
        axes.plot(*zip(*points), ".-", color=color, lw=0.5)
    return color


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "sweep")
        if not args.plot_only:
            compute(args, cells)
        table(cells)
        draw_plot(cells)


if __name__ == "__main__":
    main()
