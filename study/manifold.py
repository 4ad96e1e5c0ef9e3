"""Does the sampler stay where the forward process goes? The paper says that a high ratio makes it
leave the data manifold; this measures how far, level by level.

    python -m study.manifold --ckpt run/ema.pt
    python -m study.manifold --ckpt any/ema.pt --bnr 0 0.5 2 10       # a network of --bnr any

At each level the distance is Frechet's, between projections of the sampler's states and of degraded
images of the data. The floor is the same between two sets of degraded images: what chance gives.
"""
import math

import numpy as np
import torch
from tqdm import tqdm

from data import load
from degrade import dct2, degrade, frequencies
from fid import frechet_distance
from sample import generate, sampler, sampler_options, sampling_schedule
from study.common import Cells, groups, label_lines, listed, matching, parser, run
from util.checkpoint import load_model
from util.cli import UserError, number
from util.images import normalize

DIRECTIONS = 8                                  # in each octave of frequency
# Of cells that stand side by side; old ones lack some
ALIKE = ("ckpt", "checkpoint", "images", "kimg", "data", "label", "samples", "solver", "nfe",
         "churn", "s_min", "s_max", "s_noise", "precision")
FIELDS = [{"ckpt": str, "checkpoint": (str, None), "images": (str, None), "kimg": float,
           "data": str, "label": (str, None), "samples": float, "solver": str, "nfe": float,
           "churn": float, "s_min": float, "s_max": (str, float), "s_noise": (float, None),
           "precision": str, "schedule": str, "bnr": (float, None), "t": [float],
           "distance": [float], "floor": [float]}]


def options():
    p = parser("manifold", "The distance of the sampler's states from the forward process at the "
                           "same level, by level. The paper has no table of it.")
    a = p.add_argument
    a("--ckpt", default="run/ema.pt", help="the model: ema.pt of train.py (default run/ema.pt)")
    a("--bnr", type=number(float, 0), nargs="+", metavar="R",
      help="for a model of --bnr any: the ratios, 0 to 10 (default 0.5)")
    a("--data", help="images of the forward process (default: those that the model was trained on)")
    a("--samples", type=number(int, 100), default=1000,
      help="and as many degraded images; the floor falls with their number (default 1000)")
    a("--batch", type=number(int, 1), default=250, help="samples at a time (default 250)")
    sampler_options(p)
    args = p.parse_args()
    if args.quick:
        args.samples = 100
        args.steps = 3
    return p, args


def manifold(net, schedule, images: torch.Tensor, device, n: int, batch: int = 250, label=None,
             **options):
    """Rows (t, distance, floor) for the levels of the sampler, falling, and for its images, t = 0.

    net: (x, alpha, sigma) -> D, R; images: uint8 [N, C, H, W], drawn with replacement; n: the size
    of each set; label, options: of sample.generate.
    Each projection is divided by sqrt(v + sigma^2), v its variance over the images, so that all
    count alike; without it the mean color alone would count.
    """
    generator = torch.Generator().manual_seed(0)
    basis = directions(*images.shape[1:], generator).to(device)

    def project(x):
        return (dct2(x.double()).flatten(1) @ basis).cpu()                      # [B, K]

    def degraded(t):
        projections = []
        for index in torch.randint(len(images), (n,), generator=generator).split(batch):
            x0 = normalize(images[index])
            noise = torch.randn(x0.shape, generator=generator)
            alpha, sigma = schedule.levels(t)
            x, _ = degrade(x0.to(device), alpha, sigma, noise.to(device))
            projections.append(project(x))
        return torch.cat(projections)                                           # [n, K]

    states = {}

    def watch(t, x, d, r):
        states.setdefault(t, []).append(project(x))

    samples = generate(net, schedule, images.shape[1:], range(n), device, batch, label=label,
                       watch=watch, **options)
    for x in tqdm(samples, "sampling", math.ceil(n / batch)):
        watch(0., x, None, None)
    variance = degraded(0.).var(0)
    for t, projections in states.items():
        _, sigma = schedule.levels(t)
        scale = (variance + sigma ** 2).clamp(min=1e-8).sqrt()
        ours = moments(torch.cat(projections) / scale)
        theirs = moments(degraded(t) / scale)
        others = moments(degraded(t) / scale)
        yield t, frechet_distance(*ours, *theirs), frechet_distance(*others, *theirs)


