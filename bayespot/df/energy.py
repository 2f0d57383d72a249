"""Log-density network on the chart, normalised by quadrature."""

from __future__ import annotations

import torch
from torch import Tensor

from bayespot.df.chart import ActionChart
from bayespot.df.trained import TrainedDensity
from bayespot.df.training import ChartNetwork, perceptron
from bayespot.numerics import gauss_legendre

#: Gauss-Legendre nodes along v, t and c.
_NODES = {2: (48, 24), 3: (32, 16, 12)}


class EnergyNetwork(ChartNetwork):
    r"""The density :math:`q(y) = e^{E(y)} / \int e^{E} \rho\, dy`, E a network of the smooth coordinates.

    rho is the reference density, :math:`\rho\,dv\,dt\,dc = du\,dT\,dc`. In two or three dimensions the integral is a
    sum over Gauss-Legendre nodes in every training step, so the loss is the exact negative log-likelihood.
    """

    def __init__(self, chart: ActionChart, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.dim = chart.dim
        self.energy = perceptron(chart.dim, 1, hidden)
        nodes = [gauss_legendre(n) for n in _NODES[chart.dim]]
        axes, weights = [(1 + x) / 2 for x, _ in nodes], [w / 2 for _, w in nodes]
        y = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, chart.dim)
        w = torch.stack(torch.meshgrid(*weights, indexing="ij"), -1).log().sum(-1).reshape(-1)
        self.register_buffer("nodes", y)
        self.register_buffer("log_weight", w + chart.log_volume(y))

    def coordinates(self, y: Tensor) -> Tensor:
        return y[..., : self.dim]

    def loss(self, x: Tensor) -> Tensor:
        return -self.log_q(x).mean()

    def log_q(self, x: Tensor) -> Tensor:
        nodes, log_weight = self.get_buffer("nodes"), self.get_buffer("log_weight")
        log_norm = torch.logsumexp(log_weight + self._energy(nodes), 0)
        return self._energy(x) - log_norm

    def _energy(self, x: Tensor) -> Tensor:
        return self.energy(4 * x - 2)[..., 0]


class EnergyDensity(TrainedDensity):
    """f(J) by a log-density network normalised by quadrature, `EnergyNetwork`; see `TrainedDensity`."""

    hidden: tuple[int, ...] = (64, 64)

    def _network(self, chart: ActionChart) -> EnergyNetwork:
        return EnergyNetwork(chart, self.hidden)
