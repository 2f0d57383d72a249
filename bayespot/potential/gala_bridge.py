"""gala: its potentials as ours and ours as its own. The only importer of gala."""

from __future__ import annotations

from typing import Any

import numpy as np
from astropy import units as u
from gala.potential import CompositePotential, PotentialBase, TimeInterpolatedPotential
from gala.units import DimensionlessUnitSystem, galactic
from numpy.typing import NDArray

from bayespot.potential.base import Potential
from bayespot.potential.callables import TorchCallables

_VELOCITY2 = u.km**2 / u.s**2
#: Times in Myr at which a static potential must be what it is at 0.
_TIMES = (-3000.0, -170.0, -13.0, 13.0, 170.0, 3000.0)


class Exported(PotentialBase):  # type: ignore[misc]
    """A `Potential` in gala's galactic units (kpc, Myr, Msun); it has no compiled force."""

    def __init__(self, potential: Potential, units: Any = galactic, origin: Any = None, R: Any = None) -> None:
        PotentialBase.__init__(self, units=units, origin=origin, R=R)
        self.callables = TorchCallables(potential)
        #: (km/s)^2 in gala's units
        self.speed2 = _VELOCITY2.to(galactic["length"] ** 2 / galactic["time"] ** 2)

    def _energy(self, q: NDArray[Any], t: Any = 0.0) -> NDArray[Any]:
        return self.callables.phi(q) * self.speed2

    def _gradient(self, q: NDArray[Any], t: Any = 0.0) -> NDArray[Any]:
        # unlike the others it is given, and returns, (3, n)
        return self.callables.gradient(q.T).T * self.speed2

    def _hessian(self, q: NDArray[Any], t: Any = 0.0) -> NDArray[Any]:
        return self.callables.hessian(q) * self.speed2

    def _density(self, q: NDArray[Any], t: Any = 0.0) -> NDArray[Any]:
        return self.callables.density(q)


class GalaCallables:
    """A gala potential as `bayespot.potential.callables.Callables`, as gala computes them.

    Raises
    ------
    ValueError
        If it is not a three-dimensional gala potential, has no units or depends on time.
    """

    def __init__(self, potential: Any) -> None:
        if hasattr(potential, "potential") and hasattr(potential, "frame"):
            raise ValueError(
                f"{type(potential).__name__} of gala is a potential in a frame of reference: give its .potential, if "
                "the frame does not rotate"
            )
        if not isinstance(potential, PotentialBase):
            raise ValueError(f"not a gala potential: {potential!r}")
        name = type(potential).__name__
        if isinstance(potential, CompositePotential) and not len(potential):
            raise ValueError(f"{name} of gala has no members")
        if potential.ndim != 3:
            raise ValueError(f"{name} has {potential.ndim} dimensions: give a potential of three")
        if isinstance(potential.units, DimensionlessUnitSystem):
            raise ValueError(
                f"{name} has no units: build it with units, for instance units=gala.units.galactic, and a mass in "
                "astropy.units.Msun and lengths in kpc"
            )
        changing = _changing(potential)
        if changing:
            raise ValueError(
                f"{changing} depends on time and would be frozen at t = 0: give a static potential, for instance that "
                "of the time you mean"
            )
        self.potential = potential

    def phi(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return Phi ``(n,)`` in (km/s)^2."""
        return self.potential.energy(x.T * u.kpc).to_value(_VELOCITY2)

    def gradient(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return its gradient ``(n, 3)`` in (km/s)^2/kpc."""
        return self.potential.gradient(x.T * u.kpc).to_value(_VELOCITY2 / u.kpc).T

    def hessian(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return its second derivatives ``(n, 3, 3)`` in (km/s)^2/kpc^2."""
        return np.moveaxis(self.potential.hessian(x.T * u.kpc).to_value(_VELOCITY2 / u.kpc**2), -1, 0)


def _changing(potential: Any) -> str:
    """Return the name of the member that depends on time, or nothing."""
    name = type(potential).__name__
    if isinstance(potential, CompositePotential):
        found = next(filter(None, map(_changing, potential.values())), "")
        return f"{found} in {name}" if found else ""
    if isinstance(potential, TimeInterpolatedPotential):
        return name
    q = np.array([[8.0, 0.3], [1.0, -0.4], [0.5, 2.0]]) * u.kpc
    now = potential.gradient(q).value
    for t in _TIMES:
        try:
            then = potential.gradient(q, t=t * u.Myr).value
        except (ValueError, RuntimeError):
            # outside the times that it knows
            return name
        if not np.allclose(now, then, rtol=1e-12, atol=0, equal_nan=True):
            return name
    return ""
