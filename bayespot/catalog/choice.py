"""Which of several tables in one file has the stars: FITS extensions, tables of a VOTable, datasets of HDF5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bayespot.catalog.columns import CatalogError, has_coordinates


class Candidate(NamedTuple):
    """A table of a file: its number and name there, and its columns."""

    number: int
    name: str
    columns: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.number} {self.name!r}" if self.name else str(self.number)


def choose(tables: Sequence[Candidate], hdu: int | str | None) -> tuple[int, list[str]]:
    """Return the place in ``tables`` of the one to read, and notes on what else there was.

    Parameters
    ----------
    tables
        At least one.
    hdu
        Number or name; None: the first with coordinates.

    Raises
    ------
    CatalogError
        If there is no such table; the message lists those that there are.
    """
    if hdu is not None:
        for i, table in enumerate(tables):
            if str(hdu) == str(table.number) or str(hdu).strip("/").lower() == table.name.strip("/").lower():
                return i, []
        raise CatalogError(f"no table {hdu!r} in this file; it has {_listed(tables)}: give one of these with hdu=")
    able = [i for i, table in enumerate(tables) if has_coordinates(table.columns)]
    if len(tables) == 1 or not able:
        return 0, []
    chosen = able[0]
    note = f"table {tables[chosen]} of {len(tables)} in the file was read"
    if others := [tables[i] for i in able[1:]]:
        note += f"; {_listed(others)} {'has' if len(others) == 1 else 'have'} coordinates too: choose with hdu="
    if passed := [table for i, table in enumerate(tables) if i not in able]:
        note += f"; {_listed(passed)} {'has' if len(passed) == 1 else 'have'} none"
    return chosen, [note]


def _listed(tables: Sequence[Candidate]) -> str:
    shown = ", ".join(map(str, tables[:8]))
    return f"{shown} and {len(tables) - 8} more" if len(tables) > 8 else shown
