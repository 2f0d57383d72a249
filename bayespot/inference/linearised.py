"""The posterior with actions to first order in the potential: what the climb in an axisymmetric potential runs on.

An action of the Staeckel fudge costs a hundred times what f(J) costs. To first order about a potential all actions are
one product of matrices, so an optimiser may ask for them as often as it likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bayespot.actions.base import ActionAngles, ActionFinder, CappedActions
from bayespot.actions.response import Response, response
from bayespot.actions.staeckel import StaeckelFudge, TabulatedFudge
from bayespot.inference.latent import LatentSpace, capped_density, potential_scores, same_array, whitening
from bayespot.inference.optimise import Report, lbfgs
from bayespot.potential.base import Potential, SumPotential

#: Step in u of the change of the potential.
_STEP = 1e-4
#: Of the optimiser on the linearised posterior: nearest to its maximum in posterior sd, and most iterations.
_INNER, _ITERATIONS = 0.3, 60
#: Least gain in ln p of a round that is followed by another.
_LEAST_GAIN = 2.0
#: How often a step that lowers the posterior is halved.
_HALVINGS = 8
#: Largest change of J by one latent of the potential, over the sum of actions, for which it counts as linear; and the
#: largest step of a latent in prior standard deviations.
_LINEAR, _PRIOR_SDS = 0.4, 3.0


class Responder:
    """Actions and their derivatives by the potential's latents, of any of the stars ``w``, about u_0.

    Parameters
    ----------
    space, u
        The latents of a model that `responds`, and u_0.
    w : Float[Tensor, "*batch 6"]
        Stars, as `SnapshotModel.prepare` returns them.
    """

    def __init__(self, space: LatentSpace, u: Tensor, w: Tensor) -> None:
        with torch.no_grad():
            finder = space.model.at(space.values(u)).tabulated(w).finder
            assert isinstance(finder, TabulatedFudge)  # `responds` looked
            self.tables = finder.tables
            self._last: list[tuple[Tensor, Response]] = []
            self.changes = _changes(space, u, self.tables.field.nodes())

    def __call__(self, w: Tensor) -> Response:
        """Return the response, row after row, of places ``(*batch, 6)``; that of the last two arrays is kept."""
        w = w[..., :6]
        for known, found in self._last:
            if same_array(known, w):
                return found
        self._last = [(w, response(self.tables, w.reshape(-1, 6), self.changes)), *self._last[:1]]
        return self._last[0][1]


def phi_of_draws(space: LatentSpace, u: Tensor, nodes: tuple[Tensor, Tensor]) -> Tensor:
    """Return Phi ``(n_draws, n m)`` at all pairs of s ``(n,)`` and mu ``(m,)`` for draws of the latents."""
    values = space.values(u)
    parts = [
        part.phi_draws_on_grid({name.removeprefix(prefix): values[name] for name in names}, *nodes)
        if names
        else part.phi_on_grid(*nodes)
        for prefix, part, names in components(space)
    ]
    return sum(parts[1:], parts[0]).expand(len(u), -1, -1).flatten(1)


def components(space: LatentSpace) -> list[tuple[str, Potential, list[str]]]:
    """Return the prefix of the sites of each component of the potential, the component, and the sites' names."""
    potential = space.model.potential
    parts = (
        {f"potential.members.{i}.": part for i, part in enumerate(potential.members)}
        if isinstance(potential, SumPotential)
        else {"potential.": potential}
    )
    return [
        (prefix, part, [name for name in space.slices if name.startswith(prefix)]) for prefix, part in parts.items()
    ]


def _changes(space: LatentSpace, u: Tensor, nodes: tuple[Tensor, Tensor]) -> Tensor:
    """Return dPhi/du ``(n_nodes, k)`` of every latent of the potential at the nodes, component by component."""
    changes = u.new_zeros(nodes[0].numel() * nodes[1].numel(), space.n_potential)
    for prefix, part, names in components(space):
        columns = [k for name in names for k in range(space.size)[space.slices[name]]]
        if not columns:
            continue
        steps = _STEP * torch.eye(space.size, dtype=u.dtype)[columns]
        values = space.values(u + torch.cat([steps, -steps]))
        mine = {name.removeprefix(prefix): values[name] for name in names}
        ahead, behind = part.phi_draws_on_grid(mine, *nodes).flatten(1).chunk(2)
        changes[:, columns] = ((ahead - behind) / (2 * _STEP)).T
    return changes


