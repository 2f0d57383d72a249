"""What every potential must satisfy; called by the tests of each of them.

Tolerances are relative to the quantity itself at the same point, so that no check depends on units.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bayespot.potential import Potential
from bayespot.pyro_modules import freeze
from bayespot.units import G


def points_at(radii: Tensor, seed: int = 0) -> Tensor:
    """Return one point in a random direction at each radius, shape ``(n, 3)``."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(len(radii), 3, dtype=torch.float64, generator=generator)
    return radii[:, None] * torch.nn.functional.normalize(direction, dim=-1)


def check_potential(
    potential: Potential,
    radii: Tensor,
    density: Callable[[Tensor], Tensor] | None = None,
    rtol_density: float = 1e-9,
    rtol_laplacian: float = 1e-5,
) -> None:
    """Run every check that applies; ``density`` maps positions to the closed form in Msun/kpc^3.

    Acceleration against finite differences (1e-8 of its modulus); density by autodiff to ``rtol_density``
    and by finite differences to ``rtol_laplacian`` of the larger of itself and the mean density inside;
    Gauss's law (1e-8); circular speed (1e-12) and what tables of circular orbits are made of (1e-9); batch against
    scalar (1e-13); no graph under no_grad.
    """
    x = points_at(radii)
    check_acceleration(potential, x)
    if density is not None:
        check_density(potential, x, density, rtol_density, rtol_laplacian)
        check_enclosed_mass(potential, radii, density)
    check_circular_speed(potential, radii)
    check_circular_orbits(potential, radii)
    check_batches(potential, x)
    check_no_graph(potential, x)


def check_acceleration(potential: Potential, x: Tensor, rtol: float = 1e-8) -> None:
    """-grad Phi by autodiff against central differences of order 6 with step 0.01 r."""
    with torch.no_grad():
        step = 0.01 * x.norm(dim=-1)
        gradient = torch.zeros_like(x)
        for i in range(3):
            shift = torch.zeros_like(x)
            shift[:, i] = step
            for k, c in ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60)):
                gradient[:, i] += c * (potential.phi(x + k * shift) - potential.phi(x - k * shift)) / step
        exact = potential.acceleration(x)
    # the differences lose the digits that Phi has in common at neighbouring points
    rounding = 1e-15 * (potential.phi(x).abs() / step).detach() * 10
    _below((exact + gradient).norm(dim=-1), rtol * exact.norm(dim=-1) + rounding, "acceleration", potential, x)


def check_density(
    potential: Potential,
    x: Tensor,
    density: Callable[[Tensor], Tensor],
    rtol: float = 1e-9,
    rtol_laplacian: float = 1e-5,
) -> None:
    """Laplacian = 4 pi G rho: `density`, a plain Cartesian autodiff Laplacian, and a difference Laplacian."""
    with torch.no_grad():
        exact, r = density(x), x.norm(dim=-1)
        # where the density is far below the mean density inside r, the Laplacian is a small difference
        floor = exact + 1e-6 * potential.enclosed_mass(r).abs() / r**3
        _below((potential.density(x) - exact).abs(), rtol * floor, "density", potential, x)
        cartesian = torch.stack([_autodiff_laplacian(potential, point) for point in x]) / (4 * math.pi * G)
        _below((cartesian - exact).abs(), rtol * floor, "autodiff Laplacian", potential, x)
        # divergence of the acceleration by central differences of order 4
        step = 0.01 * r
        divergence = torch.zeros_like(r)
        for i in range(3):
            shift = torch.zeros_like(x)
            shift[:, i] = step
            for k, c in ((1, 2 / 3), (2, -1 / 12)):
                difference = potential.acceleration(x + k * shift) - potential.acceleration(x - k * shift)
                divergence += c * difference[:, i] / step
        floor = exact.abs() + potential.enclosed_mass(r).abs() / (4 * math.pi * r**3)
        error = (-divergence / (4 * math.pi * G) - exact).abs()
        _below(error, rtol_laplacian * floor, "difference Laplacian", potential, x)


def check_enclosed_mass(
    potential: Potential, radii: Tensor, density: Callable[[Tensor], Tensor], rtol: float = 1e-8
) -> None:
    """M(r_2) - M(r_1) by Gauss's law against the integral of the density over the shell, r_2 = 3 r_1.

    24 Gauss-Legendre nodes in ln r; for potentials that are not spherical 48 in cos(polar angle).
    """
    t, weight = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(24))
    mu, mu_weight = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(48))
    half = math.log(3) / 2
    with torch.no_grad():
        r = radii[:, None] * torch.exp(half * (1 + t))
        direction = torch.stack([(1 - mu**2).sqrt(), torch.zeros_like(mu), mu], -1)
        mean = (density(r[..., None, None] * direction) * mu_weight / 2).sum(-1)
        shell = half * (4 * math.pi * r**3 * mean * weight).sum(-1)
        gauss = potential.enclosed_mass(3 * radii) - potential.enclosed_mass(radii)
        scale = potential.enclosed_mass(3 * radii)
    _below((gauss - shell).abs(), rtol * scale, "mass of a shell", potential, radii)


def check_circular_speed(potential: Potential, radii: Tensor, rtol: float = 1e-12) -> None:
    """v_c^2 = r dPhi/dr on the x axis; for spheres also G M / r."""
    with torch.no_grad():
        vc2 = potential.circular_speed(radii) ** 2
        zero = torch.zeros_like(radii)
        inward = -potential.acceleration(torch.stack([radii, zero, zero], -1))[:, 0]
        _below((vc2 - radii * inward).abs(), rtol * vc2, "circular speed", potential, radii)
        if potential.symmetry == "spherical":
            newton = G * potential.enclosed_mass(radii) / radii
            _below((vc2 - newton).abs(), rtol * vc2, "circular speed from mass", potential, radii)


