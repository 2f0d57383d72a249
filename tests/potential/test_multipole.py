"""Multipoles: spheres in closed form, power laws beyond the grid, direct integration, Poisson's equation, parameters.

References that share no code with the expansion: closed forms, scipy's adaptive quadrature, galpy.
"""

from __future__ import annotations

import copy

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from contracts.potential import check_acceleration, check_batches, check_circular_speed, check_no_graph, points_at
from pyro.nn import PyroModule, PyroSample
from scipy.special import eval_legendre
from torch import Tensor

from bayespot.potential import (
    Hernquist,
    Isochrone,
    Jaffe,
    MiyamotoNagai,
    MultipoleExpansion,
    Plummer,
    Potential,
    PowerLaw,
    multipole,
)
from bayespot.potential.multipole import MultipoleTable, even_legendre, grid, half_rule
from bayespot.pyro_modules import freeze
from bayespot.units import G

RADII = torch.logspace(-2, 2.5, 40, dtype=torch.float64)


def of_sphere(sphere, l_max=16, r_min=1e-4, r_max=1e5):
    return MultipoleExpansion(lambda R, z: sphere.density_r((R**2 + z**2).sqrt()), r_min, r_max, l_max)


def halo(R, z):
    """A flattened NFW halo without closed forms."""
    m = (R**2 + (z / 0.6) ** 2).sqrt() / 20
    return 1e7 / (m * (1 + m) ** 2)


