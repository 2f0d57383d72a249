"""A small calibration of the posterior in the parametric case, and the statistics of the large one.

Protocol: 24 mocks of N = 500 stars of the isochrone (M = 1e11 Msun, b = 3 kpc, seeds 601-624), fitted by the model of
`bayespot.models.isochrone` with closed-form actions, one component of f(J) and the guide "laplace". With d the error of
(ln M, ln b) and S its posterior covariance, the sum of d S^-1 d over the mocks follows chi^2 of 48 degrees of freedom
if the posteriors are right. The bounds below are passed with probability 0.999; posteriors too narrow or too wide by a
factor of two fail with probability above 0.999 each (the sum is four times larger or smaller). The campaign itself is
tests/benchmarks/calibration.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bayespot.models import isochrone
from scipy.stats import chi2

from bayespot import Catalog, FitConfig, Isochrone, fit
from bayespot.actions import IsochroneActions
from bayespot.mock import Equilibrium

N_MOCKS, N_STARS, TRUTH = 24, 500, (1e11, 3.0)
#: Cramer-Rao floor of ln M and ln b with f(J) free, times sqrt(N).
FLOOR = np.array([0.92, 1.38])
LOW, HIGH = chi2.ppf([0.0005, 0.9995], 2 * N_MOCKS)


@pytest.fixture(scope="module")
def errors_and_covariances() -> tuple[np.ndarray, np.ndarray]:
    """Errors of the posterior mean of (ln M, ln b), and posterior covariances."""
    system = Equilibrium(Isochrone(*TRUTH))
    errors, covariances = [], []
    for seed in range(601, 601 + N_MOCKS):
        catalog = Catalog(system.sample(N_STARS, seed))
        model = isochrone.build(catalog)
        model.finder = IsochroneActions()
        # nothing here uses k-hat, which takes a likelihood per draw
        result = fit(model, catalog, FitConfig(seed=seed, n_components=1, guide="laplace", k_hat_draws=1))
        draws = torch.stack([result.draws["potential.m_tot"], result.draws["potential.r_s"]], -1).log().numpy()
        errors.append(draws.mean(0) - np.log(TRUTH))
        covariances.append(np.cov(draws.T))
    return np.array(errors), np.array(covariances)


def misfit(errors: np.ndarray, covariances: np.ndarray) -> float:
    """The sum of d S^-1 d."""
    return float(np.einsum("mi,mij,mj->", errors, np.linalg.inv(covariances), errors))


def test_parametric_posterior_is_calibrated(errors_and_covariances):
    assert LOW < misfit(*errors_and_covariances) < HIGH


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_factor_of_two_in_the_width_would_be_seen(errors_and_covariances, factor):
    errors, covariances = errors_and_covariances
    assert not LOW < misfit(errors, factor**2 * covariances) < HIGH


def test_parametric_width_is_the_bound(errors_and_covariances):
    """The posterior sd of ln M and ln b, root mean square over the mocks, within 25 % of the Cramer-Rao floor."""
    _, covariances = errors_and_covariances
    sd = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2).mean(0))
    np.testing.assert_allclose(sd, FLOOR / N_STARS**0.5, rtol=0.25)


@pytest.fixture(scope="module")
def campaign():
    path = Path(__file__).parents[1] / "benchmarks" / "calibration.py"
    spec = importlib.util.spec_from_file_location("calibration_campaign", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_coverage_from_ranks(campaign):
    """Central bands hold the share of all possible ranks that their level says, to one rank in 500."""
    rank = np.arange(campaign.N_RANKS + 1)
    for level in campaign.LEVELS:
        assert campaign.covered(rank, level).mean() == pytest.approx(level, abs=2 / (campaign.N_RANKS + 1))


def test_statistics_of_a_known_posterior(campaign):
    """200 exact Gaussian posteriors of truths drawn from them: coverage within 4 binomial sd, rms z within 0.2."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        mean, sd = generator.normal(size=(2, 1))
        draws, truth = (mean + abs(sd) * generator.normal(size=(k, 1)) for k in (campaign.N_RANKS, 1))
        rows.append({"fields": {"x": campaign.statistics(draws, truth[0])}})
    found = campaign.summarise(rows, "x")
    for level in campaign.LEVELS:
        error = (level * (1 - level) / len(rows)) ** 0.5
        assert found[f"in_{100 * level:.0f}"]["mean"] == pytest.approx(level, abs=4 * error)
    assert found["rms_z"]["mean"] == pytest.approx(1.0, abs=0.2)


def test_simultaneous_band(campaign):
    """Histograms of uniform ranks stay inside in 94 to 99 % of 2000 new simulations (95 aimed at; counts are whole)."""
    low, high = campaign.simultaneous_band(60, 10)
    counts = np.random.default_rng(1).multinomial(60, np.full(10, 0.1), 2000)
    assert 0.94 <= ((counts >= low) & (counts <= high)).all(1).mean() <= 0.99


def test_stars_of_the_prior_have_the_actions_drawn(campaign):
    """The mocks of case ``prior`` are stars of their own potential: J(w) is the J that was sampled (1e-5 of L + J_r).

    The same seed gives the same stars, and the model that is fitted has priors that no data moved.
    """
    model = campaign.prior_model({})
    catalog, truth, values = campaign.prior_truth(model, 300, 7)
    again, *_ = campaign.prior_truth(model, 300, 7)
    assert torch.equal(catalog.w, again.w)
    J = truth.df.sample(300, 7 + 1_000_000)
    with torch.no_grad():
        found = truth.finder.actions_angles(truth.potential, catalog.w).J
    size = J[:, 0] + J[:, 1].abs() + J[:, 2]
    assert float(((found - J).abs().amax(-1) / size).max()) < 1e-5
    resolved = model.df.resolved(2, J)
    assert {n: p.base_dist.loc.tolist() for n, p in resolved._pyro_samples.items()} == {
        n: p.base_dist.loc.tolist() for n, p in model.df._pyro_samples.items()
    }
    assert set(values) == set(model.sites())


def test_radii_hold_their_share_of_the_tracers(campaign):
    """Radii of a Plummer sphere from the closed form of its mass, 1e-9."""
    r = campaign.tracer_radii(campaign.MOCKS["plummer-in-core"].tracers)
    np.testing.assert_allclose((1 + (0.7 / r) ** 2) ** -1.5, campaign.FRACTIONS, rtol=1e-9)


def test_rows_survive_a_crash(campaign, tmp_path, capsys):
    """A line cut short costs its own seed only, and the next row begins on a new line."""
    path = tmp_path / "rows.jsonl"
    campaign.append(path, {"seed": 1})
    path.write_text(path.read_text() + '{"seed": 2, "fie')
    campaign.append(path, {"seed": 3})
    assert [row["seed"] for row in campaign.read_rows(path)] == [1, 3]
    assert "damaged" in capsys.readouterr().err
