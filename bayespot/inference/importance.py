"""Adaptive importance sampling: draws of a density of some tens of dimensions that is not far from a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: Draws of a round per dimension, fewest and most of them; fewest and most rounds.
_PER_ROUND, _SMALLEST, _LARGEST = 10, 40, 100
_LEAST_ROUNDS, MOST_ROUNDS = 3, 10
#: Degrees of freedom of a proposal, and by how much its covariance exceeds that of the weighted draws: weights are
#: large where it is too low.
_DEGREES, _WIDER = 5, 1.3
#: Effective draws, per dimension, that its mean and covariance are taken from; where there are fewer the weights are
#: flattened.
_PER_DIMENSION = 4
#: Flattest power of the weights.
_FLATTEST = 0.05


class Proposal(NamedTuple):
    """A multivariate Student's t."""

    mean: Tensor
    root: Tensor

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n draws ``(n, d)``."""
        z = torch.randn(n, len(self.mean), generator=generator, dtype=self.mean.dtype)
        chi_square = (torch.randn(n, _DEGREES, generator=generator, dtype=z.dtype) ** 2).sum(-1, keepdim=True)
        return self.mean + z @ self.root.T * (_DEGREES / chi_square).sqrt()

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density ``(n,)`` at x ``(n, d)``."""
        d = len(self.mean)
        z = torch.linalg.solve_triangular(self.root, (x - self.mean).T, upper=False)
        norm = math.lgamma((_DEGREES + d) / 2) - math.lgamma(_DEGREES / 2) - d / 2 * math.log(_DEGREES * math.pi)
        spread = self.root.diagonal().log().sum()
        return norm - spread - (_DEGREES + d) / 2 * torch.log1p((z**2).sum(0) / _DEGREES)


class Weighted(NamedTuple):
    """Draws ``(n, d)``, their log-density under the mixture of all proposals, and that of the target."""

    x: Tensor
    log_q: Tensor
    log_p: Tensor


def adaptive_importance(
    log_p: Callable[[Tensor], float],
    mean: Tensor,
    covariance: Tensor,
    wanted: float,
    seed: int,
    tick: Callable[[str], None],
) -> Weighted:
    """Draw from proposals that follow the weighted draws so far, until these are ``wanted`` effective ones.

    All draws of all rounds count, weighted as if they came from the mixture of all proposals (Cornuet, Marin, Mira &
    Robert 2012, Scandinavian Journal of Statistics 39, 798, algorithm 1).

    Parameters
    ----------
    log_p
        Log of the target at one place ``(d,)``, up to a constant; minus infinity where there is none.
    mean, covariance : Float[Tensor, "d"], Float[Tensor, "d d"]
        Of the first proposal.
    wanted
        Effective number of draws, see `effective`.
    seed
        Of the draws.
    tick
        Called with a note after each evaluation of ``log_p``.
    """
    generator = torch.Generator().manual_seed(seed)
    proposals: list[Proposal] = []
    x, values = mean.new_zeros(0, len(mean)), mean.new_zeros(0)
    note = ""
    while True:
        proposals.append(Proposal(mean, torch.linalg.cholesky(_WIDER * covariance)))
        found = []
        new = proposals[-1].sample(n_in_round(len(mean)), generator)
        for one in new:
            value = log_p(one)
            found.append(value if math.isfinite(value) else -math.inf)
            tick(note)
        x, values = torch.cat([x, new]), torch.cat([values, mean.new_tensor(found)])
        if not bool(torch.isfinite(values).any()):
            raise ValueError(f"no draw about the maximum has a finite log posterior (of {len(values)})")
        log_q = torch.stack([one.log_prob(x) for one in proposals]).logsumexp(0) - math.log(len(proposals))
        enough = effective(values - log_q)
        note = f"{enough:.0f} effective draws of {len(x)}"
        done = len(proposals)
        if done >= MOST_ROUNDS or (done >= _LEAST_ROUNDS and enough >= wanted):
            return Weighted(x, log_q, values)
        mean, covariance = _moments(x, values - log_q, covariance)


def n_in_round(d: int) -> int:
    """Return how many draws of d dimensions a round has."""
    return min(_LARGEST, max(_SMALLEST, _PER_ROUND * d))


def effective(log_weights: Tensor) -> float:
    """Return the effective number of draws, (sum of weights)^2 over the sum of their squares."""
    return float(1 / (torch.softmax(log_weights, 0) ** 2).sum())


def _moments(x: Tensor, log_weights: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of weighted draws, flattened so far that enough of them count."""
    d, power = x.shape[1], 1.0
    while effective(power * log_weights) < _PER_DIMENSION * d and power > _FLATTEST:
        power *= 0.9
    weight = torch.softmax(power * log_weights, 0)
    mean = weight @ x
    centred = x - mean
    covariance = (weight[:, None] * centred).T @ centred
    # few draws leave directions out: some of what was there before stays
    share = d / (d + effective(power * log_weights))
    return mean, (1 - share) * covariance + share * before


__all__ = ["MOST_ROUNDS", "Proposal", "Weighted", "adaptive_importance", "effective", "n_in_round"]
