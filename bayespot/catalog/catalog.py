"""A catalogue of stars: Galactocentric phase-space positions, errors and metadata."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.catalog.checks import check_speeds, check_spread, require_finite, require_positive
from bayespot.catalog.columns import (
    CARTESIAN,
    COVARIANCE,
    OBSERVED,
    CatalogError,
    ObservedColumns,
    canonical,
    covariance_columns,
    observed_columns,
    phase_space,
)
from bayespot.catalog.doubts import centre_doubts, copies, copy_doubts, fast_doubts, unit_doubts, value_doubts
from bayespot.catalog.frame import Frame
from bayespot.catalog.gaia import gaia_columns
from bayespot.catalog.io import read_table, write_table
from bayespot.catalog.names import read_names
from bayespot.catalog.objects import require_kind, skycoord_columns
from bayespot.catalog.rotation import (
    RotationAxis,
    mean_rotation,
    rotation_matrix,
    stored_rotation,
    turned_covariance,
    turned_meta,
    turned_stars,
)
from bayespot.catalog.snapshot import read_snapshot
from bayespot.units import takes

if TYPE_CHECKING:
    import pandas as pd
    from astropy.coordinates import SkyCoord
    from astropy.table import QTable, Table

#: Packaged example catalogues.
EXAMPLES = {
    "globular_clusters": "milky_way_globular_clusters.ecsv",
    "satellites": "milky_way_satellites.ecsv",
}


@takes(values="internal", covariance="internal")
@dataclass(frozen=True, eq=False)
class Observed:
    """What was measured of each star, in heliocentric observables.

    Parameters
    ----------
    names
        ``ra dec``, ``distance`` or ``parallax``, ``pmra pmdec radial_velocity``: deg, kpc or mas, mas/yr, km/s.
    values : Float[Tensor, "n 6"]
        NaN where a distance or a radial velocity is missing.
    covariance : Float[Tensor, "n 6 6"]
        Of the observables, with ra cos(dec) in place of ra.
    frame
        The Galactocentric frame that turns them into w; default: astropy's v4.0.
    """

    names: tuple[str, ...]
    values: Tensor
    covariance: Tensor
    frame: Frame = field(default_factory=Frame)


@takes(w="phase_space", covariance="internal")
@dataclass(frozen=True, eq=False, repr=False)
class Catalog:
    """Stars in Galactocentric Cartesian coordinates; frozen: every operation returns a new catalogue.

    The arrays and the metadata are copied in, so later changes to the caller's do not reach the catalogue. Torch has
    no read-only tensors: changing ``catalog.w`` in place is possible, and not supported.

    Parameters
    ----------
    w : Float[Tensor, "n 6"]
        (x, y, z, vx, vy, vz) in kpc and km/s.
    covariance : Float[Tensor, "n 6 6"], optional
        Measurement covariance of ``w``.
    names
        Identifiers of the stars.
    meta
        Anything JSON can hold: ``"truth"`` of a mock, ``"frame"`` of heliocentric input, ``"notes"`` on what reading
        replaced or dropped.
    observed
        The heliocentric observables that ``w`` comes from; what measurement errors are deconvolved in.

    Raises
    ------
    CatalogError
        (A ValueError.) If shapes do not agree, values are not finite or a covariance is not positive definite
        (zero variances are allowed: exact coordinates).

    Examples
    --------
    >>> clusters = Catalog.example("globular_clusters")
    >>> len(clusters), clusters.names[0], clusters.covariance.shape
    (161, 'AM4', torch.Size([161, 6, 6]))
    """

    w: Tensor
    covariance: Tensor | None = None
    names: tuple[str, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    observed: Observed | None = None

    def __new__(cls, w: Any = None, *_: Any, **__: Any) -> Catalog:
        """Say which constructor takes what is no array, before its unit is asked for (None: a copy is being made)."""
        require_kind(w, "Catalog(w)")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        w = torch.as_tensor(self.w, dtype=torch.float64).detach().clone()
        object.__setattr__(self, "w", w)
        object.__setattr__(self, "meta", copy.deepcopy(dict(self.meta)))
        if w.dim() != 2 or w.shape[1] != 6:
            raise CatalogError(f"w must have shape (n, 6), got {tuple(w.shape)}; stack x, y, z, vx, vy, vz")
        require_finite("w", w)
        if self.covariance is not None:
            covariance = torch.as_tensor(self.covariance, dtype=torch.float64).detach().clone()
            object.__setattr__(self, "covariance", covariance)
            if covariance.shape != (len(w), 6, 6):
                raise CatalogError(f"covariance must have shape ({len(w)}, 6, 6), got {tuple(covariance.shape)}")
            require_finite("covariance", covariance.flatten(1))
            require_positive("covariance", covariance)
        if self.observed is not None:
            if self.observed.values.shape != w.shape or self.observed.covariance.shape != (len(w), 6, 6):
                raise CatalogError(f"observed values and covariance must be ({len(w)}, 6) and ({len(w)}, 6, 6)")
            require_positive("covariance of the observables", self.observed.covariance)
        if self.names is not None:
            object.__setattr__(self, "names", tuple(self.names))
            if len(self.names) != len(w):
                raise CatalogError(f"{len(self.names)} names for {len(w)} stars; give one each")

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        *,
        hdu: int | str | None = None,
        frame: Any = None,
        drop_invalid: bool = False,
        drop_duplicates: bool = False,
        check_offset: bool = True,
        allow_missing: bool = False,
    ) -> Catalog:
        """Read a FITS, ECSV, CSV, Parquet, NPZ, VOTable or HDF5 file, or a table of text; gzipped where usual.

        Columns are ``x y z vx vy vz`` (Galactocentric; kpc and km/s unless the file carries units) or Gaia's
        ``ra dec`` (deg), ``distance`` (kpc) or ``parallax`` (mas), ``pmra pmdec`` (mas/yr, pmra with the factor
        cos(dec)) and ``radial_velocity`` (km/s), turned with astropy's v4.0 Galactocentric frame or ``frame``.
        ``*_error`` (those of ra and dec in mas, ra's with the factor cos(dec)) and ``*_corr`` give the covariance,
        propagated to first order; a quantity without an error column counts as exact. A missing value in an error
        column is replaced by that column's median relative error (never less than its smallest error). Identifiers
        come from ``name`` or ``source_id``; rows in messages count from 0. ``meta["notes"]`` says what was replaced,
        dropped or looks odd.

        Parameters
        ----------
        path
            File; the suffix tells the format.
        hdu
            Number or name of the table in a file with several (FITS extensions, tables of a VOTable, paths in HDF5);
            default: the first with coordinates.
        frame
            `bayespot.catalog.Frame`, or an astropy ``Galactocentric``: where the Sun is and how it moves.
        drop_invalid
            Drop rows with NaN, masked values or parallaxes that are not positive, instead of refusing them.
        drop_duplicates
            Keep the first of rows that are one star: the same ``source_id``, or coordinates equal to rounding.
        check_offset
            Refuse stars that do not surround the origin; see `check_geometry`.
        allow_missing
            Accept stars without distance or radial velocity, or with a parallax that is not positive but has an error,
            to be marginalised over by a model with errors (`bayespot.likelihood.MeasurementErrors`); ``w`` then holds
            place holders for them.

        Raises
        ------
        CatalogError
            Names the file, column or row, and the remedy.
        """
        path = Path(path)
        table, meta = read_table(path, hdu)
        try:
            return cls.from_table(
                table,
                meta=meta,
                frame=frame,
                drop_invalid=drop_invalid,
                drop_duplicates=drop_duplicates,
                check_offset=check_offset,
                allow_missing=allow_missing,
            )
        except CatalogError as error:
            raise CatalogError(f"{path}: {error}") from error

    @classmethod
    def from_table(
        cls,
        table: Table,
        *,
        meta: dict[str, Any] | None = None,
        frame: Any = None,
        drop_invalid: bool = False,
        drop_duplicates: bool = False,
        check_offset: bool = True,
        allow_missing: bool = False,
    ) -> Catalog:
        """Build a catalogue from an astropy Table or QTable with the columns of `read`; ``meta`` by default its own."""
        require_kind(table, "from_table")
        meta = copy.deepcopy(dict(table.meta if meta is None else meta))
        stored, asked = meta.get("frame"), frame is not None
        if frame is None and isinstance(stored, dict) and "galcen_distance_kpc" in stored:
            frame = stored
        if (rotation := stored_rotation(meta)) is not None:
            frame = Frame.of(frame).turned(rotation)
        plain = canonical(table)
        found = phase_space(plain, drop_invalid, allow_missing, None if frame is None else Frame.of(frame))
        names, notes = read_names(plain, found.rows)
        notes = found.notes + notes
        for column in (*CARTESIAN, *OBSERVED, *(f"{name}_error" for name in (*CARTESIAN, *OBSERVED))):
            notes += _value_notes(plain, column, found.rows)
        if found.frame is not None:
            meta["frame"] = found.frame.parameters()
        elif asked:
            meta["frame"] = Frame.of(frame).parameters()
            notes.append("the columns are Galactocentric already: the frame is recorded, and changes nothing")
        catalog = cls(
            torch.as_tensor(found.w),
            None if found.covariance is None else torch.as_tensor(found.covariance),
            names,
            meta,
            None if found.observed is None else _observed(found.observed, Frame.of(frame)),
        )
        if drop_duplicates:
            first = copies(found.w, names)
            kept = np.flatnonzero(first == np.arange(len(first)))
            if len(kept) < len(first):
                notes.append(f"{len(first) - len(kept)} of {len(first)} rows dropped as copies of others")
                catalog = catalog[kept]
        if notes:
            known = meta.get("notes", [])
            catalog.meta["notes"] = [*known, *(note for note in notes if note not in known)]
        check_speeds(catalog.v)
        catalog.check_geometry(offset=check_offset)
        return catalog

    @classmethod
    def from_dataframe(
        cls,
        frame: pd.DataFrame,
        *,
        drop_invalid: bool = False,
        drop_duplicates: bool = False,
        check_offset: bool = True,
        allow_missing: bool = False,
    ) -> Catalog:
        """Build a catalogue from a pandas DataFrame with the columns of `read`."""
        from astropy.table import Table

        require_kind(frame, "from_dataframe")
        return cls.from_table(
            Table.from_pandas(frame),
            drop_invalid=drop_invalid,
            drop_duplicates=drop_duplicates,
            check_offset=check_offset,
            allow_missing=allow_missing,
        )

    @classmethod
    def from_skycoord(cls, coordinates: SkyCoord, *, frame: Any = None, check_offset: bool = True) -> Catalog:
        """Build a catalogue from an astropy SkyCoord with distances and velocities, in any frame that it knows.

        Galactocentric coordinates are taken as they are. Of a galpy ``Orbit``: ``from_skycoord(orbit.SkyCoord())``.

        Parameters
        ----------
        coordinates
            One-dimensional.
        frame
            As in `read`; default: that of the coordinates, if they carry one. Galactocentric ones keep theirs.
        check_offset
            As in `read`.

        Raises
        ------
        CatalogError
            If distances or velocities are missing.
        """
        require_kind(coordinates, "from_skycoord")
        table, own = skycoord_columns(coordinates)
        if own is not None and (frame is None or "x" in table.colnames):
            frame = Frame.of(own)
            table.meta["frame"] = frame.parameters()
        return cls.from_table(table, frame=None if "x" in table.colnames else frame, check_offset=check_offset)

    @classmethod
    @takes(parallax_zero_point="parallax", min_parallax_over_error="number", max_ruwe="number")
    def from_gaia(
        cls,
        table: Table,
        *,
        parallax_zero_point: float = 0.0,
        min_parallax_over_error: float | None = None,
        max_ruwe: float | None = None,
        distance: str | None = None,
        frame: Any = None,
        drop_invalid: bool = False,
        drop_duplicates: bool = False,
        check_offset: bool = False,
        allow_missing: bool = False,
    ) -> Catalog:
        """Build a catalogue from a table of the Gaia archive, as a query returns it.

        Column names in any case (the archive's client writes ``SOURCE_ID``), units from the table or else Gaia's. What
        the cuts drop is counted in ``meta["notes"]``; a model of so cut stars needs the cuts in its selection.

        Parameters
        ----------
        table
            With ``ra dec parallax pmra pmdec radial_velocity``, their ``*_error`` and ``*_corr``.
        parallax_zero_point
            Subtracted from the parallaxes, mas (Lindegren et al. 2021, A&A 649, A4: -0.017 to -0.039).
        min_parallax_over_error
            Keep stars with at least this ``parallax / parallax_error``.
        max_ruwe
            Keep stars with ``ruwe`` up to this; 1.4 is Gaia's advice.
        distance
            Stem of columns to take the distance from instead of the parallax, with their quantiles as error:
            ``"r_med_geo"`` of Bailer-Jones et al. (2021), in pc, with ``r_lo_geo`` and ``r_hi_geo``.
        frame, drop_invalid, drop_duplicates, check_offset, allow_missing
            As in `read`; ``check_offset`` is off, as stars around the Sun do not surround the Galactic centre.

        Raises
        ------
        CatalogError
            Names the column that is missing, and the remedy.
        """
        require_kind(table, "from_gaia")
        prepared = gaia_columns(table, parallax_zero_point, min_parallax_over_error, max_ruwe, distance)
        return cls.from_table(
            prepared,
            frame=frame,
            drop_invalid=drop_invalid,
            drop_duplicates=drop_duplicates,
            check_offset=check_offset,
            allow_missing=allow_missing,
        )

    @classmethod
    def read_snapshot(cls, path: str | os.PathLike[str], particles: str | int = "stars", **options: Any) -> Catalog:
        """Read particles of an N-body snapshot (HDF5 of GADGET, AREPO, GIZMO or SWIFT), about their centre.

        ``options`` and what is raised are those of `bayespot.catalog.snapshot.read_snapshot`: ``max_stars`` and
        ``seed`` of a random subsample, ``radius``, units, centre. The axes are the simulation's, particle
        identifiers the names; centre, bulk velocity and what was assumed are in ``meta["snapshot"]`` and the notes.
        """
        found = read_snapshot(path, particles, **options)
        catalog = cls(torch.as_tensor(found.w), None, found.names, found.meta)
        check_speeds(catalog.v)
        catalog.check_geometry()
        return catalog

    @classmethod
    def example(cls, name: str = "globular_clusters") -> Catalog:
        """Return a packaged catalogue of the Milky Way: ``"globular_clusters"`` or ``"satellites"``."""
        from importlib.resources import as_file, files

        if name not in EXAMPLES:
            raise CatalogError(f"unknown example {name!r}; choose one of {', '.join(EXAMPLES)}")
        with as_file(files("bayespot.data") / EXAMPLES[name]) as path:
            return cls.read(path)

    def check_geometry(self, offset: bool = True) -> None:
        """Raise CatalogError unless the stars differ from one another and, if ``offset``, surround the origin.

        With the median position c (per axis) and the median distance D from it, n >= 10 stars must have
        |c| <= (1/2 + 4/sqrt(n)) D. The second term lets c scatter: for n isotropic normal positions by 1.4 D/sqrt(n).
        """
        check_spread(self.x, self.v, offset)

    @property
    def frame(self) -> Frame:
        """The Galactocentric frame of the coordinates: that in the metadata or astropy's v4.0, turned as they are."""
        stored = self.meta.get("frame")
        known = Frame.of(stored if isinstance(stored, dict) and "galcen_distance_kpc" in stored else None)
        return known.turned(self.rotation)

    @property
    def rotation(self) -> Tensor | None:
        """The matrix ``(3, 3)`` by which `rotated` turned the stars since they were read; None: not at all."""
        return stored_rotation(self.meta)

    def doubts(self) -> list[str]:
        """Return, in words, what makes one doubt the stars; empty where they look like a galaxy's.

        Units that no galaxy has, a system that is off the origin or moves as a whole, stars that are listed twice, and
        stars that the mass of the others cannot bind.
        """
        x, v, w = (a.cpu().numpy() for a in (self.x, self.v, self.w))
        found = unit_doubts(x, v)
        if found:  # all else would follow from that
            return found
        covariance = None if self.covariance is None else self.covariance.cpu().numpy()
        return centre_doubts(x, v) + copy_doubts(w, self.names) + fast_doubts(w, covariance, self.names)

    def require(self, n_parameters: int) -> None:
        """Raise CatalogError if there are fewer stars than free parameters."""
        if len(self) < n_parameters:
            raise CatalogError(
                f"{len(self)} stars for a model with {n_parameters} free parameters; add at least "
                f"{n_parameters - len(self)} stars or take a smaller model (fewer features or components)"
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

    def __repr__(self) -> str:
        truth = ", a mock" if "truth" in self.meta else ""
        return f"Catalog({len(self)} stars, {'no ' if self.covariance is None else ''}measurement errors{truth})"

    def __getitem__(self, rows: int | slice | list[int] | np.ndarray | Tensor) -> Catalog:
        """Return the chosen rows as a catalogue (of length 1 for an integer); indices or a mask."""
        if isinstance(rows, list | tuple):
            rows = np.asarray(rows, dtype=None if len(rows) else int)
        elif isinstance(rows, Tensor):
            rows = rows.cpu().numpy()
        index = np.atleast_1d(np.arange(len(self))[rows])
        chosen = torch.as_tensor(index)
        return Catalog(
            self.w[chosen],
            None if self.covariance is None else self.covariance[chosen],
            None if self.names is None else tuple(self.names[int(i)] for i in index),
            self.meta,
            None
            if self.observed is None
            else replace(
                self.observed, values=self.observed.values[chosen], covariance=self.observed.covariance[chosen]
            ),
        )

    def without_errors(self) -> Catalog:
        """Return the stars as if their coordinates were exact: no covariance, no observables.

        Raises
        ------
        CatalogError
            If a star lacks a distance or a radial velocity: it has no coordinates then.
        """
        lost = 0 if self.observed is None else int(torch.isnan(self.observed.values).any(-1).sum())
        if lost:
            raise CatalogError(
                f"{lost} of {len(self)} stars lack a distance or a radial velocity, which only measurement errors can "
                "stand in for: take the errors into account, or drop those stars"
            )
        notes = (
            {} if self.covariance is None else {"notes": [*self.meta.get("notes", []), "measurement errors left out"]}
        )
        return Catalog(self.w, None, self.names, {**self.meta, **notes})

    def rotation_axis(self) -> RotationAxis:
        """Return the axis about which the stars rotate: the mean direction of their angular momenta.

        Raises
        ------
        CatalogError
            If they do not rotate, beyond what chance gives, or are under ten.
        """
        found = mean_rotation(self.w)
        if found is None:
            raise CatalogError(
                f"{len(self)} stars without a rotation beyond chance have no axis of it: give the direction that shall "
                "become z, for instance the minor axis of the system's shape"
            )
        return found

    @takes(axis="number", rotation="number")
    def rotated(self, axis: Any = None, *, rotation: Any = None) -> Catalog:
        r"""Return the stars along other axes, :math:`x' = R x, v' = R v`, with covariances :math:`R C R^T`.

        Axisymmetric models are symmetric about z: ``catalog.rotated(catalog.rotation_axis().direction)`` makes z the
        axis about which the stars rotate (in the positive sense). The rotation since the stars were read is kept in
        ``meta["rotation"]``, and `frame`, its Sun and the frame of the heliocentric observables turn with them, so that
        errors are deconvolved as before. Selections by direction or by the Sun's place have to be turned by
        `bayespot.likelihood.Rotated`; a model refuses others. Of a mock's truth a spherical potential is kept, of any
        truth what a rotation about z leaves; the rest is dropped with a note.

        Parameters
        ----------
        axis
            Direction in the present axes that becomes z, three numbers; by the shortest rotation if its z is not
            negative, else after half a turn about x.
        rotation
            Instead of it: R, a matrix ``(3, 3)`` or a ``scipy.spatial.transform.Rotation``.

        Raises
        ------
        CatalogError
            If not just one of the two is given, the axis has no direction, or R is no rotation.

        Examples
        --------
        >>> stars = Catalog.example("globular_clusters")
        >>> upright = stars.rotated([0.0, 0.6, 0.8])
        >>> torch.allclose(upright.rotated(rotation=upright.rotation.T).w, stars.w)
        True
        """
        matrix = rotation_matrix(axis, rotation)
        seen = self.observed
        return Catalog(
            turned_stars(self.w, matrix),
            None if self.covariance is None else turned_covariance(self.covariance, matrix),
            self.names,
            turned_meta(self.meta, matrix),
            None if seen is None else replace(seen, frame=seen.frame.turned(matrix)),
        )

    def subsample(self, n: int, seed: int) -> Catalog:
        """Return ``n`` random stars without replacement."""
        if not 0 < n <= len(self):
            raise CatalogError(f"cannot draw {n} of {len(self)} stars; choose 1 to {len(self)}")
        return self[np.random.default_rng(seed).choice(len(self), n, replace=False)]

    def summary(self) -> str:
        """Return a few lines: size, radii, speed, rotation, errors and notes."""
        lines = [f"{len(self)} stars, {'with' if self.covariance is not None else 'without'} measurement errors"]
        if len(self):
            r = torch.linalg.vector_norm(self.x, dim=-1).cpu().numpy()
            q = np.quantile(r, [0.01, 0.5, 0.99])
            speed = float(self.v.pow(2).sum(-1).mean().sqrt())
            L = torch.linalg.cross(self.x, self.v)
            spin = float(L[:, 2].sum() / torch.linalg.vector_norm(L, dim=-1).sum().clamp(min=1e-300))
            lines += [
                f"radius: 1 % {q[0]:.4g}, median {q[1]:.4g}, 99 % {q[2]:.4g} kpc",
                f"rms speed {speed:.4g} km/s, net rotation (sum Lz / sum L) {spin:.3f}",
            ]
        return "\n".join(lines + [f"note: {note}" for note in [*self.meta.get("notes", []), *self.doubts()]])

    def to_table(self) -> QTable:
        """Return an astropy QTable with units; the covariance's upper triangle as columns ``cov_x_x cov_x_y ...``."""
        from astropy import units as u
        from astropy.table import QTable

        table = QTable(meta=copy.deepcopy(self.meta))
        for i, (name, unit) in enumerate(CARTESIAN.items()):
            table[name] = self.w[:, i].cpu().numpy() * u.Unit(unit)
        if self.covariance is not None:
            for name, column in covariance_columns(self.covariance.cpu().numpy()).items():
                table[name] = column * u.Unit(COVARIANCE[name])
        if self.observed is not None:
            o = self.observed
            raw = ObservedColumns(o.names, o.values.cpu().numpy(), o.covariance.cpu().numpy())
            for name, (column, unit) in observed_columns(raw).items():
                table[name] = column * u.Unit(unit)
        if self.names is not None:  # last: a line of text that starts with "#" would be read as a comment
            table["name"] = list(self.names)
        return table

    def write(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write to FITS, ECSV, CSV, Parquet or NPZ (by suffix), atomically; `read` gives it back.

        Raises
        ------
        CatalogError
            If the file exists (unless ``overwrite``), its folder does not, the suffix is unknown, or ``meta`` holds
            what JSON cannot.
        """
        write_table(self.to_table(), self.meta, Path(path), overwrite)


def _value_notes(table: Table, column: str, rows: np.ndarray) -> list[str]:
    if column not in table.colnames:
        return []
    raw = np.ma.asarray(table[column])
    if raw.dtype.kind not in "fiu":
        return []
    values = np.ma.filled(raw.astype(float), np.nan)[rows]
    known = np.isfinite(values)
    return value_doubts(column, values[known], rows[known]) if known.any() else []


def _observed(columns: ObservedColumns, frame: Frame) -> Observed:
    values, covariance = (torch.as_tensor(np.array(a)) for a in (columns.values, columns.covariance))
    return Observed(columns.names, values, covariance, frame)
