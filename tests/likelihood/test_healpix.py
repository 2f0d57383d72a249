"""Selection functions tabulated on HEALPix pixels, and those of gaiaunlimited.

Pixels are compared with astropy-healpix, directions with astropy's frames, tables with the functions that they were
made from, and the normalisation of a selection with the kept fraction of a sample. gaiaunlimited's own classes are
used where it is installed (their data by hand, as its files are large); the stand-ins here have the same traps.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import astropy_healpix
import numpy as np
import pytest
import torch
import xarray as xr
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy_healpix.healpy import nest2ring, ring2nest
from scipy.special import expit, logit

from bayespot.actions import IsochroneActions
from bayespot.catalog.frame import galactocentric_w
from bayespot.df import SphericalMixture
from bayespot.likelihood import Chain, GalacticLatitude, Healpix, from_gaiaunlimited
from bayespot.likelihood.chain import rotate
from bayespot.likelihood.healpix import pixel_of
from bayespot.likelihood.normalisation import FixedPoints
from bayespot.mock import mock
from bayespot.potential import Isochrone
from bayespot.pyro_modules import freeze

ERRORS_PAGE = Path(__file__).parents[2] / "docs" / "howto" / "errors.md"
EDGES = np.arange(10.0, 20.01, 0.5)


def star(coords: SkyCoord, distance=5.0) -> torch.Tensor:
    """Stars at rest in these directions, as Galactocentric w."""
    icrs = coords.icrs
    values = {"ra": icrs.ra.deg, "dec": icrs.dec.deg, "distance": distance + 0 * icrs.ra.deg}
    still = dict.fromkeys(("pmra", "pmdec", "radial_velocity"), 0 * icrs.ra.deg)
    return galactocentric_w({name: torch.as_tensor(np.array(v)) for name, v in (values | still).items()})


def everywhere(n: int, seed: int = 0) -> SkyCoord:
    x = np.random.default_rng(seed).normal(size=(n, 3))
    return SkyCoord(np.arctan2(x[:, 1], x[:, 0]) * u.rad, np.arctan2(x[:, 2], np.hypot(x[:, 0], x[:, 1])) * u.rad)


def sky(coords: SkyCoord) -> np.ndarray:
    """A smooth function of Galactic latitude and longitude."""
    galactic = coords.galactic
    return 0.5 + 0.3 * np.sin(galactic.b.rad) + 0.2 * np.cos(galactic.l.rad) * np.cos(galactic.b.rad)


def faint(coords: SkyCoord, gmag: np.ndarray) -> np.ndarray:
    return sky(coords) * expit((17.0 - gmag) / 0.8)


@pytest.mark.parametrize("nside", [1, 2, 8, 64, 1024, 2**15])
def test_pixels_are_those_of_astropy_healpix(nside):
    """20 000 directions, poles, the axes and the corner of a cap (a little off: edges are anybody's), in any length."""
    x = np.random.default_rng(nside).normal(size=(20_000, 3))
    x[:200, :2] *= 1e-8
    special = np.concatenate([np.eye(3), -np.eye(3), [[1.0, 0.0, 2 / 5**0.5]]])
    special += np.array([3e-10, 1e-10, 2e-10])
    x = np.concatenate([x, special, [[0.3, -1e-300, 0.1]]])
    lon, lat = np.arctan2(x[:, 1], x[:, 0]), np.arctan2(x[:, 2], np.hypot(x[:, 0], x[:, 1]))
    expected = astropy_healpix.lonlat_to_healpix(lon * u.rad, lat * u.rad, nside)
    assert np.array_equal(pixel_of(torch.as_tensor(x) * 7.3, nside).numpy()[:-1], expected[:-1])
    # a longitude that rounds to 360 deg
    assert 0 <= int(pixel_of(torch.as_tensor(x[-1:]), nside)) < 12 * nside**2


@pytest.mark.parametrize("frame", ["icrs", "galactic"])
@pytest.mark.parametrize("nest", [False, True])
def test_stars_fall_into_their_pixels(frame, nest):
    """A map of pixel numbers, read at stars of known coordinates, is astropy's number of each star's pixel."""
    coords = everywhere(500)
    own = coords.transform_to(frame).spherical
    order = "nested" if nest else "ring"
    expected = astropy_healpix.lonlat_to_healpix(own.lon, own.lat, 16, order=order)
    selection = Healpix(np.arange(12 * 16**2) / (12 * 16**2), frame, nest)
    assert np.allclose(selection(star(coords)) * 12 * 16**2, expected)


def test_the_error_of_the_table_is_what_it_says():
    """Mean error against 4000 other stars within 10 % and falling as 1 / nside; oversampling leaves no bias of sharp
    edges; a table of what is constant in the pixels has none."""
    found = {nside: Healpix.tabulate(sky, nside) for nside in (8, 32)}
    coords = everywhere(4000, 5)
    for selection in found.values():
        own = np.abs(selection(star(coords)).numpy() - sky(coords)).mean()
        assert selection.error.mean == pytest.approx(own, rel=0.1)
        assert selection.error.largest < 12 * selection.error.mean
    assert found[8].error.mean / found[32].error.mean == pytest.approx(4, rel=0.15)
    edge = [Healpix.tabulate(lambda c: (np.abs(c.galactic.b.deg) > 20).astype(float), 4, oversample=k) for k in (1, 16)]
    sizes = [abs(float(s.table.mean()) - (1 - np.sin(np.radians(20)))) for s in edge]
    assert sizes[1] < 0.003 < sizes[0]
    exact = Healpix.tabulate(lambda c: 0.7 + 0 * c.ra.deg, 2)
    assert exact.error[:3] == pytest.approx((0, 0, 0), abs=1e-15)
    assert "error: mean" in repr(found[8])


def test_magnitude_is_distance_for_one_luminosity():
    """S at m = M + 5 log10(100 d): bins, edges, what is outside, and a linear function exactly by interpolation."""
    table = np.tile(np.arange(4) / 4, (12, 1))
    w = star(everywhere(6), np.array([0.9, 1.0 + 1e-9, 1.5, 30.0, 100.0 - 1e-9, 100.0 + 1e-9]))
    # m = 9.77, 10, 10.88, 17.4, 20, 20 for M = 0
    selection = Healpix(table, magnitudes=[10, 12.5, 15, 17.5, 20], absolute_magnitude=0.0)
    assert selection(w).tolist() == [0.0, 0.0, 0.0, 0.5, 0.75, 0.0]
    by_distance = Healpix(table, distances=[1, 10**0.5, 10, 10**1.5, 100], outside=0.125)
    assert by_distance(w).tolist() == [0.125, 0.0, 0.0, 0.5, 0.75, 0.125]
    smooth = Healpix.tabulate(
        lambda c, m: (m - 10) / 10, 1, magnitudes=np.arange(10, 20.1), absolute_magnitude=0.0, interpolate=True
    )
    d = np.linspace(1.3, 78.0, 50)
    assert np.allclose(smooth(star(everywhere(50), d)), (5 * np.log10(100 * d) - 10) / 10)
    assert smooth.error.mean < 0.01 < Healpix.tabulate(faint, 8, "icrs", EDGES, 0.6).error.mean


def test_empty_pixels_never_enter_silently():
    """NaN and UNSEEN are counted and refused; 0, a probability or the coarser pixel's mean where so stated."""
    table = np.full(48, 0.5)
    table[nest2ring(2, np.arange(4))] = [0.2, 0.4, np.nan, -1.6375e30]
    with pytest.raises(ValueError, match=r"2 of 48 pixels have no value: .* empty=0 .* empty='parent'"):
        Healpix(table)
    filled = [Healpix(table, empty=empty).table.sort().values[:4].tolist() for empty in (0, 0.1, "parent")]
    assert np.allclose(filled, [[0, 0, 0.2, 0.4], [0.1, 0.1, 0.2, 0.4], [0.2, 0.3, 0.3, 0.4]])
    bins = np.stack([table, np.full(48, 0.5)], 1)
    bins[:, 1][nest2ring(2, np.arange(4))] = np.nan
    with pytest.raises(ValueError, match=r"4 of 48 pixels have no value \(6 of 96 pixels and bins\)"):
        Healpix(bins, distances=[1, 2, 3])
    with pytest.raises(ValueError, match="4 of 96 pixels and bins have no value even as a mean over a twelfth"):
        Healpix(bins, distances=[1, 2, 3], empty="parent")
    with pytest.raises(ValueError, match="12 of 12 pixels have no value"):
        Healpix.tabulate(lambda c: np.full(len(c), np.nan), 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Healpix(np.ones(13)), r"shape \(13,\); give"),
        (lambda: Healpix(np.full(12, 1.5)), "table has S = 1.5"),
        (lambda: Healpix(np.ones(12), outside=-1.0), "outside has S = -1"),
        (lambda: Healpix(np.ones(12), frame="ecliptic"), "'icrs' or 'galactic', got 'ecliptic'"),
        (lambda: Healpix(np.ones((12, 2)), distances=[1, 2]), r"\(12, 2\) and there are 1 bins"),
        (lambda: Healpix(np.ones((12, 2))), "there are no bins"),
        (lambda: Healpix(np.ones(12), magnitudes=[1, 2]), "absolute_magnitude"),
        (lambda: Healpix(np.ones(12), absolute_magnitude=1.0), "the other way round"),
        (lambda: Healpix(np.ones((12, 1)), distances=[2, 1]), "increasing edges"),
        (lambda: Healpix(np.ones((12, 1)), distances=[1, 2], magnitudes=[1, 2], absolute_magnitude=1), "not both"),
        (lambda: Healpix(np.ones(108), nest=True), "power of 2, got 3"),
        (lambda: Healpix([np.nan] * 12, empty="mean"), "a probability or 'parent', got 'mean'"),
        (lambda: Healpix.tabulate(sky, 3), "nside must be a power of 2"),
        (lambda: Healpix.tabulate(lambda c: 1.0, 1), r"shape \(\) for 12 directions"),
    ],
)
def test_wrong_tables_are_refused(build, message):
    """The message has the value and the remedy."""
    with pytest.raises(ValueError, match=message):
        build()


