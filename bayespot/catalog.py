"""A catalogue of stars: Galactocentric phase-space positions, errors and metadata."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.catalog_io import (
    _FRAME,
    CARTESIAN,
    CatalogError,
    covariance_columns,
    phase_space,
    read_table,
    write_table,
)

if TYPE_CHECKING:
    import pandas as pd
    from astropy.table import QTable, Table

#: Packaged example catalogues.
EXAMPLES = {
    "globular_clusters": "milky_way_globular_clusters.ecsv",
    "satellites": "milky_way_satellites.ecsv",
}


@dataclass(frozen=True)
class Catalog:
    """Stars in Galactocentric Cartesian coordinates; frozen: every operation returns a new catalogue.

    Parameters
    ----------
    w : Float[Tensor, "n 6"]
        (x, y, z, vx, vy, vz) in kpc and km/s.
    covariance : Float[Tensor, "n 6 6"], optional
        Measurement covariance of ``w``.
    names
        Identifiers of the stars.
    meta
        Anything JSON can hold; mocks keep their truth under ``"truth"``, conversions their ``"notes"``.

    Raises
    ------
    CatalogError
        (A ValueError.) If shapes do not agree, values are not finite, all stars are at one point, or the
        median position lies far from the origin.
    """

    w: Tensor
    covariance: Tensor | None = None
    names: tuple[str, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        w = torch.as_tensor(self.w, dtype=torch.float64)
        object.__setattr__(self, "w", w)
        if w.dim() != 2 or w.shape[1] != 6:
            raise CatalogError(f"w must have shape (n, 6), got {tuple(w.shape)}")
        bad = ~torch.isfinite(w).all(-1)
        if bool(bad.any()):
            raise CatalogError(
                f"{int(bad.sum())} stars have NaN or infinite coordinates, the first in row "
                f"{int(bad.int().argmax())}; drop them"
            )
        if self.covariance is not None:
            covariance = torch.as_tensor(self.covariance, dtype=torch.float64)
            object.__setattr__(self, "covariance", covariance)
            if covariance.shape != (len(w), 6, 6):
                raise CatalogError(f"covariance must have shape ({len(w)}, 6, 6), got {tuple(covariance.shape)}")
        if self.names is not None and len(self.names) != len(w):
            raise CatalogError(f"{len(self.names)} names for {len(w)} stars; give one each")

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, drop_invalid: bool = False) -> Catalog:
        """Read a FITS, ECSV, CSV, Parquet or NPZ file.

        Columns are ``x y z vx vy vz`` (Galactocentric; kpc and km/s unless the file carries units) or Gaia's
        ``ra dec``, ``distance`` or ``parallax``, ``pmra pmdec radial_velocity`` with optional ``*_error`` and
        ``*_corr``. A missing error is replaced by the column's median relative error and noted.

        Parameters
        ----------
        path
            File; the suffix tells the format.
        drop_invalid
            Drop rows with NaN, masked values or parallaxes that are not positive, instead of refusing them.

        Raises
        ------
        CatalogError
            Names the file, column or row, and the remedy.
        """
        path = Path(path)
        table, meta = read_table(path)
        try:
            return cls.from_table(table, meta=meta, drop_invalid=drop_invalid)
        except CatalogError as error:
            raise CatalogError(f"{path}: {error}") from error

    @classmethod
    def from_table(cls, table: Table, *, meta: dict[str, Any] | None = None, drop_invalid: bool = False) -> Catalog:
        """Build a catalogue from an astropy Table with the columns of `read`."""
        w, covariance, rows, notes = phase_space(table, drop_invalid)
        meta = dict(meta or {})
        if "ra" in table.colnames and "x" not in table.colnames:
            meta["frame"] = _FRAME
        if notes:
            meta["notes"] = [*meta.get("notes", []), *notes]
        names = None
        for column in ("name", "source_id"):
            if column in table.colnames:
                names = tuple(str(table[column][int(i)]) for i in rows)
                break
        catalog = cls(torch.as_tensor(w), None if covariance is None else torch.as_tensor(covariance), names, meta)
        catalog.check_geometry()
        return catalog

    @classmethod
    def from_dataframe(cls, frame: pd.DataFrame, *, drop_invalid: bool = False) -> Catalog:
        """Build a catalogue from a pandas DataFrame with the columns of `read`."""
        from astropy.table import Table

        return cls.from_table(Table.from_pandas(frame), drop_invalid=drop_invalid)

    @classmethod
    def example(cls, name: str = "globular_clusters") -> Catalog:
        """Return a packaged catalogue of the Milky Way: ``"globular_clusters"`` or ``"satellites"``."""
        from importlib.resources import as_file, files

        if name not in EXAMPLES:
            raise CatalogError(f"unknown example {name!r}; choose one of {', '.join(EXAMPLES)}")
        with as_file(files("bayespot.data") / EXAMPLES[name]) as path:
            return cls.read(path)

    def check_geometry(self) -> None:
        """Raise CatalogError unless the stars surround the origin and differ from one another."""
        x, n = self.x, len(self)
        centre = x.median(0).values
        spread = torch.linalg.vector_norm(x - centre, dim=-1).median()
        speed = torch.linalg.vector_norm(self.v - self.v.median(0).values, dim=-1).median()
        if n > 1 and (float(spread) == 0 or float(speed) == 0):
            what = "at one point" if float(spread) == 0 else "moving alike"
            raise CatalogError(f"all stars are {what}: {n} rows carry the information of one; check the columns")
        # the median of n isotropic positions scatters by about one spread / sqrt(n) per axis
        offset = float(torch.linalg.vector_norm(centre))
        if n >= 10 and offset > (0.5 + 3 / n**0.5) * float(spread):
            raise CatalogError(
                f"the median position is {offset:.3g} kpc from the origin, with a spread of {float(spread):.3g} kpc: "
                "x, y, z do not look Galactocentric (or centred on the system); subtract the centre"
            )

    def require(self, n_parameters: int) -> None:
        """Raise CatalogError if there are fewer stars than free parameters."""
        if len(self) < n_parameters:
            raise CatalogError(
                f"{len(self)} stars for a model with {n_parameters} free parameters; add stars or take a smaller "
                "model (fewer features or components)"
            )

    @property
    def x(self) -> Tensor:
        """Positions ``(n, 3)`` in kpc."""
        return self.w[:, :3]

    @property
    def v(self) -> Tensor:
        """Velocities ``(n, 3)`` in km/s."""
        return self.w[:, 3:]

    def __len__(self) -> int:
        return len(self.w)

    def __getitem__(self, rows: int | slice | list[int] | np.ndarray | Tensor) -> Catalog:
        """Return the chosen rows as a catalogue (also for a single one)."""
        index = np.arange(len(self))[np.asarray(rows) if isinstance(rows, Tensor | list) else rows]
        index = np.atleast_1d(index)
        chosen = torch.as_tensor(index)
        return Catalog(
            self.w[chosen],
            None if self.covariance is None else self.covariance[chosen],
            None if self.names is None else tuple(self.names[int(i)] for i in index),
            dict(self.meta),
        )

    def subsample(self, n: int, seed: int) -> Catalog:
        """Return ``n`` random stars without replacement."""
        if not 0 < n <= len(self):
            raise CatalogError(f"cannot draw {n} of {len(self)} stars; choose 1 to {len(self)}")
        return self[np.random.default_rng(seed).choice(len(self), n, replace=False)]

    def summary(self) -> str:
        """Return a few lines that describe the catalogue."""
        r = torch.linalg.vector_norm(self.x, dim=-1)
        q = torch.quantile(r[:1_000_000], torch.tensor([0.01, 0.5, 0.99], dtype=r.dtype))
        sigma = float(self.v.pow(2).sum(-1).mean().sqrt())
        L = torch.linalg.cross(self.x, self.v)
        spin = float(L[:, 2].sum() / torch.linalg.vector_norm(L, dim=-1).sum())
        lines = [
            f"{len(self)} stars, {'with' if self.covariance is not None else 'without'} measurement errors",
            f"radius: 1 % {float(q[0]):.4g}, median {float(q[1]):.4g}, 99 % {float(q[2]):.4g} kpc",
            f"rms speed {sigma:.4g} km/s, sum Lz / sum L = {spin:.3f}",
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.meta.get("notes", [])])

    def to_table(self) -> QTable:
        """Return an astropy QTable with units; the covariance's upper triangle as ``cov_*`` columns."""
        from astropy import units as u
        from astropy.table import QTable

        table = QTable()
        if self.names is not None:
            table["name"] = list(self.names)
        for i, (name, unit) in enumerate(CARTESIAN.items()):
            table[name] = self.w[:, i].numpy() * u.Unit(unit)
        if self.covariance is not None:
            for name, column in covariance_columns(self.covariance.numpy()).items():
                table[name] = column
        return table

    def write(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write to FITS, ECSV, CSV, Parquet or NPZ (by suffix), atomically; `read` gives it back."""
        write_table(self.to_table(), self.meta, Path(path), overwrite)
