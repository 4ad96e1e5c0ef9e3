"""What every program needs and no equation is in: options and errors, images on disk, checkpoints,
downloads, and the processes that torchrun starts.
"""
import argparse
import contextlib
import datetime
import errno
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import re
import secrets
import signal
import stat
import sys
import time
import urllib.request
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:                                             # Windows
    fcntl = resource = None

SIGPIPE = 13                                    # Windows has none


# Options and errors

class UserError(Exception):
    """A mistake that the user can correct. Its message is the one line that they see."""


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line and exit code 2."""

    def parse_args(self, *args, **kw):
        given = super().parse_args(*args, **kw)
        for action in self._actions:
            if getattr(given, action.dest, None) == "":         # as a path it would be the root
                self.error(f"{''.join(action.option_strings) or action.dest} must not be empty")
        return given

    def error(self, message):
        let_others_speak()
        message = str(message).removeprefix("argument ").replace(": must be", " must be", 1)
        self.exit(2, f"{self.prog}: {printable(message)}\n")

    @contextlib.contextmanager
    def one_line_errors(self):
        """Within, what the user can correct ends the program with one line and exit code 2, Ctrl-C
        with one line and 130, and the end of whoever reads its output quietly with 141."""
        sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
        if hasattr(sys.stdout, "reconfigure"):                  # names that it cannot encode
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            yield
        except UserError as e:
            self.error(e)
        except BrokenPipeError:
            discard(sys.stdout, sys.stderr)
            self.exit(128 + SIGPIPE)
        except OSError as e:
            self.error(f"{e.filename}: {e.strerror}" if e.filename else e)
        except (MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                let_others_speak(of_another=True)
                raise
            self.error("out of memory: take a smaller --batch-gpu, --batch or resolution")
        except KeyboardInterrupt:
            let_others_speak()
            self.exit(130, f"{self.prog}: interrupted; what is written already stays\n")


def let_others_speak(of_another=False):
    """torchrun ends all processes when one ends. An error is often that of all processes, or
    follows from another's: then this one is ended while it waits here. of_another: it may follow
    from another's in the first process, too."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        first = os.environ.get("RANK", "0") == "0"
        time.sleep(6 if not first else 3 if of_another else 0)


def is_out_of_memory(e):
    """torch has an exception of its own for a GPU only."""
    words = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(e, MemoryError) or any(word in str(e) for word in words)


def printable(text):
    """The text with its control characters escaped: a filename may contain any."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def say(text, file=None):
    """Prints one line, above a progress bar where there is one."""
    file = file or sys.stdout
    tqdm.write(printable(text), file=file)
    file.flush()


def warn(text):
    say(text, sys.stderr)


def discard(*streams):
    """From now on, what is written to those that nobody reads vanishes, to the very end."""
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high; NaN is out of range."""
    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            if low <= kind(text) <= high:
                return kind(text)
        noun, form = ("an integer", "d") if kind is int else ("a number", "g")
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high:{form}}"
        raise argparse.ArgumentTypeError(f"must be {noun} {limits}, not {text!r}")
    return parse


def device_name(text):
    """An argparse type: cpu, cuda or cuda:1. Under torchrun, cuda is the GPU of this process."""
    try:
        if text == "cuda" and "LOCAL_RANK" in os.environ:
            processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
            if processes > gpus:
                raise RuntimeError(f"torchrun started {processes} processes for {gpus} GPUs")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {reason}") from None
    if torch.device(text).type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, not {text!r}")
    return text


def add_device_option(parser):
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_name, default=found,
                        help="cuda or cpu (default: cuda if there is one)")


# Images as tensors and on disk

def normalize(images):
    """uint8 -> float32 in [-1, 1]. Float data, latents for example, stay as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def to_uint8(x):
    """Float in [-1, 1] -> uint8: 127.5 x + 128, clipped and truncated, as EDM does."""
    return (127.5 * x + 128).clamp(0, 255).byte()


def open_upright(file, bits=16):
    """An image file -> a PIL image of mode L (grey) or RGB: rotated as its EXIF says, transparent
    parts on white, 16-bit grey reduced from this number of bits to 8. In its info: "stack", whether
    it has more pages; the largest value of 16-bit grey, "deep", or of what Pillow reads of 16-bit
    colour, "rough". Raises ValueError where the range of values is unknown."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError:                              # which names an object in memory
        raise ValueError("it is not an image that can be read") from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:     # Pillow only warns
        raise ValueError(f"{image.width} x {image.height} pixels are more than Pillow's limit "
                         f"of {Image.MAX_IMAGE_PIXELS}")
    format, code = image.format, str([tile[3] for tile in image.tile])
    info = {"stack": getattr(image, "is_animated", False) and format not in ("MPO", "PSD")}
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode == "I" and format not in ("PNG", "PPM"):
        raise ValueError("32-bit and float images have no standard range: convert it to 8 bits")
    if image.mode.startswith("I"):                              # 16-bit grey; Pillow would clip it
        deep = np.asarray(image)
        if format != "PPM":                                     # which declares its largest value
            info["deep"] = int(deep.max())
        shift = bits - 8 if "deep" in info else 8
        image = Image.fromarray((deep >> shift).clip(0, 255).astype(np.uint8))
    elif format in ("PNG", "TIFF") and ";16" in code:
        info["rough"] = max(high for _, high in image.convert("RGB").getextrema())
    grey = image.mode in ("1", "L", "LA")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if grey else "RGB")
    image.info = info
    return image


