"""Quadrature, interpolation and roots whose derivatives are exact to the stated order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GridFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


class _AttachDerivative(torch.autograd.Function):
    """value(x) with a prescribed derivative; the slope's own graph gives the higher derivatives."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.save_for_forward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad, grad * slope, None

    @staticmethod
    def jvp(ctx: Any, value_t: Tensor | None, x_t: Tensor | None, slope_t: Tensor | None) -> Tensor:
        (slope,) = ctx.saved_tensors
        tangent = torch.zeros_like(slope)
        if value_t is not None:
            tangent = tangent + value_t
        if x_t is not None:
            tangent = tangent + x_t * slope
        return tangent


def attach_derivative(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """Return ``value``, whose derivative with respect to ``x`` is taken to be ``slope``.

    ``value`` must not depend on ``x`` in the graph (evaluate it at ``x.detach()``), but may depend on
    parameters. Interpolated integrals thereby have the exact integrand as their derivative, to any order.
    """
    return _AttachDerivative.apply(value, x, slope)


class _Refuse(torch.autograd.Function):
    """A first derivative that must not be differentiated again; ``anchor`` puts it into the graph."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("this quantity is exact to first order only; its second derivative is refused")


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Refuse.apply(grad, ctx.saved_tensors[0])


def refuse_again(grad: Tensor, anchor: Tensor) -> Tensor:
    """Return a first derivative by ``anchor`` of which no derivative can be taken: asking for one raises."""
    return _Refuse.apply(grad, anchor)


def first_order_only(value: Tensor) -> Tensor:
    """Return ``value``; differentiating it twice raises RuntimeError instead of giving a wrong number."""
    return _FirstOrderOnly.apply(value)


@torch.no_grad()
def bracketed_newton(
    function: GridFunction,
    low: Tensor,
    high: Tensor,
    start: Tensor | None = None,
    n_iter: int = 60,
    tolerance: float = 1e-14,
) -> Tensor:
    """Return the root of an increasing function in [low, high] by Newton's method kept inside its bracket.

    Parameters
    ----------
    function
        Maps x to (f, df/dx), elementwise, with f(low) <= 0 <= f(high).
    low, high : Float[Tensor, "*batch"]
        Bracket; steps that leave it are replaced by bisection.
    start
        First guess; the middle of the bracket by default, and where it is NaN.
    n_iter
        Most iterations.
    tolerance
        A root is left alone after a step smaller than this fraction of x and of the bracket, so that it does not
        depend on the others.
    """
    x = (low + high) / 2
    if start is not None:
        x = torch.where(start.isnan(), x, torch.minimum(torch.maximum(start, low), high))
    scale = (high - low).abs()
    settled = torch.zeros_like(x, dtype=torch.bool)
    for _ in range(n_iter):
        f, df = function(x)
        below = f < 0
        low, high = torch.where(below, x, low), torch.where(below, high, x)
        new = x - f / df
        # a NaN or a step out of the bracket fails this comparison and is bisected
        inside = (new >= low) & (new <= high)
        new = torch.where(inside, new, (low + high) / 2)
        moved = (new - x).abs()
        x = torch.where(settled, x, new)
        settled |= moved <= tolerance * (x.abs() + scale)
        if bool(settled.all()):
            break
    return x


def implicit_root(root: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
    """Return ``root`` with the derivative of the implicit-function theorem (first order).

    ``residual`` is f(root; parameters) with the graph of the parameters, ``slope`` is df/droot.
    """
    return root.detach() - residual / slope.detach()


@functools.cache
def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Return the nodes and weights of the n-point Gauss-Legendre rule on [-1, 1] in float64."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.as_tensor(nodes), torch.as_tensor(weights)


def unit_rule(n: int) -> tuple[Tensor, Tensor]:
    """Return the nodes and weights of the n-point Gauss-Legendre rule on [0, 1]."""
    nodes, weights = gauss_legendre(n)
    return (nodes + 1) / 2, weights / 2


def lagrange(place: Tensor, nodes: Tensor) -> Tensor:
    """Return the weights ``(*batch, n)`` of values at the nodes in the polynomial through them, at ``(*batch)``."""
    gaps = []
    for j, node in enumerate(nodes):
        others = torch.cat([nodes[:j], nodes[j + 1 :]])
        gaps.append(((place[..., None] - others) / (node - others)).prod(-1))
    return torch.stack(gaps, -1)


def legendre(x: Tensor, n: int) -> Tensor:
    """Return the Legendre polynomials P_0 to P_(n-1) of x on a new last axis."""
    found = [torch.ones_like(x), x]
    for k in range(2, n):
        found.append(((2 * k - 1) * x * found[-1] - (k - 1) * found[-2]) / k)
    return torch.stack(found[:n], -1)


@functools.cache
def midpoint_angles(n: int) -> Tensor:
    """Return the midpoints of n equal parts of [-pi/2, pi/2], weight pi/n each.

    With x = mid + half sin(psi) this is spectrally accurate for integrands that vanish like a square root
    at both ends (Gauss-Chebyshev quadrature).
    """
    return (torch.arange(n, dtype=torch.float64) + 0.5) * (torch.pi / n) - torch.pi / 2


def cumulative_integral(f: Tensor, h: float) -> Tensor:
    """Return the integrals from node 1 to each of the nodes 1..n-2 of a uniform grid, fourth order.

    The first and last of the n nodes are ghosts: they only enter the cubic rule
    h/24 (-f[i-1] + 13 f[i] + 13 f[i+1] - f[i+2]). The result has n-2 entries, the first being zero.
    """
    step = (h / 24) * (13 * (f[..., 1:-2] + f[..., 2:-1]) - f[..., :-3] - f[..., 3:])
    return torch.cat([torch.zeros_like(f[..., :1]), step.cumsum(-1)], -1)


def cubic_coefficients(value: Tensor, slope: Tensor) -> Tensor:
    """Return the coefficients (*batch, n-1, 4) of the cubic Hermite interpolant in each cell's u in [0, 1].

    ``slope`` is the derivative per cell width.
    """
    f0, f1, d0, d1 = value[..., :-1], value[..., 1:], slope[..., :-1], slope[..., 1:]
    rise = f1 - f0
    return torch.stack([f0, d0, 3 * rise - 2 * d0 - d1, d0 + d1 - 2 * rise], -1)


def horner(coefficients: Tensor, u: Tensor) -> Tensor:
    """Evaluate sum_k c[..., k] u^k."""
    *lower, result = coefficients.unbind(-1)
    for c in reversed(lower):
        result = torch.addcmul(c, result, u)
    return result


def horner_slope(coefficients: Tensor, u: Tensor) -> Tensor:
    """Evaluate d/du sum_k c[..., k] u^k."""
    _, *lower, highest = coefficients.unbind(-1)
    result = (len(lower) + 1) * highest
    for k in range(len(lower), 0, -1):
        result = torch.addcmul(k * lower[k - 1], result, u)
    return result


@functools.cache
def _stencils(width: int) -> Tensor:
    """Return W (width, width): row i gives the derivative at node i of the polynomial through nodes 0..width-1."""
    import numpy as np

    nodes = np.arange(width)
    powers = (nodes - nodes[:, None])[:, None, :].astype(float) ** nodes[None, :, None]
    first_derivative = np.broadcast_to(np.eye(width)[1][:, None], (width, width, 1))
    return torch.as_tensor(np.linalg.solve(powers, first_derivative)[..., 0])


def node_slopes(f: Tensor, even_start: bool = False, width: int = 7) -> Tensor:
    """Return the derivative of f (*batch, n) along its last axis per node spacing, order ``width - 1``.

    With ``even_start`` f is continued as f(-x) = f(x) through the first node; otherwise the stencil is
    one-sided at the edges.
    """
    half, W = width // 2, _stencils(width).to(f)
    if even_start:
        f = torch.cat([f[..., 1 : half + 1].flip(-1), f], -1)
    middle = f.unfold(-1, width, 1) @ W[half]
    parts = [middle, f[..., -width:] @ W[half + 1 :].T]
    return torch.cat(parts if even_start else [f[..., :width] @ W[:half].T, *parts], -1)


def bicubic_coefficients(value: Tensor, even_start: bool = False) -> Tensor:
    """Return the coefficients ((n-1)(m-1), 16) of the bicubic Hermite interpolant of ``value`` (n, m).

    Slopes come from seven-point differences; ``even_start`` refers to the second axis. Column 4 a + b of a
    row multiplies u^a t^b, u and t being the cell coordinates along the first and second axes.
    """
    n, m = value.shape
    d_first = node_slopes(value.T).T
    d_second = node_slopes(value, even_start)
    d_both = node_slopes(d_first, even_start)
    along = cubic_coefficients(value, d_second)  # (n, m-1, 4): polynomials in t at each node
    along_slope = cubic_coefficients(d_first, d_both)
    both = cubic_coefficients(along.permute(1, 2, 0), along_slope.permute(1, 2, 0))  # (m-1, 4b, n-1, 4a)
    return both.permute(2, 0, 3, 1).reshape((n - 1) * (m - 1), 16)


def cosine_series(coefficients: Tensor, x: Tensor) -> Tensor:
    """Return sum_k c[k - 1] cos(k x), k = 1, 2, ..., by Clenshaw's recurrence; ``coefficients`` (n, *shape of x)."""
    b1, b2 = _clenshaw(coefficients, x)
    return x.cos() * b1 - b2


def sine_series(coefficients: Tensor, x: Tensor) -> Tensor:
    """Return sum_k c[k - 1] sin(k x), k = 1, 2, ..., by Clenshaw's recurrence; ``coefficients`` (n, *shape of x)."""
    return x.sin() * _clenshaw(coefficients, x)[0]


def _clenshaw(coefficients: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    twice = 2 * x.cos()
    b1 = b2 = torch.zeros_like(x)
    for c in reversed(coefficients.unbind(0)):
        b1, b2 = torch.addcmul(c - b2, twice, b1), b1
    return b1, b2


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table[index]`` for any index shape; index_select has by far the fastest backward pass."""
    return table.index_select(0, index.reshape(-1)).reshape(*index.shape, table.shape[-1])


@torch.no_grad()
def inverted_cubics(coefficients: Tensor, target: Tensor) -> Tensor:
    """Return u in [0, 1] where rising cubics ``(*batch, 4)``, nearly straight there, have the values ``target``."""
    start = coefficients[..., 0]
    u = ((target - start) / (coefficients.sum(-1) - start)).clamp(0, 1)
    for _ in range(3):  # quadratic convergence at once
        u = (u - (horner(coefficients, u) - target) / horner_slope(coefficients, u)).clamp(0, 1)
    return u


def power_sums(index: Tensor, weight: Tensor, u: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return sum_i weight_i u_i^k over the points i of each row: the backward pass of piecewise polynomials.

    Column after column: faster than adding rows, and a matrix of all points is never there.
    """
    columns = []
    for _ in range(shape[1]):
        columns.append(torch.bincount(index, weights=weight, minlength=shape[0]))
        weight = weight * u
    return torch.stack(columns, -1)


class _Piecewise(torch.autograd.Function):
    """Value of piecewise polynomials; its derivatives by the coefficients and by u are polynomials again."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, index: Tensor, u: Tensor) -> Tensor:
        rows = coefficients.index_select(0, index)
        slope = horner_slope(rows, u) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(coefficients, index, u, slope)
        return horner(rows, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        coefficients, index, u, slope = ctx.saved_tensors
        summed = None
        if ctx.needs_input_grad[0]:
            summed = refuse_again(power_sums(index, grad, u, coefficients.shape), coefficients)
        return summed, None, None if slope is None else refuse_again(grad * slope, u)


def piecewise(coefficients: Tensor, index: Tensor, u: Tensor) -> Tensor:
    """Return sum_k c[index, k] u^k for flat index and u, differentiable once; costs little memory per point."""
    return _Piecewise.apply(coefficients, index, u)


def powered(x: Tensor, q: Tensor) -> Tensor:
    """Return (exp(q x) - 1) / q, which is x where q = 0."""
    safe = torch.where(q.abs() < 1e-7, torch.full_like(q, 1e-7), q)
    return torch.expm1(safe * x) / safe


class _GammaQuantile(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: Tensor, u: Tensor) -> Tensor:
        from scipy.special import gammaincinv

        a, p = shape.detach().numpy(), u.detach().numpy()
        value = torch.as_tensor(gammaincinv(a, p))
        if shape.requires_grad:
            step = 1e-5
            ahead, behind = gammaincinv(a * (1 + step), p), gammaincinv(a * (1 - step), p)
            ctx.save_for_backward(torch.as_tensor((ahead - behind) / (2 * step * a)))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad * ctx.saved_tensors[0] if ctx.needs_input_grad[0] else None), None


def gamma_quantile(shape: Tensor, u: Tensor) -> Tensor:
    """Return the quantile u of Gamma(shape, 1), differentiable in the shape (to about 1e-9, first order).

    Unlike rejection sampling the result is a smooth function of the shape at fixed u.
    """
    return _GammaQuantile.apply(shape, u).clamp(min=1e-290)


def wall(z: Tensor, best: Tensor, height: float) -> tuple[Tensor, Tensor]:
    """Return a value to add to the best loss so far, and its gradient, where a trial step met no finite loss.

    A cone about the best point: a line search that meets the same value and slope zero at both ends of its
    bracket divides zero by zero and goes on with NaN.
    """
    step = (z - best).detach()
    distance = torch.linalg.vector_norm(step)
    return height * (1 + distance), height * step / distance.clamp(min=1e-300)
