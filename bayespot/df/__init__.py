"""Densities of orbits f(J)."""

from bayespot.df.base import DistributionFunction
from bayespot.df.components import ComponentChoice, choose_n_components
from bayespot.df.distributions import ActionDistribution, OrbitSample, SphericalActionDistribution
from bayespot.df.mixture import ActionMixture, SphericalMixture

__all__ = [
    "ActionDistribution",
    "ActionMixture",
    "ComponentChoice",
    "DistributionFunction",
    "OrbitSample",
    "SphericalActionDistribution",
    "SphericalMixture",
    "choose_n_components",
]
