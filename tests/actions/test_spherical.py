"""The general spherical finder and torus map: contracts of every finder, and the isochrone's closed form.

Protocol: log-uniform radii, 5 to 95 % of the escape speed (`contracts_actions.bound_stars`), float64.
Accuracy expected: table 1e-5 median and 1e-3 worst, round trip 1e-6, angles 1e-6.
"""

from __future__ import annotations

import pytest
import torch
from contracts.actions import (
    angle_difference,
    bound_stars,
    check_gradients,
    check_invariance_along_orbit,
    check_round_trip,
    check_symplectic,
)

from bayespot.actions import IsochroneActions, SphericalActions
from bayespot.actions.radial import RadialOrbits
from bayespot.potential import NFW, Hernquist, Isochrone, Jaffe, Logarithmic, MassSlopeNetwork, Plummer, SumPotential
from bayespot.potential.profile import RadialProfile

POTENTIALS = {
    "isochrone": Isochrone(1e11, 3.0),
    "plummer": Plummer(1e11, 3.0),
    "hernquist": Hernquist(1e11, 3.0),
    "jaffe": Jaffe(1e11, 3.0),
    "nfw": NFW(1e12, 20.0),
    "logarithmic": Logarithmic(200.0, 1.0),
    "sum": SumPotential([Hernquist(5e10, 1.0), NFW(8e11, 16.0)]),
}


FINDER = SphericalActions()


@pytest.fixture(params=list(POTENTIALS), scope="module")
def potential(request):
    return POTENTIALS[request.param]


def test_round_trip(potential):
    """w -> (J, theta) -> w within 1e-6 for 300 stars between 0.1 and 30 kpc."""
    check_round_trip(FINDER, potential, bound_stars(potential, 300, seed=1), 1e-6)


def test_table_agrees_with_quadrature(potential):
    """J_r of the fast table against 48-point quadrature: median 1e-6, worst 1e-4 of J_r + L."""
    w = bound_stars(potential, 2000, seed=2)
    with torch.no_grad():
        J = FINDER.actions_angles(potential, w).J
        fast = FINDER.actions(potential, w)
    error = (fast - J)[:, 0].abs() / J.abs().sum(-1)
    assert float(error.median()) < 1e-6
    assert float(error.max()) < 1e-5


def test_symplectic(potential):
    """(theta, J) are canonical to 3e-6 (interpolated potential; eccentricities up to a million to one)."""
    check_symplectic(FINDER, potential, bound_stars(potential, 60, seed=3), 3e-6)


@pytest.mark.parametrize("name", ["plummer", "nfw"])
def test_invariance_along_orbits(name):
    """J and Omega constant to 1e-7 and theta = theta_0 + Omega t to 1e-5 along order-6 orbits."""
    potential = POTENTIALS[name]
    w = bound_stars(potential, 2, seed=4)
    w[:, 3:] *= 0.6  # the integrator needs a thousand steps a period and more to resolve eccentric pericentres
    check_invariance_along_orbit(FINDER, potential, w, 1e-7, 1e-5, steps_per_period=1300, n_periods=0.6)


def test_isochrone_closed_form():
    """Against the closed form, 20 000 stars: table 1e-5 median and 1e-3 worst of J_r; angles and Omega 1e-6."""
    potential = POTENTIALS["isochrone"]
    w = bound_stars(potential, 20_000, seed=5, r_range=(0.03, 3000.0))
    with torch.no_grad():
        exact = IsochroneActions().actions_angles(potential, w)
        J = SphericalActions().actions(potential, w)
        found = SphericalActions().actions_angles(potential, w[:500])
    error = (J - exact.J)[:, 0].abs() / exact.J[:, 0]
    assert float(error.median()) < 1e-5
    assert float(error.max()) < 1e-3
    assert float(angle_difference(found.theta, exact.theta[:500]).abs().max()) < 1e-6
    torch.testing.assert_close(found.Omega, exact.Omega[:500], rtol=2e-7, atol=0)


