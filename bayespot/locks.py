"""One writer at a time: a lock beside a folder, held by a process and free when that process is gone."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bayespot.files import WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class LockedError(ValueError):
    """A folder that another process writes; the message says which, and since when."""


def lock_path(folder: Path) -> Path:
    """Return the file that is there, and locked, while a process writes ``folder``."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; that of a process that is gone is taken over.

    The operating system drops the lock with its process, however that ends, so that none has to be removed by hand on
    the same machine.

    Raises
    ------
    LockedError
        If another process holds it.
    WriteError
        If the folder's place cannot be written to.
    """
    path = lock_path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquired(path, folder)
    except OSError as error:
        raise WriteError.of(folder, error) from error
    try:
        yield
    finally:
        # removed while still held: nobody can have taken it in between
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _acquired(path: Path, folder: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        holder = _read(path)
        elsewhere = bool(holder) and holder.get("host") != socket.gethostname()
        if not _exclusive(handle) or elsewhere or (fcntl is None and holder):
            os.close(handle)
            raise LockedError(_message(folder, path, holder, elsewhere or fcntl is None))
        # a holder that has just finished has unlinked the file that was opened: then there is a new one
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                break
        os.close(handle)
    content = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "command": " ".join(sys.argv)}
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(content).encode())
    return handle


def _exclusive(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _message(folder: Path, path: Path, holder: dict[str, Any], unsure: bool) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    since = holder.get("since")
    if isinstance(since, int | float):
        who += f" since {_duration(max(time.time() - since, 0.0))}"
    remedy = "wait for it, stop it, or choose another folder"
    if unsure:
        remedy += f"; if that process is gone, delete {path}"
    return f"{folder} is being written by {who}: {remedy}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
