"""Files that are complete or not there at all, and errors of the disk that say where and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "your quota is used up: free some space, or write to another disk",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOENT: "create its folder first",
    errno.ENOTDIR: "a part of the path is a file: choose another place",
}


class WriteError(OSError):
    """A file or folder that could not be written; the message says which, why and what to do."""

    @classmethod
    def of(cls, path: Path, error: OSError, note: str = "") -> WriteError:
        """Return what ``error`` means for ``path``; ``note`` ends the message."""
        # of a file in a folder that is being written: the folder's message says it all
        inner = os.strerror(error.errno) if isinstance(error, WriteError) and error.errno else None
        reason = inner or error.strerror or str(error) or type(error).__name__
        # astropy reports a full disk in words of its own, without the number
        code = errno.ENOSPC if "space" in reason.lower() else error.errno or 0
        remedy = _REMEDIES.get(code, "check the place and try again")
        return cls(error.errno, f"{path}: cannot be written ({reason}): {remedy}{note}")

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside ``path``, which replaces it at the end.

    After an error nothing of it is left and an old file is as it was.

    Raises
    ------
    WriteError
        If the disk is full, the folder missing or not writable.
    """
    # the suffix stays last: writers tell the format by it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError.of(path, error) from error
    finally:
        # a failure to remove it must not hide the first error
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None], note: str = "") -> None:
    """Have a folder written beside its place and moved there when it is complete; an old one goes only then.

    Parameters
    ----------
    folder
        What to make or replace.
    write
        Fills the empty folder that it is given.
    note
        What to add to the message of a `WriteError`.

    Raises
    ------
    WriteError
        If the disk is full or the place not writable; nothing half-written is left.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
    except OSError as error:
        raise WriteError.of(folder, error, note) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_torch(content: Any, path: Path) -> None:
    """Write with torch.save; a full disk is an OSError here, where torch's own writer raises RuntimeError."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())
