"""Actions, angles and frequencies in any axisymmetric potential by the Staeckel fudge, and the inverse map."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayespot.actions.base import ActionAngles, ActionFinder, CappedActions, TorusMap, cap_energy
from bayespot.actions.focal import FocalTable
from bayespot.actions.fudge import Surroundings, blockwise_actions
from bayespot.actions.meridional import DirectField, Equatorial, TabulatedField, require_axisymmetric
from bayespot.actions.plane import check_actions, split
from bayespot.actions.separated_angles import Torus
from bayespot.actions.spherical import SphericalActions
from bayespot.actions.staeckel_map import place
from bayespot.actions.turning import turning_points
from bayespot.numerics import first_order_only
from bayespot.potential.base import Potential, radius
from bayespot.potential.extent import Extent, log_radius
from bayespot.units import takes, takes_tensors

#: Node spacing in ln R of the circular orbits.
_DS = 0.05
#: e-foldings of radius tabulated inside the least circular radius, and beyond the largest that the energies allow in
#: the plane: off it an orbit may go a little farther.
_INNER, _OUTER = 12.0, 0.7
#: Last step of the turning points in ln x and y where angles are asked for.
_EXACT = 1e-9
#: Largest condition number of d(J, theta)/dw of stars for which Newton's step is taken.
_WORST = 1e9


class StaeckelFudge(ActionFinder, TorusMap):
    def __init__(self, delta: float | None = None) -> None:
        if delta is not None and not 0 <= delta < math.inf:
            raise ValueError(f"delta must be a length >= 0 in kpc, got {delta}; None lets the potential decide")
        self.delta = delta

    def tabulated(self, potential: Potential, w: Tensor) -> TabulatedFudge:
        """Return the finder with the tables of this potential, for ``w`` and any part of it."""
        surroundings, s_first, s_last = self._surroundings(potential, w)
        field = TabulatedField.of(potential, s_first, s_last, w)
        return TabulatedFudge(Surroundings(field, surroundings.focal, surroundings.profile), self)

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        return self.tabulated(potential, w).capped_actions(potential, w)

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        around, *_ = self._surroundings(potential, w)
        J, theta, Omega, excess = _exact(around, w.reshape(-1, 6))
        unbound = (excess > 0)[:, None]
        parts = (torch.where(unbound, torch.nan, part) for part in (J, theta, Omega))
        return ActionAngles(*(first_order_only(part).reshape(*w.shape[:-1], 3) for part in parts))

    def phase_space(self, potential: Potential, J: Tensor, theta: Tensor) -> Tensor:
        check_actions(J)
        J, theta = torch.broadcast_tensors(J, theta)
        shape = J.shape[:-1]
        J, theta = J.reshape(-1, 3), theta.reshape(-1, 3)
        with torch.no_grad():
            guess = SphericalActions().phase_space(Equatorial(potential, J), J, theta)
        around, *_ = self._surroundings(potential, guess)
        w = place(around, J.detach(), theta.detach(), guess)
        # Newton's step squares the error that is left, and has the derivatives of the implicit-function theorem
        for last in (False, True):
            w = _newton(around, w, J, theta) if last else _newton(around, w, J.detach(), theta.detach()).detach()
        return first_order_only(w).reshape(*shape, 6)

    def reaches(self, potential: Potential, J: Tensor) -> Tensor:
        return SphericalActions().reaches(Equatorial(potential, J), J)

    def _surroundings(self, potential: Potential, w: Tensor) -> tuple[Surroundings, float, float]:
        """Return the potential's circular orbits and focal distances, and ln r between which the orbits stay."""
        x, v = split(w)
        sphere = Equatorial(potential, w)
        with torch.no_grad():
            s = log_radius(radius(x)).reshape(-1)
            phi = potential.phi(x).reshape(-1)
            kinetic = (v**2).sum(-1).reshape(-1) / 2
            finite = torch.isfinite(s) & torch.isfinite(kinetic)
            if not bool(finite.any()):
                raise ValueError("no star has finite coordinates: there is nothing to compute actions of")
            s, phi, kinetic = (part[finite].to("cpu", torch.float64) for part in (s, phi, kinetic))
        extent = Extent(sphere, s)
        require_axisymmetric(potential, extent.profile, w)
        with torch.no_grad():
            energy, _ = cap_energy(kinetic + phi, phi, extent.escape_energy)
            s_first, s_last = extent.enclosing(torch.stack([energy.min(), energy.max()]))
            largest = float(extent.profile.s_of_phi(energy.max()))
        profile = extent.tabulate(sphere, s_first - 1, s_last + 2, _DS)
        if profile.vc2.device != w.device or profile.vc2.dtype != w.dtype:
            profile = profile.through(lambda part: part.to(w))
        if self.delta is not None or potential.symmetry == "spherical":
            focal = FocalTable.constant(self.delta or 0.0, w)
        else:
            focal = FocalTable.of(potential, s_first, s_last, w)
        return Surroundings(DirectField(potential), focal, profile), s_first - _INNER, largest + _OUTER


