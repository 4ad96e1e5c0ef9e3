"""The Frechet Inception distance (FID) as EDM and the original TensorFlow code compute it.

    python fid.py samples/ --ref cifar10                      # images on disk
    python fid.py --ckpt run/ema.pt --ref cifar10             # sample and score, three draws
    python fid.py --ckpt any/ema.pt --ref cifar10 --bnr 0 0.5 # a network of --bnr any, by ratio
    torchrun --nproc_per_node=8 -- fid.py --ckpt run/ema.pt --ref cifar10       # on eight GPUs
"""
import contextlib
import hashlib
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import bounded, decode, fingerprint, image_files, load, readable
from model import load_model
from sample import generate, sampler, sampler_options, sampling_path
from util import (Parser, UserError, atomic_write, crop_and_resize, fetch, full_float32, number,
                  or_a_warning, printable, process_group, rank, rank_0_first, refuse_special, say,
                  to_uint8, warn, world_size)

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_SHA256 = "6726825d"                     # its first digits
WIDTH = 2048                                    # features of an image
NATIVE_RESOLUTION = {"cifar10": 32, "leaves": 16}               # of the data sets with a name
VERSION = 3                                     # of how images are read, for what is kept of them


# The distance and the statistics that it needs

def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians: means [D] and
    covariances [D, D], arrays or tensors. Computed in float64.

    Where C = B B^T, the trace of the root is the sum of the singular values of B1^T B2. This takes
    no root of a rounding error, so that singular covariances need nothing special.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mu1, cov1, mu2, cov2))
    shared = torch.linalg.svdvals(factor(cov1).T @ factor(cov2)).sum()
    return ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared).item()


