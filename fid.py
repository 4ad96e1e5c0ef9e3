"""The Frechet Inception distance (FID) as EDM and the original TensorFlow code compute it.

    python fid.py samples/ --ref cifar10                      # images on disk
    python fid.py --ckpt run/ema.pt --ref cifar10             # sample and score, three draws
    python fid.py --ckpt any/ema.pt --ref cifar10 --bnr 0 0.5 # a network of --bnr any, by ratio
    torchrun --nproc_per_node=8 fid.py --ckpt run/ema.pt --ref cifar10          # on eight GPUs

Images are read as train.py reads them. So transparent parts are on white; EDM's and pytorch-fid's
readers leave alpha out, and FIDs of transparent images differ.
"""
import hashlib
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import load
from inception import WIDTH, load_inception
from model import load_model
from sample import generate, sampler, sampler_options, sampling_path
from util import (Parser, UserError, any_rank, atomic_write, full_float32, number, or_a_warning,
                  printable, process_group, rank, rank_0_first, refuse_special, say, to_uint8, warn,
                  world_size)

FACTS = {"num": int, "source": str, "resize": str, "weights": str, "size": str}  # of statistics


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians: means [D] and
    covariances [D, D], arrays or tensors. Computed in float64.

    Where C = B B^T, the trace of the root is the sum of the singular values of B1^T B2. This takes
    no root of a rounding error, so that singular covariances need nothing special.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mu1, cov1, mu2, cov2))
    shared = torch.linalg.svdvals(factor(cov1).T @ factor(cov2)).sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared
    return distance.clamp(min=0).item()                         # rounding may leave -1e-9


