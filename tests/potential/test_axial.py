"""Fields of potentials with an axis: closed forms, galpy, integrals of the density, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from astropy import units as u

from bayespot.potential import (
    NFW,
    CallablePotential,
    DirectNetwork,
    DoublePowerLaw,
    ExponentialDisc,
    Isochrone,
    Logarithmic,
    MassSlopeNetwork,
    MiyamotoNagai,
    Plummer,
    Potential,
    PowerLaw,
)
from bayespot.pyro_modules import freeze
from bayespot.units import G

R = torch.tensor([0.5, 2.0, 8.0, 30.0], dtype=torch.float64)
FIELDS = ("vertical_frequency", "epicycle_frequency", "density_flattening", "potential_flattening")


def close(found, expected, rtol):
    torch.testing.assert_close(
        found, torch.as_tensor(expected, dtype=torch.float64).expand_as(found), rtol=rtol, atol=0.0
    )


def test_frequencies_in_closed_form():
    """Logarithmic, Miyamoto-Nagai, a homogeneous sphere and Kepler's law: 1e-12.

    Logarithmic: nu = v_0 / (q sqrt(R^2 + r_c^2)), kappa^2 = 2 v_0^2 (R^2 + 2 r_c^2) / (R^2 + r_c^2)^2.
    """
    v, r_c, q = 220.0, 1.5, 0.8
    flat = Logarithmic(v, r_c, q)
    close(flat.vertical_frequency(R), v / (q * (R**2 + r_c**2).sqrt()), 1e-12)
    close(flat.epicycle_frequency(R), (2 * v**2 * (R**2 + 2 * r_c**2)).sqrt() / (R**2 + r_c**2), 1e-12)
    m, a, b = 7e10, 3.0, 0.3
    disc, S2 = MiyamotoNagai(m, a, b), R**2 + (a + b) ** 2
    close(disc.vertical_frequency(R), (G * m * (a + b) / b / S2**1.5).sqrt(), 1e-12)
    close(disc.epicycle_frequency(R), (G * m * (4 * S2 - 3 * R**2) / S2**2.5).sqrt(), 1e-12)
    sphere = PowerLaw(1e10, 1.0, 0.0)
    close(sphere.epicycle_frequency(R), 2 * math.sqrt(G * 1e10), 1e-12)
    for potential in (sphere, Plummer(1e-9 * 1e10, 1e-6)):
        close(potential.vertical_frequency(R), potential.circular_speed(R) / R, 1e-12)
    close(Plummer(10.0, 1e-9).epicycle_frequency(R), (G * 10.0 / R**3).sqrt(), 1e-12)


def test_frequencies_against_galpy():
    """A disc and a halo together: 1e-10."""
    galpy = pytest.importorskip("galpy.potential")
    ours = MiyamotoNagai(7e10, 3.0, 0.3) + NFW(1e12, 20.0)
    theirs = galpy.MiyamotoNagaiPotential(amp=G * 7e10, a=3.0, b=0.3) + galpy.NFWPotential(amp=G * 1e12, a=20.0)
    close(ours.vertical_frequency(R), [galpy.verticalfreq(theirs, float(r), use_physical=False) for r in R], 1e-10)
    close(ours.epicycle_frequency(R), [galpy.epifreq(theirs, float(r), use_physical=False) for r in R], 1e-10)


def test_imaginary_frequencies():
    """Where the plane, or circular orbits, are unstable: NaN, as the velocity of a circular orbit."""

    class Hill(Potential):
        symmetry = "axisymmetric"

        def phi(self, x):
            return -(x**2).sum(-1)

    assert bool(Hill().vertical_frequency(R).isnan().all())
    assert bool(Hill().epicycle_frequency(R).isnan().all())


def test_surface_density():
    """Exponential and sech^2 columns 1e-9, an isothermal layer's thinnest part, a Plummer sphere, broadcast: 1e-9."""
    z = torch.tensor([[0.001], [0.1], [1.1], [10.0]], dtype=torch.float64)
    disc = ExponentialDisc(9e8, 2.5, 0.3)
    found = disc.surface_density(R, z)
    assert found.shape == (4, 4)
    close(found, 9e8 * torch.exp(-R / 2.5) * -torch.expm1(-z / 0.3), 1e-9)
    gas = ExponentialDisc(9e8, 2.5, 0.045, vertical="sech2")
    close(gas.surface_density(R, z), 9e8 * torch.exp(-R / 2.5) * torch.tanh(z / 0.09), 1e-9)
    m, b = 1e11, 2.0
    s2 = R**2 + b**2
    column = (
        3
        * m
        * b**2
        / (4 * math.pi)
        * 2
        * (z / (3 * s2 * (s2 + z**2) ** 1.5) + 2 * z / (3 * s2**2 * (s2 + z**2) ** 0.5))
    )
    close(Plummer(m, b).surface_density(R, z), column, 1e-9)
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=rf"z_max must be positive and finite \(kpc\), got {wrong}"):
            disc.surface_density(8.0, wrong)