def population() -> Chain:
    """Isochrone M = 1e11 Msun, b = 3 kpc with a mixture fitted to its actions."""
    potential = Isochrone(m_tot=1e11, r_s=3.0)
    J = IsochroneActions().actions(potential, mock("isochrone", n_stars=2000, seed=3).w)
    df = SphericalMixture(2).resolved(2, J)
    return Chain(potential, freeze(df, df.fit_actions(J, seed=0)), IsochroneActions())


def test_normalisation():
    """Z by a lattice is the kept fraction of 2^14 stars, turned 16 ways: within 4 of its errors and 0.1 %, in a
    product with another selection."""
    selection = Healpix.tabulate(faint, 16, "galactic", EDGES, 2.5, interpolate=True)
    selection = selection * GalacticLatitude(20.0)
    with torch.no_grad():
        chain = population()
        stars = chain.augment(2**14, seed=99)
        s = selection(rotate(stars.w, chain.symmetry, 16, seed=98)).mean(0)
        expected, error = float((stars.weight * s).sum()), float(s.std()) / len(s) ** 0.5
        points = FixedPoints.lattice(chain, selection, 2**12, 7, (1.0, 20.0), n_rotations=32)
        z = float(points.log_z(chain.log_density(points.w)).exp())
        assert 0.05 < expected < 0.5
        assert abs(z - expected) < 4 * error + 0.001 * z, (z, expected, error)


