"""Reading data sets from disk: folders, archives and arrays of images, and their classes.

data.load is what uses this. What is read, and what a class is, format by format: docs/data.md.
"""
import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
import torch
from PIL import Image

from util.cli import UserError, progress, reason, warn
from util.files import atomic_write, fetch, refuse_special
from util.images import crop_and_resize, open_upright

BUILT_IN = ("leaves", "cifar10")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()

# Formats that Pillow has an extension for, and which are no pictures, or need another program
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
EXTENSIONS = {extension for extension, file_format in Image.registered_extensions().items()
              if file_format not in NO_PICTURES}
LEFTOVERS = {"__macosx", "@eadir", "@__thumb", "#recycle", "@recycle", "$recycle.bin"}
TABLES = re.compile(r"dataset\.json|metadata\.(csv|jsonl|parquet)")             # of labels
SPLIT = re.compile("(train(ing)?|val(id|idation)?|dev|test(ing)?|eval)[0-9]*[AB]?",
                   re.IGNORECASE)

UNPACK_LIMIT = 2 ** 29                          # bytes that every archive may unpack to
CACHE_FROM = 2 ** 21                            # bytes of images that are worth a file
CACHE_VERSION = 4                               # of what such a file holds
GIVE = "give leaves, cifar10, or a folder, zip, tar, .npy or .npz of images"


@dataclass
class Source:
    """What a path holds, before any image is decoded."""
    # Pairs of an image's name and a function that returns its content: the bytes of a file, or
    # an array [H, W] or [H, W, 3] of uint8. They are sorted by name.
    entries: list[tuple[str, Callable]]
    classes: dict                               # image's name -> class, a name or whole number
    why_unlabeled: str = ""                     # where classes is empty
    messages: list[str] = field(default_factory=list)           # lines to print about it


@dataclass
class Decoded:
    """One image, or why it cannot be read."""
    name: str
    pixels: np.ndarray | None = None            # uint8 [1 or 3, H, W]; None: it cannot be read
    facts: dict = field(default_factory=dict)                   # of open_upright and decode
    error: Exception | None = None


# What data.Images and data.load call


def check_images(name: str, images: torch.Tensor, latents: bool):
    """Raises UserError where these are no images, uint8 [N, C, H, W], or no latents, finite
    floats of the same layout. name: of the data set."""
    valid = isinstance(images, torch.Tensor) and images.ndim == 4 and images.numel() > 0
    if valid and latents:
        valid = images.is_floating_point() and bool(images.isfinite().all())
    elif valid:
        channels_last = images.shape[1] > 4 and images.shape[3] <= 4
        valid = images.dtype == torch.uint8 and not channels_last
    if not valid:
        raise UserError(f"{name}: images must be a torch.uint8 tensor [N, C, H, W] or "
                        "finite floats, which latents=True takes as they are; these are "
                        f"{getattr(images, 'dtype', type(images))} "
                        f"{list(getattr(images, 'shape', ()))}")


def check_labels(name: str, labels: torch.Tensor, classes: list, n: int):
    """Raises UserError where these are no labels, int64 [n] below the number of classes, or
    where two classes have one name. name: of the data set."""
    is_tensor = isinstance(labels, torch.Tensor)
    valid = is_tensor and labels.dtype == torch.long and labels.shape == (n,)
    in_range = valid and labels.min() >= 0 and labels.max() < len(classes)
    names_differ = len(set(classes)) == len(classes)
    if not in_range or not names_differ:
        raise UserError(f"{name}: labels must be an int64 tensor [{n}] of places in "
                        f"the {len(classes)} classes, which have different names")


def refuse_ambiguous(spec: str):
    """Raises UserError where a file or folder here, other than a run, has this set's name."""
    is_run = os.path.exists(f"{spec}/options.json")
    if os.path.exists(spec) and not is_run:
        raise UserError(f"{spec} is a built-in set, and there is a {spec} here: give ./{spec} "
                        "for that one, or rename it to have the built-in set")


def fetch_cifar10(folder) -> Path:
    """The path of CIFAR-10's binary archive, which is fetched once into folder."""
    return fetch(CIFAR10_URL, Path(folder, "cifar-10-binary.tar.gz"), CIFAR10_SHA256)


