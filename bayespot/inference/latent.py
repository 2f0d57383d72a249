"""The latent sites of a model as one unconstrained vector, and the posterior density over it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributions import biject_to

from bayespot.actions.base import ActionAngles, ActionFinder, CappedActions
from bayespot.df.base import DistributionFunction
from bayespot.likelihood.model import SnapshotModel
from bayespot.potential.base import Potential

#: Stars per block in sums over the whole catalogue: bounds memory at any number of stars.
BLOCK = 100_000
#: The site of the outliers' fraction.
OUTLIERS = "outliers.fraction"


class LatentSpace:
    """Maps a real vector to the sites of a model and back; the potential's sites come first, then those of streams.

    ``n_potential`` counts both. The sites of f(J) follow, last the fraction of outliers.

    Parameters
    ----------
    model
        Its sites' priors give shapes and supports.
    """

    def __init__(self, model: SnapshotModel) -> None:
        self.model = model
        sites = model.sites()
        order = [n for part in ("potential.", "streams.", "df.", "outliers.") for n in sites if n.startswith(part)]
        self.priors = {name: sites[name] for name in order}
        self.shapes, self.transforms, self.slices = {}, {}, {}
        start = 0
        for name, prior in self.priors.items():
            transform = biject_to(prior.support)
            shape = transform.inverse_shape(prior.batch_shape + prior.event_shape)
            stop = start + shape.numel()
            self.shapes[name], self.transforms[name], self.slices[name] = shape, transform, slice(start, stop)
            if not name.startswith(("df.", "outliers.")):
                self.n_potential = stop
            start = stop
        self.size = start
        self._normal = _NormalPriors(self)

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """Return the sites' values at the unconstrained vector ``u`` ``(*batch, size)``."""
        out = {}
        for name, part in self.slices.items():
            raw = u[..., part].reshape(u.shape[:-1] + self.shapes[name])
            out[name] = self.transforms[name](raw)
        return out

    def vector(self, values: dict[str, Tensor]) -> Tensor:
        """Return the unconstrained vector of the given values; the inverse of `values`."""
        return torch.cat([self.transforms[n].inv(values[n]).reshape(-1) for n in self.priors]).double()

    def log_prior(self, u: Tensor) -> Tensor:
        """Return the log prior density in u.

        Raises
        ------
        ValueError
            If u is not finite.
        """
        if not bool(torch.isfinite(u.detach()).all()):
            raise ValueError("the latents are not finite: no value of a site is within the support of its prior")
        total = self._normal.log_prob(u)
        for name in self._normal.others:
            raw = u[self.slices[name]].reshape(self.shapes[name])
            value = self.transforms[name](raw)
            total = total + self.priors[name].log_prob(value).sum()
            total = total + self.transforms[name].log_abs_det_jacobian(raw, value).sum()
        return total + self.model.log_factors(self.values(u)) if self.model.has_factors else total

    def log_likelihood(self, u: Tensor, w: Tensor) -> Tensor:
        """Return the log-density of each star of ``w`` at ``u``."""
        return self.model.at(self.values(u)).log_prob(w)

    def log_posterior(self, u: Tensor, w: Tensor) -> Tensor:
        """Return the unnormalised log posterior density in u, without gradients; any number of stars."""
        with torch.no_grad():
            fixed = self.model.at(self.values(u))
            return self.log_prior(u) + sum(fixed.log_prob(block).sum() for block in blocks(w))

    def gradient(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log posterior density and its gradient in u, block by block."""
        value, slope = self.likelihood_gradient(u, w)
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            prior = self.log_prior(u)
            return value + prior.detach(), slope + torch.autograd.grad(prior, u)[0]

    def likelihood_gradient(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of the stars ``w`` and its gradient in u, block by block."""
        u = u.detach().requires_grad_()
        value, slope = u.new_zeros(()), torch.zeros_like(u)
        with torch.enable_grad():
            for block in blocks(w):
                part = self.log_likelihood(u, block).sum()
                slope = slope + torch.autograd.grad(part, u)[0]
                value = value + part.detach()
        return value, slope

    def log_fraction_gradient(self, u: Tensor) -> Tensor:
        """Return the gradient in u of ln Z, the fraction selected; the model's points must be laid."""
        points = self.model.points
        assert points is not None  # the caller laid them
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            log_z = points.log_z(self.model.at(self.values(u)).true_density().log_prob(points.w))
            return torch.autograd.grad(log_z, u)[0]

    @torch.no_grad()
    def scores(self, u: Tensor, w: Tensor, step: float = 1e-4) -> Tensor:
        """Return d ln p(w_i)/du ``(n, size)`` by central differences (error of order step^2).

        Differences cost two passes per parameter without a graph, and are not misled by turning points
        that are constants of the first derivative.
        """
        columns = torch.zeros(len(w), self.size, dtype=torch.float64)
        # without errors or selection f(J) is all that depends on the df's sites
        plain = self.model.is_plain
        # of the sites of streams the density of these stars does not depend at all
        of_streams: list[range] = [
            range(self.size)[part] for name, part in self.slices.items() if name.startswith("streams.")
        ]
        member = torch.ones((), dtype=torch.float64)
        of_outliers = self.slices.get(OUTLIERS)
        if of_outliers is not None:
            values = self.values(u)
            outlier = self.model.at(values).density().outlier_probability(w)
            member = 1 - outlier
            # in u, the logit, the derivative is that of a mixture's weight
            columns[:, of_outliers.start] = outlier - values[OUTLIERS]
            of_streams.append(range(self.size)[of_outliers])
        unmoved = self.model
        if self.model.smoothing is None:
            # the literal likelihood asks a finder for the map back as well
            unmoved = copy.copy(self.model)
            unmoved.finder = _RememberedActions(self.model.finder)
        for k in sorted(set(range(self.size)).difference(*of_streams)):
            ahead, behind = u.clone(), u.clone()
            ahead[k] += step
            behind[k] -= step
            model = self.model if k < self.n_potential else unmoved
            plus, minus = model.at(self.values(ahead)), model.at(self.values(behind))
            if k < self.n_potential or not plain:
                columns[:, k] = (plus.log_prob(w) - minus.log_prob(w)) / (2 * step)
            else:
                # f(J) alone changes: the actions are computed once
                if k == self.n_potential:
                    J, _ = plus.finder.capped_actions(plus.potential, w)
                columns[:, k] = member * (_log_f(plus.df, J) - _log_f(minus.df, J)) / (2 * step)
        return columns

    def fisher(self, u: Tensor, w: Tensor, max_stars: int, seed: int, tick: Callable[[], None] | None = None) -> Tensor:
        """Return the outer-product Fisher information of the data plus the prior's curvature, in u.

        More than ``max_stars`` stars are represented by a random subset, scaled up. The curvature of the
        prior and of the streams is that of their log-density (central differences of the gradient), with the
        absolute values of its eigenvalues, which are positive at a maximum.
        """
        n = len(w)
        if n > max_stars:
            w = w[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:max_stars]]
        information = torch.zeros(self.size, self.size, dtype=torch.float64)
        curvature = 0.0
        for block in blocks(w, 25_000):
            scores = self.scores(u, block)
            information += scores.T @ scores
            curvature += self._fraction_curvature(u, scores)
            if tick:
                tick()
        if (own := self.slices.get(OUTLIERS)) is not None:
            information[own, own] = information[own, own].clamp(min=curvature)
        return information * (n / len(w)) + self.prior_curvature(u)

    def _fraction_curvature(self, u: Tensor, scores: Tensor) -> float:
        """Minus the second derivative of ln p in the logit of the outliers' fraction, summed over stars.

        The outer product of scores is N eps^2 without outliers, where the curvature is N eps, far larger.
        """
        own = self.slices.get(OUTLIERS)
        if own is None:
            return 0.0
        fraction = self.values(u)[OUTLIERS]
        outlier = scores[:, own.start] + fraction
        return float((fraction * (1 - fraction) - outlier * (1 - outlier)).sum())

    def prior_curvature(self, u: Tensor, step: float = 1e-4) -> Tensor:
        """Return the curvature of minus the log prior in u, eigenvalues replaced by their absolute values."""

        def slope(v: Tensor) -> Tensor:
            v = v.detach().requires_grad_()
            with torch.enable_grad():
                value = self.log_prior(v)
                # flat priors everywhere leave nothing that depends on v
                return torch.autograd.grad(value, v)[0] if value.requires_grad else torch.zeros_like(v)

        rows = []
        for k in range(self.size):
            shift = torch.zeros_like(u)
            shift[k] = step
            rows.append((slope(u - shift) - slope(u + shift)) / (2 * step))
        curvature = torch.stack(rows)
        values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
        return (vectors * values.abs()) @ vectors.T


