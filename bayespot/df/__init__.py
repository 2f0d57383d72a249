"""Densities of orbits f(J)."""

from collections.abc import Callable
from typing import Literal

from bayespot.df.base import DistributionFunction
from bayespot.df.chart import ActionChart
from bayespot.df.components import ComponentChoice, choose_n_components
from bayespot.df.diffusion import DiffusionDensity
from bayespot.df.distributions import (
    ActionDistribution,
    OrbitDistribution,
    OrbitSample,
    SphericalActionDistribution,
)
from bayespot.df.energy import EnergyDensity
from bayespot.df.flow import FlowDensity
from bayespot.df.gaussian import ChartGaussians, LogActionGaussians
from bayespot.df.logistic_gp import LogisticGaussianProcess
from bayespot.df.mixture import ActionMixture, SphericalMixture
from bayespot.df.tabulated import TabulatedDistribution
from bayespot.df.trained import TrainedDensity
from bayespot.df.training import TrainingConfig

DensityName = Literal["mixture", "gaussian", "gaussian_lnJ", "flow", "diffusion", "energy", "logistic_gp"]
#: Densities of the actions (J_r, L, cos i) by the name that `FitConfig` and the command line know them by.
DENSITIES: dict[str, Callable[..., DistributionFunction]] = {
    "mixture": SphericalMixture,
    "gaussian": ChartGaussians,
    "gaussian_lnJ": LogActionGaussians,
    "flow": FlowDensity,
    "diffusion": DiffusionDensity,
    "energy": EnergyDensity,
    "logistic_gp": LogisticGaussianProcess,
}


def density(name: DensityName, rotation: bool = False) -> DistributionFunction:
    """Return an unfitted density of orbits by name.

    Parameters
    ----------
    name
        One of `DENSITIES`.
    rotation
        Let f(J) depend on cos i.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name not in DENSITIES:
        raise ValueError(f"unknown density {name!r}; choose one of {', '.join(DENSITIES)}")
    return DENSITIES[name](rotation=rotation)


__all__ = [
    "DENSITIES",
    "ActionChart",
    "ActionDistribution",
    "ActionMixture",
    "ChartGaussians",
    "ComponentChoice",
    "DensityName",
    "DiffusionDensity",
    "DistributionFunction",
    "EnergyDensity",
    "FlowDensity",
    "LogActionGaussians",
    "LogisticGaussianProcess",
    "OrbitDistribution",
    "OrbitSample",
    "SphericalActionDistribution",
    "SphericalMixture",
    "TabulatedDistribution",
    "TrainedDensity",
    "TrainingConfig",
    "choose_n_components",
    "density",
]