@pytest.mark.parametrize("J_r", [1e-4, 0.01, 1.0, 100.0, 2000.0])
def test_turning_points(J_r):
    """Stars at and near peri- and apocentre: w to 1e-8, its derivative by J to 1e-5, theta to 1e-4, of closed form's.

    Angles from (x, v) are uncertain by the rounding of r: 1e-8 of eccentric orbits, more of circular ones.
    """
    potential = POTENTIALS["isochrone"]
    away = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-10, -1, 37, dtype=torch.float64)])
    theta_r = torch.cat([away, -away[1:], torch.pi - away])
    theta = torch.stack([theta_r, torch.ones_like(theta_r), 2 * torch.ones_like(theta_r)], -1)

    def mapped(finder):
        J = torch.tensor([J_r, 350.0, 150.0], dtype=torch.float64).repeat(len(theta), 1).requires_grad_()
        w = finder.phase_space(potential, J, theta)
        slopes = [torch.autograd.grad(column.sum(), J, retain_graph=True)[0] for column in w.unbind(-1)]
        return w.detach(), torch.stack(slopes, 1)

    (w, slope), (exact, exact_slope) = mapped(SphericalActions()), mapped(IsochroneActions())
    for part in (slice(None, 3), slice(3, None)):
        error = torch.linalg.vector_norm((w - exact)[:, part], dim=-1)
        assert float((error / torch.linalg.vector_norm(exact[:, part], dim=-1)).max()) < 1e-8
        error = (slope - exact_slope)[:, part].abs().amax((1, 2))
        assert float((error / exact_slope[:, part].abs().amax((1, 2))).max()) < 1e-5
    with torch.no_grad():
        found = SphericalActions().actions_angles(potential, exact).theta[:, 0]
    assert float(angle_difference(found, theta_r).abs().max()) < 1e-4


def test_gradients():
    """Autograd against five-point differences, in w and in the potential's parameters, both ways, 1e-5."""
    potential = Plummer(1e11, 3.0)
    values = torch.tensor([1e11, 3.0], dtype=torch.float64)
    finder = SphericalActions()
    check_gradients(finder, lambda v: Plummer(v[0], v[1]), values, bound_stars(potential, 8, seed=6), 1e-5)


def test_table_gradients():
    """The fast path's J_r against the closed form's derivatives by m_tot and r_s, 1e-4 of J_r + L."""
    values = torch.tensor([1e11, 3.0], dtype=torch.float64, requires_grad=True)
    w = bound_stars(POTENTIALS["isochrone"], 200, seed=7)
    rows = []
    for finder in (SphericalActions(), IsochroneActions()):
        J = finder.actions(Isochrone(values[0], values[1]), w)[:, 0]
        grads = [torch.autograd.grad(j, values, retain_graph=True)[0] for j in J]
        rows.append(torch.stack(grads) * values.detach())
    scale = IsochroneActions().actions(POTENTIALS["isochrone"], w).abs().sum(-1, keepdim=True)
    assert float(((rows[0] - rows[1]) / scale).abs().max()) < 1e-4


def test_second_derivatives_are_refused():
    """Differentiating the actions twice raises instead of returning a wrong number."""
    mass = torch.tensor(1e11, dtype=torch.float64, requires_grad=True)
    w = bound_stars(POTENTIALS["plummer"], 5, seed=8)
    J = SphericalActions().actions(Plummer(mass, 3.0), w)
    (first,) = torch.autograd.grad(J[:, 0].sum(), mass, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first, mass)


def test_unbound_stars():
    """A star above escape speed: NaN actions, positive excess, finite capped actions and gradients."""
    potential = POTENTIALS["plummer"]
    w = bound_stars(potential, 3, seed=9)
    w[1, 3:] *= 1e3
    J, excess = SphericalActions().capped_actions(potential, w)
    assert torch.isfinite(J).all()
    assert (excess > 0).tolist() == [False, True, False]
    assert torch.isnan(SphericalActions().actions(potential, w)).any(-1).tolist() == [False, True, False]


def test_extreme_orbits():
    """Nearly circular, nearly radial and far-flung orbits: J_r >= 0, finite, circular ones near zero."""
    potential = POTENTIALS["isochrone"]
    r = torch.tensor([0.1, 3.0, 100.0], dtype=torch.float64)
    v_c = potential.circular_speed(r).detach()
    zero = torch.zeros_like(r)
    circular = torch.stack([r, zero, zero, zero, v_c, zero], -1)
    radial = torch.stack([r, zero, zero, v_c, 1e-9 * v_c, zero], -1)
    with torch.no_grad():
        J = SphericalActions().actions(potential, circular)
        assert float((J[:, 0] / J[:, 1]).abs().max()) < 1e-6
        J = SphericalActions().actions(potential, radial)
        exact = IsochroneActions().actions(potential, radial)
    torch.testing.assert_close(J[:, 0], exact[:, 0], rtol=1e-5, atol=0)


