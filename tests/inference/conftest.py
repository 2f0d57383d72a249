"""What several tests of flattened galaxies share."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.actions import bound_stars
from pyro.distributions import LogNormal

from bayespot import SnapshotModel
from bayespot.df import ActionMixture
from bayespot.inference.latent import LatentSpace
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
