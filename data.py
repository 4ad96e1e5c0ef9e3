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
from util import (UserError, atomic_write, crop_and_resize, fetch, open_upright, refuse_special,
                  seed_for, warn)

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}     # Pillow's formats
EXTENSIONS = {e for e, f in Image.registered_extensions().items() if f not in NO_PICTURES}
LEFTOVERS = {"__macosx", "@eadir", "@__thumb", "#recycle", "@recycle", "$recycle.bin"}
TABLES = re.compile(r"dataset\.json|metadata\.(csv|jsonl|parquet)")
SPLIT = re.compile("(train(ing)?|val(id|idation)?|dev|test(ing)?|eval)[0-9]*[AB]?", re.IGNORECASE)
UNPACK_LIMIT = 2 ** 29                          # bytes that every archive may unpack to
KEEP_FROM = 2 ** 21                             # bytes of images that are worth a file
GIVE = "give leaves, cifar10, or a folder, zip, tar, .npy or .npz of images"


@dataclass
class Images:
    """A data set, checked as it enters: UserError says what is wrong with it. facts() and colour()
    describe uint8 images as normalize() makes them, in [-1, 1], and latents as they are."""
    images: torch.Tensor                        # [N, C, H, W], uint8; latents: finite floats
    labels: torch.Tensor = None                 # int64 [N], indices into classes; None: all are 0
    classes: tuple = ("all",)                   # the names of the classes
    name: str = "mine"
    latents: bool = False                       # the images are floats, meant as they are
    no_classes: str = ""                        # why there is one class only, for --cond

    def __post_init__(self):
        self.name, self.classes = str(self.name), [str(c) for c in self.classes]
        x = self.images
        if not isinstance(x, torch.Tensor) or x.ndim != 4 or 0 in x.shape or not (
                x.is_floating_point() and x.isfinite().all() if self.latents
                else x.dtype == torch.uint8 and (x.shape[1] < 5 or x.shape[3] > 4)):
            raise UserError(f"{self.name}: images must be a torch.uint8 tensor [N, C, H, W] or "
                            "finite floats, which latents=True takes as they are; these are "
                            f"{getattr(x, 'dtype', type(x))} {list(getattr(x, 'shape', ()))}")
        if self.labels is None and len(self.classes) == 1:
            self.labels = torch.zeros(len(x), dtype=torch.long)
        y = self.labels
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
            x = part.double() if self.latents else part.double() / 127.5 - 1
            total, squares = total + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3))
        digest.update(self.labels.contiguous().numpy())
        mean = total / (n * h * w)
        std = (squares / (n * h * w) - mean ** 2).clamp(min=0).sqrt()
        return {"name": self.name, "count": n, "shape": [c, h, w], "classes": self.classes,
                "latents": self.latents, "digest": digest.hexdigest()[:16],
                "mean": [round(v, 9) for v in mean.tolist()],   # the last digits differ between
                "std": [round(v, 9) for v in std.tolist()]}     # machines

    def colour(self):
        """The Gaussian of the images' mean colours, as lists: {"mean": [C], "cov": [C][C]}."""
        colours = torch.cat([p.double().mean((2, 3)) for p in self.images.split(256)])  # [N, C]
        colours = colours if self.latents else colours / 127.5 - 1
        return {"mean": colours.mean(0).tolist(),
                "cov": torch.atleast_2d(colours.T.cov(correction=0)).tolist()}


