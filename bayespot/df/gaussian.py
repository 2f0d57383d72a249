"""Gaussian mixtures of orbits: on the chart, where the boundary is right, and in ln J, as the paper has it."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Categorical, constraints
from torch.special import log_ndtr, ndtr, ndtri

from bayespot.df.chart import ActionChart
from bayespot.df.distributions import OrbitDistribution, OrbitSample, action_space, log_sinhc, strata, tilted
from bayespot.df.mixture import SitePrior, SphericalMixtureModule, WeightsPrior

_LN_2PI = math.log(2 * math.pi)
#: Smallest ratio of an action to the median that ln J is taken of.
_LEAST = 1e-12


class QuantileMixture(OrbitDistribution, abc.ABC):
    """A mixture whose components are drawn from by their quantile functions.

    ``logits`` are the log-weights.
    """

    support = action_space
    has_rsample = False
    logits: Tensor

    @abc.abstractmethod
    def _orbits(self, k: Tensor, u: Tensor) -> Tensor:
        """Return the orbits ``(*batch, 3)`` at quantiles u ``(*batch, 3)`` of the components k ``(*batch)``."""

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw orbits J ``(*sample_shape, 3)``."""
        shape = Size(sample_shape)
        k = Categorical(logits=self.logits).sample(shape)
        return self._orbits(k, torch.rand(*shape, 3, dtype=torch.float64))

    def stratified(self, n: int, seed: int, n_spare: int = 0) -> OrbitSample:
        """Return n orbits, as many from each component; see `OrbitSample`."""
        k, weight, u = strata(self.logits, n, seed, 3 + n_spare)
        return OrbitSample(self._orbits(k, u[:, :3]), weight, u[:, 3:])


