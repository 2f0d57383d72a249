"""Heliocentric columns: the Galactocentric frame, and the 6x6 errors propagated into it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from astropy import coordinates as coord
from astropy import units as u
from astropy.table import MaskedColumn
from contracts.catalog import assert_same, observed_table

from bayespot.catalog import Catalog, CatalogError, Frame, frame
from bayespot.catalog import columns as catalog_columns


@pytest.mark.parametrize("far", ["distance", "parallax"])
def test_heliocentric_against_skycoord(far):
    """Positions and velocities agree with astropy's SkyCoord in the v4.0 frame to 1e-11 relative to the largest."""
    table = observed_table(errors=False)
    if far == "parallax":
        table["parallax"] = 1 / table["distance"]
        table.remove_column("distance")
    stars = Catalog.from_table(table)
    distance = table["distance"] if far == "distance" else 1 / table["parallax"]
    sky = coord.SkyCoord(
        ra=table["ra"] * u.deg,
        dec=table["dec"] * u.deg,
        distance=distance * u.kpc,
        pm_ra_cosdec=table["pmra"] * u.mas / u.yr,
        pm_dec=table["pmdec"] * u.mas / u.yr,
        radial_velocity=table["radial_velocity"] * u.km / u.s,
    )
    with coord.galactocentric_frame_defaults.set("v4.0"):
        found = sky.transform_to(coord.Galactocentric())
    x = found.cartesian.xyz.to_value(u.kpc).T
    v = found.velocity.d_xyz.to_value(u.km / u.s).T
    assert np.allclose(stars.x.numpy(), x, rtol=0, atol=1e-11 * np.abs(x).max())
    assert np.allclose(stars.v.numpy(), v, rtol=0, atol=1e-11 * np.abs(v).max())
    assert stars.covariance is None
    assert stars.names[0] == "4000000000000000000"
    assert stars.meta["frame"]["galcen_distance_kpc"] == 8.122
    assert stars.meta["frame"]["galcen_v_sun_km_s"] == pytest.approx([12.9, 245.6, 7.78], rel=1e-14)


def test_frame_ignores_the_users_default():
    """A different astropy default in force changes nothing: the frame is v4.0 always."""
    table = observed_table(errors=False)
    with coord.galactocentric_frame_defaults.set("pre-v4.0"):
        other = Catalog.from_table(table)
    assert_same(Catalog.from_table(table), other)


def test_heliocentric_units(tmp_path):
    """Columns in radian, pc, deg/Gyr and m/s give the same stars as the defaults, to 1e-12."""
    table = observed_table()
    expected = Catalog.from_table(table)
    defaults = catalog_columns.OBSERVED | {f"{k}_error": v for k, v in catalog_columns.OBSERVED.items()}
    defaults |= {"ra_error": "mas", "dec_error": "mas"}
    other = {"deg": "rad", "mas": "arcsec", "kpc": "pc", "mas/yr": "deg/Gyr", "km/s": "m/s"}
    for name, unit in defaults.items():
        if name in table.colnames:
            table[name] = (np.asarray(table[name]) * u.Unit(unit)).to(other[unit])
    table.write(tmp_path / "a.ecsv")
    for found in (Catalog.from_table(table), Catalog.read(tmp_path / "a.ecsv")):
        assert torch.allclose(found.w, expected.w, rtol=1e-11, atol=1e-11)
        assert torch.allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("far", ["distance", "parallax"])
def test_jacobian_against_differences(far):
    """The closed-form Jacobian against central differences of w, to 1e-6 of each column's largest entry."""
    table = observed_table(errors=False)
    names = ["ra", "dec", far, "pmra", "pmdec", "radial_velocity"]
    if far == "parallax":
        table["parallax"] = 1 / table["distance"]
    values = {name: np.asarray(table[name], dtype=float) for name in names}
    _, jacobian = frame.galactocentric(values)
    for k, name in enumerate(names):
        h = 1e-5 * np.maximum(np.abs(values[name]), 1)
        scale = np.cos(np.radians(values["dec"])) if name == "ra" else 1.0  # that column is by ra cos(dec)
        ahead, _ = frame.galactocentric(values | {name: values[name] + h})
        behind, _ = frame.galactocentric(values | {name: values[name] - h})
        numeric = (ahead - behind) / (2 * h * scale)[:, None]
        error = np.abs(numeric - jacobian[:, :, k]).max(0)
        assert (error <= 1e-6 * np.abs(numeric).max(0) + 1e-9).all(), (name, error)


