"""Tables of text: CSV and its relatives, and ECSV, as spreadsheets, archives and numpy write them."""

from __future__ import annotations

import csv
import gzip
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.catalog.columns import CARTESIAN, META_COLUMN, MISSING_WORDS, NAME_COLUMNS, OBSERVED, CatalogError

if TYPE_CHECKING:
    import pandas as pd
    from astropy.table import Table

_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def content(path: Path) -> bytes:
    """Return a file's bytes, unpacked if they are gzipped."""
    packed = path.read_bytes()
    return gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed


def read_text(path: Path) -> tuple[Table, list[str]]:
    """Read a table of text: ECSV if it says so, else a line of names (or a comment with them) and rows of values.

    Values are separated by commas, semicolons, tabs or blanks, as in the line of names.

    Raises
    ------
    CatalogError
        Names the line; the first line of the file is line 1.
    """
    lines = _lines(content(path))
    if lines and lines[0].startswith("# %ECSV"):
        return _read_ecsv(lines)
    return _read_plain(lines)


def _lines(raw: bytes) -> list[str]:
    """Return the lines; the last is empty if the file ends as lines do."""
    coding = next((c for mark, c in _BYTE_ORDER_MARKS.items() if raw.startswith(mark)), "utf-8")
    return raw.decode(coding).replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _read_ecsv(lines: list[str]) -> tuple[Table, list[str]]:
    from astropy.table import Table

    # astropy's default, and what archives write for a missing number; a star may be called NA
    fills = [(word, "0") for word in {""} | {w for lower in MISSING_WORDS for w in _cases(lower)}]
    table = Table.read(lines, format="ascii.ecsv", fill_values=fills, fill_exclude_names=["name"])
    return table, []


def _cases(word: str) -> tuple[str, str, str]:
    return word, word.upper(), word.capitalize()


def _read_plain(lines: list[str]) -> tuple[Table, list[str]]:
    head = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    if head == len(lines):
        raise CatalogError("the table has no rows; it may be truncated: copy it again")
    first, comments = lines[head], [line for line in lines[:head] if line.startswith("#")]
    delimiter = _delimiter(first)
    if all(map(_is_number, _split(first, delimiter))):
        names, start = _names_in_comment(comments, _split(first, delimiter), delimiter, head + 1), head
    else:
        names, start = [name.strip() for name in _split(first, delimiter)], head + 1
    names = _distinct(names)
    notes = _check_lines(lines, start, names, delimiter)
    if delimiter == ";":
        notes.append("columns are separated by semicolons; that is how the file was read")
    table = _table(_parse(lines[start:], names, delimiter))
    stored = next((c.split(": ", 1)[1] for c in comments if c.startswith(f"# {META_COLUMN}: ")), None)
    if stored is not None:  # where bayespot kept it until version 0.1.0
        table.meta[META_COLUMN] = stored
    return table, notes


def _delimiter(line: str) -> str:
    """Return what separates values: the most frequent of comma, semicolon and tab, else blanks."""
    counts = {c: line.count(c) for c in ",;\t"}
    best = max(counts, key=lambda c: counts[c])
    return best if counts[best] else " "


def _split(line: str, delimiter: str) -> list[str]:
    return line.split() if delimiter == " " else next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _names_in_comment(comments: list[str], values: list[str], delimiter: str, line: int) -> list[str]:
    """Return the names in the last comment line (``# x y z vx vy vz``, as numpy.savetxt writes it)."""
    last = comments[-1].lstrip("#").strip() if comments else ""
    for names in (_split(last, delimiter), re.split(r"[\s,;]+", last)):
        if len(names) == len(values) and all(names):
            return [name.strip() for name in names]
    raise CatalogError(
        f"no line names the columns: line {line} begins the numbers ({len(values)} of them); "
        f"put a line {','.join(CARTESIAN)} or of Gaia's names above it"
    )


def _distinct(names: list[str]) -> list[str]:
    """Number the later of columns with one name; refuse that where it matters which is meant."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1 and name in {**CARTESIAN, **OBSERVED}:
            raise CatalogError(f"column {name} appears twice; rename or remove one of the two")
        found.append(name if seen[name] == 1 else f"{name}.{seen[name] - 1}")
    return found


def _check_lines(lines: list[str], start: int, names: list[str], delimiter: str) -> list[str]:
    """Refuse lines with too many values and a last line that was cut; note those with too few."""
    n = len(names)
    short = []
    for number, line in enumerate(lines[start:], start + 1):
        if not line.strip():
            continue
        values = _split(line, delimiter)
        if len(values) > n and any(v.strip() for v in values[n:]):
            decimals = " (are decimals written with commas? write points)" if len(values) == 2 * n else ""
            raise CatalogError(f"line {number} has {len(values)} values for {n} columns{decimals}; correct the line")
        if len(values) < n:
            if number == len(lines):  # without an end of line
                raise CatalogError(
                    f"line {number}, the last, has {len(values)} of {n} values and no end: the file is truncated: "
                    "copy it again or remove the line"
                )
            short.append(number)
    notes = []
    if short:
        notes.append(
            f"{len(short)} lines have fewer values than the {n} columns, the first line {short[0]}: what is not there "
            "counts as missing"
        )
    if lines[-1].strip():
        notes.append(f"line {len(lines)}, the last, has no end of line: make sure that the file was not cut there")
    return notes


def _parse(lines: list[str], names: list[str], delimiter: str) -> pd.DataFrame:
    import warnings

    import pandas as pd

    # identifiers stay text, or "007" would come back as 7
    text = {name for name in names if name.lower() in (*NAME_COLUMNS, META_COLUMN)}
    # from 3.1 on all digits count by default, and asking for it is deprecated
    old = tuple(int(n) for n in pd.__version__.split(".")[:2]) < (3, 1)
    exact: dict[str, Any] = {"float_precision": "round_trip"} if old else {}
    words = sorted({w for lower in MISSING_WORDS for w in _cases(lower)} | {""})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # surplus empty values were looked at
        return pd.read_csv(
            io.StringIO("\n".join(lines)),
            sep=r"\s+" if delimiter == " " else delimiter,
            header=None,
            names=names,
            index_col=False,
            dtype=dict.fromkeys(text, str),
            na_values={name: words for name in names if name not in text},
            keep_default_na=False,
            skipinitialspace=True,
            low_memory=False,
            **exact,
        )


def _table(frame: pd.DataFrame) -> Table:
    from astropy.table import MaskedColumn, Table

    columns: dict[str, Any] = {}
    for name in frame.columns:
        values = frame[name]
        if values.dtype.kind in "iuf":
            columns[name] = values.to_numpy()
            continue
        lost = values.isna().to_numpy()
        words = np.array(["" if gone else str(v) for v, gone in zip(values, lost, strict=True)])
        columns[name] = MaskedColumn(words, mask=lost) if lost.any() else words
    table = Table(columns)
    if META_COLUMN in table.colnames:
        stored = [str(v) for v in np.ma.filled(table[META_COLUMN], "") if str(v)]
        table.remove_column(META_COLUMN)
        if stored:
            table.meta[META_COLUMN] = stored[0]
    return table
