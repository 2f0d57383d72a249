"""Every bad catalogue gets an error that names the column, the rows or the file, and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import MaskedColumn, QTable, Table
from contracts.catalog import META, SUFFIXES, assert_refused, cartesian_table, observed_table, phase_space

from bayespot.catalog import Catalog, CatalogError
from bayespot.catalog.columns import CARTESIAN
from bayespot.mock import mock


def test_missing_column():
    """The message lists what is missing from the closest set, what there is, and how many rows."""
    table = cartesian_table()
    table.remove_column("vz")
    assert_refused(
        table, "missing column vz of the Galactocentric set", "50 rows with columns x, y, z, vx, vy;", "rename"
    )
    table = observed_table()
    table.remove_columns(["distance", "pmdec"])
    assert_refused(
        table, r"missing columns distance \(or parallax\), pmdec of the heliocentric set", "columns source_id, ra"
    )
    table = observed_table(errors=False)
    table["x"] = 1.0  # one Galactocentric name among Gaia's does not change the set
    table.remove_column("radial_velocity")
    assert_refused(table, "missing column radial_velocity of the heliocentric set")
    assert_refused(Table({"a": [1.0]}), "missing columns x, y, z, vx, vy, vz", "this table of 1 rows with columns a;")


@pytest.mark.parametrize("name", ["x", "vx"])
def test_wrong_unit(name):
    """A wrong physical type names the column, its unit and the unit that is needed."""
    table = cartesian_table()
    table[name].unit = u.mas
    assert_refused(table, f"column {name} has unit mas", f"turned into {CARTESIAN[name]}", "convert or correct")
    table = observed_table()
    table["pmra_error"].unit = u.km / u.s
    assert_refused(table, "column pmra_error has unit km / s", "mas/yr")


def test_unknown_unit_in_fits(tmp_path):
    """A unit that astropy does not know is an error about that column, not a warning or an unreadable file."""
    hdu = fits.table_to_hdu(cartesian_table())
    hdu.columns["y"].unit = "furlong"
    hdu.writeto(tmp_path / "a.fits")
    with pytest.raises(CatalogError, match=r"a\.fits: column y has unit furlong"):
        Catalog.read(tmp_path / "a.fits")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "masked"])
def test_invalid_values(tmp_path, bad):
    """NaN, infinite and masked values: the column, how many, the first row, the remedy; which works, and is noted."""
    table = cartesian_table()
    if bad == "masked":
        table["vy"] = MaskedColumn(table["vy"], mask=np.isin(np.arange(50), [13, 20]))
    else:
        table["vy"][[13, 20]] = bad
    parts = ("column vy: 2 of 50 values", "first in row 13", "drop_invalid=True")
    assert_refused(table, *parts)
    assert_refused(QTable(table), *parts)
    stars = Catalog.from_table(table, drop_invalid=True)
    assert np.array_equal(stars.w.numpy(), np.delete(phase_space(), [13, 20], 0))
    assert stars.meta["notes"] == ["2 of 50 rows dropped as invalid"]
    for suffix in ("fits", "ecsv", "csv"):
        path = tmp_path / f"a.{suffix}"
        table.write(path, format="csv" if suffix == "csv" else None)
        with pytest.raises(CatalogError, match=rf"a\.{suffix}: column vy: 2 of 50 .*row 13"):
            Catalog.read(path)
        assert len(Catalog.read(path, drop_invalid=True)) == 48
    table["x"] = np.nan
    assert_refused(table, "none of the 50 rows is usable", drop_invalid=True)


def test_constructor_refuses_invalid_arrays():
    """The constructor refuses wrong shapes and NaN in w or the covariance with the first row."""
    w = phase_space()
    covariance = np.tile(np.eye(6), (50, 1, 1))
    for arguments, message in (
        ((w[:, :5],), r"w must have shape \(n, 6\), got \(50, 5\)"),
        ((w, covariance[:4]), r"covariance must have shape \(50, 6, 6\), got \(4, 6, 6\)"),
        ((w, None, ("a",)), "1 names for 50 stars"),
        ((np.where(np.arange(50)[:, None] == 4, np.nan, w),), r"w: 1 of 50 stars .*row 4"),
        ((w, np.where(np.arange(50)[:, None, None] == 6, np.inf, covariance)), r"covariance: 1 of 50 .*row 6"),
    ):
        with pytest.raises(CatalogError, match=message):
            Catalog(*arguments)


def test_parallax_without_distance():
    """Negative and zero parallaxes: count, first row, remedy; a distance column or drop_invalid cures it."""
    table = observed_table(errors=False)
    table["parallax"] = 1 / table["distance"]
    table["parallax"][[4, 9]] = [-0.3, 0.0]
    assert len(Catalog.from_table(table)) == 40  # the distance column is used
    table.remove_column("distance")
    assert_refused(table, "column parallax: 2 of 40", "row 4", "-0.3", "add a distance column", "drop_invalid=True")
    assert len(Catalog.from_table(table, drop_invalid=True)) == 38


def test_impossible_sky_positions():
    """A distance that is not positive and a declination beyond the pole name the column and the row."""
    table = observed_table()
    table["distance"][3] = -1
    assert_refused(table, "column distance: 1 of 40 values are not positive, the first in row 3")
    table = observed_table()
    table["dec"][8] = 95
    assert_refused(table, "column dec: 1 of 40 values are outside -90 to 90", "row 8", "95")


def test_text_in_a_column(tmp_path):
    """Content that is no number names the column, the row and the content, in any format that can hold it."""
    table = cartesian_table()
    text = [str(value) for value in table["z"]]
    text[17] = "unknown"
    table["z"] = text
    assert_refused(table, "column z: row 17", "'unknown'", "not a number")
    for suffix in ("csv", "ecsv", "parquet", "npz", "fits"):
        path = tmp_path / f"a.{suffix}"
        if suffix == "npz":
            np.savez(path, **{name: np.asarray(table[name]) for name in table.colnames})
        else:
            table.write(path, format="csv" if suffix == "csv" else None)
        with pytest.raises(CatalogError, match=rf"a\.{suffix}: column z: row 17 .*unknown"):
            Catalog.read(path)
    table["z"] = phase_space()[:, :2]
    assert_refused(table, "column z holds arrays of shape", "one number per star")


def test_require():
    """Fewer stars than free parameters: both numbers are in the message."""
    stars = Catalog(phase_space(12))
    stars.require(12)
    with pytest.raises(CatalogError, match=r"12 stars for a model with 15 free parameters; add at least 3"):
        stars.require(15)


def test_all_stars_at_one_point():
    """Zero spread in position or in velocity; also when equal rows pass through the sky's trigonometry."""
    table = cartesian_table()
    for name in "xyz":
        table[name] = 2.0
    assert_refused(table, "all stars are at one point: 50 rows", "x, y, z", "check")
    table = cartesian_table()
    for name in ("vx", "vy", "vz"):
        table[name] = 0.0
    assert_refused(table, "all stars are moving alike: 50 rows", "vx, vy, vz")
    table = observed_table(errors=False)
    for name in ("ra", "dec", "distance"):
        table[name] = table[name][0]
    assert_refused(table, "all stars are at one point: 40 rows")


