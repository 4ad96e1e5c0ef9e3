"""Is a change better? Networks that differ in one option of train.py, or in one part, in pairs.

    python -m study.compare --data photos/ --vary bnr=0,0.5 --seeds 6 --kimg 240
    python -m study.compare --data photos/ --vary lr=2e-3,1e-3,4e-3 --bnr 0
    python -m study.compare --data photos/ --vary parts=none,my_part.py --bnr 0
    python -m study.compare --vary bnr=0,0.5 --plot-only --results study/results --name claim

Networks of one seed share their first weights, the order of the images, the noise and its levels,
and are sampled from the same noise. Each value is compared with the first one, seed by seed: what
a seed does to both drops out. Options that are not named here are train.py's. Runs and
cells that are there are used again. How to test an idea of your own: docs/compare.md.
"""
import argparse
import hashlib
import importlib.util
import json
import math
import re
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

import train
from data import Images, seed_for
from degrade import Schedule, dct2, idct2
from loss import disentangled_loss
from sample import SOLVERS, seed_list
from study.common import (HIGHEST_BANDS, Cells, Measure, band_power, bands, digest, draw_samples,
                          groups, listed, matching, mean, parser, part_of, precision,
                          rounded, run, split, steps_of)
from util.checkpoint import load_model
from util.cli import UserError, add_device_option, number
from util.distributed import signals_noted
from util.images import normalize, to_uint8
from util.run import MAY_CHANGE_ON_RESUMING, kimg_name, named_schedule

PARTS = ("schedule", "loss", "network", "optimizer")            # what a file of one's own may have
NO_MATTER = MAY_CHANGE_ON_RESUMING - {"lr", "precision", "attention"}      # to a network's weights
FIXED = NO_MATTER | {"seed", "resolution", "cond"}              # what cannot be varied
SAMPLES = 5000                                  # a cell, unless something else is said
LOSS_IMAGES = 2500                              # held-out images that the losses are measured on
LOSS_LEVELS = 20
# Student's t, 97.5 %, for 1 to 30 degrees of freedom
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
         2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
         2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
# The held-out images of the cells of study/results/claim.jsonl, which do not say it
CLAIM_IMAGES = "5689214b9d71"
FIELDS = [{"kind": "loss", "seed": int, "kimg": float, "images": (str, None), "sigma": [float],
           "denoise": [float], "deblur": [float], "solver": None, "nfe": None, "samples": None},
          {"kind": "samples", "seed": int, "kimg": float, "images": (str, None), "solver": str,
           "nfe": float, "samples": float, "distance": float, "matched": float, "power": [float]}]


@dataclass
class Variant:
    """The networks of one value, which differ in their seed alone."""
    label: tuple                                # the option and its value
    argv: list                                  # the options of train.py
    options: dict                               # those that the preset has otherwise, and bnr
    parts: dict                                 # of one's own
    code: str | None                            # the digest of their file


# The command line


def options():
    p = parser("compare", "Networks that differ in one option of train.py, or in a part of your "
                          "own, in pairs of one seed: the difference of their samples' distance to "
                          "held-out images, with its 95 % interval. Other options are train.py's.")
    a = p.add_argument
    a("--vary", default="bnr=0,0.5", type=variation, metavar="OPTION=VALUE,VALUE",
      help="an option of train.py and its values, each compared with the first; none leaves it "
           "out. parts=none,FILE.py: a file that defines any of " + ", ".join(PARTS) + " (default "
           "bnr=0,0.5)")
    a("--parts", default="none", metavar="FILE.py", help="such a file for all networks")
    a("--data", help="the images, as for train.py; a tenth of them is held out")
    a("--seeds", type=seeds_of_training, default=range(6),
      help="6: the seeds 0 to 5; 6-9 or 1,3 names them (default 6)")
    a("--kimg", type=number(float, 0.001), nargs="+", default=[240.],
      help="checkpoints that are compared, the last of them the end of training (default 240)")
    a("--solver", nargs="+", choices=list(SOLVERS), default=["multistep"],
      help="default multistep")
    a("--nfe", type=number(int, 1), nargs="+", default=[18],
      help="network evaluations, one for each solver (default 18)")
    a("--samples", type=number(int, 50), default=SAMPLES, help="a cell (default 5000)")
    a("--name", default="compare", help="of the files in --results (default compare)")
    a("--runs", default="runs/compare", help="folder of the networks (default runs/compare)")
    a("--compile", action="store_true", help="torch.compile training, sampler and measure")
    add_device_option(p)
    args, others = p.parse_known_args()
    if args.quick:
        args.kimg = [0.064]
        args.seeds = range(1)
        args.samples = 50
        args.nfe = [3]
        args.runs = f"{args.runs}/quick"
    if not args.data and not args.plot_only:
        p.error("--data is needed: the images to train on")
    if len(args.nfe) != len(args.solver):
        p.error("--solver and --nfe go together: one number for each solver")
    with p.one_line_errors():
        args.variants = variants_of(args, others)
    return p, args


