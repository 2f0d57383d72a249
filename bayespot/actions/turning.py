"""Turning points of a star's separated motion, by Newton's method kept inside a bracket that the star itself gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.actions.separated import Separated
from bayespot.potential.profile import RadialProfile

_MOST_ITERATIONS = 60
#: Halvings of the bracket of the peak of p_u^2.
_PEAK_STEPS = 16
#: Least x = a^2 at a turning point over the square of the orbit's size, and least t.
_LEAST = 1e-20


class TurningPoints(NamedTuple):
    """x = a^2 of the inner and outer turning points, and y of the upper one with t = 1 - y^2; without gradients."""

    inner: Tensor
    outer: Tensor
    y: Tensor
    t: Tensor


class Guide(NamedTuple):
    """Orbits of the stars' energies in the plane: ln radius and ln L_z of circular ones, ln of the largest radius."""

    s_c: Tensor
    ln_lc: Tensor
    s_largest: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, profile: RadialProfile, energy: Tensor) -> Guide:
        """Return those of the potential whose circular orbits in the plane are ``profile``."""
        s_c, ln_lc = profile.circular(energy)
        return cls(s_c, ln_lc, torch.maximum(profile.s_of_phi(energy), s_c))


@torch.no_grad()
def turning_points(motion: Separated, guide: Guide, tolerance: float) -> TurningPoints:
    """Return the turning points; ``guide`` says where to begin, ``tolerance`` is that of ln x and y."""
    here = torch.maximum(motion.x0, _least(motion, guide)).log()
    return _between(motion, guide, here, motion.y0.abs(), tolerance)


@torch.no_grad()
def torus_points(motion: Separated, guide: Guide, tolerance: float) -> TurningPoints:
    """Return the turning points of motion that no star is known of; both at the peak of p_u^2 if that is negative."""
    radius2 = (2 * guide.s_c).exp()
    x = (radius2 - motion.D).clamp(min=0.05 * radius2).log()
    low, high = (
        torch.maximum(x - 4, _least(motion, guide).log()),
        torch.minimum(2 * guide.s_largest, 2 * guide.s_c + 3) + 0.1,
    )
    # p_u^2 rises inside its peak and falls outside
    for _ in range(_PEAK_STEPS):
        _, slope, _ = _outer(motion, x)
        inside = slope < 0
        low, high = torch.where(inside, x, low), torch.where(inside, high, x)
        x = (low + high) / 2
    f, _, _ = _outer(motion, x)
    points = _between(motion, guide, x, torch.zeros_like(x), tolerance)
    none = f > 0
    peak = x.exp()
    f, _, _ = _vertical(motion, torch.zeros_like(x))
    y = torch.where(f > 0, 0.0, points.y)
    return TurningPoints(
        torch.where(none, peak, points.inner),
        torch.where(none, peak, points.outer),
        y,
        torch.where(f > 0, 1.0, points.t),
    )


def _between(motion: Separated, guide: Guide, here: Tensor, low: Tensor, tolerance: float) -> TurningPoints:
    """Return the turning points on both sides of a place inside: ln x and abs(y)."""
    least = _least(motion, guide)
    nearer, farther = _first_guess(motion, guide, here, least)
    lowest, infinite = least.log(), torch.full_like(here, torch.inf)
    inner = _root(_inner, motion, nearer, lowest, here, tolerance, False).exp()
    outer = _root(_outer, motion, farther, here, infinite, tolerance, True).exp()
    y = _root(_vertical, motion, _first_height(motion, low), low, torch.ones_like(low), tolerance, None)
    # t = L_z^2 / g keeps its digits where an orbit comes close to the axis
    t = (1 - y) * (1 + y)
    g = motion.A + _rise(motion, t, motion.phi_along_v(y, t))
    near_axis = (t < 0.01) & (g > 0)
    t = torch.where(near_axis, motion.lz**2 / torch.where(near_axis, g, 1.0), t)
    return TurningPoints(inner, outer, y, t.clamp(_LEAST, 1))


def _least(motion: Separated, guide: Guide) -> Tensor:
    """Return the least x: zero but for rounding, or where oblate coordinates end, in the disc inside their ring."""
    return torch.maximum(_LEAST * (2 * guide.s_c).exp(), -motion.D)


@torch.no_grad()
def lower_height(motion: Separated, y: Tensor) -> Tensor:
    """Return y of the lower turning point of orbits that keep to one side of the plane.

    ``y`` is that of a place below it, where p_v^2 is negative; at the stars it is not.
    """
    low, high = y, motion.y0.abs()
    for _ in range(_MOST_ITERATIONS):
        y = (low + high) / 2
        f, _, _ = _vertical(motion, y)
        low, high = torch.where(f > 0, y, low), torch.where(f > 0, high, y)
    return high


#: Value and slope of a function that rises through its root, and where to go if Newton's step is of no use (NaN: the
#: middle of the bracket).
Function = Callable[[Separated, Tensor], tuple[Tensor, Tensor, Tensor]]


