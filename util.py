"""What every program needs and no equation is in: options and errors, images on disk, checkpoints,
downloads, and the processes that torchrun starts.
"""
import argparse
import atexit
import contextlib
import datetime
import hashlib
import http.client
import io
import math
import os
import secrets
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

# With TF32, the sample of a seed would depend on its batch
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


class UserError(Exception):
    """A mistake that the user can correct. Its message is the one line that they see."""


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line and exit code 2."""

    def parse_args(self, *args, **kw):
        given = super().parse_args(*args, **kw)
        for action in self._actions:
            value = getattr(given, action.dest, None)           # as a path it would be the root
            if "" in (value if isinstance(value, list) else [value]):
                self.error(f"{''.join(action.option_strings) or action.dest} must not be empty")
        return given

    def error(self, message):
        with contextlib.suppress(OSError):
            for bar in list(getattr(tqdm, "_instances", ())):   # the message has a line of its own
                bar.close()
        self.exit(2, f"{self.prog}: {printable(message)}\n")

    @contextlib.contextmanager
    def one_line_errors(self):
        """Within, what the user can correct ends the program with one line and exit code 2, Ctrl-C
        with one line and 130, and the end of whoever reads its output quietly with 141."""
        sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
        if hasattr(sys.stdout, "reconfigure"):                  # a notebook's has not
            sys.stdout.reconfigure(errors="backslashreplace")   # names that it cannot encode
        try:
            yield
            sys.stdout.flush()
        except UserError as e:
            self.error(e)
        except BrokenPipeError:
            os._exit(128 + 13)              # SIGPIPE; Python's own end would write to nobody again
        except OSError as e:
            self.error(f"{e.filename}: {e.strerror}" if e.filename else e)
        except (MemoryError, RuntimeError) as e:                # torch has a class for a GPU's only
            words = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
            if not isinstance(e, MemoryError) and not any(word in str(e) for word in words):
                raise
            self.error("out of memory: take a smaller --batch-gpu, --batch or resolution")
        except KeyboardInterrupt:
            self.exit(130, f"{self.prog}: interrupted; what is written already stays\n")


def printable(text):
    """The text with its control characters escaped: a filename may contain any."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def reason(error):
    """What an exception says, in one line. Python's own words for a damaged file say nothing."""
    if isinstance(error, (ArithmeticError, AttributeError, LookupError, TypeError)):
        return "a part of it is missing or damaged"
    return " ".join(str(error).split())[:200]


def say(text, file=None):
    """Prints one line, above a progress bar. A full disk or a reader that has gone ends nothing."""
    with contextlib.suppress(OSError):
        tqdm.write(printable(text), file=file or sys.stdout)
        (file or sys.stdout).flush()


def warn(text):
    say(text, sys.stderr)


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
    """An argparse type: cpu, or cuda, which under torchrun is the GPU of this process."""
    gpu = int(os.environ.get("LOCAL_RANK", 0))
    if text == "cuda" and gpu < torch.cuda.device_count():
        torch.cuda.set_device(gpu)
    elif text != "cpu":
        raise argparse.ArgumentTypeError(f"must be cpu, or cuda with a GPU each, not {text!r}")
    return text


def add_device_option(parser):
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_name, default=found, help="cuda where there is one")


