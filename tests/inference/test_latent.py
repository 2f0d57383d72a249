"""Derivatives of single stars' ln p with a selection and with measurement errors, where f(J) enters twice.

Isochrone M = 1e11 Msun, b = 3 kpc, with priors; closed-form actions, f(J) of two components at its best fit.
"""

from __future__ import annotations

import torch
from bayespot.models import isochrone
from contracts.latent import check_scores

from bayespot import SnapshotModel
from bayespot.actions import IsochroneActions
from bayespot.catalog import Catalog
from bayespot.inference.latent import LatentSpace
from bayespot.likelihood import HeliocentricDistance, MeasurementErrors
from bayespot.mock import mock, observe
from bayespot.potential import Isochrone


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
