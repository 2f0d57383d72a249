"""The list: classes and functions whose names a stored description may contain, and nothing else.

An object of one of these classes is made without calling its constructor and given the attributes that were stored,
so that reading a file of somebody else's runs no code of theirs. A new class of a model goes on this list by name
(a test finds those that are missing), unless it computes with text or code that it holds.
"""

from __future__ import annotations

import importlib
from typing import Any

from bayespot.storage.errors import StorageError

#: Classes by module.
CLASSES: dict[str, tuple[str, ...]] = {
    "bayespot.potential.analytic": (
        "CoredPowerLaw", "Hernquist", "Isochrone", "Jaffe", "Logarithmic", "NFW", "Plummer", "PowerLaw",
    ),
    "bayespot.potential.axisymmetric": ("AxisymmetricNetwork",),
    "bayespot.potential.base": ("SumPotential",),
    "bayespot.potential.callables": ("CallablePotential",),
    "bayespot.potential.disc_profile": ("ExponentialDiscs",),
    "bayespot.potential.discs": ("ExponentialDisc",),
    "bayespot.potential.flattened": ("MiyamotoNagai", "Satoh"),
    "bayespot.potential.multipole": ("MultipoleExpansion",),
    "bayespot.potential.neural": ("DirectNetwork", "MassSlopeNetwork"),
    "bayespot.potential.profile": ("RadialProfile",),
    "bayespot.potential.spheroids": ("DoublePowerLaw", "PowerLawCutoff"),
    "bayespot.potential.symbolic": ("SymbolicPotential",),
    "bayespot.potential.tabulated": ("TabulatedSphere",),
    "bayespot.actions.focal": ("FocalTable",),
    "bayespot.actions.genfunc": ("GeneratingFunctionActions",),
    "bayespot.actions.isochrone": ("IsochroneActions",),
    "bayespot.actions.spherical": ("SphericalActions",),
    "bayespot.actions.staeckel": ("StaeckelFudge",),
    "bayespot.df.axisymmetric": ("AxisymmetricMixture",),
    "bayespot.df.chart": ("ActionChart",),
    "bayespot.df.diffusion": ("DiffusionDensity", "ScoreNetwork"),
    "bayespot.df.energy": ("EnergyDensity", "EnergyNetwork"),
    "bayespot.df.flow": ("FlowDensity", "SplineFlow"),
    "bayespot.df.gaussian": ("ChartGaussians", "LogActionGaussians"),
    "bayespot.df.logistic_gp": ("LegendreBasis", "LogisticGaussianProcess"),
    "bayespot.df.mixture": ("ActionMixture", "SitePrior", "SphericalMixture"),
    "bayespot.df.tabulated": ("TabulatedDistribution",),
    "bayespot.df.trained": ("TrainedState",),
    "bayespot.df.training": ("History", "TrainingConfig"),
    "bayespot.likelihood.augmented": ("Smoothing",),
    "bayespot.likelihood.errors": ("MeasurementErrors",),
    "bayespot.likelihood.line_of_sight": ("BackgroundAlongLine", "LineOfSight"),
    "bayespot.likelihood.outliers": ("Background", "Outliers"),
    "bayespot.likelihood.model": ("SnapshotModel",),
    "bayespot.likelihood.healpix": ("Healpix", "TabulationError"),
    "bayespot.likelihood.normalisation": ("FixedPoints",),
    "bayespot.likelihood.selection": (
        "Custom", "GalacticLatitude", "HeliocentricDistance", "MagnitudeLimit", "Product", "Rotated", "SkyCone",
        "SphericalShell",
    ),
    "bayespot.likelihood.streams": ("Stream", "Streams", "UniformOrbits"),
    "bayespot.inference.alternating": ("Round",),
    "bayespot.inference.result": ("Diagnostics", "FitConfig", "FitResult"),
    "bayespot.inference.samplers": ("Chain",),
    "pyro.nn.module": ("PyroModuleList",),
    "torch.nn.modules.activation": ("GELU", "ReLU", "SiLU", "Sigmoid", "Softplus", "Tanh"),
    "torch.nn.modules.container": ("ModuleList", "Sequential"),
    "torch.nn.modules.linear": ("Identity", "Linear"),
}  # fmt: skip
#: Functions by module.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "torch": ("cos", "exp", "relu", "sigmoid", "sin", "tanh"),
    "torch.nn.functional": ("elu", "gelu", "silu", "softplus"),
}


def name_of(thing: Any) -> str:
    """Return ``module:qualified name`` of a class or function."""
    return f"{thing.__module__}:{thing.__qualname__}"


def is_listed(cls: type) -> bool:
    """Whether objects of this class are stored by the list."""
    return cls.__qualname__ in CLASSES.get(cls.__module__, ())


def is_listed_function(function: Any) -> bool:
    """Whether a function is on the list."""
    return getattr(function, "__qualname__", "") in FUNCTIONS.get(str(getattr(function, "__module__", "")), ())


def listed(name: str, table: dict[str, tuple[str, ...]] | None = None) -> Any:
    """Return the class, or with `FUNCTIONS` the function, of a name.

    Raises
    ------
    StorageError
        If the name is not on the list.
    """
    table = CLASSES if table is None else table
    module, _, attribute = str(name).partition(":")
    if attribute not in table.get(module, ()):
        kind = "class" if table is CLASSES else "function"
        raise StorageError(f"the {kind} {name!r} is not one that a stored model may name: it was changed, or is newer")
    return getattr(importlib.import_module(module), attribute)