def test_a_table_forgets_what_made_it():
    """Pickled and back it is the same, without the function; evaluation calls nothing."""
    calls = []

    def counted(coords):
        calls.append(len(coords))
        return sky(coords)

    selection = Healpix.tabulate(counted, 8)
    assert sum(calls) == 768 + 2000
    w = star(everywhere(100))
    again = pickle.loads(pickle.dumps(selection))
    assert torch.equal(selection(w), again(w))
    assert sum(calls) == 768 + 2000


class Survey:
    """As gaiaunlimited's DR3SelectionFunction: one-dimensional arrays only, constant beyond the last magnitude."""

    def __init__(self) -> None:
        self.ds = xr.Dataset(coords={"g": np.arange(10.25, 20, 0.5)})

    def query(self, coords, gmag):
        if coords.shape != np.shape(gmag) or coords.ndim != 1 or coords.frame.name != "icrs":
            raise ValueError("Input shape mismatch")
        return faint(coords, np.clip(gmag, 10.25, 19.75))


def counts(level: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Stars of Gaia n and of a subsample k, (n_pix, 4 magnitudes); none of the last, and none in pixel 7."""
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 40, (12 * 4**level, 4))
    n[:, 3], n[7] = 0, 0
    return n, rng.binomial(n, [0.9, 0.6, 0.2, 0.5])


def subsample(level: int = 1, pixels=None) -> xr.Dataset:
    """The dataset of a SubsampleSelectionFunction in G = 10 to 18 by 2: (k + 1) / (n + 2), NaN without stars."""
    n, k = counts(level)
    p = np.where(n > 0, (k + 1) / (n + 2), np.nan)
    dataset = xr.Dataset(
        {
            "logitp": (("ipix", "phot_g_mean_mag_"), logit(p)),
            "n": (("ipix", "phot_g_mean_mag_"), n),
            "k": (("ipix", "phot_g_mean_mag_"), k),
        },
        coords={"ipix": np.arange(len(n)), "phot_g_mean_mag_": [11.0, 13.0, 15.0, 17.0]},
    )
    return dataset if pixels is None else dataset.isel(ipix=pixels)


BINNING = {"healpix": 1, "phot_g_mean_mag": [10, 18, 2]}


def test_a_survey_that_is_queried():
    """The table is the survey within its stated error; beyond its magnitudes it is refused, not repeated."""
    selection = from_gaiaunlimited(Survey(), 0.6, EDGES, nside=16, interpolate=True)
    coords = everywhere(500, 3)
    gmag = np.random.default_rng(4).uniform(10.3, 19.7, 500)
    w = star(coords, 10 ** ((gmag - 0.6) / 5 - 2))
    difference = np.abs(selection(w).numpy() - faint(coords, gmag))
    assert difference.mean() < 1.2 * selection.error.mean < 0.02
    assert float(selection(star(coords[:1], 500.0))) == 0.0
    with pytest.raises(ValueError, match="Survey knows magnitudes 10 to 20 and repeats its last value beyond"):
        from_gaiaunlimited(Survey(), 0.6, np.arange(10, 22.0))
    for arguments in ((0.6,), (None, EDGES)):
        with pytest.raises(ValueError, match="depends on magnitude: give the edges"):
            from_gaiaunlimited(Survey(), *arguments)
    with pytest.raises(ValueError, match="object has no query"):
        from_gaiaunlimited(object())


def test_a_subsample_is_taken_as_it_is():
    """Bins and pixels of the table; those without stars, and pixels that Gaia did not return, are counted."""
    sample = SimpleNamespace(ds=subsample(), hplevel_and_binning=BINNING)
    with pytest.raises(ValueError, match=r"48 of 48 pixels have no value \(49 of 192|48 of 48 pixels .* \(51 of 192"):
        from_gaiaunlimited(sample, 0.0)
    selection = from_gaiaunlimited(sample, 0.0, empty=0.0)
    assert selection.magnitudes.tolist() == [10, 12, 14, 16, 18]
    n, k = counts(1)
    order = ring2nest(2, np.arange(48))
    assert np.allclose(selection.table, np.where(n > 0, (k + 1) / (n + 2), 0.0)[order])
    # a pixel that is not listed, and the row without a pixel that an empty slice leaves behind
    lost = subsample(pixels=np.arange(47))
    lost = xr.concat([lost, lost.isel(ipix=[0]).assign_coords(ipix=[np.nan])], "ipix")
    some = from_gaiaunlimited(SimpleNamespace(ds=lost, hplevel_and_binning=BINNING), 0.0, empty=0.0)
    assert float(some.table.sum()) == pytest.approx(float(selection.table.sum() - selection.table[order == 47].sum()))
    with pytest.raises(ValueError, match=r"46 pixels, which are not all .* reindex"):
        from_gaiaunlimited(SimpleNamespace(ds=subsample(pixels=np.arange(1, 47))), 0.0, empty=0.0)
    with pytest.raises(ValueError, match="bins of its own"):
        from_gaiaunlimited(sample, 0.0, EDGES)


def test_a_colour_is_stated():
    """A third axis needs the stars' value, within the table; the RVS selection lies on Galactic pixels."""
    p = np.random.default_rng(0).uniform(0.1, 0.9, (12, 3, 2))
    dataset = xr.Dataset(
        {"logitp": (("ipix", "g", "c"), logit(p))},
        coords={"ipix": np.arange(12), "g": [5.0, 6.0, 7.0], "c": [0.5, 1.5]},
    )
    rvs = SimpleNamespace(ds=dataset.transpose("c", "ipix", "g"), datafiles={"dr3-rvs-nk.h5": "https://"})
    for colour, i in ((0.3, 0), (1.0 + 1e-9, 1), (2.0, 1)):
        selection = from_gaiaunlimited(rvs, 0.0, at={"c": colour})
        assert np.allclose(selection.table, p[:, :, i])
    assert selection.frame == "galactic"
    assert selection.magnitudes.tolist() == [4.5, 5.5, 6.5, 7.5]
    for at, message in (
        ({}, r"depends on c as well \(0 to 2\): .* at={'c': 1}"),
        ({"c": 2.1}, "outside of the table"),
        ({"c": 1.0, "b": 2.0}, "no axis b; it has c, g"),
    ):
        with pytest.raises(ValueError, match=message):
            from_gaiaunlimited(rvs, 0.0, at=at)


def hierarchical(level: int = 1) -> SimpleNamespace:
    """As SubsampleSelectionFunctionHMLE: lower edges for coordinates, 1/2 where there is no star at all."""
    n, k = counts(level)
    p = np.full((12, 4), (k.sum(0) + 1) / (n.sum(0) + 2))
    for step in range(level + 1):
        nn, kk = (a.reshape(12 * 4**step, -1, 4).sum(1) for a in (n, k))
        p = p if step == 0 else np.repeat(p, 4, 0)
        p = np.where(nn > 0, kk / np.maximum(nn, 1), p)
    with np.errstate(divide="ignore"):
        finest = xr.Dataset(
            {"logitp": (("ipix", "phot_g_mean_mag_"), logit(p)), "n": (("ipix", "phot_g_mean_mag_"), n)},
            coords={"ipix": np.arange(len(n)), "phot_g_mean_mag_": [10.0, 12.0, 14.0, 16.0]},
        )
    return SimpleNamespace(hds=[finest], hplevel_and_binning={"healpix": level, "phot_g_mean_mag": [10, 18, 2]}, p=p)


def test_a_hierarchical_subsample():
    """Its bins are those of its making; a magnitude without any star is empty, a pixel without has its parent's."""
    sample = hierarchical()
    with pytest.raises(ValueError, match=r"48 of 48 pixels have no value \(48 of 192"):
        from_gaiaunlimited(sample, 0.0)
    selection = from_gaiaunlimited(sample, 0.0, empty=0.0)
    order = ring2nest(2, np.arange(48))
    assert np.allclose(selection.table[:, :3], sample.p[order][:, :3])
    assert float(selection.table[:, 3].abs().max()) == 0
    # G = 11.9 is in the first bin
    coords = everywhere(20)
    w = star(coords, 10 ** (11.9 / 5 - 2))
    pixel = astropy_healpix.lonlat_to_healpix(coords.icrs.spherical.lon, coords.icrs.spherical.lat, 2, order="nested")
    assert np.allclose(selection(w), sample.p[pixel, 0])
    with pytest.raises(ValueError, match="holds no data yet"):
        from_gaiaunlimited(SimpleNamespace(hds=[], hplevel_and_binning={}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gaiaunlimited_itself():
    """Its classes on the data of the stand-ins: a table equals its query at 300 stars; the hierarchical query is
    shifted by half a bin; a map of M_10 is queried, its holes counted."""
    pytest.importorskip("gaiaunlimited")
    with contextlib.redirect_stdout(None):
        from gaiaunlimited.selectionfunctions import subsample as theirs
        from gaiaunlimited.selectionfunctions import surveyTCG
    coords, gmag = everywhere(300), np.random.default_rng(1).uniform(10, 16, 300)
    w = star(coords, 10 ** (gmag / 5 - 2))
    plain = theirs.SelectionFunctionBase(subsample())
    selection = from_gaiaunlimited(plain, 0.0, empty=0.0)
    queried = np.nan_to_num(plain.query(coords, phot_g_mean_mag_=gmag))
    assert np.allclose(selection(w), queried)
    hmle = theirs.SubsampleSelectionFunctionHMLE().use(subsample(), BINNING)
    assert np.allclose(expit(hmle.hds[-1]["logitp"]), hierarchical().p)
    ours = from_gaiaunlimited(hmle, 0.0, empty=0.0)
    shifted = hmle.query(coords, hplevel=1, phot_g_mean_mag_=gmag - 1)
    assert np.allclose(ours(w), shifted)
    assert not np.allclose(ours(w), hmle.query(coords, hplevel=1, phot_g_mean_mag_=gmag))
    survey = surveyTCG.DR3SelectionFunctionTCG.__new__(surveyTCG.DR3SelectionFunctionTCG)
    survey.mode, pixels = "hpx7", np.arange(192)
    survey.m10map = np.stack([np.full(192, 2), pixels, 19.5 + 0.005 * pixels], 1)
    table = from_gaiaunlimited(survey, 0.0, np.arange(18, 22.01, 0.25), nside=4, n_check=200)
    faint_stars = star(coords, 10 ** (np.full(300, 20.125) / 5 - 2))
    assert np.allclose(table(faint_stars), survey.query(coords, np.full(300, 20.125)), atol=1e-12)
    survey.m10map = survey.m10map[5:]
    with pytest.raises(ValueError, match="5 of 192 pixels have no value"):
        from_gaiaunlimited(survey, 0.0, np.arange(18, 22.0), nside=4)


def documented(capsys, n_stars: str, end: str) -> dict:
    """Run the page's block with so many stars up to ``end`` and return its names; the table's error was printed."""
    (block,) = re.findall(r"```python\n(.*?)```", ERRORS_PAGE.read_text(), re.S)
    assert "n_stars=8_000" in block
    assert end in block
    names: dict = {}
    exec(block.replace("8_000", n_stars).split(end)[0], names)
    assert (
        "Healpix(nside=32, frame='icrs', 120 bins of magnitude, absolute_magnitude=0.6, error"
        in capsys.readouterr().out
    )
    return names


def test_the_documentation_goes_from_map_to_model(capsys):
    """The page's block up to the fit: the model accepts its catalogue, and Z is the fraction of the stars that its
    selection let through, within 4 binomial standard deviations."""
    names = documented(capsys, "20_000", "posterior = ")
    catalog, model = names["catalog"], names["model"]
    assert torch.equal(model.prepare(catalog), catalog.w)
    with torch.no_grad():
        chain = population()
        points = FixedPoints.lattice(chain, model.selection, 2**12, 7, (1.0, 20.0), n_rotations=32)
        z = float(points.log_z(chain.log_density(points.w)).exp())
    assert 0.1 < z < 0.9
    # the mixture stands for the true density: another 0.5 %
    assert abs(len(catalog) / 20_000 - z) < 4 * (z * (1 - z) / 20_000) ** 0.5 + 0.005


@pytest.mark.slow
def test_the_documentation_goes_from_map_to_fit(capsys):
    """The page's block as it stands: v_c at 8 kpc within 4 posterior sd of the truth."""
    names = documented(capsys, "8_000", "print(posterior")
    v_c = names["posterior"].field("circular_speed", [8.0])
    truth = float(Isochrone(1e11, 3.0).circular_speed(torch.tensor([8.0], dtype=torch.float64))[0])
    assert abs(float(v_c.mean[0]) - truth) < 4 * float(v_c.sd[0])
