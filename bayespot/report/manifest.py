"""What makes a folder a run: its marker, the checksums of its files, and which files are its own.

``config.json`` has ``"bayespot_run"``, the version of the format, a SHA-256 of every file that results are read from
(``files``), the names of what is made for readers and may be edited (``free``: figures and the page), and a checksum of
itself. Only folders with that marker are replaced, and of these only such files are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bayespot.files import file_digest, replacing

#: Version of the format of runs.
FORMAT = 2
MARKER = "bayespot_run"
_TEMPORARY = re.compile(r"\..+\.(\d+(\.\w+)?|lock)")
#: What a distillation writes into its folder.
DISTILLATION = ("settings.json", "table.ecsv", "candidates.json", "formulas.tex", "formulas.png", "formulas.pdf")


class RunError(ValueError):
    """A run folder that cannot be read or written; the message says what is wrong and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; RunError names the file when it is none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; {path.parent} is no complete run: fit again") from error
    except (ValueError, OSError) as error:
        raise RunError(f"{path}: not valid JSON ({error}); restore it or fit again") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}, not an object; restore it or fit again")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a run.

    Raises
    ------
    RunError
        If it is missing, of another version of the format, or was changed.
    """
    path = folder / "config.json"
    config = read_json(path)
    found = config.get(MARKER, config.get("format"))
    if found != FORMAT:
        versions = config.get("versions")
        maker = versions.get("bayespot", "of that version") if isinstance(versions, dict) else "of that version"
        pickled = " (whose model is a pickle, that is code)" if found == 1 else ""
        again = f": {config['command']}" if isinstance(config.get("command"), str) and config["command"] else ""
        raise RunError(
            f"{path}: run format {found}{pickled}, this bayespot reads {FORMAT}; install bayespot {maker}, or fit "
            f"again{again}"
        )
    if config.get("checksum") != _own_checksum(config):
        raise RunError(f"{path} was changed after the run was written; restore it or fit again")
    return config


def verify(folder: Path, config: dict[str, Any]) -> None:
    """Raise RunError if a file of the run is missing, was changed, or is of another run."""
    pending = config.get("pending", {})
    for name, digest in config["files"].items():
        path = folder / name
        if not path.exists():
            raise RunError(f"{path} is missing; the run is incomplete: restore it or fit again")
        if file_digest(path) not in (digest, pending.get(name)):
            raise RunError(
                f"{path} is damaged, was changed, or is of another run (its checksum is not the one in config.json): "
                "restore it or fit again"
            )


def seal(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a folder that is complete, with the checksums of its files."""
    names = sorted(str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file())
    free = [name for name in names if _is_free(name)]
    members = [name for name in names if _is_members(name)]
    files = {name: file_digest(folder / name) for name in names if name not in free and name not in members}
    write_config(folder, {MARKER: FORMAT, **config, "files": files, "free": free})


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``, complete or not at all, with its own checksum."""
    # as it will be read: tuples become lists
    config = json.loads(json.dumps(config))
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps({**config, "checksum": _own_checksum(config)}, indent=1))


def register(folder: Path, paths: Iterable[Path], forget: Iterable[str] = ()) -> None:
    """Count files among those of a run, with their checksums, or for figures and pages with their names.

    Folders that are no run are left alone; ``forget`` are names that no longer count.
    """
    if not is_run(folder):
        return
    config = read_config(folder)
    config.pop("pending", None)
    files, free = dict(config["files"]), set(config["free"])
    for name in forget:
        files.pop(name, None)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if _is_free(name):
            free.add(name)
        else:
            files[name] = file_digest(path)
    write_config(folder, {**config, "files": files, "free": sorted(free)})


def replace_files(folder: Path, new: dict[str, Path]) -> None:
    """Put new versions of a run's files in their places; at any moment of it the run can be read."""
    config = read_config(folder)
    made = {name: path for name, path in new.items() if not _is_free(name)}
    write_config(folder, {**config, "pending": {name: file_digest(path) for name, path in made.items()}})
    for name, path in new.items():
        os.replace(path, folder / name)
    register(folder, [folder / name for name in new])


