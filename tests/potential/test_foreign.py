"""Potentials of galpy and gala, taken for what they are: second derivatives that are missing or wrong, potentials that
take no arrays, change with time or have no units.

Expected values are closed forms, or five-point differences of the package's own forces at fixed steps, which share no
code with the ones under test.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from bayespot.potential import CallablePotential, from_gala, from_galpy
from bayespot.potential.checked import Checked
from bayespot.potential.differences import slopes
from bayespot.units import G

RO, VO = 8.0, 220.0
X = np.array([[4.0, 3.0, 1.0], [0.6, -0.2, 0.5], [-9.0, 2.0, -4.0]])


class Plummer:
    """A Plummer sphere of GM = 1 at ``origin``, whose second derivatives are multiplied by ``wrong``."""

    def __init__(self, b=1.0, origin=(0.0, 0.0, 0.0), wrong=1.0):
        self.b, self.origin, self.wrong = b, np.array(origin), wrong

    def phi(self, x):
        return -((((x - self.origin) ** 2).sum(-1) + self.b**2) ** -0.5)

    def gradient(self, x):
        return (x - self.origin) * -(self.phi(x)[:, None] ** 3)

    def exact(self, x):
        q, s = x - self.origin, -self.phi(x)[:, None, None]
        return np.eye(3) * s**3 - 3 * q[:, :, None] * q[:, None, :] * s**5

    def hessian(self, x):
        return self.wrong * self.exact(x)


def differences(function, x):
    """Derivatives of function((n, 3)) -> (n, 3) by five-point differences at one step."""
    h = 1e-3 * np.linalg.norm(x, axis=1)[:, None]
    out = []
    for axis in np.eye(3):
        steps = [function(x + k * h * axis) for k in (1, -1, 2, -2)]
        out.append((8 * (steps[0] - steps[1]) - (steps[2] - steps[3])) / (12 * h))
    return np.stack(out, -1)


def density_of(potential, x=X):
    """Density from differences of the potential's forces."""

    def gradient(x):
        return -potential.acceleration(torch.as_tensor(x)).numpy()

    return differences(gradient, x).trace(axis1=1, axis2=2) / (4 * np.pi * G)


def test_slopes():
    """Second derivatives of a Plummer sphere to 1e-9 inside and outside its core, at the origin, and in a satellite of
    0.1 kpc at 30 kpc, where the first steps are larger than the satellite."""
    for source, x in (
        (Plummer(), np.array([[0.3, 0.2, -0.1], [20.0, 5.0, 1.0], [1e-3, 0.0, 0.0], [0.0, 0.0, 0.0]])),
        (Plummer(0.1, (30.0, 0.0, 0.0)), np.array([[30.05, 0.02, 0.0], [30.0, 0.0, 0.01], [33.0, 0.0, 0.0]])),
    ):
        found, exact = slopes(source.gradient, x).values, source.exact(x)
        size = np.abs(exact).max((1, 2), keepdims=True)
        assert (np.abs(found - exact) / size).max() < 1e-9


@pytest.mark.parametrize("wrong", [0.0, 1.001, -1.0, np.nan])
def test_wrong_second_derivatives_are_replaced(wrong):
    """Zeros, 0.1 %, a sign, not a number: differences take over; right ones are used as they are."""
    checked = Checked(Plummer(wrong=wrong), "Plummer")
    assert checked.by_differences
    np.testing.assert_allclose(checked.hessian(X), Plummer().exact(X), rtol=1e-8, atol=1e-12)
    assert not Checked(Plummer(), "Plummer").by_differences


def test_forces_that_are_not_those_of_phi():
    """Refused by name where they are wrong by 5 %, a warning where by 0.1 %."""

    class Wrong(Plummer):
        factor = 1.05

        def gradient(self, x):
            return self.factor * super().gradient(x)

    with pytest.raises(ValueError, match=r"forces of Wrong depart from the slope of its own Phi by 5 % at r = "):
        Checked(Wrong(), "Wrong")
    Wrong.factor = 1.001
    with pytest.warns(UserWarning, match=r"forces of Wrong depart .* by 0.1 %"):
        Checked(Wrong(), "Wrong")


@pytest.fixture(scope="module")
def gala():
    """gala.potential, astropy's units and gala's galactic units."""
    potential = pytest.importorskip("gala.potential")
    from astropy import units as u
    from gala.units import galactic

    return potential, u, galactic


