"""The Frechet Inception distance (FID) as EDM and the original TensorFlow code compute it.

    python fid.py samples/ --ref cifar10                # of images on disk, as of sample.py
    python fid.py draw1/ draw2/ draw3/ --ref cifar10    # three draws: lowest, mean and spread

The network whose features it compares: util/inception.py.
"""
import contextlib
import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import Images, load
from util.cli import Parser, UserError, add_device_option, number, progress, reason, say, warn
from util.files import atomic_write, or_a_warning, refuse_special
from util.inception import WIDTH, load_inception

# What statistics say of themselves, beside the mean mu and the covariance sigma, and its type
FACTS = {"num": int, "source": str, "resize": str, "weights": str, "size": str}


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians: means [D] and
    covariances [D, D], arrays or tensors. Computed in float64.

    Where C = B B^T, the trace of the root is the sum of the singular values of B1^T B2. This
    takes no root of a rounding error, so that singular covariances need nothing special.
    """
    mu1 = torch.as_tensor(mu1, dtype=torch.float64)
    mu2 = torch.as_tensor(mu2, dtype=torch.float64)
    cov1 = torch.as_tensor(cov1, dtype=torch.float64)
    cov2 = torch.as_tensor(cov2, dtype=torch.float64)
    trace_of_root = torch.linalg.svdvals(factor(cov1).T @ factor(cov2)).sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_of_root
    return distance.clamp(min=0).item()                         # rounding may leave -1e-9


def factor(cov: torch.Tensor) -> torch.Tensor:
    """B of C = B B^T: float64 [D, the rank of C]."""
    values, vectors = torch.linalg.eigh(cov)
    rounding = values.max() * len(values) * torch.finfo(values.dtype).eps
    significant = values > rounding
    return vectors[:, significant] * values[significant].sqrt()


@torch.no_grad()
def mean_and_covariance(batches, net) -> tuple[np.ndarray, np.ndarray, int]:
    """Of the features of net [B, D] over uint8 batches [B, C, H, W]: float64 arrays [D] and
    [D, D], and the number of images. It takes one pass, which stores no features. Raises
    UserError for fewer than two images."""
    n = 0
    total = 0
    outer = 0
    origin = None
    for images in batches:
        features = net(images).double()                         # [B, D]
        if origin is None:
            # Sums are taken around a point near the mean: far from it, digits would cancel.
            origin = features.mean(0)
        centered = features - origin
        n += len(centered)
        total = total + centered.sum(0)                         # [D]
        outer = outer + centered.T @ centered                   # [D, D]
    if n < 2:
        raise UserError(f"a covariance takes at least two images, not {n}")
    cov = (outer - torch.outer(total, total) / n) / (n - 1)
    return (origin + total / n).cpu().numpy(), cov.cpu().numpy(), n


# Statistics: a dict of mu, sigma and FACTS, named as in the files of EDM and pytorch-fid


def read_input(spec: str, resolution: int | None = None, keep: bool = True) -> dict | Images:
    """The statistics in the file spec, or else the images that data.load finds there. keep: as
    for data.load. Raises UserError."""
    path = Path(spec)
    if path.suffix == ".npz" and path.exists():
        statistics = read_statistics(path)
        if statistics is not None:
            return statistics
    images = load(spec, resolution, keep=keep)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        asked = len(json.loads((path / "draw.json").read_text())["seeds"])      # of sample.py
        if len(images.images) != asked:
            warn(f"warning: {spec} holds {len(images.images)} of the {asked} images of its draw")
    return images


def statistics_of(inputs: dict | Images, spec: str, net, settings: dict, batch: int = 256,
                  num: int | None = None, folder=None) -> dict:
    """The statistics of what read_input returned for spec: statistics as they are, or else
    those of its images. UserError where they were computed with other settings.

    net: images -> features; see load_inception. settings: the net's "resize" rule and the
    digest of its "weights". batch: images at a time. num: a fixed draw of so many images;
    None: all.
    folder: statistics of all images are cached there, for the same pixels and settings.
    """
    if isinstance(inputs, dict):
        check_settings(inputs, spec, settings)
        return inputs
    source = str(Path(spec).parent / inputs.name)
    if spec == "cifar10":
        source += ", training split"
    h, w = inputs.images.shape[2:]
    facts = {"source": source, **settings, "size": f"{h} x {w}"}
    if folder is None:
        return compute_statistics(inputs.images, net, facts, batch, num)
    path = cache_file(folder, inputs, facts)
    if path.exists():
        return {**read_statistics(path), "source": source}
    statistics = compute_statistics(inputs.images, net, facts, batch, num)
    with or_a_warning(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            np.savez(f, **statistics)
    return statistics


def check_settings(statistics: dict, spec: str, settings: dict):
    """Raises UserError where statistics say that they were computed with other settings."""
    for name, value in settings.items():
        if statistics.get(name, value) != value:
            raise UserError(f"{spec} has the {name} {statistics[name]}, not {value}: give "
                            "images, or the same option")


def compute_statistics(images: torch.Tensor, net, facts: dict, batch: int,
                       num: int | None) -> dict:
    """The statistics of num images or all: the same draw each time, not the first, which may
    be of one class."""
    order = np.random.RandomState(0).permutation(len(images))
    chosen = torch.from_numpy(np.sort(order[:num]))
    indices = progress(chosen.split(batch), facts["source"], unit=" batches")
    mu, sigma, n = mean_and_covariance((images[index] for index in indices), net)
    return {"mu": mu, "sigma": sigma, "num": n, **facts}


def cache_file(folder, data: Images, facts: dict) -> Path:
    """Where the statistics of these pixels are cached, whatever they are called."""
    settings = sorted((name, value) for name, value in facts.items() if name != "source")
    key = repr((data.facts()["digest"], settings))
    return Path(folder, f"fid-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz")


def read_statistics(path: Path) -> dict | None:
    """The statistics in an .npz: a finite mean mu [2048], a covariance sigma [2048, 2048], to
    the rounding of float32, and what it has of FACTS. None where it holds something else.
    Raises UserError."""
    refuse_special(path)
    statistics = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "mu" not in archive.files or "sigma" not in archive.files:
                return None
            for name in ("mu", "sigma", *FACTS):
                if name not in archive.files:
                    continue
                if archive.zip.getinfo(f"{name}.npy").file_size > 2 ** 26:
                    raise ValueError("it unpacks to more than statistics need")
                as_type = FACTS.get(name, np.float64)
                statistics[name] = as_type(archive[name])
        if not is_mean(statistics["mu"]) or not is_covariance(statistics["sigma"]):
            raise ValueError(f"FID takes a finite mu [{WIDTH}] and a sigma [{WIDTH}, {WIDTH}] "
                             "that is symmetric, without negative eigenvalues")
    except Exception as error:                                  # zip, zlib and NumPy differ
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    statistics.setdefault("source", str(path))
    return statistics


def is_mean(mu: np.ndarray) -> bool:
    """Whether mu [WIDTH] is finite."""
    return mu.shape == (WIDTH,) and bool(np.isfinite(mu).all())


def is_covariance(sigma: np.ndarray) -> bool:
    """Whether sigma [WIDTH, WIDTH] is symmetric without negative eigenvalues, up to rounding:
    with any other the FID could be negative."""
    if sigma.shape != (WIDTH, WIDTH):
        return False
    unit = sigma / max(np.abs(sigma).max(), 1e-300)             # large values would overflow
    is_symmetric = np.abs(unit - unit.T).max() < 1e-5           # False for NaN
    if not is_symmetric:
        return False
    eigenvalues = np.linalg.eigvalsh(unit)                      # in ascending order
    return bool(eigenvalues[0] >= -1e-5 * eigenvalues[-1])


# The command line


def main():
    p = Parser(description="The FID of images on disk to a reference.")
    a = p.add_argument
    a("samples", nargs="+",
      help="images as train.py takes them, or a statistics file (.npz); transparent parts go "
           "on white. Several are draws of one model")
    a("--ref", required=True,
      help="the reference, likewise; its statistics are cached in data/")
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
        # All is read before the network, so that a wrong name is an error at once.
        reference = read_input(args.ref, args.resolution)
        samples = [read_input(spec, args.resolution, keep=False) for spec in args.samples]
        inception, digest = load_inception(args.weights, args.device)
        net = partial(inception, resize=args.resize)
        settings = {"resize": args.resize, "weights": digest}
        reference = statistics_of(reference, args.ref, net, settings, args.batch,
                                  folder="data")
        draws = []
        for inputs, spec in zip(samples, args.samples):
            draws.append(statistics_of(inputs, spec, net, settings, args.batch, args.images))
        report(draws, reference, args.json)


def report(draws: list, reference: dict, as_json: bool):
    """Prints the distances of statistics, and warnings where they mean little."""
    fids = []
    for draw in draws:
        fids.append(frechet_distance(draw["mu"], draw["sigma"],
                                     reference["mu"], reference["sigma"]))
    draws = [facts_of(draw) for draw in draws]
    reference = facts_of(reference)
    warn_where_unfair(draws, reference)
    if as_json:
        results = []
        for fid, draw in zip(fids, draws):
            results.append({"fid": fid, "samples": draw, "reference": reference})
        say(json.dumps(results))
        return
    for fid, draw in zip(fids, draws):
        say(f"FID {fid:.4f}: {in_words(draw)}")
    if len(fids) > 1:
        say(f"the lowest (the paper's convention) {min(fids):.4f}; "
            f"mean {np.mean(fids):.4f} +- {np.std(fids, ddof=1):.4f}")
    say(f"reference: {in_words(reference)}")


def facts_of(statistics: dict) -> dict:
    """Statistics without mu and sigma."""
    return {name: value for name, value in statistics.items() if name in FACTS}


def in_words(facts: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def warn_where_unfair(draws: list, reference: dict):
    """Warns of few images and of different sizes. draws, reference: facts of statistics."""
    fewest = min(draw.get("num", 50000) for draw in draws)
    if fewest < 50000 or reference.get("num", 2048) < 2048:
        warn("warning: the FID of fewer than 50,000 generated images is higher, and of fewer "
             "than 2,048 on either side it means little: compare it only at the same numbers")
    sizes = {facts["size"] for facts in (*draws, reference) if "size" in facts}
    if len(sizes) > 1:
        warn("warning: images of different sizes make no fair comparison: give --resolution")


if __name__ == "__main__":
    main()
