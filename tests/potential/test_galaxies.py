"""Milky Ways by name against galpy's and against what the papers say of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayespot.potential import (
    NFW,
    DoublePowerLaw,
    ExponentialDisc,
    McMillan17,
    MWPotential2014,
    SumPotential,
)
from bayespot.storage import read, write
from bayespot.units import G

GENERATOR = np.random.default_rng(1)
R = np.exp(GENERATOR.uniform(np.log(0.3), np.log(50.0), 200))
Z = R * GENERATOR.standard_normal(200) * GENERATOR.choice([0.05, 0.3, 1.0], 200)
X = torch.as_tensor(np.stack([R, 0 * R, Z], -1))
RADII = np.array([2.0, 5.0, 8.0, 15.0])


def compared(potential, theirs, ro, vo):
    """Relative errors of force, density, vertical and epicycle frequency against galpy's."""
    import galpy.potential as galpy

    def evaluate(function, *places):
        return np.array([function(theirs, *(p / ro for p in place), use_physical=False) for place in zip(*places)])  # noqa: B905

    force = np.stack([evaluate(f, R, Z) for f in (galpy.evaluateRforces, galpy.evaluatezforces)]) * vo**2 / ro
    a = potential.acceleration(X).numpy()[:, ::2].T
    rho = evaluate(galpy.evaluateDensities, R, Z) * vo**2 / ro**2 / G
    nu, kappa = (evaluate(f, RADII) * vo / ro for f in (galpy.verticalfreq, galpy.epifreq))
    return (
        np.hypot(*(a - force)) / np.hypot(*force),
        np.abs(potential.density(X).numpy() / rho - 1),
        np.abs(potential.vertical_frequency(RADII).numpy() / nu - 1),
        np.abs(potential.epicycle_frequency(RADII).numpy() / kappa - 1),
    )


def test_mwpotential2014_against_galpy():
    """Forces, density and both frequencies, 0.3 < R < 50 kpc: 1e-12."""
    galpy = pytest.importorskip("galpy.potential")
    for error in compared(MWPotential2014(), galpy.MWPotential2014, 8.0, 220.0):
        assert error.max() < 1e-12


