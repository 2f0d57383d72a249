"""Mock snapshots: equilibrium, densities, anisotropy, and each system's own distribution function."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch

from bayespot.mock import MOCKS, Equilibrium, equilibrium, mock, truth_potential
from bayespot.potential import (
    NFW,
    CoredPowerLaw,
    Hernquist,
    Isochrone,
    Jaffe,
    Logarithmic,
    MassSlopeNetwork,
    Plummer,
    PowerLaw,
    describe,
)
from bayespot.units import G

N = 100_000


@functools.cache
def snapshot(name):
    """Stars of a named mock (seed 1) and its equilibrium."""
    catalog = mock(name, n_stars=N, seed=1)
    return catalog, equilibrium(catalog)


def radii(w):
    return w[:, :3].norm(dim=-1).numpy()


def velocities(w):
    """Radial velocity squared and tangential velocity squared."""
    x, v = w[:, :3], w[:, 3:]
    v_r2 = (((x * v).sum(-1)) ** 2 / (x**2).sum(-1)).numpy()
    return v_r2, (v**2).sum(-1).numpy() - v_r2


def jeans_dispersion(system, r_bins):
    """sigma_r^2 from the Jeans equation with anisotropy (r^2 + beta r_a^2) / (r^2 + r_a^2), by 1500 Gauss-Legendre
    nodes in ln r from each radius to e^30 times as far.

    nu sigma_r^2 g = int_r^inf g nu G M / r'^2 dr', g = r^(2 beta) (1 + r^2/r_a^2)^(1 - beta).
    Binney & Tremaine (2008), equation 4.216 and its Osipkov-Merritt generalisation.
    """
    beta, r_a = system.beta, system.anisotropy_radius

    def weight(r):
        with torch.no_grad():
            nu = system.tracers.density_r(torch.as_tensor(r)).numpy()
        return r ** (2 * beta) * (1 + r**2 / r_a**2) ** (1 - beta) * nu

    node, share = np.polynomial.legendre.leggauss(15)
    r = r_bins[:, None] * np.exp(0.3 * np.arange(100)[:, None] + 0.15 * (1 + node)).ravel()
    with torch.no_grad():
        pull = -(system.potential.radial_acceleration(torch.as_tensor(r)).numpy() * r)
    return (weight(r) * pull) @ np.tile(0.15 * share, 100) / weight(r_bins)


@pytest.mark.parametrize("name", MOCKS)
def test_virial_ratio(name):
    """2K + W = 0, W = -sum x . grad Phi, within 4.5 standard errors of the sample.

    Also in the form d/dt sum x.v chi(r) = 0 with chi = (1 + r/r_half)^-2, which weighs the inner stars.
    """
    catalog, system = snapshot(name)
    w = catalog.w
    x, v, r = w[:, :3], w[:, 3:], torch.as_tensor(radii(w))
    with torch.no_grad():
        a = system.potential.acceleration(x)
    half = r.median()
    xv = (x * v).sum(-1)
    for chi, slope in (
        (torch.ones_like(r), torch.zeros_like(r)),
        ((1 + r / half) ** -2, -2 / half * (1 + r / half) ** -3),
    ):
        rate = ((v**2).sum(-1) + (x * a).sum(-1)) * chi + xv**2 / r * slope
        z = float(rate.mean() / rate.std() * math.sqrt(N))
        assert abs(z) < 4.5, f"{name}: d/dt of sum x.v chi is off zero by {z:.1f} standard errors"


@pytest.mark.parametrize("name", MOCKS)
def test_radial_distribution(name):
    """Kolmogorov-Smirnov test of the radii against the closed-form mass: p > 1e-4; directions isotropic."""
    from scipy.stats import kstest

    catalog, system = snapshot(name)
    with torch.no_grad():
        fraction = (system.tracers.mass_r(torch.as_tensor(radii(catalog.w))) / system.tracers.total_mass()).numpy()
    assert kstest(fraction, "uniform").pvalue > 1e-4
    cosines = catalog.w[:, :3] / catalog.w[:, :3].norm(dim=-1, keepdim=True)
    assert (cosines.mean(0).abs() < 5 / math.sqrt(3 * N)).all()


@pytest.mark.parametrize("name", MOCKS)
def test_dispersions(name):
    """Radial dispersion against the Jeans integral and anisotropy against its law, in 12 thin radial shells.

    Stars within 3 % of each radius; 5 standard errors, plus 0.3 % for the width of the shell.
    """
    catalog, system = snapshot(name)
    r = radii(catalog.w)
    v_r2, v_t2 = velocities(catalog.w)
    centres = np.quantile(r, np.linspace(0.03, 0.97, 12))
    expected = jeans_dispersion(system, centres)
    for centre, sigma2 in zip(centres, expected, strict=True):
        shell = np.abs(np.log(r / centre)) < 0.03
        n = shell.sum()
        scale = v_r2[shell]
        assert abs(scale.mean() / sigma2 - 1) < 5 * scale.std() / scale.mean() / math.sqrt(n) + 0.003, centre
        beta = (centre**2 / system.anisotropy_radius**2 + system.beta) / (centre**2 / system.anisotropy_radius**2 + 1)
        excess = v_t2[shell] - 2 * (1 - beta) * v_r2[shell]
        assert abs(excess.mean()) < 5 * excess.std() / math.sqrt(n) + 0.003 * sigma2, centre


@pytest.mark.parametrize("name", MOCKS)
def test_own_distribution_function(name):
    """E_f[phi(w)/f(w)] = integral of phi, for a test density phi on phase space: within 5 standard errors.

    phi is 1 on a box: radius between the 5 and 95 % quantiles, velocity in the ellipsoid
    v_r^2 + (1 + r^2/r_a^2) v_t^2 < Phi(3 r) - Phi(r). The mean of 1/f over the stars there, and zero over the
    others, must be the box's phase-space volume: this fails if f is off in shape or normalisation.
    """
    catalog, system = snapshot(name)
    w, r = catalog.w, torch.as_tensor(radii(catalog.w))
    low, high = np.quantile(r, [0.05, 0.95])
    stretch = 1 + r**2 / system.anisotropy_radius**2
    v_r2, v_t2 = (torch.as_tensor(a) for a in velocities(w))
    with torch.no_grad():
        limit2 = system.potential.phi_r(3 * r) - system.potential.phi_r(r)
    inside = (r > low) & (r < high) & (v_r2 + stretch * v_t2 < limit2)
    # weighted by 1 / (r^3 x volume of the ellipsoid), so that all radii count alike
    weight = torch.where(inside, torch.exp(-system.log_f(w)) * stretch / (r**3 * limit2**1.5), 0.0)
    volume = (4 * math.pi) * (4 * math.pi / 3) * math.log(high / low)
    z = float((weight.mean() - volume) / (weight.std() / math.sqrt(N)))
    assert abs(z) < 5, f"{name}: {float(weight.mean()) / volume:.4f} of the volume, {z:.1f} standard errors"
    assert float(weight.std() / math.sqrt(N)) < 0.02 * volume


@pytest.mark.parametrize("name", ["isochrone", "plummer", "hernquist"])
def test_energies_follow_f_times_g(name):
    """Histogram of E in 40 equal-probability bins of f(E) g(E), g by quadrature: chi^2 p-value above 1e-4."""
    from scipy.stats import chisquare

    catalog, system = snapshot(name)
    with torch.no_grad():
        energy = (system.potential.phi(catalog.x) + 0.5 * (catalog.v**2).sum(-1)).numpy()
        s = np.linspace(-14, 20, 1500)
        phi = system.potential.phi_r(torch.as_tensor(np.exp(s))).numpy()
    # dN/dE = f (4 pi)^2 int r^2 sqrt(2 (E - Phi)) dr, r = r_E (1 - y^2) removes the root's singularity
    y, weight = np.polynomial.legendre.leggauss(60)
    y = (1 + y) / 2
    r = np.exp(s)[:, None] * (1 - y**2)
    with torch.no_grad():
        gap = phi[:, None] - system.potential.phi_r(torch.as_tensor(r)).numpy()
    g = 16 * np.pi**2 * np.exp(s) * (r**2 * np.sqrt(2 * gap.clip(0)) * 2 * y * weight / 2).sum(1)
    density = np.exp(system.log_f_of_q(phi)) * g * np.gradient(phi, s)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(s))])
    assert cumulative[-1] == pytest.approx(1, abs=1e-4)
    edges = np.interp(np.linspace(0, 1, 41)[1:-1] * cumulative[-1], cumulative, phi)
    counts = np.bincount(np.searchsorted(edges, energy), minlength=40)
    assert chisquare(counts).pvalue > 1e-4


def test_isochrone_closed_form():
    """f(E) of the isochrone against Binney & Tremaine (2008), equation 4.54: 1e-6 from deep to barely bound."""
    m, b = 1e11, 3.0
    e = np.concatenate([np.geomspace(1e-3, 0.1, 60), np.linspace(0.1, 0.4999, 60)])
    root = np.sqrt(e)
    bracket = 27 - 66 * e + 320 * e**2 - 240 * e**3 + 64 * e**4
    bracket += 3 * (16 * e**2 + 28 * e - 9) * np.arcsin(root) / np.sqrt(e * (1 - e))
    closed = root / (2 * (1 - e)) ** 4 * bracket / (math.sqrt(2) * (2 * math.pi) ** 3 * (G * m * b) ** 1.5)
    found = Equilibrium(Isochrone(m, b)).log_f_of_q(-e * G * m / b)
    # below e = 1e-3 the closed form itself loses its digits: its terms cancel to e^(5/2)
    np.testing.assert_allclose(np.exp(found), closed, rtol=1e-6)


def test_plummer_closed_form():
    """f(E) of the Plummer sphere, (24 sqrt 2 / 7 pi^3) E^(7/2) in G = M = b = 1: 1e-6 over eight decades of f."""
    e = np.geomspace(1e-2, 0.9999, 100)
    found = Equilibrium(Plummer(1 / G, 1.0)).log_f_of_q(-e)
    np.testing.assert_allclose(np.exp(found), 24 * math.sqrt(2) / (7 * math.pi**3) * e**3.5, rtol=1e-6)


def test_hernquist_half_radial():
    """Hernquist with beta = 1/2: f L = 3 E^2 / (4 pi^3) in G = M = a = 1 (Baes & Dejonghe 2002): 1e-6."""
    e = np.geomspace(1e-3, 0.999, 50)
    found = Equilibrium(Hernquist(1 / G, 1.0), beta=0.5).log_f_of_q(-e)
    np.testing.assert_allclose(np.exp(found), 3 * e**2 / (4 * math.pi**3), rtol=1e-6)


def test_large_samples():
    """No bias visible at N = 1e6: Kolmogorov-Smirnov p > 1e-4 for radii of isochrone stars, and for speeds of
    Plummer stars, whose squares over those of escape follow a Beta(3/2, 9/2) law at every radius (Aarseth, Henon
    & Wielen 1974) with mean 1/4 and no correlation with radius: 4.5 standard errors."""
    from scipy.stats import kstest

    n = 1_000_000
    r = radii(Equilibrium(Isochrone(1e11, 3.0)).sample(n, 5))
    fraction = Isochrone(1e11, 3.0).mass_r(torch.as_tensor(r)).numpy() / 1e11
    assert kstest(fraction, "uniform").pvalue > 1e-4
    # far tail: M(> r) = 2 b / r
    assert (r > 3e4).mean() == pytest.approx(2e-4, abs=5 * math.sqrt(2e-4 / n))
    plummer = Plummer(1e10, 1.0)
    w = Equilibrium(plummer).sample(n, 6)
    r = radii(w)
    with torch.no_grad():
        q2 = ((w[:, 3:] ** 2).sum(-1) / (-2 * plummer.phi(w[:, :3]))).numpy()
        rank = plummer.mass_r(torch.as_tensor(r)).numpy() / 1e10
    assert kstest(q2, "beta", (1.5, 4.5)).pvalue > 1e-4
    assert q2.mean() == pytest.approx(0.25, abs=4.5 * q2.std() / math.sqrt(n))
    assert abs(np.corrcoef(rank, q2)[0, 1]) < 4.5 / math.sqrt(n)


def test_seeds():
    """The same seed gives the same stars bit for bit, another seed none of them."""
    first, again, other = (mock("plummer", n_stars=50, seed=s).w for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not (first == other).any()


def test_truth_survives():
    """The metadata are plain JSON from which potential, tracers and f are rebuilt; none without truth."""
    catalog = mock("hernquist-in-nfw-radial", n_stars=20, seed=2, m_s=5e11)
    meta = json.loads(json.dumps(catalog.meta))
    truth = truth_potential(meta)
    assert describe(truth) == {"name": "NFW", "m_s": 5e11, "r_s": 20.0}
    assert truth_potential(catalog) is not None
    assert torch.equal(equilibrium(meta).log_f(catalog.w), equilibrium(catalog).log_f(catalog.w))
    assert meta["truth"]["beta"] == 0.3
    assert meta["truth"]["seed"] == 2
    assert truth_potential({}) is None
    with pytest.raises(ValueError, match="hold no truth"):
        equilibrium({})


@pytest.mark.parametrize(
    ("potential", "limit"),
    [
        (Plummer(1e10, 2.0), 0.75),
        (Hernquist(1e10, 2.0), 0.2023),
        (Jaffe(1e10, 2.0), 0.02205),
        (Isochrone(1e10, 2.0), 0.8735),
    ],
)
def test_smallest_anisotropy_radius(potential, limit):
    """Known limits of Osipkov-Merritt models in scale radii: Plummer 3/4 (f ~ E^(7/2) (1 - (1 - 7/(16 E^2)) / r_a^2)
    at E = 1), Hernquist 0.202, Jaffe 0.022, isochrone 0.874 (Merritt 1985; Ciotti 1996): 3e-4; below them an error."""
    least = Equilibrium(potential).smallest_anisotropy_radius()
    assert least / 2.0 == pytest.approx(limit, rel=5e-4)
    Equilibrium(potential, anisotropy_radius=1.001 * least)
    with pytest.raises(ValueError, match=r"no equilibrium.*the anisotropy radius must be at least"):
        Equilibrium(potential, anisotropy_radius=0.99 * least)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mock("einasto", n_stars=1, seed=0), "unknown system 'einasto'; choose one of isochrone"),
        (lambda: mock("isochrone", n_stars=0, seed=0), "n_stars must be at least 1, got 0"),
        (lambda: mock("isochrone", n_stars=1, seed=0, m_tot=-1.0), "m_tot of Isochrone must be positive"),
        (lambda: mock("isochrone", n_stars=1, seed=0, mass=1.0), "takes the parameters m_tot, r_s"),
        (lambda: mock("hernquist-in-galaxy", n_stars=1, seed=0, m_s=1.0), "the potential is a sum"),
        (lambda: mock(NFW(1e11, 10.0), n_stars=1, seed=0), "infinite mass"),
        (lambda: mock(PowerLaw(1e10, 1.0, 1.0), n_stars=1, seed=0), "infinite mass"),
        (lambda: mock(Logarithmic(200.0, 1.0), n_stars=1, seed=0), "tracers must be analytic spheres"),
        (lambda: mock(Logarithmic(200.0, 1.0, 0.8), n_stars=1, seed=0), "axisymmetric"),
        (lambda: mock("plummer", n_stars=1, seed=0, anisotropy_radius=-1.0), "anisotropy_radius must be positive"),
        (lambda: mock("plummer", n_stars=1, seed=0, beta=0.7), r"beta must be in \(-0.5, 0.5\], got 0.7"),
        (lambda: mock("plummer", n_stars=1, seed=0, beta=0.3), "no equilibrium"),
        (lambda: mock(NFW(1e11, 10.0), tracers="plummer", n_stars=1, seed=0), "no equilibrium"),
        (
            lambda: mock(MassSlopeNetwork(0.0, -1.0, 1.0, 20.0), tracers="plummer", n_stars=1, seed=0),
            "no description in closed form",
        ),
    ],
)
def test_bad_input(call, message):
    """Unknown names, bad numbers and impossible combinations are refused with the reason."""
    with pytest.raises(ValueError, match=message):
        call()


def test_any_sphere_as_potential():
    """Potentials of finite and infinite depth and mass, the cored ones with cored tracers: virial to 4.5 errors."""
    pairs = [
        (PowerLaw(1e10, 1.0, 1.0), Hernquist(1.0, 3.0)),
        (PowerLaw(1e10, 1.0, 2.0), Jaffe(1.0, 3.0)),
        (CoredPowerLaw(1e10, 2.0, 2.0), Plummer(1.0, 1.0)),
        (CoredPowerLaw(1e10, 2.0, 0.0), Plummer(1.0, 1.0)),
        (Hernquist(1e10, 1.0) + NFW(1e12, 20.0), Jaffe(1.0, 5.0)),
    ]
    for potential, tracers in pairs:
        w = mock(potential, tracers=tracers, n_stars=20_000, seed=0).w
        x, v, r = w[:, :3], w[:, 3:], w[:, :3].norm(dim=-1)
        chi, slope = (1 + r) ** -2, -2 * (1 + r) ** -3
        with torch.no_grad():
            a = potential.acceleration(x)
        rate = ((v**2).sum(-1) + (x * a).sum(-1)) * chi + (x * v).sum(-1) ** 2 / r * slope
        assert abs(float(rate.mean() / rate.std())) * math.sqrt(20_000) < 4.5, describe(potential)
