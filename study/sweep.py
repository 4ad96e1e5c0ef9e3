"""Trained networks, sampled at every ratio: the paper's Table 3, Figure 5 and Table 4 in small.

    python train.py --data photos/ --bnr any --duration 240 --out any        # one for every ratio
    python -m study.sweep --ckpt any/ema.pt                        # distance against BNR (Table 3)
    python -m study.sweep --ckpt any/ema.pt --steps                # and against NFE (Figure 5)
    python -m study.sweep --ckpt any/ema.pt --schedule blurring    # and that schedule (Table 4)
    python -m study.sweep --ckpt any/ema.pt hot/ema.pt             # beside a network of one ratio
"""
from sample import SOLVERS, sampling_schedule
from study.common import (COLORS, REFERENCES, Cells, Measure, column, deviation, digest_of,
                          draw_samples, groups, label_lines, load_once, loaded, matching, mean,
                          parser, plot_means, precision, references, run, steps_of, top_bands)
from util.checkpoint import read_checkpoint
from util.cli import UserError, add_device_option, number

RATIOS = [0, 0.1, 0.3, 0.5, 0.65, 1, 2, 10]
TABLE = ("data", "samples", "kimg", "measure", "images")        # what only like cells share
BASE = {"data": str, "samples": float, "measure": (str, None), "images": (str, None),
        "distance": float, "power": [float]}
FIELDS = [{**BASE, "network": "floor"},
          {**BASE, "network": str, "kimg": float, "seed": int, "bnr": (float, None),
           "schedule": (str, None), "solver": str, "nfe": int}]


def options():
    p = parser("sweep", "The distance of samples to the data against BNR: the paper's Table 3. "
                        "With --steps its Figure 5, with --schedule blurring its Table 4.")
    a = p.add_argument
    a("--ckpt", nargs="+", default=["run/ema.pt"],
      help="the models: those of --bnr any at every ratio, others at their own (default "
           "run/ema.pt)")
    a("--data", help="images to compare with (default: those that the first was trained on)")
    a("--bnr", type=number(float, 0, 10), nargs="+",
      help="ratios to sample at (default the paper's eight; 0, 0.5 and 2 with --steps)")
    a("--schedule", choices=["blurring"], help="sample on this schedule as well")
    a("--steps", action="store_true", help="each solver with 9, 18 and 35 evaluations")
    a("--nfe", type=number(int, 1), nargs="+", default=[35],
      help="network evaluations; Heun takes odd numbers, so one fewer where even (default 35)")
    a("--solvers", nargs="+", choices=list(SOLVERS), default=["heun"], help="default heun")
    a("--samples", type=number(int, 50), default=5000, help="a cell (default 5000)")
    a("--fid", action="store_true", help="FID to the same images, instead of the study's distance; "
      "its weights are kept in data/")
    add_device_option(p)
    args = p.parse_args()
    if args.steps:
        args.solvers = ["heun", "multistep", "euler"]
        args.nfe = [9, 18, 35]
    if args.bnr is None:
        args.bnr = [0, 0.5, 2] if args.steps else RATIOS
    if args.quick:
        args.samples = 50
        args.nfe = [3]
        args.bnr = args.bnr[:2]
    return p, args


def compute(args, cells: Cells) -> list:
    checkpoints = {filename: read_checkpoint(filename) for filename in args.ckpt}
    first = checkpoints[args.ckpt[0]]
    data = args.data or first["options"]["data"]
    shape = first["data"]["shape"]
    for filename, checkpoint in checkpoints.items():
        if checkpoint["data"]["shape"] != shape:
            raise UserError(f"{filename} makes images of {checkpoint['data']['shape']}, and "
                            f"{args.ckpt[0]} of {shape}: compare them apart")
    count = args.samples if args.quick else REFERENCES
    reference = references(data, shape[1], count)
    measure = Measure(reference, args.device, args.fid)
    shared = {"images": reference, "samples": args.samples, "measure": "FID" if args.fid else None,
              "data": load_once(data, shape[1]).name}

    def floor():
        return measure(references(data, shape[1], args.samples, skip=count))
    whole = digest_of(load_once(data, shape[1]).images)
    print(row(cells.compute(floor, network="floor", whole=whole, **shared)), flush=True)

    for filename, checkpoint in checkpoints.items():
        for bnr, schedule in schedules_of(args, checkpoint):
            for solver in args.solvers:
                for nfe in args.nfe:
                    sample_cell(args, cells, filename, bnr, schedule, solver, nfe, measure, shared)
    return cells.cells


