r"""The likelihood of a potential as a Gaussian in what the stars tell of Phi: what the posterior is sampled with.

Stars tell a few numbers about Phi well, such as v_c at their radii, and leave the rest to the prior. Phi is far from
linear in the latents of a free-form potential: over the width that the prior leaves them, what the stars know well
changes by hundreds of its standard deviations, and no Gaussian in the latents is near the posterior. In Phi itself the
likelihood is nearly Gaussian. With the stars' first-order response to Phi on a grid of nodes,

.. math::
    \ln L(u) \approx \ln L(u_0) + g \cdot c - \tfrac12 c^T H c, \qquad
    c = W^T [\Phi(u) - \Phi(u_0)]

where the columns of W pick the changes of Phi that stars tell apart, in units of their information; g is the exact
gradient, and H its derivative, measured where stars decide and one (the outer product of scores) where the prior does.
The prior, and Phi as a function of the latents, are exact. f(J) stays as it is at u_0 where it is independent of the
potential to first order: in a complete sample without errors. Otherwise its latents join c, of which the likelihood is
nearly Gaussian where f(J) is an exponential family (`bayespot.df.LogisticGaussianProcess`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from bayespot.actions.response import score_matrix
from bayespot.df.base import DistributionFunction
from bayespot.inference.blocks import stars_in
from bayespot.inference.latent import LatentSpace, capped_density, whitening
from bayespot.inference.linearised import AtFixedActions, Responder, components, phi_of_draws
from bayespot.inference.optimise import lbfgs

#: Rows of the data that decide on W, of more a random part; draws of the potential that show how Phi may change, and
#: how many of them are evaluated at once.
_MOST_ROWS, _DRAWS, _CHUNK = 25_000, 256, 64
#: Points of a selection whose scores are summed at a time.
_POINTS = 8192
#: Least information of a change of Phi that counts, over what it is with the draws' own size.
_LEAST = 0.01
#: Share of the information that stars must have in a direction for its second derivative to be measured; step of the
#: difference in standard deviations, and least value over that of the outer product of scores; where f(J) is drawn too.
_MEASURED, _STEP, _LEAST_CURVATURE, _LEAST_JOINT = 0.3, 1.0, 0.05, 0.005
#: Share of the information that stars must have in a direction for it to be refined; standard deviation of what second
#: derivatives change by then, in units of the outer product's.
_REFINED, _CHANGE = 0.1, 1.0
#: Draws whose gradient is off by more than so many times the median's are not refined with.
_CLIFF = 5.0
#: Inverse of the power of the likelihood that is drawn from. At 1.2, against 1, the weights left 149 of 200 draws
#: effective for 115 (k-hat 0.17 for 0.63; 1000 disc stars, seed 201), and 74 for 52 (0.65 for 0.93; halo stars).
_TEMPERATURE = 1.2
#: Distance from u_0 in any latent beyond which no draw of a posterior lies.
_FARTHEST = 100.0
#: Step of differences of c by the latents.
_DIFFERENCE = 1e-2
#: Of the optimiser: distance from the maximum in standard deviations, and most iterations.
_TOLERANCE, _ITERATIONS = 0.02, 200


@dataclass(frozen=True)
class Emulator:
    """The posterior of the potential near u_0, for many draws at once.

    Parameters
    ----------
    space
        The model's latents.
    u_0 : Float[Tensor, "size"]
        Where Phi was expanded.
    s, mu : Float[Tensor, "n"], Float[Tensor, "m"]
        Nodes of Phi.
    W : Float[Tensor, "n*m n_asked"]
        What is asked of Phi there, one column each.
    g, H : Float[Tensor, "k"], Float[Tensor, "k k"]
        Gradient and minus the second derivatives of the log-likelihood in c: what is asked of Phi, and the latents of
        f(J) where they are drawn too.
    information : Float[Tensor, "d d"]
        Minus the second derivatives of the log posterior by the d latents that are drawn, at u_0.
    correction : Float[Tensor, "k"]
        The part of g that the likelihood of the model's points lacks: that of a selection normalised with more points.
    """

    space: LatentSpace
    u_0: Tensor
    s: Tensor
    mu: Tensor
    W: Tensor
    g: Tensor
    H: Tensor
    information: Tensor
    correction: Tensor

    @classmethod
    def of(
        cls,
        space: LatentSpace,
        u: Tensor,
        w: Tensor,
        seed: int,
        measured: bool = True,
        tick: Callable[[], None] | None = None,
    ) -> Emulator:
        """Expand the likelihood of the stars ``w`` about u, for a model that `responds`.

        Parameters
        ----------
        space, u, w
            The latents, the place, and the stars.
        seed
            Of the draws, and of the part of the stars.
        measured
            Whether second derivatives are measured; otherwise they are the outer product's.
        tick
            Called after each gradient.
        """
        n_potential, d = space.n_potential, n_drawn(space)
        generator = torch.Generator().manual_seed(seed)
        part, scale = _part(w, seed)
        responder = Responder(space, u, w)
        nodes = responder.tables.field.nodes()
        scored = _StarScores.of_stars(space, u, part, responder)
        prior = space.prior_curvature(u)[:d, :d]
        of_latents = scored.of(responder.changes)
        of_orbits = part.new_zeros(len(part), 0)
        if d > n_potential:
            of_orbits = space.scores(u, part, responder=responder)[:, n_potential:d]
        both = torch.cat([of_latents, of_orbits], 1)
        # at fixed f(J)
        C = whitening(scale * of_latents.T @ of_latents + prior[:n_potential, :n_potential])
        with torch.no_grad():
            phi_0 = phi_of_draws(space, u[None], nodes)[0]
            noise = torch.randn(_DRAWS, n_potential, generator=generator, dtype=u.dtype)
            draws = torch.cat([u[:n_potential] + noise @ C.T, u[n_potential:].expand(_DRAWS, -1)], 1)
            changes = [phi_of_draws(space, some, nodes) - phi_0 for some in draws.split(_CHUNK)]
        scores = torch.cat([scored.of(change.T) for change in changes] + [of_latents @ C], 1)
        values, vectors = torch.linalg.eigh(scale * scores.T @ scores)
        kept = values > _LEAST
        patterns = scores @ (vectors[:, kept] / values[kept].sqrt())
        W = scale * scored.back(patterns)
        rows = W.reshape(len(nodes[0]), -1).abs().amax(1).nonzero()[:, 0]
        rows = torch.arange(int(rows[0]), int(rows[-1]) + 1)
        at = (rows[:, None] * len(nodes[1]) + torch.arange(len(nodes[1]))).reshape(-1)
        asked = torch.cat([patterns, of_orbits], 1)
        g, H = scale * asked.sum(0), scale * asked.T @ asked
        information = scale * both.T @ both + prior
        found = cls(space, u, nodes[0][rows], nodes[1], W[at], g, H, information, torch.zeros_like(g))
        return found._exact(w, C, prior, measured, seed, tick)

    def _exact(
        self, w: Tensor, C: Tensor, prior: Tensor, measured: bool, seed: int, tick: Callable[[], None] | None
    ) -> Emulator:
        """Return the emulator with the exact gradient at u_0 and second derivatives.

        C is the root of the covariance of the potential's latents at fixed f(J).
        """
        space, u, own = self.space, self.u_0, slice(0, self.space.n_potential)
        here = self.corrected(u, space.likelihood_gradient(u, w)[1])
        D = here.derivatives(u)
        k = self.n_asked
        A, sigma, Bt = torch.linalg.svd(D[:k, own] @ C, full_matrices=False)
        bend, H = here._bend(), self.H.clone()
        part, scale = _part(w, seed)
        if measured and bool((told := sigma**2 > _MEASURED).any()):
            V, A, sigma = (C @ Bt.T)[:, told], A[:, told], sigma[told]
            changes = []
            for v in V.T:
                step = torch.cat([_STEP * v, u.new_zeros(space.size - space.n_potential)])
                slopes = [space.likelihood_gradient(at, part)[1][: self.d] for at in (u - step, u + step)]
                changes.append(scale * (slopes[0] - slopes[1]) / (2 * _STEP))
                if tick:
                    tick()
            columns = torch.stack(changes, 1)
            found = V.T @ (columns[own] + bend[own, own] @ V) / (sigma[:, None] * sigma)
            H[:k, :k] += A @ ((found + found.T) / 2 - A.T @ H[:k, :k] @ A) @ A.T
            of_both = columns[space.n_potential :] / sigma
            H[k:, :k] += (of_both - H[k:, :k] @ A) @ A.T
            H[:k, k:] = H[k:, :k].T
        if measured and self.d > space.n_potential:
            rest = slice(space.n_potential, self.d)
            H[k:, k:] = scale * _of_orbits(space, u, part, self.information[rest, rest])
        H = self._sane(H, prior)
        root = whitening(self.information)
        white = _at_least(root.T @ (D.T @ H @ D + prior - bend) @ root, _LEAST_CURVATURE)
        back = torch.linalg.inv(root)
        return replace(here, H=H, information=back.T @ white @ back)

    def _sane(self, H: Tensor, prior: Tensor) -> Tensor:
        """Return second derivatives by c that, with the prior of f(J), are positive, by a part of these at least."""
        k = self.n_asked
        of_orbits = torch.block_diag(H.new_zeros(k, k), prior[self.space.n_potential :, self.space.n_potential :])
        root, least = torch.eye(k, dtype=H.dtype), _LEAST_CURVATURE
        if k < len(H):
            # potential and f(J) may stand in for each other: a small value is no error there
            root, least = torch.block_diag(root, whitening((self.H + of_orbits)[k:, k:])), _LEAST_JOINT
        back = torch.linalg.inv(root)
        return back.T @ _at_least(root.T @ (H + of_orbits) @ root, least) @ back - of_orbits

    def corrected(self, u: Tensor, slope: Tensor) -> Emulator:
        """Return the emulator with another g, such that its gradient at u is ``slope``, of the log-likelihood."""
        with torch.no_grad():
            emulated = self.derivatives(u).T @ (self.g - self.H @ self.c(u[None])[0])
        return replace(self, g=self.g + self._in_c(u, slope[: self.d] - emulated))

    def with_more_points(self, u: Tensor, slope: Tensor) -> Emulator:
        """Return the emulator of a likelihood whose gradient at u is larger by ``slope`` than that of the model's."""
        change = self._in_c(u, slope[: self.d])
        return replace(self, g=self.g + change, correction=self.correction + change)

    def _in_c(self, u: Tensor, slope: Tensor) -> Tensor:
        """Return the gradient by c ``(k,)`` of what has this one by the latents ``(d,)`` at u."""
        C, units = whitening(self.information), self._units()
        A, sigma, Bt = torch.linalg.svd(units @ self.derivatives(u) @ C, full_matrices=False)
        # what the stars hardly tell stays as it is
        return units.T @ A @ (sigma / (sigma**2 + _LEAST) * (Bt @ (C.T @ slope)))

    def _units(self) -> Tensor:
        """Return what makes of c the same with f(J) in units of what stars tell of it, as what is asked of Phi is."""
        k = self.n_asked
        values, vectors = torch.linalg.eigh(self.H[k:, k:])
        of_orbits = vectors * values.clamp(min=0).sqrt() @ vectors.T
        return torch.block_diag(torch.eye(k, dtype=self.H.dtype), of_orbits) if len(values) else torch.eye(k).to(self.H)

    def exact(self, log_p: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the log posterior of one u ``(size,)`` with the correction, from that of the model's points."""
        if not self.correction.any():
            return log_p
        return lambda u: log_p(u) + (self.c(u[None]) @ self.correction)[0].detach()

    def refined(self, u: Tensor, w: Tensor, tick: Callable[[], None] | None = None) -> Emulator:
        """Return the emulator whose gradients are nearest to the exact ones at draws u ``(n_draws, size)``.

        g and H change as little as that takes, by least squares: second derivatives then are those over the width of
        the posterior, of use where ln L is not quadratic.
        """
        d = self.d
        C = whitening(self.information)
        units = self._units()
        A, sigma, _ = torch.linalg.svd(units @ self.derivatives(u.mean(0)) @ C, full_matrices=False)
        A = units.T @ A[:, (sigma**2 > _REFINED).nonzero()[:, 0]]
        m = A.shape[1]
        first, second = torch.triu_indices(m, m)
        places = self.c(u).detach() @ A
        design, missing = [], []
        for one, a in zip(u, places, strict=True):
            slope = self.space.likelihood_gradient(one, w)[1][:d]
            D = self.derivatives(one)
            emulated = D.T @ (self.g - self.correction - self.H @ self.c(one[None])[0].detach())
            B = C.T @ (D.T @ A)
            of_H = B[:, first] * a[second] + torch.where(first == second, 0.0, B[:, second] * a[first])
            design.append(torch.cat([B, -of_H], 1))
            missing.append(C.T @ (slope - emulated))
            if tick:
                tick()
        # where stars come loose ln L falls off a cliff, whose slope says nothing of the rest
        misses = torch.stack(missing).norm(dim=-1).nan_to_num(torch.inf)
        near = (misses <= _CLIFF * misses.median()).nonzero()[:, 0]
        if not bool(torch.isfinite(misses[near]).all()):
            return self
        X, y = torch.cat([design[i] for i in near]), torch.cat([missing[i] for i in near])
        root = torch.linalg.cholesky(X.T @ X + torch.eye(X.shape[1], dtype=X.dtype) / _CHANGE**2)
        found = torch.cholesky_solve((X.T @ y)[:, None], root)[:, 0]
        change = torch.zeros(m, m, dtype=X.dtype)
        change[first, second] = found[m:]
        change[second, first] = found[m:]
        H = self._sane(self.H + A @ change @ A.T, self.space.prior_curvature(self.u_0)[:d, :d])
        return replace(self, g=self.g + A @ found[:m], H=H)

    def proposal(self) -> Emulator:
        """Return the emulator of the potential alone to draw from where weights correct the draws.

        f(J) is integrated out, and the likelihood taken to a power below one: weights are large where the density drawn
        from is too low, so that it should be the wider one.
        """
        n = self.space.n_potential
        if self.d == n:
            return replace(self, g=self.g / _TEMPERATURE, H=self.H / _TEMPERATURE)
        k, orbits = self.n_asked, self._orbits
        across = self.H[:k, k:] @ orbits.covariance
        g, H = self.g[:k] - across @ orbits.slope, self.H[:k, :k] - across @ self.H[k:, :k]
        rest = torch.linalg.solve(self.information[n:, n:], self.information[n:, :n])
        information = self.information[:n, :n] - self.information[:n, n:] @ rest
        return replace(self, g=g / _TEMPERATURE, H=_at_least(H / _TEMPERATURE, 0.0), information=information)

    @cached_property
    def _orbits(self) -> _Orbits:
        n, k = self.space.n_potential, self.n_asked
        precision = self.H[k:, k:] + self.space.prior_curvature(self.u_0)[n : self.d, n : self.d]
        root = whitening(precision)
        slope = self.g[k:] + self.space.prior_gradient(self.u_0)[1][n : self.d]
        return _Orbits(root, root @ root.T, slope)

    def _orbits_given(self, u: Tensor) -> Tensor:
        """Return the mean of the latents of f(J) ``(n_draws, d - n_potential)`` in the potentials at u."""
        n, k, orbits = self.space.n_potential, self.n_asked, self._orbits
        return self.u_0[n : self.d] + (orbits.slope - self._of_phi(u) @ self.H[:k, k:]) @ orbits.covariance

    @torch.no_grad()
    def with_orbits(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """Return draws ``(n_draws, size)`` of the potential with f(J) drawn in each of them, where that is drawn."""
        n = self.space.n_potential
        if self.d == n:
            return u
        noise = torch.randn(len(u), self.d - n, generator=generator, dtype=u.dtype)
        return torch.cat([u[:, :n], self._orbits_given(u) + noise @ self._orbits.root.T, u[:, self.d :]], 1)

    @torch.no_grad()
    def log_proposal(self, u: Tensor) -> Tensor:
        """Return the log-density ``(n_draws,)`` of draws from the `proposal` `with_orbits`, up to a constant."""
        n = self.space.n_potential
        if self.d == n:
            return self.proposal().log_posterior(u)
        still = torch.cat([u[:, :n], self.u_0[n:].expand(len(u), -1)], 1)
        miss = (u[:, n : self.d] - self._orbits_given(u)).T
        z = torch.linalg.solve_triangular(self._orbits.root, miss, upper=False)
        return self.proposal().log_posterior(still) - 0.5 * (z**2).sum(0)

    def derivatives(self, u: Tensor) -> Tensor:
        """Return dc/du ``(k, d)`` by the latents that are drawn."""
        n_potential = self.space.n_potential
        steps = _DIFFERENCE * torch.eye(self.space.size, dtype=u.dtype)[:n_potential]
        with torch.no_grad():
            ahead, behind = self._of_phi(u + torch.cat([steps, -steps])).chunk(2)
        return torch.block_diag((ahead - behind).T / (2 * _DIFFERENCE), torch.eye(self.d - n_potential, dtype=u.dtype))

    def _bend(self) -> Tensor:
        """Return the second derivatives of g . c by the latents that are drawn ``(d, d)`` at u_0."""
        n, g = self.space.n_potential, self.g
        steps = _DIFFERENCE * torch.eye(self.space.size, dtype=g.dtype)[:n]
        at = (self.u_0 + torch.cat([steps, -steps])).requires_grad_()
        with torch.enable_grad():
            of_phi = self._of_phi(at)
            (slopes,) = torch.autograd.grad((of_phi @ g[: of_phi.shape[1]]).sum(), at)
        ahead, behind = slopes[:, :n].chunk(2)
        found = (ahead - behind) / (2 * _DIFFERENCE)
        return torch.block_diag((found + found.T) / 2, g.new_zeros(self.d - n, self.d - n))

    @property
    def d(self) -> int:
        """Number of latents that are drawn, the first ones: those of the potential, or all."""
        return len(self.information)

    @property
    def n_asked(self) -> int:
        """How much is asked of Phi: so many of c come first, the latents of f(J) follow."""
        return self.W.shape[1]

    def c(self, u: Tensor) -> Tensor:
        """Return what stars tell of the change of Phi, and of f(J), ``(n_draws, k)`` at u ``(n_draws, size)``."""
        own = slice(self.space.n_potential, self.d)
        return torch.cat([self._of_phi(u), u[:, own] - self.u_0[own]], 1)

    def _of_phi(self, u: Tensor) -> Tensor:
        return self._functionals(u) - self._functionals_0

    @cached_property
    def _functionals_0(self) -> Tensor:
        with torch.no_grad():
            return self._functionals(self.u_0[None])

    def _functionals(self, u: Tensor) -> Tensor:
        values = self.space.values(u)
        return sum(
            part({name.removeprefix(prefix): values[name] for name in names}) for prefix, names, part in self._parts
        )  # type: ignore[return-value]

    @cached_property
    def _parts(self) -> list[tuple[str, list[str], Any]]:
        """Prefix and names of the sites of each component that has any, and what computes its functionals."""
        here = self.space.values(self.u_0)
        W = self.W.reshape(len(self.s), len(self.mu), -1)
        found = []
        for prefix, part, names in components(self.space):
            if names:
                own = {name.removeprefix(prefix): here[name] for name in names}
                found.append((prefix, names, part.functionals_on_grid(own, W, self.s, self.mu)))
        return found

    def log_posterior(self, u: Tensor) -> Tensor:
        """Return the log posterior ``(n_draws,)`` at u ``(n_draws, size)``, up to a constant."""
        c = self.c(u)
        return c @ self.g - 0.5 * ((c @ self.H) * c).sum(-1) + self.space.log_prior(u)

    def gradients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return `log_posterior` and its gradient ``(n_draws, size)``; NaN so far off that a site may overflow."""
        u = u.detach()
        near = ((u - self.u_0).abs() < _FARTHEST).all(-1)
        with torch.enable_grad():
            at = torch.where(near[:, None], u, self.u_0).requires_grad_()
            value = self.log_posterior(at)
            slope = torch.autograd.grad(value.sum(), at)[0]
        return torch.where(near, value.detach(), torch.nan), torch.where(near[:, None], slope, torch.nan)

    def gradient(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return `log_posterior` at one u ``(size,)`` and its gradient; what is not drawn stays: for `lbfgs`."""
        value, slope = self.gradients(u[None])
        slope[:, self.d :] = 0
        return value[0], slope[0]

    def valid(self, u: Tensor) -> bool:
        """Whether every site has a value at u."""
        return self.space.valid(u)

    def maximum(self, u: Tensor) -> Tensor:
        """Return the latents where the emulated posterior is largest, from u; what is not drawn stays."""
        n = self.space.size - self.d
        information = torch.block_diag(self.information, torch.eye(n, dtype=u.dtype))
        u, *_ = lbfgs(self, u, u[None], information, _TOLERANCE, _ITERATIONS, lambda u, note: None)  # type: ignore[arg-type]
        return u

    def state(self) -> dict[str, Any]:
        """Return what `restored` makes the emulator of."""
        names = ("u_0", "s", "mu", "W", "g", "H", "information", "correction")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restored(cls, space: LatentSpace, state: dict[str, Any]) -> Emulator:
        """Return the emulator with this `state`."""
        return cls(space, **state)


def n_drawn(space: LatentSpace) -> int:
    """Return how many latents an emulated posterior has draws of: the potential's, or all (see the module)."""
    return space.n_potential if space.model.is_plain else space.size


class _Orbits(NamedTuple):
    """Root of the covariance of the latents of f(J) in a given potential, the covariance, and the slope at u_0."""

    root: Tensor
    covariance: Tensor
    slope: Tensor


@dataclass(frozen=True)
class _StarScores:
    """How ln p of each star changes with Phi at the nodes: ``own`` ``(n, n_nodes)``, less a share of that of ln Z.

    ``of_all`` ``(n_nodes,)`` is that of ln Z, the fraction selected, which members share, and ``member`` ``(n,)`` the
    probability of each star to be one.
    """

    own: sparse.csr_matrix
    of_all: Tensor
    member: Tensor

    @classmethod
    def of_stars(cls, space: LatentSpace, u: Tensor, w: Tensor, responder: Responder) -> _StarScores:
        """Return them of the stars ``w`` at u."""
        model, tables, points = space.model.at(space.values(u)), responder.tables, space.model.points
        member = w.new_ones(len(w))
        if model.outliers is not None:
            with torch.no_grad():
                member = 1 - model.tabulated(w).density().outlier_probability(w)
        found = responder(w)
        slopes, per_star = _slopes(model.df, found.J), sparse.identity(len(w), format="csr")
        if w.dim() == 3:
            log_p = capped_density(model.df, found).reshape(w.shape[:-1]) + w[..., 6]
            slopes = torch.softmax(log_p, -1).reshape(-1, 1).detach() * slopes
            per_star = sparse.kron(per_star, np.ones((1, w.shape[1])), format="csr")
        rows = torch.repeat_interleave(member, len(slopes) // len(w))[:, None] * slopes
        own = per_star @ score_matrix(tables, w[..., :6].reshape(-1, 6), rows)
        of_all = w.new_zeros(tables.field.n_nodes)
        if points is not None:
            found = responder(points.w)
            log_p = points.log_weight + points.accepted.log() + capped_density(model.df, found)
            slopes = torch.softmax(log_p, 0).detach()[:, None] * _slopes(model.df, found.J)
            for some, rows in zip(points.w.split(_POINTS), slopes.split(_POINTS), strict=True):
                of_all += torch.as_tensor(np.asarray(score_matrix(tables, some, rows).sum(0))[0])
        return cls(own, of_all, member)

    def of(self, changes: Tensor) -> Tensor:
        """Return the changes ``(n, k)`` of ln p that those of Phi ``(n_nodes, k)`` make."""
        return torch.as_tensor(self.own @ changes.numpy()) - self.member[:, None] * (self.of_all @ changes)

    def back(self, patterns: Tensor) -> Tensor:
        """Return the transposed product ``(n_nodes, k)`` with patterns ``(n, k)``."""
        return torch.as_tensor(self.own.T @ patterns.numpy()) - self.of_all[:, None] * (self.member @ patterns)


def _of_orbits(space: LatentSpace, u: Tensor, w: Tensor, information: Tensor) -> Tensor:
    """Return minus the second derivatives of ln L by the latents of f(J), the potential being that at u.

    ``information`` is the outer product's, with the prior.
    """
    here, root, own = AtFixedActions(space, u, w), whitening(information), slice(space.n_potential, space.size)
    columns = []
    for v in root.T:
        step = torch.cat([u.new_zeros(space.n_potential), _STEP * v])
        slopes = [(here.gradient(at, w)[1] - space.prior_gradient(at)[1])[own] for at in (u - step, u + step)]
        columns.append((slopes[0] - slopes[1]) / (2 * _STEP))
    back = torch.linalg.inv(root)
    found = root.T @ torch.stack(columns, 1)
    return back.T @ ((found + found.T) / 2) @ back


def _slopes(df: DistributionFunction, J: Tensor) -> Tensor:
    """Return the derivatives ``(n, 2)`` of ln f by J_r and J_z."""
    with torch.enable_grad():
        J = J.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(df.log_prob(J).sum(), J)
    return slopes[:, ::2]


def _part(w: Tensor, seed: int) -> tuple[Tensor, float]:
    """Return a random part of many stars, and by how much it must be scaled up."""
    n = stars_in(w, _MOST_ROWS)
    if len(w) <= n:
        return w, 1.0
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
    return w[order[:n]], len(w) / n


def _at_least(matrix: Tensor, least: float) -> Tensor:
    """Return a symmetric matrix with eigenvalues below ``least`` raised to it."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=least)) @ vectors.T
