"""Gravitational potentials: one abstract method, everything else by automatic differentiation."""

from bayespot.potential.analytic import (
    ANALYTIC,
    NFW,
    AnalyticPotential,
    AnalyticSphere,
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
from bayespot.potential.axial_fields import AXIAL_FIELDS, MERIDIONAL_FIELDS, axial_fields, meridional_fields
from bayespot.potential.axisymmetric import AxisymmetricNetwork
from bayespot.potential.base import Potential, radius
from bayespot.potential.callables import CallablePotential
from bayespot.potential.disc_profile import ExponentialDiscs
from bayespot.potential.discs import ExponentialDisc
from bayespot.potential.exchange import from_gala, from_galpy
from bayespot.potential.fields import RADIAL_FIELDS, Field, PlaneField, truth_field
from bayespot.potential.flattened import MiyamotoNagai, Satoh
from bayespot.potential.galaxies import McMillan17, MWPotential2014
from bayespot.potential.multipole import MultipoleExpansion
from bayespot.potential.neural import DirectNetwork, MassSlopeNetwork
from bayespot.potential.profile import RadialProfile
from bayespot.potential.spheroids import DoublePowerLaw, PowerLawCutoff
from bayespot.potential.symbolic import SymbolicPotential
from bayespot.potential.tabulated import TabulatedSphere

__all__ = [
    "ANALYTIC",
    "AXIAL_FIELDS",
    "MERIDIONAL_FIELDS",
    "NFW",
    "RADIAL_FIELDS",
    "AnalyticPotential",
    "AnalyticSphere",
    "AxisymmetricNetwork",
    "CallablePotential",
    "CoredPowerLaw",
    "DirectNetwork",
    "DoublePowerLaw",
    "ExponentialDisc",
    "ExponentialDiscs",
    "Field",
    "Hernquist",
    "Isochrone",
    "Jaffe",
    "Logarithmic",
    "MWPotential2014",
    "MassSlopeNetwork",
    "McMillan17",
    "MiyamotoNagai",
    "MultipoleExpansion",
    "PlaneField",
    "Plummer",
    "Potential",
    "PowerLaw",
    "PowerLawCutoff",
    "RadialProfile",
    "Satoh",
    "SumPotential",
    "SymbolicPotential",
    "TabulatedSphere",
    "axial_fields",
    "describe",
    "from_description",
    "from_gala",
    "from_galpy",
    "meridional_fields",
    "radius",
    "truth_field",
]
