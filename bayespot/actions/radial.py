"""Radial motion in a spherical potential: turning points, periods and partial integrals, star by star."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.actions.table import turning_points
from bayespot.numerics import cosine_series, gauss_legendre, implicit_root, midpoint_angles, sine_series
from bayespot.potential.profile import RadialProfile

#: Points of the quadratures along an orbit.
N_POINTS = 48
#: L is kept between these fractions of L_c(E), where the quadratures keep about ten digits.
_LEAST_L, _MOST_L = 1e-8, 1 - 1e-9
#: In ln r from a turning point: closer, the potential's rise is its slope's (relative error d^2), not a difference.
_NEAR = 2e-5
#: 1 - |sin(psi)| at a turning point itself.
_LEAST_RISE = 1e-30


class Series(NamedTuple):
    """A quantity that grows along an orbit from pericentre on, by its slope's ``mean`` over psi and cosines."""

    mean: Tensor
    coefficients: Tensor

    def __call__(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """Return it and its slope at psi (shape of the orbits)."""
        turn, coefficients = psi + torch.pi / 2, self.coefficients
        order = torch.arange(1, len(coefficients) + 1, dtype=psi.dtype).reshape(-1, *[1] * (coefficients.dim() - 1))
        grown = self.mean * turn + sine_series(coefficients / order, turn)
        return grown, self.mean + cosine_series(coefficients, turn)


class RadialOrbits(NamedTuple):
    r"""Orbits of given E and L, with s = ln r = ``mid`` + ``half`` sin(psi) between the turning points.

    The motion obeys :math:`r^2 p_r^2 = F(s) = 2 (E - \Phi) r^2 - L^2` (Binney & Tremaine 2008, eq. 3.14).
    Turning points carry the derivative of the implicit-function theorem, so every integral below is exact
    to first order in E, L and the potential's parameters.
    """

    profile: RadialProfile
    energy: Tensor
    L: Tensor
    mid: Tensor
    half: Tensor
    n_points: int = N_POINTS

    @classmethod
    def of(
        cls,
        profile: RadialProfile,
        energy: Tensor,
        L: Tensor,
        n_points: int = N_POINTS,
        near: RadialOrbits | None = None,
    ) -> RadialOrbits:
        """Find the turning points of bound orbits; energy (km/s)^2 and L (kpc km/s) have one shape.

        They are sought from those of orbits ``near`` by, if these are known.
        """
        s_c, ln_lc = profile.circular(energy)
        start = None if near is None else torch.stack([near.mid - near.half, near.mid + near.half]).detach()
        lc = ln_lc.exp()
        L = torch.minimum(torch.maximum(L, _LEAST_L * lc), _MOST_L * lc)
        s_peri, s_apo = (
            implicit_root(s, _f(profile, energy, L, s), _f_slope(profile, energy, s))
            for s in turning_points(profile, energy.detach(), L.detach() ** 2, s_c.detach(), start)
        )
        return cls(profile, energy, L, (s_apo + s_peri) / 2, (s_apo - s_peri) / 2, n_points)

    def detach(self) -> RadialOrbits:
        """Return the same orbits without the graph of E, L and the turning points."""
        return self._replace(**{name: getattr(self, name).detach() for name in ("energy", "L", "mid", "half")})

    def some(self, index: tuple[Tensor, ...]) -> RadialOrbits:
        """Return the orbits of the given indices."""
        return self._replace(**{name: getattr(self, name)[index] for name in ("energy", "L", "mid", "half")})

    def s(self, psi: Tensor) -> Tensor:
        """Return ln r at psi (shape of the orbits, or with one more trailing axis)."""
        extra = psi.dim() > self.mid.dim() or psi.shape[-1:] != self.mid.shape[-1:]
        mid, half = (self.mid[..., None], self.half[..., None]) if extra else (self.mid, self.half)
        return mid + half * psi.sin()

    def radial_momentum(self, psi: Tensor) -> Tensor:
        """Return r p_r (kpc km/s) at psi on the way out, zero at the turning points."""
        *_, root = self._motion(psi[..., None] + torch.pi / 2)
        return root[..., 0]

    def _motion(self, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""s, ds/dpsi and r p_r, ``turn`` = psi + pi/2 in [0, pi] on a trailing axis.

        The last two vanish at the turning points and their ratio does not, so neither may be a difference of
        large numbers there: with d = s - s_t from a turning point s_t,

        .. math:: F = L^2 (e^{2 d} - 1) - 2 e^{2 s} [\Phi(s) - \Phi(s_t)].
        """
        mid, half, L = self.mid[..., None], self.half[..., None], self.L[..., None]
        # 1 + sin(psi) and 1 - sin(psi)
        rise = (2 * (turn / 2).sin() ** 2).clamp(min=_LEAST_RISE)
        fall = (2 * (turn / 2).cos() ** 2).clamp(min=_LEAST_RISE)
        s, speed = mid + half * (1 - fall), half * (rise * fall).sqrt()
        f = _f(self.profile, self.energy[..., None], L, s)
        near = torch.nonzero(half * torch.minimum(rise, fall) < _NEAR, as_tuple=True)
        if len(near[0]):
            mid, half, L, rise, fall = (t.expand(f.shape)[near] for t in (mid, half, L, rise, fall))
            inside = rise < fall
            turning = torch.where(inside, mid - half, mid + half)
            d = torch.where(inside, half * rise, -half * fall)
            climb = d * self.profile.vc2_at(turning + d / 2)
            f = f.index_put(near, L**2 * torch.expm1(2 * d) - 2 * (2 * (turning + d)).exp() * climb)
        return s, speed, f.clamp(min=1e-300).sqrt()

    def _integrand(self, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d(J_r pi)/dpsi, dt/dpsi and d(azimuth)/dpsi at ``turn`` as in `_motion`."""
        s, weight, root = self._motion(turn)
        return weight * root, weight * (2 * s).exp() / root, weight * self.L[..., None] / root

    def full(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return J_r (kpc km/s), Omega_r and Omega_L (km/s/kpc)."""
        turn = midpoint_angles(self.n_points) + torch.pi / 2
        action, time, azimuth = (f.mean(-1) for f in self._integrand(turn))
        # mean over psi times pi is the integral from peri- to apocentre, half a period
        return action, 1 / time, azimuth / time

    def phases(self) -> tuple[Tensor, Tensor]:
        """Return ln r at points along each orbit and the fractions of the period spent there, ``(*batch, n_points)``.

        The fractions are weights of an average over the radial angle, which is the average over time.
        """
        psi = midpoint_angles(self.n_points)
        _, time, _ = self._integrand(psi + torch.pi / 2)
        return self.mid[..., None] + self.half[..., None] * psi.sin(), time / time.sum(-1, keepdim=True)

    def since_pericentre(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """Return the time (kpc s/km) and the azimuth (rad) from pericentre to psi on the way out."""
        nodes, weights = gauss_legendre(self.n_points)
        span = (psi + torch.pi / 2)[..., None] / 2
        _, time, azimuth = self._integrand(span * (nodes + 1))
        return (time * span * weights).sum(-1), (azimuth * span * weights).sum(-1)

    @torch.no_grad()
    def series(self) -> tuple[Series, Series]:
        """Return time and azimuth since pericentre as series in psi, from one quadrature.

        Their slopes are even about both turning points: series of cosines, whose coefficients the values at the
        midpoints give. The integrals are series of sines, as exact as the quadrature;
        `since_pericentre` is so at any psi.
        """
        x = midpoint_angles(self.n_points) + torch.pi / 2
        order = torch.arange(1, self.n_points, dtype=x.dtype)
        cosines = torch.cos(x[:, None] * order) * (2 / self.n_points)
        _, *slopes = self._integrand(x)
        time, azimuth = (Series(slope.mean(-1), (slope @ cosines).movedim(-1, 0).contiguous()) for slope in slopes)
        return time, azimuth

    def slopes(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """Return dt/dpsi (kpc s/km) and d(azimuth)/dpsi at psi, finite at the turning points."""
        _, time, azimuth = self._integrand(psi[..., None] + torch.pi / 2)
        return time[..., 0], azimuth[..., 0]


def _f(profile: RadialProfile, energy: Tensor, L: Tensor, s: Tensor) -> Tensor:
    return 2 * (energy - profile.phi(s)) * (2 * s).exp() - L**2


def _f_slope(profile: RadialProfile, energy: Tensor, s: Tensor) -> Tensor:
    return 2 * (2 * (energy - profile.phi(s)) - profile.vc2_at(s)) * (2 * s).exp()
