"""Potentials to and from other packages, against those packages' own functions of the same potential.

galpy's and gala's numbers for a potential that both sides know in closed form must agree with ours to 1e-9 (gala and
densities to 1e-4: their gravitational constants have fewer digits). AGAMA's file is read by a parser as strict as
AGAMA's own: section, keys, the empty line between the tables.
"""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from contracts.potential import (
    check_acceleration,
    check_batches,
    check_circular_speed,
    check_density,
    check_potential,
    points_at,
)
from torch.distributions import LogNormal

from bayespot.actions import SphericalActions, integrate
from bayespot.potential import (
    NFW,
    CallablePotential,
    Isochrone,
    Logarithmic,
    MassSlopeNetwork,
    Plummer,
    TabulatedSphere,
    from_gala,
    from_galpy,
)
from bayespot.potential.exchange import agama_text
from bayespot.units import G

M, B = 1e11, 3.0
RO, VO = 8.0, 220.0
RADII = torch.logspace(-1, 2, 7, dtype=torch.float64)
W = torch.tensor([[8.0, 0.0, 0.5, 40.0, 90.0, -30.0], [1.0, 2.0, -2.0, -60.0, 20.0, 80.0]], dtype=torch.float64)


class Quadratic:
    """A triaxial harmonic oscillator with a twist, whose Hessian is constant."""

    matrix = np.array([[2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 4.0]])

    def phi(self, x):
        return np.einsum("ni,ij,nj->n", x, self.matrix, x) / 2

    def gradient(self, x):
        return x @ self.matrix

    def hessian(self, x):
        return np.broadcast_to(self.matrix, (len(x), 3, 3))


def assert_close(found, expected, rtol, note=""):
    """Compare arrays or tensors, with or without a graph."""
    found, expected = (x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=rtol, err_msg=note)


def galpy_isochrone():
    """galpy's isochrone of the mass M and scale B."""
    potential = pytest.importorskip("galpy.potential")
    return potential.IsochronePotential(amp=G * M / RO / VO**2, b=B / RO, ro=RO, vo=VO)


def galpy_frame(w):
    """galpy's (R, vR, vT, z, vz, phi) in natural units of one star."""
    x, y, z, vx, vy, vz = w.tolist()
    R, phi = np.hypot(x, y), np.arctan2(y, x)
    v_R, v_T = vx * np.cos(phi) + vy * np.sin(phi), vy * np.cos(phi) - vx * np.sin(phi)
    return [R / RO, v_R / VO, v_T / VO, z / RO, vz / VO, phi]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("as_sphere", [True, False])
def test_to_galpy_against_the_built_in(as_sphere):
    """Phi, forces, second derivatives, v_c of the exported isochrone against galpy's isochrone to 1e-9, as a sphere and
    through the general, cylindrical class; scalars and arrays."""
    known, ours = galpy_isochrone(), Isochrone(M, B)
    if not as_sphere:
        ours.symmetry = "triaxial"
    exported = ours.to_galpy(RO, VO)
    R, z, phi = np.array([0.2, 1.0, 4.0]), np.array([0.1, -0.5, 2.0]), 0.7
    for name in ("__call__", "Rforce", "zforce", "R2deriv", "z2deriv", "Rzderiv"):
        got = getattr(exported, name)(R, z, phi=phi, use_physical=False)
        assert_close(got, getattr(known, name)(R, z, use_physical=False), rtol=1e-9, note=name)
        one = getattr(exported, name)(R[0], z[0], phi=phi, use_physical=False)
        assert_close(one, got[0], rtol=1e-12, note=name)
    if not as_sphere:
        for name in ("phitorque", "phi2deriv", "Rphideriv"):
            assert abs(getattr(exported, name)(1.0, 0.3, phi=phi, use_physical=False)) < 1e-9
    assert exported.vcirc(1.0, phi=0.0, use_physical=False) == pytest.approx(
        known.vcirc(1.0, use_physical=False), rel=1e-9
    )
    density = exported.dens(1.0, 0.2, phi=phi, use_physical=False)
    assert density == pytest.approx(known.dens(1.0, 0.2, use_physical=False), rel=1e-8)


