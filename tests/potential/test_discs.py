"""Exponential discs: galpy, direct integration, Poisson's equation, Gauss's law, the plane, parameters.

References that share no code with the ansatz: galpy's Hankel transforms, scipy's adaptive quadrature.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from contracts.potential import check_circular_speed, check_no_graph, check_parameter_gradients
from scipy.integrate import quad
from scipy.special import i0, i1, j1, k0, k1

from bayespot.potential import ExponentialDisc, Potential
from bayespot.pyro_modules import freeze
from bayespot.units import G


def places(h, n=300, seed=0):
    """Positions within 0.1 < R / r_d < 15, a third each within h / 3, 0.3 R and R of the plane (normal)."""
    generator = np.random.default_rng(seed)
    R = np.exp(generator.uniform(np.log(0.1), np.log(15.0), n))
    z = R * generator.standard_normal(n) * generator.choice([h / 3, 0.3, 1.0], n)
    return R, z, torch.as_tensor(np.stack([R, 0 * R, z], -1))


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("h", [0.05, 0.1, 0.3])
def test_exponential_disc_against_galpy(h):
    """Force errors, r_d = 1: median and 95 % point below those stated in the docstring for l_max 8, 16, 32."""
    galpy = pytest.importorskip("galpy.potential")
    theirs = galpy.DoubleExponentialDiskPotential(amp=G * 1e9 / (2 * h), hr=1.0, hz=h)
    R, z, x = places(h)
    pairs = list(zip(R, z, strict=True))
    expected = np.array(
        [[method(a, b, use_physical=False) for method in (theirs.Rforce, theirs.zforce)] for a, b in pairs]
    )
    for l_max, median, tail in ((8, 1.2e-3, 7e-3), (16, 2e-4, 1.6e-3), (32, 3e-5, 4e-4)):
        a = ExponentialDisc(1e9, 1.0, h, l_max=l_max).acceleration(x).numpy()
        error = np.hypot(*(a[:, ::2] - expected).T) / np.hypot(*expected.T)
        assert np.median(error) < median, l_max
        assert np.quantile(error, 0.95) < tail, l_max


@pytest.mark.parametrize(("vertical", "r_hole"), [("exponential", None), ("sech2", None), ("sech2", 0.6)])
def test_laplacian(vertical, r_hole):
    """Laplacian of Phi / 4 pi G against the given density within the disc: 1e-3 median at l_max 32; enclosed mass 1e-5.

    The mass within 3 r_d by the flux through the sphere against the integral of the density.
    """
    disc = ExponentialDisc(1e9, 1.0, 0.1, r_hole=r_hole, vertical=vertical, l_max=32)
    R, z, x = places(0.1)
    inside = np.abs(z) < 0.2
    found, expected = Potential.density(disc, x)[inside], disc.density(x)[inside]
    assert float((found / expected - 1).abs().median()) < 1e-3
    t, w = np.polynomial.legendre.leggauss(200)
    r, u = 1.5 * (1 + t), (1 + t) / 2
    mu = u**3
    R, z = r[:, None] * np.sqrt(1 - mu**2), r[:, None] * mu
    rho = disc.density(torch.as_tensor(np.stack([R, 0 * R, z], -1))).numpy()
    mass = (4 * np.pi * r**2 * 1.5 * w * (rho * w / 2 * 3 * u**2).sum(-1)).sum()
    t, w = (torch.as_tensor(part) for part in np.polynomial.legendre.leggauss(400))
    mu = ((1 + t) / 2) ** 3
    direction = torch.stack([(1 - mu**2).sqrt(), 0 * mu, mu], -1)
    flux = -(disc.acceleration(3.0 * direction) * direction).sum(-1)
    assert float((flux * w / 2 * 3 * ((1 + t) / 2) ** 2).sum() * 9 / G) == pytest.approx(mass, rel=1e-5)


def test_sech2_by_direct_integration():
    """Force of a sech^2 disc as the integral over razor-thin exponential discs at all heights, in the plane: 1e-4.

    A thin disc's force at height d: -2 pi G Sigma_0 int k (1 + k^2)^(-3/2) J_1(kR) e^(-k d) dk (Binney & Tremaine 2008,
    section 2.6.2); the sum over heights by Gauss-Legendre.
    """
    h = 0.1
    disc = ExponentialDisc(1e9, 1.0, h, vertical="sech2", l_max=48)
    heights, weight = np.polynomial.legendre.leggauss(60)
    heights, weight = 1.25 * (1 + heights), 1.25 * weight * 2
    layer = weight / (4 * h) / np.cosh(heights / (2 * h)) ** 2
    assert layer.sum() == pytest.approx(1, abs=1e-8)
    for R in (0.5, 2.0, 5.0):

        def thin(k, R=R):
            return k * (1 + k**2) ** -1.5 * j1(k * R) * (layer * np.exp(-k * heights)).sum()

        edges = np.concatenate([[0.0], np.arange(1, 260) * np.pi / R])
        value = sum(quad(thin, a, b, epsabs=0, epsrel=1e-9)[0] for a, b in itertools.pairwise(edges))
        found = float(disc.radial_acceleration(R))
        assert found == pytest.approx(-2 * np.pi * G * 1e9 * value, rel=1e-4)


def test_freeman():
    """The rotation curve of a disc of h/r_d = 1/300 is within 1 % of the razor-thin disc's (Freeman 1970).

    v_c^2 = 4 pi G Sigma_0 r_d y^2 [I_0 K_0 - I_1 K_1], y = R / 2 r_d: Binney & Tremaine (2008), equation 2.165.
    """
    R = np.array([0.5, 1.0, 2.2, 5.0, 10.0])
    y = R / 2
    expected = np.sqrt(4 * np.pi * G * 1e9 * y**2 * (i0(y) * k0(y) - i1(y) * k1(y)))
    found = ExponentialDisc(1e9, 1.0, 1 / 300, l_max=64).circular_speed(R).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-2)


def test_on_the_axis():
    """Force on the z axis, where other codes have lost the disc, by one-dimensional quadrature: 1e-4.

    F_z(0, z) = -2 pi G int Sigma_0 e^(-R) R dR int zeta(z') (z - z') / (R^2 + (z - z')^2)^(3/2) dz'; the integral over
    R at a distance d = z - z' is int k (1 + k^2)^(-3/2) e^(-k |d|) dk, with d's sign.
    """
    h = 0.1
    disc = ExponentialDisc(1e9, 1.0, h, l_max=48)
    for z in (0.05, 0.3, 2.0):

        def push(zp, z=z):
            d = z - zp
            inner = quad(lambda k: k * (1 + k**2) ** -1.5 * np.exp(-k * abs(d)), 0, np.inf, epsrel=1e-9)[0]
            return np.sign(d) * inner * np.exp(-abs(zp) / h) / (2 * h)

        value = quad(push, -3, 3, points=[0.0, z], epsrel=1e-7, limit=200)[0]
        for R in (0.0, 1e-5):
            found = float(disc.acceleration([R, 0.0, z])[2])
            assert found == pytest.approx(-2 * np.pi * G * 1e9 * value, rel=1e-4), (R, z)


def test_the_plane():
    """At z = 0, the exponential layer's cusp: no vertical force, and the Laplacian is the density's (0.3 %)."""
    for vertical in ("exponential", "sech2"):
        disc = ExponentialDisc(1e9, 2.5, 0.3, vertical=vertical, l_max=32)
        x = torch.tensor([[8.0, 0.0, 0.0], [8.0, 0.0, 1e-9], [8.0, 0.0, -1e-9]], dtype=torch.float64)
        a = disc.acceleration(x)
        assert float(a[0, 2]) == 0
        torch.testing.assert_close(a[1], a[2] * torch.tensor([1.0, 1.0, -1.0]).double(), rtol=1e-9, atol=0.0)
        rho = Potential.density(disc, x)
        torch.testing.assert_close(rho, disc.density(x), rtol=3e-3, atol=0.0)


def test_laws():
    """Even in z, no force at the centre, Kepler's law far away (M = 2 pi Sigma_0 r_d^2), circular speed, graphs."""
    disc = ExponentialDisc(1e9, 1.0, 0.1)
    _, _, x = places(0.1, 20)
    torch.testing.assert_close(disc.phi(x * torch.tensor([1.0, 1.0, -1.0]).double()), disc.phi(x), rtol=1e-14, atol=0.0)
    assert bool((disc.acceleration(torch.zeros(3, dtype=torch.float64)) == 0).all())
    mass = 2 * math.pi * 1e9
    for far in (1e3, 1e7):
        x_far = torch.tensor([0.6 * far, 0.0, 0.8 * far], dtype=torch.float64)
        assert float(disc.phi(x_far)) == pytest.approx(-G * mass / far, rel=1e-5)
    check_circular_speed(disc, torch.tensor([0.1, 1.0, 5.0, 50.0], dtype=torch.float64))
    check_no_graph(disc, x)
    holed = ExponentialDisc(1e9, 1.0, 0.1, r_hole=2.0, vertical="sech2")
    at = torch.cat([1e-8 * x, torch.zeros(1, 3, dtype=torch.float64), x]).requires_grad_()
    for field in (holed.phi, holed.acceleration, holed.density):
        assert bool(torch.isfinite(torch.autograd.grad(field(at).sum(), at)[0]).all())


@pytest.mark.parametrize("vertical", ["exponential", "sech2"])
def test_parameter_gradients(vertical):
    """Slopes of Phi, force and density by all parameters against differences: 1e-7."""
    _, _, x = places(0.1, 20)
    values = {"sigma_0": 1e9, "r_d": 1.1, "h_z": 0.13, "r_hole": 0.4}
    check_parameter_gradients(lambda **kw: ExponentialDisc(vertical=vertical, l_max=8, **kw), values, x)


def test_free_mass_keeps_its_table(monkeypatch):
    """With a prior on sigma_0 draws share a table; with one on r_d each has its own; discs do not mix theirs."""
    from bayespot.potential.multipole import MultipoleTable

    made = []
    build = MultipoleTable.of_density.__func__

    def counted(cls, *arguments):
        made.append(1)
        return build(cls, *arguments)

    monkeypatch.setattr(MultipoleTable, "of_density", classmethod(counted))
    _, _, x = places(0.1, 20)
    one = torch.ones((), dtype=torch.float64)
    free = ExponentialDisc(dist.LogNormal(20.0, 0.1), 1.0, 0.1)
    first, second = (freeze(free, {"sigma_0": k * 1e9 * one}).phi(x) for k in (1, 2))
    torch.testing.assert_close(second, 2 * first, rtol=1e-14, atol=0.0)
    assert len(made) == 1
    free = ExponentialDisc(1e9, dist.LogNormal(0.0, 0.1), 0.1)
    found = [freeze(free, {"r_d": k * one}).phi(x) for k in (1.0, 1.2)]
    assert len(made) == 3
    torch.testing.assert_close(found[0], first, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(found[1], ExponentialDisc(1e9, 1.2, 0.1).phi(x), rtol=1e-14, atol=0.0)
    shared = torch.tensor(1.0, dtype=torch.float64)
    discs = [ExponentialDisc(1e9, shared, 0.1, vertical=vertical) for vertical in ("exponential", "sech2")]
    before = [disc.phi(x) for disc in discs]
    after = [disc.phi(x) for disc in discs]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.allclose(before[0], before[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExponentialDisc(1e9, 0.0, 0.1), "r_d of ExponentialDisc must be positive and finite, got 0.0"),
        (lambda: ExponentialDisc(1e9, 1.0, -0.1), "h_z of ExponentialDisc must be positive and finite, got -0.1"),
        (lambda: ExponentialDisc(1e9, 1.0, 0.1, vertical="flat"), "vertical must be exponential or sech2, got 'flat'"),
        (lambda: ExponentialDisc(1e9, 1.0, 0.1, r_hole=math.nan), "r_hole of ExponentialDisc must be positive"),
        (lambda: ExponentialDisc(1e9, 1.0, 0.1, l_max=15), "l_max must be an even number, 0 or more, got 15"),
    ],
)
def test_bad_input(build, message):
    """Every bad parameter is refused by name, with the value received."""
    with pytest.raises(ValueError, match=message):
        build()
