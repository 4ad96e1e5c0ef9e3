"""Data sets as tensors, and EDM's non-leaky augmentation.

    python data.py                     # draws a grid of the default data set, dead leaves: data.png
    python data.py --data cifar10      # or of CIFAR-10, or of a folder, zip or tar of images
"""
import bz2
import contextlib
import gzip
import io
import lzma
import math
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from degrade import dct2, idct2
from util import (Parser, UserError, atomic_write, crop_and_resize, fetch, normalize, number,
                  open_upright, save_grid, seed_for, to_uint8)

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
TAR_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
UNPACK_LIMIT = 2 ** 29                          # bytes that every archive may unpack to


@dataclass
class Images:
    """A data set. facts() and colour() describe uint8 images as normalize() makes them, in [-1, 1],
    and float images, latents for example, as they are."""
    images: torch.Tensor                        # [N, C, H, W], uint8 or float
    labels: torch.Tensor                        # int64 [N], indices into classes
    classes: list                               # the names of the classes
    name: str
    skipped: list = field(default_factory=list)                 # names of the unreadable files

    def facts(self):
        """What a checkpoint stores about its data, as plain types. mean and std: per channel."""
        n, c, h, w = self.images.shape
        moments = [mean_and_std(self.images[:, i]) for i in range(c)]
        # the last digits differ between machines
        mean, std = ([round(v.item(), 9) for v in values] for values in zip(*moments))
        return {"name": self.name, "count": n, "shape": [c, h, w], "classes": list(self.classes),
                "skipped": len(self.skipped), "mean": mean, "std": std}

    def colour(self):
        """The Gaussian of the images' mean colours, as lists: {"mean": [C], "cov": [C][C]}."""
        n, c, h, w = self.images.shape
        colours = self.images.sum((2, 3), dtype=torch.float64) / (h * w)        # [N, C]
        if self.images.dtype == torch.uint8:
            colours = colours / 127.5 - 1
        cov = colours.T.cov(correction=0).reshape(c, c)
        return {"mean": colours.mean(0).tolist(), "cov": cov.tolist()}


def mean_and_std(channel):
    """Of one channel [N, H, W] in the scale of normalize(): two 0-d float64 tensors."""
    if channel.dtype != torch.uint8:
        return channel.double().mean(), channel.double().std(unbiased=False)
    # a histogram is exact and needs no float copy of the data
    p = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
    value = normalize(torch.arange(256, dtype=torch.uint8))
    mean = (p * value).sum()
    return mean, (p * (value - mean) ** 2).sum().sqrt()


def load(spec, resolution=None, folder="data"):
    """The data set that spec names, as uint8 Images. Raises UserError.

    spec: "leaves" (made here), "cifar10" (the 50,000 training images, fetched once into folder), or
    the path of a folder, zip or tar of images; their parent folders are the classes.
    resolution: centre-crop and resize to this many pixels a side; None: keep the size.
    """
    if spec == "leaves":
        return load_leaves(resolution or 16, folder)
    if spec == "cifar10":
        return load_cifar10(resolution, folder)
    return load_files(Path(spec), resolution)


# Batches

