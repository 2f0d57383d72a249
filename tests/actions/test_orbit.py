"""Symplectic integrators: order, energy, reversibility, derivatives."""

from __future__ import annotations

import itertools
import math
import weakref

import numpy as np
import pytest
import torch

from bayespot.actions import integrate
from bayespot.actions.orbit import dense, integrate_transformed
from bayespot.potential import NFW, Isochrone, MassSlopeNetwork
from bayespot.pyro_modules import freeze
from bayespot.units import G

ORDERS = {"leapfrog": 2, "yoshida4": 4, "yoshida6": 6}
STARS = torch.tensor([[1.0, 0.0, 0.3, 0.1, 0.5, 0.1], [0.5, -1.0, 0.2, 0.3, 0.1, -0.4]], dtype=torch.float64)


@pytest.fixture
def potential() -> Isochrone:
    """In units G M = b = 1; the orbits' radial periods are then about 15."""
    return Isochrone(m_tot=1 / G, r_s=1.0)


def energy(potential, w):
    return 0.5 * (w[..., 3:] ** 2).sum(-1) + potential.phi(w[..., :3])


@pytest.mark.parametrize("method", ORDERS)
def test_order(potential, method):
    """Slope of log error on log step over five steps, against a much finer orbit: order +- 0.15."""
    n_steps = {"leapfrog": 100, "yoshida4": 60, "yoshida6": 24}[method]
    counts = np.round(n_steps * 2 ** (np.arange(5) / 2)).astype(int)
    with torch.no_grad():
        exact = integrate(potential, STARS, (15.0, 1200), "yoshida6")[-1]
        errors = [float((integrate(potential, STARS, (15.0, int(n)), method)[-1] - exact).norm()) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(ORDERS[method], abs=0.15)


@pytest.mark.parametrize("method", ORDERS)
def test_energy_does_not_drift(potential, method):
    """Over 40 periods the energy error oscillates: its mean in the last quarter is at most 1.5 times, and its
    largest value there at most 2 times, that of the first quarter (a drift would give 7 times)."""
    with torch.no_grad():
        orbit = integrate(potential, STARS, (600.0, 1600), method)
        error = (energy(potential, orbit) - energy(potential, STARS)).abs()
    first, last = error[1:401], error[1200:]
    assert (last.mean(0) < 1.5 * first.mean(0)).all()
    assert (last.amax(0) < 2 * first.amax(0)).all()


@pytest.mark.parametrize("method", ORDERS)
def test_reversible(potential, method):
    """Forward and back, by negated times and by negated velocities, returns to the start to 1e-12."""
    times = torch.linspace(0.0, 10.0, 41, dtype=torch.float64)
    turn = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    with torch.no_grad():
        end = integrate(potential, STARS, times, method)[-1]
        back = integrate(potential, end, times.flip(0), method)[-1]
        mirrored = integrate(potential, end * turn, times, method)[-1] * turn
    assert (back - STARS).abs().max() < 1e-12
    assert (mirrored - STARS).abs().max() < 1e-12


@pytest.mark.parametrize("method", ORDERS)
def test_symplectic(potential, method):
    """The Jacobian of 20 coarse steps, by autograd, preserves the symplectic form to 1e-12."""
    jacobian = torch.autograd.functional.jacobian(lambda w: integrate(potential, w, (10.0, 20), method)[-1], STARS[0])
    eye, zero = torch.eye(3), torch.zeros(3, 3)
    form = torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)]).double()
    assert (jacobian @ form @ jacobian.T - form).abs().max() < 1e-12


def test_angular_momentum(potential):
    """A sphere's angular momentum is conserved to rounding, 1e-13, whatever the step."""
    with torch.no_grad():
        orbit = integrate(potential, STARS, (30.0, 60))
    L = torch.linalg.cross(orbit[..., :3], orbit[..., 3:])
    assert (L - L[0]).abs().max() < 1e-13


def test_outputs(potential):
    """The first output is w; substeps and any batch shape give the same orbit; uneven times are hit."""
    with torch.no_grad():
        fine = integrate(potential, STARS, (4.0, 40), "yoshida4")
        coarse = integrate(potential, STARS, (4.0, 4), "yoshida4", n_substeps=10)
        single = integrate(potential, STARS[1], (4.0, 40), "yoshida4")
        times = torch.tensor([1.0, 1.1, 1.4], dtype=torch.float64)
        uneven = integrate(potential, STARS, times, "yoshida6", n_substeps=5)
        there = integrate(potential, STARS, (0.4, 20), "yoshida6")[-1]
    assert fine.shape == (41, 2, 6)
    assert torch.equal(fine[0], STARS)
    torch.testing.assert_close(coarse, fine[::10], rtol=0, atol=1e-12)
    torch.testing.assert_close(single, fine[:, 1], rtol=0, atol=1e-12)
    torch.testing.assert_close(uneven[-1], there, rtol=0, atol=1e-8)