def crop_and_resize(image, width, height):
    """Centre-crop a PIL image to these proportions, then resize it with Lanczos, as EDM does."""
    k = min(image.width / width, image.height / height)
    w, h = max(1, round(width * k)), max(1, round(height * k))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    box = (left, top, left + w, top + h)
    return image.crop(box).resize((width, height), Image.Resampling.LANCZOS)


def read_image(filename, channels, height, width):
    """One image file, cropped and resized: uint8 [1, channels, height, width]. Raises UserError."""
    if channels not in (1, 3):
        raise UserError(f"{filename} cannot become an image of {channels} channels")
    refuse_special(filename)
    try:
        image = open_upright(filename).convert("L" if channels == 1 else "RGB")
        array = torch.from_numpy(np.array(crop_and_resize(image, width, height)))
    except FileNotFoundError:
        raise UserError(f"{filename} does not exist") from None
    except Exception as e:                                      # decoders raise nearly anything
        raise UserError(f"{filename} is not an image that can be read: {e}") from None
    return array[None, None] if channels == 1 else array.permute(2, 0, 1)[None].contiguous()


def save_image(pixels, filename):
    """uint8 [C, H, W] -> an image file. Of other data than grey or RGB, the first channels."""
    array = pixels[:3 if len(pixels) >= 3 else 1].cpu().permute(1, 2, 0).numpy()
    write_image(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array), filename)


def write_image(image, filename):
    try:
        image.save(filename)
    except ValueError as e:                                     # the extension names the format
        raise UserError(f"{filename} cannot be written ({e}): use the extension .png") from None


def save_grid(images, filename, columns=None):
    """uint8 [N, C, H, W] -> one image of them all. Small images are enlarged, not smoothed."""
    n = len(images)
    columns = columns or math.ceil(math.sqrt(n))
    tiles = F.pad(enlarge(images.cpu()), (1, 1, 1, 1, 0, 0, 0, -n % columns))   # a dark border each
    _, c, h, w = tiles.shape
    rows = tiles.reshape(-1, columns, c, h, w).permute(2, 0, 3, 1, 4)   # [C, rows, H, cols, W]
    save_image(rows.reshape(c, -1, columns * w), filename)


