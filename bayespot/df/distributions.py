"""Densities on action space as torch Distributions: mixtures with the right supports, sampled and stratified."""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Categorical, Distribution, Gamma, constraints

from bayespot.numerics import gamma_quantile
from bayespot.units import Declared, takes_tensors

_LN_2 = math.log(2.0)
_LN_2PI = math.log(2 * math.pi)
#: Smallest ratio of an action to the components' scale that ln J is taken of.
_LEAST = 1e-12


class OrbitSample(NamedTuple):
    """Weighted orbits: ``J (n, 3)`` in kpc km/s, ``weight (n,)`` that sum to one, ``spare (n, n_spare)`` uniforms.

    The expectation of any function of J under f is the sum of weight times its value; J and weight are
    differentiable in the parameters of f. ``spare`` belongs to the same points, for the angles.
    """

    J: Tensor
    weight: Tensor
    spare: Tensor


class _ActionSpace(constraints.Constraint):
    """J_r >= 0, J_phi real, J_z >= 0."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value[..., 0] >= 0) & (value[..., 2] >= 0) & torch.isfinite(value).all(-1)


action_space = _ActionSpace()


class OrbitDistribution(Distribution, Declared, abc.ABC):
    """A normalised density f(J) on `action_space` that also places weighted orbits."""

    @takes_tensors(value="action")
    @abc.abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln f(J) in (kpc km/s)^-3."""

    @abc.abstractmethod
    def stratified(self, n: int, seed: int, n_spare: int = 0) -> OrbitSample:
        """Return n weighted orbits with the random numbers of ``seed``; see `OrbitSample`."""


