"""The Frechet Inception distance (FID) as EDM and the original TensorFlow code compute it.

    python fid.py samples/ --ref cifar10                 # of images on disk, those of sample.py
    python fid.py draw1/ draw2/ draw3/ --ref cifar10     # three draws: the lowest, mean and spread
"""
import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import load
from inception import WIDTH, load_inception
from util import (Parser, UserError, add_device_option, atomic_write, number, or_a_warning,
                  printable, reason, refuse_special, say, warn)

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
def mean_and_covariance(batches, net):
    """Of the features of net [B, D] over uint8 batches [B, C, H, W], in one pass that keeps no
    features: float64 arrays [D] and [D, D], and the number of images. Raises UserError for fewer
    than two images."""
    n, total, outer, origin = 0, 0, 0, None
    for images in batches:
        f = net(images).double()
        origin = f.mean(0) if origin is None else origin        # sums are taken around a point near
        f = f - origin                      # the mean: far from it, large numbers would cancel
        n, total, outer = n + len(f), total + f.sum(0), outer + f.T @ f
    if n < 2:
        raise UserError(f"a covariance takes at least two images, not {n}")
    cov = (outer - torch.outer(total, total) / n) / (n - 1)
    return (origin + total / n).cpu().numpy(), cov.cpu().numpy(), n


def opened(spec, resolution=None, keep=True):
    """The statistics in spec, a dict, or else its images, data.Images. Raises UserError."""
    path = Path(spec)
    stats = read_statistics(path) if path.suffix == ".npz" and path.exists() else None
    return stats or load(spec, resolution, keep=keep)


def read_statistics(path):
    """An .npz of a finite mean mu [2048] and a covariance sigma [2048, 2048], to float32's rounding
    -> dict; None where it holds others. Raises UserError."""
    refuse_special(path)
    try:
        with np.load(path, allow_pickle=False) as z:
            names = [name for name in ("mu", "sigma", *FACTS) if name in z.files]
            if names[:2] != ["mu", "sigma"]:
                return None
            if max(z.zip.getinfo(f"{name}.npy").file_size for name in names) > 2 ** 26:
                raise ValueError("it unpacks to more than statistics need")
            found = {name: FACTS.get(name, np.float64)(z[name]) for name in names}
        mu, sigma = found["mu"], found["sigma"]
        unit = sigma / max(np.abs(sigma).max(), 1e-300)         # or large values would overflow
        values = np.linalg.eigvalsh(unit)                       # in ascending order
        if mu.shape != (WIDTH,) or sigma.shape != (WIDTH, WIDTH) or not np.isfinite(mu).all() \
                or not np.abs(unit - unit.T).max() < 1e-5 or not values[0] >= -1e-5 * values[-1]:
            raise ValueError(f"FID takes a finite mu [{WIDTH}] and a sigma [{WIDTH}, {WIDTH}] that "
                             "is symmetric, without negative eigenvalues")
    except Exception as e:                                      # zip, zlib and NumPy differ
        raise UserError(f"{path} cannot be read: {reason(e)}") from None
    return {**found, "source": found.get("source", str(path))}


def statistics_of(found, spec, net, made, batch=256, num=None, folder=None):
    """The statistics of what `opened` has found in spec, of num images or all: mu, sigma and how
    they were made, named as in the files of EDM and pytorch-fid. net: see load_inception.

    made: the net's "resize" rule and the digest of its "weights"; UserError where what is found was
    made otherwise. folder: statistics are kept there, and reused for the same pixels and `made`.
    """
    if isinstance(found, dict):
        for what, asked in made.items():
            if found.get(what, asked) != asked:
                raise UserError(f"{spec} has the {what} {found[what]}, not {asked}: give images, "
                                "or the same option")
        return found
    facts = {**made, "size": "{} x {}".format(*found.images.shape[2:])}
    source = str(Path(spec).parent / found.name) + ", training split" * (spec == "cifar10")
    if folder:
        key = repr((found.facts()["digest"], sorted(facts.items()))).encode()
        kept = Path(folder, f"fid-{hashlib.sha256(key).hexdigest()[:16]}.npz")
        if kept.exists():
            return {**read_statistics(kept), "source": source}
    chosen = np.sort(np.random.RandomState(0).permutation(len(found.images))[:num])
    bar = tqdm(torch.from_numpy(chosen).split(batch), printable(source), unit=" batches")
    mu, sigma, n = mean_and_covariance((found.images[i] for i in bar), net)
    stats = {"mu": mu, "sigma": sigma, "num": n, "source": source, **facts}
    if folder:
        with or_a_warning(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(kept) as f:
                np.savez(f, **stats)
    return stats


def main():
    p = Parser(description="The FID of images on disk to a reference.")
    a = p.add_argument
    a("samples", nargs="+", help="images as train.py takes them, or a statistics file (.npz); "
                                 "transparent parts go on white. Several are draws of one model")
    a("--ref", required=True, help="the reference, likewise; its statistics are kept in data/")
    a("--resolution", type=number(int, 1, 4096),
      help="side that both are cropped and resized to (default: as they are)")
    a("--images", type=number(int, 2), default=50000, help="images to score (default 50000)")
    a("--batch", type=number(int, 1), default=256, help="images at a time (default 256)")
    a("--weights", help="the network's published weights (default: fetched once into data/)")
    a("--resize", choices=["tf1", "pytorch"], default="tf1",
      help="tf1: the original's and EDM's; pytorch: pytorch-fid's (default tf1)")
    a("--json", action="store_true", help="print a JSON list with an object for each draw")
    add_device_option(p)
    args = p.parse_args()
    with p.one_line_errors():
        samples = [opened(spec, args.resolution, keep=False) for spec in args.samples]
        found = opened(args.ref, args.resolution)
        net, digest = load_inception(args.weights, args.device)
        net, made = partial(net, resize=args.resize), {"resize": args.resize, "weights": digest}
        ref = statistics_of(found, args.ref, net, made, args.batch, folder="data")
        draws = [statistics_of(one, spec, net, made, args.batch, args.images)
                 for one, spec in zip(samples, args.samples)]
        report(draws, ref, args.json)


def report(draws, ref, as_json):
    """Prints the distances of statistics, and warnings where they mean little."""
    fids = [frechet_distance(d["mu"], d["sigma"], ref["mu"], ref["sigma"]) for d in draws]
    *sides, ref = [{k: v for k, v in d.items() if k in FACTS} for d in (*draws, ref)]
    if min(d.get("num", 50000) for d in sides) < 50000 or ref.get("num", 2048) < 2048:
        warn("warning: the FID of fewer than 50,000 generated images is higher, and of fewer than "
             "2,048 on either side it means little: compare it only at the same numbers")
    if len({d["size"] for d in (*sides, ref) if "size" in d}) > 1:
        warn("warning: images of different sizes make no fair comparison: give --resolution")
    if as_json:
        say(json.dumps([{"fid": fid, "samples": side, "reference": ref}
                        for fid, side in zip(fids, sides)]))
        return
    for fid, side in zip(fids, sides):
        say(f"FID {fid:.4f}: {', '.join(f'{k} {v}' for k, v in side.items())}")
    if len(fids) > 1:
        say(f"the lowest (the paper's convention) {min(fids):.4f}; mean {np.mean(fids):.4f} +- "
            f"{np.std(fids, ddof=1):.4f}")
    say(f"reference: {', '.join(f'{k} {v}' for k, v in ref.items())}")


if __name__ == "__main__":
    main()
