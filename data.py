"""Pictures in, pictures out: data sets as uint8 tensors, EDM's non-leaky augmentation, grids and film strips.

    python data.py                         # draws a grid of the default data set, dead leaves: data.png
    python data.py --data cifar10          # or of CIFAR-10, fetched once, or of any folder, zip or tar of pictures
"""
import argparse
import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import math
import os
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from degrade import dct2, idct2

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, NotImplementedError)
ROOM = 2 ** 29                                                  # bytes that any archive may unpack to
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class UserError(Exception):
    """Something a user can put right; its message is the one line they see."""


@dataclass
class Pictures:
    pictures: torch.Tensor                                      # uint8 [N, C, H, W]
    labels: torch.Tensor                                        # int64 [N], places in classes
    classes: list                                               # class names
    name: str
    skipped: list = field(default_factory=list)                 # names of the files that could not be read

    def facts(self):
        """What a checkpoint remembers of its data, as plain types; mean and std are per channel, for pictures in [-1, 1]."""
        n, c, h, w = self.pictures.shape
        counts = torch.stack([torch.bincount(self.pictures[:, i].flatten(), minlength=256) for i in range(c)]).double()
        p = counts / (n * h * w)                                # a histogram is exact and needs no float copy of the set
        value = torch.arange(256) / 127.5 - 1
        mean = (p * value).sum(1)
        std = (p * (value - mean[:, None]) ** 2).sum(1).sqrt()
        rounded = lambda values: [round(v, 9) for v in values.tolist()]                         # the last digits are the machine's
        return {"name": self.name, "count": n, "shape": [c, h, w], "classes": list(self.classes), "skipped": len(self.skipped),
                "mean": rounded(mean), "std": rounded(std)}

    def colour(self):
        """The Gaussian of the pictures' mean colours, in [-1, 1], as plain types: {"mean": [C], "cov": [C][C]}."""
        n, c, h, w = self.pictures.shape
        colours = self.pictures.sum((2, 3)).double() / (h * w) / 127.5 - 1                      # [N, C]
        return {"mean": colours.mean(0).tolist(), "cov": colours.T.cov(correction=0).reshape(c, c).tolist()}


def load(spec, resolution=None, folder="data"):
    """The data set named by spec, as Pictures.

    spec: "leaves" (made here), "cifar10" (the 50,000 training pictures, fetched once into folder), or the path of a folder, zip
    or tar of pictures, whose classes are the parent folders' names. resolution: centre-crop and resize to that many pixels a
    side; None: as they are. Raises UserError.
    """
    if spec == "leaves":
        return load_leaves(resolution or 16, folder)
    if spec == "cifar10":
        return load_cifar10(resolution, folder)
    return load_files(Path(spec), resolution)


def augment(x, p, batch=None, part=slice(None)):
    """EDM's non-leaky augmentation: x [B, C, H, W] -> the augmented pictures and what was done to each, [B, 9].

    x may be a part, a slice, of a batch of that many: what is done to a picture does not depend on who has the others.

    Each kind happens with probability p, but the x-flip with one half. The 9 numbers go to the network and are 0 where nothing was
    done, as at sampling: x-flip, y-flip, scale, rotation (cos - 1, sin), stretch along a direction (cos, sin), shift in x and in y.
    The two numbers of a stretch are EDM's: they leave open whether it is wider along its direction or narrower against it.
    """
    b, device = batch or len(x), x.device
    coin, uniform = (lambda q: torch.rand(b, device=device)[part] < q), (lambda: math.pi * (2 * torch.rand(b, device=device)[part] - 1))
    normal = lambda *n: torch.randn(b, *n, device=device)[part]
    flip_x, flip_y = coin(0.5), coin(p) & coin(0.5)
    scale = coin(p) * normal()
    angle = coin(p) * uniform()
    stretch, direction = coin(p) * normal(), coin(0.5) * uniform()
    shift = coin(p)[:, None] * normal(2)
    labels = torch.stack([flip_x, flip_y, scale, angle.cos() - 1, angle.sin(),
                          stretch * direction.cos(), stretch * direction.sin(), shift[:, 0], shift[:, 1]], 1)

    x = torch.where(flip_x[:, None, None, None], x.flip(-1), x)
    x = torch.where(flip_y[:, None, None, None], x.flip(-2), x)
    # a point of the result -> the point of the picture it shows: the inverses of shift, stretch, rotation and scale
    wide = torch.diag_embed((0.2 * torch.stack([-stretch, stretch], 1)).exp2())
    inverse = (-0.2 * scale).exp2()[:, None, None] * turn(-angle) @ turn(direction) @ wide @ turn(-direction)       # [B, 2, 2]
    inverse[:, 0, 1] *= x.shape[-2] / x.shape[-1]               # from pixels to affine_grid's units, half a side each
    inverse[:, 1, 0] *= x.shape[-1] / x.shape[-2]
    theta = torch.cat([inverse, -inverse @ (0.25 * shift)[:, :, None]], 2)                      # 1/8 of the side is 1/4 of its half
    moved = warp(x, theta).to(x.dtype)
    still = (labels[:, 2:] == 0).all(1)
    return torch.where(still[:, None, None, None], x, moved), labels


