"""A user's model file: imported when he gives it, and from a run of somebody else only when that is trusted."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bayespot.files import file_digest
from bayespot.report.manifest import RunError
from bayespot.storage import NotTrusted, Reader, StorageError, Written, read

PREFIX = "bayespot_user_model_"


def load_model_module(path: Path, name: str | None = None) -> Any:
    """Import a user's model file under a name by which its classes can be found again.

    Raises
    ------
    RunError
        If there is no such file, or what it raises when it is imported.
    """
    name = name or PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise RunError(f"{path}: no such model file; give a .py file with build(catalog) -> SnapshotModel")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise RunError(f"{path} cannot be imported: {in_words(error, path)}; correct it") from error
    return module


def in_words(error: BaseException, path: Path) -> str:
    """Return what was raised and at which line of a user's file."""
    line = None
    if isinstance(error, SyntaxError):
        line = error.lineno
    else:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.resolve()]
        lines = lines or [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = lines[-1] if lines else None
    where = "" if line is None else f"line {line}: "
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{where}{type(error).__name__}{f': {message}' if message else ''}"


def source_of(written: Written, model_file: Path | None) -> tuple[Path, str] | None:
    """Return the one file with a model's own code, and the name of its module; None if there is none, or several."""
    if model_file is not None:
        digest = file_digest(model_file)
        names = [name for name, other in written.code.items() if other == digest]
        return model_file, names[0] if names else PREFIX + model_file.stem
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in written.code if "." not in name}
    return next(((Path(f), n) for n, f in files.items() if f), None) if len(files) == len(written.code) == 1 else None


def read_model(folder: Path, config: dict[str, Any], trust: bool, given: Path | None) -> Any:
    """Return what ``model.safetensors`` of a run holds.

    Raises
    ------
    RunError
        If it needs code that is not trusted, or is damaged.
    """
    path = folder / "model.safetensors"
    stored = config.get("model_file")
    if given is not None:
        if stored is None:
            raise RunError(f"{folder} was not made with a model file of its own: leave {given} out")
        if not given.is_file():
            raise RunError(f"{given}: no such model file")
        if file_digest(given) != stored["sha256"]:
            raise RunError(f"{given} is not the file that {folder} was made with ({stored['name']}), or has changed")
    module = _finder(folder, config, given) if trust or given is not None else None
    try:
        return read(path, Reader(module, unpickle=trust))
    except NotTrusted as error:
        raise RunError(_untrusted(folder, stored, str(error), given)) from error
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; the run is incomplete: fit again") from error
    except StorageError as error:
        raise RunError(f"{path}: not a readable model ({error}); fit again") from error


def _finder(folder: Path, config: dict[str, Any], given: Path | None) -> Callable[[str], Any]:
    stored = config.get("model_file") or {}

    def find(name: str) -> Any:
        digest = config.get("code", {}).get(name, "")
        loaded = sys.modules.get(name)
        source = getattr(loaded, "__file__", None)
        if loaded is not None and (
            not digest or (source and Path(source).exists() and file_digest(Path(source)) == digest)
        ):
            return loaded
        if name == stored.get("module"):
            # another module of that name stays what it is
            own = name if loaded is None or name.startswith(PREFIX) else f"{PREFIX}{name}_{digest[:8]}"
            return load_model_module(given or folder / "model.py", own)
        return _installed(name, digest, folder)

    return find


def _installed(name: str, digest: str, folder: Path) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise RunError(f"{folder} needs the module {name}, which cannot be imported ({error}): install it") from error
    source = getattr(module, "__file__", None)
    if digest and source and file_digest(Path(source)) != digest:
        raise RunError(f"{source} has changed since {folder} was made with it: restore it, or fit again")
    return module


def _untrusted(folder: Path, stored: dict[str, Any] | None, what: str, given: Path | None) -> str:
    if stored is not None and given is None and not what.startswith("a pickled"):
        return (
            f"{folder} was made with its author's own model file, {stored['name']}, whose code would run: look at "
            f"{folder / 'model.py'} and pass --trust-model, or give the same file with --model-file"
        )
    return (
        f"{folder} needs {what}, which would run code of its author's when it is read: pass --trust-model if you trust "
        "them"
    )
