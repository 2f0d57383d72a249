"""Gravitational potentials: analytic, neural, and sums of them."""

from bayespot.potential.analytic import (
    ANALYTIC,
    NFW,
    AnalyticPotential,
    CoredPowerLaw,
    Hernquist,
    Isochrone,
    Jaffe,
    Logarithmic,
    Plummer,
    PowerLaw,
    SumPotential,
    describe,
    from_description,
)
from bayespot.potential.base import Potential
from bayespot.potential.neural import DirectNetwork, MassSlopeNetwork
from bayespot.potential.profile import RadialProfile

__all__ = [
    "ANALYTIC",
    "NFW",
    "AnalyticPotential",
    "CoredPowerLaw",
    "DirectNetwork",
    "Hernquist",
    "Isochrone",
    "Jaffe",
    "Logarithmic",
    "MassSlopeNetwork",
    "Plummer",
    "Potential",
    "PowerLaw",
    "RadialProfile",
    "SumPotential",
    "describe",
    "from_description",
]
