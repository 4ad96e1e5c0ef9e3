"""Data sets as tensors, and EDM's non-leaky augmentation.

    python data.py                     # draws a grid of the default data set, dead leaves: data.png
    python data.py --data cifar10      # or of CIFAR-10, or of a folder, zip or tar of images
"""
import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from degrade import dct2, idct2
from util import (Parser, UserError, atomic_write, crop_and_resize, fetch, normalize, number,
                  open_upright, refuse_special, remove_parts, save_grid, say, seed_for, to_uint8,
                  warn)

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
TAR_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
UNPACK_LIMIT = 2 ** 29                          # bytes that every archive may unpack to
KEEP_FROM = 2 ** 24                             # bytes of decoded images that are worth a file
NPY_HEADER = 128                                # its length in bytes
VERSION = 1                                     # of how images are decoded


@dataclass
class Images:
    """A data set. facts() and colour() describe uint8 images as normalize() makes them, in [-1, 1],
    and float images, latents for example, as they are."""
    images: torch.Tensor                        # [N, C, H, W], uint8 or float
    labels: torch.Tensor                        # int64 [N], indices into classes
    classes: list                               # the names of the classes
    name: str
    skipped: list = field(default_factory=list)                 # names of the unreadable files
    latents: bool = False

    def facts(self):
        """What a checkpoint stores about its data, as plain types. mean and std: per channel."""
        n, c, h, w = self.images.shape
        moments = [mean_and_std(self.images[:, i]) for i in range(c)]
        # the last digits differ between machines
        mean, std = ([round(v.item(), 9) for v in values] for values in zip(*moments))
        return {"name": self.name, "count": n, "shape": [c, h, w], "classes": list(self.classes),
                "counts": torch.bincount(self.labels, minlength=len(self.classes)).tolist(),
                "latents": self.latents, "digest": self.digest(),
                "skipped": len(self.skipped), "mean": mean, "std": std}

    def digest(self):
        h = hashlib.sha256(self.images.numpy().tobytes())
        h.update(self.labels.numpy().tobytes())
        return h.hexdigest()[:16]

    def colour(self):
        """The Gaussian of the images' mean colours, as lists: {"mean": [C], "cov": [C][C]}."""
        n, c, h, w = self.images.shape
        parts = self.images.split(256)                          # a whole float copy may not fit
        colours = torch.cat([p.sum((2, 3), dtype=torch.float64) for p in parts]) / (h * w)
        if self.images.dtype == torch.uint8:
            colours = colours / 127.5 - 1
        cov = colours.T.cov(correction=0).reshape(c, c)
        return {"mean": colours.mean(0).tolist(), "cov": cov.tolist()}


def mean_and_std(channel):
    """Of one channel [N, H, W] in the scale of normalize(): two 0-d float64 tensors."""
    if channel.dtype != torch.uint8:
        return channel.double().mean(), channel.double().std(unbiased=False)
    # a histogram is exact and needs no float copy of the data
    parts = channel.split(256)
    counts = sum(torch.bincount(part.flatten(), minlength=256) for part in parts)
    p = counts.double() / channel.numel()
    value = normalize(torch.arange(256, dtype=torch.uint8)).double()
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
    return load_files(Path(spec), resolution, folder)


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

def load_files(path, resolution, folder):
    """A folder, zip or tar as Images. A file that cannot be read is skipped and named on stderr.

    Many images are decoded once, kept in folder until their files change, and mapped into memory:
    the processes of a machine share them, and only what is used has to fit.
    """
    with readable(path):
        key = repr((VERSION, fingerprint(path), resolution)).encode()
    digest = hashlib.sha256(key).hexdigest()[:12]
    kept = Path(folder, f"images-{path.stem}-{digest}.npy")
    try:
        images = np.load(kept, mmap_mode="c", allow_pickle=False)
        parents, skipped = json.loads(kept.with_suffix(".json").read_text())
    except (OSError, ValueError, EOFError):                     # the first time
        try:
            images, parents, skipped = decode_files(path, resolution, kept)
        except ColourAfterGrey:
            images, parents, skipped = decode_files(path, resolution, kept, channels=3)
    if skipped:
        warn(f"{path}: {len(skipped)} of {len(skipped) + len(parents)} images skipped")
    classes = sorted(set(parents))
    places = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([places[parent] for parent in parents])
    return Images(torch.from_numpy(images), labels, classes, path.name, skipped)


class ColourAfterGrey(Exception):
    """Among RGB images grey becomes RGB, and those before were written as grey."""


