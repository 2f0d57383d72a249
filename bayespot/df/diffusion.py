"""Diffusion model on the chart: trained score, exact log-density by the probability-flow ODE."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.special import ndtri

from bayespot.df.chart import ActionChart
from bayespot.df.trained import TrainedDensity
from bayespot.df.training import ChartNetwork, perceptron

#: Coordinates of the cube stay this far from its faces, where the normal score is infinite.
_EDGE = 1e-7


class ScoreNetwork(ChartNetwork):
    r"""Variance-preserving diffusion of the normal scores :math:`z = \Phi^{-1}(u, T, c)`.

    Noise is added as :math:`z_\tau = \alpha z_0 + \sigma \epsilon`, :math:`\alpha = \cos(\pi\tau/2)`,
    :math:`\sigma = \sin(\pi\tau/2)`. The reference density is the standard normal at all times, so the score is
    modelled as its own and a correction,

    .. math::
        s(z, \tau) = -z + \alpha\, e\, g(z, \tau), \quad
        e_i = \exp\left(-\frac{\alpha^2 z_i^2}{2 (2 - \alpha^2)}\right),

    g a network. The envelope e is that of the exact correction for a density that is bounded and smooth on the cube:
    at tau = 0 it makes d ln q / du = sqrt(2 pi) g finite at the faces, so q is finite and positive there.
    The loss is denoising score matching with the weights of the likelihood, for which the network predicts
    :math:`\sigma e g \approx \sigma z_0 - \alpha \epsilon`; every epsilon is used with both signs.

    The density is exact for the network: along the probability flow :math:`\dot z = -\tfrac{\pi}{2} \sigma e g`

    .. math:: \ln p_0(z_0) = \ln N(z_1) + \int_0^1 \nabla \cdot \dot z\, d\tau,

    with the exact divergence and the adaptive Dormand-Prince method.

    References
    ----------
    Kotelnikov et al. (2022), arXiv:2209.15421 (diffusion of tabular data through normal scores, perceptron);
    Song et al. (2021), arXiv:2011.13456, section 4.3 and appendix D.2 (probability flow);
    Nichol & Dhariwal (2021), arXiv:2102.09672 (cosine schedule).
    """

    max_held_out = 3000

    def __init__(self, chart: ActionChart, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.chart = chart
        self.g = perceptron(2 * chart.dim + 4, chart.dim, hidden)

    def coordinates(self, y: Tensor) -> Tensor:
        x = self.chart.uniform(y)[..., : self.chart.dim]
        return ndtri(x.double().clamp(_EDGE, 1 - _EDGE))

    def correction(self, z: Tensor, tau: Tensor) -> Tensor:
        """Return e g ``(*batch, d)`` at z ``(*batch, d)`` and times ``(*batch, 1)``."""
        alpha2 = (math.pi / 2 * tau).cos() ** 2
        envelope = (-alpha2 * z**2 / (2 * (2 - alpha2))).exp()
        angle = math.pi * tau
        times = torch.cat([2 * tau - 1, angle.cos(), angle.sin(), (2 * angle).sin()], -1)
        features = torch.cat([2 * torch.erf(z / math.sqrt(2)), (z / 2).tanh(), times], -1)
        return envelope * self.g(features)

    def loss(self, x: Tensor) -> Tensor:
        # stratified times, least of them small but positive: the weight alpha/sigma is integrable
        n = len(x)
        tau = ((torch.arange(n) + torch.rand(n)) / n)[torch.randperm(n), None].to(x).clamp(1e-3, 1 - 1e-3)
        alpha, sigma = (math.pi / 2 * tau).cos(), (math.pi / 2 * tau).sin()
        noise = torch.randn_like(x)
        noise = torch.cat([noise, -noise])
        x, tau, alpha, sigma = (torch.cat([part, part]) for part in (x, tau, alpha, sigma))
        predicted = sigma * self.correction(alpha * x + sigma * noise, tau)
        wanted = sigma * x - alpha * noise
        return (alpha / sigma * (predicted**2 - 2 * predicted * wanted)).mean()

    @torch.no_grad()
    def log_q(self, x: Tensor) -> Tensor:
        """Return ln q at normal scores, ln of the density over the standard normal's."""
        from zuko.utils import odeint

        tolerance = 1e-5 if x.dtype == torch.float64 else 1e-4
        parts = []
        for z_0 in x.split(20_000):
            start = (z_0, torch.zeros_like(z_0[:, 0]))
            z_1, divergence = odeint(lambda tau, z, _: self._drift(z, tau), start, 0.0, 1.0, (), tolerance, 0.0)
            parts.append(divergence + (z_0**2 - z_1**2).sum(-1) / 2)
        return torch.cat(parts)

    def _drift(self, z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return the flow's velocity and its divergence."""
        speed = -math.pi / 2 * (math.pi / 2 * tau).sin()
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self.correction(z, tau.expand(len(z), 1))
            rows = [torch.autograd.grad(value[:, k].sum(), z, retain_graph=True)[0][:, k] for k in range(z.shape[1])]
        return speed * value.detach(), speed * torch.stack(rows).sum(0)


class DiffusionDensity(TrainedDensity):
    """f(J) by a diffusion model, `ScoreNetwork`; see `TrainedDensity`.

    The table's nodes are carried through the probability flow once per training.
    """

    hidden: tuple[int, ...] = (64, 64)
    cells = {2: (96, 48), 3: (48, 24)}

    def _network(self, chart: ActionChart) -> ScoreNetwork:
        return ScoreNetwork(chart, self.hidden)