def factor(cov):
    """B of C = B B^T: float64 [D, the rank of C]."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps  # not rounding
    return vectors[:, kept] * values[kept].sqrt()


@torch.no_grad()
def mean_and_covariance(batches, net, batch=256):
    """Of the features of net [B, D] over uint8 batches [B, C, H, W], in one pass that keeps no
    features: float64 arrays [D] and [D, D], and the number of images.

    In a process group each process gives its share of the images, and each gets the result for all.
    Raises UserError for fewer than two images.
    """
    n, mean, scatter = 0, torch.zeros(1), torch.zeros(1, 1)
    for images in (part for some in batches for part in some.split(batch)):
        f = net(images).double()
        if n == 0:                          # sums are taken around a point near the mean: far from
            origin = f.mean(0)              # it, large numbers would cancel and lose digits
            total, outer = torch.zeros_like(origin), torch.zeros_like(f.T @ f)
        f = f - origin
        n, total, outer = n + len(f), total + f.sum(0), outer + f.T @ f
    if n:
        mean, scatter = origin + total / n, outer - torch.outer(total, total) / n
    if world_size() > 1:
        n, mean, scatter = merged(n, mean, scatter)
    if n < 2:
        raise UserError("one image has no covariance: give at least two" if n else
                        "there are no images to take statistics of")
    return mean.cpu().numpy(), (scatter / (n - 1)).cpu().numpy(), n


def merged(n, mean, scatter):
    """The number of images, mean and scatter matrix of each process -> those of all together. A
    process may have no images."""
    parts = [None] * world_size()
    dist.all_gather_object(parts, (n, mean.cpu(), scatter.cpu()))
    parts = [part for part in parts if part[0]]
    if not parts:
        return n, mean, scatter
    n = sum(m for m, _, _ in parts)
    mean = sum(m * mu for m, mu, _ in parts) / n
    return n, mean, sum(s + m * torch.outer(mu - mean, mu - mean) for m, mu, s in parts)


def statistics(batches, net, resize, digest, source, batch=256):
    """Uint8 batches [B, 1 or 3, H, W] -> mu, sigma and how they were made, in the layout of the
    statistics files of EDM and pytorch-fid. net, digest: see load_inception."""
    sizes = set()

    def noted():
        for images in batches:
            sizes.add("{} x {}".format(*images.shape[2:]))
            yield images
    mu, sigma, n = mean_and_covariance(noted(), partial(net, resize=resize), batch)
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, sizes)
        sizes = set.union(*parts)
    return {"mu": mu, "sigma": sigma, "num": n, "source": source, "resize": resize,
            "weights": digest, "size": sizes.pop() if len(sizes) == 1 else "several sizes"}


# The network

class InceptionV3(nn.Module):
    """The FID network: uint8 [B, 1 or 3, H, W] -> float32 features [B, 2048].

    resize: how images come to 299 x 299, bilinear. "tf1" is the original's: source pixel = target
    pixel * size / 299. "pytorch" is pytorch-fid's: with half-pixel centres. The parameters have the
    names of the published port, pt_inception-2015-12-05.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2, 0), Conv(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Conv(32, 64, 3), Conv(64, 80)
        self.Conv2d_4a_3x3, self.Mixed_5b = Conv(80, 192, 3, 1, 0), InceptionA(192, 32)
        self.Mixed_5c, self.Mixed_5d = InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a, self.Mixed_6b = InceptionB(), InceptionC(128)
        self.Mixed_6c, self.Mixed_6d = InceptionC(160), InceptionC(160)
        self.Mixed_6e, self.Mixed_7a = InceptionC(192), InceptionD()
        self.Mixed_7b, self.Mixed_7c = InceptionE(1280, average_pool), InceptionE(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)                         # in the file; FID does not use it

    def forward(self, images, resize="tf1"):
        if images.shape[1] not in (1, 3):
            raise UserError(f"FID needs images of 1 or 3 channels, not {images.shape[1]}")
        x = images.to(self.fc.weight.device).float().expand(-1, 3, -1, -1)
        if resize == "tf1":
            x = (resize_tf1_along(resize_tf1_along(x, 2), 3) - 128) / 128
        elif resize == "pytorch":
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) * (2 / 255) - 1
        else:
            raise ValueError(f"resize must be tf1 or pytorch, not {resize}")
        with torch.autocast(x.device.type, enabled=False):
            x = x.contiguous(memory_format=torch.channels_last)                 # [B, 3, 299, 299]
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))   # [B, 64, 147, 147]
            x = F.max_pool2d(x, 3, 2)                                           # [B, 64, 73, 73]
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                       # [B, 192, 71, 71]
            x = F.max_pool2d(x, 3, 2)                                           # [B, 192, 35, 35]
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                  # [B, 288, 35, 35]
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                  # [B, 768, 17, 17]
            x = self.Mixed_6e(self.Mixed_6d(x))                                 # [B, 768, 17, 17]
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                  # [B, 2048, 8, 8]
            return x.mean((2, 3))                                               # [B, 2048]


def resize_tf1_along(x, dim, size=299):
    """TensorFlow 1's bilinear resize of one dimension: no half-pixel centres; the right neighbour
    of the last pixel is that pixel."""
    n = x.shape[dim]
    source = torch.arange(size, device=x.device) * (n / size)
    left = source.long().clamp(max=n - 1)
    right = (left + 1).clamp(max=n - 1)
    share = (source - left).reshape([size if d == dim else 1 for d in range(x.ndim)])
    return torch.lerp(x.index_select(dim, left), x.index_select(dim, right), share)


