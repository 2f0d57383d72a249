"""Symplectic integrators: order, energy, reversibility, derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayespot.orbit import integrate
from bayespot.potential.analytic import Isochrone
from bayespot.units import G

ORDERS = {"leapfrog": 2, "yoshida4": 4, "yoshida6": 6}
STARS = torch.tensor([[1.0, 0.0, 0.3, 0.1, 0.5, 0.1], [0.5, -1.0, 0.2, 0.3, 0.1, -0.4]], dtype=torch.float64)


@pytest.fixture
def potential() -> Isochrone:
    """In units G M = b = 1; the orbits' radial periods are then about 15."""
    return Isochrone(m_tot=1 / G, r_s=1.0)


def energy(potential, w):
    return 0.5 * (w[..., 3:] ** 2).sum(-1) + potential.phi(w[..., :3])


@pytest.mark.parametrize("method", ORDERS)
def test_order(potential, method):
    """Slope of log error on log step over five steps, against a much finer orbit: order +- 0.15."""
    n_steps = {"leapfrog": 100, "yoshida4": 60, "yoshida6": 24}[method]
    counts = np.round(n_steps * 2 ** (np.arange(5) / 2)).astype(int)
    with torch.no_grad():
        exact = integrate(potential, STARS, (15.0, 1200), "yoshida6")[-1]
        errors = [float((integrate(potential, STARS, (15.0, int(n)), method)[-1] - exact).norm()) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(ORDERS[method], abs=0.15)


@pytest.mark.parametrize("method", ORDERS)
def test_energy_does_not_drift(potential, method):
    """Over 40 periods the energy error oscillates: its mean in the last quarter is at most 1.5 times, and its
    largest value there at most 2 times, that of the first quarter (a drift would give 7 times)."""
    with torch.no_grad():
        orbit = integrate(potential, STARS, (600.0, 1600), method)
        error = (energy(potential, orbit) - energy(potential, STARS)).abs()
    first, last = error[1:401], error[1200:]
    assert (last.mean(0) < 1.5 * first.mean(0)).all()
    assert (last.amax(0) < 2 * first.amax(0)).all()


@pytest.mark.parametrize("method", ORDERS)
def test_reversible(potential, method):
    """Forward and back, by negated times and by negated velocities, returns to the start to 1e-12."""
    times = torch.linspace(0.0, 10.0, 41, dtype=torch.float64)
    turn = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    with torch.no_grad():
        end = integrate(potential, STARS, times, method)[-1]
        back = integrate(potential, end, times.flip(0), method)[-1]
        mirrored = integrate(potential, end * turn, times, method)[-1] * turn
    assert (back - STARS).abs().max() < 1e-12
    assert (mirrored - STARS).abs().max() < 1e-12


@pytest.mark.parametrize("method", ORDERS)
def test_symplectic(potential, method):
    """The Jacobian of 20 coarse steps, by autograd, preserves the symplectic form to 1e-12."""
    jacobian = torch.autograd.functional.jacobian(lambda w: integrate(potential, w, (10.0, 20), method)[-1], STARS[0])
    eye, zero = torch.eye(3), torch.zeros(3, 3)
    form = torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)]).double()
    assert (jacobian @ form @ jacobian.T - form).abs().max() < 1e-12


def test_angular_momentum(potential):
    """A sphere's angular momentum is conserved to rounding, 1e-13, whatever the step."""
    with torch.no_grad():
        orbit = integrate(potential, STARS, (30.0, 60))
    L = torch.linalg.cross(orbit[..., :3], orbit[..., 3:])
    assert (L - L[0]).abs().max() < 1e-13


def test_outputs(potential):
    """The first output is w; substeps and any batch shape give the same orbit; uneven times are hit."""
    with torch.no_grad():
        fine = integrate(potential, STARS, (4.0, 40), "yoshida4")
        coarse = integrate(potential, STARS, (4.0, 4), "yoshida4", n_substeps=10)
        single = integrate(potential, STARS[1], (4.0, 40), "yoshida4")
        times = torch.tensor([1.0, 1.1, 1.4], dtype=torch.float64)
        uneven = integrate(potential, STARS, times, "yoshida6", n_substeps=5)
        there = integrate(potential, STARS, (0.4, 20), "yoshida6")[-1]
    assert fine.shape == (41, 2, 6)
    assert torch.equal(fine[0], STARS)
    torch.testing.assert_close(coarse, fine[::10], rtol=0, atol=1e-12)
    torch.testing.assert_close(single, fine[:, 1], rtol=0, atol=1e-12)
    torch.testing.assert_close(uneven[-1], there, rtol=0, atol=1e-8)


def test_gradients():
    """d(end)/d(m_tot, w, t_end) against central differences: 1e-7."""
    mass = torch.ones((), dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64, requires_grad=True)

    def end(mass, w, times):
        trial = Isochrone(m_tot=mass / G, r_s=1.0)
        return integrate(trial, w, times, "yoshida4", n_substeps=5)[-1]

    assert torch.autograd.gradcheck(end, (mass, STARS.clone().requires_grad_(), times), atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), (1.0, 2)), r"\(3,\)"),
        ((STARS, (1.0, 0)), "n_steps must be at least 1; got 0"),
        ((STARS, torch.zeros(2, 2)), r"\(2, 2\)"),
        ((STARS, (1.0, 2), "euler"), "'euler'"),
        ((STARS, (1.0, 2), "leapfrog", 0), "n_substeps must be at least 1; got 0"),
    ],
)
def test_refusals(potential, arguments, message):
    """Wrong shapes, counts and names raise ValueError with the value received."""
    with pytest.raises(ValueError, match=message):
        integrate(potential, *arguments)
