"""The number of mixture components of f(J), chosen from the data by held-out likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayespot.df.base import DistributionFunction, LogFraction
from bayespot.pyro_modules import freeze

CANDIDATES = (1, 2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class ComponentChoice:
    """The chosen number and, per candidate, the held-out mean log-likelihood and its distance to the best.

    Rows of ``table``: ``n_components``, ``log_f`` (mean over held-out stars), ``below_best`` (its paired
    difference to the best candidate) and ``standard_error`` of that difference.
    """

    n_components: int
    table: list[dict[str, float]]


def choose_n_components(
    df: DistributionFunction,
    J: Tensor,
    seed: int,
    candidates: Sequence[int] = CANDIDATES,
    n_folds: int = 4,
    max_stars: int = 20_000,
    tick: Callable[[str], None] | None = None,
    log_z: LogFraction | None = None,
    joint: bool = False,
) -> ComponentChoice:
    """Choose the number of components by cross-validation at fixed actions.

    Every star's ln f is predicted by a fit to the other folds. The rule: the smallest number whose mean
    held-out log-likelihood is within one standard error, of the paired difference, of the best candidate's.
    Candidates are tried in increasing order until two in a row fail to improve on the best.

    Parameters
    ----------
    df
        Mixture whose kind and options are used.
    J : Float[Tensor, "n 3"]
        Actions in kpc km/s; a random ``max_stars`` of them are used.
    seed
        Seed of the folds and of the fits' starts.
    tick
        Called with a note after every candidate.
    log_z
        ln of the fraction of the population that was selected, as a function of f(J).
    joint
        Choose the best candidate itself, with priors near the data. For likelihoods with a selection or measurement
        errors, where a misfit of f(J) does not average out over the angles but moves the potential.
    """
    generator = torch.Generator().manual_seed(seed)
    J = J[torch.randperm(len(J), generator=generator)[:max_stars]]
    folds = torch.arange(len(J)) % n_folds
    scores: dict[int, Tensor] = {}
    worse = 0
    for k in sorted(candidates):
        if 7 * k * n_folds > len(J):
            break  # fewer stars in a fold than parameters: no fit to speak of
        scores[k] = _held_out(df, J, folds, n_folds, k, seed, log_z, joint)
        best = max(scores, key=lambda n: float(scores[n].mean()))
        worse = 0 if best == k else worse + 1
        if tick:
            tick(f"{k} components: ln f {float(scores[k].mean()):.4f}, best {best}")
        if worse == 2:
            break
    if not scores:
        return ComponentChoice(1, [])
    table = []
    for k, score in scores.items():
        difference = scores[best] - score
        error = float(difference.std() / len(J) ** 0.5) if k != best else 0.0
        table.append(
            {
                "n_components": float(k),
                "log_f": float(score.mean()),
                "below_best": float(difference.mean()),
                "standard_error": error,
            }
        )
    if joint:
        return ComponentChoice(best, table)
    chosen = next(int(row["n_components"]) for row in table if row["below_best"] <= row["standard_error"])
    return ComponentChoice(chosen, table)


def _held_out(
    df: DistributionFunction,
    J: Tensor,
    folds: Tensor,
    n_folds: int,
    k: int,
    seed: int,
    log_z: LogFraction | None,
    near_data: bool,
) -> Tensor:
    score = torch.empty(len(J), dtype=torch.float64)
    for fold in range(n_folds):
        held = folds == fold
        module = df.resolved(k, J[~held], near_data)
        values = module.fit_actions(J[~held], seed, max_iterations=60, log_z=log_z)
        with torch.no_grad():
            fixed = freeze(module, values)
            log_f = fixed.log_prob(J[held])
            if log_z is not None:
                log_f = log_f - log_z(fixed)
            score[held] = torch.where(torch.isfinite(log_f), log_f, -torch.inf)
    return score
