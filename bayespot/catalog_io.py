"""Files and columns: from a table on disk to Galactocentric coordinates with covariances, and back."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from astropy.table import Table
    from numpy.typing import NDArray

    Array = NDArray[Any]


class CatalogError(ValueError):
    """A catalogue that cannot be used; the message names the column, row or file and the remedy."""


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
_SUFFIXES = {
    ".fits": "fits",
    ".fit": "fits",
    ".ecsv": "ascii.ecsv",
    ".csv": "csv",
    ".parquet": "parquet",
    ".npz": "npz",
}
_META_KEY = "bayespot_meta"
_FITS_KEY = "BSMETA"
_NAME_COLUMNS = ("name", "source_id")


class PhaseSpace(NamedTuple):
    """What a table says of its stars: w (n, 6), covariance (n, 6, 6) or None, the rows kept, frame and notes."""

    w: Array
    covariance: Array | None
    rows: Array
    frame: dict[str, Any] | None
    notes: list[str]


# --- files


def read_table(path: Path) -> tuple[Table, dict[str, Any]]:
    """Read a file into an astropy Table and its metadata; raise CatalogError if it cannot be read."""
    if path.is_dir():
        raise CatalogError(f"{path} is a folder; give a file ({', '.join(_SUFFIXES)})")
    if not path.exists():
        raise CatalogError(f"{path}: no such file; check the path")
    kind = _file_format(path)
    try:
        table = _READERS[kind](path)
        stored = table.meta.pop(_META_KEY, None)
        n_written, meta = len(table), {k: v for k, v in table.meta.items() if _is_json(v)}
        if stored:
            content = json.loads(stored)
            n_written, meta = content["n_stars"], content["meta"]
            if kind in ("csv", "ascii.ecsv") and path.read_bytes()[-1:] != b"\n":
                raise CatalogError(f"{path}: the last line is truncated: copy the file again")
    except CatalogError:
        raise
    except Exception as error:  # the readers raise whatever their libraries raise on a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CatalogError(
            f"{path}: not a readable {kind} file ({reason}); it may be truncated or have the wrong suffix: "
            "copy it again or convert it"
        ) from error
    if len(table) == 0:
        raise CatalogError(f"{path}: the table has no rows; it may be truncated: copy it again")
    if len(table) != n_written:
        raise CatalogError(f"{path}: {len(table)} rows of {n_written} written; it is truncated: copy it again")
    return table, meta


def write_table(table: Table, meta: dict[str, Any], path: Path, overwrite: bool) -> None:
    """Write a table with its metadata, atomically: into a temporary folder beside the file, then a rename."""
    kind = _file_format(path)
    if path.is_dir():
        raise CatalogError(f"{path} is a folder; give a file name")
    if path.exists() and not overwrite:
        raise CatalogError(f"{path} exists; choose another name or pass overwrite=True")
    if not path.parent.is_dir():
        raise CatalogError(f"{path}: the folder {path.parent} does not exist; create it first")
    for key, value in meta.items():
        if not _is_json(value):
            raise CatalogError(
                f"meta[{key!r}] = {value!r} cannot be stored; keep numbers, strings, lists and dictionaries in meta"
            )
    text = json.dumps({"n_stars": len(table), "meta": meta}, default=_plain)
    with tempfile.TemporaryDirectory(prefix=".bayespot-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        _write(table, text, temporary, kind)
        os.replace(temporary, path)


def _file_format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise CatalogError(f"{path}: unknown suffix {suffix!r}; use one of {', '.join(_SUFFIXES)}")
    return _SUFFIXES[suffix]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, default=_plain)
    except (TypeError, ValueError):
        return False
    return True


def _read_npz(path: Path) -> Table:
    from astropy.table import Table

    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
        columns = {name: archive[name] for name in archive.files}
    meta = columns.pop(_META_KEY, None)
    return Table(columns, meta={} if meta is None else {_META_KEY: str(meta)})


def _read_csv(path: Path) -> Table:
    from astropy.io import ascii

    lines = path.read_text(encoding="utf-8").splitlines()
    head = 0
    while head < len(lines) and (not lines[head].strip() or lines[head].startswith("#")):
        head += 1
    # identifiers stay text, or "007" would come back as 7
    converters = {name: [ascii.convert_numpy(str)] for name in _NAME_COLUMNS}
    table = ascii.read(lines[head:], format="csv", guess=False, converters=converters)
    for line in lines[:head]:
        if line.startswith(f"# {_META_KEY}: "):
            table.meta[_META_KEY] = line.split(": ", 1)[1]
    return table


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet
    from astropy.table import Table

    arrow = pyarrow.parquet.read_table(path)
    if b"table_meta_yaml" in (arrow.schema.metadata or {}):
        return Table.read(path, format="parquet")
    # written by another program, without units; astropy's own reader fails on missing strings
    return Table({name: arrow[name].to_numpy() for name in arrow.column_names})


def _read_fits(path: Path) -> Table:
    import warnings

    from astropy.io import fits
    from astropy.table import Table

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd units and keywords: columns are checked by `phase_space`
        # astropy only warns of a truncated file and then returns garbage or nothing
        warnings.filterwarnings("error", message="(?s).*(truncated|corrupt)")
        with path.open("rb") as handle, fits.open(handle, memmap=False) as hdus:
            hdu = next((h for h in hdus if isinstance(h, fits.BinTableHDU | fits.TableHDU)), None)
            if hdu is None:
                raise CatalogError(f"{path}: no table in this FITS file (or truncated); write a binary table")
            table = Table.read(hdu)
            stored = hdu.header.get(_FITS_KEY)
    table.meta = {_META_KEY: stored} if stored else {}
    return table


def _read_ecsv(path: Path) -> Table:
    from astropy.table import Table

    return Table.read(path, format="ascii.ecsv")


_READERS = {
    "npz": _read_npz,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "fits": _read_fits,
    "ascii.ecsv": _read_ecsv,
}


def _write(source: Table, text: str, path: Path, kind: str) -> None:
    from astropy.table import Table

    table = Table(source, copy=False)
    table.meta = {_META_KEY: text}
    if kind == "npz":
        arrays: dict[str, Any] = {name: np.asarray(table[name]) for name in table.colnames}
        np.savez(path, **(arrays | {_META_KEY: np.array(text)}))
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="\n") as handle:
            handle.write(f"# {_META_KEY}: {text}\n")
            table.write(handle, format="ascii.csv")
    elif kind == "fits":
        from astropy.io import fits

        table.meta = {}
        for name in table.colnames:
            if table[name].dtype.kind == "U":  # FITS strings are bytes
                table[name] = np.char.encode(np.asarray(table[name]), "utf-8")
        hdu = fits.table_to_hdu(table)
        # astropy misreads a quote before a slash in long strings; escaped, JSON needs no quote
        hdu.header[_FITS_KEY] = text.replace("'", "\\u0027")
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path)
    else:
        table.write(path, format=kind)


# --- columns


def phase_space(table: Table, drop_invalid: bool) -> PhaseSpace:
    """Turn a table's columns into Galactocentric coordinates, after checking them.

    Galactocentric columns are used as they are, heliocentric ones are turned with astropy's v4.0 frame.
    """
    from astropy.table import Table as PlainTable

    table = PlainTable(table, copy=False)  # quantities become columns with units
    wanted = _wanted(table.colnames, len(table))
    heliocentric = "ra" in wanted
    stored = COVARIANCE if not heliocentric and set(COVARIANCE) <= set(table.colnames) else {}
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
    if not heliocentric:
        return PhaseSpace(np.stack([values[name] for name in CARTESIAN], -1), covariance, rows, None, notes)
    w, jacobian = galactocentric(values)
    if covariance is not None:
        covariance = jacobian @ covariance @ jacobian.transpose(0, 2, 1)
        covariance = (covariance + covariance.transpose(0, 2, 1)) / 2  # symmetric to the last bit
    return PhaseSpace(w, covariance, rows, frame_parameters(), notes)


def read_names(table: Table, rows: Array) -> tuple[str, ...] | None:
    """Return the identifiers of the chosen rows from ``name`` or ``source_id``; None without either."""
    for column in _NAME_COLUMNS:
        if column in table.colnames:
            values = np.ma.filled(np.ma.asarray(table[column]).astype(object), "")[rows].tolist()
            return tuple(v.decode() if isinstance(v, bytes) else "" if v is None else str(v) for v in values)
    return None


def covariance_columns(covariance: Array) -> dict[str, Array]:
    """Return the upper triangle as columns ``cov_x_x``, ``cov_x_y``, ..."""
    i, j = np.triu_indices(6)
    return dict(zip(COVARIANCE, covariance[:, i, j].T, strict=True))


def _wanted(found: list[str], n: int) -> dict[str, str]:
    """Return the set of columns to use and their units, or raise with what the closest set lacks."""
    far = "parallax" if "parallax" in found and "distance" not in found else "distance"
    observed = {k: v for k, v in OBSERVED.items() if k not in ("distance", "parallax") or k == far}
    missing, wanted = min(
        (([c for c in s if c not in found], s) for s in (CARTESIAN, observed)), key=lambda p: len(p[0])
    )
    if not missing:
        return dict(wanted)
    label = {"distance": "distance (or parallax)"}
    kind = "Galactocentric" if wanted is CARTESIAN else "heliocentric"
    raise CatalogError(
        f"missing column{'s' * (len(missing) > 1)} {', '.join(label.get(c, c) for c in missing)} of the {kind} set "
        f"({', '.join(label.get(c, c) for c in wanted)}), the closest to this table of {n} rows with columns "
        f"{', '.join(found)}; rename or add what is missing. Either {', '.join(CARTESIAN)} or ra, dec, distance (or "
        "parallax), pmra, pmdec, radial_velocity are needed; names are case-sensitive"
    )


def _column(table: Table, name: str, unit: str) -> Array:
    """Return a column as floats in ``unit``, masked values as NaN."""
    from astropy import units as u

    column = table[name]
    raw = np.ma.asarray(column)
    if raw.ndim != 1:
        raise CatalogError(f"column {name} holds arrays of shape {raw.shape[1:]}; give one number per star")
    mask = np.ma.getmaskarray(raw)
    data = np.where(mask, "nan", raw.data.astype(object)) if raw.dtype.kind not in "fiu" else raw.data
    try:
        value = np.where(mask, np.nan, data.astype(float))
    except (TypeError, ValueError):
        row = next(i for i, item in enumerate(data) if not _is_number(item))
        raise CatalogError(
            f"column {name}: row {row} (counting from 0) is {data[row]!r}, not a number; correct it or drop the row"
        ) from None
    if column.unit is None or str(column.unit) == "":
        return value
    try:
        return np.asarray((value * u.Unit(column.unit)).to_value(u.Unit(unit)))
    except (u.UnitConversionError, ValueError, TypeError) as error:
        raise CatalogError(
            f"column {name} has unit {column.unit}, which cannot be turned into {unit}; convert or correct it"
        ) from error


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
        checks = [(~np.isfinite(value), "NaN, infinite or masked", "drop those rows (drop_invalid=True) or fill them")]
        if name == "parallax":
            remedy = "they give no distance: add a distance column or drop those rows (drop_invalid=True)"
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


# --- frame


def frame_parameters() -> dict[str, Any]:
    """Return astropy's v4.0 parameters of the Galactocentric frame as plain numbers, for the metadata."""
    frame = _frame()
    _, sun = _rotation()
    return {
        "name": "astropy Galactocentric v4.0",
        "galcen_ra_deg": float(frame.galcen_coord.ra.deg),
        "galcen_dec_deg": float(frame.galcen_coord.dec.deg),
        "galcen_distance_kpc": float(frame.galcen_distance.to_value("kpc")),
        "galcen_v_sun_km_s": [float(v) for v in sun[3:]],
        "z_sun_pc": float(frame.z_sun.to_value("pc")),
        "roll_deg": float(frame.roll.to_value("deg")),
    }


