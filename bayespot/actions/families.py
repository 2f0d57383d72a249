"""Families of orbits: boxes and tubes, and those whose plane, axis or azimuth is undefined."""

from __future__ import annotations

import torch
from torch import Tensor

from bayespot.potential.base import Symmetry

#: Orbit families of `OrbitActions.family`.
FAMILIES = ("box", "tube about z", "tube about x")

#: Orbits whose L_z never exceeds this fraction of their largest L are polar: L_z is rounding.
_POLAR = 1e-9

#: Factors that leave of positions and velocities what is in the plane z = 0.
_LEVEL = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
#: Height, over its radius, that a star of a planar orbit gets.
LIFT = 1e-6


def orbit_family(orbit: Tensor, symmetry: Symmetry) -> Tensor:
    """Tubes keep the sense of rotation about their axis, boxes about none (n, T, 6) -> (n,)."""
    tube_z = torch.full((len(orbit),), FAMILIES.index("tube about z"))
    if symmetry != "triaxial":
        return tube_z
    L = torch.linalg.cross(orbit[..., :3], orbit[..., 3:])
    keeps = (L > 0).all(1) | (L < 0).all(1)
    return torch.where(keeps[:, 2], tube_z, torch.where(keeps[:, 0], FAMILIES.index("tube about x"), 0))


def off_plane(w: Tensor) -> Tensor:
    """Lift stars that stay in the plane z = 0 by a millionth of their radius, so that their Omega_z shows."""
    planar = (w[:, 2] == 0) & (w[:, 5] == 0)
    lift = torch.where(planar, LIFT * torch.linalg.vector_norm(w[:, :2], dim=-1), 0.0)
    return w + lift[:, None] * w.new_tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])


def is_radial(orbit: Tensor) -> Tensor:
    """Which orbits (n, T, 6) have no angular momentum but rounding."""
    x, v = (torch.linalg.vector_norm(part, dim=-1) for part in orbit.split(3, -1))
    L = torch.linalg.vector_norm(torch.linalg.cross(orbit[..., :3], orbit[..., 3:]), dim=-1)
    return L.amax(1) <= _POLAR * x.amax(1) * v.amax(1)


def into_plane(orbit: Tensor) -> tuple[Tensor, Tensor]:
    """Turn polar orbits (n, T, 6) about z into the plane y = 0, exactly; return them and their azimuths (n,)."""
    L = torch.linalg.cross(orbit[..., :3], orbit[..., 3:])
    polar = (L[..., 2].abs().amax(1) <= _POLAR * torch.linalg.vector_norm(L, dim=-1).amax(1)) | is_radial(orbit)
    farthest = (orbit[..., 0] ** 2 + orbit[..., 1] ** 2).argmax(1)
    at = orbit[torch.arange(len(orbit)), farthest]
    azimuth = torch.where(polar, torch.atan2(at[:, 1], at[:, 0]), 0.0)
    c, s = azimuth.cos()[:, None], azimuth.sin()[:, None]
    x, y, z, v_x, v_y, v_z = orbit.unbind(-1)
    zero = torch.zeros_like(x)
    turned = torch.stack([c * x + s * y, zero, z, c * v_x + s * v_y, zero, v_z], -1)
    return torch.where(polar[:, None, None], turned, orbit), azimuth


def on_axis(orbit: Tensor, symmetry: Symmetry) -> Tensor:
    """Which orbits (n, T, 6) keep to the z axis of a flattened potential."""
    across = orbit[..., :2].abs().amax((1, 2))
    return (across <= _POLAR * orbit[..., 2].abs().amax(1)) & (symmetry == "axisymmetric")


def is_flat(orbit: Tensor) -> Tensor:
    """Which orbits (n, T, 6) keep to the plane z = 0, but for the lift that `off_plane` gave them."""
    return orbit[..., 2].abs().amax(1) <= 1e3 * LIFT * torch.linalg.vector_norm(orbit[..., :3], dim=-1).amax(1)


def is_radial_in_plane(orbit: Tensor) -> Tensor:
    """Which orbits (n, T, 6) have no angular momentum once what is out of the plane z = 0 is left out."""
    return is_radial(orbit * _LEVEL)