def relative(found, expected):
    """Errors of vectors over their length."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("sphere", [Hernquist(1e11, 3.0), Jaffe(1e11, 3.0), Plummer(1e11, 3.0), Isochrone(1e11, 3.0)])
def test_spheres(sphere):
    """Phi, force and Laplacian of spheres through 9 multipoles: 1e-6, 1e-6, 2e-5 (the last between the nodes)."""
    potential, x = of_sphere(sphere), points_at(RADII)
    with torch.no_grad():
        assert float((potential.phi(x) / sphere.phi(x) - 1).abs().max()) < 1e-6
        assert float(relative(potential.acceleration(x), sphere.acceleration(x)).max()) < 1e-6
        rho = sphere.density_r(RADII)
        assert float((Potential.density(potential, x) / rho - 1).abs().max()) < 2e-5
        torch.testing.assert_close(potential.density(x), rho, rtol=1e-12, atol=0.0)


def test_beyond_the_grid():
    """Force of a Hernquist sphere tabulated from 0.003 to 3000 kpc, at 1e-3 to 1e7 kpc: 0.3 %; Kepler's law far out.

    Inside the density is all but a power law, outside all but r^-4.
    """
    sphere = Hernquist(1e11, 3.0)
    potential = of_sphere(sphere, r_min=0.003, r_max=3000.0)
    x = points_at(torch.logspace(-3, 7, 50, dtype=torch.float64))
    with torch.no_grad():
        assert float(relative(potential.acceleration(x), sphere.acceleration(x)).max()) < 3e-3
        far = torch.tensor([0.0, 0.0, 1e12], dtype=torch.float64)
        assert float(potential.phi(far) / sphere.phi(far)) == pytest.approx(1, abs=1e-4)


def test_scale_free():
    """A flattened power law has the same force whether tabulated or continued: 1e-10, r = 1e-5 to 1e5 kpc."""

    def rho(R, z):
        return 1e7 * (R**2 + z**2 / 0.49) ** -1.25

    narrow, wide = MultipoleExpansion(rho, 1e-2, 1e2), MultipoleExpansion(rho, 1e-6, 1e6)
    x = points_at(torch.logspace(-5, 5, 50, dtype=torch.float64))
    with torch.no_grad():
        assert float(relative(narrow.acceleration(x), wide.acceleration(x)).max()) < 1e-10
        a = wide.acceleration(x)
        # -grad Phi of a density r^-2.5 goes as r^-1.5 in every direction
        torch.testing.assert_close(wide.acceleration(7 * x), a * 7**-1.5, rtol=1e-9, atol=0.0)


def test_against_direct_integration():
    """Phi of a flattened halo on the axis and in the plane by adaptive quadrature over homoeoids: 1e-8.

    Binney & Tremaine (2008), equation 2.140: Phi = -pi G q int_0^inf psi(m^2(u)) du / ((1 + u) sqrt(q^2 + u)) for
    lengths in the semi-axis; here the force, -2 pi G q x_i int rho(m) du / ((a_i^2 + u) (1 + u) sqrt(q^2 + u)).
    """
    from scipy.integrate import quad

    q, potential = 0.6, MultipoleExpansion(halo, 1e-4, 1e6, 32)

    def force(R, z, along):
        def integrand(t):
            u = (t / (1 - t)) ** 2
            m = np.sqrt(R**2 / (1 + u) + z**2 / (q**2 + u)) / 20
            rho = 1e7 / (m * (1 + m) ** 2)
            return rho / (((1 if along == "R" else q**2) + u) * (1 + u) * np.sqrt(q**2 + u)) * 2 * t / (1 - t) ** 3

        value = quad(integrand, 0, 1, epsabs=0, epsrel=1e-11, limit=400)[0]
        return -2 * np.pi * G * q * (R if along == "R" else z) * value

    for R, z in ((8.0, 0.0), (0.0, 8.0), (0.3, 0.1), (5.0, 5.0), (60.0, 20.0)):
        a = potential.acceleration([R, 0.0, z]).numpy()
        expected = np.array([force(R, z, "R"), 0.0, force(R, z, "z")])
        assert np.linalg.norm(a - expected) < 1e-8 * np.linalg.norm(expected), (R, z)


def test_convergence_with_degree():
    """Force errors of a Miyamoto-Nagai disc, b/a = 1/2, at the 95 % point: under 4, 1 and 0.4 % at l_max 8, 16, 32."""
    disc, x = MiyamotoNagai(1e11, 3.0, 1.5), points_at(torch.logspace(-1, 2, 300, dtype=torch.float64))

    def rho(R, z):
        return disc.density(torch.stack([R, torch.zeros_like(R), z], -1))

    with torch.no_grad():
        for l_max, bound in ((8, 4e-2), (16, 1e-2), (32, 4e-3)):
            potential = MultipoleExpansion(rho, 1e-2, 1e4, l_max)
            assert float(relative(potential.acceleration(x), disc.acceleration(x)).quantile(0.95)) < bound, l_max


def test_contract():
    """Forces are the slopes of Phi (1e-8), circular speed, batches, graphs; density and Laplacian agree to 1e-6."""
    potential, x = MultipoleExpansion(halo, 1e-3, 1e5, 32), points_at(RADII[::3])
    assert potential.symmetry == "axisymmetric"
    check_acceleration(potential, x)
    check_circular_speed(potential, RADII[::3])
    check_batches(potential, x)
    check_no_graph(potential, x)
    with torch.no_grad():
        laplacian = Potential.density(potential, x)
        torch.testing.assert_close(laplacian, potential.density(x), rtol=1e-6, atol=0.0)
        # Gauss's law by the Lebedev rule against the monopole of the density, r^2 rho integrated by Gauss-Legendre
        t, w = np.polynomial.legendre.leggauss(60)
        mu, w_mu = np.polynomial.legendre.leggauss(60)
        r = torch.as_tensor(2.5 * (1 + t))
        rho = halo(r[:, None] * torch.as_tensor(np.sqrt(1 - mu**2)), r[:, None] * torch.as_tensor(mu))
        mass = float((4 * np.pi * r**2 * (rho * torch.as_tensor(w_mu / 2)).sum(-1) * torch.as_tensor(2.5 * w)).sum())
        assert float(potential.enclosed_mass(5.0)) == pytest.approx(mass, rel=1e-8)


def test_smooth_between_nodes():
    """Phi, its slope (1e-9) and its second derivative (1e-7; 1e-3 at the ends) are continuous at nodes and ends."""
    potential = MultipoleExpansion(halo, 0.1, 100.0, 8)
    nodes = potential._s[2:-2].exp()
    direction = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    for node in (nodes[0], nodes[20], nodes[-1]):
        sides = [(node * f * direction).requires_grad_() for f in (1 - 1e-12, 1 + 1e-12)]
        values = []
        for x in sides:
            (g,) = torch.autograd.grad(phi := potential.phi(x), x, create_graph=True)
            (h,) = torch.autograd.grad(g @ direction, x)
            values.append((phi.detach(), (g @ direction).detach(), h @ direction))
        bend = 1e-7 if node == nodes[20] else 1e-3
        for (left, right), rtol in zip(zip(*values, strict=True), (1e-9, 1e-9, bend), strict=True):
            assert float(left) == pytest.approx(float(right), rel=rtol), float(node)


def test_the_centre():
    """At the origin: no force, a finite Phi of a cusp r^-1, the same limit along every direction."""
    potential = MultipoleExpansion(halo, 1e-3, 1e5)
    origin = torch.zeros(3, dtype=torch.float64)
    assert bool((potential.acceleration(origin) == 0).all())
    near = potential.phi(points_at(torch.full((5,), 1e-30, dtype=torch.float64)))
    torch.testing.assert_close(near, potential.phi(origin).expand(5), rtol=1e-12, atol=0.0)
    assert float(potential.phi(origin)) == pytest.approx(float(potential.phi([1e-6, 0.0, 0.0])), rel=1e-5)


class Spheroid(PyroModule):
    """A density with free parameters, as a user would write one."""

    def __init__(self, amplitude, q):
        super().__init__()
        for name, value in (("amplitude", amplitude), ("q", q)):
            if isinstance(value, dist.Distribution):
                setattr(self, name, PyroSample(value))
            elif isinstance(value, torch.nn.Parameter):
                setattr(self, name, value)
            else:
                self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def forward(self, R: Tensor, z: Tensor) -> Tensor:
        return self.amplitude * (1 + R**2 + (z / self.q) ** 2) ** -2


def test_free_parameters():
    """Slopes of Phi and force by the density's parameters against differences (1e-6); priors are sites under rho."""
    x = points_at(RADII[::4])

    def total(amplitude, q):
        potential = MultipoleExpansion(Spheroid(amplitude, q), 1e-3, 1e3, 8)
        return potential.phi(x).sum() + potential.acceleration(x).sum()

    parameters = [torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1e7, 0.8)]
    slopes = torch.autograd.grad(total(*parameters), parameters)
    for i, (value, slope) in enumerate(zip((1e7, 0.8), slopes, strict=True)):
        near = [[1e7, 0.8] for _ in range(2)]
        near[0][i], near[1][i] = value * (1 + 1e-4), value * (1 - 1e-4)
        with torch.no_grad():
            difference = (total(*near[0]) - total(*near[1])) / (2e-4 * value)
        assert float(slope) == pytest.approx(float(difference), rel=1e-6)
    free = MultipoleExpansion(Spheroid(dist.LogNormal(16.0, 0.1), dist.Uniform(0.5, 1.0)), 1e-3, 1e3, 8)
    values = {f"rho.{k}": torch.tensor(v, dtype=torch.float64) for k, v in (("amplitude", 1e7), ("q", 0.8))}
    fixed = MultipoleExpansion(Spheroid(1e7, 0.8), 1e-3, 1e3, 8)
    torch.testing.assert_close(freeze(free, values).phi(x), fixed.phi(x), rtol=1e-14, atol=0.0)


