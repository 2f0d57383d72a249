"""The number of mixture components of f(J), chosen from the data by held-out likelihood or by evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bayespot.callers_state import keeps_callers_state
from bayespot.df.base import DistributionFunction, LogFraction
from bayespot.df.mixture import ActionMixtureModule, SiteCoordinates
from bayespot.pyro_modules import freeze
from bayespot.units import takes_tensors

CANDIDATES = (1, 2, 3, 4, 6, 8, 12)
Criterion = Literal["held_out", "evidence"]


@dataclass(frozen=True)
class ComponentChoice:
    """The chosen number and, per candidate, the held-out mean log-likelihood and its distance to the best.

    Rows of ``table``: ``n_components``, ``log_f`` (mean over held-out stars), ``below_best`` (its paired
    difference to the best candidate) and ``standard_error`` of that difference; by evidence ``log_evidence`` of all
    stars and ``below_best``.
    """

    n_components: int
    table: list[dict[str, float]]


@takes_tensors(J="action")
@keeps_callers_state
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
    criterion: Criterion = "held_out",
) -> ComponentChoice:
    """Choose the number of components at fixed actions by cross-validation or by evidence.

    Held out: every star's ln f is predicted by a fit to the other folds. The rule: the smallest number whose mean
    held-out log-likelihood is within one standard error, of the paired difference, of the best candidate's.
    Evidence: the number with the highest `log_evidence`, which counts the prior as well.
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
    criterion
        ``"held_out"`` or ``"evidence"``; the latter for complete samples without errors only.

    Raises
    ------
    ValueError
        If the criterion is unknown, or evidence is asked for with a selection.
    """
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion must be one of {', '.join(get_args(Criterion))}; got {criterion!r}")
    if criterion == "evidence":
        if log_z is not None:
            raise ValueError("the evidence does not allow for a selection: use criterion='held_out'")
        return _by_evidence(df, J, seed, candidates, max_stars, tick)
    generator = torch.Generator().manual_seed(seed)
    J = J[torch.randperm(len(J), generator=generator)[:max_stars]]
    folds = torch.arange(len(J)) % n_folds
    scores: dict[int, Tensor] = {}

    def held_out(k: int) -> float:
        scores[k] = _held_out(df, J, folds, n_folds, k, seed, log_z, joint)
        return float(scores[k].mean())

    # fewer stars in a fold than parameters: no fit to speak of
    means = _tried([k for k in candidates if 7 * k * n_folds <= len(J)], held_out, "ln f", tick)
    if not means:
        return ComponentChoice(1, [])
    best = max(means, key=means.__getitem__)
    table = []
    for k, score in scores.items():
        difference = scores[best] - score
        error = float(difference.std() / len(J) ** 0.5) if k != best else 0.0
        table.append(
            {
                "n_components": float(k),
                "log_f": means[k],
                "below_best": float(difference.mean()),
                "standard_error": error,
            }
        )
    if joint:
        return ComponentChoice(best, table)
    chosen = next(int(row["n_components"]) for row in table if row["below_best"] <= row["standard_error"])
    return ComponentChoice(chosen, table)


def log_evidence(module: DistributionFunction, values: Mapping[str, Tensor], J: Tensor) -> float:
    r"""Return the Laplace approximation to ln p(J), the evidence of a mixture with its K components.

    .. math:: \ln p(J) \approx \ln p(J, \hat z) + \frac{d}{2} \ln 2\pi - \frac{1}{2} \ln\det H + \ln K!

    z are the sites in units of their priors, H the second derivatives of -ln p(J, z) at the maximum, and K! counts the
    maxima that differ by the order of the components (logistic-normal weights only). The prior contributes 1 to every
    eigenvalue of H; those that come out below 1, of components with hardly any weight, are set to 1.

    Parameters
    ----------
    module
        A resolved mixture.
    values
        Its sites at the maximum of their posterior, as `fit_actions` returns them.
    J : Float[Tensor, "n 3"]
        Actions in kpc km/s.

    References
    ----------
    Bishop (2006), Pattern Recognition and Machine Learning, section 4.4.1 and equation 10.2 on label switching.
    """
    if not isinstance(module, ActionMixtureModule):
        raise ValueError(f"{type(module).__name__} is no mixture and has no sites to integrate over")
    coordinates = SiteCoordinates(module)

    def minus_log_joint(z: Tensor) -> Tensor:
        return -coordinates.log_prior(z) - freeze(module, coordinates.values(z)).log_prob(J).sum()

    z = coordinates.whitened(coordinates.flat(values)).detach()
    H = torch.autograd.functional.hessian(minus_log_joint, z)
    eigenvalues = torch.linalg.eigvalsh((H + H.T) / 2).clamp(min=1.0)
    with torch.no_grad():
        peak = -float(minus_log_joint(z))
    volume = 0.5 * len(z) * math.log(2 * math.pi) - 0.5 * float(eigenvalues.log().sum())
    # sticks are broken in an order: their prior is no symmetric one, and only one maximum is counted
    exchangeable = module.weights_prior == "logistic_normal"
    return peak + volume + (math.lgamma((module.n_components or 1) + 1) if exchangeable else 0.0)


def _by_evidence(
    df: DistributionFunction,
    J: Tensor,
    seed: int,
    candidates: Sequence[int],
    max_stars: int,
    tick: Callable[[str], None] | None,
) -> ComponentChoice:
    J = J[torch.randperm(len(J), generator=torch.Generator().manual_seed(seed))[:max_stars]]

    def evidence(k: int) -> float:
        module = df.resolved(k, J)
        return log_evidence(module, module.fit_actions(J, seed), J)

    found = _tried([k for k in candidates if 7 * k <= len(J)], evidence, "ln evidence", tick)
    if not found:
        return ComponentChoice(1, [])
    best = max(found, key=found.__getitem__)
    table = [{"n_components": float(k), "log_evidence": v, "below_best": found[best] - v} for k, v in found.items()]
    return ComponentChoice(best, table)


def _tried(
    candidates: Sequence[int], score: Callable[[int], float], what: str, tick: Callable[[str], None] | None
) -> dict[int, float]:
    """Score candidates in increasing order until two in a row fail to improve on the best."""
    found: dict[int, float] = {}
    worse = 0
    for k in sorted(candidates):
        found[k] = score(k)
        best = max(found, key=found.__getitem__)
        worse = 0 if best == k else worse + 1
        if tick:
            tick(f"{k} components: {what} {found[k]:.4f}, best {best}")
        if worse == 2:
            break
    return found


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
