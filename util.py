"""What every program needs and no equation is in: options and errors, images on disk, checkpoints,
downloads, and the processes that torchrun starts.
"""
import argparse
import contextlib
import datetime
import hashlib
import http.client
import io
import math
import os
import secrets
import signal
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                             # Windows
    fcntl = None

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
        with contextlib.suppress(OSError):
            for bar in list(getattr(tqdm, "_instances", ())):   # the message has a line of its own
                bar.close()
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
            os._exit(128 + SIGPIPE)         # Python's own end would write to nobody again
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
    """Prints one line, above a progress bar where there is one."""
    with shown():
        tqdm.write(printable(text), file=file or sys.stdout)
        (file or sys.stdout).flush()


def warn(text):
    say(text, sys.stderr)


@contextlib.contextmanager
def shown(signals=None):
    """Within, output that a full disk does not take ends nothing, and a reader that has gone is
    added to signals where there are any."""
    try:
        yield
    except BrokenPipeError:
        if signals is None:
            raise
        signals.append(SIGPIPE)
    except OSError:
        pass


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


def open_upright(file):
    """An image file -> a PIL image of mode L (grey) or RGB: rotated as its EXIF says, transparent
    parts on white, the upper 8 bits of 16-bit grey. In its info: "stack", whether it has more
    pages, and "deep", the largest value of 16-bit grey. Raises ValueError where the range of values
    is unknown."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError:                              # which names an object in memory
        raise ValueError("it is not an image that can be read") from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:     # Pillow only warns
        raise ValueError(f"{image.width} x {image.height} pixels are more than Pillow's limit "
                         f"of {Image.MAX_IMAGE_PIXELS}")
    format = image.format
    info = {"stack": getattr(image, "is_animated", False) and format not in ("MPO", "PSD")}
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode == "I" and format not in ("PNG", "PPM"):
        raise ValueError("32-bit and float images have no standard range: convert it to 8 bits")
    if image.mode.startswith("I"):                              # 16-bit grey; Pillow would clip it
        deep = np.asarray(image)
        if format != "PPM":                                     # which declares its largest value
            info["deep"] = int(deep.max())
        image = Image.fromarray((deep >> 8).clip(0, 255).astype(np.uint8))
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
    kind = Image.registered_extensions().get(os.path.splitext(filename)[1].lower())
    if kind not in Image.SAVE:
        raise UserError(f"{filename} cannot be written: use the extension .png")
    with atomic_write(filename) as f:
        image.save(f, kind)


def save_grid(images, filename, columns=None):
    """uint8 [N, C, H, W] -> one image of them all. Small images are enlarged, not smoothed."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    tiles = F.pad(enlarge(images.cpu()), (1, 1, 1, 1, 0, 0, 0, missing))        # a dark border each
    _, c, h, w = tiles.shape
    rows = tiles.reshape(-1, columns, c, h, w).permute(2, 0, 3, 1, 4)   # [C, rows, H, cols, W]
    save_image(rows.reshape(c, -1, columns * w), filename)


