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
_MEMBERSHIP = ("membership", "membership_probability", "p_member", "p_mem")
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
    sky : Float[Tensor, "n 6"]
        x and y in kpc at the nominal distance; the line-of-sight velocity relative to the system's and its error in
        km/s (infinite where it was not measured); whether the star's place counts, 1 in a photometric sample and 0
        else; the prior probability that it is a member.

    Examples
    --------
    >>> stars = ProjectedCatalog.of(x=[0.1, -0.2, 0.3], y=[0.0, 0.1, -0.3], v=[5.0, -3.0, 1.0], v_error=2.0)
    >>> stars.sky.shape
    torch.Size([3, 6])
    """

    sky: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sky is None:
            raise CatalogError("a ProjectedCatalog needs sky; build it with ProjectedCatalog.of or .read")
        sky = torch.as_tensor(self.sky, dtype=torch.float64).detach().clone()
        if sky.shape != (len(self.w), 6):
            raise CatalogError(f"sky must have shape ({len(self.w)}, 6), got {tuple(sky.shape)}")
        object.__setattr__(self, "sky", sky)

    @classmethod
    @takes(x="length", y="length", v="speed", v_error="speed", membership="number")
    def of(
        cls,
        x: Any,
        y: Any,
        v: Any,
        v_error: Any = 0.0,
        names: tuple[str, ...] | None = None,
        meta: Mapping[str, Any] | None = None,
        photometric: Any = False,
        membership: Any = 1.0,
    ) -> ProjectedCatalog:
        """Return stars at x, y on the sky in kpc from the centre with line-of-sight velocities v +- v_error (km/s).

        v is relative to the system's, to some standard deviations of `LineOfSight.velocity_sd`. ``photometric`` are the
        stars, all or each, of a sample that is complete out to its outermost star: their places count, and v may be NaN
        for them. ``membership`` is the prior probability that a star is a member.

        Raises
        ------
        CatalogError
            If lengths differ, values are not finite or out of range, the centre is far from the stars, velocities
            are relative to nothing, or they look like those of all stars of the field.
        """
        given = {"x": x, "y": y, "v": v, "v_error": v_error, "photometric": photometric, "membership": membership}
        columns = {name: np.atleast_1d(np.asarray(value, dtype=float)) for name, value in given.items()}
        shape = columns["x"].shape
        for name in ("v_error", "photometric", "membership"):
            columns[name] = np.broadcast_to(columns[name], shape) if columns[name].size == 1 else columns[name]
        measured = ~(np.isnan(columns["v"]) & (columns["photometric"] > 0)) if columns["v"].shape == shape else True
        for name, column in columns.items():
            if column.shape != shape:
                raise CatalogError(f"{name} has shape {column.shape}, x {shape}; give one number per star")
            bad = ~np.isfinite(column) & (measured if name in ("v", "v_error") else True)
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                raise CatalogError(f"{name} of star {row} (counting from 0) is {column[row]}; drop the row")
        if (columns["v_error"] < 0).any():
            row = int(columns["v_error"].argmin())
            raise CatalogError(f"v_error of star {row} (counting from 0) is negative, {columns['v_error'][row]} km/s")
        if ((columns["membership"] <= 0) | (columns["membership"] > 1)).any():
            row = int(np.flatnonzero((columns["membership"] <= 0) | (columns["membership"] > 1))[0])
            raise CatalogError(
                f"membership of star {row} (counting from 0) is {columns['membership'][row]:g}, which is no "
                "probability above 0: drop the row"
            )
        columns["v"] = np.where(measured, columns["v"], 0.0)
        columns["v_error"] = np.where(measured, columns["v_error"], np.inf)
        columns["photometric"] = (columns["photometric"] > 0).astype(float)
        sky = np.stack(list(columns.values()), 1)
        _check(sky)
        return cls(w=_stand_ins(sky), names=names, meta=dict(meta or {}), sky=torch.as_tensor(sky))

    @classmethod
    @takes(distance="length")
    def read(  # type: ignore[override]
        cls,
        path: str | os.PathLike[str],
        distance: Any = None,
        hdu: int | str | None = None,
        photometry: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> ProjectedCatalog:
        """Read a table of a system's members, and one of a photometric sample, with the options of `of_table`."""
        table, meta = read_table(Path(path), hdu)
        places = None if photometry is None else read_table(Path(photometry), None)[0]
        where = f"{path}" if photometry is None else f"{path} or {photometry}"
        try:
            found = cls.of_table(table, distance, photometry=places, **options)
        except CatalogError as error:
            raise CatalogError(f"{where}: {error}") from error
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
        photometry: Table | None = None,
        complete: bool = False,
    ) -> ProjectedCatalog:
        r"""Return the stars of an astropy Table (or QTable).

        Columns: ``ra dec`` (deg) or, from the centre, ``x y`` (kpc without a unit; arcmin and deg are converted);
        ``radial_velocity`` (or ``v_los``, ``vlos``, ``rv``) in km/s with ``radial_velocity_error``; ``membership``, a
        prior probability (1 without); ``name`` or ``source_id``. From ra and dec the places are those of the plane
        tangent at the centre; the share of the
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
        photometry
            Stars of which the places count, with the same columns of places (and ``membership``): a sample that is
            complete within the radius of its outermost star.
        complete
            Whether the places of the stars of ``table`` count, too: that sample is complete like a photometric one.

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
        if centre is None and {"ra", "dec"} <= set(columns):
            # the middle of a complete sample is less biased than that of stars that were chosen
            ra, dec = _ra_dec(table if photometry is None else photometry)
            centre = (math.degrees(_middle(np.radians(ra))) % 360, float(np.median(dec)))
            notes.append(f"centre at the median of the stars, ra {centre[0]:.5f}, dec {centre[1]:.5f} deg")
        x, y, direction = _places(table, distance, centre)
        v_sys = systemic_velocity
        if v_sys is None:
            v_sys = float(np.median(v))
            notes.append(f"systemic velocity at the median of the stars, {v_sys:.2f} km/s")
        bulk = v_sys * direction[2]
        if systemic_proper_motion is not None:
            if distance is None:
                raise CatalogError("systemic_proper_motion needs the distance of the system (kpc; --distance)")
            motion = np.asarray(systemic_proper_motion, dtype=float) * u.mas / u.yr
            across = (distance * u.kpc * motion).to_value("km/s", u.dimensionless_angles())
            bulk = bulk + across[0] * direction[0] + across[1] * direction[1]
        names, more = read_names(table, np.arange(len(table)))
        meta: dict[str, Any] = {"notes": notes + more, "systemic_velocity_kms": float(v_sys), "complete": complete}
        if centre is not None:
            meta["centre_deg"] = [float(part) for part in centre]
        if distance is not None:
            meta |= {"distance_kpc": float(distance), "distance_error_kpc": float(distance_error)}
        sets = [(x, y, v - bulk, error, np.full(len(x), complete), _membership(table))]
        if photometry is not None:
            x, y, _ = _places(photometry, distance, centre)
            none = np.full(len(x), np.nan)
            sets.append((x, y, none, none, np.full(len(x), True), _membership(photometry)))
            others, _ = read_names(photometry, np.arange(len(photometry)))
            names = names + others if names is not None and others is not None else None
        x, y, v, error, placed, membership = (np.concatenate(parts) for parts in zip(*sets, strict=True))
        return cls.of(x, y, v, error, names, meta, placed, membership)

    def __getitem__(self, rows: Any) -> ProjectedCatalog:
        index = torch.as_tensor(np.atleast_1d(np.arange(len(self))[_rows(rows)]))
        assert self.sky is not None  # the constructor looked
        names = None if self.names is None else tuple(self.names[int(i)] for i in index)
        return ProjectedCatalog(self.w[index], None, names, self.meta, None, self.sky[index])

    def __repr__(self) -> str:
        return f"ProjectedCatalog({len(self)} stars)"

    @property
    def stars(self) -> Tensor:
        """What the likelihood sees ``(n, 6)``."""
        assert self.sky is not None  # the constructor looked
        return self.sky

    @property
    def sky_positions(self) -> np.ndarray:
        """x and y ``(n, 2)`` in kpc of the stars that have a velocity."""
        assert self.sky is not None  # the constructor looked
        return self.sky[torch.isfinite(self.sky[:, 3]), :2].numpy()

    def doubts(self) -> list[str]:
        return []

    def check_geometry(self, offset: bool = True) -> None:
        """Do nothing: `of` has looked."""

    @takes(axis="number", rotation="number")
    def rotated(self, axis: Any = None, *, rotation: Any = None) -> Catalog:
        raise CatalogError("stars on the sky have no other axes: a ProjectedCatalog cannot be rotated")

    def without_errors(self) -> ProjectedCatalog:
        assert self.sky is not None  # the constructor looked
        sky = self.sky.clone()
        sky[torch.isfinite(sky[:, 3]), 3] = 0.0
        notes = [*self.meta.get("notes", []), "measurement errors left out"]
        return replace(self, sky=sky, meta={**self.meta, "notes": notes})

    def write(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Refuse: the stand-ins are no coordinates."""
        raise CatalogError("a ProjectedCatalog is not written: keep the table that it was read from")


