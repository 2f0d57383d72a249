"""Flattened double power laws and the power law with a cut-off: closed forms, galpy, Laplacians, parameters."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts.potential import (
    check_acceleration,
    check_circular_speed,
    check_no_graph,
    check_parameter_gradients,
    check_potential,
    points_at,
)
from scipy.integrate import quad

from bayespot.potential import NFW, DoublePowerLaw, Hernquist, Potential, PowerLawCutoff
from bayespot.pyro_modules import freeze
from bayespot.units import G

RADII = torch.logspace(-2, 2.5, 19, dtype=torch.float64)
RHO, R_S = 1e7, 20.0


def relative(found, expected):
    """Errors of vectors over their length."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize(
    ("spheroid", "sphere"),
    [
        (DoublePowerLaw(RHO, R_S, 1.0, 3.0), NFW(4 * math.pi * RHO * R_S**3, R_S)),
        (DoublePowerLaw(RHO, R_S, 1.0, 4.0, q=1), Hernquist(2 * math.pi * RHO * R_S**3, R_S)),
        (
            DoublePowerLaw(1e10, 1.9, 1.8, 1.8, r_cut=1.9),
            PowerLawCutoff(2 * math.pi * 1e10 * 1.9**3 * math.gamma(0.6), 1.9, 1.8),
        ),
    ],
    ids=["nfw", "hernquist", "cut-off"],
)
def test_spheres(spheroid, sphere):
    """Spheres in closed form: density 1e-12, Phi 1e-8, force 1e-7."""
    x = points_at(RADII)
    assert spheroid.symmetry == "spherical"
    torch.testing.assert_close(spheroid.density(x), sphere.density_r(RADII), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(spheroid.phi(x), sphere.phi(x), rtol=1e-8, atol=0.0)
    assert float(relative(spheroid.acceleration(x), sphere.acceleration(x)).max()) < 1e-7


@pytest.mark.parametrize(("q", "l_max", "bound"), [(0.7, 16, 1e-7), (0.4, 16, 2e-4), (0.4, 32, 2e-7), (1.3, 16, 1e-7)])
def test_flattened_halo_against_galpy(q, l_max, bound):
    """Forces of an NFW halo with axis ratio q against galpy's ellipsoidal quadrature, 0.01 to 300 kpc."""
    galpy = pytest.importorskip("galpy.potential")
    theirs = galpy.TriaxialNFWPotential(amp=4 * math.pi * RHO * R_S**3 * G, a=R_S, b=1.0, c=q, glorder=200)
    x = points_at(RADII)
    R, z = x[:, :2].norm(dim=-1), x[:, 2]
    a = DoublePowerLaw(RHO, R_S, 1.0, 3.0, q, l_max=l_max).acceleration(torch.stack([R, 0 * R, z], -1))
    expected = torch.tensor(
        [
            [method(float(Ri), float(zi), phi=0.0, use_physical=False) for method in (theirs.Rforce, theirs.zforce)]
            for Ri, zi in zip(R, z, strict=True)
        ],
        dtype=torch.float64,
    )
    assert float(relative(a[:, ::2], expected).max()) < bound


def test_bulge_of_mcmillan_by_direct_integration():
    """Force of a cut-off bulge with q = 1/2 by adaptive quadrature over homoeoids, at five places: 1e-6 at l_max 32.

    Binney & Tremaine (2008), section 2.5.2.
    """
    q, rho_0, r_s, r_cut = 0.5, 9.84e10, 0.075, 2.1
    bulge = DoublePowerLaw(rho_0, r_s, 0.0, 1.8, q, r_cut, l_max=32)

    def force(R, z, along):
        def integrand(t):
            u = (t / (1 - t)) ** 2
            m = np.sqrt(R**2 / (1 + u) + z**2 / (q**2 + u))
            rho = rho_0 * (1 + m / r_s) ** -1.8 * np.exp(-((m / r_cut) ** 2))
            return rho / (((1 if along == "R" else q**2) + u) * (1 + u) * np.sqrt(q**2 + u)) * 2 * t / (1 - t) ** 3

        value = quad(integrand, 0, 1, epsabs=0, epsrel=1e-11, limit=400)[0]
        return -2 * np.pi * G * q * (R if along == "R" else z) * value

    for R, z in ((0.05, 0.02), (1.0, 0.0), (0.0, 1.0), (2.0, 1.5), (8.0, 0.5)):
        a = bulge.acceleration([R, 0.0, z]).numpy()
        expected = np.array([force(R, z, "R"), 0.0, force(R, z, "z")])
        assert np.linalg.norm(a - expected) < 1e-6 * np.linalg.norm(expected), (R, z)


@pytest.mark.parametrize(
    "spheroid",
    [
        DoublePowerLaw(RHO, R_S, 1.0, 3.0, 0.8, l_max=24),
        DoublePowerLaw(RHO, 1.0, 0.0, 5.0, 0.8, l_max=24),
        DoublePowerLaw(RHO, 1.0, 2.5, 2.5, 0.8, r_cut=50.0, l_max=24),
        DoublePowerLaw(RHO, 3.0, 0.5, 2.2, 1.2, l_max=24),
    ],
)
def test_laws(spheroid):
    """-grad Phi against differences (1e-8), Laplacian = 4 pi G rho (1e-5), circular speed, graphs; attraction."""
    radii = RADII[RADII < 60]
    x = points_at(radii)
    check_acceleration(spheroid, x)
    check_circular_speed(spheroid, radii)
    check_no_graph(spheroid, x)
    scale = spheroid.density(x) + 1e-3 * spheroid.enclosed_mass(radii) / radii**3
    assert float(((Potential.density(spheroid, x) - spheroid.density(x)) / scale).abs().max()) < 1e-5
    assert bool(((spheroid.acceleration(x) * x).sum(-1) < 0).all())


def test_cutoff_contract():
    """Every check of `contracts.check_potential` for gamma = 0, 1.2 and 1.8; `mass_r` is r^2 dPhi/dr / G."""
    for gamma in (0.0, 1.2, 1.8):
        sphere = PowerLawCutoff(1e10, 1.9, gamma)
        radii = RADII[RADII < 6]
        check_potential(sphere, radii, lambda x, s=sphere: s.density_r(x.norm(dim=-1)))
        torch.testing.assert_close(sphere.mass_r(RADII), sphere.enclosed_mass(RADII), rtol=1e-12, atol=0.0)
        assert float(sphere.mass_r(torch.tensor(100.0).double())) == pytest.approx(1e10, rel=1e-14)
        assert float(sphere.phi_r(torch.tensor(1e3).double())) == pytest.approx(-G * 1e10 / 1e3, rel=1e-12)
        check_parameter_gradients(
            lambda gamma=gamma, **kw: PowerLawCutoff(gamma=gamma, **kw), {"m_tot": 1e10, "r_c": 1.9}, points_at(radii)
        )


def test_cutoff_against_galpy():
    """Force and differences of Phi (galpy's is zero at the centre) of the bulge of MWPotential2014: 1e-10."""
    galpy = pytest.importorskip("galpy.potential")
    theirs, ours = galpy.PowerSphericalPotentialwCutoff(amp=1.0, alpha=1.8, rc=1.9), PowerLawCutoff(1e10, 1.9, 1.8)
    amp = G * 1e10 / theirs.mass(1e3, use_physical=False)
    phi = torch.tensor([amp * theirs(float(r), 0.0, use_physical=False) for r in RADII], dtype=torch.float64)
    force = torch.tensor([amp * theirs.Rforce(float(r), 0.0, use_physical=False) for r in RADII], dtype=torch.float64)
    torch.testing.assert_close(ours.radial_acceleration(RADII), force, rtol=1e-10, atol=0.0)
    torch.testing.assert_close((ours.phi_r(RADII) - ours.phi_r(RADII[0])), phi - phi[0], rtol=1e-10, atol=1e-6)


def test_parameter_gradients():
    """Slopes of Phi, force and density by all six parameters against differences: 1e-7."""
    values = {"rho_0": RHO, "r_s": R_S, "gamma": 1.0, "beta": 3.2, "q": 0.8, "r_cut": 200.0}
    check_parameter_gradients(lambda **kw: DoublePowerLaw(l_max=8, **kw), values, points_at(RADII[::3]))


def test_priors():
    """Priors are sites; a frozen draw is the potential of those numbers; one of q keeps the axisymmetry."""
    x = points_at(RADII[::4])
    free = DoublePowerLaw(dist.LogNormal(16.0, 0.1), R_S, dist.Uniform(0.0, 2.0), 3.0, dist.Uniform(0.5, 1.5))
    assert free.symmetry == "axisymmetric"
    assert {"rho_0", "gamma", "q"} <= set(pyro.poutine.trace(free).get_trace(x).stochastic_nodes)
    values = {k: torch.tensor(v, dtype=torch.float64) for k, v in (("rho_0", RHO), ("gamma", 0.7), ("q", 0.9))}
    fixed = DoublePowerLaw(RHO, R_S, 0.7, 3.0, 0.9)
    torch.testing.assert_close(freeze(free, values).phi(x), fixed.phi(x), rtol=1e-13, atol=0.0)
    assert DoublePowerLaw(RHO, R_S, 1.0, 3.0, torch.nn.Parameter(torch.ones(()).double())).symmetry == "axisymmetric"


def test_draws_out_of_range():
    """A prior that reaches where no potential vanishes at infinity, or the mass is infinite, gives NaN, no number."""
    x, one = points_at(RADII), torch.ones((), dtype=torch.float64)
    free = DoublePowerLaw(RHO, R_S, dist.Uniform(0.0, 4.0), dist.Uniform(1.0, 4.0), 0.8)
    for gamma, beta, exists in ((1.0, 1.9, False), (1.0, 2.1, True), (2.9, 4.0, True), (3.1, 4.0, False)):
        phi = freeze(free, {"gamma": gamma * one, "beta": beta * one}).phi(x)
        assert bool((phi < 0).all()) if exists else bool(phi.isnan().all()), (gamma, beta)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: DoublePowerLaw(RHO, R_S, 3.0, 4.0),
            r"gamma of DoublePowerLaw must be in \[0, 3\) and finite",
        ),
        (lambda: DoublePowerLaw(RHO, R_S, 1.0, 2.0), "beta of DoublePowerLaw must be above 2 and finite, got 2.0"),
        (lambda: DoublePowerLaw(RHO, R_S, 1.0, 3.0, 0.0), "q of DoublePowerLaw must be positive and finite, got 0.0"),
        (lambda: DoublePowerLaw(RHO, R_S, 1.0, 3.0, 0.5, l_max=3), "l_max must be an even number"),
        (lambda: DoublePowerLaw(RHO, R_S, 1.0, 1.8, r_cut=-1), "r_cut of DoublePowerLaw must be positive"),
        (lambda: DoublePowerLaw(RHO, 0.01, 1.0, 1.8, r_cut=300.0), "r_cut of DoublePowerLaw must be at most 1e4 r_s"),
        (lambda: PowerLawCutoff(1e10, 1.0, 2.0), r"gamma of PowerLawCutoff must be in \[0, 2\) and finite, got 2.0"),
        (lambda: PowerLawCutoff(1e10, 1.0, dist.Uniform(0.0, 1.0)), "gamma of PowerLawCutoff must be a number"),
    ],
)
def test_bad_input(build, message):
    """Every bad parameter is refused by name, with the value received."""
    with pytest.raises(ValueError, match=message):
        build()
