"""Proposals of importance sampling: mixtures of Student's t, and those learned on a surrogate of the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.interpolate import RBFInterpolator
from torch import Tensor

#: Degrees of freedom of the t's.
_DEGREES = 5
#: Of the surrogate: how far below the highest value its points may be, and how far, in root mean square, it may pass
#: by them: values of the target may be noisy; fewest points per dimension.
_DROP, _SMOOTHING, _LEAST = 30.0, 1.0, 5
#: Of a rehearsal: most iterations, draws in each, and effective ones that the next is made of; where there are fewer
#: the weights are flattened, at most to this power.
_ITERATIONS, _DRAWS, _EFFECTIVE, _FLATTEST = 4, 2000, 200, 0.05
#: t's of a proposal, draws they are placed with, share of these that are near to one, the width of one over the scatter
#: of those near to it, and the share of their mean variance in every direction that all have.
_CENTRES, _POOL, _NEAR, _WIDTH, _ROUND = 100, 1000, 0.4, 1.0, 0.1


class Proposal(NamedTuple):
    """A mixture of k multivariate Student's t of equal shares: means ``(k, d)`` and roots of covariances
    ``(k, d, d)``."""

    means: Tensor
    roots: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> Proposal:
        """Return a single t of mean ``(d,)`` and covariance ``(d, d)``, but for its degrees of freedom."""
        return cls(mean[None], torch.linalg.cholesky(covariance)[None])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n draws ``(n, d)``."""
        k, d = self.means.shape
        which = torch.randint(k, (n,), generator=generator)
        z = torch.randn(n, d, generator=generator, dtype=self.means.dtype)
        chi_square = (torch.randn(n, _DEGREES, generator=generator, dtype=z.dtype) ** 2).sum(-1, keepdim=True)
        return self.means[which] + (self.roots[which] @ z[..., None])[..., 0] * (_DEGREES / chi_square).sqrt()

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density ``(n,)`` at x ``(n, d)``."""
        k, d = self.means.shape
        back = torch.linalg.inv(self.roots)
        z = back @ x.T - back @ self.means[..., None]
        norm = math.lgamma((_DEGREES + d) / 2) - math.lgamma(_DEGREES / 2) - d / 2 * math.log(_DEGREES * math.pi)
        spread = self.roots.diagonal(dim1=1, dim2=2).log().sum(-1)
        parts = norm - spread[:, None] - (_DEGREES + d) / 2 * torch.log1p((z**2).sum(1) / _DEGREES)
        return parts.logsumexp(0) - math.log(k)


def effective(log_weights: Tensor) -> float:
    """Return the effective number of draws, (sum of weights)^2 over the sum of their squares."""
    return float(1 / (torch.softmax(log_weights, 0) ** 2).sum())


def flattened(log_weights: Tensor, wanted: float) -> Tensor:
    """Return a power of the weights, as near to one as leaves ``wanted`` effective draws, but not below 0.05."""
    power = 1.0
    while effective(power * log_weights) < wanted and power > _FLATTEST:
        power *= 0.9
    return power * log_weights


def rehearsed(x: Tensor, log_p: Tensor, proposals: Sequence[Proposal], generator: torch.Generator) -> Proposal:
    """Learn a proposal on a surrogate of the target, of which draws cost next to nothing.

    The surrogate is a radial basis function of whitened coordinates, a cubic of the distance and a plane. It is drawn
    from with the proposals there are and with mixtures of t's about the draws, each as wide as the draws near to it
    scatter (Givens & Raftery 1996, JASA 91, 132, section 2.2): these follow ridges that bend and widen. No
    density of the target enters but at its own points, so that what the surrogate gets wrong costs draws and does not
    make them wrong.

    Parameters
    ----------
    x, log_p : Float[Tensor, "n d"], Float[Tensor, "n"]
        Where the target was evaluated, and its logarithm; minus infinity where there is none.
    proposals
        Where x was drawn from; the surrogate counts where their density is not below that at any x.
    generator
        Of the draws.
    """
    kept = log_p > log_p.max() - _DROP
    x, log_p = x[kept], log_p[kept]
    surrogate = _surrogate(x, log_p)
    floor = log_mixture([one.log_prob(x) for one in proposals]).min()

    def value(x: Tensor, densities: Sequence[Tensor]) -> Tensor:
        return torch.where(log_mixture(densities[: len(proposals)]) < floor, -math.inf, surrogate(x))

    mine, counts = list(proposals), [_DRAWS // len(proposals) + 1] * len(proposals)
    draws = torch.cat([one.sample(n, generator) for one, n in zip(mine, counts, strict=True)])
    densities = [one.log_prob(draws) for one in mine]
    values = value(draws, densities)
    for iteration in range(_ITERATIONS):
        weights = values - log_mixture(densities, counts)
        found = _local(draws, flattened(weights, _EFFECTIVE), generator)
        if iteration == _ITERATIONS - 1 or (iteration and effective(weights) >= _EFFECTIVE):
            break
        more = found.sample(_DRAWS, generator)
        of_more = [one.log_prob(more) for one in mine]
        values = torch.cat([values, value(more, of_more)])
        densities = [torch.cat(both) for both in zip(densities, of_more, strict=True)]
        draws = torch.cat([draws, more])
        densities.append(found.log_prob(draws))
        mine.append(found)
        counts.append(_DRAWS)
    return found


def learnable(log_p: Tensor, d: int) -> bool:
    """Whether there are values ``(n,)`` enough for a surrogate in d dimensions."""
    return int((log_p > log_p.max() - _DROP).sum()) >= _LEAST * d


def log_mixture(log_densities: Sequence[Tensor], counts: Sequence[int] | None = None) -> Tensor:
    """Return the log-density ``(n,)`` of draws from a mixture of proposals of these log-densities.

    ``counts`` are how many draws come from each; None: equally many.
    """
    shares = torch.tensor([1] * len(log_densities) if counts is None else counts, dtype=torch.float64)
    log_shares = (shares / shares.sum()).log()
    return torch.stack([one + share for one, share in zip(log_densities, log_shares, strict=True)]).logsumexp(0)


def _surrogate(x: Tensor, log_p: Tensor) -> Callable[[Tensor], Tensor]:
    """Interpolate ln p in coordinates in which the points have unit covariance."""
    mean, root = x.mean(0), torch.linalg.cholesky(torch.cov(x.T))

    def white(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root, (x - mean).T, upper=False).T

    found = RBFInterpolator(white(x).numpy(), log_p.numpy(), kernel="cubic", degree=1, smoothing=_SMOOTHING)
    return lambda x: torch.as_tensor(found(white(x).numpy()))


def _local(x: Tensor, log_weights: Tensor, generator: torch.Generator) -> Proposal:
    """Put t's about draws x ``(n, d)`` in proportion to their weights."""
    d = x.shape[1]
    weights = torch.softmax(log_weights, 0)
    centred = x - weights @ x
    root = torch.linalg.cholesky(centred.T @ (weights[:, None] * centred))
    y = torch.linalg.solve_triangular(root, x.T, upper=False).T
    centres = torch.multinomial(weights, _CENTRES, replacement=True, generator=generator)
    pool = y[torch.multinomial(weights, _POOL, replacement=True, generator=generator)]
    n_near = max(int(_NEAR * _POOL), 4 * d)
    near = pool[torch.cdist(y[centres], pool).topk(n_near, largest=False).indices]
    near = near - near.mean(1, keepdim=True)
    scatter = near.transpose(1, 2) @ near / n_near
    mean_variance = scatter.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    scatter = (1 - _ROUND) * scatter + _ROUND * mean_variance * torch.eye(d, dtype=x.dtype)
    return Proposal(x[centres], _WIDTH * root @ torch.linalg.cholesky(scatter))


__all__ = ["Proposal", "effective", "flattened", "learnable", "log_mixture", "rehearsed"]
