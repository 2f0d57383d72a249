"""Simulated stars whose truth is known: equilibria, samples from them, observations of them."""

from bayespot.mock.equilibrium import Equilibrium
from bayespot.mock.observe import observe
from bayespot.mock.sample import MOCKS, MockSystem, equilibrium, mock, truth_potential

__all__ = ["MOCKS", "Equilibrium", "MockSystem", "equilibrium", "mock", "observe", "truth_potential"]
