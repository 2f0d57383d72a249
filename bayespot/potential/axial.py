"""Fields that potentials symmetric about the z axis have beside those of all: frequencies, columns, flattenings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayespot.numerics import gauss_legendre
from bayespot.units import Declared, takes_tensors

#: Nodes of a column's quadrature, and how they crowd towards the plane: z = z_max sinh(k t) / sinh(k).
_N_COLUMN, _CROWDING = 96, 10.0
#: A surface's height on the axis is looked for between r over this and r times this, at places so far apart in ln z.
_FLATTEST, _SPACING = 1e3, 0.1
#: Relative change of a field towards the centre below which it counts as constant.
_LEAST_CHANGE = 1e-9
#: Steps of Ridders' method, two evaluations each, in the interval that the trials left: to rounding.
_N_RIDDERS = 4


class AxialFields(Declared):
    """Methods of `Potential` that need symmetry about z; for a triaxial one they raise ValueError.

    They are differentiable as the other fields are, except the flattenings, which carry no graph.
    """

    symmetry: Any
    phi: Any
    density: Any

    @takes_tensors(R="length")
    def vertical_frequency(self, R: Tensor) -> Tensor:
        r"""Return :math:`\nu = (\partial^2\Phi / \partial z^2)^{1/2}` in the plane at R (kpc), in km/s/kpc.

        NaN where the plane is unstable. Binney & Tremaine (2008), equation 3.79b.
        """
        _require_axis(self, "vertical_frequency")
        _, _, bend = _slopes_in_plane(self, R, vertical=True)
        return bend.sqrt()

    @takes_tensors(R="length")
    def epicycle_frequency(self, R: Tensor) -> Tensor:
        r"""Return :math:`\kappa = (\partial^2\Phi / \partial R^2 + 3 R^{-1} \partial\Phi / \partial R)^{1/2}` at R > 0.

        In the plane, R in kpc, in km/s/kpc; NaN where circular orbits are unstable. Binney & Tremaine (2008), equation
        3.79a.
        """
        _require_axis(self, "epicycle_frequency")
        R, slope, bend = _slopes_in_plane(self, R, vertical=False)
        return (bend + 3 * slope / R).sqrt()

    @takes_tensors(R="length", z_max="length")
    def surface_density(self, R: Tensor, z_max: Tensor) -> Tensor:
        r"""Return :math:`\Sigma(R, z_{max}) = 2 \int_0^{z_{max}} \rho(R, z)\, dz`, of all matter, in Msun/kpc^2.

        Parameters
        ----------
        R, z_max : Float[Tensor, "*batch"]
            Radius in the plane and height in kpc, broadcast.

        Raises
        ------
        ValueError
            If the potential is triaxial or a height is not positive and finite.
        """
        _require_axis(self, "surface_density")
        if not bool((torch.isfinite(z_max) & (z_max > 0)).all()):
            raise ValueError(f"z_max must be positive and finite (kpc), got {z_max.tolist()}")
        shape = torch.broadcast_shapes(R.shape, z_max.shape)
        t, weight = (part.to(z_max) for part in gauss_legendre(_N_COLUMN))
        t = (1 + t) / 2
        stretched = torch.sinh(_CROWDING * t) / math.sinh(_CROWDING)
        weight = weight / 2 * _CROWDING * torch.cosh(_CROWDING * t) / math.sinh(_CROWDING)
        R, z = torch.broadcast_tensors(torch.atleast_1d(R)[..., None], z_max[..., None] * stretched)
        # one axis of places, as parameters of shape (n, 1) want it
        places = torch.stack([R, torch.zeros_like(R), z], -1).flatten(-3, -2)
        density = self.density(places).unflatten(-1, R.shape[-2:])
        return 2 * z_max * (density * weight).sum(-1).reshape(shape)

    @takes_tensors(R="length")
    def density_flattening(self, R: Tensor) -> Tensor:
        r"""Return the axis ratio z/R of the surface of equal density through (R, 0, 0): rho(0, 0, z) = rho(R, 0, 0).

        Parameters
        ----------
        R : Float[Tensor, "*batch"]
            Radius in the plane in kpc.

        Returns
        -------
        Float[Tensor, "*batch"]
            Of several such z the smallest; NaN if there is none between R / 1000 and 1000 R, or if the density changes
            by less than 1e-9 of itself towards the centre.
        """
        _require_axis(self, "density_flattening")
        return _flattening(lambda x: -self.density(x), R)

    @takes_tensors(R="length")
    def potential_flattening(self, R: Tensor) -> Tensor:
        r"""Return z/R of the surface of equal :math:`\Phi` through (R, 0, 0); see `density_flattening`."""
        _require_axis(self, "potential_flattening")
        return _flattening(self.phi, R)


def _require_axis(potential: Any, what: str) -> None:
    if potential.symmetry == "triaxial":
        raise ValueError(
            f"{type(potential).__name__} is triaxial: {what} needs a potential symmetric about the z axis; take its "
            "fields at positions instead (acceleration, density)"
        )


def _slopes_in_plane(potential: Any, R: Tensor, vertical: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return R, dPhi/dR and the second derivative of Phi by z, or by R, at (R, 0, 0)."""
    keep = torch.is_grad_enabled() and (
        R.requires_grad or potential.phi(torch.stack([R, 0 * R, 0 * R], -1).detach().reshape(-1, 3)[:1]).requires_grad
    )
    with torch.enable_grad():
        R = R if R.requires_grad else R.detach().requires_grad_()
        z = torch.zeros_like(R).requires_grad_()
        phi = potential.phi(torch.stack([R, torch.zeros_like(R), z], -1))
        slopes = torch.autograd.grad(phi.sum(), (R, z), create_graph=True)
        by = 1 if vertical else 0
        (bend,) = torch.autograd.grad(slopes[by].sum(), (R, z)[by], create_graph=keep)
    return (R, slopes[0], bend) if keep else (R.detach(), slopes[0].detach(), bend)


