"""Generating functions from orbits: against closed forms and quadratures, and along orbits where there are none."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from contracts.actions import angle_difference, bound_stars

from bayespot.actions import GeneratingFunctionActions, IsochroneActions, SphericalActions, integrate
from bayespot.actions.families import FAMILIES
from bayespot.actions.genfunc import OrbitActions
from bayespot.potential import NFW, Isochrone, Logarithmic, Potential


class TriaxialLogarithmic(Potential):
    """Binney & Tremaine (2008), equation 2.71a, with axis ratios 0.95 and 0.85 and v_0 = 220 km/s, r_c = 1 kpc."""

    symmetry = "triaxial"

    def phi(self, x):
        return 0.5 * 220**2 * (1 + (x**2 / x.new_tensor([1.0, 0.95, 0.85]) ** 2).sum(-1)).log()


def stars(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    return torch.cat([4 * x, 120 * v], -1)


@pytest.fixture(scope="module")
def finder():
    return GeneratingFunctionActions()


@pytest.mark.parametrize(
    ("potential", "reference"),
    [
        (Isochrone(m_tot=1e11, r_s=3.0), IsochroneActions()),
        (NFW(m_s=8e11, r_s=20.0), SphericalActions()),
    ],
    ids=["isochrone", "nfw"],
)
def test_spheres(potential, reference, finder):
    """100 stars from 5 to 95 % of the escape speed: J to 1e-4 of sum abs(J) (the issue asks 1e-3), theta to 1e-4 rad,
    Omega to 1e-4; the error estimate covers nine in ten of the errors above rounding of 1e-6."""
    w = bound_stars(potential, 100, seed=1)
    with torch.no_grad():
        ours, exact = finder.orbits(potential, w), reference.actions_angles(potential, w)
    scale = exact.J.abs().sum(-1, keepdim=True)
    error = (ours.J - exact.J).abs() / scale
    assert float(error.max()) < 1e-4
    assert float(angle_difference(ours.theta, exact.theta).abs().max()) < 1e-4
    assert float(((ours.Omega - exact.Omega).norm(dim=-1) / exact.Omega.norm(dim=-1)).max()) < 1e-4
    assert float((error < 3 * ours.error / scale + 1e-6).all(-1).double().mean()) > 0.9


FLATTENED = {"flattened": Logarithmic(v_0=220.0, r_c=1.0, q=0.8), "triaxial": TriaxialLogarithmic()}
TIMES = torch.tensor([0.0, 0.31, 1.6], dtype=torch.float64)


FEW = stars(60, seed=3)[:30]


@functools.cache
def along(name: str) -> OrbitActions:
    """What is found of 30 stars, `FEW`, at three instants of their orbits, ``(3, 30)``.

    The orbits themselves are at order 6 with steps of 0.002 kpc/(km/s) at most.
    """
    with torch.no_grad():
        orbit = integrate(FLATTENED[name], FEW, TIMES, "yoshida6", n_substeps=650)
        return GeneratingFunctionActions().orbits(FLATTENED[name], orbit)


@pytest.mark.parametrize("name", FLATTENED)
def test_constant_along_orbits(name):
    """sd of J over three instants of one orbit, relative to sum abs(J): median below 0.3 %, nine in ten below 3 %;
    theta at the later instants is theta + Omega t, in the median to 0.01 rad; the errors rank the sd."""
    found = along(name)
    scale = found.J.abs().sum(-1).mean(0)
    spread = found.J.std(0).norm(dim=-1) / scale
    assert float(spread.median()) < 3e-3
    assert float(spread.quantile(0.9)) < 3e-2
    turned = angle_difference(found.theta, found.theta[0] + found.Omega[0] * TIMES[:, None, None])
    assert float(turned.abs().amax((0, 2)).median()) < 0.01
    estimate = found.error[0].norm(dim=-1) / scale
    rank = [t.argsort().argsort().double().numpy() for t in (spread, estimate)]
    assert np.corrcoef(*rank)[0, 1] > 0.5


def test_families(finder):
    """In a triaxial potential all three families occur; L_z keeps its sign on tubes about z, L_x on those about x, and
    a star on the long axis at rest is a box with J on that axis alone."""
    w, found = FEW, along("triaxial")
    with torch.no_grad():
        resting = finder.orbits(FLATTENED["triaxial"], torch.tensor([6.0, 0, 0, 0, 0, 0], dtype=torch.float64))
    counts = torch.bincount(torch.cat([found.family[0], resting.family[None]]), minlength=3)
    assert bool((counts > 3).all())
    assert FAMILIES[int(resting.family)] == "box"
    assert float(resting.J[1:].abs().max()) < 1e-3 * float(resting.J[0])
    L = torch.linalg.cross(w[:, :3], w[:, 3:])
    for name, axis in (("tube about z", 2), ("tube about x", 0)):
        tube = found.family[0] == FAMILIES.index(name)
        assert bool((found.J[0, tube, 1] * L[tube, axis] > 0).all()), name


def test_flattened_keeps_lz():
    """J_phi is L_z to 1e-9 in an axisymmetric potential, of either sign."""
    w, J = FEW, along("flattened").J[0]
    L_z = w[:, 0] * w[:, 4] - w[:, 1] * w[:, 3]
    assert 0 < (L_z > 0).sum() < len(L_z)
    torch.testing.assert_close(J[:, 1], L_z, rtol=1e-9, atol=1e-9)


def test_unbound_and_batches():
    """Unbound stars and NaN give NaN and leave the others alone; the batch shape is kept; capped actions are finite.

    Orbits of four periods, whatever their errors.
    """
    finder = GeneratingFunctionActions(n_periods=4, max_error=1.0)
    potential = Isochrone(m_tot=1e11, r_s=3.0)
    w = bound_stars(potential, 4, seed=2)
    w[1, 3:] *= 50
    w[2, 0] = torch.nan
    with torch.no_grad():
        found = finder.orbits(potential, w.reshape(2, 2, 6))
        one = finder.orbits(potential, w[3])
        J, excess = finder.capped_actions(potential, w[[0, 1]])
    assert found.J.shape == (2, 2, 3)
    assert found.J.isnan().any(-1).tolist() == [[False, True], [True, False]]
    torch.testing.assert_close(found.J[1, 1], one.J)
    assert bool(torch.isfinite(J).all())
    assert excess[0] == 0 < excess[1]


def test_refusals(finder):
    """A derivative raises instead of being zero; settings that cannot work name their value."""
    w = bound_stars(Isochrone(m_tot=1e11, r_s=3.0), 2, seed=2).requires_grad_()
    J = finder.actions(Isochrone(m_tot=1e11, r_s=3.0), w)
    with pytest.raises(RuntimeError, match="no derivatives"):
        J.sum().backward()
    with pytest.raises(ValueError, match="n_periods must be at least 4, got 1"):
        GeneratingFunctionActions(n_periods=1)
    with pytest.raises(ValueError, match="steps_per_period must be at least 24, got 8"):
        GeneratingFunctionActions(steps_per_period=8)
    with pytest.raises(ValueError, match="last axis 6"):
        finder.orbits(Isochrone(m_tot=1e11, r_s=3.0), torch.zeros(3))
