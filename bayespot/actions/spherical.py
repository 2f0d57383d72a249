"""Actions, angles and frequencies in any spherical potential, and the inverse map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayespot.actions.base import ActionAngles, ActionFinder, CappedActions, TorusMap, cap_energy
from bayespot.actions.plane import (
    angular_momentum,
    check_actions,
    combine_actions,
    combine_angles,
    combine_frequencies,
    orbital_plane,
    split,
    split_angles,
    to_phase_space,
)
from bayespot.actions.radial import N_POINTS, RadialOrbits
from bayespot.actions.reach import BEYOND, profile_of_actions, profile_of_stars
from bayespot.actions.table import ActionTable
from bayespot.numerics import bracketed_newton, first_order_only, implicit_root
from bayespot.potential.base import Potential, radius
from bayespot.potential.extent import Extent, log_radius
from bayespot.potential.profile import RadialProfile, require_spherical

#: Node spacing in ln r: cubic interpolation errors of about 1e-9 and 2e-12 of the potential's variation.
_DS_FAST, _DS_EXACT = 0.025, 0.005
_N_ROUGH = 16
#: Error of a phase in radians below which one Newton step is enough.
_OFF = 1e-7


class SphericalActions(ActionFinder, TorusMap):
    r"""Action finder and torus map of every spherical potential.

    `capped_actions` and `actions` are the fast path: the potential is tabulated in ln r, J_r in two
    dimensions (`ActionTable`), and each star costs an interpolation. `actions_angles` and `phase_space`
    integrate every star's radial motion (48-point quadrature) and are mutually inverse to rounding. For statistics of
    many stars ``exact=False`` makes do with 16 points, and where no gradient is asked for the inverse map reads
    energies and phases off tables and series.

    First derivatives with respect to w, J, theta and the potential's parameters are exact; differentiating
    twice raises RuntimeError (turning points inside the table are constants, which is right only once).

    The tables reach from the innermost to the outermost of the orbits, which the stars' energies decide and not where
    the stars happen to be; their nodes are the same for all stars, so that J of a star does not depend on its
    company (to rounding). A star at the centre is one at 1e-300 kpc. Bound is what the potential's limit at infinity
    says (`ESCAPE_MARGIN`).

    Accuracy of J_r over J_r + L: fast path 1e-6 in the median, 1e-5 to 1e-4 at worst; `actions_angles` 1e-8.

    Parameters
    ----------
    exact
        Whether `actions_angles` and `phase_space` are exact to about 1e-8, or to 1e-5 and cheaper.
    """

    #: Models stored before there was a choice have none of their own.
    exact: bool = True

    def __init__(self, exact: bool = True) -> None:
        self.exact = exact

    @property
    def n_points(self) -> int:
        """Quadrature points along an orbit."""
        return N_POINTS if self.exact else _N_ROUGH

    def rough(self) -> SphericalActions:
        return SphericalActions(exact=False)

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        return self.tabulated(potential, w).capped_actions(potential, w)

    def tabulated(self, potential: Potential, w: Tensor) -> TabulatedActions:
        """Return the finder with the tables of this potential, for ``w`` and any part of it."""
        x, v = split(w)
        profile, s_first, s_last = profile_of_stars(potential, log_radius(radius(x)), v, _DS_FAST)
        return TabulatedActions(ActionTable.of(profile, s_first, s_last), self)

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        plane = orbital_plane(w)
        s = log_radius(plane.r)
        profile, *_ = profile_of_stars(potential, s, w[..., 3:], _DS_EXACT)
        phi = profile.phi(s)
        energy, excess = cap_energy((w[..., 3:] ** 2).sum(-1) / 2 + phi, phi, profile.escape_energy)
        orbits = RadialOrbits.of(profile, energy, plane.L, self.n_points)
        J_r, Omega_r, Omega_L = orbits.full()
        sine = ((s - orbits.mid) / orbits.half).clamp(-1 + 1e-15, 1 - 1e-15)
        time, azimuth = orbits.since_pericentre(sine.asin())
        outward = torch.where(plane.v_r < 0, -1.0, 1.0).to(s)
        theta_r = outward * Omega_r * time
        lag = outward * (azimuth - Omega_L * time)
        parts = (
            combine_actions(J_r, plane),
            combine_angles(theta_r, lag, plane),
            combine_frequencies(Omega_r, Omega_L, plane.Lz),
        )
        unbound = excess[..., None] > 0
        return ActionAngles(*(first_order_only(torch.where(unbound, torch.nan, part)) for part in parts))

    def phase_space(self, potential: Potential, J: Tensor, theta: Tensor) -> Tensor:
        check_actions(J)
        require_spherical(potential)
        J_r, J_phi, J_z = J.unbind(-1)
        L = J_z + J_phi.abs()
        angles = split_angles(theta, J_phi)
        profile, s_first, s_last = profile_of_actions(potential, J_r.detach(), L.detach(), _DS_EXACT)
        orbits = self._orbits(profile, s_first, s_last, J_r, L)
        _, Omega_r, Omega_L = orbits.full()
        psi, azimuth = self._phase(orbits, Omega_r, angles.theta_r.abs())
        outward = torch.where(angles.theta_r < 0, -1.0, 1.0).to(psi)
        r = orbits.s(psi).exp()
        v_r = outward * orbits.radial_momentum(psi) / r
        lag = outward * azimuth - Omega_L / Omega_r * angles.theta_r
        return first_order_only(to_phase_space(r, v_r, J_phi, J_z, angles.node, angles.theta_z + lag))

    def reaches(self, potential: Potential, J: Tensor) -> Tensor:
        J_r, J_phi, J_z = J.detach().unbind(-1)
        L = J_z + J_phi.abs()
        extent = Extent(potential)
        # where the potential overflows no circular orbit is reached
        largest = extent.profile.ln_lc_nodes[-1].exp() if extent.usable else 0.0
        return (L + J_r > 0) & (L + BEYOND * J_r < largest)

    def _orbits(self, profile: RadialProfile, s_first: float, s_last: float, J_r: Tensor, L: Tensor) -> RadialOrbits:
        """Orbits of the given actions: table, then (if exact) Newton on the quadrature."""
        with torch.no_grad():
            energy, floor = self._tabulated_energy(profile, s_first, s_last, J_r, L)
            orbits = RadialOrbits.of(profile, energy, L, self.n_points)
            for _ in range(3 if self.exact else 0):
                action, Omega_r, _ = orbits.full()
                # implicit_root's step, the last one, squares what is left
                if bool(((action - J_r).abs() <= 1e-7 * (J_r + L)).all()):
                    break
                energy = torch.maximum(energy + (J_r - action) * Omega_r, floor)
                orbits = RadialOrbits.of(profile, energy, L, self.n_points, near=orbits)
        if not (self.exact or torch.is_grad_enabled()):
            return orbits
        if torch.is_grad_enabled():
            orbits = RadialOrbits.of(profile, energy, L, self.n_points, near=orbits)
        action, Omega_r, _ = orbits.full()
        energy = implicit_root(energy, action - J_r, 1 / Omega_r)
        return RadialOrbits.of(profile, energy, L, self.n_points, near=orbits)

    @staticmethod
    def _tabulated_energy(
        profile: RadialProfile, s_first: float, s_last: float, J_r: Tensor, L: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Energy of the orbits of given actions by the table of J_r, and that of the circular orbits of their L."""
        table = ActionTable.of(profile, s_first, s_last)

        def residual(s: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                s = s.detach().requires_grad_()
                lc = profile.ln_lc_at(s).exp()
                action = (lc - L) * table.g(s, (L / lc).clamp(1e-30, 1).sqrt())
                (slope,) = torch.autograd.grad(action.sum(), s)
            return action.detach() - J_r, slope

        s_low = profile.s_of_ln_lc(L.clamp(min=1e-12 * float((L + J_r).max())).log())
        s_high = profile.s_of_ln_lc((L + BEYOND * J_r).log())
        # L_c is L + J_r / g, with g between 1/2 and 1
        start = profile.s_of_ln_lc((L + 1.5 * J_r).log())
        s_c = bracketed_newton(residual, s_low, s_high, start=start, tolerance=1e-7)
        energy, floor = (profile.phi(s) + profile.vc2_at(s) / 2 for s in (s_c, s_low))
        return energy, floor

    def _phase(self, orbits: RadialOrbits, Omega_r: Tensor, theta_r: Tensor) -> tuple[Tensor, Tensor]:
        """Solve Omega_r t(psi) = theta_r, in [0, pi] on the way out; return psi and the azimuth since pericentre."""
        fixed = orbits.detach()
        times, azimuths = fixed.series()

        def near(psi: Tensor) -> tuple[Tensor, Tensor]:
            time, slope = times(psi)
            return Omega_r * time - theta_r, Omega_r * slope

        edge = torch.full_like(theta_r.detach(), torch.pi / 2)
        start = bracketed_newton(near, -edge, edge, n_iter=12, tolerance=1e-8)
        if not (self.exact or torch.is_grad_enabled()):
            return start, azimuths(start)[0]
        time, azimuth = orbits.since_pericentre(start)
        # the series is as exact as the quadrature for most orbits
        off = torch.nonzero((Omega_r * time - theta_r).detach().abs() > _OFF, as_tuple=True)
        if len(off[0]):
            rest, Omega, theta = fixed.some(off), Omega_r.detach()[off], theta_r.detach()[off]

            def residual(psi: Tensor) -> tuple[Tensor, Tensor]:
                time, _ = rest.since_pericentre(psi)
                return Omega * time - theta, Omega * rest.slopes(psi)[0]

            solved = bracketed_newton(residual, -edge[off], edge[off], start=start[off], tolerance=1e-8)
            start = start.index_put(off, solved)
            time, azimuth = orbits.since_pericentre(start)
        # one more Newton step, which squares what is left and carries the derivatives of psi
        time_slope, azimuth_slope = orbits.slopes(start)
        psi = implicit_root(start, Omega_r * time - theta_r, Omega_r * time_slope)
        return psi, azimuth + azimuth_slope.detach() * (psi - start)


class TabulatedActions(ActionFinder):
    """`SphericalActions` in one potential, with its tables: what `SphericalActions.tabulated` returns.

    Parameters
    ----------
    table
        J_r of the orbits of all stars that are asked for.
    angles
        The finder that computes angles and frequencies.
    """

    def __init__(self, table: ActionTable, angles: SphericalActions) -> None:
        self.table, self.angles = table, angles

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        """Return `SphericalActions.capped_actions`; the potential is that of the tables, whatever is given."""
        x, v = split(w)
        angular = angular_momentum(w)
        profile = self.table.profile
        phi = profile.phi_once(log_radius(radius(x)))
        energy, excess = cap_energy((v**2).sum(-1) / 2 + phi, phi, profile.escape_energy)
        J_r = self.table.radial_action(energy, angular.L)
        return CappedActions(combine_actions(first_order_only(J_r), angular), excess)

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        return self.angles.actions_angles(potential, w)

    def rough(self) -> TabulatedActions:
        """Return the same with `SphericalActions.rough`."""
        return TabulatedActions(self.table, self.angles.rough())

    def through(self, change: Callable[[Tensor], Tensor]) -> TabulatedActions:
        """Return the same with every table passed through ``change``."""
        return TabulatedActions(self.table.through(change), self.angles)
