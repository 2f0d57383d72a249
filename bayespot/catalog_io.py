"""Files and columns: from a table on disk to Galactocentric coordinates with covariances, and back."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_SUFFIXES = {
    ".fits": "fits",
    ".fit": "fits",
    ".ecsv": "ascii.ecsv",
    ".csv": "csv",
    ".parquet": "parquet",
    ".npz": "npz",
}
_META_KEY = "bayespot_meta"
_FRAME = "galactocentric v4.0 (astropy)"
_COVARIANCE = [f"cov_{a}_{b}" for i, a in enumerate(CARTESIAN) for b in list(CARTESIAN)[i:]]


def file_format(path: Path) -> str:
    """Return the format that the suffix stands for."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise CatalogError(f"{path}: unknown suffix {suffix!r}; use one of {', '.join(_SUFFIXES)}")
    return _SUFFIXES[suffix]


def read_table(path: Path) -> tuple[Table, dict[str, Any]]:
    """Read a file into an astropy Table and its metadata."""
    from astropy.table import Table

    kind = file_format(path)
    if not path.exists():
        raise CatalogError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise CatalogError(f"{path} is a folder; give a file")
    try:
        if kind == "npz":
            with np.load(path, allow_pickle=False) as archive:
                columns = {name: archive[name] for name in archive.files}
            meta = columns.pop(_META_KEY, None)
            table = Table(columns, meta={_META_KEY: str(meta)} if meta is not None else {})
        elif kind == "csv":
            table = _read_csv(path)
        elif kind == "parquet":
            table = _read_parquet(path)
        elif kind == "fits":
            table = _read_fits(path)
        else:
            table = Table.read(path, format=kind)
    except CatalogError:
        raise
    except Exception as error:  # the readers raise whatever their libraries raise on a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CatalogError(
            f"{path}: not a readable {kind} file ({reason}); it may be truncated or have the wrong suffix: "
            "copy it again or convert it"
        ) from error
    if len(table) == 0:
        raise CatalogError(f"{path}: the table has no rows; it may be truncated")
    stored = table.meta.pop(_META_KEY, None) or table.meta.pop(_META_KEY.upper(), None)
    meta = json.loads(stored) if stored else {k: v for k, v in table.meta.items() if _plain(v)}
    return table, meta


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | dict)


def _read_csv(path: Path) -> Table:
    from astropy.table import Table

    with path.open() as handle:
        first = handle.readline()
    table = Table.read(path, format="ascii.csv", comment="#")
    if first.startswith(f"# {_META_KEY}: "):
        table.meta[_META_KEY] = first.split(": ", 1)[1]
    return table


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet
    from astropy.table import Table

    arrow = pyarrow.parquet.read_table(path)
    table = Table({name: arrow[name].to_numpy() for name in arrow.column_names})
    stored = (arrow.schema.metadata or {}).get(_META_KEY.encode())
    if stored:
        table.meta[_META_KEY] = stored.decode()
    for field in arrow.schema:
        unit = (field.metadata or {}).get(b"unit")
        if unit:
            table[field.name].unit = unit.decode()
    return table


def _read_fits(path: Path) -> Table:
    import warnings

    from astropy.io import fits
    from astropy.table import Table

    with warnings.catch_warnings():
        # astropy only warns of a truncated file and then returns garbage
        warnings.simplefilter("error")
        with fits.open(path, memmap=False) as hdus:
            hdu = next((h for h in hdus if isinstance(h, fits.BinTableHDU | fits.TableHDU)), None)
            if hdu is None:
                raise CatalogError(f"{path}: no table in this FITS file; write the stars as a binary table")
            table = Table.read(hdu)
            stored = hdu.header.get("HIERARCH " + _META_KEY) or hdu.header.get("BSMETA")
    table.meta = {_META_KEY: stored} if stored else {}
    return table