def test_offset_positions():
    """Stars centred elsewhere (by one spread, here 20 kpc or the Sun's place) are refused; the check can be waived."""
    for n in (10, 100, 1000):
        table = cartesian_table(n)
        table["x"] += 20
        assert_refused(table, f"columns x, y, z: the median position of {n} stars", "kpc from the origin", "Subtract")
        assert len(Catalog.from_table(table, check_offset=False)) == n
    table = cartesian_table(1000)
    table["x"] -= 8.122
    assert_refused(table, "do not look Galactocentric", "check_offset=False")


@pytest.mark.parametrize("name", ["isochrone", "hernquist", "plummer"])
def test_offset_check_spares_mocks(name):
    """300 random sets each of 10, 20 and 100 stars of a mock: the offset check fires for none."""
    stars = mock(name, n_stars=20_000, seed=1)
    rng = np.random.default_rng(0)
    for n in (10, 20, 100):
        for _ in range(300):
            stars[rng.integers(0, len(stars), n)].check_geometry()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.95])
def test_truncated_file(tmp_path, suffix, fraction):
    """A file cut anywhere is refused as truncated, with its name; nothing else is raised."""
    path = tmp_path / f"a.{suffix}"
    Catalog(phase_space(200), meta=META).write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(CatalogError, match=rf"a\.{suffix}: .*(?s:truncated)"):
        Catalog.read(path)


@pytest.mark.parametrize("suffix", ["csv", "ecsv"])
def test_truncated_between_lines(tmp_path, suffix):
    """A text file cut at a line's end, or in its last number, is sound in itself; the stored count tells."""
    path = tmp_path / f"a.{suffix}"
    Catalog(phase_space(200)).write(path)
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[:-50]))
    with pytest.raises(CatalogError, match="150 rows of 200 written; it is truncated"):
        Catalog.read(path)
    path.write_text(text[:-4])  # the last number lacks digits
    with pytest.raises(CatalogError, match=r"(the last line|line 201, the last).*truncated"):
        Catalog.read(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unreadable_file(tmp_path, suffix):
    """An empty file and garbage are refused with the name of the file and a remedy."""
    path = tmp_path / f"a.{suffix}"
    for content in (b"", bytes(range(256)) * 40, b"\x93NUMPY garbage", b"PK\x03\x04 garbage", b"not, a\ntable"):
        path.write_bytes(content)
        with pytest.raises(CatalogError, match=rf"a\.{suffix}.*"):
            Catalog.read(path)
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(CatalogError, match="may be truncated or have the wrong suffix: copy it again or convert it"):
        Catalog.read(path)


def test_no_such_file(tmp_path):
    """A missing path, a folder, an unknown suffix, a table without rows and a FITS image each say so."""
    with pytest.raises(CatalogError, match=r"none\.fits: no such file"):
        Catalog.read(tmp_path / "none.fits")
    with pytest.raises(CatalogError, match="is a folder; give a file"):
        Catalog.read(tmp_path)
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(
        CatalogError, match=r"unknown suffix '\.xlsx'; use one of \.fits, .*\.ecsv, \.csv, \.parquet, \.npz"
    ):
        Catalog.read(tmp_path / "a.xlsx")
    (tmp_path / "a.csv").write_text("x,y,z,vx,vy,vz\n")
    with pytest.raises(CatalogError, match="the table has no rows"):
        Catalog.read(tmp_path / "a.csv")
    fits.PrimaryHDU(np.zeros((3, 3))).writeto(tmp_path / "image.fits")
    with pytest.raises(CatalogError, match="no table in this FITS file"):
        Catalog.read(tmp_path / "image.fits")