average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
half_size_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. size: a number or (height, width). padding: by default what
    keeps the size."""

    def __init__(self, cin, cout, size=1, stride=1, padding=None):
        super().__init__()
        h, w = (size, size) if isinstance(size, int) else size
        padding = (h // 2, w // 2) if padding is None else padding
        self.conv = nn.Conv2d(cin, cout, (h, w), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Branches(nn.Module):
    """Branches side by side, whose outputs are concatenated. branches: lists of layers; a tuple in
    them holds layers that share their input.

    The published file numbers the convolutions of a branch that has several: branch_1, branch_2a
    and branch_2b in a tuple.
    """

    def __init__(self, **branches):
        super().__init__()
        self.branches = list(branches.values())
        for name, layers in branches.items():
            convs = [layer for layer in layers if isinstance(layer, (Conv, tuple))]
            for i, conv in enumerate(convs, 1):
                number = f"_{i}" if len(convs) > 1 else ""
                for letter, layer in zip("ab", conv) if isinstance(conv, tuple) else [("", conv)]:
                    self.add_module(name + number + letter, layer)

    def forward(self, x):
        return torch.cat([self.run(layers, x) for layers in self.branches], 1)

    def run(self, layers, x):
        for layer in layers:
            x = torch.cat([f(x) for f in layer], 1) if isinstance(layer, tuple) else layer(x)
        return x


class InceptionA(Branches):
    def __init__(self, cin, pooled):
        super().__init__(
            branch1x1=[Conv(cin, 64)],
            branch5x5=[Conv(cin, 48), Conv(48, 64, 5)],
            branch3x3dbl=[Conv(cin, 64), Conv(64, 96, 3), Conv(96, 96, 3)],
            branch_pool=[average_pool, Conv(cin, pooled)])


class InceptionB(Branches):
    def __init__(self):
        super().__init__(
            branch3x3=[Conv(288, 384, 3, 2, 0)],
            branch3x3dbl=[Conv(288, 64), Conv(64, 96, 3), Conv(96, 96, 3, 2, 0)],
            branch_pool=[half_size_pool])


class InceptionC(Branches):
    def __init__(self, c):
        super().__init__(
            branch1x1=[Conv(768, 192)],
            branch7x7=[Conv(768, c), Conv(c, c, (1, 7)), Conv(c, 192, (7, 1))],
            branch7x7dbl=[Conv(768, c), Conv(c, c, (7, 1)), Conv(c, c, (1, 7)),
                          Conv(c, c, (7, 1)), Conv(c, 192, (1, 7))],
            branch_pool=[average_pool, Conv(768, 192)])


class InceptionD(Branches):
    def __init__(self):
        super().__init__(
            branch3x3=[Conv(768, 192), Conv(192, 320, 3, 2, 0)],
            branch7x7x3=[Conv(768, 192), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1)),
                         Conv(192, 192, 3, 2, 0)],
            branch_pool=[half_size_pool])


class InceptionE(Branches):
    def __init__(self, cin, pool):          # the original's two blocks have different pools
        super().__init__(
            branch1x1=[Conv(cin, 320)],
            branch3x3=[Conv(cin, 384), (Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1)))],
            branch3x3dbl=[Conv(cin, 448), Conv(448, 384, 3),
                          (Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1)))],
            branch_pool=[pool, Conv(cin, 192)])


def load_inception(weights=None, device="cpu", folder="data"):
    """The network and the SHA-256 of its weights file, which is fetched once into folder.
    weights: instead, a file of the same layout. Raises UserError."""
    path = Path(weights or f"{folder}/{WEIGHTS_URL.rsplit('/', 1)[1]}")
    if weights:
        refuse_special(path)
    else:
        fetch(WEIGHTS_URL, path, "sha256", WEIGHTS_SHA256, "or name a file with --weights")
    net = InceptionV3()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as e:                                      # zip, pickle and torch differ
        reason = " ".join(str(e).split())[:200]
        message = f"{path} does not have the layout of the published weights: {reason}"
        raise UserError(message) from None
    net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return net, hashlib.sha256(path.read_bytes()).hexdigest()


# Images and statistics on disk

def saved_statistics(spec):
    """The statistics in spec, where it is a statistics file; None where it holds images, which are
    not read yet. Raises UserError where spec is missing or of another type."""
    path = Path(spec)
    if path.suffix in (".npy", ".npz"):
        found = read_statistics(path) if path.suffix == ".npz" else None
        if found is None:
            read_array(path)                                    # of a .npy, only its header
        return found
    if spec not in NATIVE_RESOLUTION:
        with readable(path):
            if next(iter(image_files(path)), None) is None:
                raise UserError(f"{spec} holds no images")
    return None


def read_statistics(path):
    """An .npz of mu [2048] and sigma [2048, 2048] -> dict; None where it holds images."""
    facts = {"num": int, "resolution": int, "source": str, "resize": str, "weights": str,
             "size": str}
    with numpy_errors(path), np.load(path, allow_pickle=False) as z:
        if not {"mu", "sigma"} <= set(z.files):
            return None
        bounded(path, sum(i.file_size for i in z.zip.infolist()))
        mu, sigma = z["mu"], z["sigma"]
        saved = {k: z[k].item() for k in z.files if k in facts}
    if not all(isinstance(v, facts[k]) for k, v in saved.items()):
        raise UserError(f"{path} holds statistics with facts of an unknown type")
    if (mu.shape, sigma.shape) != ((WIDTH,), (WIDTH, WIDTH)) or not all(
            a.dtype in (np.float32, np.float64) and np.isfinite(a).all() for a in (mu, sigma)):
        raise UserError(f"{path} holds mu {mu.dtype} {list(mu.shape)} and sigma {sigma.dtype} "
                        f"{list(sigma.shape)}, not finite float [{WIDTH}] and [{WIDTH}, {WIDTH}]")
    if not is_covariance(torch.as_tensor(sigma, dtype=torch.float64)):
        raise UserError(f"{path} holds a sigma that is not a covariance (symmetric, without "
                        "negative eigenvalues): make the statistics again from the images")
    return {"num": None, "source": str(path), **saved, "mu": mu, "sigma": sigma}


def is_covariance(sigma):
    """Whether sigma [D, D], float64, is symmetric and positive semi-definite. The tolerance leaves
    room for the rounding of float32."""
    sigma = sigma / sigma.abs().max().clamp(min=1e-300)         # or large values would overflow
    values = torch.linalg.eigvalsh(sigma)                       # in ascending order
    return bool((sigma - sigma.T).abs().max() < 1e-5 and values[0] >= -1e-5 * values[-1])


def read_array(path):
    """A .npy or .npz of uint8 images, channels last, first or none -> [N, H, W, 1 or 3]."""
    with numpy_errors(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".npz":
            bounded(path, sum(i.file_size for i in array.zip.infolist()))
            array = array[array.files[0]]
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds several arrays: rename it to end in .npz")
    images = array[..., None] if array.ndim == 3 else array
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) \
            or 0 in images.shape:
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}, not uint8 images "
                        "[N, H, W, C] of 1 or 3 channels")
    return images


@contextlib.contextmanager
def numpy_errors(path):
    """Turns what np.load raises for a missing or damaged file into a UserError."""
    refuse_special(path)
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as e:                                      # zip, zlib and NumPy differ
        raise UserError(f"{path} cannot be read: {' '.join(str(e).split())}") from None


def check_comparable(saved, spec, resolution, resize, digest):
    """Raises UserError where the statistics of a file were made in another way than is asked for.
    Prints a warning where the file does not say how. resolution 0 asks for none."""
    for what, asked in (("resolution", resolution), ("resize", resize), ("weights", digest)):
        if asked and saved.get(what, asked) != asked:
            raise UserError(f"{spec} was made with {what} {saved[what]}, not {asked}: give the "
                            "images themselves, or the same option")
    if "resize" not in saved and rank() == 0:
        warn(f"warning: {spec} does not say with which resize rule, weights and resolution it was "
             "made")


def reference_statistics(spec, resolution, net, resize, digest, batch=256, folder="data"):
    """The statistics of all images of spec. They are kept in folder, and reused as long as the
    files, the resolution, the resize rule and the weights are the same. Raises UserError."""
    resolution = resolution or NATIVE_RESOLUTION.get(spec, 0)
    files = None if spec in NATIVE_RESOLUTION else fingerprint(Path(spec).resolve())
    key = repr((VERSION, str(spec), files, resolution, resize, digest)).encode()
    kept = Path(folder, f"fid-{Path(spec).stem}-{hashlib.sha256(key).hexdigest()[:12]}.npz")
    if kept.exists():
        return read_statistics(kept)
    source = "cifar10, training split" if spec == "cifar10" else str(spec)
    batches = read_batches(spec, resolution, batch=batch)
    stats = {**statistics(batches, net, resize, digest, source, batch), "resolution": resolution}
    if rank() == 0 and stats["num"] == count(image_readers(spec, resolution)):  # no file is broken
        with or_a_warning(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(kept) as f:
                np.savez(f, **stats)
            warn(f"statistics kept as {kept}")
    return stats


def read_batches(spec, resolution=0, num=None, batch=256):
    """Yields the images of spec, uint8 [B, 3, H, W], those of one size together: num of them by a
    fixed draw, or all; this process's share. Names the files that cannot be read on stderr."""
    with readable(spec):
        readers = image_readers(spec, resolution)
        chosen = np.random.RandomState(0).permutation(count(readers))[:num]
        mine = set(np.sort(chosen)[rank()::world_size()].tolist())
        if not isinstance(readers, list):                       # a tar: again, from its start
            readers = image_readers(spec, resolution)
        bar = tqdm(desc=printable(spec), total=len(mine), unit=" images", disable=rank() > 0)
        waiting = []                                            # [3, H, W] each
        for i, (name, read) in enumerate(readers):
            if i not in mine:
                continue
            bar.update()
            try:
                image = torch.from_numpy(np.atleast_3d(np.array(read())))       # [H, W, 1 or 3]
            except Exception as e:                              # decoders raise nearly anything
                warn(f"skipped {name}: {e}")
                continue
            image = image.permute(2, 0, 1).expand(3, -1, -1)
            if waiting and (len(waiting) == batch or waiting[0].shape != image.shape):
                yield torch.stack(waiting)
                waiting = []
            waiting.append(image)
        bar.close()
        if waiting:
            yield torch.stack(waiting)


