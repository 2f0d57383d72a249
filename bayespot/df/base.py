"""The interface of a density of orbits f(J)."""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from bayespot.df.distributions import OrbitDistribution, OrbitSample
from bayespot.potential.base import Symmetry
from bayespot.pyro_modules import AbstractPyroModule
from bayespot.units import Declared, takes_tensors


class DistributionFunction(AbstractPyroModule, Declared, abc.ABC):
    """Density of orbits in action space, normalised to one star; it knows actions, never the potential.

    ``n_components`` is the number of mixture components, or None when the data shall choose it.
    """

    n_components: int | None
    #: ``"spherical"`` if f depends on J_r and L only, so that a sphere of such orbits has no preferred axis.
    symmetry: Symmetry = "axisymmetric"
    #: Whether its priors alone determine f, so that a catalogue may have fewer stars than f has parameters.
    regularised: bool = False
    #: Whether f describes the catalogue's stars at all; if not they must be bound and nothing else.
    proper: bool = True

    @takes_tensors(J="action")
    @abc.abstractmethod
    def log_prob(self, J: Tensor) -> Tensor:
        """Return ln f(J) in (kpc km/s)^-3 for J ``(*batch, 3)`` = (J_r, J_phi, J_z) in kpc km/s."""

    @abc.abstractmethod
    def sample(self, n: int, seed: int) -> Tensor:
        """Return n orbits J ``(n, 3)``."""

    @abc.abstractmethod
    def stratified(self, n: int, seed: int, n_spare: int = 0) -> OrbitSample:
        """Return n weighted orbits, differentiable in the parameters, with common random numbers."""

    @takes_tensors(J="action")
    @abc.abstractmethod
    def resolved(self, n_components: int, J: Tensor, near_data: bool = False) -> DistributionFunction:
        """Return the density with ``n_components`` components and priors scaled to the actions ``J``.

        ``near_data``: keep f(J) to the scales of the data. For catalogues with a selection or measurement errors, in
        which f(J) where no star is seen trades against the potential.
        """

    @takes_tensors(J="action")
    @abc.abstractmethod
    def fit_actions(
        self, J: Tensor, seed: int, max_iterations: int = 100, log_z: LogFraction | None = None
    ) -> dict[str, Tensor]:
        """Return the sites' values of highest posterior for fixed actions ``J (n, 3)``.

        ``log_z`` is ln of the fraction of the population that was selected, as a function of f(J).
        """

    @takes_tensors(J="action")
    def forward(self, J: Tensor) -> Tensor:
        """Evaluate `log_prob`; called as ``df(J)`` every sample site is drawn once."""
        return self.log_prob(J)


class DistributionDensity(DistributionFunction, abc.ABC):
    """A density of orbits that is a torch Distribution at the current values of its parameters."""

    @abc.abstractmethod
    def distribution(self) -> OrbitDistribution:
        """Return f(J) as a torch Distribution."""

    def log_prob(self, J: Tensor) -> Tensor:
        return self.distribution().log_prob(J)

    def sample(self, n: int, seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.distribution().sample(torch.Size([n]))

    def stratified(self, n: int, seed: int, n_spare: int = 0) -> OrbitSample:
        return self.distribution().stratified(n, seed, n_spare)


#: ln of the fraction of a population that a selection keeps, as a function of f(J) in a fixed potential.
LogFraction = Callable[[DistributionFunction], Tensor]
