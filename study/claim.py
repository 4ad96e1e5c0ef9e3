"""The paper's claim, with power: is BNR 0.5 better than hot, by how much, and when?

    python -m study.claim --data c10/train                    # all that is missing
    python -m study.claim --data c10/train --seeds 0          # those of one seed
    python -m study.claim --plot-only                         # the tables, from what results/ has

The plan, written before any network was trained, is docs/claim.md. What is there already, a
network in --runs or a cell in results/, is not made again.
"""
import math
import os
from itertools import product

import numpy as np
import torch

import train
from data import Images
from degrade import ConstantBNR, dct2, idct2
from loss import disentangled_loss
from study.common import (Cells, Measure, band_power, bands, digest, drawn, load_once, loaded,
                          matching, mean, parser, plotted, steps_of)
from util import normalize, number, seed_for, to_uint8

HELD_OUT = 10                                   # one image in so many is not trained on
RATIOS = (0, 0.5, 0.3, 1)                       # the last two with the first three seeds only
KIMGS = (60, 120, 180, 240)
SOLVERS = (("multistep", 18), ("heun", 35))     # and their network evaluations
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571)    # Student's t, 97.5 %, for 1 to 5 degrees of freedom


def options():
    p = parser("claim", "BNR 0.5 against BNR 0, network by network: the plan is docs/claim.md.")
    a = p.add_argument
    a("--data", help="the images, as for train.py")
    a("--runs", default="runs", help="folder of the networks' runs (default runs)")
    a("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2, 3, 4, 5],
      help="default 0 to 5; BNR 0.3 and 1 take the first three")
    a("--solvers", nargs="+", choices=dict(SOLVERS), default=list(dict(SOLVERS)),
      help="default both")
    a("--bnr", type=float, choices=RATIOS, nargs="+", default=list(RATIOS), help="default all four")
    a("--kimg", type=int, choices=KIMGS, nargs="+", default=list(KIMGS), help="default all four")
    a("--networks", action="store_true", help="only train the networks")
    a("--compile", action="store_true", help="torch.compile sampler and measure: on a CPU 1.4 "
                                             "times as fast, after four minutes")
    args = p.parse_args()
    args.samples = 5000
    if args.quick:
        args.runs, args.seeds, args.samples = f"{args.runs}/quick", [0, 1], 50
        args.kimg = [1, 2]
    if not args.data and not args.plot_only:
        p.error("--data is needed: the images to train on")
    return p, args


def split(data, resolution=16):
    """The data set without its held-out images, and those: two Images. The held-out ones are the
    first tenth of one shuffle."""
    whole = load_once(data, resolution)
    g = torch.Generator().manual_seed(seed_for("held out", 0))
    order = torch.randperm(len(whole.images), generator=g)
    n = len(order) // HELD_OUT
    return [Images(whole.images[part], whole.labels[part], whole.classes, f"{whole.name}, {name}")
            for name, part in (("training part", order[n:].sort().values),
                               ("held out", order[:n].sort().values))]


def train_network(data, runs, bnr, seed, kimgs=KIMGS):
    """The folder of a network that is trained, or trained on, to the last of kimgs."""
    out = f"{runs}/claim-{bnr:g}-{seed}"
    if not os.path.exists(f"{out}/{kept(kimgs[-1])}"):
        argv = ["--data", data, "--preset", "tiny", "--bnr", bnr, "--seed", seed, "--out", out,
                "--duration", kimgs[-1], "--keep-every", kimgs[0], "--snapshot-every", kimgs[0],
                "--log-every", 10]
        train.train(train.options(list(map(str, argv))), split(data)[0])
    return out


def kept(kimg):
    """The name of train.py's copy of ema.pt at this kimg."""
    return f"ema-{kimg:06d}.pt"


def matched(images, power):
    """uint8 images, each band of whose DCT coefficients is scaled to this power."""
    u = dct2(normalize(images).double())
    _, band = bands(*images.shape[2:])
    gain = torch.cat([(power / band_power(images)).sqrt(), torch.ones(1)])      # -1: the mean
    return to_uint8(idct2(u * gain[band]))


def sample_cell(checkpoint, solver, nfe, args, measure):
    images = drawn(checkpoint, range(args.samples), compiled=args.compile, batch=250,
                   steps=steps_of(solver, nfe), solver=solver)
    found = measure(images)
    return {**found, "matched": measure(matched(images, measure.power))["distance"],
            "checkpoint": digest(checkpoint)}


@torch.no_grad()
def loss_cell(checkpoint, bnr, held_out, compiled):
    """The mean of both terms at each level, common noise at every level and ratio."""
    net, _ = loaded(checkpoint, "cpu", compiled)
    x0 = normalize(held_out[:2500])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    found = {"sigma": np.geomspace(0.002, 80, 20).round(5).tolist(), "denoise": [], "deblur": []}
    for sigma in found["sigma"]:
        alpha, _ = ConstantBNR(bnr).levels(sigma)
        terms = [torch.stack(disentangled_loss(net, x, alpha, sigma, n, net.sigma_data))
                 for x, n in zip(x0.split(250), noise.split(250))]
        for name, value in zip(("denoise", "deblur"), torch.cat(terms, 1).mean(1).tolist()):
            found[name].append(round(value, 6))
    return {**found, "checkpoint": digest(checkpoint)}


