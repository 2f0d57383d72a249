r"""Sums over the line of sight and over velocities in a spherical system: surface density and moments of v_los.

Of a star that moves with speed v at an angle eta from the radius, where the line of sight makes an angle of cosine
:math:`\mu = z/r` with the radius, the mean of :math:`\cos(q v_{los})` over azimuths is

.. math:: \sum_l (-1)^l (4l + 1)\, j_{2l}(q v)\, P_{2l}(\cos\eta)\, P_{2l}(\mu)

(the expansion of a plane wave and the addition theorem, Abramowitz & Stegun 1972, 10.1.47). f is summed over angles,
then over speeds, then along the line of sight: matrices that no parameter changes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import spherical_jn
from torch import Tensor

from bayespot.likelihood.phase_mixed import PhaseMixed
from bayespot.numerics import lagrange, legendre, unit_rule
from bayespot.units import takes, takes_tensors

#: Distance of nodes in ln R and ln r, and nodes of the polynomials between them.
_DS, _STENCIL = 0.25, 6
#: Nodes along the line of sight per unit of t, z = R sinh t, and the largest radius over that of the outermost star.
_LINE, _FARTHEST = 6, 30.0
#: Nodes in speed and in the angle between velocity and radius, and even Legendre polynomials of the latter.
_SPEEDS, _ANGLES, _EVEN = 40, 16, 12
#: Coefficients of the series, and half its period V in standard deviations of the catalogue's velocities.
_TERMS, _PERIOD = 32, 8.0
#: Radius on the sky, over the median, inside of which all is as at this radius.
_INNERMOST = 0.01
#: Steepest surface density: between nodes a polynomial of what is steeper may have any value.
_STEEPEST = 16.0
#: Nodes in ln R of the integral over the field.
_FIELD = 64


@takes(V="speed", R_out="length")
@takes_tensors(w="phase_space", angles="internal", speeds="internal", along="internal", log_r3="internal")
@dataclass(frozen=True, eq=False)
class SkyLattice:
    """Points of phase space of which sums at nodes in ln R are made.

    No parameter changes them: speeds reach to V, beyond which nothing counts.

    Parameters
    ----------
    first, n
        First node, in steps of ln R and ln r, and their number; those of r go farther.
    V
        Half the period of the series in km/s.
    R_out
        Radius of the outermost star of the photometric sample; 0: there is none.
    w : Float[Tensor, "n_r n_speeds n_angles 6"]
        The points, velocities at each radius.
    angles : Float[Tensor, "n_angles n_l"]
        Even Legendre polynomials at the angles, times these' weights.
    speeds : Float[Tensor, "n_l n_speeds n_terms"]
        Spherical Bessel functions of q v, times the speeds' weights.
    along : Float[Tensor, "n n_r n_l"]
        Weights of the nodes in r for each of R.
    log_r3 : Float[Tensor, "n_r"]
        3 ln r: what is between the nodes is r^3 f.
    """

    first: int
    n: int
    V: float
    R_out: float
    w: Tensor
    angles: Tensor
    speeds: Tensor
    along: Tensor
    log_r3: Tensor

    @classmethod
    @takes(stretch="number")
    @takes_tensors(stars="internal")
    def covering(cls, stars: Tensor, stretch: float = 1.0, finer: int = 1) -> SkyLattice:
        """Return the lattice of stars ``(n, 6)``, as `LineOfSightVelocities` takes them.

        Parameters
        ----------
        stars
            Their radii on the sky decide on the nodes, their velocities on V.
        stretch
            Largest factor by which the distance may grow or shrink.
        finer
            Times as many nodes, polynomials and coefficients, to tell the error of the sums.
        """
        R = torch.linalg.vector_norm(stars[..., :2], dim=-1)
        v = stars[torch.isfinite(stars[..., 3]), 2]
        sd = 1.4826 * float((v - v.median()).abs().median())
        V = _PERIOD * max(sd, 1e-3)
        low = math.log(max(float(R.min()), _INNERMOST * float(R.median())) / stretch) / _DS
        high = math.log(float(R.max()) * stretch) / _DS
        placed = R[stars[..., 4] > 0]
        R_out = float(placed.max()) if len(placed) else 0.0
        if R_out:
            # the field begins at the centre
            low = min(low, math.log(_INNERMOST * float(R.median()) / stretch) / _DS)
        room = _STENCIL // 2 - 1
        first, last = math.floor(low) - room, math.floor(high) + 1 + room
        n, n_l = last - first + 1, _EVEN * finer
        # from the inner nodes the line of sight reaches as far as it does from the outer ones
        n_r = n + math.ceil(math.log(_FARTHEST) / _DS) + 2 * room + 1
        y, y_weight = unit_rule(_ANGLES * finer)
        speed, speed_weight = (V * part for part in _speeds(finer))
        eta = math.pi / 2 * y**2
        angles = _even_legendre(eta.cos(), n_l) * (eta.sin() * math.pi * y * y_weight)[:, None]
        bessel = _bessel_functions(finer)
        s = _DS * (first - room + torch.arange(n_r, dtype=torch.float64))
        r, v_r, v_t = torch.broadcast_tensors(
            s.exp()[:, None, None], speed[:, None] * eta.cos(), speed[:, None] * eta.sin()
        )
        zero = torch.zeros_like(r)
        w = torch.stack([r, zero, zero, v_r, v_t, zero], -1)
        along = _along_the_line(first, n, n_r, n_l, finer)
        return cls(first, n, V, R_out, w, angles, bessel * speed_weight[:, None], along, 3 * s)

    def sums(self, density: PhaseMixed) -> Tensor:
        """Return at the nodes in R, ``(*batch, n, n_terms)``: ln of the surface density, up to a constant, and the
        coefficients of the series after the first, which is 1; of as many densities f(J) as there are."""
        return self.reduced(self.summed(self.scaled(density)))

    def scaled(self, density: PhaseMixed) -> Tensor:
        """Return r^3 f at the points ``(*batch, n_r, n_speeds, n_angles)``, up to a constant."""
        log_f = density.log_prob(self.w.reshape(-1, 6))
        scaled = log_f.unflatten(-1, self.w.shape[:3]) + self.log_r3[:, None, None]
        return (scaled - scaled.detach().amax((-3, -2, -1), keepdim=True)).exp()

    @takes_tensors(f="internal")
    def summed(self, f: Tensor) -> Tensor:
        """Return the sums ``(*batch, n, n_terms)`` over lines of sight and velocities of ``f (*batch, n_r, n_speeds,
        n_angles)``, linear in it."""
        by_angle = (f @ self.angles).movedim(-1, -3)
        at_r = (by_angle @ self.speeds).movedim(-3, -2)
        return self.along.reshape(self.n, -1) @ at_r.flatten(-3, -2)

    @takes_tensors(found="internal")
    def reduced(self, found: Tensor) -> Tensor:
        """Return what `sums` does of `summed`."""
        surface = found[..., :1].clamp(min=1e-300)
        # means of cosines, also where a density that jumps between nodes has a sum that is no more positive
        return torch.cat([surface.log(), (found[..., 1:] / surface).clamp(-1, 1)], -1)

    @takes_tensors(sums="internal", R="length")
    def at(self, sums: Tensor, R: Tensor) -> Tensor:
        """Return what `sums` returned at radii R on the sky, by interpolation in ln R."""
        room = _STENCIL // 2 - 1
        place = (R.clamp(min=1e-300).log() / _DS - self.first).clamp(room, self.n - 1 - room)
        cell = place.detach().floor().long().clamp(room, self.n - 2 - room)
        weight = lagrange(place - cell + room, torch.arange(_STENCIL, dtype=torch.float64))
        near = cell[..., None] - room + torch.arange(_STENCIL)
        whole = torch.zeros(*R.shape, self.n, dtype=R.dtype).scatter(-1, near, weight)
        return whole @ sums

    @takes_tensors(sums="internal")
    def resolves(self, sums: Tensor) -> Tensor:
        """Return whether the surface density is smooth enough for what is between the nodes in R, out to R_out: no
        steeper than a power of 16."""
        if not self.R_out:
            return torch.ones(sums.shape[:-2], dtype=torch.bool)
        slopes = sums[..., 0].diff() / _DS
        inner = self.first + torch.arange(self.n - 1) < math.log(self.R_out) / _DS
        return (slopes[..., inner].abs() < _STEEPEST).all(-1)

    @takes_tensors(sums="internal", R="length")
    def log_inside(self, sums: Tensor, R: Tensor) -> Tensor:
        """Return ln of the number of stars within a radius R ``()`` on the sky, with `sums`' constant."""
        low = math.exp(_DS * (self.first + _STENCIL // 2 - 1))
        x, weight = unit_rule(_FIELD)
        span = (R / low).log()
        ln_R = math.log(low) + span * torch.cat([x.new_zeros(1), x])
        log_surface = self.at(sums[..., :1], ln_R.exp())[..., 0] + 2 * ln_R
        # within the innermost node the surface density is what it is there
        inner = log_surface[..., 0] + math.log(math.pi)
        rest = log_surface[..., 1:] + (2 * math.pi * span * weight).log()
        return torch.logaddexp(inner, torch.logsumexp(rest, -1))

    def moments(self, density: PhaseMixed) -> VelocityMoments:
        """Return the second moments of the velocities, at the nodes in r and along the lines of sight."""
        f = self.scaled(density) * self.speeds[0, :, :1] * self.angles[:, 0]
        number, radial, tangential = (
            (f * part).sum((1, 2)) for part in (torch.ones_like(f), self.w[..., 3] ** 2, self.w[..., 4] ** 2)
        )
        # <v_los^2> = mu^2 <v_r^2> + (1 - mu^2) <v_t^2> / 2, mu^2 = (1 + 2 P_2(mu)) / 3
        squares = self.along[..., 0] @ (radial + tangential) / 3 + self.along[..., 1] @ (2 * radial - tangential) / 3
        return VelocityMoments(
            self.w[:, 0, 0, 0],
            radial / number,
            tangential / number,
            (_DS * (self.first + torch.arange(self.n, dtype=torch.float64))).exp(),
            squares / (self.along[..., 0] @ number),
        )


class VelocityMoments(NamedTuple):
    """Second moments of velocities in (km/s)^2.

    ``radial`` and ``tangential`` (of both directions together) at radii ``r (n_r,)``, that along the line of sight
    ``los`` at radii ``R (n,)`` on the sky, in kpc.
    """

    r: Tensor
    radial: Tensor
    tangential: Tensor
    R: Tensor
    los: Tensor


def _speeds(finer: int) -> tuple[Tensor, Tensor]:
    """Speeds over V, closer to each other where the stars' are, and their weights with the square of the speed."""
    u, weight = unit_rule(_SPEEDS * finer)
    top = math.asinh(_PERIOD)
    speed = (top * u).sinh() / _PERIOD
    return speed, speed**2 * (top * u).cosh() * top * weight


@functools.cache
def _bessel_functions(finer: int) -> Tensor:
    """(-1)^l (4l + 1) j_2l(q v) at the speeds and terms, ``(n_l, n_speeds, n_terms)``."""
    qv = (math.pi * _speeds(finer)[0][:, None] * torch.arange(_TERMS * finer, dtype=torch.float64)).numpy()
    orders = range(_EVEN * finer)
    return torch.as_tensor(np.stack([(-1) ** k * (4 * k + 1) * spherical_jn(2 * k, qv) for k in orders]))


def _even_legendre(x: Tensor, n: int) -> Tensor:
    """P_0, P_2, P_4, ... on a new last axis."""
    return legendre(x, 2 * n)[..., ::2]


@functools.cache
def _along_the_line(first: int, n: int, n_r: int, n_l: int, finer: int) -> Tensor:
    """Weights ``(n, n_r, n_l)`` of values at the nodes in r, for the integral over z at each node in R."""
    room = _STENCIL // 2 - 1
    last_t = math.log(2 * _FARTHEST) + _DS * (n - 1)
    t, weight = unit_rule(math.ceil(_LINE * last_t) * finer)
    t, weight = last_t * t, last_t * weight
    # ln r = ln R + ln cosh t, the same step from every node of R
    up = t.cosh().log() / _DS
    cell = up.floor().long()
    near = lagrange(up - cell + room, torch.arange(_STENCIL, dtype=torch.float64))
    # dz = R cosh t dt; between the nodes is r^3 f
    of_angle = (weight * t.cosh() ** -2)[:, None] * _even_legendre(t.tanh(), n_l)
    found = torch.zeros(n, n_r, n_l, dtype=torch.float64)
    rows = torch.arange(n)
    for i in range(len(t)):
        within = rows[rows + int(cell[i]) + _STENCIL <= n_r]
        for k in range(_STENCIL):
            found[within, within + int(cell[i]) + k] += near[i, k] * of_angle[i]
    R = (_DS * (first + rows.double())).exp()
    return found * R[:, None, None] ** -2


__all__ = ["SkyLattice"]
