"""The geometry of an orbital plane, common to the action finders and torus maps of every sphere.

In a spherical potential a star moves in a plane fixed by its angular momentum. The plane is placed by the
angle ``node`` of its ascending node (where the star crosses z = 0 upwards) and by its inclination,
cos i = L_z / L; in it the star's azimuth ``psi`` is counted from the node in the sense of motion. The angles
conjugate to (J_phi, J_z) = (L_z, L - abs(L_z)) are then

    theta_z   = psi - lag,
    theta_phi = node + sign(L_z) theta_z,

where ``lag`` depends on the radial motion only: the azimuth swept since pericentre, less its mean
Omega_z t (Binney & Tremaine 2008, section 3.5.2). A polar orbit (L_z = 0) counts as prograde.

Where an angle does not exist a fixed choice is made, with finite gradients: a planar orbit has its node on
the x axis; a radial orbit (L = 0) lies in the polar plane through the star; a star at the centre has the
direction of its velocity. Gradients of such an angle are not meaningful, but those of the actions and of
theta_phi on a planar orbit are right.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class OrbitalPlane(NamedTuple):
    """A star in its orbital plane; every field has the batch shape of ``w``.

    ``r`` (kpc), ``v_r`` and ``v_t`` (km/s, v_t >= 0), ``L``, ``Lz`` and ``J_z`` = L - abs(Lz) (kpc km/s),
    ``cos_i`` = Lz / L, ``node`` and ``psi`` (radians, in (-pi, pi]).
    """

    r: Tensor
    v_r: Tensor
    v_t: Tensor
    L: Tensor
    Lz: Tensor
    J_z: Tensor
    cos_i: Tensor
    node: Tensor
    psi: Tensor


class AngularMomentum(NamedTuple):
    """``L``, ``Lz`` and ``J_z`` = L - abs(Lz), in kpc km/s."""

    L: Tensor
    Lz: Tensor
    J_z: Tensor


class PlaneAngles(NamedTuple):
    """The radial angle, the ascending node and theta_z, in radians."""

    theta_r: Tensor
    node: Tensor
    theta_z: Tensor


def prograde(Lz: Tensor) -> Tensor:
    """Return the sense of rotation about z, +1 or -1; a polar orbit (Lz = 0) counts as +1."""
    return torch.where(Lz < 0, -1.0, 1.0).to(Lz)


def angular_momentum(w: Tensor) -> AngularMomentum:
    """Return the angular actions of a sphere without the angles (less work than `orbital_plane`).

    Parameters
    ----------
    w : Float[Tensor, "*batch 6"]
        Position (kpc) and velocity (km/s).

    Raises
    ------
    ValueError
        If the last axis of ``w`` is not 6.
    """
    x, v = split(w)
    return _angular_momentum(torch.linalg.cross(x, v))


def orbital_plane(w: Tensor) -> OrbitalPlane:
    """Return the orbital plane of each star and its place in it.

    Parameters
    ----------
    w : Float[Tensor, "*batch 6"]
        Position (kpc) and velocity (km/s).

    Raises
    ------
    ValueError
        If the last axis of ``w`` is not 6.
    """
    x, v = split(w)
    r = torch.linalg.vector_norm(x, dim=-1)
    unit = _direction(x, v, r)
    v_r = (unit * v).sum(-1)
    # The second projection removes the rounding of the first: on a nearly radial orbit the normal of the
    # plane would otherwise not be perpendicular to x, and the star would leave its own plane.
    across = v - v_r[..., None] * unit
    across = across - (across * unit).sum(-1, keepdim=True) * unit
    v_t = torch.linalg.vector_norm(across, dim=-1)
    normal = torch.linalg.cross(unit, across)
    L, Lz, J_z = _angular_momentum(r[..., None] * normal)
    cos_i = torch.where(L > 0, Lz / torch.where(L > 0, L, 1.0), 0.0)

    X, Y, Z = unit.unbind(-1)
    nx, ny, nz = normal.unbind(-1)
    radial, planar = L == 0, (nx == 0) & (ny == 0)
    # components of the star's direction along the node and perpendicular to it, times sin(i) v_t
    along, up = Y * nx - X * ny, Z * v_t
    along = torch.where(planar, X, along)
    up = torch.where(planar, prograde(nz) * Y, up)
    node = torch.where(planar, 0.0, safe_atan2(nx, -ny))
    R = torch.linalg.vector_norm(unit[..., :2], dim=-1)
    node = torch.where(radial, safe_atan2(Y, X), node)
    psi = safe_atan2(torch.where(radial, Z, up), torch.where(radial, R, along))
    return OrbitalPlane(r, v_r, v_t, L, Lz, J_z, cos_i, node, psi)


def to_phase_space(r: Tensor, v_r: Tensor, J_phi: Tensor, J_z: Tensor, node: Tensor, psi: Tensor) -> Tensor:
    """Return w ``(*batch, 6)`` of a star in its orbital plane; the inverse of `orbital_plane`.

    Parameters
    ----------
    r, v_r : Float[Tensor, "*batch"]
        Radius (kpc) and radial velocity (km/s).
    J_phi, J_z : Float[Tensor, "*batch"]
        Angular actions, L_z and L - abs(L_z), in kpc km/s. The two together keep the inclination
        accurate where the plane almost coincides with z = 0.
    node, psi : Float[Tensor, "*batch"]
        Ascending node and azimuth from it, in radians.
    """
    L = J_z + J_phi.abs()
    moving = L > 0
    safe_L = torch.where(moving, L, 1.0)
    cos_i = torch.where(moving, J_phi / safe_L, 0.0)
    sin_i = torch.where(moving, safe_sqrt(J_z * (J_z + 2 * J_phi.abs())) / safe_L, 1.0)
    v_t = torch.where(r > 0, L / torch.where(r > 0, r, 1.0), 0.0)
    c_node, s_node, c_psi, s_psi = node.cos(), node.sin(), psi.cos(), psi.sin()
    radial = _in_plane(c_psi, s_psi, c_node, s_node, cos_i, sin_i)
    tangential = _in_plane(-s_psi, c_psi, c_node, s_node, cos_i, sin_i)
    x = r[..., None] * radial
    v = v_r[..., None] * radial + v_t[..., None] * tangential
    return torch.cat(torch.broadcast_tensors(x, v), -1)


def combine_angles(theta_r: Tensor, lag: Tensor, plane: OrbitalPlane) -> Tensor:
    """Return theta ``(*batch, 3)`` = (theta_r, theta_phi, theta_z) in [0, 2 pi).

    Parameters
    ----------
    theta_r : Float[Tensor, "*batch"]
        Radial angle, zero at pericentre.
    lag : Float[Tensor, "*batch"]
        psi - theta_z: azimuth swept since pericentre less (Omega_z / Omega_r) theta_r, zero at pericentre.
    plane : OrbitalPlane
    """
    theta_z = plane.psi - lag
    theta_phi = plane.node + prograde(plane.Lz) * theta_z
    return wrap(torch.stack(torch.broadcast_tensors(theta_r, theta_phi, theta_z), -1))


def split_angles(theta: Tensor, J_phi: Tensor) -> PlaneAngles:
    """Undo `combine_angles`: return theta_r in [-pi, pi), the node and theta_z = psi - lag."""
    theta_r, theta_phi, theta_z = theta.unbind(-1)
    return PlaneAngles(wrap(theta_r + math.pi) - math.pi, theta_phi - prograde(J_phi) * theta_z, theta_z.clone())


def combine_actions(J_r: Tensor, angular: AngularMomentum | OrbitalPlane) -> Tensor:
    """Return J ``(*batch, 3)`` = (J_r, J_phi, J_z)."""
    return torch.stack(torch.broadcast_tensors(J_r, angular.Lz, angular.J_z), -1)


def combine_frequencies(Omega_r: Tensor, Omega_L: Tensor, Lz: Tensor) -> Tensor:
    """Return Omega ``(*batch, 3)`` = (Omega_r, sign(Lz) Omega_L, Omega_L); Omega_L = dH/dL at fixed J_r."""
    return torch.stack(torch.broadcast_tensors(Omega_r, prograde(Lz) * Omega_L, Omega_L), -1)


def wrap(angle: Tensor) -> Tensor:
    """Return the angle modulo 2 pi, in [0, 2 pi) even where rounding would give 2 pi itself."""
    turned = torch.remainder(angle, 2 * math.pi)
    return torch.where(turned >= 2 * math.pi, turned - 2 * math.pi, turned)


def check_actions(J: Tensor) -> None:
    """Raise ValueError unless the last axis of ``J`` is 3, all are finite or NaN, and J_r, J_z >= 0."""
    if J.shape[-1:] != (3,):
        raise ValueError(f"J must have last axis 3, (J_r, J_phi, J_z); got shape {tuple(J.shape)}")
    for i, name in ((0, "J_r"), (2, "J_z")):
        if bool((J[..., i] < 0).any()):
            raise ValueError(f"{name} must be >= 0; got {float(J[..., i].min()):.6g}: drop or clamp those orbits")
    if bool(J.isinf().any()):
        raise ValueError("actions must be finite; got inf: no bound orbit has it")


def safe_sqrt(y: Tensor) -> Tensor:
    """Return the square root with derivative zero, instead of infinity, where ``y`` <= 0 (there it is 0)."""
    positive = y > 0
    root = torch.where(positive, y, 1.0).sqrt()
    # NaN input stays NaN
    return torch.where(positive, root, torch.where(y.isnan(), y.detach(), 0.0))


def safe_atan2(y: Tensor, x: Tensor) -> Tensor:
    """Return atan2 with value and derivative zero, instead of a NaN derivative, at (0, 0)."""
    nowhere = (x == 0) & (y == 0)
    return torch.atan2(torch.where(nowhere, 0.0, y), torch.where(nowhere, 1.0, x))


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return position and velocity, the two halves of ``w``.

    Raises
    ------
    ValueError
        If the last axis of ``w`` is not 6.
    """
    if w.shape[-1:] != (6,):
        raise ValueError(f"w must have last axis 6, (x, y, z, vx, vy, vz); got shape {tuple(w.shape)}")
    return w[..., :3], w[..., 3:]


