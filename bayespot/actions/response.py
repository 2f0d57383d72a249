r"""How the actions of stars change with the potential: the derivatives of J by Phi wherever the fudge asks for it.

At fixed w and turning points (whose first-order change does not matter) J depends on the potential through Phi at the
star, at the quadratures' nodes, and where the circular orbit of the star's energy is, from which Delta is read. With
those derivatives and the change of Phi by a parameter, tabulated once for all stars, dJ/da is one product of a sparse
matrix with a table, for all parameters together. What a table of focal distances itself changes is not in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from bayespot.actions.focal import FocalTable
from bayespot.actions.fudge import Surroundings
from bayespot.actions.meridional import TabulatedField

#: Stars at a time.
_BLOCK = 4096
#: Step in ln R of differences in the plane.
_SHIFT = 0.02


class Response(NamedTuple):
    """Actions ``J (n, 3)`` and excess energy ``(n,)`` of stars, and their derivatives by each parameter of Phi.

    ``of_J`` ``(n, 2, k)`` are those of J_r and J_z (L_z has none), ``of_excess`` ``(n, k)``.
    """

    J: Tensor
    excess: Tensor
    of_J: Tensor
    of_excess: Tensor


def response(tables: Surroundings, w: Tensor, changes: Tensor) -> Response:
    """Return how the actions of stars respond to changes of the potential.

    Parameters
    ----------
    tables
        The potential.
    w : Float[Tensor, "n 6"]
        Stars.
    changes : Float[Tensor, "n_nodes k"]
        dPhi/da of every parameter at the nodes of the tabulated field, see `TabulatedField.nodes`.
    """
    fixed = tables.through(torch.Tensor.detach)
    with torch.enable_grad():
        parts = [_of_block(fixed, block, changes) for block in w.split(_BLOCK)]
    return Response(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _of_block(tables: Surroundings, w: Tensor, changes: Tensor) -> Response:
    asked: list[_Asked] = []
    focal = _Focal(tables.focal)
    probed = replace(tables, field=_Probe(tables.field, asked), focal=cast("FocalTable", focal))
    (J, excess), _ = probed.actions(w, None)
    circular = focal.circular_orbits(asked)
    values = [one.value for one in asked] + [focal.leaf for _ in circular[:1]]
    places = [(one.stars, *tables.field.stencil(one.R, one.z)) for one in asked + circular]
    rows = []
    for column in (J[:, 0], J[:, 2], excess):
        slopes: list[Tensor | None] = [None] * len(values)
        if column.requires_grad:
            slopes = list(torch.autograd.grad(column.sum(), values, retain_graph=True, allow_unused=True))
        if circular:
            by_s = slopes.pop()
            slopes += [None if by_s is None else by_s * weight for weight in focal.weights]
        rows.append(_product(places, slopes, len(w), changes))
    return Response(J.detach(), excess.detach(), torch.stack(rows[:2], 1).detach(), rows[2].detach())


class _Focal:
    """Focal distances that note down for which circular orbits they are asked, and give a leaf to differentiate by."""

    def __init__(self, focal: FocalTable) -> None:
        self.focal, self.varies = focal, focal.varies
        self.s: Tensor | None = None
        self.leaf = focal.squares
        #: Derivatives of s_c by Phi at each of the places of `circular_orbits`.
        self.weights: list[Tensor] = []

    def at(self, s: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not self.varies:
            return self.focal.at(s)
        self.s, self.leaf = s, s.detach().requires_grad_()
        return self.focal.at(self.leaf)

    def circular_orbits(self, asked: Sequence[_Asked]) -> list[_Asked]:
        r"""Return the star, and places in the plane, on whose Phi s_c of the star's energy depends.

        :math:`d s_c = (ds_c/dE) [d\Phi_\star - d\Phi - \frac12 d(R\, \partial\Phi/\partial R)]`, the last two at s_c.
        """
        if self.s is None or not self.s.requires_grad:
            return []
        star = asked[0]
        (slope,) = torch.autograd.grad(self.s.sum(), star.value, retain_graph=True)
        s = self.leaf.detach()
        shifts = (0.0, _SHIFT, -_SHIFT)
        plane = [_Asked(None, (s + shift).exp(), torch.zeros_like(s), s) for shift in shifts]
        self.weights = [slope, -slope, -slope / (4 * _SHIFT), slope / (4 * _SHIFT)]
        return [star, *plane]


class _Asked(NamedTuple):
    """Where some of the stars (None: all) asked for Phi, and what they got."""

    stars: Tensor | None
    R: Tensor
    z: Tensor
    value: Tensor


class _Probe:
    """A field that notes down where it is asked for Phi, and gives values by which one may differentiate."""

    def __init__(self, field: TabulatedField, asked: list[_Asked], stars: Tensor | None = None) -> None:
        self.field, self.asked, self.stars = field, asked, stars

    def taken(self, index: Tensor) -> _Probe:
        return _Probe(self.field, self.asked, index if self.stars is None else self.stars[index])

    def phi(self, R: Tensor, z: Tensor) -> Tensor:
        R, z = torch.broadcast_tensors(R, z)
        if not torch.is_grad_enabled():
            return self.field.phi(R, z)
        phi, by_ln_R, by_ln_z = self.field.slopes(R.detach(), z.detach())
        self.asked.append(_Asked(self.stars, R.detach(), z.detach(), phi.requires_grad_()))
        # places depend on Delta
        return phi + _relative(R) * by_ln_R + _relative(z) * by_ln_z

    def slopes(self, R: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.field.slopes(R, z)


def _relative(x: Tensor) -> Tensor:
    """Return zero, with the derivatives of ln x."""
    fixed = x.detach()
    return (x - fixed) / torch.where(fixed == 0, 1.0, fixed)


#: Stars that asked (None: all), the nodes about each place and their weights.
_Place: TypeAlias = tuple[Tensor | None, Tensor, Tensor]


def _product(places: Sequence[_Place], slopes: Sequence[Tensor | None], n: int, changes: Tensor) -> Tensor:
    """Return the change ``(n, k)`` of what has these slopes by the values at the places."""
    total = changes.new_zeros(n, changes.shape[1])
    used = [(place, slope) for place, slope in zip(places, slopes, strict=True) if slope is not None]
    if whole := [pair for pair in used if pair[0][0] is None]:
        total = _matrix(whole, len(changes)) @ changes
    for place, slope in used:
        if place[0] is not None:
            total = total.index_add(0, place[0], _matrix([(place, slope)], len(changes)) @ changes)
    return total


def _matrix(pairs: Sequence[tuple[_Place, Tensor]], n_nodes: int) -> Tensor:
    """Return the sparse matrix (n, n_nodes) that makes of changes at the nodes those of what has these slopes."""
    column = torch.cat([index.reshape(len(slope), -1) for (_, index, _), slope in pairs], 1)
    weight = torch.cat([(weight * slope[..., None]).reshape(len(slope), -1) for (_, _, weight), slope in pairs], 1)
    start = torch.arange(0, column.numel() + 1, column.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # torch calls its CSR matrices a beta, and unchecked
        return torch.sparse_csr_tensor(start, column.reshape(-1), weight.reshape(-1), (len(column), n_nodes))
