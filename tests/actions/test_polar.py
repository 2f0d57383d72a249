"""Generating-function actions of orbits with L_z near zero, and of the degenerate ones around them.

Polar orbits of a flattened potential move in a plane: their actions are areas of surfaces of section over 2 pi, found
here with scipy's integrator. Accuracy expected: the finder's own error, and 1 % of the sum of the actions.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from contracts.actions import angle_difference
from scipy.integrate import solve_ivp

from bayespot.actions import GeneratingFunctionActions, IsochroneActions, integrate
from bayespot.actions.genfunc import OrbitActions
from bayespot.potential import NFW, Isochrone, Logarithmic

FLAT = Logarithmic(v_0=220.0, r_c=1.0, q=0.8)
FINDER = GeneratingFunctionActions()
#: Shorter orbits, for what is said of them and not for their accuracy.
QUICK = GeneratingFunctionActions(n_periods=8)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


V_PHI = tensor(-2.0, -0.5, -1e-9, 0.0, 1e-9, 0.5, 2.0)
AZIMUTH = tensor(0.0, 0.927, 2.5, -1.2)
TIMES = tensor(0.0, 0.31, 0.77)


@pytest.fixture(scope="module")
def found() -> dict[str, OrbitActions]:
    """What the finder says of the stars of several tests, integrated together.

    ``"across"``: a polar box, and with the velocities ``V_PHI`` beside it; ``"box"`` and ``"loop"``: polar orbits at
    four azimuths; ``"along"``: one box at three ``TIMES``.
    """
    c, s, one = AZIMUTH.cos(), AZIMUTH.sin(), torch.ones_like(AZIMUTH)
    stars = {"across": tensor([8, 0, 5, 100, 0, 80]).repeat(len(V_PHI), 1)}
    stars["across"][:, 4] = V_PHI
    for name, (R, v_R, z, v_z) in {"box": (8.0, 100.0, 5.0, 80.0), "loop": (8.0, 30.0, 0.5, 180.0)}.items():
        stars[name] = torch.stack([R * c, R * s, z * one, v_R * c, v_R * s, v_z * one], -1)
    with torch.no_grad():
        stars["along"] = integrate(FLAT, tensor([4.8, 6.4, 5, 60, 80, 80]), TIMES, "yoshida6", n_substeps=1000)[:, 0]
        whole = FINDER.orbits(FLAT, torch.cat(list(stars.values())))
    parts = [part.split([len(w) for w in stars.values()]) for part in whole]
    return {name: OrbitActions(*columns) for name, *columns in zip(stars, *parts, strict=True)}


def section_areas(x, z, v_x, v_z, periods=600.0):
    """Areas over 2 pi of the sections z = 0 (upwards) and x = 0 of a polar orbit: actions of its two librations."""

    def slope(_, y):
        m2 = 1 + y[0] ** 2 + (y[1] / 0.8) ** 2
        return [y[2], y[3], -(220.0**2) * y[0] / m2, -(220.0**2) * y[1] / 0.64 / m2]

    def through(i):
        def event(_, y):
            return y[i]

        event.direction = 1
        return event

    run = solve_ivp(
        slope, (0, periods / 6), [x, z, v_x, v_z], "DOP853", rtol=1e-10, atol=1e-10, events=[through(1), through(0)]
    )
    areas = []
    for crossings, (i, j) in zip(run.y_events, ((0, 2), (1, 3)), strict=True):
        points = crossings[:, [i, j]]
        points = points[np.argsort(np.arctan2(*(points / points.std(0)).T))]
        areas.append(0.5 * abs(np.sum(np.cross(points, np.roll(points, -1, 0)))) / (2 * np.pi))
    return areas


@pytest.mark.filterwarnings("ignore:Arrays of 2-dimensional vectors:DeprecationWarning")
def test_polar_box_against_sections(found):
    """The reported star (J_z was -1260): J_r is half the action of the libration through the axis, J_z the other."""
    through_plane, through_axis = section_areas(8.0, 5.0, 100.0, 80.0)
    J, error = found["across"].J[3], found["across"].error[3]
    exact = torch.tensor([through_plane / 2, 0.0, through_axis], dtype=torch.float64)
    assert bool(found["across"].reliable[3])
    assert float((J - exact).abs().max()) < 0.01 * float(exact.sum())
    assert float((J - exact).abs().max()) < 2 * float(error.max())


def test_continuous_through_zero(found):
    """From L_z = -16 to 16 kpc km/s: dJ_r/dL_z = -Omega_phi/Omega_r at fixed E and nearly fixed J_z; J even in L_z."""
    J, Omega = found["across"].J, found["across"].Omega
    torch.testing.assert_close(J.flip(0)[:, [0, 2]], J[:, [0, 2]], rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(J[:, 1], 8 * V_PHI, rtol=1e-6, atol=1e-6)
    assert float((J[:, 2] - J[3, 2]).abs().max()) < 1.0
    expected = J[3, 0] - (Omega[3, 1] / Omega[3, 0]) * 8 * V_PHI.abs()
    assert float((J[:, 0] - expected).abs().max()) < 1.0
    assert abs(float(Omega[3, 1] / Omega[3, 0]) - 0.5) < 1e-6


@pytest.mark.parametrize("orbit", ["box", "loop"])
def test_polar_orbits_turn_with_the_axes(found, orbit):
    """A polar orbit at four azimuths: equal J and Omega, theta_phi turned by the azimuth; box and loop alike."""
    J, theta, Omega = found[orbit][:3]
    assert bool(found[orbit].reliable.all())
    assert bool((J[:, [0, 2]] > 0).all())
    torch.testing.assert_close(J, J[:1].expand(4, 3), rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(Omega, Omega[:1].expand(4, 3), rtol=1e-8, atol=1e-8)
    turned = theta - torch.stack([0 * AZIMUTH, AZIMUTH, 0 * AZIMUTH], -1)
    assert float(angle_difference(turned, turned[:1]).abs().max()) < 1e-6


def test_polar_orbits_keep_their_actions(found):
    """Along a box of L_z = 0: J within 1 %, theta = theta_0 + Omega t to 0.02 rad."""
    J, theta, Omega = found["along"][:3]
    assert float(J.std(0).max()) < 0.01 * float(J[0].abs().sum())
    drift = angle_difference(theta, theta[:1] + Omega[:1] * TIMES[:, None])
    assert float(drift.abs().max()) < 0.02


def test_spheres():
    """Polar, planar, retrograde, radial and resting stars: J within 1e-3 of the isochrone's; no plane, no angles."""
    potential = Isochrone(m_tot=1e11, r_s=3.0)
    w = tensor(
        (8, 0, 5, 100, 0, 80),
        (4.8, 6.4, 5, 60, 80, 80),
        (8, 0, 0, 30, 0, -180),
        (8, 0, 0, 60, 150, 0),
        (8, 0, 1, 60, -150, 20),
        (8, 0, 5, 0, 0, 0),
        (0, 0, 5, 0, 0, 80),
        (0, 0, 0, 100, 50, 80),
        (0, 0, 0, 0, 0, 0),
    )
    with torch.no_grad():
        found, exact = FINDER.actions_angles(potential, w), IsochroneActions().actions_angles(potential, w)
    size = exact.J.abs().sum(-1, keepdim=True)
    assert bool(((found.J - exact.J).abs() <= 1e-3 * size).all()), found.J
    planar = torch.linalg.cross(w[:, :3], w[:, 3:]).norm(dim=-1) > 0
    assert planar.sum() == 5
    assert torch.equal(found.Omega[:, 1:].isnan(), ~planar[:, None].expand(-1, 2))
    torch.testing.assert_close(found.Omega[planar][:, ::2], exact.Omega[planar][:, ::2], rtol=1e-5, atol=0)


