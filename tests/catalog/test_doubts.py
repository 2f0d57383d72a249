"""What is said of stars that can be read: units, a moving system, copies, sentinels, stars too fast to belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from astropy import units as u
from contracts.catalog import cartesian_table, observed_table

from bayespot import Catalog, CatalogError
from bayespot.catalog.columns import CARTESIAN
from bayespot.mock import mock


@pytest.fixture(scope="module")
def stars() -> Catalog:
    """800 stars of the isochrone, M = 1e11 Msun, b = 3 kpc."""
    return mock("isochrone", n_stars=800, seed=1)


def changed(stars: Catalog, row: int, column: str, value: float) -> Catalog:
    w = stars.w.clone()
    w[row, list(CARTESIAN).index(column)] = value
    return Catalog(w)


@pytest.mark.parametrize(
    "name", ["isochrone-radial", "hernquist-in-logarithmic", "dwarf-in-nfw", "hernquist-in-galaxy"]
)
def test_mocks_draw_no_doubts(name):
    """No doubt about the mock systems that come nearest to the limits: 30 samples of 50, 100 and 1000 stars."""
    whole = mock(name, n_stars=4000, seed=1)
    for n in (50, 100, 1000):
        for seed in range(10):
            assert whole.subsample(n, seed).doubts() == [], (n, seed)


@pytest.mark.parametrize("name", ["globular_clusters", "satellites"])
def test_real_systems_draw_no_doubts(name):
    """Nor about the Milky Way's clusters and satellites; their notes are those of missing errors alone."""
    real = Catalog.example(name)
    assert real.doubts() == []
    assert all("missing" in note for note in real.meta["notes"])


@pytest.mark.parametrize(
    ("length", "speed", "unit"),
    [
        (1 / 8, 1 / 220, "galpy's internal units"),
        (1, 1 / 977.792, "kpc and kpc/Myr"),
        (50, 1.0227, "pc (with km/s or pc/Myr)"),
    ],
)
def test_units_by_plausibility(length, speed, unit):
    """A halo in other units: one doubt, that gives the orbital time and names the unit."""
    w = mock("hernquist-in-galaxy", n_stars=300, seed=1).w * torch.tensor([length] * 3 + [speed] * 3)
    (doubt,) = Catalog(w).doubts()
    for words in ("Gyr for an orbit", f"are the columns in {unit}", "Give the units in the file"):
        assert words in doubt


def test_bulk_velocity(stars):
    """40 km/s are many standard errors: the columns, the velocity and the remedy; so for 1 kpc; 1 km/s is nothing."""
    w = stars.w.clone()
    w[:, 4] += 40
    (doubt,) = Catalog(w).doubts()
    for words in ("columns vx, vy, vz", "standard errors from zero", "subtract the system's bulk velocity", "v_sun"):
        assert words in doubt
    assert doubt in Catalog(w).summary()
    w = stars.w.clone()
    w[:, 0] += 2
    (doubt,) = Catalog(w).doubts()
    assert "columns x, y, z" in doubt
    assert "subtract the system's centre" in doubt
    w = stars.w.clone()
    w[:, 4] += 1
    assert Catalog(w).doubts() == []
    w[:, 0] += 20  # one side of a system, whose motion is no bulk velocity
    assert not any("bulk" in doubt for doubt in Catalog(w).doubts())


def test_copies(stars):
    """Rows equal to rounding, and rows of one source_id: which, and drop_duplicates keeps the first of each."""
    table = stars[:100].to_table()
    names = [str(4 * 10**18 + i) for i in range(100)]
    again = table[[3, 7, 7]]
    for name in CARTESIAN:
        again[name] = np.float32(again[name].value).astype(float) * again[name].unit
    from astropy.table import vstack

    both = vstack([table, again])
    (doubt,) = Catalog.from_table(both).doubts()
    for words in (
        "3 of 103 rows repeat a star",
        "row 100 that of row 3",
        "row 102 that of row 7",
        "drop_duplicates=True",
    ):
        assert words in doubt
    kept = Catalog.from_table(both, drop_duplicates=True)
    assert torch.equal(kept.w, stars.w[:100])
    assert "3 of 103 rows dropped as copies of others" in kept.meta["notes"]
    assert kept.doubts() == []
    table["source_id"] = [*names[:99], names[5]]
    (doubt,) = Catalog.from_table(table).doubts()
    assert f"row 99 that of row 5 ({names[5]})" in doubt
    assert Catalog.from_table(table, drop_duplicates=True).names == tuple(names[:99])
    table["source_id"] = ["halo", "disc"] * 50  # groups, not stars
    assert Catalog.from_table(table).doubts() == []


