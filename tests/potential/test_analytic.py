"""Analytic potentials: closed forms, the contract of potentials, limits, sums, descriptions."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts.potential import check_parameter_gradients, check_potential, points_at

from bayespot.potential import (
    ANALYTIC,
    NFW,
    RADIAL_FIELDS,
    CoredPowerLaw,
    Hernquist,
    Isochrone,
    Jaffe,
    Logarithmic,
    MassSlopeNetwork,
    MiyamotoNagai,
    Plummer,
    PowerLaw,
    PowerLawCutoff,
    Satoh,
    SumPotential,
    describe,
    from_description,
)
from bayespot.potential.fields import evaluator, radial_fields, radial_fields_of_draws
from bayespot.pyro_modules import freeze
from bayespot.units import G

SPHERES = {
    "isochrone": Isochrone(1e11, 3.0),
    "plummer": Plummer(1e10, 2.0),
    "hernquist": Hernquist(5e10, 3.0),
    "jaffe": Jaffe(1e11, 4.0),
    "nfw": NFW(7e11, 20.0),
    **{f"powerlaw-{gamma:g}": PowerLaw(1e11, 5.0, gamma) for gamma in (0.0, 0.7, 1.0, 2.0, 2.6)},
    **{f"coredpowerlaw-{gamma:g}": CoredPowerLaw(1e10, 2.0, gamma) for gamma in (0.0, 1.3, 2.0, 2.5, 3.0)},
}
RADII = torch.logspace(-2, 2.5, 19, dtype=torch.float64)


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def logarithmic_density(x, v_0, r_c, q):
    """Binney & Tremaine (2008), equation 2.71c."""
    R2, z2 = x[..., 0] ** 2 + x[..., 1] ** 2, x[..., 2] ** 2
    top = (2 * q**2 + 1) * r_c**2 + R2 + (2 - q**-2) * z2
    return v_0**2 / (4 * math.pi * G * q**2) * top / (r_c**2 + R2 + z2 / q**2) ** 2


def logarithmic_mass(r, v_0, r_c, q):
    """Flux of the closed-form force through the sphere, by 200 Gauss-Legendre nodes in cos(polar angle)."""
    import numpy as np

    mu, weight = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(200))
    r = r[:, None]
    m2 = r**2 * (1 - mu**2 + mu**2 / q**2)
    inward = v_0**2 * (m2 / r) / (r_c**2 + m2)
    return r[:, 0] ** 2 * (inward * weight / 2).sum(-1) / G


@pytest.mark.parametrize("name", SPHERES)
def test_contract(name):
    """Every check of `contracts.check_potential` over 4.5 decades in radius, against the closed form."""
    potential = SPHERES[name]
    check_potential(potential, RADII, lambda x: potential.density_r(x.norm(dim=-1)))


@pytest.mark.parametrize("name", SPHERES)
def test_radial_fields_in_one_pass(name):
    """All five fields of radius equal the potential's own methods to 1e-9, and carry no graph."""
    potential = SPHERES[name]
    found = radial_fields(potential, RADII)
    for field in RADIAL_FIELDS:
        torch.testing.assert_close(found[field], evaluator(field, RADII)(potential), rtol=1e-9, atol=0.0)
        assert not found[field].requires_grad


