"""Derivatives of numpy functions by differences whose step every point chooses for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Steps over the distance from the origin, from large to small: half a decade apart.
STEPS = 0.03 * 10.0 ** (-0.5 * np.arange(10))
#: Distance in kpc that counts for points closer to the origin.
FLOOR = 1e-4


class Slopes(NamedTuple):
    """Derivatives ``(n, *shape, 3)`` and estimates of the error of all of a point's ``(n,)``."""

    values: NDArray[Any]
    errors: NDArray[Any]


def slopes(
    function: Callable[[NDArray[Any]], NDArray[Any]],
    x: NDArray[Any],
    rtol: float = 1e-10,
    steps: NDArray[Any] = STEPS,
) -> Slopes:
    r"""Return :math:`\partial f_i/\partial x_j` by five-point differences.

    The step falls until three successive estimates agree to ``rtol`` of the largest, or as far as ``steps`` go; the
    estimate that its neighbours agree with best is kept. (`scipy.differentiate.jacobian` stops where the error first
    rises, for a satellite of 0.1 kpc at 30 kpc on steps larger than the satellite.)

    Parameters
    ----------
    function
        From positions ``(n, 3)`` to values ``(n, *shape)``.
    x : (n, 3)
        Positions in kpc.
    rtol
        Error at which a point is done.
    steps
        At least three, over the distance from the origin.
    """
    length = np.maximum(np.linalg.norm(x, axis=1), FLOOR)
    # every point moves along every axis
    start, direction = np.repeat(x, 3, axis=0), np.kron(length[:, None], np.eye(3))
    values, errors = _along(function, start, direction, rtol, steps)
    values = np.moveaxis(values.reshape(len(x), 3, *values.shape[1:]), 1, -1)
    shape = (-1,) + (1,) * (values.ndim - 1)
    return Slopes(values / length.reshape(shape), errors.reshape(len(x), 3).max(1) / length)


def _along(
    function: Callable[[NDArray[Any]], NDArray[Any]],
    x: NDArray[Any],
    direction: NDArray[Any],
    rtol: float,
    steps: NDArray[Any],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the slopes of points along one direction each, and estimates of their errors."""
    best: NDArray[Any] | None = None
    least = np.full(len(x), np.inf)
    todo = np.arange(len(x))
    last: list[NDArray[Any]] = []
    for h in steps:
        sides = [x[todo] + k * h * direction[todo] for k in (1.0, -1.0, 2.0, -2.0)]
        # one call for all: packages that convert units take as long for one point as for many
        ahead, behind, far_ahead, far_behind = np.split(function(np.concatenate(sides)), 4)
        with np.errstate(invalid="ignore"):
            estimate = (8 * (ahead - behind) - (far_ahead - far_behind)) / (12 * h)
        last = [*last[-2:], estimate]
        if best is None:
            best = np.full((len(x), *estimate.shape[1:]), np.nan)
        if len(last) < 3:
            continue
        before, middle, after = (a.reshape(len(todo), -1) for a in last)
        with np.errstate(invalid="ignore"):
            error = np.maximum(np.abs(middle - before), np.abs(after - middle)).max(1)
            better = error < least[todo]
            done = error <= rtol * np.abs(middle).max(1)
        best[todo[better]], least[todo[better]] = last[1][better], error[better]
        todo, last = todo[~done], [a[~done] for a in last]
        if not len(todo):
            break
    return (np.full(len(x), np.nan) if best is None else best), least