def turn(angle):
    """[B] -> rotations by angle, [B, 2, 2]."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(-1, 2, 2)


def warp(x, theta):
    """Resample x under affine maps [B, 2, 3] of affine_grid's kind: at twice the resolution, up and down without aliasing by DCT."""
    b, c, h, w = x.shape
    fine = idct2(F.pad(dct2(x), (0, w, 0, h))) * 2                                              # [B, C, 2H, 2W]
    grid = F.affine_grid(theta.to(fine.dtype), fine.shape, align_corners=False)
    fine = F.grid_sample(fine, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return idct2(dct2(fine)[..., :h, :w]) / 2                                                   # [B, C, H, W]


def normalize(pictures):
    """uint8 -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1] -> uint8: (127.5 x + 128) clipped and truncated, EDM's rule."""
    return (127.5 * x + 128).clamp(0, 255).byte()


def leaves(n, resolution=16, seed=0, discs=96):
    """The dead-leaves model of natural scenes: uint8 [n, 3, resolution, resolution].

    Opaque discs of random colour lie over one another, the front ones drawn first; radii have density r^-3 between a quarter of
    the picture's side and the whole, centres are uniform over everywhere a disc can touch the picture from.
    """
    g = torch.Generator().manual_seed(seed)
    pixel = (torch.arange(resolution) + 0.5) / resolution       # in units of the side
    small, large = 0.25, 1.0
    chunks = []
    for start in range(0, n, 1024):
        b = min(1024, n - start)
        picture, light = torch.zeros(b, 3, resolution, resolution), torch.ones(b, 1, resolution, resolution)
        for _ in range(discs):
            u, x, y = torch.rand(3, b, 1, 1, 1, generator=g)
            radius = (small ** -2 - u * (small ** -2 - large ** -2)) ** -0.5
            x, y = (x * (1 + 2 * large) - large for x in (x, y))
            distance = torch.hypot(pixel - x, pixel[:, None] - y)                               # [b, 1, H, W]
            cover = ((radius - distance) * resolution + 0.5).clamp(0, 1)                        # antialiased over one pixel
            picture += light * cover * torch.rand(b, 3, 1, 1, generator=g)
            light *= 1 - cover
        picture += light * torch.rand(b, 3, 1, 1, generator=g)
        chunks.append((picture * 255).round().byte())
    return torch.cat(chunks)


def load_leaves(resolution, folder, n=16384):
    kept = Path(folder) / f"leaves-{resolution}.npy"
    try:
        pictures = torch.from_numpy(np.load(kept, allow_pickle=False))
        if pictures.dtype != torch.uint8 or pictures.shape != (n, 3, resolution, resolution):
            raise ValueError
    except (OSError, ValueError, TypeError, EOFError):          # not made yet, or not whole: it costs seconds to make
        pictures = leaves(n, resolution)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(kept) as f:
            np.save(f, pictures.numpy())
    return Pictures(pictures, torch.zeros(n, dtype=torch.long), ["leaves"], "leaves")


def load_cifar10(resolution, folder):
    archive = fetch(CIFAR10_URL, Path(folder) / "cifar-10-binary.tar.gz", "md5", CIFAR10_MD5)
    with tarfile.open(archive) as tar:                          # members are read by name into memory: no path of theirs is written
        raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read() for i in range(1, 6))
    records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3072)                                # label, then R, G, B planes
    pictures = records[:, 1:].reshape(-1, 3, 32, 32)
    if resolution not in (None, 32):
        pictures = np.stack([np.asarray(fit(Image.fromarray(p.transpose(1, 2, 0)), resolution, resolution)) for p in tqdm(pictures, "resizing")])
        pictures = pictures.transpose(0, 3, 1, 2)
    return Pictures(torch.from_numpy(pictures.copy()), torch.from_numpy(records[:, 0].astype(np.int64)), CIFAR10_CLASSES, "cifar10")


