r"""Focal distance of the spheroidal coordinates in which a potential comes nearest to Staeckel's form.

As Delta^2, which is negative where oblate coordinates are meant: those of potentials elongated along z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayespot.numerics import bracketed_newton, implicit_root
from bayespot.potential.base import Potential

#: Distance of the table's radii in ln r.
_DS = 0.5
#: y = sin(latitude) of the places compared with the plane.
_Y = (0.2, 0.4, 0.6, 0.8)
#: (Delta / radius)^2 that are tried of flattened and of elongated potentials (no ring lies outside its shell), and most
#: steps of Newton's method between two of them.
_TRIED = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4)
_ELONGATED = (-0.97, -0.9, -0.7, -0.5, -0.3, -0.1, -0.03, -0.01, -0.003)
_STEPS = 30
#: Difference of the two sides, over their size, that counts as none: a sphere's.
_ROUNDING = 1e-12
#: Relative step of the slope by Delta^2.
_STEP = 1e-4


@dataclass(frozen=True)
class FocalTable:
    r"""Delta^2 (kpc^2) of shell orbits, linear in s = ln of the radius where they cross the plane.

    In Staeckel's form d/da [(a^2 + Delta^2 t) Phi] at fixed a is the same at all latitudes: there a shell orbit, which
    keeps its a, meets the same force wherever it is. Delta is where the mean over four latitudes equals the value in
    the plane (the condition of Sanders 2012, MNRAS 426, 128, equation 9, integrated from the plane to each of them). In
    a sphere it is zero, in a potential elongated along z negative (`bayespot.actions.spheroidal`).
    """

    squares: Tensor
    s_first: float

    @classmethod
    def of(cls, potential: Potential, s_first: float, s_last: float, like: Tensor) -> FocalTable:
        """Solve at multiples of 0.5 in s that enclose the two; derivatives by the potential's parameters are kept."""
        first = math.floor(s_first / _DS)
        n = max(math.ceil(s_last / _DS) - first + 1, 2)
        s = _DS * torch.arange(first, first + n, dtype=like.dtype, device=like.device)
        return cls(_squares(potential, s.exp()), first * _DS)

    @classmethod
    def constant(cls, delta: float, like: Tensor) -> FocalTable:
        """Return the table of one focal distance, or if that is negative of the ring of that radius."""
        return cls(like.new_full((1,), delta * abs(delta)), 0.0)

    def through(self, change: Callable[[Tensor], Tensor]) -> FocalTable:
        """Return the table with its numbers passed through ``change``."""
        return replace(self, squares=change(self.squares))

    @property
    def varies(self) -> bool:
        """Whether Delta depends on the energy."""
        return len(self.squares) > 1

    def at(self, s: Tensor) -> Tensor:
        """Return D = Delta^2 (kpc^2) of orbits with the energy of a circular one at exp(s)."""
        if not self.varies:
            return self.squares.expand(s.shape)
        position = ((s - self.s_first) / _DS).clamp(0, len(self.squares) - 1)
        i = position.detach().long().clamp(0, len(self.squares) - 2)
        low, high = self.squares[i], self.squares[i + 1]
        return low + (position - i) * (high - low)


def _squares(potential: Potential, a: Tensor) -> Tensor:
    """Return Delta^2 for shells of size ``a (n,)``."""
    y = torch.tensor(_Y, dtype=a.dtype, device=a.device)
    mean = torch.cat([torch.ones_like(y[:1]), torch.full_like(y, -1 / len(y))])
    y = torch.cat([torch.zeros_like(y[:1]), y])
    t = (1 - y) * (1 + y)

    def sides(D: Tensor, graph: bool) -> Tensor:
        """d/da [(a^2 + D t) Phi] in the plane and at the other latitudes, (*batch, n, 5)."""
        with torch.enable_grad():
            size = a.detach().expand(D.shape)[..., None].expand(*D.shape, len(y)).clone().requires_grad_()
            D = D.detach()[..., None]
            R, z = size * t.sqrt(), (size**2 + D).sqrt() * y
            phi = potential.phi(torch.stack([R, torch.zeros_like(R), z], -1))
            (side,) = torch.autograd.grad(((size**2 + D * t) * phi).sum(), size, create_graph=graph)
        return side

    @torch.no_grad()
    def excess(D: Tensor) -> Tensor:
        side = sides(D, False)
        difference = (side * mean).sum(-1)
        return torch.where(difference.abs() > _ROUNDING * side.abs().amax(-1), difference, 0.0)

    with torch.no_grad():
        tried = torch.tensor((*_ELONGATED, *_TRIED), dtype=a.dtype, device=a.device)[:, None] * a**2
        found = excess(tried)
        zero = len(_ELONGATED)
        # below zero is the side of potentials flattened more strongly than that
        flat, elongated = found[zero] < 0, found[zero] > 0
        crossed = (found[:-1] < 0) & (found[1:] >= 0)
        crossed[:zero] &= elongated
        crossed[zero:] &= flat
        solved = crossed.any(0)
        k = crossed.to(torch.int8).argmax(0)[None]
        low, high = tried.gather(0, k)[0], tried.gather(0, k + 1)[0]

        def rising(D: Tensor) -> tuple[Tensor, Tensor]:
            ahead, here, behind = excess(torch.stack([D * (1 + _STEP), D, D * (1 - _STEP)]))
            return here, (ahead - behind) / (2 * _STEP * D)

        D = torch.where(solved, bracketed_newton(rising, low, high, n_iter=_STEPS, tolerance=1e-8), a**2)
        round_enough = found[zero] == 0
        _, slope = rising(D)
    residual = (sides(D, torch.is_grad_enabled()) * mean).sum(-1)
    # far outside a potential is a sphere but for rounding: both sides are equal at every Delta, and there is no slope
    sound = solved & torch.isfinite(slope) & (slope != 0)
    D = torch.where(sound, implicit_root(D, residual, torch.where(sound, slope, 1.0)), torch.where(solved, D, 0.0))
    return _filled(D, solved | round_enough, a)


def _filled(D: Tensor, found: Tensor, a: Tensor) -> Tensor:
    """Give radii without a solution, as deep in a core, the value of the next radius outwards or inwards that has one.

    Raises
    ------
    ValueError
        If no radius has a solution.
    """
    if not bool(found.any()):
        raise ValueError(
            f"no focal distance of the Staeckel fudge between {float(a[0]):.3g} and {float(a[-1]):.3g} kpc: the "
            "potential is nowhere finite there, or so flat that no spheroids fit; give delta=, in kpc"
        )
    place = torch.arange(len(D), device=D.device)
    beyond = torch.where(found, place, len(D)).flip(0).cummin(0).values.flip(0)
    before = torch.where(found, place, -1).cummax(0).values
    return D[torch.where(beyond < len(D), beyond, before)]