def test_gradients():
    """d(end)/d(m_tot, w, t_end) against central differences: 1e-7."""
    mass = torch.ones((), dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64, requires_grad=True)

    def end(mass, w, times):
        trial = Isochrone(m_tot=mass / G, r_s=1.0)
        return integrate(trial, w, times, "yoshida4", n_substeps=5, adjoint=False)[-1]

    assert torch.autograd.gradcheck(end, (mass, STARS.clone().requires_grad_(), times), atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), (1.0, 2)), r"\(3,\)"),
        ((STARS, (1.0, 0)), "n_steps must be at least 1; got 0"),
        ((STARS, torch.zeros(2, 2)), r"\(2, 2\)"),
        ((STARS, (1.0, 2), "euler"), "'euler'"),
        ((STARS, (1.0, 2), "leapfrog", 0), "n_substeps must be at least 1; got 0"),
    ],
)
def test_refusals(potential, arguments, message):
    """Wrong shapes, counts and names raise ValueError with the value received."""
    with pytest.raises(ValueError, match=message):
        integrate(potential, *arguments)


def _gradients(potential_of, names, w, adjoint):
    """Gradient of a scalar of the orbit with respect to w and the parameters."""
    leaves = {k: v.clone().requires_grad_() for k, v in names.items()}
    start = w.clone().requires_grad_()
    orbit = integrate(potential_of(leaves), start, (0.6, 6), "yoshida4", n_substeps=7, adjoint=adjoint)
    value = (orbit[..., :3].pow(2).sum(-1).sqrt() + 0.01 * orbit[..., 3]).sum() + orbit[3].sum()
    return torch.autograd.grad(value, [start, *leaves.values()])


def _potentials():
    def d(*values):
        return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)

    network = MassSlopeNetwork(1.0, -2.0, 4.0, 25.0, n_features=4)
    total = Isochrone(m_tot=1e11, r_s=3.0) + NFW(m_s=8e11, r_s=20.0)
    names = [name for name, _ in total.named_buffers()]
    return {
        "isochrone": (
            lambda p: freeze(Isochrone(m_tot=1e11, r_s=3.0), {"m_tot": p["ln_m"].exp(), "r_s": p["r_s"]}),
            {"ln_m": d(25.3), "r_s": d(3.0)},
        ),
        "network": (
            lambda p: freeze(network, {"ln_mass": p["ln_mass"], "slope_weights": p["weights"]}),
            {"ln_mass": d(24.5), "weights": d(0.3, -0.2, 0.5, -0.4, 0.1)},
        ),
        "sum": (
            lambda p: freeze(total, {n: p[n.replace(".", "_")] for n in names}),
            {n.replace(".", "_"): b.clone() for n, b in total.named_buffers()},
        ),
    }


@pytest.mark.parametrize("name", ["isochrone", "network", "sum"])
def test_adjoint_gradient(name):
    """The reversed-time gradient, in w and all parameters, equals the plain one to 1e-8 (yoshida4, 42 steps)."""
    w = torch.tensor([[8.0, 0.0, 1.0, 20.0, 150.0, 30.0], [2.0, 1.0, 0.5, -40.0, 60.0, 90.0]], dtype=torch.float64)
    potential_of, names = _potentials()[name]
    ours, plain = (_gradients(potential_of, names, w, adjoint) for adjoint in (True, False))
    for a, b in zip(ours, plain, strict=True):
        assert float((a - b).abs().max()) < 1e-8 * float(b.abs().max())


def test_adjoint_gradient_against_differences():
    """Both parameters of the isochrone by central differences of the orbit itself, 1e-6 relative."""
    w = torch.tensor([[8.0, 0.0, 1.0, 20.0, 150.0, 30.0]], dtype=torch.float64)
    potential_of, names = _potentials()["isochrone"]
    slopes = _gradients(potential_of, names, w, True)[1:]

    @torch.no_grad()
    def value(shifted):
        orbit = integrate(potential_of(shifted), w, (0.6, 6), "yoshida4", n_substeps=7)
        return float((orbit[..., :3].pow(2).sum(-1).sqrt() + 0.01 * orbit[..., 3]).sum() + orbit[3].sum())

    for slope, (name, x) in zip(slopes, names.items(), strict=True):
        h = 1e-5
        expected = (value({**names, name: x + h}) - value({**names, name: x - h})) / (2 * h)
        assert abs(float(slope) - expected) < 1e-6 * abs(expected)