def variation(text: str):
    """An argparse type: NAME=VALUE,VALUE -> the name and the values."""
    name, _, values = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    values = values.split(",")
    if len(values) < 2 or "" in values or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"must be like bnr=0,0.5, with values that differ, not "
                                         f"{text!r}")
    return name, values


def seeds_of_training(text: str):
    """An argparse type: a number of seeds, from 0 on, or a list of them as sample.py has it."""
    if re.fullmatch("[1-9][0-9]?", text):
        return range(int(text))
    return seed_list(text)


def variants_of(args, others: list) -> list:
    """The variants of --vary. Raises UserError; train.py's parser ends the program."""
    name, values = args.vary
    known = vars(train.options([])).keys() - FIXED
    if name not in known | {"parts"}:
        raise UserError(f"--vary {name}: choose among parts, {', '.join(sorted(known))}")
    variants = []
    for value in values:
        argv = list(others)
        if args.data:
            argv += ["--data", args.data]
        filename = args.parts
        if name == "parts":
            filename = value
        elif value != "none":
            argv += [f"--{name.replace('_', '-')}", *value.split()]
        variant = Variant((name, value), argv, differing_options(argv), {}, None)
        if filename != "none":
            variant.parts = read_parts(filename)
            variant.options["parts"] = Path(filename).stem
            variant.code = digest(filename)
        variants.append(variant)
    return variants


def differing_options(argv: list) -> dict:
    """What a network's weights depend on, beside data and seed, as plain types: the preset, bnr,
    and every option that is not the preset's."""
    chosen = vars(train.options(argv))
    usual = vars(train.options(["--preset", chosen["preset"]]))
    differing = {"preset": chosen["preset"]}
    for name, value in chosen.items():
        matters = name not in NO_MATTER | {"seed"} and value != usual[name]
        if name == "bnr" or matters:
            differing[name] = "inf" if value == math.inf else value
    return differing