@pytest.mark.parametrize("name", SPHERES)
def test_many_draws_at_once(name):
    """Fields of 120 values of mass and scale in one go equal those of each, to 1e-9."""
    potential = SPHERES[name]
    sites = [n for n in potential.names if n != "gamma"]
    scale = 1 + 0.1 * torch.rand(120, len(sites), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = {n: getattr(potential, n) * scale[:, k] for k, n in enumerate(sites)}
    ticks = []
    found = radial_fields_of_draws(potential, values, RADII, lambda: ticks.append(1))
    assert len(ticks) == 120
    assert potential.radial_draws(values, RADII) is not None
    for i in (0, 60, 119):
        one = radial_fields(freeze(potential, {n: v[i] for n, v in values.items()}), RADII)
        for field in RADIAL_FIELDS:
            torch.testing.assert_close(found[field][i], one[field], rtol=1e-9, atol=0.0)


def test_many_draws_of_a_sum():
    """A sum of spheres, sites of both members by their names; with a member that is no formula it is asked singly."""
    r, n = RADII, 3
    galaxy = Hernquist(5e10, 3.0) + NFW(7e11, 20.0)
    values = {"members.0.m_tot": tensor([4e10, 5e10, 6e10]), "members.1.r_s": tensor([18.0, 20.0, 22.0])}
    assert galaxy.radial_draws(values, r) is not None
    found = radial_fields_of_draws(galaxy, values, r)
    for i in range(n):
        fixed = Hernquist(float(values["members.0.m_tot"][i]), 3.0) + NFW(7e11, float(values["members.1.r_s"][i]))
        for field, wanted in radial_fields(fixed, r).items():
            torch.testing.assert_close(found[field][i], wanted, rtol=1e-9, atol=0.0)
    assert not (galaxy + MassSlopeNetwork(1.0, -2.0, 5.0, 25.0)).elementwise


@pytest.mark.parametrize("q", [1.0, 0.8, 1.3])
def test_contract_logarithmic(q):
    """The same, spherical and flattened, against the textbook's density."""
    potential = Logarithmic(220.0, 1.5, q)
    assert potential.symmetry == ("spherical" if q == 1 else "axisymmetric")
    check_potential(potential, RADII, lambda x: logarithmic_density(x, 220.0, 1.5, q))


def test_enclosed_mass_without_spherical_symmetry():
    """Gauss's law by the Lebedev rule against a 200-node flux integral, q = 0.8 and 1.3: 1e-9."""
    for q in (0.8, 1.3):
        mass = Logarithmic(220.0, 1.5, q).enclosed_mass(RADII)
        torch.testing.assert_close(mass, logarithmic_mass(RADII, 220.0, 1.5, q), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SPHERES)
def test_mass_closed_form(name):
    """`mass_r` equals r^2 dPhi/dr / G from 1e-8 to 1e6 scale radii: 1e-12; `total_mass` is its limit."""
    potential = SPHERES[name]
    r = torch.logspace(-8, 6, 29, dtype=torch.float64) * 3
    torch.testing.assert_close(potential.mass_r(r), potential.enclosed_mass(r).detach(), rtol=1e-12, atol=0)
    total, far = float(potential.total_mass()), float(potential.mass_r(tensor(1e12)))
    if total == math.inf:
        assert far > 3 * float(potential.mass_r(tensor(1e3)))
    else:
        assert far == pytest.approx(total, rel=1e-9)


def test_values():
    """Numbers worked out by hand from the textbook formulas, G M = r_s = 1 and r = 2: 1e-14."""
    m, r = 1 / G, tensor(2.0)
    root5 = math.sqrt(5)
    expected = {
        Isochrone(m, 1.0): -1 / (1 + root5),
        Plummer(m, 1.0): -1 / root5,
        Hernquist(m, 1.0): -1 / 3,
        Jaffe(m, 1.0): -math.log(1.5),
        NFW(m, 1.0): -math.log(3) / 2,
        PowerLaw(m, 1.0, 2.5): -2 / math.sqrt(2),
        PowerLaw(m, 1.0, 2.0): math.log(2),
        PowerLaw(m, 1.0, 1.0): 2.0,
        CoredPowerLaw(m, 1.0, 3.0): -1 / root5,
        CoredPowerLaw(m, 1.0, 2.0): math.log(5) / 2,
        CoredPowerLaw(m, 1.0, 1.0): root5 - 1,
        Logarithmic(1.0, 1.0): math.log(5) / 2,
        Logarithmic(1.0, 1.0, 0.8): math.log(5) / 2,
    }
    for potential, value in expected.items():
        assert float(potential.phi_r(r)) == pytest.approx(value, rel=1e-14), describe(potential)


@pytest.mark.parametrize("name", ["isochrone", "plummer", "hernquist", "nfw", "coredpowerlaw-2.5"])
def test_centre_and_far_away(name):
    """At r = 0 value and acceleration (zero) are finite; at 1e6 r_s Phi = -G M/r; Phi -> 0 at infinity."""
    potential = SPHERES[name]
    origin = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    near = potential.phi_r(tensor(1e-12))
    torch.testing.assert_close(potential.phi(origin), near, rtol=1e-11, atol=0)
    assert (potential.acceleration(origin) == 0).all()
    assert not torch.isnan(potential.density(origin))
    far = tensor(3e6)
    expected = -G * potential.mass_r(far) / far
    if name in ("isochrone", "plummer", "hernquist"):
        assert float(potential.phi_r(far)) == pytest.approx(float(expected), rel=1e-5)
    assert float(potential.phi_r(tensor(1e15)) / potential.phi_r(tensor(1.0))) < 1e-4


def test_core_is_smooth_at_the_origin():
    """Density of cored spheres at the origin by autodiff is the central density: 1e-12."""
    for potential in (Isochrone(1e11, 3.0), Plummer(1e11, 3.0), CoredPowerLaw(1e11, 3.0, 2.0)):
        centre = potential.density(torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(centre, potential.density_r(tensor(1e-9)), rtol=1e-12, atol=0)


def test_limits_between_families():
    """Gamma = 3 is Plummer, gamma = 2 logarithmic, gamma -> 2 continuous, the envelope the scale-free law."""
    x = points_at(RADII)
    plummer, logarithmic = Plummer(1e10, 2.0), Logarithmic(math.sqrt(G * 1e10 / 2.0), 2.0)
    torch.testing.assert_close(CoredPowerLaw(1e10, 2.0, 3.0).phi(x), plummer.phi(x), rtol=1e-13, atol=0)
    torch.testing.assert_close(CoredPowerLaw(1e10, 2.0, 2.0).phi(x), logarithmic.phi(x), rtol=1e-13, atol=0)
    for cls in (CoredPowerLaw, PowerLaw):
        at, beside = cls(1e10, 2.0, 2.0), cls(1e10, 2.0, 2.0 + 1e-9)
        torch.testing.assert_close(beside.acceleration(x), at.acceleration(x), rtol=1e-7, atol=0)
    far = tensor([1e5])
    cored, scale_free = CoredPowerLaw(1e10, 2.0, 1.3), PowerLaw(1e10, 2.0, 1.3)
    torch.testing.assert_close(cored.enclosed_mass(far), scale_free.enclosed_mass(far), rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", [*SPHERES, "logarithmic"])
def test_parameter_gradients(name):
    """Derivatives of Phi, acceleration and density in every parameter against differences: 1e-7."""
    potential = SPHERES.get(name, Logarithmic(200.0, 2.0, 0.8))
    values = {k: v for k, v in describe(potential).items() if k != "name"}
    edge = name in ("powerlaw-0", "coredpowerlaw-0", "coredpowerlaw-3", "powerlaw-2", "coredpowerlaw-2")
    if edge:  # gamma at the end of its range or where the gauge changes: no central difference
        gamma = values.pop("gamma")
        build = lambda **kw: type(potential)(gamma=gamma, **kw)  # noqa: E731
    else:
        build = type(potential)
    check_parameter_gradients(build, values, points_at(RADII[::3]))


def test_sum():
    """Fields of a sum are sums of fields (1e-13); nesting is flattened; symmetry is the least symmetric."""
    parts = [Hernquist(5e10, 1.0), NFW(7e11, 20.0), Logarithmic(100.0, 2.0, 0.9)]
    total = parts[0] + parts[1] + parts[2]
    assert isinstance(total, SumPotential)
    assert [type(m) for m in total.members] == [Hernquist, NFW, Logarithmic]
    assert len(SumPotential([total, parts[0] + parts[1]]).members) == 5
    assert total.symmetry == "axisymmetric"
    assert (parts[0] + parts[1]).symmetry == "spherical"
    x = points_at(RADII)
    with torch.no_grad():
        for field in ("phi", "acceleration", "density"):
            expected = sum(getattr(p, field)(x) for p in parts)
            torch.testing.assert_close(getattr(total, field)(x), expected, rtol=1e-8, atol=0)
        expected = sum(p.enclosed_mass(RADII) for p in parts)
        torch.testing.assert_close(total.enclosed_mass(RADII), expected, rtol=1e-11, atol=0)
    check_potential(parts[0] + parts[1], RADII)
    check_potential(total, RADII)


def test_sample_sites():
    """Distributions become sample sites, named after the attribute and, in sums, after the member."""
    potential = Isochrone(dist.LogNormal(25.0, 0.1), 3.0) + NFW(7e11, dist.LogNormal(3.0, 0.1))
    trace = pyro.poutine.trace(potential).get_trace(points_at(RADII))
    sites = {n for n, s in trace.nodes.items() if s["type"] == "sample" and not n.startswith("_")}
    assert sites == {"members.0.m_tot", "members.1.r_s"}
    with pytest.raises(ValueError, match="m_tot of Isochrone is not a single number"):
        describe(potential)


def test_describe_round_trip():
    """describe -> JSON -> from_description gives the same potential, for every class and a sum."""
    x = points_at(RADII)
    flattened = [MiyamotoNagai(7e10, 3.0, 0.3), Satoh(7e10, 3.0, 0.3), Logarithmic(200.0, 2.0, 0.8)]
    potentials = [*SPHERES.values(), PowerLawCutoff(1e10, 2.0, 1.8), *flattened]
    assert {type(p) for p in potentials} == set(ANALYTIC.values())
    for potential in [*potentials, potentials[0] + potentials[4] + potentials[-1]]:
        again = from_description(json.loads(json.dumps(describe(potential))))
        assert again.symmetry == potential.symmetry
        assert torch.equal(again.phi(x), potential.phi(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Isochrone(-1.0, 3.0), "m_tot of Isochrone must be positive and finite, got -1.0"),
        (lambda: Plummer(1e10, 0), "r_s of Plummer must be positive and finite, got 0"),
        (lambda: NFW(math.nan, 1.0), "m_s of NFW must be positive and finite, got nan"),
        (lambda: Jaffe(1e10, math.inf), "r_s of Jaffe must be positive and finite, got inf"),
        (lambda: Hernquist(torch.nn.Parameter(tensor(-2.0)), 1.0), "m_tot of Hernquist must be positive"),
        (lambda: PowerLaw(1e10, 1.0, 3.0), r"gamma of PowerLaw must be in \[0, 3\) and finite, got 3.0"),
        (lambda: CoredPowerLaw(1e10, 1.0, -0.1), r"gamma of CoredPowerLaw must be in \[0, 3\]"),
        (lambda: Logarithmic(200.0, 1.0, -1.0), "q of Logarithmic must be positive and finite, got -1.0"),
        (lambda: SumPotential([]), "at least one member"),
        (lambda: SumPotential([3.0]), "adds potentials, got 3.0"),
        (
            lambda: from_description({"name": "einasto"}),
            "unknown potential 'einasto'; choose one of isochrone",
        ),
        (
            lambda: from_description({"name": "nfw", "m_tot": 1.0}),
            "NFW takes the parameters m_s, r_s; got m_tot",
        ),
        (lambda: describe(MassSlopeNetwork(0.0, -1.0, 1.0, 20.0)), "no description in closed form"),
    ],
)
def test_bad_input(build, message):
    """Every bad parameter is refused by name, with the value received."""
    with pytest.raises(ValueError, match=message):
        build()
