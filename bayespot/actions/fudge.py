"""J_r and J_z of stars by the Staeckel fudge from tables of one potential, in blocks that fit a processor's cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayespot.actions.base import CappedActions, cap_energy
from bayespot.actions.focal import FocalTable
from bayespot.actions.plane import safe_sqrt
from bayespot.actions.separated import Field, Separated
from bayespot.actions.separated_actions import radial_action, vertical_action
from bayespot.actions.spheroidal import Spheroidal, to_spheroidal
from bayespot.actions.turning import Guide, TurningPoints, turning_points
from bayespot.numerics import refuse_again
from bayespot.potential.profile import RadialProfile

#: Nodes of the two quadratures.
N_RADIAL, N_VERTICAL = 16, 10
#: Largest last step in ln x and y of the turning points, whose error is the square of it and in J squared again.
_TOLERANCE = 1e-5
#: Stars at a time.
_BLOCK = 8192
#: Radius, over that of the circular orbit, inside which hardly any orbit spends time.
_SCALE = 0.02
#: Least abs(D) over the square of that radius: formulas may divide by it, and a sphere's actions change by it.
_LEAST_D = 1e-18


class Motion(NamedTuple):
    """Stars whose motion separates: their coordinates, integrals, where to look for turning points, excess energy."""

    star: Spheroidal
    separated: Separated
    guide: Guide
    excess: Tensor


@dataclass(frozen=True)
class Surroundings:
    """What the fudge needs of a potential: Phi, focal distances, and the circular orbits in the plane."""

    field: Any
    focal: FocalTable
    profile: RadialProfile

    def through(self, change: Callable[[Tensor], Tensor]) -> Surroundings:
        """Return the same with the numbers of every table passed through ``change``."""
        return replace(
            self,
            field=self.field.through(change),
            focal=self.focal.through(change),
            profile=self.profile.through(change),
        )

    def motion(self, w: Tensor) -> Motion:
        """Return the separated motion of stars ``w (n, 6)``; the unbound are slowed down until they are not."""
        field: Field = self.field
        R2 = w[..., 0] ** 2 + w[..., 1] ** 2
        phi = field.phi(safe_sqrt(R2), w[..., 2])
        kinetic = (w[..., 3:] ** 2).sum(-1) / 2
        energy, excess = cap_energy(kinetic + phi, phi, self.profile.escape_energy)
        unbound = excess > 0
        if bool(unbound.any()):
            slower = torch.where(unbound, energy - phi, kinetic)
            factor = torch.where(unbound, slower / torch.where(unbound, kinetic, 1.0), 1.0).sqrt()
            w = torch.cat([w[..., :3], factor[..., None] * w[..., 3:]], -1)
            kinetic = slower
        D = self.focal.at(self.profile.circular(energy)[0]) if self.focal.varies else self.focal.at(energy)
        guide = Guide.of(self.profile, energy.detach())
        least = _LEAST_D * (2 * guide.s_c).exp()
        star = to_spheroidal(w, torch.where(D.abs() < least, least + D - D.detach(), D))
        return Motion(star, Separated.of(field, star, energy, kinetic, _SCALE * guide.s_c.exp()), guide, excess)

    def actions(self, w: Tensor, points: TurningPoints | None) -> tuple[CappedActions, TurningPoints]:
        """Return J of stars ``w (n, 6)``, and the turning points unless they are known."""
        star, separated, guide, excess = self.motion(w)
        if points is None:
            points = turning_points(separated.detached(), guide, _TOLERANCE)
        J_r = radial_action(separated, points, N_RADIAL)
        J_z = vertical_action(separated, points, N_VERTICAL)
        return CappedActions(torch.stack([J_r, star.Lz, J_z], -1), excess), points


def blockwise_actions(tables: Surroundings, w: Tensor) -> CappedActions:
    """Return J of stars ``w (*batch, 6)``, differentiable once by w and all tables.

    Values and derivatives are made block by block: memory does not grow with the number of nodes.
    """
    parts: list[Tensor] = []
    tables.through(lambda part: parts.append(part) or part)  # type: ignore[func-returns-value]
    J, excess = _Blockwise.apply(tables, w.reshape(-1, 6), *parts)
    return CappedActions(J.reshape(*w.shape[:-1], 3), excess.reshape(w.shape[:-1]))


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tables: Surroundings, w: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        fixed = tables.through(torch.Tensor.detach)
        found, points = zip(*(fixed.actions(block, None) for block in w.split(_BLOCK)), strict=True)
        ctx.tables = tables
        ctx.save_for_backward(w, *(torch.cat(column) for column in zip(*points, strict=True)), *parts)
        return torch.cat([one.J for one in found]), torch.cat([one.excess for one in found])

    @staticmethod
    def backward(ctx: Any, grad_J: Tensor, grad_excess: Tensor) -> tuple[Tensor | None, ...]:
        w, *saved = ctx.saved_tensors
        points, parts = saved[:4], saved[4:]
        wanted = ctx.needs_input_grad[1:]
        leaves = [part.detach().requires_grad_(want) for part, want in zip(parts, wanted[1:], strict=True)]
        remaining = iter(leaves)
        tables = ctx.tables.through(lambda _: next(remaining))
        wanted_leaves = [leaf for leaf in leaves if leaf.requires_grad]
        sums: list[Tensor | None] = [None] * len(wanted_leaves)
        of_w = []
        for star, g_J, g_excess, *at in zip(
            *(part.split(_BLOCK) for part in (w, grad_J, grad_excess, *points)), strict=True
        ):
            with torch.enable_grad():
                star = star.detach().requires_grad_(wanted[0])
                (J, excess), _ = tables.actions(star, TurningPoints(*at))
                value = (J * g_J).sum() + (excess * g_excess).sum()
            asked = ([star] if wanted[0] else []) + wanted_leaves
            found = list(torch.autograd.grad(value, asked, allow_unused=True))
            if wanted[0]:
                of_w.append(found.pop(0))
            sums = [
                new if old is None else old if new is None else old + new for old, new in zip(sums, found, strict=True)
            ]
        totals = iter(sums)
        gradients = [next(totals) if want else None for want in wanted[1:]]
        refused = [None if g is None else refuse_again(g, part) for g, part in zip(gradients, parts, strict=True)]
        return None, refuse_again(torch.cat(of_w), w) if wanted[0] else None, *refused