def normalize(images):
    """uint8 -> float32 in [-1, 1]. Float data, latents for example, stay as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def to_uint8(x):
    """Float in [-1, 1] -> uint8: 127.5 x + 128, clipped and truncated, as EDM does."""
    return (127.5 * x + 128).clamp(0, 255).byte()


def open_upright(file):
    """An image file -> a PIL image of mode L (grey) or RGB: rotated as its EXIF says, transparent
    parts on white, the upper 8 bits of 16-bit grey. In its info: "stack", whether it has more
    pages, and "deep", the largest value of 16-bit grey. Raises ValueError where the range of values
    is unknown, and what Pillow raises for a file that is damaged or too large."""
    image = Image.open(file)
    info, kind = {"stack": getattr(image, "is_animated", False)}, image.format
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode == "I" and kind not in ("PNG", "PPM"):
        raise ValueError("32-bit and float images have no standard range: convert it to 8 bits")
    if image.mode.startswith("I"):                              # 16-bit grey; Pillow would clip it
        deep = np.asarray(image)
        info["deep"] = int(deep.max())
        image = Image.fromarray((deep >> 8).clip(0, 255).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
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
    return image.crop((left, top, left + w, top + h)).resize((width, height), Image.LANCZOS)


def read_image(filename, channels, height, width):
    """One image file, cropped and resized: uint8 [1, channels, height, width]. Raises UserError."""
    refuse_special(filename)
    try:
        image = open_upright(filename).convert({1: "L", 3: "RGB"}[channels])
        array = np.atleast_3d(np.array(crop_and_resize(image, width, height)))  # [H, W, C]
    except Exception as e:                                      # decoders raise nearly anything
        raise UserError(f"{filename} is not an image that can be read as one of {channels} "
                        f"channels: {reason(e)}") from None
    return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous()


def save_image(pixels, filename):
    """uint8 [1 or 3, H, W] -> a PNG."""
    if not str(filename).lower().endswith(".png"):
        raise UserError(f"{filename} cannot be written: use the extension .png")
    array = pixels.cpu().permute(1, 2, 0).numpy()               # [H, W, C]
    with atomic_write(filename) as f:
        Image.fromarray(array[:, :, 0] if len(pixels) == 1 else array).save(f, "png")


def save_grid(images, filename, columns=None):
    """uint8 [N, C, H, W] -> one image of them all, each in a dark border. Small ones are enlarged,
    not smoothed. Of other data than grey or RGB, the first channels."""
    columns, k = columns or math.ceil(math.sqrt(len(images))), max(1, 64 // images.shape[-1])
    images = images[:, :3 if images.shape[1] >= 3 else 1].cpu()
    images = images.repeat_interleave(k, -1).repeat_interleave(k, -2)
    tiles = F.pad(images, (1, 1, 1, 1, 0, 0, 0, -len(images) % columns))
    _, c, h, w = tiles.shape
    rows = tiles.reshape(-1, columns, c, h, w).permute(2, 0, 3, 1, 4)   # [C, rows, H, cols, W]
    save_image(rows.reshape(c, -1, columns * w), filename)


def refuse_special(filename):
    """Raises UserError for a device, a pipe or a socket, before anything waits for it."""
    if os.path.exists(filename) and not os.path.isfile(filename) and not os.path.isdir(filename):
        raise UserError(f"{filename} is a device or a pipe: give a file")


@contextlib.contextmanager
def atomic_write(filename, mode="wb"):
    """A file to write in. It is flushed to disk and renamed to filename when it is complete, so
    that a reader finds the old file or the new one, never a part. Until then its name is its own:
    two programs may write the same file at once. A link stays, and what it names is written."""
    refuse_special(filename)
    filename = os.path.realpath(filename)
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


@contextlib.contextmanager
def or_a_warning(what):
    """Within, a disk that takes no more costs only what is written there."""
    try:
        yield
    except OSError as e:
        warn(f"{what} could not be written ({e.strerror or e})")


def save_checkpoints(files):
    """Saves {filename: checkpoint}, all or none: they are renamed when all are on disk. True when
    saved. Where the disk does not take them: False, and old files stay."""
    with or_a_warning(" and ".join(map(str, files))):
        with contextlib.ExitStack() as stack:
            for filename, checkpoint in files.items():
                buffer = io.BytesIO()                           # torch.save hides a file's OSError
                torch.save(checkpoint, buffer)
                f = stack.enter_context(atomic_write(filename))
                f.write(buffer.getbuffer())
                f.flush()
                os.fsync(f.fileno())
        return True
    return False


def read_checkpoint(filename):
    """A file of torch.save with plain tensors and types only -> dict. Raises UserError."""
    refuse_special(filename)
    try:
        with zipfile.ZipFile(filename) as z:                    # torch.save does not compress, so
            if sum(i.file_size for i in z.infolist()) > os.path.getsize(filename):
                raise ValueError                                # this would be a decompression bomb
        return dict(torch.load(filename, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{filename} does not exist: train a model with train.py first") from None
    except Exception:                                           # zip, pickle and torch differ
        raise UserError(f"{filename} is not a checkpoint of this project, or it is damaged") \
            from None


@contextlib.contextmanager
def locked(folder):
    """Within, the folder exists and no other run can have it. UserError where another has it. The
    lock ends with the process, however that ends. A folder that stays empty is removed."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/.lock", "w") as f:
        try:
            import fcntl                                        # Windows has none
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in Path(folder).glob("*.????????.part"):   # a killed run has left it
                part.unlink()
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run: choose another --out, or wait for "
                            "its end") from None
        except (ImportError, OSError) as e:                     # some network disks have no locks
            warn(f"{folder} cannot be locked ({reason(e)}): start no second run in it")
        try:
            yield
        finally:
            if os.listdir(folder) == [".lock"]:
                os.remove(f.name)
                os.rmdir(folder)


