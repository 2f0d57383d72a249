"""Models of the Milky Way by name, as published."""

from __future__ import annotations

import math

import torch

from bayespot.potential.analytic import NFW
from bayespot.potential.base import SumPotential
from bayespot.potential.discs import ExponentialDisc
from bayespot.potential.flattened import MiyamotoNagai
from bayespot.potential.spheroids import DoublePowerLaw, PowerLawCutoff
from bayespot.units import G


def MWPotential2014() -> SumPotential:
    r"""Return the Milky Way of Bovy (2015): bulge, Miyamoto-Nagai disc and NFW halo.

    The three give 5, 60 and 35 % of :math:`v_c^2 = (220\,\mathrm{km/s})^2` in the plane at 8 kpc; the members are in
    this order.

    References
    ----------
    Bovy (2015), ApJS 216, 29, table 1: bulge gamma = 1.8, r_c = 1.9 kpc; disc a = 3 kpc, b = 280 pc; halo r_s = 16 kpc.

    Examples
    --------
    >>> round(MWPotential2014().circular_speed(8.0).item(), 9)
    220.0
    """
    R, v2 = 8.0, 220.0**2
    gamma, r_c, a, b, r_s = 1.8, 1.9, 3.0, 0.28, 16.0
    one = torch.ones((), dtype=torch.float64)
    within = float(torch.special.gammainc((3 - gamma) / 2 * one, (R / r_c) ** 2 * one))
    bulge = 0.05 * v2 * R / G / within
    disc = 0.60 * v2 * (R**2 + (a + b) ** 2) ** 1.5 / (G * R**2)
    halo = 0.35 * v2 * R / G / (math.log1p(R / r_s) - R / (R + r_s))
    return SumPotential([PowerLawCutoff(bulge, r_c, gamma), MiyamotoNagai(disc, a, b), NFW(halo, r_s)])


def McMillan17(l_max: int = 32) -> SumPotential:
    r"""Return the best-fitting Milky Way of McMillan (2017), whose v_c at the Sun, R = 8.21 kpc, is 233.1 km/s.

    Members: bulge (`DoublePowerLaw`, q = 0.5), dark halo (`NFW`), thin and thick stellar discs and the gas discs of HI
    and H2 (`ExponentialDisc`), in this order.

    Parameters
    ----------
    l_max
        Largest degree of the multipoles of bulge and discs. Relative errors of the force at 400 places with
        0.3 < R < 50 kpc, most of them near the plane, against 64 (median, 95 %, largest): 0.02, 0.25, 0.45 % at 8;
        0.002, 0.06, 0.1 % at 16; 0.0003, 0.007, 0.02 % at 32.

    References
    ----------
    McMillan (2017), MNRAS 465, 76: equations 1, 3, 4 and 5, table 1 (gas discs), section 2 (shape of the bulge, heights
    of the stellar discs) and table 3 (best-fitting model, here to the digits of the file ``PJM17_best.Tpot`` of the
    author's GalPot: with the table's three digits v_c is 233.2 km/s).

    Examples
    --------
    >>> round(McMillan17().circular_speed(8.21).item(), 1)
    233.1
    """
    rho_h, r_h = 8.53702e6, 19.5725
    return SumPotential(
        [
            DoublePowerLaw(9.8351e10, 0.075, 0.0, 1.8, q=0.5, r_cut=2.1, l_max=l_max),
            NFW(4 * math.pi * rho_h * r_h**3, r_h),
            ExponentialDisc(8.95679e8, 2.49955, 0.3, l_max=l_max),
            ExponentialDisc(1.83444e8, 3.02134, 0.9, l_max=l_max),
            ExponentialDisc(5.31319e7, 7.0, 0.085, r_hole=4.0, vertical="sech2", l_max=l_max),
            ExponentialDisc(2.17995e9, 1.5, 0.045, r_hole=12.0, vertical="sech2", l_max=l_max),
        ]
    )