def fetch(url, path, algorithm, digest, otherwise=""):
    """The path of a file with that digest (or whose digest begins so): what is there already, else fetched from url."""
    by_hand = " ".join(filter(None, [f"get {url} elsewhere and put it at {path}", otherwise]))
    if not path.exists():
        part = Path(f"{path}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(url, timeout=30) as r, open(part, "wb") as f:
                size = int(r.headers.get("Content-Length", 0))
                with tqdm(desc=path.name, total=size or None, unit="B", unit_scale=True) as bar:
                    while block := r.read(1 << 20):
                        f.write(block)
                        bar.update(len(block))
            if part.stat().st_size < size:
                raise OSError("the connection broke off")
        except OSError as e:
            part.unlink(missing_ok=True)
            raise UserError(f"cannot fetch {path.name} ({e}): {by_hand}") from None
        if not has_digest(part, algorithm, digest):
            os.replace(part, f"{path}.bad")
            raise UserError(f"what {url} sent has not the {algorithm} {digest}; it is kept as {path}.bad: {by_hand}")
        os.replace(part, path)
    elif not has_digest(path, algorithm, digest):
        raise UserError(f"{path} is damaged (its {algorithm} is not {digest}): remove it, or {by_hand}")
    return path


def has_digest(path, algorithm, digest):
    return hashlib.new(algorithm, path.read_bytes()).hexdigest().startswith(digest)


@contextlib.contextmanager
def written_aside(path, mode="wb"):
    """A file to write in, flushed to disk and renamed to path when whole: who reads path finds the old file or the new one."""
    with open(f"{path}.part", mode) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.part", path)


@contextlib.contextmanager
def readable(path):
    """What a damaged folder or archive raises within, as a UserError."""
    try:
        yield
    except ARCHIVE_ERRORS as e:
        raise UserError(f"{path} is no folder, zip or tar that can be read ({type(e).__name__})") from None


def load_files(path, resolution):
    arrays, parents, skipped = [], [], []
    with readable(path):
        for name, read in tqdm(picture_files(path), "decoding", unit=" pictures"):
            try:
                image = decode(read(), resolution)
            except Exception as e:                              # Pillow's decoders raise nearly anything for a broken file
                tqdm.write(f"skipped {name}: {e}", file=sys.stderr)
                skipped.append(name)
                continue
            if arrays and resolution is None and image.shape[:2] != arrays[0].shape[:2]:
                raise UserError(f"{name} is not of the first picture's size: give a resolution to crop and resize them to")
            arrays.append(image)
            parents.append(PurePosixPath(name).parent.name)
    if skipped:
        print(f"{path}: {len(skipped)} broken files skipped", file=sys.stderr)
    if not arrays:
        raise UserError(f"{path} holds no picture that can be read ({', '.join(sorted(SUFFIXES))})")
    if any(a.ndim == 3 for a in arrays):                        # grey among colour becomes colour
        arrays = [a if a.ndim == 3 else np.repeat(a[:, :, None], 3, 2) for a in arrays]
    stack = torch.from_numpy(np.stack(arrays))
    pictures = stack.permute(0, 3, 1, 2).contiguous() if stack.ndim == 4 else stack[:, None]    # [N, C, H, W]
    classes = sorted(set(parents))
    return Pictures(pictures, torch.tensor([classes.index(p) for p in parents]), classes, path.name, skipped)


def picture_files(path):
    """Pairs of a picture's name, folders included, and a function that reads its bytes. Archives are never unpacked to disk."""
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if is_picture(f.name) and f.is_file()]
        return [((path.name / f.relative_to(path)).as_posix() if f.parent == path else f.relative_to(path).as_posix(), f.read_bytes)
                for f in files]
    if not path.exists():
        raise UserError(f"{path} does not exist: give leaves, cifar10, or a folder, zip or tar of pictures")
    if is_picture(path.name):
        raise UserError(f"{path} is one picture: give the folder it is in")
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        files = [i for i in archive.infolist() if not i.filename.endswith("/") and is_picture(inside(path, i.filename))]
        bounded(path, sum(i.file_size for i in files))
        return [(i.filename, lambda i=i: not_a_link(i.external_attr >> 28 != 0o12) and archive.read(i)) for i in files]
    return tar_files(path)


