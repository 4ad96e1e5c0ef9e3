"""Data sets as tensors, the batches of training, and EDM's non-leaky augmentation.

    python -c "import data; print(data.load('my-images/').facts())"

What is read, and what a class is, format by format: docs/data.md.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import re
import tarfile
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from degrade import dct2, idct2
from util import (UserError, atomic_write, crop_and_resize, fetch, open_upright, or_a_warning,
                  refuse_special, remove_parts, restricted_unpickle, seed_for, warn)

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}     # Pillow's formats
EXTENSIONS = {e for e, f in Image.registered_extensions().items() if f not in NO_PICTURES}
LEFTOVERS = {"__macosx", "@eadir", "@__thumb", "#recycle", "@recycle", "$recycle.bin"}
READ_FIRST = re.compile(r"dataset\.json|metadata\.(csv|jsonl|parquet)|data_batch_[1-5](\.bin)?")
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
UNPACK_LIMIT = 2 ** 29                          # bytes that every archive may unpack to
KEEP_FROM = 2 ** 24                             # bytes of decoded images that are worth a file
VERSION = 3                                     # of how images are decoded


@dataclass
class Images:
    """A data set, checked as it enters: UserError says what is wrong with it. facts() and colour()
    describe uint8 images as normalize() makes them, in [-1, 1], and latents as they are."""
    images: torch.Tensor                        # [N, C, H, W], uint8; latents: finite floats
    labels: torch.Tensor = None                 # int64 [N], indices into classes; None: all are 0
    classes: tuple = ("all",)                   # the names of the classes
    name: str = "mine"
    skipped: tuple = ()                         # names of the unreadable files
    latents: bool = False                       # the images are floats, meant as they are
    no_classes: str = ""                        # why there is one class only, for --cond

    def __post_init__(self):
        self.name, self.classes = str(self.name), [str(c) for c in self.classes]
        x, shape = self.images, list(self.images.shape)
        if not isinstance(x, torch.Tensor) or x.ndim != 4 or 0 in shape or not (
                x.is_floating_point() and all(part.isfinite().all() for part in x.split(256))
                if self.latents else x.dtype == torch.uint8):
            raise UserError(f"{self.name}: images must be a uint8 tensor [N, C, H, W], or finite "
                            "floats, which latents=True takes as they are; these are "
                            f"{x.dtype} {shape} with latents={self.latents}")
        y = self.labels = torch.zeros(len(x), dtype=torch.long) if self.labels is None \
            else self.labels
        if not isinstance(y, torch.Tensor) or y.dtype != torch.long or y.shape != (len(x),) \
                or y.min() < 0 or y.max() >= len(self.classes) \
                or len(set(self.classes)) < len(self.classes):
            raise UserError(f"{self.name}: labels must be an int64 tensor [{len(x)}] of places in "
                            f"the {len(self.classes)} classes, which have different names")

    def facts(self):
        """What a checkpoint stores about its data, as plain types. mean and std: per channel."""
        n, c, h, w = self.images.shape
        digest, total, squares = hashlib.sha256(), 0, 0
        for part in self.images.split(256):                     # a whole float copy may not fit
            digest.update(part.contiguous().view(torch.uint8).numpy())
            x = part.double()
            total, squares = total + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3))
        digest.update(self.labels.contiguous().numpy())
        mean, unit = total / (n * h * w), 1 if self.latents else 127.5
        std = (squares / (n * h * w) - mean ** 2).clamp(min=0).sqrt() / unit
        mean = mean if self.latents else mean / unit - 1
        return {"name": self.name, "count": n, "shape": [c, h, w], "classes": self.classes,
                "counts": self.labels.bincount(minlength=len(self.classes)).tolist(),
                "skipped": len(self.skipped), "latents": self.latents,
                "digest": digest.hexdigest()[:16],              # the last digits of the others
                "mean": [round(v, 9) for v in mean.tolist()],   # differ between machines
                "std": [round(v, 9) for v in std.tolist()]}

    def colour(self):
        """The Gaussian of the images' mean colours, as lists: {"mean": [C], "cov": [C][C]}."""
        n, c, h, w = self.images.shape
        parts = self.images.split(256)                          # a whole float copy may not fit
        colours = torch.cat([p.sum((2, 3), dtype=torch.float64) for p in parts]) / (h * w)
        if not self.latents:
            colours = colours / 127.5 - 1
        cov = colours.T.cov(correction=0).reshape(c, c)
        return {"mean": colours.mean(0).tolist(), "cov": cov.tolist()}


