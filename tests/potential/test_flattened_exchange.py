"""Axisymmetric potentials to galpy and gala and back, against these packages' own and our closed forms.

Exported: Phi, forces and second derivatives of every class against our own fields and differences of our forces, 2e-7
(tables of networks: 1e-6); closed forms against galpy's own to 1e-9. Imported: forces and second derivatives to 1e-9
where both sides know a closed form (gala to 1e-8, whose constant of gravity is taken from the mass it states).
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from bayespot import SnapshotModel, SphericalMixture
from bayespot.actions import StaeckelFudge
from bayespot.potential import (
    NFW,
    AxisymmetricNetwork,
    DoublePowerLaw,
    ExponentialDisc,
    Logarithmic,
    MassSlopeNetwork,
    McMillan17,
    MiyamotoNagai,
    MultipoleExpansion,
    MWPotential2014,
    Satoh,
    from_gala,
    from_galpy,
)
from bayespot.potential.differences import slopes
from bayespot.pyro_modules import freeze
from bayespot.units import G

pytestmark = pytest.mark.filterwarnings("ignore:::galpy", "ignore:.*numpy.*", "ignore::DeprecationWarning")
RO, VO = 8.0, 220.0
NATURAL = {"use_physical": False}
GENERATOR = np.random.default_rng(0)
R = np.exp(GENERATOR.uniform(np.log(0.5), np.log(40.0), 12))
Z = 0.3 * R * GENERATOR.standard_normal(12)
AZIMUTH = GENERATOR.uniform(0, 2 * np.pi, 12)
X = np.stack([R * np.cos(AZIMUTH), R * np.sin(AZIMUTH), Z], -1)
#: A disc star as galpy's (R, vR, vT, z, vz, phi) in natural units, and two of ours.
STAR = [1.0, 0.1, 0.9, 0.1, 0.15, 0.3]
STARS = torch.tensor([[8.0, 1.0, 0.4, 20.0, 190.0, 15.0], [3.0, -2.0, 0.1, 60.0, 90.0, 30.0]], dtype=torch.float64)


def network():
    """A draw of the free-form potential, flattened differently at every radius."""
    free = AxisymmetricNetwork(MassSlopeNetwork(1.0, -2.0, 5.0, 25.0))
    weights = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return freeze(free, free.initial_values() | {"shape_weights": 0.5 * weights})


def spheroid(R, z):
    return 1e9 * (1 + R**2 + z**2 / 0.49) ** -2.5


OURS = {
    "MiyamotoNagai": lambda: MiyamotoNagai(6e10, 3.0, 0.3),
    "Satoh": lambda: Satoh(6e10, 3.0, 0.3),
    "Logarithmic": lambda: Logarithmic(220.0, 1.0, 0.8),
    "DoublePowerLaw": lambda: DoublePowerLaw(8.5e6, 19.6, 1.0, 3.0, q=0.8),
    "ExponentialDisc": lambda: ExponentialDisc(8.9e8, 2.5, 0.3),
    "holed": lambda: ExponentialDisc(5e7, 7.0, 0.085, r_hole=4.0, vertical="sech2"),
    "MultipoleExpansion": lambda: MultipoleExpansion(spheroid, 1e-3, 1e3),
    "AxisymmetricNetwork": network,
    "sum": lambda: MiyamotoNagai(6e10, 3.0, 0.3) + NFW(1e12, 20.0),
    "MWPotential2014": MWPotential2014,
    "McMillan17": McMillan17,
}


@pytest.fixture(scope="module")
def galpy():
    return pytest.importorskip("galpy.potential")


@pytest.fixture(scope="module")
def gala():
    return pytest.importorskip("gala.potential")


def own_derivatives(potential):
    """Acceleration (n, 3) and second derivatives of Phi (n, 3, 3) along R, phi and z, by differences of forces."""

    def gradient(x):
        return -potential.acceleration(torch.as_tensor(x)).numpy()

    c, s, zero = np.cos(AZIMUTH), np.sin(AZIMUTH), 0 * AZIMUTH
    frame = np.stack([np.stack(row, -1) for row in ((c, s, zero), (-s, c, zero), (zero, zero, zero + 1))], -2)
    second = frame @ slopes(gradient, X).values @ frame.transpose(0, 2, 1)
    return (frame @ -gradient(X)[..., None])[..., 0], second


@pytest.mark.parametrize("name", OURS)
def test_every_axisymmetric_potential_in_galpy(galpy, name):
    """Phi, forces, second derivatives, density and frequencies, at points and arrays, in the plane and at infinity."""
    potential = OURS[name]()
    exported = potential.to_galpy(RO, VO)
    assert not exported.isNonAxi
    a, second = own_derivatives(potential)
    size = np.abs(second).max((1, 2)) * RO**2 / VO**2
    at = (R / RO, Z / RO)
    phi = potential.phi(torch.as_tensor(X)).numpy() / VO**2
    np.testing.assert_allclose(exported(*at, **NATURAL), phi, rtol=1e-12)
    for quantity, column in (("Rforce", 0), ("zforce", 2)):
        force = getattr(exported, quantity)(*at, **NATURAL)
        np.testing.assert_allclose(force, a[:, column] * RO / VO**2, rtol=1e-9, atol=1e-12 * np.abs(a).max())
        # one component after the other at one place, as galpy's integrators ask
        one = [getattr(exported, quantity)(r, z, **NATURAL) for r, z in zip(*at, strict=True)]
        np.testing.assert_allclose(one, force, rtol=1e-9, atol=1e-12 * np.abs(a).max())
    for quantity, i, j in (("R2deriv", 0, 0), ("z2deriv", 2, 2), ("Rzderiv", 0, 2)):
        found = getattr(exported, quantity)(*at, **NATURAL)
        assert (np.abs(found - second[:, i, j] * RO**2 / VO**2) < 2e-7 * size).all(), quantity
    density = potential.density(torch.as_tensor(X)).numpy() * G * RO**2 / VO**2
    np.testing.assert_allclose(exported.dens(*at, **NATURAL), density, rtol=1e-10, atol=1e-300)
    for quantity, own in (
        ("vcirc", potential.circular_speed(8.0) / VO),
        ("epifreq", potential.epicycle_frequency(8.0) * RO / VO),
        ("verticalfreq", potential.vertical_frequency(8.0) * RO / VO),
    ):
        assert float(getattr(exported, quantity)(1.0, **NATURAL)) == pytest.approx(float(own), rel=1e-9)
    far = exported(np.array([np.inf, 1.0]), np.array([0.0, 0.2]), **NATURAL)
    assert np.isinf(far[0]) if name == "Logarithmic" else abs(far[0]) < 1e-6
    assert np.isfinite(far[1])
    assert exported.Rforce(np.inf, 0.1, **NATURAL) == 0
    assert pickle.loads(pickle.dumps(exported))(1.0, 0.1, **NATURAL) == exported(1.0, 0.1, **NATURAL)


def test_exported_against_galpys_own(galpy):
    """Miyamoto & Nagai's disc: by ours and by its own class: fields to 1e-9, what follows to 1e-6, masses
    (our average over the sphere of a thin disc's force) to 1e-4."""
    m, a, b = 6e10, 3.0, 0.3
    known = galpy.MiyamotoNagaiPotential(amp=G * m / RO / VO**2, a=a / RO, b=b / RO, ro=RO, vo=VO)
    ours = MiyamotoNagai(m, a, b).to_galpy(RO, VO)
    for name in ("__call__", "Rforce", "zforce", "R2deriv", "z2deriv", "Rzderiv", "dens"):
        found, expected = (getattr(p, name)(R / RO, Z / RO, **NATURAL) for p in (ours, known))
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=name)
    for name, arguments in (
        ("vcirc", (1.0,)), ("omegac", (1.0,)), ("epifreq", (1.0,)), ("verticalfreq", (1.0,)), ("vesc", (1.0,)),
        ("rl", (0.5,)), ("flattening", (1.0, 0.1)), ("dvcircdR", (1.0,)), ("rE", (-0.3,)),
        ("surfdens", (1.0, 0.1)), ("mass", (1.0,)), ("tdyn", (1.0,)),
    ):  # fmt: skip
        found, expected = (float(np.squeeze(getattr(p, name)(*arguments, **NATURAL))) for p in (ours, known))
        assert found == pytest.approx(expected, rel=1e-4 if name in ("mass", "tdyn") else 1e-6), name
    # with units
    assert float(ours.vcirc(1.0)) == pytest.approx(float(known.vcirc(1.0)), rel=1e-9)


