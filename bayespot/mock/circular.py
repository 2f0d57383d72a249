"""Circular orbits in the plane of an axisymmetric potential, tabulated."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bayespot.potential.base import Potential
from bayespot.units import Declared, takes

Array = NDArray[np.float64]

#: Radii in kpc that are tabulated, and nodes per unit of ln R.
R_RANGE, _PER_UNIT = (1e-4, 1e6), 40


class CircularOrbit(NamedTuple):
    """Radius R (kpc), energy E ((km/s)^2), angular momentum L (kpc km/s) and the frequencies (km/s/kpc)."""

    R: Array
    E: Array
    L: Array
    omega: Array
    kappa: Array
    nu: Array


class CircularOrbits(Declared):
    r"""Circular orbits in z = 0: their frequencies Omega, kappa and nu, found by radius, energy or angular momentum.

    .. math::
        \Omega^2 = \frac{1}{R} \frac{\partial\Phi}{\partial R}, \quad
        \kappa^2 = \frac{\partial^2\Phi}{\partial R^2} + 3 \Omega^2, \quad
        \nu^2 = \frac{\partial^2\Phi}{\partial z^2}

    Parameters
    ----------
    potential
        Spherical or axisymmetric about z, its parameters numbers.
    unstable_inside
        Leave out the radii up to the outermost unstable circular orbit, where the potential's centre has any (a
        free-form density may be so uneven there); what is asked for there gets the innermost orbit that is kept.

    Raises
    ------
    ValueError
        If the potential is triaxial, has priors, or a circular orbit between 10^-4 and 10^6 kpc is unstable; of those
        allowed to be, if most are.

    References
    ----------
    Binney & Tremaine (2008), equations 3.79.
    """

    def __init__(self, potential: Potential, unstable_inside: bool = False) -> None:
        if potential.symmetry == "triaxial":
            raise ValueError(f"{type(potential).__name__} is triaxial: it has no circular orbits in z = 0")
        first, last = (math.log(R) for R in R_RANGE)
        ln_R = np.linspace(first, last, round(_PER_UNIT * (last - first)) + 1)
        R = torch.as_tensor(np.exp(ln_R))
        with torch.no_grad():
            phi, v_c = potential.phi_r(R), potential.circular_speed(R)
            found = {
                "Omega": v_c / R, "kappa": potential.epicycle_frequency(R), "nu": potential.vertical_frequency(R)
            }  # fmt: skip
        first_kept = 0
        for name, frequency in found.items():
            bad = (~(frequency > 0)).nonzero()[:, 0]
            if len(bad) and (not unstable_inside or int(bad[-1]) > len(R) // 2):
                shown = float(R[bad[-1] if unstable_inside else bad[0]])
                raise ValueError(f"circular orbits of this potential are unstable: no {name} at R = {shown:.4g} kpc")
            if len(bad):
                first_kept = max(first_kept, int(bad[-1]) + 1)
        columns = [phi + v_c**2 / 2, R * v_c, *found.values()]
        ln_R = ln_R[first_kept:]
        self._ln_R = ln_R
        self._columns = [column.numpy()[first_kept:] for column in columns]
        from scipy.interpolate import CubicSpline

        energy, *others = self._columns
        self._splines = [CubicSpline(ln_R, energy), *(CubicSpline(ln_R, np.log(column)) for column in others)]

    @property
    def largest_energy(self) -> float:
        """Energy of the outermost circular orbit in (km/s)^2."""
        return float(self._columns[0][-1])

    @takes(R="length")
    def at(self, R: Array) -> CircularOrbit:
        """Return the circular orbits of given radii in kpc; the ends' beyond the table."""
        s = np.clip(np.log(R), self._ln_R[0], self._ln_R[-1])
        energy, *others = (spline(s) for spline in self._splines)
        return CircularOrbit(np.exp(s), energy, *(np.exp(other) for other in others))

    @takes(L="action")
    def radius(self, L: Array) -> Array:
        """Return the radii (kpc) of the circular orbits of given angular momenta in kpc km/s."""
        s = np.interp(np.log(np.clip(L, self._columns[1][0], None)), np.log(self._columns[1]), self._ln_R)
        return np.exp(self._refined(s, 1, np.log(np.clip(L, self._columns[1][0], None))))

    @takes(E="potential")
    def radius_of_energy(self, E: Array) -> Array:
        """Return the radii (kpc) of the circular orbits of given energies in (km/s)^2; the ends' beyond the table."""
        E = np.clip(E, self._columns[0][0], self._columns[0][-1])
        return np.exp(self._refined(np.interp(E, self._columns[0], self._ln_R), 0, E))

    def _refined(self, s: Array, column: int, target: Array) -> Array:
        """Newton's method on a spline from where straight lines between the nodes lead."""
        spline = self._splines[column]
        for _ in range(4):
            s = np.clip(s - (spline(s) - target) / spline(s, 1), self._ln_R[0], self._ln_R[-1])
        return s