def load(spec, resolution=None, folder="data", keep=True):
    """The data set that spec names, as uint8 Images. Raises UserError.

    spec: "leaves" (made here), "cifar10" (the 50,000 training images, fetched once into folder),
    the path of a folder, zip, tar or .npy of images, or "a.npz:x" for the array x in a.npz.
    resolution: centre-crop and resize to this many pixels a side; None: keep the size.
    keep: many images are decoded once, kept in folder until their files change, and mapped into
    memory: the processes of a machine share them.
    """
    if spec in ("leaves", "cifar10") and os.path.exists(spec) \
            and not os.path.exists(f"{spec}/options.json"):     # a run
        raise UserError(f"{spec} is a built-in set, and there is a {spec} here: give ./{spec} for "
                        "that one, or rename it to have the built-in set")
    if spec == "leaves":
        side = resolution or 16
        made = kept(Path(folder, f"leaves-{side}.pt"), lambda: {"images": leaves(16384, side)})
        return Images(**made, name=spec)
    file, colon, array = str(spec).partition(".npz:")
    path = Path(f"{file}.npz" if colon else spec)
    if spec == "cifar10":
        array, path = spec, Path(folder, "cifar-10-binary.tar.gz")
        fetch(CIFAR10_URL, path, CIFAR10_SHA256)
    refuse_special(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: {GIVE}")
    paths = dict(folder_files(path)) if path.is_dir() else {"": path}
    key = 2, array, resolution, [(name, (s := file.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns)
                              for name, file in paths.items()]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    file = Path(folder, f"images-{path.resolve().stem}-{digest}.pt")
    make = partial(read, path, paths, array, resolution)
    found = kept(file, make) if keep else make()
    for line in found.pop("said"):
        warn(f"{path}: {line}")
    name = spec if spec == "cifar10" else f"{path.resolve().name}:{array}".rstrip(":")
    return Images(**found, name=name)


def kept(path, make):
    """What make() returns: a dict with images and plain types. From KEEP_FROM bytes on it is in the
    file at path, where that can be written, and mapped into memory; a change stays in memory."""
    with contextlib.suppress(Exception):                        # it is missing or damaged
        return torch.load(path, mmap=True, weights_only=True)
    found = make()
    if found["images"].nbytes >= KEEP_FROM:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as f:
                torch.save(found, f)
            return torch.load(path, mmap=True, weights_only=True)
        except (OSError, RuntimeError) as e:                    # torch has one for a full disk
            warn(f"{path} could not be written; is the disk full? ({e})")
    return found


def shuffled(start, count, n, seed):
    """Places start to start + count in an endless series of shuffles of n images, int64 [count]:
    an epoch shows each image once."""
    place = torch.arange(start, start + count)
    epochs = range(start // n, (start + count - 1) // n + 1)
    return torch.cat([epoch(e, n, seed)[place[place // n == e] % n] for e in epochs])


@lru_cache(maxsize=2)
def epoch(e, n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_for("epoch", seed, e)))


def take(images, index, device):
    """images[index] on the device; through pinned memory, so that the CPU waits for no copy."""
    batch = images[index]
    return batch if device.type == "cpu" else batch.pin_memory().to(device, non_blocking=True)


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

    def draw(random, *shape):
        return random(b, *shape, device=device)[part]

    flip_x = draw(torch.rand) < 0.5
    flip_y = (draw(torch.rand) < p) & (draw(torch.rand) < 0.5)
    scale = (draw(torch.rand) < p) * draw(torch.randn)
    angle = (draw(torch.rand) < p) * math.pi * (2 * draw(torch.rand) - 1)
    stretch = (draw(torch.rand) < p) * draw(torch.randn)
    direction = (draw(torch.rand) < 0.5) * math.pi * (2 * draw(torch.rand) - 1)
    shift = (draw(torch.rand) < p)[:, None] * draw(torch.randn, 2)
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


def leaves(n, resolution=16, seed=0, discs=96):
    """The dead-leaves model of natural scenes: uint8 [n, 3, resolution, resolution].

    Opaque discs of random colours overlap; they are drawn from front to back. Radii have a density
    of r^-3 from 1/4 of the side to the whole side. Centres are uniform over all places from which
    a disc can reach the image.
    """
    g = torch.Generator().manual_seed(seed)
    pixel = (torch.arange(resolution) + 0.5) / resolution       # in units of the side
    chunks = []
    for start in range(0, n, 1024):
        b = min(1024, n - start)
        image = torch.zeros(b, 3, resolution, resolution)
        uncovered = torch.ones(b, 1, resolution, resolution)    # the share of each pixel
        for _ in range(discs):
            u, x, y = torch.rand(3, b, 1, 1, 1, generator=g)
            radius, x, y = (16 - 15 * u) ** -0.5, 3 * x - 1, 3 * y - 1
            distance = torch.hypot(pixel - x, pixel[:, None] - y)               # [b, 1, H, W]
            disc = ((radius - distance) * resolution + 0.5).clamp(0, 1)         # soft over a pixel
            image += uncovered * disc * torch.rand(b, 3, 1, 1, generator=g)
            uncovered *= 1 - disc
        image += uncovered * torch.rand(b, 3, 1, 1, generator=g)
        chunks.append((image * 255).round().byte())
    return torch.cat(chunks)


def read(path, paths, array, resolution):
    """What path holds, sorted by name, as a dict for Images; "said": the lines to say about it.
    Files that cannot be read are named on stderr. Raises UserError."""
    try:
        if zipfile.is_zipfile(path):                            # as an .npz is
            bounded(path, sum(info.file_size for info in zipfile.ZipFile(path).infolist()))
        entries, values, said = array_source(path, array) \
            if array or path.suffix in (".npy", ".npz") else file_source(path, paths)
    except UserError:
        raise
    except Exception as e:                                      # zip, tar, json and NumPy differ
        reason = f"{type(e).__name__}: {str(e).split(':')[0]}"
        what = "is one image: give its folder" if path.suffix.lower() in EXTENSIONS else GIVE
        raise UserError(f"{path} cannot be read ({reason}): {what}") from None
    images, infos, channels = None, {}, 1
    with ThreadPoolExecutor() as pool:
        for n, pixels, info in tqdm(pool.map(partial(decode, resolution), entries), "decoding",
                                     len(entries)):
            if pixels is None:
                warn(f"skipped {n}: {info}")
                continue
            if images is None:
                images = np.empty((len(entries), 3, *pixels.shape[1:]), np.uint8)
            if pixels.shape[1:] != images.shape[2:]:
                raise UserError(f"{n} and the first image have different sizes: give a resolution "
                                "to crop and resize them to")
            images[len(infos)] = pixels                         # grey as three equal channels
            infos[n], channels = info, max(channels, len(pixels))
    if not infos:
        raise UserError("; ".join([f"{path} contains no image that can be read", *said, GIVE]))
    if skipped := len(entries) - len(infos):
        said.append(f"{skipped} of {len(entries)} images skipped")
    deep = max(info.get("deep", 0) for info in infos.values())
    if 0 < deep < 2 ** 15:                                      # 12 bits in 16, for example
        said.append(f"its 16-bit images use 1/{2 ** 16 // deep} of their range: convert to 8 bits")
    if stacks := [n for n in infos if infos[n].get("stack")]:
        said.append(f"only the first page is read of {len(stacks)} with several, as {stacks[0]}")
    no_classes = values if isinstance(values, str) else ""      # the reason
    values = ["all" if no_classes else values[n] for n in infos]
    classes, labels = np.unique(values, return_inverse=True)
    return {"images": torch.from_numpy(images[:len(infos), :channels]).contiguous(),
            "labels": torch.from_numpy(labels), "classes": classes.tolist(),
            "no_classes": no_classes, "said": said}


def decode(resolution, entry):
    """entry: a name and a function that returns the bytes of a PNG or another file, or an array
    [H, W] or [H, W, 3]. -> the name, uint8 [1 or 3, H, W] and the facts of open_upright; or the
    name, None and the error."""
    name, content = entry
    try:
        found = content()
        image = Image.fromarray(found) if isinstance(found, np.ndarray) \
            else open_upright(io.BytesIO(found))
        info = image.info
        image = crop_and_resize(image, resolution, resolution) if resolution else image
        return name, np.atleast_3d(image).transpose(2, 0, 1), info
    except Exception as e:                                      # decoders raise nearly anything
        return name, None, e


# What a path holds: entries, sorted pairs of an image's name and a function that returns its
# content; {name: class}, or a string, why there are no classes; lines to say about it

def file_source(path, paths):
    """A folder, zip or tar. Archives may be hostile: they are read, never unpacked to disk."""
    if path.is_dir():
        members = {name: file.read_bytes for name, file in paths.items()}
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        members = {i.filename: partial(archive.read, i) for i in archive.infolist()
                   if not i.is_dir()}
    else:
        members = tar_members(path)
    entries, tables, left = {}, {}, []
    for name, content in members.items():
        file = PurePosixPath(name.replace("\\", "/"))           # Windows' names
        shown = not any(p.startswith(".") or p.lower() in LEFTOVERS for p in file.parts)
        if shown and file.suffix.lower() in EXTENSIONS:
            entries[str(file)] = content
        elif shown and TABLES.fullmatch(file.name):
            tables[str(file)] = content
        else:
            left.append(name)
    said = [f"files that are not read: {len(left)}, as {left[0]}"] if left else []
    return sorted(entries.items()), file_classes(entries, tables), said


def array_source(path, chosen):
    """A .npy, or of an .npz the array that is chosen, or else its only images. Their classes are in
    the only other array of as many numbers or names. And CIFAR-10's binary archive."""
    if chosen == "cifar10":
        batches = [content() for name, content in sorted(tar_members(path).items())
                   if "/data_batch_" in name]       # records: a label, then three planes of pixels
        records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, 1 + 3072)
        arrays = {chosen: records[:, 1:].reshape(-1, 3, 32, 32),
                  "labels": np.array(CIFAR10_CLASSES)[records[:, 0]]}
    else:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = dict(loaded) if path.suffix == ".npz" else {"": loaded}
    found = [k for k, a in arrays.items() if a.dtype == np.uint8 and a.size and (
        a.ndim == 3 and a.shape[2] > 4 or a.ndim == 4 and {1, 3} & {a.shape[1], a.shape[3]})]
    chosen = chosen or (found[0] if len(found) == 1 else None)
    if chosen not in found:
        held = ", ".join(f"{k} {a.dtype} {list(a.shape)}".lstrip() for k, a in arrays.items())
        raise UserError(f"{path} holds {held}: images are uint8 [N, H, W], or [N, H, W, C] of 1 or "
                        f"3 channels; of several give one, as {path}:NAME")
    x = arrays[chosen]
    x = x.transpose(0, 2, 3, 1) if x.ndim == 4 and x.shape[3] not in (1, 3) else x
    x = x[..., 0] if x.shape[3:] == (1,) else x                 # [N, H, W] or [N, H, W, 3]
    entries = [(f"{i:09d}", partial(x.__getitem__, i)) for i in range(len(x))]
    labels = [a for a in arrays.values()
              if a.dtype.kind in "iuU" and a.shape in ((len(x),), (len(x), 1))]
    values = dict(zip(dict(entries), labels[0].ravel().tolist())) if len(labels) == 1 \
        else f"{len(labels)} of its arrays could be its labels"
    return entries, values, []


def file_classes(names, tables):
    """EDM's table: the labels that dataset.json has for the images below its folder. Or the first
    folder in which the paths differ."""
    for table in (name for name in tables if name.endswith("dataset.json")):
        given = dict(json.loads(tables[table]()).get("labels") or ())
        folder = PurePosixPath(table).parent
        labels = {str(folder / n.replace("\\", "/")): label for n, label in given.items()}
        if unknown := names.keys() - labels.keys():
            return f"{table} has no label for {len(unknown)} of {len(names)} images"
        if {type(labels[n]) for n in names} not in ({int}, {str}):
            return f"the labels in {table} are neither whole numbers nor names"
        return labels
    folders = [PurePosixPath(n).parts[:-1] for n in names]
    depth = len(os.path.commonprefix(folders))
    values = [(*folder, "")[depth] for folder in folders]       # "": an image beside the folders
    reasons = [f"labels in {n} are not read" for n in tables]
    splits = sorted({value for value in values if SPLIT.fullmatch(value)})
    if len(splits) > 1:                                         # one class may be named train
        reasons.insert(0, f"{' and '.join(splits)} are splits: give one of them")
    if "" in values:
        reasons.append(f"{values.count('')} of {len(names)} images lie in no folder of a class")
    return ", and ".join(reasons) or dict(zip(names, values))


def tar_members(path):
    """{name: a function that returns its content} of a tar, which is read whole: in a compressed
    one there is no other order. Links are not followed."""
    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, *args):
            header = super().frombuf(*args)
            bounded(path, header.size)                          # before it is read
            return header

    members = {}
    with tarfile.open(path, tarinfo=Header) as tar:
        for member in tar:
            bounded(path, member.offset_data + member.size)
            if not member.isdir():
                content = tar.extractfile(member).read() if member.isfile() else b""
                members[member.name] = partial(bytes, content)
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):                 # where tarfile ends without a word
            raise UserError(f"{path} is cut short or damaged: copy it again")
    return members


def bounded(path, size):
    """Raises UserError where an archive unpacks to far more bytes than it has: images do not."""
    if size > UNPACK_LIMIT + 100 * path.stat().st_size:
        raise UserError(f"{path} is refused: it unpacks to {size / 2 ** 30:.1f} GiB, more than 100 "
                        "times its size; if you trust it, save it uncompressed")


def folder_files(folder, inside="", around=()):
    """Yields the name and path of each file below a folder. Links are followed, but not to a folder
    around them. OSError where a folder cannot be read."""
    around = (*around, os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and os.path.realpath(entry) not in around:
            yield from folder_files(entry, f"{inside}{entry.name}/", around)
        elif entry.is_file():
            yield inside + entry.name, Path(entry)
        else:
            warn(f"{entry.path} is not read: it is no file, or a link to none or around itself")
