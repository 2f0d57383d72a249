"""A smooth density fitted to augmented stars, and with it the literal likelihood (steps G and H of the chain)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bayespot.actions.base import ESCAPE_MARGIN
from bayespot.likelihood.chain import Chain
from bayespot.likelihood.phase_mixed import UNBOUND_STEEPNESS, StarDensity
from bayespot.potential.base import Potential, Symmetry
from bayespot.units import takes, takes_tensors

#: Pairs of star and augmented star evaluated at once; bounds memory.
_PAIRS = 4_000_000
#: In standard deviations: a kernel further away from a pole does not reach across it.
_REACH = 6.0
#: Where velocities have their zero of energy, in units of the median radius.
_FAR = 1e9


@takes(bandwidth="number")
@dataclass(frozen=True)
class Smoothing:
    """Settings of the ``augmented`` likelihood.

    Parameters
    ----------
    kind
        ``"mixture"``, a Gaussian mixture fitted by unrolled EM, or ``"kernel"``, a kernel density corrected for its
        own smoothing with that mixture; the latter costs a hundred times more and gains little.
    n_augmented, seed
        Number of augmented stars and seed of their random numbers, which are the same at all parameters.
    n_components, n_steps
        Mixture: components and EM steps. A kernel density with ``n_components=0`` is not corrected.
    bandwidth
        Kernel: standard deviation of the kernel over that of the stars, per coordinate. None: 1.5 n^(-1/(d+4)) in
        d coordinates, a third of that without correction.

    Raises
    ------
    ValueError
        If a setting is unknown or out of range.
    """

    kind: Literal["kernel", "mixture"] = "mixture"
    n_augmented: int = 16_384
    seed: int = 0
    n_components: int = 12
    n_steps: int = 80
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("kernel", "mixture"):
            raise ValueError(f"kind must be 'kernel' or 'mixture', got {self.kind!r}")
        if self.n_augmented < 64:
            raise ValueError(f"n_augmented must be at least 64, got {self.n_augmented}")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, got {self.bandwidth}")
        least = 1 if self.kind == "mixture" else 0
        if self.n_components < least or self.n_steps < 1:
            raise ValueError(
                f"a {self.kind} needs n_components of at least {least} and n_steps of at least 1, got "
                f"{self.n_components} and {self.n_steps}"
            )

    def density(self, chain: Chain) -> AugmentedDensity:
        """Return the density fitted to augmented stars of ``chain``."""
        return AugmentedDensity(chain, self)


class ReducedCoordinates(NamedTuple):
    """Coordinates that the symmetry leaves: ``y (n, d)``, ``u_t (n,)`` or None, ``log_volume (n,)``, ``excess (n,)``.

    ``u_t`` is the length of a two-dimensional vector of random direction; exp(log_volume) is the volume of
    phase space per unit of (y, vector); ``excess`` is that of an unbound star's energy as in `CappedActions`.
    """

    y: Tensor
    u_t: Tensor | None
    log_volume: Tensor
    excess: Tensor


class AugmentedDensity(StarDensity):
    r"""Smooth density of augmented stars in the coordinates that the population's symmetry leaves.

    Velocities are taken in units of the escape speed (to 10^9 median radii) and stretched,

    .. math:: u = \frac{\hat v}{|\hat v|} \sqrt{-\ln(1 - \hat v^2)}, \qquad \hat v = v / v_{esc}(r),

    so that a density that falls with a power of the energy below escape becomes a Gaussian. A spherical population
    is smoothed in (ln r, u_r, u_t), where u_t is a vector in two dimensions of random direction and u_r has random
    sign; an axisymmetric one in (ln r, sin b, u_R, u_phi, u_z). The kernel's or the components' images under
    these symmetries are summed in closed form, so there is no edge at u_t = 0; at the poles, sin b = 1 and -1, kernels
    turn back.

    A kernel K smooths the augmented density p to p * K. With the mixture m as a start the estimate is
    :math:`m\,(p * K) / (m * K)`, where smoothing acts on what m misses alone (in the spirit of Hjort & Glad 1995,
    Ann. Statist. 23, 882).

    Everything is differentiable in the parameters of the potential and of f(J), first order.

    Parameters
    ----------
    chain
        The population.
    smoothing
        How it is smoothed.

    Raises
    ------
    ValueError
        If the population is neither spherical nor axisymmetric (for mixtures: not spherical).
    """

    def __init__(self, chain: Chain, smoothing: Smoothing) -> None:
        super().__init__()
        self.symmetry, self.potential, self.smoothing = chain.symmetry, chain.potential, smoothing
        if self.symmetry == "triaxial" or (self.symmetry != "spherical" and smoothing.kind == "mixture"):
            raise ValueError(
                f"no augmented density of kind {smoothing.kind!r} for a population of {self.symmetry} symmetry; "
                "take likelihood='jeans'"
            )
        stars = chain.augment(smoothing.n_augmented, smoothing.seed)
        self._log_weight = stars.weight.log()
        if not len(stars.w):
            # the potential of an absurd trial step: `log_prob` has nothing to smooth
            return
        self._edge = _FAR * float(torch.linalg.vector_norm(stars.w[:, :3].detach(), dim=-1).median())
        self._stars = reduced(stars.w, self.potential, self.symmetry, self._edge)
        k = smoothing.n_components if self.symmetry == "spherical" else 0
        self._mixture = _fit_mixture(self._stars, stars.weight, k, smoothing.n_steps) if k else None
        if smoothing.kind == "kernel":
            self._sd = self._bandwidths()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln p(w) in (kpc km/s)^-3 for ``value (*batch, 6)``; minus infinity if no orbit was held."""
        shape = value.shape[:-1]
        w = value.reshape(-1, 6)
        if not len(self._log_weight):
            # with the graph of the potential, which a fit's trial step asks for its gradient
            return (0 * self.potential.phi(w[:, :3]) - torch.inf).reshape(shape)
        at = reduced(w, self.potential, self.symmetry, self._edge)
        m = self._mixture
        log_p = -at.log_volume - UNBOUND_STEEPNESS * at.excess
        if m is not None:
            log_p = log_p + torch.logsumexp(_mixture_terms(at, m), -1)
        if self.smoothing.kind == "kernel":
            log_p = log_p + self._log_kernel(at)
            if m is not None:
                log_p = log_p - torch.logsumexp(_mixture_terms(at, m.smoothed(self._sd)), -1)
        return log_p.reshape(shape)

    def _log_kernel(self, at: ReducedCoordinates) -> Tensor:
        step = max(1, _PAIRS // len(self._log_weight))
        columns = [at.y] if at.u_t is None else [at.y, at.u_t[:, None]]
        parts = torch.cat(columns, -1).split(step)
        # the pairs are computed again in the backward pass rather than kept
        return torch.cat([checkpoint(self._kernel, part, use_reentrant=False) for part in parts])

    def _bandwidths(self) -> Tensor:
        """Kernel widths of (y, u_t)."""
        y, u_t, *_ = self._stars
        weight = self._log_weight.exp()
        columns = [y[:, i] for i in range(y.shape[1])]
        if self.symmetry == "spherical":
            columns[1] = columns[1].abs()
        sd = [_robust_sd(column, weight) for column in columns]
        if self.symmetry == "spherical":
            sd[1] = _quantile(columns[1], weight, 0.683)
        if u_t is not None:
            # 39.3 % of a two-dimensional Gaussian is within one standard deviation
            sd.append(_quantile(u_t, weight, 0.393))
        n, d = len(y), y.shape[1] + (0 if u_t is None else 2)
        factor = self.smoothing.bandwidth
        if factor is None:
            factor = (0.5 if self._mixture is None else 1.5) * n ** (-1 / (d + 4))
        return torch.stack(sd) * factor

    def _kernel(self, at: Tensor) -> Tensor:
        """Log kernel density at reduced coordinates ``(m, d)``."""
        y, u_t, *_ = self._stars
        sd = self._sd
        d = y.shape[1]
        a, b = at[:, :d] / sd[:d], y / sd[:d]
        exponent = self._log_weight - (sd[:d].log() + 0.5 * math.log(2 * math.pi)).sum()
        if u_t is None:
            b, exponent = _with_polar_images(b, exponent, sd)
            return torch.logsumexp(exponent + a @ b.T - 0.5 * (a**2).sum(-1)[:, None] - 0.5 * (b**2).sum(-1), -1)
        # ln r: a plain Gaussian; u_r: the mean of the kernels at +u_r and -u_r; u_t: of those on a circle
        t, s = at[:, d] / sd[d], u_t / sd[d]
        exponent = exponent - 2 * sd[d].log() - math.log(2 * math.pi)
        radial, across = a[:, 1, None] * b[:, 1], t[:, None] * s
        terms = -0.5 * (a[:, 0, None] - b[:, 0]) ** 2 - 0.5 * (a[:, 1, None].abs() - b[:, 1].abs()) ** 2
        terms = terms + torch.log1p(torch.exp(-2 * radial.abs())) - math.log(2)
        terms = terms - 0.5 * (t[:, None] - s) ** 2 + torch.special.i0e(across).log()
        return torch.logsumexp(exponent + terms, -1)


@takes_tensors(w="phase_space")
def reduced(w: Tensor, potential: Potential, symmetry: Symmetry, edge: float) -> ReducedCoordinates:
    """Return the coordinates that ``symmetry`` leaves of ``w (n, 6)``; ``edge`` (kpc) is where speeds vanish."""
    x, v = w[:, :3], w[:, 3:]
    r = torch.linalg.vector_norm(x, dim=-1)
    escape2 = 2 * (potential.phi(x.new_tensor([edge, 0.0, 0.0])) - potential.phi(x)).clamp(min=1e-300)
    u2 = (v**2).sum(-1) / escape2
    # 1 - u^2 is the energy's distance from escape; beyond it a star has the coordinates of one just inside
    short = 1 - u2
    excess = torch.where(short < ESCAPE_MARGIN, ESCAPE_MARGIN - short, 0.0)
    u2 = u2.clamp(max=1 - ESCAPE_MARGIN)
    small = u2 < 1e-8
    safe = torch.where(small, 0.5, u2)
    stretch = torch.where(small, 1 + u2 / 4, (-torch.log1p(-safe) / safe).sqrt())
    # d^3 u / d^3 y, both of the same direction
    log_volume = 3 * r.log() + 1.5 * escape2.log() + torch.log1p(-u2) - stretch.log()
    u = v / escape2.sqrt()[:, None] * stretch[:, None]
    if symmetry == "spherical":
        unit = x / r[:, None]
        u_r = (u * unit).sum(-1)
        across = (u - u_r[:, None] * unit).pow(2).sum(-1)
        u_t = torch.where(across > 0, across.clamp(min=1e-300).sqrt(), 0.0)
        y = torch.stack([r.log(), u_r], -1)
        return ReducedCoordinates(y, u_t, math.log(4 * math.pi) + log_volume, excess)
    R = torch.linalg.vector_norm(x[:, :2], dim=-1)
    u_R = (u[:, 0] * x[:, 0] + u[:, 1] * x[:, 1]) / R
    u_phi = (u[:, 1] * x[:, 0] - u[:, 0] * x[:, 1]) / R
    y = torch.stack([r.log(), x[:, 2] / r, u_R, u_phi, u[:, 2]], -1)
    return ReducedCoordinates(y, None, math.log(2 * math.pi) + log_volume, excess)


def _with_polar_images(b: Tensor, exponent: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Add the images of stars ``b (n, 5)``, in units of ``sd``, whose kernels reach across a pole.

    Across the pole sin b turns back, and with the longitude the directions of R and phi are opposite.
    """
    found, exponents = [b], [exponent]
    for pole in (1 / sd[1], -1 / sd[1]):
        near = ((b[:, 1] - pole).abs() < _REACH).nonzero()[:, 0]
        ln_r, sine, u_R, u_phi, u_z = b[near].unbind(-1)
        found.append(torch.stack([ln_r, 2 * pole - sine, -u_R, -u_phi, u_z], -1))
        exponents.append(exponent[near])
    return torch.cat(found), torch.cat(exponents)


def _quantile(value: Tensor, weight: Tensor, level: float) -> Tensor:
    """Weighted quantile, differentiable as the value of the star that it falls on."""
    order = value.detach().argsort()
    share = weight.detach()[order].cumsum(0)
    return value[order[int(torch.searchsorted(share, level).clamp(max=len(order) - 1))]]


def _robust_sd(value: Tensor, weight: Tensor) -> Tensor:
    """Half the central 68 %, which the far tails do not inflate."""
    return (_quantile(value, weight, 0.841) - _quantile(value, weight, 0.159)) / 2


class _Mixture(NamedTuple):
    """Components: log weight, mean and sd of ln r, sd of u_r and, per axis, of u_t."""

    log_weight: Tensor
    mean: Tensor
    sd: Tensor
    sd_r: Tensor
    sd_t: Tensor

    def smoothed(self, sd: Tensor) -> _Mixture:
        """Return the mixture convolved with a Gaussian of widths ``sd`` in (ln r, u_r, u_t)."""
        widths = [(own**2 + more**2).sqrt() for own, more in zip(self[2:], sd, strict=True)]
        return _Mixture(self.log_weight, self.mean, *widths)


def _mixture_terms(at: ReducedCoordinates, m: _Mixture) -> Tensor:
    assert at.u_t is not None  # mixtures are of spherical populations
    scaled = ((at.y[:, :1] - m.mean) / m.sd) ** 2 + (at.y[:, 1:] / m.sd_r) ** 2 + (at.u_t[:, None] / m.sd_t) ** 2
    norm = m.sd.log() + m.sd_r.log() + 2 * m.sd_t.log() + 2 * math.log(2 * math.pi)
    return m.log_weight - 0.5 * scaled - norm


def _fit_mixture(stars: ReducedCoordinates, weight: Tensor, k: int, n_steps: int) -> _Mixture:
    """Fit by EM from a start that depends on ranks only; every step is differentiable."""
    assert stars.u_t is not None
    ln_r, u_r, u_t = stars.y[:, 0], stars.y[:, 1], stars.u_t
    order = ln_r.detach().argsort()
    share = weight.detach()[order].cumsum(0)
    levels = (torch.arange(k, dtype=torch.float64) + 0.5) / k
    mean = ln_r[order[torch.searchsorted(share, levels).clamp(max=len(order) - 1)]]
    rms_r, rms_t = ((weight * u**2).sum().sqrt() for u in (u_r, u_t / math.sqrt(2)))
    # cold, hot and radial components in turn, so that shapes of the velocity ellipsoid can differ at one radius
    tilt = torch.tensor([0.5, 1.0, 1.4], dtype=torch.float64)[torch.arange(k) % 3]
    tilt_t = torch.tensor([0.5, 1.3, 0.7], dtype=torch.float64)[torch.arange(k) % 3]
    spread = (weight * (ln_r - (weight * ln_r).sum()) ** 2).sum().sqrt() * 2 / k
    m = _Mixture(torch.full_like(mean, -math.log(k)), mean, spread.expand(k), rms_r * tilt, rms_t * tilt_t)
    for _ in range(n_steps):
        # responsibilities are computed again in the backward pass: memory does not grow with the steps
        m = _Mixture(*checkpoint(_em_step, stars, weight, *m, use_reentrant=False))
    return m


def _em_step(stars: ReducedCoordinates, weight: Tensor, *parameters: Tensor) -> _Mixture:
    assert stars.u_t is not None
    ln_r, u_r, u_t = stars.y[:, 0], stars.y[:, 1], stars.u_t
    part = torch.softmax(_mixture_terms(stars, _Mixture(*parameters)), -1) * weight[:, None]
    mass = part.sum(0) + 1e-12
    mean = (part * ln_r[:, None]).sum(0) / mass
    sd = ((part * (ln_r[:, None] - mean) ** 2).sum(0) / mass + 1e-6).sqrt()
    sd_r = ((part * u_r[:, None] ** 2).sum(0) / mass + 1e-8).sqrt()
    sd_t = ((part * u_t[:, None] ** 2).sum(0) / (2 * mass) + 1e-8).sqrt()
    return _Mixture((mass / mass.sum()).log(), mean, sd, sd_r, sd_t)