def test_orbits_and_actions_in_galpy(galpy):
    """An orbit in the exported sum keeps its energy to 1e-9 and ends where galpy's own sum takes it (1e-6); the actions
    of actionAngleStaeckel and its estimate of Delta are the same (1e-6)."""
    from galpy.actionAngle import actionAngleStaeckel, estimateDeltaStaeckel
    from galpy.orbit import Orbit

    ours = MWPotential2014().to_galpy(RO, VO)
    known = galpy.MWPotential2014
    times = np.linspace(0, 1.0, 11)
    ends, actions = [], []
    for potential in (ours, known):
        orbit = Orbit(STAR, ro=RO, vo=VO)
        orbit.integrate(times, potential, method="dop853")
        energy = orbit.E(times, **NATURAL)
        assert np.ptp(energy) < 1e-9 * abs(energy[0])
        ends.append([orbit.R(1.0, **NATURAL), orbit.z(1.0, **NATURAL), orbit.vR(1.0, **NATURAL)])
        delta = float(estimateDeltaStaeckel(potential, 1.1, 0.1, use_physical=False))
        actions.append([float(np.squeeze(j)) for j in actionAngleStaeckel(pot=potential, delta=delta, c=False)(*STAR)])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-6)
    np.testing.assert_allclose(actions[0], actions[1], rtol=1e-6)