@pytest.mark.parametrize("far", ["distance", "parallax"])
def test_covariance_against_monte_carlo(far):
    """20 stars, 40 000 draws of the observables each, through SkyCoord: sd to 3 %, correlations to 0.03.

    The sampling error is 0.35 % of sd and 0.005 of a correlation; the errors (1-3 % in distance) leave the
    first-order propagation good to about 1e-3. Median over stars to 1 %.
    """
    n, draws = 20, 40_000
    rng = np.random.default_rng(2)
    table = observed_table(n, seed=3)
    if far == "parallax":
        table["parallax"] = 1 / table["distance"]
        table["parallax_error"] = table["parallax"] * rng.uniform(0.01, 0.02, n)
        table["parallax_pmra_corr"] = rng.uniform(-0.5, 0.5, n)
        table.remove_columns(["distance", "distance_error"])
    # errors of the angles that matter: 0.2 deg moves a star at 8 kpc by 30 pc
    table["ra_error"], table["dec_error"] = table["ra_error"] * 2e4, table["dec_error"] * 2e4
    found = Catalog.from_table(table).covariance.numpy()
    names = ["ra", "dec", far, "pmra", "pmdec", "radial_velocity"]
    for i in range(n):
        mean = np.array([table[name][i] for name in names])
        sd = np.array([table[f"{name}_error"][i] for name in names])
        sd[:2] /= 3.6e6
        correlation = np.eye(6)
        for a, b in (("ra", "dec"), ("pmra", "pmdec"), ("parallax", "pmra")):
            if f"{a}_{b}_corr" in table.colnames:
                j, k = names.index(a), names.index(b)
                correlation[j, k] = correlation[k, j] = table[f"{a}_{b}_corr"][i]
        noise = rng.multivariate_normal(np.zeros(6), correlation * np.outer(sd, sd), draws)
        noise[:, 0] /= np.cos(np.radians(mean[1]))
        ra, dec, d, pmra, pmdec, v_r = (mean + noise).T
        sky = coord.SkyCoord(
            ra=ra * u.deg,
            dec=dec * u.deg,
            distance=(d if far == "distance" else 1 / d) * u.kpc,
            pm_ra_cosdec=pmra * u.mas / u.yr,
            pm_dec=pmdec * u.mas / u.yr,
            radial_velocity=v_r * u.km / u.s,
        )
        with coord.galactocentric_frame_defaults.set("v4.0"):
            g = sky.transform_to(coord.Galactocentric())
        w = np.concatenate([g.cartesian.xyz.to_value(u.kpc), g.velocity.d_xyz.to_value(u.km / u.s)])
        expected = np.cov(w)
        sd_expected, sd_found = np.sqrt(np.diag(expected)), np.sqrt(np.diag(found[i]))
        assert np.allclose(sd_found, sd_expected, rtol=0.03), i
        assert abs(np.median(sd_found / sd_expected) - 1) < 0.01, i
        difference = found[i] / np.outer(sd_found, sd_found) - expected / np.outer(sd_expected, sd_expected)
        assert np.abs(difference).max() < 0.03, i


def test_covariance_is_positive_and_symmetric():
    """Every propagated covariance is symmetric to the bit and positive definite."""
    covariance = Catalog.from_table(observed_table()).covariance
    assert torch.equal(covariance, covariance.mT)
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert float(torch.linalg.eigvalsh(covariance / scale[:, :, None] / scale[:, None, :]).min()) > 0


