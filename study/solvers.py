"""Solvers and their time steps by network evaluations: how far a sample is from the end of the
network's own flow, its power by band, and the study's distance.

    python -m study.solvers --ckpt run/ema.pt
    python -m study.solvers --ckpt any/ema.pt --bnr 0 0.5 2           # a network of --bnr any

rms: the root mean square over pixels of the difference to Heun's result after 80 steps from the
same latents, on images in [-1, 1]. "heun, even" and "euler, even" have multistep's time steps.
"""
import time

import torch
from tqdm import tqdm

from data import load
from degrade import levels_of
from model import load_model
from sample import multistep_times, sampling_path, solve, time_steps
from study.common import (REFERENCES, Cells, Measure, band_power, digest, digest_of, groups, mean,
                          parser, plotted, references, seed_noise, steps_of, top_bands)
from util import number, to_uint8

NFE = [6, 8, 9, 10, 12, 18, 35]
STEPS = {"multistep": ["multistep"], "heun": ["heun", "heun, even"],
         "euler": ["euler", "euler, even"]}


def options():
    p = parser("solvers", "Solvers and time steps by network evaluations, on trained networks.")
    a = p.add_argument
    a("--ckpt", nargs="+", default=["run/ema.pt"], help="models of train.py (default run/ema.pt)")
    a("--bnr", type=number(float, 0, 10), nargs="+", help="for models of --bnr any (default 0.5)")
    a("--data", help="images to compare with (default: those that the model was trained on)")
    a("--nfe", type=number(int, 2), nargs="+", default=NFE,
      help="network evaluations; Heun takes the odd number below (default 6 8 9 10 12 18 35)")
    a("--latents", type=number(int, 2), default=256, help="for rms and power (default 256)")
    a("--samples", type=number(int, 0), default=1000,
      help="for the distance of Heun at 35 and multistep at 9, 12 and 18; 0: none (default 1000)")
    args = p.parse_args()
    if args.quick:
        args.nfe, args.latents, args.samples = [6, 9], 4, 0
    return p, args


def run(net, path, x, solver, nfe):
    """The images of the states x at the start, and the seconds that they took."""
    name, even = solver.removesuffix(", even"), solver.endswith("even") or solver == "multistep"
    n = steps_of(name, nfe)
    times = multistep_times(n, *x.shape[2:]) if even else time_steps(n)
    start = time.time()
    return torch.cat([solve(net, path, part, times, name) for part in x.split(128)]), \
        time.time() - start


def compute(args, cells):
    for filename in args.ckpt:
        net, checkpoint = load_model(filename)
        shape, data = checkpoint["data"]["shape"], args.data or checkpoint["options"]["data"]
        count = min(REFERENCES, len(load(data, shape[1]).images) // 2)
        reference = references(data, shape[1], count)
        measure = Measure(reference) if args.samples else None
        for bnr in args.bnr or [None]:
            path = sampling_path(checkpoint, bnr)
            shared = dict(checkpoint=digest(filename), bnr=getattr(path, "bnr", None),
                          trained=checkpoint["config"]["bnr"], data=checkpoint["data"]["name"],
                          kimg=checkpoint["seen"] / 1000, seed=checkpoint["options"]["seed"],
                          images=digest_of(reference), latents=args.latents)
            one_path(args, cells, net, path, shape, reference, measure, shared)


def one_path(args, cells, net, path, shape, reference, measure, shared):
    start = levels_of(path, path.t_range(*shape[1:])[1])[1].item()
    x = start * seed_noise(range(args.latents), shape)()
    end = None
    for nfe in tqdm(args.nfe, f"{shared['trained']}, BNR {shared['bnr']}"):
        for solver in [s for some in STEPS.values() for s in some]:
            evaluations = nfe - (nfe + 1) % 2 if solver.startswith("heun") else nfe
            key = dict(**shared, solver=solver, nfe=evaluations)
            if cells.find(**key):
                continue
            end = solve(net, path, x, time_steps(80)) if end is None else end

            def value():
                images, took = run(net, path, x, solver, nfe)
                power = band_power(to_uint8(images)) / band_power(reference)
                return {"rms": round((images - end).square().mean().sqrt().item(), 5),
                        "power": [round(v, 3) for v in power.tolist()], "took": round(took, 2)}
            cells.compute(key, value)
    compared = [("heun", 35), ("multistep", 9), ("multistep", 12), ("multistep", 18)]
    for solver, nfe in compared if measure else ():
        def value():
            z = start * seed_noise(range(args.samples), shape)()
            images, took = run(net, path, z, solver, nfe)
            return {**measure(to_uint8(images)), "took": round(took, 2)}
        cells.compute(dict(**shared, solver=solver, nfe=nfe, samples=args.samples), value)


def table(cells):
    """For each network and path: rms, power in the top three bands, distance."""
    for (trained, bnr, data, kimg, seed, _), some in groups(
            cells.cells, "trained", "bnr", "data", "kimg", "seed", "checkpoint").items():
        print(f"\n{data}, {kimg:g} kimg, trained with BNR {trained}, seed {seed}, sampled at {bnr}")
        distances = {(c["solver"], c["nfe"]): c for c in some if "distance" in c}
        for c in sorted((c for c in some if "rms" in c), key=lambda c: (c["solver"], c["nfe"])):
            measured = distances.get((c["solver"], c["nfe"]))
            more = f"   distance {measured['distance']:.1f}" if measured else ""
            print(f"{c['solver']:14}NFE {c['nfe']:3}   rms {c['rms']:.4f}   power {top_bands(c)}"
                  f"{more}")
        if ("heun", 35) in distances:
            heun = distances["heun", 35]
            ratios = ", ".join(f"NFE {nfe} {heun['took'] / c['took']:.1f}"
                               for (solver, nfe), c in distances.items() if solver != "heun")
            print(f"wall clock of Heun at 35 over multistep's, {heun['samples']} samples: {ratios}")


def draw_plot(cells):
    def draw(plt):
        of_rms = [c for c in cells.cells if "rms" in c]
        kinds = sorted(groups(of_rms, "data", "trained", "bnr").items(), key=str)
        figure, axes = plt.subplots(1, len(kinds), squeeze=False, layout="constrained",
                                    figsize=(4.5 * len(kinds), 4))
        for axis, ((data, trained, bnr), some) in zip(axes[0], kinds):
            for (solver,), same in groups(some, "solver").items():
                by_nfe = groups(same, "nfe")
                places = sorted(nfe for nfe, in by_nfe)
                axis.loglog(places, [mean([c["rms"] for c in by_nfe[nfe,]]) for nfe in places],
                            ".-", label=solver)
            axis.set(xlabel="NFE", ylabel="rms to the flow's end", xticks=NFE, xticklabels=NFE,
                     title=f"trained with {trained}, sampled at {bnr}\n{data}")
            axis.minorticks_off()
            axis.legend(fontsize="small")
        return figure
    plotted(cells.png, draw)


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "solvers")
        if not args.plot_only:
            compute(args, cells)
        table(cells)
        draw_plot(cells)


if __name__ == "__main__":
    main()