def test_flattening():
    """Isodensity of spheroids q (1e-9), equipotentials of a logarithmic potential q, spheres 1, an exponential layer.

    Density of a disc: rho(0, 0, z) = rho(R, 0, 0) where z / h = R / r_d. Of the logarithmic potential at R >> r_c:
    Binney & Tremaine (2008), equation 2.72b: q_rho^2 = q^4 (2 - q^-2).
    """
    for q in (0.3, 0.8, 1.2):
        close(DoublePowerLaw(1e7, 20.0, 1.0, 3.0, q).density_flattening(R), q, 1e-9)
        close(Logarithmic(220.0, 1.0, q).potential_flattening(R), q, 1e-9)
    close(Logarithmic(220.0, 1e-6, 0.8).density_flattening(R), 0.8**2 * math.sqrt(2 - 0.8**-2), 1e-6)
    close(ExponentialDisc(9e8, 2.5, 0.3).density_flattening(R), 0.3 / 2.5, 1e-9)
    close(ExponentialDisc(9e8, 3.0, 0.01).density_flattening(R), 0.01 / 3, 1e-9)
    for field in ("density_flattening", "potential_flattening"):
        found = getattr(Isochrone(1e11, 3.0), field)(R)
        close(found, 1.0, 1e-9)
        assert not found.requires_grad
    both = ExponentialDisc(9e8, 2.5, 0.3) + DoublePowerLaw(1e7, 20.0, 1.0, 3.0, 0.8)
    assert bool((both.potential_flattening(R) > both.density_flattening(R)).all())
    assert bool(PowerLaw(1e10, 1.0, 0.0).density_flattening(R).isnan().all())


def test_derivatives():
    """Slopes by R and by a parameter against differences (1e-6); without gradients nothing has a graph."""
    halo = DoublePowerLaw(1e7, 20.0, 1.0, 3.0, 0.8)
    r = R.clone().requires_grad_()
    for name in ("vertical_frequency", "epicycle_frequency", "surface_density"):

        def field(potential, x, name=name):
            arguments = (torch.ones_like(x),) if name == "surface_density" else ()
            return getattr(potential, name)(x, *arguments)

        assert not field(halo, R).requires_grad
        (slope,) = torch.autograd.grad(field(halo, r).sum(), r)
        close(slope, (field(halo, R * (1 + 1e-5)) - field(halo, R * (1 - 1e-5))) / (2e-5 * R), 1e-6)
        q = torch.nn.Parameter(torch.tensor(0.8).double())
        (slope,) = torch.autograd.grad(field(DoublePowerLaw(1e7, 20.0, 1.0, 3.0, q), R).sum(), q)
        at = [field(DoublePowerLaw(1e7, 20.0, 1.0, 3.0, q), R).sum() for q in (0.8 + 1e-4, 0.8 - 1e-4)]
        assert float(slope) == pytest.approx(float(at[0] - at[1]) / 2e-4, rel=1e-5)


def test_other_potentials():
    """Networks and functions of other packages have them as well: the frequencies of a sphere, v_c / r, 1e-9."""

    class Harmonic:
        def phi(self, x):
            return (x**2).sum(-1) / 2

        def gradient(self, x):
            return x

        def hessian(self, x):
            return np.broadcast_to(np.eye(3), (len(x), 3, 3))

    close(CallablePotential(Harmonic()).vertical_frequency(R), 1.0, 1e-12)
    network = MassSlopeNetwork(1.0, -2.0, 5.0, 25.0)
    fixed = freeze(network, network.initial_values())
    close(fixed.vertical_frequency(R), fixed.circular_speed(R) / R, 1e-9)


def test_units():
    """Radii in pc."""
    disc = MiyamotoNagai(7e10, 3.0, 0.3)
    for name in FIELDS:
        close(getattr(disc, name)(8000 * u.pc), getattr(disc, name)(8.0), 1e-12)


@pytest.mark.parametrize("name", [*FIELDS, "surface_density"])
def test_triaxial(name):
    """Without an axis there is no such field."""
    network = DirectNetwork(3.0, 25.0, "triaxial", prior="none")
    arguments = (8.0, 1.0) if name == "surface_density" else (8.0,)
    with pytest.raises(
        ValueError, match=f"DirectNetwork is triaxial: {name} needs a potential symmetric about the z axis"
    ):
        getattr(network, name)(*arguments)
