"""The built-in models of flattened galaxies: what they are made of, and that their likelihood can be had."""

from __future__ import annotations

import pytest
import torch
from bayespot.models import axisymmetric, disc_and_halo

from bayespot import Catalog, LogisticGaussianProcess
from bayespot.actions import StaeckelFudge
from bayespot.df import AxisymmetricMixture
from bayespot.potential import AxisymmetricNetwork, ExponentialDiscs


@pytest.fixture(scope="module")
def stars() -> Catalog:
    """Forty stars in a box of 6 kpc, with up to 200 km/s."""
    w = torch.rand(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    return Catalog(w * torch.tensor([12.0, 12, 6, 250, 250, 150]).double())


@pytest.mark.parametrize("module", [axisymmetric, disc_and_halo], ids=["axisymmetric", "disc_and_halo"])
def test_models(module, stars):
    """The network alone or with discs, the fudge, a mixture in all actions; with errors a logistic Gaussian process
    that knows the sense of rotation. At a draw of the prior the stars' likelihood is finite."""
    model = module.build(stars)
    assert model.potential.symmetry == "axisymmetric"
    network = model.potential if module is axisymmetric else model.potential.members[0]
    assert isinstance(network, AxisymmetricNetwork)
    assert module is axisymmetric or isinstance(model.potential.members[1], ExponentialDiscs)
    assert isinstance(model.finder, StaeckelFudge)
    assert isinstance(model.df, AxisymmetricMixture)
    assert model.errors is None
    blurred = Catalog(stars.w, covariance=0.01 * torch.eye(6).double().expand(40, 6, 6))
    other = module.build(blurred)
    assert isinstance(other.df, LogisticGaussianProcess)
    assert other.errors is not None
    J = 500 * torch.rand(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.df = model.df.resolved(1, J)
    values = {name: value[0] for name, value in model.sample_prior(1, seed=3).items()}
    values |= {f"df.{name}": value for name, value in model.df.fit_actions(J, seed=0).items()}
    values |= {f"potential.{name}": value for name, value in model.potential.initial_values().items()}
    with torch.no_grad():
        ln_p = model.at(values).density().log_prob(stars.w)
    assert torch.isfinite(ln_p).all()