def image_readers(spec, resolution):
    """Pairs of a name and a function that returns the image: uint8 [H, W], [H, W, 1] or [H, W, 3],
    prepared as data.load does. A list, but an iterator for a tar, which is read in order."""
    path = Path(spec)
    if spec not in NATIVE_RESOLUTION and path.suffix not in (".npy", ".npz"):
        files = image_files(path)
        readers = ((name, lambda read=read: decode(read(), resolution)) for name, read in files)
        return list(readers) if isinstance(files, list) else readers
    if path.suffix:
        images = read_array(path)
    else:
        images = load(spec, resolution or None).images.permute(0, 2, 3, 1).numpy()
    return [(f"image {i}", partial(resized, image, resolution)) for i, image in enumerate(images)]


def resized(image, resolution):
    """uint8 [H, W, 1 or 3], cropped and resized to a square; as it is where resolution is 0."""
    if not resolution:
        return image
    image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return np.asarray(crop_and_resize(image, resolution, resolution))


def count(readers):
    return len(readers) if isinstance(readers, list) else sum(1 for _ in readers)


# The command line

def drawn_batches(net, path, shape, first, num, device, batch, **options):
    """Yields the images of seeds first to first + num - 1, uint8 [B, C, H, W]; this process's
    share. options: see sample.generate."""
    seeds = range(first + rank(), first + num, world_size())
    with tqdm(desc=f"seeds {first}-{first + num - 1}", total=len(seeds), unit=" images",
              disable=rank() > 0) as bar:
        for x in generate(net, path, shape, seeds, device, batch, **options):
            yield to_uint8(x)
            bar.update(len(x))