def shuffled(start, count, n, seed):
    """Places start to start + count in an endless series of shuffles of n images, int64 [count]:
    an epoch shows each image once."""
    place = torch.arange(start, start + count)
    epochs = range(start // n, (start + count - 1) // n + 1)
    return torch.cat([epoch(e, n, seed)[place[place // n == e] % n] for e in epochs])


@lru_cache(maxsize=2)
def epoch(e, n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_for("epoch", seed, e)))


def resident(images, device):
    """The data set on the training device where it takes less than half of the free memory."""
    if device.type == "cpu":
        return images
    fits = images.numel() * images.element_size() < torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


def take(images, index, device):
    """images[index] on the device; through pinned memory, so that the CPU waits for no copy."""
    if device.type == "cpu":
        return images[index]
    if images.device.type == "cpu":
        return images[index].pin_memory().to(device, non_blocking=True)
    return images[index.pin_memory().to(device, non_blocking=True)]


# Augmentation

def augment(x, p, batch=None, part=slice(None)):
    """EDM's non-leaky augmentation: x [B, C, H, W] -> augmented images and labels [B, 9] (float).

    Each kind has probability p, but the x-flip 1/2 and the y-flip p / 2. x may be a slice, `part`,
    of a batch of `batch` images: the result does not depend on how the batch is split.
    The labels go to the network. They are 0 where nothing was done, as in sampling: x-flip, y-flip,
    scale, rotation (cos - 1, sin), stretch (s cos d, s sin d), shift in x and in y. As in EDM, a
    stretch s along direction d has the label of the opposite one, -s along d + pi.
    """
    b, device = batch or len(x), x.device
    h, w = x.shape[-2:]

    def coin(probability):
        return torch.rand(b, device=device)[part] < probability

    def any_angle():
        return math.pi * (2 * torch.rand(b, device=device)[part] - 1)

    def normal(*shape):
        return torch.randn(b, *shape, device=device)[part]

    flip_x = coin(0.5)
    flip_y = coin(p) & coin(0.5)
    scale = coin(p) * normal()
    angle = coin(p) * any_angle()
    stretch = coin(p) * normal()
    direction = coin(0.5) * any_angle()
    shift = coin(p)[:, None] * normal(2)
    labels = torch.stack([flip_x, flip_y, scale, angle.cos() - 1, angle.sin(),
                          stretch * direction.cos(), stretch * direction.sin(),
                          shift[:, 0], shift[:, 1]], 1)

    x = torch.where(flip_x[:, None, None, None], x.flip(-1), x)
    x = torch.where(flip_y[:, None, None, None], x.flip(-2), x)
    # EDM's matrix: from a point of the result to its source, in pixels from the middle, y down
    axes = torch.diag_embed((0.2 * torch.stack([-stretch, stretch], 1)).exp2())
    shrink = (-0.2 * scale).exp2()[:, None, None]
    matrix = shrink * rotation(angle) @ rotation(-direction) @ axes @ rotation(direction)
    matrix[:, 0, 1] *= h / w                                    # affine_grid's unit is half a side,
    matrix[:, 1, 0] *= w / h                                    # so a shift of 1/8 side is 0.25
    theta = torch.cat([matrix, -matrix @ (0.25 * shift)[:, :, None]], 2)        # [B, 2, 3]
    moved = warp(x, theta).to(x.dtype)
    unmoved = (labels[:, 2:] == 0).all(1)                       # these stay exact
    return torch.where(unmoved[:, None, None, None], x, moved), labels


def rotation(angle):
    """Angles [B] -> [[cos, -sin], [sin, cos]], [B, 2, 2]."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([c, -s, s, c], -1).reshape(-1, 2, 2)


def warp(x, theta):
    """Resample x [B, C, H, W] with the matrices [B, 2, 3] of affine_grid, at twice the resolution;
    the DCT resamples up and down without aliasing. Beyond the borders x is reflected."""
    h, w = x.shape[-2:]
    fine = idct2(F.pad(dct2(x), (0, w, 0, h))) * 2              # [B, C, 2H, 2W]
    grid = F.affine_grid(theta.to(fine.dtype), fine.shape, align_corners=False)
    fine = F.grid_sample(fine, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return idct2(dct2(fine)[..., :h, :w]) / 2                   # [B, C, H, W]


# Dead leaves and CIFAR-10

def leaves(n, resolution=16, seed=0, discs=96):
    """The dead-leaves model of natural scenes: uint8 [n, 3, resolution, resolution].

    Opaque discs of random colours overlap; they are drawn from front to back. Radii have a density
    of r^-3 from 1/4 of the side to the whole side. Centres are uniform over all places from which
    a disc can reach the image.
    """
    g = torch.Generator().manual_seed(seed)
    pixel = (torch.arange(resolution) + 0.5) / resolution       # in units of the side
    small, large = 0.25, 1.0
    chunks = []
    for start in range(0, n, 1024):
        b = min(1024, n - start)
        image = torch.zeros(b, 3, resolution, resolution)
        uncovered = torch.ones(b, 1, resolution, resolution)    # the share of each pixel
        for _ in range(discs):
            u, x, y = torch.rand(3, b, 1, 1, 1, generator=g)
            radius = (small ** -2 - u * (small ** -2 - large ** -2)) ** -0.5
            x, y = (v * (1 + 2 * large) - large for v in (x, y))
            distance = torch.hypot(pixel - x, pixel[:, None] - y)               # [b, 1, H, W]
            disc = ((radius - distance) * resolution + 0.5).clamp(0, 1)         # soft over a pixel
            image += uncovered * disc * torch.rand(b, 3, 1, 1, generator=g)
            uncovered *= 1 - disc
        image += uncovered * torch.rand(b, 3, 1, 1, generator=g)
        chunks.append((image * 255).round().byte())
    return torch.cat(chunks)


def load_leaves(resolution, folder, n=16384):
    """n dead leaves, made once and then read from the folder."""
    path = Path(folder) / f"leaves-{resolution}.npy"
    try:
        images = torch.from_numpy(np.load(path, allow_pickle=False))
        if images.dtype != torch.uint8 or images.shape != (n, 3, resolution, resolution):
            raise ValueError
    except (OSError, ValueError, TypeError, EOFError):          # the file is missing or damaged
        images = leaves(n, resolution)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            np.save(f, images.numpy())
    return Images(images, torch.zeros(n, dtype=torch.long), ["leaves"], "leaves")


def load_cifar10(resolution, folder):
    path = fetch(CIFAR10_URL, Path(folder) / "cifar-10-binary.tar.gz", "md5", CIFAR10_MD5)
    with tarfile.open(path) as tar:
        batches = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
        raw = b"".join(tar.extractfile(name).read() for name in batches)
    records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3072)                # a label, then RGB
    labels, images = records[:, 0].astype(np.int64), records[:, 1:].reshape(-1, 3, 32, 32)
    if resolution not in (None, 32):
        rgb = (Image.fromarray(i) for i in tqdm(images.transpose(0, 2, 3, 1), "resizing"))
        resized = [np.asarray(crop_and_resize(i, resolution, resolution)) for i in rgb]
        images = np.stack(resized).transpose(0, 3, 1, 2)
    return Images(torch.from_numpy(images.copy()), torch.from_numpy(labels), CIFAR10_CLASSES,
                  "cifar10")


# Folders and archives of images. Archives may be hostile: they are read, never unpacked to disk.

def load_files(path, resolution):
    """A folder, zip or tar as Images. A file that cannot be read is skipped and named on stderr."""
    arrays, parents, skipped = [], [], []
    with readable(path):
        for name, read in tqdm(image_files(path), "decoding", unit=" images"):
            try:
                image = decode(read(), resolution)
            except Exception as e:                              # decoders raise nearly anything
                tqdm.write(f"skipped {name}: {e}", file=sys.stderr)
                skipped.append(name)
                continue
            if arrays and image.shape[:2] != arrays[0].shape[:2]:
                raise UserError(f"{name} and the first image have different sizes: give a "
                                "resolution to crop and resize them to")
            arrays.append(image)
            parents.append(PurePosixPath(name).parent.name)
    if skipped:
        total = len(skipped) + len(arrays)
        print(f"{path}: {len(skipped)} of {total} images skipped", file=sys.stderr)
    if not arrays:
        raise UserError(f"{path} contains no readable image ({', '.join(sorted(EXTENSIONS))})")
    if any(a.ndim == 3 for a in arrays):                        # among RGB images grey becomes RGB
        arrays = [a if a.ndim == 3 else np.repeat(a[:, :, None], 3, 2) for a in arrays]
    stack = torch.from_numpy(np.stack(arrays))                  # [N, H, W] or [N, H, W, 3]
    images = stack.permute(0, 3, 1, 2).contiguous() if stack.ndim == 4 else stack[:, None]
    classes = sorted(set(parents))
    labels = torch.tensor([classes.index(p) for p in parents])
    return Images(images, labels, classes, path.name, skipped)


def decode(data, resolution):
    """The bytes of an image file -> uint8 [H, W] (grey) or [H, W, 3]. resolution: as for load."""
    image = open_upright(io.BytesIO(data))
    return np.array(crop_and_resize(image, resolution, resolution) if resolution else image)


@contextlib.contextmanager
def readable(path):
    """Within, what a damaged folder or archive raises becomes a UserError."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, OSError, EOFError,
            ValueError, NotImplementedError) as e:
        raise UserError(f"{path} is not a folder, zip or tar that can be read "
                        f"({type(e).__name__})") from None


def image_files(path):
    """Pairs of a name, folders included, and a function that returns the bytes. For a tar this is
    an iterator, and each function works until the next pair; else a list. path: pathlib.Path.

    Raises UserError, and the errors that readable catches.
    """
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if is_image(f.name) and f.is_file()]
        # the class of an image that lies directly in the folder is the folder
        roots = [path.parent if f.parent == path else path for f in files]
        return [(f.relative_to(root).as_posix(), f.read_bytes) for f, root in zip(files, roots)]
    if not path.exists():
        raise UserError(f"{path} does not exist: give leaves, cifar10, or a folder, zip or tar of "
                        "images")
    if is_image(path.name):
        raise UserError(f"{path} is one image: give the folder that contains it")
    return zip_images(path) if zipfile.is_zipfile(path) else tar_images(path)


def zip_images(path):
    archive = zipfile.ZipFile(path)
    files = [i for i in archive.infolist() if not i.filename.endswith("/")]
    for info in files:
        refuse_outside(path, info.filename)
    images = [info for info in files if is_image(info.filename)]
    bounded(path, sum(info.file_size for info in images))

    def read(info):
        refuse_link(info.external_attr >> 28 == 0o12)           # Unix's file type, S_IFLNK
        return archive.read(info)
    return [(info.filename, partial(read, info)) for info in images]


def tar_images(path):
    with open(path, "rb") as f:
        start = f.read(6)
    opener = next((o for magic, o in TAR_OPENERS.items() if start.startswith(magic)), open)

    def read(member):
        refuse_link(not member.isfile())
        return tar.extractfile(member).read()
    with opener(path, "rb") as f, tarfile.open(fileobj=BoundedFile(f, path), mode="r:") as tar:
        for member in tar:
            refuse_outside(path, member.name)
            if is_image(member.name) and not member.isdir():
                bounded(path, member.size)                      # a sparse one may hold few bytes
                yield member.name, partial(read, member)


class BoundedFile:
    """An unpacked tar that cannot be read beyond the limit of `bounded`: even a header may claim
    that it is gigabytes long."""

    def __init__(self, file, path):
        self.file, self.path, self.tell = file, path, file.tell

    def read(self, n):
        bounded(self.path, self.tell() + n)
        return self.file.read(n)

    def seek(self, position):
        bounded(self.path, position)
        return self.file.seek(position)


def bounded(path, size):
    """Raises UserError where the file at path, a pathlib.Path, unpacks to more bytes than images
    do: they are compressed already."""
    packed = path.stat().st_size
    if size > UNPACK_LIMIT + 100 * packed:
        raise UserError(f"{path} is refused: it unpacks to {size / 2 ** 30:.1f} GiB from "
                        f"{packed / 2 ** 20:.1f} MiB; if you trust it, save it uncompressed")


def refuse_link(is_link):
    if is_link:
        raise ValueError("it is a link in an archive; links are not followed")


def refuse_outside(path, name):
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"{path} is refused: it contains {name!r}, which would unpack outside its "
                        "folder")


def is_image(name):
    """By its extension. macOS adds files like ._cat.png, which are not images."""
    name = PurePosixPath(name)
    return name.suffix.lower() in EXTENSIONS and not name.name.startswith("._")


def main():
    p = Parser(description="Draw a grid of a data set, and print what a checkpoint would store "
                           "about it.")
    p.add_argument("--data", default="leaves",
                   help="leaves, cifar10, or a folder, zip or tar of images (default leaves)")
    p.add_argument("--resolution", type=number(int, 1),
                   help="side in pixels (default: 16 for leaves, else that of the files)")
    p.add_argument("--augment", type=number(float, 0, 1), default=0.,
                   help="augment with this probability (default 0)")
    p.add_argument("--out", default="data.png", help="the grid (default data.png)")
    args = p.parse_args()
    with p.one_line_errors():
        data = load(args.data, args.resolution)
        order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
        images = data.images[order[:64]]
        if args.augment:
            images = to_uint8(augment(normalize(images), args.augment)[0])
        save_grid(images, args.out)
        print(f"{args.out}: {data.facts()}")


if __name__ == "__main__":
    main()
