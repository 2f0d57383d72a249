"""The latent sites of a model as one unconstrained vector, and the posterior density over it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import biject_to

from bayespot.actions.base import ActionAngles, ActionFinder, CappedActions
from bayespot.actions.response import Response
from bayespot.df.base import DistributionFunction
from bayespot.inference.blocks import BLOCK, Cut, mapped, stars_in
from bayespot.likelihood.model import SnapshotModel
from bayespot.likelihood.phase_mixed import UNBOUND_STEEPNESS, ObservedStars
from bayespot.potential.base import Potential

#: Stars per block of a literal likelihood.
_LITERAL_BLOCK = 100_000
#: The site of the outliers' fraction.
OUTLIERS = "outliers.fraction"


class LatentSpace:
    """Maps a real vector to the sites of a model and back; the potential's sites come first.

    Those of streams and of the system's place on the sky are next: ``n_potential`` counts all three. The sites of f(J)
    follow, last the fraction of outliers.

    Parameters
    ----------
    model
        Its sites' priors give shapes and supports.
    """

    def __init__(self, model: SnapshotModel) -> None:
        self.model = model
        sites = model.sites()
        order = [
            n for part in ("potential.", "streams.", "sky.", "df.", "outliers.") for n in sites if n.startswith(part)
        ]
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

    def valid(self, u: Tensor) -> bool:
        """Whether every site has a value at u: exponentials of the latents of a long trial step over- or underflow."""
        values = self.values(u)
        return all(
            bool(torch.isfinite(values[name]).all())
            and (prior.support is None or bool(prior.support.check(values[name]).all()))
            for name, prior in self.priors.items()
        )

    def vector(self, values: dict[str, Tensor]) -> Tensor:
        """Return the unconstrained vector of the given values; the inverse of `values`."""
        return torch.cat([self.transforms[n].inv(values[n]).reshape(-1) for n in self.priors]).double()

    def log_prior(self, u: Tensor) -> Tensor:
        """Return the log prior density ``(*batch,)`` in u ``(*batch, size)``.

        Raises
        ------
        ValueError
            If u is not finite.
        """
        if not bool(torch.isfinite(u.detach()).all()):
            raise ValueError("the latents are not finite: no value of a site is within the support of its prior")
        total = self._normal.log_prob(u)
        for name in self._normal.others:
            raw = u[..., self.slices[name]].reshape(u.shape[:-1] + self.shapes[name])
            value = self.transforms[name](raw)
            for part in (self.priors[name].log_prob(value), self.transforms[name].log_abs_det_jacobian(raw, value)):
                total = total + part.reshape(*u.shape[:-1], -1).sum(-1)
        if not self.model.has_factors:
            return total
        rows = [self.model.log_factors(self.values(row)) for row in u.reshape(-1, self.size)]
        return total + torch.stack(rows).reshape(total.shape)

    def log_likelihood(self, u: Tensor, w: Tensor) -> Tensor:
        """Return the log-density of each star of ``w`` at ``u``."""
        return self.model.at(self.values(u)).log_prob(w)

    @torch.no_grad()
    def log_likelihoods(self, u: Tensor, w: Tensor) -> Tensor:
        """Return the log-density of each star of ``w`` at ``u``, without gradients; any number of stars."""
        density = self.model.at(self.values(u)).tabulated(w).density()
        return torch.cat(list(mapped(density.log_prob, w, self._block)))

    @torch.no_grad()
    def log_posterior(self, u: Tensor, w: Tensor) -> Tensor:
        """Return the unnormalised log posterior density in u, without gradients; any number of stars."""
        density = self.model.at(self.values(u)).tabulated(w).density()
        return self.log_prior(u) + sum(mapped(lambda block: density.log_prob(block).sum(), w, self._block))

    def log_posterior_near(self, u_0: Tensor, w: Tensor, n_rows: int, seed: int) -> Callable[[Tensor], Tensor]:
        r"""Return `log_posterior` of ``w`` as a function of u, of large catalogues from a random part of n_rows rows.

        The part's log-likelihood, scaled to all stars, is corrected to first order about u_0, so that value and
        gradient there are those of all stars. Where u is a draw from the posterior of d latents and B stars are in the
        part, the rest is noise of one or two times :math:`d / \sqrt{B}`, the same for equal u, and as much
        in the mean.
        """
        part = stars_in(w, n_rows)
        if len(w) <= 2 * part or self.model.smoothing is not None or self.model.points is not None:
            return lambda u: self.log_posterior(u, w)
        rows = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))[:part]
        few, scale = w[rows], len(w) / part
        (value, slope), (own, own_slope) = (self.likelihood_gradient(u_0, stars) for stars in (w, few))
        value, slope = value - scale * own, slope - scale * own_slope

        def estimate(u: Tensor) -> Tensor:
            prior = self.log_prior(u)
            return prior + scale * (self.log_posterior(u, few) - prior) + value + slope @ (u - u_0)

        return estimate

    def gradient(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log posterior density and its gradient in u, block by block."""
        value, slope = self.likelihood_gradient(u, w)
        prior, prior_slope = self.prior_gradient(u)
        return value + prior, slope + prior_slope

    def prior_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log prior density and its gradient in u."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            prior = self.log_prior(u)
            # flat priors everywhere leave nothing that depends on u
            slope = torch.autograd.grad(prior, u)[0] if prior.requires_grad else torch.zeros_like(u)
            return prior.detach(), slope

    def likelihood_gradient(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of the stars ``w`` and its gradient in u.

        Tables of actions and the normalisation of a selection are computed, and differentiated, once for all blocks of
        stars.
        """
        u, cut = u.detach().requires_grad_(), Cut()
        with torch.enable_grad():
            if self.model.smoothing is None:
                log_p = self._in_blocks(u, w, cut).log_prob
            else:
                leaf = cut(u)
                log_p = functools.partial(self.log_likelihood, leaf)

            def one(block: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
                part = log_p(block).sum()
                return part.detach(), torch.autograd.grad(part, cut.leaves, allow_unused=True)

            value = u.new_zeros(())
            for part, gradients in mapped(one, w, self._block):
                value = value + part
                cut.add(gradients)
            return value, cut.gradient(u)

    def _in_blocks(self, u: Tensor, w: Tensor, cut: Cut) -> ObservedStars:
        """Return the density of any of the stars ``w`` at ``u``, with the graph cut behind all that they share."""
        values = self.values(u)
        whole = self.model.at(values).tabulated(w)
        fixed = self.model.at({name: cut(value) for name, value in values.items()})
        fixed.finder, fixed.lattice = whole.finder.through(cut), whole.lattice
        density = fixed.density()
        shared = whole.density().shared()
        return density if shared is None else density.sharing(cut(shared))

    @property
    def _block(self) -> int:
        # a literal density samples its population anew for every block
        return BLOCK if self.model.smoothing is None else _LITERAL_BLOCK

    def log_fraction_gradient(self, u: Tensor) -> Tensor:
        """Return the gradient in u of ln Z, the fraction selected; the model's points must be laid."""
        points = self.model.points
        assert points is not None  # the caller laid them
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            log_z = points.log_z(self.model.at(self.values(u)).true_density().log_prob(points.w))
            return torch.autograd.grad(log_z, u)[0]

    @torch.no_grad()
    def scores(
        self, u: Tensor, w: Tensor, step: float = 1e-4, responder: Callable[[Tensor], Response] | None = None
    ) -> Tensor:
        """Return d ln p(w_i)/du ``(n, size)`` by central differences (error of order step^2).

        A ``responder`` spares the differences by the potential's latents (`fisher`).

        Differences cost two passes per parameter without a graph, and are not misled by turning points
        that are constants of the first derivative.
        """
        return torch.cat(list(mapped(self._scorer(u, w, step, responder), w)))

    def _scorer(
        self, u: Tensor, w: Tensor, step: float = 1e-4, responder: Callable[[Tensor], Response] | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Return what computes the scores of blocks of the stars ``w``; tables are computed once for all blocks.

        A ``responder`` knows the actions of stars and their derivatives by the potential.
        """
        values = self.values(u)
        here = self.model.at(values).tabulated(w)
        # without errors or selection f(J) is all that depends on the df's sites
        plain = self.model.is_plain
        # of the sites of streams the density of these stars does not depend at all
        apart: list[range] = [
            range(self.size)[part] for name, part in self.slices.items() if name.startswith("streams.")
        ]
        of_outliers = self.slices.get(OUTLIERS)
        if of_outliers is not None:
            apart.append(range(self.size)[of_outliers])

        def moved(k: int, by: float) -> SnapshotModel:
            at = u.clone()
            at[k] += by
            model = self.model.at(self.values(at))
            if k < self.n_potential:
                return model.tabulated(w)
            if model.smoothing is None:
                # the literal likelihood asks a finder for the map back as well
                model.finder, model.lattice = here.finder, here.lattice
            return model

        points = self.model.points
        of_fraction = w.new_zeros(self.n_potential)
        at_points = RememberedActions(here.finder)
        if responder is not None:
            apart.append(range(self.n_potential))
            if points is not None:
                found = responder(points.w)
                at_points.remember(points.w, found)
                weight = torch.softmax(points.log_weight + points.accepted.log() + capped_density(here.df, found), 0)
                of_fraction = weight @ potential_scores(here.df, found)
        pairs = {k: (moved(k, step), moved(k, -step)) for k in sorted(set(range(self.size)).difference(*apart))}

        def of_all_stars(k: int, model: SnapshotModel) -> Tensor | None:
            if points is None and not model.conditional:
                return None  # a literal density would sample its population for nothing
            if k >= self.n_potential and model.smoothing is None:
                model = copy.copy(model)
                model.finder = at_points
            return model.density().shared()

        shared = {k: [of_all_stars(k, model) for model in pair] for k, pair in pairs.items()}

        def scores(block: Tensor) -> Tensor:
            columns = block.new_zeros(len(block), self.size)
            density, member = here.density(), block.new_ones(())
            if of_outliers is not None:
                outlier = density.outlier_probability(block)
                member = 1 - outlier
                # in u, the logit, the derivative is that of a mixture's weight
                columns[:, of_outliers.start] = outlier - values[OUTLIERS]
            remembered = RememberedActions(here.finder)
            J = None
            if responder is not None:
                found = responder(block)
                remembered.remember(block[..., :6], found)
                own = potential_scores(here.df, found)
                if block.dim() == 3:
                    log_p = capped_density(here.df, found).reshape(block.shape[:-1]) + block[..., 6]
                    own = (torch.softmax(log_p, -1)[..., None] * own.reshape(*log_p.shape, -1)).sum(1)
                columns[:, : self.n_potential] = member[..., None] * (own - of_fraction)
                J = found.J if plain else None
            elif plain:
                J = here.finder.capped_actions(here.potential, block).J
            for k, pair in pairs.items():
                if k >= self.n_potential and J is not None:
                    plus, minus = (model.df.log_prob(J) for model in pair)
                    columns[:, k] = member * (plus - minus) / (2 * step)
                    continue
                both = []
                for i, model in enumerate(pair):
                    one = model
                    if k >= self.n_potential and model.smoothing is None:
                        one = copy.copy(model)
                        one.finder = remembered
                    of_one, of_all = one.density(), shared[k][i]
                    both.append((of_one if of_all is None else of_one.sharing(of_all)).log_prob(block))
                columns[:, k] = (both[0] - both[1]) / (2 * step)
            return columns

        return scores

    @torch.no_grad()
    def fisher(
        self,
        u: Tensor,
        w: Tensor,
        max_stars: int,
        seed: int,
        tick: Callable[[], None] | None = None,
        responder: Callable[[Tensor], Response] | None = None,
    ) -> Tensor:
        """Return the outer-product Fisher information of the data plus the prior's curvature, in u.

        More than ``max_stars`` stars are represented by a random subset, scaled up. A ``responder`` spares the
        differences by the potential's latents, see `bayespot.inference.linearised`. The curvature of the
        prior and of the streams is that of their log-density (central differences of the gradient), with the
        absolute values of its eigenvalues, which are positive at a maximum.
        """
        n = len(w)
        if n > max_stars:
            w = w[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:max_stars]]
        information = torch.zeros(self.size, self.size, dtype=torch.float64)
        curvature = 0.0
        scorer = self._scorer(u, w, responder=responder)

        def one(block: Tensor) -> tuple[Tensor, float]:
            scores = scorer(block)
            return scores.T @ scores, self._fraction_curvature(u, scores)

        for product, curved in mapped(one, w):
            information += product
            curvature += curved
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
            return self.prior_gradient(v)[1]

        normal = self._normal
        known = torch.zeros(self.size, dtype=torch.bool)
        rows = torch.zeros(self.size, self.size, dtype=torch.float64)
        if not self.model.has_factors:
            known[normal.rows] = True
            rows[normal.rows, normal.rows] = normal.sd**-2
        for k in torch.nonzero(~known)[:, 0]:
            shift = torch.zeros_like(u)
            shift[k] = step
            rows[k] = (slope(u - shift) - slope(u + shift)) / (2 * step)
        curvature = rows
        values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
        return (vectors * values.abs()) @ vectors.T


def capped_density(df: DistributionFunction, response: Response) -> Tensor:
    """Return ln p(w) ``(n,)`` of members, up to a constant: ln f, lower for the unbound (`PhaseMixed`)."""
    return df.log_prob(response.J) - UNBOUND_STEEPNESS * response.excess


def potential_scores(df: DistributionFunction, response: Response) -> Tensor:
    """Return d ln p(w)/da ``(n, k)`` of members: ln f at actions that respond to the potential."""
    with torch.enable_grad():
        J = response.J.detach().requires_grad_()
        (slope,) = torch.autograd.grad(df.log_prob(J).sum(), J)
    scores = (slope[:, ::2, None] * response.of_J).sum(1)
    return scores - UNBOUND_STEEPNESS * (response.excess > 0)[:, None] * response.of_excess


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
        return self.log_norm - 0.5 * ((u[..., self.rows] - self.mean) / self.sd).square().sum(-1)


class RememberedActions(ActionFinder):
    """A finder in one potential: where f(J) alone changes, the actions of the same arrays are computed once."""

    def __init__(self, finder: ActionFinder) -> None:
        self.finder = finder
        # the arrays are kept, so that no other takes their place in memory
        self.seen: list[tuple[Tensor, CappedActions]] = []

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        for known, found in self.seen:
            if same_array(known, w):
                return found
        self.seen.append((w, self.finder.capped_actions(potential, w)))
        return self.seen[-1][1]

    def remember(self, w: Tensor, found: Response) -> None:
        """Take the actions of ``w`` ``(*batch, 6)`` from their response."""
        J, excess = found.J.reshape(*w.shape[:-1], 3), found.excess.reshape(w.shape[:-1])
        self.seen.append((w, CappedActions(J, excess)))

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        return self.finder.actions_angles(potential, w)


def same_array(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same numbers, as a single block of stars is of all."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


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