def main():
    p = Parser(description="The Frechet Inception distance of images on disk, or of a model's "
                           "samples, to a reference.")
    a = p.add_argument
    a("samples", nargs="?", help="a folder, zip, tar, .npy or .npz of images, cifar10, leaves, or "
                                 "a statistics file (.npz)")
    a("--ref", required=True, help="the reference, likewise; the statistics of its images are kept "
                                   "in data/ and reused")
    a("--resolution", type=number(int, 1, 4096),
      help="side that samples and reference are cropped and resized to (default: as they are); "
           "--ckpt has its own, which the reference is prepared with")
    a("--ckpt", help="instead of samples: draw them from this model, ema.pt of train.py")
    a("--num", type=number(int, 2), help="images to score, at most (default 50000)")
    a("--draws", type=number(int, 1), default=3,
      help="with --ckpt: how many times, each with seeds of its own (default 3)")
    a("--bnr", type=number(float, 0), nargs="+", metavar="R",
      help="for a model of --bnr any: the ratios to score, 0 to 10 (default 0.5)")
    sampler_options(p)
    a("--batch", type=number(int, 1), default=256, help="images at a time (default 256)")
    a("--weights", help="the network's weights, a file of the published layout (default: fetched "
                        "once into data/)")
    a("--resize", choices=["tf1", "pytorch"], default="tf1",
      help="tf1: the original's and EDM's; pytorch: pytorch-fid's (default tf1)")
    a("--json", action="store_true", help="print JSON: an object, or with --bnr a list of them")
    args = p.parse_args()
    if bool(args.samples) == bool(args.ckpt):
        p.error("give either samples or --ckpt")
    for name in () if args.ckpt else ("bnr", "path", "draws", "steps", "solver", "churn", "s_min",
                                      "s_max", "precision", "compile", "label"):
        if getattr(args, name) != p.get_default(name):
            flag = "class" if name == "label" else name.replace("_", "-")
            p.error(f"--{flag} is for --ckpt: images on disk are as they are")
    if args.bnr and args.path:
        p.error("--bnr and --path are two ways to choose the path: give one of them")
    if args.resolution and args.ckpt:
        p.error("--resolution is for images on disk: --ckpt has its own resolution")
    with process_group(), p.one_line_errors():
        report(score(args), args)


