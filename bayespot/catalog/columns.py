"""Columns: from a table's Galactocentric or heliocentric columns to coordinates with covariances, and back."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bayespot.catalog.frame import Frame, galactocentric, heliocentric
from bayespot.catalog.refusal import CatalogError as CatalogError

if TYPE_CHECKING:
    from astropy.table import Table
    from numpy.typing import NDArray

    Array = NDArray[Any]


#: Galactocentric columns and their default units.
CARTESIAN = {"x": "kpc", "y": "kpc", "z": "kpc", "vx": "km/s", "vy": "km/s", "vz": "km/s"}
#: Heliocentric columns (Gaia's names) and their default units; pmra includes cos(dec).
OBSERVED = {
    "ra": "deg",
    "dec": "deg",
    "distance": "kpc",
    "parallax": "mas",
    "pmra": "mas/yr",
    "pmdec": "mas/yr",
    "radial_velocity": "km/s",
}
#: Upper triangle of the covariance of the Galactocentric columns, and its units.
COVARIANCE = {
    f"cov_{a}_{b}": "kpc2" if b in "xyz" else "km kpc / s" if a in "xyz" else "km2 / s2"
    for i, a in enumerate(CARTESIAN)
    for b in list(CARTESIAN)[i:]
}
#: Columns that may name the stars.
NAME_COLUMNS = ("name", "source_id")
#: Column (CSV) or key (ECSV, Parquet, NPZ) in which bayespot keeps metadata.
META_COLUMN = "bayespot_meta"
#: What archives and spreadsheets write for a missing number, in any case.
MISSING_WORDS = frozenset({"null", "na", "n/a", "<na>", "nan", "none", "--", "---", "-", "masked"})
#: Observables that may be missing, to be marginalised over.
MAY_BE_MISSING = ("distance", "radial_velocity")


class ObservedColumns(NamedTuple):
    """Heliocentric columns: names, values (n, 6) with NaN where missing, and their covariance (n, 6, 6)."""

    names: tuple[str, ...]
    values: Array
    covariance: Array


class PhaseSpace(NamedTuple):
    """What a table says of its stars: w (n, 6), covariance (n, 6, 6) or None, the rows kept, frame and notes.

    ``observed`` are the heliocentric columns that w comes from, if they have errors; ``frame`` is theirs, None for
    Galactocentric columns.
    """

    w: Array
    covariance: Array | None
    rows: Array
    frame: Frame | None
    notes: list[str]
    observed: ObservedColumns | None = None


def phase_space(
    table: Table, drop_invalid: bool, allow_missing: bool = False, frame: Frame | None = None
) -> PhaseSpace:
    """Turn a table's columns, named as in `canonical`, into Galactocentric coordinates, after checking them.

    Galactocentric columns are used as they are, heliocentric ones are turned with the frame (default: astropy's v4.0).
    """
    wanted = _wanted(table.colnames, len(table))
    if "ra" in wanted:
        return _from_heliocentric(table, wanted, drop_invalid, allow_missing, Frame.of(frame))
    stored = COVARIANCE if set(COVARIANCE) <= set(table.colnames) else {}
    values = {name: _column(table, name, unit) for name, unit in (wanted | stored).items()}
    rows, notes = _valid_rows(values, drop_invalid)
    values = {name: value[rows] for name, value in values.items()}
    if stored:
        i, j = np.triu_indices(6)
        symmetric = np.empty((len(rows), 6, 6))
        symmetric[:, i, j] = symmetric[:, j, i] = np.stack([values[name] for name in stored], -1)
        covariance: Array | None = symmetric
    else:
        covariance = _covariance(table, wanted, values, rows, notes)
    w = np.stack([values[name] for name in CARTESIAN], -1)
    return PhaseSpace(w, covariance, rows, None, notes, _also_observed(table, w, rows, Frame.of(frame)))


def canonical(table: Table) -> Table:
    """Return the table with plain columns, and names of columns in lower case where only that completes a set.

    ``X Y Z VX VY VZ`` are read as ``x y z vx vy vz`` if neither set of coordinates is there in lower case; identifiers
    (``SOURCE_ID``) in any case. Of two columns that differ in case alone the lower-case one keeps its name.
    """
    from astropy.table import Table as PlainTable

    table = PlainTable(table, copy=False)  # quantities become columns with units
    complete = any(set(needed) <= set(table.colnames) for needed in _sets(table.colnames))
    for name in list(table.colnames):
        lower = name.lower()
        if name != lower and lower not in table.colnames and (lower in NAME_COLUMNS or not complete):
            table.rename_column(name, lower)
    return table


def has_coordinates(names: Iterable[str]) -> bool:
    """Return whether columns of these names, in any case, place and move a star."""
    lower = [name.lower() for name in names]
    return any(set(needed) <= set(lower) for needed in _sets(lower))


def _from_heliocentric(
    table: Table, wanted: dict[str, str], drop_invalid: bool, allow_missing: bool, frame: Frame
) -> PhaseSpace:
    values = {name: _column(table, name, unit) for name, unit in wanted.items()}
    lost = {name: ~np.isfinite(values[name]) for name in MAY_BE_MISSING if name in values}
    lost = {name: mask for name, mask in lost.items() if allow_missing and mask.any()}
    negative = _negative_parallaxes(table, values) if allow_missing else np.zeros(len(table), dtype=bool)
    values = _filled(values, lost | ({"parallax": negative} if negative.any() else {}), frame)
    rows, notes = _valid_rows(values, drop_invalid)
    values = {name: value[rows] for name, value in values.items()}
    notes += [f"{mask[rows].sum()} of {len(rows)} stars have no {name}" for name, mask in lost.items()]
    covariance = _covariance(table, wanted, values, rows, notes)
    w, jacobian = galactocentric(values, frame)
    if negative[rows].any():
        notes.append(
            f"{negative[rows].sum()} of {len(rows)} stars have no positive parallax, and are kept with its error"
        )
        values["parallax"] = np.where(negative, _column(table, "parallax", "mas"), values["parallax"])[rows]
    observed = None
    if covariance is None and lost:
        covariance = np.zeros((len(rows), 6, 6))
    if covariance is not None:
        seen = np.stack([np.where(lost[n][rows], np.nan, v) if n in lost else v for n, v in values.items()], -1)
        observed = ObservedColumns(tuple(values), seen, covariance)
        covariance = jacobian @ covariance @ jacobian.transpose(0, 2, 1)
        covariance = (covariance + covariance.transpose(0, 2, 1)) / 2  # symmetric to the last bit
    return PhaseSpace(w, covariance, rows, frame, notes, observed)


def _negative_parallaxes(table: Table, values: dict[str, Array]) -> Array:
    """Return which parallaxes are not positive but have an error, so that the true one can be marginalised over."""
    if "parallax" not in values or "parallax_error" not in table.colnames:
        return np.zeros(len(table), dtype=bool)
    error = _column(table, "parallax_error", "mas")
    return (values["parallax"] <= 0) & (values["parallax"] > -np.inf) & (error > 0) & np.isfinite(error)


def _filled(values: dict[str, Array], lost: dict[str, Array], frame: Frame) -> dict[str, Array]:
    """Give missing values a place holder: the median distance; no Galactocentric motion along the line of sight."""
    values = dict(values)
    if "parallax" in lost:
        known = values["parallax"][~lost["parallax"] & (values["parallax"] > 0)]
        if not len(known):
            raise CatalogError("column parallax: none is positive; at least some are needed to place the other stars")
        values["parallax"] = np.where(lost["parallax"], np.median(known), values["parallax"])
    if "distance" in lost:
        known = values["distance"][~lost["distance"]]
        if not len(known):
            raise CatalogError("column distance: no star has one; at least some are needed to place the others")
        values["distance"] = np.where(lost["distance"], np.median(known), values["distance"])
    if "radial_velocity" in lost:
        at_rest, _ = galactocentric(values | {"radial_velocity": 0 * values["ra"]}, frame)
        at_rest[..., 3:] = 0.0
        reflex = heliocentric(at_rest, frame)["radial_velocity"]
        values["radial_velocity"] = np.where(lost["radial_velocity"], reflex, values["radial_velocity"])
    return values


def _also_observed(table: Table, w: Array, rows: Array, frame: Frame) -> ObservedColumns | None:
    """Heliocentric columns with errors beside Galactocentric ones (as `Catalog.write` puts them), if they agree."""
    names = [n for n in OBSERVED if n in table.colnames and not (n == "parallax" and "distance" in table.colnames)]
    if len(names) < 6 or not any(f"{n}_error" in table.colnames for n in names):
        return None
    values = {n: _column(table, n, OBSERVED[n])[rows] for n in names}
    covariance = _covariance(table, {n: OBSERVED[n] for n in names}, values, rows, [])
    # a parallax that is not positive places no star: w has a place holder
    placed = values.get("parallax", np.ones(len(w))) > 0
    safe = values if placed.all() else values | {"parallax": np.where(placed, values["parallax"], 1.0)}
    found, _ = galactocentric(safe, frame)
    known = np.isfinite(found).all(-1) & placed
    off = np.abs(found - w).max(-1) > 1e-5 * np.abs(w).max(-1)
    if (off & known).any():
        row = int(rows[int(np.argmax(off & known))])
        raise CatalogError(
            f"columns {', '.join(CARTESIAN)} and {', '.join(names)} disagree, first in row {row} (counting from 0): "
            "they are of different frames; remove one of the two sets, or give the frame that turned one into the other"
        )
    assert covariance is not None  # an error column was found above
    return ObservedColumns(tuple(names), np.stack([values[n] for n in names], -1), covariance)


def observed_columns(observed: ObservedColumns) -> dict[str, tuple[Array, str]]:
    """Return the columns, with units, that `phase_space` reads back into the same observables."""
    columns = {n: (observed.values[:, i], OBSERVED[n]) for i, n in enumerate(observed.names)}
    sd = np.sqrt(np.diagonal(observed.covariance, axis1=1, axis2=2))
    for i, a in enumerate(observed.names):
        angle = a in ("ra", "dec")
        columns[f"{a}_error"] = (sd[:, i] * (3.6e6 if angle else 1.0), "mas" if angle else OBSERVED[a])
        for j in range(i + 1, 6):
            product = sd[:, i] * sd[:, j]
            c = np.divide(observed.covariance[:, i, j], product, out=np.zeros(len(sd)), where=product > 0)
            if (c != 0).any():
                columns[f"{a}_{observed.names[j]}_corr"] = (np.clip(c, -1, 1), "")
    return columns


def covariance_columns(covariance: Array) -> dict[str, Array]:
    """Return the upper triangle as columns ``cov_x_x``, ``cov_x_y``, ..."""
    i, j = np.triu_indices(6)
    return dict(zip(COVARIANCE, covariance[:, i, j].T, strict=True))


def _sets(found: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the two sets of columns, one of which is needed; the distance may be a parallax."""
    far = "parallax" if "parallax" in found and "distance" not in found else "distance"
    return CARTESIAN, {k: v for k, v in OBSERVED.items() if k not in ("distance", "parallax") or k == far}


def _wanted(found: list[str], n: int) -> dict[str, str]:
    """Return the set of columns to use and their units, or raise with what the closest set lacks."""
    missing, wanted = min((([c for c in s if c not in found], s) for s in _sets(found)), key=lambda p: len(p[0]))
    if not missing:
        return dict(wanted)
    label = {"distance": "distance (or parallax)"}
    kind = "Galactocentric" if wanted is CARTESIAN else "heliocentric"
    raise CatalogError(
        f"missing column{'s' * (len(missing) > 1)} {', '.join(label.get(c, c) for c in missing)} of the {kind} set "
        f"({', '.join(label.get(c, c) for c in wanted)}), the closest to this table of {n} rows with columns "
        f"{', '.join(found)}; rename or add what is missing. Either {', '.join(CARTESIAN)} or ra, dec, distance (or "
        "parallax), pmra, pmdec, radial_velocity are needed, in small letters or capitals"
    )


def _column(table: Table, name: str, unit: str) -> Array:
    """Return a column as floats in ``unit``, masked values as NaN."""
    from astropy import units as u

    column = table[name]
    raw = np.ma.asarray(column)
    if raw.ndim != 1:
        raise CatalogError(f"column {name} holds arrays of shape {raw.shape[1:]}; give one number per star")
    mask = np.ma.getmaskarray(raw)
    data = raw.data
    if raw.dtype.kind not in "fiu":
        data = np.array(["nan" if m or _is_missing(d) else d for d, m in zip(data, mask, strict=True)], dtype=object)
    try:
        value = np.where(mask, np.nan, data.astype(float))
    except (TypeError, ValueError):
        row = next(i for i, item in enumerate(data) if not _is_number(item))
        wrong = data[row].decode() if isinstance(data[row], bytes) else data[row]
        comma = isinstance(wrong, str) and re.fullmatch(r"\s*[+-]?\d*,\d+\s*", wrong)
        remedy = "its decimal comma must be a point" if comma else "correct it or drop the row"
        raise CatalogError(f"column {name}: row {row} (counting from 0) is {wrong!r}, not a number; {remedy}") from None
    if column.unit is None or str(column.unit) == "":
        return value
    try:
        return np.asarray((value * u.Unit(column.unit)).to_value(u.Unit(unit)))
    except (u.UnitConversionError, ValueError, TypeError) as error:
        raise CatalogError(
            f"column {name} has unit {column.unit}, which cannot be turned into {unit}; convert or correct it"
        ) from error


def _is_missing(item: Any) -> bool:
    """Return whether a cell holds nothing, or a word for it."""
    if isinstance(item, bytes):
        item = item.decode("utf-8", "replace")
    return item is None or (isinstance(item, str) and item.strip().lower() in MISSING_WORDS | {""})


def _is_number(item: Any) -> bool:
    try:
        float(item)
    except (TypeError, ValueError):
        return False
    return True


def _valid_rows(values: dict[str, Array], drop_invalid: bool) -> tuple[Array, list[str]]:
    """Return the usable rows and a note on those dropped; raise on the first bad column unless dropping."""
    n = len(next(iter(values.values())))
    good = np.ones(n, dtype=bool)
    for name, value in values.items():
        drop = "drop those rows (drop_invalid=True)"
        # `bayespot fit` has --drop-invalid and --allow-missing
        keep = ", fill them, or keep them for a model with errors (allow_missing=True)"
        remedy = drop + (keep if name in MAY_BE_MISSING else " or fill them")
        checks = [(~np.isfinite(value), "NaN, infinite or masked", remedy)]
        if name == "parallax":
            remedy = (
                "they give no distance: add a distance column, drop those rows (drop_invalid=True), or keep those with "
                "errors for a model with errors (allow_missing=True), since cutting them biases"
            )
            checks.append((value <= 0, "not positive", remedy))
        elif name == "distance" or (name.startswith("cov_") and name[4:] in {f"{a}_{a}" for a in CARTESIAN}):
            wrong = value <= 0 if name == "distance" else value < 0
            checks.append((wrong, "not positive", "correct them or drop those rows (drop_invalid=True)"))
        elif name == "dec":
            checks.append((np.abs(value) > 90, "outside -90 to 90 deg", "correct the values or the column's unit"))
        for bad, what, remedy in checks:
            if bad.any() and not drop_invalid:
                row = int(np.argmax(bad))
                raise CatalogError(
                    f"column {name}: {bad.sum()} of {n} values are {what}, the first in row {row} (counting from 0) "
                    f"with {value[row]:.4g}; {remedy}"
                )
            good &= ~bad
    rows = np.flatnonzero(good)
    if len(rows) == 0:
        raise CatalogError(f"none of the {n} rows is usable; check the columns {', '.join(values)}")
    return rows, [f"{n - len(rows)} of {n} rows dropped as invalid"] if len(rows) < n else []


# --- measurement errors


def _covariance(
    table: Table, wanted: dict[str, str], values: dict[str, Array], rows: Array, notes: list[str]
) -> Array | None:
    """Covariance of the input columns (n, 6, 6) from *_error and *_corr columns; None without errors.

    The row and column of ra are those of ra cos(dec), as in Gaia's ra_error and ra_*_corr; both angles in deg.
    """
    names = list(wanted)
    if not any(f"{name}_error" in table.colnames for name in names):
        return None
    sd = np.zeros((len(rows), 6))
    for i, name in enumerate(names):
        if f"{name}_error" in table.colnames:
            sd[:, i] = _errors(table, name, wanted[name], values[name], rows, notes)
    correlation = np.broadcast_to(np.eye(6), (len(rows), 6, 6)).copy()
    correlated = False
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if i != j and (column := f"{a}_{b}_corr") in table.colnames:
                c = np.nan_to_num(_column(table, column, "")[rows])
                if (np.abs(c) > 1).any():
                    k = int(np.argmax(np.abs(c) > 1))
                    raise CatalogError(f"column {column}: row {rows[k]} (counting from 0) is {c[k]:.4g}; correct it")
                correlation[:, i, j] = correlation[:, j, i] = c
                correlated = True
    if correlated:
        lowest = np.linalg.eigvalsh(correlation)[:, 0]
        if (lowest < -1e-6).any():  # not rounding: these numbers are the correlations of nothing
            raise CatalogError(
                f"columns *_corr: row {rows[int(np.argmax(lowest < -1e-6))]} (counting from 0) is no correlation "
                f"matrix (lowest eigenvalue {lowest.min():.3g}); correct the *_corr columns or remove them"
            )
    return correlation * sd[:, :, None] * sd[:, None, :]


def _errors(table: Table, name: str, unit: str, value: Array, rows: Array, notes: list[str]) -> Array:
    """Standard errors of one column in its unit, with missing ones filled by the median relative error."""
    column = f"{name}_error"
    angle = name in ("ra", "dec")  # their errors are in mas in Gaia's tables
    error = _column(table, column, "mas" if angle else unit)[rows] / (3.6e6 if angle else 1.0)
    if (error < 0).any():
        k = int(np.argmax(error < 0))
        raise CatalogError(f"column {column}: row {rows[k]} (counting from 0) is negative; correct it")
    lost = ~np.isfinite(error)
    if not lost.any():
        return error
    known = ~lost & (value != 0)
    if not known.any():
        raise CatalogError(f"column {column} has no finite value in {len(rows)} rows; remove the column or fill it")
    relative = np.median(error[known] / np.abs(value[known]))
    notes.append(f"{lost.sum()} of {len(rows)} missing {column} replaced by the median relative error, {relative:.3g}")
    # never below the smallest error given, or a proper motion near zero would pass for exact
    return np.where(lost, np.maximum(relative * np.abs(value), error[~lost].min()), error)
