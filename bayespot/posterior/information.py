"""Fisher information per star on a model's potential, of stars whose density of orbits is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayespot.actions.base import cap_energy
from bayespot.actions.radial import RadialOrbits
from bayespot.actions.reach import profile_of_stars
from bayespot.actions.response import response
from bayespot.inference.latent import LatentSpace, whitening
from bayespot.inference.linearised import Responder
from bayespot.mock.equilibrium import Equilibrium
from bayespot.mock.orbits import OrbitPopulation
from bayespot.potential.base import Potential, radius
from bayespot.potential.fields import truth_field

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Weight of the latents' distance from their start in the fit to the true potential: that of a unit-normal prior
#: beside a million stars. It settles what the stars' radii do not.
_RIDGE = 1e-3
#: Places at which an axisymmetric potential is compared with the true one, and the quantile of errors that is quoted.
_N_PLACES, _QUOTED = 300, 0.95
#: Change of the mean square error of accelerations in a step that is the last of that comparison.
_MATCHED = 1e-2
_STEP = 1e-4
#: Rounding error of central differences of that step, with a margin.
_NOISE = 20 * 2.2e-16 / _STEP
_BLOCK = 5_000
#: Share of the information that stars must have in a direction for its curvature to be measured, and the step of the
#: difference in standard deviations.
_MEASURED, _SHIFT = 0.3, 1.0
#: Least curvature in such a direction over the inverse of its variance.
_LEAST_CURVATURE = 0.05


def differences(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Return d function / du ``(n, K)`` by central differences."""
    columns = []
    for k in range(len(u)):
        shift = torch.zeros_like(u)
        shift[k] = _STEP
        columns.append((function(u + shift) - function(u - shift)) / (2 * _STEP))
    return torch.stack(columns, -1)