@pytest.mark.filterwarnings("ignore")
def test_galpy_derivatives_of_a_triaxial_potential():
    """The cylindrical derivatives of a potential without symmetry against central differences to 1e-6."""
    pytest.importorskip("galpy")
    exported = CallablePotential(Quadratic()).to_galpy(RO, VO)
    at, h = np.array([1.1, -0.4, 0.8]), 1e-4

    def value(R, z, phi):
        return float(exported(R, z, phi=phi, use_physical=False))

    def slope(i, call):
        step = np.eye(3)[i] * h
        return (call(*(at + step)) - call(*(at - step))) / (2 * h)

    def force(name):
        return lambda R, z, phi: float(getattr(exported, name)(R, z, phi=phi, use_physical=False))

    R, z, phi = at
    for name, expected in (
        ("Rforce", -slope(0, value)),
        ("zforce", -slope(1, value)),
        ("phitorque", -slope(2, value)),
        ("R2deriv", -slope(0, force("Rforce"))),
        ("z2deriv", -slope(1, force("zforce"))),
        ("Rzderiv", -slope(1, force("Rforce"))),
        ("phi2deriv", -slope(2, force("phitorque"))),
        ("Rphideriv", -slope(2, force("Rforce"))),
        ("phizderiv", -slope(2, force("zforce"))),
    ):
        got = float(getattr(exported, name)(R, z, phi=phi, use_physical=False))
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-9), name


@pytest.mark.filterwarnings("ignore")
def test_galpy_orbit_and_actions():
    """An orbit in the exported isochrone ends where galpy's own isochrone takes it (1e-6), with the same actions."""
    known, exported = galpy_isochrone(), Isochrone(M, B).to_galpy(RO, VO)
    from galpy.actionAngle import actionAngleSpherical
    from galpy.orbit import Orbit

    start, times = galpy_frame(W[0]), np.linspace(0, 1.0, 11)
    ends = []
    for potential in (known, exported):
        orbit = Orbit(start, ro=RO, vo=VO)
        orbit.integrate(times, potential, method="dop853")
        ends.append([orbit.R(1.0, use_physical=False), orbit.z(1.0, use_physical=False)])
    assert_close(ends[1], ends[0], rtol=1e-6)
    values = [[float(np.squeeze(j)) for j in actionAngleSpherical(pot=p)(*start)] for p in (known, exported)]
    assert_close(values[1], values[0], rtol=1e-6)
    J = SphericalActions().actions(Isochrone(M, B), W[:1])[0]
    assert_close(np.array(values[0]) * RO * VO, J, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_from_galpy():
    """galpy's isochrone as a potential: found to be a sphere; our isochrone's fields, orbits (1e-9) and actions (1e-5);
    density to 1e-8; a copy and a pickle give the same numbers."""
    potential, truth = from_galpy(galpy_isochrone()), Isochrone(M, B)
    assert potential.symmetry == "spherical"
    check_acceleration(potential, points_at(RADII))
    check_density(potential, points_at(RADII), truth.density, 1e-8, 1e-5)
    check_batches(potential, points_at(RADII))
    for field in ("circular_speed", "enclosed_mass"):
        assert_close(getattr(potential, field)(RADII), getattr(truth, field)(RADII), rtol=1e-9)
    finder = SphericalActions()
    assert_close(finder.actions(potential, W), finder.actions(truth, W), rtol=1e-5)
    ends = [integrate(p, W, (0.05, 3), "yoshida6", n_substeps=50)[-1] for p in (potential, truth)]
    assert_close(ends[0], ends[1], rtol=1e-9)
    for other in (copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        assert torch.equal(other.phi(W[:, :3]), potential.phi(W[:, :3]))


@pytest.mark.filterwarnings("ignore")
def test_from_galpy_milky_way():
    """A list of galpy potentials: axisymmetric, its v_c(8 kpc) = 220 km/s, forces and Hessian against differences; and
    back to galpy with the same forces to 1e-9."""
    galpy_potential = pytest.importorskip("galpy.potential")
    potential = from_galpy(galpy_potential.MWPotential2014)
    assert potential.symmetry == "axisymmetric"
    assert float(potential.circular_speed(torch.tensor(8.0).double())) == pytest.approx(220, rel=1e-9)
    check_acceleration(potential, points_at(RADII[1:-1]))
    check_circular_speed(potential, RADII)
    x = torch.tensor([4.0, -3.0, 1.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(potential.acceleration, x.requires_grad_(), rtol=1e-5, atol=1e-3)
    back = potential.to_galpy(8.0, 220.0)
    expected = galpy_potential.evaluatezforces(galpy_potential.MWPotential2014, 0.7, 0.2, use_physical=False)
    assert back.zforce(0.7, 0.2, use_physical=False) == pytest.approx(expected, rel=1e-9)


def test_callable_potential():
    """A triaxial quadratic form: forces and density in closed form; third derivatives are refused."""
    potential = CallablePotential(Quadratic())
    assert potential.symmetry == "triaxial"
    x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, 9.0]], dtype=torch.float64)
    assert_close(-potential.acceleration(x), x.numpy() @ Quadratic.matrix, rtol=1e-14)
    assert_close(potential.density(x), 7.0 / (4 * np.pi * G), rtol=1e-14)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="has two derivatives"):
        torch.autograd.grad(potential.density(x).sum(), x)
    with pytest.raises(ValueError, match="symmetry must be one of spherical"):
        CallablePotential(Quadratic(), "round")