def read_parts(filename: str) -> dict:
    """The parts that a Python file defines, by name. Raises UserError, and what the file raises."""
    if not Path(filename).is_file():
        raise UserError(f"{filename} does not exist: give a Python file, or none")
    spec = importlib.util.spec_from_file_location(Path(filename).stem, filename)
    if spec is None:
        raise UserError(f"{filename} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parts = {name: getattr(module, name) for name in PARTS if hasattr(module, name)}
    if not parts:
        raise UserError(f"{filename} defines none of {', '.join(PARTS)}")
    for name, part in parts.items():
        if name == "schedule" and not isinstance(part, Schedule):
            raise UserError(f"{filename}: schedule must be a degrade.Schedule, not {part!r}")
        if name != "schedule" and not callable(part):
            raise UserError(f"{filename}: {name} must be a function, not {part!r}")
    return parts


# Training


def trained(args, variant: Variant, seed: int, training: Images) -> str:
    """The folder of a network with a copy at each of --kimg, which is trained where it is missing.
    A signal saves the run and ends the program; the next start continues it."""
    out = f"{args.runs}/{folder_name(variant, seed, training)}"
    missing = [kimg for kimg in args.kimg if not checkpoint_at(out, variant, kimg).exists()]
    if not missing:
        return out
    every = math.gcd(*(round(kimg * 1000) for kimg in args.kimg)) / 1000
    argv = [*variant.argv, "--seed", str(seed), "--out", out, "--device", args.device,
            "--duration", str(max(args.kimg)), "--keep-every", str(every)]
    if args.compile:
        argv.append("--compile")
    run_args = train.options(argv)
    parts = {name: part for name, part in variant.parts.items() if name != "network"}
    net = make_own_network(variant, training, seed)
    with signals_noted() as signals:
        train.train(run_args, training, net=net, signals=signals, **parts)
    if signals:
        sys.exit(128 + signals[0])
    for kimg in missing:
        if not checkpoint_at(out, variant, kimg).exists():
            raise UserError(f"{out} is past {kimg:g} kimg and has no copy of it: choose among its "
                            "copies by --kimg, or remove it to train again")
    return out


def folder_name(variant: Variant, seed: int, training: Images) -> str:
    """The same for the same network, whatever it is compared with."""
    identity = json.dumps([variant.options, variant.code, training.facts()["digest"]])
    identity = hashlib.sha256(identity.encode()).hexdigest()[:8]
    words = ""
    for name, value in variant.options.items():
        if name != "preset":
            words += f"{name}{value}_"
    words = re.sub(r"[^\w.-]+", "-", words)[:80]
    return f"{words}{identity}/{seed}"


def checkpoint_at(out: str, variant: Variant, kimg: float) -> Path:
    """train.py's copy of ema.pt at the first step that reaches kimg."""
    batch = train.options(variant.argv).batch
    seen = math.ceil(round(kimg * 1000, 6) / batch) * batch
    return Path(out, f"ema-{kimg_name(seen)}.pt")


def make_own_network(variant: Variant, images: Images, seed: int):
    """The network of one's own with its first weights, or None for the project's."""
    if "network" not in variant.parts:
        return None
    classes = 0
    if train.options(variant.argv).cond:
        classes = len(images.classes)
    torch.manual_seed(seed_for("weights", seed))                # as train.py does for its own
    return variant.parts["network"](tuple(images.images.shape[1:]), classes)


def schedule_of(variant: Variant) -> Schedule:
    schedule, _ = named_schedule(train.options(variant.argv), variant.parts.get("schedule"))
    return schedule


# Measuring


def compute(args, cells: Cells) -> list:
    """Seed by seed, so that what is there when it is stopped are whole pairs."""
    resolution = train.options(args.variants[0].argv).resolution or None
    training, held_out = split(args.data, resolution)
    if args.quick:
        held_out = part_of(held_out, torch.arange(len(held_out.images))[:args.samples], "quick")
    measure = Measure(held_out.images, args.device, compiled=args.compile)
    for seed in args.seeds:
        folders = [trained(args, variant, seed, training) for variant in args.variants]
        for kimg in sorted(args.kimg, reverse=True):
            for variant, out in zip(args.variants, folders):
                checkpoint = checkpoint_at(out, variant, kimg)
                cells_of(args, cells, variant, seed, checkpoint, held_out, measure)
    return cells.cells


def cells_of(args, cells: Cells, variant: Variant, seed: int, filename: Path, held_out: Images,
             measure: Measure) -> None:
    """The cells of one checkpoint: its losses, and its samples by each solver."""
    @lru_cache(maxsize=1)                                       # where a cell is missing, once
    def load():
        net = make_own_network(variant, held_out, seed)
        return load_model(str(filename), args.device, precision(args.device), args.compile, net)

    compute_cell = partial(cells.compute, images=held_out.images, checkpoint=filename, seed=seed,
                           network=variant.options, code=variant.code, compiled=args.compile,
                           precision=precision(args.device))

    def losses():
        net, _ = load()
        losses = held_out_losses(net, schedule_of(variant), held_out, args.device)
        return {**losses, "data": held_out.name}
    compute_cell(losses, kind="loss", loss_images=LOSS_IMAGES)

    for solver, nfe in zip(args.solver, args.nfe):
        steps = steps_of(solver, nfe)
        evaluations = 2 * steps - 1 if solver == "heun" else steps

        def measured_samples():
            net, checkpoint = load()
            images = draw_samples(net, checkpoint, schedule_of(variant), range(args.samples),
                                  args.device, steps=steps, solver=solver)
            matched = measure(match_power(images, measure.power))
            return {**measure(images), "matched": matched["distance"], "data": held_out.name}
        cell = compute_cell(measured_samples, kind="samples", solver=solver, nfe=evaluations,
                            samples=args.samples)
        print(f"{' '.join(variant.label)}, seed {seed}, {cell['kimg']:g} kimg, {solver} "
              f"{evaluations}: distance {cell['distance']:.1f}", flush=True)


@torch.no_grad()
def held_out_losses(net, schedule: Schedule, held_out: Images, device) -> dict:
    """The mean of both terms of (9) at each level, with common noise at every level and for every
    network, whatever loss it was trained with."""
    x0 = normalize(held_out.images[:LOSS_IMAGES])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    labels = held_out.labels[:LOSS_IMAGES]
    low, high = schedule.sigma_range(*x0.shape[2:])
    levels = np.geomspace(low, high, LOSS_LEVELS).round(5).tolist()
    means = []
    for t in levels:
        alpha, sigma = schedule.levels(t)
        terms = []                                              # [2, B] each
        for x, n, label in zip(x0.split(250), noise.split(250), labels.split(250)):
            heads = net
            if net.classes:
                heads = partial(net, label=label.to(device))
            terms.append(torch.stack(disentangled_loss(
                heads, x.to(device), alpha.item(), sigma.item(), n.to(device), net.sigma_data)))
        means.append(torch.cat(terms, 1).mean(1).cpu())
    denoise, deblur = torch.stack(means, 1)                     # [LOSS_LEVELS] each
    return {"sigma": levels, "denoise": rounded(denoise, 6), "deblur": rounded(deblur, 6)}


def match_power(images: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """uint8 images, each band of whose DCT coefficients is scaled to this power, so that power
    alone cannot win."""
    u = dct2(normalize(images).double())
    _, band = bands(*images.shape[2:])
    gain = (power / band_power(images)).sqrt()
    gain = torch.cat([gain, torch.ones(1)])                     # the mean, band -1, stays
    return to_uint8(idct2(u * gain[band]))


# The table and the figure


def interval(differences: list):
    """The mean and the half of its 95 % interval by Student's t, NaN for a single one."""
    n = len(differences)
    if n < 2:
        return mean(differences), math.nan
    t = T_975[min(n - 1, len(T_975)) - 1]
    return mean(differences), t * np.std(differences, ddof=1) / math.sqrt(n)


def sign_flip_p(differences: list) -> float:
    """The exact p value, two-sided: the share of all assignments of signs to the differences whose
    mean is as far from 0. NaN for more than 20, where there are too many."""
    if len(differences) > 20:
        return math.nan
    sums = np.zeros(1)
    for d in differences:
        sums = np.concatenate([sums + d, sums - d])
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - 1e-9))