def test_tables_for_galpys_compiled_code(galpy):
    """galpy's interpRZPotential of an exported one: forces to 1e-4, and an orbit by galpy's C (1e-4 of the radius)."""
    from galpy.orbit import Orbit

    exported = OURS["sum"]().to_galpy(RO, VO)
    table = galpy.interpRZPotential(
        RZPot=exported, rgrid=(np.log(0.01), np.log(20.0), 101), zgrid=(0.0, 2.0, 101), logR=True, interpPot=True,
        interpRforce=True, interpzforce=True, zsym=True, enable_c=True, ro=RO, vo=VO,
    )  # fmt: skip
    for r, z in ((0.5, 0.1), (1.0, 0.03), (3.0, 0.7)):
        assert table.Rforce(r, z, **NATURAL) == pytest.approx(float(exported.Rforce(r, z, **NATURAL)), rel=1e-4)
    if not table.hasC:
        pytest.skip("galpy's compiled code is not there")
    orbits = [Orbit(STAR, ro=RO, vo=VO) for _ in range(2)]
    for orbit, potential, method in zip(orbits, (exported, table), ("dop853", "dop853_c"), strict=True):
        orbit.integrate(np.linspace(0, 1, 5), potential, method=method)
    assert orbits[1].R(1.0, **NATURAL) == pytest.approx(float(orbits[0].R(1.0, **NATURAL)), rel=1e-4)


GALPY = {
    "MiyamotoNagai": (lambda p: p.MiyamotoNagaiPotential(normalize=1.0, a=0.4, b=0.04), "axisymmetric"),
    "flattened NFW": (lambda p: p.TriaxialNFWPotential(normalize=1.0, a=2.0, c=0.8), "axisymmetric"),
    "double power law": (
        lambda p: p.TwoPowerTriaxialPotential(normalize=1.0, a=2.0, alpha=1.0, beta=3.5, c=0.8),
        "axisymmetric",
    ),
    "logarithmic": (lambda p: p.LogarithmicHaloPotential(normalize=1.0, q=0.8, core=0.1), "axisymmetric"),
    "Kuzmin-Kutuzov": (lambda p: p.KuzminKutuzovStaeckelPotential(normalize=1.0, ac=5.0, Delta=1.0), "axisymmetric"),
    "cut-off": (lambda p: p.PowerSphericalPotentialwCutoff(normalize=1.0, alpha=1.8, rc=0.24), "spherical"),
    "MWPotential2014": (lambda p: p.MWPotential2014, "axisymmetric"),
}


