"""Training of a network density on the chart: Adam, averaged weights, early stopping on held-out stars."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@dataclass(frozen=True)
class TrainingConfig:
    """Numbers of the training.

    Parameters
    ----------
    steps, warm_steps
        Most steps of Adam from random weights, and from those of an earlier training.
    batch_size, learning_rate
        Stars per step; initial rate, which falls to zero as a cosine over the steps.
    held_out
        Fraction of the stars that decide when to stop.
    check_every, patience
        Steps between evaluations of the held-out likelihood, and how many in a row may fail to improve on the best.
    average
        Decay per step of the exponential average of the weights, which is what is kept.
    max_held_out
        Most held-out stars that are evaluated.
    """

    steps: int = 2000
    warm_steps: int = 600
    batch_size: int = 1024
    learning_rate: float = 2e-3
    held_out: float = 0.2
    check_every: int = 100
    patience: int = 5
    average: float = 0.99
    max_held_out: int = 20_000

    def __post_init__(self) -> None:
        for name in ("steps", "warm_steps", "batch_size", "check_every", "patience", "max_held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be a fraction between 0 and 1, got {self.held_out}")


class ChartNetwork(nn.Module, abc.ABC):
    """A density on the chart with trainable weights, in the precision of its weights."""

    #: Most held-out stars for networks whose density is expensive; None: as many as `TrainingConfig` says.
    max_held_out: int | None = None

    @abc.abstractmethod
    def coordinates(self, y: Tensor) -> Tensor:
        """Return the coordinates ``(n, d)`` in which the network works, from the chart's smooth ones ``(n, 3)``."""

    @abc.abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """Return the loss of a batch of `coordinates`, whose minimum is the stars' density."""

    @abc.abstractmethod
    def log_q(self, x: Tensor) -> Tensor:
        """Return ln q, the density over the chart's reference density, at `coordinates`."""


@dataclass(frozen=True)
class History:
    """Held-out mean ln q at every evaluation, and the steps done when the best was reached."""

    held_out: list[float]
    best_step: int

    @property
    def best(self) -> float:
        """The best held-out mean ln q."""
        return max(self.held_out)


def train(
    network: ChartNetwork,
    y: Tensor,
    config: TrainingConfig,
    seed: int,
    split_seed: int,
    warm: bool = False,
    tick: Callable[[str], None] | None = None,
) -> tuple[ChartNetwork, History]:
    """Return a copy of the network trained on stars at ``y (n, 3)``, in float64, and its history.

    Weights are trained in float32 and averaged; of the averages the one with the best held-out likelihood is kept.
    ``seed`` decides the batches and ``split_seed`` the split; ``warm`` tells that the network was trained before. Then
    the split must be the same: a network has a good opinion of stars that it was trained on.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = copy.deepcopy(network).float().requires_grad_(True).train()
        x = network.coordinates(y).float()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split_seed))
        n_held = max(1, round(config.held_out * len(x)))
        held, own = x[order[:n_held]], x[order[n_held:]]
        held = held[: min(config.max_held_out, network.max_held_out or len(held))]
        steps = config.warm_steps if warm else config.steps
        rate = config.learning_rate / (3 if warm else 1)
        optimiser = torch.optim.Adam(network.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        averaging = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.average))
        average = cast("ChartNetwork", averaging.module)
        found, best, best_step = [_held_out(network, held)], copy.deepcopy(network), 0
        for step in range(1, steps + 1):
            batch = own[torch.randint(len(own), (min(config.batch_size, len(own)),))]
            optimiser.zero_grad()
            network.loss(batch).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0, error_if_nonfinite=True)
            optimiser.step()
            schedule.step()
            averaging.update_parameters(network)
            if step % config.check_every == 0 or step == steps:
                found.append(_held_out(average, held))
                if found[-1] == max(found):
                    best, best_step = copy.deepcopy(average), step
                if tick:
                    tick(f"step {step}: held-out ln q {found[-1]:.4f}")
                if step - best_step >= config.patience * config.check_every:
                    break
    return best.double().requires_grad_(False).eval(), History(found, best_step)


@torch.no_grad()
def _held_out(network: ChartNetwork, x: Tensor) -> float:
    values = network.log_q(x).double()
    mean = float(values.mean())
    return mean if mean == mean else -float("inf")


def perceptron(n_in: int, n_out: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Return a multi-layer perceptron with SiLU activations whose output is zero at first."""
    layers: list[nn.Module] = []
    for n_from, n_to in zip((n_in, *hidden), hidden, strict=False):
        layers += [nn.Linear(n_from, n_to), nn.SiLU()]
    last = nn.Linear(hidden[-1], n_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