def _root(
    function: Function, motion: Separated, x: Tensor, low: Tensor, high: Tensor, tolerance: float, outwards: bool | None
) -> Tensor:
    """Return the roots of a rising function of stars, each between ``low`` and ``high``; those found are set aside.

    Where the function falls the point lies on the other side of its extreme, and the root farther ``outwards``
    or inwards; None: it is negative at ``low`` and may rise and fall, and the root is where it changes sign.
    """
    found, index = x.clone(), None
    for _ in range(_MOST_ITERATIONS):
        f, slope, other = function(motion, x)
        rises = slope > 0
        below = f < 0 if outwards is None else torch.where(rises, f < 0, outwards)
        low, high = torch.where(below, x, low), torch.where(below, high, x)
        new = torch.minimum(x - f / slope, x + 1.0)
        other = torch.where((other >= low) & (other <= high), other, (low + high) / 2)
        new = torch.where(rises & (new >= low) & (new <= high), new, other)
        # a NaN counts as found
        left = (new - x).abs() > tolerance
        x = new
        n_left = int(left.sum())
        if n_left > 0.7 * len(x):
            continue
        found = x if index is None else found.index_put((index,), x)
        if n_left == 0:
            break
        kept = torch.nonzero(left)[:, 0]
        index = kept if index is None else index[kept]
        x, low, high, motion = x[kept], low[kept], high[kept], motion.taken(kept)
    else:
        found = x if index is None else found.index_put((index,), x)
    return found


def _along_u(motion: Separated, ln_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, K = 2 (E - Phi) and 2 dPhi / d ln x."""
    x = ln_x.exp()
    c2 = torch.maximum(x + motion.D, 1e-14 * x)
    phi, by_R, by_z = motion.field.slopes((x * motion.t0).sqrt(), c2.sqrt() * motion.y0)
    return x, 2 * (motion.energy - phi), by_R + by_z * x / c2


def _inner(motion: Separated, ln_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ln x - ln X(K): for constant K p_u = 0 is a quadratic equation for x, whose largest root is X."""
    _, K, rise = _along_u(motion, ln_x)
    X, root = _quadratic(motion, K)
    floor = torch.maximum(_LEAST * motion.scale**2, -motion.D)
    ln_X = torch.maximum(X, floor).log()
    slope = torch.where(floor < X, 1 - (X + motion.D * motion.t0) / root * rise, 1.0)
    return ln_x - ln_X, slope, ln_X


def _quadratic(motion: Separated, K: Tensor) -> tuple[Tensor, Tensor]:
    K = K.clamp(min=1e-300)
    D = motion.D
    barrier = motion.lz**2 * D
    q = K * D * motion.t0 - motion.A
    # without a root in oblate coordinates the motion goes through the disc inside the ring
    root = (q**2 + 4 * K * barrier).clamp(min=0).sqrt().clamp(min=1e-300)
    return torch.where(q < 0, (root - q) / (2 * K), 2 * barrier / (q + root).clamp(min=1e-300)), root


def _outer(motion: Separated, ln_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return -p_u^2, which is convex in ln x."""
    x, K, rise = _along_u(motion, ln_x)
    wall = motion.lz**2 * motion.D / x
    reach = x + motion.D * motion.t0
    return motion.A + wall - K * reach, rise * reach - K * x - wall, ln_x + 1.0


def _vertical(motion: Separated, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return -t p_v^2; its slope is that by y."""
    y = y.clamp(min=1e-8)
    f, slope = _by_square(motion, y)
    return f, 2 * y * slope, torch.full_like(y, torch.nan)


def _by_square(motion: Separated, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return -t p_v^2 and its slope by y^2, which is finite in the plane."""
    D = motion.D
    t = ((1 - y) * (1 + y)).clamp(min=1e-16)
    phi, by_R, by_z = motion.field.slopes((motion.x0 * t).sqrt(), (motion.x0 + D).clamp(min=0).sqrt() * y)
    rise = _rise(motion, t, phi)
    falls = 2 * D * (motion.energy - phi) + (motion.x0 + D * t) * (by_z / y**2 - by_R / t)
    return motion.A * y**2 - motion.lift - rise * t, motion.A + rise + falls * t


def _rise(motion: Separated, t: Tensor, phi: Tensor) -> Tensor:
    D = motion.D
    return 2 * ((motion.x0 + D * t) * (motion.energy - phi) - (motion.x0 + D * motion.t0) * motion.kinetic)


def _first_guess(motion: Separated, guide: Guide, here: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    radius2 = (2 * guide.s_c).exp()
    circular = (radius2 - motion.D).clamp(min=0.05 * radius2).log()
    inside = torch.minimum(circular, here)
    X, _ = _quadratic(motion, _along_u(motion, inside)[1])
    nearer = torch.minimum(torch.maximum(X, least).log(), here)
    eccentricity = (1 - (motion.A / (2 * guide.ln_lc).exp()).clamp(max=1)).sqrt()
    return nearer, torch.maximum(circular + 2 * (guide.s_largest - guide.s_c) * eccentricity, here)


def _first_height(motion: Separated, low: Tensor) -> Tensor:
    """One step of Newton's method in y^2, in which the equation of a sphere is linear."""
    y = low.clamp(0.01, 0.999)
    f, slope = _by_square(motion, y)
    y2 = y**2 - f / slope
    y = torch.where((slope > 0) & (y2 > 0), y2.clamp(min=1e-16), 0.25).sqrt()
    return torch.minimum(torch.maximum(y, low), torch.ones_like(y))
