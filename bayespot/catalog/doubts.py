"""What makes one doubt stars that can be read: units, a moving or shifted system, copies, stars too fast to belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

#: Median radii in kpc and median speeds in km/s of stellar systems, from star clusters to clusters of galaxies.
RADII, SPEEDS = (1e-4, 3000.0), (0.05, 3000.0)
#: One kpc/(km/s) in Gyr.
_GYR = 0.977792
#: Units that columns without units are often in: factors to kpc and km/s.
_OTHER_UNITS = {
    "galpy's internal units (multiply by ro = 8 kpc and vo = 220 km/s)": (8.0, 220.0),
    "kpc and kpc/Myr": (1.0, 977.792),
    "pc (with km/s or pc/Myr)": (1e-3, 1.0),
    "pc and kpc/Myr": (1e-3, 977.792),
}
#: Speed (km/s) and orbital time (Gyr) of a galaxy's stars, and their spread in ln, for the choice among these.
_TYPICAL, _SPREAD = (150.0, 0.3), (1.0, 1.5)
#: What stands for "missing" in many a file, up to the sign: nines, and the least integers of 16 and 32 bits.
_MARKS = [99, 999, 9999, 99999, 999999, 99.9, 99.99, 99.999, 999.9, 999.99, 9999.9, 9999.99, 32768, 2147483648]
#: Copies agree to this fraction of the median radius and speed.
_ROUNDING = 1e-4


class Moments(NamedTuple):
    """How far the median of a vector is from zero: its size, that of the spread, and by how many standard errors."""

    offset: Array
    spread: float
    sigma: float


def unit_doubts(x: Array, v: Array) -> list[str]:
    """Return why positions (kpc) and velocities (km/s), each ``(n, 3)``, may be in other units; mostly nothing."""
    if not len(x):
        return []
    r, speed = (float(np.median(np.linalg.norm(a, axis=-1))) for a in (x, v))
    remedy = " Give the units in the file (ECSV, FITS) or convert the columns to kpc and km/s"
    found = []
    if not RADII[0] <= r <= RADII[1]:
        found.append(f"the median radius is {r:.3g} kpc, no stellar system's: are the positions in pc?")
    if not SPEEDS[0] <= speed <= SPEEDS[1]:
        found.append(f"the median speed is {speed:.3g} km/s, no stellar system's: are the velocities in m/s?")
    if not found and speed > 0:
        time = 2 * np.pi * r / speed * _GYR
        # slow stars on wide orbits: even the largest dwarf galaxies turn faster
        if time > 20 or (speed < 5 and time > 3):
            found.append(
                f"read as kpc and km/s, the median star (r = {r:.3g}, v = {speed:.3g}) needs {time:.3g} Gyr for an "
                f"orbit, too long to be phase-mixed: are the columns in {_likely_unit(r, speed)}?"
            )
    return [text + remedy for text in found]


def _likely_unit(r: float, speed: float) -> str:
    def distance(unit: str) -> float:
        length, velocity = _OTHER_UNITS[unit]
        numbers = velocity * speed, 2 * np.pi * length * r / (velocity * speed) * _GYR
        return sum((np.log(a / b) / s) ** 2 for a, b, s in zip(numbers, _TYPICAL, _SPREAD, strict=True))

    return min(_OTHER_UNITS, key=distance)


def moments(a: Array) -> Moments:
    """Return the median of vectors ``(n, 3)``, their spread, and the median's distance from zero in standard errors.

    By the sign test: of n stars of a system centred on zero as many are on either side, whatever their distribution,
    and the difference of the two counts has the variance n.
    """
    centre = np.median(a, axis=0)
    sides = (a > 0).sum(0) - (a < 0).sum(0)
    return Moments(
        centre, float(np.median(np.linalg.norm(a - centre, axis=-1))), float(np.linalg.norm(sides) / len(a) ** 0.5)
    )


def centre_doubts(x: Array, v: Array) -> list[str]:
    """Return whether the system as a whole is off the origin or moves, by 6 standard errors and 3 % of its spread.

    Less than that changes the mean square by 0.1 %. Stars on one side of a system are no sample of its motion: nothing
    is said of the velocities of stars whose positions are far off.
    """
    if len(x) < 10:
        return []
    place, motion = moments(x), moments(v)
    if np.linalg.norm(place.offset) > (0.5 + 4 / len(x) ** 0.5) * place.spread:
        return []
    found = []
    for what, columns, unit, m in (
        ("is at", "x, y, z", "kpc", place),
        ("moves with", "vx, vy, vz", "km/s", motion),
    ):
        if m.sigma > 6 and np.linalg.norm(m.offset) > 0.03 * m.spread:
            where = ", ".join(f"{c:.3g}" for c in m.offset)
            found.append(
                f"columns {columns}: the median star {what} ({where}) {unit}, {m.sigma:.2g} standard errors from zero: "
                f"subtract the system's {'centre' if unit == 'kpc' else 'bulk velocity'}, or if the columns come from "
                "ra, dec ... state the frame (R0, z_sun, v_sun) they were made with"
            )
    return found


def copies(w: Array, names: Sequence[str] | None) -> Array:
    """Return, for each star, the row of the first star that it repeats, or its own; w ``(n, 6)``.

    Two rows are one star if their identifiers are the same number, or if all six coordinates agree to rounding.
    """
    from scipy.spatial import cKDTree

    first = np.arange(len(w))
    if len(w) < 2:
        return first
    scale = np.repeat([max(float(np.median(np.linalg.norm(a, axis=-1))), 1e-300) for a in (w[:, :3], w[:, 3:])], 3)
    tree = cKDTree(w / scale)
    # nearest neighbour but oneself; few have one so near
    near = np.asarray(tree.query(w / scale, k=2, distance_upper_bound=_ROUNDING, p=np.inf)[0])
    for i in np.flatnonzero(np.isfinite(near[:, 1])).tolist():
        first[i] = min(tree.query_ball_point(w[i] / scale, _ROUNDING, p=np.inf))
    if names is not None:
        seen: dict[str, int] = {}
        for i, name in enumerate(names):
            if name.isdigit() and len(name) > 5:  # source_id; other names may be those of a group
                first[i] = min(int(first[i]), seen.setdefault(name, i))
    while not np.array_equal(first[first], first):
        first = first[first]
    return first


def copy_doubts(w: Array, names: Sequence[str] | None) -> list[str]:
    """Return whether stars are listed twice, and which."""
    first = copies(w, names)
    again = np.flatnonzero(first != np.arange(len(w)))
    if not len(again):
        return []
    shown = ", ".join(f"row {i} that of row {first[i]}{_called(names, i)}" for i in again[:3])
    return [
        f"{len(again)} of {len(w)} rows repeat a star (counting from 0: {shown}{', ...' if len(again) > 3 else ''}), "
        "and copies make error bars too narrow: keep one of each with drop_duplicates=True"
    ]


def fast_doubts(w: Array, covariance: Array | None, names: Sequence[str] | None) -> list[str]:
    r"""Return which stars the mass that the others show cannot bind.

    Where the dispersion of the others is s(r) (of the local median speed, which outliers hardly move), they move in a
    potential with about :math:`v_{esc}^2(r) = 2\int_r s^2\, d\ln r + 2 s^2(r_{max})`. Stars of eleven mock
    systems of 100 to 20 000 stars reach at most 1.6 times that, radially anisotropic ones 1.9 times what a tenth of
    them exceeds.
    """
    n = len(w)
    if n < 50:
        return []
    r, speed = np.linalg.norm(w[:, :3], axis=-1), np.linalg.norm(w[:, 3:], axis=-1)
    if not (r > 0).all() or not (speed > 0).any():
        return []
    escape = _escape_speed(r, speed)
    slow = speed - 3 * _speed_error(w, covariance)
    limit = np.full(n, max(1.7 * (1 + 20 / n), 2.1 * float(np.quantile(speed / escape, 0.9))))
    # the last stars are beyond what the others tell
    limit[r > np.quantile(r, 0.975)] *= 1.3
    fast = np.flatnonzero(slow > limit * escape)
    if not len(fast):
        return []
    fast = fast[np.argsort(-(slow / escape)[fast])]
    shown = ", ".join(
        f"row {i}{_called(names, i)} with {speed[i]:.4g} km/s at {r[i]:.3g} kpc, where about {escape[i]:.3g} escape"
        for i in fast[:3]
    )
    mass = float((speed / escape)[fast[0]] ** 2)
    return [
        f"{len(fast)} of {n} stars are too fast for the mass that binds the others (counting from 0: {shown}"
        f"{', ...' if len(fast) > 3 else ''}); one such star raises the mass, here up to {mass:.2g} times: correct "
        "these rows or leave them out, unless their errors say so"
    ]


def _escape_speed(r: Array, speed: Array) -> Array:
    n = len(r)
    order = np.argsort(r)
    parts = np.array_split(order, max(n // max(10, min(n // 20, 2000)), 1))
    ln_r = np.array([np.median(np.log(r[p])) for p in parts])
    # the median of chi-square with three degrees of freedom is 2.366
    s2 = np.array([np.median(speed[p] ** 2) for p in parts]) * 3 / 2.366
    steps = np.diff(ln_r) * (s2[1:] + s2[:-1]) / 2
    outward = np.concatenate([np.cumsum(steps[::-1])[::-1], [0.0]])
    return np.sqrt(np.interp(np.log(r), ln_r, 2 * outward + 2 * s2[-1]))


def _speed_error(w: Array, covariance: Array | None) -> Array:
    """Return the standard error of each star's speed."""
    if covariance is None:
        return np.zeros(len(w))
    v = w[:, 3:]
    along = np.einsum("ni,nij,nj->n", v, covariance[:, 3:, 3:], v) / np.maximum((v**2).sum(-1), 1e-300)
    return np.sqrt(np.maximum(along, 0))