def load(spec, resolution=None, folder="data", keep=True):
    """The data set that spec names, as uint8 Images. Raises UserError.

    spec: "leaves" (made here), "cifar10" (the 50,000 training images, fetched once into folder),
    the path of a folder, zip, tar or .npy of images, or "a.npz:x" for the array x in a.npz.
    resolution: centre-crop and resize to this many pixels a side; None: keep the size.
    keep: many images are decoded once, kept in folder until their files change, and mapped into
    memory: the processes of a machine share them, and only what is used has to fit.
    """
    if spec in ("leaves", "cifar10") and os.path.exists(spec) \
            and not os.path.exists(f"{spec}/options.json"):     # a run
        raise UserError(f"{spec} is a built-in set, and there is a {spec} here: give ./{spec} for "
                        "that one, or rename it to have the built-in set")
    if spec == "leaves":
        return load_leaves(resolution or 16, folder)
    file, colon, array = str(spec).partition(".npz:")
    path = Path(f"{file}.npz" if colon else spec)
    if spec == "cifar10":
        path = fetch(CIFAR10_URL, Path(folder) / "cifar-10-binary.tar.gz", "md5", CIFAR10_MD5)
    refuse_special(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give leaves, cifar10, or a folder, zip, tar, .npy "
                        "or .npz of images")
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        raise UserError(f"{path} is one image: give the folder that contains it")
    paths = folder_files(path) if path.is_dir() else {"": path}
    key = VERSION, array, resolution, [(name, stamp(file)) for name, file in paths.items()]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    kept = Path(folder, f"images-{path.resolve().stem}-{digest}.npy")
    try:
        images = np.load(kept, mmap_mode="c", allow_pickle=False)
        found = json.loads(kept.with_suffix(".json").read_text())
    except (OSError, ValueError, EOFError):                     # the first time
        images, found = decode_all(path, paths, array, resolution, kept if keep else None)
    for line in found.pop("said"):
        warn(f"{path}: {line}")
    labels = torch.tensor(found.pop("labels"))
    images = torch.from_numpy(images)[:len(labels), :found.pop("channels")]
    found["name"] = spec if spec == "cifar10" else found["name"]
    return Images(images, labels, **found)


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


# Dead leaves

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
    with contextlib.suppress(OSError, ValueError, EOFError):    # it is missing or incomplete
        return Images(torch.from_numpy(np.load(path, allow_pickle=False)), name="leaves")
    images = leaves(n, resolution)
    with or_a_warning(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            np.save(f, images.numpy())
    return Images(images, name="leaves")


# From files to images

def decode_all(path, paths, array, resolution, kept):
    """An array that begins with the images that path holds, sorted by name, and what is known of
    them, for JSON. From KEEP_FROM bytes on they are in the file `kept`."""
    try:
        name, entries, class_of, left = array_source(path, array) \
            if path.suffix in (".npy", ".npz") else file_source(path, paths)
    except Exception as e:                                      # zip, tar, zlib and NumPy differ
        if isinstance(e, UserError):
            raise
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{path} is not a folder, zip, tar, .npy or .npz that can be read "
                        f"({reason})") from None
    images, notes = decode_files(entries, resolution, kept, 16)
    if not notes:
        raise UserError(f"{path} contains no image that can be read" + (left and f" ({left})"))
    said = [f"not read: {left}"] if left else []
    deep = max(note.get("deep", 0) for note in notes.values())
    if 0 < deep < 2 ** 15:                                      # 12 bits in 16, for example
        bits = max(8, deep.bit_length())
        said.append(f"its 16-bit images use 1/{2 ** (16 - bits)} of their range: they are read as "
                    f"{bits}-bit ones")
        images, notes = decode_files(entries, resolution, kept, bits)
    if stacks := [n for n in notes if notes[n].get("stack")]:
        said.append(f"only the first page is read of {len(stacks)} with several, as {min(stacks)}")
    skipped = sorted({n for n, _ in entries} - notes.keys())
    if skipped:
        said.append(f"{len(skipped)} of {len(skipped) + len(notes)} images skipped")
    labels, classes, no_classes = classified(sorted(notes), class_of)
    found = {"name": name, "labels": labels, "classes": classes, "no_classes": no_classes,
             "channels": max(note["channels"] for note in notes.values()),
             "skipped": skipped, "said": said}
    if isinstance(images, np.memmap):
        with atomic_write(kept.with_suffix(".json"), "w") as f:
            json.dump(found, f)
    return images, found