def enlarge(images):
    k = max(1, 64 // images.shape[-1])
    return images.repeat_interleave(k, -1).repeat_interleave(k, -2)


def film_strip(rows, columns, filename):
    """rows: pairs of a label and its images [C, H, W] in [-1, 1], one for each column label."""
    cells = [F.pad(enlarge(to_uint8(torch.stack(list(row))).cpu()), (0, 2, 0, 2), value=255)
             for _, row in rows]                                # [columns, C, H, W] each
    _, c, h, w = cells[0].shape
    left, top = 12 + 6 * max(len(label) for label, _ in rows), 16
    canvas = Image.new("RGB", (left + len(columns) * w, top + len(rows) * h), "white")
    draw = ImageDraw.Draw(canvas)
    for j, label in enumerate(columns):
        draw.text((left + j * w + 2, 2), label, fill="black")
    for i, ((label, _), row) in enumerate(zip(rows, cells)):
        draw.text((2, top + i * h + h // 2 - 7), label, fill="black")
        rgb = (row if c >= 3 else row[:, :1].expand(-1, 3, -1, -1))[:, :3]
        strip = torch.cat(list(rgb), 2).permute(1, 2, 0)        # [H, columns W, 3]
        canvas.paste(Image.fromarray(strip.contiguous().numpy()), (left, top + i * h))
    write_image(canvas, filename)


# Files: checkpoints and downloads

def refuse_special(filename):
    """Raises UserError for a device, a pipe or a socket, before anything waits for it."""
    with contextlib.suppress(OSError, ValueError):              # it is missing: its reader says so
        mode = os.stat(filename).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
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
    try:
        with contextlib.ExitStack() as stack:
            for filename, checkpoint in files.items():
                buffer = io.BytesIO()                           # torch.save hides a file's OSError
                torch.save(checkpoint, buffer)
                f = stack.enter_context(atomic_write(filename))
                f.write(buffer.getbuffer())
                f.flush()
                os.fsync(f.fileno())
        return True
    except OSError as e:
        stays = "; the previous one stays" if os.path.exists(filename) else ""
        warn(f"{filename} could not be saved ({e.strerror}){stays}")
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


@contextlib.contextmanager
def locked(folder):
    """Within, the folder exists and no other run can have it. UserError where another has it. The
    lock ends with the process, however that ends. A folder that stays empty is removed."""
    if rank() > 0 or fcntl is None:
        yield
        return
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/.lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in Path(folder).glob("*.????????.part"):   # a killed run has left it
                part.unlink()
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run: choose another --out, or wait for "
                            "its end") from None
        except OSError as e:                                    # some network disks have no locks
            warn(f"{folder} cannot be locked ({e.strerror}): start no second run in it")
        try:
            yield
        finally:
            if os.listdir(folder) == [".lock"]:
                os.remove(f.name)
                os.rmdir(folder)


def fetch(url, path, algorithm, digest, otherwise=""):
    """The path, a pathlib.Path, of a file whose digest begins so. Where it is missing, it is
    fetched from url. otherwise: what else the user may do. Raises UserError."""
    remedy = ", ".join(filter(None, [f"download {url} elsewhere and put it at {path}", otherwise]))

    def is_right():
        return hashlib.new(algorithm, path.read_bytes()).hexdigest().startswith(digest)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
            if not is_right():
                path.unlink()
                raise OSError(f"what came does not have the {algorithm} {digest}")
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"cannot fetch {path.name} ({reason(e)}): {remedy}") from None
    if not is_right():
        raise UserError(f"{path} is damaged (its {algorithm} is not {digest}): remove it, or "
                        f"{remedy}")
    return path


# Processes, signals and speed

@contextlib.contextmanager
def process_group():
    """Within, the processes that torchrun started can communicate: NCCL for what is on a GPU, gloo
    for what is on a CPU. Without torchrun, or in a group already, this does nothing."""
    own = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if own:                                                     # decoding a data set may take hours
        dist.init_process_group(timeout=datetime.timedelta(hours=12))
    yield
    if own:
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
    """A list to which Ctrl-C, SIGTERM and the end of the terminal add their number. A second signal
    ends the process at once, but not under torchrun, which repeats a Ctrl-C that every process has
    received already."""
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
        reason = next(iter(str(e).splitlines()), type(e).__name__)[:200]
        remedy = "install a C++ compiler" + (" and Triton" if device.type == "cuda" else "")
        if asked:
            raise UserError(f"torch.compile does not work here ({reason}): leave --compile out, or "
                            f"{remedy}") from None
        warn(f"not compiled, so slower: torch.compile does not work here ({reason}): {remedy}")
    else:
        module.compile()                                        # weights keep their names


def full_float32():
    """Turn TF32 off: with it, the sample of a seed would depend on its batch."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def seed_for(purpose, seed, i=0):
    """A seed of its own for each purpose, run and place in it: an int below 2^63."""
    digest = hashlib.sha256(f"{purpose}, {seed}, {i}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
