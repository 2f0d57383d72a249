"""The free-form axisymmetric potential: its sphere, Poisson's equation, an expansion of its density, sites."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts.potential import (
    check_acceleration,
    check_batches,
    check_circular_orbits,
    check_circular_speed,
    check_draws_on_grid,
    check_no_graph,
    points_at,
)

from bayespot.potential import (
    NFW,
    AxisymmetricNetwork,
    ExponentialDisc,
    MassSlopeNetwork,
    MultipoleExpansion,
    Potential,
)
from bayespot.potential.multipole import polar
from bayespot.pyro_modules import freeze
from bayespot.storage import read, write
from bayespot.units import G

RADII = torch.logspace(-2, 2.5, 19, dtype=torch.float64)
SEEDS = range(6)


def monopole():
    return MassSlopeNetwork(1.0, -2.0, 5.0, 25.0)


def drawn(seed, l_max=12, scale=1.0):
    """A draw from the prior, its shape's weights times ``scale``, and the values."""
    free = AxisymmetricNetwork(monopole(), l_max=l_max)
    generator = torch.Generator().manual_seed(seed)
    values = {
        "monopole.ln_mass": torch.tensor(25.0, dtype=torch.float64),
        "monopole.slope_weights": torch.randn(11, dtype=torch.float64, generator=generator),
        "shape_weights": scale * 0.7 * torch.randn(6, 3, dtype=torch.float64, generator=generator),
    }
    return freeze(free, values), values


def test_the_sphere():
    """Without weights: Phi, force, density and mass of the monopole to 1e-12; the start of a fit is such a sphere."""
    potential, _ = drawn(0, scale=0.0)
    x = points_at(RADII)
    for field in ("phi", "acceleration", "density"):
        expected = getattr(potential.monopole, field)(x)
        torch.testing.assert_close(getattr(potential, field)(x), expected, rtol=1e-12, atol=1e-12)
    free = AxisymmetricNetwork(monopole())
    start = freeze(free, free.initial_values())
    torch.testing.assert_close(start.density_flattening(RADII), torch.ones_like(RADII), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_of_the_prior(seed):
    """Positive density; Laplacian = 4 pi G rho (1e-2, l_max 16, and 1e-5, l_max 32, median); attraction; mass; v_c.

    The average density on spheres, by 64 nodes in the polar angle, is the monopole's (1e-10), and so is the flux of the
    force (1e-9). Forces at l_max 12 are within 1.5 % of those at l_max 32 at 95 % of the places.
    """
    potential, _ = drawn(seed, 12)
    fine, x = drawn(seed, 32)[0], points_at(RADII)
    rho = fine.density(x)
    assert bool((rho > 0).all())
    assert float((Potential.density(drawn(seed, 16)[0], x) / rho - 1).abs().median()) < 1e-2
    assert float((Potential.density(fine, x) / rho - 1).abs().median()) < 1e-5
    error = (potential.acceleration(x) - fine.acceleration(x)).norm(dim=-1) / fine.acceleration(x).norm(dim=-1)
    assert float(error.quantile(0.95)) < 1.5e-2
    assert bool(((fine.acceleration(x) * x).sum(-1) < 0).all())
    mu, weight = (torch.as_tensor(part) for part in np.polynomial.legendre.leggauss(64))
    direction = torch.stack([(1 - mu**2).sqrt(), 0 * mu, mu], -1)
    mean = (potential.density(RADII[:, None, None] * direction) * weight / 2).sum(-1)
    expected = potential.monopole.density(points_at(RADII))
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=0.0)
    flux = Potential.enclosed_mass(potential, RADII)
    torch.testing.assert_close(flux, potential.enclosed_mass(RADII), rtol=1e-9, atol=0.0)
    assert bool(torch.isfinite(potential.circular_speed(RADII)).all())