def test_planar_orbits_of_flattened_potentials():
    """Circular, eccentric, retrograde: J_z = 0, and Omega_z that of small vertical oscillations; radial: NaN."""
    R = torch.tensor(8.0, dtype=torch.float64)
    v_c = float(FLAT.circular_speed(R))
    with torch.no_grad():
        w = tensor([8, 0, 0, 0, v_c, 0], [8, 0, 0, 60, -150, 0], [8, 0, 0, 100, 0, 0], [8, 0, 1e-3, 60, -150, 0])
        found = FINDER.orbits(FLAT, w)
    assert bool(found.reliable[:3].all())
    assert float(found.J[:3, 2].abs().max()) < 1e-5 * float(found.J[:3].abs().sum(-1).min())
    assert float(found.J[0, 0]) < 1e-6
    assert abs(float(found.Omega[0, 2]) / (v_c / 8 / 0.8) - 1) < 1e-4
    assert abs(float(found.Omega[1, 2] / found.Omega[3, 2]) - 1) < 1e-4
    assert bool(found.Omega[2, 2].isnan())


def test_no_number_without_a_word():
    """An orbit along the axis, where families meet, is NaN with a warning that counts and names it; so is any above
    ``max_error``; `orbits` keeps what was found, and clean samples give no warning."""
    w = tensor([8, 0, 1, 20, 150, 30], [0, 0, 5, 0, 0, 80])
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="1 of 2 stars have no reliable actions.*row 1"):
            J = QUICK.actions(FLAT, w)
        with pytest.warns(RuntimeWarning, match="no reliable actions"):
            angles = QUICK.actions_angles(FLAT, w)
        found = QUICK.orbits(FLAT, w)
        strict = GeneratingFunctionActions(n_periods=8, max_error=1e-9)
        with pytest.warns(RuntimeWarning, match="n_periods"):
            assert bool(strict.actions(FLAT, w[:1]).isnan().all())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            QUICK.actions(FLAT, w[:1])
    for part in (J, angles.J, angles.theta, angles.Omega):
        assert part.isnan().all(-1).tolist() == [False, True]
    assert found.reliable.tolist() == [True, False]
    assert bool(torch.isfinite(found.J).all())
    with pytest.raises(ValueError, match="max_error must be positive"):
        GeneratingFunctionActions(max_error=0.0)


def test_company_and_escape():
    """J of a star at its pericentre is the same alone and beside a far one; escape is the potential's."""
    potential = NFW(m_s=1e12, r_s=20.0)
    w = tensor([0.05, 0, 0, 0, 500, 100], [300, 0, 0, 0, 50, 10], [0.01, 0, 0, 0, 1500, 0])
    with torch.no_grad():
        together = QUICK.orbits(potential, w)
        alone = QUICK.orbits(potential, w[:1])
    torch.testing.assert_close(together.J[0], alone.J[0], rtol=1e-9, atol=1e-9)
    assert together.J.isnan().any(-1).tolist() == [False, False, True]
    log = Logarithmic(200.0, 1.0)
    with torch.no_grad():
        assert bool(torch.isfinite(QUICK.orbits(log, tensor([8, 0, 0, 0, 1100, 0])).J).all())