def closest_sphere(space: LatentSpace, truth: Potential, r: Tensor) -> tuple[Tensor, float]:
    """Return the latents whose ln M(<r) is closest to the true one's at ``r``, and the largest error left."""
    from scipy.optimize import least_squares

    start = space.vector(space.model.initial_values())
    true = np.log(truth_field(truth, "enclosed_mass", r.numpy()))

    def error(u: NDArray[np.float64]) -> NDArray[np.float64]:
        mass = truth_field(space.model.at(space.values(torch.as_tensor(u))).potential, "enclosed_mass", r.numpy())
        # a direct network may have M < 0 on the way
        return np.log(np.clip(mass, 1e-30 * np.exp(true), None)) - true

    def residuals(u: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([error(u) / math.sqrt(len(true)), _RIDGE * (u - start.numpy())])

    found = least_squares(residuals, start.numpy(), jac="3-point", method="trf", x_scale="jac", max_nfev=200)
    return torch.as_tensor(found.x), float(np.abs(error(found.x)).max())


def closest_flattened(space: LatentSpace, truth: Potential, x: Tensor) -> tuple[Tensor, float]:
    """Return the latents whose accelerations at stars ``x`` are closest to the true ones, relative to their size.

    And the relative error of nineteen in twenty of them.
    """
    from scipy.optimize import least_squares

    order = radius(x).argsort()
    x = x[order[torch.linspace(0, len(x) - 1, min(_N_PLACES, len(x))).long()]]
    # in the plane y = 0, from above: the potentials have axis and plane of symmetry
    x = torch.stack([torch.linalg.vector_norm(x[:, :2], dim=-1), torch.zeros_like(x[:, 0]), x[:, 2].abs()], -1)
    start = space.vector(space.model.initial_values())
    true = truth.acceleration(x).detach()[:, ::2]
    size = torch.linalg.vector_norm(true, dim=-1, keepdim=True)

    def error(u: NDArray[np.float64]) -> NDArray[np.float64]:
        found = space.model.at(space.values(torch.as_tensor(u))).potential.acceleration(x).detach()[:, ::2]
        return ((found - true) / size).numpy()

    def residuals(u: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([error(u).ravel() / math.sqrt(len(x)), _RIDGE * (u - start.numpy())])

    found = least_squares(residuals, start.numpy(), method="trf", x_scale="jac", ftol=_MATCHED, max_nfev=100)
    return torch.as_tensor(found.x), float(np.quantile(np.linalg.norm(error(found.x), axis=-1), _QUOTED))


@torch.no_grad()
def of_sphere(known: Equilibrium, space: LatentSpace, u: Tensor, w: Tensor) -> Tensor:
    """Return the mean information per star of ``w`` on the potential at ``u``."""
    s = radius(w[:, :3]).log()
    profile, *_ = profile_of_stars(known.potential, s, w[:, 3:], 0.01)
    grid = profile.s_first + profile.ds * torch.arange(len(profile.vc2), dtype=torch.float64)
    slopes = differences(lambda v: space.model.at(space.values(v)).potential.phi_r(grid.exp()), u)
    total = torch.zeros(len(u), len(u), dtype=torch.float64)
    for stars in w.split(_BLOCK):
        x, v = stars[:, :3], stars[:, 3:]
        phi = profile.phi(radius(x).log())
        energy, _ = cap_energy((v**2).sum(-1) / 2 + phi, phi, profile.escape_energy)
        along, weight = RadialOrbits.of(profile, energy, radius(torch.linalg.cross(x, v))).phases()
        position = ((along - profile.s_first) / profile.ds).clamp(0, len(grid) - 1.001)
        index = position.long()
        change = torch.lerp(slopes[index], slopes[index + 1], (position - index)[..., None])
        change = change - (weight[..., None] * change).sum(1, keepdim=True)
        depth = profile.phi_nodes[index].abs().amax(1)[:, None, None]
        # rounding of the differences must not count as information
        change = torch.where(change.abs() > _NOISE * depth, change, 0.0)
        score = (weight.sqrt() * known.energy_slope(stars)[:, None])[..., None] * change
        total += torch.einsum("nqk,nql->kl", score, score)
    return total / len(w)


def of_flattened(
    population: OrbitPopulation,
    space: LatentSpace,
    u: Tensor,
    w: Tensor,
    n_groups: int,
    tick: Callable[[float], None] | None = None,
) -> Tensor:
    r"""Return the information per star on an axisymmetric potential at u, of groups of stars ``(n_groups, K, K)``.

    Scores are :math:`\partial\ln f/\partial J \cdot \partial J/\partial\Phi` with the actions of the Staeckel fudge.
    Their outer product is the information where the prior decides; where the stars do it is how much they change when
    the potential does: the squares of scores are ruled by the few stars of small L_z for which the fudge's derivatives
    are worst, and would have flattenings up to twice too certain.
    """
    responder = Responder(space, u, w)

    def scores(at: Tensor) -> Tensor:
        tables = responder.tables if at is u else Responder(space, at, w).tables
        found = response(tables, w, responder.changes)
        with torch.enable_grad():
            J = found.J.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(population.log_prob(J).sum(), J)
        # a star that is not bound there tells nothing
        return (slopes[:, ::2, None] * found.of_J).sum(1).nan_to_num(0.0, 0.0, 0.0)

    groups = torch.arange(len(w)).tensor_split(n_groups)
    own = scores(u)
    outer = torch.stack([own[rows].T @ own[rows] / len(rows) for rows in groups])
    total = len(w) * outer.mean(0)
    root = whitening(total + space.prior_curvature(u))
    share, vectors = torch.linalg.eigh(root.T @ total @ root)
    root = root @ vectors
    found = root.T @ outer @ root
    told = (share > _MEASURED).nonzero()[:, 0]
    columns = []
    for done, k in enumerate(told, 1):
        step = _SHIFT * root[:, k]
        change = (scores(u - step) - scores(u + step)) / (2 * _SHIFT)
        columns.append(torch.stack([change[rows].mean(0) for rows in groups]) @ root[:, told])
        if tick:
            tick(done / len(told))
    if columns:
        measured = torch.stack(columns, -1)
        measured = (measured + measured.transpose(1, 2)) / 2
        mean = measured.mean(0)
        values, vectors = torch.linalg.eigh(mean)
        least = _LEAST_CURVATURE / len(w)
        found[:, told[:, None], told] = measured + (vectors * values.clamp(min=least)) @ vectors.T - mean
    back = torch.linalg.inv(root)
    return back.T @ found @ back
