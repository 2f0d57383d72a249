"""Symplectic orbit integration in any potential, batched over stars."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from bayespot.potential.base import Potential

Method = Literal["leapfrog", "yoshida4", "yoshida6"]

# Half of each symmetric composition of leapfrog steps, from its end to the last before the central one,
# in units of the step. Yoshida (1990), Phys. Lett. A 150, 262: equation 2.11 (also Forest & Ruth 1990)
# and table 1, solution A.
_HALF: dict[str, tuple[float, ...]] = {
    "leapfrog": (),
    "yoshida4": (1 / (2 - 2 ** (1 / 3)),),
    "yoshida6": (0.784513610477560, 0.235573213359357, -1.17767998417887),
}


def integrate(
    potential: Potential,
    w: Tensor,
    times: Tensor | tuple[float, int],
    method: Method = "leapfrog",
    n_substeps: int = 1,
) -> Tensor:
    r"""Integrate :math:`\dot x = v,\ \dot v = -\nabla\Phi(x)` from ``w`` and return the orbit.

    Compositions of the drift-kick-drift leapfrog, which are symplectic and, at a fixed step, reversible in
    time. The step is the interval between two output times divided by ``n_substeps``; for long orbits it
    should not vary.

    Parameters
    ----------
    potential : Potential
    w : Float[Tensor, "*batch 6"]
        Position (kpc) and velocity (km/s) at the first time.
    times : Float[Tensor, "n_out"] or (t_end, n_steps)
        Output times in kpc/(km/s), about 0.978 Gyr, increasing or decreasing; the first is that of ``w``.
        The pair stands for ``n_steps`` equal steps from 0 to ``t_end`` (n_out = n_steps + 1).
    method
        ``"leapfrog"`` (order 2, one force evaluation per step), ``"yoshida4"`` (order 4, three) or
        ``"yoshida6"`` (order 6, seven).
    n_substeps
        Steps between two outputs.

    Returns
    -------
    Float[Tensor, "n_out *batch 6"]
        The first entry is ``w`` itself. Differentiable in ``w``, ``times`` and the potential's parameters;
        call it under ``torch.no_grad()`` when no derivative is wanted, since the graph grows with every step.

    Raises
    ------
    ValueError
        If the last axis of ``w`` is not 6, the method is unknown, ``times`` is empty or not one-dimensional,
        or a number of steps is less than one.

    Examples
    --------
    >>> import torch
    >>> from bayespot.potential.analytic import Isochrone
    >>> w = torch.tensor([8.0, 0.0, 1.0, 20.0, 150.0, 30.0], dtype=torch.float64)
    >>> integrate(Isochrone(m_tot=1e11, r_s=3.0), w, (1.0, 100), method="yoshida4").shape
    torch.Size([101, 6])
    """
    if method not in _HALF:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(get_args(Method))}")
    if n_substeps < 1:
        raise ValueError(f"n_substeps must be at least 1; got {n_substeps}")
    if w.shape[-1:] != (6,):
        raise ValueError(f"w must have last axis 6, (x, y, z, vx, vy, vz); got shape {tuple(w.shape)}")
    x, v = w[..., :3], w[..., 3:]
    weights = _weights(method)
    outputs = [w]
    for interval in _output_times(times, w).diff():
        step = interval / n_substeps
        for _ in range(n_substeps):
            x, v = _step(potential, x, v, step, weights)
        outputs.append(torch.cat([x, v], -1))
    return torch.stack(outputs)


def _weights(method: str) -> tuple[float, ...]:
    """Return the leapfrog steps of a composition, which sum to one."""
    half = _HALF[method]
    return (*half, 1 - 2 * sum(half), *reversed(half))


def _step(
    potential: Potential, x: Tensor, v: Tensor, step: Tensor, weights: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    for weight in weights:
        x = x + 0.5 * weight * step * v
        v = v + weight * step * potential.acceleration(x)
        x = x + 0.5 * weight * step * v
    return x, v


def _output_times(times: Tensor | tuple[float, int], w: Tensor) -> Tensor:
    if isinstance(times, Tensor):
        if times.dim() != 1 or len(times) < 1:
            raise ValueError(f"times must be one-dimensional and not empty; got shape {tuple(times.shape)}")
        return times.to(w)
    t_end, n_steps = times
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1; got {n_steps}")
    return torch.linspace(0.0, t_end, n_steps + 1, dtype=w.dtype, device=w.device)
