"""Identifiers of stars, with all their digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.catalog.columns import MISSING_WORDS, NAME_COLUMNS

if TYPE_CHECKING:
    from astropy.table import Table

#: Floating-point numbers hold every integer up to this one.
_EXACT = 2**53


def read_names(table: Table, rows: np.ndarray) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the identifiers of the chosen rows from ``name`` or ``source_id``, None without either; and notes.

    A star without one has the empty name. Numbers that were stored as floating-point ones have lost digits beyond the
    sixteenth: a note says so.
    """
    for column in NAME_COLUMNS:
        if column in table.colnames:
            raw = np.ma.asarray(table[column])[rows]
            if raw.dtype.kind == "f":
                return _from_floats(column, np.ma.filled(raw, np.nan))
            words = column == "source_id"
            return tuple(_text(v, words) for v in np.ma.filled(raw.astype(object), "").tolist()), []
    return None, []


def _text(value: Any, words: bool) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    text = str(value)
    # a star may be called NA, an identifier that is a number may not
    return "" if words and text.strip().lower() in MISSING_WORDS else text


def _from_floats(column: str, values: np.ndarray) -> tuple[tuple[str, ...], list[str]]:
    names = tuple("" if np.isnan(v) else str(int(v)) if v == np.floor(v) and abs(v) < 1e300 else str(v) for v in values)
    notes = []
    if (np.abs(values[np.isfinite(values)]) >= _EXACT).any():
        notes.append(
            f"column {column} holds floating-point numbers, which have lost the last digits of its identifiers: store "
            "integers or text"
        )
    return names, notes
