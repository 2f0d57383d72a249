"""Adaptive importance sampling: draws of a density of ten or so dimensions of which each value is dear."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.inference.proposals import Proposal, effective, flattened, learnable, log_mixture, rehearsed

#: Draws of a round per dimension, fewest and most of them; fewest and most rounds.
_PER_ROUND, _SMALLEST, _LARGEST = 10, 40, 100
_LEAST_ROUNDS, MOST_ROUNDS = 3, 10
#: By how much the covariance of a proposal exceeds that of the weighted draws: weights are large where it is too low.
_WIDER = 1.3
#: Effective draws, per dimension, that its mean and covariance are taken from; where there are fewer the weights are
#: flattened.
_PER_DIMENSION = 4


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
    most_rounds: int = MOST_ROUNDS,
) -> Weighted:
    """Draw from proposals that follow the draws so far, until these are ``wanted`` effective ones.

    In turn a proposal has the mean and covariance of the weighted draws, or is learned from the values at all of them
    (`rehearsed`), of which those of low weight tell as much as others: the latter reach where the target is wide, the
    former cost fewer draws where it is nearly a Gaussian. All draws of all rounds count, weighted as if they came from
    the mixture of all proposals (Cornuet, Marin, Mira & Robert 2012, Scandinavian Journal of Statistics 39, 798,
    algorithm 1).

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
    most_rounds
        Rounds after which it ends in any case.
    """
    generator = torch.Generator().manual_seed(seed)
    proposals: list[Proposal] = []
    x, values = mean.new_zeros(0, len(mean)), mean.new_zeros(0)
    note = ""
    while True:
        if len(proposals) % 2 and learnable(values, len(mean)):
            proposals.append(rehearsed(x, values, proposals, generator))
        else:
            proposals.append(Proposal.of(mean, _WIDER * covariance))
        found = []
        new = proposals[-1].sample(n_in_round(len(mean)), generator)
        for one in new:
            value = log_p(one)
            found.append(value if math.isfinite(value) else -math.inf)
            tick(note)
        x, values = torch.cat([x, new]), torch.cat([values, mean.new_tensor(found)])
        if not bool(torch.isfinite(values).any()):
            raise ValueError(f"no draw about the maximum has a finite log posterior (of {len(values)})")
        log_q = log_mixture([one.log_prob(x) for one in proposals])
        enough = effective(values - log_q)
        note = f"{enough:.0f} effective draws of {len(x)}"
        done = len(proposals)
        if done >= most_rounds or (done >= _LEAST_ROUNDS and enough >= wanted):
            return Weighted(x, log_q, values)
        mean, covariance = _moments(x, values - log_q, covariance)


def n_in_round(d: int) -> int:
    """Return how many draws of d dimensions a round has."""
    return min(_LARGEST, max(_SMALLEST, _PER_ROUND * d))


def _moments(x: Tensor, log_weights: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of weighted draws, flattened so far that enough of them count."""
    d = x.shape[1]
    log_weights = flattened(log_weights, _PER_DIMENSION * d)
    weight = torch.softmax(log_weights, 0)
    mean = weight @ x
    centred = x - mean
    covariance = (weight[:, None] * centred).T @ centred
    # few draws leave directions out: some of what was there before stays
    share = d / (d + effective(log_weights))
    return mean, (1 - share) * covariance + share * before


__all__ = ["MOST_ROUNDS", "Weighted", "adaptive_importance", "n_in_round"]
