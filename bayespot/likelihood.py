"""The likelihood of observed stars given a potential and a density of orbits."""

from __future__ import annotations

import math
from typing import Any

from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from bayespot.actions.base import ActionFinder
from bayespot.df.base import DistributionFunction
from bayespot.potential.base import Potential

#: Log-density lost per unit of excess energy (in units of the local escape energy) by an unbound star.
UNBOUND_STEEPNESS = 300.0


class PhaseMixed(TorchDistribution):
    r"""Density of a phase-mixed population in phase space, the ``jeans`` likelihood.

    .. math:: p(w) = f(J(w)) / (2\pi)^3

    (theta, J) are canonical, so there is no Jacobian and the normalisation does not depend on the potential.
    An unbound star has no actions; it gets the density of the orbit capped just below escape, lowered by
    `UNBOUND_STEEPNESS` times its excess energy: finite, continuous and steep, so that an optimiser recovers.

    Parameters
    ----------
    potential, finder, df
        Potential, its action finder, and the density of orbits f(J) in (kpc km/s)^-3.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, potential: Potential, finder: ActionFinder, df: DistributionFunction) -> None:
        self.potential, self.finder, self.df = potential, finder, df
        super().__init__(Size(), Size([6]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln p(w) in (kpc km/s)^-3 for ``value`` ``(*batch, 6)`` in kpc and km/s."""
        J, excess = self.finder.capped_actions(self.potential, value)
        return self.df.log_prob(J) - 3 * math.log(2 * math.pi) - UNBOUND_STEEPNESS * excess

    def expand(self, batch_shape: Any, _instance: Any = None) -> PhaseMixed:
        """Return self: stars are the batch, and they come with the value."""
        return self
