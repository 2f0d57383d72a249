"""What other packages say of their potentials, compared with differences before it is used."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayespot.potential.callables import Callables
from bayespot.potential.differences import STEPS, Slopes, slopes

#: Relative error of forces beyond which a potential is refused, or a warning given.
REFUSED, DOUBTED = 1e-2, 1e-4
#: Relative error of second derivatives beyond which they are replaced.
REPLACED = 1e-5
#: Steps of the comparison: as few as show an error.
_STEPS = STEPS[1:4]
#: Where they are compared, in kpc: no point lies on an axis or in a plane of symmetry.
_RADII = np.geomspace(0.1, 50.0, 6)
_DIRECTIONS = np.array(
    [[0.48, 0.60, 0.64], [-0.64, 0.48, -0.60], [0.36, -0.80, 0.48], [0.80, 0.36, -0.48], [-0.28, -0.576, 0.768],
     [0.768, -0.576, 0.28]]
)  # fmt: skip


class Checked:
    """A source whose forces are those of its Phi and whose second derivatives are those of its forces.

    Forces are compared with differences of Phi, second derivatives with differences of the forces, at six points
    between 0.1 and 50 kpc.

    Parameters
    ----------
    source
        What the package says.
    name
        Of the potential, for messages.

    Attributes
    ----------
    by_differences : bool
        Whether second derivatives are differences of the forces (to about 1e-9), because the package gives none or
        wrong ones.

    Raises
    ------
    ValueError
        If at half of the points the forces are not the slopes of Phi to 1 %, or nothing is finite at any.

    Warns
    -----
    UserWarning
        If at any point they are not so to 1e-4.
    """

    def __init__(self, source: Callables, name: str) -> None:
        self.source = source
        x = _RADII[:, None] * _DIRECTIONS
        errors = _errors(source.gradient(x), slopes(source.phi, x, steps=_STEPS))
        known = np.isfinite(errors)
        if not known.any():
            raise ValueError(f"{name} is not finite at any of {len(x)} points between 0.1 and 50 kpc")
        worst = int(np.where(known, errors, -1.0).argmax())
        if errors[worst] > DOUBTED:
            fault = (
                f"the forces of {name} depart from the slope of its own Phi by {100 * errors[worst]:.2g} % at "
                f"r = {_RADII[worst]:.3g} kpc"
            )
            if 2 * (errors[known] > REFUSED).sum() >= known.sum():
                raise ValueError(f"{fault} and elsewhere, so that no orbit keeps its energy: give another form of it")
            warnings.warn(f"{fault}: energies and orbits there agree no better", UserWarning, stacklevel=4)
        self.by_differences = True
        try:
            hessian = source.hessian(x)
        except (NotImplementedError, ValueError):
            return
        errors = _errors(hessian, slopes(source.gradient, x, steps=_STEPS))
        # a quadrature or table that fails at one place fails for forces too
        self.by_differences = 2 * (errors <= REPLACED).sum() <= np.isfinite(errors).sum()

    def phi(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return Phi ``(n,)`` in (km/s)^2."""
        return self.source.phi(x)

    def gradient(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return its gradient ``(n, 3)`` in (km/s)^2/kpc."""
        return self.source.gradient(x)

    def hessian(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return its second derivatives ``(n, 3, 3)`` in (km/s)^2/kpc^2."""
        if not self.by_differences:
            return self.source.hessian(x)
        found = slopes(self.source.gradient, x).values
        return (found + found.transpose(0, 2, 1)) / 2


def _errors(found: NDArray[Any], expected: Slopes) -> NDArray[Any]:
    """Return relative errors ``(n,)`` beyond what the differences lose; NaN where these are not finite."""
    axes = tuple(range(1, found.ndim))
    with np.errstate(invalid="ignore", divide="ignore"):
        off = np.abs(found - expected.values).max(axes) - 3 * expected.errors
        relative = np.where(off <= 0, 0.0, off / np.abs(expected.values).max(axes))
    # not a number where the differences are finite: as wrong as can be
    return np.where(np.isfinite(expected.values).all(axes), np.nan_to_num(relative, nan=1e300, posinf=1e300), np.nan)
