"""What every action finder and torus map must satisfy; called by the tests of each of them.

Each check takes the object under test and stars generic enough that every angle exists (no exactly circular,
radial or planar orbits), and names the worst star when it fails. Errors are relative to the star's own
scales: |x|, |v|, the sum of abs(J), the modulus of Omega; angles are compared modulo 2 pi.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from bayespot.actions import ActionAngles, ActionFinder, TorusMap, integrate
from bayespot.potential import Potential


class FinderAndMap(Protocol):
    """Both interfaces at once."""

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles: ...

    def phase_space(self, potential: Potential, J: Tensor, theta: Tensor) -> Tensor: ...


def bound_stars(potential: Potential, n: int, seed: int, r_range: tuple[float, float] = (0.1, 30.0)) -> Tensor:
    """Return ``w (n, 6)``: log-uniform radii (kpc), isotropic directions, 5 to 95 % of the escape speed.

    Escape is to 1e6 kpc, so that potentials of infinite depth serve as well.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    directions = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    x_hat, v_hat = torch.nn.functional.normalize(directions, dim=-1)
    r = r_range[0] * (r_range[1] / r_range[0]) ** draw[:, :1]
    with torch.no_grad():
        depth = potential.phi_r(torch.tensor(1e6, dtype=torch.float64)) - potential.phi(r * x_hat)
    speed = (2 * depth).sqrt()[:, None] * (0.05 + 0.9 * draw[:, 1:])
    return torch.cat([r * x_hat, speed * v_hat], -1)


def angle_difference(a: Tensor, b: Tensor) -> Tensor:
    """Return a - b in [-pi, pi)."""
    return torch.remainder(a - b + math.pi, 2 * math.pi) - math.pi


def check_round_trip(subject: FinderAndMap, potential: Potential, w: Tensor, rtol: float) -> None:
    """w -> (J, theta) -> w: |dx| / |x| and |dv| / |v| at most ``rtol`` for every star."""
    with torch.no_grad():
        J, theta, _ = subject.actions_angles(potential, w)
        difference = subject.phase_space(potential, J, theta) - w
    for part, name in ((slice(0, 3), "x"), (slice(3, 6), "v")):
        error = difference[:, part].norm(dim=-1) / w[:, part].norm(dim=-1)
        _below(error, rtol, f"round trip of {name}", w)


class _PeriodAsUnit(Potential):
    """A potential for stars that each count time in a period of their own: velocities are times ``period (n,)``."""

    def __init__(self, potential: Potential, period: Tensor) -> None:
        super().__init__()
        self.potential, self.period = potential, period

    def phi(self, x: Tensor) -> Tensor:
        return self.period**2 * self.potential.phi(x)


def check_invariance_along_orbit(
    finder: ActionFinder,
    potential: Potential,
    w: Tensor,
    rtol_J: float,
    atol_theta: float,
    n_periods: float = 3.0,
    steps_per_period: int = 400,
) -> None:
    """Along orbits integrated at order 6, J and Omega stay, and theta = theta_0 + Omega t.

    Each star runs for ``n_periods`` of its own radial periods; eight instants are compared. The drift of J
    and Omega must stay below ``rtol_J``, angles within ``atol_theta`` radians.
    """
    with torch.no_grad():
        start = finder.actions_angles(potential, w)
        period = 2 * math.pi / start.Omega[:, 0]
        turns = torch.linspace(0, n_periods, 8, dtype=w.dtype)
        n_substeps = math.ceil(n_periods * steps_per_period / 7)
        unit = torch.stack([torch.ones_like(period), period], -1).repeat_interleave(3, -1)
        orbit = integrate(_PeriodAsUnit(potential, period), w * unit, turns, "yoshida6", n_substeps) / unit
        J, theta, Omega = finder.actions_angles(potential, orbit)
        drift_J = (J - start.J).abs().amax(-1) / start.J.abs().sum(-1)
        drift_Omega = (Omega - start.Omega).norm(dim=-1) / start.Omega.norm(dim=-1)
        expected = start.theta + turns[:, None, None] * period[:, None] * start.Omega
        error = angle_difference(theta, expected).abs().amax(-1)
        for i in range(len(w)):
            _below(drift_J[:, i], rtol_J, f"J along the orbit of star {i}", orbit[:, i])
            _below(drift_Omega[:, i], rtol_J, f"Omega along the orbit of star {i}", orbit[:, i])
            _below(error[:, i], atol_theta, f"theta - Omega t along the orbit of star {i}", orbit[:, i])


