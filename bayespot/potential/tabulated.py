r"""A spherical potential from values of :math:`\Phi` or of the enclosed mass at radii, for instance of a simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.numerics import powered
from bayespot.potential.base import Potential, Symmetry, radius
from bayespot.units import G, takes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

#: A quintic spline needs so many values.
_FEWEST = 6


class TabulatedSphere(Potential):
    r"""Fixed spherical potential through values at radii: a quintic spline in ln r, power laws beyond both ends.

    Density and force are smooth (the spline has four continuous derivatives). Beyond the table
    :math:`v_c^2 \propto r^q` with the q of its ends, so that a table that ends where the mass is constant goes on
    as Kepler's. With n values per e-folding of a smooth profile the errors of :math:`\Phi`, force and density fall as
    :math:`n^{-6}`, :math:`n^{-5}` and :math:`n^{-4}`.

    Parameters
    ----------
    r : (n,)
        Radii in kpc, positive and increasing; 6 at least.
    phi : (n,)
        :math:`\Phi` in (km/s)^2.

    Raises
    ------
    ValueError
        If the numbers cannot be a potential: shapes, radii that do not increase, values that are not finite, or an
        outward force at a radius.

    Examples
    --------
    >>> r = np.geomspace(0.01, 1000, 200)
    >>> plummer = TabulatedSphere(r, -G * 1e10 / np.sqrt(1 + r**2))
    >>> round(plummer.enclosed_mass(torch.tensor(2.0).double()).item() / 1e10, 6)
    0.715542
    """

    symmetry: Symmetry = "spherical"

    @takes(r="length", phi="potential")
    def __init__(self, r: ArrayLike, phi: ArrayLike) -> None:
        from scipy.interpolate import PPoly, make_interp_spline

        super().__init__()
        s, values = _checked(r, phi, "phi")
        spline = make_interp_spline(s, values, k=5)
        outward = spline(s, 1) <= 0
        if outward.any():
            raise ValueError(
                f"phi must rise with r; at {outward.sum()} of {len(s)} radii it does not, the first at "
                f"{np.exp(s[np.argmax(outward)]):.4g} kpc: smooth the table or leave those radii out"
            )
        pieces = PPoly.from_spline((spline.t, spline.c, spline.k))
        # the spline's knots are repeated at the ends, with pieces of no length there
        used = np.diff(pieces.x) > 0
        self.register_buffer("_knots", torch.as_tensor(np.append(pieces.x[:-1][used], s[-1])))
        self.register_buffer("_cells", torch.as_tensor(np.ascontiguousarray(pieces.c[::-1, used].T)))
        #: Per end: s, Phi, v_c^2 and q = d ln v_c^2 / ds.
        ends = [(float(e), *(float(spline(e, k)) for k in range(3))) for e in (s[0], s[-1])]
        self._ends = tuple((e, value, slope, second / slope) for e, value, slope, second in ends)

    @classmethod
    @takes(r="length", mass="mass")
    def from_mass(cls, r: ArrayLike, mass: ArrayLike) -> TabulatedSphere:
        r"""Return the potential of an enclosed mass, :math:`\Phi(r) = -\int_r^\infty G M / r'^2 dr'`.

        Parameters
        ----------
        r : (n,)
            Radii in kpc.
        mass : (n,)
            M(<r) in Msun, positive and not decreasing; beyond the last radius its power law goes on.

        Raises
        ------
        ValueError
            As the class, or if the mass is not positive or decreases, or grows so fast at the last radius that Phi has
            no limit.
        """
        from scipy.interpolate import make_interp_spline

        s, m = _checked(r, mass, "mass")
        if (m <= 0).any() or (np.diff(m) < 0).any():
            raise ValueError("mass must be positive and must not decrease with r")
        fine = np.linspace(s[0], s[-1], 8 * len(s))
        ln_mass = make_interp_spline(s, np.log(m), k=5 if len(s) > 10 else 3)
        vc2 = make_interp_spline(fine, G * np.exp(ln_mass(fine) - fine), k=5)
        q = float(ln_mass(s[-1], 1)) - 1
        if q >= 0:
            raise ValueError(f"the mass grows as r^{q + 1:.2f} at the last radius: Phi has no limit; extend the table")
        rise = vc2.antiderivative()
        edge = float(vc2(s[-1])) / q
        return cls(np.exp(fine), rise(fine) - float(rise(s[-1])) + edge)

    def phi(self, x: Tensor) -> Tensor:
        return self.phi_r(radius(x))

    def phi_r(self, r: Tensor) -> Tensor:
        s = r.clamp(min=1e-300).log()
        index = (torch.searchsorted(self._knots, s.detach().contiguous()) - 1).clamp(0, len(self._cells) - 1)
        u = s - self._knots[index]
        rows = self._cells[index]
        value = rows[..., 5]
        for k in range(4, -1, -1):
            value = value * u + rows[..., k]
        (first, phi_0, vc2_0, q_0), (last, phi_1, vc2_1, q_1) = self._ends
        below = phi_0 + vc2_0 * powered((s - first).clamp(max=0), torch.tensor(q_0).to(s))
        above = phi_1 + vc2_1 * powered((s - last).clamp(min=0), torch.tensor(q_1).to(s))
        return torch.where(s < first, below, torch.where(s > last, above, value))


def _checked(r: ArrayLike, values: ArrayLike, what: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return ln r and the values as arrays."""
    radii, y = np.asarray(r, dtype=float), np.asarray(values, dtype=float)
    if radii.ndim != 1 or radii.shape != y.shape or len(radii) < _FEWEST:
        raise ValueError(f"r and {what} must be (n,) with n >= {_FEWEST}; got shapes {radii.shape} and {y.shape}")
    if not (np.isfinite(radii).all() and np.isfinite(y).all()):
        raise ValueError(f"r and {what} must be finite")
    if radii[0] <= 0 or (np.diff(radii) <= 0).any():
        raise ValueError(f"r must be positive and increasing (kpc), got {radii[:4]} ...")
    return np.log(radii), y