@pytest.mark.filterwarnings("ignore")
def test_gala_both_ways():
    """gala's isochrone against ours, exported and imported: Phi, gradient, Hessian and density to 1e-4 (gala's G)."""
    potential = pytest.importorskip("gala.potential")
    from astropy import units as u
    from gala.units import galactic

    known = potential.IsochronePotential(M * u.Msun, B * u.kpc, units=galactic)
    truth, x = Isochrone(M, B), W[:, :3]
    exported = truth.to_gala()
    q = x.numpy().T * u.kpc
    for name in ("energy", "gradient", "hessian", "density"):
        got, expected = getattr(exported, name)(q), getattr(known, name)(q)
        assert_close(got.to_value(expected.unit), expected.value, rtol=1e-4, note=name)
    imported = from_gala(known)
    assert imported.symmetry == "spherical"
    assert_close(imported.acceleration(x), truth.acceleration(x), rtol=1e-4)
    assert_close(imported.density(x), truth.density(x), rtol=1e-4)
    with pytest.raises(ValueError, match="not a gala potential"):
        from_gala(Isochrone(M, B))


def read_agama(text: str) -> dict[str, np.ndarray]:
    """Parse a Multipole file by AGAMA's rules: keys, "Coefficients", then two tables with an empty line between."""
    lines = text.split("\n")
    assert lines[0] == "[Potential]"
    start = lines.index("Coefficients")
    keys = dict(line.split("=") for line in lines[1:start])
    assert keys == {"type": "Multipole", "gridSizeR": keys["gridSizeR"], "lmax": "0", "symmetry": "Spherical"}
    n, lines = int(keys["gridSizeR"]), lines[start + 1 :]
    assert len(lines) >= 2 * n + 5
    assert (lines[0], lines[n + 2], lines[n + 3]) == ("#Phi", "", "#dPhi/dr")
    assert lines[1].startswith("#")
    assert lines[n + 4].startswith("#")
    tables = [np.array([line.split() for line in lines[k : k + n]], dtype=float) for k in (2, n + 5)]
    assert np.array_equal(tables[0][:, 0], tables[1][:, 0])
    return {"r": tables[0][:, 0], "phi": tables[0][:, 1], "slope": tables[1][:, 1]}