def test_neural_potential_round_trip():
    """The mass-slope network at a prior draw is an ordinary spherical potential to the finder."""
    network = MassSlopeNetwork(1.0, -2.0, 4.0, 24.0, prior="none")
    from bayespot.pyro_modules import freeze

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(network.n_features + 1, generator=generator, dtype=torch.float64)
    fixed = freeze(network, {"ln_mass": torch.tensor(24.0, dtype=torch.float64), "slope_weights": weights})
    check_round_trip(SphericalActions(), fixed, bound_stars(fixed, 100, seed=10), 1e-6)


def test_refusals():
    """A flattened potential, a bad range and impossible actions are refused with the value received."""
    flat = Logarithmic(200.0, 1.0, 0.8)
    w = bound_stars(POTENTIALS["plummer"], 2, seed=11)
    with pytest.raises(ValueError, match="axisymmetric"):
        SphericalActions().actions(flat, w)
    J = torch.tensor([[-1.0, 100.0, 10.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="J_r"):
        SphericalActions().phase_space(POTENTIALS["plummer"], J, torch.zeros(1, 3, dtype=torch.float64))


def test_time_along_an_orbit():
    """The series of t(psi) equals the quadrature from pericentre: 1e-8 rad for round and long orbits."""
    potential = POTENTIALS["plummer"]
    J = torch.tensor([[1.0, 200.0, 50.0], [300.0, 100.0, 100.0], [400.0, 60.0, 0.0]], dtype=torch.float64)
    w = SphericalActions().phase_space(potential, J, torch.full((3, 3), 1.0, dtype=torch.float64))
    r, v = torch.linalg.vector_norm(w[:, :3], dim=-1), w[:, 3:]
    profile = RadialProfile.of(potential, -12.0, 8.0, 0.005)
    energy = (v**2).sum(-1) / 2 + profile.phi(r.log())
    orbits = RadialOrbits.of(profile, energy, torch.linalg.vector_norm(torch.linalg.cross(w[:, :3], v), dim=-1))
    _, Omega_r, _ = orbits.full()
    series, azimuths = orbits.series()
    for psi in torch.linspace(-torch.pi / 2, torch.pi / 2, 9, dtype=torch.float64):
        time, slope = series(psi.expand(3))
        exact, azimuth = orbits.since_pericentre(psi.expand(3))
        torch.testing.assert_close(azimuths(psi.expand(3))[0], azimuth, rtol=0, atol=1e-8)
        torch.testing.assert_close(Omega_r * time, Omega_r * exact, rtol=0, atol=1e-8)
        torch.testing.assert_close(slope, orbits.slopes(psi.expand(3))[0], rtol=1e-6, atol=0)


def test_rough_angles(potential):
    """The finder for statistics: its theta and Omega, and J and theta of what it maps back without gradients.

    1e-5 at the 99 % point and at most 2e-5 of J_r + L and in radians, against the exact finder.
    """
    w = bound_stars(potential, 1000, seed=17)
    finder = SphericalActions()
    rough = finder.rough()
    assert not rough.exact
    assert not rough.tabulated(potential, w).rough().angles.exact
    with torch.no_grad():
        exact, found = (one.actions_angles(potential, w) for one in (finder, rough))
        back = finder.actions_angles(potential, rough.phase_space(potential, exact.J, exact.theta))
    errors = [
        (found.Omega / exact.Omega - 1).abs().amax(-1),
        *(angle_difference(one.theta, exact.theta).abs().amax(-1) for one in (found, back)),
        *((one.J - exact.J).abs().sum(-1) / exact.J.abs().sum(-1) for one in (found, back)),
    ]
    assert all(float(error.quantile(0.99)) < 1e-5 and float(error.max()) < 2e-5 for error in errors)
    # it is no copy of the exact one
    assert float(errors[-1].max()) > 1e-9