class _NormalPriors:
    """The sites with Normal priors as one vector: most are, and each has its price, paid at every gradient.

    ``others`` names the sites that are left.
    """

    def __init__(self, space: LatentSpace) -> None:
        self.others: list[str] = []
        rows, means, sds = [torch.zeros(0, dtype=torch.long)], [], []
        for name, prior in space.priors.items():
            inner = prior.base_dist if isinstance(prior, torch.distributions.Independent) else prior
            if not isinstance(inner, torch.distributions.Normal):
                self.others.append(name)
                continue
            part = space.slices[name]
            rows.append(torch.arange(part.start, part.stop))
            means.append(inner.loc.expand(space.shapes[name]).reshape(-1))
            sds.append(inner.scale.expand(space.shapes[name]).reshape(-1))
        self.rows = torch.cat(rows)
        self.mean, self.sd = (torch.cat([*x, torch.zeros(0)]).detach().double() for x in (means, sds))
        self.log_norm = -float(self.sd.log().sum()) - len(self.rows) * 0.5 * math.log(2 * math.pi)

    def log_prob(self, u: Tensor) -> Tensor:
        return self.log_norm - 0.5 * ((u[self.rows] - self.mean) / self.sd).square().sum()


class _RememberedActions(ActionFinder):
    """A finder in one potential: where f(J) alone changes, the actions of the same arrays are computed once."""

    def __init__(self, finder: ActionFinder) -> None:
        self.finder = finder
        # the arrays are kept, so that no other takes their place in memory
        self.seen: list[tuple[Tensor, CappedActions]] = []

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        for known, found in self.seen:
            if known.data_ptr() == w.data_ptr() and known.shape == w.shape and known.stride() == w.stride():
                return found
        self.seen.append((w, self.finder.capped_actions(potential, w)))
        return self.seen[-1][1]

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        return self.finder.actions_angles(potential, w)


def whitening(information: Tensor) -> Tensor:
    """Return lower-triangular C with C C^T = information^-1.

    Directions the data and the prior leave free (information below 1e-12 of its row's scale) keep a
    finite, large variance instead of failing.
    """
    scale = information.diagonal().clamp(min=1e-12).rsqrt()
    correlation = information * scale[:, None] * scale[None, :]
    values, vectors = torch.linalg.eigh((correlation + correlation.T) / 2)
    covariance = (vectors / values.clamp(min=1e-9)) @ vectors.T
    return torch.linalg.cholesky(covariance * scale[:, None] * scale[None, :])


def blocks(w: Tensor, size: int = BLOCK) -> Iterator[Tensor]:
    """Yield consecutive blocks of stars, of at most ``size`` rows in all (a star may have many samples)."""
    yield from w.split(stars_in(w, size))


def stars_in(w: Tensor, n_rows: int) -> int:
    """Return how many stars make ``n_rows`` rows of the data that `SnapshotModel.prepare` returns."""
    return n_rows if w.dim() == 2 else max(1, n_rows // w.shape[1])


def _log_f(df: DistributionFunction, J: Tensor) -> Tensor:
    return df.log_prob(J)
