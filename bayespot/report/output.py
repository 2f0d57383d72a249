"""Where a run goes: what may be replaced, what is refused before any work, and unfinished fits beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bayespot.files import file_digest, recover, remove_leftovers
from bayespot.locks import locked
from bayespot.report.manifest import (
    RunError,
    is_run,
    named,
    remove_files,
    remove_own,
    require_replaceable,
    strangers,
)

#: In an unfinished fit's folder: the checksum of the configuration of the run that it became.
_FINISHED = "finished"


def partial_folder(folder: Path) -> Path:
    """Return where an unfinished fit of ``folder`` keeps its checkpoint."""
    return folder.with_name(folder.name + ".partial")


@contextmanager
def output_folder(
    folder: Path, overwrite: bool, resume: bool, inputs: Sequence[Path] = (), look: bool = False
) -> Iterator[None]:
    """Hold a run's place for a fit: refuse it before the fit where the run could not be written there at its end.

    Parameters
    ----------
    folder
        The run to be.
    overwrite, resume
        Whether an existing run is replaced, and whether an unfinished fit is continued.
    inputs
        Files that are read: none may be inside.
    look
        Only refuse: nothing is removed yet.

    Raises
    ------
    RunError
        If the place is taken or not a run, or an input is inside.
    LockedError
        If another process writes it.
    WriteError
        If it cannot be written to.
    """
    for path in inputs:
        if path.exists() and (path.resolve() == folder.resolve() or folder.resolve() in path.resolve().parents):
            raise RunError(f"the output {folder} contains the input {path}: choose another folder")
    with locked(folder):
        remove_leftovers(folder.parent, folder.name)
        tidy_partial(folder)
        with suppress(OSError):
            recover(folder, remove_own)
        check_free(folder, overwrite, resume, look)
        yield


def check_free(folder: Path, overwrite: bool, resume: bool, look: bool = False) -> None:
    """Refuse a folder that exists, or an unfinished fit, unless told what to do with it; only runs are removed."""
    partial = partial_folder(folder)
    if resume and is_finished(folder):
        return
    if folder.exists():
        if not overwrite:
            raise RunError(f"{folder} exists; choose another folder or pass --overwrite")
        require_replaceable(folder)
    if partial.exists() and not resume:
        if not overwrite:
            raise RunError(f"{partial} holds an interrupted fit; continue it with --resume or drop it with --overwrite")
        if not look:
            drop_partial(folder)


def mark_finished(folder: Path, written: Path) -> None:
    """Note in an unfinished fit that the run in ``written`` is what became of it, just before that is moved."""
    if partial_folder(folder).is_dir():
        (partial_folder(folder) / _FINISHED).write_text(file_digest(written / "config.json"))


def is_finished(folder: Path) -> bool:
    """Whether an unfinished fit became the run that is there: the process was killed before it was tidied away."""
    mark = partial_folder(folder) / _FINISHED
    if not mark.exists() or not is_run(folder):
        return False
    return mark.read_text() == file_digest(folder / "config.json")


def drop_partial(folder: Path) -> None:
    """Remove an unfinished fit.

    Raises
    ------
    RunError
        If there is a file in its folder that no fit wrote.
    """
    partial = partial_folder(folder)
    if not partial.is_dir():
        return
    own = {path for pattern in ("checkpoint.*", "member-*.*", _FINISHED) for path in partial.glob(pattern)}
    if others := strangers(partial, own):
        raise RunError(f"{partial} holds {named(others, partial)}, which no fit wrote: move that away")
    remove_files(partial, own)


def tidy_partial(folder: Path) -> None:
    """Remove what killed processes left of an unfinished fit, and its folder if nothing was reached."""
    partial = partial_folder(folder)
    remove_leftovers(partial)
    with suppress(OSError):
        partial.rmdir()
