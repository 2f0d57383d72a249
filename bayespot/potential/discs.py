"""Exponential discs of stars and gas: a separable ansatz for Phi, and multipoles for what it leaves."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from bayespot.potential.multipole import (
    ExpandedPotential,
    MultipoleTable,
    checked_degree,
    cylindrical,
    grid,
    half_rule,
    polar,
)
from bayespot.potential.parameters import Value, set_checked
from bayespot.units import G, takes

Vertical = Literal["exponential", "sech2"]
#: Ends of the grid in ln(r / r_d): within, the residual density vanishes as r; without, exponentially.
_FIRST, _LAST = -11.0, 4.5
#: Nodes in mu = t^3, crowded towards the plane: the residual has the disc's thickness.
_N_ANGLES, _STRETCH = 96, 3


class ExponentialDisc(ExpandedPotential):
    r"""Disc of exponential surface density, with a hole if wanted, and an exponential or sech^2 vertical profile.

    .. math::
        \rho = \Sigma(R)\, \zeta(z), \quad
        \Sigma = \Sigma_0 \exp\!\left(-\frac{r_{hole}}{R} - \frac{R}{r_d}\right), \quad
        \zeta = \frac{e^{-|z|/h_z}}{2 h_z} \text{ or } \frac{\mathrm{sech}^2(z / 2 h_z)}{4 h_z}

    .. math::
        \Phi = 4\pi G\, \Sigma(r) H(z) + \sum_l \Phi_l(r) P_l(\cos\theta), \qquad H'' = \zeta, \quad H(0) = H'(0) = 0

    The first term, with the spherical radius r in the place of R, has the disc's vertical structure. The residual

    .. math::
        \rho_{res} = [\Sigma(R) - \Sigma(r)]\, \zeta - (\Sigma'' + 2 \Sigma'/r) H - 2 \Sigma' \frac{z}{r} H'

    is smooth enough for few multipoles (`MultipoleExpansion`), scaled by sigma_0 and r_d. They are made once while only
    sigma_0 is free.

    Relative errors of the force at 2000 places with 0.1 < R / r_d < 15, a third each within h_z / 3, 0.3 R and R of the
    plane, h_z / r_d = 0.1, against l_max = 96 (median, 95 %, largest): 0.09, 0.56, 0.9 % at l_max 8; 0.013, 0.13, 0.2 %
    at 16; 0.001, 0.024, 0.04 % at 32. With 0.003 <= h_z / r_d <= 1 they are no larger than three times these, at
    h_z / r_d = 3 up to six times. The largest with a hole, at its inner edge where the disc's own force is small: 16, 2
    and 0.3 %.

    Parameters
    ----------
    sigma_0
        Surface density scale in Msun/kpc^2; without a hole that of the centre.
    r_d, h_z
        Scale length and scale height in kpc.
    r_hole
        Scale of the hole in kpc, for gas; None: none.
    vertical
        ``"exponential"`` or ``"sech2"``.
    l_max
        Largest degree of the multipoles, even.

    References
    ----------
    Kuijken & Dubinski (1995), MNRAS 277, 1341, and Dehnen & Binney (1998), MNRAS 294, 429, for the ansatz; McMillan
    (2017), MNRAS 465, 76, equations 3 and 4, for the densities.

    Examples
    --------
    >>> disc = ExponentialDisc(sigma_0=8.96e8, r_d=2.5, h_z=0.3)
    >>> round(disc.circular_speed(8.2).item(), 1)  # km/s
    140.9
    """

    @takes(sigma_0="surface_density", r_d="length", h_z="length", r_hole="length")
    def __init__(
        self,
        sigma_0: Value,
        r_d: Value,
        h_z: Value,
        r_hole: Value | None = None,
        vertical: Vertical = "exponential",
        l_max: int = 16,
    ) -> None:
        super().__init__()
        if vertical not in ("exponential", "sech2"):
            raise ValueError(f"vertical must be exponential or sech2, got {vertical!r}")
        set_checked(self, "sigma_0", sigma_0)
        set_checked(self, "r_d", r_d)
        set_checked(self, "h_z", h_z)
        self.has_hole = r_hole is not None
        if r_hole is not None:
            set_checked(self, "r_hole", r_hole)
        self.vertical = vertical
        self.l_max = checked_degree(l_max)
        self.register_buffer("_s", grid(_FIRST, _LAST, l_max), persistent=False)

    def _parameters_now(self) -> tuple[Tensor, ...]:
        """r_d, h_z and, with a hole, r_hole."""
        return (self.r_d, self.h_z, *((self.r_hole,) if self.has_hole else ()))

    def phi(self, x: Tensor) -> Tensor:
        lengths = self._parameters_now()
        r_d, h, hole = _in_r_d(*lengths)

        def build() -> MultipoleTable:
            residual = functools.partial(_residual, h, hole, self.vertical)
            return MultipoleTable.of_density(residual, self._s, half_rule(_N_ANGLES, _STRETCH), self.l_max)

        table = self._kept_table(lengths, build, self.vertical)
        r, mu = polar(x)
        ansatz = _sigma(r / r_d, hole) * _layer(_modulus(x[..., 2]) / r_d, h, self.vertical)[0]
        return 4 * math.pi * G * self.sigma_0 * r_d * (ansatz + table.phi((r / r_d).log(), mu))

    def density(self, x: Tensor) -> Tensor:
        r_d, h, hole = _in_r_d(*self._parameters_now())
        R, z = cylindrical(x)
        return self.sigma_0 / r_d * _sigma(R / r_d, hole) * _layer(_modulus(z) / r_d, h, self.vertical)[2]


def _in_r_d(r_d: Tensor, h_z: Tensor, r_hole: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return r_d, h_z / r_d, None if r_hole is None else r_hole / r_d


def _modulus(z: Tensor) -> Tensor:
    """|z| whose derivative in the plane is 1: H'(0) = 0 keeps the force right, and H''(0) is not lost."""
    return torch.where(z < 0, -z, z)


def _sigma(r: Tensor, hole: Tensor | None) -> Tensor:
    """Surface density over sigma_0, lengths in r_d."""
    return torch.exp(-r if hole is None else -r - hole / r)


def _layer(z: Tensor, h: Tensor, vertical: Vertical) -> tuple[Tensor, Tensor, Tensor]:
    """H, H' and H'' at z >= 0."""
    u = z / h
    if vertical == "exponential":
        # expm1(-u) + u cancels below u = 1e-3, where H is u^2 h / 4 and without weight
        return h / 2 * (torch.expm1(-u) + u), -torch.expm1(-u) / 2, torch.exp(-u) / (2 * h)
    # ln cosh(u/2) = u/2 + ln(1 + exp(-u)) - ln 2
    fall = torch.exp(-u)
    ln_cosh = u / 2 + torch.log1p(fall) - math.log(2)
    return h * ln_cosh, -torch.expm1(-u) / (2 * (1 + fall)), fall / (h * (1 + fall) ** 2)


def _residual(h: Tensor, hole: Tensor | None, vertical: Vertical, R: Tensor, z: Tensor) -> Tensor:
    """Density that the ansatz leaves, in sigma_0 / r_d."""
    r = (R**2 + z**2).sqrt()
    H, slope, zeta = _layer(z, h, vertical)
    sigma = _sigma(r, hole)
    # Sigma(R) = Sigma(r) exp(r - R - hole/R + hole/r), without the difference of nearly equal radii
    rise = z**2 / (r + R)
    gamma = -torch.ones_like(r)
    bend = torch.ones_like(r)
    if hole is not None:
        rise = rise * (1 - hole / (r * R))
        gamma = gamma + hole / r**2
        bend = gamma**2 - 2 * hole / r**3
    return sigma * (torch.expm1(rise) * zeta - (bend + 2 * gamma / r) * H - 2 * gamma * z / r * slope)