def is_run(folder: Path) -> bool:
    """Whether a folder has the marker of a run, of this or an earlier format."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict):
        return False
    first = config.get("format") == 1 and {"model", "fit", "versions"} <= config.keys()
    return first or isinstance(config.get(MARKER), int)


def own_files(folder: Path) -> set[Path]:
    """Return the files that a run wrote into its folder."""
    config = json.loads((folder / "config.json").read_text())
    if MARKER not in config:
        return _own_of_format_1(folder, config)
    found = {folder / "config.json", folder / "report.html"}
    listed = (*config.get("files", {}), *config.get("free", ()))
    found |= {folder / name for name in listed if _is_inside(name)}
    for member in folder.glob("member-*"):
        if is_run(member):
            found |= own_files(member)
    return found | distillation_files(folder / "distillation")


def _own_of_format_1(folder: Path, config: dict[str, Any]) -> set[Path]:
    """Earlier runs did not list their files: those of the names that they had."""
    names = ("config.json", "diagnostics.json", "posterior.nc", "model.pt", "model.py", "stars.npz", "summary.ecsv")
    figures = [p for p in (folder / "figures").glob("*") if p.suffix in (".png", ".pdf")]
    found = {folder / name for name in (*names, "fields.ecsv", "report.html")} | set(figures)
    for member in folder.glob("member-*") if "ensemble" in config else ():
        if is_run(member):
            found |= own_files(member)
    return found | distillation_files(folder / "distillation")


def distillation_files(folder: Path) -> set[Path]:
    """Return the files that a distillation wrote into its folder."""
    if not (folder / "settings.json").exists():
        return set()
    return {folder / name for name in DISTILLATION} | set((folder / "searches").glob("*-*.json"))


def strangers(folder: Path, own: set[Path]) -> list[Path]:
    """Return the files in a folder that are not among its own, temporary ones left aside."""
    inside = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(p for p in inside if p not in own and not _is_temporary(p, folder))


def require_replaceable(folder: Path) -> None:
    """Raise RunError unless a folder is a run, or empty, with no file in it but the run's own."""
    if not folder.is_dir():
        raise RunError(f"{folder} is a file, and a run is a folder: choose another name")
    if not any(folder.iterdir()):
        return
    if not is_run(folder):
        raise RunError(f"{folder} is not a run of bayespot, and only a run is replaced: choose another folder")
    if others := strangers(folder, own_files(folder)):
        raise RunError(
            f"{folder} holds {named(others, folder)}, which the run did not write and replacing it would delete: move "
            "that away, or choose another folder"
        )


def named(paths: Sequence[Path], folder: Path) -> str:
    """Return the first names of files in a folder, and how many more there are."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(str(p.relative_to(folder)) for p in paths[:3]) + more


def remove_own(folder: Path) -> None:
    """Remove the files of a run, and the folder if nothing else is in it."""
    remove_files(folder, own_files(folder) if is_run(folder) else set())


def remove_files(folder: Path, own: Iterable[Path]) -> None:
    """Remove files of a folder, temporary ones, and then every folder that is empty."""
    for path in (*own, *(p for p in folder.rglob("*") if p.is_file() and _is_temporary(p, folder))):
        path.unlink(missing_ok=True)
    for path in sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        folder.rmdir()


def _is_temporary(path: Path, folder: Path) -> bool:
    """Whether a file is one of `bayespot.files.replacing`, in such a folder, or of the operating system's browser."""
    parts = path.relative_to(folder).parts
    return path.name in (".DS_Store", "Thumbs.db") or any(_TEMPORARY.fullmatch(part) for part in parts)


def _is_inside(name: Any) -> bool:
    """Whether a name in a configuration, which somebody else may have written, stays inside the run."""
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _is_free(name: str) -> bool:
    return name.startswith("figures/") or "/figures/" in name or name.endswith((".html", ".png", ".pdf"))


def _is_members(name: str) -> bool:
    """Whether a file of a member is under the checksums of that member's own configuration."""
    return name.startswith("member-") and name.count("/") >= 1 and not name.endswith("/config.json")


def _own_checksum(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
