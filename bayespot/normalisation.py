r"""The fraction of a population that a selection keeps, :math:`Z = \int f(J(w))/(2\pi)^3\, S(w)\, d^6w`.

Two estimators over augmented stars with common random numbers. `pathwise_log_z` moves the stars with the
parameters and needs a smooth S. `FixedPoints` keeps the stars where the population had them at reference parameters
and re-weights them by the ratio of closed-form densities: S is evaluated once and never differentiated, so
hard edges are as good as smooth ones, and a step of the fit costs no inverse map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayespot.actions.base import ActionFinder
from bayespot.chain import Chain, rotate
from bayespot.df.base import LogFraction
from bayespot.df.distributions import uniform_points
from bayespot.potential.base import Potential
from bayespot.selection import SelectionFunction

#: Fraction of the points that cover all bound orbits.
_COVER = 0.2

Scatter = Callable[[Tensor, int], Tensor]


def pathwise_log_z(chain: Chain, selection: SelectionFunction, n: int, seed: int, n_rotations: int = 1) -> Tensor:
    """Return ln Z by the chain, its gradient through the stars' paths.

    Parameters
    ----------
    chain
        The population; derivatives are with respect to its parameters.
    selection
        A smooth selection function.
    n, seed
        Augmented stars and their random numbers.
    n_rotations
        Rotations of each star, from the population's symmetry, over which S is averaged.

    Raises
    ------
    ValueError
        If S has hard edges: its pathwise derivative misses the stars that cross them.
    """
    if not selection.smooth:
        raise ValueError(
            f"{selection} has hard edges, through which no path derivative goes; use FixedPoints, or pass "
            "smooth=True if it is differentiable"
        )
    stars = chain.augment(n, seed)
    s = (
        selection(stars.w)
        if n_rotations == 1
        else selection(rotate(stars.w, chain.symmetry, n_rotations, seed)).mean(0)
    )
    return (stars.weight * s).sum().log()


@dataclass(frozen=True, eq=False)
class Tilt:
    r"""A correction of ln Z, linear in the values of a model's sites about ``centre``; see `bayespot.tilting`.

    It levels off at ``bound``, far from the centre, :math:`b \tanh(t/b)`: a linear term alone would reward a fit for
    running away along a direction that the data leave nearly free.
    """

    centre: dict[str, Tensor]
    slope: dict[str, Tensor]
    bound: float

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the correction at ``values`` of all sites."""
        parts = [(slope * (values[name] - self.centre[name])).sum() for name, slope in self.slope.items()]
        return self.bound * torch.tanh(torch.stack(parts).sum() / self.bound)