def test_missing_errors_are_filled_and_noted():
    """NaN errors take the median relative error of their column; the count is in the notes and the summary."""
    table = observed_table()
    relative = np.full(40, 0.02)
    relative[:9] = 0.05
    table["distance_error"] = relative * table["distance"]
    table["distance_error"][[30, 31]] = np.nan
    masked = table.copy()
    masked["distance_error"] = MaskedColumn(masked["distance_error"], mask=np.isnan(masked["distance_error"]))
    filled = table.copy()
    filled["distance_error"][[30, 31]] = 0.02 * filled["distance"][[30, 31]]
    expected = Catalog.from_table(filled)
    for source in (table, masked):
        stars = Catalog.from_table(source)
        assert torch.allclose(stars.covariance, expected.covariance, rtol=1e-12)
        assert stars.meta["notes"] == [
            "2 of 40 missing distance_error replaced by the median relative error, 0.02",
        ]
        assert "note: 2 of 40 missing distance_error" in stars.summary()
    # a proper motion near zero does not come out exact
    table["pmra"][5], table["pmra_error"][5] = 0.0, np.nan
    assert float(torch.linalg.eigvalsh(Catalog.from_table(table).covariance[5]).min()) > 0
    table["pmra_error"] = np.nan
    with pytest.raises(CatalogError, match=r"pmra_error has no finite value in 40 rows; remove"):
        Catalog.from_table(table)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("pmra_error", -0.1, r"pmra_error: row 7 .*negative; correct"),
        ("pmra_pmdec_corr", 1.2, r"pmra_pmdec_corr: row 7 .*1\.2; correct"),
    ],
)
def test_impossible_errors(column, value, message):
    """A negative error and a correlation above 1 name the column and the row of the input, also after dropping."""
    table = observed_table()
    table[column][7] = value
    with pytest.raises(CatalogError, match=message):
        Catalog.from_table(table)
    table["ra"][2] = np.nan
    with pytest.raises(CatalogError, match=message):
        Catalog.from_table(table, drop_invalid=True)


def test_impossible_correlations():
    """Correlations that no covariance can have are refused with the first row."""
    table = observed_table()
    for pair, c in {"ra_dec": 0.9, "ra_pmra": 0.9, "dec_pmra": -0.9}.items():
        table[f"{pair}_corr"] = np.where(np.arange(40) == 11, c, 0.0)
    with pytest.raises(CatalogError, match=r"\*_corr: row 11 .*eigenvalue"):
        Catalog.from_table(table)


# --- one's own Sun


OWN = Frame(r_sun=8.34, z_sun=0.027, v_sun=(11.1, 251.5, 7.3))


def test_own_frame_against_skycoord(tmp_path):
    """R0, z_sun and v_sun of one's own agree with astropy's Galactocentric of the same; they stay with the file."""
    table = observed_table()
    stars = Catalog.from_table(table, frame=OWN)
    sky = coord.SkyCoord(
        ra=table["ra"] * u.deg,
        dec=table["dec"] * u.deg,
        distance=table["distance"] * u.kpc,
        pm_ra_cosdec=table["pmra"] * u.mas / u.yr,
        pm_dec=table["pmdec"] * u.mas / u.yr,
        radial_velocity=table["radial_velocity"] * u.km / u.s,
    )
    own = coord.Galactocentric(
        galcen_coord=coord.ICRS(ra=266.4051 * u.deg, dec=-28.936175 * u.deg),
        galcen_distance=8.34 * u.kpc,
        z_sun=27 * u.pc,
        galcen_v_sun=coord.CartesianDifferential([11.1, 251.5, 7.3] * u.km / u.s),
    )
    found = sky.transform_to(own)
    np.testing.assert_allclose(stars.x, found.cartesian.xyz.to_value(u.kpc).T, atol=1e-10)
    np.testing.assert_allclose(stars.v, found.velocity.d_xyz.to_value(u.km / u.s).T, atol=1e-8)
    assert stars.meta["frame"]["galcen_distance_kpc"] == 8.34
    assert stars.frame == stars.observed.frame == stars[3:7].observed.frame == OWN
    assert Frame.of(own) == OWN
    assert_same(Catalog.from_table(table, frame=own), stars)
    np.testing.assert_allclose(Catalog.from_skycoord(sky, frame=OWN).w, stars.w, atol=1e-8)
    np.testing.assert_allclose(Catalog.from_skycoord(found).w, stars.w, atol=1e-8)
    assert Catalog.from_skycoord(found).frame == OWN
    assert abs(OWN.sun[0] + 8.34) < 1e-3
    assert OWN.sun[2] == pytest.approx(0.027)
    for suffix in ("csv", "fits", "ecsv"):
        stars.write(tmp_path / f"a.{suffix}")
        again = Catalog.read(tmp_path / f"a.{suffix}")
        assert_same(again, stars)
        assert again.observed.frame == OWN
    with pytest.raises(CatalogError, match=r"disagree.*or give the frame"):
        Catalog.read(tmp_path / "a.csv", frame=Frame())


def test_samples_within_errors_use_the_frame():
    """Where a star may be, in its own frame: at zero errors exactly where it is."""
    from bayespot.likelihood import MeasurementErrors

    stars = Catalog.from_table(observed_table(), frame=OWN)
    placed = MeasurementErrors().place(stars, torch.zeros(40, 1, 6, dtype=torch.float64))
    torch.testing.assert_close(placed[:, 0, :6], stars.w, rtol=1e-9, atol=1e-9)


