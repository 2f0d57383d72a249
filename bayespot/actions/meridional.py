"""Axisymmetric potentials in the meridional plane: evaluated anew, or tabulated in ln r and latitude."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayespot.numerics import bicubic_coefficients, gather_rows, horner, horner_slope, power_sums, refuse_again
from bayespot.potential.base import Potential
from bayespot.potential.profile import RadialProfile

#: Rows' distance in ln r, and cells from the plane to the axis.
_DS, _N_LATITUDE = 0.05, 40
#: mu = sin(latitude) inside which cells have equal heights; above they grow with it.
_THIN = 0.02
_STRETCH = math.asinh(1 / _THIN)
#: Rows beyond the last that is needed, so that slopes at the edge are those of any other table.
_EDGE = 4
#: Radii at which symmetry about the plane is checked: multiples of a circular orbit's radius.
_CHECKED = (0.1, 1.0, 10.0)
#: Largest difference of Phi between north and south, over the squared circular speed.
_ASYMMETRY = 1e-6


class Equatorial(Potential):
    """The sphere whose potential is that of another in the plane z = 0: it has the same circular orbits there.

    It keeps to the device and the precision of ``like``; profiles, which are small, stay on the CPU.
    """

    symmetry = "spherical"

    def __init__(self, potential: Potential, like: Tensor) -> None:
        super().__init__()
        self.potential, self.like = potential, like.new_zeros(())

    def phi(self, x: Tensor) -> Tensor:
        return self.phi_r(torch.linalg.vector_norm(x, dim=-1))

    def phi_r(self, r: Tensor) -> Tensor:
        R = r.to(self.like)
        zero = torch.zeros_like(R)
        return self.potential.phi(torch.stack([R, zero, zero], -1)).to(r)

    def phi_and_vc2(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.radial()(r)

    def radial(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        radial = self.potential.radial()

        def at(r: Tensor) -> tuple[Tensor, Tensor]:
            phi, vc2 = radial(r.to(self.like))
            return phi.to(r), vc2.to(r)

        return at


class DirectField:
    """The potential itself, evaluated wherever it is asked for."""

    def __init__(self, potential: Potential) -> None:
        self.potential = potential

    def phi(self, R: Tensor, z: Tensor) -> Tensor:
        R, z = torch.broadcast_tensors(R, z)
        return self.potential.phi(torch.stack([R, torch.zeros_like(R), z], -1))

    def slopes(self, R: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            R, z = (part.detach().requires_grad_() for part in torch.broadcast_tensors(R, z))
            phi = self.phi(R, z)
            by_R, by_z = torch.autograd.grad(phi.sum(), (R, z))
        return phi.detach(), R.detach() * by_R, z.detach() * by_z

    def taken(self, index: Tensor) -> DirectField:
        return self


@dataclass(frozen=True)
class TabulatedField:
    r"""Bicubic table of :math:`\Phi` over s = ln r and tau, with abs(z)/r = d sinh(k tau).

    Rows are multiples of their distance, the same for all stars; inside the first and beyond the last Phi counts as
    constant, so they have to lie far inside and outside all orbits.
    """

    coefficients: Tensor
    s_first: float
    n_s: int

    @classmethod
    def of(cls, potential: Potential, s_first: float, s_last: float, like: Tensor) -> TabulatedField:
        """Tabulate between two radii (ln kpc), on the device of ``like``; the graph of parameters is kept."""
        first, last = math.floor(s_first / _DS) - _EDGE, math.ceil(s_last / _DS) + _EDGE
        phi = potential.phi_on_grid(*_nodes(first, last - first + 1, like))
        return cls(bicubic_coefficients(phi, even_start=True), first * _DS, len(phi))

    @property
    def n_nodes(self) -> int:
        """Number of the places where Phi was tabulated."""
        return self.n_s * (_N_LATITUDE + 1)

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Return ln r ``(n_s,)`` and z/r of the nodes."""
        return _nodes(round(self.s_first / _DS), self.n_s, self.coefficients)

    def stencil(self, R: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the 16 nodes about each place, and the weights with which their values make the one there.

        Cubic interpolation of values alone: of a smooth change of Phi, not as exact as `phi` is of Phi itself.
        """
        cell, u, v, *_ = self._cells(R, z)
        i, j = cell // _N_LATITUDE, cell % _N_LATITUDE
        i, along_s = _four(i, u, self.n_s, even=False)
        j, along_tau = _four(j, v, _N_LATITUDE + 1, even=True)
        index = i[..., :, None] * (_N_LATITUDE + 1) + j[..., None, :]
        return index.flatten(-2), (along_s[..., :, None] * along_tau[..., None, :]).flatten(-2)

    def taken(self, index: Tensor) -> TabulatedField:
        return self

    def through(self, change: Callable[[Tensor], Tensor]) -> TabulatedField:
        """Return the table with its numbers passed through ``change``."""
        return replace(self, coefficients=change(self.coefficients))

    def _cells(self, R: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        r2 = (R * R + z * z).clamp(min=1e-300)
        position = ((0.5 / _DS) * r2.log() - self.s_first / _DS).clamp(0, self.n_s - 1)
        q = z.abs() * r2.rsqrt() * (1 / _THIN)
        height = (q + (q * q + 1).sqrt()).log() * (_N_LATITUDE / _STRETCH)
        i = position.detach().long().clamp(0, self.n_s - 2)
        j = height.detach().long().clamp(0, _N_LATITUDE - 1)
        return i * _N_LATITUDE + j, position - i, height - j, r2, q

    def phi(self, R: Tensor, z: Tensor) -> Tensor:
        R, z = torch.broadcast_tensors(R, z)
        index, u, v, *_ = self._cells(R, z)
        return _Bicubic.apply(self.coefficients, index.reshape(-1), u.reshape(-1), v.reshape(-1)).reshape(R.shape)

    @torch.no_grad()
    def slopes(self, R: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index, u, v, r2, q = self._cells(*torch.broadcast_tensors(R, z))
        phi, by_u, by_v = _values(gather_rows(self.coefficients, index), u, v)
        by_s = by_u / _DS
        # d tau / d ln(mu)
        by_ln_mu = by_v * (_N_LATITUDE / _STRETCH) * q * (q * q + 1).rsqrt()
        mu2 = z * z / r2
        return phi, (1 - mu2) * (by_s - by_ln_mu), mu2 * by_s + (1 - mu2) * by_ln_mu


class TabulatedForces:
    """Accelerations in an axisymmetric potential from a table of Phi between two radii (ln kpc), without gradients."""

    def __init__(self, potential: Potential, s_first: float, s_last: float, like: Tensor) -> None:
        self._field = TabulatedField.of(potential, s_first, s_last, like)

    def acceleration(self, x: Tensor) -> Tensor:
        """Return the acceleration at x ``(*batch, 3)`` in (km/s)^2/kpc."""
        R2 = x[..., 0] ** 2 + x[..., 1] ** 2
        z = x[..., 2]
        _, by_R, by_z = self._field.slopes(R2.sqrt(), z)
        # the field's slopes are R dPhi/dR and z dPhi/dz
        across = -by_R / R2.clamp(min=1e-300)
        up = -by_z / torch.where(z == 0, 1.0, z)
        return torch.stack([across * x[..., 0], across * x[..., 1], up], -1)


def _nodes(first: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return s ``(n,)`` and mu of a table whose first row is number ``first``."""
    s = _DS * torch.arange(first, first + n, dtype=like.dtype, device=like.device)
    tau = torch.linspace(0, 1, _N_LATITUDE + 1, dtype=like.dtype, device=like.device)
    return s, (_THIN * torch.sinh(_STRETCH * tau)).clamp(max=1)


def _four(cell: Tensor, u: Tensor, n: int, even: bool) -> tuple[Tensor, Tensor]:
    """Return four of n nodes about a place in a cell, and the weights of the cubic through them.

    Beyond the first node a function that is ``even`` goes on; beyond an end that it does not the nodes are shifted.
    """
    first = (cell - 1).clamp(max=n - 4) if even else (cell - 1).clamp(0, n - 4)
    at = u + (cell - first)
    k = torch.arange(4, device=u.device)
    others = torch.stack([k[k != own] for own in range(4)])
    ratio = (at[..., None, None] - others) / (k[:, None] - others)
    return (first[..., None] + k).abs(), ratio.prod(-1)


def _values(rows: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bicubic polynomials of ``rows`` (*batch, 16) and their slopes by u and v."""
    c0, c1, c2, c3 = rows.unflatten(-1, (4, 4)).unbind(-1)
    v4 = v[..., None]
    top = torch.addcmul(c2, c3, v4)
    middle = torch.addcmul(c1, top, v4)
    along_u = torch.addcmul(c0, middle, v4)
    rise_u = torch.addcmul(middle, torch.addcmul(top, c3, v4), v4)
    return horner(along_u, u), horner_slope(along_u, u), horner(rise_u, u)


class _Bicubic(torch.autograd.Function):
    """Bicubic polynomials, differentiable once by their coefficients and places, with little memory per point."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, index: Tensor, u: Tensor, v: Tensor) -> Tensor:
        rows = coefficients.index_select(0, index)
        if any(ctx.needs_input_grad):
            value, by_u, by_v = _values(rows, u, v)
            ctx.save_for_backward(coefficients, index, u, v, by_u, by_v)
            return value
        return horner(horner(rows.unflatten(-1, (4, 4)), v[:, None]), u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, index, u, v, by_u, by_v = ctx.saved_tensors
        table = None
        if ctx.needs_input_grad[0]:
            weight, sums = grad, []
            for _ in range(4):
                sums.append(power_sums(index, weight, v, (len(coefficients), 4)))
                weight = weight * u
            table = refuse_again(torch.cat(sums, -1), coefficients)
        return table, None, refuse_again(grad * by_u, u), refuse_again(grad * by_v, v)


def require_axisymmetric(potential: Potential, profile: RadialProfile, like: Tensor) -> None:
    """Raise ValueError unless the potential is symmetric about the z axis and, as far as checked, about z = 0."""
    if potential.symmetry == "triaxial":
        raise ValueError(
            f"{type(potential).__name__} is triaxial: the Staeckel fudge needs a potential that is symmetric about the "
            "z axis; use GeneratingFunctionActions, or set symmetry='axisymmetric' if it is"
        )
    if potential.symmetry == "spherical":
        return
    with torch.no_grad():
        middle = profile.s_nodes[len(profile.s_nodes) // 2]
        r = torch.tensor(_CHECKED, dtype=like.dtype, device=like.device) * middle.exp().to(like)
        R, z = 0.8 * r, 0.6 * r
        field = DirectField(potential)
        difference = (field.phi(R, z) - field.phi(R, -z)).abs()
        if bool((difference > _ASYMMETRY * profile.vc2_at(r.log().to(profile.vc2)).to(like).abs()).any()):
            worst = int(difference.argmax())
            raise ValueError(
                f"{type(potential).__name__} is not symmetric about the plane z = 0: Phi differs by "
                f"{float(difference[worst]):.3g} (km/s)^2 between z = {float(z[worst]):.3g} kpc and minus that, at R = "
                f"{float(R[worst]):.3g} kpc; the Staeckel fudge needs that symmetry: shift the potential's plane to "
                "z = 0, or take GeneratingFunctionActions"
            )
