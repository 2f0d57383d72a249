"""Tables of the Gaia archive: names, zero point, quality cuts and distances."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bayespot.catalog.columns import CatalogError

if TYPE_CHECKING:
    from astropy.table import Table


def gaia_columns(
    table: Table,
    parallax_zero_point: float = 0.0,
    min_parallax_over_error: float | None = None,
    max_ruwe: float | None = None,
    distance: str | None = None,
) -> Table:
    """Return the table with the columns that a catalogue needs, as `bayespot.catalog.Catalog.from_gaia` says."""
    from astropy import units as u
    from astropy.table import Table as PlainTable

    found = PlainTable(table)
    for name in list(found.colnames):
        if name != name.lower():
            if name.lower() in found.colnames:
                raise CatalogError(f"columns {name} and {name.lower()} both exist; remove one of them")
            found.rename_column(name, name.lower())
    notes = []
    keep = np.ones(len(found), dtype=bool)
    if max_ruwe is not None:
        keep &= _numbers(found, "ruwe") <= max_ruwe
        notes.append(f"{len(found) - keep.sum()} of {len(found)} stars have ruwe above {max_ruwe:g} and are left out")
    if min_parallax_over_error is not None:
        before = keep.sum()
        keep &= _numbers(found, "parallax") >= min_parallax_over_error * _numbers(found, "parallax_error")
        notes.append(
            f"{before - keep.sum()} of {before} stars have parallax / parallax_error below "
            f"{min_parallax_over_error:g} and are left out; the cut is a selection by distance"
        )
    if not keep.any():
        raise CatalogError(f"none of the {len(found)} stars passes the cuts; relax max_ruwe or min_parallax_over_error")
    found = found[keep]
    if parallax_zero_point and distance is None:
        zero = (parallax_zero_point * u.mas).to_value(found["parallax"].unit or u.mas)
        found["parallax"] = found["parallax"] - zero
        notes.append(f"the zero point {parallax_zero_point:g} mas was subtracted from the parallaxes")
    if distance is not None:
        _take_distance(found, distance)
        notes.append(f"distances from {distance}, with half its 68 % interval as error")
    found.meta["notes"] = [*found.meta.get("notes", []), *notes]
    return found


def _take_distance(table: Table, stem: str) -> None:
    """Replace the parallax by a distance in kpc from columns in pc (unless they have another unit)."""
    from astropy import units as u

    if "_med_" not in stem:
        raise CatalogError(f"distance must name a median with _med_ in it, such as r_med_geo; got {stem!r}")
    kpc = {}
    for name in (stem, stem.replace("_med_", "_lo_"), stem.replace("_med_", "_hi_")):
        unit = u.Unit(table[name].unit) if name in table.colnames and table[name].unit else u.pc
        kpc[name] = (_numbers(table, name) * unit).to_value(u.kpc)
    middle, low, high = kpc.values()
    table.remove_columns([c for c in table.colnames if c.startswith("parallax") or "_parallax_" in c])
    table["distance"], table["distance_error"] = middle * u.kpc, (high - low) / 2 * u.kpc


def _numbers(table: Table, name: str) -> np.ndarray:
    """Return a column as floats, masked values as NaN."""
    if name not in table.colnames:
        raise CatalogError(f"missing column {name}; the table has {', '.join(table.colnames)}: add it to the query")
    return np.ma.filled(np.ma.asarray(table[name]).astype(float), np.nan)