def tar_files(path):
    with open(path, "rb") as f:
        start = f.read(6)
    unpack = next((o for magic, o in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)) if start.startswith(magic)), open)
    with unpack(path, "rb") as f, tarfile.open(fileobj=Bounded(f, path), mode="r:") as tar:
        for member in tar:                                      # in the archive's order: a compressed tar has no other
            if is_picture(inside(path, member.name)) and not member.isdir():
                yield member.name, lambda: not_a_link(member.isfile()) and tar.extractfile(member).read()


class Bounded:
    """An unpacked tar, as far as `bounded` lets it go, headers and all: a header may say that it is gigabytes long."""

    def __init__(self, file, path):
        self.file, self.path, self.tell = file, path, file.tell

    def read(self, n):
        bounded(self.path, self.tell() + n)
        return self.file.read(n)

    def seek(self, place):
        bounded(self.path, place)
        return self.file.seek(place)


def bounded(path, size):
    """Pictures are compressed already: what grows a hundredfold is there to fill the memory."""
    if size > ROOM + 100 * path.stat().st_size:
        raise UserError(f"{path} unpacks to {size / 2 ** 30:.1f} GiB from {path.stat().st_size / 2 ** 20:.1f} MiB: not used")


def not_a_link(true):
    if not true:
        raise ValueError("a link in an archive, which is not followed")
    return true


def inside(path, name):
    if PurePosixPath(name.replace("\\", "/")).is_absolute() or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise UserError(f"{path} holds {name!r}, which would unpack outside its folder: not used")
    return name


def is_picture(name):
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not PurePosixPath(name).name.startswith("._")


def decode(data, resolution):
    """A picture file's bytes -> uint8 [H, W] (grey) or [H, W, 3]."""
    image = upright(io.BytesIO(data))
    return np.array(fit(image, resolution, resolution) if resolution else image)


def upright(file):
    """A picture file -> an image of mode L (grey) or RGB, turned as its camera was, on white where it is transparent."""
    image = Image.open(file)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:     # Pillow itself only warns, up to twice that
        raise ValueError(f"{image.width} x {image.height} pixels are more than Pillow's limit of {Image.MAX_IMAGE_PIXELS}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                              # 16 bits of grey, which Pillow would clip
        return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def fit(image, width, height):
    """Centre-crop to those proportions, then resize with Lanczos, as EDM prepares FFHQ and LSUN."""
    k = min(image.width / width, image.height / height)
    w, h = max(1, round(width * k)), max(1, round(height * k))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.LANCZOS)


def read_picture(path, channels, height, width):
    """One picture file, cropped and resized -> uint8 [1, channels, height, width]. Raises UserError."""
    try:
        image = fit(upright(path).convert("L" if channels == 1 else "RGB"), width, height)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as e:                                      # Pillow's decoders raise nearly anything for a broken file
        raise UserError(f"{path} is no picture that can be read: {e}") from None
    array = torch.from_numpy(np.array(image))
    return array[None, None] if channels == 1 else array.permute(2, 0, 1)[None].contiguous()


def save_picture(pixels, path):
    """uint8 [C, H, W] (1 or 3 channels) -> an image file."""
    array = pixels.cpu().permute(1, 2, 0).numpy()
    write(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array), path)