def test_tables_are_made_once(monkeypatch):
    """Numbers: one table for all calls and for frozen copies; another after a change in place; trained: every call."""
    made = []
    build = MultipoleTable.of_density.__func__

    def counted(cls, *arguments):
        made.append(1)
        return build(cls, *arguments)

    monkeypatch.setattr(MultipoleTable, "of_density", classmethod(counted))
    x = points_at(RADII[::8])
    potential = MultipoleExpansion(Spheroid(1e7, 0.8), 1e-3, 1e3, 8)
    made.clear()
    potential.phi(x)
    before = potential.acceleration(x)
    freeze(potential, {}).phi(x)
    assert len(made) == 1
    potential.rho.amplitude.mul_(2)
    torch.testing.assert_close(potential.acceleration(x), 2 * before, rtol=1e-13, atol=0.0)
    assert len(made) == 2
    again = copy.deepcopy(potential)
    torch.testing.assert_close(again.acceleration(x), 2 * before, rtol=1e-13, atol=0.0)
    trained = MultipoleExpansion(Spheroid(torch.nn.Parameter(torch.tensor(1e7).double()), 0.8), 1e-3, 1e3, 8)
    with torch.no_grad():
        assert not trained.phi(x).requires_grad
    for _ in range(2):
        assert float(torch.autograd.grad(trained.phi(x).sum(), trained.rho.amplitude)[0]) < 0