class TruncatedGaussianDistribution(QuantileMixture):
    r"""Mixture of Gaussians on the chart's unit cube (u, T, c), cut off at its faces and renormalised.

    .. math::
        f(J) = f_0(J) \sum_k w_k \prod_i \frac{N(x_i; \mu_{ki}, \sigma_{ki})}
        {\Phi\big(\frac{1 - \mu_{ki}}{\sigma_{ki}}\big) - \Phi\big(\frac{-\mu_{ki}}{\sigma_{ki}}\big)}

    with x = (u, T) or, with rotation, (u, T, c), and f_0 the chart's reference density (`ActionChart`): finite and
    positive where J_r or L vanish, power-law tails.

    Parameters
    ----------
    chart
        Chart of action space.
    logits : Float[Tensor, "K"]
        Log-weights.
    centre, sigma : Float[Tensor, "K d"]
        Centres, inside the cube or not, and widths; d is ``chart.dim``.
    """

    arg_constraints = {
        "logits": constraints.real,
        "centre": constraints.independent(constraints.real, 1),
        "sigma": constraints.independent(constraints.positive, 1),
    }

    def __init__(self, chart: ActionChart, logits: Tensor, centre: Tensor, sigma: Tensor) -> None:
        self.chart, self.logits, self.centre, self.sigma = chart, logits, centre, sigma
        super().__init__(Size(), Size([3]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln f(J) in (kpc km/s)^-3."""
        y = self.chart.smooth(value)
        x = self.chart.uniform(y)[..., None, : self.chart.dim]
        low, high = -self.centre / self.sigma, (1 - self.centre) / self.sigma
        each = -0.5 * ((x - self.centre) / self.sigma) ** 2 - self.sigma.log() - 0.5 * _LN_2PI - _log_mass(low, high)
        log_q = torch.logsumexp(torch.log_softmax(self.logits, -1) + each.sum(-1), -1)
        return log_q + self.chart.log_reference(y)

    def _orbits(self, k: Tensor, u: Tensor) -> Tensor:
        # a chart without rotation has uniform c
        d = self.chart.dim
        mean, sigma = self.centre[k], self.sigma[k]
        low, high = -mean / sigma, (1 - mean) / sigma
        # on the side of the normal where its distribution function has digits left
        flip = torch.where(low + high > 0, -1.0, 1.0).to(mean)
        left, right = torch.minimum(flip * low, flip * high), torch.maximum(flip * low, flip * high)
        p = torch.where(flip < 0, 1 - u[..., :d], u[..., :d])
        z = flip * ndtri(ndtr(left) + p * (ndtr(right) - ndtr(left)))
        x = (mean + sigma * z).clamp(1e-15, 1 - 1e-15)
        return self.chart.actions(self.chart.smooth_of_uniform(torch.cat([x, u[..., d:]], -1)))


class LogActionDistribution(QuantileMixture):
    r"""Gaussian mixture in (ln J_r, ln L) with a density of cos i, the coordinates of the paper.

    .. math:: f(J) = \frac{1}{J_r L^2} \sum_k w_k\, N(\ln J_r, \ln L; \mu_k, \Sigma_k)\, q_k(\cos i)

    with q as in `SphericalActionDistribution`. f vanishes faster than any power where J_r or L does, which no physical
    f(J) does: it biases the potential, and is here for comparison.

    Parameters
    ----------
    logits : Float[Tensor, "K"]
        Log-weights.
    centre, sigma : Float[Tensor, "K 2"]
        Means and standard deviations of ln J_r and ln L (J in kpc km/s).
    correlation : Float[Tensor, "K"]
        Their correlation.
    concentration : Float[Tensor, "K"], optional
        k of the rotation.

    References
    ----------
    Tenachi, Ibata & Diakogiannis (2023), arXiv:2305.16845.
    """

    arg_constraints = {
        "logits": constraints.real,
        "centre": constraints.independent(constraints.real, 1),
        "sigma": constraints.independent(constraints.positive, 1),
        "correlation": constraints.interval(-1, 1),
        "concentration": constraints.real,
    }

    def __init__(
        self, logits: Tensor, centre: Tensor, sigma: Tensor, correlation: Tensor, concentration: Tensor | None = None
    ) -> None:
        self.logits, self.centre, self.sigma, self.correlation = logits, centre, sigma, correlation
        self.rotation = concentration is not None
        self.concentration = torch.zeros_like(logits) if concentration is None else concentration
        super().__init__(Size(), Size([3]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln f(J) in (kpc km/s)^-3."""
        least = _LEAST * self.centre.detach().exp().amax(0)
        L = (value[..., 2] + value[..., 1].abs()).clamp(min=float(least[1]))
        J_r = value[..., 0].clamp(min=float(least[0]))
        ln_J = torch.stack([J_r.log(), L.log()], -1)
        z_r, z_L = ((ln_J[..., None, :] - self.centre) / self.sigma).unbind(-1)
        rho = self.correlation
        square = (z_r**2 - 2 * rho * z_r * z_L + z_L**2) / (1 - rho**2)
        terms = torch.log_softmax(self.logits, -1) - 0.5 * square - self.sigma.log().sum(-1) - _LN_2PI
        terms = terms - 0.5 * torch.log1p(-(rho**2)) - math.log(2)
        if self.rotation:
            cos_i = (value[..., 1] / L).clamp(-1, 1)
            terms = terms + cos_i[..., None] * self.concentration - log_sinhc(self.concentration)
        return torch.logsumexp(terms, -1) - ln_J[..., 0] - 2 * ln_J[..., 1]

    def _orbits(self, k: Tensor, u: Tensor) -> Tensor:
        z = ndtri(u[..., :2])
        rho = self.correlation[k]
        z_L = rho * z[..., 0] + (1 - rho**2).sqrt() * z[..., 1]
        J_r = (self.centre[k, 0] + self.sigma[k, 0] * z[..., 0]).exp()
        L = (self.centre[k, 1] + self.sigma[k, 1] * z_L).exp()
        cos_i = tilted(u[..., 2], self.concentration[k])
        return torch.stack([J_r, L * cos_i, L * (1 - cos_i.abs())], -1)


class ChartGaussians(SphericalMixtureModule):
    """Gaussian mixture on the chart of action space, `TruncatedGaussianDistribution`.

    Sites: ``logits``, and for each of u and T (and c with rotation) ``mean_*`` and ``ln_sigma_*``. The widths' prior,
    log-normal about 0.3 a factor e^0.7 wide, is the guard against narrow components.

    Parameters
    ----------
    n_components, rotation, weights
        See `SphericalMixtureModule`.
    flattened
        The stars are in a flattened potential: f(J) of all three actions on a chart with a scale for each.
    """

    flattened = False

    def __init__(
        self,
        n_components: int | None = None,
        rotation: bool = False,
        weights: WeightsPrior = "logistic_normal",
        flattened: bool = False,
    ) -> None:
        super().__init__(n_components, rotation or flattened, weights)
        self.flattened = flattened
        self.chart: ActionChart | None = None

    def _new(self, n_components: int) -> ChartGaussians:
        return ChartGaussians(n_components, self.rotation, flattened=self.flattened)

    @property
    def _axes(self) -> tuple[str, ...]:
        return ("u", "T", "c") if self.rotation else ("u", "T")

    def _site_priors(self, J: Tensor) -> dict[str, SitePrior]:
        self.chart = ActionChart.for_actions(J, self.rotation, self.flattened)
        priors = {"logits": SitePrior(0.0, 1.5)}
        for axis in self._axes:
            priors |= {f"mean_{axis}": SitePrior(0.5, 0.5), f"ln_sigma_{axis}": SitePrior(math.log(0.3), 0.7)}
        return priors

    def _start(self, J: Tensor, n_components: int) -> dict[str, Tensor]:
        # the start breaks the symmetry along u; fits that begin too narrow stay there
        levels = (torch.arange(n_components, dtype=torch.float64) + 0.5) / n_components
        return {"mean_u": levels, "ln_sigma_u": torch.full_like(levels, math.log(0.5))}

    def distribution(self) -> TruncatedGaussianDistribution:
        if self.chart is None:
            raise ValueError("the chart is not set: call resolved(n_components, J) first")
        mean = torch.stack([getattr(self, f"mean_{axis}") for axis in self._axes], -1)
        sigma = torch.stack([getattr(self, f"ln_sigma_{axis}") for axis in self._axes], -1).exp()
        return TruncatedGaussianDistribution(self.chart, self.log_weights(), mean, sigma)


class LogActionGaussians(SphericalMixtureModule):
    """Gaussian mixture in ln J, `LogActionDistribution`, for comparison with the paper: it biases the potential.

    Sites: ``logits``, ``mean_r``, ``mean_L``, ``ln_sigma_r``, ``ln_sigma_L``, ``atanh_correlation`` and, with rotation,
    ``concentration``; means are in units of the data's standard deviations about their means.

    Parameters are those of `SphericalMixtureModule`.
    """

    def __init__(
        self, n_components: int | None = None, rotation: bool = False, weights: WeightsPrior = "logistic_normal"
    ) -> None:
        super().__init__(n_components, rotation, weights)
        self._centre, self._spread = torch.zeros(2).double(), torch.ones(2).double()

    def _site_priors(self, J: Tensor) -> dict[str, SitePrior]:
        ln_J = torch.stack([J[:, 0], J[:, 2] + J[:, 1].abs()], -1).clamp(min=1e-300).log()
        self._centre, self._spread = ln_J.mean(0), ln_J.std(0)
        priors = {
            "logits": SitePrior(0.0, 1.5),
            "mean_r": SitePrior(0.0, 1.5),
            "mean_L": SitePrior(0.0, 1.5),
            "ln_sigma_r": SitePrior(math.log(0.6), 0.7),
            "ln_sigma_L": SitePrior(math.log(0.6), 0.7),
            "atanh_correlation": SitePrior(0.0, 0.7),
        }
        return priors | ({"concentration": SitePrior(0.0, 2.0)} if self.rotation else {})

    def _start(self, J: Tensor, n_components: int) -> dict[str, Tensor]:
        normal = ndtri((torch.arange(n_components, dtype=torch.float64) + 0.5) / n_components)
        return {"mean_r": normal, "mean_L": normal}

    def distribution(self) -> LogActionDistribution:
        mean = self._centre + self._spread * torch.stack([self.mean_r, self.mean_L], -1)
        sigma = self._spread * torch.stack([self.ln_sigma_r, self.ln_sigma_L], -1).exp()
        return LogActionDistribution(
            self.log_weights(),
            mean,
            sigma,
            self.atanh_correlation.tanh(),
            self.concentration if self.rotation else None,
        )


def _log_mass(low: Tensor, high: Tensor) -> Tensor:
    """ln[Phi(high) - Phi(low)] for low < high, without loss of digits in either tail."""
    flip = low + high > 0
    a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
    top = log_ndtr(b)
    return top + torch.log1p(-(log_ndtr(a) - top).exp())
