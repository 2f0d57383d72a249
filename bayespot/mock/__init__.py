"""Simulated stars whose truth is known: equilibria, samples from them, observations of them."""

from bayespot.mock.equilibrium import Equilibrium
from bayespot.mock.flattened import GALAXY_STARS, galaxy_mock, orbit_mock
from bayespot.mock.mixing import phase_mixed
from bayespot.mock.observe import observe
from bayespot.mock.orbits import DoublePowerLawOrbits, MixedOrbits, OrbitPopulation, QuasiIsothermalOrbits
from bayespot.mock.sample import MOCKS, MockSystem, equilibrium, mock, truth_potential

__all__ = [
    "GALAXY_STARS",
    "MOCKS",
    "DoublePowerLawOrbits",
    "Equilibrium",
    "MixedOrbits",
    "MockSystem",
    "OrbitPopulation",
    "QuasiIsothermalOrbits",
    "equilibrium",
    "galaxy_mock",
    "mock",
    "observe",
    "orbit_mock",
    "phase_mixed",
    "truth_potential",
]
