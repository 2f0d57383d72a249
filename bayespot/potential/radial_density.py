"""The density of a sphere with two slopes, whatever the potential is made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline

from bayespot.potential.callables import TorchCallables
from bayespot.units import G

#: Nodes of the spline in kpc: 40 a decade.
NODES = np.geomspace(1e-6, 1e6, 481)
#: Fraction of the mean density inside r below which the density is rounding of the enclosed mass.
_LOST = 1e-9


class RadialDensity:
    r"""ln rho as a quintic spline of ln r, a power law beyond its ends.

    .. math::
        \rho' = \gamma\,\rho/r, \qquad \rho'' = (\gamma' + \gamma^2 - \gamma)\,\rho/r^2, \qquad
        \gamma = d\ln\rho/d\ln r

    Autograd would give these for closed forms only: tabulated and neural potentials are cubics between their nodes, and
    those of other packages have two derivatives. Against the isochrone's closed form gamma is right to 1e-7.

    Parameters
    ----------
    callables
        Of a spherical potential.
    """

    def __init__(self, callables: TorchCallables) -> None:
        self.callables = callables
        x = _on_axis(NODES)
        with np.errstate(all="ignore"):
            rho, force = callables.density(x), callables.gradient(x)[:, 0]
            sound = np.isfinite(rho) & (rho > _LOST * 3 * force / (4 * np.pi * G * NODES))
        first, last = _longest(sound)
        self._spline = None
        if last - first > 5:
            s = np.log(NODES[first:last])
            self._spline = make_interp_spline(s, np.log(rho[first:last]), k=5)
            self._ends = s[0], s[-1]

    def slopes(self, r: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return rho (Msun/kpc^3), drho/dr and d^2rho/dr^2 at radii ``(n,)`` in kpc."""
        if self._spline is None:
            # no density, or of a few nodes only: a point, a shell
            return tuple(np.zeros((3, len(r))))  # type: ignore[return-value]
        with np.errstate(divide="ignore"):
            s = np.log(r)
        inside = np.clip(s, *self._ends)
        # galpy asks for one radius at a time, and for very many
        rho = np.exp(self._spline(inside))
        if (s != inside).any():
            rho = np.where(s == inside, rho, np.maximum(self.callables.density(_on_axis(r)), 0.0))
        gamma = self._spline(inside, 1)
        bend = np.where(s == inside, self._spline(inside, 2), 0.0)
        return rho, gamma * rho / r, (bend + gamma**2 - gamma) * rho / r**2

    def scale_radius(self) -> float | None:
        """Return the radius in kpc at which gamma falls through -2, or None."""
        if self._spline is None:
            return None
        s = np.linspace(*self._ends, 1000)
        excess = self._spline(s, 1) + 2
        found = np.flatnonzero((excess[:-1] > 0) & (excess[1:] <= 0))
        if not len(found):
            return None
        i = found[0]
        return float(np.exp(s[i] + (s[i + 1] - s[i]) * excess[i] / (excess[i] - excess[i + 1])))


def _on_axis(r: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([r, np.zeros_like(r), np.zeros_like(r)], -1)


def _longest(flags: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the first and one past the last index of the longest run of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    if not len(edges):
        return 0, 0
    starts, ends = edges[::2], edges[1::2]
    i = int((ends - starts).argmax())
    return int(starts[i]), int(ends[i])
