"""The generating function from a toy torus to the torus of an orbit, by two linear least-squares problems."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.potential.base import Symmetry

#: Ridge of the normal equations, relative to their diagonal: resonant modes, constant along the orbit, belong to J.
_RIDGE = 1e-6


class Orbit(NamedTuple):
    """``times (n, T)`` around zero, ``w (n, T, 6)``, ``rate (n, T)`` and the relative ``energy_error (n,)``."""

    times: Tensor
    w: Tensor
    rate: Tensor
    energy_error: Tensor


class Torus(NamedTuple):
    """Each (n, 3); ``moved`` is the change of J that made Omega . J the mean square speed."""

    J: Tensor
    theta: Tensor
    Omega: Tensor
    scatter: Tensor
    moved: Tensor


def torus(run: Orbit, orbit: Tensor, J_toy: Tensor, theta_toy: Tensor, modes: Tensor, part: slice) -> Torus:
    times, J_toy, theta_toy = run.times[:, part], J_toy[:, part], theta_toy[:, part]
    weight = _window(times) * run.rate[:, part]
    weight = weight / weight.sum(1, keepdim=True)
    phase = theta_toy @ modes.T
    J, coefficients = _actions(J_toy, phase, modes, weight)
    theta, Omega = _angles(times, theta_toy, phase, weight)
    along = J_toy - 2 * (phase.cos() * coefficients[:, None]) @ modes
    variance = (weight[..., None] * (along - J[:, None]) ** 2).sum(1)
    v2 = (weight * (orbit[:, part, 3:] ** 2).sum(-1)).sum(1)
    spread = (variance * Omega**2).sum(-1)
    lack = (v2 - (Omega * J).sum(-1)) / torch.where(spread > 0, spread, 1.0)
    moved = variance * Omega * lack[:, None]
    return Torus(J + moved, theta, Omega, variance.sqrt(), moved)


@functools.cache
def _half_space(reach: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
    """All n inside the ellipsoid with these axes but zero, one of each pair n and -n."""
    spans = [range(-m, m + 1) for m in reach]
    return tuple(
        n
        for n in itertools.product(*spans)
        if n > (0, 0, 0) and sum((i / m) ** 2 for i, m in zip(n, reach, strict=True)) <= 1
    )


def tube_modes(n_max: int, symmetry: Symmetry) -> Tensor:
    def allowed(n: tuple[int, ...]) -> bool:
        if symmetry == "spherical":
            return n[1] == n[2] == 0
        if symmetry == "axisymmetric":
            return n[1] == 0 and n[2] % 2 == 0
        return n[1] % 2 == 0 and n[2] % 2 == 0

    modes = [n for n in _half_space((2 * n_max, n_max, n_max)) if allowed(n)]
    return torch.tensor(modes, dtype=torch.float64)


def box_modes(n_max: int) -> Tensor:
    # even in every angle
    reach = max(n_max // 2, 1)
    return 2 * torch.tensor(_half_space((reach, reach, reach)), dtype=torch.float64)


def _window(times: Tensor) -> Tensor:
    """Squared Hann window over the times (n, T) of each star."""
    u = (times - times[:, :1]) / (times[:, -1:] - times[:, :1])
    return (math.pi * u).sin() ** 4


def unwrapped(angle: Tensor) -> Tensor:
    """Make angles (n, T, 3) continuous in time, keeping the middle one."""
    step = angle.diff(dim=1)
    step = torch.remainder(step + math.pi, 2 * math.pi) - math.pi
    whole = torch.cat([torch.zeros_like(angle[:, :1]), step.cumsum(1)], 1)
    middle = angle.shape[1] // 2
    return whole - whole[:, middle, None] + angle[:, middle, None]


def _actions(J_toy: Tensor, phase: Tensor, modes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares for J (n, 3) and S (n, N) from toy actions (n, T, 3) and n . theta' (n, T, N)."""
    c = phase.cos()
    wc = weight[..., None] * c
    n = len(phase)
    mean_c = wc.sum(1)
    cross = 2 * mean_c[:, None, :] * modes.T
    square = 4 * (wc.transpose(1, 2) @ c) * (modes @ modes.T)
    eye = torch.eye(3, dtype=J_toy.dtype).expand(n, 3, 3)
    matrix = torch.cat([torch.cat([eye, cross], 2), torch.cat([cross.transpose(1, 2), square], 2)], 1)
    right = torch.cat([(weight[..., None] * J_toy).sum(1), 2 * ((wc.transpose(1, 2) @ J_toy) * modes).sum(-1)], -1)
    solution = _solve(matrix, right[..., None], 3)[..., 0]
    return solution[:, :3], solution[:, 3:]


def _angles(times: Tensor, theta_toy: Tensor, phase: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares for theta at t = 0 and Omega (n, 3)."""
    scale = times[:, -1:, None]
    design = torch.cat(
        [torch.ones_like(scale.expand(-1, times.shape[1], 1)), times[..., None] / scale, -2 * phase.sin()], -1
    )
    weighted = weight[..., None] * design
    solution = _solve(weighted.transpose(1, 2) @ design, weighted.transpose(1, 2) @ theta_toy, 2)
    return solution[:, 0], solution[:, 1] / scale[:, 0]


def _solve(matrix: Tensor, right: Tensor, n_free: int) -> Tensor:
    """Solve normal equations; all but the first unknowns have a ridge, for modes that an orbit does not tell apart."""
    broken = ~torch.isfinite(matrix).all((1, 2))
    diagonal = matrix.diagonal(dim1=1, dim2=2).clone()
    diagonal = diagonal + 1e-6 * diagonal.amax(1, keepdim=True)
    diagonal[:, :n_free] = 0
    ridge = _RIDGE * torch.diag_embed(diagonal)
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype)
    solution = torch.linalg.solve(torch.where(broken[:, None, None], eye, matrix + ridge), right)
    return torch.where(broken[:, None, None], torch.nan, solution)
