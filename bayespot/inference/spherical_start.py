"""The start of a free-form axisymmetric fit: the sphere that its stars feel, less the mass of the other components."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from bayespot.actions.spherical import SphericalActions
from bayespot.df import ActionMixture
from bayespot.inference.latent import LatentSpace
from bayespot.inference.optimise import Report, adam_until_bound, count_unbound, lbfgs
from bayespot.inference.result import FitConfig
from bayespot.likelihood.model import SnapshotModel
from bayespot.numerics import gauss_legendre
from bayespot.optimisers import LBFGS
from bayespot.potential.axisymmetric import AxisymmetricNetwork
from bayespot.potential.base import Potential, SumPotential
from bayespot.potential.neural import MassSlopeNetwork
from bayespot.pyro_modules import freeze
from bayespot.units import G

#: Largest part of the sphere's mass inside any radius that the other components may have at the start.
_MOST = 0.7
#: Relative error of the mass that the network is asked to keep to, at this many radii.
_CLOSE, _N_RADII = 0.01, 60
#: Nodes in latitude of the average over a sphere.
_N_LATITUDES = 24
#: Of L-BFGS in the sphere: how near to its maximum in posterior standard deviations, and most iterations.
_TOLERANCE, _ITERATIONS = 0.3, 60


def spherical_start(
    model: SnapshotModel, values: Mapping[str, Tensor], w: Tensor, config: FitConfig, report: Report
) -> dict[str, Tensor]:
    """Return ``values`` with the monopole of an `AxisymmetricNetwork` from a spherical fit of the stars ``w``.

    The sphere costs a tenth of an axisymmetric potential, and binds the stars as that must. Of its enclosed mass that
    of the other components at their own start is taken off, so far as it leaves the network any. Models without such
    a network, and stars that no sphere binds, keep ``values``.
    """
    path, network = _network(model.potential)
    if network is None:
        return dict(values)
    prefix = f"potential.{path}monopole."
    own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    sphere = _fitted_sphere(model, network.monopole, own, w, config, report)
    if sphere is None:
        return dict(values)
    s = torch.linspace(network.monopole.s_inner, network.monopole.s_outer, _N_RADII, dtype=torch.float64)
    total = freeze(network.monopole, sphere).enclosed_mass(s.exp()).detach()
    others = [part for part in _parts(model.at(values).potential) if not isinstance(part, AxisymmetricNetwork)]
    rest = sum((_mean_enclosed_mass(part, s.exp()) for part in others), torch.zeros_like(total))
    left = total - torch.minimum(rest, _MOST * total)
    start = _refitted(network.monopole, sphere, s, left.log()) if others else sphere
    return dict(values) | {prefix + name: value for name, value in start.items()}


def _parts(potential: Potential) -> list[Potential]:
    return list(potential.members) if isinstance(potential, SumPotential) else [potential]


def _network(potential: Potential) -> tuple[str, AxisymmetricNetwork | None]:
    """Return the first network among the components, and the prefix of its sites."""
    for i, part in enumerate(_parts(potential)):
        if isinstance(part, AxisymmetricNetwork):
            return (f"members.{i}." if isinstance(potential, SumPotential) else ""), part
    return "", None


def _fitted_sphere(
    model: SnapshotModel,
    monopole: MassSlopeNetwork,
    start: Mapping[str, Tensor],
    w: Tensor,
    config: FitConfig,
    report: Report,
) -> dict[str, Tensor] | None:
    """Return the monopole's sites where the sphere's posterior is largest, or None where stars stay unbound."""
    finder = SphericalActions()
    with torch.no_grad():
        J = finder.capped_actions(freeze(monopole, start), w).J
    df = copy.deepcopy(model.df).resolved(min(model.df.n_components or 3, 3), J)
    alone = SnapshotModel(monopole, df, finder)
    own = {f"df.{name}": value for name, value in df.fit_actions(J[:20_000], config.seed).items()}
    space = LatentSpace(alone)
    u = space.vector({f"potential.{name}": value for name, value in start.items()} | own)
    u = adam_until_bound(space, u, w, config.adam_steps, config.adam_learning_rate, report)
    if count_unbound(space, u, w) > len(w) // 2:
        return None
    u, *_ = lbfgs(space, u, w, space.fisher(u, w, 3000, config.seed), _TOLERANCE, _ITERATIONS, report)
    found = space.values(u)
    return {name: found[f"potential.{name}"] for name in start}


@torch.no_grad()
def _mean_enclosed_mass(potential: Potential, r: Tensor) -> Tensor:
    """Return the mass inside r by Gauss's law, from the mean radial force on the sphere."""
    if potential.symmetry == "spherical":
        return potential.enclosed_mass(r)
    mu, weight = (part.to(r) for part in gauss_legendre(_N_LATITUDES))
    direction = torch.stack([((1 - mu) * (1 + mu)).sqrt(), torch.zeros_like(mu), mu], -1)
    inward = -(potential.acceleration(r[:, None, None] * direction) * direction).sum(-1)
    return r**2 / G * (inward * weight / 2).sum(-1)


def _refitted(monopole: MassSlopeNetwork, start: Mapping[str, Tensor], s: Tensor, ln_mass: Tensor) -> dict[str, Tensor]:
    """Return the sites with which the network comes nearest to the enclosed mass, within its prior."""
    names = list(start)
    sizes = [start[name].numel() for name in names]
    u = torch.cat([start[name].reshape(-1) for name in names]).clone().requires_grad_()
    priors = SnapshotModel(monopole, ActionMixture(), SphericalActions()).sites()
    optimiser = LBFGS([u], max_iter=200, line_search_fn="strong_wolfe")

    def values() -> dict[str, Tensor]:
        return {n: part.reshape(start[n].shape) for n, part in zip(names, u.split(sizes), strict=True)}

    def cost() -> Tensor:
        optimiser.zero_grad()
        now = values()
        found = freeze(monopole, now).enclosed_mass(s.exp()).log()
        total = 0.5 * (((found - ln_mass) / _CLOSE) ** 2).mean() * len(s)
        total = total - sum(priors[f"potential.{name}"].log_prob(value).sum() for name, value in now.items())
        total.backward()
        return total.detach()

    optimiser.step(cost)
    return {name: value.detach().clone() for name, value in values().items()}
