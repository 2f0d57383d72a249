"""HDF5: tables as astropy and h5py write them, a dataset of records or a group of columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.catalog.choice import Candidate, choose
from bayespot.catalog.columns import CatalogError

if TYPE_CHECKING:
    from astropy.table import Table


def read_hdf5(path: Path, hdu: int | str | None) -> tuple[Table, list[str]]:
    """Read the first table with coordinates, or the one at the path ``hdu``.

    Raises
    ------
    CatalogError
        If the file is a simulation's snapshot or pandas' store: the message says what reads it.
    """
    import h5py

    with h5py.File(path, "r") as file:
        if any(name.startswith("PartType") for name in file):
            raise CatalogError(
                f"this is an N-body snapshot ({', '.join(n for n in file if n.startswith('PartType'))}), not a table: "
                "read it with Catalog.read_snapshot(path), or on the command line bayespot snapshot"
            )
        found = _tables(file)
        if not found:
            raise CatalogError("no table in this HDF5 file: it needs a dataset of records or a group of columns")
        paths = sorted(found)
        chosen, notes = choose([Candidate(i, p, found[p]) for i, p in enumerate(paths)], hdu)
        where = file[paths[chosen]]
        if where.attrs.get("pandas_type") is not None or "pandas_type" in where.parent.attrs:
            raise CatalogError("pandas wrote this file with to_hdf; write Parquet (to_parquet) or CSV instead")
        if isinstance(where, h5py.Dataset):
            return _records(where), notes
        return _columns(where), notes


def _tables(file: Any) -> dict[str, tuple[str, ...]]:
    """Return the path and the columns of everything that may be a table."""
    import h5py

    found: dict[str, tuple[str, ...]] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.dtype.names and item.ndim == 1:
                found[name] = item.dtype.names
        elif columns := _one_dimensional(item):
            found[name] = tuple(columns)

    visit("/", file)
    file.visititems(visit)
    return found


def _one_dimensional(group: Any) -> list[str]:
    import h5py

    return [
        name
        for name, item in group.items()
        if isinstance(item, h5py.Dataset)
        and item.ndim == 1
        and not item.dtype.names
        and "__table_column_meta__" not in name
    ]


def _records(dataset: Any) -> Table:
    from astropy.table import Table

    # astropy knows the units and masks that its own writer keeps beside the records
    return Table.read(dataset.parent, path=dataset.name.rsplit("/", 1)[1], format="hdf5", character_as_bytes=False)


def _columns(group: Any) -> Table:
    from astropy.table import Table

    names = _one_dimensional(group)
    lengths = {name: len(group[name]) for name in names}
    if len(set(lengths.values())) > 1:
        common = max(lengths.values())
        odd = next(name for name, n in lengths.items() if n != common)
        raise CatalogError(f"column {odd} has {lengths[odd]} values, others {common}; give one number per star")
    table = Table()
    for name in names:
        values = group[name][...]
        if values.dtype.kind == "O":
            values = np.array([v.decode() if isinstance(v, bytes) else str(v) for v in values])
        table[name] = values
        unit = group[name].attrs.get("unit", group[name].attrs.get("units"))
        if unit is not None:
            table[name].unit = unit.decode() if isinstance(unit, bytes) else str(unit)
    return table
