"""Hamiltonian Monte Carlo with many chains side by side, for densities that cost little more at many places at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.inference.latent import whitening

#: Chains, leapfrog steps of a trajectory, and the acceptance that the step is adapted to (Beskos et al. 2013, Bernoulli
#: 19, 1501, give 0.65 at least; rough posteriors want more).
N_CHAINS, _LEAPFROG, _ACCEPTANCE = 64, 16, 0.8
#: Trajectories of the warm-up with the metric given, and of each of the two with that of the chains. Trajectories from
#: one kept draw to the next.
_WARMUP, _SECOND_WARMUP, _THIN = 16, 8, 5
#: Width of the start over the metric's, first step, its largest change after a trajectory, and its scatter.
_START, _FIRST_STEP, _GAIN, _JITTER = 0.2, 0.05, 0.5, 0.3
#: How far below the median of ln p a chain may be in the warm-up, in standard deviations of a Gaussian's: one
#: that is farther has not come down from where it started, and begins anew where another is.
_LOST = 10.0
#: Weight of the old metric among the chains' covariance, as a number of draws.
_PRIOR_DRAWS = 60

#: Log density and its gradient ``(n_chains, d)`` at places of that shape.
Gradients = Callable[[Tensor], tuple[Tensor, Tensor]]


class Chains(NamedTuple):
    """Draws ``(n_kept, n_chains, d)``, the mean acceptance while they were made, and the root of the metric."""

    u: Tensor
    acceptance: float
    C: Tensor


def starts(u_0: Tensor, information: Tensor, seed: int) -> Tensor:
    """Return places ``(n_chains, d)`` near u_0, for an information about there."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(N_CHAINS, len(u_0), generator=generator, dtype=u_0.dtype)
    return u_0 + _START * noise @ whitening(information).T


def hmc(
    gradients: Gradients,
    u: Tensor,
    information: Tensor,
    n_draws: int,
    seed: int,
    tick: Callable[[str], None],
    warm: Chains | None = None,
) -> Chains:
    """Draw from a density by Hamiltonian Monte Carlo (Neal 2011, Handbook of MCMC, chapter 5).

    The metric is the given information, and after each part of the warm-up the covariance of the chains. Trajectories
    are of fixed length with steps that vary at random.

    Parameters
    ----------
    gradients
        Log density and gradient at many places; not finite where there is no density.
    u : Float[Tensor, "n_chains d"]
        Where chains start.
    information : Float[Tensor, "d d"]
        The inverse of about the covariance.
    n_draws
        At least so many are kept, thinned.
    seed
        Of momenta.
    tick
        Called with a note after each trajectory.
    warm
        Chains of nearly the same density: they go on from where they were, with their metric.
    """
    generator = torch.Generator().manual_seed(seed)
    if warm is None:
        sampler = _Sampler(gradients, u, whitening(information), generator, tick)
        sampler.warm_up(_WARMUP)
    else:
        sampler = _Sampler(gradients, warm.u[-1], warm.C, generator, tick)
    sampler.warm_up(_SECOND_WARMUP)
    sampler.warm_up(_SECOND_WARMUP)
    sampler.adapts = False
    kept: list[Tensor] = []
    while len(kept) * N_CHAINS < n_draws:
        for _ in range(_THIN):
            u = sampler.next()
        kept.append(u)
    return Chains(torch.stack(kept), sampler.accepted / sampler.counted, sampler.C)


def n_trajectories(n_draws: int, warm: bool = False) -> int:
    """Return how often `hmc` reports on the way to so many draws, from the start or from ``warm`` chains."""
    return (0 if warm else _WARMUP) + 2 * _SECOND_WARMUP + _THIN * math.ceil(n_draws / N_CHAINS)


def r_hat(u: Tensor) -> Tensor:
    """Return r-hat ``(d,)`` of draws ``(n_kept, n_chains, d)``: between chains over within them.

    Without halving the chains, which here are many and short (Gelman & Rubin 1992, Statistical Science 7, 457).
    """
    n = len(u)
    within, between = u.var(0).mean(0), u.mean(0).var(0)
    return ((n - 1) / n + between / within.clamp(min=1e-300)).sqrt()


class _Sampler:
    """The chains' places u = centre + C z, and the step."""

    def __init__(
        self, gradients: Gradients, u: Tensor, C: Tensor, generator: torch.Generator, tick: Callable[[str], None]
    ) -> None:
        self.gradients, self.centre, self.C = gradients, u.mean(0), C
        self.generator, self.tick = generator, tick
        self.step, self.adapts, self.accepted, self.counted = _FIRST_STEP, True, 0.0, 0
        self.z = self._white(u - self.centre)
        self.value, self.slope = self._at(self.z)
        self.gather()

    def _white(self, u: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.C, u.T, upper=False).T

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.C.dtype)

    def _at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self.gradients(self.centre + z @ self.C.T)
        return value, slope @ self.C

    def gather(self) -> None:
        """Put chains that are far from where the density is to where others are."""
        scatter = (self.z.shape[1] / 2) ** 0.5
        lost = ~(self.value > self.value.nan_to_num(-math.inf).median() - _LOST * scatter)
        sound = (~lost).nonzero()[:, 0]
        chosen = sound[torch.randint(len(sound), (int(lost.sum()),), generator=self.generator)]
        for part in (self.z, self.value, self.slope):
            part[lost] = part[chosen]

    def warm_up(self, n: int) -> None:
        """Advance by n trajectories; the metric is then the covariance in the second half of them."""
        for _ in range(n - n // 2):
            self.next()
        self.gather()
        found = torch.cat([self.next() for _ in range(n // 2)])
        centred = found - found.mean(0)
        covariance = (centred.T @ centred + _PRIOR_DRAWS * self.C @ self.C.T) / (len(found) + _PRIOR_DRAWS)
        self.remeasure(torch.linalg.cholesky(covariance))

    def remeasure(self, C: Tensor) -> None:
        """Take another metric; the chains stay where they are."""
        u = self.z @ self.C.T
        self.C = C
        self.z = self._white(u)
        self.value, self.slope = self._at(self.z)

    def trajectory(self, p: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return z, momenta, ln p and its gradient after leapfrog steps from where the chains are."""
        z, value, slope = self.z, self.value, self.slope
        for _ in range(_LEAPFROG):
            p = p + step / 2 * slope
            z = z + step * p
            value, slope = self._at(z)
            # a chain that has left the density stands still, and is sent back at the end
            slope = torch.where(torch.isfinite(slope).all(-1, keepdim=True), slope, 0.0)
            p = p + step / 2 * slope
        return z, p, value, slope

    def next(self) -> Tensor:
        """Return where the chains are after one more trajectory."""
        jitter = 1 + _JITTER * (2 * float(torch.rand((), generator=self.generator)) - 1)
        step = self.step * jitter
        p = self._noise(*self.z.shape)
        before = self.value - (p**2).sum(-1) / 2
        z, p, value, slope = self.trajectory(p, step)
        rate = (value - (p**2).sum(-1) / 2 - before).exp().nan_to_num(0.0).clamp(max=1.0)
        take = torch.rand(len(z), generator=self.generator, dtype=z.dtype) < rate
        self.z = torch.where(take[:, None], z, self.z)
        self.value, self.slope = torch.where(take, value, self.value), torch.where(take[:, None], slope, self.slope)
        mean = float(rate.mean())
        if self.adapts:
            self.step *= math.exp(_GAIN * (mean - _ACCEPTANCE))
        else:
            self.accepted, self.counted = self.accepted + mean, self.counted + 1
        self.tick(f"acceptance {mean:.2f}")
        return self.centre + self.z @ self.C.T