@torch.no_grad()
def _flattening(rising: Callable[[Tensor], Tensor], R: Tensor) -> Tensor:
    """Return z/R where a field that rises outward has on the z axis its value at (R, 0, 0)."""
    span = math.log(_FLATTEST)
    at, shape = torch.atleast_1d(R), R.shape
    counts = torch.isfinite(at) & (at > 0)
    ln_R = torch.where(counts, at, 1.0).log()
    wanted = rising(torch.stack([at, 0 * at, 0 * at], -1))
    # places on the axis that serve all radii, each within its own range
    first, last = float(ln_R.min()) - span, float(ln_R.max()) + span
    ln_z = torch.linspace(first, last, max(math.ceil((last - first) / _SPACING), 1) + 1).to(at)
    tried = _on_axis(rising, ln_z.expand(*at.shape[:-1], -1))
    window = ln_z - ln_R[..., None]
    above = (tried[..., None, :] >= wanted[..., None]) & (window >= -span - _SPACING)
    k = above.int().argmax(-1)
    begun = torch.searchsorted(ln_z, ln_R - span - _SPACING)
    start = tried.gather(-1, begun)
    # of a field that is constant there all differences are rounding
    found = counts & above.any(-1) & (k > begun) & (start - wanted < -_LEAST_CHANGE * wanted.abs())
    low, high = ln_z[(k - 1).clamp(min=0)], ln_z[k]
    ln_q = _crossing(lambda u: _on_axis(rising, u) - wanted, low, high) - ln_R
    within = found & (ln_q.abs() <= span)
    return torch.where(within, ln_q.exp(), math.nan).reshape(shape)


def _on_axis(rising: Callable[[Tensor], Tensor], ln_z: Tensor) -> Tensor:
    z = ln_z.exp()
    return rising(torch.stack([0 * z, 0 * z, z], -1))


def _crossing(excess: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return where a function changes its sign from minus to plus, by Ridders' method: the bracket never widens."""
    below, above = excess(low), excess(high)
    best = high
    for _ in range(_N_RIDDERS):
        middle = (low + high) / 2
        value = excess(middle)
        slope = (value**2 - below * above).clamp(min=1e-300).sqrt()
        best = (middle - (middle - low) * value / slope).clamp(low, high)
        at_best = excess(best)
        for place, height in ((middle, value), (best, at_best)):
            inside = (place > low) & (place < high)
            lower, upper = inside & (height < 0), inside & (height >= 0)
            low, below = torch.where(lower, place, low), torch.where(lower, height, below)
            high, above = torch.where(upper, place, high), torch.where(upper, height, above)
    return best
