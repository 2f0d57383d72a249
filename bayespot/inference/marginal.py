r"""The posterior of the potential with f(J) integrated out in each potential.

Where f(J) is inferred together with the potential, the ridge on which they stand in for each other bends: no Gaussian
in all latents is near the posterior. In a *given* potential the actions are numbers, ln f is linear in its parameters
(`bayespot.df.LogisticGaussianProcess`), and the posterior of these, log-concave or nearly so, is close to the Gaussian
at its maximum. Where the prior of f(J) has an amplitude to be inferred, that is one more number of which f(J) is a
Gaussian process (`LogisticGaussianProcess.prior_sd`). Laplace's method gives

.. math:: \ln p(u | data) \approx \ln p(u, \hat w(u) | data) - \tfrac12 \ln \det H(u) + const

(Tierney & Kadane 1986, JASA 81, 82, equation 4.1; Rue, Martino & Chopin 2009, JRSS B 71, 319, equation 3), a few draws
from that Gaussian what it lacks, and adaptive importance sampling the ten or so latents u that are left. Where each
potential has a covariance of its own what Laplace's method lacks is learned from the draws as a function of u
(`bayespot.inference.correction`); elsewhere draws of both have exact weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bayespot.df.base import DistributionFunction
from bayespot.df.logistic_gp import AMPLITUDE_SD, LogDensityAtActions, LogisticGaussianProcess
from bayespot.inference.correction import log_ratio
from bayespot.inference.importance import MOST_ROUNDS, adaptive_importance, n_in_round
from bayespot.inference.latent import LatentSpace, RememberedActions, same_array, whitening
from bayespot.likelihood.model import SnapshotModel
from bayespot.likelihood.phase_mixed import ObservedStars, PhaseMixed
from bayespot.likelihood.sky_lattice import SkyLattice
from bayespot.optimisers import LBFGS

#: Draws of f(J) in each potential, whose weights correct Laplace's method: from the Gaussian of that potential; of
#: stars on the sky, where f(J) is farther from that; and from that of the maximum, where these cost less than
#: derivatives.
_DRAWS, _DRAWS_ON_THE_SKY, _DRAWS_OF_MAXIMUM = 8, 32, 16
#: How many of them are evaluated at once, of stars on the sky.
_DRAWS_AT_ONCE = 8
#: Weight over the largest below which a potential has no draws of f(J).
_NEGLIGIBLE = 1e-4
#: Largest logarithm of what Laplace's method lacks in a potential: one more does not overflow.
_MOST = 600.0
#: Least curvature of ln p in f(J) over that of its prior: where ln p is not concave a Gaussian may not be much wider
#: than the prior.
_LEAST_OF_PRIOR = 0.5
#: Of the climb to the best f(J): most steps, and the slope, in the inverse of standard deviations, at which it ends.
_STEPS, _SLOPE = 40, 0.05
#: -ln p of a trial step to where it is not finite.
_WALL = 1e12
#: Rows of the data times directions whose second derivatives are taken at once.
_AT_ONCE = 1_000_000
#: Farthest that a latent of f(J) may be from its prior mean, in prior standard deviations: a spike of f between the
#: velocities that are summed over has any likelihood.
_FARTHEST = 10.0
#: Of the amplitude of f(J), in prior standard deviations of its logarithm: how far its start is looked for, and the
#: step of the differences that give its variance.
_AMPLITUDES, _AMPLITUDE_STEP = 3, 0.5
#: Step of the differences that give the first proposal, in standard deviations of the outer product's, and the least
#: curvature over that of the outer product.
_STEP, _LEAST_CURVATURE = 0.1, 0.05


class Orbits(NamedTuple):
    """f(J) in one potential: the latents of highest posterior ``(k,)`` and the root of their covariance.

    ``log_p`` is the log posterior there, ``log_marginal`` that of the potential with f(J) integrated out.
    """

    mode: Tensor
    root: Tensor
    log_p: float
    log_marginal: float


class MarginalPosterior:
    """The posterior of all latents but those of f(J), for a model that is `integrable`.

    Parameters
    ----------
    space, data
        Latents, and the stars as `SnapshotModel.prepare` returns them.
    u : Float[Tensor, "size"]
        The maximum: the climb to the best f(J) begins there.
    """

    def __init__(self, space: LatentSpace, data: Tensor, u: Tensor) -> None:
        self.space, self.data, self.u = space, data, u
        df = cast("LogisticGaussianProcess", space.model.df)
        #: Whether f(J) has its own covariance in each potential: else more draws cost less than second derivatives.
        self.own_covariance = space.model.projection is not None or not df.adaptive
        on_the_sky = _DRAWS_ON_THE_SKY if space.model.projection is not None else _DRAWS
        #: Draws of f(J) in each potential.
        self.n_draws = on_the_sky if self.own_covariance else _DRAWS_OF_MAXIMUM
        #: Whether the last of the other latents is that of the amplitude of f(J), z with ln A = ln A_0 + sd z.
        self.adaptive = df.adaptive
        part = space.slices["df.weights"]
        self.own = torch.arange(part.start, part.stop)
        #: Rows of the other latents.
        self.rest = torch.cat([torch.arange(part.start), torch.arange(part.stop, space.size)])
        self._centre(u[self.rest])

    def _centre(self, rest: Tensor) -> None:
        """Take the latents ``rest``, and f(J) at its best there, as what others are near to."""
        given = self.given(rest)
        #: Minus the second derivatives of ln p by f(J), without what an amplitude adds to its prior.
        self.information = torch.cholesky_inverse(given.root(self.u[self.own]))
        if given.prior_sd is not None:
            self.information = self.information - (given.prior_sd**-2 - 1).diag()

    def start(self, tick: Callable[[str], None]) -> Tensor:
        """Return the other latents at the maximum; with that of the amplitude, at its highest marginal posterior."""
        rest = self.u[self.rest]
        if not self.adaptive:
            return rest
        highest, found, mode = -math.inf, rest, self.u[self.own]
        for z in torch.linspace(-_AMPLITUDES, _AMPLITUDES, 2 * _AMPLITUDES + 1, dtype=rest.dtype):
            here = torch.cat([rest, z[None]])
            orbits, _ = self.orbits(here)
            tick("amplitude of f(J)")
            if orbits.log_marginal > highest:
                highest, found, mode = orbits.log_marginal, here, orbits.mode
        self.u = self.whole(rest, mode)
        self._centre(found)
        return found

    def given(self, rest: Tensor) -> _GivenPotential:
        """Return the posterior of f(J) given the other latents."""
        z = rest[-1] if len(rest) > len(self.rest) else None
        return _GivenPotential(self.space, self.data, self.whole(rest, self.u[self.own]), z)

    def whole(self, rest: Tensor, own: Tensor) -> Tensor:
        """Return all latents ``(size,)`` from those that are left and those of f(J)."""
        u = torch.empty_like(self.u)
        u[self.rest], u[self.own] = rest[: len(self.rest)], own
        return u

    def with_orbits(
        self, rest: Tensor, orbits: Orbits, given: _GivenPotential, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """Return all latents ``(size,)`` with f(J) drawn in a potential, and the latter's log marginal posterior."""
        draws, log_weights = given.draws(orbits, self.n_draws, generator)
        if not bool(torch.isfinite(log_weights).any()):
            return self.whole(rest, orbits.mode), -math.inf
        chosen = torch.multinomial(torch.softmax(log_weights, 0), 1, generator=generator)
        return self.whole(rest, draws[int(chosen)]), float(log_weights.logsumexp(0)) - math.log(len(draws))

    def orbits(self, rest: Tensor, near: Tensor | None = None) -> tuple[Orbits, _GivenPotential]:
        """Return f(J) given the other latents, and what it was found with; the climb begins at the latents ``near``."""
        given = self.given(rest)
        information = self.information
        if given.prior_sd is not None:
            information = information + (given.prior_sd**-2 - 1).diag()
        root = whitening(given.positive(information))
        return given.orbits(self.u[self.own] if near is None else near, root, self.own_covariance), given

    def slope(self, rest: Tensor) -> Tensor:
        """Return the gradient of the profile, ln p at the best f(J), by the latents of the model."""
        found, _ = self.orbits(rest)
        return self.space.gradient(self.whole(rest, found.mode), self.data)[1][self.rest]

    def first_covariance(self, start: Tensor, information: Tensor, tick: Callable[[str], None]) -> Tensor:
        """Return the inverse of the profile's curvature at ``start``, by differences of its gradient.

        ``information`` is that of all latents of the model, of which the curvature is a part at least. An amplitude's
        variance is that of its marginal posterior, and its correlations are left to the adaption.
        """
        root = torch.linalg.cholesky(torch.linalg.inv(information)[self.rest][:, self.rest])
        columns = []
        for v in root.T:
            slopes = []
            for step in (-_STEP, _STEP):
                at = start.clone()
                at[: len(v)] += step * v
                slopes.append(self.slope(at))
                tick("curvature")
            columns.append(root.T @ (slopes[0] - slopes[1]) / (2 * _STEP))
        curvature = torch.stack(columns)
        values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
        back = root @ vectors
        found = (back / values.clamp(min=_LEAST_CURVATURE)) @ back.T
        if not self.adaptive:
            return found
        last = torch.zeros_like(start)
        last[-1] = _AMPLITUDE_STEP
        below, here, above = (self.orbits(start + k * last)[0].log_marginal for k in (-1, 0, 1))
        precision = max((2 * here - below - above) / _AMPLITUDE_STEP**2, 1.0)
        return torch.block_diag(found, torch.tensor([[1 / precision]], dtype=start.dtype))


