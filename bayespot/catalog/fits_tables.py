"""FITS: the table with the stars among the extensions, and missing values as the standard has them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.catalog.choice import Candidate, choose
from bayespot.catalog.columns import META_COLUMN, CatalogError
from bayespot.catalog.text import content

if TYPE_CHECKING:
    from astropy.table import Table

#: Header card of bayespot's metadata.
FITS_KEY = "BSMETA"


def read_fits(path: Path, hdu: int | str | None) -> tuple[Table, list[str]]:
    """Read the first table with coordinates, or the one that ``hdu`` names; see `choose`."""
    from astropy.io import fits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd units and keywords: columns are checked by `phase_space`
        # astropy only warns of a truncated file and then returns garbage or nothing
        warnings.filterwarnings("error", message="(?s).*(truncated|corrupt)")
        with fits.open(io.BytesIO(content(path)), memmap=False) as hdus:
            found = [(i, h) for i, h in enumerate(hdus) if isinstance(h, fits.BinTableHDU | fits.TableHDU)]
            if not found:
                raise CatalogError(f"{path}: no table in this FITS file (or truncated); write a binary table")
            chosen, notes = choose([Candidate(i, h.name, tuple(h.columns.names)) for i, h in found], hdu)
            table = _read_hdu(found[chosen][1])
            stored = found[chosen][1].header.get(FITS_KEY)
    table.meta = {META_COLUMN: stored} if stored else {}
    return table, notes


def _read_hdu(hdu: Any) -> Table:
    from astropy.io import fits
    from astropy.table import Table

    if isinstance(hdu, fits.TableHDU):
        return _read_ascii(hdu)
    stored = hdu.data.view(np.ndarray)
    nulls = {c.name: stored[c.name] == c.null for c in hdu.columns if c.null is not None and stored[c.name].ndim == 1}
    table = Table.read(hdu)
    for name, lost in nulls.items():
        # TNULL is of the stored integers; astropy 8 compares it with what TSCAL and TZERO make of them
        if lost.any() and stored[name].dtype.kind in "iu":
            table[name] = _masked(table[name], lost)
    return table


def _masked(column: Any, lost: np.ndarray) -> Any:
    from astropy.table import MaskedColumn

    raw = np.ma.asarray(column)
    return MaskedColumn(raw.data, mask=np.ma.getmaskarray(raw) | lost, unit=column.unit)


def _read_ascii(hdu: Any) -> Table:
    """Read an ASCII table as text: astropy 8 fails on one with TNULL, and takes blanks for zeros."""
    from astropy.table import MaskedColumn, Table

    stored = hdu.data.view(np.ndarray)
    columns = {}
    for column in hdu.columns:
        words = np.char.strip(np.char.decode(stored[column.name], "utf-8"))
        lost = words == ""
        if column.null is not None:
            lost |= words == str(column.null).strip()
        if str(column.format)[0] in "IFED":
            words = np.char.replace(words, "D", "E")
        columns[column.name] = MaskedColumn(words, mask=lost, unit=column.unit)
    return Table(columns)
