"""Tables of stars for the tests of catalogues, and what those tests assert again and again."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from astropy import coordinates as coord
from astropy import units as u
from astropy.table import Table

from bayespot.catalog import Catalog, CatalogError
from bayespot.catalog.columns import CARTESIAN

SUFFIXES = ["fits", "fit", "ecsv", "csv", "parquet", "npz"]


#: JSON with everything that a header card, a comment or a YAML string could trip over.
META = {
    "truth": {
        "potential": {"name": "Isochrone", "m_tot": 1e11, "r_s": 3.0000000000000004},
        "tracers": {"name": "Plummer", "r_s": [1, 2.5, None]},
        "beta": 0.0,
        "seed": 7,
        "exact": True,
    },
    "notes": ["it's 'quoted' \"twice\"", "ends with & ", "a # b, c: {d}", "two\nlines\tand ω Cen"] + ["'" * 70] * 3,
    "source": "long " * 200,
}


def phase_space(n: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 6)) * [5, 5, 5, 100, 100, 100]


def cartesian_table(n: int = 50, seed: int = 0) -> Table:
    return Table(dict(zip(CARTESIAN, phase_space(n, seed).T, strict=True)))


def observed_table(n: int = 40, seed: int = 0, errors: bool = True) -> Table:
    """Stars around the Galactic centre as Gaia would list them, without units."""
    rng = np.random.default_rng(seed)
    w = phase_space(n, seed)
    galactocentric = coord.Galactocentric(
        *(w[:, :3].T * u.kpc),
        **dict(zip(("v_x", "v_y", "v_z"), w[:, 3:].T * u.km / u.s, strict=True)),
        **coord.galactocentric_frame_defaults.get_from_registry("v4.0")["parameters"],
    )
    sky = galactocentric.transform_to(coord.ICRS())
    table = Table(
        {
            "source_id": np.arange(n) + 4_000_000_000_000_000_000,
            "ra": sky.ra.deg,
            "dec": sky.dec.deg,
            "distance": sky.distance.kpc,
            "pmra": sky.pm_ra_cosdec.to_value(u.mas / u.yr),
            "pmdec": sky.pm_dec.to_value(u.mas / u.yr),
            "radial_velocity": sky.radial_velocity.to_value(u.km / u.s),
        }
    )
    if errors:
        table["ra_error"] = rng.uniform(10, 50, n)
        table["dec_error"] = rng.uniform(10, 50, n)
        table["distance_error"] = rng.uniform(0.01, 0.03, n) * table["distance"]
        table["pmra_error"] = rng.uniform(0.05, 0.3, n)
        table["pmdec_error"] = rng.uniform(0.05, 0.3, n)
        table["radial_velocity_error"] = rng.uniform(0.5, 5, n)
        table["pmra_pmdec_corr"] = rng.uniform(-0.8, 0.8, n)
        table["ra_dec_corr"] = rng.uniform(-0.8, 0.8, n)
    return table


def assert_same(a: Catalog, b: Catalog) -> None:
    assert torch.equal(a.w, b.w)
    assert (a.covariance is None) == (b.covariance is None)
    assert a.covariance is None or torch.equal(a.covariance, b.covariance)
    assert a.names == b.names
    assert a.meta == b.meta


def assert_refused(table: Table, *parts: str, **options) -> None:
    with pytest.raises(CatalogError) as found:
        Catalog.from_table(table, **options)
    for part in parts:
        assert re.search(part, str(found.value)), f"{part!r} is not in: {found.value}"