@pytest.mark.parametrize("name", GALPY)
def test_from_galpy_and_back(galpy, name):
    """Symmetry found; second derivatives those of the forces (1e-9); actions; and back in galpy the same to 1e-9."""
    make, symmetry = GALPY[name]
    known = make(galpy)
    potential = from_galpy(known, RO, VO)
    assert potential.symmetry == symmetry
    assert not potential.source.by_differences
    found, expected = potential.source.hessian(X), slopes(potential.source.gradient, X)
    assert (np.abs(found - expected.values) < 1e-9 * np.abs(expected.values).max((1, 2), keepdims=True)).all()
    assert bool(torch.isfinite(StaeckelFudge().actions(potential, STARS)).all())
    back = potential.to_galpy(RO, VO)
    for quantity in ("Rforces", "zforces", "R2derivs", "z2derivs", "Rzderivs"):
        ours, theirs = (
            [
                float(getattr(galpy, f"evaluate{quantity}")(p, r, z, **NATURAL))
                for r, z in zip(R / RO, Z / RO, strict=True)
            ]
            for p in (back, known)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-10 * np.abs(theirs).max(), err_msg=quantity)


def test_from_galpy_against_closed_forms(galpy):
    """galpy's Milky Way, flattened NFW halo and exponential disc against ours: forces to 1e-7 (DoublePowerLaw's and
    ExponentialDisc's tables at l_max 32: 1e-6, 1e-3), actions to 1e-6."""
    milky_way = from_galpy(galpy.MWPotential2014, RO, VO)
    a, b = (p.acceleration(torch.as_tensor(X)) for p in (milky_way, MWPotential2014()))
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    J = [StaeckelFudge().actions(p, STARS) for p in (milky_way, MWPotential2014())]
    torch.testing.assert_close(J[0], J[1], rtol=1e-6, atol=1e-4)
    # rho = amp / (4 pi a^3) / (m/a) / (1 + m/a)^2 in galpy's units of mass, ro vo^2 / G
    halo = galpy.TriaxialNFWPotential(amp=5.0, a=2.0, c=0.8)
    rho_0 = 5.0 * RO * VO**2 / G / (4 * np.pi * (2.0 * RO) ** 3)
    disc = galpy.DoubleExponentialDiskPotential(amp=1.0, hr=2.5 / RO, hz=0.3 / RO)
    rho_disc = VO**2 / RO**2 / G
    with pytest.warns(UserWarning, match="DoubleExponentialDiskPotential depart"):
        imported_disc = from_galpy(disc, RO, VO, symmetry="axisymmetric")
    for theirs, ours, rtol in (
        (from_galpy(halo, RO, VO), DoublePowerLaw(rho_0, 2.0 * RO, 1.0, 3.0, q=0.8, l_max=32), 1e-6),
        (imported_disc, ExponentialDisc(2 * 0.3 * rho_disc, 2.5, 0.3, l_max=32), 1e-3),
    ):
        a, b = (p.acceleration(torch.as_tensor(X)) for p in (theirs, ours))
        assert float(((a - b).norm(dim=1) / b.norm(dim=1)).max()) < rtol


@pytest.mark.parametrize("name", OURS)
def test_every_axisymmetric_potential_in_gala(gala, name):
    """Energy, gradient, Hessian and density of the exported potential, v_c, and an orbit (energy to 1e-3); back again
    the same acceleration, and the symmetry found."""
    from astropy import units as u
    from gala.dynamics import PhaseSpacePosition

    potential = OURS[name]()
    exported, x = potential.to_gala(), torch.as_tensor(X)
    q, v2 = X.T * u.kpc, (u.km / u.s) ** 2
    np.testing.assert_allclose(exported.energy(q).to_value(v2), potential.phi(x).numpy(), rtol=1e-9)
    a = potential.acceleration(x).numpy()
    np.testing.assert_allclose(-exported.gradient(q).to_value(v2 / u.kpc).T, a, rtol=1e-9, atol=1e-9 * np.abs(a).max())
    expected = slopes(lambda x: -potential.acceleration(torch.as_tensor(x)).numpy(), X).values
    found = np.moveaxis(exported.hessian(q).to_value(v2 / u.kpc**2), -1, 0)
    assert (np.abs(found - expected) < 2e-7 * np.abs(expected).max((1, 2), keepdims=True)).all()
    rho = potential.density(x).numpy()
    np.testing.assert_allclose(exported.density(q).to_value(u.Msun / u.kpc**3), rho, rtol=1e-9, atol=1e-300)
    speed = exported.circular_velocity(np.array([[8.0], [0.0], [0.0]]) * u.kpc).to_value(u.km / u.s)
    assert float(speed[0]) == pytest.approx(float(potential.circular_speed(8.0)), rel=1e-9)
    start = PhaseSpacePosition(pos=[8.0, 0.0, 0.5] * u.kpc, vel=[20.0, 180.0, 30.0] * u.km / u.s)
    energy = exported.integrate_orbit(start, dt=0.5 * u.Myr, n_steps=40).energy().value
    assert np.ptp(energy) < 1e-3 * np.abs(energy).max()
    back = from_gala(exported)
    assert back.symmetry == "axisymmetric"
    np.testing.assert_allclose(back.acceleration(x).numpy(), a, rtol=1e-8, atol=1e-9 * np.abs(a).max())