def _angular_momentum(Lvec: Tensor) -> AngularMomentum:
    L = torch.linalg.vector_norm(Lvec, dim=-1)
    Lz = Lvec[..., 2]
    # (L^2 - Lz^2) / (L + |Lz|): no cancellation on nearly planar orbits
    total = L + prograde(Lz) * Lz
    across = Lvec[..., 0] ** 2 + Lvec[..., 1] ** 2
    J_z = across / torch.where(total > 0, total, 1.0)
    return AngularMomentum(L, Lz, J_z)


def _direction(x: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Return x / r; at the centre the direction of v, or the x axis for a star at rest."""
    away = (r > 0)[..., None]
    speed = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    along = torch.where(speed > 0, v / torch.where(speed > 0, speed, 1.0), v.new_tensor([1.0, 0.0, 0.0]))
    return torch.where(away, x / torch.where(away, r[..., None], 1.0), along)


def _in_plane(along: Tensor, up: Tensor, c_node: Tensor, s_node: Tensor, cos_i: Tensor, sin_i: Tensor) -> Tensor:
    """Return the Galactocentric components of a vector given along the node and 90 degrees ahead of it."""
    parts = (c_node * along - cos_i * s_node * up, s_node * along + cos_i * c_node * up, sin_i * up)
    return torch.stack(torch.broadcast_tensors(*parts), -1)
