"""Symplectic orbit integration in any potential, batched over stars."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bayespot.potential.base import Potential
from bayespot.units import takes, takes_tensors, tensor

Method = Literal["leapfrog", "yoshida4", "yoshida6"]

# Half of each symmetric composition of leapfrog steps, from its end to the last before the central one,
# in units of the step. Yoshida (1990), Phys. Lett. A 150, 262: equation 2.11 (also Forest & Ruth 1990)
# and table 1, solution A.
_HALF: dict[str, tuple[float, ...]] = {
    "leapfrog": (),
    "yoshida4": (1 / (2 - 2 ** (1 / 3)),),
    "yoshida6": (0.784513610477560, 0.235573213359357, -1.17767998417887),
}


@takes(times="time")
@takes_tensors(w="phase_space")
def integrate(
    potential: Potential,
    w: Tensor,
    times: Tensor | tuple[float, int],
    method: Method = "leapfrog",
    n_substeps: int = 1,
    adjoint: bool = True,
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
    adjoint
        Differentiate by stepping back in time, with memory for the outputs only, whatever the number of steps;
        derivatives are first order and not with respect to ``times``. False: plain automatic differentiation,
        whose memory grows with every step.

    Returns
    -------
    Float[Tensor, "n_out *batch 6"]
        The first entry is ``w`` itself. Differentiable in ``w`` and the potential's parameters (and, without
        the adjoint, in ``times``).

    Raises
    ------
    ValueError
        If the last axis of ``w`` is not 6, the method is unknown, ``times`` is empty or not one-dimensional,
        a number of steps is less than one, or ``times`` needs a derivative that the adjoint does not give.

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
    weights, intervals = _weights(method), _output_times(times, w).diff()
    if torch.is_grad_enabled() and adjoint:
        if intervals.requires_grad:
            raise ValueError("the adjoint has no derivative with respect to times: detach them or pass adjoint=False")
        parameters = _differentiable(potential)
        if w.requires_grad or parameters:
            return _Adjoint.apply(potential, weights, n_substeps, intervals, w, *parameters)
    return _forward(potential, weights, n_substeps, intervals, w)


@takes_tensors(w="phase_space", time="time")
@torch.no_grad()
def advance(potential: Potential, w: Tensor, time: Tensor, method: Method = "yoshida4", n_steps: int = 1) -> Tensor:
    """Return ``w (*batch, 6)`` after a time of its own for every star, ``time (*batch)`` in kpc/(km/s).

    In ``n_steps`` equal steps and without derivatives; see `integrate` for the methods.
    """
    weights, step = _weights(method), (time / n_steps)[..., None]
    x, v = w[..., :3], w[..., 3:]
    for _ in range(n_steps):
        x, v = _step(potential, x, v, step, weights)
    return torch.cat([x, v], -1)


class TransformedOrbit(NamedTuple):
    """``times (n_out, *batch)`` in kpc/(km/s), ``w (n_out, *batch, 6)`` and ``rate (n_out, *batch)`` = dt/ds."""

    times: Tensor
    w: Tensor
    rate: Tensor


@takes_tensors(w="phase_space", scale="length", softening="length", step="time")
def integrate_transformed(
    potential: Potential,
    w: Tensor,
    scale: Tensor,
    softening: Tensor,
    step: Tensor,
    n_steps: int,
    method: Method = "yoshida6",
    n_substeps: int = 1,
) -> TransformedOrbit:
    r"""Integrate with steps proportional to the distance from the centre, for orbits of any eccentricity.

    Equal steps in s, with :math:`dt/ds = (r^2 + \epsilon^2)^{1/2} / r_0`, by compositions of the
    time-transformed leapfrog: reversible, and without drift of the energy. Each star has its own clock. Without
    derivatives; `integrate` has them.

    Parameters
    ----------
    potential : Potential
    w : Float[Tensor, "*batch 6"]
        Position (kpc) and velocity (km/s) at time zero.
    scale, softening : Float[Tensor, "*batch"]
        Radius r_0 at which dt = ds, and epsilon, in kpc; the latter at most the pericentre to resolve.
    step : Float[Tensor, "*batch"]
        Difference of s between outputs, in kpc/(km/s); negative ones go back in time.
    n_steps
        Outputs after the first, ``step`` apart.
    method, n_substeps
        As in `integrate`.

    References
    ----------
    Mikkola & Aarseth (2002), Celest. Mech. Dyn. Astron. 84, 343: equations 12 to 18.

    Examples
    --------
    >>> import torch
    >>> from bayespot.potential.analytic import NFW
    >>> w = torch.tensor([8.0, 0.0, 1.0, 20.0, 0.5, 0.3], dtype=torch.float64)
    >>> one = torch.ones((), dtype=torch.float64)
    >>> integrate_transformed(NFW(m_s=8e11, r_s=20.0), w, 8 * one, 0.01 * one, 0.01 * one, 100).times.shape
    torch.Size([101])
    """
    weights = _weights(method)
    with torch.no_grad():
        x, v = w[..., :3], w[..., 3:]
        t = torch.zeros_like(scale)
        softening = softening**2

        def speed_up(x: Tensor) -> tuple[Tensor, Tensor]:
            r2 = (x**2).sum(-1) + softening
            return scale / r2.sqrt(), r2

        clock = speed_up(x)[0]
        times, orbit, rate = [t], [w], [1 / clock]
        for _ in range(n_steps):
            for weight in weights * n_substeps:
                h = weight * step / n_substeps
                half = h / 2 / clock
                t, x = t + half, x + half[..., None] * v
                omega, r2 = speed_up(x)
                kick = h / omega
                after = v + kick[..., None] * potential.acceleration(x)
                clock = clock - h * ((v + after) / 2 * x).sum(-1) / r2
                v = after
                half = h / 2 / clock
                t, x = t + half, x + half[..., None] * v
            times.append(t)
            orbit.append(torch.cat([x, v], -1))
            rate.append(1 / speed_up(x)[0])
    return TransformedOrbit(torch.stack(times), torch.stack(orbit), torch.stack(rate))


@takes_tensors(times="time", orbit="phase_space", at="time")
def dense(potential: Potential, times: Tensor, orbit: Tensor, at: Tensor) -> Tensor:
    """Evaluate an orbit between its output times, by the quintic through x, v and acceleration at both ends.

    The error is of order h^6 in x and h^5 in v for outputs h apart, on top of the integration's.

    Parameters
    ----------
    potential : Potential
        The one that the orbit was integrated in.
    times : Float[Tensor, "n_out"]
        Output times, increasing or decreasing.
    orbit : Float[Tensor, "n_out *batch 6"]
        What `integrate` returned.
    at : Float[Tensor, "n"]
        Times in kpc/(km/s).

    Returns
    -------
    Float[Tensor, "n *batch 6"]

    Raises
    ------
    ValueError
        If shapes do not fit or a time is outside the range.

    Examples
    --------
    >>> import torch
    >>> from bayespot.potential.analytic import Isochrone
    >>> w = torch.tensor([8.0, 0.0, 1.0, 20.0, 150.0, 30.0], dtype=torch.float64)
    >>> potential, times = Isochrone(m_tot=1e11, r_s=3.0), torch.linspace(0, 1, 101).double()
    >>> orbit = integrate(potential, w, times, method="yoshida6")
    >>> dense(potential, times, orbit, torch.tensor([0.123])).shape
    torch.Size([1, 6])
    """
    if times.shape != orbit.shape[:1] or len(times) < 2:
        raise ValueError(f"times {tuple(times.shape)} must be those of the orbit {tuple(orbit.shape)}, at least two")
    at = at.to(times)
    low, high = float(times.min()), float(times.max())
    outside = (at < low) | (at > high)
    if bool(outside.any()):
        raise ValueError(f"time {float(at[outside][0]):.6g} is outside the orbit's range, {low:.6g} to {high:.6g}")
    if times[0] > times[-1]:
        times, orbit = times.flip(0), orbit.flip(0)
    i = (torch.searchsorted(times.contiguous(), at, right=True) - 1).clamp(0, len(times) - 2)
    shape = (-1, *[1] * (orbit.dim() - 1))
    h = (times[i + 1] - times[i]).reshape(shape)
    u = ((at - times[i]) / (times[i + 1] - times[i])).reshape(shape)
    used, place = torch.unique(torch.cat([i, i + 1]), return_inverse=True)
    acceleration = potential.acceleration(orbit[used][..., :3])
    (x0, v0), (x1, v1) = (orbit[k].split(3, -1) for k in (i, i + 1))
    a0, a1 = acceleration[place[: len(i)]], acceleration[place[len(i) :]]
    v0, v1, a0, a1 = h * v0, h * v1, h**2 * a0, h**2 * a1
    # x0 + v0 u + a0 u^2 / 2 + c3 u^3 + c4 u^4 + c5 u^5
    dx, dv, da = x1 - x0 - v0 - a0 / 2, v1 - v0 - a0, a1 - a0
    c3, c4, c5 = 10 * dx - 4 * dv + da / 2, -15 * dx + 7 * dv - da, 6 * dx - 3 * dv + da / 2
    x = x0 + u * (v0 + u * (a0 / 2 + u * (c3 + u * (c4 + u * c5))))
    v = (v0 + u * (a0 + u * (3 * c3 + u * (4 * c4 + u * 5 * c5)))) / h
    return torch.cat([x, v], -1)


def _forward(potential: Potential, weights: tuple[float, ...], n_substeps: int, intervals: Tensor, w: Tensor) -> Tensor:
    x, v = w[..., :3], w[..., 3:]
    outputs = [w]
    for interval in intervals:
        step = interval / n_substeps
        for _ in range(n_substeps):
            x, v = _step(potential, x, v, step, weights)
        outputs.append(torch.cat([x, v], -1))
    return torch.stack(outputs)


class _Adjoint(torch.autograd.Function):
    """Reverse-mode derivative of an orbit from its outputs alone.

    A symmetric symplectic step is undone by the same step with the sign of time reversed, so the states within
    an output interval are found again on the way back, one vector-Jacobian product each; rounding does not
    accumulate beyond an interval, since each starts from its stored output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        potential: Potential,
        weights: tuple[float, ...],
        n_substeps: int,
        intervals: Tensor,
        w: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        with torch.no_grad():
            orbit = _forward(potential, weights, n_substeps, intervals, w)
        ctx.potential, ctx.weights, ctx.n_substeps, ctx.parameters = potential, weights, n_substeps, parameters
        ctx.save_for_backward(orbit, intervals)
        return orbit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        orbit, intervals = ctx.saved_tensors
        parameters = ctx.parameters
        slopes = [torch.zeros_like(p) for p in parameters]
        adjoint = grad[-1]
        for k in range(len(intervals) - 1, -1, -1):
            step = intervals[k] / ctx.n_substeps
            x, v = orbit[k + 1].split(3, -1)
            for _ in range(ctx.n_substeps):
                with torch.no_grad():
                    x, v = _step(ctx.potential, x, v, -step, ctx.weights)
                with torch.enable_grad():
                    start = torch.cat([x, v], -1).requires_grad_()
                    end = torch.cat(_step(ctx.potential, start[..., :3], start[..., 3:], step, ctx.weights), -1)
                    # parameters may share a graph of their own (tables), which later steps need again
                    found = torch.autograd.grad(
                        end, [start, *parameters], adjoint, allow_unused=True, retain_graph=True
                    )
                adjoint = found[0]
                for slope, part in zip(slopes, found[1:], strict=True):
                    if part is not None:
                        slope += part
            adjoint = adjoint + grad[k]
        return None, None, None, None, adjoint, *slopes


def _differentiable(potential: Potential) -> list[Tensor]:
    """Every tensor of the potential that needs a derivative: parameters, buffers and values of fixed sites."""
    found: dict[int, Tensor] = {}
    for module in potential.modules():
        for store in (module.__dict__, module._parameters, module._buffers):
            for value in store.values():
                if isinstance(value, Tensor) and value.requires_grad:
                    found[id(value)] = value
    return list(found.values())


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
    if isinstance(times, list) and len(times) == 2 and isinstance(times[1], int):
        raise ValueError(f"{times} may be two times or (t_end, n_steps): give times as floats, the pair as a tuple")
    if not isinstance(times, tuple):
        times = tensor(times, "time", "times")
        if times.dim() != 1 or len(times) < 1:
            raise ValueError(f"times must be one-dimensional and not empty; got shape {tuple(times.shape)}")
        return times.to(w)
    if len(times) != 2 or times[1] != int(times[1]):
        raise ValueError(f"the pair times is (t_end, n_steps), with a whole number of steps; got {times}")
    t_end, n_steps = float(times[0]), int(times[1])
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1; got {n_steps}")
    return torch.linspace(0.0, t_end, n_steps + 1, dtype=w.dtype, device=w.device)
