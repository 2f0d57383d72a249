"""Spherical potentials tabulated as far as orbits reach: those of stars, or those of given actions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.actions.base import cap_energy
from bayespot.potential.base import Potential
from bayespot.potential.extent import Extent
from bayespot.potential.profile import RadialProfile

#: e-foldings of radius tabulated inside the least circular radius, and beyond the largest: an apocentre is at most
#: twice as far out.
_INNER, _OUTER = 5.0, 2.0
#: e-foldings of the circular radius by which the table of J_r goes beyond the orbits, at whose edges it is less exact.
_EDGE = 1.0
#: L + BEYOND J_r bounds the angular momentum of the circular orbit of the same energy.
BEYOND = 2.2


class Reach(NamedTuple):
    """A potential tabulated over orbits, whose circular radii lie well within exp(``s_first``) and exp(``s_last``)."""

    profile: RadialProfile
    s_first: float
    s_last: float


def profile_of_stars(potential: Potential, s: Tensor, v: Tensor, ds: float) -> Reach:
    """Tabulate a spherical potential over the orbits of stars at s = ln(r/kpc) with velocities v (km/s).

    Their energies decide how far it goes, and not where they happen to be: a star near its pericentre may go far.

    Raises
    ------
    ValueError
        If the potential is not spherical, or no star has finite coordinates.
    """
    with torch.no_grad():
        kinetic = (v**2).sum(-1) / 2
        finite = torch.isfinite(s) & torch.isfinite(kinetic)
        if not bool(finite.any()):
            raise ValueError("no star has finite coordinates: there is nothing to compute actions of")
        s, kinetic = s[finite], kinetic[finite]
    extent = Extent(potential, s)
    with torch.no_grad():
        if not extent.usable:
            # NaN all over, which tells an optimiser to turn back
            s_first, s_last = float(s.min()), max(float(s.max()), float(s.min()) + 4)
            return Reach(RadialProfile.of(potential, s_first, s_last, ds), s_first, s_last)
        phi = extent.profile.phi(s)
        energy, _ = cap_energy(kinetic + phi, phi, extent.escape_energy)
        first, last = extent.enclosing(torch.stack([energy.min(), energy.max()]))
    return _reach(potential, extent, first, last, ds)


def profile_of_actions(potential: Potential, J_r: Tensor, L: Tensor, ds: float) -> Reach:
    """Tabulate a spherical potential over the orbits of given actions (kpc km/s).

    Raises
    ------
    ValueError
        If the potential is not spherical, or has no orbit of such actions.
    """
    extent = Extent(potential)
    coarse = extent.profile
    low, high = float((L + J_r).min()), float((L + BEYOND * J_r).max())
    if not (low > 0 and extent.usable and float(coarse.ln_lc_nodes[-1]) > math.log(high)):
        raise ValueError(
            f"no orbit of this potential has actions from {low:.6g} to {high:.6g} kpc km/s between "
            f"{math.exp(coarse.s_first):.2g} and {math.exp(coarse.s_last):.2g} kpc; drop them (J = 0 is the star "
            "at rest in the centre)"
        )
    first, last = coarse.s_of_ln_lc(torch.tensor([low, high], dtype=torch.float64).log()).tolist()
    return _reach(potential, extent, first, last, ds)


def _reach(potential: Potential, extent: Extent, s_first: float, s_last: float, ds: float) -> Reach:
    inner = min(s_first - _EDGE - _INNER, extent.inner_edge(s_first))
    profile = extent.tabulate(potential, inner, s_last + _OUTER, ds)
    return Reach(profile, s_first - _EDGE, s_last + _EDGE)