def test_agama_file(tmp_path):
    """The file holds Phi and dPhi/dr of the isochrone to 1e-13, is not overwritten unasked; nothing else is left."""
    truth, path = Isochrone(M, B), tmp_path / "potential.ini"
    truth.to_agama(path, np.geomspace(0.1, 100, 31))
    table = read_agama(path.read_text())
    r = torch.as_tensor(table["r"])
    assert_close(table["phi"], truth.phi_r(r), rtol=1e-13)
    assert_close(table["slope"], G * truth.mass_r(r) / r**2, rtol=1e-13)
    assert len(read_agama(agama_text(truth))["r"]) == 161
    with pytest.raises(ValueError, match="exists"):
        truth.to_agama(path)
    truth.to_agama(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["potential.ini"]
    with pytest.raises(ValueError, match="spherical"):
        Logarithmic(200.0, 1.0, 0.9).to_agama(path, overwrite=True)
    with pytest.raises(ValueError, match="positive and increasing"):
        truth.to_agama(path, [1.0, 1.0], overwrite=True)


def test_priors_are_not_exported(tmp_path):
    """A parameter with a prior is named, and the remedy."""
    pytest.importorskip("galpy")
    free = MassSlopeNetwork(1.0, -2.0, 4.0, 25.0)
    nested = Plummer(LogNormal(torch.tensor(20.0), torch.tensor(1.0)), 1.0) + NFW(1e11, 10.0)
    for potential, words in ((free, "ln_mass, slope_weights"), (nested, "members.0.m_tot")):
        with pytest.raises(ValueError, match=words):
            potential.to_galpy()
        with pytest.raises(ValueError, match="potential_at"):
            potential.to_agama(tmp_path / "a.ini")


@pytest.mark.parametrize("package", ["galpy", "gala"])
def test_missing_package(package, monkeypatch):
    """Without the package: a ModuleNotFoundError that says how to install it; nothing else needs it."""
    monkeypatch.delitem(sys.modules, f"bayespot.potential.{package}_bridge", raising=False)
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        getattr(Isochrone(M, B), f"to_{package}")()


def test_tabulated_sphere():
    """Values of the isochrone's Phi at 30 radii per decade: fields to 1e-6 (density 1e-4) inside the table, M(<r) to
    1 % ten times beyond it; all that a potential must satisfy; actions as in the isochrone (1e-5)."""
    truth = Isochrone(M, B)
    r = np.geomspace(0.01, 1000, 151)
    potential = TabulatedSphere(r, truth.phi_r(torch.as_tensor(r)))
    check_potential(potential, RADII)
    for field, rtol in (("phi_r", 1e-7), ("circular_speed", 1e-6), ("enclosed_mass", 1e-6)):
        assert_close(getattr(potential, field)(RADII), getattr(truth, field)(RADII), rtol=rtol)
    x = RADII[:, None] * torch.tensor([0.6, 0.0, 0.8]).double()
    assert_close(potential.density(x), truth.density(x), rtol=1e-4)
    far = torch.tensor([0.001, 10_000.0], dtype=torch.float64)
    assert_close(potential.enclosed_mass(far), truth.enclosed_mass(far), rtol=1e-2)
    finder = SphericalActions()
    assert_close(finder.actions(potential, W), finder.actions(truth, W), rtol=1e-5)


def test_tabulated_errors_converge():
    """Phi's error falls at least as the fifth power of the spacing (a quintic spline's sixth, but for the ends)."""
    truth, errors = Isochrone(M, B), []
    for n in (21, 41, 81):
        r = np.geomspace(0.01, 1000, n)
        potential = TabulatedSphere(r, truth.phi_r(torch.as_tensor(r)))
        between = 1.1 * RADII
        errors.append(float((potential.phi_r(between) / truth.phi_r(between) - 1).abs().max()))
    slopes = np.diff(np.log(errors)) / np.log(0.5)
    assert (slopes > 5).all(), slopes


def test_from_mass():
    """The enclosed mass of a Plummer sphere and of an NFW halo: Phi to 1e-4 (the mass beyond the table is a power
    law's), M(<r) to 1e-5."""
    r = np.geomspace(0.01, 3000, 201)
    for truth, rtol in ((Plummer(M, B), 1e-5), (NFW(M, B), 3e-2)):
        potential = TabulatedSphere.from_mass(r, truth.mass_r(torch.as_tensor(r)))
        assert_close(potential.enclosed_mass(RADII), truth.mass_r(RADII), rtol=1e-5)
        assert_close(potential.phi_r(RADII), truth.phi_r(RADII), rtol=rtol)


@pytest.mark.parametrize(
    ("r", "phi", "words"),
    [
        ([1.0, 2.0], [-1.0, -0.5], "n >= 6"),
        ([1, 2, 3, 3, 4, 5], [-6, -5, -4, -3, -2, -1], "increasing"),
        ([0, 1, 2, 3, 4, 5], [-6, -5, -4, -3, -2, -1], "positive"),
        ([1, 2, 3, 4, 5, 6], [-6, -5, -4, -3, np.nan, -1], "finite"),
        ([1, 2, 3, 4, 5, 6], [-6, -5, -4, -5, -6, -7], "must rise"),
    ],
)
def test_bad_tables(r, phi, words):
    """A ValueError that names what is wrong."""
    with pytest.raises(ValueError, match=words):
        TabulatedSphere(r, phi)


def test_bad_masses():
    """A decreasing mass, and one without a limit of Phi, are refused."""
    r = np.geomspace(1, 100, 20)
    with pytest.raises(ValueError, match="must not decrease"):
        TabulatedSphere.from_mass(r, 1e10 / r)
    with pytest.raises(ValueError, match=r"grows as r\^2"):
        TabulatedSphere.from_mass(r, 1e10 * r**2)


def galpy_plummer():
    """galpy's Plummer sphere of the mass M and scale B."""
    potential = pytest.importorskip("galpy.potential")
    return potential.PlummerPotential(amp=G * M / RO / VO**2, b=B / RO, ro=RO, vo=VO)


@pytest.mark.filterwarnings("ignore")
def test_galpy_slopes_of_the_density():
    """drho/dr and d^2rho/dr^2 of the exported Plummer sphere against galpy's (1e-7, 1e-6), with the amplitude, from
    0.001 to 240 kpc; of a table of the isochrone and of a potential that came from galpy to 1e-3."""
    known, exported = galpy_plummer(), Plummer(M, B).to_galpy(RO, VO)
    for r in (1e-4, 0.05, 0.3, 1.0, 5.0, 30.0):
        for name, rtol in (("_ddensdr", 1e-6), ("_d2densdr2", 2e-6)):
            assert getattr(exported, name)(r) == pytest.approx(getattr(known, name)(r), rel=rtol), (name, r)
            assert getattr(2.0 * exported, name)(r) == pytest.approx(2 * getattr(known, name)(r), rel=rtol), (name, r)
    r = np.geomspace(0.01, 1000, 151)
    truth = Isochrone(M, B).to_galpy(RO, VO)
    for other in (TabulatedSphere(r, Isochrone(M, B).phi_r(torch.as_tensor(r))), from_galpy(galpy_isochrone())):
        other = other.to_galpy(RO, VO)
        at = np.array([0.1, 1.0, 5.0])
        assert_close(other._ddensdr(at), truth._ddensdr(at), rtol=1e-3)
        assert_close(other._d2densdr2(at), truth._d2densdr2(at), rtol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_galpy_distribution_functions():
    """f(E) and f(Q) by galpy's inversions of the exported Plummer sphere are those of galpy's own to 1e-6."""
    known, exported = galpy_plummer(), Plummer(M, B).to_galpy(RO, VO)
    from galpy.df import eddingtondf, osipkovmerrittdf

    energy = np.array([-0.4]) * G * M / (B * VO**2)
    values = [eddingtondf(pot=p).fE(energy) for p in (exported, known)]
    assert_close(values[0], values[1], rtol=1e-6)
    values = [osipkovmerrittdf(pot=p, ra=1.0).fQ(-energy) for p in (exported, known)]
    assert_close(values[0], values[1], rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_galpy_masses_and_radii():
    """What galpy's users ask of a sphere equals galpy's Plummer to 1e-7, through both classes; limits at the origin and
    at infinity; the half-mass radius of an NFW halo within a radius only."""
    known = galpy_plummer()
    flat = Plummer(M, B)
    flat.symmetry = "axisymmetric"
    asked = {
        "mass": (1.0,), "tdyn": (1.0,), "vcirc": (1.0,), "dvcircdR": (1.0,), "epifreq": (1.0,), "verticalfreq": (1.0,),
        "vesc": (1.0,), "rl": (0.5,), "rE": (-0.5,), "LcE": (-0.5,), "vterm": (30.0,), "surfdens": (1.0, 0.5),
        "rforce": (1.0, 0.2), "r2deriv": (1.0, 0.2), "rhalf": (), "flattening": (1.0, 0.2),
    }  # fmt: skip
    for exported in (Plummer(M, B).to_galpy(RO, VO), flat.to_galpy(RO, VO)):
        for name, arguments in asked.items():
            got = float(getattr(exported, name)(*arguments, use_physical=False))
            assert got == pytest.approx(float(getattr(known, name)(*arguments, use_physical=False)), rel=1e-7), name
        tidal = [float(p.rtide(1.0, 0.1, M=1e-3, use_physical=False)) for p in (exported, known)]
        assert tidal[0] == pytest.approx(tidal[1], rel=1e-7)
        total = G * M / (RO * VO**2)
        assert exported.mass(np.inf, use_physical=False) == pytest.approx(total, rel=1e-8)
        assert exported.rhalf() == pytest.approx(RO * known.rhalf(use_physical=False), rel=1e-7)
    sphere = Plummer(M, B).to_galpy(RO, VO)
    assert sphere(0.0, 0.0, use_physical=False) == pytest.approx(known(0.0, 0.0, use_physical=False))
    assert abs(sphere(np.inf, 0.0, use_physical=False)) < 1e-9
    assert sphere.Rforce(0.0, 0.0, use_physical=False) == sphere.zforce(np.inf, 0.0, use_physical=False) == 0
    # rho falls as r^-2 at b (2/3)^(1/2)
    assert sphere._scale * RO == pytest.approx(B * (2 / 3) ** 0.5, rel=1e-3)
    nfw = NFW(1e12, 20.0).to_galpy(RO, VO)
    assert nfw._scale * RO == pytest.approx(20.0, rel=1e-3)
    assert nfw.mass(np.inf, use_physical=False) == np.inf
    with pytest.raises(ValueError, match=r"grows without end.*give INF="):
        nfw.rhalf()
    half = nfw.rhalf(INF=10.0, use_physical=False)
    assert nfw.mass(half, use_physical=False) == pytest.approx(nfw.mass(10.0, use_physical=False) / 2, rel=1e-7)
    assert Logarithmic(200.0, 1.0).to_galpy(RO, VO)(np.inf, 0.0, use_physical=False) == np.inf
