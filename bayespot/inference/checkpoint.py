"""Checkpoints: the state of a fit as data, and the fingerprint that tells one fit from another."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayespot.catalog.projected import ProjectedCatalog
from bayespot.files import replacing
from bayespot.inference.result import FitConfig
from bayespot.likelihood.model import SnapshotModel
from bayespot.storage import Reader, StorageError, Written, describe, read, write

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog

#: What the parts of a fingerprint are called in messages.
_PARTS = {"model": "model", "code": "model file", "stars": "catalogue", "version": "version of bayespot"}


class Checkpoints:
    """The file that keeps one fit: what is written there is read back by the same fit only.

    Parameters
    ----------
    path
        The file.
    model, catalog, config
        What is fitted, as given.

    Raises
    ------
    StorageError
        If the model cannot be stored: said here, before the fit.
    """

    def __init__(self, path: Path, model: SnapshotModel, catalog: Catalog, config: FitConfig) -> None:
        self.path = path
        self.model = describe(model)
        self.fingerprint = _fingerprint(self.model, catalog, config)

    def save(self, content: Any) -> None:
        """Write the state, complete or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            write({"fingerprint": self.fingerprint, "content": content}, temporary, "fit")

    def load(self) -> Any:
        """Return what was saved.

        Raises
        ------
        ValueError
            If the file is missing, damaged, or of another fit; the message says what differs.
        """
        if not self.path.exists():
            raise ValueError(f"nothing to resume: {self.path} does not exist; fit without resuming")
        reader = Reader(self._module, known=self.model)
        try:
            found = read(self.path, reader, only="fingerprint")
            if found != self.fingerprint:
                raise ValueError(
                    f"{self.path} belongs to another fit ({_differences(found, self.fingerprint)}); resume with the "
                    "same model, catalogue, seed and options, or fit anew with --overwrite"
                )
            return read(self.path, reader, only="content")
        except StorageError as error:
            raise ValueError(f"{self.path}: not a readable checkpoint ({error}); delete it and fit anew") from error

    def _module(self, name: str) -> Any:
        """Code that the model at hand uses was imported by the user, in this process."""
        if name not in self.model.code:
            raise StorageError(f"it needs the code of {name}, which the model does not use")
        return sys.modules[name]


def _fingerprint(model: Written, catalog: Catalog, config: FitConfig) -> dict[str, Any]:
    """What tells one fit from another: model and its code, stars with their errors, settings, version."""
    settings = json.loads(json.dumps(asdict(config)))
    return {
        "version": version("bayespot"),
        "model": model.digest(),
        "code": dict(model.code),
        "stars": _stars(catalog),
        "settings": settings,
    }


def _stars(catalog: Catalog) -> str:
    total = hashlib.sha256()
    parts: list[Tensor | None] = [catalog.w, catalog.covariance]
    if catalog.observed is not None:
        total.update(" ".join(catalog.observed.names).encode())
        parts += [catalog.observed.values, catalog.observed.covariance]
    if isinstance(catalog, ProjectedCatalog):
        parts.append(catalog.sky)
    for part in parts:
        total.update(b"none" if part is None else part.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def _differences(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict) or "settings" not in found:
        return "its fingerprint is not readable"
    parts = [f"another {_PARTS[name]}" for name in _PARTS if found.get(name) != wanted[name]]
    # the model's digest holds that of its code
    if "another model file" in parts and "another model" in parts:
        parts.remove("another model")
    settings = found["settings"]
    parts += [
        f"{name} {settings.get(name)} there, {value} here"
        for name, value in wanted["settings"].items()
        if settings.get(name) != value
    ]
    return ", ".join(parts)