def check_circular_orbits(potential: Potential, radii: Tensor, rtol: float = 1e-9) -> None:
    """`phi_and_vc2`, `radial` and an `evaluated` copy are Phi and R dPhi/dR in the plane, also for a second call."""
    phi, vc2 = (part.detach() for part in Potential.phi_and_vc2(potential, radii))
    for one in (potential.phi_and_vc2, potential.radial(), potential.evaluated().phi_and_vc2):
        for _ in range(2):
            for found, expected in zip(one(radii), (phi, vc2), strict=True):
                torch.testing.assert_close(found.detach(), expected, rtol=rtol, atol=rtol * float(vc2.abs().max()))


def check_draws_on_grid(free: Potential, draws: dict[str, Tensor], s: Tensor, mu: Tensor, rtol: float = 1e-9) -> None:
    """Phi of many values of the sites on a grid, and functionals of it, are those of one value after the other."""
    each = torch.stack(
        [freeze(free, {name: value[i] for name, value in draws.items()}).phi_on_grid(s, mu) for i in range(3)]
    )
    few = {name: value[:3] for name, value in draws.items()}
    torch.testing.assert_close(free.phi_draws_on_grid(few, s, mu), each, rtol=rtol, atol=rtol * float(each.abs().max()))
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(len(s), len(mu), 4, dtype=torch.float64, generator=generator)
    functionals = free.functionals_on_grid({name: value[0] for name, value in draws.items()}, W, s, mu)
    expected = torch.tensordot(each, W, dims=2)
    # power laws beyond a table's edges are those of the first draw
    torch.testing.assert_close(functionals(few), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def check_batches(potential: Potential, x: Tensor, rtol: float = 1e-13) -> None:
    """Points one at a time, and in a batch of another shape, give the numbers of the flat batch."""
    with torch.no_grad():
        for name in ("phi", "density"):
            method = getattr(potential, name)
            flat = method(x)
            single = torch.stack([method(point) for point in x])
            assert single.shape == flat.shape, f"{name}: shape {tuple(single.shape)}, not {tuple(flat.shape)}"
            _below((single - flat).abs(), rtol * flat.abs(), f"{name} one by one", potential, x)
            stacked = method(torch.stack([x, x.flip(0)]))
            _below((stacked[1] - flat.flip(0)).abs(), rtol * flat.flip(0).abs(), f"{name} stacked", potential, x)
        assert potential.acceleration(torch.stack([x, x])).shape == (2, len(x), 3)


def check_no_graph(potential: Potential, x: Tensor) -> None:
    """Without gradients asked for nothing carries a graph; in grad mode everything is differentiable in position."""
    r = x.norm(dim=-1)
    of_position, of_radius = ("phi", "acceleration", "density"), ("radial_acceleration", "enclosed_mass")
    for name in (*of_position, *of_radius, "circular_speed"):
        argument = x if name in of_position else r
        with torch.no_grad():
            value = getattr(potential, name)(argument)
        assert not value.requires_grad, f"{name} of {type(potential).__name__} keeps a graph under no_grad"
        if not potential.phi(x).requires_grad:
            value = getattr(potential, name)(argument)
            assert not value.requires_grad, f"{name} of {type(potential).__name__} keeps a graph that nobody asked for"
        at = argument.clone().requires_grad_()
        (slope,) = torch.autograd.grad(getattr(potential, name)(at).sum(), at)
        assert torch.isfinite(slope).all(), f"the gradient of {name} of {type(potential).__name__} is not finite"


def check_parameter_gradients(
    build: Callable[..., Potential], values: dict[str, float], x: Tensor, rtol: float = 1e-7
) -> None:
    """d Phi, d a and d rho with respect to every parameter against central differences of order 4."""
    for name, value in values.items():
        for field in ("phi", "acceleration", "density"):

            def total(p: Tensor | float, name: str = name, field: str = field) -> Tensor:
                return getattr(build(**{**values, name: p}), field)(x).sum()

            parameter = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))
            (slope,) = torch.autograd.grad(total(parameter), parameter)
            h = 1e-3 * abs(value)
            with torch.no_grad():
                near = total(value + h) - total(value - h)
                far = total(value + 2 * h) - total(value - 2 * h)
                scale = total(value).abs() / abs(value)
            difference = (8 * near - far) / (12 * h)
            error = float((slope - difference).abs() / (slope.abs() + scale))
            assert error < rtol, f"d {field} / d {name}: relative error {error:.2g}, allowed {rtol:.2g}"


def _autodiff_laplacian(potential: Potential, point: Tensor) -> Tensor:
    with torch.enable_grad():
        return torch.autograd.functional.hessian(potential.phi, point).trace()


def _below(error: Tensor, bound: Tensor, what: str, potential: Potential, where: Tensor) -> None:
    """Fail at the point where the error exceeds its bound by most; NaN counts as infinite."""
    ratio = torch.nan_to_num(error / bound.clamp(min=1e-300), nan=math.inf)
    worst = int(ratio.argmax())
    assert float(ratio[worst]) <= 1, (
        f"{what} of {type(potential).__name__}: error {float(error[worst]):.3g}, "
        f"allowed {float(bound[worst]):.3g}, at {where[worst].tolist()}"
    )