def _check(sky: np.ndarray) -> None:
    """Raise for a centre far from the stars, and for velocities that are not those of members about the system's."""
    x, y = sky[:, 0], sky[:, 1]
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
    v = sky[np.isfinite(sky[:, 3]), 2]
    if len(v) < 10:
        raise CatalogError(f"{len(v)} of {n} stars have a line-of-sight velocity, of which 10 are needed")
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
            f"{int(far.sum())} of {len(v)} line-of-sight velocities are more than {_FAR:g} times their scatter "
            f"({width:.1f} km/s) from the median, star {row} (counting from 0) by {v[row] - centre:.0f} km/s: all "
            "stars of the field instead of members? Keep those with a high probability of membership"
        )


def _stand_ins(sky: np.ndarray) -> Tensor:
    """Phase-space positions ``(n, 6)`` with depths of a Plummer sphere and isotropic velocities; seeded."""
    rng = np.random.default_rng(0)
    x, y, v, v_error = sky[:, :4].T
    measured = np.isfinite(v_error)
    R2 = x**2 + y**2
    a2 = max(float(np.median(R2)), 1e-12)
    # at R the depth of a Plummer sphere goes as (a^2 + R^2 + z^2)^(-5/2): Student's t with four degrees of freedom
    z = np.sqrt((a2 + R2) / 4) * rng.standard_t(4, len(x))
    sd = 1.4826 * float(np.median(np.abs(v - np.median(v))[measured]))
    sd = math.sqrt(max(sd**2 - float(np.median(v_error[measured])) ** 2, (0.3 * sd) ** 2, 1e-6))
    across, along = sd * rng.standard_normal((2, len(x))), sd * rng.standard_normal(len(x))
    return torch.as_tensor(np.stack([x, y, z, *across, np.where(measured, v, along)], 1))


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


