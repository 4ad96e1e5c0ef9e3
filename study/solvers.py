"""Solvers and their time steps by network evaluations: how far a sample is from the converged ODE
solution of the same network, its power by band, and the study's distance.

    python -m study.solvers --ckpt run/ema.pt
    python -m study.solvers --ckpt any/ema.pt --bnr 0 0.5 2           # a network of --bnr any

rms: the root mean square over pixels of the difference to Heun's result after 80 steps from the
same noise, on images in [-1, 1]. "heun, even" and "euler, even" have multistep's time steps.
"""
import time

import torch
from tqdm import tqdm

from sample import SOLVERS, multistep_times, sampling_schedule, seeded_randn, time_steps
from study.common import (COLORS, REFERENCES, Cells, Measure, band_power, groups,
                          label_lines, load_once, parser, plot_means, references, rounded,
                          run, steps_of, top_bands)
from util.checkpoint import load_model
from util.cli import number
from util.images import to_uint8

NFE = [6, 8, 9, 10, 12, 18, 35]
WAYS = ["multistep", "heun", "heun, even", "euler", "euler, even"]
MEASURED = [("heun", 35), ("multistep", 9), ("multistep", 12), ("multistep", 18)]       # distance
TICKS = [6, 9, 18, 35]                          # of the figure
CONVERGED = 80                                  # steps of Heun
BASE = {"trained": (float, str), "bnr": (float, None), "schedule": (str, None), "data": str,
        "kimg": float, "seed": int, "checkpoint": str, "solver": str, "nfe": int,
        "power": [float], "took": float}
FIELDS = [{**BASE, "rms": float, "distance": None},
          {**BASE, "rms": None, "distance": float, "samples": float}]


def options():
    p = parser("solvers", "Solvers and time steps by network evaluations, on trained networks.")
    a = p.add_argument
    a("--ckpt", nargs="+", default=["run/ema.pt"], help="models of train.py (default run/ema.pt)")
    a("--bnr", type=number(float, 0, 10), nargs="+", help="for models of --bnr any (default 0.5)")
    a("--data", help="images to compare with (default: those that the model was trained on)")
    a("--nfe", type=number(int, 2), nargs="+", default=NFE,
      help="network evaluations; Heun takes the odd number below (default 6 8 9 10 12 18 35)")
    a("--draws", type=number(int, 2), default=256, help="images for rms and power (default 256)")
    a("--samples", type=number(int, 0), default=1000,
      help="for the distance of Heun at 35 and multistep at 9, 12 and 18; 0: none (default 1000)")
    args = p.parse_args()
    if args.quick:
        args.nfe = [6, 9]
        args.draws = 4
        args.samples = 0
    return p, args


def solved(net, schedule, x: torch.Tensor, way: str, nfe: int):
    """The images that x leads to, and the seconds that they took."""
    solver = way.removesuffix(", even")
    steps = steps_of(solver, nfe)
    times = time_steps(steps)
    if way.endswith("even") or solver == "multistep":
        times = multistep_times(steps, *x.shape[2:], schedule)
    start = time.time()
    images = torch.cat([SOLVERS[solver](net, schedule, part, times) for part in x.split(128)])
    return images, round(time.time() - start, 2)


