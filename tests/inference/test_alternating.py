"""Fits with Gaussian mixtures and trained densities: parametric isochrone, N = 2000, seed 5 (fixture), short training,
actions in closed form.

The truth never enters a fit; tolerances are posterior standard deviations.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bayespot.models import isochrone

from bayespot import FitConfig, Isochrone, Posterior, SnapshotModel, fit
from bayespot.actions import IsochroneActions
from bayespot.catalog import Catalog
from bayespot.df import DiffusionDensity, EnergyDensity, FlowDensity, TrainedDensity, TrainingConfig, density
from bayespot.inference.fit import _Fit
from bayespot.likelihood import Chain, HeliocentricDistance, MeasurementErrors
from bayespot.mock import mock
from bayespot.progress import Progress
from bayespot.report import load_run, save_run

QUICK = FitConfig(seed=1, guide="laplace", n_draws=100, k_hat_draws=20, df_rounds=3)
SHORT = TrainingConfig(steps=100, warm_steps=40, batch_size=512, check_every=20, learning_rate=4e-3)
TRAINED = {"flow": FlowDensity, "diffusion": DiffusionDensity, "energy": EnergyDensity}


def model_with(name: str, catalog) -> SnapshotModel:
    df = TRAINED[name](training=SHORT) if name in TRAINED else density(name)
    return SnapshotModel(isochrone.build(catalog).potential, df, IsochroneActions())


@pytest.mark.parametrize("name", ["gaussian", *TRAINED])
def test_fit_recovers_the_potential(isochrone_stars, name):
    """M and b within 3.5 posterior sd of the truth, whose sd is 0.8 to 1.5 of the Cramer-Rao floor; no star unbound."""
    config = dataclasses.replace(QUICK, n_components=None if name in TRAINED else 2)
    result = fit(model_with(name, isochrone_stars), isochrone_stars, config)
    for site, true, floor in (("m_tot", 1e11, 0.92), ("r_s", 3.0, 1.38)):
        draws = result.draws[f"potential.{site}"].log()
        assert abs(float(draws.mean()) - torch.tensor(true).log()) < 3.5 * float(draws.std()), (name, site)
        assert 0.8 < float(draws.std()) / (floor / 2000**0.5) < 1.5, (name, site)
    assert result.diagnostics.n_unbound == 0
    assert result.diagnostics.df == type(result.model.df).__name__
    if name in TRAINED:
        assert not [site for site in result.draws if site.startswith("df.")]
        assert 1 <= len(result.diagnostics.df_rounds) <= 3
        assert result.diagnostics.gradient_norm < 0.1


@pytest.fixture(scope="module")
def few_stars() -> Catalog:
    """400 stars of the same system, for tests of the machinery."""
    return mock("isochrone", n_stars=400, seed=6)


@pytest.mark.usefixtures("no_figures")
def test_run_folder_keeps_a_trained_density(few_stars, tmp_path):
    """A run with a trained f(J) is saved and read back: the same ln f, the same fields, the rounds in its report."""
    result = fit(model_with("energy", few_stars), few_stars, QUICK)
    save_run(tmp_path / "run", result, few_stars)
    posterior, _, diagnosis = load_run(tmp_path / "run")
    J = IsochroneActions().actions(Isochrone(1e11, 3.0), few_stars.w[:50])
    assert torch.equal(posterior.model.df.log_prob(J), result.model.df.log_prob(J))
    radii = [1.0, 10.0]
    before = Posterior.from_result(result).field("potential", radii).mean
    assert (posterior.field("potential", radii).mean == before).all()
    assert diagnosis["df"] == "EnergyDensity"
    assert diagnosis["df_rounds"][0]["iterations"] > 0
    # step D of the chain: its orbits map to stars of the density that the chain claims
    chain = Chain(Isochrone(1e11, 3.0), result.model.df, IsochroneActions())
    stars = chain.augment(2048, seed=1)
    assert torch.isfinite(chain.log_density(stars.w)).all()
    v2 = (stars.weight[:, None] * stars.w[:, 3:] ** 2).sum()
    assert float(v2 / (few_stars.v**2).sum(-1).mean()) == pytest.approx(1, abs=0.15)


def test_resumed_rounds_are_the_same(few_stars, tmp_path):
    """A fit stopped after the first round and resumed gives the numbers of the uninterrupted one."""
    model = model_with("energy", few_stars)
    config = dataclasses.replace(QUICK, df_rounds=2, n_draws=20, k_hat_draws=5)
    whole = fit(model, few_stars, config)

    class Stopped(Exception):
        pass

    run = _Fit(model, few_stars, config, tmp_path / "checkpoint.pt")

    def save(force: bool = True) -> None:
        _Fit.save(run, force)
        if run.state["rounds"]:
            raise Stopped

    run.save = save
    with Progress(False) as bar, pytest.raises(Stopped):
        run.complete(bar)
    resumed = fit(model, few_stars, config, checkpoint=tmp_path / "checkpoint.pt", resume=True)
    for site, value in whole.draws.items():
        torch.testing.assert_close(resumed.draws[site], value, rtol=1e-10, atol=0)


def test_refusals(isochrone_stars):
    """Selections, errors and the augmented likelihood are refused, and unknown densities, with what to use instead."""
    potential = isochrone.build(isochrone_stars).potential
    for options in (
        {"selection": HeliocentricDistance(1e4)},
        {"errors": MeasurementErrors()},
        {"likelihood": "augmented"},
    ):
        model = SnapshotModel(potential, EnergyDensity(), **options)
        with pytest.raises(ValueError, match="mixture"):
            fit(model, isochrone_stars, QUICK)
    with pytest.raises(ValueError, match="gaussian_lnJ"):
        FitConfig(df="gauss")
    with pytest.raises(ValueError, match="unknown density"):
        density("gauss")
    assert isinstance(density("flow"), TrainedDensity)