def test_from_gala_against_closed_forms(gala):
    """gala's discs, flattened halo and Milky Ways: axisymmetric, its own second derivatives kept, forces to 1e-8."""
    from astropy import units as u
    from gala.units import galactic

    m, length = 1e11 * u.Msun, u.kpc
    known = {
        "disc": (
            gala.MiyamotoNagaiPotential(m, 3 * length, 0.3 * length, units=galactic),
            MiyamotoNagai(1e11, 3.0, 0.3),
        ),
        "Satoh": (gala.SatohPotential(m, 3 * length, 0.3 * length, units=galactic), Satoh(1e11, 3.0, 0.3)),
        "halo": (
            gala.LogarithmicPotential(200 * u.km / u.s, 1 * length, q1=1, q2=1, q3=0.8, units=galactic),
            Logarithmic(200.0, 1.0, 0.8),
        ),
        "Bovy": (gala.BovyMWPotential2014(), MWPotential2014()),
    }
    x = torch.as_tensor(X)
    for name, (theirs, ours) in known.items():
        potential = from_gala(theirs)
        assert potential.symmetry == "axisymmetric", name
        assert not potential.source.by_differences, name
        torch.testing.assert_close(potential.acceleration(x), ours.acceleration(x), rtol=1e-4, atol=1e-6, msg=name)
    for version in ("v1", "v2"):
        potential = from_gala(gala.MilkyWayPotential(version=version))
        assert potential.symmetry == "axisymmetric"
        assert not potential.source.by_differences


def one_sided(package):
    """A disc whose plane is 0.2 kpc above z = 0: symmetric about the axis, and not about the plane."""
    if package == "gala":
        gala = pytest.importorskip("gala.potential")
        from astropy import units as u
        from gala.units import galactic

        return from_gala(
            gala.MiyamotoNagaiPotential(
                1e11 * u.Msun, 3 * u.kpc, 0.3 * u.kpc, units=galactic, origin=[0.0, 0.0, 0.2] * u.kpc
            )
        )
    galpy = pytest.importorskip("galpy.potential")
    disc = galpy.MiyamotoNagaiPotential(normalize=1.0, a=0.4, b=0.04)
    return from_galpy(
        galpy.RotateAndTiltWrapperPotential(pot=disc, zvec=[0.0, 0.0, 1.0], offset=[0.0, 0.0, 0.2 / RO]), RO, VO
    )


@pytest.mark.parametrize("package", ["galpy", "gala"])
@pytest.mark.parametrize("alone", [True, False])
def test_one_sided_potentials_have_no_fudge(package, alone):
    """Potentials without symmetry about z = 0, alone and in a sum: refused where actions are asked for, by any way."""
    potential = one_sided(package)
    potential = potential if alone else potential + NFW(1e12, 20.0)
    assert potential.symmetry == "axisymmetric"
    w = torch.tensor([[8.0, 1.0, 0.4, 20.0, 190.0, 15.0]], dtype=torch.float64)
    finder = SnapshotModel(potential, SphericalMixture(1)).finder
    for ask in (finder.actions, finder.actions_angles, finder.tabulated, finder.capped_actions):
        with pytest.raises(ValueError, match=r"not symmetric about the plane z = 0: Phi differs by .* shift the pot"):
            ask(potential, w)
    with pytest.raises(ValueError, match="not symmetric about the plane z = 0"):
        finder.phase_space(potential, torch.tensor([[10.0, 1500.0, 5.0]]).double(), torch.ones(1, 3).double())
