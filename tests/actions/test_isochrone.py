"""Closed-form isochrone actions against quadrature, integrated orbits and their own inverse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contracts.actions import (
    bound_stars,
    check_gradients,
    check_invariance_along_orbit,
    check_round_trip,
    check_symplectic,
)
from scipy.optimize import brentq

from bayespot.actions import IsochroneActions
from bayespot.actions.isochrone import solve_kepler
from bayespot.potential import Isochrone, Plummer
from bayespot.units import G

M_TOT, R_S = 1e11, 3.0
FINDER = IsochroneActions()

# x along a generic direction, and orbits on which some angle does not exist
EDGE_ORBITS = {
    "circular": [3.0, 4.0, 0.0, -0.8, 0.6, 0.5],  # speed set by the test
    "radial": [3.0, -4.0, 2.0, 30.0, -40.0, 20.0],
    "radial_infall": [3.0, -4.0, 2.0, -30.0, 40.0, -20.0],
    "nearly_radial": [3.0, -4.0, 2.0, 30.0, -40.0, 20.0 + 1e-9],
    "planar": [5.0, 2.0, 0.0, -40.0, 120.0, 0.0],
    "planar_retrograde": [5.0, 2.0, 0.0, 40.0, -120.0, 0.0],
    "nearly_planar": [5.0, 2.0, 1e-9, -40.0, 120.0, 1e-8],
    "polar": [5.0, 0.0, 1.0, 25.0, 0.0, 90.0],
    "polar_oblique": [5.0, 2.0, 1.0, 25.0, 10.0, 90.0],
    "pole": [0.0, 0.0, 5.0, 30.0, 60.0, 20.0],
    "axis": [0.0, 0.0, 5.0, 0.0, 0.0, 120.0],
    "centre": [0.0, 0.0, 0.0, 30.0, 60.0, 20.0],
    "at_rest": [5.0, 2.0, -3.0, 0.0, 0.0, 0.0],
}


@pytest.fixture
def potential() -> Isochrone:
    return Isochrone(m_tot=M_TOT, r_s=R_S)


def edge_star(potential: Isochrone, name: str) -> torch.Tensor:
    w = torch.tensor(EDGE_ORBITS[name], dtype=torch.float64)
    if name == "circular":
        r = w[:3].norm()
        w[3:] *= potential.circular_speed(r).detach() / w[3:].norm()
    return w


def quadrature_radial_action(w: torch.Tensor) -> float:
    """J_r = (1/pi) int p_r dr between turning points found by bisection.

    With r = mid + half sin(psi) the integrand is smooth and periodic in psi, so the trapezoidal
    rule converges exponentially.
    """
    x, v = w[:3].numpy(), w[3:].numpy()
    r_0, L2 = np.linalg.norm(x), np.sum(np.cross(x, v) ** 2)

    def phi(r):
        return -G * M_TOT / (R_S + np.sqrt(R_S**2 + r**2))

    E = 0.5 * v @ v + phi(r_0)

    def f(r):
        return 2 * (E - phi(r)) * r**2 - L2

    low = brentq(f, 1e-12 * r_0, r_0, xtol=1e-15, rtol=1e-15)
    high = brentq(f, r_0, 1e6 * r_0, xtol=1e-13, rtol=1e-15)
    psi = (np.arange(4000) + 0.5) * np.pi / 4000 - np.pi / 2
    r = 0.5 * (low + high) + 0.5 * (high - low) * np.sin(psi)
    p_r = np.sqrt(np.maximum(f(r), 0)) / r
    return float(np.mean(p_r * 0.5 * (high - low) * np.cos(psi)))


def test_radial_action_equals_its_integral(potential):
    """40 random bound stars: closed form against the integral of p_r, 1e-8 of the sum of actions."""
    w = bound_stars(potential, 40, seed=1)
    J = FINDER.actions(potential, w)
    expected = torch.tensor([quadrature_radial_action(star) for star in w], dtype=torch.float64)
    assert ((J[:, 0] - expected).abs() / J.abs().sum(-1)).max() < 1e-8


def test_angular_actions(potential):
    """J_phi = L_z and J_z = L - |L_z| to 1e-13 of L, and `actions` agrees with `actions_angles`."""
    w = bound_stars(potential, 200, seed=2)
    Lvec = torch.linalg.cross(w[:, :3], w[:, 3:])
    L = Lvec.norm(dim=-1)
    J = FINDER.actions(potential, w)
    assert ((J[:, 1] - Lvec[:, 2]).abs() / L).max() < 1e-13
    assert ((J[:, 2] - (L - Lvec[:, 2].abs())).abs() / L).max() < 1e-13
    torch.testing.assert_close(FINDER.actions_angles(potential, w).J, J, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("r_s", [0.03, 3.0, 300.0])
def test_round_trip(r_s):
    """w -> (J, theta) -> w over 5000 random bound stars, from the core to the Keplerian part: 1e-10."""
    potential = Isochrone(m_tot=M_TOT, r_s=r_s)
    check_round_trip(FINDER, potential, bound_stars(potential, 5000, seed=3), rtol=1e-10)


def test_round_trip_from_actions(potential):
    """(J, theta) -> w -> (J, theta) over random actions spanning six decades: 1e-10 of |J|, 1e-9 rad."""
    generator = torch.Generator().manual_seed(4)
    J = 10 ** (6 * torch.rand(2000, 3, generator=generator, dtype=torch.float64) - 2)
    J[::2, 1] *= -1
    theta = 2 * math.pi * torch.rand(2000, 3, generator=generator, dtype=torch.float64)
    back = FINDER.actions_angles(potential, FINDER.phase_space(potential, J, theta))
    assert ((back.J - J).abs().amax(-1) / J.abs().sum(-1)).max() < 1e-10
    # the angles of a nearly circular or nearly planar orbit are as uncertain as its small action is small
    smallness = (J[:, [0, 2]].amin(-1) / J.abs().sum(-1)).sqrt()
    turn = torch.remainder(back.theta - theta + math.pi, 2 * math.pi) - math.pi
    assert (turn.abs().amax(-1) * smallness).max() < 1e-9


def test_energy_and_frequencies(potential):
    """H(J) equals v^2/2 + Phi to 1e-12; Omega equals central differences of H(J) to 1e-8."""
    w = bound_stars(potential, 100, seed=5)
    J, _, Omega = FINDER.actions_angles(potential, w)
    E = 0.5 * (w[:, 3:] ** 2).sum(-1) + potential.phi(w[:, :3])
    torch.testing.assert_close(FINDER.energy(potential, J), E, rtol=1e-12, atol=0.0)
    for i in range(3):
        step = torch.zeros_like(J)
        step[:, i] = 1e-5 * J[:, i].abs()
        change = FINDER.energy(potential, J + step) - FINDER.energy(potential, J - step)
        slope = change / (2 * step[:, i])
        error = (slope - Omega[:, i]).abs() * J[:, i].abs() / E.abs()
        assert error.max() < 1e-8, i


def test_invariance_along_orbits(potential):
    """Four orbits over a radial period and a half at order 6: J to 1e-9, theta = theta_0 + Omega t to 1e-8 rad."""
    w = bound_stars(potential, 4, seed=6, r_range=(1.0, 20.0))
    check_invariance_along_orbit(FINDER, potential, w, 1e-9, 1e-8, n_periods=1.5, steps_per_period=800)


def test_invariance_along_edge_orbits(potential):
    """The same on orbits in a coordinate plane, both senses: J to 1e-9, angles to 1e-8 rad."""
    w = torch.stack([edge_star(potential, name) for name in ("planar", "planar_retrograde", "polar")])
    check_invariance_along_orbit(FINDER, potential, w, rtol_J=1e-9, atol_theta=1e-8, n_periods=1.2)


def test_symplectic(potential):
    """Poisson brackets of (theta, J) by autograd on 200 stars: canonical to 1e-8."""
    check_symplectic(FINDER, potential, bound_stars(potential, 200, seed=7), atol=1e-8)


def test_gradients(potential):
    """Finder and torus map, in w, (J, theta), m_tot and r_s, against five-point differences: 1e-7."""
    values = torch.tensor([M_TOT, R_S], dtype=torch.float64)
    w = bound_stars(potential, 8, seed=8)
    check_gradients(FINDER, lambda p: Isochrone(m_tot=p[0], r_s=p[1]), values, w, rtol=1e-7)


def test_second_derivatives():
    """Both directions pass torch's gradgradcheck in w, (J, theta), m_tot and r_s, in units G M = b = 1."""
    mass, b = (torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    unit = Isochrone(m_tot=1 / G, r_s=1.0)
    w = bound_stars(unit, 3, seed=9, r_range=(0.5, 2.0)).requires_grad_()
    J, theta, _ = (t.detach().requires_grad_() for t in FINDER.actions_angles(unit, w))

    def forward(mass, b, w):
        return FINDER.actions_angles(Isochrone(m_tot=mass / G, r_s=b), w)

    def inverse(mass, b, J, theta):
        return FINDER.phase_space(Isochrone(m_tot=mass / G, r_s=b), J, theta)

    assert torch.autograd.gradgradcheck(forward, (mass, b, w), atol=1e-4)
    assert torch.autograd.gradgradcheck(inverse, (mass, b, J, theta), atol=1e-4)


@pytest.mark.parametrize("name", EDGE_ORBITS)
def test_edge_orbits(potential, name):
    """Circular, radial, planar, polar, at the centre: finite values and gradients, round trip to 1e-10."""
    w = edge_star(potential, name).requires_grad_()
    found = FINDER.actions_angles(potential, w)
    for part in found:
        assert part.isfinite().all()
        (gradient,) = torch.autograd.grad(part.sum(), w, retain_graph=True)
        assert gradient.isfinite().all(), (name, part)
    J, theta, _ = (part.detach().requires_grad_() for part in found)
    back = FINDER.phase_space(potential, J, theta)
    scale = torch.tensor([5.0] * 3 + [200.0] * 3, dtype=torch.float64)
    assert ((back - w) / scale).abs().max() < 1e-10
    assert all(g.isfinite().all() for g in torch.autograd.grad(back.sum(), (J, theta)))


def test_actions_of_edge_orbits(potential):
    """J_r of a circular orbit, J_z of planar ones and L of radial ones vanish to 1e-12 of |J|."""
    J = {name: FINDER.actions(potential, edge_star(potential, name)) for name in EDGE_ORBITS}
    assert 0 <= J["circular"][0] < 1e-12 * J["circular"].abs().sum()
    assert J["planar"][1] > 0
    assert J["planar"][2] == 0
    torch.testing.assert_close(J["planar_retrograde"], J["planar"] * torch.tensor([1, -1, 1]))
    assert J["polar"][1].abs() < 1e-12 * J["polar"].sum()
    assert J["radial"][1:].abs().max() < 1e-12 * J["radial"][0]


def test_at_rest_in_the_centre(potential):
    """J = 0, finite gradients, and the frequencies of the harmonic core, Omega_z = Omega_r / 2, to 1e-12."""
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    J, _, Omega = FINDER.actions_angles(potential, w)
    assert (J == 0).all()
    (gradient,) = torch.autograd.grad(J.sum() + Omega.sum(), w)
    assert gradient.isfinite().all()
    core = math.sqrt(G * M_TOT / (4 * R_S**3))  # Phi = Phi(0) + core^2 r^2 / 2
    torch.testing.assert_close(Omega, torch.tensor([2 * core, core, core], dtype=torch.float64), rtol=1e-12, atol=0.0)


def test_angle_zero_is_pericentre(potential):
    """At theta_r = 0 the radius has a minimum: v_r = 0 to 1e-10 and smaller than at theta_r = +-0.1."""
    J = torch.tensor([[100.0, 300.0, 200.0], [1e3, -20.0, 5.0]], dtype=torch.float64)
    r = []
    for theta_r in (0.0, 0.1, -0.1):
        theta = torch.tensor([theta_r, 1.0, 2.0], dtype=torch.float64).expand(2, 3)
        w = FINDER.phase_space(potential, J, theta)
        r.append(w[:, :3].norm(dim=-1))
        if theta_r == 0:
            assert ((w[:, :3] * w[:, 3:]).sum(-1).abs() / (r[0] * w[:, 3:].norm(dim=-1))).max() < 1e-10
    assert (r[0] < r[1]).all()
    assert (r[0] < r[2]).all()


def test_unbound_stars(potential):
    """Unbound stars are NaN and leave finite gradients; capped actions are finite and say by how much."""
    w = bound_stars(potential, 6, seed=10)
    w[::2, 3:] *= 30.0
    w.requires_grad_()
    mass = torch.tensor(M_TOT, dtype=torch.float64, requires_grad=True)
    trial = Isochrone(m_tot=mass, r_s=R_S)
    J = FINDER.actions(trial, w)
    assert J[::2].isnan().all()
    assert J[1::2].isfinite().all()
    for part in FINDER.actions_angles(trial, w):
        assert part[::2].isnan().all()
        gradients = torch.autograd.grad(part[1::2].sum(), (w, mass), retain_graph=True)
        assert all(g.isfinite().all() for g in gradients)
    capped, excess = FINDER.capped_actions(trial, w)
    assert capped.isfinite().all()
    torch.testing.assert_close(capped[1::2], J[1::2])
    assert (excess[::2] > 0).all()
    assert (excess[1::2] == 0).all()
    (slope,) = torch.autograd.grad(excess.sum(), mass, retain_graph=True)
    assert slope < 0, "more mass must bind the stars"
    assert torch.autograd.grad(capped.sum(), w)[0].isfinite().all()


def test_batches(potential):
    """Leading axes are batch, also those of the parameters: equal to one call per element."""
    w = bound_stars(potential, 6, seed=11)
    J, theta, Omega = FINDER.actions_angles(potential, w)
    for part, flat in zip(FINDER.actions_angles(potential, w.reshape(2, 3, 6)), (J, theta, Omega), strict=True):
        torch.testing.assert_close(part, flat.reshape(2, 3, 3))
    masses = torch.tensor([[M_TOT], [2 * M_TOT]], dtype=torch.float64)
    draws = Isochrone(m_tot=masses, r_s=R_S)
    torch.testing.assert_close(FINDER.actions_angles(draws, w).theta[0], theta)
    heavier = Isochrone(m_tot=2 * M_TOT, r_s=R_S)
    torch.testing.assert_close(FINDER.actions(draws, w)[1], FINDER.actions(heavier, w))
    torch.testing.assert_close(FINDER.phase_space(draws, J, theta)[1], FINDER.phase_space(heavier, J, theta))


def test_kepler():
    """Residual of Kepler's equation below 1e-14 up to e = 1 - 1e-6, and derivatives up to third order.

    The derivatives are those of the exact eta(M): with D = 1 - e cos(eta), 1/D, -e sin(eta)/D^3 and
    (3 e^2 sin^2(eta)/D - e cos(eta))/D^4; tolerance 1e-9.
    """
    e = torch.tensor([0.0, 1e-8, 0.3, 0.9, 0.999, 1 - 1e-6], dtype=torch.float64)[:, None]
    M = torch.cat([torch.linspace(-math.pi, math.pi, 101), torch.tensor([1e-12, -1e-9, 1e-6])]).double()
    eta = solve_kepler(e, M)
    assert (eta - e * eta.sin() - M).abs().max() < 1e-14
    M = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    value = solve_kepler(torch.tensor(0.6, dtype=torch.float64), M)
    derivatives, term = [], value
    for _ in range(3):
        (term,) = torch.autograd.grad(term, M, create_graph=True)
        derivatives.append(float(term.detach()))
    eta_0, e_0 = float(value.detach()), 0.6
    D, sine, cosine = 1 - e_0 * math.cos(eta_0), e_0 * math.sin(eta_0), e_0 * math.cos(eta_0)
    assert derivatives == pytest.approx([1 / D, -sine / D**3, (3 * sine**2 / D - cosine) / D**4], rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: FINDER.actions(Plummer(m_tot=1.0, r_s=1.0), torch.zeros(6)), "got Plummer"),
        (lambda p: FINDER.actions(p, torch.zeros(2, 5)), r"\(2, 5\)"),
        (lambda p: FINDER.phase_space(p, torch.tensor([-1.0, 2.0, 3.0]), torch.zeros(3)), "J_r must be >= 0"),
        (lambda p: FINDER.phase_space(p, torch.tensor([1.0, 2.0, -3.0]), torch.zeros(3)), "J_z must be >= 0"),
        (lambda p: FINDER.phase_space(p, torch.tensor([math.inf, 2.0, 3.0]), torch.zeros(3)), "finite"),
        (lambda p: FINDER.energy(p, torch.zeros(2)), r"\(2,\)"),
    ],
)
def test_refusals(potential, call, message):
    """Wrong potential, shapes and impossible actions raise ValueError with the value received."""
    with pytest.raises(ValueError, match=message):
        call(potential)