class Linearised:
    """The log posterior of ``w`` with J linear in the potential's latents about u_0, exact to first order there.

    It has what `lbfgs` asks of a `LatentSpace`. Far off it falls steeply: linear actions could all shrink together, and
    f(J) with them. ``reach`` says how far, over where J stops being linear.
    """

    def __init__(
        self, space: LatentSpace, u: Tensor, w: Tensor, responder: Callable[[Tensor], Response], reach: float = 1.0
    ) -> None:
        self.space, self.u_0, self.w = space, u, w
        points = space.model.points
        places = [w[..., :6]] + ([] if points is None else [points.w])
        self.known = [(place, responder(place)) for place in places]
        self.reach = reach * _reach(self.known[0][1], space.prior_curvature(u).diagonal()[: space.n_potential])
        self.value, self.slope = self._approximate(u)

    def valid(self, u: Tensor) -> bool:
        """Whether every site has a value at u."""
        return self.space.valid(u)

    def gradient(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log posterior at u and its gradient; the stars are those of the construction."""
        value, slope = self._approximate(u)
        step = u - self.u_0
        own = slice(0, self.space.n_potential)
        far = step[own] / self.reach
        value = value - len(w) * (far**8).sum()
        slope[own] -= 8 * len(w) * far**7 / self.reach
        return value, slope

    def _approximate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        prior, prior_slope = self.space.prior_gradient(u)
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            value = self._log_likelihood(u)
            return value.detach() + prior, torch.autograd.grad(value, u)[0] + prior_slope

    def _log_likelihood(self, u: Tensor) -> Tensor:
        model = self.space.model.at(self.space.values(u))
        model.finder = _LinearActions(self.known, (u - self.u_0)[: self.space.n_potential])
        return model.density().log_prob(self.w).sum()


class _LinearActions(ActionFinder):
    """Actions to first order after a step of the potential's latents, of the arrays whose response is known."""

    def __init__(self, known: Sequence[tuple[Tensor, Response]], step: Tensor) -> None:
        self.known, self.step = known, step

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        """Return the actions of one of the arrays, whatever the potential."""
        J, excess, of_J, of_excess = next(found for places, found in self.known if same_array(places, w))
        moved = _positive(J[:, ::2], of_J @ self.step)
        J = torch.stack([moved[:, 0], J[:, 1], moved[:, 1]], -1)
        excess = (excess + of_excess @ self.step).clamp(min=0)
        return CappedActions(J.reshape(*w.shape[:-1], 3), excess.reshape(w.shape[:-1]))

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        """Refuse: angles are not linearised."""
        raise NotImplementedError("linear actions have no angles")


class AtFixedActions(Linearised):
    """The log posterior of ``w`` as a function of f(J) and the outliers alone, the potential being that at u."""

    def __init__(self, space: LatentSpace, u: Tensor, w: Tensor) -> None:
        model = space.model.at(space.values(u)).tabulated(w)
        k = space.n_potential

        @torch.no_grad()
        def still(places: Tensor) -> Response:
            J, excess = model.finder.capped_actions(model.potential, places.reshape(-1, 6))
            return Response(J, excess, J.new_zeros(len(J), 2, k), J.new_zeros(len(J), k))

        super().__init__(space, u, w, still)

    def gradient(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log posterior at u and its gradient, zero by the potential's latents."""
        value, slope = self._approximate(u)
        slope[: self.space.n_potential] = 0
        return value, slope


def fraction_slope(space: LatentSpace, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return ln Z, of the fraction that a selection keeps, at u and its gradient ``(size,)`` to first order in J.

    Of the stars ``w`` and the model's points.
    """
    points = space.model.points
    assert points is not None  # the caller laid them
    found = Responder(space, u, w)(points.w)
    u = u.detach().requires_grad_()
    with torch.enable_grad():
        df = space.model.at(space.values(u)).df
        log_p = points.log_weight + points.accepted.log() + capped_density(df, found) - 3 * math.log(2 * math.pi)
        log_z = torch.logsumexp(log_p, 0)
        slope = torch.autograd.grad(log_z, u)[0] if log_z.requires_grad else torch.zeros_like(u)
    slope[: space.n_potential] = torch.softmax(log_p.detach(), 0) @ potential_scores(df, found)
    return log_z.detach(), slope.detach()


def _reach(response: Response, prior_curvature: Tensor) -> Tensor:
    """Return the steps of the potential's latents up to which J is about linear."""
    relative = (response.of_J.abs().sum(1) / response.J.abs().sum(-1, keepdim=True).clamp(min=1e-300)).square().mean(0)
    of_prior = _PRIOR_SDS * prior_curvature.clamp(min=1e-12).rsqrt()
    return torch.minimum(_LINEAR * relative.clamp(min=1e-24).rsqrt(), of_prior)


def _positive(J: Tensor, rise: Tensor) -> Tensor:
    """Return J + rise, below J an exponential of the same slope: actions stay positive."""
    below = torch.exp((rise / J.clamp(min=1e-300)).clamp(max=0))
    return torch.where(rise >= 0, J + rise, J * below)


def gauss_newton(
    space: LatentSpace, u: Tensor, w: Tensor, tolerance: float, max_rounds: int, report: Report, n_information: int
) -> tuple[Tensor, float, int]:
    """Climb the log posterior by maximising it with linear actions, again and again from where that leads.

    It ends where actions of second order decide: a round that gains little in ln p is the last.

    Parameters
    ----------
    space, u, w
        The latents of a model that `responds`, where to begin, and the stars.
    tolerance
        Distance from the maximum in posterior standard deviations.
    max_rounds
        Most linearisations.
    report
        Called with (u, note) after each.
    n_information
        Stars that give the information, of more a random part.

    Returns
    -------
    u, distance, iterations
        Where the posterior is highest of all places reached, how far from the maximum that is, and the iterations of
        the optimisers.
    """
    done, norm, reach, before = 0, math.inf, 1.0, -math.inf
    for k in range(max_rounds):
        responder = Responder(space, u, w)
        here = Linearised(space, u, w, responder, reach)
        information = space.fisher(u, w, n_information, k, responder=responder)
        norm = float((whitening(information).T @ here.slope).norm())
        report(u, f"ln p {float(here.value):.3f}, {norm:.2g} sd from the maximum")
        if norm < tolerance or float(here.value) < before + _LEAST_GAIN:
            break
        before = float(here.value)
        u_1, _, n = lbfgs(here, u, w, information, max(_INNER * tolerance, 0.01), _ITERATIONS, _silent)  # type: ignore[arg-type]
        done += n
        shorter = uphill(space, u, u_1 - u, w, float(here.value))
        if shorter == 0:
            break
        reach = min(1.0, 2 * reach) if shorter == 1 else reach / 2
        u = u + shorter * (u_1 - u)
    return u, norm, done


def uphill(space: LatentSpace, u: Tensor, step: Tensor, w: Tensor, value: float) -> float:
    """Return the part of a step that leads higher than ``value``, halved until it does; zero if none does."""
    part = 1.0
    for _ in range(_HALVINGS):
        if space.valid(u + part * step) and float(space.log_posterior(u + part * step, w)) > value:
            return part
        part /= 2
    return 0.0


def _silent(u: Tensor, note: str) -> None:
    """Tell nobody."""


def responds(space: LatentSpace) -> bool:
    """Whether the model's actions have a `Responder`: the Staeckel fudge, a likelihood in closed form, no streams."""
    model = space.model
    return (
        model.smoothing is None
        and not len(model.streams)
        and isinstance(model.finder, StaeckelFudge)
        and model.potential.symmetry == "axisymmetric"
    )