def _membership(table: Table) -> np.ndarray:
    """Prior probabilities that stars are members; 1 without a column of them."""
    columns = {name.lower(): name for name in table.colnames}
    found = _column(table, columns, _MEMBERSHIP, "", "probability of membership", needed=False)
    return np.ones(len(table)) if found is None else found


def _ra_dec(table: Table) -> tuple[np.ndarray, np.ndarray]:
    columns = {name.lower(): name for name in table.colnames}
    ra, dec = (_column(table, columns, (name,), "deg", name) for name in ("ra", "dec"))
    return ra, dec


def _places(
    table: Table, distance: float | None, centre: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y in kpc on the plane tangent at the centre, and the stars' directions ``(3, n)``: east, north, along."""
    columns = {name.lower(): name for name in table.colnames}
    if {"ra", "dec"} <= set(columns):
        if distance is None:
            raise CatalogError("columns ra, dec need the distance of the system: give distance (kpc; --distance)")
        assert centre is not None  # by default at their middle
        east, north, along = _directions(*_ra_dec(table), *centre)
        return distance * east / along, distance * north / along, np.stack([east, north, along])
    x, y = (_offset(table, columns, name, distance) for name in ("x", "y"))
    # without a distance the system is far away
    far = distance or math.inf
    along = 1 / np.sqrt(1 + (x**2 + y**2) / far**2)
    return x, y, np.stack([x / far * along, y / far * along, along])


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
