"""Derivatives of single stars' ln p with a selection and with measurement errors, where f(J) enters twice.

Isochrone M = 1e11 Msun, b = 3 kpc, with priors; closed-form actions, f(J) of two components at its best fit.
"""

from __future__ import annotations

import pytest
import torch
from bayespot.models import isochrone
from contracts.latent import check_scores

from bayespot import MassSlopeNetwork, SnapshotModel, SphericalMixture
from bayespot.actions import IsochroneActions
from bayespot.catalog import Catalog
from bayespot.inference.latent import LatentSpace
from bayespot.likelihood import HeliocentricDistance, MeasurementErrors, Outliers
from bayespot.mock import mock, observe
from bayespot.potential import DirectNetwork, Isochrone


def space_of(catalog: Catalog, true: Catalog, **options) -> tuple[LatentSpace, torch.Tensor, torch.Tensor]:
    """Latents of a survey's model near the truth, its points laid, and the stars as the likelihood sees them."""
    plain = isochrone.build(catalog.without_errors())
    J = IsochroneActions().actions(Isochrone(1e11, 3.0), true.w)
    df = plain.df.resolved(2, J)
    model = SnapshotModel(plain.potential, df, finder=IsochroneActions(), **options)
    values = {f"df.{name}": value for name, value in df.fit_actions(J, 0).items()} | {
        "potential.m_tot": torch.tensor(1.05e11).double(),
        "potential.r_s": torch.tensor(3.2).double(),
    }
    if model.selection is not None:
        model = model.select_at(values, catalog, 2048, 0)
    space = LatentSpace(model)
    return space, space.vector(values), model.prepare(catalog, 0)


def test_scores_under_a_selection():
    """Stars within 10 kpc of the Sun: scores, in which Z has its part, add up to the gradient."""
    whole = mock("isochrone", n_stars=400, seed=3)
    selection = HeliocentricDistance(10.0)
    catalog = whole[selection(whole.w) > 0.5]
    check_scores(*space_of(catalog, whole, selection=selection))


def test_scores_with_errors():
    """Four samples a star within 10 % in distance: scores of the mean over them add up to the gradient."""
    true = mock("isochrone", n_stars=60, seed=4)
    catalog = observe(true, distance_error=0.1, seed=1)
    check_scores(*space_of(catalog, true, errors=MeasurementErrors(n_samples=4)))


@pytest.mark.parametrize("kind", ["network", "isochrone", "sticks", "direct"])
def test_log_prior_is_that_of_the_sites(isochrone_stars, kind):
    """Normal sites as one vector, others one by one, factors: the sum over the model's sites with the Jacobian, and its
    gradient, at a random u; NaN is refused."""
    w = isochrone_stars.w[:200]
    potential = {
        "isochrone": isochrone.build(isochrone_stars).potential,
        "direct": DirectNetwork(10.0, 25.0, width=4),
    }.get(kind, MassSlopeNetwork.for_stars(w, n_features=5))
    df = SphericalMixture(weights="stick_breaking" if kind == "sticks" else "logistic_normal")
    J = torch.rand(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 300
    model = SnapshotModel(potential, df.resolved(3, J), outliers=Outliers()).with_outliers(w)
    space = LatentSpace(model)
    u = space.vector({name: prior.sample() for name, prior in space.priors.items()}).requires_grad_()
    expected = model.log_prior(space.values(u))
    for name, part in space.slices.items():
        raw, transform = u[part].reshape(space.shapes[name]), space.transforms[name]
        expected = expected + transform.log_abs_det_jacobian(raw, transform(raw)).sum()
    found = space.log_prior(u)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    slopes = [torch.autograd.grad(value, u)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="within the support"):
        space.log_prior(u.detach() * torch.nan)