def over_training_levels(cell: dict, terms: list) -> float:
    """The mean of held-out losses over the distribution of training noise levels (9)."""
    z = (np.log(cell["sigma"]) - Schedule.P_mean) / Schedule.P_std
    weights = np.exp(-z ** 2 / 2)
    losses = np.zeros(len(z))
    for term in terms:
        losses = losses + np.array(cell[term])
    return np.sum(losses * weights) / np.sum(weights)


def power_of_band(cell: dict, band: int) -> float:
    """band: -1 for the highest. NaN where the images are too small to have it."""
    return ([math.nan] * HIGHEST_BANDS + cell["power"])[band]


SAMPLE_MEASURES = {                             # function of a cell, digits
    "distance": (lambda cell: cell["distance"], 1),
    "matched distance": (lambda cell: cell["matched"], 1),
    "power, band -3": (partial(power_of_band, band=-3), 2),
    "power, band -2": (partial(power_of_band, band=-2), 2),
    "power, band -1": (partial(power_of_band, band=-1), 2)}
LOSS_MEASURES = {
    "loss, denoise": (partial(over_training_levels, terms=["denoise"]), 5),
    "loss, deblur": (partial(over_training_levels, terms=["deblur"]), 5),
    "loss, both": (partial(over_training_levels, terms=["denoise", "deblur"]), 5)}


def with_network(cell: dict) -> dict:
    """A cell; one of claim.py, which was before this program, with what this one writes too."""
    if "network" in cell or "bnr" not in cell:
        return cell
    return {**cell, "network": {"preset": "tiny", "bnr": cell["bnr"]}, "images": CLAIM_IMAGES}


def comparisons(variants: list, cells: list, kind: str):
    """Yields (variant, a list of pairs for each checkpoint), for each value but the first and each
    way to measure. A pair: the cells of one seed, the first value's and the other's."""
    first, *others = variants
    ways = groups(matching(cells, kind=kind), "solver", "nfe", "samples").values()
    for other in others:
        for same in ways:
            by_kimg = []
            for _, at_kimg in sorted(groups(same, "kimg").items()):
                pairs = pairs_of(by_seed(at_kimg, first), by_seed(at_kimg, other))
                if pairs:
                    by_kimg.append(pairs)
            yield other, by_kimg


