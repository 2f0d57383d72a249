r"""The fit with a trained f(J): train it at a fixed potential, maximise over the potential at fixed f(J), repeat.

At fixed coordinates a change of the potential moves the actions by an oscillation in angle, whose mean vanishes. So at
the true potential the expected score of the potential is zero for any f(J), and no block of the information mixes
the two: alternating maximisation converges at once but for noise, errors of f(J) do not move the potential to first
order, and the posterior of the potential at fixed f(J) is as wide as with f(J) free. What can go wrong is an f(J) that
remembers its stars: it holds the potential where it was trained. Early stopping on held-out stars prevents that.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bayespot.df.trained import TrainedDensity
from bayespot.inference.blocks import mapped
from bayespot.inference.latent import LatentSpace, whitening
from bayespot.inference.optimise import Report, lbfgs
from bayespot.inference.result import FitConfig
from bayespot.likelihood.model import SnapshotModel

#: The rounds end when one moves the potential by less than this, in posterior standard deviations per parameter.
SETTLED = 0.1
#: A potential that the last round moved by more than this is worth a warning.
UNSETTLED = 0.3
#: Most stars of the information matrix that whitens a round.
_FISHER_STARS = 25_000


@dataclass(frozen=True)
class Round:
    """What one round did: displacement of the potential, held-out mean ln q of f(J), seconds of either half.

    ``moved`` is the root mean square over the potential's parameters, whitened by their posterior.
    """

    moved: float
    held_out: float
    training_steps: int
    iterations: int
    training_seconds: float
    maximising_seconds: float


@dataclass(frozen=True)
class Alternation:
    """The state after a round: the model with f(J) as trained last, its latents ``u`` and the rounds so far."""

    model: SnapshotModel
    u: Tensor
    rounds: list[Round]

    @property
    def settled(self) -> bool:
        """Whether the last round hardly moved the potential."""
        return bool(self.rounds) and self.rounds[-1].moved < SETTLED


def require_plain(model: SnapshotModel) -> None:
    """Refuse likelihoods in which a trained f(J) would have to be trained on what is not known.

    Raises
    ------
    ValueError
        With a selection, measurement errors, the augmented or the conditional likelihood.
    """
    for name, present in (
        ("a selection", model.selection is not None),
        ("measurement errors", model.errors is not None),
        ("the augmented likelihood", model.smoothing is not None),
        ("the conditional likelihood", model.conditional),
    ):
        if present:
            raise ValueError(
                f"{type(model.df).__name__} is trained on the actions of the stars as they are, which does not go with "
                f"{name}: use df='mixture' (SphericalMixture), which is fitted jointly with the potential"
            )


def alternate(
    model: SnapshotModel,
    trained: TrainedDensity,
    u: Tensor,
    data: Tensor,
    config: FitConfig,
    rounds: list[Round],
    report: Report,
) -> Iterator[Alternation]:
    """Yield the state after every further round, until one hardly moves the potential or ``config.df_rounds`` are done.

    Parameters
    ----------
    model
        Potential and finder; its f(J) is replaced.
    trained
        f(J), untrained or as the last round left it.
    u : Float[Tensor, "size"]
        Latents; those of the potential come first, others are dropped.
    data : Float[Tensor, "n 6"]
        Stars; a random ``config.subset_size`` of them are used.
    config
        Settings of the fit.
    rounds
        Rounds that are done already.
    report
        Called with (u, note).
    """
    if len(data) > config.subset_size:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
        data = data[order[: config.subset_size]]
    state = Alternation(model, u, list(rounds))
    while len(state.rounds) < config.df_rounds and not state.settled:
        state = _round(state, trained, data, config, report)
        trained = _density(state.model)
        yield state


def _round(state: Alternation, trained: TrainedDensity, data: Tensor, config: FitConfig, report: Report) -> Alternation:
    k, begun = len(state.rounds), time.perf_counter()
    old = LatentSpace(state.model)
    u = state.u[: old.n_potential].clone()

    def tick(note: str) -> None:
        report(u, f"round {k + 1}: f(J), {note}")

    trained = trained.trained(_actions(old, state.u, data), config.seed + 104_729 * k, tick)
    between = time.perf_counter()
    model = copy.copy(state.model)
    model._modules = dict(model._modules) | {"df": trained}
    space = LatentSpace(model)
    information = space.fisher(u, data, _FISHER_STARS, config.seed)
    moved_to, _, iterations = lbfgs(space, u, data, information, config.map_tolerance, config.map_iterations, report)
    step = torch.linalg.solve_triangular(whitening(information), (moved_to - u)[:, None], upper=False)
    assert trained.state is not None  # it was just trained
    histories = trained.state.histories
    done = Round(
        moved=float(step.norm()) / math.sqrt(len(u)),
        held_out=sum(history.best for history in histories) / len(histories),
        training_steps=sum(history.best_step for history in histories),
        iterations=iterations,
        training_seconds=between - begun,
        maximising_seconds=time.perf_counter() - between,
    )
    report(moved_to, f"round {k + 1}: the potential moved by {done.moved:.2g} posterior sd")
    return Alternation(model, moved_to, [*state.rounds, done])


@torch.no_grad()
def _actions(space: LatentSpace, u: Tensor, data: Tensor) -> Tensor:
    """Actions of all stars: the order decides which are held out."""
    fixed = space.model.at(space.values(u)).tabulated(data)
    return torch.cat(list(mapped(lambda block: fixed.finder.capped_actions(fixed.potential, block).J, data)))


def _density(model: SnapshotModel) -> TrainedDensity:
    assert isinstance(model.df, TrainedDensity)  # a round put it there
    return model.df
