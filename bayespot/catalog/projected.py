"""Stars of a system that is seen in projection: places on the sky and line-of-sight velocities."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.catalog.catalog import Catalog
from bayespot.catalog.columns import CatalogError
from bayespot.catalog.io import read_table
from bayespot.catalog.names import read_names
from bayespot.units import takes

if TYPE_CHECKING:
    from astropy.table import Table

#: Names of the columns that are read, first come first served; in lower case.
_V = ("radial_velocity", "v_los", "vlos", "v_helio", "vhelio", "rv")
_V_ERROR = ("radial_velocity_error", "v_los_error", "vlos_error", "v_error", "rv_error", "e_rv", "e_v_los", "e_vlos")
#: Share of the velocities that may be farther from their median than so many of their own widths: more are no members.
_FAR, _MANY = 6.0, 0.1


@takes(w="phase_space", covariance="internal", sky="internal")
@dataclass(frozen=True, eq=False, repr=False)
class ProjectedCatalog(Catalog):
    """Places on the sky and line-of-sight velocities, about the system's centre; x is east, y north, z away from us.

    ``w`` are stand-ins: what is not known, depth and the velocity across, is drawn from a broad guess (a Plummer
    sphere with isotropic velocities), for a fit to begin with and scales to be taken from. The likelihood of a fit,
    `bayespot.likelihood.LineOfSight`, sees ``sky`` alone, and other likelihoods refuse these stars.

    Parameters
    ----------
    sky : Float[Tensor, "n 4"]
        x and y in kpc at the nominal distance, the line-of-sight velocity relative to the system's, and its error in
        km/s.

    Examples
    --------
    >>> stars = ProjectedCatalog.of(x=[0.1, -0.2, 0.3], y=[0.0, 0.1, -0.3], v=[5.0, -3.0, 1.0], v_error=2.0)
    >>> stars.sky.shape
    torch.Size([3, 4])
    """

    sky: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sky is None:
            raise CatalogError("a ProjectedCatalog needs sky; build it with ProjectedCatalog.of or .read")
        sky = torch.as_tensor(self.sky, dtype=torch.float64).detach().clone()
        if sky.shape != (len(self.w), 4):
            raise CatalogError(f"sky must have shape ({len(self.w)}, 4), got {tuple(sky.shape)}")
        object.__setattr__(self, "sky", sky)

    @classmethod
    @takes(x="length", y="length", v="speed", v_error="speed")
    def of(
        cls,
        x: Any,
        y: Any,
        v: Any,
        v_error: Any = 0.0,
        names: tuple[str, ...] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> ProjectedCatalog:
        """Return stars at x, y on the sky in kpc from the centre with line-of-sight velocities v +- v_error (km/s).

        v is relative to the system's, to some standard deviations of `LineOfSight.velocity_sd`.

        Raises
        ------
        CatalogError
            If lengths differ, values are not finite or errors negative, the centre is far from the stars, velocities
            are relative to nothing, or they look like those of all stars of the field.
        """
        columns = [np.atleast_1d(np.asarray(one, dtype=float)) for one in (x, y, v, v_error)]
        n = len(columns[0])
        columns[3] = np.broadcast_to(columns[3], (n,)) if columns[3].size == 1 else columns[3]
        for name, column in zip(("x", "y", "v", "v_error"), columns, strict=True):
            if column.shape != (n,):
                raise CatalogError(f"{name} has shape {column.shape}, x {columns[0].shape}; give one number per star")
            if not np.isfinite(column).all():
                row = int(np.flatnonzero(~np.isfinite(column))[0])
                raise CatalogError(f"{name} of star {row} (counting from 0) is {column[row]}; drop the row")
        if (columns[3] < 0).any():
            row = int(columns[3].argmin())
            raise CatalogError(f"v_error of star {row} (counting from 0) is negative, {columns[3][row]} km/s")
        _check(*columns)
        return cls(
            w=_stand_ins(*columns), names=names, meta=dict(meta or {}), sky=torch.as_tensor(np.stack(columns, 1))
        )

    @classmethod
    @takes(
        distance="length",
        distance_error="length",
        centre="angle",
        systemic_velocity="speed",
        systemic_proper_motion="proper_motion",
    )
    def read(  # type: ignore[override]
        cls,
        path: str | os.PathLike[str],
        distance: Any = None,
        distance_error: Any = 0.0,
        centre: tuple[float, float] | None = None,
        systemic_velocity: Any = None,
        systemic_proper_motion: tuple[float, float] | None = None,
        hdu: int | str | None = None,
    ) -> ProjectedCatalog:
        """Read a table of a system's members, see `of_table`."""
        table, meta = read_table(Path(path), hdu)
        try:
            found = cls.of_table(table, distance, distance_error, centre, systemic_velocity, systemic_proper_motion)
        except CatalogError as error:
            raise CatalogError(f"{path}: {error}") from error
        notes = [*meta.get("notes", []), *found.meta.get("notes", [])]
        return replace(found, meta={**meta, **found.meta, **({"notes": notes} if notes else {})})

    @classmethod
    @takes(
        distance="length",
        distance_error="length",
        centre="angle",
        systemic_velocity="speed",
        systemic_proper_motion="proper_motion",
    )
    def of_table(
        cls,
        table: Table,
        distance: Any = None,
        distance_error: Any = 0.0,
        centre: tuple[float, float] | None = None,
        systemic_velocity: Any = None,
        systemic_proper_motion: tuple[float, float] | None = None,
    ) -> ProjectedCatalog:
        r"""Return the stars of an astropy Table (or QTable).

        Columns: ``ra dec`` (deg) or, from the centre, ``x y`` (kpc without a unit; arcmin and deg are converted);
        ``radial_velocity`` (or ``v_los``, ``vlos``, ``rv``) in km/s with ``radial_velocity_error``; ``name`` or
        ``source_id``. From ra and dec the places are those of the plane tangent at the centre; the share of the
        system's own motion in each velocity, which varies over the sky, is taken off exactly:

        .. math:: v - [v_{sys} \cos\rho + D (\mu_E e_E + \mu_N e_N) \cdot n]

        with n the direction of the star, rho its angle from the centre and :math:`e_E, e_N` east and north there
        (van der Marel et al. 2002, AJ 124, 2639, equation 13, for a system that moves as one).

        Parameters
        ----------
        table
            One row per member.
        distance, distance_error
            Of the system in kpc; needed unless x and y are lengths. The error is kept in ``meta`` for
            `LineOfSight.for_stars`.
        centre
            (ra, dec) in deg; None: the medians of the stars'.
        systemic_velocity
            In km/s; None: the median of the stars'.
        systemic_proper_motion
            (pmra, pmdec) in mas/yr, pmra with cos(dec); None: without, as if it were zero.

        Raises
        ------
        CatalogError
            If columns or the distance are missing, or as in `of`.
        """
        from astropy import units as u

        columns = {name.lower(): name for name in table.colnames}
        notes = []
        v = _column(table, columns, _V, "km/s", "line-of-sight velocity")
        error = _column(table, columns, _V_ERROR, "km/s", "error of the line-of-sight velocity", needed=False)
        if error is None:
            notes.append("no column of errors of the line-of-sight velocity: they count as exact")
            error = np.zeros_like(v)
        if distance is not None and not distance > 0:
            raise CatalogError(f"distance must be positive (kpc), got {distance}")
        if {"ra", "dec"} <= set(columns):
            ra, dec = (_column(table, columns, (name,), "deg", name) for name in ("ra", "dec"))
            if distance is None:
                raise CatalogError("columns ra, dec need the distance of the system: give distance (kpc; --distance)")
            if centre is None:
                centre = (math.degrees(_middle(np.radians(ra))) % 360, float(np.median(dec)))
                notes.append(f"centre at the median of the stars, ra {centre[0]:.5f}, dec {centre[1]:.5f} deg")
            east, north, along = _directions(ra, dec, *centre)
            x, y = distance * east / along, distance * north / along
            cosine = along
        else:
            x, y = (_offset(table, columns, name, distance) for name in ("x", "y"))
            rho = np.hypot(x, y) / (distance or math.inf)
            cosine = 1 / np.sqrt(1 + rho**2)
            east, north = (part / (distance or math.inf) * cosine for part in (x, y))
        v_sys = systemic_velocity
        if v_sys is None:
            v_sys = float(np.median(v))
            notes.append(f"systemic velocity at the median of the stars, {v_sys:.2f} km/s")
        bulk = v_sys * cosine
        if systemic_proper_motion is not None:
            if distance is None:
                raise CatalogError("systemic_proper_motion needs the distance of the system (kpc; --distance)")
            motion = np.asarray(systemic_proper_motion, dtype=float) * u.mas / u.yr
            across = (distance * u.kpc * motion).to_value("km/s", u.dimensionless_angles())
            bulk = bulk + across[0] * east + across[1] * north
        names, more = read_names(table, np.arange(len(table)))
        meta: dict[str, Any] = {"notes": notes + more, "systemic_velocity_kms": float(v_sys)}
        if distance is not None:
            meta |= {"distance_kpc": float(distance), "distance_error_kpc": float(distance_error)}
        return cls.of(x, y, v - bulk, error, names, meta)

    def __getitem__(self, rows: Any) -> ProjectedCatalog:
        index = torch.as_tensor(np.atleast_1d(np.arange(len(self))[_rows(rows)]))
        assert self.sky is not None  # the constructor looked
        names = None if self.names is None else tuple(self.names[int(i)] for i in index)
        return ProjectedCatalog(self.w[index], None, names, self.meta, None, self.sky[index])

    def __repr__(self) -> str:
        return f"ProjectedCatalog({len(self)} stars)"

    @property
    def stars(self) -> Tensor:
        """What the likelihood sees ``(n, 6)``: ``sky`` and two zeros."""
        assert self.sky is not None  # the constructor looked
        return torch.cat([self.sky, self.sky.new_zeros(len(self), 2)], 1)

    def doubts(self) -> list[str]:
        return []

    def check_geometry(self, offset: bool = True) -> None:
        """Do nothing: `of` has looked."""

    @takes(axis="number", rotation="number")
    def rotated(self, axis: Any = None, *, rotation: Any = None) -> Catalog:
        raise CatalogError("stars on the sky have no other axes: a ProjectedCatalog cannot be rotated")

    def without_errors(self) -> ProjectedCatalog:
        assert self.sky is not None  # the constructor looked
        sky = torch.cat([self.sky[:, :3], torch.zeros_like(self.sky[:, 3:])], 1)
        notes = [*self.meta.get("notes", []), "measurement errors left out"]
        return replace(self, sky=sky, meta={**self.meta, "notes": notes})

    def write(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Refuse: the stand-ins are no coordinates."""
        raise CatalogError("a ProjectedCatalog is not written: keep the table that it was read from")


def _check(x: np.ndarray, y: np.ndarray, v: np.ndarray, v_error: np.ndarray) -> None:
    """Raise for a centre far from the stars, and for velocities that are not those of members about the system's."""
    n = len(x)
    R = np.hypot(x, y)
    if n == 0:
        raise CatalogError("no stars")
    if not R.max() > 0:
        raise CatalogError("all stars are at the centre; check which columns were read")
    if n < 10:
        return
    middle = np.hypot(np.median(x), np.median(y))
    if middle > (0.5 + 4 / n**0.5) * np.median(np.hypot(x - np.median(x), y - np.median(y))):
        raise CatalogError(
            f"the median of {n} stars is {middle:.3g} kpc from the centre, their median distance from it "
            f"{np.median(R):.3g} kpc: the centre is wrong, or x and y are not relative to it; give centre "
            "(ra, dec in deg; --centre)"
        )
    centre = np.median(v)
    width = 1.4826 * np.median(np.abs(v - centre))
    if width <= 0:
        raise CatalogError("all line-of-sight velocities are the same; check which column was read")
    if abs(centre) > 3 * width:
        raise CatalogError(
            f"the median line-of-sight velocity is {centre:.1f} km/s, its scatter {width:.1f}: velocities are not "
            "relative to the system's; subtract it (systemic_velocity; --systemic-velocity)"
        )
    far = np.abs(v - centre) > _FAR * width
    if far.mean() > _MANY:
        row = int(np.abs(v - centre).argmax())
        raise CatalogError(
            f"{int(far.sum())} of {n} line-of-sight velocities are more than {_FAR:g} times their scatter ({width:.1f} "
            f"km/s) from the median, star {row} (counting from 0) by {v[row] - centre:.0f} km/s: all stars of the "
            "field instead of members? Keep those with a high probability of membership"
        )


def _stand_ins(x: np.ndarray, y: np.ndarray, v: np.ndarray, v_error: np.ndarray) -> Tensor:
    """Phase-space positions ``(n, 6)`` with depths of a Plummer sphere and isotropic velocities; seeded."""
    rng = np.random.default_rng(0)
    R2 = x**2 + y**2
    a2 = max(float(np.median(R2)), 1e-12)
    # at R the depth of a Plummer sphere goes as (a^2 + R^2 + z^2)^(-5/2): Student's t with four degrees of freedom
    z = np.sqrt((a2 + R2) / 4) * rng.standard_t(4, len(x))
    sd = 1.4826 * float(np.median(np.abs(v - np.median(v))))
    sd = math.sqrt(max(sd**2 - float(np.median(v_error)) ** 2, (0.3 * sd) ** 2, 1e-6))
    across = sd * rng.standard_normal((2, len(x)))
    return torch.as_tensor(np.stack([x, y, z, *across, v], 1))


def _rows(rows: Any) -> Any:
    if isinstance(rows, list | tuple):
        return np.asarray(rows, dtype=None if len(rows) else int)
    return rows.cpu().numpy() if isinstance(rows, Tensor) else rows


def _column(
    table: Table, columns: Mapping[str, str], names: tuple[str, ...], unit: str, what: str, needed: bool = True
) -> Any:
    """Return a column as numbers in ``unit``; the first of the names that is there."""
    from astropy import units as u

    name = next((columns[one] for one in names if one in columns), None)
    if name is None:
        if needed:
            raise CatalogError(f"no column of the {what}: name it {names[0]}; there are {', '.join(table.colnames)}")
        return None
    column = table[name]
    values = np.ma.filled(np.ma.asarray(getattr(column, "value", column)).astype(float), np.nan)
    if (own := column.unit) is not None and str(own):
        try:
            values = (values * u.Unit(own)).to_value(unit)
        except u.UnitConversionError as error:
            raise CatalogError(f"column {name} is in {own}, which is no {unit}") from error
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise CatalogError(f"column {name}: row {row} (counting from 0) has no number; drop it")
    return values


def _offset(table: Table, columns: Mapping[str, str], name: str, distance: float | None) -> Any:
    """Return x or y in kpc."""
    from astropy import units as u

    if name not in columns:
        raise CatalogError(f"no column {name}, nor ra and dec; there are {', '.join(table.colnames)}")
    column = table[columns[name]]
    unit = u.Unit(column.unit) if column.unit is not None else u.kpc
    if unit.physical_type != "angle":
        return _column(table, columns, (name,), "kpc", name)
    if distance is None:
        raise CatalogError(f"column {name} is an angle ({unit}): give the distance of the system (kpc; --distance)")
    return distance * np.tan(_column(table, columns, (name,), "rad", name))


def _directions(
    ra: np.ndarray, dec: np.ndarray, ra_0: float, dec_0: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Components of the stars' directions to the east and north of the centre, and along it."""
    a, d, d_0 = np.radians(ra - ra_0), np.radians(dec), math.radians(dec_0)
    east = np.cos(d) * np.sin(a)
    north = np.sin(d) * math.cos(d_0) - np.cos(d) * math.sin(d_0) * np.cos(a)
    along = np.sin(d) * math.sin(d_0) + np.cos(d) * math.cos(d_0) * np.cos(a)
    if (along <= 0.5).any():
        row = int(along.argmin())
        raise CatalogError(f"star {row} (counting from 0) is over 60 deg from the centre: give the right centre (deg)")
    return east, north, along


def _middle(angle: np.ndarray) -> float:
    """Median of angles near each other, which may lie on both sides of zero."""
    mean = math.atan2(np.sin(angle).mean(), np.cos(angle).mean())
    return mean + float(np.median((angle - mean + np.pi) % (2 * np.pi) - np.pi))


__all__ = ["ProjectedCatalog"]