def decode_files(entries, resolution, kept, bits):
    """-> that array, and {name: facts} of the images; what cannot be read is named on stderr.
    bits: the depth of 16-bit images."""
    places, images, notes = {n: i for i, n in enumerate(sorted({n for n, _ in entries}))}, None, {}
    try:
        with contextlib.ExitStack() as stack:
            for name, image in decoded(entries, resolution, bits):
                if isinstance(image, Exception):
                    warn(f"skipped {name}: {image}")
                    continue
                image, notes[name] = image
                if images is None:
                    images = room((len(places), 3, *image.shape[1:]), kept, stack)
                if image.shape[1:] != images.shape[2:]:
                    raise UserError(f"{name} and the first image have different sizes: give a "
                                    "resolution to crop and resize them to")
                images[places[name]] = image                    # grey as three equal channels
            for i, name in enumerate(sorted(notes)):
                if i < places[name]:                            # close the gaps
                    images[i] = images[places[name]]
        return np.load(kept, mmap_mode="c") if isinstance(images, np.memmap) else images, notes
    except OSError as e:
        warn(f"the decoded images cannot be kept in {kept.parent} ({e.strerror})")
        return decode_files(entries, resolution, None, bits)


def room(shape, kept, stack):
    """Space for images: in the file kept, from KEEP_FROM bytes on, or else in memory."""
    if not kept or math.prod(shape) < KEEP_FROM:
        return np.empty(shape, np.uint8)
    kept.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(kept.parent, age=86400)                        # another program may be at its own
    part = stack.enter_context(atomic_write(kept))
    array = np.lib.format.open_memmap(part.name, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):                          # else a full disk ends the process
        os.posix_fallocate(part.fileno(), 0, os.path.getsize(part.name))
    return array


def decoded(entries, resolution, bits):
    """Yields each name with what decode returns, or with the exception that it raised. Files are
    read in their order, and decoded on all cores."""
    def attempt(f, *args):
        try:
            return f(*args)
        except Exception as e:                                  # decoders raise nearly anything
            return e

    def image(data):
        return data if isinstance(data, Exception) else attempt(decode, data, resolution, bits)
    some = 16 * (os.cpu_count() or 1)
    with ThreadPoolExecutor() as pool, tqdm(total=len(entries), desc="decoding") as bar:
        for start in range(0, len(entries), some):
            names, reads = zip(*entries[start:start + some])
            yield from zip(names, pool.map(image, map(attempt, reads)))
            bar.update(len(names))


def decode(data, resolution, bits):
    """An image, the bytes of a file or an array -> uint8 [1 or 3, H, W], and facts about it."""
    image = Image.fromarray(data) if isinstance(data, np.ndarray) \
        else open_upright(io.BytesIO(data), bits)
    facts = {**image.info, "channels": len(image.getbands())}
    image = crop_and_resize(image, resolution, resolution) if resolution else image
    return np.atleast_3d(np.array(image)).transpose(2, 0, 1), facts


# What a path holds: its name; entries, pairs of an image's name and a function that reads it; a
# function that returns the classes of names; what is not read