class MarginalDraws(NamedTuple):
    """Draws of all latents ``(n, size)`` and their log importance weights."""

    u: Tensor
    log_weights: Tensor


def marginal(
    target: MarginalPosterior,
    information: Tensor,
    wanted: float,
    seed: int,
    tick: Callable[[str], None],
    most_rounds: int = MOST_ROUNDS,
) -> MarginalDraws:
    """Draw from the posterior with f(J) integrated out.

    Parameters
    ----------
    target
        What is drawn from.
    information
        Of all latents at the maximum.
    wanted
        Effective number of draws.
    seed
        Of the draws.
    tick
        Called with a note after each potential.
    most_rounds
        Of the importance sampling.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    kept: list[_Kept | None] = []
    modes = _Modes(target.u[target.own])

    def log_p(rest: Tensor) -> float:
        try:
            try:
                found, given = target.orbits(rest, modes.near(rest))
            except (ValueError, torch.linalg.LinAlgError):
                # what was extrapolated may be absurd where f(J) is not
                found, given = target.orbits(rest)
            absurd = bool(given.is_far(found.mode)) or not math.isfinite(found.log_marginal)
        except (ValueError, torch.linalg.LinAlgError):
            # far out a latent may overflow
            absurd = True
        if absurd:
            kept.append(None)
            return -math.inf
        modes.add(rest, found.mode)
        if target.own_covariance:
            kept.append(_Kept(found, target.whole(rest, found.mode)))
            return found.log_marginal
        draw, value = target.with_orbits(rest, found, given, generator)
        kept.append(_Kept(found, draw))
        return value

    start = target.start(tick)
    modes.first = target.u[target.own]
    covariance = target.first_covariance(start, information, tick)
    found = adaptive_importance(log_p, start, covariance, wanted, seed, tick, most_rounds)
    log_weights = found.log_p - found.log_q
    if target.own_covariance:
        return _corrected(target, found.x, kept, log_weights, generator, tick)
    return MarginalDraws(torch.stack([target.u if one is None else one.draw for one in kept]), log_weights)


class _Kept(NamedTuple):
    """Of a potential: f(J) in it, and a draw of all latents."""

    orbits: Orbits
    draw: Tensor


def _corrected(
    target: MarginalPosterior,
    x: Tensor,
    kept: list[_Kept | None],
    log_weights: Tensor,
    generator: torch.Generator,
    tick: Callable[[str], None],
) -> MarginalDraws:
    """Draw f(J) in the potentials ``x (n, d)`` and correct their weights by Laplace's method for what it lacks.

    Those of negligible weight have none after this.
    """
    rows = (log_weights > log_weights.max() + math.log(_NEGLIGIBLE)).nonzero()[:, 0]
    u, ratio = target.u.expand(len(x), -1).clone(), log_weights.new_zeros(len(rows))
    for i, row in enumerate(rows):
        one = kept[int(row)]
        assert one is not None  # it has a weight
        u[row], value = target.with_orbits(x[row], one.orbits, target.given(x[row]), generator)
        ratio[i] = math.exp(min(value - one.orbits.log_marginal, _MOST))
        tick("density of orbits")
    a, b = log_ratio(x[rows], ratio, log_weights[rows])
    found = torch.full_like(log_weights, -math.inf)
    found[rows] = log_weights[rows] + a + x[rows] @ b
    return MarginalDraws(u, found)


class _Modes:
    """Where f(J) is likely to be best: a linear function of the other latents, fitted to the potentials so far.

    ``first`` is where it is until there are enough of them.
    """

    def __init__(self, first: Tensor) -> None:
        self.first = first
        self._rest: list[Tensor] = []
        self._modes: list[Tensor] = []
        self._fitted: tuple[Tensor, Tensor] | None = None

    def add(self, rest: Tensor, mode: Tensor) -> None:
        """Take one more; now and then the function is fitted anew."""
        self._rest.append(rest)
        self._modes.append(mode)
        if len(self._rest) % (3 * len(rest)) == 0:
            x, y = torch.stack(self._rest), torch.stack(self._modes)
            mean = x.mean(0)
            centred = torch.cat([torch.ones_like(x[:, :1]), x - mean], -1)
            self._fitted = mean, torch.linalg.lstsq(centred, y, driver="gelsd").solution

    def near(self, rest: Tensor) -> Tensor:
        """Return the latents of f(J) that a climb at ``rest`` begins with."""
        if self._fitted is None:
            return self.first
        mean, slopes = self._fitted
        return slopes[0] + (rest - mean) @ slopes[1:]


def n_marginal_steps(target: MarginalPosterior, most_rounds: int = MOST_ROUNDS) -> int:
    """Return how often `marginal` reports at most."""
    d, amplitude = len(target.rest), 2 * _AMPLITUDES + 1 if target.adaptive else 0
    each = 2 if target.own_covariance else 1
    return 2 * d + amplitude + each * most_rounds * n_in_round(d + target.adaptive)


def integrable(model: SnapshotModel) -> bool:
    """Whether f(J) can be integrated out: of a sphere, ln f linear in its latents, a likelihood in closed form."""
    linear = isinstance(model.df, LogisticGaussianProcess)
    return linear and model.smoothing is None and model.potential.symmetry == "spherical"


class _GivenPotential:
    """The log posterior as a function of the latents of f(J) alone.

    ``z`` is the latent of the amplitude of its prior; None: it is that of the model.
    """

    def __init__(self, space: LatentSpace, data: Tensor, u: Tensor, z: Tensor | None = None) -> None:
        self.space, self.data, self.u, self.z = space, data, u, z
        df = cast("LogisticGaussianProcess", space.model.df)
        #: Prior standard deviations of the latents of f(J); None: all are 1.
        self.prior_sd = None if z is None else df.prior_sd(AMPLITUDE_SD * z)
        self.own = space.slices["df.weights"]
        with torch.no_grad():
            self.model = space.model.at(space.values(u)).tabulated(data)
        self.model.finder = RememberedActions(self.model.finder)
        self.df = _KnownDensity(df)
        self.model._modules = dict(self.model._modules) | {"df": self.df}

    def log_p(self, own: Tensor) -> Tensor:
        """Return the log posterior at latents of f(J) ``(k,)``."""
        self.df.weights = own
        return self._log_posterior(self.model.density(), own)

    def _log_posterior(self, density: ObservedStars, own: Tensor) -> Tensor:
        before, after = (
            part.expand(*own.shape[:-1], -1) for part in (self.u[: self.own.start], self.u[self.own.stop :])
        )
        log_prior = self.space.log_prior(torch.cat([before, own, after], -1))
        found = density.log_prob(self.data).sum(-1) + log_prior
        if self.prior_sd is None or self.z is None:
            return found
        # in place of the model's prior N(0, 1) of the latents of f(J), and with that of the amplitude
        other = 0.5 * (own**2 * (1 - self.prior_sd**-2)).sum(-1) - self.prior_sd.log().sum()
        return found + other - 0.5 * self.z**2 - 0.5 * math.log(2 * math.pi)

    def draws(self, orbits: Orbits, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents of f(J) ``(n, k)`` from the Gaussian of ``orbits``, and their log importance weights."""
        z = torch.randn(n, len(orbits.mode), generator=generator, dtype=orbits.mode.dtype)
        own = orbits.mode + z @ orbits.root.T
        volume = orbits.root.diagonal().log().sum() + len(orbits.mode) / 2 * math.log(2 * math.pi)
        return own, self.log_p_of_draws(own) + 0.5 * (z**2).sum(-1) + volume

    @torch.no_grad()
    def log_p_of_draws(self, own: Tensor) -> Tensor:
        """Return `log_p` ``(n_draws,)`` of draws ``(n_draws, k)``; minus infinity far from the prior, and where the
        sums over a lattice of the sky do not resolve f(J)."""
        parts = own.split(_DRAWS_AT_ONCE if self.model.projection is not None else 1)
        found = torch.cat([self._log_p_of_some(some) for some in parts])
        return torch.where(self.is_far(own), -math.inf, found)

    def _log_p_of_some(self, own: Tensor) -> Tensor:
        if not isinstance(lattice := self.model.lattice, SkyLattice):
            return torch.stack([self.log_p(one) for one in own])
        self.df.weights = own
        density = self.model.density()
        sums = cast("Tensor", density.shared())
        log_p = self._log_posterior(density.sharing(sums), own)
        return torch.where(lattice.resolves(sums), log_p, -math.inf)

    def is_far(self, own: Tensor) -> Tensor:
        """Return whether a latent of f(J) ``(*batch, k)`` is more than `_FARTHEST` prior standard deviations from its
        prior mean."""
        return ((own if self.prior_sd is None else own / self.prior_sd).abs() > _FARTHEST).any(-1)

    def positive(self, information: Tensor) -> Tensor:
        """Return minus second derivatives ``(k, k)`` with eigenvalues, over the prior's, of `_LEAST_OF_PRIOR` at
        least."""
        sd = torch.ones_like(information[0]) if self.prior_sd is None else self.prior_sd
        values, vectors = torch.linalg.eigh(sd[:, None] * information * sd)
        back = vectors / sd[:, None]
        return (back * values.clamp(min=_LEAST_OF_PRIOR)) @ back.T

    def _gradient(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return ln p and its gradient."""
        own = own.detach().requires_grad_()
        value = self.log_p(own)
        return value.detach(), torch.autograd.grad(value, own)[0]

    def root(self, own: Tensor) -> Tensor:
        """Return C with C C^T the inverse of minus the second derivatives of ln p.

        Raises
        ------
        ValueError
            If these are not finite.
        """
        if self.model.projection is not None:
            return whitening(self.positive(self._information_on_the_sky(own)))
        own = own.detach().requires_grad_()
        slope = torch.autograd.grad(self.log_p(own), own, create_graph=True)[0]
        directions = torch.eye(len(own), dtype=own.dtype).split(max(1, _AT_ONCE // self.data[..., 0].numel()))
        parts = [
            torch.autograd.grad(slope, own, some, is_grads_batched=True, retain_graph=True)[0] for some in directions
        ]
        found = torch.cat(parts)
        if not bool(torch.isfinite(found).all()):
            raise ValueError("the second derivatives of f(J) are not finite")
        return whitening(self.positive(-(found + found.T) / 2))

    def _information_on_the_sky(self, own: Tensor) -> Tensor:
        """Return minus the second derivatives of ln p, of stars on the sky.

        ln p is a function of sums s that are linear in f, and ln f is linear in the latents: what is left to
        differentiate twice are the stars, at a thousandth of the numbers.
        """
        lattice = cast("SkyLattice", self.model.lattice)
        with torch.no_grad():
            self.df.weights = own
            seen = self.model.density()
            f = lattice.scaled(
                PhaseMixed(self.model.potential, self.model.finder, cast("DistributionFunction", self.df))
            )
            J, *_ = self.model.finder.capped_actions(self.model.potential, lattice.w.reshape(-1, 6))
            features = self.df.features(J).reshape(*f.shape, -1)
            along = lattice.summed((f[..., None] * features).movedim(-1, 0))

        points = f.clone().requires_grad_()
        found = lattice.summed(points)
        log_p = seen.sharing(lattice.reduced(found)).log_prob(self.data).sum()
        (slope,) = torch.autograd.grad(log_p, found, create_graph=True)
        (curved,) = torch.autograd.grad(slope, found, along, is_grads_batched=True, retain_graph=True)
        (by_f,) = torch.autograd.grad(found, points, slope.detach())
        weighted = ((by_f * f).reshape(-1, 1) * features.reshape(-1, features.shape[-1])).T
        second = weighted @ features.reshape(-1, features.shape[-1])
        second = second + along.flatten(1) @ curved.flatten(1).T
        if not bool(torch.isfinite(second).all()):
            raise ValueError("the second derivatives of f(J) are not finite")
        prior = torch.ones_like(own) if self.prior_sd is None else self.prior_sd**-2
        return -(second + second.T) / 2 + prior.diag()

    def orbits(self, own: Tensor, root: Tensor, own_covariance: bool = True) -> Orbits:
        """Return the maximum from ``own`` on, and what Laplace's method makes of it.

        By L-BFGS in coordinates whitened by the covariance ``root root^T`` of another potential.
        """
        z = torch.zeros_like(own, requires_grad=True)
        optimiser = LBFGS(
            [z], max_iter=_STEPS, history_size=_STEPS, tolerance_grad=_SLOPE, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            value, slope = self._gradient(own + root @ z.detach())
            if bool(torch.isfinite(value)) and bool(torch.isfinite(slope).all()):
                z.grad = -root.T @ slope
                return -value
            if not z.any():
                raise ValueError("the log posterior of f(J) is not finite")
            # a trial step too far: the line search turns back
            z.grad = torch.zeros_like(z)
            return value.new_tensor(_WALL)

        optimiser.step(closure)
        own = own + root @ z.detach()
        value = float(self.log_p_of_draws(own[None])[0])
        if own_covariance:
            root = self.root(own)
        volume = len(own) / 2 * math.log(2 * math.pi) + float(root.diagonal().log().sum())
        return Orbits(own, root, value, value + volume)


class _KnownDensity(torch.nn.Module):
    """ln f at actions that stay, as a function of ``weights``."""

    weights: Tensor

    def __init__(self, df: LogisticGaussianProcess) -> None:
        super().__init__()
        self.df, self.symmetry = df, df.symmetry
        self._seen: list[tuple[Tensor, LogDensityAtActions]] = []

    def log_prob(self, J: Tensor) -> Tensor:
        return self._at(J)(self.weights)

    def features(self, J: Tensor) -> Tensor:
        """Return the derivatives ``(*batch, K)`` of ln f by the weights, but for that of its normalisation."""
        return self._at(J).features

    def _at(self, J: Tensor) -> LogDensityAtActions:
        for known, log_f in self._seen:
            if same_array(known, J):
                return log_f
        with torch.no_grad():
            self._seen.append((J, self.df.at_actions(J)))
        return self._seen[-1][1]


__all__: list[Any] = ["MarginalDraws", "MarginalPosterior", "Orbits", "integrable", "marginal", "n_marginal_steps"]
