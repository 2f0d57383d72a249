r"""J_r and J_z of separated motion, by quadratures that hold for every eccentricity and inclination.

Along u the variable is zeta = ln(c + S) with c^2 = a^2 + Delta^2, along v it is sigma = asinh(y / eps): even in u and
resolving discs. With sigma = sigma_m sin(psi) the integrands vanish like a square root at both ends, and midpoints
in psi converge exponentially, with a rate that poles limit: at the axis (y = 1, a = 0), close to the turning point
where L_z is small. But the error of N midpoints from a pole is known: int dpsi / (C + sin psi) comes out smaller by
T = tanh(N arcosh C). The residues are L_z, so the error is L_z (1 - T), and is taken off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayespot.actions.plane import safe_sqrt
from bayespot.actions.separated import Separated
from bayespot.actions.turning import TurningPoints, lower_height

#: Height, over c, inside which the vertical variable is linear: nodes fall as densely on a thin disc as above it.
EPS = 0.05
#: Extents of the motion below which the integrand is made from differences over them: J there is of second order.
LEAST_HALF, LEAST_Y = 1e-5, 1e-4


def midpoints(n: int, like: Tensor) -> Tensor:
    """Return the midpoints of n equal parts of [-pi/2, pi/2]."""
    return (torch.arange(n, dtype=like.dtype, device=like.device) + 0.5) * (torch.pi / n) - torch.pi / 2


def softening(motion: Separated) -> Tensor:
    """Return S (kpc): no more than a star's orbit needs where Delta does not do the same."""
    return (motion.scale - motion.delta.detach()).clamp(min=0)


def missed(n: float, C: Tensor) -> Tensor:
    """Return 1 - tanh(n arcosh C): the part of the pole at -C that n midpoints miss."""
    return 2 / (1 + torch.exp(2 * n * torch.acosh(C.clamp(min=1))))


def radial_action(motion: Separated, points: TurningPoints, n: int) -> Tensor:
    r"""Return :math:`J_r = \pi^{-1} \int p_u\, du` between the turning points; derivatives exact to first order."""
    D = motion.delta.detach() ** 2
    S = softening(motion)
    c_inner, c_outer = (points.inner + D).sqrt(), (points.outer + D).sqrt()
    first, last = (c_inner + S).log(), (c_outer + S).log()
    mid, half = (last + first) / 2, ((last - first) / 2).clamp(min=0)
    # the focal segment, a = 0, is where the variable ends
    room = mid - (motion.delta.detach() + S).log()
    least = LEAST_HALF * room.clamp(max=1)
    narrow = half < least
    half = torch.maximum(half, least)
    psi = midpoints(n, mid)
    many = motion.spread()

    fixed = many.delta.detach()

    def place(sine: Tensor) -> tuple[Tensor, Tensor]:
        e = (mid[..., None] + half[..., None] * sine).exp()
        c = e - S[..., None]
        return e, ((c - fixed) * (c + fixed)).clamp(min=1e-300)

    e, x = place(psi.sin())
    # where Delta changes nodes keep their x, and so their distances from the pole: else the part that is missed there
    # would change, without bound as L_z vanishes. du = dx / (2 a c)
    c = (x + many.delta**2).sqrt()
    weight = half[..., None] * psi.cos() * e * (c.detach() / c) / x / n
    square = many.along_u(x)
    ends = torch.zeros_like(mid)
    if bool(narrow.any()):
        with torch.no_grad():
            _, at = place(psi.new_tensor([-1.0, 1.0]))
            ends = torch.where(narrow, many.along_u(at).mean(-1), ends)
    J = _sum(weight, square, ends)
    # poles at a = 0, or further in where there is no focal distance
    at_axis = room / half
    inside = (mid - S.clamp(min=1e-300).log()) / half
    pole = motion.lz / 2
    J = J - pole * missed(n, at_axis) - (safe_sqrt(motion.A) - pole) * missed(n, inside)
    return J.clamp(min=0)


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
        off_plane = _off_plane(motion.taken(index), y.detach()[index, 0], points.y[index], n)
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
    return (2 / n) * (half[:, None] * psi.cos() / t * root).sum(-1)


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