def test_adjoint_memory_does_not_grow_with_steps():
    """Tensors kept for the backward pass: the same for 4 and 64 steps per output; without the adjoint, 16 times."""
    w = torch.tensor([[8.0, 0.0, 1.0, 20.0, 150.0, 30.0]], dtype=torch.float64, requires_grad=True)
    potential = _potentials()["isochrone"][0](_potentials()["isochrone"][1])

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor

    def kept(n_substeps, adjoint):
        boxes = weakref.WeakSet()

        def pack(tensor):
            box = Box(tensor)
            boxes.add(box)
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            orbit = integrate(potential, w, (0.6, 6), "leapfrog", n_substeps, adjoint)
        assert orbit.requires_grad
        return sum(box.tensor.numel() for box in boxes)

    assert kept(4, True) == kept(64, True)
    assert kept(64, False) > 10 * kept(4, False)


def test_adjoint_refuses_times():
    """A derivative with respect to times needs adjoint=False, and has it then: dw/dt is the velocity at the end."""
    w = torch.tensor([8.0, 0.0, 1.0, 20.0, 150.0, 30.0], dtype=torch.float64, requires_grad=True)
    potential = _potentials()["isochrone"][0](_potentials()["isochrone"][1])
    times = torch.linspace(0, 0.1, 41, dtype=torch.float64).requires_grad_()
    with pytest.raises(ValueError, match="adjoint=False"):
        integrate(potential, w, times)
    orbit = integrate(potential, w, times, "yoshida6", adjoint=False)
    (slope,) = torch.autograd.grad(orbit[-1, 0], times)
    assert abs(float(slope[-1]) - float(orbit[-1, 3].detach())) < 1e-4 * abs(float(orbit[-1, 3].detach()))


def test_dense_output_order():
    """Error between outputs against a fine integration falls with h to the power 6 in x and 5 in v (within 0.5)."""
    potential = _potentials()["isochrone"][0](_potentials()["isochrone"][1])
    w = torch.tensor([[8.0, 0.0, 1.0, 20.0, 150.0, 30.0], [4.0, 1.0, 0.5, -40.0, 120.0, 60.0]], dtype=torch.float64)
    at = torch.linspace(0.003, 0.397, 37, dtype=torch.float64)
    fine = torch.linspace(0, 0.4, 1601, dtype=torch.float64)
    orbit = integrate(potential, w, fine, "yoshida6")
    exact, errors = dense(potential, fine, orbit, at).detach(), []
    for n in (40, 80, 160):
        step = 1600 // n
        found = dense(potential, fine[::step], orbit[::step], at).detach()
        difference = (found - exact).abs().amax((0, 1))
        errors.append((float(difference[:3].max()), float(difference[3:].max())))
    slopes = [[math.log2(a / b) for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(errors)]
    for in_x, in_v in slopes:
        assert abs(in_x - 6) < 0.5
        assert abs(in_v - 5) < 0.5


def test_dense_output_refuses_times_outside():
    """The message names the time and the range; a decreasing orbit is as good as an increasing one."""
    potential = _potentials()["isochrone"][0](_potentials()["isochrone"][1])
    w = torch.tensor([8.0, 0.0, 1.0, 20.0, 150.0, 30.0], dtype=torch.float64)
    times = torch.linspace(0, -0.2, 21, dtype=torch.float64)
    orbit = integrate(potential, w, times, "yoshida6")
    assert torch.allclose(dense(potential, times, orbit, times[3:5]), orbit[3:5], atol=1e-9)
    with pytest.raises(ValueError, match=r"time 0\.1 is outside"):
        dense(potential, times, orbit, torch.tensor([0.1]))


def test_transformed_steps_on_plunging_orbits():
    """NFW, pericentre 1/160 of apocentre: 32 steps per period keep the energy to 1e-4 over 20 periods, where equal
    steps lose it; negative steps return to the start to 1e-9; times increase, dt/ds is their slope to 1 %."""
    halo = NFW(m_s=8e11, r_s=20.0)
    w = torch.tensor([[30.0, 0.0, 0.0, 0.0, 1.0, 2.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    ds, n = 0.55 / 32 * one, 640
    run = integrate_transformed(halo, w, 15 * one, 0.01 * one, ds, n)
    back = integrate_transformed(halo, run.w[-1], 15 * one, 0.01 * one, -ds, n)
    r = run.w[..., :3].norm(dim=-1)
    assert float(r.max() / r.min()) > 160
    with torch.no_grad():
        kinetic = (run.w[..., 3:] ** 2).sum(-1).max() / 2
        drift = float((energy(halo, run.w) - energy(halo, w)).abs().max() / kinetic)
        equal = integrate(halo, w, torch.linspace(0, float(run.times[-1]), n + 1, dtype=torch.float64), "yoshida6")
        lost = float((energy(halo, equal) - energy(halo, w)).abs().max() / kinetic)
    assert drift < 1e-4
    assert lost > 0.05
    assert float((back.w[-1] - w).abs().max()) < 1e-9 * 300
    steps = run.times.diff(dim=0)
    assert bool((steps > 0).all())
    middle = (run.rate[1:] + run.rate[:-1]) / 2
    assert float((steps.sum() / (middle * ds).sum() - 1).abs()) < 0.01
