"""Predictive checks of axisymmetric models: statistics of known stars, and replicas of a flattened logarithmic halo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyro.distributions import LogNormal

from bayespot import Catalog, Posterior, SnapshotModel
from bayespot.actions import StaeckelFudge
from bayespot.df import ActionMixture
from bayespot.posterior import cylindrical_profiles, posterior_predictive
from bayespot.posterior.predictive import Replicator
from bayespot.potential import Logarithmic
from bayespot.pyro_modules import freeze
from bayespot.report import plots

STATISTICS = {
    "counts", "heights", "mean_v_phi", "sigma_R", "sigma_phi", "sigma_z", "directions", "planes", "angles",
}  # fmt: skip
HALO = Logarithmic(200.0, 1.0, 0.8)


def test_profiles_of_known_stars():
    """Two bins by hand, to rounding; a bin with one star has no dispersion; a star on the axis has no azimuth."""
    w = np.array(
        [
            [2.0, 0.0, 0.5, 30.0, 40.0, 5.0],  # v_R = 30, v_phi = 40
            [0.0, -1.0, -3.0, 10.0, -20.0, 7.0],  # v_R = 20, v_phi = 10
            [3.0, 4.0, 0.1, 3.0, 4.0, -1.0],  # v_R = 5, v_phi = 0
        ]
    )
    found = cylindrical_profiles(w, np.array([0.0, 3.0, np.inf]), np.array([0.0, 0.3, 1.0, np.inf]))
    assert found["counts"].tolist() == [2, 1]
    assert found["heights"].tolist() == [1, 1, 1]
    assert found["mean_v_phi"][0] == pytest.approx(25)
    assert found["sigma_R"][0] ** 2 == pytest.approx((900 + 400) / 2)
    assert found["sigma_phi"][0] == pytest.approx(15)
    assert found["sigma_z"][0] ** 2 == pytest.approx((25 + 49) / 2)
    assert np.isnan([found[name][1] for name in ("mean_v_phi", "sigma_R", "sigma_phi", "sigma_z")]).all()
    axis = cylindrical_profiles(
        np.array([[0.0, 0.0, 1.0, 2.0, 3.0, 4.0]] * 2), np.array([0.0, 9.0]), np.array([0.0, 9.0])
    )
    assert np.isfinite(np.concatenate(list(axis.values()))).all()


@pytest.fixture(scope="module")
def flattened() -> tuple[SnapshotModel, dict[str, torch.Tensor], Catalog]:
    """A model, the values of its sites, and 300 stars that it replicates with seed 5."""
    v_0 = LogNormal(torch.tensor(200.0).double().log(), torch.tensor(0.01).double())
    generator = torch.Generator().manual_seed(1)
    J = 500 * torch.rand(400, 3, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 2.0, 0.6]).double()
    df = ActionMixture().resolved(1, J)
    model = SnapshotModel(Logarithmic(v_0, 1.0, 0.8), df)
    values = {f"df.{name}": value for name, value in df.fit_actions(J, seed=0).items()}
    values["potential.v_0"] = torch.tensor(200.0).double()
    start = Catalog(torch.rand(300, 6, dtype=torch.float64, generator=generator))
    return model, values, Catalog(Replicator(model, start).draw(values, seed=5).w)


def test_replicas_have_the_models_actions(flattened):
    """The actions of 300 replicated stars, by the fudge: their means are those of f(J) within 4 standard errors."""
    model, values, stars = flattened
    with torch.no_grad():
        J = StaeckelFudge().actions(HALO, stars.w)
    df = freeze(model.df, {name.removeprefix("df."): value for name, value in values.items() if name.startswith("df.")})
    drawn = df.sample(20_000, 0).detach()
    error = (drawn.std(0) / len(J) ** 0.5).numpy()
    assert (np.abs((J.mean(0) - drawn.mean(0)).numpy()) < 4 * error).all()
    # all rotate in the sense of the actions that f(J) was made for
    assert float(J[:, 1].mean()) > 300


def test_check(flattened, monkeypatch):
    """Statistics in R, |z| and cylindrical velocities with their bins. Of the model's stars with v_z doubled sigma_z is
    twice the replicas', its p-value the least that four can give, and the rest is reproduced to 20 %. The figure has a
    panel each."""
    monkeypatch.setattr("bayespot.posterior.predictive.MIN_DRAWS", 4)
    model, values, stars = flattened
    posterior = Posterior(model, {name: value.expand(4, *value.shape).clone() for name, value in values.items()})
    hot = Catalog(stars.w * torch.tensor([1.0, 1, 1, 1, 1, 2]).double())
    found = posterior_predictive(posterior, hot, n_draws=4, seed=2, n_bins=4)
    assert set(found.p_values) == STATISTICS
    assert found.p_values["sigma_z"] == pytest.approx(0.5 / 5)
    for name, factor in (("sigma_z", 2.0), ("sigma_R", 1.0), ("mean_v_phi", 1.0)):
        ratio = found.observed[name][0].mean() / found.replicated[name].mean()
        assert ratio == pytest.approx(factor, rel=0.2), name
    R = np.hypot(*stars.x[:, :2].numpy().T)
    np.testing.assert_allclose(found.r_edges[1:-1], np.quantile(R, [0.25, 0.5, 0.75]))
    assert found.z is not None
    np.testing.assert_allclose(found.z, np.quantile(np.abs(stars.x[:, 2].numpy()), [0.125, 0.375, 0.625, 0.875]))
    assert found.observed["heights"].shape == (4, 4)
    figure = plots.predictive_figure(found)
    labels = [ax.get_xlabel() for ax in figure.axes]
    assert labels[:6] == ["$R$ [kpc]", "$|z|$ [kpc]", *["$R$ [kpc]"] * 4]
    assert sum(ax.axison for ax in figure.axes) == len(STATISTICS)
