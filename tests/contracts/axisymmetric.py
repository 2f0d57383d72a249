"""Axisymmetric potentials that tests compare with: one of Staeckel's form, written out, and a galaxy with a disc."""

from __future__ import annotations

import torch
from torch import Tensor

from bayespot.potential import NFW, Hernquist, MiyamotoNagai, SumPotential
from bayespot.potential.base import Potential
from bayespot.units import G


class KuzminKutuzov(Potential):
    r"""Phi = -G M / (sqrt(lambda) + sqrt(nu)), of Staeckel's form with Delta^2 = a^2 - c^2.

    Dejonghe & de Zeeuw (1988), ApJ 333, 90, equation 2; lambda + nu and lambda nu are polynomials in R^2 and z^2.
    """

    symmetry = "axisymmetric"

    def __init__(self, m_tot, a, c):
        super().__init__()
        self.m_tot, self.a, self.c = m_tot, a, c

    def phi(self, x: Tensor) -> Tensor:
        R2, z2 = x[..., 0] ** 2 + x[..., 1] ** 2, x[..., 2] ** 2
        a2, c2 = self.a**2, self.c**2
        product = a2 * c2 + R2 * c2 + z2 * a2
        return -G * self.m_tot / (R2 + z2 + a2 + c2 + 2 * product.sqrt()).sqrt()


def milky_way(disc: float | Tensor = 6e10, bulge: float | Tensor = 1e10, halo: float | Tensor = 8e11) -> Potential:
    """Return a disc (a = 3, b = 0.28 kpc), a bulge and a halo of given masses (Msun)."""
    return SumPotential([MiyamotoNagai(disc, 3.0, 0.28), Hernquist(bulge, 0.5), NFW(halo, 16.0)])


def disc_stars(potential: Potential, n: int, seed: int) -> Tensor:
    """Return ``w (n, 6)`` at 4 to 12 kpc: 0.3 kpc high, dispersions 35, 25, 20 km/s about the circular speed."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2, n, generator=generator, dtype=torch.float64)
    z, v_R, v_phi, v_z = torch.randn(4, n, generator=generator, dtype=torch.float64)
    R, phi = 4 + 8 * uniform[0], 2 * torch.pi * uniform[1]
    v_R, v_phi, v_z = 35 * v_R, 25 * v_phi + potential.circular_speed(R).detach(), 20 * v_z
    cos, sin = phi.cos(), phi.sin()
    return torch.stack([R * cos, R * sin, 0.3 * z, v_R * cos - v_phi * sin, v_R * sin + v_phi * cos, v_z], -1)
