"""Prolate spheroidal coordinates about the z axis, regular at every focal distance from zero on.

With the foci at z = +- Delta,

    R = a sqrt(t),    z = c y,    c^2 = a^2 + Delta^2,    t = 1 - y^2,

where a = Delta sinh(u), and y = sin(beta) for the latitude beta = pi/2 - v. As Delta goes to zero a becomes the
spherical radius and beta the latitude; the momentum p_u becomes r p_r, and p_v^2 + L_z^2 / t becomes L^2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.actions.plane import safe_sqrt, split

#: Square of the distance from the foci, over that from the centre, below which a star counts as no nearer.
_LEAST = 1e-32


class Spheroidal(NamedTuple):
    """A star in these coordinates; every field has the batch shape of ``w``.

    ``delta`` (kpc), ``x`` = a^2 (kpc^2), ``y`` in [-1, 1], ``t`` = 1 - y^2, ``metric`` = a^2 + Delta^2 t (kpc^2), the
    momenta ``p_u`` and ``p_beta`` (kpc km/s), ``v_phi`` (km/s), ``Lz`` (kpc km/s) and the azimuth ``phi``.
    """

    delta: Tensor
    x: Tensor
    y: Tensor
    t: Tensor
    metric: Tensor
    p_u: Tensor
    p_beta: Tensor
    v_phi: Tensor
    Lz: Tensor
    phi: Tensor


def to_spheroidal(w: Tensor, delta: Tensor) -> Spheroidal:
    """Return stars in the coordinates with focal distance ``delta``.

    Parameters
    ----------
    w : Float[Tensor, "*batch 6"]
        Position (kpc) and velocity (km/s).
    delta : Float[Tensor, "*batch"]
        In kpc, not negative; may be the same number for all.

    Raises
    ------
    ValueError
        If the last axis of ``w`` is not 6.
    """
    position, velocity = split(w)
    X, Y, z = position.unbind(-1)
    v_x, v_y, v_z = velocity.unbind(-1)
    R2 = X**2 + Y**2
    away = R2 > 0
    R = safe_sqrt(R2)
    safe_R = torch.where(away, R, 1.0)
    Lz = X * v_y - Y * v_x
    # a star on the axis moves away from it, without L_z
    v_R = torch.where(away, (X * v_x + Y * v_y) / safe_R, safe_sqrt(v_x**2 + v_y**2))
    v_phi = torch.where(away, Lz / safe_R, 0.0)
    phi = torch.where(away, torch.atan2(torch.where(away, Y, v_y), torch.where(away, X, v_x)), _direction(v_x, v_y))

    D = delta**2 * torch.ones_like(R)
    r2 = R2 + z**2
    b = r2 - D
    # zero at the foci, where the coordinates have no derivatives
    metric = (b**2 + 4 * D * R2 + _LEAST * (r2 + D).detach() ** 2).clamp(min=1e-300).sqrt()
    outer = b > 0
    # of two equivalent forms the one without cancellation
    total = (metric + b.abs()) / 2
    x = torch.where(outer, total, D * R2 / total)
    t = torch.where(outer, R2 / total, total / torch.where(D > 0, D, 1.0)).clamp(max=1)
    c = (x + D).sqrt()
    y = (z / c).clamp(-1, 1)
    a, root_t = safe_sqrt(x), safe_sqrt(t)
    p_u = v_R * c * root_t + v_z * a * y
    p_beta = v_z * c * root_t - v_R * a * y
    return Spheroidal(delta * torch.ones_like(R), x, y, t, metric, p_u, p_beta, v_phi, Lz, phi)


def from_spheroidal(
    delta: Tensor, x: Tensor, y: Tensor, t: Tensor, p_u: Tensor, p_beta: Tensor, Lz: Tensor, phi: Tensor
) -> Tensor:
    """Return w ``(*batch, 6)``, the inverse of `to_spheroidal`; ``t`` = 1 - y^2 keeps what is small near the axis."""
    c, a, root_t = (x + delta**2).sqrt(), safe_sqrt(x), safe_sqrt(t)
    metric = x + delta**2 * t
    v_R = (p_u * c * root_t - p_beta * a * y) / metric
    v_z = (p_u * a * y + p_beta * c * root_t) / metric
    R, z = a * root_t, c * y
    v_phi = torch.where(R > 0, Lz / torch.where(R > 0, R, 1.0), 0.0)
    cos, sin = phi.cos(), phi.sin()
    parts = (R * cos, R * sin, z, v_R * cos - v_phi * sin, v_R * sin + v_phi * cos, v_z)
    return torch.stack(torch.broadcast_tensors(*parts), -1)


def _direction(v_x: Tensor, v_y: Tensor) -> Tensor:
    still = (v_x == 0) & (v_y == 0)
    return torch.atan2(torch.where(still, 0.0, v_y), torch.where(still, 1.0, v_x))