def file_source(path, paths):
    if path.is_dir():
        members = ((name, partial(read_file, file)) for name, file in paths.items())
    else:
        members = zip_members(path) if zipfile.is_zipfile(path) else tar_members(path)
    entries, texts, left = [], {}, Counter()
    for name, read in members:
        name = PurePosixPath(name.replace("\\", "/"))           # Windows' names
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{path} is refused: it contains {str(name)!r}, which would unpack "
                            "outside its folder")
        if any(part.startswith(".") or part.lower() in LEFTOVERS for part in name.parts):
            left["hidden or of a file manager"] += 1
        elif READ_FIRST.fullmatch(name.name):
            texts[str(name)] = read()
        elif name.suffix.lower() in EXTENSIONS:
            entries.append((str(name), read))
        else:
            left[name.suffix.lower() or "without an extension"] += 1
    if batches := [texts[name] for name in sorted(texts) if "data_batch_" in name]:
        records = np.concatenate([cifar10_records(batch) for batch in batches])
        entries = rows(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        return path.resolve().name, entries, lambda _: [CIFAR10_CLASSES[i] for i, *_ in records], ""
    left = ", ".join(f"{n} {kind}" for kind, n in left.most_common(8))
    return path.resolve().name, entries, partial(file_classes, texts), left


def array_source(path, chosen):
    """A .npy, or of an .npz the array that is chosen, or else its only images."""
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if path.suffix == ".npz":
        bounded(path, sum(info.file_size for info in loaded.zip.infolist()))
    arrays = {"": loaded} if path.suffix == ".npy" else dict(loaded)
    found = {k: pictures(a) for k, a in arrays.items() if pictures(a) is not None}
    chosen = chosen or (list(found)[0] if len(found) == 1 else None)
    if chosen not in found:
        held = ", ".join(f"{k} {a.dtype} {list(a.shape)}".lstrip() for k, a in arrays.items())
        remedy = f"give one, as {path}:{min(found)}" if found else \
            "images are uint8 [N, H, W], or [N, H, W, C] of 1 or 3 channels"
        raise UserError(f"{path} holds {held}: {remedy}")
    return (f"{path.name}:{chosen}".rstrip(":"), rows(found[chosen]),
            partial(array_classes, chosen, arrays), "")


def pictures(a):
    """Images [N, H, W], [N, H, W, C] or [N, C, H, W] -> [N, H, W] or [N, H, W, 3]; else None."""
    if a.dtype != np.uint8 or a.ndim not in (3, 4) or 0 in a.shape:
        return None
    if a.ndim == 3:
        return a if a.shape[2] > 4 else None                    # else it is one image
    a = a if a.shape[3] in (1, 3) else a.transpose(0, 2, 3, 1)
    return {1: a[..., 0], 3: a}.get(a.shape[3])


def rows(images):
    return [(f"{i:09d}", partial(images.__getitem__, i)) for i in range(len(images))]


def cifar10_records(batch):
    """A file of CIFAR-10, binary or Python's -> uint8 [N, 1 + 3072]: a label, then RGB."""
    if batch[0] < 10:                                           # a label; pickles begin otherwise
        return np.frombuffer(batch, np.uint8).reshape(-1, 1 + 3072)
    found = restricted_unpickle(batch, PICKLED)
    labels, pixels = (found[key] if key in found else found[key.encode()]
                      for key in ("labels", "data"))
    return np.c_[labels, np.frombuffer(pixels[-1], np.uint8).reshape(-1, 3072)].astype(np.uint8)


class Stored(list):
    """What stands for NumPy's types in a pickle. The state of an array ends with its bytes."""
    __setstate__ = list.extend


PICKLED = dict.fromkeys([("numpy.core.multiarray", "_reconstruct"), ("numpy", "dtype"),
                         ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray")],
                        lambda *args: Stored())
PICKLED["_codecs", "encode"] = lambda text, code: text.encode("latin1")


# What a class is

def classified(names, class_of):
    """The label of each image, the names of the classes, and "". Or why there are no classes."""
    try:
        values = class_of(names)
        if {type(v) for v in values} not in ({int}, {str}):
            raise ValueError("its labels are neither whole numbers nor names")
    except ValueError as e:
        return [0] * len(names), ["all"], str(e)
    classes = sorted(set(values))
    places = {value: i for i, value in enumerate(classes)}
    return [places[v] for v in values], classes, ""


def array_classes(chosen, arrays, names):
    """The labels of the images of this name: the other array of as many, and of the same split."""
    found = {k: a for k, a in arrays.items() if a.size == len(names) == len(a)
             and split_words(k) == split_words(chosen)}
    if len(found) != 1:
        raise ValueError(f"{' and '.join(found) or 'no array'} could be its labels")
    return next(iter(found.values())).ravel().tolist()


def file_classes(texts, names):
    """From EDM's table, or the first folder in which the paths differ."""
    for table in texts:
        if table.endswith("dataset.json"):
            return table_classes(PurePosixPath(table), texts[table], names)
    folders = [PurePosixPath(n).parts[:-1] for n in names]
    depth = len(os.path.commonprefix(folders))
    values = [folder[depth] if len(folder) > depth else "" for folder in folders]
    found, reasons = sorted(set(values)), []
    splits = [value for value in found if split_words(value)]
    if len(splits) >= 2 and 2 * len(splits) >= len(found):      # a class may be named train
        reasons.append(f"{' and '.join(splits)} are splits: give one of them")
    reasons += [f"labels in {n} are not read" for n in texts]
    if "" in found:
        reasons.append(f"{values.count('')} of {len(names)} images lie in no folder of a class")
    if reasons:
        raise ValueError(", and ".join(reasons))
    return values


def table_classes(table, text, names):
    """EDM's and StyleGAN's labels: those that dataset.json has for the images below its folder."""
    try:
        given = dict(json.loads(text).get("labels") or ())
        labels = {str(table.parent / n.replace("\\", "/")): label for n, label in given.items()}
    except Exception as e:                                      # it may hold anything
        raise ValueError(f"{table} cannot be read ({type(e).__name__})") from None
    if known := len(names) - sum(name in labels for name in names):
        raise ValueError(f"{table} has no label for {known} of {len(names)} images")
    return [labels[name] for name in names]


def split_words(name):
    """{"train"} of train2017, trainA or x_train."""
    return {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)} & SPLITS


# Folders and archives. Archives may be hostile: they are read, never unpacked to disk.

def zip_members(path):
    archive = zipfile.ZipFile(path)
    files = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
    bounded(path, sum(info.file_size for info in files))
    return [(info.filename, refuse_link if info.external_attr >> 28 == 0o12     # Unix's S_IFLNK
             else partial(archive.read, info)) for info in files]


def tar_members(path):
    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, *args):
            header = super().frombuf(*args)
            bounded(path, header.size)                          # before it is read
            return header

    tar = tarfile.open(path, tarinfo=Header)
    for member in tar:
        bounded(path, member.offset_data + member.size)
        if not member.isdir():
            yield member.name, (lambda m=member: tar.extractfile(m).read()) if member.isfile() \
                else refuse_link
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(512) != bytes(512):                     # where tarfile ends without a word
        raise UserError(f"{path} is cut short or damaged: copy it again")


