"""What several tests of flattened galaxies share."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.actions import bound_stars
from pyro.distributions import LogNormal

from bayespot import Catalog, SnapshotModel
from bayespot.df import ActionMixture, LogisticGaussianProcess
from bayespot.inference.latent import LatentSpace
from bayespot.likelihood import MeasurementErrors
from bayespot.likelihood.selection import Custom
from bayespot.potential import NFW, MiyamotoNagai


def near(value):
    return LogNormal(torch.tensor(math.log(value), dtype=torch.float64), 0.5)


@pytest.fixture(scope="session")
def flattened_problem():
    """Latents with f(J) at its start, u and stars.

    150 stars of `contracts.actions.bound_stars` in a Miyamoto & Nagai disc and a halo, both masses and the disc height
    free: no equilibrium, which identities of derivatives do not need.
    """
    w = bound_stars(MiyamotoNagai(5e10, 3.0, 0.3) + NFW(5e11, 20.0), 150, 3)
    model = SnapshotModel(MiyamotoNagai(near(5e10), 3.0, near(0.3)) + NFW(near(5e11), 20.0), ActionMixture())
    values = model.initial_values()
    fixed = model.at(values)
    model.finder = model.finder.settled(fixed.potential, w)
    J = model.finder.capped_actions(fixed.potential, w).J.detach()
    model.df = model.df.resolved(2, J)
    values |= {f"df.{name}": value for name, value in model.df.fit_actions(J, 1).items()}
    model = model.with_outliers(w)
    values["outliers.fraction"] = torch.tensor(0.01, dtype=torch.float64)
    space = LatentSpace(model)
    return space, space.vector(values), w


def _faint(x, v):
    return torch.exp(-((x**2).sum(-1) / 400))


@pytest.fixture(scope="session", params=["complete", "observed"])
def problem(request, flattened_problem):
    """`flattened_problem`, and the same with errors of a tenth of each coordinate in 4 samples, with a selection.

    f(J) is a logistic Gaussian process of low degree, which the potential is not independent of there.
    """
    if request.param == "complete":
        return flattened_problem
    w = bound_stars(MiyamotoNagai(5e10, 3.0, 0.3) + NFW(5e11, 20.0), 150, 3)
    potential = MiyamotoNagai(near(5e10), 3.0, near(0.3)) + NFW(near(5e11), 20.0)
    model = SnapshotModel(
        potential,
        LogisticGaussianProcess(flattened=True, degree=3),
        errors=MeasurementErrors(),
        selection=Custom(_faint, smooth=True, position_only=True),
        selection_sees="true",
    )
    values = model.initial_values()
    noise = torch.randn(len(w), 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    data = torch.cat([w[:, None] * (1 + 0.1 * noise), 0.2 * noise[..., :1]], -1)
    fixed = model.at(values)
    model.finder = model.finder.settled(fixed.potential, w)
    J = model.finder.capped_actions(fixed.potential, w).J.detach()
    model.df = model.df.resolved(1, J, near_data=True)
    values |= {f"df.{name}": value for name, value in model.df.fit_actions(J, 1).items()}
    model = model.with_outliers(w, True)
    values["outliers.fraction"] = torch.tensor(0.01, dtype=torch.float64)
    model = model.select_at(values, Catalog(w), 1000, 2)
    space = LatentSpace(model)
    return space, space.vector(values), data
