r"""J_r and J_z of separated motion, by quadratures that hold for every eccentricity and inclination.

Along u the variable is zeta = ln(c + S) with c^2 = a^2 + D, along v it is sigma = asinh(y / eps): even in u and
resolving discs. With sigma = sigma_m sin(psi) the integrands vanish like a square root at both ends, and midpoints
in psi converge exponentially, with a rate that poles limit: at the axis (y = 1, a = 0), close to the turning point
where L_z is small. But the error of N midpoints from a pole is known: int dpsi / (C + sin psi) comes out smaller by
T = tanh(N arcosh C). The residues are L_z, so the error is L_z (1 - T), and is taken off. Oblate coordinates (D < 0)
end in a disc, c = 0, which orbits may go through; zeta is asinh(c / S) there, and the pole at c = +- sqrt(D) complex.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.actions.plane import safe_sqrt
from bayespot.actions.separated import Separated
from bayespot.actions.turning import TurningPoints, lower_height

#: Height, over c, inside which the vertical variable is linear: nodes fall as densely on a thin disc as above it.
EPS = 0.05
#: Extents of the motion below which the integrand is made from differences over them: J there is of second order.
LEAST_HALF, LEAST_Y = 1e-5, 1e-4
#: How near to the end of oblate coordinates, over it, a turning point counts as there.
AT_DISC = 1e-9


def midpoints(n: int, like: Tensor) -> Tensor:
    """Return the midpoints of n equal parts of [-pi/2, pi/2]."""
    return (torch.arange(n, dtype=like.dtype, device=like.device) + 0.5) * (torch.pi / n) - torch.pi / 2


def missed(n: float, C: Tensor) -> Tensor:
    """Return 1 - tanh(n arcosh C): the part of the pole at -C that n midpoints miss; C may be complex."""
    C = C if C.is_complex() else C.clamp(min=1)
    left = torch.exp(-2 * n * torch.acosh(C))
    return 2 * left / (1 + left)


def radial_action(motion: Separated, points: TurningPoints, n: int) -> Tensor:
    r"""Return :math:`J_r = \pi^{-1} \int p_u\, du` between the turning points; derivatives exact to first order.

    Motion through the disc inside the ring of oblate coordinates has no inner one: it counts from the disc.
    """
    variable = _RadialVariable.of(motion)
    D = motion.D.detach()
    c_inner, c_outer = ((x + D).clamp(min=0).sqrt() for x in (points.inner, points.outer))
    through = points.inner <= -D * (1 + AT_DISC)
    last = variable.of_c(c_outer)
    # there the integrand is even about the disc
    first = torch.where(through, -last, variable.of_c(c_inner))
    mid, half = (last + first) / 2, ((last - first) / 2).clamp(min=0)
    room = mid - variable.end
    least = LEAST_HALF * torch.where(through, 1.0, room.clamp(max=1))
    narrow = half < least
    half = torch.maximum(half, least)
    psi = midpoints(n, mid)
    many = motion.spread()
    rate, x = variable.spread().place(mid[..., None] + half[..., None] * psi.sin())
    # where Delta changes nodes keep their x, and so their distances from the pole: else the part that is missed there
    # would change, without bound as L_z vanishes. In oblate coordinates they keep their c, as the disc does, where the
    # integrand need not vanish. du = dx / (2 a c) = dc / a
    x = x - torch.where(many.D < 0, many.D - many.D.detach(), 0.0)
    c = torch.maximum(x + many.D, 1e-14 * x).sqrt()
    weight = half[..., None] * psi.cos() * rate * (c.detach() / c) / x / n
    square = many.along_u(x)
    ends = torch.zeros_like(mid)
    if bool(narrow.any()):
        with torch.no_grad():
            _, at = variable.spread().place(mid[..., None] + half[..., None] * psi.new_tensor([-1.0, 1.0]))
            ends = torch.where(narrow, many.along_u(at).mean(-1), ends)
    J = _sum(weight, square, ends)
    # poles at a = 0, or further in where there is no focal distance
    pole = torch.where(variable.ring > 0, 0.0, motion.lz / 2)
    inside = missed(n, (mid - variable.pole) / half).real
    J = J - pole * missed(n, room / half) - (safe_sqrt(motion.A) - pole) * torch.where(through, 0.0, inside)
    return torch.where(through, J / 2, J).clamp(min=0)


class _RadialVariable(NamedTuple):
    """ln(c + S), or in oblate coordinates asinh(c / S), which is odd in c."""

    focus: Tensor
    ring: Tensor
    S: Tensor

    @classmethod
    def of(cls, motion: Separated) -> _RadialVariable:
        """Return that with an S no larger than a star's orbit needs where foci do not do the same."""
        D = motion.D.detach()
        focus, ring = D.clamp(min=0).sqrt(), (-D).clamp(min=0).sqrt()
        S = torch.where(ring > 0, torch.maximum(motion.scale, ring), (motion.scale - focus).clamp(min=0))
        return cls(focus, ring, S)

    def spread(self) -> _RadialVariable:
        """Return the same with a trailing axis for nodes."""
        return _RadialVariable(*(part[..., None] for part in self))

    @property
    def end(self) -> Tensor:
        """Its value on the focal segment, a = 0, or in the disc, c = 0."""
        return torch.where(self.ring > 0, 0.0, (self.focus + self.S).log())

    @property
    def pole(self) -> Tensor:
        """Its value, complex, at c = 0, in oblate coordinates at the pole a = 0."""
        on_axis = torch.where(self.ring > 0, 0.0, self.S.clamp(min=1e-300).log())
        return torch.complex(on_axis, torch.where(self.ring > 0, (self.ring / self.S).clamp(max=1).asin(), 0.0))

    def of_c(self, c: Tensor) -> Tensor:
        """Return its value at c (kpc)."""
        oblate = self.ring > 0
        return torch.where(oblate, torch.asinh(c / torch.where(oblate, self.S, 1.0)), (c + self.S).log())

    def place(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        """Return dc/dzeta and x where it is zeta."""
        oblate = self.ring > 0
        rising, falling = zeta.exp(), torch.where(oblate, (-zeta).exp(), 0.0)
        c = torch.where(oblate, self.S * (rising - falling) / 2, rising - self.S)
        rate = torch.where(oblate, self.S * (rising + falling) / 2, rising)
        return rate, ((c - self.focus) * (c + self.focus) + self.ring**2).clamp(min=1e-300)


def vertical_action(motion: Separated, points: TurningPoints, n: int) -> Tensor:
    r"""Return :math:`J_z = (2/\pi) \int p_v\, dv` from the plane to the turning point, with n nodes."""
    flat = points.y < LEAST_Y
    top = torch.asinh(points.y.clamp(min=LEAST_Y) / EPS)
    psi = (midpoints(2 * n, top))[n:]
    many = motion.spread()

    def place(sine: Tensor) -> tuple[Tensor, Tensor]:
        y = EPS * torch.sinh(top[..., None] * sine)
        return y, ((1 - y) * (1 + y)).clamp(min=1e-30)

    y, t = place(psi.sin())
    weight = top[..., None] * psi.cos() * (y**2 + EPS**2).sqrt() / t / n
    square = many.along_v(y, t)
    ends = torch.zeros_like(top)
    if bool(flat.any()):
        with torch.no_grad():
            y, t = place(psi.new_tensor([1.0]))
            ends = torch.where(flat, many.along_v(y, t)[..., 0], ends)
    J = _sum(weight, square, ends)
    pole = torch.asinh(torch.ones_like(top) / EPS) / top
    J = (J - motion.lz * missed(2 * n, pole)).clamp(min=0)
    aside = (square.detach()[..., 0] < 0) & ~flat
    if bool(aside.any()):
        index = torch.nonzero(aside)[:, 0]
        off_plane = _off_plane(motion.taken(index), y.detach()[index, 0], points.y[index], 2 * n)
        J = J.index_put((index,), off_plane)
    return J


def _off_plane(motion: Separated, below: Tensor, upper: Tensor, n: int) -> Tensor:
    """Return J_z of motion between a lower turning point, farther out than ``below``, and the upper one."""
    lower = lower_height(motion.detached(), below)
    mid, half = (upper + lower) / 2, ((upper - lower) / 2).clamp(min=0)
    psi = midpoints(n, mid)
    y = mid[:, None] + half[:, None] * psi.sin()
    t = ((1 - y) * (1 + y)).clamp(min=1e-30)
    root = motion.spread().along_v(y, t).clamp(min=1e-300).sqrt()
    J = (2 / n) * (half[:, None] * psi.cos() / t * root).sum(-1)
    pole = (1 - mid) / half.clamp(min=1e-300)
    return (J - motion.lz * missed(n, pole)).clamp(min=0)


def _sum(weight: Tensor, square: Tensor, ends: Tensor) -> Tensor:
    """Return the sum of weight sqrt(square); where the interval was widened ``square`` is ``ends`` at its ends.

    There the root is that of square - ends, and the sum's value for the true one follows to first order.
    """
    # between turning points the square is positive; rounding must not give NaN
    root = (square - ends[..., None]).clamp(min=1e-300).sqrt()
    J = (weight * root).sum(-1)
    narrow = ends != 0
    correction = torch.where(narrow, ends * (weight / (2 * root)).sum(-1), 0.0).detach()
    return torch.where(narrow, (J + correction).clamp(min=0), J) if bool(narrow.any()) else J
