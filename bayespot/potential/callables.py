"""Potentials from functions of numpy arrays: how those of other packages become torch's."""

from __future__ import annotations

from typing import Any, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayespot.potential.base import Potential, Symmetry


class Callables(Protocol):
    """Phi and its derivatives at Cartesian positions ``(n, 3)`` in kpc, as numpy arrays."""

    def phi(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return Phi ``(n,)`` in (km/s)^2."""

    def gradient(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return its gradient ``(n, 3)`` in (km/s)^2/kpc."""

    def hessian(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return its second derivatives ``(n, 3, 3)`` in (km/s)^2/kpc^2."""


class CallablePotential(Potential):
    """A fixed potential computed by functions outside torch, differentiable in positions to second order.

    It has no parameters: orbits, actions, densities and fits of f(J) in it work, derivatives beyond the second are
    refused. `from_galpy` and `from_gala` build it.

    Parameters
    ----------
    source
        An object with the methods of `Callables`; a run can be saved only if it can be pickled.
    symmetry
        ``"spherical"``, ``"axisymmetric"`` or ``"triaxial"``; None: found by comparing Phi at equal radii to 1e-9.

    Raises
    ------
    ValueError
        If the symmetry is unknown, or Phi is not finite on a ring around the origin.

    Examples
    --------
    >>> class Harmonic:
    ...     def phi(self, x):
    ...         return (x**2).sum(-1) / 2
    ...     def gradient(self, x):
    ...         return x
    ...     def hessian(self, x):
    ...         return np.broadcast_to(np.eye(3), (len(x), 3, 3))
    >>> potential = CallablePotential(Harmonic())
    >>> potential.symmetry, potential.circular_speed(torch.tensor(2.0).double()).item()
    ('spherical', 2.0)
    """

    def __init__(self, source: Callables, symmetry: Symmetry | None = None) -> None:
        super().__init__()
        if symmetry is not None and symmetry not in get_args(Symmetry):
            raise ValueError(f"symmetry must be one of {', '.join(get_args(Symmetry))}; got {symmetry!r}")
        self.source = source
        self.symmetry: Symmetry = find_symmetry(source) if symmetry is None else symmetry

    def phi(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 3)
        return _Phi.apply(flat, self.source).reshape(x.shape[:-1])


def find_symmetry(source: Callables) -> Symmetry:
    """Return the symmetry of Phi about the origin and the z axis, by its values at equal radii."""
    theta, azimuth = np.meshgrid(np.linspace(0.1, np.pi - 0.2, 5), np.linspace(0.3, 6.1, 7), indexing="ij")
    directions = np.stack(
        [np.sin(theta) * np.cos(azimuth), np.sin(theta) * np.sin(azimuth), np.cos(theta)], -1
    )  # polar angle by azimuth
    values = np.stack([source.phi(r * directions.reshape(-1, 3)).reshape(theta.shape) for r in (1.0, 8.0, 30.0)])
    if not np.isfinite(values).all():
        raise ValueError(f"the potential is not finite at {np.sum(~np.isfinite(values))} of {values.size} test points")
    scale = np.abs(source.gradient(directions.reshape(-1, 3))).max()
    if (np.ptp(values, axis=2) > 1e-9 * (np.abs(values).max(2) + scale)).any():
        return "triaxial"
    if (np.ptp(values, axis=(1, 2)) > 1e-9 * (np.abs(values).max((1, 2)) + scale)).any():
        return "axisymmetric"
    return "spherical"


def _array(x: Tensor) -> NDArray[Any]:
    return x.detach().cpu().double().numpy()


class _Phi(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Callables) -> Tensor:
        ctx.save_for_backward(x)
        ctx.source = source
        return torch.as_tensor(np.array(source.phi(_array(x)), dtype=float)).to(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return upstream[0][:, None] * _Gradient.apply(x, ctx.source), None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Callables) -> Tensor:
        ctx.save_for_backward(x)
        ctx.source = source
        return torch.as_tensor(np.array(source.gradient(_array(x)), dtype=float)).to(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _HessianProduct.apply(x, upstream[0], ctx.source), None


class _HessianProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor, source: Callables) -> Tensor:
        hessian = torch.as_tensor(np.array(source.hessian(_array(x)), dtype=float)).to(x)
        ctx.save_for_backward(hessian)
        return (hessian @ vector[..., None])[..., 0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor, None]:
        if ctx.needs_input_grad[0]:
            # without this the missing term would count as zero
            raise RuntimeError("a CallablePotential has two derivatives; the third (the density's slope) is not known")
        (hessian,) = ctx.saved_tensors
        return None, (hessian @ upstream[0][..., None])[..., 0], None


class TorchCallables:
    """The other way round: a `Potential` as functions of numpy arrays (see `Callables`)."""

    def __init__(self, potential: Potential) -> None:
        require_fixed(potential)
        self.potential = potential

    def phi(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return Phi ``(n,)`` in (km/s)^2."""
        with torch.no_grad():
            return self.potential.phi(torch.as_tensor(x)).numpy()

    def gradient(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return its gradient ``(n, 3)`` in (km/s)^2/kpc."""
        with torch.no_grad():
            return -self.potential.acceleration(torch.as_tensor(x)).numpy()

    def hessian(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return its second derivatives ``(n, 3, 3)`` in (km/s)^2/kpc^2."""
        with torch.enable_grad():
            position = torch.as_tensor(x).clone().requires_grad_()
            gradient = -self.potential.acceleration(position)
            rows = [torch.autograd.grad(gradient[:, i].sum(), position, retain_graph=True)[0] for i in range(3)]
        return torch.stack(rows, -2).detach().numpy()

    def density(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return the mass density ``(n,)`` in Msun/kpc^3."""
        with torch.no_grad():
            return self.potential.density(torch.as_tensor(x)).numpy()


def require_fixed(potential: Potential) -> None:
    """Raise ValueError if a parameter of the potential has a prior instead of a value."""
    free = [
        f"{name}.{site}".lstrip(".")
        for name, module in potential.named_modules()
        for site in getattr(module, "_pyro_samples", {})
    ]
    if free:
        raise ValueError(
            f"{', '.join(free)} of {type(potential).__name__} have a prior, not a value: export one draw of the "
            "posterior, posterior.potential_at(i)"
        )