def compute(args, cells: Cells) -> list:
    for filename in args.ckpt:
        net, checkpoint = load_model(filename)
        shape = checkpoint["data"]["shape"]
        data = args.data or checkpoint["options"]["data"]
        count = min(REFERENCES, len(load_once(data, shape[1]).images) // 2)
        reference = references(data, shape[1], count)
        key = {"images": reference, "checkpoint": filename, "data": checkpoint["data"]["name"],
               "trained": checkpoint["config"]["bnr"], "seed": checkpoint["options"]["seed"]}
        for bnr in args.bnr or [None]:
            schedule = sampling_schedule(checkpoint, bnr)
            key["bnr"] = getattr(schedule, "bnr", None)
            key["schedule"] = checkpoint["config"]["schedule"]
            distances_to_solution(args, cells, net, schedule, shape, reference, key)
            if args.samples:
                distances_to_data(args, cells, net, schedule, shape, Measure(reference), key)
    return cells.cells


def first_states(schedule, shape, n: int) -> torch.Tensor:
    """The states [n, C, H, W] at the highest level, of the seeds 0 to n - 1."""
    _, t_max = schedule.sigma_range(*shape[1:])
    _, sigma = schedule.levels(t_max)
    return sigma * seeded_randn(range(n), shape)()


def distances_to_solution(args, cells: Cells, net, schedule, shape, reference, key: dict) -> None:
    x = first_states(schedule, shape, args.draws)
    solution = None
    for nfe in tqdm(args.nfe, f"{key['trained']}, BNR {key['bnr']}"):
        for way in WAYS:
            def value():
                nonlocal solution
                if solution is None:
                    solution = SOLVERS["heun"](net, schedule, x, time_steps(CONVERGED))
                images, took = solved(net, schedule, x, way, nfe)
                rms = (images - solution).square().mean().sqrt().item()
                power = band_power(to_uint8(images)) / band_power(reference)
                return {"rms": round(rms, 5), "power": rounded(power, 3), "took": took}
            evaluations = nfe
            if way.startswith("heun"):
                evaluations = 2 * steps_of("heun", nfe) - 1
            cells.compute(value, kind="rms", solver=way, nfe=evaluations, draws=args.draws, **key)


def distances_to_data(args, cells: Cells, net, schedule, shape, measure, key: dict) -> None:
    for way, nfe in MEASURED:
        def value():
            x = first_states(schedule, shape, args.samples)
            images, took = solved(net, schedule, x, way, nfe)
            return {**measure(to_uint8(images)), "took": took}
        cells.compute(value, kind="distance", solver=way, nfe=nfe, samples=args.samples, **key)


def table(cells: list) -> None:
    """For each network and ratio: rms, power in the top three bands, distance."""
    names = ("trained", "bnr", "schedule", "data", "kimg", "seed", "checkpoint", "images")
    for (trained, bnr, schedule, data, kimg, seed, *_), same in groups(cells, *names).items():
        print(f"\n{data}, {kimg:g} kimg, trained with BNR {trained}, seed {seed}, sampled at "
              f"{schedule or bnr}")
        by_way = sorted(groups(same, "solver", "nfe").items())
        measured = {}
        for (solver, nfe), at_way in by_way:
            line = f"{solver:14}NFE {nfe:3}"
            for cell in at_way:
                if cell.get("rms") is not None:
                    line += f"   rms {cell['rms']:.4f}   power {top_bands(cell)}"
            for cell in at_way:
                if cell.get("distance") is not None:
                    line += f"   distance {cell['distance']:.1f}"
                    measured[solver, nfe] = cell
            print(line)
        heun = measured.pop(("heun", 35), None)
        if heun:
            ratios = [f"NFE {nfe} {heun['took'] / max(cell['took'], 0.01):.1f}"
                      for (_, nfe), cell in measured.items()]
            print(f"wall clock of Heun at 35 over multistep's, {heun['samples']} samples: "
                  f"{', '.join(ratios)}")


def draw_rms(plt, cells: list):
    """rms by NFE, a line a solver with its own time steps, a panel for each of at most three
    ratios."""
    plain = [c for c in cells if c.get("rms") is not None and c["solver"] in COLORS]
    panels = sorted(groups(plain, "trained", "bnr", "data").items(), key=str)[:3]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), squeeze=False, sharey=True, layout="constrained",
                                figsize=(2 + 4 * len(panels), 4.6))
    for axis, ((trained, bnr, _), same) in zip(axes[0], panels):
        ends = []
        for (solver,), of_solver in groups(same, "solver").items():
            last = plot_means(axis, of_solver, "nfe", "rms", COLORS[solver])
            ends.append((last, solver, COLORS[solver]))
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(TICKS, TICKS)
        axis.minorticks_off()
        title = f"BNR {bnr}"
        if trained != bnr:
            title = f"network of {trained}, {title}"
        axis.set(xlabel="NFE", title=title)
    axes[0, 0].set_ylabel("rms to the converged solution")
    label_lines(axes[0, -1], ends)
    return figure


def main():
    p, args = options()
    run(p, args, "solvers", FIELDS, compute, table, {"": draw_rms})


if __name__ == "__main__":
    main()