def write_table(table: Table, meta: dict[str, Any], path: Path, overwrite: bool) -> None:
    """Write a table with its metadata, atomically: a temporary file beside it, then a rename."""
    kind = file_format(path)
    if path.exists() and not overwrite:
        raise CatalogError(f"{path} exists; choose another name or pass overwrite=True")
    text = json.dumps(meta)
    handle, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent or Path("."), prefix=".")
    os.close(handle)
    temporary = Path(name)
    try:
        _write(table, text, temporary, kind)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(table: Table, text: str, path: Path, kind: str) -> None:
    table = table.copy()
    if kind == "npz":
        arrays: dict[str, Any] = {name: np.asarray(table[name]) for name in table.colnames}
        np.savez(path, **(arrays | {_META_KEY: np.array(text)}))
    elif kind == "csv":
        with path.open("w") as handle:
            handle.write(f"# {_META_KEY}: {text}\n")
            table.write(handle, format="ascii.csv")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        fields, columns = [], []
        for name in table.colnames:
            array = pyarrow.array(np.asarray(table[name]))
            unit = table[name].unit
            fields.append(pyarrow.field(name, array.type, metadata={"unit": str(unit)} if unit else None))
            columns.append(array)
        schema = pyarrow.schema(fields, metadata={_META_KEY: text})
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), path)
    elif kind == "fits":
        from astropy.io import fits

        hdu = fits.table_to_hdu(table)
        hdu.header["BSMETA"] = text
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, overwrite=True)
    else:
        table.meta = {_META_KEY: text}
        table.write(path, format=kind, overwrite=True)


def phase_space(table: Table, drop_invalid: bool) -> tuple[Array, Array | None, Array, list[str]]:
    """Return w (n, 6), covariance (n, 6, 6) or None, the kept rows, and notes.

    Galactocentric columns are used as they are, heliocentric ones are turned with astropy's v4.0 frame.
    """
    names = set(table.colnames)
    if set(CARTESIAN) <= names:
        wanted = dict(CARTESIAN)
    elif {"ra", "dec"} <= names or len(names & set(OBSERVED)) >= 3:
        wanted = {k: v for k, v in OBSERVED.items() if k not in ("distance", "parallax")}
        wanted["distance" if "distance" in names or "parallax" not in names else "parallax"] = ""
        wanted = {k: OBSERVED[k] for k in OBSERVED if k in wanted}
    else:
        wanted = dict(CARTESIAN)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise CatalogError(
            f"missing column{'s' * (len(missing) > 1)} {', '.join(missing)} "
            f"(the file has {', '.join(table.colnames)}); "
            f"needed are {', '.join(CARTESIAN)} in a Galactocentric frame, or ra, dec, distance (or parallax), "
            "pmra, pmdec, radial_velocity: rename or add them"
        )
    values = {name: _column(table, name, unit) for name, unit in wanted.items()}
    good = np.ones(len(table), dtype=bool)
    for name, value in values.items():
        bad = ~np.isfinite(value)
        if bad.any() and not drop_invalid:
            raise CatalogError(
                f"column {name}: {bad.sum()} of {len(bad)} values are NaN, infinite or masked, the first in row "
                f"{int(np.argmax(bad))}; drop those rows (drop_invalid=True) or fill them"
            )
        good &= ~bad
    if "parallax" in values:
        bad = good & ~(values["parallax"] > 0)
        if bad.any() and not drop_invalid:
            row = int(np.argmax(bad))
            raise CatalogError(
                f"column parallax: {bad.sum()} values are not positive, the first in row {row} "
                f"({values['parallax'][row]:.4g} mas), and give no distance; add a distance column or drop them "
                "(drop_invalid=True)"
            )
        good &= ~bad
    rows = np.flatnonzero(good)
    notes = [f"{len(good) - len(rows)} rows dropped as invalid"] if len(rows) < len(good) else []
    values = {name: value[rows] for name, value in values.items()}
    covariance = _covariance(table, wanted, values, rows, notes)
    if "ra" in values:
        w, jacobian = galactocentric(values, derivatives=covariance is not None)
        if covariance is not None:
            covariance = jacobian @ covariance @ jacobian.transpose(0, 2, 1)
    else:
        w = np.stack([values[name] for name in CARTESIAN], -1)
        if set(_COVARIANCE) <= names:
            covariance = _stored_covariance(table, rows)
    return w, covariance, rows, notes


def _column(table: Table, name: str, unit: str) -> Array:
    from astropy import units as u

    column = table[name]
    raw = np.ma.asarray(column)
    if raw.dtype.kind not in "fiu":
        for i, item in enumerate(raw):
            try:
                float(item)
            except (TypeError, ValueError):
                raise CatalogError(f"column {name}: row {i} is {item!r}, not a number; correct or drop it") from None
    value = np.ma.filled(raw.astype(float), np.nan)
    found = getattr(column, "unit", None)
    if found is None or str(found) == "":
        return value
    try:
        return (value * u.Unit(found)).to_value(u.Unit(unit))
    except (u.UnitConversionError, ValueError, TypeError) as error:
        raise CatalogError(f"column {name} has unit {found}, which is no {unit}; convert or correct it") from error