def _frame() -> Any:
    from astropy.coordinates import Galactocentric, galactocentric_frame_defaults

    return Galactocentric(**galactocentric_frame_defaults.get_from_registry("v4.0")["parameters"])


def _rotation() -> tuple[Array, Array]:
    """Return R (3, 3) and the Sun's w (6): x = R x_icrs + sun[:3], v = R v_icrs + sun[3:]."""
    from astropy import coordinates as coord
    from astropy import units as u

    corners = coord.CartesianRepresentation(
        np.concatenate([np.zeros((3, 1)), np.eye(3)], 1) * u.kpc,
        differentials=coord.CartesianDifferential(np.zeros((3, 4)) * u.km / u.s),
    )
    found = coord.ICRS(corners).transform_to(_frame())
    x, v = found.cartesian.xyz.to_value("kpc"), found.velocity.d_xyz.to_value("km/s")
    return x[:, 1:] - x[:, :1], np.concatenate([x[:, 0], v[:, 0]])


def galactocentric(values: dict[str, Array]) -> tuple[Array, Array]:
    """Turn heliocentric observables into w (n, 6), with the Jacobian (n, 6, 6).

    With the unit vectors n (towards the star), p (east) and q (north), distance d and k = 4.74 km/s per
    mas/yr kpc, x = R d n + x_sun and v = R (v_r n + k d (pmra p + pmdec q)) + v_sun.

    Parameters
    ----------
    values
        ``ra dec`` (deg), ``distance`` (kpc) or ``parallax`` (mas), ``pmra pmdec`` (mas/yr), ``radial_velocity``
        (km/s).

    Returns
    -------
    w
        kpc and km/s.
    jacobian
        Derivatives of w by (ra cos(dec), dec, distance or parallax, pmra, pmdec, radial_velocity).
    """
    from astropy import units as u

    k = (1 * u.mas * u.kpc / u.yr).to_value(u.km / u.s, u.dimensionless_angles())
    ra, dec = np.radians(values["ra"]), np.radians(values["dec"])
    d = values["distance"] if "distance" in values else 1 / values["parallax"]
    p = np.stack([-np.sin(ra), np.cos(ra), np.zeros_like(ra)], -1)
    q = np.stack([-np.cos(ra) * np.sin(dec), -np.sin(ra) * np.sin(dec), np.cos(dec)], -1)
    n = np.stack([np.cos(ra) * np.cos(dec), np.sin(ra) * np.cos(dec), np.sin(dec)], -1)
    mu_p, mu_q, v_r, far = (a[:, None] for a in (k * values["pmra"], k * values["pmdec"], values["radial_velocity"], d))
    rotation, sun = _rotation()
    w = np.concatenate([(far * n) @ rotation.T, (v_r * n + far * (mu_p * p + mu_q * q)) @ rotation.T], -1) + sun

    # dn = p da + q dd, dp = (tan(dec) q - n) da, dq = -tan(dec) p da - n dd, with da = cos(dec) dra
    tan = np.tan(dec)[:, None]
    degree = np.pi / 180
    by_far = 1.0 if "distance" in values else -(far**2)
    zero = np.zeros_like(n)
    dx = [far * p * degree, far * q * degree, n * by_far, zero, zero, zero]
    dv = [
        (v_r * p + far * (mu_p * (tan * q - n) - mu_q * tan * p)) * degree,
        (v_r * q - far * mu_q * n) * degree,
        (mu_p * p + mu_q * q) * by_far,
        k * far * p,
        k * far * q,
        n,
    ]
    jacobian = np.concatenate([rotation @ np.stack(dx, -1), rotation @ np.stack(dv, -1)], 1)
    return w, jacobian
