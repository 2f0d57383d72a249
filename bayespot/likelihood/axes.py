"""Whether stars, model and selection are about the same axes, before a fit is made of them."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayespot.catalog.rotation import RotationAxis, mean_rotation
from bayespot.likelihood.healpix import Healpix
from bayespot.likelihood.selection import (
    GalacticLatitude,
    HeliocentricDistance,
    MagnitudeLimit,
    Product,
    Rotated,
    SelectionFunction,
    SkyCone,
)
from bayespot.potential.base import Potential

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog

#: Median of abs(z) over that of R, or of abs(v_z) over that of the speed, below which stars are only in the plane: a
#: galaxy's thinnest discs of gas have 0.005.
_FLAT = 1e-4
#: Tilt of the rotation axis (deg) at three standard errors less that is refused, and probability below which one is
#: mentioned; a tilt by less than a degree is not.
_REFUSED, _CHANCE, _LEAST = 10.0, 1e-6, 1.0
#: Largest difference of two rotations, or places of the Sun in kpc, that are the same.
_SAME = 1e-6
#: Selections by directions along the axes, and by distances from the Sun; a user's own are of the stars as they are.
_BY_DIRECTION = (GalacticLatitude, SkyCone, Healpix)
_BY_DISTANCE = (HeliocentricDistance, MagnitudeLimit)


def require_axes(potential: Potential, selection: SelectionFunction | None, catalog: Catalog) -> None:
    """Refuse stars that an axisymmetric model cannot be about, and selections in other axes than the stars'.

    The axis about which the stars rotate is looked at where the catalogue is complete and its stars' coordinates are
    exact: selections and errors turn it.

    Raises
    ------
    ValueError
        If the potential is axisymmetric and the stars have no extent along z, or rotate about another axis (by 10
        degrees beyond three standard errors); or if the stars were turned and the selection was not, or the reverse.

    Warns
    -----
    UserWarning
        If they rotate about an axis that is off z by less, but by more than a degree and beyond chance (1e-6).
    """
    if selection is not None:
        _require_same_axes(selection, catalog)
    if potential.symmetry != "axisymmetric":
        return
    _require_extent(catalog.w)
    if selection is None and catalog.covariance is None:
        _require_upright(mean_rotation(catalog.w))


def _require_same_axes(selection: SelectionFunction, catalog: Catalog) -> None:
    if isinstance(selection, Product):
        for factor in selection.factors:
            _require_same_axes(factor, catalog)
        return
    turned = catalog.rotation
    if isinstance(selection, Rotated):
        stated = torch.tensor(selection.rotation, dtype=torch.float64)
        if float((stated - (torch.eye(3).double() if turned is None else turned)).abs().max()) > _SAME:
            have = "were not turned" if turned is None else "were turned by another"
            raise ValueError(
                f"{selection} is turned by a rotation, the stars {have}: build it with the catalogue's own, "
                "Rotated(selection, catalog.rotation)"
            )
        return
    if turned is None:
        return
    moved = isinstance(selection, _BY_DISTANCE) and math.dist(selection.observer, catalog.frame.sun) > _SAME
    if moved or isinstance(selection, _BY_DIRECTION):
        raise ValueError(
            f"the stars were turned (Catalog.rotated), and {selection} is stated in the axes before that: give "
            "Rotated(selection, catalog.rotation)"
        )


def _require_extent(w: Tensor) -> None:
    """Raise ValueError if most stars have no height or no vertical velocity."""
    if not len(w):
        return
    R, speed = (torch.linalg.vector_norm(part, dim=-1).median() for part in (w[:, :2], w[:, 3:]))
    height, vertical = w[:, 2].abs().median(), w[:, 5].abs().median()
    flat = [
        f"{name} = 0 (median {float(size):.2g} {unit}, beside {float(scale):.3g})"
        for name, size, scale, unit in (("z", height, R, "kpc"), ("v_z", vertical, speed, "km/s"))
        if float(size) <= _FLAT * float(scale)
    ]
    if flat:
        raise ValueError(
            f"most of {len(w)} stars have {' and '.join(flat)}: they say nothing of the motion off the plane, f(J) "
            "would pile up at J_z = 0, and the vertical force is not determined; give heights and vertical velocities, "
            "or of a razor-thin disc fit the plane alone by a sphere (spherical potential, f(J) with rotation=True)"
        )


def _require_upright(axis: RotationAxis | None) -> None:
    """Raise ValueError, or warn, if the stars rotate about an axis that is not z."""
    if axis is None or axis.p_value > _CHANCE or axis.tilt < _LEAST:
        return
    where = ", ".join(f"{c:.3f}" for c in axis.direction)
    text = (
        f"the stars rotate about ({where}), {axis.tilt:.3g} +- {axis.tilt_error:.2g} deg from the z axis, about which "
        "the potential is symmetric: turn them, catalog.rotated(catalog.rotation_axis().direction)"
    )
    if axis.tilt - 3 * axis.tilt_error > _REFUSED:
        raise ValueError(text)
    warnings.warn(f"{text}, or doubt the symmetry", UserWarning, stacklevel=4)
