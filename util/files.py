"""Files: written whole or not at all, checked before they are opened, fetched once."""
import contextlib
import hashlib
import http.client
import os
import secrets
from pathlib import Path

import torch

from util.cli import UserError, reason, warn


def refuse_special(filename):
    """Raises UserError for a device, a pipe or a socket, before anything waits for it."""
    is_file_or_folder = os.path.isfile(filename) or os.path.isdir(filename)
    if os.path.exists(filename) and not is_file_or_folder:
        raise UserError(f"{filename} is a device or a pipe: give a file")


@contextlib.contextmanager
def atomic_write(filename, mode: str = "wb", flush: bool = True):
    """A context with a file to write in, which is flushed to disk and renamed to filename when
    it is complete: a reader finds the old file or the new one, never a part of one.

    Until then its name is its own, so that two programs may write the same file at once. Where
    filename is a link, the link stays, and the file that it names is replaced. flush: False for
    what is quickly made again; a power failure may leave such a file empty.
    """
    refuse_special(filename)
    target = os.path.realpath(filename)
    part = f"{target}.{secrets.token_hex(4)}.part"
    try:
        with open(part, mode) as f:
            yield f
            if flush:
                f.flush()
                os.fsync(f.fileno())
        os.replace(part, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        error.filename = filename                               # a full disk's names none
        raise


@contextlib.contextmanager
def or_a_warning(what: str):
    """A context in which an OSError, of a full disk for example, is a warning that `what`
    could not be written, and no more."""
    try:
        yield
    except OSError as error:
        warn(f"{what} could not be written ({error.strerror or error})")


def fetch(url: str, path: Path, sha256: str, otherwise: str = "") -> Path:
    """The path of a file whose SHA-256 begins with these digits. Where the file is missing, it
    is fetched from url.

    otherwise: what else the user may do, for the error. Raises UserError where the file cannot
    be fetched or has another SHA-256.
    """
    remedy = f"download {url} elsewhere and put it at {path}{otherwise}"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(f"cannot fetch {path.name} ({reason(error)}): {remedy}") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(sha256):
        raise UserError(f"{path} is damaged (its SHA-256 is not {sha256}): remove it, or "
                        f"{remedy}")
    return path
