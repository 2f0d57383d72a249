"""No public call leaves a trace in its caller's process, not even one that fails.

Before each call the caller has parameters in Pyro's store, random states of its own, a default dtype and filters of
warnings that are not the usual ones; after it all are compared bit by bit.
"""

from __future__ import annotations

import dataclasses
import pickle
import random
import warnings

import numpy as np
import pyro
import pytest
import torch
from bayespot.models import isochrone
from contracts.targets import Here

from bayespot import Catalog, FitConfig, Posterior, SnapshotModel, fit, fit_ensemble, load_run, save_run
from bayespot.actions import IsochroneActions
from bayespot.callers_state import callers_state
from bayespot.df import FlowDensity, SphericalMixture, TrainingConfig, choose_n_components
from bayespot.distill import DistillConfig, distill
from bayespot.inference import FitError
from bayespot.likelihood import MeasurementErrors
from bayespot.mock import mock, observe
from bayespot.posterior import forecast, posterior_predictive
from bayespot.potential import Isochrone

STARS = mock("isochrone", n_stars=170, seed=5)
FEW = STARS[:60]
QUICK = FitConfig(
    seed=1, n_components=1, svi_steps=4, n_draws=50, k_hat_draws=25, nuts_chains=1, nuts_warmup=4, svgd_particles=4,
    svgd_steps=2,
)  # fmt: skip


def model(stars: Catalog) -> SnapshotModel:
    """The built-in isochrone with its actions in closed form, which is quick."""
    return SnapshotModel(isochrone.build(stars).potential, SphericalMixture(), IsochroneActions())


def snapshot() -> dict[str, bytes]:
    """Everything of the process that a call must leave alone."""
    store = pyro.get_param_store()
    return {
        "parameter store": pickle.dumps([(name, store[name].detach().numpy(), id(store[name])) for name in store]),
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "numpy's random state": pickle.dumps(np.random.get_state()),  # noqa: NPY002
        "python's random state": pickle.dumps(random.getstate()),
        "default dtype": repr(torch.get_default_dtype()).encode(),
        "threads": repr(torch.get_num_threads()).encode(),
        "gradient mode": repr(torch.is_grad_enabled()).encode(),
        "warnings filters": repr(warnings.filters).encode(),
        "numpy's errors": repr(np.geterr()).encode(),
    }


@pytest.fixture
def caller():
    """A process with a state of its own: a parameter, seeds, a filter, float64, one thread."""
    with callers_state():
        pyro.get_param_store().clear()
        pyro.param("mine", torch.tensor([1.0, 2.0], dtype=torch.float64))
        pyro.set_rng_seed(77)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="a filter of the caller")
        yield


def unchanged(call) -> None:
    """Call, and compare the state before and after; exceptions are the call's."""
    before = snapshot()
    try:
        call()
    finally:
        after = snapshot()
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"changed: {', '.join(changed)}"


@pytest.fixture(scope="module")
def result():
    return fit(model(FEW), FEW, QUICK)


@pytest.mark.parametrize("guide", ["full_rank", "laplace", "nuts", "svgd"])
def test_fit(caller, guide):
    """Whatever the guide."""
    n_draws = 8 if guide == "nuts" else 50
    unchanged(lambda: fit(model(FEW), FEW, dataclasses.replace(QUICK, guide=guide, df_guide="point", n_draws=n_draws)))


def test_fit_with_a_trained_density(caller):
    """A flow is trained by minibatches, with seeds of its own."""
    flow = FlowDensity(training=TrainingConfig(steps=4, warm_steps=2, check_every=2))
    own = SnapshotModel(isochrone.build(FEW).potential, flow, IsochroneActions())
    unchanged(lambda: fit(own, FEW, dataclasses.replace(QUICK, df_rounds=1, guide="laplace")))


def test_fit_that_fails(caller):
    """A fit that ends in an error, before it starts and within variational inference."""

    def failing():
        light = SnapshotModel(Isochrone(1e6, 3.0), SphericalMixture(), IsochroneActions())
        with pytest.raises(FitError, match="stay unbound"):
            fit(light, FEW, dataclasses.replace(QUICK, adam_steps=1))

    unchanged(failing)