def check_symplectic(finder: ActionFinder, potential: Potential, w: Tensor, atol: float) -> None:
    """The Poisson brackets of (theta, J) are canonical: M S M^T = S for M = d(theta, J)/d(x, v), by autograd.

    In units |x| = |v| = 1 of each star, every element within ``atol``.
    """
    w = w.detach().requires_grad_()
    J, theta, _ = finder.actions_angles(potential, w)
    columns = [*theta.unbind(-1), *J.unbind(-1)]
    rows = [torch.autograd.grad(column.sum(), w, retain_graph=True)[0] for column in columns]
    jacobian = torch.stack(rows, -2)
    scale_x, scale_v = (part.norm(dim=-1).detach() for part in (w[:, :3], w[:, 3:]))
    unit = torch.cat([scale_x[:, None].expand(-1, 3), scale_v[:, None].expand(-1, 3)], -1)
    jacobian = jacobian * unit[:, None, :]
    jacobian = torch.cat([jacobian[:, :3], jacobian[:, 3:] / (scale_x * scale_v)[:, None, None]], 1)
    eye, zero = torch.eye(3, dtype=w.dtype), torch.zeros(3, 3, dtype=w.dtype)
    form = torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)])
    brackets = jacobian @ form @ jacobian.mT
    _below((brackets - form).abs().amax((-1, -2)), atol, "Poisson brackets of (theta, J)", w)


def check_gradients(
    subject: ActionFinder | FinderAndMap,
    make_potential: Callable[[Tensor], Potential],
    values: Tensor,
    w: Tensor,
    rtol: float,
    step: float = 1e-4,
) -> None:
    """Autograd against five-point differences, for the finder and, where there is one, the torus map.

    ``make_potential(values)`` builds the potential from a 1-D tensor of parameters (none zero). Derivatives
    of (J, theta, Omega) along a random direction in w and along each parameter, then those of w along a
    random direction in (J, theta) and along each parameter; all in relative units, each within ``rtol``
    times (1 + the largest derivative of that star).
    """
    generator = torch.Generator().manual_seed(0)
    scale_w = torch.cat([part.norm(dim=-1, keepdim=True).expand(-1, 3) for part in (w[:, :3], w[:, 3:])], -1)
    with torch.no_grad():
        J, theta, Omega = subject.actions_angles(make_potential(values), w)
    scale_J = J.abs().sum(-1, keepdim=True)
    scale_Omega = Omega.norm(dim=-1, keepdim=True)

    def finder(values: Tensor, w: Tensor) -> Tensor:
        J, theta, Omega = subject.actions_angles(make_potential(values), w)
        return torch.cat([theta, J / scale_J, Omega / scale_Omega], -1)

    direction = scale_w * torch.randn(w.shape, generator=generator, dtype=w.dtype)
    _compare_derivatives(finder, values, w, direction, 3, rtol, step, "finder")
    if isinstance(subject, ActionFinder) and not isinstance(subject, TorusMap):
        return

    def torus(values: Tensor, point: Tensor) -> Tensor:
        return subject.phase_space(make_potential(values), point[:, :3], point[:, 3:]) / scale_w

    # relative in the actions themselves, so that no step makes one negative
    direction = torch.cat([J, torch.ones_like(J)], -1) * (torch.rand(w.shape, generator=generator, dtype=w.dtype) + 0.5)
    _compare_derivatives(torus, values, torch.cat([J, theta], -1), direction, 0, rtol, step, "torus map")


def _compare_derivatives(
    function: Callable[[Tensor, Tensor], Tensor],
    values: Tensor,
    points: Tensor,
    direction: Tensor,
    n_angles: int,
    rtol: float,
    step: float,
    name: str,
) -> None:
    """Compare derivatives along ``direction`` and in ln(values); the first outputs may be angles."""
    values, points = values.detach().requires_grad_(), points.detach().requires_grad_()
    output = function(values, points)
    analytic = []
    for i in range(len(output)):
        for column in output[i]:
            in_values, in_points = torch.autograd.grad(column, (values, points), retain_graph=True)
            along = (in_points[i] * direction[i]).sum()
            analytic.append(torch.cat([along[None], in_values * values.detach()]))
    found = torch.stack(analytic).reshape(*output.shape, -1)

    def difference(shift: Callable[[float], Tensor]) -> Tensor:
        change = [shift(h) - shift(-h) for h in (step, 2 * step)]
        for part in change:
            part[:, :n_angles] = angle_difference(part[:, :n_angles], torch.zeros(()))
        return (8 * change[0] - change[1]) / (12 * step)

    with torch.no_grad():
        expected = [difference(lambda h: function(values, points + h * direction))]
        for j in range(len(values)):
            factor = torch.zeros_like(values)
            factor[j] = 1.0
            expected.append(difference(lambda h, f=factor: function(values * (1 + h * f), points)))
    reference = torch.stack(expected, -1)
    error = (found - reference).abs() / (1 + reference.abs().amax((1, 2), keepdim=True))
    _below(error.amax((1, 2)), rtol, f"derivatives of the {name}", points)


def _below(error: Tensor, tolerance: float, name: str, stars: Tensor) -> None:
    worst = int(error.nan_to_num(torch.inf).argmax())
    assert bool((error <= tolerance).all()), (
        f"{name}: error {float(error[worst]):.3g} > {tolerance:.3g} at {stars[worst].tolist()}"
    )
