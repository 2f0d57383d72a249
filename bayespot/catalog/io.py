"""Files: tables on disk in FITS, ECSV, CSV, Parquet or NPZ, with their metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.catalog.columns import NAME_COLUMNS, CatalogError
from bayespot.files import replacing

if TYPE_CHECKING:
    from astropy.table import Table

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
    """Write a table with its metadata, complete or not at all."""
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
    with replacing(path) as temporary:
        _write(table, text, temporary, kind)


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

    if path.stat().st_size == 0:
        # numpy's EOFError is what the command line takes for Ctrl-D
        raise ValueError("the file is empty")
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
    converters = {name: [ascii.convert_numpy(str)] for name in NAME_COLUMNS}
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
