"""How far the orbits of a potential reach: its circular orbits from centre to infinity, and the escape energy."""

from __future__ import annotations

import torch
from torch import Tensor

from bayespot.potential.base import Potential
from bayespot.potential.profile import RadialProfile

#: ln r of the innermost and outermost nodes, 1.5e-8 and 4.9e8 kpc, unless stars lie beyond.
CENTRE, INFINITY = -18.0, 20.0
_DS = 0.25
#: Beyond these ln r even for stars outside: e^-60 kpc is no length, and e^60 squared must not overflow.
_LOWEST, _HIGHEST = -60.0, 60.0
#: e-foldings of radius between a star and the ends.
_ROOM = 8.0
#: Least q = d ln v_c^2 / d ln r of a stable circular orbit, with some room: at -2 L_c no longer rises.
_LEAST_Q = -1.999
#: Fewest nodes of a potential that can be used: 4 e-foldings of radius.
_FEWEST = 16
#: Least difference of energies of neighbouring nodes, over Phi.
_ROUNDING = 1e-14
#: Largest error of Phi inside a profile, over the kinetic energy that the innermost orbit has there.
_TOLERANCE = 1e-9
#: Radius that stands for the centre itself, where ln r does not exist.
_LEAST_RADIUS = 1e-300


def log_radius(r: Tensor) -> Tensor:
    """Return ln(r/kpc), at the centre that of 1e-300 kpc, with derivative zero."""
    return r.clamp(min=max(_LEAST_RADIUS, torch.finfo(r.dtype).tiny)).log()


class Extent:
    r"""A spherical potential on 150 radii from centre to infinity, without gradients.

    It tells which radii the orbits of given energies need, so that tables follow the orbits and not the places where
    stars happen to be, and what the energy of escape is. Where the potential ceases to be one (not finite, an outward
    force, or no stable circular orbits) the extent ends, and orbits that reach that radius count as unbound.

    Parameters
    ----------
    potential : Potential
        Spherical.
    s : Float[Tensor, "n"], optional
        ln r of stars (kpc), which the radii have to enclose.

    Raises
    ------
    ValueError
        If the potential is not spherical.
    """

    #: Whether the potential holds orbits at all; a trial step of a fit may overflow it.
    usable: bool

    def __init__(self, potential: Potential, s: Tensor | None = None) -> None:
        # with the graph that the profile is to have, if it is wanted
        self._radial = potential.radial()
        with torch.no_grad():
            self._measure(potential, s)

    def _measure(self, potential: Potential, s: Tensor | None) -> None:
        first, last = CENTRE, INFINITY
        if s is not None and len(s):
            first = min(first, max(float(s.min()) - _ROOM, _LOWEST))
            last = max(last, min(float(s.max()) + _ROOM, _HIGHEST))
        whole = RadialProfile.of(potential, first, last, _DS, radial=self._radial)
        low, high = _usable(whole)
        self.usable = high - low >= _FEWEST
        if not self.usable:
            low, high = 0, len(whole.vc2)
        whole_range = high == len(whole.vc2)
        limit = None if whole_range else whole.phi_nodes[high - 1]
        self.profile = RadialProfile(
            whole.s_first + _DS * low, _DS, whole.phi_nodes[low:high], whole.vc2[low:high], limit
        )
        #: Where the limit at infinity is read from; None where the extent ends before.
        self.s_far = last if whole_range else None

    @property
    def escape_energy(self) -> Tensor:
        r"""Limit of :math:`\Phi` at infinity, infinite if there is none, in (km/s)^2."""
        return self.profile.escape_energy

    @torch.no_grad()
    def enclosing(self, energy: Tensor) -> tuple[float, float]:
        """Return ln r of the nodes that enclose the circular orbits of the given energies (2,), in order."""
        p = self.profile
        low, high = torch.searchsorted(p.energy_nodes, energy).tolist()
        last = len(p.vc2) - 1
        return p.s_first + p.ds * min(max(low - 1, 0), last), p.s_first + p.ds * min(high, last)

    @torch.no_grad()
    def inner_edge(self, s_c: float) -> float:
        """Return where a profile may begin whose innermost circular orbit is at ``s_c``.

        Inside it the power law of its first node goes on; Phi is off by at most 1e-9 of an orbit's kinetic energy.
        """
        p = self.profile
        s = p.s_first + p.ds * torch.arange(len(p.vc2), dtype=torch.float64)
        here = int((s < s_c).sum()) - 1
        if here < 1:
            return p.s_first
        s, vc2, phi = s[: here + 1], p.vc2[: here + 1], p.phi_nodes[: here + 1]
        q = p.ln_vc2_slope[: here + 1, None]
        q = torch.where(q.abs() < 1e-7, torch.full_like(q, 1e-7), q)
        distance = (s[None] - s[:, None]).clamp(max=0)
        continued = phi[:, None] + vc2[:, None] * torch.expm1(q * distance) / q
        kinetic = p.energy_nodes[here] - phi
        error = ((continued - phi).abs() / kinetic).nan_to_num(torch.inf).amax(1)
        fine = torch.nonzero(error <= _TOLERANCE)[:, 0]
        return float(s[fine[-1]]) if len(fine) else p.s_first

    def tabulate(self, potential: Potential, s_first: float, s_last: float, ds: float) -> RadialProfile:
        """Tabulate the potential with its gradients, and with this extent's energy of escape."""
        p = self.profile
        s_first, s_last = max(s_first, p.s_first), min(s_last, p.s_last)
        limit = p.escape_energy if self.s_far is None else None
        return RadialProfile.of(potential, s_first, s_last, ds, self.s_far, limit, self._radial)


def escape_energy(potential: Potential) -> Tensor:
    r"""Return the energy at which a star escapes: the least limit of :math:`\Phi` along the axes, in (km/s)^2.

    Infinite if :math:`\Phi` has no limit, as that of a logarithmic potential. Without gradients.
    """
    with torch.no_grad():
        if potential.symmetry == "spherical":
            return Extent(potential).escape_energy
        s = INFINITY + _DS * torch.arange(5, dtype=torch.float64)
        axes = torch.eye(3, dtype=torch.float64)
        x = s.exp()[:, None, None] * axes
        phi = potential.phi(x)
        vc2 = -(x * potential.acceleration(x)).sum(-1)
        q = (vc2[-1] / vc2[0]).log() / float(s[-1] - s[0])
        falls = q < -1e-6
        limit = torch.where(falls, phi[-1] - vc2[-1] / torch.where(falls, q, -1.0), torch.inf)
        return limit.min()


def _usable(profile: RadialProfile) -> tuple[int, int]:
    """First and one past the last node of the longest run where the potential has stable circular orbits."""
    rising = torch.isfinite(profile.phi_nodes) & torch.isfinite(profile.vc2) & (profile.vc2 > 0)
    q = (profile.vc2[1:] / profile.vc2[:-1]).log() / profile.ds
    # deep in a core all energies are one to rounding: there its power law goes on
    energy = profile.energy_nodes
    told = energy.diff() > _ROUNDING * profile.phi_nodes[1:].abs()
    ok = (rising[1:] & rising[:-1] & (q > _LEAST_Q) & told).tolist()
    best, start = (0, 0), None
    for i, good in enumerate([*ok, False]):
        if good and start is None:
            start = i
        elif not good and start is not None:
            best, start = max(best, (start, i + 1), key=lambda run: run[1] - run[0]), None
    return best