def directions(c: int, h: int, w: int, generator) -> torch.Tensor:
    """Random orthonormal directions of the DCT coefficients, float64 [C H W, K]: DIRECTIONS in each
    octave of frequency, or as many as it has coefficients, and in that of the mean."""
    lam = frequencies(h, w).expand(c, h, w).flatten()
    octave = torch.floor(torch.log2(lam / lam[lam > 0].min()) / 2 + 1e-9)       # the mean's is -inf
    bases = []
    for o in octave.unique():
        inside = octave == o
        random = torch.randn(len(lam), DIRECTIONS, dtype=torch.float64, generator=generator)
        u, _, _ = torch.linalg.svd(random * inside[:, None], full_matrices=False)
        bases.append(u[:, :min(DIRECTIONS, int(inside.sum()))])
    return torch.cat(bases, 1)


def moments(x: torch.Tensor):
    return x.mean(0), x.T.cov()


def compute(args, cells: Cells) -> list:
    """The cells of the ratios that are asked for."""
    net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
    sampling, nfe = sampler(args, net, checkpoint)
    images = compared_images(args, net, checkpoint)
    shown = []
    for bnr in args.bnr or [None]:
        schedule = sampling_schedule(checkpoint, bnr, args.schedule)

        def value():
            rows = manifold(net, schedule, images, args.device, args.samples, args.batch,
                            **sampling)
            t, distance, floor = zip(*rows)
            return {"t": t, "distance": distance, "floor": floor}
        shown.append(cells.compute(
            value, images=images, checkpoint=args.ckpt, ckpt=args.ckpt, label=args.label, nfe=nfe,
            data=args.data or checkpoint["options"]["data"], samples=args.samples,
            solver=args.solver, churn=args.churn, s_min=args.s_min, s_max=f"{args.s_max:g}",
            s_noise=args.s_noise, precision=args.precision, schedule=type(schedule).__name__,
            bnr=getattr(schedule, "bnr", None)))
    return shown


def compared_images(args, net, checkpoint: dict) -> torch.Tensor:
    """The images of the forward process: of the class that is sampled, where there are classes."""
    trained = checkpoint["options"]
    try:
        data = load(args.data or trained["data"], trained["resolution"] or None)
    except UserError as e:
        if args.data:
            raise
        raise UserError(f"{e}; the model was trained on it, --data says where it is now") from None
    images = data.images
    if net.classes and args.label is None:
        raise UserError("a class-conditional model is compared class by class: give --class")
    if net.classes:
        if args.label not in data.classes:
            raise UserError(f"the images have no class {args.label}")
        images = images[data.labels == data.classes.index(args.label)]
    if list(images.shape[1:]) != checkpoint["data"]["shape"]:
        raise UserError(f"the images are {list(images.shape[1:])}, and the model's are "
                        f"{checkpoint['data']['shape']}")
    return images


def place(cell: dict) -> str:
    if cell["bnr"] is None:
        return cell["schedule"]
    return f"BNR {cell['bnr']:g}"


def title_of(cell: dict) -> str:
    title = f"{cell['ckpt']} at {cell['kimg']:g} kimg, {cell['samples']} samples"
    if cell["label"] is not None:
        title += f" of class {cell['label']}"
    title += f", {cell['solver']} NFE {cell['nfe']}"
    if cell["churn"]:
        title += f", churn {cell['churn']:g}"
    return f"{title}, beside {cell['data']}"


def table(cells: list) -> None:
    """Cells with the same levels side by side."""
    for same in groups(cells, *ALIKE).values():
        print(f"\n{title_of(same[0])}: distance from the forward process, and floor")
        print(f"{'t':>8}" + listed(map(place, same), ">24", ""))
        for i, t in enumerate(same[0]["t"]):
            line = f"{t:8.3g}"
            for cell in matching(same, t=same[0]["t"]):
                text = f"{cell['distance'][i]:14.4g} ({cell['floor'][i]:.3g})"
                line += f"{text:>24}"
            print(line)


def draw_excess(plt, cells: list):
    """The distance less its floor by level, a line a ratio, of the first table."""
    same = next(iter(groups(cells, *ALIKE).values()))
    figure, axes = plt.subplots(figsize=(8, 4.8))
    lowest = min((t for t in same[0]["t"] if t > 0), default=1.)
    ends = []
    for i, cell in enumerate(same):
        excess = np.array(cell["distance"]) - np.array(cell["floor"])
        axes.plot(cell["t"], excess, ".-", color=f"C{i % 10}")
        ends.append((excess[-1], place(cell), f"C{i % 10}"))
    axes.set_xscale("symlog", linthresh=lowest)
    axes.set_xlim(max(same[0]["t"]), 0)         # as the sampler goes, to the images at t = 0
    axes.set(xlabel="level t, from noise to images", ylabel="distance less its floor",
             title="How far the sampler's states are from degraded images")
    label_lines(axes, ends)
    return figure


def main():
    p, args = options()
    run(p, args, "manifold", FIELDS, compute, table, {"": draw_excess})


if __name__ == "__main__":
    main()
