r"""The gradient of ln Z at one place, from as many points as it takes, so that few do elsewhere.

A fit evaluates the fraction Z of the population that a selection keeps with a few ten thousand fixed points. Their
Monte-Carlo error is nearly the same linear function of the parameters all over the posterior. It is removed by the
`Tilt` that gives ln Z the gradient at one reference that batches of new points have on average; the scatter between
the batches tells the error that remains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.catalog import Catalog
from bayespot.latent import LatentSpace
from bayespot.model import SnapshotModel
from bayespot.normalisation import Tilt

#: Points per batch, and the least number of batches whose scatter is trusted.
BATCH, LEAST = 65_536, 4
#: The most that a tilt can change the log-likelihood of all stars; within the posterior it is a few.
_BOUND = 20.0


class TiltEstimate(NamedTuple):
    """``tilt``, the points used, and the ``error`` that is left: the largest shift of a latent in posterior sd."""

    tilt: Tilt
    n_points: int
    error: float


def tilt_at(
    space: LatentSpace,
    u: Tensor,
    catalog: Catalog,
    covariance: Tensor,
    tolerance: float,
    max_points: int,
    seed: int,
    tick: Callable[[str], None] | None = None,
) -> TiltEstimate:
    """Return the tilt of ``space.model``'s ln Z at u.

    Parameters
    ----------
    space, u
        Latents of a model whose points are drawn (`SnapshotModel.select_at`), and the reference.
    catalog
        The stars.
    covariance : Float[Tensor, "size size"]
        Posterior covariance of u, which turns gradients into shifts.
    tolerance
        Batches are added until no latent of the potential is moved by more, in posterior standard deviations,
    max_points
        or until so many points are used.
    seed
        Seed of the batches, which share no points with the model's own.
    tick
        Called with a note after every batch.
    """
    values = {name: value.detach() for name, value in space.values(u).items()}
    slopes: list[dict[str, Tensor]] = []
    error = float("inf")
    while len(slopes) < LEAST or (error > tolerance and (len(slopes) + 1) * BATCH <= max_points):
        batch = space.model.select_at(values, catalog, BATCH, seed + 7_001 * (len(slopes) + 1))
        slopes.append(_slope(batch, values))
        if len(slopes) >= LEAST:
            moved = len(catalog) * torch.stack([_in_u(space, u, slope) for slope in slopes]) @ covariance
            spread = moved.std(0) / covariance.diagonal().sqrt() / len(slopes) ** 0.5
            error = float(spread[: space.n_potential].max())
        if tick:
            tick(f"{len(slopes) * BATCH} points, {error:.2g} posterior sd")
    own = _slope(space.model, values)
    mean = {name: torch.stack([slope[name] for slope in slopes]).mean(0) - own[name] for name in values}
    return TiltEstimate(Tilt(values, mean, _BOUND / len(catalog)), len(slopes) * BATCH, error)


def _slope(model: SnapshotModel, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of ln Z, without a tilt, in the values of the sites."""
    points = model.points
    assert points is not None  # the caller drew them
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    with torch.enable_grad():
        log_z = points.log_z(model.at(leaves).true_density().log_prob(points.w))
        found = torch.autograd.grad(log_z, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if part is None else part
        for (name, leaf), part in zip(leaves.items(), found, strict=True)
    }


def _in_u(space: LatentSpace, u: Tensor, slope: dict[str, Tensor]) -> Tensor:
    at = u.detach().clone().requires_grad_()
    with torch.enable_grad():
        parts = [(slope[name] * value).sum() for name, value in space.values(at).items()]
        (found,) = torch.autograd.grad(torch.stack(parts).sum(), at)
    return found