def _called(names: Sequence[str] | None, row: int) -> str:
    return f" ({names[row]})" if names is not None and names[row] else ""


# --- columns as they were read


def value_doubts(column: str, values: Array, rows: Array | None = None) -> list[str]:
    """Return which values of a column look like marks for "missing": nines far from the rest, or one value repeated.

    Parameters
    ----------
    column
        Its name; an error column (``*_error``) may hold one value for all, but zeros are named.
    values
        ``(n,)``.
    rows
        Their rows in the file; default 0 to n - 1.
    """
    rows = np.arange(len(values)) if rows is None else rows
    found = []

    def say(bad: Array, what: str, remedy: str) -> None:
        found.append(
            f"column {column}: {bad.sum()} of {len(values)} values are {what}, the first in row "
            f"{rows[int(np.argmax(bad))]} (counting from 0); {remedy}"
        )

    error = column.endswith("_error")
    if error and (bad := values == 0).any() and not bad.all():
        say(bad, "0", "such a star counts as exact: leave the error empty if it is not known")
    marks = _marks(values)
    for mark in np.unique(values[marks])[:3]:
        say(values == mark, f"{mark:g}", "if that stands for missing, leave the cells empty or drop the rows")
    if not error and len(values) >= 20 and column not in ("ra", "dec"):
        unique, counts = np.unique(values, return_counts=True)
        top, second = [*np.sort(counts)[::-1].tolist()[:2], 0][:2]
        common = unique[int(np.argmax(counts))]
        if 5 <= top < len(values) and top >= 5 * second and not marks[values == common].any():
            say(values == common, f"{common:g}", "one value so often is no measurement: leave the cells empty")
    return found


def _marks(values: Array) -> Array:
    """Return which values are `_MARKS` or 1e10 and beyond, and far from the other values or there several times."""
    special = np.isin(np.abs(values), _MARKS) | (np.abs(values) >= 1e10)
    rest = values[~special]
    if not special.any() or len(rest) < 3:
        return np.zeros(len(values), dtype=bool)
    low, middle, high = np.quantile(rest, [0.1, 0.5, 0.9])
    often = np.array([mark for mark in np.unique(values[special]) if (values == mark).sum() >= 5])
    return special & ((np.abs(values - middle) > 2 * max(high - low, 1e-300)) | np.isin(values, often))