def score(args):
    """The results to print, one dict, or one for each --bnr. Raises UserError, where it can before
    anything is computed."""
    full_float32()
    saved = {spec: saved_statistics(spec) for spec in (args.samples or args.ref, args.ref)}
    if args.num and args.samples and saved[args.samples]:
        raise UserError(f"--num {args.num}: {args.samples} holds statistics, and not the images")
    args.num = args.num or 50000
    resolution = args.resolution or 0
    if args.ckpt:
        model, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
        options, nfe = sampler(args, model, checkpoint)
        paths = [sampling_path(checkpoint, bnr, args.path) for bnr in args.bnr or [None]]
        shape, resolution = checkpoint["data"]["shape"], checkpoint["options"]["resolution"]
        if shape[0] not in (1, 3):
            raise UserError(f"{args.ckpt} makes images of {shape[0]} channels: FID needs 1 or 3")
    with rank_0_first():
        net, digest = load_inception(args.weights, args.device)
        for spec in NATIVE_RESOLUTION.keys() & saved.keys() if world_size() > 1 else ():
            load(spec, resolution or None)                      # one process makes it for all
    for spec in filter(saved.get, saved):
        check_comparable(saved[spec], spec, resolution, args.resize, digest)

    common = {"net": net, "resize": args.resize, "digest": digest, "batch": args.batch}
    ref = saved[args.ref] or reference_statistics(args.ref, resolution, **common)
    result = {"reference": ref["source"], "reference_num": ref["num"], "resolution": resolution,
              "reference_size": ref.get("size"), "resize": args.resize, "weights_sha256": digest}
    if args.samples:
        stats = saved[args.samples] or statistics(
            read_batches(args.samples, resolution, args.num, args.batch), source=args.samples,
            **common)
        return [{"fid": distance(stats, ref), "samples": stats["source"],
                 "generated": stats["num"], "size": stats.get("size"), **result}]
    result.update(samples=args.ckpt, generated=args.num, size="{} x {}".format(*shape[1:]),
                  nfe=nfe, precision=args.precision)
    result.update((k, v) for k, v in options.items() if k != "colour" and v != math.inf)
    if args.path:
        result["path"] = args.path
    results = []
    for bnr, path in zip(args.bnr or [None], paths):
        fids = []
        for first in range(0, args.draws * args.num, args.num):
            batches = drawn_batches(model, path, shape, first, args.num, args.device, args.batch,
                                    **options)
            fids.append(distance(statistics(batches, source=args.ckpt, **common), ref))
            if rank() == 0:                                     # what an interruption leaves
                warn(f"draw {len(fids)} of {args.draws}: FID {fids[-1]:.4f}")
        std = float(np.std(fids, ddof=1)) if len(fids) > 1 else None
        results.append({**({} if bnr is None else {"bnr": bnr}), "fid": min(fids), "draws": fids,
                        "mean": float(np.mean(fids)), "std": std, **result})
    return results