@dataclass(frozen=True, eq=False)
class FixedPoints:
    r"""Stars of a reference population and the probability that each is selected.

    :math:`Z = \sum_j q_j \rho_j \bar S_j`, with q the weights and rho the ratio of the density to the reference
    density. Dividing by :math:`\sum_j q_j \rho_j`, whose expectation is one, would lessen the noise where S is
    near one, but a fit can then raise its likelihood without bound: a component of f(J) that moves onto a few points
    which are not selected inflates that sum.

    Parameters
    ----------
    w : Float[Tensor, "n 6"]
        Augmented stars at the reference parameters, those with S > 0.
    log_weight : Float[Tensor, "n"]
        Logarithm of weight over the density that the points were drawn from.
    log_reference : Float[Tensor, "n"]
        Logarithm of the density at the reference parameters; minus infinity where unbound.
    accepted : Float[Tensor, "n"]
        S, averaged over rotations that leave the population unchanged and over measurement errors.
    """

    w: Tensor
    log_weight: Tensor
    log_reference: Tensor
    accepted: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        chain: Chain,
        selection: SelectionFunction,
        n: int,
        seed: int,
        r_range: tuple[float, float],
        n_rotations: int = 16,
        scatter: Scatter | None = None,
    ) -> FixedPoints:
        """Draw about n points, most from the population ``chain`` and a fifth from all bound orbits.

        The latter, uniform in ln r over ``r_range`` and in velocity up to escape, are what a fit cannot run
        away from: with the former alone it finds populations that have no points where they are selected, whose Z
        would come out too small.

        Parameters
        ----------
        chain, selection
            Population at the reference parameters, and S.
        n, seed
            Number of points and seed.
        r_range
            Radii (kpc) that all bound orbits are covered over.
        n_rotations
            Rotations per star over which S is averaged.
        scatter
            Maps (true w, seed) to observed w, when S applies to what was observed.
        """
        seed = seed * 7919
        n = max(n, 64)
        k = max(int(_COVER * n), 16)
        stars = chain.augment(n - k, seed)
        w = torch.cat([stars.w, _all_orbits(chain.potential, k, seed, r_range)])
        log_density = chain.log_density(w)
        # the balance heuristic: every point has the density of the mixture that all were drawn from
        share = k / (len(stars.w) + k)
        cover = _log_all_orbits(chain.potential, w, r_range)
        log_g = torch.logaddexp(log_density + math.log(1 - share), cover + math.log(share))
        q = torch.cat([(1 - share) * stars.weight, torch.full((k,), share / k).double()])
        log_weight = q.log() - log_g
        s = torch.zeros(len(w), dtype=torch.float64)
        for i, one in enumerate(rotate(w, chain.symmetry, n_rotations, seed)):
            s += selection(one if scatter is None else scatter(one, seed * 997 + i)) / n_rotations
        good = torch.isfinite(log_g) & (s > 0)
        if not bool(good.any()):
            raise ValueError(f"{selection} keeps 0 of {n} stars of the population: check its limits and observer")
        return cls(*(x[good] for x in (w, log_weight, log_density, s)))

    def log_z(self, log_prob: Tensor) -> Tensor:
        """Return ln Z from ln p of the points ``(n,)``."""
        return torch.logsumexp(self.log_weight + log_prob + self.accepted.log(), 0)

    def in_actions(self, potential: Potential, finder: ActionFinder) -> LogFraction:
        """Return ln Z as a function of f(J) alone: the points' actions in a fixed potential are computed once."""
        with torch.no_grad():
            J, excess = finder.capped_actions(potential, self.w)
            bound = excess == 0
            J, log_weight = J[bound], (self.log_weight + self.accepted.log())[bound] - 3 * math.log(2 * math.pi)
        return lambda df: torch.logsumexp(log_weight + df.log_prob(J), 0)

    @torch.no_grad()
    def effective_fraction(self, log_prob: Tensor) -> float:
        """Return the effective over the true number of points after re-weighting; 1 at the reference parameters."""
        bound = torch.isfinite(self.log_reference)
        log_q = (self.log_weight + self.log_reference + self.accepted.log())[bound]
        log_ratio = (log_prob - self.log_reference)[bound]
        first, second = (torch.logsumexp(log_q + k * log_ratio, 0) for k in (1, 2))
        return float((2 * first - second - torch.logsumexp(log_q, 0)).exp())


def _speed_limit(potential: Potential, r: Tensor) -> Tensor:
    """Return 1.2 times the escape speed, to 10^9 radii: potentials nearby may bind faster stars."""
    zero = torch.zeros_like(r)
    far = potential.phi((1e9 * r.max() * r.new_tensor([1.0, 0.0, 0.0]))[None])
    return 1.2 * (2 * (far - potential.phi(torch.stack([r, zero, zero], -1)))).sqrt()


def _all_orbits(potential: Potential, n: int, seed: int, r_range: tuple[float, float]) -> Tensor:
    """Return stars (n, 6) uniform in ln r, direction, and velocity up to the speed limit."""
    u = uniform_points(n, 6, seed + 500_009)
    low, high = r_range
    r = low * (high / low) ** u[:, 0]
    speed = _speed_limit(potential, r) * u[:, 1] ** (1 / 3)
    x, v = (size[:, None] * _directions(u[:, i : i + 2]) for size, i in ((r, 2), (speed, 4)))
    return torch.cat([x, v], -1)


def _log_all_orbits(potential: Potential, w: Tensor, r_range: tuple[float, float]) -> Tensor:
    r, speed = (torch.linalg.vector_norm(part, dim=-1) for part in (w[:, :3], w[:, 3:]))
    limit = _speed_limit(potential, r)
    low, high = r_range
    log_g = -3 * r.log() - math.log(4 * math.pi * math.log(high / low)) - 3 * limit.log() + math.log(3 / 4 / math.pi)
    return torch.where((r >= low) & (r <= high) & (speed <= limit), log_g, -torch.inf)


def _directions(u: Tensor) -> Tensor:
    """Return unit vectors (n, 3) from uniforms (n, 2)."""
    z, angle = 2 * u[:, 0] - 1, 2 * math.pi * u[:, 1]
    R = (1 - z**2).sqrt()
    return torch.stack([R * angle.cos(), R * angle.sin(), z], -1)
