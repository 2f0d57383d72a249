"""Known densities of orbits and phase mixing: norms by importance sampling, moments, equilibria that stay."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from bayespot.actions.orbit import advance, integrate
from bayespot.actions.spherical import SphericalActions
from bayespot.mock.circular import CircularOrbits
from bayespot.mock.mixing import phase_mixed
from bayespot.mock.orbits import DoublePowerLawOrbits, MixedOrbits, QuasiIsothermalOrbits
from bayespot.potential import NFW, DirectNetwork, Hernquist, Isochrone, Logarithmic

GALAXY = Hernquist(5e10, 1.0) + NFW(8e11, 16.0)
HALO = DoublePowerLawOrbits(1500.0, 1.2, 5.0, outer_weights=(1.4, 0.8), rotation=0.4, J_phi_0=300.0)


def ratio(one, other, n: int = 200_000) -> tuple[float, float]:
    """Mean of f/g over draws of g, which is one, and its standard error."""
    J = other.sample(n, seed=5)
    weight = (one.log_prob(J) - other.log_prob(J)).exp()
    return float(weight.mean()), float(weight.std() / n**0.5)


@pytest.mark.parametrize(
    "other",
    [
        DoublePowerLawOrbits(1500.0, 1.2, 5.0),
        DoublePowerLawOrbits(1200.0, 1.0, 4.5, steepness=1.3, inner_weights=(1.2, 0.9)),
        DoublePowerLawOrbits(2000.0, 1.0, 4.0, outer_weights=(0.8, 1.2), rotation=-0.5, J_phi_0=100.0),
    ],
)
def test_double_power_law_is_normalised(other):
    """Sampled by rejection, normalised by quadrature: the mean ratio of two of them is one, both ways, 4 sigma."""
    for mean, error in (ratio(HALO, other), ratio(other, HALO)):
        assert abs(mean - 1) < 4 * error < 0.05


def test_double_power_law_has_its_slopes():
    """ln f falls by Gamma and B per unit of ln J far inside and far outside; rotation favours one sense by its rule."""
    direction = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    for size, slope in ((1e-6, -1.2), (1e7, -5.0)):
        pair = HALO.log_prob(torch.stack([1500 * size * direction, 1500 * size * math.e * direction]))
        assert float(pair.diff()) == pytest.approx(slope, abs=1e-4)
    J = HALO.sample(100_000, seed=2)
    fast = J[:, 1].abs() > 1500
    assert float((J[fast, 1] > 0).double().mean()) == pytest.approx(0.7, abs=0.01)
    assert float((J[:, 0] >= 0).double().mean()) == float((J[:, 2] >= 0).double().mean()) == 1


def test_quasi_isothermal_disc():
    """Its norm by importance sampling (0.7 %, 4 sigma), guiding radii Gamma(2), actions exponential at their scale."""
    disc = QuasiIsothermalOrbits(GALAXY, r_d=3.0, sigma_r=60.0, sigma_z=40.0, r_sigma=6.0)
    broad = QuasiIsothermalOrbits(GALAXY, r_d=4.0, sigma_r=80.0, sigma_z=60.0, r_sigma=6.0, J_phi_0=100.0)
    mean, error = ratio(disc, broad)
    assert abs(mean - 1) < 4 * error < 0.03
    J = disc.sample(20_000, seed=1)
    R = disc.circular.radius(J[:, 1].abs().numpy())
    assert kstest(R, "gamma", args=(2, 0, 3.0)).pvalue > 0.001
    at = disc.circular.at(R)
    scaled = J[:, 0].numpy() * at.kappa / (60.0 * np.exp((8 - R) / 6)) ** 2
    assert kstest(scaled, "expon").pvalue > 0.001
    assert float((J[:, 1] > 0).double().mean()) > 0.97


def test_mixed_populations():
    """Fractions of the draws and of f are those given."""
    disc = QuasiIsothermalOrbits(GALAXY)
    both = MixedOrbits([disc, HALO], [0.7, 0.3])
    J = both.sample(20_000, seed=3)
    torch.testing.assert_close(both.log_prob(J).exp(), 0.7 * disc.log_prob(J).exp() + 0.3 * HALO.log_prob(J).exp())
    share = (0.7 * disc.log_prob(J).exp() / both.log_prob(J).exp()).mean()
    assert float(share) == pytest.approx(0.7, abs=0.015)


def test_circular_orbits():
    """Frequencies of a flattened logarithmic potential in closed form, 1e-6; radii found again by L and by E, 1e-10."""
    v, r_c, q = 200.0, 1.0, 0.8
    orbits = CircularOrbits(Logarithmic(v, r_c, q))
    R = np.geomspace(0.01, 1000, 57)
    at = orbits.at(R)
    omega2 = v**2 / (r_c**2 + R**2)
    np.testing.assert_allclose(at.omega**2, omega2, rtol=1e-6)
    np.testing.assert_allclose(at.kappa**2, omega2 * (4 - 2 * R**2 / (r_c**2 + R**2)), rtol=1e-6)
    np.testing.assert_allclose(at.nu**2, omega2 / q**2, rtol=1e-6)
    np.testing.assert_allclose(orbits.radius(at.L), R, rtol=1e-10)
    np.testing.assert_allclose(orbits.radius_of_energy(at.E), R, rtol=1e-8)


def test_mixing_keeps_orbits_and_forgets_phases():
    """Stars all at pericentre: actions to 1e-4 afterwards, radial angles uniform; a copy of the stars is as before."""
    generator = torch.Generator().manual_seed(1)
    J = DoublePowerLawOrbits(1500.0, 1.2, 5.0).sample(300, seed=4)
    theta = 2 * math.pi * torch.rand(300, 3, generator=generator, dtype=torch.float64)
    theta[:, 0] = 0.0
    finder = SphericalActions()
    with torch.no_grad():
        w = finder.phase_space(GALAXY, J, theta)
        before = w.clone()
        fractions: list[float] = []
        mixed = phase_mixed(GALAXY, w, seed=2, n_periods=8.0, tick=fractions.append)
        found = finder.actions_angles(GALAXY, mixed)
    assert torch.equal(w, before)
    assert float(((found.J - J).abs().sum(-1) / J.abs().sum(-1)).max()) < 1e-4
    assert kstest(found.theta[:, 0].numpy() / (2 * math.pi), "uniform").pvalue > 0.001
    assert fractions[-1] == 1
    assert fractions == sorted(fractions)


def test_each_star_has_its_own_time():
    """`advance` takes stars where `integrate` takes them one by one."""
    potential = Isochrone(1e11, 3.0)
    w = torch.tensor([[8.0, 0.0, 1.0, 20.0, 150.0, 30.0], [3.0, 2.0, 0.0, 0.0, 90.0, 40.0]], dtype=torch.float64)
    times = torch.tensor([0.02, -0.005], dtype=torch.float64)
    moved = advance(potential, w, times, "yoshida4", n_steps=4)
    for star, time, end in zip(w, times.tolist(), moved, strict=True):
        torch.testing.assert_close(end, integrate(potential, star, (time, 4), "yoshida4")[-1], rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DoublePowerLawOrbits(-1.0, 1.0, 5.0), "J_0"),
        (lambda: DoublePowerLawOrbits(1e3, 3.2, 5.0), "inner < 3 < outer"),
        (lambda: DoublePowerLawOrbits(1e3, 1.0, 5.0, inner_weights=(2.0, 1.5)), "inner_weights"),
        (lambda: DoublePowerLawOrbits(1e3, 1.0, 5.0, rotation=1.5), "rotation"),
        (lambda: QuasiIsothermalOrbits(GALAXY, sigma_z=0.0), "sigma_z"),
        (lambda: MixedOrbits([HALO], [0.5]), "sum to one"),
        (lambda: MixedOrbits([HALO], [0.5, 0.5]), "fraction for each"),
        (lambda: CircularOrbits(DirectNetwork(3.0, 25.0, "triaxial", prior="none")), "triaxial: it has no circular"),
        (lambda: phase_mixed(GALAXY, torch.ones(1, 6), 0, n_periods=0.0), "n_periods"),
    ],
)
def test_refusals(build, message):
    """What cannot be is refused by name."""
    with pytest.raises(ValueError, match=message):
        build()
