"""Densities of orbits that are trained on actions: they have weights of their own instead of Pyro sites."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayespot.df.axisymmetric import AxisymmetricMixture
from bayespot.df.base import DistributionDensity, DistributionFunction, LogFraction
from bayespot.df.chart import ActionChart
from bayespot.df.mixture import SphericalMixture
from bayespot.df.tabulated import CELLS, TabulatedDistribution
from bayespot.df.training import ChartNetwork, History, TrainingConfig, train
from bayespot.units import takes_tensors


@dataclass(frozen=True)
class TrainedState:
    """What a training leaves: the chart, the networks with their histories, and the density tabulated from them."""

    chart: ActionChart
    networks: list[ChartNetwork]
    histories: list[History]
    table: TabulatedDistribution


class TrainedDensity(DistributionDensity, abc.ABC):
    """A density of orbits by a network on the `ActionChart`, trained on the stars' actions in a fixed potential.

    It has no Pyro sites: a fit alternates between training f(J) at fixed potential and maximising over the potential
    at fixed f(J) (`bayespot.inference.alternating`). At the true potential the expected score of the potential
    vanishes for any f(J), so small errors of the network do not move it; an overfitted one ties it to the potential it
    was trained in, hence the early stopping on held-out stars. The network is tabulated once per training
    (`TabulatedDistribution`).

    Parameters
    ----------
    rotation
        Let f(J) depend on cos i; otherwise on J_r and L only.
    n_members
        Networks trained from different weights and held-out stars; f(J) is their mean.
    training
        Steps, batches and early stopping.
    flattened
        The stars are in a flattened potential: f(J) of all three actions on a chart with a scale for each.
    """

    flattened = False
    hidden: tuple[int, ...]
    #: Cells of the table by number of coordinates.
    cells: dict[int, tuple[int, int]] = CELLS

    def __init__(
        self,
        rotation: bool = False,
        n_members: int = 1,
        training: TrainingConfig | None = None,
        flattened: bool = False,
    ) -> None:
        super().__init__()
        if n_members < 1:
            raise ValueError(f"n_members must be at least 1, got {n_members}")
        self.n_components = None
        self.rotation, self.flattened, self.n_members = rotation or flattened, flattened, n_members
        self.symmetry = "axisymmetric" if self.rotation else "spherical"
        self.training_config = TrainingConfig() if training is None else training
        # in a plain attribute: weights must not become Pyro parameters
        self.state: TrainedState | None = None

    @abc.abstractmethod
    def _network(self, chart: ActionChart) -> ChartNetwork:
        """Return an untrained network."""

    @takes_tensors(J="action")
    def trained(self, J: Tensor, seed: int, tick: Callable[[str], None] | None = None) -> TrainedDensity:
        """Return a copy trained on actions ``J (n, 3)`` in kpc km/s; a trained one continues from its weights.

        Parameters
        ----------
        J
            Actions of the stars, in the same order in every training: the same fraction is held out.
        seed
            Seed of weights and batches.
        tick
            Called with a note at every evaluation of the held-out stars.
        """
        before = self.state
        chart = ActionChart.for_actions(J, self.rotation, self.flattened) if before is None else before.chart
        y = chart.smooth(J)
        networks, histories = [], []
        for k in range(self.n_members):
            own_seed = seed + 7919 * k
            network = self._fresh(chart, own_seed) if before is None else before.networks[k]
            network, history = train(network, y, self.training_config, own_seed, k, before is not None, tick)
            networks.append(network)
            histories.append(history)
        table = TabulatedDistribution(chart, lambda y: _mean_log_q(networks, y), self.cells[chart.dim])
        module = copy.copy(self)
        module.__dict__ = self.__dict__ | {"state": TrainedState(chart, networks, histories, table)}
        return module

    def _fresh(self, chart: ActionChart, seed: int) -> ChartNetwork:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self._network(chart)

    def start(self) -> DistributionFunction:
        """Return the mixture with which the stars are bound before there is anything to train on."""
        return AxisymmetricMixture(3) if self.flattened else SphericalMixture(3, self.rotation)

    def distribution(self) -> TabulatedDistribution:
        """Return f(J) as a torch Distribution.

        Raises
        ------
        ValueError
            If it is not trained.
        """
        if self.state is None:
            raise ValueError(f"{type(self).__name__} is not trained: call trained(J, seed), or fit a model with it")
        return self.state.table

    @takes_tensors(J="action")
    def exact_log_prob(self, J: Tensor) -> Tensor:
        """Return ln f(J) by the networks themselves instead of their table (normalised as the table is)."""
        table, state = self.distribution(), self.state
        assert state is not None  # or distribution had raised
        y = state.chart.smooth(J).reshape(-1, 3)
        log_q = _mean_log_q(state.networks, y) - table.log_norm
        return (log_q + state.chart.log_reference(y)).reshape(J.shape[:-1])

    def resolved(self, n_components: int, J: Tensor, near_data: bool = False) -> DistributionFunction:
        return self

    def fit_actions(
        self, J: Tensor, seed: int, max_iterations: int = 100, log_z: LogFraction | None = None
    ) -> dict[str, Tensor]:
        return {}


@torch.no_grad()
def _mean_log_q(networks: list[ChartNetwork], y: Tensor) -> Tensor:
    """ln of the mean of the networks' q."""
    found = torch.stack([network.log_q(network.coordinates(y)) for network in networks])
    return found.logsumexp(0) - math.log(len(networks))
