"""The command line: options, errors in one line, and what is printed above a progress bar."""
import argparse
import contextlib
import math
import os
import sys

import torch
from tqdm import tqdm

# What torch's RuntimeErrors say when memory runs out; it has a class of its own for GPUs only.
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")


class UserError(Exception):
    """A mistake that the user can correct. Its message is the one line that they see."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that ends the program with one line and exit code 2 at a mistake."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As argparse does, and refuses an empty string: as a path it would be the root."""
        parsed = super().parse_args(args, namespace)
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            values = value if isinstance(value, list) else [value]
            if "" in values:
                names = action.option_strings or [action.dest]
                self.error(f"{names[0]} must not be empty")
        return parsed

    def error(self, message):
        """Ends the program with exit code 2 and the message, on a line of its own."""
        close_progress_bars()
        self.exit(2, f"{self.prog}: {message}\n")

    @contextlib.contextmanager
    def one_line_errors(self):
        """A context in which what the user can correct ends the program with one line and exit
        code 2, and Ctrl-C with one line and exit code 130."""
        prepare_output()
        try:
            yield
            sys.stdout.flush()
        except UserError as error:
            self.error(error)
        except BrokenPipeError:
            os._exit(1)                     # a normal exit would write to the pipe again
        except OSError as error:
            if error.filename:
                self.error(f"{error.filename}: {error.strerror or error}")
            self.error(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.error("out of memory: take a smaller --batch-gpu, --batch or resolution")
        except KeyboardInterrupt:
            self.exit(130, f"{self.prog}: interrupted; what is written already stays\n")


def close_progress_bars():
    """Ends the lines of tqdm's progress bars, so that a message has a line of its own."""
    with contextlib.suppress(OSError):
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def prepare_output():
    """Makes sys.stdout and sys.stderr writable, whatever they are and whatever is written."""
    if sys.stdout is None:                                      # as where a shell closed it
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):                      # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")       # names that it cannot encode


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY)


def progress(*args, **options) -> tqdm:
    """A progress bar, tqdm(...). Where stderr is no terminal, as in a batch system's log, it writes
    every 30 seconds."""
    if not sys.stderr.isatty():
        options.setdefault("mininterval", 30)
    return tqdm(*args, **options)


def reason(error: Exception) -> str:
    """What an exception says, in one line of at most 200 characters."""
    if isinstance(error, (ArithmeticError, AttributeError, LookupError, TypeError)):
        # Python's own words for a damaged file would not help, as in "'NoneType' has no ..."
        return "a part of it is missing or damaged"
    return " ".join(str(error).split())[:200]


def say(text: str, file=None):
    """Prints one line, above a progress bar. It raises no OSError: neither a full disk nor a
    closed pipe ends the program."""
    if file is None:
        file = sys.stdout
    with contextlib.suppress(OSError):
        tqdm.write(str(text), file=file)
        file.flush()


def warn(text: str):
    """Prints one line on stderr, as say does."""
    say(text, sys.stderr)


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: an int or a float (the kind) from low to high. NaN is out of range."""
    if kind is int:
        noun = "an integer"
        digits = "d"
    else:
        noun = "a number"
        digits = "g"
    if high == math.inf:
        limits = f"of at least {low}"
    else:
        limits = f"from {low} to {high:{digits}}"

    def parse(text: str):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"must be {noun} {limits}, not {text!r}")
    return parse


def device_name(text: str) -> str:
    """An argparse type: cpu, or cuda, which under torchrun is the GPU of this process."""
    if text == "cpu":
        return text
    gpu = int(os.environ.get("LOCAL_RANK", 0))
    if text != "cuda":
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, not {text!r}")
    if gpu >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"cuda needs a GPU for each process, and torch sees "
                                         f"{torch.cuda.device_count()}")
    torch.cuda.set_device(gpu)
    return text


def add_device_option(parser: argparse.ArgumentParser):
    """Adds --device, which is cuda by default where there is a GPU, and else cpu."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_name, default=default,
                        help=f"cpu or cuda (default {default})")