def enlarge(images):
    k = max(1, 64 // images.shape[-1])
    return images.repeat_interleave(k, -1).repeat_interleave(k, -2)


def film_strip(rows, columns, filename):
    """rows: pairs of a label and its images [C, H, W] in [-1, 1], one for each column label."""
    cells = [enlarge(to_uint8(torch.stack(list(row))).cpu()) for _, row in rows]
    _, c, h, w = cells[0].shape
    left, top, gap = 12 + 6 * max(len(label) for label, _ in rows), 16, 2
    size = left + len(columns) * (w + gap), top + len(rows) * (h + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for j, label in enumerate(columns):
        draw.text((left + j * (w + gap), 2), label, fill="black")
    for i, ((label, _), row) in enumerate(zip(rows, cells)):
        y = top + i * (h + gap)
        draw.text((2, y + h // 2 - 6), label, fill="black")
        for j, cell in enumerate(row):
            rgb = (cell if c >= 3 else cell[:1].expand(3, -1, -1))[:3]
            tile = Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy())
            canvas.paste(tile, (left + j * (w + gap), y))
    write_image(canvas, filename)


# Files: checkpoints and downloads

def refuse_special(filename):
    """Raises UserError for a device, a pipe or a socket, before anything waits for it."""
    with contextlib.suppress(OSError, ValueError):              # it is missing: its reader says so
        mode = os.stat(filename).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UserError(f"{filename} is a device or a pipe: give a file")


def writable_folder(folder):
    """Makes the folder where it is missing. Raises UserError where nothing can be written there."""
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is not a folder that can be written to")


@contextlib.contextmanager
def atomic_write(filename, mode="wb"):
    """A file to write in. It is flushed to disk and renamed to filename when it is complete, so
    that a reader finds the old file or the new one, never a part. Until then its name is its own:
    two programs may write the same file at once."""
    part = f"{filename}.{secrets.token_hex(4)}.part"
    try:
        with open(part, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, filename)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def remove_parts(folder, age=0):
    """Removes what killed programs have left of atomic_write in the folder, age seconds ago."""
    for name in os.listdir(folder):
        if re.search(r"\.[0-9a-f]{8}\.part$", name):
            with contextlib.suppress(OSError):                  # it may be gone, or someone else's
                if time.time() - os.path.getmtime(f"{folder}/{name}") >= age:
                    os.remove(f"{folder}/{name}")


@contextlib.contextmanager
def or_a_warning(what):
    """Within, a disk that takes no more costs only what is written there."""
    try:
        yield
    except OSError as e:
        warn(f"{what} could not be written ({e.strerror or e})")


def save_checkpoint(checkpoint, filename):
    """True when saved. Where the disk does not take it: False, and the old file stays."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    try:
        with atomic_write(filename) as f:
            f.write(buffer.getbuffer())
        return True
    except OSError as e:
        warn(f"{filename} could not be saved ({e.strerror}); the previous one stays, and training "
             "continues")
        return False


def read_checkpoint(filename):
    """A file of torch.save with plain tensors and types only -> dict. Raises UserError."""
    refuse_special(filename)
    try:
        with zipfile.ZipFile(filename) as z:                    # torch.save does not compress, so
            if sum(i.file_size for i in z.infolist()) > os.path.getsize(filename):
                raise ValueError                                # this would be a decompression bomb
        checkpoint = torch.load(filename, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{filename} does not exist: train a model with train.py first") from None
    except Exception:                                           # zip, pickle and torch differ
        message = f"{filename} is not a checkpoint of this project, or it is damaged"
        raise UserError(message) from None
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise UserError(f"{filename} is not a checkpoint of this project: it holds a {kind}")
    return checkpoint


def check_facts(checkpoint, weights, size):
    """Raises for weights and facts that train.py never saves. size: of the file, in bytes."""
    for v in weights.values():
        if (v.dtype, v.layout, v.device.type) != (torch.float32, torch.strided, "cpu"):
            raise ValueError("its weights are not float32")
    if sum(v.numel() * 4 for v in weights.values()) > size:
        raise ValueError("its weights claim to be larger than the file")
    if not all(v.isfinite().all() for v in weights.values()):
        raise ValueError("its weights are not finite")
    data, options = checkpoint["data"], checkpoint["options"]
    c, h, w = data["shape"]
    if not all(type(n) is int and 0 < n <= 4096 for n in (c, h, w)):
        raise ValueError("it makes images of an unknown shape")
    if type(options["sample_steps"]) is not int or not 1 <= options["sample_steps"] <= 10000:
        raise ValueError("its sample_steps is out of range")
    if options["resolution"] not in (0, max(h, w)):
        raise ValueError("its resolution is not that of its images")
    if not all(isinstance(v, str) for v in (options["data"], *data["classes"])):
        raise TypeError("its data or classes have names of another type")


def restricted_unpickle(data, allowed):
    """What is pickled in data: bytes, or an open file, which is read to the end of one pickle.

    allowed: {(module, name): what stands for it}. Nothing else is imported or called: UserError for
    another name. Byte strings of Python 2 stay bytes. Damaged data raise nearly anything.
    """
    def find_class(module, name):
        if (module, name) not in allowed:
            raise UserError(f"it names {f'{module}.{name}'[:80]!r}, which is not needed; nothing "
                            "of it was executed")
        return allowed[module, name]
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    # the one in C allocates whatever the data claim; this one does so for a bytearray alone
    reader = pickle._Unpickler(file, encoding="bytes")
    reader.dispatch = {k: v for k, v in reader.dispatch.items() if k != pickle.BYTEARRAY8[0]}
    reader.find_class, reader.persistent_load = find_class, lambda pid: pid
    return reader.load()


@contextlib.contextmanager
def locked(folder):
    """Within, the folder exists and no other run can have it. UserError where another has it. The
    lock ends with the process, however that ends. Parts of files that a killed run has left are
    removed, and so is a folder that stays empty."""
    if rank() > 0 or fcntl is None:
        yield
        return
    writable_folder(folder)
    with open(f"{folder}/.lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run: choose another --out, or wait for "
                            "its end") from None
        except OSError as e:                                    # some network disks have no locks
            warn(f"{folder} cannot be locked ({e.strerror}): start no second run in it")
        else:
            remove_parts(folder)
        try:
            yield
        finally:
            if os.listdir(folder) == [".lock"]:
                os.remove(f.name)
                os.rmdir(folder)


def resumed_log(filename, seen):
    """The log, open to continue after the checkpoint: later lines will be written again."""
    kept = []
    if os.path.exists(filename):
        for line in open(filename):
            with contextlib.suppress(ValueError, KeyError, TypeError):      # an incomplete line
                kept += [line] if json.loads(line)["kimg"] <= seen / 1000 else []
    with atomic_write(filename, "w") as f:
        f.writelines(kept)
    return open(filename, "a")


def fetch(url, path, algorithm, digest, otherwise=""):
    """The path of a file whose digest begins so: the one that is there, or else fetched from url.

    path: pathlib.Path. otherwise: what else the user may do. Raises UserError.
    """
    remedy = ", ".join(filter(None, [f"download {url} elsewhere and put it at {path}", otherwise]))
    if path.exists():
        if not has_digest(path, algorithm, digest):
            raise UserError(f"{path} is damaged (its {algorithm} is not {digest}): remove it, or "
                            f"{remedy}")
        return path
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as r, open(part, "wb") as f:
            size = int(r.headers.get("Content-Length", 0))
            with tqdm(desc=path.name, total=size or None, unit="B", unit_scale=True) as bar:
                while block := r.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
        if part.stat().st_size < size:
            raise OSError("the connection was lost")
    except BaseException as e:
        part.unlink(missing_ok=True)
        if not isinstance(e, (OSError, http.client.HTTPException)):
            raise
        reason = " ".join(str(e).split())
        raise UserError(f"cannot fetch {path.name} ({reason}): {remedy}") from None
    if not has_digest(part, algorithm, digest):
        os.replace(part, f"{path}.bad")
        raise UserError(f"the file from {url} does not have the {algorithm} {digest}; it is kept "
                        f"as {path}.bad: {remedy}")
    os.replace(part, path)
    return path


def has_digest(path, algorithm, digest):
    return hashlib.new(algorithm, path.read_bytes()).hexdigest().startswith(digest)


# Processes, signals and precision

@contextlib.contextmanager
def process_group():
    """Within, the processes that torchrun started can communicate: NCCL for what is on a GPU, gloo
    for what is on a CPU. Without torchrun this does nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:                # decoding a data set may take hours
        dist.init_process_group(timeout=datetime.timedelta(hours=12))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """The number of this process among those of torchrun; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block before the others: it fetches or makes a file for all of them."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


def any_rank(signals):
    """Whether any process got a signal. If so, every process has its number in the list `signals`,
    in the same step."""
    if world_size() > 1:
        received = torch.tensor(signals[0] if signals else 0)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        if received and not signals:
            signals.append(int(received))
    return bool(signals)


@contextlib.contextmanager
def signals_noted():
    """A list to which Ctrl-C, SIGTERM, the end of the terminal or of whoever reads the output adds
    its number. A second signal ends the process at once, but not under torchrun, which repeats a
    Ctrl-C that every process has received already."""
    received = []

    def note(number, frame):
        received.append(number)
        if world_size() == 1:
            signal.signal(number, signal.SIG_DFL)
            with contextlib.suppress(OSError):                  # print is not safe in a handler
                os.write(2, b"\nstopping after this step; a second signal stops at once\n")
    names = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    numbers = [getattr(signal, n) for n in names]
    before = {s: signal.signal(s, note) for s in numbers if signal.getsignal(s) != signal.SIG_IGN}
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (LastingStream(s, received) for s in streams)
    try:
        yield received
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in before.items():
            signal.signal(number, handler)


class LastingStream:
    """A stream whose failure ends no run: what a full disk does not take is dropped, and a reader
    that has gone is noted like a signal."""

    def __init__(self, stream, received):
        self.stream, self.received = stream, received

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, method, *args):
        try:
            method(*args)
        except OSError as e:
            if e.errno in (errno.EPIPE, errno.EIO):             # a pipe or a terminal has gone
                discard(self.stream)
                self.received.append(SIGPIPE)


def full_float32():
    """Turn TF32 off: with it, the sample of a seed would depend on its batch."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def seed_for(purpose, seed, i=0):
    """A seed of its own for each purpose, run and place in it: an int below 2^63."""
    digest = hashlib.sha256(f"{purpose}, {seed}, {i}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def peak_memory(device):
    """GiB of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return 0.
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