def factor(cov):
    """B of C = B B^T: float64 [D, the rank of C]."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps  # not rounding
    return vectors[:, kept] * values[kept].sqrt()


@torch.no_grad()
def mean_and_covariance(batches, net, batch=256):
    """Of the features of net [B, D] over uint8 batches [B, C, H, W], in one pass that keeps no
    features: float64 arrays [D] and [D, D], and the number of images.

    In a process group each process gives its share of the images, which may be none, and each gets
    the result for all. Raises UserError for fewer than two images.
    """
    n, total, outer, mine = 0, 0, 0, None
    for images in (part for some in batches for part in some.split(batch)):
        f = net(images).double()
        if n == 0:                          # sums are taken around a point near the mean: far from
            origin = f.mean(0)              # it, large numbers would cancel and lose digits
        f = f - origin
        n, total, outer = n + len(f), total + f.sum(0), outer + f.T @ f
    if n:
        scatter = outer - torch.outer(total, total) / n
        mine = n, (origin + total / n).cpu(), scatter.cpu()
    parts = [mine]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, mine)
    parts = [part for part in parts if part]
    n = sum(m for m, _, _ in parts)
    if n < 2:
        raise UserError("one image has no covariance: give at least two" if n else
                        "there are no images to take statistics of")
    mean = sum(m * mu for m, mu, _ in parts) / n
    scatter = sum(s + m * torch.outer(mu - mean, mu - mean) for m, mu, s in parts)
    return mean.numpy(), (scatter / (n - 1)).numpy(), n


def statistics(batches, net, resize, digest, source, batch=256):
    """Uint8 batches [B, 1 or 3, H, W] -> mu, sigma and how they were made, in the layout of the
    statistics files of EDM and pytorch-fid. net, digest: see load_inception."""
    mu, sigma, n = mean_and_covariance(batches, partial(net, resize=resize), batch)
    return {"mu": mu, "sigma": sigma, "num": n, "source": source, "resize": resize,
            "weights": digest}


# Files

def opened(spec, resolution=None, keep=True):
    """The statistics in spec, a dict, or else its images, data.Images. Raises UserError."""
    path = Path(spec)
    stats = read_statistics(path) if path.suffix == ".npz" and path.exists() else None
    if stats:
        return stats
    if path.suffix == ".pkl":
        raise UserError(f"{path} could run code: give an .npz; of EDM2's, if you trust it, "
                        f"np.savez('x.npz', **pickle.load(open({spec!r}, 'rb'))['fid'])")
    try:
        return load(spec, resolution, keep=keep)
    except UserError as e:
        if f", {WIDTH}]" not in str(e):
            raise
        raise UserError(f"{e}; of features give an .npz of mu, their mean, and sigma, "
                        "np.cov(features, rowvar=False)") from None


def read_statistics(path):
    """An .npz of mu [2048] and sigma [2048, 2048] -> dict; None where it holds others. Raises
    UserError."""
    refuse_special(path)
    try:
        with np.load(path, allow_pickle=False) as z:
            names = [name for name in ("mu", "sigma", *FACTS) if name in z.files]
            if names[:2] != ["mu", "sigma"]:
                return None
            if max(z.zip.getinfo(f"{name}.npy").file_size for name in names) > 2 ** 26:
                raise ValueError("it unpacks to more than statistics need")
            found = {name: FACTS.get(name, np.float64)(z[name]) for name in names}
    except Exception as e:                                      # zip, zlib and NumPy differ
        raise UserError(f"{path} cannot be read: {' '.join(str(e).split())}") from None
    mu, sigma = torch.from_numpy(found["mu"]), torch.from_numpy(found["sigma"])
    if (mu.shape, sigma.shape) != ((WIDTH,), (WIDTH, WIDTH)) or not is_covariance(sigma) \
            or not mu.isfinite().all():
        raise UserError(f"{path} holds mu {list(mu.shape)} and sigma {list(sigma.shape)}: FID "
                        f"takes a finite mu [{WIDTH}] and a covariance [{WIDTH}, {WIDTH}] "
                        "(symmetric, no negative eigenvalue)")
    return {"num": None, "source": str(path), **found}


def is_covariance(sigma):
    """Whether float64 [D, D] is symmetric and positive semi-definite, to float32's rounding."""
    sigma = sigma / sigma.abs().max().clamp(min=1e-300)         # or large values would overflow
    if not (sigma - sigma.T).abs().max() < 1e-5:                # NaN is not, either
        return False
    values = torch.linalg.eigvalsh(sigma)                       # in ascending order
    return bool(values[0] >= -1e-5 * values[-1])


