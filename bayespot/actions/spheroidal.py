"""Spheroidal coordinates about the z axis, regular through the spherical ones: prolate and oblate.

With the foci at z = +- Delta,

    R = a sqrt(t),    z = c y,    c^2 = a^2 + Delta^2,    t = 1 - y^2,

where a = Delta sinh(u), and y = sin(beta) for the latitude beta = pi/2 - v. As Delta goes to zero a becomes the
spherical radius and beta the latitude; the momentum p_u becomes r p_r, and p_v^2 + L_z^2 / t becomes L^2. All depends
on D = Delta^2 alone, and goes on to D < 0: there c = sqrt(-D) sinh(u), and the foci are a ring of radius sqrt(-D) in
the plane. Prolate coordinates (D > 0) suit potentials that are flattened, oblate ones those elongated along z.
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

    ``D`` (kpc^2), ``x`` = a^2 (kpc^2), ``y`` in [-1, 1], ``t`` = 1 - y^2, ``metric`` = a^2 + D t (kpc^2), the
    momenta ``p_u`` and ``p_beta`` (kpc km/s), ``v_phi`` (km/s), ``Lz`` (kpc km/s) and the azimuth ``phi``.
    """

    D: Tensor
    x: Tensor
    y: Tensor
    t: Tensor
    metric: Tensor
    p_u: Tensor
    p_beta: Tensor
    v_phi: Tensor
    Lz: Tensor
    phi: Tensor


def to_spheroidal(w: Tensor, D: Tensor) -> Spheroidal:
    """Return stars in the coordinates with squared focal distance ``D``.

    Parameters
    ----------
    w : Float[Tensor, "*batch 6"]
        Position (kpc) and velocity (km/s).
    D : Float[Tensor, "*batch"]
        In kpc^2; may be the same number for all.

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

    D = D * torch.ones_like(R)
    r2, z2 = R2 + z**2, z**2
    b, d = r2 - D, r2 + D
    prolate = D >= 0
    # zero at the foci, where the coordinates have no derivatives; of equivalent forms those without cancellation
    square = torch.where(prolate, b**2 + 4 * D * R2, d * d - 4 * D * z2)
    metric = (square + _LEAST * (r2 + D.abs()).detach() ** 2).clamp(min=1e-300).sqrt()
    outer = b > 0
    total = (metric + b.abs()) / 2
    x = torch.where(outer, total, D * R2 / total)
    t = torch.where(outer, R2 / total, total / torch.where(D > 0, D, 1.0)).clamp(max=1)
    # inside the ring of oblate coordinates c vanishes in the plane, and y does not
    over = torch.where(prolate | (d > 0), 0.0, (metric - d) / 2)
    ring = over > 0
    safe = torch.where(ring, over, 1.0)
    c2 = torch.where(ring, -D * z2 / safe, torch.where(prolate, x + D, (metric + d) / 2))
    c = safe_sqrt(c2)
    above = torch.where(z < 0, -1.0, 1.0).to(z)
    y = torch.where(ring, above * safe.sqrt() / torch.where(ring, -D, 1.0).sqrt(), z / torch.where(ring, 1.0, c))
    y = y.clamp(-1, 1)
    a, root_t = safe_sqrt(x), safe_sqrt(t)
    p_u = v_R * c * root_t + v_z * a * y
    p_beta = v_z * c * root_t - v_R * a * y
    return Spheroidal(D, x, y, t, metric, p_u, p_beta, v_phi, Lz, phi)


def from_spheroidal(
    D: Tensor, x: Tensor, y: Tensor, t: Tensor, p_u: Tensor, p_beta: Tensor, Lz: Tensor, phi: Tensor
) -> Tensor:
    """Return w ``(*batch, 6)``, the inverse of `to_spheroidal`; ``t`` = 1 - y^2 keeps what is small near the axis."""
    c, a, root_t = (x + D).clamp(min=0).sqrt(), safe_sqrt(x), safe_sqrt(t)
    metric = x + D * t
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
