"""Two interfaces: `ActionFinder` (w -> J, theta, Omega) and `TorusMap` (J, theta -> w).

They are separate because most finders have no inverse; the isochrone and the general spherical ones have both.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.potential.base import Potential
from bayespot.units import Declared, takes_tensors

#: Stars whose squared speed comes closer than this fraction to the escape speed's count as unbound.
ESCAPE_MARGIN = 1e-4


class ActionAngles(NamedTuple):
    """Actions, angles and frequencies, each ``(*batch, 3)`` in the order (r, phi, z).

    ``J`` = (J_r, J_phi, J_z) in kpc km/s with J_phi = L_z and, for a sphere, J_z = L - |L_z|; ``theta`` in
    [0, 2 pi); ``Omega`` in km/s/kpc. NaN where the star is unbound.
    """

    J: Tensor
    theta: Tensor
    Omega: Tensor


class CappedActions(NamedTuple):
    """Actions that exist for every star, so that a likelihood can recover from a bad potential.

    ``J (*batch, 3)`` are those of the star with its energy capped just below escape; ``excess (*batch,)``
    is (E - E_cap)/(E_escape - Phi(x)), zero for bound stars.
    """

    J: Tensor
    excess: Tensor


class ActionFinder(Declared, abc.ABC):
    """Maps phase-space positions to actions in a given potential; gradients are exact to first order."""

    @takes_tensors(w="phase_space")
    @abc.abstractmethod
    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        """Return finite actions for ``w`` = (x, v) ``(*batch, 6)`` in kpc and km/s, and the excess energy."""

    @takes_tensors(w="phase_space")
    @abc.abstractmethod
    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        """Return actions, angles and frequencies; NaN where unbound."""

    @takes_tensors(w="phase_space")
    def actions(self, potential: Potential, w: Tensor) -> Tensor:
        """Return J ``(*batch, 3)``; NaN where unbound."""
        J, excess = self.capped_actions(potential, w)
        return torch.where(excess[..., None] > 0, torch.nan, J)

    @takes_tensors(w="phase_space")
    def tabulated(self, potential: Potential, w: Tensor) -> ActionFinder:
        """Return a finder for this potential that serves ``w (n, 6)`` and any part of it, block after block.

        What no star changes is computed once, by finders that have such a thing; the others return themselves.
        """
        return self

    @takes_tensors(w="phase_space")
    def settled(self, potential: Potential, w: Tensor) -> ActionFinder:
        """Return a finder that keeps the choices it would make for the stars ``w (n, 6)`` in this potential.

        Finders that choose something by the potential, as a focal distance, are spared it in potentials near this one;
        the others return themselves.
        """
        return self

    def rough(self) -> ActionFinder:
        """Return a finder for statistics of many stars: J and theta to 1e-5, at less cost where that exists."""
        return self

    def through(self, change: Callable[[Tensor], Tensor]) -> ActionFinder:
        """Return the finder with every tensor that it keeps of a potential passed through ``change``."""
        return self


class TorusMap(Declared, abc.ABC):
    """Maps actions and angles to phase-space positions in a given potential (the inverse of a finder)."""

    @takes_tensors(J="action", theta="phase")
    @abc.abstractmethod
    def phase_space(self, potential: Potential, J: Tensor, theta: Tensor) -> Tensor:
        """Return w = (x, v) ``(*batch, 6)`` for actions and angles ``(*batch, 3)``; differentiable in all three.

        Raises
        ------
        ValueError
            If an action is impossible (J_r < 0 or J_z < 0) or no orbit of the potential has it.
        """

    @takes_tensors(J="action")
    def reaches(self, potential: Potential, J: Tensor) -> Tensor:
        """Return which actions ``(*batch, 3)`` the map can place: all that are possible, unless overridden."""
        return (J[..., 0] >= 0) & (J[..., 2] >= 0)


@takes_tensors(energy="potential", phi="potential", escape="potential")
def cap_energy(energy: Tensor, phi: Tensor, escape: Tensor) -> tuple[Tensor, Tensor]:
    """Return (energy capped just below escape, excess); see `CappedActions`."""
    # a star outside the place where a potential ceases to hold orbits has Phi above escape
    depth = torch.where(torch.isfinite(escape), (escape - phi).abs(), 1.0)
    cap = torch.where(torch.isfinite(escape), escape - ESCAPE_MARGIN * depth, torch.inf)
    excess = torch.where(energy > cap, (energy - torch.where(energy > cap, cap, energy)) / depth, 0.0)
    return torch.minimum(energy, cap), excess
