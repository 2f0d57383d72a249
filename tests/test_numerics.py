"""Quadrature, interpolation and roots against closed forms; tolerances are a few times the stated order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bayespot import numerics as num


def test_cumulative_integral_is_fourth_order():
    """Integral of exp: halving the step divides the error by 16 (slope of log error 4 +- 0.3)."""
    errors = []
    for n in (20, 40, 80):
        h = 1.0 / n
        x = h * torch.arange(-1, n + 2, dtype=torch.float64)
        errors.append(float((num.cumulative_integral(x.exp(), h)[-1] - (math.e - 1)).abs()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - 4) < 0.3 for slope in slopes), slopes


@pytest.mark.parametrize(("even", "power"), [(False, 6), (False, 3), (True, 4), (True, 6)])
def test_slopes_are_exact_for_polynomials(even, power):
    """Seven points determine a polynomial of degree six: its slope is exact at every node, edges included."""
    x = torch.arange(20, dtype=torch.float64)
    rows = torch.stack([(x / 10) ** power, 2 - (x / 10) ** power])
    slope = power / 10 * (x / 10) ** (power - 1)
    torch.testing.assert_close(num.node_slopes(rows, even), torch.stack([slope, -slope]), rtol=0, atol=1e-9)


def test_bicubic_interpolation():
    """A smooth even function on 24 x 20 nodes: 2e-5 between nodes, even start respected at the edge."""
    x = torch.linspace(0, 2, 24, dtype=torch.float64)
    y = torch.linspace(0, 1, 20, dtype=torch.float64)
    table = num.bicubic_coefficients(torch.sin(x)[:, None] * torch.cos(2 * y)[None, :], even_start=True)
    i, j = torch.meshgrid(torch.arange(23), torch.arange(19), indexing="ij")
    u, t = 0.37, 0.71
    c = table[(i * 19 + j).reshape(-1)].reshape(23, 19, 4, 4)
    powers_u = torch.tensor([1, u, u**2, u**3], dtype=torch.float64)
    powers_t = torch.tensor([1, t, t**2, t**3], dtype=torch.float64)
    found = torch.einsum("ijab,a,b->ij", c, powers_u, powers_t)
    exact = torch.sin((i + u) * 2 / 23) * torch.cos(2 * (j + t) / 19)
    assert float((found - exact).abs().max()) < 2e-5


def test_bracketed_newton():
    """Roots of a function with a pole in its Newton step, to rounding."""
    target = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    low, high = torch.full_like(target, 1e-3), torch.full_like(target, 1e3)
    root = num.bracketed_newton(lambda x: (x.log() - target.log(), 1 / x), low, high)
    torch.testing.assert_close(root, target, rtol=1e-12, atol=0)


def test_implicit_root_derivative():
    """d/da of the root of x^3 = a is 1/(3 x^2)."""
    a = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor(5.0 ** (1 / 3), dtype=torch.float64)
    root = num.implicit_root(x, x**3 - a, 3 * x**2)
    (slope,) = torch.autograd.grad(root, a)
    assert float(slope) == pytest.approx(1 / (3 * float(x) ** 2), rel=1e-12)


def test_attach_derivative_has_right_higher_derivatives():
    """An integral given as a number with its integrand attached: second derivative is the integrand's slope."""
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    value = num.attach_derivative(torch.exp(x.detach()), x, torch.exp(x))
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert first.item() == pytest.approx(math.exp(0.7), rel=1e-14)
    assert float(second) == pytest.approx(math.exp(0.7), rel=1e-14)


def test_second_derivatives_are_refused():
    """first_order_only raises on the second differentiation."""
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(num.first_order_only(x**2), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is refused"):
        torch.autograd.grad(first, x)


def test_a_wall_is_lowest_at_the_best_point():
    """Its slope is its gradient, points away from the best point, and is zero there rather than NaN."""
    best = torch.tensor([1.0, -2.0], dtype=torch.float64)
    z = torch.tensor([4.0, 2.0], dtype=torch.float64)
    value, slope = num.wall(z, best, 10.0)
    assert float(value) == pytest.approx(10 * (1 + 5))
    torch.testing.assert_close(slope, torch.tensor([6.0, 8.0], dtype=torch.float64))
    value, slope = num.wall(best, best, 10.0)
    assert float(value) == 10.0
    assert not slope.any()


def test_trigonometric_series():
    """Clenshaw's sums equal the sums of sines and cosines, to rounding, and keep the shape of x."""
    generator = torch.Generator().manual_seed(3)
    c = torch.randn(23, 4, 5, generator=generator, dtype=torch.float64)
    x = 3 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    kx = torch.arange(1, 24, dtype=torch.float64).reshape(-1, 1, 1) * x
    torch.testing.assert_close(num.cosine_series(c, x), (c * kx.cos()).sum(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(num.sine_series(c, x), (c * kx.sin()).sum(0), rtol=0, atol=1e-12)


def test_roots_do_not_depend_on_their_company():
    """A root solved alone and beside one that takes many more steps is the same to the last bit; NaN starts serve."""

    def cubes(x):
        return x**3 - target, 3 * x**2

    low, high = torch.zeros(1, dtype=torch.float64), torch.full((1,), 1e3, dtype=torch.float64)
    target = torch.tensor([8.1], dtype=torch.float64)
    alone = num.bracketed_newton(cubes, low, high, start=torch.tensor([2.01], dtype=torch.float64), tolerance=1e-6)
    target = torch.tensor([8.1, 1.0], dtype=torch.float64)
    start = torch.tensor([2.01, torch.nan], dtype=torch.float64)
    both = num.bracketed_newton(cubes, low.expand(2), high.expand(2), start=start, tolerance=1e-6)
    assert float(both[0]) == float(alone)
    assert float(both[1]) == pytest.approx(1.0, abs=1e-6)
