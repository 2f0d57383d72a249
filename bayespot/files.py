"""Files that are complete or not there at all, and errors of the disk that say where and what to do."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Names of what `replacing` and `write_folder` fill before it is moved to its place.
_TEMPORARY = re.compile(r"\.(?P<stem>.+?)\.(?P<pid>\d+)(?P<suffix>\.\w+)?")
_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "your quota is used up: free some space, or write to another disk",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOENT: "create its folder first",
    errno.ENAMETOOLONG: "choose a shorter name",
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


def write_folder(
    folder: Path, write: Callable[[Path], None], note: str = "", remove: Callable[[Path], None] = shutil.rmtree
) -> None:
    """Have a folder written beside its place and moved there when it is complete; an old one goes only then.

    Parameters
    ----------
    folder
        What to make or replace.
    write
        Fills the empty folder that it is given.
    note
        What to add to the message of a `WriteError`.
    remove
        Removes the old folder, which has been moved aside.

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
        recover(folder, remove)
        if folder.exists():
            old = set_aside(folder)
            os.rename(folder, old)
            try:
                os.rename(temporary, folder)
            except OSError:
                os.rename(old, folder)
                raise
            remove(old)
        else:
            os.rename(temporary, folder)
    except OSError as error:
        raise WriteError.of(folder, error, note) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Return where the old folder is for the moment in which a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def recover(folder: Path, remove: Callable[[Path], None] = shutil.rmtree) -> None:
    """End a replacement that was killed half-way: the old folder is back, or gone if the new one is there."""
    old = set_aside(folder)
    if old.is_dir() and not folder.exists():
        os.rename(old, folder)
    elif old.is_dir():
        remove(old)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files and folders that killed processes left in a folder; with ``name`` those of one file."""
    if not folder.is_dir():
        return
    for one in folder.iterdir():
        match = _TEMPORARY.fullmatch(one.name)
        if match is None or _is_alive(int(match["pid"])):
            continue
        if name is not None and name not in (match["stem"] + (match["suffix"] or ""), match["stem"]):
            continue
        if one.is_dir():
            shutil.rmtree(one, ignore_errors=True)
        else:
            one.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return True
    if os.name != "posix":
        return True  # there os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