def test_fit_interrupted(caller, monkeypatch):
    """An interrupt in the middle of variational inference, where the seed of the process is set."""
    from bayespot.inference import svi

    def interrupt(seed, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(svi, "step_seed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        unchanged(lambda: fit(model(FEW), FEW, QUICK))


def test_fit_with_a_users_careless_model(caller):
    """A model of the user's that seeds, filters and stores parameters as it is called changes nothing outside."""

    class Careless(SnapshotModel):
        def prepare(self, catalog, seed=0):
            pyro.set_rng_seed(seed)
            pyro.param("theirs", torch.zeros(1))
            torch.set_default_dtype(torch.float32)
            torch.set_num_threads(2)
            warnings.simplefilter("ignore")
            return super().prepare(catalog, seed)

    unchanged(lambda: fit(Careless(isochrone.build(FEW).potential, SphericalMixture(), IsochroneActions()), FEW, QUICK))


def test_same_numbers_whatever_the_callers_state(result):
    """The caller's default dtype and seeds do not enter: the draws are those of the usual state, bit for bit."""
    with callers_state():
        torch.set_default_dtype(torch.float64)
        pyro.set_rng_seed(5)
        pyro.param("potential.m_tot", torch.tensor(1.0))
        again = fit(model(FEW), FEW, QUICK)
    assert torch.equal(again.draws["potential.m_tot"], result.draws["potential.m_tot"])


def test_fit_ensemble(caller):
    """Members in this process."""
    unchanged(lambda: fit_ensemble(model(FEW), FEW, QUICK, 2, jobs=1))


def test_distill(caller, result, tmp_path):
    """Symbolic regression seeds numpy and torch, and filters warnings, as it works."""
    tiny = DistillConfig(budget_epochs=1, searches=1, families=("kepler",), batch_size=40, max_ranked=1, seed=4)
    unchanged(lambda: distill(Posterior.from_result(result), tiny, Here(), catalog=FEW, progress=False))


CALLS = {
    "mock": lambda r, p: mock("isochrone-radial", n_stars=50, seed=1),
    "observe": lambda r, p: observe(STARS, 1),
    "prior": lambda r, p: Posterior.prior(r.model, 10, 0),
    "sample_prior": lambda r, p: r.model.sample_prior(10),
    "initial_values": lambda r, p: r.model.initial_values(),
    "field": lambda r, p: Posterior.from_result(r).field("density", [1.0]),
    "predict": lambda r, p: Posterior.from_result(r).predict([1.0]),
    "summary": lambda r, p: Posterior.from_result(r).summary(),
    "plane": lambda r, p: Posterior.from_result(r).plane("density", n=4),
    "reweighted": lambda r, p: Posterior.from_result(r).reweighted(),
    "to_inference_data": lambda r, p: Posterior.from_result(r).to_inference_data([1.0]),
    "posterior_predictive": lambda r, p: posterior_predictive(Posterior.from_result(r), FEW, 50),
    "forecast": lambda r, p: forecast(model(STARS), STARS).posterior(100, 10, 0),
    "choose_n_components": lambda r, p: choose_n_components(
        SphericalMixture(), torch.linspace(1, 2, 600, dtype=torch.float64).reshape(200, 3), 0, (1, 2)
    ),
    "df.sample": lambda r, p: r.model.at({k: v[0] for k, v in r.draws.items()}).df.sample(10, 0),
    "augment": lambda r, p: r.model.chain({k: v[0] for k, v in r.draws.items()}).augment(64, 0),
    "errors": lambda r, p: MeasurementErrors(n_samples=4).samples(observe(STARS, 1), 0),
    "write and read": lambda r, p: (STARS.write(p / "stars.fits"), Catalog.read(p / "stars.fits")),
    "save and load": lambda r, p: (save_run(p / "run", r, FEW), load_run(p / "run")),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_calls(caller, name, result, tmp_path):
    """Simulation, checks, forecasts, fields, tables, files."""
    unchanged(lambda: CALLS[name](result, tmp_path))


FAILING = {
    "fit_ensemble": lambda r: fit_ensemble(model(FEW), FEW[:3], QUICK, 2, jobs=1),
    "mock": lambda r: mock("isochrone", n_stars=5, seed=0, anisotropy_radius=0.1),
    "observe": lambda r: observe(STARS, 1, v_error=-1.0),
    "field": lambda r: Posterior.from_result(r).field("mass", [1.0]),
    "predict": lambda r: Posterior.from_result(r).predict([-1.0]),
    "reweighted": lambda r: Posterior(r.model, r.draws).reweighted(),
    "posterior_predictive": lambda r: posterior_predictive(Posterior.from_result(r), FEW, 10),
    "forecast": lambda r: forecast(model(STARS), Catalog(STARS.w)),
    "distill": lambda r: distill(Posterior.from_result(r).thinned(2), progress=False),
    "read": lambda r: Catalog.read("no_such_file.csv"),
    "load_run": lambda r: load_run("no_such_run"),
}


@pytest.mark.parametrize("name", FAILING)
def test_calls_that_fail(caller, name, result):
    """The same when they raise."""

    def failing():
        with pytest.raises((ValueError, OSError, RuntimeError)):
            FAILING[name](result)

    unchanged(failing)