def statistics_of(found, spec, num=None, size=None, folder=None, **how):
    """The statistics of what `opened` has found in spec, of num images or all. UserError where they
    are made in another way than is asked for. folder: they are kept there, and reused for the very
    same pixels, resize rule and weights. how: net, resize, digest and batch of `statistics`."""
    saved = isinstance(found, dict)
    made = found if saved else {"size": "{} x {}".format(*found.images.shape[2:])}
    for what, asked in ("size", size), ("resize", how["resize"]), ("weights", how["digest"]):
        if asked and made.get(what, asked) != asked:
            raise UserError(f"{spec} has the {what} {made[what]}, not {asked}: give other images "
                            "or the same option")
    if saved:
        if "resize" not in found and rank() == 0:
            warn(f"warning: {spec} does not say how it was made: resize rule, weights and size")
        return found
    source = str(Path(spec).parent / found.name) + ", training split" * (spec == "cifar10")
    if folder:
        key = repr((found.facts()["digest"], made["size"], how["resize"], how["digest"])).encode()
        name = f"fid-{Path(spec).resolve().stem}-{hashlib.sha256(key).hexdigest()[:12]}.npz"
        kept = Path(folder, name)
        if not any_rank([] if kept.exists() else [1]):          # each machine may have its own disk
            return {**read_statistics(kept), "source": source}
    chosen = np.sort(np.random.RandomState(0).permutation(len(found.images))[:num])
    mine = torch.from_numpy(chosen[rank()::world_size()]).split(how["batch"])
    bar = tqdm(mine, printable(source), unit=" batches", disable=rank() > 0)
    stats = {**statistics((found.images[i] for i in bar), source=source, **how), **made}
    if folder and rank() == 0:
        with or_a_warning(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(kept) as f:
                np.savez(f, **stats)
            warn(f"statistics kept as {kept}")
    return stats


def drawn_batches(net, path, shape, first, num, device, batch, **options):
    """Yields the images of seeds first to first + num - 1, uint8 [B, C, H, W]; this process's
    share. options: see sample.generate."""
    seeds = range(first + rank(), first + num, world_size())
    with tqdm(desc=f"seeds {first}-{first + num - 1}", total=len(seeds), unit=" images",
              disable=rank() > 0) as bar:
        for x in generate(net, path, shape, seeds, device, batch, **options):
            yield to_uint8(x)
            bar.update(len(x))


# The command line

def main():
    p = Parser(description="The FID of images on disk, or of a model's samples, to a reference.")
    a = p.add_argument
    a("samples", nargs="?", help="a folder, zip, .npy or .npz of images, cifar10, leaves, or "
                                 "a statistics file (.npz); transparent parts go on white")
    a("--ref", required=True, help="the reference, likewise; its statistics are kept in data/")
    a("--resolution", type=number(int, 1, 4096),
      help="side that both are cropped and resized to (default: as they are, or the model's)")
    a("--images", type=number(int, 2), help="images to score, at most (default 50000)")
    a("--batch", type=number(int, 1), default=256, help="images at a time (default 256)")
    a("--weights", help="the network's published weights (default: fetched once into data/)")
    a("--resize", choices=["tf1", "pytorch"], default="tf1",
      help="tf1: the original's and EDM's; pytorch: pytorch-fid's (default tf1)")
    a("--json", action="store_true", help="print JSON: an object, or with --bnr a list of them")
    a("--ckpt", help="instead of samples: draw them from this model, ema.pt of train.py")
    sampling = p.add_argument_group("for --ckpt, but the device for all")
    a = sampling.add_argument
    a("--draws", type=number(int, 1), default=3, help="each with seeds of its own (default 3)")
    a("--bnr", type=number(float, 0), nargs="+", metavar="R",
      help="for a model of --bnr any: the ratios to score, 0 to 10 (default 0.5)")
    sampler_options(sampling)
    args = p.parse_args()
    if bool(args.samples) == bool(args.ckpt):
        p.error("give either samples or --ckpt")
    for action in () if args.ckpt else sampling._group_actions:
        if action.dest != "device" and getattr(args, action.dest) != action.default:
            p.error(f"{action.option_strings[0]} is for --ckpt: images on disk are as they are")
    if args.bnr and args.path:
        p.error("--bnr and --path are two ways to choose the path: give one of them")
    with process_group(), p.one_line_errors():
        full_float32()
        report(score_model(args) if args.ckpt else score_images(args), args)


def score_images(args):
    """The result to print, in a list. Raises UserError."""
    samples = opened(args.samples, args.resolution, keep=False)
    if args.images and isinstance(samples, dict):
        raise UserError(f"--images {args.images}: {args.samples} holds statistics, not the images")
    size = args.resolution and f"{args.resolution} x {args.resolution}"
    ref, about, how = reference(args, args.resolution, size)
    stats = statistics_of(samples, args.samples, args.images or 50000, size, **how)
    return [{"fid": distance(stats, ref), "samples": stats["source"], "generated": stats["num"],
             "size": stats.get("size"), **about}]


def score_model(args):
    """The results to print, one for each ratio. Raises UserError."""
    net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
    options, nfe = sampler(args, net, checkpoint)
    paths = [sampling_path(checkpoint, bnr, args.path) for bnr in args.bnr or [None]]
    facts, num = checkpoint["data"], args.images or 50000
    if facts.get("latents") or facts["shape"][0] not in (1, 3):
        kind = "floats" if facts.get("latents") else f"images of {facts['shape'][0]} channels"
        raise UserError(f"{args.ckpt} makes {kind}: FID needs images of 1 or 3")
    if net.classes:
        options["counts"] = facts.get("counts")                 # as often as the data have them
    size = "{} x {}".format(*facts["shape"][1:])
    ref, about, how = reference(args, args.resolution or checkpoint["options"]["resolution"], size)
    about.update(samples=args.ckpt, generated=num, size=size, nfe=nfe, precision=args.precision,
                 path=args.path)
    about.update((k, v) for k, v in options.items()
                 if k not in ("colour", "counts") and v != math.inf)
    results = []
    for bnr, path in zip(args.bnr or [None], paths):
        fids = []
        for first in range(0, args.draws * num, num):
            batches = drawn_batches(net, path, facts["shape"], first, num, args.device, args.batch,
                                    **options)
            fids.append(distance(statistics(batches, source=args.ckpt, **how), ref))
            if rank() == 0:                                     # what an interruption leaves
                warn(f"draw {len(fids)} of {args.draws}: FID {fids[-1]:.4f}")
        std = float(np.std(fids, ddof=1)) if len(fids) > 1 else None
        results.append({"bnr": bnr, "fid": min(fids), "draws": fids, "mean": float(np.mean(fids)),
                        "std": std, **about})
    return results


def reference(args, resolution, size):
    """The reference's statistics, what a result says of it, and the keywords of `statistics`."""
    with rank_0_first():                                        # it makes or fetches them for all
        found = opened(args.ref, resolution or None)
        net, digest = load_inception(args.weights, args.device)
    how = {"net": net, "resize": args.resize, "digest": digest, "batch": args.batch}
    ref = statistics_of(found, args.ref, size=size, folder="data", **how)
    return ref, {"reference": ref["source"], "reference_num": ref["num"],
                 "reference_size": ref.get("size"), "resize": args.resize,
                 "weights_sha256": digest}, how


def distance(stats, ref):
    return frechet_distance(stats["mu"], stats["sigma"], ref["mu"], ref["sigma"])


def report(results, args):
    """Prints the results, and warnings where the FID of so few images means little."""
    if rank() > 0:
        return
    r = results[0]
    if (r["generated"] or 50000) < 50000 or (r["reference_num"] or 2048) < 2048:
        warn("warning: the FID of fewer than 50,000 generated images is higher, and of fewer than "
             "2,048 on either side it means little: compare it only at the same numbers")
    if r["size"] and r["reference_size"] not in (None, r["size"]):
        warn("warning: images of different sizes make no fair comparison: give --resolution")
    if args.json:
        say(json.dumps(results if args.bnr else r))
        return
    for row in results if args.ckpt else ():
        ratio = f"BNR {row['bnr']:g}: " if args.bnr else ""
        spread = "" if row["std"] is None else f" +- {row['std']:.4f}"
        say(f"{ratio}draws {', '.join(f'{fid:.4f}' for fid in row['draws'])}; lowest "
            f"{row['fid']:.4f} (the paper's convention), mean {row['mean']:.4f}{spread}")
    if args.ckpt:
        names = "solver steps nfe churn s_min s_max s_noise path label precision".split()
        known = (name for name in names if r.get(name) is not None)
        say("sampler: " + ", ".join(f"{name} {r[name]}" for name in known))
    sides = []
    for n, source, size in ((r["generated"], r["samples"], r["size"]),
                            (r["reference_num"], r["reference"], r["reference_size"])):
        number = "an unknown number of" if n is None else f"{n:,}"
        sides.append(f"{number} images of {source}" + (f" at {size}" if size else ""))
    fid = "of " if args.bnr else f"{r['fid']:.4f}   "
    say(f"FID {fid}{' against '.join(sides)}; resize {r['resize']}, weights "
        f"{r['weights_sha256'][:8]}")


if __name__ == "__main__":
    main()