def test_mwpotential2014_against_its_paper():
    """Bovy (2015), table 1 and section 3.5: parts of v_c^2 at 8 kpc, masses 0.45, 6.8 and 80 (virial) e10 Msun."""
    galaxy = MWPotential2014()
    parts = [float(member.circular_speed(8.0)) ** 2 / 220**2 for member in galaxy.members]
    assert parts == pytest.approx([0.05, 0.60, 0.35], rel=1e-12)
    bulge, disc, halo = galaxy.members
    assert float(bulge.m_tot) == pytest.approx(0.45e10, rel=0.01)
    assert float(disc.m_tot) == pytest.approx(6.8e10, rel=0.01)
    assert float(halo.enclosed_mass(245.0)) == pytest.approx(0.8e12, rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mcmillan17_against_galpy():
    """With the three digits of the paper's table 3, as galpy has them: force 0.1 %, density 1 %, frequencies 0.1 %.

    galpy's is an expansion as well, of degree 30 (disc) and in 20 radial functions.
    """
    module = pytest.importorskip("galpy.potential.mwpotentials")
    ours = SumPotential(
        [
            DoublePowerLaw(98.4e9, 0.075, 0.0, 1.8, q=0.5, r_cut=2.1, l_max=32),
            NFW(4 * math.pi * 0.00854e9 * 19.6**3, 19.6),
            ExponentialDisc(896e6, 2.5, 0.3, l_max=32),
            ExponentialDisc(183e6, 3.02, 0.9, l_max=32),
            ExponentialDisc(53.1e6, 7.0, 0.085, r_hole=4.0, vertical="sech2", l_max=32),
            ExponentialDisc(2180e6, 1.5, 0.045, r_hole=12.0, vertical="sech2", l_max=32),
        ]
    )
    force, density, nu, kappa = compared(ours, module.McMillan17, 8.21, 233.1)
    assert force.max() < 1e-3
    assert density.max() < 1e-2
    assert max(nu.max(), kappa.max()) < 1e-3
    named = McMillan17()
    error = (named.acceleration(X) - ours.acceleration(X)).norm(dim=-1) / ours.acceleration(X).norm(dim=-1)
    assert float(error.max()) < 5e-3  # the digits that the table leaves out


def test_mcmillan17_against_its_paper():
    """McMillan (2017), best-fitting model: v_0 at 8.21 kpc, local dark density, masses of stars and gas.

    v_0 = 233.1 km/s and rho_dm = 0.0101 Msun/pc^3 to the digits given; stellar mass within the posterior 54.3 +- 5.7,
    gas 11 (HI) and 1.2 (H2), all e9 Msun (table 1); gas columns at the Sun 10 and 2 Msun/pc^2 (table 1) to 5 %.
    """
    galaxy = McMillan17()
    bulge, halo, thin, thick, hi, h2 = galaxy.members
    assert round(float(galaxy.circular_speed(8.21)), 1) == 233.1
    assert round(float(halo.density([8.21, 0.0, 0.0])) / 1e9, 4) == 0.0101
    stars = [float(part.enclosed_mass(200.0)) / 1e9 for part in (bulge, thin, thick)]
    assert sum(stars) == pytest.approx(54.3, abs=5.7)
    assert stars[0] == pytest.approx(8.9, rel=0.02)
    assert float(hi.enclosed_mass(500.0)) == pytest.approx(11e9, rel=0.05)
    assert float(h2.enclosed_mass(500.0)) == pytest.approx(1.2e9, rel=0.05)
    assert float(hi.surface_density(8.33, 3.0)) == pytest.approx(10e6, rel=0.05)
    assert float(h2.surface_density(8.33, 3.0)) == pytest.approx(2e6, rel=0.05)


def test_mcmillan17_converges():
    """Force at l_max 16 and 32 against l_max 64: 95 % of the places within 0.1 and 0.015 %."""
    fine = McMillan17(64).acceleration(X)
    for l_max, bound in ((16, 1e-3), (32, 1.5e-4)):
        error = (McMillan17(l_max).acceleration(X) - fine).norm(dim=-1) / fine.norm(dim=-1)
        assert float(error.quantile(0.95)) < bound, l_max


def test_poisson():
    """Laplacian of the sum against its density: median 1e-3; the mass within 20 kpc is the parts' own."""
    from bayespot.potential import Potential

    galaxy = McMillan17()
    laplacian, rho = Potential.density(galaxy, X), galaxy.density(X)
    assert float((laplacian / rho - 1).abs().median()) < 1e-3
    parts = sum(float(member.enclosed_mass(20.0)) for member in galaxy.members)
    assert float(galaxy.enclosed_mass(20.0)) == pytest.approx(parts, rel=1e-10)
    assert math.isfinite(float(galaxy.phi([0.0, 0.0, 0.0])))


def test_export_to_galpy():
    """Phi, force and the density (the given one, not the multipoles' Laplacian) of an exported disc: 1e-12."""
    pytest.importorskip("galpy")
    disc = ExponentialDisc(9e8, 2.5, 0.3)
    exported = disc.to_galpy(ro=8.0, vo=220.0)
    x = torch.tensor([8.0, 0.0, 0.4], dtype=torch.float64)
    found = [method(1.0, 0.05, use_physical=False) for method in (exported, exported.zforce, exported.dens)]
    expected = float(disc.phi(x)), float(disc.acceleration(x)[2]) * 8, float(disc.density(x)) * G * 64
    assert found == pytest.approx([value / 220**2 for value in expected], rel=1e-12)


def test_storage(tmp_path):
    """Both come back from a file with the same numbers, without tables in it."""
    for build in (MWPotential2014, McMillan17):
        galaxy = build()
        before = galaxy.phi(X)
        write(galaxy, tmp_path / "g.safetensors")
        assert (tmp_path / "g.safetensors").stat().st_size < 200_000
        assert torch.equal(read(tmp_path / "g.safetensors").phi(X), before)