def refuse_link():
    raise ValueError("it is a link in an archive; links are not followed")


def bounded(path, size):
    """Raises UserError where the file at path, a pathlib.Path, unpacks to more bytes than images
    do: they are compressed already."""
    packed = path.stat().st_size
    if size > UNPACK_LIMIT + 100 * packed:
        raise UserError(f"{path} is refused: it unpacks to {size / 2 ** 30:.1f} GiB from "
                        f"{packed / 2 ** 20:.1f} MiB; if you trust it, save it uncompressed")


def folder_files(root):
    """{name: path} of all files below root. Links are followed, into each folder once."""
    found, seen = {}, set()
    for folder, subfolders, names in os.walk(
            root, followlinks=True, onerror=lambda e: warn(f"{e.filename}: {e.strerror}")):
        subfolders.sort()
        real = os.path.realpath(folder)
        if real in seen:
            warn(f"{folder} is a link to a folder that is read already")
            subfolders.clear()
            continue
        seen.add(real)
        files = [Path(folder, name) for name in sorted(names)]
        found.update((file.relative_to(root).as_posix(), file) for file in files)
    return found


def read_file(path):
    refuse_special(path)
    return path.read_bytes()


def stamp(path):
    """What differs where another file of the same size and time is put in its place."""
    facts = path.stat() if path.exists() else None
    return facts and (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