def schedules_of(args, checkpoint: dict) -> list:
    """(bnr, name of a schedule) that a model is sampled at; (None, None) is its own."""
    if checkpoint["config"]["bnr"] != "any":
        return [(None, None)]
    chosen = [(bnr, None) for bnr in args.bnr]
    if args.schedule:
        chosen.append((None, args.schedule))
    return chosen


def sample_cell(args, cells: Cells, filename: str, bnr, name, solver: str, nfe: int,
                measure: Measure, shared: dict) -> None:
    checkpoint = read_checkpoint(filename)
    steps = steps_of(solver, nfe)
    network = checkpoint["config"]["schedule"] or str(checkpoint["config"]["bnr"])

    def value():
        net, checkpoint = loaded(filename, args.device)
        schedule = sampling_schedule(checkpoint, bnr, name)
        return measure(draw_samples(net, checkpoint, schedule, range(args.samples), args.device,
                                    solver=solver, steps=steps))
    cell = cells.compute(value, checkpoint=filename, network=network,
                         seed=checkpoint["options"]["seed"], bnr=bnr, schedule=name, solver=solver,
                         nfe=2 * steps - 1 if solver == "heun" else steps,
                         precision=precision(args.device), **shared)
    print(row(cell), flush=True)


# The table


def row(cell: dict) -> str:
    if cell["network"] == "floor":
        return line("floor: other images", [cell], "")
    return line(f"{cell['network']}-{cell['seed']} {place(cell)}", [cell],
                f"{cell['solver']} NFE {cell['nfe']}")


def line(name: str, cells: list, note: str) -> str:
    distance = mean(column(cells, "distance"))
    return f"{name:24}{distance:10.1f}   power {top_bands(*cells)}   {note}".rstrip()


def place(cell: dict) -> str:
    if cell["schedule"]:
        return cell["schedule"]
    if cell["bnr"] is None:
        return ""
    return f"BNR {cell['bnr']:g}"


def tables_of(cells: list):
    """(title, floor, cells of networks) of each table: of the same images, kimg and so on."""
    networks = [c for c in cells if c["network"] != "floor"]
    floors = groups(matching(cells, network="floor"), "data", "samples", "measure", "images")
    for values, same in groups(networks, *TABLE).items():
        data, samples, kimg, measure, images = values
        title = f"{data}, {kimg:g} kimg, {samples} samples"
        if measure:
            title += f", {measure}"
        yield title, floors.get((data, samples, measure, images), []), same


def table(cells: list) -> None:
    """For each solver and NFE the means over the networks for every ratio, and their deviation;
    then the networks of one ratio."""
    for title, floors, same in tables_of(cells):
        print(f"\n{title}: mean distance, power in the top three bands, standard deviation over "
              "networks")
        for floor in floors:
            print(row(floor))
        by_way = groups(matching(same, network="any"), "solver", "nfe")
        for (solver, nfe), sampled in sorted(by_way.items()):
            print(f"{solver}, NFE {nfe}")
            by_place = groups(sampled, "schedule", "bnr")
            for _, at_place in sorted(by_place.items(), key=ascending):
                spread = deviation(column(at_place, "distance"))
                print(line(place(at_place[0]), at_place, f"+- {spread}"))
        for cell in same:
            if cell["network"] != "any":
                print(row(cell))


def ascending(item):
    (schedule, bnr), _ = item
    return schedule or "", bnr or 0


# The figures


