"""A spherical potential tabulated in ln r: what makes the cost per star independent of the network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayespot.numerics import (
    cubic_coefficients,
    gather_rows,
    horner,
    horner_slope,
    implicit_root,
    inverted_cubics,
    node_slopes,
    piecewise,
    powered,
)
from bayespot.potential.base import Potential
from bayespot.units import takes, takes_tensors

#: Nodes, and their spacing in ln r, from which the limit of Phi at infinity is told.
_N_FAR, _DS_FAR = 5, 0.25
#: d ln v_c^2 / d ln r above which the potential has no limit at infinity: the mass grows as r at least.
_LEAST_FALL = -1e-6
#: A star at rest in the centre has this in place of -1, for which the logarithm is infinite.
_LEAST_ARGUMENT = -1 + 1e-15


def _table(compute: Callable[[Any], Tensor]) -> cached_property[Tensor]:
    """Make a property that is computed when first asked for, with the graph that its profile was made with.

    First touched inside no_grad it would else stay without one.
    """

    @functools.wraps(compute)
    def computed(profile: RadialProfile) -> Tensor:
        with torch.set_grad_enabled(profile.keeps_graph):
            return compute(profile)

    return cached_property(computed)


@takes(s_first="number", ds="number")
@takes_tensors(phi_nodes="potential", vc2="potential", limit="potential")
@dataclass(frozen=True)
class RadialProfile:
    r"""Potential and circular orbits on a uniform grid in s = ln r, power-law mass beyond both ends.

    Between nodes cubic Hermite interpolation (error about ``ds**4 / 384`` times the fourth derivative);
    beyond the grid :math:`v_c^2 \propto r^{q}` with the edge's own q, so a table that ends where the mass
    is constant continues as Kepler's.

    Parameters
    ----------
    s_first, ds
        First node and spacing.
    phi, vc2 : Float[Tensor, "n"]
        Potential and :math:`v_c^2 = d\Phi/ds` at the nodes in (km/s)^2.
    limit : Float[Tensor, ""], optional
        :math:`\Phi(\infty)`, infinite where the potential has no limit; by default that of the power law at the
        last node.
    keeps_graph
        Whether what follows from the nodes can be differentiated by them; as autograd is set, unless given.
    """

    s_first: float
    ds: float
    phi_nodes: Tensor
    vc2: Tensor
    limit: Tensor | None = None
    keeps_graph: bool = field(default_factory=torch.is_grad_enabled)

    @classmethod
    @takes(s_first="number", s_last="number", ds="number", s_far="number")
    @takes_tensors(limit="potential")
    def of(
        cls,
        potential: Potential,
        s_first: float,
        s_last: float,
        ds: float = 0.05,
        s_far: float | None = None,
        limit: Tensor | None = None,
        radial: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> RadialProfile:
        """Tabulate a spherical potential at all multiples of ``ds`` from ``s_first`` to ``s_last`` (ln kpc).

        Nodes are multiples of ``ds``, so that two profiles of one potential agree wherever both have nodes. The
        limit at infinity is that of the power law at ``s_far``, or ``limit``. ``radial`` is what the potential's
        `Potential.radial` returned, if it has been asked already.
        """
        require_spherical(potential)
        first = math.floor(s_first / ds + 1e-9)
        n = max(math.ceil(s_last / ds - 1e-9) - first + 1, 8)
        s = ds * torch.arange(first, first + n, dtype=torch.float64)
        if s_far is not None:
            s = torch.cat([s, s_far + _DS_FAR * torch.arange(_N_FAR, dtype=torch.float64)])
        phi, vc2 = (radial or potential.phi_and_vc2)(s.exp())
        if s_far is not None:
            q = node_slopes(vc2[n:].log(), width=_N_FAR)[-1] / _DS_FAR
            limit = _limit(phi[-1], vc2[-1], q)
        return cls(first * ds, ds, phi[:n], vc2[:n], limit)

    def through(self, change: Callable[[Tensor], Tensor]) -> RadialProfile:
        """Return the profile with its nodes, and all that follows from them, passed through ``change``."""
        limit = None if self.limit is None else change(self.limit)
        new = RadialProfile(self.s_first, self.ds, change(self.phi_nodes), change(self.vc2), limit, self.keeps_graph)
        for name, table in vars(type(self)).items():
            if isinstance(table, cached_property) and name not in ("s_nodes", "escape_energy"):
                new.__dict__[name] = change(getattr(self, name))
        new.__dict__["escape_energy"] = change(self.escape_energy) if limit is None else limit
        return new

    @property
    def s_last(self) -> float:
        return self.s_first + self.ds * (len(self.vc2) - 1)

    @cached_property
    def s_nodes(self) -> Tensor:
        """ln(r/kpc) of the nodes."""
        return self.s_first + self.ds * torch.arange(len(self.vc2), dtype=self.vc2.dtype)

    @_table
    def ln_vc2_slope(self) -> Tensor:
        """d ln v_c^2 / ds at the nodes."""
        return node_slopes(self.vc2.log(), width=5) / self.ds

    @_table
    def phi_cubics(self) -> Tensor:
        """Coefficients (n - 1, 4) of Phi in each cell, see `numerics.cubic_coefficients`."""
        return cubic_coefficients(self.phi_nodes, self.vc2 * self.ds)

    @_table
    def circular_cubics(self) -> Tensor:
        """Rows of eight: the cubics of E_c(s) and of ln L_c(s)."""
        rise = (1 + self.ln_vc2_slope / 2) * self.ds
        energy = cubic_coefficients(self.energy_nodes, self.vc2 * rise)
        return torch.cat([energy, cubic_coefficients(self.ln_lc_nodes, rise)], -1)

    @_table
    def energy_nodes(self) -> Tensor:
        """Energy of the circular orbit at each node, (km/s)^2."""
        return self.phi_nodes + self.vc2 / 2

    @_table
    def ln_lc_nodes(self) -> Tensor:
        """ln of the circular orbit's angular momentum (kpc km/s) at each node."""
        return self.s_nodes + self.vc2.log() / 2

    @_table
    def escape_energy(self) -> Tensor:
        r"""Limit of :math:`\Phi` at infinity; infinite where the mass grows at least as r."""
        if self.limit is not None:
            return self.limit
        return _limit(self.phi_nodes[-1], self.vc2[-1], self.ln_vc2_slope[-1])

    def _cell(self, s: Tensor) -> tuple[Tensor, Tensor]:
        position = (s.detach() - self.s_first) / self.ds
        index = position.long().clamp(0, len(self.vc2) - 2)
        return index, (s - self.s_first) / self.ds - index

    @takes_tensors(s="number")
    def nodes_at(self, s: Tensor) -> Tensor:
        """Return the indices of the nodes at s, which is on nodes."""
        return ((s - self.s_first) / self.ds).round().long().clamp(0, len(self.vc2) - 1)

    def _covers(self, s: Tensor) -> bool:
        return bool(((s >= self.s_first) & (s <= self.s_last)).all())

    @takes_tensors(s="number")
    def phi(self, s: Tensor) -> Tensor:
        r"""Return :math:`\Phi` at s = ln(r/kpc)."""
        if self._covers(s):
            index, u = self._cell(s)
            return horner(gather_rows(self.phi_cubics, index), u)
        # the branch that is not taken must not overflow: its derivative would be NaN
        index, u = self._cell(s.clamp(self.s_first, self.s_last))
        inside = horner(gather_rows(self.phi_cubics, index), u)
        q = self.ln_vc2_slope
        below = self.phi_nodes[0] + self.vc2[0] * powered((s - self.s_first).clamp(max=0), q[0])
        above = self.phi_nodes[-1] + self.vc2[-1] * powered((s - self.s_last).clamp(min=0), q[-1])
        return torch.where(s < self.s_first, below, torch.where(s > self.s_last, above, inside))

    @takes_tensors(s="number")
    def phi_once(self, s: Tensor) -> Tensor:
        """Return `phi`, differentiable once: for many stars, with less memory for its gradient."""
        if not self._covers(s):
            return self.phi(s)
        index, u = self._cell(s)
        return piecewise(self.phi_cubics, index.reshape(-1), u.reshape(-1)).reshape(s.shape)

    @takes_tensors(s="number")
    def vc2_at(self, s: Tensor) -> Tensor:
        """Return d Phi/ds = v_c^2 at s, the derivative of what `phi` returns."""
        index, u = self._cell(s.clamp(self.s_first, self.s_last))
        inside = horner_slope(gather_rows(self.phi_cubics, index), u) / self.ds
        q = self.ln_vc2_slope
        below = self.vc2[0] * torch.exp(q[0] * (s - self.s_first).clamp(max=0))
        above = self.vc2[-1] * torch.exp(q[-1] * (s - self.s_last).clamp(min=0))
        return torch.where(s < self.s_first, below, torch.where(s > self.s_last, above, inside))

    @takes_tensors(s="number")
    def phi_and_vc2(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return `phi` and `vc2_at` at s in one pass, for s inside the grid; elsewhere one after the other."""
        if not self._covers(s):
            return self.phi(s), self.vc2_at(s)
        index, u = self._cell(s)
        cubics = gather_rows(self.phi_cubics, index)
        return horner(cubics, u), horner_slope(cubics, u) / self.ds

    @takes_tensors(s="number")
    def ln_lc_at(self, s: Tensor) -> Tensor:
        """Return ln L_c of the circular orbit at s."""
        return s + self.vc2_at(s).log() / 2

    @takes_tensors(energy="potential")
    def circular(self, energy: Tensor) -> tuple[Tensor, Tensor]:
        """Return (s_c, ln L_c) of the circular orbit of the given energy, by inverse interpolation.

        First derivatives follow the implicit-function theorem. The energy must lie below
        `escape_energy` and above the potential's minimum.
        """
        nodes = self.energy_nodes.detach()
        fixed = energy.detach()
        index = (torch.searchsorted(nodes, fixed.contiguous()) - 1).clamp(0, len(nodes) - 2)
        rows = gather_rows(self.circular_cubics, index)
        cubic, ln_lc = rows[..., :4], rows[..., 4:]
        u = inverted_cubics(cubic.detach(), fixed)
        u = implicit_root(u, horner(cubic, u) - energy, horner_slope(cubic.detach(), u))
        s_c, ln_l = self.s_first + self.ds * (index + u), horner(ln_lc, u)
        below, above = fixed < nodes[0], fixed > nodes[-1]
        if bool((below | above).any()):
            for outside, edge in ((below, 0), (above, -1)):
                # power law: E - Phi_edge = v^2 [(e^{q d} - 1)/q + e^{q d}/2], solved for d = s - s_edge
                q = self.ln_vc2_slope[edge]
                q = torch.where(q.abs() < 1e-7, torch.full_like(q, 1e-7), q)
                excess = torch.where(outside, (energy - self.phi_nodes[edge]) / self.vc2[edge], 0.5)
                # at the bottom of a potential of finite depth r_c and the argument's distance from -1 vanish
                d = torch.log1p((q * (excess - 0.5) / (1 + q / 2)).clamp(min=_LEAST_ARGUMENT)) / q
                s_edge = self.s_first if edge == 0 else self.s_last
                s_c = torch.where(outside, s_edge + d, s_c)
                ln_l = torch.where(outside, self.ln_lc_nodes[edge] + (1 + q / 2) * d, ln_l)
        return s_c, ln_l

    @takes_tensors(phi="potential")
    @torch.no_grad()
    def s_of_phi(self, phi: Tensor) -> Tensor:
        r"""Return s = ln r where the potential has the value ``phi``, without gradients."""
        index = (torch.searchsorted(self.phi_nodes, phi.contiguous()) - 1).clamp(0, len(self.phi_nodes) - 2)
        s = self.s_first + self.ds * (index + inverted_cubics(gather_rows(self.phi_cubics, index), phi))
        below, above = phi < self.phi_nodes[0], phi > self.phi_nodes[-1]
        if bool((below | above).any()):
            for outside, edge, s_edge in ((below, 0, self.s_first), (above, -1, self.s_last)):
                # power law: Phi - Phi_edge = v^2 (e^{q d} - 1)/q, solved for d = s - s_edge
                q = self.ln_vc2_slope[edge]
                q = torch.where(q.abs() < 1e-7, torch.full_like(q, 1e-7), q)
                rise = (phi - self.phi_nodes[edge]) / self.vc2[edge]
                s = torch.where(outside, s_edge + torch.log1p((q * rise).clamp(min=_LEAST_ARGUMENT)) / q, s)
        return s

    @takes_tensors(ln_lc="number")
    @torch.no_grad()
    def s_of_ln_lc(self, ln_lc: Tensor) -> Tensor:
        """Return s = ln r of the circular orbit with angular momentum exp(ln_lc), on the grid, without gradients."""
        index = (torch.searchsorted(self.ln_lc_nodes, ln_lc.contiguous()) - 1).clamp(0, len(self.vc2) - 2)
        cubics = gather_rows(self.circular_cubics, index)[..., 4:]
        return self.s_first + self.ds * (index + inverted_cubics(cubics, ln_lc))


def _limit(phi: Tensor, vc2: Tensor, q: Tensor) -> Tensor:
    r"""Limit of :math:`\Phi` at infinity where :math:`v_c^2 \propto r^q` from here on."""
    falls = q < _LEAST_FALL
    return torch.where(falls, phi - vc2 / torch.where(falls, q, -1.0), torch.inf)


def require_spherical(potential: Potential) -> None:
    """Raise ValueError unless the potential is spherical."""
    if potential.symmetry != "spherical":
        raise ValueError(
            f"{type(potential).__name__} is {potential.symmetry}: spherical actions need a spherical potential; "
            "use one with symmetry='spherical', or StaeckelFudge for an axisymmetric potential"
        )
