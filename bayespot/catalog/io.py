"""Files: tables on disk in FITS, ECSV, CSV, Parquet, NPZ, VOTable or HDF5, with their metadata."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.catalog.choice import Candidate, choose
from bayespot.catalog.columns import META_COLUMN, CatalogError
from bayespot.catalog.fits_tables import FITS_KEY, read_fits
from bayespot.catalog.hdf5_tables import read_hdf5
from bayespot.catalog.text import content, read_text
from bayespot.files import replacing

if TYPE_CHECKING:
    from astropy.table import Table

#: What is written and read.
_SUFFIXES = {
    ".fits": "fits",
    ".fit": "fits",
    ".ecsv": "ascii.ecsv",
    ".csv": "csv",
    ".parquet": "parquet",
    ".npz": "npz",
}
#: What is read as well.
_READ_ONLY = {
    ".vot": "votable",
    ".votable": "votable",
    ".hdf5": "hdf5",
    ".h5": "hdf5",
    ".txt": "csv",
    ".dat": "csv",
    ".tsv": "csv",
}
#: What may be gzipped.
_PACKED = ("fits", "ascii.ecsv", "csv", "votable")


def read_table(path: Path, hdu: int | str | None = None) -> tuple[Table, dict[str, Any]]:
    """Read a file into an astropy Table and its metadata; raise CatalogError if it cannot be read.

    ``hdu`` is the number or name of the table in a file with several; notes on the reading are in the metadata.
    """
    if path.is_dir():
        raise CatalogError(f"{path} is a folder; give a file ({', '.join(_SUFFIXES)})")
    if not path.exists():
        raise CatalogError(f"{path}: no such file; check the path")
    kind = _kind_to_read(path)
    try:
        table, notes = _read(path, kind, hdu)
        stored = table.meta.pop(META_COLUMN, None)
        n_written, meta = len(table), {k: v for k, v in table.meta.items() if _is_json(v)}
        if stored:
            written = json.loads(stored)
            n_written, meta = written["n_stars"], written["meta"]
            if kind in ("csv", "ascii.ecsv") and content(path)[-1:] != b"\n":
                raise CatalogError("the last line is truncated: copy the file again")
    except CatalogError as error:
        raise CatalogError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    except Exception as error:  # the readers raise whatever their libraries raise on a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CatalogError(
            f"{path}: not a readable {kind} file ({reason}); it may be truncated or have the wrong suffix: "
            "copy it again or convert it"
        ) from error
    if len(table) == 0:
        raise CatalogError(f"{path}: the table has no rows; it may be truncated: copy it again")
    if len(table) != n_written:
        raise CatalogError(
            f"{path}: {len(table)} rows of {n_written} written; it is truncated: copy it again"
            + (f", or remove {META_COLUMN} if you took rows out" if kind != "fits" else "")
        )
    if notes:
        meta["notes"] = [*meta.get("notes", []), *notes]
    return table, meta


def write_table(table: Table, meta: dict[str, Any], path: Path, overwrite: bool) -> None:
    """Write a table with its metadata, complete or not at all."""
    kind = check_place(path, overwrite)
    for key, value in meta.items():
        if not _is_json(value):
            raise CatalogError(
                f"meta[{key!r}] = {value!r} cannot be stored; keep numbers, strings, lists and dictionaries in meta"
            )
    text = json.dumps({"n_stars": len(table), "meta": meta}, default=_plain)
    with replacing(path) as temporary:
        _write(table, text, temporary, kind)


def check_place(path: Path, overwrite: bool) -> str:
    """Return the format of a file to be written; raise CatalogError where `write_table` could not write it."""
    kind = _file_format(path)
    if path.is_dir():
        raise CatalogError(f"{path} is a folder; give a file name")
    if path.exists() and not overwrite:
        raise CatalogError(f"{path} exists; choose another name or pass overwrite=True")
    if not path.parent.is_dir():
        raise CatalogError(f"{path}: the folder {path.parent} does not exist; create it first")
    return kind


def _kind_to_read(path: Path) -> str:
    known = _SUFFIXES | _READ_ONLY
    inner = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    kind = known.get(inner)
    if kind is None or (inner != path.suffix.lower() and kind not in _PACKED):
        packed = ", ".join(f"{suffix}.gz" for suffix, k in known.items() if k in _PACKED)
        raise CatalogError(f"{path}: unknown suffix {path.suffix!r}; use one of {', '.join(known)}, {packed}")
    return kind


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
    meta = columns.pop(META_COLUMN, None)
    return Table(columns, meta={} if meta is None else {META_COLUMN: str(meta)})


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet
    from astropy.table import Table

    arrow = pyarrow.parquet.read_table(path)
    if b"table_meta_yaml" in (arrow.schema.metadata or {}):
        return Table.read(path, format="parquet")
    # written by another program, without units; astropy's own reader fails on missing strings
    return Table({name: _arrow_column(arrow[name]) for name in arrow.column_names})


def _arrow_column(column: Any) -> Any:
    """Return a column as an array; integers with gaps stay integers, or identifiers would lose digits."""
    import pyarrow.types
    from astropy.table import MaskedColumn

    if pyarrow.types.is_integer(column.type) and column.null_count:
        return MaskedColumn(column.fill_null(0).to_numpy(), mask=column.is_null().to_numpy())
    return column.to_numpy()


def _read_votable(path: Path, hdu: int | str | None) -> tuple[Table, list[str]]:
    import warnings

    from astropy.io import votable

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small sins against the standard, which archives commit
        tables = list(votable.parse(io.BytesIO(content(path))).iter_tables())
        if not tables:
            raise CatalogError("no table in this VOTable")
        names = [table.name or table.ID or "" for table in tables]
        columns = [tuple(field.name for field in table.fields) for table in tables]
        chosen, notes = choose([Candidate(i, n, c) for i, (n, c) in enumerate(zip(names, columns, strict=True))], hdu)
        table = tables[chosen].to_table(use_names_over_ids=True)
    table.meta = {}
    return table, notes


def _read(path: Path, kind: str, hdu: int | str | None) -> tuple[Table, list[str]]:
    if kind in _SEVERAL:
        return _SEVERAL[kind](path, hdu)
    if hdu is not None:
        raise CatalogError(f"hdu={hdu!r} chooses among several tables, and a {kind} file has one; leave it out")
    if kind in ("csv", "ascii.ecsv"):
        return read_text(path)
    return (_read_npz(path) if kind == "npz" else _read_parquet(path)), []


_SEVERAL = {"fits": read_fits, "votable": _read_votable, "hdf5": read_hdf5}


def _write(source: Table, text: str, path: Path, kind: str) -> None:
    from astropy.table import Table

    table = Table(source, copy=False)
    table.meta = {META_COLUMN: text}
    if kind == "npz":
        arrays: dict[str, Any] = {name: np.asarray(table[name]) for name in table.colnames}
        np.savez(path, **(arrays | {META_COLUMN: np.array(text)}))
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="\n") as handle:
            # a column of its own, whose first row has it all: a comment above the names would pass for the names
            table[META_COLUMN] = [text, *[""] * (len(table) - 1)][: len(table)]
            table.write(handle, format="ascii.csv")
    elif kind == "fits":
        from astropy.io import fits

        table.meta = {}
        for name in table.colnames:
            if table[name].dtype.kind == "U":  # FITS strings are bytes
                table[name] = np.char.encode(np.asarray(table[name]), "utf-8")
        hdu = fits.table_to_hdu(table)
        # astropy misreads a quote before a slash in long strings; escaped, JSON needs no quote
        hdu.header[FITS_KEY] = text.replace("'", "\\u0027")
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path)
    else:
        table.write(path, format=kind)