def fetch(url, path, sha256, otherwise=""):
    """The path, a pathlib.Path, of a file whose SHA-256 begins so. Where it is missing, it is
    fetched from url. otherwise: what else the user may do. Raises UserError."""
    remedy = f"download {url} elsewhere and put it at {path}{otherwise}"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256)
    except (OSError, RuntimeError, http.client.HTTPException) as e:
        raise UserError(f"cannot fetch {path.name} ({reason(e)}): {remedy}") from None
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(sha256):
        raise UserError(f"{path} is damaged (its SHA-256 is not {sha256}): remove it, or {remedy}")
    return path


def join_processes():
    """Lets the processes that torchrun started communicate: by NCCL what is on a GPU, by gloo what
    is on a CPU. Without torchrun, or after the first time, this does nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group(timeout=datetime.timedelta(hours=12))   # for decoding a large set
        atexit.register(dist.destroy_process_group)             # a second run needs the same group


def rank():
    """The number of this process among those of torchrun; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def any_rank(signals):
    """Whether any process got a signal; then each has its number in the list `signals`, in the same
    step. One that comes meanwhile counts in the next."""
    received = torch.tensor(signals[0] if signals else 0)
    if world_size() > 1:
        dist.all_reduce(received, dist.ReduceOp.MAX)
    if received and not signals:
        signals.append(int(received))
    return bool(received)


@contextlib.contextmanager
def signals_noted():
    """A list to which Ctrl-C, SIGTERM, the end of the terminal and that of who reads the output add
    their number. A second one ends the process at once, but not under torchrun, which repeats a
    Ctrl-C that every process has received already."""
    received = []

    def note(number, frame):
        received.append(number)
        if world_size() == 1 and signal.Signals(number).name != "SIGPIPE":      # each line is one
            signal.signal(number, signal.SIG_DFL)
            with contextlib.suppress(OSError):                  # print is not safe in a handler
                os.write(2, b"\nstopping after this step; a second signal stops at once\n")
    names = "SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE"            # Windows has two of them
    before = {s: signal.signal(s, note) for s in signal.Signals if s.name in names
              and (s.name == "SIGPIPE" or signal.getsignal(s) != signal.SIG_IGN)}       # nohup
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compile_or_warn(module, asked):
    """torch.compile(module) in place, where one line compiles here. Else a warning and the module
    as it is, or UserError where the user has asked for it."""
    device = next(module.parameters()).device
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as e:                  # the class depends on torch and on its disk cache
        failed = f"torch.compile does not work here ({reason(e)}): install a C++ compiler"
        failed += " and Triton" if device.type == "cuda" else ""
        if asked:
            raise UserError(f"{failed}, or leave --compile out") from None
        warn(f"not compiled, so slower: {failed}")
    else:
        module.compile()                                        # weights keep their names


def seed_for(purpose, seed, i=0):
    """A seed of its own for each purpose, run and place in it: an int below 2^63."""
    digest = hashlib.sha256(f"{purpose}, {seed}, {i}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
