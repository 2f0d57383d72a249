"""Actions, angles and frequencies in any spherical potential, and the inverse map."""

from __future__ import annotations

import math

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
from bayespot.actions.radial import RadialOrbits
from bayespot.actions.table import ActionTable
from bayespot.numerics import bracketed_newton, first_order_only, implicit_root
from bayespot.potential.base import Potential, radius
from bayespot.potential.profile import RadialProfile, require_spherical
from bayespot.units import takes

_LN2 = math.log(2)
#: Node spacing in ln r: cubic interpolation errors of about 1e-9 and 3e-11 of the potential's variation.
_DS_FAST, _DS_EXACT = 0.025, 0.01
#: e-foldings of radius tabulated inside the least circular radius, for the pericentres of eccentric orbits.
_INNER = 5.0
#: L + _BEYOND J_r bounds the angular momentum of the circular orbit of the same energy.
_BEYOND = 2.2


class SphericalActions(ActionFinder, TorusMap):
    r"""Action finder and torus map of every spherical potential.

    `capped_actions` and `actions` are the fast path: the potential is tabulated in ln r, J_r in two
    dimensions (`ActionTable`), and each star costs an interpolation. `actions_angles` and `phase_space`
    integrate every star's radial motion (48-point quadrature) and are mutually inverse to rounding.

    First derivatives with respect to w, J, theta and the potential's parameters are exact; differentiating
    twice raises RuntimeError (turning points inside the table are constants, which is right only once).

    Parameters
    ----------
    r_min, r_max
        Range of radii (kpc) the stars may have, which sets the tables; by default that of the stars in each
        call. Fixing it makes results independent of how stars are batched.
    margin
        How many e-foldings of radius the tables extend beyond ``r_max``; orbits that reach further continue
        in a power law. A table that ends inside the data biases large samples.
    """

    @takes(r_min="length", r_max="length", margin="number")
    def __init__(self, r_min: float | None = None, r_max: float | None = None, margin: float = 6.0) -> None:
        if r_min is not None and r_max is not None and not 0 < r_min < r_max:
            raise ValueError(f"need 0 < r_min < r_max in kpc, got r_min={r_min} and r_max={r_max}")
        self.r_min, self.r_max, self.margin = r_min, r_max, margin

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        x, v = split(w)
        angular = angular_momentum(w)
        s = radius(x).log()
        profile, s_first, s_last = self._profile(potential, s, _DS_FAST)
        table = ActionTable.of(profile, s_first, s_last)
        phi = profile.phi(s)
        energy, excess = cap_energy((v**2).sum(-1) / 2 + phi, phi, profile.escape_energy)
        J_r = table.radial_action(energy, angular.L)
        return CappedActions(combine_actions(first_order_only(J_r), angular), excess)

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        plane = orbital_plane(w)
        s = plane.r.log()
        profile, *_ = self._profile(potential, s, _DS_EXACT)
        phi = profile.phi(s)
        energy, excess = cap_energy((w[..., 3:] ** 2).sum(-1) / 2 + phi, phi, profile.escape_energy)
        orbits = RadialOrbits.of(profile, energy, plane.L)
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
        profile = self._profile_for_actions(potential, J_r.detach(), L.detach())
        orbits = RadialOrbits.of(profile, self._energy(profile, J_r, L), L)
        _, Omega_r, Omega_L = orbits.full()
        psi = self._phase(orbits, Omega_r, angles.theta_r.abs())
        time, azimuth = orbits.since_pericentre(psi)
        outward = torch.where(angles.theta_r < 0, -1.0, 1.0).to(psi)
        r = orbits.s(psi).exp()
        v_r = outward * orbits.radial_momentum(psi) / r
        lag = outward * (azimuth - Omega_L * time)
        return first_order_only(to_phase_space(r, v_r, J_phi, J_z, angles.node, angles.theta_z + lag))

    def reaches(self, potential: Potential, J: Tensor) -> Tensor:
        _, ln_lc, reached = self._scan(potential)
        J_r, J_phi, J_z = J.detach().unbind(-1)
        L = J_z + J_phi.abs()
        # where the potential overflows no circular orbit is reached
        largest = torch.where(reached, ln_lc, -torch.inf).max().exp()
        return (L + J_r > 0) & (L + _BEYOND * J_r < largest)

    @staticmethod
    @torch.no_grad()
    def _scan(potential: Potential) -> tuple[Tensor, Tensor, Tensor]:
        """ln r from 1.5e-8 to 4.9e8 kpc, ln of the circular orbit's L there, and where it is finite."""
        scan = RadialProfile.of(potential, -18.0, 20.0, 0.25)
        ln_lc = scan.ln_lc_nodes
        s = scan.s_first + scan.ds * torch.arange(len(ln_lc), dtype=ln_lc.dtype)
        return s, ln_lc, torch.isfinite(ln_lc)

    def _profile(self, potential: Potential, s: Tensor, ds: float) -> tuple[RadialProfile, float, float]:
        """Tabulate the potential over every orbit that the stars can have; r_c >= r/2 on any orbit."""
        require_spherical(potential)
        fixed = s.detach()
        finite = fixed[torch.isfinite(fixed)]
        if not len(finite):
            raise ValueError("no star has a finite, positive radius: there is nothing to compute actions of")
        s_first = (math.log(self.r_min) if self.r_min else float(finite.min())) - _LN2
        s_last = (math.log(self.r_max) if self.r_max else float(finite.max())) + self.margin
        return RadialProfile.of(potential, s_first - _INNER, s_last + _LN2, ds), s_first, s_last

    def _profile_for_actions(self, potential: Potential, J_r: Tensor, L: Tensor) -> RadialProfile:
        s, ln_lc, reached = self._scan(potential)
        low, high = float((L + J_r).min()), float((L + _BEYOND * J_r).max())
        if not (low > 0 and float(ln_lc[reached].max()) > math.log(high)):
            raise ValueError(
                f"no orbit of this potential has actions from {low:.6g} to {high:.6g} kpc km/s between "
                "1.5e-8 and 4.9e8 kpc; drop them (J = 0 is the star at rest in the centre)"
            )
        first = float(s[reached & (ln_lc <= math.log(low))].max()) if low > float(ln_lc[reached].min().exp()) else -18
        last = float(s[reached & (ln_lc >= math.log(high))].min())
        return RadialProfile.of(potential, first - _INNER, last + 1.0, _DS_EXACT)

    @staticmethod
    def _energy(profile: RadialProfile, J_r: Tensor, L: Tensor) -> Tensor:
        """Energy of the orbit with the given actions: table, then Newton on the exact quadrature."""
        with torch.no_grad():
            table = ActionTable.of(profile, profile.s_first, profile.s_last)
            s_low = profile.s_of_ln_lc(L.clamp(min=1e-12 * float((L + J_r).max())).log())

            def residual(s: Tensor) -> tuple[Tensor, Tensor]:
                lc = profile.ln_lc_at(s).exp()
                g = table.g(s, (L / lc).clamp(0, 1).sqrt())
                return (lc - L) * g - J_r, lc * g

            s_high = profile.s_of_ln_lc((L + _BEYOND * J_r).log())
            # Newton on the exact quadrature follows, so the table need not be solved to rounding
            s_c = bracketed_newton(residual, s_low, s_high, tolerance=1e-9)
            energy = profile.phi(s_c) + profile.vc2_at(s_c) / 2
            floor = profile.phi(s_low) + profile.vc2_at(s_low) / 2
            for _ in range(3):
                action, Omega_r, _ = RadialOrbits.of(profile, energy, L).full()
                energy = torch.maximum(energy + (J_r - action) * Omega_r, floor)
        action, Omega_r, _ = RadialOrbits.of(profile, energy, L).full()
        return implicit_root(energy, action - J_r, 1 / Omega_r)

    @staticmethod
    def _phase(orbits: RadialOrbits, Omega_r: Tensor, theta_r: Tensor) -> Tensor:
        """Solve Omega_r t(psi) = theta_r for psi, theta_r in [0, pi] on the way out."""
        fixed = RadialOrbits(orbits.profile, *(t.detach() for t in orbits[1:]))

        def residual(psi: Tensor) -> tuple[Tensor, Tensor]:
            time, _ = fixed.since_pericentre(psi)
            return Omega_r * time - theta_r, Omega_r * fixed.time_slope(psi)

        edge = torch.full_like(theta_r.detach(), torch.pi / 2)
        # implicit_root makes one more Newton step, which squares the remaining error
        psi = bracketed_newton(residual, -edge, edge, tolerance=1e-8)
        time, _ = orbits.since_pericentre(psi)
        return implicit_root(psi, Omega_r * time - theta_r, Omega_r * orbits.time_slope(psi))
