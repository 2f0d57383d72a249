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
The prior, and Phi as a function of the latents, are exact. f(J) stays as it is at u_0: to first order it is independent
of the potential.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayespot.actions.response import score_matrix
from bayespot.inference.latent import LatentSpace, whitening
from bayespot.inference.linearised import Responder, components, phi_of_draws
from bayespot.inference.optimise import lbfgs

#: Stars that decide on W, of more a random part; draws of the potential that show how Phi may change, and how many of
#: them are evaluated at once.
_MOST_STARS, _DRAWS, _CHUNK = 25_000, 256, 64
#: Least information of a change of Phi that counts, over what it is with the draws' own size.
_LEAST = 0.01
#: Share of the information that stars must have in a direction for its second derivative to be measured; step of the
#: difference in standard deviations, and least value over that of the outer product of scores.
_MEASURED, _STEP, _LEAST_CURVATURE = 0.3, 1.0, 0.05
#: Share of the information that stars must have in a direction for it to be refined; standard deviation of what second
#: derivatives change by then, in units of the outer product's.
_REFINED, _CHANGE = 0.1, 1.0
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
    W : Float[Tensor, "n*m k"]
        What is asked of Phi there, one column each.
    g, H : Float[Tensor, "k"], Float[Tensor, "k k"]
        Gradient and minus the second derivatives of the log-likelihood in c.
    information : Float[Tensor, "d d"]
        Minus the second derivatives of the log posterior by the d latents of the potential, at u_0.
    """

    space: LatentSpace
    u_0: Tensor
    s: Tensor
    mu: Tensor
    W: Tensor
    g: Tensor
    H: Tensor
    information: Tensor

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
        n_potential = space.n_potential
        generator = torch.Generator().manual_seed(seed)
        part, scale = _part(w, seed)
        responder = Responder(space, u, w)
        nodes = responder.tables.field.nodes()
        G = score_matrix(responder.tables, part, _slopes(space, u, part, responder(part).J))
        prior = space.prior_curvature(u)[:n_potential, :n_potential]
        of_latents = torch.as_tensor(G @ responder.changes.numpy())
        C = whitening(scale * of_latents.T @ of_latents + prior)
        with torch.no_grad():
            phi_0 = phi_of_draws(space, u[None], nodes)[0]
            noise = torch.randn(_DRAWS, n_potential, generator=generator, dtype=u.dtype)
            draws = torch.cat([u[:n_potential] + noise @ C.T, u[n_potential:].expand(_DRAWS, -1)], 1)
            changes = [phi_of_draws(space, some, nodes) - phi_0 for some in draws.split(_CHUNK)]
        scores = torch.cat([torch.as_tensor(G @ change.T.numpy()) for change in changes] + [of_latents @ C], 1)
        values, vectors = torch.linalg.eigh(scale * scores.T @ scores)
        kept = values > _LEAST
        patterns = scores @ (vectors[:, kept] / values[kept].sqrt())
        W = scale * torch.as_tensor(G.T @ patterns.numpy())
        rows = W.reshape(len(nodes[0]), -1).abs().amax(1).nonzero()[:, 0]
        rows = torch.arange(int(rows[0]), int(rows[-1]) + 1)
        at = (rows[:, None] * len(nodes[1]) + torch.arange(len(nodes[1]))).reshape(-1)
        g, H = scale * patterns.sum(0), torch.eye(int(kept.sum()), dtype=u.dtype)
        information = torch.linalg.inv(C @ C.T)
        found = cls(space, u, nodes[0][rows], nodes[1], W[at], g, H, information)
        return found._exact(w, C, prior, measured, seed, tick)

    def _exact(
        self, w: Tensor, C: Tensor, prior: Tensor, measured: bool, seed: int, tick: Callable[[], None] | None
    ) -> Emulator:
        """Return the emulator with the exact gradient at u_0 and second derivatives; C is the root of a covariance."""
        space, u, d = self.space, self.u_0, self.space.n_potential
        here = self.corrected(u, space.likelihood_gradient(u, w)[1])
        D = here.derivatives(u)
        A, sigma, Bt = torch.linalg.svd(D @ C, full_matrices=False)
        bend, H = here._bend(), self.H
        if measured and bool((told := sigma**2 > _MEASURED).any()):
            V, A, sigma = (C @ Bt.T)[:, told], A[:, told], sigma[told]
            part, scale = _part(w, seed)
            columns = []
            for v in V.T:
                step = torch.cat([_STEP * v, u.new_zeros(space.size - d)])
                slopes = [space.likelihood_gradient(at, part)[1][:d] for at in (u - step, u + step)]
                columns.append(scale * (slopes[0] - slopes[1]) / (2 * _STEP))
                if tick:
                    tick()
            found = V.T @ (torch.stack(columns, 1) + bend @ V) / (sigma[:, None] * sigma)
            H = H + A @ ((found + found.T) / 2 - torch.eye(len(sigma), dtype=u.dtype)) @ A.T
            H = _at_least(H, _LEAST_CURVATURE)
        white = _at_least(C.T @ (D.T @ H @ D + prior - bend) @ C, _LEAST_CURVATURE)
        back = torch.linalg.inv(C)
        return replace(here, H=H, information=back.T @ white @ back)

    def corrected(self, u: Tensor, slope: Tensor) -> Emulator:
        """Return the emulator with another g, such that its gradient at u is ``slope``, of the log-likelihood."""
        C, D = whitening(self.information), self.derivatives(u)
        with torch.no_grad():
            missing = slope[: self.space.n_potential] - D.T @ (self.g - self.H @ self.c(u[None])[0])
        A, sigma, Bt = torch.linalg.svd(D @ C, full_matrices=False)
        # what the stars hardly tell stays as it is
        return replace(self, g=self.g + A @ (sigma / (sigma**2 + _LEAST) * (Bt @ (C.T @ missing))))

    def refined(self, u: Tensor, w: Tensor, tick: Callable[[], None] | None = None) -> Emulator:
        """Return the emulator whose gradients are nearest to the exact ones at draws u ``(n_draws, size)``.

        g and H change as little as that takes, by least squares: second derivatives then are those over the width of
        the posterior, of use where ln L is not quadratic.
        """
        d = self.space.n_potential
        C = whitening(self.information)
        A, sigma, _ = torch.linalg.svd(self.derivatives(u.mean(0)) @ C, full_matrices=False)
        A = A[:, (sigma**2 > _REFINED).nonzero()[:, 0]]
        m = A.shape[1]
        first, second = torch.triu_indices(m, m)
        places = self.c(u).detach() @ A
        design, missing = [], []
        for one, a in zip(u, places, strict=True):
            slope = self.space.likelihood_gradient(one, w)[1][:d]
            D = self.derivatives(one)
            emulated = D.T @ (self.g - self.H @ self.c(one[None])[0].detach())
            B = C.T @ (D.T @ A)
            of_H = B[:, first] * a[second] + torch.where(first == second, 0.0, B[:, second] * a[first])
            design.append(torch.cat([B, -of_H], 1))
            missing.append(C.T @ (slope - emulated))
            if tick:
                tick()
        X, y = torch.cat(design), torch.cat(missing)
        found = torch.linalg.solve(X.T @ X + torch.eye(X.shape[1], dtype=X.dtype) / _CHANGE**2, X.T @ y)
        change = torch.zeros(m, m, dtype=X.dtype)
        change[first, second] = found[m:]
        change[second, first] = found[m:]
        H = _at_least(self.H + A @ change @ A.T, _LEAST_CURVATURE)
        return replace(self, g=self.g + A @ found[:m], H=H)

    def widened(self) -> Emulator:
        """Return the emulator of the likelihood to a power below one: to draw from where weights correct the draws.

        Weights are large where the density drawn from is too low: it should be the wider one.
        """
        return replace(self, g=self.g / _TEMPERATURE, H=self.H / _TEMPERATURE)

    def derivatives(self, u: Tensor) -> Tensor:
        """Return dc/du ``(k, d)`` by the potential's latents."""
        steps = _DIFFERENCE * torch.eye(self.space.size, dtype=u.dtype)[: self.space.n_potential]
        with torch.no_grad():
            ahead, behind = self.c(u + torch.cat([steps, -steps])).chunk(2)
        return (ahead - behind).T / (2 * _DIFFERENCE)

    def _bend(self) -> Tensor:
        """Return the second derivatives of g . c by the potential's latents ``(d, d)`` at u_0."""
        d, g = self.space.n_potential, self.g
        steps = _DIFFERENCE * torch.eye(self.space.size, dtype=g.dtype)[:d]
        at = (self.u_0 + torch.cat([steps, -steps])).requires_grad_()
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad((self.c(at) @ g).sum(), at)
        ahead, behind = slopes[:, :d].chunk(2)
        found = (ahead - behind) / (2 * _DIFFERENCE)
        return (found + found.T) / 2

    def c(self, u: Tensor) -> Tensor:
        """Return what stars tell of the change of Phi ``(n_draws, k)`` at u ``(n_draws, size)``."""
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
        """Return `log_posterior` at one u ``(size,)`` and its gradient; f(J) stays: what `lbfgs` asks for."""
        value, slope = self.gradients(u[None])
        slope[:, self.space.n_potential :] = 0
        return value[0], slope[0]

    def valid(self, u: Tensor) -> bool:
        """Whether every site has a value at u."""
        return self.space.valid(u)

    def maximum(self, u: Tensor) -> Tensor:
        """Return the latents where the emulated posterior is largest, from u, whose f(J) stays."""
        n = self.space.size - self.space.n_potential
        information = torch.block_diag(self.information, torch.eye(n, dtype=u.dtype))
        u, *_ = lbfgs(self, u, u[None], information, _TOLERANCE, _ITERATIONS, lambda u, note: None)  # type: ignore[arg-type]
        return u

    def state(self) -> dict[str, Any]:
        """Return what `restored` makes the emulator of."""
        names = ("u_0", "s", "mu", "W", "g", "H", "information")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restored(cls, space: LatentSpace, state: dict[str, Any]) -> Emulator:
        """Return the emulator with this `state`."""
        return cls(space, **state)


def _slopes(space: LatentSpace, u: Tensor, w: Tensor, J: Tensor) -> Tensor:
    """Return the derivatives ``(n, 2)`` of each star's log-density by J_r and J_z."""
    model = space.model.at(space.values(u))
    with torch.enable_grad():
        J = J.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(model.df.log_prob(J).sum(), J)
    if model.outliers is not None:
        with torch.no_grad():
            slopes = slopes * (1 - model.tabulated(w).density().outlier_probability(w))[:, None]
    return slopes[:, ::2]


def _part(w: Tensor, seed: int) -> tuple[Tensor, float]:
    """Return a random part of many stars, and by how much it must be scaled up."""
    if len(w) <= _MOST_STARS:
        return w, 1.0
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
    return w[order[:_MOST_STARS]], len(w) / _MOST_STARS


def _at_least(matrix: Tensor, least: float) -> Tensor:
    """Return a symmetric matrix with eigenvalues below ``least`` raised to it."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=least)) @ vectors.T
