"""The climb with linear actions, on the stars of `flattened_problem`."""

from __future__ import annotations

import math

import torch
from contracts.actions import bound_stars
from pyro.distributions import LogNormal

from bayespot import FitConfig, SnapshotModel
from bayespot.actions import SphericalActions
from bayespot.actions.response import Response
from bayespot.df import ActionMixture
from bayespot.inference.latent import LatentSpace, whitening
from bayespot.inference.linearised import (
    AtFixedActions,
    Linearised,
    Responder,
    _LinearActions,
    gauss_newton,
    responds,
)
from bayespot.inference.optimise import lbfgs
from bayespot.inference.spherical_start import spherical_start
from bayespot.potential import NFW, AxisymmetricNetwork, ExponentialDisc, MiyamotoNagai
from bayespot.pyro_modules import freeze
from bayespot.units import G


def near(value):
    return LogNormal(torch.tensor(math.log(value), dtype=torch.float64), 0.5)


def ignore(u, note):
    """Take no notice of progress."""


def test_gradient_and_second_order(problem):
    """Value and gradient are exact at the place; beside it the value is wrong by the square of the distance."""
    space, u, w = problem
    near_u = Linearised(space, u, w, Responder(space, u, w))
    value, slope = near_u.gradient(u, w)
    expected, expected_slope = space.gradient(u, w)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-4, atol=1e-3)
    direction = torch.zeros_like(u)
    direction[: space.n_potential] = torch.tensor([0.02, -0.03, 0.02], dtype=torch.float64)
    miss = [
        abs(float(near_u.gradient(u + part * direction, w)[0] - space.log_posterior(u + part * direction, w)))
        for part in (0.25, 0.125)
    ]
    assert miss[0] < 0.2 * abs(float(space.log_posterior(u + 0.25 * direction, w) - expected))
    assert miss[1] < 0.4 * miss[0]
    # of f(J) and of the fraction of outliers it is exact
    other = torch.zeros_like(u)
    other[space.n_potential :] = 0.05
    torch.testing.assert_close(near_u.gradient(u + other, w)[0], space.log_posterior(u + other, w))


def test_linear_actions():
    """J and the excess energy after a step, of known arrays; J stays positive, the excess is never negative."""
    w = torch.arange(12.0, dtype=torch.float64).reshape(2, 6)
    J, excess = torch.tensor([[1.0, -2.0, 3.0], [2.0, 5.0, 1.0]]).double(), torch.tensor([0.1, 0.0]).double()
    of_J = torch.tensor([[[1.0], [2.0]], [[-8.0], [0.5]]]).double()
    known = Response(J, excess, of_J, torch.tensor([[0.4], [-0.2]]).double())
    found = _LinearActions([(w, known)], torch.tensor([0.5]).double()).capped_actions(NFW(5e11, 20.0), w)
    expected = torch.tensor([[1.5, -2.0, 4.0], [2 * math.exp(-2), 5.0, 1.25]]).double()
    torch.testing.assert_close(found.J, expected)
    torch.testing.assert_close(found.excess, torch.tensor([0.3, 0.0]).double())


def test_fisher_by_responses(problem):
    """The information by responses is that by differences, to the derivative of the focal distance."""
    space, u, w = problem
    plain = space.fisher(u, w, 1000, 0)
    by_responses = space.fisher(u, w, 1000, 0, responder=Responder(space, u, w))
    C = whitening(plain)
    whitened = C.T @ by_responses @ C
    assert float((whitened - torch.eye(len(u))).abs().max()) < 0.1


def test_climb_reaches_the_maximum(flattened_problem):
    space, u, w = flattened_problem
    top, _, _ = gauss_newton(space, u, w, 0.05, 20, ignore, 1000)
    assert float(space.log_posterior(top, w)) > float(space.log_posterior(u, w)) + 1
    rest, *_ = lbfgs(space, top, w, space.fisher(top, w, 1000, 0), 0.05, 60, ignore)
    assert float(space.log_posterior(rest, w)) < float(space.log_posterior(top, w)) + 5


def test_at_fixed_actions(problem):
    """f(J) and the outliers alone: exact, and the potential does not move."""
    space, u, w = problem
    fixed = AtFixedActions(space, u, w)
    at = u.clone()
    at[space.n_potential :] += 0.05
    value, slope = fixed.gradient(at, w)
    expected, expected_slope = space.gradient(at, w)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope[space.n_potential :], expected_slope[space.n_potential :], rtol=1e-6, atol=1e-6)
    assert not slope[: space.n_potential].any()


def test_responses_of_the_same_stars_are_kept(flattened_problem):
    """Of a view of all stars, as blocks are, too; not of others."""
    space, u, w = flattened_problem
    responder = Responder(space, u, w)
    first = responder(w)
    assert responder(w.split(len(w))[0]) is first
    part = responder(w[:10])
    assert part is not first
    torch.testing.assert_close(part.J, first.J[:10])


def test_what_responds(flattened_problem):
    space, _, _ = flattened_problem
    assert responds(space)
    sphere = SnapshotModel(NFW(near(5e11), 20.0), ActionMixture())
    assert not responds(LatentSpace(sphere))
    assert not responds(LatentSpace(SnapshotModel(sphere.potential, ActionMixture(), SphericalActions())))


def test_spherical_start():
    """The network and the disc together have the mass of the sphere that the stars feel, and bind them."""
    w = bound_stars(MiyamotoNagai(5e10, 3.0, 0.3) + NFW(5e11, 20.0), 200, 4)
    disc = ExponentialDisc(near(5e8), 2.6, 0.3)
    model = SnapshotModel(AxisymmetricNetwork.for_stars(w) + disc, ActionMixture())
    values = spherical_start(model, model.initial_values(), w, FitConfig(), ignore)
    alone = SnapshotModel(AxisymmetricNetwork.for_stars(w), ActionMixture())
    sphere = spherical_start(alone, alone.initial_values(), w, FitConfig(), ignore)
    r = torch.linalg.vector_norm(w[:, :3], dim=-1).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    total = freeze(alone.potential, {k.removeprefix("potential."): v for k, v in sphere.items()}).enclosed_mass(r)
    galaxy = model.at(values).potential
    mu = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    direction = torch.stack([(1 - mu**2).sqrt(), 0 * mu, mu], -1)
    x = r[:, None, None] * direction
    found = r**2 / G * -(galaxy.acceleration(x) * direction).sum(-1).mean(-1)
    torch.testing.assert_close(found.detach(), total.detach(), rtol=0.05, atol=0)
    fixed = model.at(values)
    assert int((fixed.finder.capped_actions(fixed.potential, w).excess > 0).sum()) <= 2
    # a model without a network keeps its start
    plain = SnapshotModel(MiyamotoNagai(near(5e10), 3.0, 0.3), ActionMixture())
    start = plain.initial_values()
    assert spherical_start(plain, start, w, FitConfig(), ignore) == start


def test_underflow_is_no_place(flattened_problem):
    """A trial step on which the logarithm of a mass falls below that of the least number is one to turn back from."""
    space, u, w = flattened_problem
    far = u.clone()
    far[0] = -800.0
    assert space.valid(u)
    assert not space.valid(far)
    top, *_ = lbfgs(space, u, w, 1e-6 * torch.eye(len(u), dtype=torch.float64), 0.05, 2, ignore)
    assert bool(torch.isfinite(space.log_posterior(top, w)))