def main_table(cells: list, enough):
    """Of the tables in which enough(cells of networks) is true, the one with the most cells."""
    tables = [of_title for of_title in tables_of(cells) if enough(of_title[2])]
    return max(tables, key=lambda of_title: len(of_title[2]), default=None)


def at_ratios(cells: list) -> list:
    """Those of networks for every ratio at a ratio, by Heun where there are some, with the most
    evaluations."""
    cells = of_any(cells)
    cells = matching(cells, solver="heun") or cells
    most = max(column(cells, "nfe"), default=0)
    return matching(cells, nfe=most)


def of_any(cells: list) -> list:
    return [c for c in matching(cells, network="any") if c["bnr"] is not None]


def draw_ratios(plt, cells: list):
    """Distance against BNR: a line of means, a point a network, and networks of one ratio."""
    chosen = main_table(cells, enough=lambda same: len(groups(at_ratios(same), "bnr")) > 1)
    if chosen is None:
        return None
    title, floors, same = chosen
    one_network = at_ratios(same)
    solver = one_network[0]["solver"]
    nfe = one_network[0]["nfe"]
    figure, axes = plt.subplots(figsize=(8, 4.8))
    axes.set_xscale("symlog", linthresh=0.1)
    last = plot_means(axes, one_network, "bnr", "distance", "C0")
    ends = [(last, "one network\nfor all ratios", "C0")]
    of_way = matching(same, solver=solver, nfe=nfe)
    single = [c for c in of_way if fixed_ratio(c) is not None]
    if single:
        distances = column(single, "distance")
        axes.plot(list(map(fixed_ratio, single)), distances, "x", color="C1", mew=2.5)
        ends.append((mean(distances), "a network\nfor each", "C1"))
    for floor in floors[:1]:
        axes.axhline(floor["distance"], color="gray", ls=":")
        ends.append((floor["distance"], "other images", "gray"))
    ticks = []
    for bnr in sorted(set(column(one_network, "bnr"))):
        if not ticks or bnr > 1.5 * ticks[-1]:                  # or their numbers would overlap
            ticks.append(bnr)
    axes.set_xticks(ticks, [f"{bnr:g}" for bnr in ticks])
    axes.set_xlim(-0.01, ticks[-1] * 1.15)
    axes.set_ylim(0)
    axes.minorticks_off()
    axes.set(xlabel="BNR", ylabel="Frechet distance", title=f"{title}, {solver} {nfe}")
    label_lines(axes, ends)
    return figure


def fixed_ratio(cell: dict):
    """The ratio of a network of one ratio; None for other networks."""
    try:
        return float(cell["network"])
    except ValueError:
        return None


def draw_evaluations(plt, cells: list):
    """Distance against NFE at one ratio: a line a solver."""
    chosen = main_table(cells, enough=lambda same: len(groups(of_any(same), "nfe")) > 2)
    if chosen is None:
        return None
    title, floors, same = chosen
    by_ratio = groups(of_any(same), "bnr")
    (bnr,), at_ratio = max(by_ratio.items(), key=lambda item: (item[0] == (0.5,), len(item[1])))
    figure, axes = plt.subplots(figsize=(8, 4.8))
    ends = []
    for (solver,), of_solver in groups(at_ratio, "solver").items():
        last = plot_means(axes, of_solver, "nfe", "distance", COLORS.get(solver))
        ends.append((last, solver, COLORS.get(solver)))
    for floor in floors[:1]:
        axes.axhline(floor["distance"], color="gray", ls=":")
        ends.append((floor["distance"], "other images", "gray"))
    axes.set_xticks(sorted(set(column(at_ratio, "nfe")) - {17}))            # too near to 18
    axes.set_ylim(0)
    axes.set(xlabel="NFE, network evaluations per image", ylabel="Frechet distance",
             title=f"{title}, BNR {bnr:g}")
    label_lines(axes, ends)
    return figure


def main():
    p, args = options()
    run(p, args, "sweep", FIELDS, compute, table, {"": draw_ratios, "-nfe": draw_evaluations})


if __name__ == "__main__":
    main()