def write(image, path):
    try:
        image.save(path)
    except ValueError as e:                                     # Pillow knows the format by the ending
        raise UserError(f"{path} cannot be written ({e}): end it in .png") from None


def save_grid(pictures, path, columns=None):
    """uint8 [N, C, H, W] -> one picture of them all, small ones enlarged without smoothing."""
    n = len(pictures)
    columns = columns or math.ceil(math.sqrt(n))
    tiles = F.pad(enlarge(pictures.cpu()), (1, 1, 1, 1, 0, 0, 0, -n % columns))                 # a dark line around each
    _, c, h, w = tiles.shape
    save_picture(tiles.reshape(-1, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, -1, columns * w), path)


def enlarge(pictures):
    k = max(1, 64 // pictures.shape[-1])
    return pictures.repeat_interleave(k, -1).repeat_interleave(k, -2)


def film_strip(rows, columns, path):
    """{row label: [x [C, H, W] in [-1, 1] for each column]} and column labels -> one labelled picture."""
    cells = [enlarge(to_uint8(torch.stack(list(row))).cpu()) for row in rows.values()]          # [columns, C, H, W] each
    _, c, h, w = cells[0].shape
    left, top, gap = 12 + 6 * max(map(len, rows)), 16, 2
    canvas = Image.new("RGB", (left + len(columns) * (w + gap), top + len(rows) * (h + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for j, text in enumerate(columns):
        draw.text((left + j * (w + gap), 2), text, fill="black")
    for i, (text, row) in enumerate(zip(rows, cells)):
        draw.text((2, top + i * (h + gap) + h // 2 - 6), text, fill="black")
        for j, cell in enumerate(row):
            canvas.paste(Image.fromarray(cell.expand(3, -1, -1).permute(1, 2, 0).numpy()), (left + j * (w + gap), top + i * (h + gap)))
    write(canvas, path)


class Options(argparse.ArgumentParser):
    """argparse that answers what a user got wrong with one line and exit code 2."""

    def error(self, message):
        first = os.environ.get("RANK", "0") == "0"              # under torchrun one process speaks for all
        self.exit(2, f"{self.prog}: {message}\n" if first else None)

    @contextlib.contextmanager
    def one_line_errors(self):
        try:
            yield
        except UserError as e:
            self.error(e)
        except OSError as e:
            self.error(f"{e.filename}: {e.strerror}" if e.filename else e)


def within(kind, low, high=math.inf):
    """An argparse type: a number of that kind from low to high, which NaN is not."""
    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number from {low} to {high}")
    return parse


def device(text):
    """An argparse type: cpu, cuda or cuda:1, where there is such a device; under torchrun cuda is this process's own."""
    try:
        if text == "cuda" and "LOCAL_RANK" in os.environ:
            if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
                raise RuntimeError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {str(e).splitlines()[0]}") from None
    if torch.device(text).type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} has no float64, or no pictures: use cpu or cuda")
    return text


def rank():
    """This process's number among those that torchrun started, 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined():
    """Within, this process talks to the others that torchrun started, if it did: by gloo of what is on the CPU, by NCCL of what is on a GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_rank_first():
    """The block, in rank 0 before the others: it fetches or makes a file for all."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and ranks() > 1:
        dist.barrier()


def main():
    p = Options(description="Draw a grid of a data set, and print what a checkpoint would remember of it.")
    p.add_argument("--data", default="leaves", help="leaves, cifar10, or a folder, zip or tar of pictures (default leaves)")
    p.add_argument("--resolution", type=within(int, 1), help="side in pixels (default: as they are)")
    p.add_argument("--augment", type=within(float, 0, 1), default=0., help="draw them augmented with this probability (default 0)")
    p.add_argument("--out", default="data.png", help="the grid (default data.png)")
    args = p.parse_args()
    with p.one_line_errors():
        data = load(args.data, args.resolution)
        pictures = data.pictures[torch.randperm(len(data.pictures), generator=torch.Generator().manual_seed(0))[:64]]
        if args.augment:
            pictures = to_uint8(augment(normalize(pictures), args.augment)[0])
        save_grid(pictures, args.out)
        print(f"{args.out}: {data.facts()}")


if __name__ == "__main__":
    main()
