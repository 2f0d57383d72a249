r"""How the actions of stars change with the potential: the derivatives of J by Phi wherever the fudge asks for it.

At fixed w and turning points (whose first-order change does not matter) J depends on the potential through Phi at the
star, at the quadratures' nodes, and where the circular orbit of the star's energy is, from which Delta is read. With
those derivatives and the change of Phi by a parameter, tabulated once for all stars, dJ/da is one product of a sparse
matrix with a table, for all parameters together. What a table of focal distances itself changes is not in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias, TypeVar, cast

import torch
from scipy import sparse
from torch import Tensor

from bayespot.actions.focal import FocalTable
from bayespot.actions.fudge import Surroundings
from bayespot.actions.meridional import TabulatedField

_T = TypeVar("_T")
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
    parts = _of_blocks(tables, w, lambda probed, block: probed.response(changes))
    return Response(*(torch.cat(column) for column in zip(*parts, strict=True)))


def score_matrix(tables: Surroundings, w: Tensor, slopes: Tensor) -> sparse.csr_matrix:
    """Return the sparse matrix ``(n, n_nodes)`` that makes of a change of Phi at the nodes one of a function of J.

    Parameters
    ----------
    tables
        The potential.
    w : Float[Tensor, "n 6"]
        Stars.
    slopes : Float[Tensor, "n 2"]
        Derivatives of the function by J_r and J_z of each star.
    """
    return sparse.vstack(_of_blocks(tables, w, lambda probed, block: probed.matrix(slopes[block]))).tocsr()


def _of_blocks(tables: Surroundings, w: Tensor, found: Callable[[_Probed, slice], _T]) -> list[_T]:
    """Return what is found for one block of stars after the other, so that their graphs do not add up."""
    fixed = tables.through(torch.Tensor.detach)
    blocks = [slice(first, first + _BLOCK) for first in range(0, len(w), _BLOCK)]
    with torch.enable_grad():
        return [found(_Probed(fixed, w[block]), block) for block in blocks]


class _Probed:
    """Actions of some stars, and where and how they depend on Phi."""

    def __init__(self, tables: Surroundings, w: Tensor) -> None:
        asked: list[_Asked] = []
        focal = _Focal(tables.focal)
        probed = replace(tables, field=_Probe(tables.field, asked), focal=cast("FocalTable", focal))
        (J, excess), _ = probed.actions(w, None)
        circular = focal.circular_orbits(asked)
        self.focal, self.circular, self.n_nodes = focal, circular, tables.field.n_nodes
        self.values = [one.value for one in asked] + [focal.leaf for _ in circular[:1]]
        self.places: list[_Place] = [(one.stars, *tables.field.stencil(one.R, one.z)) for one in asked + circular]
        self.columns = (J[:, 0], J[:, 2], excess)
        self.J, self.excess = J.detach(), excess.detach()

    def derivatives(self, column: Tensor) -> tuple[list[_Place], list[Tensor | None]]:
        """Return the places on whose Phi ``column`` ``(n,)`` depends, and its derivatives."""
        slopes: list[Tensor | None] = [None] * len(self.values)
        if column.requires_grad:
            slopes = list(torch.autograd.grad(column.sum(), self.values, retain_graph=True, allow_unused=True))
        if self.circular:
            by_s = slopes.pop()
            slopes += [None if by_s is None else by_s * weight for weight in self.focal.weights]
        return self.places, slopes

    def response(self, changes: Tensor) -> Response:
        """Return the block's `response`."""
        rows = [_product(*self.derivatives(column), len(self.J), changes) for column in self.columns]
        return Response(self.J, self.excess, torch.stack(rows[:2], 1).detach(), rows[2].detach())

    def matrix(self, slopes: Tensor) -> sparse.csr_matrix:
        """Return the block's rows of `score_matrix`."""
        n = len(self.J)
        places, derivatives = self.derivatives(slopes[:, 0] * self.columns[0] + slopes[:, 1] * self.columns[1])
        total = sparse.csr_matrix((n, self.n_nodes))
        for (stars, index, weight), slope in zip(places, derivatives, strict=True):
            if slope is None:
                continue
            data = (weight * slope[..., None]).reshape(len(slope), -1)
            rows = torch.arange(n) if stars is None else stars
            rows = rows[:, None].expand(data.shape)
            triple = (part.reshape(-1).cpu().numpy() for part in (data, rows, index.reshape(data.shape)))
            values, row, column = triple
            total = total + sparse.csr_matrix((values, (row, column)), shape=total.shape)
        return total


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
