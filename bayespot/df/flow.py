"""Normalising flow on the chart: neural splines of the unit cube."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayespot.df.chart import ActionChart
from bayespot.df.trained import TrainedDensity
from bayespot.df.training import ChartNetwork


def box_spline(widths: Tensor, heights: Tensor, derivatives: Tensor) -> Any:
    """Return a monotonic rational-quadratic spline of [-1, 1] onto itself with free slopes at both ends.

    zuko's spline continues as the identity outside its box, so that its end slopes are 1 and the density at an edge
    that of the marginal. Here nothing is outside, and the density at the edges is learnt.

    Parameters
    ----------
    widths, heights : Float[Tensor, "*batch K"]
        Unconstrained widths and heights of the bins.
    derivatives : Float[Tensor, "*batch K+1"]
        Unconstrained slopes at the knots.

    References
    ----------
    Durkan et al. (2019), arXiv:1906.04032, equations 4 to 8.
    """
    from zuko.transforms import MonotonicRQSTransform

    class BoxSpline(MonotonicRQSTransform):
        def bin(self, k: Tensor) -> Any:
            _, *rest = super().bin(k.clamp(0, self.bins - 1))
            return torch.ones_like(k, dtype=torch.bool), *rest

    spline = BoxSpline(widths, heights, derivatives[..., 1:-1], bound=1.0)
    # the same limits as the inner slopes have
    ends = derivatives[..., [0, -1]]
    ends = (ends / (1 + ends.abs() / 7)).exp()
    spline.derivatives = torch.cat([ends[..., :1], spline.derivatives[..., 1:-1], ends[..., 1:]], -1)
    return spline


class SplineFlow(ChartNetwork):
    r"""Autoregressive neural spline flow from (u, T, c) to a uniform cube, :math:`q(x) = |\det \partial T/\partial x|`.

    Layers alternate in the order of the coordinates; every one maps the cube onto itself.
    """

    def __init__(self, chart: ActionChart, n_layers: int, n_bins: int, hidden: tuple[int, ...]) -> None:
        from zuko.flows.autoregressive import MaskedAutoregressiveTransform
        from zuko.lazy import LazyComposedTransform

        super().__init__()
        self.chart = chart
        self._shape = (n_layers, n_bins, hidden)
        order = torch.arange(chart.dim)
        self.transform = LazyComposedTransform(
            *(
                MaskedAutoregressiveTransform(
                    chart.dim,
                    order=order if i % 2 == 0 else order.flip(0),
                    univariate=box_spline,
                    shapes=[(n_bins,), (n_bins,), (n_bins + 1,)],
                    hidden_features=hidden,
                    activation=torch.nn.SiLU,
                )
                for i in range(n_layers)
            )
        )

        for layer in self.transform.transforms:
            # the identity at first, whatever the random weights
            torch.nn.init.zeros_(layer.hyper[-1].weight)
            torch.nn.init.zeros_(layer.hyper[-1].bias)

    def stored_arguments(self) -> dict[str, Any]:
        """Return what the constructor takes: zuko's modules hold functions, so only their weights are stored."""
        return {"chart": self.chart, **dict(zip(("n_layers", "n_bins", "hidden"), self._shape, strict=True))}

    def coordinates(self, y: Tensor) -> Tensor:
        return 2 * self.chart.uniform(y)[..., : self.chart.dim] - 1

    def loss(self, x: Tensor) -> Tensor:
        return -self.log_q(x).mean()

    def log_q(self, x: Tensor) -> Tensor:
        return self.transform().call_and_ladj(x)[1]


class FlowDensity(TrainedDensity):
    """f(J) by a normalising flow, `SplineFlow`; see `TrainedDensity`."""

    hidden: tuple[int, ...] = (32, 32)
    n_layers = 2
    n_bins = 8

    def _network(self, chart: ActionChart) -> SplineFlow:
        return SplineFlow(chart, self.n_layers, self.n_bins, self.hidden)
