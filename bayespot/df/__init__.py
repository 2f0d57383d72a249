"""Densities of orbits f(J)."""

from bayespot.df.base import DistributionFunction
from bayespot.df.components import ComponentChoice, choose_n_components
from bayespot.df.distributions import ActionDistribution, SphericalActionDistribution
from bayespot.df.mixture import ActionMixture, SphericalMixture

__all__ = [
    "ActionDistribution",
    "ActionMixture",
    "ComponentChoice",
    "DistributionFunction",
    "SphericalActionDistribution",
    "SphericalMixture",
    "choose_n_components",
]