@pytest.mark.parametrize("value", [-999.0, -9999.0, 9999.0, 1e10])
def test_sentinels(value):
    """A velocity of -999 in one row: the column, the row, the value."""
    table = cartesian_table(200)
    table["vz"][13] = value
    if value == 1e10:
        with pytest.raises(CatalogError, match=r"faster than light.*row 13"):
            Catalog.from_table(table)
        return
    (note,) = Catalog.from_table(table).meta["notes"]
    assert note.startswith(f"column vz: 1 of 200 values are {value:g}, the first in row 13 (counting from 0)")
    assert "leave the cells empty or drop the rows" in note
    sky = observed_table()
    sky["radial_velocity"][5] = value
    assert any("radial_velocity: 1 of 40" in note for note in Catalog.from_table(sky).meta["notes"])


def test_honest_nines_and_repeats():
    """99.9 km/s among others, data rounded to one digit and equal errors are no sentinels."""
    table = cartesian_table(300)
    for name in CARTESIAN:
        table[name] = np.round(table[name], 1)
        table[f"{name}_error"] = 2.0
    table["vz"][7] = 99.9
    assert "notes" not in Catalog.from_table(table).meta


def test_repeated_values_and_zero_errors():
    """One velocity for many stars, and errors of 0 beside others, are named."""
    table = cartesian_table(300)
    table["vx"][20:30] = 0.0
    table["vy_error"] = np.where(np.arange(300) == 40, 0.0, 2.0)
    repeated, zero = Catalog.from_table(table).meta["notes"]
    assert repeated.startswith("column vx: 10 of 300 values are 0, the first in row 20")
    assert zero.startswith("column vy_error: 1 of 300 values are 0, the first in row 40")
    assert "leave the error empty" in zero


@pytest.mark.parametrize("value", [600.0, -998.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_one_star_too_fast(stars, value, quantile):
    """One star at 600 km/s, or one at -998, is named wherever it is; the mass that it asks for is given."""
    r = torch.linalg.vector_norm(stars.x, dim=-1)
    row = int((r - r.quantile(quantile)).abs().argmin())
    (doubt,) = changed(stars, row, "vz", value).doubts()
    for words in ("1 of 800 stars are too fast for the mass that binds the others", f"row {row} with", "times"):
        assert words in doubt


def test_fast_within_its_error(stars):
    """A star whose velocity is that uncertain is not named."""
    fast = changed(stars, 5, "vz", 600.0)
    covariance = torch.zeros(800, 6, 6, dtype=torch.float64)
    covariance[:, 3:, 3:] = torch.eye(3) * 300.0**2
    assert Catalog(fast.w, covariance).doubts() == []


def test_contaminants(stars):
    """1 % of stars at three times the escape speed are all found, and no other."""
    rng = np.random.default_rng(3)
    rows = rng.choice(800, 8, replace=False)
    w = stars.w.clone()
    direction = rng.normal(size=(8, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    r = torch.linalg.vector_norm(w[rows, :3], dim=-1).numpy()
    escape = np.sqrt(2 * 4.300917e-6 * 1e11 / (3 + np.sqrt(9 + r**2)))
    w[rows, 3:] = torch.as_tensor(direction * 3 * escape[:, None])
    (doubt,) = Catalog(w).doubts()
    assert doubt.startswith("8 of 800 stars are too fast")


def test_copies_of_a_large_catalogue_are_quick():
    """1e5 stars in seconds."""
    import time

    big = Catalog(torch.randn(100_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100)
    start = time.process_time()
    big.doubts()
    assert time.process_time() - start < 5


def test_quantities_are_not_marks():
    """Units do not matter to the marks: they are looked for in the numbers of the file."""
    table = cartesian_table(100)
    table["vz"].unit = u.m / u.s
    table["vz"] *= 1000
    table["vz"][8] = -9999
    assert Catalog.from_table(table).doubts() == []
