"""Does the sampler stay where the forward process goes? The paper says that a high ratio makes it
leave the data manifold; this measures how far, level by level.

    python -m study.manifold --ckpt run/ema.pt
    python -m study.manifold --ckpt any/ema.pt --bnr 0 0.5 2 10       # a network of --bnr any

At each level the distance is Frechet's, between projections of the sampler's states and of degraded
images of the data. The floor is the same between two sets of degraded images: what chance gives.
"""
import math

import torch
from tqdm import tqdm

from data import load
from degrade import dct2, degrade, frequencies
from fid import frechet_distance
from model import load_model
from sample import generate, sampler, sampler_options, sampling_path
from study.common import Cells, digest, groups, parser, plotted
from util import UserError, normalize, number

DIRECTIONS = 8                                  # in each octave of frequency


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
        args.samples, args.steps = 100, 3
    return p, args


def manifold(net, path, images, device, n, batch=250, label=None, **options):
    """Rows (t, distance, floor) for the levels of the sampler, falling, and for its images, t = 0.

    net: (x, alpha, sigma) -> D, R; images: uint8 [N, C, H, W], drawn with replacement; n: the size
    of each set; label, options: of sample.generate.
    Each projection is divided by sqrt(v + sigma^2), v its variance over the images, so that all
    count alike; without it the mean colour alone would count.
    """
    g = torch.Generator().manual_seed(0)
    basis = directions(*images.shape[1:], g).to(device)

    def project(x):
        return (dct2(x.double()).flatten(1) @ basis).cpu()                      # [B, K]

    def degraded(t):
        parts = []
        for index in torch.randint(len(images), (n,), generator=g).split(batch):
            x0 = normalize(images[index])
            noise = torch.randn(x0.shape, generator=g)
            x, _ = degrade(x0.to(device), *path.levels(t), noise.to(device))
            parts.append(project(x))
        return torch.cat(parts)                                                 # [n, K]

    states = {}

    def watch(t, x, d, r):
        states.setdefault(t, []).append(project(x))

    samples = generate(net, path, images.shape[1:], range(n), device, batch, label=label,
                       watch=watch, **options)
    for x in tqdm(samples, "sampling", math.ceil(n / batch)):
        watch(0., x, None, None)
    v = degraded(0.).var(0)
    for t, parts in states.items():
        scale = (v + path.levels(t)[1] ** 2).clamp(min=1e-8).sqrt()
        ours, theirs, others = (moments(s / scale)
                                for s in (torch.cat(parts), degraded(t), degraded(t)))
        yield t, frechet_distance(*ours, *theirs), frechet_distance(*others, *theirs)


def directions(c, h, w, generator):
    """Random orthonormal directions of the DCT coefficients, float64 [C H W, K]: DIRECTIONS in each
    octave of frequency, or as many as it has coefficients, and in that of the mean."""
    lam = frequencies(h, w).expand(c, h, w).flatten()
    octave = torch.floor(torch.log2(lam / lam[lam > 0].min()) / 2 + 1e-9)       # the mean's is -inf
    found = []
    for o in octave.unique():
        inside = octave == o
        random = torch.randn(len(lam), DIRECTIONS, dtype=torch.float64, generator=generator)
        u, _, _ = torch.linalg.svd(random * inside[:, None], full_matrices=False)
        found.append(u[:, :min(DIRECTIONS, int(inside.sum()))])
    return torch.cat(found, 1)


def moments(x):
    return x.mean(0), x.T.cov()


def compute(args, cells):
    """The cells of the paths that are asked for."""
    net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
    sampling, nfe = sampler(args, net, checkpoint)
    trained = checkpoint["options"]
    key = dict(ckpt=args.ckpt, checkpoint=digest(args.ckpt), kimg=checkpoint["seen"] / 1000,
               data=args.data or trained["data"], label=args.label, samples=args.samples,
               solver=args.solver, nfe=nfe, churn=args.churn, s_min=args.s_min,
               s_max=f"{args.s_max:g}", precision=args.precision)
    images, found = None, []
    for bnr in args.bnr or [None]:
        path = sampling_path(checkpoint, bnr, args.path)
        of_path = dict(key, path=type(path).__name__, bnr=getattr(path, "bnr", None))
        if images is None and not cells.find(**of_path):
            images = compared_images(args, net, checkpoint)

        def rows():
            by_level = manifold(net, path, images, args.device, args.samples, args.batch,
                                **sampling)
            t, distance, floor = zip(*by_level)
            return {"t": t, "distance": distance, "floor": floor}
        found.append(cells.compute(of_path, rows))
    return found


def compared_images(args, net, checkpoint):
    """The images of the forward process: of the class that is sampled, where there are classes."""
    trained = checkpoint["options"]
    try:
        data = load(args.data or trained["data"], trained["resolution"] or None)
    except UserError as e:
        raise UserError(e if args.data else f"{e}; the model was trained on it, --data says where "
                                            "it is now") from None
    images = data.images
    if net.classes:
        if args.label is None:
            raise UserError("a class-conditional model is compared class by class: give --class")
        classes = checkpoint["data"]["classes"]
        name = args.label if args.label in classes else classes[int(args.label)]
        if name not in data.classes:
            raise UserError(f"the images have no class {name}")
        images = images[data.labels == data.classes.index(name)]
    if list(images.shape[1:]) != checkpoint["data"]["shape"]:
        raise UserError(f"the images are {list(images.shape[1:])}, and the model's are "
                        f"{checkpoint['data']['shape']}")
    return images


def curve(cell):
    return f"BNR {cell['bnr']:g}" if cell["bnr"] is not None else cell["path"]


def title(cell):
    label = f" of class {cell['label']}" if cell["label"] is not None else ""
    churn = f", churn {cell['churn']:g}" if cell["churn"] else ""
    return (f"{cell['ckpt']} at {cell['kimg']:g} kimg, {cell['samples']} samples{label}, "
            f"{cell['solver']} NFE {cell['nfe']}{churn}, beside {cell['data']}")


def table(cells):
    """Cells with the same levels side by side."""
    for _, some in groups(cells, "ckpt", "checkpoint", "kimg", "data", "label", "samples", "solver",
                          "nfe", "churn", "s_min", "s_max", "precision").items():
        print(f"\n{title(some[0])}: distance from the forward process, and floor")
        print(f"{'t':>8}" + "".join(f"{curve(c):>24}" for c in some))
        for i, t in enumerate(some[0]["t"]):
            row = (f"{c['distance'][i]:14.4g} ({c['floor'][i]:.3g})" for c in some)
            print(f"{t:8.3g}" + "".join(f"{text:>24}" for text in row))


def draw_plot(cells, shown):
    """The distance by level, a line a cell, and dotted its floor. t = 0 stands at the left."""
    def draw(plt):
        figure, axes = plt.subplots(figsize=(8, 5))
        for c in shown:
            line, = axes.plot(c["t"], c["distance"], ".-", label=f"{curve(c)}, {title(c)}")
            axes.plot(c["t"], c["floor"], ":", color=line.get_color())
        axes.set_xscale("symlog", linthresh=min(t for c in shown for t in c["t"] if t > 0))
        axes.set(yscale="log", xlabel="level t", ylabel="Frechet distance; dotted: its floor")
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.12))
        return figure
    plotted(cells.png, draw)


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "manifold")
        shown = cells.cells if args.plot_only else compute(args, cells)
        table(shown)
        draw_plot(cells, shown)


if __name__ == "__main__":
    main()