def test_impossible_frames():
    """What cannot be the Sun's place or motion is named with its value and unit."""
    for given, words in (
        ({"r_sun": 8122}, "r_sun = 8122 kpc"),
        ({"z_sun": 20.8}, "z_sun = 20.8 kpc"),
        ({"v_sun": (1, 2)}, "v_sun = "),
        ({"v_sun": (12, float("nan"), 7)}, "three numbers"),
    ):
        with pytest.raises(CatalogError, match=words):
            Frame(**given)
    with pytest.raises(CatalogError, match=r"frame = 8\.1 is no Galactocentric frame; give Frame"):
        Catalog.from_table(observed_table(), frame=8.1)


def test_frame_of_galactocentric_columns():
    """x y z stay as they are; the frame is recorded, and a note says so."""
    table = Catalog.from_table(observed_table(errors=False)).to_table()
    table.meta.clear()
    stars = Catalog.from_table(table, frame=OWN)
    assert torch.equal(stars.w, Catalog.from_table(table).w)
    assert stars.frame == OWN
    assert "the frame is recorded, and changes nothing" in stars.meta["notes"][0]


def test_negative_parallaxes_are_kept():
    """With allow_missing a negative parallax with an error stays as observed; w has a place holder; files keep it."""
    table = observed_table()
    table["parallax"], table["parallax_error"] = 1 / table["distance"], 0.05
    table.remove_columns(["distance", "distance_error"])
    table["parallax"][[4, 9]] = [-0.03, 0.0]
    with pytest.raises(CatalogError, match=r"column parallax: 2 of 40 .*allow_missing=True"):
        Catalog.from_table(table)
    stars = Catalog.from_table(table, allow_missing=True)
    assert len(stars) == 40
    assert stars.observed.values[[4, 9], 2].tolist() == [-0.03, 0.0]
    assert "2 of 40 stars have no positive parallax, and are kept" in stars.meta["notes"][0]
    again = Catalog.from_table(stars.to_table(), allow_missing=True)
    assert torch.equal(again.observed.values[:, 2], stars.observed.values[:, 2])
    table["parallax_error"][4] = 0.0
    with pytest.raises(CatalogError, match="column parallax: 1 of 40"):
        Catalog.from_table(table, allow_missing=True)


def test_wrong_constructor():
    """What another constructor takes: its name."""
    import pandas as pd
    from galpy.orbit import Orbit

    table = observed_table()
    for call, given, right in (
        (Catalog, table, r"Catalog.from_table\(table\)"),
        (Catalog, pd.DataFrame({"x": [1.0]}), "Catalog.from_dataframe"),
        (Catalog, "stars.csv", r"Catalog.read\(path\)"),
        (Catalog.from_table, table.to_pandas(), "Catalog.from_dataframe"),
        (Catalog.from_table, {"x": [1.0]}, r"astropy.table.Table\(columns\)"),
        (Catalog.from_dataframe, table, r"Catalog.from_table\(table\)"),
        (Catalog.from_gaia, table.to_pandas(), "Catalog.from_dataframe"),
        (Catalog.from_table, coord.SkyCoord(1 * u.deg, 2 * u.deg), "Catalog.from_skycoord"),
        (Catalog.from_table, Orbit(), r"Catalog.from_skycoord\(orbit.SkyCoord\(\)\)"),
        (Catalog.from_table, 3, "takes a Table or QTable, got int"),
        (Catalog.from_skycoord, coord.SkyCoord(1 * u.deg, 2 * u.deg), "no velocities"),
    ):
        with pytest.raises(CatalogError, match=right):
            call(given)


def test_orbit_of_galpy():
    """galpy's frame is left-handed: by way of its SkyCoord x and vx change sign, all else stays."""
    from galpy.orbit import Orbit

    orbit = Orbit([1.5, 0.1, 1.1, 0.1, 0.2, 0.3], ro=8.0, vo=220.0, zo=0.0208)
    stars = Catalog.from_skycoord(orbit.SkyCoord(), check_offset=False)
    assert stars.frame.r_sun == pytest.approx(8.0, rel=1e-4)
    expected = [-orbit.x(), orbit.y(), orbit.z(), -orbit.vx(), orbit.vy(), orbit.vz()]
    np.testing.assert_allclose(stars.w[0], np.ravel(expected), rtol=1e-3, atol=0.05)
