"""Turning stars to other axes, and the axis about which they rotate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayespot.catalog.refusal import CatalogError

#: Probability below which a rotation is not chance.
_CHANCE = 1e-4
#: Departure of a matrix from orthogonality that is rounding.
_ROUNDING = 1e-6
#: Distance from the unit matrix of a rotation that is none, back to where the stars were.
_UNTURNED = 1e-12
#: Directions of angular momenta agree no better than this (radians), so that cold discs have a finite error.
_SHARPEST = 1e-6


class RotationAxis(NamedTuple):
    """The axis about which stars rotate, from the directions n of their angular momenta.

    ``direction`` is the unit vector along the mean of n, about which the stars turn in the positive sense; ``tilt`` its
    angle from the z axis in degrees, 0 to 90 (from -z if that is nearer), and ``tilt_error`` the standard error of
    that; ``rotation`` the length of the mean, 1 for stars that all turn alike, about ``1/sqrt(n)`` for none that do;
    ``p_value`` the probability that stars symmetric about z have so large a mean across z.
    """

    direction: tuple[float, float, float]
    tilt: float
    tilt_error: float
    rotation: float
    p_value: float


def mean_rotation(w: Tensor) -> RotationAxis | None:
    r"""Return the axis about which stars ``w (n, 6)`` rotate; None if they do not, beyond chance, or are under ten.

    In a population symmetric about z the mean of :math:`n = x \times v / |x \times v|` has no component across z,
    however it rotates; its covariance is that of n over the number of stars.
    """
    L = torch.linalg.cross(w[:, :3], w[:, 3:])
    length = torch.linalg.vector_norm(L, dim=-1)
    n = (L[length > 0] / length[length > 0, None]).cpu().numpy()
    if len(n) < 10:
        return None
    mean = n.mean(0)
    covariance = (n - mean).T @ (n - mean) / len(n) ** 2 + _SHARPEST**2 * np.eye(3)
    rotation = float(np.linalg.norm(mean))
    if rotation == 0 or _chance(float(mean @ np.linalg.solve(covariance, mean)), 3) > _CHANCE:
        return None
    across = mean[:2]
    size = float(np.linalg.norm(across))
    # at right angles to the mean, in the plane of it and z; of an axis along z the mean of all such directions
    lean = np.array([*(across / max(size, 1e-300) * mean[2]), -size]) / rotation
    variance = lean @ covariance @ lean if size > _SHARPEST else np.trace(covariance[:2, :2]) / 2
    tilt = math.degrees(math.atan2(size, abs(float(mean[2]))))
    p_value = _chance(float(across @ np.linalg.solve(covariance[:2, :2], across)), 2)
    x, y, z = (float(c) for c in mean / rotation)
    return RotationAxis((x, y, z), tilt, math.degrees(math.sqrt(float(variance)) / rotation), rotation, p_value)


def _chance(chi2: float, dof: int) -> float:
    from scipy.special import chdtrc

    return float(chdtrc(dof, chi2))


def rotation_matrix(axis: Any, rotation: Any) -> Tensor:
    """Return the matrix (3, 3) that turns ``axis`` into z, by the shortest way if z > 0, or the one that is given.

    Raises
    ------
    CatalogError
        If not just one of the two is given, the axis has no direction, or the matrix is no rotation.
    """
    if (axis is None) == (rotation is None):
        raise CatalogError("give either axis=, the direction that becomes z, or rotation=, a matrix (3, 3)")
    if axis is not None:
        return _onto_z(axis)
    matrix = rotation.as_matrix() if hasattr(rotation, "as_matrix") else rotation
    found = torch.as_tensor(np.asarray(matrix, dtype=float))
    if found.shape != (3, 3) or not bool(torch.isfinite(found).all()):
        raise CatalogError(f"rotation must be a matrix (3, 3) or one scipy Rotation, got shape {tuple(found.shape)}")
    off = float((found @ found.T - torch.eye(3, dtype=found.dtype)).abs().max())
    if off > _ROUNDING or float(torch.linalg.det(found)) < 0:
        raise CatalogError(
            f"rotation must be orthogonal with determinant 1: R R^T departs from one by {off:.2g}, the determinant is "
            f"{float(torch.linalg.det(found)):.3g}; mirrored axes would turn rotation round (turn the signs of two)"
        )
    return found


def _onto_z(axis: Any) -> Tensor:
    a = np.asarray(axis, dtype=float)
    size = float(np.linalg.norm(a)) if a.shape == (3,) else math.nan
    if not 0 < size < math.inf:
        raise CatalogError(f"axis must be three numbers that are not all zero, got {axis!r}")
    x, y, z = a / size
    if z < 0:
        # half a turn about x first: the formula divides by 1 + z
        half = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
        return _onto_z((x, -y, -z)) @ half
    # Rodrigues' formula about axis x z, without dividing by the sine
    k = np.array([[0.0, 0.0, -x], [0.0, 0.0, -y], [x, y, 0.0]])
    return torch.as_tensor(np.eye(3) + k + k @ k / (1 + z))


def stored_rotation(meta: Mapping[str, Any]) -> Tensor | None:
    """Return the rotation (3, 3) that a catalogue's metadata record, from the axes in which it was read; or None."""
    stored = meta.get("rotation")
    return None if stored is None else rotation_matrix(None, stored)


def turned_meta(meta: Mapping[str, Any], matrix: Tensor) -> dict[str, Any]:
    """Return the metadata of turned stars: one rotation or none, and no truth that no longer holds, with a note."""
    before = stored_rotation(meta)
    total = matrix if before is None else matrix @ before
    found = {**meta, "rotation": total.tolist()}
    if float((total - torch.eye(3, dtype=total.dtype)).abs().max()) < _UNTURNED:
        del found["rotation"]
    truth = meta.get("truth")
    if isinstance(truth, Mapping) and abs(float(matrix[2, 2])) < 1 - 1e-12:
        kept = {k: v for k, v in truth.items() if k != "orbits"} if _round(truth.get("potential")) else {}
        notes = [*meta.get("notes", [])]
        if len(kept) < len(truth):
            what = "the truth's orbits hold" if kept else "the truth holds"
            notes.append(f"{what} in the axes before the rotation only, and left out")
        found |= {"notes": notes} if notes else {}
        found = {k: v for k, v in found.items() if k != "truth"} | ({"truth": kept} if kept else {})
    return found


#: Potentials by name that have no axis; sums of them have none.
_ROUND = ("Isochrone", "Plummer", "Hernquist", "Jaffe", "NFW", "PowerLaw", "CoredPowerLaw", "PowerLawCutoff")


def _round(potential: Any) -> bool:
    """Whether a description of a potential (`bayespot.potential.analytic.describe`) is a sphere's."""
    if not isinstance(potential, Mapping):
        return False
    if potential.get("name") == "SumPotential":
        return all(_round(member) for member in potential.get("members", []))
    return potential.get("name") in _ROUND or (potential.get("name") == "Logarithmic" and potential.get("q", 1.0) == 1)


def turned_stars(w: Tensor, matrix: Tensor) -> Tensor:
    """Return positions and velocities ``(*batch, 6)`` along other axes."""
    return (w.unflatten(-1, (2, 3)) @ matrix.to(w).T).flatten(-2)


def turned_covariance(covariance: Tensor, matrix: Tensor) -> Tensor:
    """Return covariances ``(n, 6, 6)`` of stars that `turned_stars` turns."""
    both = torch.block_diag(matrix, matrix).to(covariance)
    turned = both @ covariance @ both.T
    return (turned + turned.transpose(1, 2)) / 2