def _covariance(
    table: Table, wanted: dict[str, str], values: dict[str, Array], rows: Array, notes: list[str]
) -> Array | None:
    """Covariance of the input columns (n, 6, 6) from *_error and *_corr columns; None without errors."""
    names = list(wanted)
    found = [f"{name}_error" for name in names if f"{name}_error" in table.colnames]
    if not found:
        return None
    n = len(rows)
    sd = np.zeros((n, 6))
    for i, name in enumerate(names):
        if f"{name}_error" not in table.colnames:
            continue
        # Gaia gives the errors of ra and dec in mas
        unit = "mas" if name in ("ra", "dec") else wanted[name]
        error = _column(table, f"{name}_error", unit)[rows]
        if (error < 0).any():
            raise CatalogError(f"column {name}_error: row {int(np.argmax(error < 0))} is negative; correct it")
        lost = ~np.isfinite(error)
        if lost.any():
            if lost.all():
                raise CatalogError(f"column {name}_error has no finite value; remove the column or fill it")
            relative = np.median(error[~lost] / np.abs(values[name][~lost]))
            error = np.where(lost, relative * np.abs(values[name]), error)
            notes.append(f"{lost.sum()} missing {name}_error replaced by the median relative error, {relative:.3g}")
        sd[:, i] = error / 3.6e6 if unit == "mas" and name in ("ra", "dec") else error
    correlation = np.broadcast_to(np.eye(6), (n, 6, 6)).copy()
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if i != j and f"{a}_{b}_corr" in table.colnames:
                c = np.nan_to_num(_column(table, f"{a}_{b}_corr", "")[rows])
                if (np.abs(c) > 1).any():
                    raise CatalogError(
                        f"column {a}_{b}_corr: row {int(np.argmax(np.abs(c) > 1))} exceeds 1; correct it"
                    )
                correlation[:, i, j] = correlation[:, j, i] = c
    return correlation * sd[:, :, None] * sd[:, None, :]


def _stored_covariance(table: Table, rows: Array) -> Array:
    covariance = np.empty((len(rows), 6, 6))
    names = list(CARTESIAN)
    for i in range(6):
        for j in range(i, 6):
            column = np.asarray(table[f"cov_{names[i]}_{names[j]}"], dtype=float)[rows]
            covariance[:, i, j] = covariance[:, j, i] = column
    return covariance


def covariance_columns(covariance: Array) -> dict[str, Array]:
    """Return the upper triangle as columns ``cov_x_x``, ``cov_x_y``, ..."""
    i, j = np.triu_indices(6)
    return dict(zip(_COVARIANCE, covariance[:, i, j].T, strict=True))


def galactocentric(values: dict[str, Array], derivatives: bool = False) -> tuple[Array, Array]:
    """Turn heliocentric observables into w (n, 6), with the Jacobian (n, 6, 6) in the values' order.

    Units: deg, kpc or mas, mas/yr, km/s. Derivatives are central differences, exact to about 1e-8.
    """
    names = list(values)
    w = _transform(values)
    jacobian = np.zeros((len(w), 6, 6))
    if derivatives:
        for k, name in enumerate(names):
            step = 1e-4 * np.maximum(np.abs(values[name]), 1e-2 if name != "radial_velocity" else 1.0)
            ahead = _transform(values | {name: values[name] + step})
            behind = _transform(values | {name: values[name] - step})
            jacobian[:, :, k] = (ahead - behind) / (2 * step[:, None])
    return w, jacobian


def _transform(values: dict[str, Array]) -> Array:
    import astropy.coordinates as coord
    from astropy import units as u

    distance = values["distance"] if "distance" in values else 1 / values["parallax"]
    icrs = coord.SkyCoord(
        ra=values["ra"] * u.deg,
        dec=np.clip(values["dec"], -90, 90) * u.deg,
        distance=distance * u.kpc,
        pm_ra_cosdec=values["pmra"] * u.mas / u.yr,
        pm_dec=values["pmdec"] * u.mas / u.yr,
        radial_velocity=values["radial_velocity"] * u.km / u.s,
    )
    with coord.galactocentric_frame_defaults.set("v4.0"):
        found = icrs.transform_to(coord.Galactocentric())
    x = found.cartesian.xyz.to_value(u.kpc).T
    v = found.velocity.d_xyz.to_value(u.km / u.s).T
    return np.concatenate([x, v], -1)
