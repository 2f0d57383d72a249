"""How likely the stars are, given potential and density of orbits: steps D to H of the chain, and the model."""

from bayespot.likelihood.augmented import AugmentedDensity, Smoothing
from bayespot.likelihood.chain import AugmentedStars, Chain
from bayespot.likelihood.errors import MeasurementErrors
from bayespot.likelihood.gaiaunlimited import from_gaiaunlimited
from bayespot.likelihood.healpix import Healpix
from bayespot.likelihood.line_of_sight import LineOfSight
from bayespot.likelihood.model import SnapshotModel
from bayespot.likelihood.outliers import Background, Outliers
from bayespot.likelihood.selection import (
    Custom,
    GalacticLatitude,
    HeliocentricDistance,
    MagnitudeLimit,
    Rotated,
    SelectionFunction,
    SkyCone,
    SphericalShell,
)
from bayespot.likelihood.streams import Stream, UniformOrbits, stacked

__all__ = [
    "AugmentedDensity",
    "AugmentedStars",
    "Background",
    "Chain",
    "Custom",
    "GalacticLatitude",
    "Healpix",
    "HeliocentricDistance",
    "LineOfSight",
    "MagnitudeLimit",
    "MeasurementErrors",
    "Outliers",
    "Rotated",
    "SelectionFunction",
    "SkyCone",
    "Smoothing",
    "SnapshotModel",
    "SphericalShell",
    "Stream",
    "UniformOrbits",
    "from_gaiaunlimited",
    "stacked",
]