GALA = {
    "Burkert": lambda p, u, g: p.BurkertPotential(1e7 * u.Msun / u.kpc**3, 5 * u.kpc, units=g),
    "Kuzmin": lambda p, u, g: p.KuzminPotential(1e11 * u.Msun, 3 * u.kpc, units=g),
    "turned logarithm": lambda p, u, g: p.LogarithmicPotential(
        200 * u.km / u.s, 1 * u.kpc, q1=1, q2=0.9, q3=0.8, phi=30 * u.deg, units=g
    ),
    "Lee-Suto": lambda p, u, g: p.LeeSutoTriaxialNFWPotential(200 * u.km / u.s, 15 * u.kpc, b=0.9, c=0.8, units=g),
    "oscillator": lambda p, u, g: p.HarmonicOscillatorPotential(np.array([20.0, 20.0, 30.0]) / u.Gyr, units=g),
    "LM10": lambda p, u, g: p.LM10Potential(),
    "rotated": lambda p, u, g: p.MiyamotoNagaiPotential(
        1e11 * u.Msun, 3 * u.kpc, 0.3 * u.kpc, units=g, R=np.array([[1, 0, 0], [0, 0, -1.0], [0, 1.0, 0]])
    ),
    "sum": lambda p, u, g: (
        p.PlummerPotential(1e11 * u.Msun, 3 * u.kpc, units=g)
        + p.BurkertPotential(1e7 * u.Msun / u.kpc**3, 5 * u.kpc, units=g)
    ),
}


@pytest.mark.filterwarnings("ignore:.*numpy.*")
@pytest.mark.parametrize("name", GALA)
def test_gala_second_derivatives(gala, name):
    """Where gala's second derivatives are zero, wrong or missing the density is that of its forces (1e-6 of the largest
    second derivative's)."""
    potential = from_gala(GALA[name](*gala))
    assert potential.source.by_differences
    expected = density_of(potential)
    scale = np.linalg.norm(potential.acceleration(torch.as_tensor(X)), axis=1) / np.linalg.norm(X, axis=1) / G
    assert (np.abs(potential.density(torch.as_tensor(X)).numpy() - expected) < 1e-6 * scale).all()


def test_gala_burkert_density(gala):
    """rho_0 / ((1 + x) (1 + x^2)) with x = r / r_0 to 1e-4 (gala's constant of gravity), 8.01e6 Msun/kpc^3 at 1 kpc."""
    potential = from_gala(GALA["Burkert"](*gala))
    r = torch.tensor([0.2, 1.0, 10.0], dtype=torch.float64)
    x = r.numpy() / 5
    density = potential.density(torch.stack([r, 0 * r, 0 * r], -1)).numpy()
    np.testing.assert_allclose(density, 1e7 / ((1 + x) * (1 + x**2)), rtol=1e-4)
    assert density[1] == pytest.approx(8.0128e6, rel=1e-4)


def test_gala_right_ones_are_used_as_they_are(gala):
    """gala's Milky Way keeps its own second derivatives."""
    p, _, _ = gala
    assert not from_gala(p.MilkyWayPotential(version="v2")).source.by_differences


def test_gala_refusals(gala):
    """No units, two dimensions, a rotating frame, a mass that grows, alone and in a sum: by name."""
    p, u, galactic = gala
    growing = p.TimeInterpolatedPotential(
        p.PlummerPotential, np.linspace(-100, 100, 11) * u.Myr, m=np.linspace(1, 2, 11) * 1e10 * u.Msun, b=1 * u.kpc,
        units=galactic,
    )  # fmt: skip
    plummer = p.PlummerPotential(1e11 * u.Msun, 3 * u.kpc, units=galactic)
    frame = p.ConstantRotatingFrame(Omega=[0, 0, 30] * u.km / u.s / u.kpc, units=galactic)
    for potential, words in (
        (p.PlummerPotential(1.0, 1.0), "PlummerPotential has no units: build it with units"),
        (p.HenonHeilesPotential(), "HenonHeilesPotential has 2 dimensions"),
        (growing, "TimeInterpolatedPotential depends on time"),
        (plummer + growing, "TimeInterpolatedPotential in CCompositePotential depends on time"),
        (p.Hamiltonian(plummer, frame), r"Hamiltonian of gala is a potential in a frame .* give its .potential"),
        (p.CompositePotential(), "has no members"),
    ):
        with pytest.raises(ValueError, match=words):
            from_gala(potential)


def test_gala_own_class_that_turns(gala):
    """A user's Python potential whose phase goes with t is found out by its values."""
    p, _, galactic = gala

    class Bar(p.PotentialBase):
        def _energy(self, q, t=0.0):
            angle = 0.03 * np.asarray(t)
            x = q[:, 0] * np.cos(angle) + q[:, 1] * np.sin(angle)
            return 0.01 * np.log(1 + (q**2).sum(1) + x**2)

        def _gradient(self, q, t=0.0):
            angle = 0.03 * np.asarray(t)
            c, s = np.cos(angle), np.sin(angle)
            x = q[0] * c + q[1] * s
            return 0.02 * (q + x * np.stack([c + 0 * x, s + 0 * x, 0 * x])) / (1 + (q**2).sum(0) + x**2)

    with pytest.raises(ValueError, match="Bar depends on time"):
        from_gala(Bar(units=galactic))