def decode_files(path, resolution, kept, channels=None):
    """The images, uint8 [N, C, H, W], the folder of each and the names of the skipped files. From
    KEEP_FROM bytes on they are written to the file `kept`, and the rest beside it."""
    parents, skipped, shape, limit = [], [], None, KEEP_FROM
    file = memory = io.BytesIO(bytes(NPY_HEADER))
    file.seek(0, io.SEEK_END)
    with contextlib.ExitStack() as stack:
        for name, image in decoded(path, resolution):
            if isinstance(image, Exception):
                warn(f"skipped {name}: {image}")
                skipped.append(name)
                continue
            image = np.atleast_3d(image).transpose(2, 0, 1)     # [1 or 3, H, W]
            shape = shape or (channels or len(image), *image.shape[1:])
            if image.shape[1:] != shape[1:]:
                raise UserError(f"{name} and the first image have different sizes: give a "
                                "resolution to crop and resize them to")
            if len(image) > shape[0]:
                raise ColourAfterGrey
            file.write(np.broadcast_to(image, shape).tobytes())
            parents.append(PurePosixPath(name).parent.name)
            if file is memory and file.tell() > limit:
                try:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    remove_parts(kept.parent, age=86400)        # another program may be at its own
                    file = stack.enter_context(atomic_write(kept))
                    file.write(memory.getbuffer())
                except OSError as e:
                    warn(f"the decoded images cannot be kept in {kept.parent} ({e.strerror})")
                    limit = math.inf
        if not parents:
            raise UserError(f"{path} contains no readable image ({', '.join(sorted(EXTENSIONS))})")
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(parents), *shape)}
        file.seek(0)                                            # known only now; NumPy's version 1
        file.write(b"\x93NUMPY\1\0" + (NPY_HEADER - 10).to_bytes(2, "little"))
        file.write(f"{str(header):{NPY_HEADER - 11}}\n".encode())
    if file is memory:
        images = np.frombuffer(memory.getbuffer(), np.uint8, offset=NPY_HEADER)
        return images.reshape(header["shape"]), parents, skipped
    with atomic_write(kept.with_suffix(".json"), "w") as f:
        json.dump([parents, skipped], f)
    return np.load(kept, mmap_mode="c"), parents, skipped


def decoded(path, resolution):
    """Yields the name of each image file with its image, or with the exception that it raised.
    Files are read in order, and decoded on all cores."""
    def attempt(f, *args):
        try:
            return f(*args)
        except Exception as e:                                  # decoders raise nearly anything
            return e

    def image(data):
        return data if isinstance(data, Exception) else attempt(decode, data, resolution)
    cores = os.cpu_count() or 1
    with readable(path), ThreadPoolExecutor(cores) as pool:
        files = tqdm(image_files(path), "decoding", unit=" images")
        pairs = ((name, attempt(read)) for name, read in files)
        while some := list(islice(pairs, 4 * cores)):
            names, data = zip(*some)
            yield from zip(names, pool.map(image, data))


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
        found = folder_images(path)
        # the class of an image that lies directly in the folder is the folder
        roots = [path.parent if f.parent == path else path for f, _ in found]
        return [(f.relative_to(root).as_posix(), read) for (f, read), root in zip(found, roots)]
    refuse_special(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give leaves, cifar10, or a folder, zip or tar of "
                        "images")
    if is_image(path.name):
        raise UserError(f"{path} is one image: give the folder that contains it")
    return zip_images(path) if zipfile.is_zipfile(path) else tar_images(path)


def folder_images(path):
    """Pairs as those of image_files, sorted. Links are followed, into each folder once. What cannot
    be read is among the pairs, too, so that it is named like any other file."""
    found, seen = {}, set()

    def refuse(file, reason):
        def read():
            raise ValueError(reason)
        found[Path(file)] = read

    def read_file(file):
        refuse_special(file)
        return file.read_bytes()
    for folder, subfolders, names in os.walk(
            path, followlinks=True, onerror=lambda e: refuse(e.filename, e.strerror)):
        real = os.path.realpath(folder)
        if real in seen:
            refuse(folder, "a link to a folder that is read already")
            subfolders.clear()
        else:
            found.update((Path(folder, name), None) for name in names if is_image(name))
        seen.add(real)
        subfolders.sort()
    return [(f, found[f] or partial(read_file, f)) for f in sorted(found)]


def fingerprint(path):
    """The names, sizes and times of the files that image_files reads. path: pathlib.Path."""
    def facts(file):
        with contextlib.suppress(OSError):
            return file.stat().st_size, file.stat().st_mtime_ns
    if path.is_dir():
        return path.name, [(str(f.relative_to(path)), facts(f)) for f, _ in folder_images(path)]
    return path.name, facts(path)


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
    with opener(path, "rb") as f:
        file = BoundedFile(f, path)
        tar = tarfile.open(fileobj=file, mode="r:")
        for member in tar:
            refuse_outside(path, member.name)
            if is_image(member.name) and not member.isdir():
                bounded(path, member.size)                      # a sparse one may hold few bytes
                yield member.name, partial(read, member)
        if file.last != bytes(512):                             # where tarfile ends without a word
            raise UserError(f"{path} is cut short or damaged: copy it again")


class BoundedFile:
    """An unpacked tar that cannot be read beyond the limit of `bounded`: even a header may claim
    that it is gigabytes long. last: what was read last; at a tar's end, zeros."""

    def __init__(self, file, path):
        self.file, self.path, self.tell = file, path, file.tell

    def read(self, n):
        bounded(self.path, self.tell() + n)
        self.last = self.file.read(n)
        return self.last

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
        say(f"{args.out}: {data.facts()}")


if __name__ == "__main__":
    main()
