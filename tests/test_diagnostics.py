"""ArviZ 0.20 to 1.x behind one interface: files of either are read by both, and every number is what it is defined as.

No torch here: `python -m pytest --noconftest -o addopts= tests/test_diagnostics.py` runs where there is none.
`tests/data/posterior-arviz-0.nc` and `-1.nc` were written by `_written` below with ArviZ 0.23.4 and 1.3.0.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bayespot import diagnostics

DATA = Path(__file__).parent / "data"


def _written():
    """Posterior of a scalar and a vector site in two chains, statistics, a field of radius and a predictive check."""
    rng = np.random.default_rng(7)
    draws = {"potential.ln_mass": rng.normal(size=60), "df.weights": rng.normal(size=(60, 3))}
    weights = {"log_weights": rng.normal(size=60)}
    data = diagnostics.to_inference_data(draws, weights, {"seed": 7}, n_chains=2)
    predictive = {"counts": rng.poisson(10.0, size=(60, 4))}
    diagnostics.with_predictive(data, {"counts": np.array([9, 11, 10, 8])}, predictive, {"p_value_counts": 0.4})
    return data, draws, weights, predictive


@pytest.mark.parametrize("name", ["posterior-arviz-0.nc", "posterior-arviz-1.nc", "own"])
def test_files_of_either_version(name, tmp_path):
    """Draws, statistics, chains, attributes and predictive groups are those that were written, bit by bit."""
    data, draws, weights, predictive = _written()
    path = DATA / name
    if name == "own":
        path = tmp_path / "posterior.nc"
        diagnostics.save_netcdf(data, path)
    found = diagnostics.load_netcdf(path)
    for group, wanted in (("posterior", draws), ("sample_stats", weights), ("posterior_predictive", predictive)):
        arrays = diagnostics.posterior_arrays(found, group)
        assert arrays.keys() == wanted.keys()
        for site, value in wanted.items():
            np.testing.assert_array_equal(arrays[site], value)
    assert found["posterior"].sizes["chain"] == 2
    assert found.attrs["seed"] == 7
    assert found["posterior_predictive"].attrs["p_value_counts"] == 0.4
    np.testing.assert_array_equal(found["observed_data"]["counts"], [9, 11, 10, 8])
    assert diagnostics.posterior_arrays(found, "no_such_group") == {}
    # the same without ArviZ
    for group, wanted in (("posterior", draws), ("sample_stats", weights), ("no_such_group", {})):
        arrays = diagnostics.stored_arrays(path, group)
        assert arrays.keys() == wanted.keys()
        for site, value in wanted.items():
            np.testing.assert_array_equal(arrays[site], value)


def test_fields_and_repeated_checks():
    """Fields of radius come with units and the radii as coordinate; a second check replaces the first."""
    data, draws, *_ = _written()
    one = diagnostics.to_inference_data(draws)
    field = SimpleNamespace(draws=np.arange(120.0).reshape(60, 2), unit="km / s")
    diagnostics.with_fields(one, {"r": np.array([1.0, 8.0])}, {"circular_speed": field})
    speed = one["posterior"]["circular_speed"]
    assert speed.attrs["unit"] == "km / s"
    assert float(speed.sel(r=8.0)[0, 5]) == 11.0
    np.testing.assert_array_equal(diagnostics.posterior_arrays(one)["df.weights"], draws["df.weights"])
    diagnostics.with_predictive(data, {"angles": np.ones(3)}, {"angles": np.zeros((60, 1))}, {})
    assert list(data["posterior_predictive"].data_vars) == ["angles"]
    assert "posterior" not in diagnostics.no_inference_data()


def test_damaged_file(tmp_path):
    """A file that is missing or cut is named, with what to do."""
    readers = (diagnostics.load_netcdf, diagnostics.stored_arrays)
    for read in readers:
        with pytest.raises(ValueError, match=r"no\.nc: no such file.*fit again"):
            read(tmp_path / "no.nc")
    whole = (DATA / "posterior-arviz-1.nc").read_bytes()
    (tmp_path / "cut.nc").write_bytes(whole[: len(whole) // 3])
    for read in readers:
        with pytest.raises(ValueError, match=r"cut\.nc: not a readable NetCDF.*fit again"):
            read(tmp_path / "cut.nc")


def test_smoothed_weights():
    """Weights of equal tails keep their sum and order; k is small for a wide guide, large for a narrow one."""
    z = np.random.default_rng(0).normal(size=4000)
    wide = (-0.5 * (z / 1.0) ** 2) - (-0.5 * (z / 1.1) ** 2)
    narrow = -(1 / 3.0**2 - 1) * z**2 / 2
    smoothed, k = diagnostics.psis(wide + 5.0)
    assert k < 0.3
    assert np.logaddexp.reduce(smoothed) == pytest.approx(np.logaddexp.reduce(wide + 5.0))
    assert diagnostics.psis_k_hat(narrow) > 0.6
    assert math.isnan(diagnostics.psis_k_hat(wide[:10]))
    assert diagnostics.psis_k_hat(np.where(z > 3, np.inf, wide)) == math.inf


def test_weight_fraction_and_chains():
    """Equal weights are all effective, one of four a quarter; r-hat and ESS of independent and of split chains."""
    assert diagnostics.weight_fraction(np.full(50, 3.0)) == pytest.approx(1.0)
    assert diagnostics.weight_fraction(np.array([0.0, -1e3, -1e3, -1e3])) == pytest.approx(0.25)
    x = np.random.default_rng(1).normal(size=(2, 2000, 2))
    r_hat, ess = diagnostics.chain_statistics(x)
    assert r_hat < 1.01
    assert 3000 < ess < 5000
    x[1, :, 1] += 3.0
    r_hat, ess = diagnostics.chain_statistics(x)
    assert r_hat > 1.5
    assert ess < 20


def test_compare_by_leave_one_out():
    """A normal model against one shifted by half an sd: elpd to 1 % of the closed form, its difference positive.

    300 draws of the mean's posterior given n stars; each star's leave-one-out density is N(mean of the others,
    1 + 1/n).
    """
    rng = np.random.default_rng(2)
    y = rng.normal(size=400)
    mean = y.mean() + rng.normal(size=(300, 1)) / np.sqrt(len(y))

    def log_p(shift: float) -> np.ndarray:
        return -0.5 * (y - mean - shift) ** 2 - 0.5 * np.log(2 * np.pi)

    rows = diagnostics.compare_loo({"right": log_p(0.0), "shifted": log_p(0.5)})
    others = (y.sum() - y) / (len(y) - 1)
    exact = (-0.5 * (y - others) ** 2 / (1 + 1 / len(y)) - 0.5 * np.log(2 * np.pi * (1 + 1 / len(y)))).sum()
    assert rows["right"]["elpd"] == pytest.approx(exact, abs=1.0)
    pointwise = log_p(0.0).mean(0) - log_p(0.5).mean(0)
    assert rows["right"]["elpd_diff"] == 0.0
    assert rows["shifted"]["elpd_diff"] == pytest.approx(pointwise.sum(), rel=0.05)
    assert rows["shifted"]["dse"] == pytest.approx(np.sqrt(len(y)) * pointwise.std(), rel=0.05)
    assert rows["right"]["weight"] > 0.9
    assert rows["right"]["bad_k"] == 0.0
    single = diagnostics.compare_loo({"only": log_p(0.0)})["only"]
    assert (single["weight"], single["elpd_diff"]) == (1.0, 0.0)


def test_what_is_kept_does_not_change_with_what_was_given():
    """Draws are copied: torch frees the memory of a tensor that is sent to another process, whoever views it."""
    draws = np.arange(6.0).reshape(6, 1)
    data = diagnostics.to_inference_data({"a": draws}, {"lp": draws[:, 0]})
    draws[:] = np.nan
    assert np.array_equal(np.asarray(data["posterior"]["a"]).ravel(), np.arange(6.0))
    assert np.array_equal(np.asarray(data["sample_stats"]["lp"]).ravel(), np.arange(6.0))
