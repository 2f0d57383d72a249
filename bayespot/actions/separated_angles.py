r"""Angles and frequencies of separated motion, from the derivatives of J and of the generating function W.

With W(E, I, L_z) = int p_u du + int p_v dv + L_z phi, I being the third integral, and p_u^2 = 2 E a^2 - 2 I + ...,
p_v^2 = 2 E D t + 2 I + ..., D = Delta^2,

.. math:: \Omega_i = \partial E / \partial J_i, \qquad \theta_i = \sum_k
          \frac{\partial W}{\partial (E, I, L_z)_k} \frac{\partial (E, I, L_z)_k}{\partial J_i}

(Binney & Tremaine 2008, equations 3.226 to 3.247; Sanders & Binney 2016, section 3.2). theta_r counts from pericentre,
theta_z from the plane on the way up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.actions.plane import prograde, wrap
from bayespot.actions.separated import Separated
from bayespot.actions.separated_actions import AT_DISC, EPS, LEAST_HALF, LEAST_Y, midpoints, missed
from bayespot.actions.turning import TurningPoints
from bayespot.numerics import gauss_legendre, implicit_root

#: Nodes between the turning points, and between one of them (or the plane) and the star.
_N = 64
#: 1 - |sin psi| at a turning point itself.
_EDGE = 1e-15
#: C of a pole that is none.
_NO_POLE = 1e8


Pair = tuple[Tensor, Tensor]
Series = Callable[[Tensor], tuple[Pair, Pair]]


class Derivatives(NamedTuple):
    """Derivatives of J_r, of J_z or of W by E, I and L_z; at L_z = 0 those of L_z > 0."""

    by_E: Tensor
    by_I: Tensor
    by_L: Tensor


class Torus(NamedTuple):
    """One star's torus: both motions' extents, J and its derivatives; fields have the shape of the stars.

    Along u ln(c / Delta) = ``mid`` + ``half`` sin(psi), in oblate coordinates (D < 0) u = asinh(c / sqrt(-D)) itself;
    along v asinh(y / EPS) = ``top`` sin(chi). ``below`` and
    ``above`` are what x p_u^2 and t p_v^2 are at the ends of an interval that was widened, otherwise zero.
    """

    motion: Separated
    sign: Tensor
    mid: Tensor
    half: Tensor
    top: Tensor
    below: Tensor
    above: Tensor
    J_r: Tensor
    J_z: Tensor
    of_r: Derivatives
    of_z: Derivatives

    @classmethod
    def of(cls, motion: Separated, points: TurningPoints, Lz: Tensor) -> Torus:
        """Return the torus, with turning points that have the derivatives of the implicit-function theorem."""
        inner, outer, y = _differentiable(motion, points)
        first, last = (_variable(x, motion.D) for x in (inner, outer))
        mid, half = (first + last) / 2, (last - first) / 2
        least = LEAST_HALF * mid.detach().clamp(max=1)
        narrow, flat = half < least, y < LEAST_Y
        half = torch.where(narrow, least, half)
        top = torch.asinh(torch.where(flat, LEAST_Y, y) / EPS)
        zero = torch.zeros_like(mid)
        empty = Derivatives(zero, zero, zero)
        new = cls(motion, prograde(Lz), mid, half, top, zero, zero, zero, zero, empty, empty)
        if bool((narrow | flat).any()):
            right = torch.full_like(mid, torch.pi / 2)[..., None]
            with torch.no_grad():
                ends = [new._along_u(psi)[1][..., 0] for psi in (-right, right)]
                at_top = new._along_v(right)[1][..., 0]
            below = torch.where(narrow, (ends[0] + ends[1]) / 2, 0.0)
            new = new._replace(below=below, above=torch.where(flat, at_top, 0.0))
        return new._integrated()

    def place(self, psi: Tensor) -> Tensor:
        """Return x at psi, which has nodes on a trailing axis."""
        D = self.motion.D[..., None]
        at = self.mid[..., None] + self.half[..., None] * psi.sin()
        # of the one that does not hold no overflow must reach the gradient
        prolate = D * torch.expm1(2 * torch.where(D > 0, at, 0.0))
        return torch.where(D > 0, prolate, -D * torch.cosh(torch.where(D > 0, 0.0, at)) ** 2).clamp(min=1e-300)

    def _along_u(self, psi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, x p_u^2 and dpsi-weight of sqrt(x p_u^2) in p_u du, at psi on a trailing axis."""
        motion = self.motion.spread()
        x = self.place(psi)
        square = motion.along_u(x) - self.below[..., None]
        c = torch.where(motion.D > 0, (x + motion.D).clamp(min=1e-300).sqrt(), x.sqrt())
        return x, square.clamp(min=1e-300), self.half[..., None] * psi.cos() * c / x

    def _along_v(self, chi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t, t p_v^2, the weight of sqrt(t p_v^2) in p_v dv and dpsi_y/dchi, where y = y_max sin(psi_y)."""
        top = self.top[..., None]
        sigma = top * chi.sin()
        y = EPS * torch.sinh(sigma)
        t = ((1 - y) * (1 + y)).clamp(min=1e-30)
        square = self.motion.spread().along_v(y, t) - self.above[..., None]
        rate = top * chi.cos() * (y**2 + EPS**2).sqrt()
        fall = 2 * top * ((torch.pi / 2 - chi) / 2).sin() ** 2
        span = EPS * (torch.sinh(fall) * torch.sinh(top + sigma)).clamp(min=1e-300).sqrt()
        return t, square.clamp(min=1e-300), rate / t, rate / span

    def _integrated(self) -> Torus:
        """Fill in J and its derivatives."""
        motion = self.motion
        lz, D = motion.lz, motion.D
        psi = midpoints(_N, self.mid)
        x, square, weight = self._along_u(psi)
        root = square.sqrt()
        lost = missed(_N, self._pole()) / 2
        time = weight / root
        J_r = (weight * root).mean(-1) - lz * lost
        J_r = torch.where(self.below != 0, J_r + (self.below * time.mean(-1) / 2).detach(), J_r)
        by_L = -lz * D * time.mean(-1) - lost
        of_r = Derivatives((x * x * time).mean(-1), -(x * time).mean(-1), self.sign * by_L)

        t, square, weight, _ = self._along_v(psi)
        root = square.sqrt()
        lost = missed(_N, self._pole_of_v())
        time = weight / root
        J_z = (weight * root).mean(-1) - lz * lost
        J_z = torch.where(self.above != 0, J_z + (self.above * time.mean(-1) / 2).detach(), J_z)
        by_L = -lz * time.mean(-1) - lost
        of_z = Derivatives(D * (t * t * time).mean(-1), (t * time).mean(-1), self.sign * by_L)
        return self._replace(J_r=J_r, J_z=J_z, of_r=of_r, of_z=of_z)

    def _pole(self) -> Tensor:
        """C of the pole at the axis along u, -C in sin(psi); in oblate coordinates there is none on the real axis."""
        return torch.where(self.motion.D > 0, (self.mid / self.half).clamp(min=1), _NO_POLE)

    def _pole_of_v(self) -> Tensor:
        return (torch.asinh(torch.ones_like(self.top) / EPS) / self.top).clamp(min=1)

    def integrals(self) -> tuple[Derivatives, Derivatives, Derivatives]:
        """Return the derivatives of E, I and L_z by J_r, J_phi and J_z (in the fields ``by_E``, ``by_I``, ``by_L``)."""
        (a, b, c), (d, e, f) = self.of_r, self.of_z
        det = a * e - b * d
        zero, one = torch.zeros_like(det), torch.ones_like(det)
        return (
            Derivatives(e / det, -d / det, zero),
            Derivatives((b * f - e * c) / det, (d * c - a * f) / det, one),
            Derivatives(-b / det, a / det, zero),
        )

    def frequencies(self) -> Tensor:
        """Return Omega ``(*batch, 3)``."""
        return torch.stack([part.by_E for part in self.integrals()], -1)

    def phases(self, x: Tensor, y: Tensor, outward: Tensor, upward: Tensor) -> tuple[Tensor, Tensor]:
        """Return psi and chi of stars; psi in (-pi, pi] is negative inwards, chi beyond +- pi/2 on the way down."""
        psi = ((_variable(x, self.motion.D) - self.mid) / self.half).clamp(-1 + _EDGE, 1 - _EDGE).asin()
        chi = (torch.asinh(y / EPS) / self.top).clamp(-1 + _EDGE, 1 - _EDGE).asin()
        return torch.where(outward, psi, -torch.pi - psi), torch.where(upward, chi, torch.pi - chi)

    def angles(self, psi: Tensor, chi: Tensor, phi: Tensor) -> Tensor:
        """Return theta ``(*batch, 3)`` at phases as `phases` gives them and the azimuth phi."""
        outward, upward = psi > -torch.pi / 2, chi <= torch.pi / 2
        sign = torch.where(outward, 1.0, -1.0).to(phi)
        u = self._of_u(torch.where(outward, psi, -torch.pi - psi))
        v = self._of_v(torch.where(upward, chi, torch.pi - chi))
        whole = Derivatives(*(torch.pi * part for part in self.of_z))
        v = Derivatives(*(torch.where(upward, part, all_ - part) for part, all_ in zip(v, whole, strict=True)))
        W = [sign * part + other for part, other in zip(u, v, strict=True)]
        W[2] = W[2] + phi
        theta = [sum(w * part for w, part in zip(W, parts, strict=True)) for parts in self.integrals()]
        return wrap(torch.stack(torch.broadcast_tensors(*theta), -1))

    @staticmethod
    def wrapped(psi: Tensor, chi: Tensor) -> tuple[Tensor, Tensor]:
        """Return unwrapped phases in the ranges of `phases`."""
        psi = torch.remainder(psi + 1.5 * torch.pi, 2 * torch.pi) - 1.5 * torch.pi
        return psi, torch.remainder(chi + torch.pi / 2, 2 * torch.pi) - torch.pi / 2

    @torch.no_grad()
    def series(self) -> tuple[Series, Series]:
        """Return the derivatives of int p_u du by E and I since pericentre, as functions of psi + pi/2, and those of
        int p_v dv since the plane, as functions of chi; each with its slope, at any phase, and exact to the quadrature.
        """
        psi = midpoints(_N, self.mid)
        x, square, weight = self._along_u(psi)
        time = weight * x / square.sqrt()
        u = _cosines(psi + torch.pi / 2, x * time), _cosines(psi + torch.pi / 2, -time)
        t, square, weight, _ = self._along_v(psi)
        time = weight * t / square.sqrt()
        D = self.motion.D[..., None]
        v = _cosines(psi + torch.pi / 2, D * t * time), _cosines(psi + torch.pi / 2, time)
        quarter = torch.full_like(self.mid, torch.pi / 2)
        start = [at(quarter)[0] for at in v]

        def along_u(eta: Tensor) -> tuple[Pair, Pair]:
            return u[0](eta), u[1](eta)

        def along_v(chi: Tensor) -> tuple[Pair, Pair]:
            (a, da), (b, db) = (at(chi + torch.pi / 2) for at in v)
            return (a - start[0], da), (b - start[1], db)

        return along_u, along_v

    def _of_u(self, psi: Tensor) -> Derivatives:
        """Derivatives of int p_u du from pericentre to psi."""
        nodes, weights = (part.to(psi) for part in gauss_legendre(_N))
        span = (psi + torch.pi / 2) / 2
        at = span[..., None] * (nodes + 1) - torch.pi / 2
        x, square, weight = self._along_u(at)
        weights = span[..., None] * weights
        time = weight / square.sqrt()
        C = self._pole()
        axis = ((C - 1) * (C + 1)).sqrt()[..., None] / (2 * (C[..., None] + at.sin()))
        D = self.motion.D[..., None]
        smooth = (weights * (self.motion.lz[..., None] * D * time - axis)).sum(-1)
        turned = torch.atan2((C + 1).sqrt() * span.sin(), (C - 1).clamp(min=0).sqrt() * span.cos())
        return Derivatives(
            (weights * x * x * time).sum(-1), -(weights * x * time).sum(-1), -self.sign * (smooth + turned)
        )

    def _of_v(self, chi: Tensor) -> Derivatives:
        """Derivatives of int p_v dv from the plane to chi in [-pi/2, pi/2]."""
        nodes, weights = (part.to(chi) for part in gauss_legendre(_N))
        at = chi[..., None] / 2 * (nodes + 1)
        weights = chi[..., None] / 2 * weights
        t, square, weight, rate = self._along_v(at)
        time = weight / square.sqrt()
        y_top, y = EPS * torch.sinh(self.top), EPS * torch.sinh(self.top * chi.sin())
        root_t = ((1 - y_top) * (1 + y_top)).clamp(min=0).sqrt()
        smooth = (weights * (self.motion.lz[..., None] * time - root_t[..., None] * rate / t)).sum(-1)
        fall, rise = self.top * (1 - chi.sin()), self.top * (1 + chi.sin())
        across = EPS * (torch.sinh(fall) * torch.sinh(rise)).clamp(min=1e-300).sqrt()
        turned = torch.atan2(root_t * y, across)
        D = self.motion.D
        return Derivatives(
            D * (weights * t * t * time).sum(-1), (weights * t * time).sum(-1), -self.sign * (smooth + turned)
        )


def _differentiable(motion: Separated, points: TurningPoints) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, x and y of the turning points with their derivatives."""
    fixed = motion.detached()
    D = fixed.D
    out = []
    with torch.no_grad():
        slopes = []
        for x in (points.inner, points.outer):
            c2 = torch.maximum(x + D, 1e-14 * x)
            phi, by_R, by_z = fixed.field.slopes((x * fixed.t0).sqrt(), c2.sqrt() * fixed.y0)
            K, reach = 2 * (fixed.energy - phi), x + D * fixed.t0
            slopes.append(K * (x + reach) - fixed.A - reach * (by_R + by_z * x / c2))
        y = points.y.clamp(min=1e-8)
        t = ((1 - y) * (1 + y)).clamp(min=1e-16)
        phi, by_R, by_z = fixed.field.slopes((fixed.x0 * t).sqrt(), (fixed.x0 + D).clamp(min=0).sqrt() * y)
        rise = 2 * ((fixed.x0 + D * t) * (fixed.energy - phi) - (fixed.x0 + D * fixed.t0) * fixed.kinetic)
        falls = 2 * D * (fixed.energy - phi) + (fixed.x0 + D * t) * (by_z / y**2 - by_R / t)
        of_y = -2 * y * (fixed.A + rise + falls * t)
    for x, slope in zip((points.inner, points.outer), slopes, strict=True):
        root = implicit_root(x, motion.along_u(x), slope).clamp(min=1e-300)
        # no turning point, but the disc inside the ring
        out.append(torch.where(x <= -D * (1 + AT_DISC), -motion.D, root))
    return out[0], out[1], implicit_root(y, motion.along_v(y, t), of_y)


def _variable(x: Tensor, D: Tensor) -> Tensor:
    """Return what sin(psi) is linear in along u, at x = a^2."""
    prolate = D > 0
    ratio = torch.where(prolate, x, 1.0) / torch.where(prolate, D, 1.0)
    c2 = torch.where(prolate, 1.0, x + D).clamp(min=1e-300) / torch.where(prolate, 1.0, -D)
    return torch.where(prolate, torch.log1p(ratio) / 2, torch.asinh(c2.sqrt()))


def _cosines(at: Tensor, rate: Tensor) -> Callable[[Tensor], Pair]:
    """Return the integral from zero, and itself, of a function even about 0 and pi with values at midpoints between."""
    order = torch.arange(1, len(at), dtype=at.dtype, device=at.device)
    mean = rate.mean(-1)
    coefficients = rate @ (torch.cos(at[:, None] * order) * (2 / len(at)))

    def value(phase: Tensor) -> Pair:
        turns = phase[..., None] * order
        slope = mean + (coefficients * turns.cos()).sum(-1)
        return mean * phase + (coefficients / order * turns.sin()).sum(-1), slope

    return value
