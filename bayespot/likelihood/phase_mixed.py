"""The likelihood of observed stars given a potential and a density of orbits."""

from __future__ import annotations

import abc
import copy
import math
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from bayespot.actions.base import ActionFinder
from bayespot.df.base import DistributionFunction
from bayespot.likelihood.normalisation import FixedPoints
from bayespot.potential.base import Potential
from bayespot.units import Declared, takes_tensors

#: Log-density lost per unit of excess energy (in units of the local escape energy) by an unbound star.
UNBOUND_STEEPNESS = 300.0


class StarDensity(Declared, TorchDistribution):
    """A density of w = (x, v) ``(*batch, 6)`` in (kpc km/s)^-3 as a Pyro distribution."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self) -> None:
        super().__init__(Size(), Size([6]), validate_args=False)

    @takes_tensors(value="phase_space")
    @abc.abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln p(w) in (kpc km/s)^-3 for ``value`` as the density takes it."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> StarDensity:
        """Return self: stars are the batch, and they come with the value."""
        return self

    def shared(self) -> Tensor | None:
        """Return what the densities of all stars share and need computing once, as a normalisation; None: nothing."""
        return None

    @takes_tensors(shared="internal")
    def sharing(self, shared: Tensor) -> StarDensity:
        """Return the density with what `shared` returned, of this one or of an equal one."""
        raise ValueError(f"a {type(self).__name__} shares nothing among stars")

    @takes_tensors(value="phase_space")
    def log_membership(self, value: Tensor) -> Tensor:
        """Return ln of the prior probability ``(*batch,)`` that stars are members, of those that are no outliers."""
        return value.new_zeros(())

    @takes_tensors(value="phase_space")
    def log_position(self, value: Tensor) -> Tensor:
        """Return ln of the density of positions alone, in kpc^-3, of stars ``value (*batch, 6)``.

        Raises
        ------
        ValueError
            If it is not known.
        """
        raise ValueError(
            f"a {type(self).__name__} does not know the density of its positions, which a conditional likelihood "
            "divides by: give it a method log_position(value), or fit with outliers=False (--no-outliers)"
        )


class PhaseMixed(StarDensity):
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

    def __init__(self, potential: Potential, finder: ActionFinder, df: DistributionFunction) -> None:
        self.potential, self.finder, self.df = potential, finder, df
        super().__init__()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln p(w) in (kpc km/s)^-3 for ``value`` ``(*batch, 6)`` in kpc and km/s."""
        J, excess = self.finder.capped_actions(self.potential, value)
        return self.df.log_prob(J) - 3 * math.log(2 * math.pi) - UNBOUND_STEEPNESS * excess


class ObservedStars(StarDensity):
    r"""Density of stars as they were observed: averaged over errors, divided by the fraction selected, with outliers.

    Parameters
    ----------
    density
        Density of the true w of members.
    points
        Points for the normalisation Z of a selection; None: every star is in the catalogue.
    background, fraction
        Density of outliers as they are selected, and their fraction of the catalogue; None: all stars are members.
    """

    def __init__(
        self,
        density: StarDensity,
        points: FixedPoints | None = None,
        background: StarDensity | None = None,
        fraction: Tensor | None = None,
    ) -> None:
        self.density, self.points, self.background, self.fraction = density, points, background, fraction
        super().__init__()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln p per star of ``(*batch, 6)``, or of ``(*batch, S, 7)``: S samples of w and their log-weights."""
        if self.background is None:
            return self._members(value)
        return torch.logaddexp(*self._parts(value))

    def outlier_probability(self, value: Tensor) -> Tensor:
        """Return the probability ``(*batch,)`` that each star is an outlier; zero without a background."""
        if self.background is None:
            return torch.zeros_like(self._members(value))
        members, outliers = self._parts(value)
        return torch.sigmoid(outliers - members)

    @cached_property
    def log_z(self) -> Tensor:
        """ln of the fraction of members that the selection keeps, 0 without one; the same for all stars."""
        if self.points is None:
            return torch.zeros((), dtype=torch.float64)
        return self.points.log_z(self.density.log_prob(self.points.w))

    def shared(self) -> Tensor | None:
        return self.density.shared() if self.points is None else self.log_z

    def sharing(self, shared: Tensor) -> ObservedStars:
        found = copy.copy(self)
        if self.points is None:
            found.density = self.density.sharing(shared)
        else:
            found.log_z = shared
        return found

    def _members(self, value: Tensor) -> Tensor:
        log_p = _mean_over_samples(self.density, value)
        return log_p if self.points is None else log_p - self.log_z

    def _parts(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the densities of members and of outliers, each with its share."""
        assert self.background is not None  # the callers looked
        assert self.fraction is not None  # it comes with a background
        outliers = _mean_over_samples(self.background, value)
        log_member = torch.log1p(-self.fraction) + self.density.log_membership(value)
        return self._members(value) + log_member, outliers + (-log_member.expm1()).log()


def _mean_over_samples(density: StarDensity, value: Tensor) -> Tensor:
    log_p = sample_log_weights(density, value)
    return torch.logsumexp(log_p, -1) - math.log(value.shape[-2]) if value.shape[-1] == 7 else log_p


def sample_log_weights(density: StarDensity, value: Tensor) -> Tensor:
    """Return ln p(w) of true coordinates, or the log of weight times density of each sample ``(*batch, S)``."""
    if value.shape[-1] == 6:
        return density.log_prob(value)
    return density.log_prob(value[..., :6]) + value[..., 6]


def effective_samples(density: StarDensity, value: Tensor) -> Tensor:
    """Return the effective number of error samples of each star of ``(n, S, 7)``, between 1 and S."""
    log_p = sample_log_weights(density, value)
    weight = torch.softmax(log_p, -1)
    return 1 / (weight**2).sum(-1)