def test_rules():
    """Half-range rules integrate t^k to rounding; polynomials are scipy's (1e-13); sums are those of a dense matrix."""
    for stretch in (1, 3):
        mu, weight = half_rule(40, stretch)
        for k in (0, 2, 16):
            assert float((weight * mu**k).sum()) == pytest.approx(1 / (k + 1), rel=1e-13)
    mu = torch.linspace(-1, 1, 41, dtype=torch.float64)
    for l_max in (0, 2, 64):
        expected = np.stack([eval_legendre(l, mu.numpy()) for l in range(0, l_max + 1, 2)], -1)
        torch.testing.assert_close(even_legendre(mu, l_max), torch.as_tensor(expected), rtol=0.0, atol=1e-13)
    terms = torch.randn(3, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor = torch.tensor([[1.0], [0.9], [0.2]], dtype=torch.float64)
    lag = torch.arange(37)[:, None] - torch.arange(37)
    dense = torch.where(lag >= 0, factor[..., None] ** lag.clamp(min=0), 0.0)
    expected = (dense @ terms[..., None])[..., 0]
    torch.testing.assert_close(multipole._decaying_sums(terms, factor), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultipoleExpansion(halo, 0.0, 1.0), r"need 0 < r_min < r_max / 2 \(kpc\), got 0.0 and 1.0"),
        (lambda: MultipoleExpansion(halo, 1.0, 1.5), "need 0 < r_min < r_max / 2"),
        (lambda: MultipoleExpansion(halo, 1e-2, 1e2, 7), "l_max must be an even number, 0 or more, got 7"),
        (lambda: MultipoleExpansion(halo, 1e-2, 1e2, -2), "l_max must be an even number"),
        (lambda: MultipoleExpansion(halo, 1e-2, 1e2, 16, 4), "n_angles must be more than l_max / 2 = 8, got 4"),
        (lambda: MultipoleExpansion(3.0, 1e-2, 1e2), "rho must be a function of R and z, got 3.0"),
        (lambda: of_sphere(PowerLaw(1e10, 1.0, 1.9)), r"falls as r\^-1.90 at r_max = 100000 kpc, not more steeply"),
        (lambda: of_sphere(PowerLaw(1e10, 1.0, 2.0)), r"falls as r\^-2.00 at r_max"),
        (
            lambda: MultipoleExpansion(lambda R, z: (R**2 + z**2) ** -1.6, 1e-2, 1e2),
            r"rises as r\^-3.20 towards r_min = 0.01 kpc: the mass is infinite",
        ),
        (lambda: MultipoleExpansion(lambda R, z: (R - 1).log(), 1e-2, 1e2), "not finite between 0.01 and 100 kpc"),
    ],
)
def test_bad_input(build, message):
    """What makes no grid or no potential is refused with the value received."""
    with pytest.raises(ValueError, match=message):
        build()


def test_in_the_plane_within_and_beyond_the_grid():
    """Phi and dPhi/ds in the plane, of a power law in density, against `phi` and its derivative."""
    s = grid(-2.0, 2.0, 8)
    table = MultipoleTable.of_density(lambda R, z: (R**2 + 3 * z**2) ** -1.25, s, half_rule(40), 8)
    at = torch.linspace(-6.0, 6.0, 49, dtype=torch.float64).requires_grad_()
    phi = table.phi(at, torch.zeros_like(at))
    (slope,) = torch.autograd.grad(phi.sum(), at)
    for found, expected in zip(table.in_plane(at.detach()), (phi.detach(), slope), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
