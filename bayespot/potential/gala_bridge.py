"""gala: its potentials as ours and ours as its own. The only importer of gala."""

from __future__ import annotations

from typing import Any

import numpy as np
from astropy import units as u
from gala.potential import PotentialBase
from gala.units import galactic
from numpy.typing import NDArray

from bayespot.potential.base import Potential
from bayespot.potential.callables import TorchCallables

_VELOCITY2 = u.km**2 / u.s**2


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
    """A gala potential as `bayespot.potential.callables.Callables`."""

    def __init__(self, potential: Any) -> None:
        if not isinstance(potential, PotentialBase):
            raise ValueError(f"not a gala potential: {potential!r}")
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