def by_seed(cells: list, variant: Variant) -> dict:
    of_variant = matching(cells, network=variant.options, code=variant.code)
    return {cell["seed"]: cell for cell in of_variant}


def pairs_of(first: dict, other: dict) -> list:
    return [(first[seed], other[seed]) for seed in sorted(first.keys() & other.keys())]


def differences(pairs: list, value) -> list:
    return [value(other) - value(first) for first, other in pairs]


def table(variants: list, cells: list) -> None:
    """For each value but the first, each measure and checkpoint: the mean of the first value, the
    mean difference d, its interval, its p value, and d seed by seed. Images by images. Raises
    UserError where there are no pairs."""
    name, first = variants[0].label
    tables = 0
    for (images,), same in groups(list(map(with_network, cells)), "images").items():
        rows = rows_of(variants, same, "samples", SAMPLE_MEASURES)
        rows += rows_of(variants, same, "loss", LOSS_MEASURES)
        if rows:
            tables += 1
            print(f"\n{same[-1].get('data', 'photographs')}, held-out images {images}\n\n"
                  f"| {name} | solver, NFE | measure | kimg | pairs | {first}, mean | d, mean | "
                  "95 % | p | d by seed |\n|---|---|---|---|---|---|---|---|---|---|")
            print(*rows, sep="\n")
    if not tables:
        raise UserError("the results have no pairs of these values: repeat the options that they "
                        "were made with")


def rows_of(variants: list, cells: list, kind: str, measures: dict) -> list:
    rows = []
    for other, by_kimg in comparisons(variants, cells, kind):
        for measure, (value, digits) in measures.items():
            for pairs in by_kimg:
                firsts = [value(first) for first, _ in pairs]
                d = differences(pairs, value)
                rows.append(row(other, measure, digits, pairs[0][0], firsts, d))
                if measure == "distance":
                    percent = [100 * one / first for one, first in zip(d, firsts)]
                    rows.append(row(other, "distance, d in %", 1, pairs[0][0], firsts, percent))
    return rows


def row(other: Variant, measure: str, digits: int, cell: dict, firsts: list, d: list) -> str:
    """firsts: the values of the first variant, by seed; d: the differences from them. cell: any of
    this checkpoint."""
    middle, half = interval(d)
    spread = "-"
    if len(d) > 1:
        spread = f"+-{half:.{digits}f}"
    way = ""
    if cell["kind"] == "samples":
        way = way_of(cell)
    return (f"| {other.label[1]} | {way} | {measure} | {cell['kimg']:g} | {len(d)} | "
            f"{mean(firsts):.{digits}f} | {middle:+.{digits}f} | {spread} | {sign_flip_p(d):.3g} | "
            f"{listed(d, f'+.{digits}f')} |")


def way_of(cell: dict) -> str:
    way = f"{cell['solver']}, {cell['nfe']}"
    if cell["samples"] != SAMPLES:
        way += f", {cell['samples']} samples"
    return way


def draw_distances(variants: list, plt, cells: list):
    """The difference of the distance: a line for each value and checkpoint, with its interval; a
    point for each seed."""
    name, first = variants[0].label
    cells = list(map(with_network, cells))
    cells = matching(cells, images=cells[-1].get("images"))     # of one set: the last
    lines = []
    for other, by_kimg in comparisons(variants, cells, "samples"):
        for pairs in by_kimg:
            cell = pairs[0][0]
            label = f"{other.label[1]}, {cell['kimg']:g} kimg, {way_of(cell)}"
            lines.append((label, differences(pairs, SAMPLE_MEASURES["distance"][0])))
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.55 * len(lines)))
    labels = []
    for height, (label, d) in enumerate(reversed(lines)):
        middle, half = interval(d)
        labels.append(label)
        axes.plot(d, [height] * len(d), "o", color="C0", alpha=0.35, mec="none")
        axes.errorbar(middle, height, xerr=np.nan_to_num(half), fmt="o", color="C0", capsize=5)
    axes.axvline(0, color="gray", lw=1.5)
    axes.set_yticks(range(len(lines)), labels)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlabel(f"distance less that of {name} {first} (left of 0: better)")
    axes.set_title("mean over seeds, its 95 % interval, and each pair")
    return figure


def main():
    p, args = options()
    run(p, args, args.name, FIELDS, compute, partial(table, args.variants),
        {"": partial(draw_distances, args.variants)})


if __name__ == "__main__":
    main()
