"""Spheroids whose density is a double power law with an exponential cut-off, flattened; and the spherical cut-off."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from bayespot.potential.analytic import ANALYTIC, AnalyticSphere
from bayespot.potential.base import Symmetry, radius
from bayespot.potential.multipole import (
    ExpandedPotential,
    MultipoleTable,
    checked_degree,
    cylindrical,
    grid,
    half_rule,
    polar,
)
from bayespot.potential.parameters import Value, is_number_one, set_checked
from bayespot.units import G, takes

#: Ends of the grid in ln(r / r_s): beyond them the density is a power law to 1e-6.
_FIRST, _LAST = -14.0, 14.0
#: Largest cut-off radius in r_s that the grid resolves.
_FARTHEST_CUT = 1e4


class PowerLawCutoff(AnalyticSphere):
    r"""Sphere with a power-law density and an exponential cut-off, for bulges.

    .. math::
        \rho \propto r^{-\gamma} e^{-(r/r_c)^2}, \qquad
        M(<r) = m_{tot} P\!\left(\tfrac{3-\gamma}{2}, \tfrac{r^2}{r_c^2}\right), \qquad
        \Phi = -\frac{G M}{r} - \frac{G m_{tot}}{r_c}
        \frac{\Gamma(1 - \gamma/2)}{\Gamma(\frac{3 - \gamma}{2})}
        Q\!\left(1 - \tfrac{\gamma}{2}, \tfrac{r^2}{r_c^2}\right)

    with the regularised incomplete gamma functions P and Q.

    Parameters
    ----------
    m_tot, r_c
        Total mass in Msun and cut-off radius in kpc.
    gamma
        Negative logarithmic slope of the inner density, 0 <= gamma < 2; a number, not a prior (incomplete gamma
        functions have no derivative by it: `DoublePowerLaw` takes one, and steeper cusps).

    References
    ----------
    Bovy (2015), ApJS 216, 29, section 3.5 (galpy's PowerSphericalPotentialwCutoff).
    """

    names = ("m_tot", "r_c", "gamma")

    @takes(m_tot="mass", r_c="length", gamma="number")
    def __init__(self, m_tot: Value, r_c: Value, gamma: float) -> None:
        super().__init__()
        if not isinstance(gamma, int | float) and not (type(gamma) is Tensor and not gamma.requires_grad):
            raise ValueError(f"gamma of PowerLawCutoff must be a number, got {gamma!r}; DoublePowerLaw takes a prior")
        self._set("m_tot", m_tot)
        self._set("r_c", r_c)
        self._set("gamma", gamma, 0.0, 2.0, closed="[")

    def phi(self, x: Tensor) -> Tensor:
        r = radius(x).clamp(min=1e-100)
        u, a = (r / self.r_c) ** 2, 1 - self.gamma / 2
        depth = torch.exp(torch.lgamma(a) - torch.lgamma(a + 0.5)) / self.r_c
        within, beyond = torch.special.gammainc(a + 0.5, u), torch.special.gammaincc(a, u)
        return -G * self.m_tot * (within / r + depth * beyond)

    def density_r(self, r: Tensor) -> Tensor:
        u, g = r / self.r_c, self.gamma
        norm = 2 * math.pi * self.r_c**3 * torch.exp(torch.lgamma((3 - g) / 2))
        return self.m_tot / norm * u**-g * torch.exp(-(u**2))

    def mass_r(self, r: Tensor) -> Tensor:
        return self.m_tot * torch.special.gammainc((3 - self.gamma) / 2, (r / self.r_c) ** 2)

    def total_mass(self) -> Tensor:
        return self.m_tot


class DoublePowerLaw(ExpandedPotential):
    r"""Spheroid with two density slopes, an axis ratio and, if wanted, an exponential cut-off.

    .. math:: \rho = \rho_0 \left(\frac{m}{r_s}\right)^{-\gamma} \left(1 + \frac{m}{r_s}\right)^{\gamma - \beta}
              e^{-(m/r_{cut})^2}, \qquad m^2 = R^2 + \frac{z^2}{q^2}

    gamma = 1, beta = 3 is a flattened NFW halo, gamma = 0 with a cut-off the bulge of McMillan (2017). Phi is a table
    of multipoles (`MultipoleExpansion`), scaled by rho_0 and r_s: while only those two are free (without a
    cut-off) it is made once. Largest relative error of the force of an NFW halo at 0.01 to 1000 kpc: 4e-8 (q = 0.7) and
    1e-4 (q = 0.4) at l_max 16; 6e-8 at l_max 32 (q = 0.4).

    Parameters
    ----------
    rho_0, r_s
        Density scale in Msun/kpc^3 and scale radius in kpc.
    gamma, beta
        Negative logarithmic slopes of the inner and outer density: 0 <= gamma < 3, and beta > 2 unless there is a
        cut-off (Phi vanishes at infinity). Where a prior reaches beyond, Phi is NaN.
    q
        Axis ratio of the surfaces of equal density, z over R; the number 1 makes a sphere.
    r_cut
        Cut-off radius in kpc, at most 1e4 r_s; None: none.
    l_max
        Largest degree of the multipoles, even; none but 0 for a sphere.

    References
    ----------
    Zhao (1996), MNRAS 278, 488, equation 1 with alpha = 1; McMillan (2017), MNRAS 465, 76, equations 1 and 5.

    Examples
    --------
    >>> halo = DoublePowerLaw(rho_0=8.5e6, r_s=19.6, gamma=1.0, beta=3.0, q=0.8)
    >>> round(halo.circular_speed(8.2).item(), 2)  # km/s
    142.3
    """

    elementwise = False

    @takes(rho_0="density", r_s="length", gamma="number", beta="number", q="number", r_cut="length")
    def __init__(
        self,
        rho_0: Value,
        r_s: Value,
        gamma: Value,
        beta: Value,
        q: Value = 1.0,
        r_cut: Value | None = None,
        l_max: int = 16,
    ) -> None:
        super().__init__()
        set_checked(self, "rho_0", rho_0)
        set_checked(self, "r_s", r_s)
        set_checked(self, "gamma", gamma, 0.0, 3.0, closed="[")
        set_checked(self, "beta", beta, 2.0 if r_cut is None else 0.0)
        set_checked(self, "q", q)
        self.is_cut = r_cut is not None
        if r_cut is not None:
            set_checked(self, "r_cut", r_cut)
            self._require_near_cut()
        self.symmetry: Symmetry = "spherical" if is_number_one(q) else "axisymmetric"
        self.l_max = 0 if self.symmetry == "spherical" else checked_degree(l_max)
        self.register_buffer("_s", grid(_FIRST, _LAST, self.l_max), persistent=False)

    def _require_near_cut(self) -> None:
        numbers = [self._buffers.get(name) for name in ("r_s", "r_cut")]
        if all(n is not None for n in numbers) and bool((self.r_cut > _FARTHEST_CUT * self.r_s).any()):
            raise ValueError(
                f"r_cut of DoublePowerLaw must be at most 1e4 r_s, got {self.r_cut.tolist():g} and r_s = "
                f"{self.r_s.tolist():g} kpc: leave it out, with beta > 2"
            )

    def phi(self, x: Tensor) -> Tensor:
        r_s, shape, ratio = self.r_s, (self.gamma, self.beta, self.q), None
        key: tuple[Tensor, ...] = shape
        if self.is_cut:
            r_cut = self.r_cut
            key, ratio = (*shape, r_s, r_cut), r_cut / r_s

        def build() -> MultipoleTable:
            density = functools.partial(_shape, *shape, ratio)
            return MultipoleTable.of_density(density, self._s, half_rule(2 * self.l_max + 16), self.l_max)

        r, mu = polar(x)
        table = self._kept_table(key, build)
        return 4 * math.pi * G * self.rho_0 * r_s**2 * table.phi((r / r_s).log(), mu)

    def density(self, x: Tensor) -> Tensor:
        r_s = self.r_s
        ratio = self.r_cut / r_s if self.is_cut else None
        R, z = cylindrical(x)
        return self.rho_0 * _shape(self.gamma, self.beta, self.q, ratio, R / r_s, z / r_s)


def _shape(gamma: Tensor, beta: Tensor, q: Tensor, cut: Tensor | None, R: Tensor, z: Tensor) -> Tensor:
    """Return the density in units of rho_0 at R and z in units of r_s."""
    m2 = R**2 + (z / q) ** 2
    rho = torch.exp(-gamma / 2 * m2.log() + (gamma - beta) * torch.log1p(m2.sqrt()))
    return rho if cut is None else rho * torch.exp(-m2 / cut**2)


ANALYTIC["powerlawcutoff"] = PowerLawCutoff