def test_against_an_expansion_of_its_density():
    """Forces equal those of `MultipoleExpansion` of the same density, on a grid of its own: 1e-6, 1e-3 to 1e6 kpc."""
    potential, _ = drawn(1, 12)

    def rho(R, z):
        return potential.density(torch.stack([R, torch.zeros_like(R), z], -1))

    expansion = MultipoleExpansion(rho, 1e-4, 1e5, 12, 28)
    x = points_at(torch.logspace(-3, 6, 40, dtype=torch.float64))
    a, expected = potential.acceleration(x), expansion.acceleration(x)
    assert float(((a - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 1e-6


class Difference(Potential):
    """What the shape adds to the monopole."""

    symmetry = "axisymmetric"

    def __init__(self, potential):
        super().__init__()
        self.potential = potential

    def phi(self, x):
        table = self.potential._build(self.potential.shape_weights)
        r, mu = polar(x)
        return table.phi(r.log(), mu)


def test_contract():
    """Circular speed, batches, graphs; Kepler's law far away; a finite force at the centre.

    Force = -grad Phi to 1e-5, as the monopole's: its Phi is interpolated and its slope exact; the multipoles' to 1e-8.
    """
    potential, _ = drawn(2)
    x = points_at(RADII)
    assert potential.symmetry == "axisymmetric"
    check_acceleration(potential, x, 1e-5)
    check_acceleration(Difference(potential), x)
    check_circular_speed(potential, RADII)
    check_batches(potential, x)
    check_no_graph(potential, x)
    far = torch.tensor([0.0, 6e8, 8e8], dtype=torch.float64)
    mass = float(potential.enclosed_mass(1e9))
    assert float(potential.phi(far)) == pytest.approx(-G * mass / 1e9, rel=1e-4)
    assert bool(torch.isfinite(potential.acceleration(torch.zeros(3, dtype=torch.float64))).all())


def test_parameter_gradients():
    """Slopes of Phi and of the force by every weight of shape and monopole against differences: 1e-6."""
    _, values = drawn(3, 8)
    x = points_at(RADII[::4])
    free = AxisymmetricNetwork(monopole(), l_max=8)

    def total(values):
        fixed = freeze(free, values)
        return fixed.phi(x).sum() + (fixed.acceleration(x) * x).sum()

    trained = {name: value.clone().requires_grad_() for name, value in values.items()}
    slopes = dict(zip(trained, torch.autograd.grad(total(trained), list(trained.values())), strict=True))
    generator = torch.Generator().manual_seed(0)
    for name, value in values.items():
        along = torch.randn(value.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            ahead, behind = (total(values | {name: value + h * along}) for h in (1e-5, -1e-5))
        assert float((slopes[name] * along).sum()) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-6), name


def test_sites():
    """Sites of the monopole and of the shape, one value a call; flat without a prior; starts for all of them."""
    free = AxisymmetricNetwork(monopole(), n_shapes=5, n_degrees=2)
    pyro.set_rng_seed(0)
    nodes = pyro.poutine.trace(free).get_trace(points_at(RADII))
    sites = {name for name, node in nodes.nodes.items() if node["type"] == "sample" and not name.startswith("_")}
    assert sites == {"monopole.ln_mass", "monopole.slope_weights", "shape_weights"} == set(free.initial_values())
    assert nodes.nodes["shape_weights"]["value"].shape == free.initial_values()["shape_weights"].shape == (5, 2)
    w = torch.cat([points_at(RADII), 100 * points_at(torch.ones(19, dtype=torch.float64), 1)], -1)
    placed = AxisymmetricNetwork.for_stars(w, prior="none")
    assert isinstance(placed._pyro_samples["shape_weights"], dist.ImproperUniform)
    assert placed.monopole.s_0 == pytest.approx(float(RADII.log().median()))


def test_with_a_disc_of_free_mass(tmp_path):
    """The sum with a disc of fixed shape: its sites, the sum of the fields; stored and read back."""
    free = AxisymmetricNetwork(monopole()) + ExponentialDisc(dist.LogNormal(20.0, 1.0), 2.5, 0.3)
    x = points_at(RADII)
    trace = pyro.poutine.trace(free).get_trace(x)
    assert {"members.0.shape_weights", "members.1.sigma_0"} <= set(trace.stochastic_nodes)
    _, values = drawn(4)
    values = {f"members.0.{name}": value for name, value in values.items()}
    values["members.1.sigma_0"] = torch.tensor(5e8, dtype=torch.float64)
    fixed = freeze(free, values)
    expected = drawn(4)[0].acceleration(x) + ExponentialDisc(5e8, 2.5, 0.3).acceleration(x)
    torch.testing.assert_close(fixed.acceleration(x), expected, rtol=1e-12, atol=1e-9)
    write(free, tmp_path / "p.safetensors")
    again = freeze(read(tmp_path / "p.safetensors"), values)
    torch.testing.assert_close(again.phi(x), fixed.phi(x), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_shapes": 1}, "need n_shapes >= 2 and n_degrees >= 1, got 1 and 3"),
        ({"n_degrees": 0}, "need n_shapes >= 2 and n_degrees >= 1, got 6 and 0"),
        ({"shape_sd": 0.0}, "shape_sd must be positive, got 0.0"),
        ({"l_max": 0}, "l_max must be at least 2, got 0"),
        ({"l_max": 9}, "l_max must be an even number, 0 or more, got 9"),
        ({"monopole": 3.0}, "monopole must be a MassSlopeNetwork, got 3.0"),
    ],
)
def test_bad_input(arguments, message):
    """Refused with the value received."""
    with pytest.raises(ValueError, match=message):
        AxisymmetricNetwork(**({"monopole": monopole()} | arguments))


def test_on_a_grid():
    """`phi_on_grid` is Phi at all pairs, beyond the table's ends too, alone and in a sum."""
    potential = drawn(3)[0] + ExponentialDisc(5e8, 2.6, 0.3) + NFW(1e11, 10.0)
    s = torch.linspace(-25.0, 40.0, 33, dtype=torch.float64)
    mu = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
    r = s.exp()[:, None]
    x, z = r * (1 - mu**2).sqrt(), r * mu
    places = torch.stack([x, torch.zeros_like(x), z], -1)
    for one in (potential, *potential.members):
        torch.testing.assert_close(one.phi_on_grid(s, mu), one.phi(places), rtol=1e-10, atol=1e-9)


def test_circular_orbits_beyond_the_tables():
    """Phi and v_c^2 in the plane from the centre to where all mass is inside, alone and in a sum."""
    potential = drawn(3)[0]
    r = torch.linspace(-18.0, 22.0, 60, dtype=torch.float64).exp()
    check_circular_orbits(potential, r)
    check_circular_orbits(potential + ExponentialDisc(5e8, 2.6, 0.3), r)
    # derivatives by the sites, which tables of actions pass on
    free, values = AxisymmetricNetwork(monopole()), drawn(3)[1]
    values = {name: value.clone().requires_grad_() for name, value in values.items()}
    for k in (0, 1):
        found, expected = (
            torch.autograd.grad(pair[k].sum(), list(values.values()), allow_unused=True)
            for pair in (
                freeze(free, values).phi_and_vc2(r[20:40]),
                Potential.phi_and_vc2(freeze(free, values), r[20:40]),
            )
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8 * float(other.abs().max()))


def test_many_draws_on_a_grid():
    free = AxisymmetricNetwork(monopole())
    values = [drawn(seed)[1] for seed in (3, 4, 5)]
    draws = {name: torch.stack([one[name] for one in values]) for name in values[0]}
    mu = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
    check_draws_on_grid(free, draws, torch.linspace(-3.0, 4.0, 9, dtype=torch.float64), mu)
    check_draws_on_grid(free, draws, torch.linspace(-25.0, 40.0, 9, dtype=torch.float64), mu)
