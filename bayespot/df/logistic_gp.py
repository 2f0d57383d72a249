"""Logistic Gaussian process on the chart of action space: f(J) whose posterior is close to a Gaussian."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.nn import PyroSample
from torch import Size, Tensor
from torch.distributions import constraints

from bayespot.df.base import DistributionDensity, LogFraction
from bayespot.df.chart import ActionChart
from bayespot.df.distributions import OrbitDistribution, OrbitSample, action_space
from bayespot.df.tabulated import TabulatedDistribution
from bayespot.numerics import gauss_legendre, legendre
from bayespot.optimisers import LBFGS
from bayespot.pyro_modules import freeze
from bayespot.units import takes, takes_tensors

#: Gauss-Legendre nodes along v, t and c.
_NODES = {2: (64, 32), 3: (48, 20, 12)}
#: Highest degree in cos i, with rotation.
_ROTATION_DEGREE = 4
#: Standard deviations of the powers of v, t and 1 - v that f(J) may have towards its edges, and least of these.
_CUSPS, _EDGE = (2.0, 1.0, 2.0), 1e-9
#: With such powers, standard deviations of the amplitudes of the first and second degree: together with the powers they
#: place the scale and the slopes of f(J), of which the reference density may be a poor guess.
_LOW = (1.5, 0.75)
#: Standard deviation of ln A where it is inferred.
AMPLITUDE_SD = 1.0
#: Highest tail index of the reference density where the actions at hand are not a sample of f(J).
_WIDE_TAIL = 1.5


class LogPolynomialDistribution(OrbitDistribution):
    r"""Density of orbits :math:`\ln f = \ln f_0 + \sum_k a_k \phi_k(v, t, c) - \ln Z`, an exponential family.

    phi_k are products of orthonormal Legendre polynomials on the `ActionChart`, f_0 its reference density; Z is summed
    over Gauss-Legendre nodes.

    Parameters
    ----------
    chart
        Its smooth coordinates are those of the polynomials.
    basis
        The polynomials, with their values at the nodes.
    amplitude : Float[Tensor, "K"]
        a_k.
    """

    support = action_space
    has_rsample = False
    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, chart: ActionChart, basis: LegendreBasis, amplitude: Tensor) -> None:
        self.chart, self.basis, self.amplitude = chart, basis, amplitude
        self.log_norm = torch.logsumexp(basis.log_weight + basis.at_nodes @ amplitude, 0)
        super().__init__(Size(), Size([3]), validate_args=False)

    @takes_tensors(y="number")
    def log_q(self, y: Tensor) -> Tensor:
        """Return ln q, the density over the reference density, at smooth coordinates ``(*batch, 3)``."""
        return self.basis.combined(y, self.amplitude) - self.log_norm

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln f(J) in (kpc km/s)^-3 for J ``(*batch, 3)`` in kpc km/s."""
        y = self.chart.smooth(value)
        return self.log_q(y) + self.chart.log_reference(y)

    def _tabulated(self) -> TabulatedDistribution:
        return TabulatedDistribution(self.chart, self.log_q)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw orbits J ``(*sample_shape, 3)`` (`TabulatedDistribution.sample`)."""
        return self._tabulated().sample(sample_shape)

    def stratified(self, n: int, seed: int, n_spare: int = 0) -> OrbitSample:
        """Return n weighted orbits; the weights are differentiable in the amplitudes, J stays in place."""
        placed = self._tabulated().stratified(n, seed, n_spare)
        log_f = self.log_prob(placed.J)
        weight = placed.weight * (log_f - log_f.detach()).exp()
        return OrbitSample(placed.J, weight / weight.sum(), placed.spare)


class LogDensityAtActions(NamedTuple):
    """ln f at fixed actions, linear in ``weights (K,)`` but for the normalisation.

    ``reference (*batch)`` and ``features (*batch, K)`` are those of the actions, ``log_weight (n,)`` and ``at_nodes
    (n, K)`` those of the sum over all actions.
    """

    reference: Tensor
    features: Tensor
    log_weight: Tensor
    at_nodes: Tensor

    def __call__(self, weights: Tensor) -> Tensor:
        """Return ln f ``(*batch)`` in (kpc km/s)^-3, or ``(n_draws, *batch)`` of ``weights (n_draws, K)``."""
        norm = torch.logsumexp(self.log_weight + weights @ self.at_nodes.T, -1)
        if weights.dim() == 1:
            return self.reference + self.features @ weights - norm
        summed = (weights @ self.features.flatten(0, -2).T).unflatten(-1, self.reference.shape)
        return self.reference + summed - norm.reshape(-1, *(1,) * self.reference.dim())


class LegendreBasis:
    """Products of orthonormal Legendre polynomials of the chart's coordinates up to a total degree.

    Without the constant, which the normalisation takes. ``degrees (K,)`` are their total degrees; ``nodes (n, 3)`` with
    ``log_weight (n,)`` integrate over the reference density, and ``at_nodes (n, K)`` are the polynomials there.

    Parameters
    ----------
    chart
        Chart of action space.
    degree
        Highest total degree; in cos i, with rotation, at most 4.
    cusps
        Whether ln v, ln t and ln(1 - v) come after the polynomials, less their means over the reference density.
    """

    #: Those stored before there was a choice have none.
    cusps: bool = False

    def __init__(self, chart: ActionChart, degree: int, cusps: bool = False) -> None:
        self.degree, self.cusps = degree, cusps
        top = min(degree, _ROTATION_DEGREE) if chart.rotation else 0
        powers = torch.cartesian_prod(torch.arange(degree + 1), torch.arange(degree + 1), torch.arange(top + 1))
        total = powers.sum(-1)
        self.powers = powers[(total > 0) & (total <= degree)]
        self.degrees = self.powers.sum(-1)
        axes, weights = [], []
        for x, w in map(gauss_legendre, _NODES[chart.dim]):
            axes.append((1 + x) / 2)
            weights.append(w / 2)
        if not chart.rotation:
            axes.append(torch.full((1,), 0.5, dtype=torch.float64))
            weights.append(torch.ones(1, dtype=torch.float64))
        # the reference density goes as (1 - v)^(b - 1): smooth in s, v = 1 - (1 - s)^p, even where b is small
        p = max(1.0, 3 / chart.tail)
        weights[0] = weights[0] * p * (1 - axes[0]) ** (p - 1)
        axes[0] = 1 - (1 - axes[0]) ** p
        self.nodes = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        log_step = torch.stack(torch.meshgrid(*weights, indexing="ij"), -1).log().sum(-1).reshape(-1)
        self.log_weight = log_step + chart.log_volume(self.nodes)
        weight = self.log_weight.exp()
        self.at_nodes = self._polynomial_values(self.nodes)
        if cusps:
            logs = _logarithms(self.nodes)
            self.mean_logs = weight @ logs / weight.sum()
            self.at_nodes = torch.cat([self.at_nodes, logs - self.mean_logs], -1)

    def __len__(self) -> int:
        return self.at_nodes.shape[1]

    @takes_tensors(y="number")
    def values(self, y: Tensor) -> Tensor:
        """Return the polynomials, and logarithms, ``(*batch, K)`` at smooth coordinates ``y (*batch, 3)``."""
        found = self._polynomial_values(y)
        return torch.cat([found, _logarithms(y) - self.mean_logs], -1) if self.cusps else found

    def _polynomial_values(self, y: Tensor) -> Tensor:
        i, j, k = self.powers.unbind(-1)
        v, t = (self._polynomials(x) for x in y[..., :2].unbind(-1))
        if not bool(k.any()):
            # the same products, without copies of their factors
            degrees = range(self.degree + 1)
            return torch.cat([v[..., n, None] * t[..., int(not n) : self.degree + 1 - n] for n in degrees], -1)
        return v[..., i] * t[..., j] * self._polynomials(y[..., 2])[..., k]

    def combined(self, y: Tensor, amplitude: Tensor) -> Tensor:
        """Return the sum of the polynomials with amplitudes ``(K,)`` at smooth coordinates ``y (*batch, 3)``."""
        if self.cusps:
            smooth, powers = amplitude[: len(self.powers)], amplitude[len(self.powers) :]
            return self._summed(y, smooth) + (_logarithms(y) - self.mean_logs) @ powers
        return self._summed(y, amplitude)

    def _summed(self, y: Tensor, amplitude: Tensor) -> Tensor:
        n = self.degree + 1
        i, j, k = self.powers.unbind(-1)
        m = int(k.max()) + 1
        table = amplitude.new_zeros(n * m * n).index_put((((i * m) + k) * n + j,), amplitude).reshape(n, m * n)
        along_t = (self._polynomials(y[..., 0]) @ table).reshape(*y.shape[:-1], m, n)
        along_c = (along_t * self._polynomials(y[..., 1])[..., None, :]).sum(-1)
        return along_c[..., 0] if m == 1 else (along_c * self._polynomials(y[..., 2])[..., :m]).sum(-1)

    def _polynomials(self, x: Tensor) -> Tensor:
        """Return sqrt(2n + 1) P_n(2x - 1) on a new last axis."""
        degree = torch.arange(self.degree + 1, dtype=x.dtype)
        return legendre(2 * x - 1, self.degree + 1) * (2 * degree + 1).sqrt()


def _logarithms(y: Tensor) -> Tensor:
    """ln v, ln t and ln(1 - v) ``(*batch, 3)`` at smooth coordinates."""
    return torch.cat([y[..., :2], 1 - y[..., :1]], -1).clamp(min=_EDGE).log()


class LogisticGaussianProcess(DistributionDensity):
    r"""f(J) whose logarithm is a Gaussian process on the `ActionChart`, in polynomials up to a total degree.

    .. math:: \ln f = \ln f_0 + \sum_k A \rho^{n_k} w_k \phi_k(v, t, c) - \ln Z, \quad w_k \sim N(0, 1)

    (site ``weights``), n_k the degree of phi_k: without data f is the reference density f_0, whose scales and tail are
    those of the actions it is resolved with. Where stars are selected or blurred these actions have another tail than
    f, and the polynomials, bounded, can thin out a tail by any factor but not give it another power: f_0 then falls no
    faster than S^-1.5. At fixed actions the posterior of w is log-concave, and with many stars close to a Gaussian,
    where a mixture's bends along ridges on which components stand in for each other: the density for likelihoods in
    which f(J) and the potential are inferred together (selections, measurement errors). It is smooth: cold shells and
    clumps take a `SphericalMixture`.

    Parameters
    ----------
    rotation
        Let f(J) depend on cos i; otherwise on J_r and L only.
    degree
        Highest total degree of the polynomials.
    amplitude, decay
        A and rho of the prior.
    flattened
        The stars are in a flattened potential: f(J) of all three actions on a chart with a scale for each.
    cusps
        Let f(J) go as a power of the actions towards J = 0, of L towards L = 0 and of 1/J far out (powers with priors
        of sd 2, 1 and 2), three more ``weights``: tracers with a density cusp have the first, radially biased orbits
        near the centre the second, where a smooth f(J) is finite. The first two degrees then have sd 1.5 and 0.75 at
        least. What f(J) cannot follow the potential makes up for, where the two are inferred together.
    adaptive
        Let the guide ``"marginal"`` infer the amplitude, ln A with a prior of sd 1 about that of ``amplitude``; other
        guides take A as it is.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    References
    ----------
    Leonard (1978), JRSS B 40, 113; Lenk (1988), JASA 83, 509; Tokdar (2007), JCGS 16, 633.

    Examples
    --------
    >>> J = 1000 * torch.rand(500, 3, dtype=torch.float64)
    >>> df = LogisticGaussianProcess(degree=3).resolved(1, J)
    >>> df.site_distributions()["weights"].event_shape
    torch.Size([9])
    """

    regularised = True
    flattened = False
    #: Those stored before there was a choice have none.
    cusps = False
    adaptive = False

    @takes(amplitude="number", decay="number")
    def __init__(
        self,
        rotation: bool = False,
        degree: int = 8,
        amplitude: float = 1.0,
        decay: float = 0.55,
        flattened: bool = False,
        cusps: bool = False,
        adaptive: bool = False,
    ) -> None:
        super().__init__()
        if degree < 1 or not amplitude > 0 or not 0 < decay <= 1:
            raise ValueError(
                "a logistic Gaussian process needs degree >= 1, amplitude > 0 and 0 < decay <= 1; "
                f"got {degree}, {amplitude} and {decay}"
            )
        self.rotation, self.flattened = rotation or flattened, flattened
        self.degree, self.amplitude, self.decay = degree, amplitude, decay
        self.cusps, self.adaptive = cusps, adaptive
        self.symmetry = "axisymmetric" if self.rotation else "spherical"
        self.n_components = 1
        self._chart: ActionChart | None = None
        self._basis: LegendreBasis | None = None

    def resolved(self, n_components: int, J: Tensor, near_data: bool = False) -> LogisticGaussianProcess:
        if n_components != 1:
            raise ValueError(
                f"a logistic Gaussian process has no components to set (n_components={n_components}); leave "
                "n_components out, raise the degree for a more flexible f(J), or take df='mixture'"
            )
        module = LogisticGaussianProcess(
            self.rotation, self.degree, self.amplitude, self.decay, self.flattened, self.cusps, self.adaptive
        )
        chart = ActionChart.for_actions(J.detach(), self.rotation, self.flattened)
        if near_data:
            chart = replace(chart, tail=min(chart.tail, _WIDE_TAIL))
        module._chart, module._basis = chart, LegendreBasis(chart, self.degree, self.cusps)
        for name, prior in module.site_distributions().items():
            setattr(module, name, PyroSample(prior))
        return module

    def site_distributions(self) -> dict[str, dist.TorchDistribution]:
        """Return the prior of the site of a resolved density, ``weights (K,)``."""
        zero = torch.zeros(len(self._resolved()[1]), dtype=torch.float64)
        return {"weights": dist.Normal(zero, torch.ones_like(zero)).to_event(1)}

    def _resolved(self) -> tuple[ActionChart, LegendreBasis]:
        if self._chart is None or self._basis is None:
            raise ValueError("the chart is not set: call resolved(1, J) first")
        return self._chart, self._basis

    def distribution(self) -> LogPolynomialDistribution:
        chart, basis = self._resolved()
        return LogPolynomialDistribution(chart, basis, self._sd * self.weights)

    @classmethod
    def of_velocities(cls) -> LogisticGaussianProcess:
        """Return the density for velocities given positions, and for stars on the sky.

        There positions say little of f(J), so that its prior counts: it has powers towards the edges, and its amplitude
        is inferred (``adaptive``), since ln f of populations of constant anisotropy is smooth and that of
        Osipkov-Merritt's is not.
        """
        return cls(degree=8, decay=0.68, cusps=True, adaptive=True)

    @property
    def _sd(self) -> Tensor:
        """Prior standard deviations of the amplitudes."""
        return self._sd_at(self.amplitude)

    def _sd_at(self, amplitude: float | Tensor) -> Tensor:
        basis = self._resolved()[1]
        smooth = amplitude * self.decay ** basis.degrees.double()
        if not basis.cusps:
            return smooth
        low = torch.zeros_like(smooth)
        for degree, sd in enumerate(_LOW, 1):
            low[basis.degrees == degree] = sd
        return torch.cat([(smooth**2 + low**2).sqrt(), smooth.new_tensor(_CUSPS)])

    @takes_tensors(ln_amplitude="number")
    def prior_sd(self, ln_amplitude: Tensor) -> Tensor:
        """Return the prior standard deviations ``(K,)`` of ``weights`` where ln A is ``ln_amplitude`` more than its
        prior mean: 1 at 0."""
        return self._sd_at(self.amplitude * ln_amplitude.exp()) / self._sd

    @takes_tensors(J="action")
    def at_actions(self, J: Tensor) -> LogDensityAtActions:
        """Return `log_prob` at fixed actions ``J (*batch, 3)`` as a function of ``weights (K,)``.

        All but one product of matrices is done before.
        """
        chart, basis = self._resolved()
        y, sd = chart.smooth(J), self._sd
        return LogDensityAtActions(chart.log_reference(y), basis.values(y) * sd, basis.log_weight, basis.at_nodes * sd)

    def fit_actions(
        self, J: Tensor, seed: int, max_iterations: int = 100, log_z: LogFraction | None = None
    ) -> dict[str, Tensor]:
        """Maximise the posterior of the weights at fixed actions: a concave problem without ``log_z``."""
        w = torch.zeros(len(self._resolved()[1]), dtype=torch.float64, requires_grad=True)
        optimiser = LBFGS([w], max_iter=max_iterations, history_size=30, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            fixed = freeze(self, {"weights": w})
            loss = (w**2).sum() / (2 * len(J)) - fixed.log_prob(J).mean()
            if log_z is not None:
                loss = loss + log_z(fixed)
            loss.backward()
            return loss

        optimiser.step(closure)
        return {"weights": w.detach().clone()}
