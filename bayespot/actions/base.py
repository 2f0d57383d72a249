"""Two interfaces: `ActionFinder` (w -> J, theta, Omega) and `TorusMap` (J, theta -> w).

They are separate because most finders have no inverse; the isochrone and the general spherical ones have both.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

from torch import Tensor

from bayespot.potential.base import Potential


class ActionAngles(NamedTuple):
    """Actions, angles and frequencies, each ``(*batch, 3)`` in the order (r, phi, z).

    ``J`` = (J_r, J_phi, J_z) in kpc km/s with J_phi = L_z and, for a sphere, J_z = L - |L_z|; ``theta`` in
    [0, 2 pi); ``Omega`` in km/s/kpc. NaN where the star is unbound.
    """

    J: Tensor
    theta: Tensor
    Omega: Tensor


class ActionFinder(abc.ABC):
    """Maps phase-space positions to actions in a given potential."""

    @abc.abstractmethod
    def actions(self, potential: Potential, w: Tensor) -> Tensor:
        """Return J ``(*batch, 3)`` for ``w`` = (x, v) ``(*batch, 6)`` in kpc and km/s; NaN where unbound."""

    @abc.abstractmethod
    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        """Return actions, angles and frequencies; NaN where unbound."""


class TorusMap(abc.ABC):
    """Maps actions and angles to phase-space positions in a given potential (the inverse of a finder)."""

    @abc.abstractmethod
    def phase_space(self, potential: Potential, J: Tensor, theta: Tensor) -> Tensor:
        """Return w = (x, v) ``(*batch, 6)`` for actions and angles ``(*batch, 3)``; differentiable in all three.

        Raises
        ------
        ValueError
            If an action is impossible (J_r < 0 or J_z < 0) or no orbit of the potential has it.
        """