def distance(stats, ref):
    return frechet_distance(stats["mu"], stats["sigma"], ref["mu"], ref["sigma"])


def report(results, args):
    """Prints the results, and warnings where the FID of so few images means little."""
    if rank() > 0:
        return
    r = results[0]
    for name, n in (("generated", r["generated"]), ("reference", r["reference_num"])):
        if n is not None and n < 2048:
            warn(f"warning: {n} {name} images make a singular covariance; the FID of so few is not "
                 "meaningful")
    if r["generated"] is not None and r["generated"] < 50000:
        warn("warning: the FID of fewer than 50,000 generated images is higher; compare it only at "
             "the same number")
    if args.json:
        say(json.dumps(results if args.bnr else r))
        return
    if args.bnr:
        say(f"{'BNR':>6} {'lowest':>10} {'mean':>10} {'std':>10}")
        for row in results:
            std = "-" if row["std"] is None else f"{row['std']:.4f}"
            say(f"{row['bnr']:>6g} {row['fid']:>10.4f} {row['mean']:>10.4f} {std:>10}")
    elif args.ckpt:
        spread = "" if r["std"] is None else f" +- {r['std']:.4f}"
        say(f"draws {', '.join(f'{fid:.4f}' for fid in r['draws'])}; lowest {r['fid']:.4f} (the "
            f"paper's convention), mean {r['mean']:.4f}{spread}")
    if args.ckpt:
        churn = f"churn {args.churn:g} from {args.s_min:g} to {args.s_max:g}"
        parts = [args.solver, args.path and f"path {args.path}",
                 "label" in r and f"class {r['label']}", f"{r['steps']} steps", f"NFE {r['nfe']}",
                 churn if args.churn else "no churn", args.precision]
        say("sampler " + ", ".join(filter(None, parts)))
    generated, reference = ("an unknown number of" if n is None else f"{n:,}"
                            for n in (r["generated"], r["reference_num"]))
    fid = "of " if args.bnr else f"{r['fid']:.4f}   "
    side = f" at {r['resolution']} x {r['resolution']}" if r["resolution"] else ""
    sizes = r["size"], r["reference_size"]
    if None not in sizes and sizes[0] != sizes[1]:
        side = f", {sizes[0]} against {sizes[1]}, which is no fair comparison"
    say(f"FID {fid}{generated} images of {r['samples']} against {reference} of {r['reference']}"
        f"{side}; resize {r['resize']}, weights {r['weights_sha256'][:8]}")


if __name__ == "__main__":
    main()
