"""Closed forms that are flattened along z: Miyamoto-Nagai and Satoh discs.

The flattened logarithmic potential is `bayespot.potential.analytic.Logarithmic` with q below one.
"""

from __future__ import annotations

from torch import Tensor

from bayespot.potential.analytic import ANALYTIC, AnalyticPotential
from bayespot.potential.base import Symmetry
from bayespot.potential.parameters import Value
from bayespot.units import G, takes


class _FlattenedPlummer(AnalyticPotential):
    """A model of total mass ``m_tot`` (Msun) that a length a (kpc) flattens and b keeps from being razor-thin."""

    symmetry: Symmetry = "axisymmetric"
    names = ("m_tot", "a", "b")

    @takes(m_tot="mass", a="length", b="length")
    def __init__(self, m_tot: Value, a: Value, b: Value) -> None:
        super().__init__()
        self._set("m_tot", m_tot)
        self._set("a", a, closed="[")
        self._set("b", b)


class MiyamotoNagai(_FlattenedPlummer):
    r"""Disc of Miyamoto and Nagai, :math:`\Phi = -G m_{tot} / \sqrt{R^2 + (a + \sqrt{z^2 + b^2})^2}`.

    The density is positive everywhere; a = 0 is the Plummer sphere of scale b, b -> 0 Kuzmin's razor-thin disc.

    Parameters
    ----------
    m_tot, a, b
        Total mass in Msun; scale length a >= 0 and scale height b > 0 in kpc.

    References
    ----------
    Miyamoto & Nagai (1975), PASJ 27, 533; Binney & Tremaine (2008), equations 2.69.

    Examples
    --------
    >>> import torch
    >>> disc = MiyamotoNagai(m_tot=6.8e10, a=3.0, b=0.28)
    >>> round(disc.circular_speed(torch.tensor(8.0, dtype=torch.float64)).item(), 2)  # km/s
    170.17
    """

    def phi(self, x: Tensor) -> Tensor:
        depth = self.a + (x[..., 2] ** 2 + self.b**2).sqrt()
        return -G * self.m_tot * (x[..., 0] ** 2 + x[..., 1] ** 2 + depth**2).rsqrt()


class Satoh(_FlattenedPlummer):
    r"""Disc of Satoh, :math:`\Phi = -G m_{tot} / \sqrt{R^2 + z^2 + a (a + 2 \sqrt{z^2 + b^2})}`.

    The density is positive everywhere; a = 0 is a point mass.

    Parameters
    ----------
    m_tot, a, b
        Total mass in Msun; scale length a >= 0 and scale height b > 0 in kpc.

    References
    ----------
    Satoh (1980), PASJ 32, 41; Binney & Tremaine (2008), equations 2.70.
    """

    def phi(self, x: Tensor) -> Tensor:
        a = self.a
        softening = a * (a + 2 * (x[..., 2] ** 2 + self.b**2).sqrt())
        return -G * self.m_tot * ((x**2).sum(-1) + softening).rsqrt()


ANALYTIC.update({cls.__name__.lower(): cls for cls in (MiyamotoNagai, Satoh)})
