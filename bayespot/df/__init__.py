"""Densities of orbits f(J)."""

from collections.abc import Callable
from typing import Literal

from bayespot.df.axisymmetric import AxisymmetricActionDistribution, AxisymmetricMixture
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
#: Densities of the actions (J_r, J_phi, J_z), for flattened potentials, by the same names.
AXISYMMETRIC_DENSITIES: dict[str, Callable[[], DistributionFunction]] = {
    "mixture": AxisymmetricMixture,
    "gaussian": lambda: ChartGaussians(flattened=True),
    "flow": lambda: FlowDensity(flattened=True),
    "diffusion": lambda: DiffusionDensity(flattened=True),
    "energy": lambda: EnergyDensity(flattened=True),
    "logistic_gp": lambda: LogisticGaussianProcess(flattened=True),
}


def density(name: DensityName, rotation: bool = False, flattened: bool = False) -> DistributionFunction:
    """Return an unfitted density of orbits by name.

    Parameters
    ----------
    name
        One of `DENSITIES`.
    rotation
        Let f(J) depend on cos i.
    flattened
        The stars are in a flattened potential: f(J) of all three actions, with rotation.

    Raises
    ------
    ValueError
        If the name is unknown, or there is no such density for a flattened potential.

    Examples
    --------
    >>> type(density("mixture", flattened=True)).__name__
    'AxisymmetricMixture'
    """
    if name not in DENSITIES:
        raise ValueError(f"unknown density {name!r}; choose one of {', '.join(DENSITIES)}")
    if not flattened:
        return DENSITIES[name](rotation=rotation)
    if name not in AXISYMMETRIC_DENSITIES:
        raise ValueError(
            f"the density {name!r} knows (J_r, L, cos i) only and cannot follow a disc; for a flattened potential "
            f"choose one of {', '.join(AXISYMMETRIC_DENSITIES)}"
        )
    return AXISYMMETRIC_DENSITIES[name]()


__all__ = [
    "AXISYMMETRIC_DENSITIES",
    "DENSITIES",
    "ActionChart",
    "ActionDistribution",
    "ActionMixture",
    "AxisymmetricActionDistribution",
    "AxisymmetricMixture",
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
