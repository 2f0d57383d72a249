"""Closed forms flattened along z: textbook densities, the contract of potentials, limits, parameters."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts.potential import check_parameter_gradients, check_potential, points_at

from bayespot.potential import MiyamotoNagai, Plummer, Satoh
from bayespot.pyro_modules import freeze
from bayespot.units import G

RADII = torch.logspace(-2, 2.5, 19, dtype=torch.float64)
M, A, B = 6.8e10, 3.0, 0.28


def miyamoto_nagai(x, m, a, b):
    """Binney & Tremaine (2008), equation 2.69b."""
    R2, zeta = x[..., 0] ** 2 + x[..., 1] ** 2, (x[..., 2] ** 2 + b**2).sqrt()
    top = a * R2 + (a + 3 * zeta) * (a + zeta) ** 2
    return b**2 * m / (4 * math.pi) * top / ((R2 + (a + zeta) ** 2) ** 2.5 * zeta**3)


def satoh(x, m, a, b):
    """Binney & Tremaine (2008), equation 2.70b."""
    zeta2, r2 = x[..., 2] ** 2 + b**2, (x**2).sum(-1)
    S2 = r2 + a * (a + 2 * zeta2.sqrt())
    return a * b**2 * m / (4 * math.pi * S2**1.5 * zeta2) * (zeta2**-0.5 + 3 / a * (1 - r2 / S2))


DENSITIES = {MiyamotoNagai: miyamoto_nagai, Satoh: satoh}


@pytest.mark.parametrize("cls", DENSITIES)
def test_contract(cls):
    """Every check of `contracts.check_potential` for a = 2, b = 3 at 0.01 to 3 kpc, where its differences resolve b."""
    check_potential(cls(M, 2.0, 3.0), RADII[RADII < 3], lambda x: DENSITIES[cls](x, M, 2.0, 3.0))


@pytest.mark.parametrize("cls", DENSITIES)
def test_density_of_thin_discs(cls):
    """The Laplacian of a disc of b/a = 0.1 against the textbook over 4.5 decades: 1e-7 (its terms cancel to that)."""
    x = points_at(RADII)
    expected = DENSITIES[cls](x, M, A, B)
    assert bool((expected > 0).all())
    torch.testing.assert_close(cls(M, A, B).density(x), expected, rtol=1e-7, atol=0.0)


def test_against_galpy():
    """Phi and forces of a thin Miyamoto-Nagai disc: 1e-12 (galpy has no Satoh disc)."""
    galpy = pytest.importorskip("galpy.potential")
    theirs, ours = galpy.MiyamotoNagaiPotential(amp=G * M, a=A, b=B), MiyamotoNagai(M, A, B)
    x = points_at(RADII)
    R, z = (x[:, 0] ** 2 + x[:, 1] ** 2).sqrt(), x[:, 2]
    a = ours.acceleration(x)
    found = (ours.phi(x), (a[:, :2] * x[:, :2]).sum(-1) / R, a[:, 2])
    for value, method in zip(found, (theirs, theirs.Rforce, theirs.zforce), strict=True):
        expected = method(R.numpy(), z.numpy(), use_physical=False)
        torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("cls", [MiyamotoNagai, Satoh])
def test_parameter_gradients(cls):
    """Derivatives of Phi, acceleration and density by every parameter against differences: 1e-7."""
    check_parameter_gradients(cls, {"m_tot": M, "a": A, "b": B}, points_at(RADII[::3]))


def test_limits():
    """A = 0: a Plummer sphere and a point; far away Kepler's law; at the origin no force: 1e-13."""
    x = points_at(RADII)
    torch.testing.assert_close(MiyamotoNagai(M, 0.0, B).phi(x), Plummer(M, B).phi(x), rtol=1e-13, atol=0.0)
    torch.testing.assert_close(Satoh(M, 0, B).phi(x), -G * M / x.norm(dim=-1), rtol=1e-13, atol=0.0)
    for potential in (MiyamotoNagai(M, A, B), Satoh(M, A, B)):
        far = torch.tensor([0.0, 6e7, 8e7], dtype=torch.float64)
        assert float(potential.phi(far)) == pytest.approx(-G * M / 1e8, rel=1e-7)
        assert bool((potential.acceleration(torch.zeros(3, dtype=torch.float64)) == 0).all())


def test_many_parameters_at_once():
    """Parameters (n, 1) with positions (n, m, 3), as in draws, equal one after the other; priors are sites."""
    x = points_at(RADII)
    for cls in (MiyamotoNagai, Satoh):
        potential = cls(dist.LogNormal(25.0, 0.1), dist.LogNormal(1.0, 0.1), B)
        sites = pyro.poutine.trace(potential).get_trace(x).stochastic_nodes
        assert {"m_tot", "a"} <= set(sites)
        values = {"m_tot": torch.tensor([[5e10], [7e10]]).double(), "a": torch.tensor([[2.0], [3.0]]).double()}
        found = freeze(potential, values).phi(x.expand(2, -1, 3))
        for i in range(2):
            one = cls(float(values["m_tot"][i]), float(values["a"][i]), B).phi(x)
            torch.testing.assert_close(found[i], one, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MiyamotoNagai(M, -1.0, B), "a of MiyamotoNagai must be at least 0 and finite, got -1.0"),
        (lambda: MiyamotoNagai(M, A, 0.0), "b of MiyamotoNagai must be positive and finite, got 0.0"),
        (lambda: Satoh(M, math.inf, B), "a of Satoh must be at least 0 and finite, got inf"),
        (lambda: Satoh(0.0, A, B), "m_tot of Satoh must be positive and finite, got 0.0"),
    ],
)
def test_bad_input(build, message):
    """Every bad parameter is refused by name, with the value received."""
    with pytest.raises(ValueError, match=message):
        build()
