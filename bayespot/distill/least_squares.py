"""Levenberg-Marquardt for many small problems at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: Damping factors tried together in one evaluation, relative to the current one.
_FACTORS = (1e-3, 0.1, 1.0, 10.0, 1e3)


class Minimum(NamedTuple):
    """Parameters ``(K, p)`` and residuals ``(K, k)`` at the minima, and the Jacobians ``(K, k, p)`` next to them."""

    parameters: Tensor
    residual: Tensor
    jacobian: Tensor

    @property
    def chi2(self) -> Tensor:
        """Sums of squares ``(K,)``."""
        return (self.residual**2).sum(-1)


@torch.no_grad()
def levenberg_marquardt(
    residual: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 20, tolerance: float = 1e-6
) -> Minimum:
    """Minimise the sums of squares of K problems with p parameters each.

    Jacobians are forward differences; a parameter that nothing depends on stays where it is.

    Parameters
    ----------
    residual
        Maps parameters ``(B, K, p)`` to residuals ``(B, K, k)``; NaN where they are not defined.
    start : Float[Tensor, "K p"]
        Where each problem starts.
    iterations, tolerance
        At most so many; fewer when no sum of squares falls by more than this fraction plus this number.
    """
    best = start.clone()
    here = residual(best[None])[0]
    cost = _cost(here)
    damping = torch.full_like(cost, 1e-2)
    factors = torch.tensor(_FACTORS, dtype=start.dtype)
    jacobian = _jacobian(residual, best, here)
    for _ in range(iterations):
        square = jacobian.mT @ jacobian
        slope = (jacobian.mT @ here[..., None])[..., 0]
        diagonal = square.diagonal(dim1=-2, dim2=-1)
        # an idle parameter has no curvature: one keeps the system solvable and its step zero
        extra = torch.where(diagonal > 0, diagonal, 1.0)
        lam = factors[:, None] * damping
        system = square + (lam[..., None] * extra)[..., None] * torch.eye(start.shape[-1], dtype=start.dtype)
        step, info = torch.linalg.solve_ex(system, slope.expand(len(factors), *slope.shape)[..., None])
        trial = best - torch.where(info[..., None] == 0, step[..., 0], 0.0)
        there = residual(trial)
        costs = _cost(there)
        least, which = costs.min(0)
        better = least < cost
        gain = cost - least
        problem = torch.arange(len(best))
        best = torch.where(better[:, None], trial[which, problem], best)
        here = torch.where(better[:, None], there[which, problem], here)
        damping = torch.where(better, lam[which, problem].clamp(min=1e-12), damping * 1e3)
        done = torch.where(better, gain < tolerance * (cost + 1), damping > 1e6) | ~torch.isfinite(cost)
        cost = torch.where(better, least, cost)
        jacobian = _jacobian(residual, best, here)
        if bool(done.all()):
            break
    return Minimum(best, here, jacobian)


def _cost(residual: Tensor) -> Tensor:
    cost = (residual**2).sum(-1)
    return torch.where(torch.isfinite(cost), cost, torch.inf)


def _jacobian(residual: Callable[[Tensor], Tensor], at: Tensor, here: Tensor) -> Tensor:
    step = 1e-7 * (at.abs() + 1e-2)
    shifted = at + torch.diag_embed(step).movedim(-2, 0)
    columns = (residual(shifted) - here) / step.T[..., None]
    return torch.nan_to_num(columns.movedim(0, -1), nan=0.0, posinf=0.0, neginf=0.0)
