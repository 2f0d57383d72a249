"""Catalogues from tables of the Gaia archive: names, zero point, cuts, distances; and of QTables and data frames."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units as u
from astropy.table import MaskedColumn, QTable, Table

from bayespot import Catalog, CatalogError

N = 60


@pytest.fixture
def archive() -> Table:
    """A table as the archive's client returns it: upper-case identifier, units, masked radial velocities."""
    rng = np.random.default_rng(0)
    parallax = rng.uniform(0.2, 2.0, N)
    table = Table(
        {
            "SOURCE_ID": np.arange(N),
            "ra": rng.uniform(0, 360, N) * u.deg,
            "dec": rng.uniform(-80, 80, N) * u.deg,
            "parallax": parallax * u.mas,
            "parallax_error": np.full(N, 0.1) * u.mas,
            "pmra": rng.normal(0, 5, N) * u.mas / u.yr,
            "pmra_error": np.full(N, 0.05) * u.mas / u.yr,
            "pmdec": rng.normal(0, 5, N) * u.mas / u.yr,
            "radial_velocity_error": np.full(N, 1.0) * u.km / u.s,
            "parallax_pmra_corr": np.full(N, 0.3),
            "ruwe": rng.uniform(0.9, 1.6, N),
            "r_med_geo": 1100 / parallax,
            "r_lo_geo": 1000 / parallax,
            "r_hi_geo": 1300 / parallax,
        }
    )
    table["radial_velocity"] = MaskedColumn(rng.normal(0, 80, N), mask=np.arange(N) < 4, unit=u.km / u.s)
    return table


def test_archive_table(archive):
    """Masked radial velocities are refused by name unless allowed; identifiers, covariances and correlations arrive."""
    with pytest.raises(CatalogError, match="column radial_velocity: 4 of 60"):
        Catalog.from_gaia(archive)
    stars = Catalog.from_gaia(archive, allow_missing=True)
    assert (len(stars), stars.names[7]) == (N, "7")
    assert stars.observed.names[2] == "parallax"
    assert stars.observed.covariance[0, 2, 3] == pytest.approx(0.3 * 0.1 * 0.05)
    assert len(Catalog.from_gaia(archive, drop_invalid=True)) == N - 4
    assert "SOURCE_ID" in archive.colnames  # the caller's table is as it was


def test_zero_point_and_cuts(archive):
    """The zero point is subtracted; the cuts keep exactly the stars that pass, and the notes count the others."""
    plain = Catalog.from_gaia(archive, drop_invalid=True)
    moved = Catalog.from_gaia(archive, drop_invalid=True, parallax_zero_point=-0.03)
    np.testing.assert_allclose(moved.observed.values[:, 2], plain.observed.values[:, 2] + 0.03, rtol=1e-12)
    cut = Catalog.from_gaia(archive, allow_missing=True, max_ruwe=1.4, min_parallax_over_error=5)
    good = (archive["ruwe"] <= 1.4) & (archive["parallax"] >= 0.5)
    assert list(cut.names) == [str(i) for i in archive["SOURCE_ID"][good]]
    assert any("ruwe above 1.4" in note for note in cut.meta["notes"])
    assert any("selection by distance" in note for note in cut.meta["notes"])


def test_distances(archive):
    """Distances in pc with their quantiles: kpc, and half the interval as error; no parallax is left."""
    stars = Catalog.from_gaia(archive, drop_invalid=True, distance="r_med_geo")
    assert stars.observed.names[2] == "distance"
    middle = np.asarray(archive["r_med_geo"])[4:] / 1000
    np.testing.assert_allclose(stars.observed.values[:, 2], middle, rtol=1e-12)
    np.testing.assert_allclose(stars.observed.covariance[:, 2, 2] ** 0.5, middle * 0.3 / 2 / 1.1, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda t: t.remove_column("ruwe"), {"max_ruwe": 1.4}, "missing column ruwe"),
        (lambda t: None, {"max_ruwe": 0.5}, "none of the 60 stars passes"),
        (lambda t: None, {"distance": "r_med_photogeo"}, "missing column r_med_photogeo"),
        (lambda t: None, {"distance": "parallax"}, "_med_"),
        (lambda t: t.add_column(t["ra"], name="RA"), {}, "columns RA and ra both exist"),
        (lambda t: t.remove_column("pmdec"), {}, "missing column pmdec"),
    ],
)
def test_errors(archive, change, options, words):
    """A CatalogError names the column or the cut, and what to do."""
    change(archive)
    with pytest.raises(CatalogError, match=words):
        Catalog.from_gaia(archive, drop_invalid=True, **options)


def test_tables_and_frames(isochrone_stars):
    """A QTable, a Table in other units and a DataFrame give the same catalogue."""
    few = isochrone_stars[:50]
    table = few.to_table()
    parsecs = Table(table)
    for name in "xyz":
        parsecs[name] = table[name].to(u.pc)
    frame = Table({name: table[name].value for name in ("x", "y", "z", "vx", "vy", "vz")}).to_pandas()
    for other in (Catalog.from_table(QTable(table)), Catalog.from_table(parsecs), Catalog.from_dataframe(frame)):
        np.testing.assert_allclose(other.w, few.w, rtol=1e-12)


def test_units_are_doubted(isochrone_stars):
    """Bare parsecs and metres per second draw a doubt with the remedy; light speed is an error; a mock draws none."""
    assert isochrone_stars.doubts() == []
    w = isochrone_stars.w.clone()
    w[:, :3] *= 1000
    (doubt,) = Catalog(w).doubts()
    assert "positions in pc" in doubt
    assert doubt in Catalog(w).summary()
    w[:, 3:] *= 1000
    assert "velocities in m/s" in Catalog(w).doubts()[1]
    table = Catalog(w).to_table()
    table["vx"][3] = 4e5 * u.km / u.s
    with pytest.raises(CatalogError, match=r"of 2000 stars are faster than light.*row 3"):
        Catalog.from_table(table)
