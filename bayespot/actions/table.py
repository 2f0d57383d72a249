"""Radial actions of every orbit of a spherical potential, tabulated and interpolated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayespot.numerics import (
    bicubic_coefficients,
    bracketed_newton,
    gather_rows,
    horner,
    horner_slope,
    inverted_cubics,
    midpoint_angles,
    power_sums,
    refuse_again,
)
from bayespot.potential.profile import RadialProfile

_N_ETA = 20  # cells in y = sqrt(L/L_c)
_N_QUADRATURE = 16
_ROW = 0.25  # distance of rows in s_c
#: Least L_c - L over L_c.
_LEAST_GAP = 1e-12
_FEWEST = 8  # rows, for the slopes' seven-point differences


@dataclass(frozen=True)
class ActionTable:
    r"""Bicubic table of :math:`g = J_r / (L_c - L)` over (s_c, y), :math:`y = \sqrt{L/L_c(E)}`.

    s_c is ln of the radius of the circular orbit with the same energy. g runs from 1 (Kepler) to 1/2
    (harmonic), tends to :math:`(1+\gamma)^{-1/2}` for circular orbits, and is smooth everywhere, so J_r is
    positive and vanishes on circular orbits by construction. It is even in y, which resolves the layer at
    small L where orbits begin to feel the centre.
    """

    profile: RadialProfile
    coefficients: Tensor
    s_first: float
    ds: float
    n_s: int

    @classmethod
    def of(cls, profile: RadialProfile, s_first: float, s_last: float) -> ActionTable:
        """Integrate J_r on nodes of the profile between ``s_first`` and ``s_last`` (16-point quadrature)."""
        # rows are multiples of their distance, the same for all stars, from the last before s_first on
        stride = max(round(_ROW / profile.ds), 1)
        row = stride * profile.ds
        offset = round(profile.s_first / profile.ds)
        first = max(math.floor(s_first / row + 1e-9), math.ceil(offset / stride))
        last = min(math.ceil(s_last / row - 1e-9), (offset + len(profile.vc2) - 1) // stride)
        first = min(first, last - _FEWEST + 1)
        nodes = stride * torch.arange(first, last + 1) - offset
        ln_lc = profile.ln_lc_nodes[nodes, None]
        energy = profile.energy_nodes[nodes, None]
        s_c = profile.s_first + profile.ds * nodes[:, None].to(energy.dtype)
        y = torch.arange(1, _N_ETA, dtype=energy.dtype) / _N_ETA
        eta = y**2
        eccentric = _radial_action(profile, energy, ln_lc, s_c, eta)
        g = torch.cat(
            [
                _radial_orbit_action(profile, energy) / ln_lc.exp(),
                eccentric / (ln_lc.exp() * (1 - eta)),
                (2 + profile.ln_vc2_slope[nodes, None]).rsqrt(),
            ],
            -1,
        )
        return cls(
            profile,
            bicubic_coefficients(g, even_start=True),
            float(s_c[0]),
            row,
            len(nodes),
        )

    def through(self, change: Callable[[Tensor], Tensor]) -> ActionTable:
        """Return the table with all its numbers, and those of its profile, passed through ``change``."""
        return replace(self, profile=self.profile.through(change), coefficients=change(self.coefficients))

    def g(self, s_c: Tensor, y: Tensor) -> Tensor:
        """Interpolate g; beyond the last node it is extrapolated."""
        s = s_c.clamp(self.s_first, self.s_first + self.ds * (self.n_s - 1))
        u = (s - self.s_first) / self.ds
        i = u.detach().long().clamp(0, self.n_s - 2)
        t = y * _N_ETA
        j = t.detach().long().clamp(0, _N_ETA - 1)
        c = gather_rows(self.coefficients, i * _N_ETA + j)
        g = horner(horner(c.unflatten(-1, (4, 4)).mT, (u - i)[..., None]), t - j)
        beyond = s_c - s
        if bool((beyond > 0).any()):
            # Keplerian orbits approach g = 1 as r^(-1/2); in any other power law g no longer changes
            kepler = self.profile.ln_vc2_slope[-1] < -0.9
            g = torch.where(kepler, 1 + (g - 1) * torch.exp(-0.5 * beyond.clamp(min=0)), g)
        return g

    def radial_action(self, energy: Tensor, L: Tensor) -> Tensor:
        """Return J_r (kpc km/s) of orbits with energy (km/s)^2 and angular momentum L (kpc km/s), to first order."""
        profile = self.profile
        nodes = profile.energy_nodes.detach()
        ends = profile.ln_lc_nodes.new_tensor([self.s_first, self.s_first + self.ds * (self.n_s - 1)])
        low, high = nodes[profile.nodes_at(ends)].tolist()
        fixed = energy.detach()
        if bool(((fixed >= low) & (fixed <= high)).all()):
            constants = (profile.s_first, profile.ds, self.s_first, self.ds, self.n_s)
            flat = (energy.reshape(-1), L.reshape(-1), profile.circular_cubics, self.coefficients)
            return _InterpolatedAction.apply(*flat, nodes, constants).reshape(energy.shape)
        s_c, ln_lc = profile.circular(energy)
        lc = ln_lc.exp()
        # rounding may put L a hair above L_c; J_r stays positive so that ln J_r exists
        gap = torch.clamp(lc - L, min=_LEAST_GAP * lc.detach())
        y = (L / lc).clamp(1e-30, 1).sqrt()
        return gap * self.g(s_c, y)


class _InterpolatedAction(torch.autograd.Function):
    """`ActionTable.radial_action` inside the table in one piece, with less memory for its gradient.

    The derivatives with respect to E, L and both tables are those of the interpolants, with the circular orbit's place
    by the implicit-function theorem.
    """

    @staticmethod
    def forward(
        ctx: Any, energy: Tensor, L: Tensor, circular: Tensor, coefficients: Tensor, nodes: Tensor, constants: Any
    ) -> Tensor:
        s_profile, ds_profile, s_table, ds_table, n_s = constants
        index = (torch.searchsorted(nodes, energy) - 1).clamp(0, len(nodes) - 2)
        rows = circular.index_select(0, index)
        of_energy, of_ln_lc = rows[:, :4], rows[:, 4:]
        u = inverted_cubics(of_energy, energy)
        lc = horner(of_ln_lc, u).exp()
        # rounding may put L a hair above L_c; J_r stays positive so that ln J_r exists
        gap = torch.clamp(lc - L, min=0) + _LEAST_GAP * lc
        y = (L / lc).clamp(1e-30, 1).sqrt()
        v = (s_profile + ds_profile * (index + u) - s_table) / ds_table
        i = v.long().clamp(0, n_s - 2)
        t = y * _N_ETA
        j = t.long().clamp(0, _N_ETA - 1)
        v, t, cell = v - i, t - j, i * _N_ETA + j
        along = coefficients.index_select(0, cell).unflatten(-1, (4, 4)).mT
        of_t = horner(along, v[:, None])
        g = horner(of_t, t)
        if any(ctx.needs_input_grad):
            by_y = gap * horner_slope(of_t, t) * _N_ETA
            by_s = gap * horner(horner_slope(along, v[:, None]), t) / ds_table
            by_ln_lc = lc * g - by_y * y / 2
            by_energy = (by_ln_lc * horner_slope(of_ln_lc, u) + by_s * ds_profile) / horner_slope(of_energy, u)
            by_L = by_y * y / (2 * L.clamp(min=1e-300)) - g
            ctx.save_for_backward(circular, coefficients, index, u, cell, v, t, gap, by_energy, by_ln_lc, by_L)
        return gap * g

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        circular, coefficients, index, u, cell, v, t, gap, by_energy, by_ln_lc, by_L = ctx.saved_tensors
        energy, table, cubics = grad * by_energy, None, None
        if ctx.needs_input_grad[2]:
            shape = (len(circular), 4)
            sums = [power_sums(index, weight, u, shape) for weight in (-energy, grad * by_ln_lc)]
            cubics = refuse_again(torch.cat(sums, -1), circular)
        if ctx.needs_input_grad[3]:
            weight, sums = grad * gap, []
            for _ in range(4):
                sums.append(power_sums(cell, weight, t, (len(coefficients), 4)))
                weight = weight * v
            table = refuse_again(torch.cat(sums, -1), coefficients)
        return energy, grad * by_L, cubics, table, None, None


def _radial_action(profile: RadialProfile, energy: Tensor, ln_lc: Tensor, s_c: Tensor, eta: Tensor) -> Tensor:
    """(1/pi) int p_r dr = (1/pi) int sqrt(F) ds, F = 2 (E - Phi) r^2 - L^2, turning points detached."""
    l2 = (ln_lc.exp() * eta) ** 2
    s_peri, s_apo = _turning_points_of_rows(profile, energy.detach(), l2.detach(), s_c)
    psi = midpoint_angles(_N_QUADRATURE)
    half = (s_apo - s_peri)[..., None] / 2
    s = (s_apo + s_peri)[..., None] / 2 + half * psi.sin()
    f = 2 * (energy[..., None] - profile.phi(s)) * (2 * s).exp() - l2[..., None]
    weight = half * psi.cos() / _N_QUADRATURE
    # F cannot be negative between turning points; rounding next to a circular orbit must not give NaN
    return (f.clamp(min=1e-300).sqrt() * weight).sum(-1)


def _radial_orbit_action(profile: RadialProfile, energy: Tensor) -> Tensor:
    """J_r at L = 0: with s = s_apo - tau^2 the integrand is even and decays like a Gaussian."""
    step = 0.2
    # midpoints: the derivative's integrand, unlike J_r's, does not vanish at tau = 0
    tau2 = (step * (torch.arange(26, dtype=energy.dtype) + 0.5)) ** 2
    s = profile.s_of_phi(energy.detach()) - tau2
    speed = (2 * (energy - profile.phi(s))).clamp(min=1e-300).sqrt()
    return ((speed * s.exp() * tau2.sqrt()).sum(-1, keepdim=True)) * (2 * step / torch.pi)


@torch.no_grad()
def _turning_points_of_rows(profile: RadialProfile, energy: Tensor, l2: Tensor, s_c: Tensor) -> tuple[Tensor, Tensor]:
    """Return `turning_points` of orbits of one energy (n, 1) and several L^2 (n, m), by inverse interpolation.

    2 (E - Phi) r^2 at all nodes brackets every root at once, and Newton's method stays in its cell; the
    root finder, which brackets each orbit anew, serves only orbits beyond the profile.
    """
    s = profile.s_nodes
    f = 2 * (energy - profile.phi_nodes) * (2 * s).exp()
    outside = s > s_c
    inner = torch.searchsorted(torch.where(outside, torch.inf, f), l2) - 1
    outer = torch.searchsorted(torch.where(outside, -f, -torch.inf), -l2) - 1
    if bool(((inner < 0) | (outer > len(s) - 2)).any()):
        return turning_points(profile, energy, l2, s_c)
    index = torch.stack([inner, outer])
    cubics = gather_rows(profile.phi_cubics, index)
    s_cell = profile.s_first + profile.ds * index.to(energy)
    f = f.expand(2, *f.shape)
    start, end = f.gather(-1, index), f.gather(-1, index + 1)
    u = ((l2 - start) / (end - start)).clamp(0, 1)
    for _ in range(3):  # the cell is short: quadratic convergence from the secant on
        centrifugal = l2 * (-2 * (s_cell + profile.ds * u)).exp()
        excess = 2 * (energy - horner(cubics, u)) - centrifugal
        u = (u - excess / (2 * (profile.ds * centrifugal - horner_slope(cubics, u)))).clamp(0, 1)
    peri, apo = s_cell + profile.ds * u
    return peri, apo


@torch.no_grad()
def turning_points(
    profile: RadialProfile, energy: Tensor, l2: Tensor, s_c: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return ln r of pericentre and apocentre, without gradients.

    Roots of ln[2 (E - Phi) r^2 / L^2] within the circular radius s_c and of 2 (E - Phi) - (L/r)^2 outside, which are
    nearly straight in ln r there. Sought from ``start`` (2, ...), by default from :math:`r^p = r_c^p (1 \mp e)` with
    :math:`e^2 = 1 - (L/L_c)^2` and :math:`p^2 = 2 + d\ln v_c^2/d\ln r` at r_c, which holds for Kepler's, for harmonic
    and for nearly circular orbits.
    """
    s_c = s_c.expand(torch.broadcast_shapes(s_c.shape, l2.shape))
    ln_l2 = l2.log()
    ln_eta = (ln_l2 / 2 - profile.ln_lc_at(s_c)).clamp(max=0)

    def rising(s: Tensor) -> tuple[Tensor, Tensor]:
        phi, vc2 = profile.phi_and_vc2(s)
        kinetic = 2 * (energy - phi)
        inner = kinetic[0].clamp(min=1e-300)
        centrifugal = l2 * (-2 * s[1]).exp()
        value = torch.stack([inner.log() + 2 * s[0] - ln_l2, centrifugal - kinetic[1]])
        return value, torch.stack([2 - 2 * vc2[0] / inner, 2 * (vc2[1] - centrifugal)])

    # the apocentre is at most 2 r_c (Kepler's radial orbit)
    low, high = torch.stack([s_c + 4 * ln_eta - 4, s_c]), torch.stack([s_c, s_c + 0.7])
    if start is None:
        e2 = -torch.expm1(2 * ln_eta)
        e = e2.sqrt()
        power = (2 + profile.ln_vc2_slope[profile.nodes_at(s_c)]).sqrt()
        # 1 - e without its cancellation
        start = s_c + torch.stack([2 * ln_eta - torch.log1p(e), torch.log1p(e)]) / power
    # Newton squares the last step's error, and that of J_r is of second order in the turning points'
    peri, apo = bracketed_newton(rising, low, high, start=start, tolerance=1e-9)
    return peri, apo
