"""Actions of single stars: as far as their orbits go, whatever their company, and bound as the potential says.

Protocol: radii from 1e-3 to 1e4 kpc, speeds from 1 % to within 1e-4 of escape, velocities from tangential to nearly
radial, each star alone. Reference: r p_r integrated over ln r between turning points found by scipy, with 1500
Gauss-Legendre nodes. Accuracy expected, over J_r + L: fast path 1e-4 (1e-5 but for extreme shapes), `actions_angles`
1e-8; company and order of stars 1e-12.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from contracts.actions import bound_stars
from scipy.integrate import fixed_quad
from scipy.optimize import brentq

from bayespot.actions import IsochroneActions, SphericalActions
from bayespot.potential import (
    NFW,
    CoredPowerLaw,
    Hernquist,
    Isochrone,
    Jaffe,
    Logarithmic,
    MassSlopeNetwork,
    Plummer,
    Potential,
    SumPotential,
)
from bayespot.potential.extent import Extent, escape_energy
from bayespot.pyro_modules import freeze

FINDER = SphericalActions()


def network():
    free = MassSlopeNetwork(1.0, -2.0, 4.0, 24.0, prior="none")
    weights = torch.randn(free.n_features + 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return freeze(free, {"ln_mass": torch.tensor(24.0, dtype=torch.float64), "slope_weights": weights})


POTENTIALS = {
    "nfw": NFW(1e12, 20.0),
    "hernquist": Hernquist(1e11, 3.0),
    "compact": Hernquist(1e10, 0.01),
    "plummer": Plummer(1e11, 3.0),
    "isochrone": Isochrone(1e11, 3.0),
    "logarithmic": Logarithmic(200.0, 1.0),
    "cored": CoredPowerLaw(1e10, 2.0, 2.3),
    "network": network(),
}


def stars(*rows):
    """Stars on the x axis from (r, v_r, v_t)."""
    return torch.tensor([[r, 0, 0, v_r, v_t, 0] for r, v_r, v_t in rows], dtype=torch.float64)


def extreme_stars(potential, n, seed):
    """Return n rows (r, v_r, v_t) over all radii, speeds and directions."""
    rows = []
    for r, share, eta in itertools.product((1e-3, 0.1, 3.0, 100.0, 1e4), (0.01, 0.5, 0.95, 0.9999), (1e-3, 0.3, 1.0)):
        top = torch.tensor(1e5 if isinstance(potential, Logarithmic) else 1e15, dtype=torch.float64)
        with torch.no_grad():
            depth = potential.phi_r(top) - potential.phi_r(torch.tensor(r, dtype=torch.float64))
        v = share * math.sqrt(2 * float(depth))
        rows.append((r, v * math.sqrt(1 - eta**2), v * eta))
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:n]]


def radial_action(potential, r, v_r, v_t):
    """Return (1/pi) times the integral of sqrt(2 (E - Phi) r^2 - L^2) d ln r between the turning points."""

    def phi(s):
        with torch.no_grad():
            return potential.phi_r(torch.as_tensor(np.exp(s), dtype=torch.float64)).numpy()

    here = math.log(r)
    energy, L = (v_r**2 + v_t**2) / 2 + float(phi(here)), r * v_t

    def f(s):
        return 2 * (energy - phi(s)) * np.exp(2 * s) - L**2

    def edge(step):
        if f(here + 1e-4 * step) <= 0:
            return here
        s = here + 1e-4 * step
        while f(s + step) > 0:
            s += step
        return brentq(f, s, s + step, xtol=1e-15, rtol=1e-15)

    peri, apo = edge(-0.1), edge(0.1)
    middle, half = (apo + peri) / 2, (apo - peri) / 2

    def integrand(psi):
        return np.sqrt(np.clip(f(middle + half * np.sin(psi)), 0, None)) * half * np.cos(psi)

    return fixed_quad(integrand, -math.pi / 2, math.pi / 2, n=1500)[0] / math.pi


@pytest.mark.parametrize("name", list(POTENTIALS))
def test_single_stars_against_quadrature(name):
    """Four extreme stars, each alone: J_r against the quadrature."""
    potential = POTENTIALS[name]
    # Phi of the network is a table itself, whose force agrees with its slope to 1e-7
    fine = 1e-6 if name == "network" else 1e-8
    for r, v_r, v_t in extreme_stars(potential, 4, seed=len(name)):
        exact = radial_action(potential, r, v_r, v_t)
        with torch.no_grad():
            fast = float(FINDER.actions(potential, stars((r, v_r, v_t)))[0, 0])
            slow = float(FINDER.actions_angles(potential, stars((r, v_r, v_t))).J[0, 0])
        assert abs(fast - exact) < 1e-4 * (exact + r * v_t), (name, r, v_r, v_t, fast, exact)
        assert abs(slow - exact) < fine * (exact + r * v_t), (name, r, v_r, v_t, slow, exact)


def test_star_at_its_pericentre():
    """The reported stars: J_r of one that goes out to a thousand scale radii, and none of one above escape speed."""
    potential = POTENTIALS["nfw"]
    with torch.no_grad():
        J = FINDER.actions(potential, stars((0.01, 0.0, 620.0), (0.01, 0.0, 1500.0)))
        alone = [FINDER.actions(potential, stars((0.01, 0.0, v)))[0] for v in (620.0, 1500.0)]
    assert abs(float(alone[0][0]) / radial_action(potential, 0.01, 0.0, 620.0) - 1) < 1e-6
    assert bool(alone[1].isnan().all()), "1500 km/s is above the escape speed of 656 km/s"
    torch.testing.assert_close(J, torch.stack(alone), rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["nfw", "plummer", "logarithmic", "network"])
def test_company_does_not_matter(name):
    """Ten stars alone, in another order, and among 2000 others of all radii and energies, one of them unbound."""
    potential = POTENTIALS[name]
    w = torch.cat([bound_stars(potential, 6, seed=1), stars(*extreme_stars(potential, 4, seed=2))])
    others = bound_stars(potential, 2000, seed=3, r_range=(1e-4, 1e5))
    others[0, 3:] *= 1e4
    for function in (FINDER.actions, lambda p, w: FINDER.actions_angles(p, w).Omega):
        with torch.no_grad():
            alone = torch.cat([function(potential, star[None]) for star in w])
            among = function(potential, torch.cat([others, w]))[len(others) :]
            turned = function(potential, w.flip(0)).flip(0)
        scale = alone.abs().sum(-1, keepdim=True)
        assert float(((among - alone) / scale).abs().max()) < 1e-12
        assert float(((turned - alone) / scale).abs().max()) < 1e-12


def test_gradients_do_not_depend_on_company():
    """d J_r / d (m_s, r_s) of one star alone and among 500 others, 1e-9 of J_r + L."""
    w = torch.cat([stars((0.01, 0.0, 620.0)), bound_stars(POTENTIALS["nfw"], 500, seed=5)])
    slopes = []
    for sample in (w[:1], w):
        values = torch.tensor([1e12, 20.0], dtype=torch.float64, requires_grad=True)
        J = FINDER.actions(NFW(values[0], values[1]), sample)[0]
        (slope,) = torch.autograd.grad(J[0], values)
        slopes.append(slope * values.detach() / J.detach().abs().sum())
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["nfw", "hernquist", "cored", "isochrone"])
@pytest.mark.parametrize("r", [1e-3, 1.0, 1e4])
def test_escape_is_the_potentials(name, r):
    """Alone, a star with 0.9999 of the escape speed is bound and one with 1.0001 is not, at every radius."""
    potential = POTENTIALS[name]
    with torch.no_grad():
        v = math.sqrt(-2 * float(potential.phi_r(torch.tensor(r, dtype=torch.float64))))
        for share, bound in ((0.9999, True), (1.0001, False)):
            w = stars((r, 0.0, share * v))
            assert bool(torch.isfinite(FINDER.actions(potential, w)).all()) == bound
            assert bool(torch.isfinite(FINDER.actions_angles(potential, w).J).all()) == bound


def test_potentials_without_escape():
    """In a logarithmic potential, also one with a point-like mass in it, nothing escapes: 12 v_0 at 1 kpc is bound."""
    halo = Logarithmic(200.0, 1.0)
    for potential in (halo, SumPotential([halo, Plummer(1e11, 0.1)])):
        assert math.isinf(float(escape_energy(potential)))
        w = stars((1.0, 0.0, 1200.0))
        with torch.no_grad():
            J = FINDER.actions(potential, w)
        assert abs(float(J[0, 0]) / radial_action(potential, 1.0, 0.0, 1200.0) - 1) < 1e-4


def test_escape_energies():
    """Limits of Phi at infinity: zero to 1e-7 of the depth; infinite where there is none; flattened ones likewise."""
    for name in ("nfw", "hernquist", "plummer", "cored"):
        potential = POTENTIALS[name]
        depth = -float(potential.phi_r(torch.tensor(1.0, dtype=torch.float64)).detach())
        assert abs(float(escape_energy(potential))) < 1e-7 * depth
    assert math.isinf(float(escape_energy(Logarithmic(200.0, 1.0, 0.8))))


def test_origin():
    """Stars at the centre: those passing it have the isochrone's J, Omega and finite gradients; one at rest J = 0."""
    potential = POTENTIALS["isochrone"]
    w = torch.tensor([[0, 0, 0, 30, -200, 50], [0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    exact = IsochroneActions().actions_angles(potential, w)
    for rows in ([0], [1], [0, 1]):
        found = FINDER.actions_angles(potential, w[rows])
        scale = exact.J[0].abs().sum()
        torch.testing.assert_close(found.J / scale, exact.J[rows] / scale, rtol=0, atol=1e-7)
        torch.testing.assert_close(FINDER.actions(potential, w[rows]) / scale, exact.J[rows] / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        FINDER.actions_angles(potential, w[:1]).Omega[0, 0], exact.Omega[0, 0], rtol=1e-6, atol=0
    )
    values = torch.tensor([1e11, 3.0], dtype=torch.float64, requires_grad=True)
    J = FINDER.actions(Isochrone(values[0], values[1]), w)
    assert bool(torch.isfinite(torch.autograd.grad(J[:, 0].sum(), values)[0]).all())
    with torch.no_grad():
        assert float(FINDER.actions(Jaffe(1e11, 3.0), w)[1].abs().max()) < 1e-12


class Barrier(Potential):
    """A potential with its maximum at 50 kpc, from where the force points outward."""

    symmetry = "spherical"

    def phi(self, x):
        r2 = (x**2).sum(-1)
        return -(200.0**2) / (1 + r2).sqrt() - r2 * 0.5 * 200.0**2 / 50**3


class Broken(Potential):
    symmetry = "spherical"

    def phi(self, x):
        return x.sum(-1) * torch.nan


def test_potentials_that_end():
    """Beyond the radius where a force turns outward no orbit is bound; a potential of NaN gives NaN."""
    with torch.no_grad():
        extent = Extent(Barrier())
        assert 30 < math.exp(extent.profile.s_last) < 51
        J = FINDER.actions(Barrier(), stars((5.0, 0.0, 80.0), (5.0, 0.0, 110.0), (1.0, 0.0, 1000.0)))
        exact = radial_action(Barrier(), 5.0, 0.0, 80.0)
        assert bool(FINDER.actions(Broken(), stars((1.0, 2.0, 3.0)))[:, 0].isnan().all())
    assert abs(float(J[0, 0]) / exact - 1) < 1e-4
    assert J.isnan().any(-1).tolist() == [False, False, True]


def test_nothing_to_compute():
    """Stars without finite coordinates are refused; NaN among others gives NaN there alone."""
    with pytest.raises(ValueError, match="no star has finite coordinates"):
        FINDER.actions(POTENTIALS["nfw"], torch.full((2, 6), torch.nan, dtype=torch.float64))
    w = stars((8.0, 10.0, 200.0), (8.0, math.nan, 200.0))
    with torch.no_grad():
        J = FINDER.actions(POTENTIALS["nfw"], w)
        torch.testing.assert_close(J[0], FINDER.actions(POTENTIALS["nfw"], w[:1])[0])
    assert bool(J[1].isnan().any())
