"""Fields in the plane and over (R, z), of one potential and of many draws: closed forms, and draws one by one."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from pyro.distributions import LogNormal
from scipy.integrate import quad

from bayespot.potential import (
    AXIAL_FIELDS,
    MERIDIONAL_FIELDS,
    NFW,
    AxisymmetricNetwork,
    CallablePotential,
    DoublePowerLaw,
    ExponentialDisc,
    Logarithmic,
    MassSlopeNetwork,
    MiyamotoNagai,
    axial_fields,
    meridional_fields,
)
from bayespot.potential.axial_fields import fields_of_draws, fields_on_x_axis
from bayespot.pyro_modules import freeze
from bayespot.units import G

R = torch.tensor([0.5, 2.0, 8.2, 20.0], dtype=torch.float64)
Z = torch.tensor([0.0, 0.3, 1.1, 9.0], dtype=torch.float64)
DISC = MiyamotoNagai(6.8e10, 3.0, 0.28)


def prior(value: float, sd: float = 0.2) -> LogNormal:
    return LogNormal(torch.tensor(math.log(value)).double(), torch.tensor(sd).double())


def test_vertical_force_and_column():
    """Miyamoto-Nagai: K_z in closed form, to 1e-12; an exponential disc: Sigma (1 - exp(-z / h)), to 1e-9."""
    a, b, z = 3.0, 0.28, 1.1
    root = math.sqrt(z**2 + b**2)
    K_z = -G * 6.8e10 * z * (a + root) / root * (R**2 + (a + root) ** 2) ** -1.5
    found = axial_fields(DISC, R, ["vertical_acceleration"])["vertical_acceleration"]
    torch.testing.assert_close(found, K_z, rtol=1e-12, atol=0)
    disc = ExponentialDisc(9e8, 2.5, 0.3)
    column = axial_fields(disc, R, ["surface_density"], height=0.5)["surface_density"]
    torch.testing.assert_close(column, 9e8 * torch.exp(-R / 2.5) * (1 - math.exp(-0.5 / 0.3)), rtol=1e-9, atol=0)


def test_the_others_are_the_potentials_own():
    """Names, order and values of all fields; over (R, z) the components of the acceleration."""
    found = axial_fields(DISC, R)
    assert tuple(found) == AXIAL_FIELDS
    for name in AXIAL_FIELDS[2:]:
        torch.testing.assert_close(found[name], getattr(DISC, name)(R), rtol=0, atol=0)
    over = meridional_fields(DISC, R, Z)
    assert tuple(over) == MERIDIONAL_FIELDS
    x = torch.stack([R, 0 * R, Z], -1)
    torch.testing.assert_close(over["potential"], DISC.phi(x), rtol=0, atol=0)
    torch.testing.assert_close(over["density"], DISC.density(x), rtol=1e-12, atol=0)
    a = DISC.acceleration(x)
    torch.testing.assert_close(over["acceleration_R"], a[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(over["acceleration_z"], a[:, 2], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["at once", "one by one"])
def test_many_draws(kind):
    """Elementwise potentials are evaluated together, others in turn: the numbers are those of each draw alone, to
    1e-12, and every draw is counted."""
    if kind == "at once":
        potential = MiyamotoNagai(prior(6e10), 3.0, prior(0.3)) + NFW(prior(8e11), 16.0) + Logarithmic(90.0, 2.0, 0.8)
        names, shapes = ("members.0.m_tot", "members.0.b", "members.1.m_s"), ((), (), ())
    else:
        network = AxisymmetricNetwork(MassSlopeNetwork(1.0, -2.0, 4.0, 25.0, n_features=4), l_max=4)
        potential = network + ExponentialDisc(prior(5e8), 2.5, 0.3)
        names = ("members.0.shape_weights", "members.0.monopole.ln_mass", "members.0.monopole.slope_weights",
                 "members.1.sigma_0")  # fmt: skip
        shapes = ((6, 3), (), (5,), ())
    generator = torch.Generator().manual_seed(0)
    n = 3
    scale = {"members.0.m_tot": 6e10, "members.0.b": 0.3, "members.1.m_s": 8e11, "members.1.sigma_0": 5e8}
    values = {}
    for name, shape in zip(names, shapes, strict=True):
        noise = 0.2 * torch.randn(n, *shape, dtype=torch.float64, generator=generator)
        values[name] = scale[name] * noise.exp() if name in scale else noise + (25 if "ln_mass" in name else 0)
    assert potential.elementwise == (kind == "at once")
    for evaluate, places in ((axial_fields, (R,)), (meridional_fields, (R, Z)), (fields_on_x_axis, (R,))):
        counted: list[int] = []
        found = fields_of_draws(evaluate, potential, values, places, functools.partial(counted.append, 1))
        assert len(counted) == n
        for i in range(n):
            with torch.no_grad():
                alone = evaluate(freeze(potential, {name: value[i] for name, value in values.items()}), *places)
            for name, value in alone.items():
                assert torch.isfinite(value).all(), name
                np.testing.assert_allclose(found[name][i], value, rtol=1e-10, err_msg=name)


def test_flattening_of_shared_places():
    """One search along the axis serves radii over six decades: each as alone, to 1e-9; NaN where R is not positive."""
    wide = torch.tensor([1e-3, 0.3, 40.0, 1e3, 0.0, -1.0], dtype=torch.float64)
    halo = DoublePowerLaw(1e7, 20.0, 1.0, 3.0, 0.7)
    torch.testing.assert_close(
        halo.density_flattening(wide[:4]), torch.full((4,), 0.7, dtype=torch.float64), rtol=1e-9, atol=0
    )
    together = DISC.potential_flattening(wide)
    for r, q in zip(wide[:4], together, strict=False):
        torch.testing.assert_close(DISC.potential_flattening(r), q, rtol=1e-9, atol=0)
    assert together[4:].isnan().all()
    assert DISC.potential_flattening(wide.reshape(2, 3)).shape == (2, 3)


def test_mass_inside_a_sphere():
    """A disc 50 times flatter than wide: the mass inside spheres by quadrature of its own density, to 1e-7."""
    disc = ExponentialDisc(9e8, 2.5, 0.05)
    for r in (1.0, 5.0):

        def ring(x: float, r: float = r) -> float:
            return 2 * math.pi * x * 9e8 * math.exp(-x / 2.5) * -math.expm1(-math.sqrt(r**2 - x**2) / 0.05)

        mass = quad(ring, 0, r, limit=200, epsabs=0, epsrel=1e-10)[0]
        assert float(disc.enclosed_mass(r)) == pytest.approx(mass, rel=1e-7)


def test_refusals():
    """Names, heights and symmetries that are none, in one sentence each."""
    with pytest.raises(ValueError, match="unknown field 'mass'; choose one of vertical_acceleration"):
        axial_fields(DISC, R, ["mass"])
    with pytest.raises(ValueError, match="unknown field 'mass'; choose one of potential, density"):
        meridional_fields(DISC, R, Z, ["mass"])
    for height in (0.0, -1.0, math.nan, [1.0, 2.0]):
        with pytest.raises(ValueError, match="height must be one positive, finite number"):
            axial_fields(DISC, R, height=height)
    box = CallablePotential(lambda x: (x**2).sum(-1), symmetry="triaxial")
    with pytest.raises(ValueError, match="CallablePotential is triaxial: it has no fields of R alone"):
        axial_fields(box, R)