@pytest.fixture(scope="module")
def galpy():
    """galpy.potential."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("galpy.potential")


def halo(galpy):
    """A triaxial logarithmic halo."""
    return galpy.LogarithmicHaloPotential(normalize=1.0, q=0.8, b=0.9)


ONE_BY_ONE = {
    "double exponential": lambda p: p.DoubleExponentialDiskPotential(de_n=1000),
    "turned": lambda p: p.RotateAndTiltWrapperPotential(pot=halo(p), zvec=[0.3, 0.2, 0.93], galaxy_pa=0.4),
    "razor-thin exponential": lambda p: p.RazorThinExponentialDiskPotential(),
    "sum": lambda p: p.NFWPotential(normalize=0.5) + p.DoubleExponentialDiskPotential(de_n=1000),
    "list": lambda p: [p.NFWPotential(normalize=0.5), p.DoubleExponentialDiskPotential(de_n=1000)],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_galpy_one_point_at_a_time(galpy, name):
    """Potentials that take no arrays: Phi and forces are those of galpy's own calls of one point, the density that of
    its forces."""
    known = ONE_BY_ONE[name](galpy)
    potential = from_galpy(known, RO, VO)
    x = torch.as_tensor(X[:2])
    phi, acceleration = potential.phi(x).numpy(), potential.acceleration(x).numpy()
    for i, (a, b, c) in enumerate(X[:2]):
        at = {"R": np.hypot(a, b) / RO, "z": c / RO, "phi": np.arctan2(b, a), "use_physical": False}
        one = {
            n: float(np.squeeze(getattr(galpy, f"evaluate{n}")(known, **at)))
            for n in ("Potentials", "Rforces", "zforces")
        }
        assert phi[i] == pytest.approx(one["Potentials"] * VO**2, rel=1e-12)
        radial = (acceleration[i, 0] * a + acceleration[i, 1] * b) / np.hypot(a, b)
        assert radial == pytest.approx(one["Rforces"] * VO**2 / RO, rel=1e-12)
        assert acceleration[i, 2] == pytest.approx(one["zforces"] * VO**2 / RO, rel=1e-12)
    scale = np.linalg.norm(acceleration, axis=1) / np.linalg.norm(X[:2], axis=1) / G
    assert (np.abs(potential.density(x).numpy() - density_of(potential, X[:2])) < 1e-3 * scale).all()


@pytest.mark.filterwarnings("ignore")
def test_galpy_sums_are_objects_or_lists(galpy):
    """A sum, a sum of sums and a list of the same members are one potential."""
    a, b, c = galpy.MiyamotoNagaiPotential(normalize=0.6), galpy.NFWPotential(normalize=0.3), halo(galpy)
    sums = [from_galpy(one, RO, VO) for one in (a + b + c, a + (b + c), [a, [b, c]])]
    assert {one.symmetry for one in sums} == {"triaxial"}
    x = torch.as_tensor(X)
    for one in sums[1:]:
        torch.testing.assert_close(one.acceleration(x), sums[0].acceleration(x), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="empty list"):
        from_galpy([], RO, VO)


def bar(p):
    return p.DehnenBarPotential()


CHANGING = {
    "DehnenBarPotential": bar,
    "SoftenedNeedleBarPotential": lambda p: p.SoftenedNeedleBarPotential(normalize=0.2),
    "SpiralArmsPotential": lambda p: p.SpiralArmsPotential(omega=1.3),
    "DehnenSmoothWrapperPotential": lambda p: p.DehnenSmoothWrapperPotential(pot=halo(p), tform=-1000.0),
    "GaussianAmplitudeWrapperPotential": lambda p: p.GaussianAmplitudeWrapperPotential(pot=halo(p), to=7.7, sigma=0.1),
    "SolidBodyRotationWrapperPotential": lambda p: p.SolidBodyRotationWrapperPotential(pot=halo(p), omega=1.1),
    "CorotatingRotationWrapperPotential": lambda p: p.CorotatingRotationWrapperPotential(pot=halo(p)),
    "TimeDependentAmplitudeWrapperPotential": lambda p: p.TimeDependentAmplitudeWrapperPotential(
        pot=halo(p), A=lambda t: 1 + 0.1 * t
    ),
    "DehnenBarPotential in RotateAndTiltWrapperPotential": lambda p: p.RotateAndTiltWrapperPotential(
        pot=bar(p), zvec=[0.3, 0.2, 0.93]
    ),
    "DehnenBarPotential in DehnenSmoothWrapperPotential": lambda p: p.DehnenSmoothWrapperPotential(
        pot=halo(p) + bar(p)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHANGING)
def test_galpy_what_changes_with_time_is_refused(galpy, name):
    """Bars, spirals, wrappers that grow or turn: by name, alone, in a sum and in a list."""
    changing = CHANGING[name](galpy)
    for one in (changing, galpy.NFWPotential() + changing, [galpy.NFWPotential(), changing]):
        with pytest.raises(ValueError, match=f"^{name} depends on time or rotates"):
            from_galpy(one, RO, VO)


@pytest.mark.filterwarnings("ignore")
def test_galpy_moving_objects_and_friction_are_refused(galpy):
    """A satellite on its orbit, friction, and the forces of an accelerated frame."""
    from galpy.orbit import Orbit

    orbit = Orbit([1.0, 0.1, 1.1, 0.0, 0.1, 0.0])
    orbit.integrate(np.linspace(0, 1, 11), halo(galpy))
    nfw = galpy.NFWPotential(normalize=1.0)
    for one, words in (
        (
            galpy.MovingObjectPotential(orbit, pot=galpy.PlummerPotential(amp=0.1, b=0.1)),
            "MovingObject.* depends on time",
        ),
        (nfw + galpy.ChandrasekharDynamicalFrictionForce(GMs=0.1, dens=nfw), "Chandrasekhar.* depends on the velocity"),
        (nfw + galpy.NonInertialFrameForce(Omega=1.0), "NonInertialFrameForce depends on the velocity"),
        (nfw.toPlanar(), "not a three-dimensional galpy potential"),
    ):
        with pytest.raises(ValueError, match=words):
            from_galpy(one, RO, VO)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.SpiralArmsPotential(),
        lambda p: p.SolidBodyRotationWrapperPotential(pot=p.NFWPotential(), omega=1.1),
        lambda p: p.KuzminLikeWrapperPotential(pot=p.PlummerPotential(), a=1.1, b=0.1),
        lambda p: p.AdiabaticContractionWrapperPotential(pot=p.NFWPotential(), baryonpot=p.HernquistPotential(amp=0.3)),
    ],
)
def test_galpy_static_ones_pass(galpy, make):
    """Spiral arms that stand, a sphere that turns, wrappers that do neither."""
    assert isinstance(from_galpy(make(galpy), RO, VO), CallablePotential)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_galpy_units(galpy):
    """No units: a warning that says which are taken. Units that contradict the potential's or each other, or are none:
    refused. Quantities are converted."""
    from astropy import units as u

    bare = galpy.PlummerPotential(amp=1.0, b=0.5)
    with pytest.warns(UserWarning, match=r"PlummerPotential has no units of its own: ro=8, vo=220"):
        default = from_galpy(bare)
    with pytest.warns(UserWarning, match=r"no units of its own: vo=220 "):
        from_galpy(bare, ro=8.0)
    own = galpy.PlummerPotential(amp=1e11 * u.Msun, b=4 * u.kpc, ro=8.3, vo=230.0)
    x = torch.as_tensor(X)
    closed = -G * 1e11 / (x**2).sum(-1).add(16).sqrt()
    torch.testing.assert_close(from_galpy(own).phi(x), closed, rtol=1e-4, atol=0)
    torch.testing.assert_close(from_galpy(own, 8300 * u.pc, 230.0).phi(x), closed, rtol=1e-4, atol=0)
    torch.testing.assert_close(from_galpy(bare, 8 * u.kpc, 220 * u.km / u.s).phi(x), default.phi(x))
    other = galpy.PlummerPotential(amp=1.0, b=0.5, ro=8.0, vo=220.0)
    for arguments, words in (
        ((own, 8.0), r"ro=8 contradicts PlummerPotential, which was built with ro=8.3"),
        (([own, other],), r"units differ: PlummerPotential ro=8.3, vo=230, PlummerPotential ro=8, vo=220"),
        ((bare, -8.0, 220.0), "positive, got ro=-8"),
        ((bare, 8.0, np.inf), "positive, got vo=inf"),
        ((bare, 8 * u.Msun, 220.0), "ro is a length and cannot be in solMass"),
    ):
        with pytest.raises(ValueError, match=words):
            from_galpy(*arguments)


@pytest.mark.filterwarnings("ignore")
def test_galpy_failures_are_said_in_one_sentence(galpy):
    """A potential that galpy itself cannot evaluate (its own default arguments): which, where and why."""
    with pytest.raises(ValueError, match=r"galpy does not give Rforces of Truncated\w+ at R = .* kpc \(TypeError"):
        from_galpy(galpy.TruncatedTwoPowerSphericalPotential(), RO, VO)