class SphericalActionDistribution(OrbitDistribution):
    r"""Mixture of compound Gammas in (J_r, L) with a density of cos i, on (J_r, J_phi, J_z).

    .. math::
        f(J) = \frac{1}{L} \sum_k w_k\, p_k(J_r, L)\, q_k(\cos i), \quad
        p_k \propto J_r^{a-1} L^{c-1} \left(1 + \frac{J_r}{b s_r} + \frac{L}{b s_L}\right)^{-(a+c+b)},

    L = J_z + |J_phi|, cos i = J_phi / L. Each component is a product of Gammas of shapes a >= 1 and c >= 2
    whose common scale is inverse-Gamma(b) distributed: f is finite where J_r or L vanish, the tails are
    power laws of index b, and b -> infinity gives the product of Gammas with scales s_r and s_L. It is the
    double power law of Posti et al. (2015, MNRAS 447, 3060) in another notation. q = 1/2, or with rotation
    :math:`q = k e^{k \cos i} / (2 \sinh k)`.

    Parameters
    ----------
    logits, scale_r, scale_L, shape_r, shape_L, tail : Float[Tensor, "K"]
        Log-weights; s_r and s_L in kpc km/s; a, c and b.
    concentration : Float[Tensor, "K"], optional
        k of the rotation.
    """

    support = action_space
    has_rsample = False
    arg_constraints = {
        "logits": constraints.real,
        "scale_r": constraints.positive,
        "scale_L": constraints.positive,
        "shape_r": constraints.greater_than_eq(1),
        "shape_L": constraints.greater_than_eq(2),
        "tail": constraints.positive,
        "concentration": constraints.real,
    }

    @takes_tensors(
        logits="number", scale_r="action", scale_L="action", shape_r="number", shape_L="number", tail="number",
        concentration="number",
    )  # fmt: skip
    def __init__(
        self,
        logits: Tensor,
        scale_r: Tensor,
        scale_L: Tensor,
        shape_r: Tensor,
        shape_L: Tensor,
        tail: Tensor,
        concentration: Tensor | None = None,
        validate_args: bool | None = False,
    ) -> None:
        self.logits, self.scale_r, self.scale_L = logits, scale_r, scale_L
        self.shape_r, self.shape_L, self.tail = shape_r, shape_L, tail
        self.rotation = concentration is not None
        self.concentration = torch.zeros_like(logits) if concentration is None else concentration
        super().__init__(Size(), Size([3]), validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln f(J) in (kpc km/s)^-3."""
        if self._validate_args:
            self._validate_sample(value)
        a, c, b = self.shape_r, self.shape_L, self.tail
        least = _LEAST * (self.scale_r.max() + self.scale_L.max()).detach()
        J_r = value[..., 0].clamp(min=least)
        L = (value[..., 2] + value[..., 1].abs()).clamp(min=least)
        s_r, s_L = b * self.scale_r, b * self.scale_L
        constant = (
            torch.log_softmax(self.logits, -1) + torch.lgamma(a + c + b) - torch.lgamma(a) - torch.lgamma(c)
            - torch.lgamma(b) - a * s_r.log() - c * s_L.log() - _LN_2
        )  # fmt: skip
        # the 1/L of f(J) lowers the power of L by one
        linear, weights = [J_r.log(), L.log()], [a - 1, c - 2]
        if self.rotation:
            k = self.concentration
            constant = constant - log_sinhc(k)
            linear, weights = [*linear, (value[..., 1] / L).clamp(-1, 1)], [*weights, k]
        features = torch.stack([x.reshape(-1) for x in linear])
        actions = torch.stack([J_r.reshape(-1), L.reshape(-1)])
        parameters = (constant, torch.stack(weights, -1), torch.stack([1 / s_r, 1 / s_L], -1), a + c + b)
        return _LogSumOfPowers.apply(features, actions, *parameters).reshape(J_r.shape)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw orbits J ``(*sample_shape, 3)``."""
        shape = Size(sample_shape)
        k = Categorical(logits=self.logits).sample(shape)
        common = 1 / Gamma(self.tail[k], 1.0).sample()
        J_r = Gamma(self.shape_r[k], 1.0).sample() * common * self.tail[k] * self.scale_r[k]
        L = Gamma(self.shape_L[k], 1.0).sample() * common * self.tail[k] * self.scale_L[k]
        u, kappa = torch.rand(L.shape, dtype=L.dtype), self.concentration[k]
        cos_i = tilted(u, kappa)
        return torch.stack([J_r, L * cos_i, L * (1 - cos_i.abs())], -1)

    def stratified(self, n: int, seed: int, n_spare: int = 0) -> OrbitSample:
        """Return n orbits, as many from each component; see `OrbitSample`.

        The same seed gives the same uniform numbers whatever the parameters, so estimates at two parameter
        values share their noise.
        """
        k, weight, u = strata(self.logits, n, seed, 4 + n_spare)
        common = self.tail[k] / gamma_quantile(self.tail[k], u[:, 0])
        J_r = gamma_quantile(self.shape_r[k], u[:, 1]) * common * self.scale_r[k]
        L = gamma_quantile(self.shape_L[k], u[:, 2]) * common * self.scale_L[k]
        cos_i = tilted(u[:, 3], self.concentration[k])
        return OrbitSample(torch.stack([J_r, L * cos_i, L * (1 - cos_i.abs())], -1), weight, u[:, 4:])


class _LogSumOfPowers(torch.autograd.Function):
    r"""ln sum_k exp(c_k + w_k . features - t_k ln(1 + v_k . actions)) in few passes over the stars, and its gradient.

    ``features (m, n)``, ``actions (2, n)``; c and t ``(K,)``, w ``(K, m)``, v ``(K, 2)``. Stars lie along the last
    axis, where sums over few components are fast. Derivatives of its derivatives are those of the plain formula.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, actions: Tensor, constant: Tensor, weights: Tensor, scales: Tensor, total: Tensor
    ) -> Tensor:
        ratio = scales @ actions
        log1p = ratio.log1p()
        terms = torch.addmm(constant[:, None], weights, features).addcmul_(total[:, None], log1p, value=-1)
        # as logsumexp: with no finite term the largest must not be subtracted
        largest = terms.amax(0)
        largest = torch.where(torch.isfinite(largest), largest, 0.0)
        terms.sub_(largest).exp_()
        summed = terms.sum(0)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(features, actions, constant, weights, scales, total, ratio, log1p, terms / summed)
        return summed.log_().add_(largest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, ratio, log1p, share = ctx.saved_tensors
        if torch.is_grad_enabled():
            terms = inputs[2][:, None] + inputs[3] @ inputs[0]
            terms = terms - inputs[5][:, None] * torch.log1p(inputs[4] @ inputs[1])
            needed = [x for x, wanted in zip(inputs, ctx.needs_input_grad, strict=True) if wanted]
            found = iter(torch.autograd.grad(torch.logsumexp(terms, 0), needed, grad, create_graph=True))
            return tuple(next(found) if wanted else None for wanted in ctx.needs_input_grad)
        features, actions, _, weights, scales, total = inputs
        share = share * grad
        falling = share / (1 + ratio) * -total[:, None]
        return (
            weights.T @ share if ctx.needs_input_grad[0] else None,
            scales.T @ falling if ctx.needs_input_grad[1] else None,
            share.sum(-1),
            share @ features.T,
            falling @ actions.T,
            -(share * log1p).sum(-1),
        )


class ActionDistribution(OrbitDistribution):
    r"""Mixture on (J_r, J_phi, J_z) for systems of any symmetry that have these actions.

    .. math::
        f(J) = \sum_k w_k C_k J_r^{a-1} J_z^{c-1} \left(1 + \frac{1}{b}\left[\frac{J_r}{s_r} + \frac{J_z}{s_z}
        + \frac{(J_\phi - \mu)^2}{2\sigma^2}\right]\right)^{-(a + c + b + 1/2)}

    Gammas of shape >= 1 in J_r and J_z and a Gaussian in J_phi with a common inverse-Gamma(b) scale: finite
    at J_r = 0 and J_z = 0, smooth through J_phi = 0, power-law tails; b -> infinity gives the product.

    Parameters
    ----------
    logits, scale_r, scale_z, mean_phi, sigma_phi, shape_r, shape_z, tail : Float[Tensor, "K"]
        Log-weights; scales, mean and width in kpc km/s; a, c and b.
    """

    support = action_space
    has_rsample = False
    arg_constraints = {
        "logits": constraints.real,
        "scale_r": constraints.positive,
        "scale_z": constraints.positive,
        "mean_phi": constraints.real,
        "sigma_phi": constraints.positive,
        "shape_r": constraints.greater_than_eq(1),
        "shape_z": constraints.greater_than_eq(1),
        "tail": constraints.positive,
    }

    @takes_tensors(
        logits="number", scale_r="action", scale_z="action", mean_phi="action", sigma_phi="action", shape_r="number",
        shape_z="number", tail="number",
    )  # fmt: skip
    def __init__(
        self,
        logits: Tensor,
        scale_r: Tensor,
        scale_z: Tensor,
        mean_phi: Tensor,
        sigma_phi: Tensor,
        shape_r: Tensor,
        shape_z: Tensor,
        tail: Tensor,
        validate_args: bool | None = False,
    ) -> None:
        self.logits, self.scale_r, self.scale_z = logits, scale_r, scale_z
        self.mean_phi, self.sigma_phi = mean_phi, sigma_phi
        self.shape_r, self.shape_z, self.tail = shape_r, shape_z, tail
        super().__init__(Size(), Size([3]), validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln f(J) in (kpc km/s)^-3."""
        if self._validate_args:
            self._validate_sample(value)
        a, c, b, sigma = self.shape_r, self.shape_z, self.tail, self.sigma_phi
        least = _LEAST * (self.scale_r.max() + self.scale_z.max()).detach()
        J_r, J_z = value[..., 0].clamp(min=least), value[..., 2].clamp(min=least)
        s_r, s_z = b * self.scale_r, b * self.scale_z
        constant = (
            torch.log_softmax(self.logits, -1) + torch.lgamma(a + c + b + 0.5) - torch.lgamma(a) - torch.lgamma(c)
            - torch.lgamma(b) - a * s_r.log() - c * s_z.log() - sigma.log() - 0.5 * (_LN_2PI + b.log())
        )  # fmt: skip
        powers = torch.stack([a - 1, c - 1])
        logs = torch.stack([J_r.log(), J_z.log()], -1)
        ratio = torch.stack([J_r, J_z], -1) @ torch.stack([1 / s_r, 1 / s_z])
        ratio = ratio + ((value[..., 1, None] - self.mean_phi) / sigma) ** 2 / (2 * b)
        terms = torch.addmm(constant, logs.reshape(-1, 2), powers).reshape(ratio.shape)
        return torch.logsumexp(terms - (a + c + b + 0.5) * torch.log1p(ratio), -1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw orbits J ``(*sample_shape, 3)``."""
        k = Categorical(logits=self.logits).sample(Size(sample_shape))
        common = self.tail[k] / Gamma(self.tail[k], 1.0).sample()
        J_r = Gamma(self.shape_r[k], 1.0).sample() * common * self.scale_r[k]
        J_z = Gamma(self.shape_z[k], 1.0).sample() * common * self.scale_z[k]
        J_phi = self.mean_phi[k] + common.sqrt() * self.sigma_phi[k] * torch.randn(k.shape, dtype=J_r.dtype)
        return torch.stack([J_r, J_phi, J_z], -1)

    def stratified(self, n: int, seed: int, n_spare: int = 0) -> OrbitSample:
        """Return n orbits, as many from each component; see `OrbitSample`."""
        k, weight, u = strata(self.logits, n, seed, 4 + n_spare)
        common = self.tail[k] / gamma_quantile(self.tail[k], u[:, 0])
        J_r = gamma_quantile(self.shape_r[k], u[:, 1]) * common * self.scale_r[k]
        J_z = gamma_quantile(self.shape_z[k], u[:, 2]) * common * self.scale_z[k]
        normal = math.sqrt(2) * torch.erfinv(2 * u[:, 3] - 1)
        J_phi = self.mean_phi[k] + common.sqrt() * self.sigma_phi[k] * normal
        return OrbitSample(torch.stack([J_r, J_phi, J_z], -1), weight, u[:, 4:])


def strata(logits: Tensor, n: int, seed: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Component, weight and scrambled Sobol point of every orbit; weights are differentiable in the logits.

    As many orbits of every component whatever its weight: with counts that follow the weights sums over the orbits
    would jump as these change.
    """
    share = torch.softmax(logits, -1)
    size = len(share)
    counts = [max(16, n // size + (i < n % size)) for i in range(size)]
    points = [uniform_points(m, dim, seed * 1009 + i) for i, m in enumerate(counts)]
    k = torch.repeat_interleave(torch.arange(size), torch.tensor(counts))
    return k, (share / share.new_tensor(counts))[k], torch.cat(points)


def uniform_points(n: int, dim: int, seed: int) -> Tensor:
    """Return n points ``(n, dim)`` of a scrambled Sobol sequence, strictly inside the unit cube."""
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
    return engine.draw(n, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)


def tilted(u: Tensor, kappa: Tensor) -> Tensor:
    """Return cos i at the quantile u of the density k exp(k c) / (2 sinh k) on [-1, 1]."""
    size = kappa.abs()
    safe = torch.where(size < 1e-6, 1.0, size)
    turned = 1 + torch.log(u + (1 - u) * torch.exp(-2 * safe)) / safe
    # to first order in k near zero, so that its derivative there is right
    flat = 2 * u - 1
    return torch.where(size < 1e-6, flat + kappa * (1 - flat**2) / 2, torch.where(kappa < 0, -turned, turned))


def log_sinhc(k: Tensor) -> Tensor:
    """ln(sinh k / k), stable at zero and for large k."""
    size = k.abs()
    safe = torch.where(size < 1e-4, 1.0, size)
    large = safe - _LN_2 + torch.log1p(-torch.exp(-2 * safe)) - safe.log()
    return torch.where(size < 1e-4, k**2 / 6, large)