def split_array_name(spec) -> tuple[Path, str]:
    """a.npz:x -> the path a.npz and the array's name x. Of any other path the array is ""."""
    stem, separator, array = str(spec).partition(".npz:")
    if not separator:
        return Path(spec), ""
    return Path(f"{stem}.npz"), array


def read_or_cached(path: Path, array: str, resolution: int | None, cache_folder) -> dict:
    """What `read` returns. Where there is a cache_folder, many images are decoded once and
    cached there until a file's name, size or times change. Raises UserError."""
    refuse_special(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: {GIVE}")
    if path.is_dir():
        files = without_outputs(path, dict(folder_files(path)))
    else:
        files = {"": path}
    make = partial(read, path, files, array, resolution)
    if cache_folder is None:
        return make()
    key = cache_key(files, array, resolution)
    return cached(Path(cache_folder, f"images-{path.resolve().stem}-{key}.pt"), make)


def without_outputs(path: Path, files: dict) -> dict:
    """{name: path} without the runs and draws below a folder, and with one line about them. Where
    no image lies elsewhere, as where each class is a draw, only without their grids."""
    marks = [name for name in files if name.endswith(("/log.jsonl", "/draw.json"))]
    outputs = [mark.rpartition("/")[0] for mark in marks]
    files = {n: file for n, file in files.items() if n.removesuffix("-grid.png") not in outputs}
    inside = tuple(f"{folder}/" for folder in outputs)
    others = {name: file for name, file in files.items() if not name.startswith(inside)}
    if not outputs or not any(is_image(PurePath(name)) for name in others):
        return files
    warn(f"{path}: runs and draws are left out, {', '.join(outputs)}")
    return others


def cache_key(files: dict, array: str, resolution: int | None) -> str:
    """12 hexadecimal digits, which change with each file's name, size and times."""
    file_stats = []
    for name, file in files.items():
        stat = file.stat()
        file_stats.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    key = repr((CACHE_VERSION, array, resolution, file_stats))
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def cached(path: Path, make: Callable[[], dict]) -> dict:
    """What make() returns: a dict with "images" and plain types. From CACHE_FROM bytes on it
    is in the file at path, where that can be written, and mapped into memory: the processes of
    a machine share it, and a change of the tensor stays in this process."""
    with contextlib.suppress(Exception):                        # it is missing or damaged
        return torch.load(path, mmap=True, weights_only=True)
    decoded = make()
    if decoded["images"].nbytes < CACHE_FROM:
        return decoded
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            torch.save(decoded, f)
        return torch.load(path, mmap=True, weights_only=True)
    except (OSError, RuntimeError) as error:                    # torch has one for a full disk
        warn(f"{path} could not be written; is the disk full? ({error})")
        return decoded


# What sample.py calls


def claim_folder(folder, draw: dict) -> set:
    """The names of the images in a folder, which belongs to one draw. What that is, plain types, is
    in its draw.json; of a file that it names, the digest. UserError where it holds another's."""
    for name, value in draw.items():
        if isinstance(value, str) and os.path.isfile(value):
            draw[name] = hashlib.sha256(Path(value).read_bytes()).hexdigest()
    text = json.dumps(draw)
    os.makedirs(folder, exist_ok=True)
    there = {name for name in os.listdir(folder) if name.endswith((".png", ".npy"))}
    file = Path(folder, "draw.json")
    if not there:
        file.write_text(text)
    elif not file.exists() or file.read_text(errors="replace") != text:
        raise UserError(f"{folder} holds images of another draw: remove it, or give another "
                        f"folder, as in --out {os.path.basename(folder)}-2")
    return there


# From a path to tensors


def read(path: Path, files: dict, array: str, resolution: int | None) -> dict:
    """What path holds, sorted by name: a dict of data.Images' fields images, labels, classes
    and why_unlabeled, and "messages", the lines to print about it.

    files: {name: path}, the files of a folder, or the path alone. array: the name of one in an
    .npz, "cifar10" for that archive, or "". Images that cannot be read are named on stderr and
    left out. Raises UserError where none can be read.
    """
    source = open_source(path, files, array)
    images, facts = decode_all(source.entries, resolution)
    messages = list(source.messages)
    if images is None:
        sentences = [f"{path} contains no image that can be read", *messages, GIVE]
        raise UserError("; ".join(sentences))
    skipped = len(source.entries) - len(images)
    if skipped:
        messages.append(f"{skipped} of {len(source.entries)} images skipped")
    messages += fact_messages(facts)
    if source.why_unlabeled:
        values = ["all"] * len(images)
    else:
        values = [source.classes[name] for name in facts]
    classes, labels = np.unique(values, return_inverse=True)
    return {"images": torch.from_numpy(images).contiguous(),
            "labels": torch.from_numpy(labels),
            "classes": classes.tolist(),
            "why_unlabeled": source.why_unlabeled,
            "messages": messages}


def open_source(path: Path, files: dict, array: str) -> Source:
    """What a path holds, by its kind. Raises UserError where it cannot be read."""
    try:
        if zipfile.is_zipfile(path):                            # as an .npz is
            sizes = [member.file_size for member in zipfile.ZipFile(path).infolist()]
            check_unpacked_size(path, sum(sizes))
        if path.suffix == ".npz":
            arrays = dict(np.load(path, allow_pickle=False))
            return array_source(path, arrays, array)
        if path.suffix == ".npy":
            images = np.load(path, mmap_mode="r", allow_pickle=False)
            return array_source(path, {"": images}, array)
        if array == "cifar10":
            return array_source(path, cifar10_arrays(path), array)
        return file_source(path, files)
    except UserError:
        raise
    except Exception as error:                                  # zip, tar, NumPy differ
        if is_image(path):
            raise UserError(f"{path} is one image: give its folder") from None
        problem = " ".join(str(error).split(":")[0].split())
        kind = type(error).__name__
        raise UserError(f"{path} cannot be read ({kind}: {problem}): {GIVE}") from None


def decode_all(entries: list, resolution: int | None) -> tuple[np.ndarray | None, dict]:
    """Decodes a Source's entries. Returns those that can be read, uint8 [N, C, H, W], or None
    where none can; and {name: facts} of the same in the same order. C is 3 where any image has
    color, and else 1. Raises UserError for images of different sizes."""
    images = None
    facts = {}
    channels = 1
    with ThreadPoolExecutor() as pool:
        results = pool.map(partial(decode, resolution), entries)
        for image in progress(results, "decoding", len(entries)):
            if image.pixels is None:
                warn(f"skipped {image.name}: {reason(image.error)}")
                continue
            c, h, w = image.pixels.shape
            if images is None:
                images = np.empty((len(entries), 3, h, w), np.uint8)
            if (h, w) != images.shape[2:]:
                raise UserError(f"{image.name} and the first image have different sizes: give "
                                "--resolution, a side to crop and resize them to")
            images[len(facts)] = image.pixels                   # gray: three equal channels
            facts[image.name] = image.facts
            channels = max(channels, c)
    if images is not None:
        images = images[:len(facts), :channels]
    return images, facts


def decode(resolution: int | None, entry: tuple) -> Decoded:
    """One entry of a Source, cropped and resized to this many pixels a side; None: as it is.
    """
    name, read_content = entry
    try:
        content = read_content()
        if isinstance(content, np.ndarray):
            image = Image.fromarray(content)
            facts = {"notes": [], "opacity": 255}
        else:
            image, facts = open_upright(io.BytesIO(content))
        facts["largest"] = min(facts["opacity"], np.max(image.getextrema()))
        if resolution:
            if min(image.size) < resolution:
                facts["notes"].append("smaller than the resolution, and so enlarged, are {}")
            image = crop_and_resize(image, resolution, resolution)
        pixels = np.atleast_3d(image).transpose(2, 0, 1)        # [1 or 3, H, W]
        return Decoded(name, pixels, facts)
    except Exception as error:                                  # decoders raise anything
        return Decoded(name, error=error)


def fact_messages(facts: dict) -> list[str]:
    """A line for each kind of fact that someone should know of their images."""
    messages = []
    largest = sorted(of_image["largest"] for of_image in facts.values())[len(facts) // 2]
    if largest < 128:
        messages.append(f"its images use 1/{256 // (largest + 1)} of their range: in half of them "
                        f"no value is above {largest} of 255; stretch them to it")
    for note in sorted({note for of_image in facts.values() for note in of_image["notes"]}):
        names = [name for name, of_image in facts.items() if note in of_image["notes"]]
        messages.append(f"{note.format(len(names))}, as {names[0]}")
    return messages


# Folders, zips and tars


def file_source(path: Path, files: dict) -> Source:
    """A folder, zip or tar. Archives may be hostile: they are read, never unpacked to disk."""
    images = {}                                 # name -> a function that returns its bytes
    tables = {}
    not_read = []
    for name, read_content in file_members(path, files).items():
        member = PurePosixPath(name.replace("\\", "/"))         # Windows' names
        if is_hidden(member):
            not_read.append(name)
        elif is_image(member):
            images[str(member)] = read_content
        elif TABLES.fullmatch(member.name):
            tables[str(member)] = read_content
        elif member.name != "draw.json":                        # of sample.py
            not_read.append(name)
    classes, why_unlabeled = file_classes(list(images), tables)
    messages = []
    if not_read:
        messages.append(f"files that are not read: {len(not_read)}, as {not_read[0]}")
    return Source(sorted(images.items()), classes, why_unlabeled, messages)


def is_hidden(member: PurePosixPath) -> bool:
    """Whether a part of the name begins with a dot, or is of what file managers leave."""
    return any(part.startswith(".") or part.lower() in LEFTOVERS for part in member.parts)


def is_image(file: PurePath) -> bool:
    return file.suffix.lower() in EXTENSIONS


def file_members(path: Path, files: dict) -> dict:
    """{name: a function that returns its bytes} of all files in a folder, zip or tar."""
    if path.is_dir():
        return {name: file.read_bytes for name, file in files.items()}
    if zipfile.is_zipfile(path):
        return zip_members(path)
    return tar_members(path)


def zip_members(path: Path) -> dict:
    """{name: a function that returns its bytes} of a zip."""
    archive = zipfile.ZipFile(path)
    members = {}
    for info in archive.infolist():
        if not info.is_dir():
            members[info.filename] = partial(archive.read, info)
    return members


def tar_members(path: Path) -> dict:
    """{name: a function that returns its bytes} of a tar, which is read whole: a compressed
    one can only be read in order. Links are not followed: they are read as empty files."""
    class BoundedHeader(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, *args):
            header = super().frombuf(*args)
            check_unpacked_size(path, header.size)              # before any of it is read
            return header

    members = {}
    with tarfile.open(path, tarinfo=BoundedHeader) as tar:
        for member in tar:
            check_unpacked_size(path, member.offset_data + member.size)
            if member.isdir():
                continue
            content = b""
            if member.isfile():
                content = tar.extractfile(member).read()
            members[member.name] = partial(bytes, content)
        # tarfile takes a damaged header for the end; the real end is a block of zeros.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise UserError(f"{path} is cut short or damaged: copy it again")
    return members


def check_unpacked_size(path: Path, size: int):
    """Raises UserError where an archive unpacks to far more than its size: images do not."""
    if size > UNPACK_LIMIT + 100 * path.stat().st_size:
        gib = size / 2 ** 30
        raise UserError(f"{path} is refused: it unpacks to {gib:.1f} GiB, more than 100 times "
                        "its size; if you trust it, save it uncompressed")


def folder_files(folder, inside: str = "", parents: tuple = ()):
    """Yields the name and the path of each file below a folder, sorted. Links are followed,
    but not to a folder around them. OSError where a folder cannot be read.

    inside: the name of this folder below the first one, with a slash at its end. parents: the
    real paths of the folders around this one.
    """
    parents = (*parents, os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and os.path.realpath(entry) not in parents:
            yield from folder_files(entry, f"{inside}{entry.name}/", parents)
        elif entry.is_file():
            yield inside + entry.name, Path(entry)
        else:
            warn(f"{entry.path} is not read: it is no file, or a link to none or around "
                 "itself")


# Classes of files: {name: class} and "", or {} and the reason why there are none


def file_classes(names: list, tables: dict) -> tuple[dict, str]:
    """The labels of EDM's dataset.json, where there is one, or else the folders.

    tables: {name: a function that returns its bytes} of the files that may hold labels.
    """
    for table, read_content in tables.items():
        if PurePosixPath(table).name == "dataset.json":
            return table_classes(names, table, read_content())
    return folder_classes(names, list(tables))


def table_classes(names: list, table: str, content: bytes) -> tuple[dict, str]:
    """The labels that a dataset.json has for the images below its folder."""
    folder = PurePosixPath(table).parent
    classes = {}
    for name, label in dict(json.loads(content).get("labels") or ()).items():
        classes[str(folder / name.replace("\\", "/"))] = label
    unlabeled = set(names) - classes.keys()
    if unlabeled:
        return {}, f"{table} has no label for {len(unlabeled)} of {len(names)} images"
    types = {type(classes[name]) for name in names}
    if types not in ({int}, {str}):
        return {}, f"the labels in {table} are neither whole numbers nor names"
    return classes, ""


def folder_classes(names: list, tables: list) -> tuple[dict, str]:
    """The first folder in which the paths differ, whatever lies below it. tables: the names of
    the files whose labels are not read."""
    folders = {name: PurePosixPath(name).parts[:-1] for name in names}
    depth = common_depth(list(folders.values()))
    classes = {}
    for name, folder in folders.items():
        if len(folder) > depth:
            classes[name] = folder[depth]
    in_no_folder = len(names) - len(classes)

    reasons = []
    splits = sorted({name for name in classes.values() if SPLIT.fullmatch(name)})
    if len(splits) > 1:                                         # one class may be named train
        reasons.append(f"{' and '.join(splits)} are splits: give one of them")
    for table in tables:
        reasons.append(f"labels in {table} are not read")
    if in_no_folder:
        reasons.append(f"{in_no_folder} of {len(names)} images lie in no folder of a class")
    if reasons:
        return {}, ", and ".join(reasons)
    return classes, ""


def common_depth(folders: list) -> int:
    """The number of leading parts that all of these tuples share."""
    first = min(folders, default=())
    last = max(folders, default=())             # tuples between these two share as much
    depth = 0
    for a, b in zip(first, last):
        if a != b:
            break
        depth += 1
    return depth


# Arrays


def array_source(path: Path, arrays: dict, chosen: str) -> Source:
    """The images of the array that is chosen, or else of the only one that holds images. Their
    classes are in the only other array of as many whole numbers or names."""
    images = image_array(path, arrays, chosen)
    entries = []
    for i in range(len(images)):
        entries.append((f"{i:09d}", partial(images.__getitem__, i)))
    labels = [array for array in arrays.values() if could_be_labels(array, len(images))]
    if len(labels) != 1:
        return Source(entries, {}, f"{len(labels)} of its arrays could be its labels")
    classes = {}
    for (name, _), label in zip(entries, labels[0].ravel().tolist()):
        classes[name] = label
    return Source(entries, classes)


def image_array(path: Path, arrays: dict, chosen: str) -> np.ndarray:
    """The array of images: uint8 [N, H, W] or [N, H, W, 3]. Raises UserError where the chosen
    one holds no images, or where none is chosen and several or none do."""
    candidates = [name for name, array in arrays.items() if holds_images(array)]
    if not chosen and len(candidates) == 1:
        chosen = candidates[0]
    if chosen not in candidates:
        contents = []
        for name, array in arrays.items():
            contents.append(f"{name} {array.dtype} {list(array.shape)}".lstrip())
        raise UserError(f"{path} holds {', '.join(contents)}: images are uint8 [N, H, W], or "
                        "[N, H, W, C] of 1 or 3 channels (others, and floats, are for Python: "
                        f"data.Images(..., latents=True)); of several give one, as {path}:NAME")
    images = arrays[chosen]
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)                   # from [N, C, H, W]
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    return images


def holds_images(array: np.ndarray) -> bool:
    """Whether this is uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], of 1 or 3 channels."""
    if array.dtype != np.uint8 or array.size == 0:
        return False
    if array.ndim == 3:
        return array.shape[2] > 4                               # else one image [H, W, C]
    return array.ndim == 4 and (array.shape[1] in (1, 3) or array.shape[3] in (1, 3))


def could_be_labels(array: np.ndarray, count: int) -> bool:
    """Whether this is as many whole numbers or names as there are images, one for each."""
    return array.dtype.kind in "iuU" and array.shape in ((count,), (count, 1))


def cifar10_arrays(path: Path) -> dict:
    """The training images and labels of CIFAR-10's binary archive."""
    content = b""
    for name, read_content in sorted(tar_members(path).items()):
        if "/data_batch_" in name:
            content += read_content()
    pixels = 3 * 32 * 32                                        # three planes, after the label
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + pixels)
    return {"cifar10": records[:, 1:].reshape(-1, 3, 32, 32),
            "labels": np.array(CIFAR10_CLASSES)[records[:, 0]]}