class TabulatedFudge(ActionFinder):
    """`StaeckelFudge` in one potential, with its tables: what `StaeckelFudge.tabulated` returns.

    Parameters
    ----------
    tables
        The potential between the orbits of all stars that are asked for.
    exact
        The finder that computes angles and frequencies.
    """

    def __init__(self, tables: Surroundings, exact: StaeckelFudge) -> None:
        self.tables, self.exact = tables, exact

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        """Return `StaeckelFudge.capped_actions`; the potential is that of the tables, whatever is given."""
        return blockwise_actions(self.tables, w)

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        return self.exact.actions_angles(potential, w)

    def through(self, change: Callable[[Tensor], Tensor]) -> TabulatedFudge:
        """Return the same with every table passed through ``change``."""
        return TabulatedFudge(self.tables.through(change), self.exact)


def _exact(around: Surroundings, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return J, theta, Omega and the excess energy of stars ``w (n, 6)``."""
    star, separated, guide, excess = around.motion(w)
    torus = Torus.of(separated, turning_points(separated.detached(), guide, _EXACT), star.Lz)
    psi, chi = torus.phases(star.x, star.y, star.p_u >= 0, star.p_beta >= 0)
    J = torch.stack([torus.J_r.clamp(min=0), star.Lz, torus.J_z.clamp(min=0)], -1)
    return J, torus.angles(psi, chi, star.phi), torus.frequencies(), excess


def _newton(around: Surroundings, w: Tensor, J: Tensor, theta: Tensor) -> Tensor:
    """Return w after one step towards J and theta; unchanged where an angle does not exist."""
    with torch.enable_grad():
        at = w.detach().requires_grad_()
        found_J, found_theta, *_ = _exact(around, at)
        columns = [*found_J.unbind(-1), *found_theta.unbind(-1)]
        rows = [torch.autograd.grad(column.sum(), at, retain_graph=True)[0] for column in columns]
    jacobian = torch.stack(rows, -2).detach()
    turn = torch.remainder(theta - found_theta + math.pi, 2 * math.pi) - math.pi
    miss = torch.cat([J - found_J, turn], -1)
    # in units of each star's own size, speed and actions
    size = torch.cat([part.norm(dim=-1, keepdim=True).expand(-1, 3) for part in w.detach().split(3, -1)], -1)
    unit = torch.cat([found_J.detach().abs().sum(-1, keepdim=True).expand(-1, 3), torch.ones_like(turn)], -1)
    scaled = jacobian * size[:, None, :] / unit[:, :, None]
    usable = torch.isfinite(scaled).all(-1).all(-1) & (torch.linalg.cond(scaled.nan_to_num(0.0)) < _WORST)
    scaled = torch.where(usable[:, None, None], scaled, torch.eye(6, dtype=w.dtype, device=w.device))
    step = size * torch.linalg.solve(scaled, miss / unit)
    return torch.where(usable[:, None], w.detach() + step, w.detach())