def compute(args, cells):
    """Seed by seed, so that what is there when it is stopped are whole pairs."""
    held_out = split(args.data)[1].images
    measure, kimgs = None, (1, 2) if args.quick else KIMGS
    for seed in args.seeds:
        ratios = RATIOS if seed < 3 and not args.quick else RATIOS[:2]
        for bnr in (bnr for bnr in ratios if bnr in args.bnr):
            out = train_network(args.data, args.runs, bnr, seed, kimgs)
            for kimg in () if args.networks else sorted(set(kimgs) & set(args.kimg), reverse=True):
                checkpoint, key = f"{out}/{kept(kimg)}", dict(bnr=bnr, seed=seed, kimg=kimg)
                measure = measure or Measure(held_out, compiled=args.compile)
                cells.compute({"kind": "loss", **key},
                              lambda: loss_cell(checkpoint, bnr, held_out, args.compile))
                for solver, nfe in SOLVERS:
                    if solver in args.solvers:
                        cells.compute(
                            {"kind": "samples", **key, "solver": solver, "nfe": nfe},
                            lambda: sample_cell(checkpoint, solver, nfe, args, measure))


def pairs(cells, value, bnr=0.5, **key):
    """value(cell at bnr) - value(cell at 0) for each seed that has both."""
    hot, warm = ({c["seed"]: value(c) for c in matching(cells, bnr=b, **key)} for b in (0, bnr))
    return [warm[seed] - hot[seed] for seed in sorted(hot.keys() & warm.keys())]


def interval(differences):
    """The mean and the half of its 95 % interval, NaN for a single one."""
    n = len(differences)
    if n < 2:
        return differences[0], math.nan
    return mean(differences), T_975[n - 2] * np.std(differences, ddof=1) / math.sqrt(n)


VALUES = {"distance": lambda c: c["distance"], "matched distance": lambda c: c["matched"],
          **{f"power, band {i}": lambda c, i=i: c["power"][i] for i in (-3, -2, -1)}}


def by_law(cell, *terms):
    """The mean of the held-out loss over the levels as training draws them, (9)."""
    z = (np.log(cell["sigma"]) + 1.2) / 1.2
    return np.average(sum(np.array(cell[term]) for term in terms), weights=np.exp(-z ** 2 / 2))


LOSSES = {"loss, denoise": lambda c: by_law(c, "denoise"),
          "loss, deblur": lambda c: by_law(c, "deblur"),
          "loss, both": lambda c: by_law(c, "denoise", "deblur")}


def table(cells):
    """For each ratio, solver, measure and checkpoint: the mean of hot, d and its interval."""
    print("| BNR | solver, NFE | measure | kimg | pairs | hot, mean | d, mean | 95 % | each d |")
    print("|---|---|---|---|---|---|---|---|---|")
    kinds = [(solver, nfe, VALUES) for solver, nfe in SOLVERS] + [(None, None, LOSSES)]
    for bnr, (solver, nfe, values) in product((0.5, 0.3, 1), kinds):
        key = dict(solver=solver, nfe=nfe) if solver else dict(kind="loss")
        for (name, value), kimg in product(values.items(), sorted({c["kimg"] for c in cells})):
            d = pairs(cells, value, bnr, kimg=kimg, **key)
            if d:
                hot = mean([value(c) for c in matching(cells, bnr=0, kimg=kimg, **key)])
                n = {"d": 1, "m": 1, "p": 2, "l": 5}[name[0]]   # digits
                middle, half = interval(d)
                print(f"| {bnr} | {f'{solver}, {nfe}' if solver else ''} | {name} | {kimg} | "
                      f"{len(d)} | {hot:.{n}f} | {middle:+.{n}f} | +-{half:.{n}f} | "
                      f"{', '.join(f'{v:+.{n}f}' for v in d)} |")


def figure(plt, cells):
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4))
    samples, losses = matching(cells, kind="samples"), matching(cells, kind="loss")
    for axis, name in ((left, "distance"), (middle, "matched distance")):
        for i, (solver, nfe) in enumerate(SOLVERS):
            points = [(kimg, pairs(samples, VALUES[name], kimg=kimg, solver=solver, nfe=nfe))
                      for kimg in KIMGS]
            points = [(kimg + 3 * i, *interval(d)) for kimg, d in points if d]
            if points:
                x, y, half = zip(*points)
                axis.errorbar(x, y, np.nan_to_num(half), marker="o", capsize=3,
                              label=f"{solver}, NFE {nfe}")
        axis.axhline(0, color="black", lw=0.5)
        axis.set(xlabel="kimg", ylabel="BNR 0.5 less BNR 0", title=f"{name}, with 95 % interval")
        axis.legend()
    for kimg in sorted({c["kimg"] for c in losses})[-1:]:
        for name, value in (("denoise", lambda c: np.array(c["denoise"])),
                            ("deblur", lambda c: np.array(c["deblur"])),
                            ("both", lambda c: np.array(c["denoise"]) + np.array(c["deblur"]))):
            d = pairs(losses, value, kimg=kimg)
            if d:
                right.semilogx(losses[0]["sigma"], np.mean(d, 0), marker=".", label=name)
        right.axhline(0, color="black", lw=0.5)
        right.set(xlabel="sigma", title=f"held-out loss, 0.5 less 0, {kimg} kimg")
        right.legend()
    return fig


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "claim")
        if not args.plot_only:
            compute(args, cells)
        if cells.cells:
            table(cells.cells)
            plotted(cells.png, lambda plt: figure(plt, cells.cells))


if __name__ == "__main__":
    main()
