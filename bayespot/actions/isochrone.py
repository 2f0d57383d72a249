"""Closed-form actions, angles and frequencies of the isochrone sphere, both ways."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.actions.base import ActionAngles, ActionFinder, CappedActions, TorusMap, cap_energy
from bayespot.actions.plane import (
    angular_momentum,
    check_actions,
    combine_actions,
    combine_angles,
    combine_frequencies,
    orbital_plane,
    safe_atan2,
    safe_sqrt,
    split,
    split_angles,
    to_phase_space,
)
from bayespot.potential.analytic import Isochrone
from bayespot.potential.base import Potential
from bayespot.units import G, takes_tensors


class IsochroneActions(ActionFinder, TorusMap):
    r"""Actions of the isochrone :math:`\Phi = -k / (b + a)`, :math:`a = (b^2 + r^2)^{1/2}`.

    With k = G m_tot and b = r_s,

    .. math::
        H(J) = -\frac{k^2}{2 [J_r + (L + Q)/2]^2}, \quad Q = (L^2 + 4 k b)^{1/2}, \quad L = J_z + |J_\phi|.

    With :math:`A = k / (-2E)`, :math:`c = A - b`, :math:`s = (A / k)^{1/2}` the radial motion is that of a
    Kepler ellipse in the variable a: :math:`a = A - p`, :math:`r v_r s = q`, where
    (p, q) = e c (cos eta, sin eta) and

    .. math::
        \theta_r = \eta - q / A, \qquad
        \psi - \theta_z = \arctan\frac{q}{u + L s} + \frac{L}{Q} \arctan\frac{q}{u + 2 b + Q s}
            + \frac{1}{2} \left(1 + \frac{L}{Q}\right) \frac{q}{A}, \qquad u = a - b.

    These are the standard expressions written so that no two nearly equal numbers are subtracted and no
    formula is singular on circular, radial, planar or polar orbits. theta_r = 0 at pericentre; geometry
    and conventions of the other angles are those of `bayespot.actions.plane`.

    Differentiable in ``w`` (or J and theta) and in m_tot and r_s, to any order from w to J and up to third
    order from (J, theta) to w. An angle that does not exist (theta_r of a circular orbit) has derivative
    zero; so has w with respect to an action that is zero, where the true derivative is infinite.
    Unbound stars give NaN and leave the derivatives of the others finite.

    References
    ----------
    Binney & Tremaine (2008), Galactic Dynamics, section 3.5.2, equations 3.224 to 3.241;
    McGill & Binney (1990), MNRAS 244, 634, appendix.

    Examples
    --------
    >>> import torch
    >>> from bayespot.potential.analytic import Isochrone
    >>> potential = Isochrone(m_tot=1e11, r_s=3.0)
    >>> w = torch.tensor([8.0, 0.0, 1.0, 20.0, 150.0, 30.0], dtype=torch.float64)
    >>> J, theta, Omega = IsochroneActions().actions_angles(potential, w)
    >>> torch.allclose(IsochroneActions().phase_space(potential, J, theta), w)
    True
    """

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        """Return J ``(*batch, 3)`` in kpc km/s of every star, bound or not, and the excess energy.

        Raises
        ------
        ValueError
            If ``potential`` is not an `Isochrone` or the last axis of ``w`` is not 6.
        """
        k, b = _constants(potential)
        angular = angular_momentum(w)
        orbit = _radial_orbit(k, b, w, angular.L)
        return CappedActions(combine_actions(_radial_action(k, orbit), angular), orbit.excess)

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        """Return actions, angles and frequencies, each ``(*batch, 3)``; NaN where unbound.

        Raises
        ------
        ValueError
            If ``potential`` is not an `Isochrone` or the last axis of ``w`` is not 6.
        """
        k, b = _constants(potential)
        plane = orbital_plane(w)
        orbit = _radial_orbit(k, b, w, plane.L)
        theta_r = safe_atan2(orbit.q, orbit.c - orbit.u) - orbit.q / orbit.A
        lag = _lag(b, orbit.A, orbit.s, orbit.u, orbit.q, orbit.L, orbit.Q)
        Omega_r = 1 / (orbit.A * orbit.s)
        Omega_L = 0.5 * (1 + orbit.L / orbit.Q) * Omega_r
        return ActionAngles(
            J=_bound_only(combine_actions(_radial_action(k, orbit), plane), orbit.excess),
            theta=_bound_only(combine_angles(theta_r, lag, plane), orbit.excess),
            Omega=_bound_only(combine_frequencies(Omega_r, Omega_L, plane.Lz), orbit.excess),
        )

    def phase_space(self, potential: Potential, J: Tensor, theta: Tensor) -> Tensor:
        """Return w = (x, v) ``(*batch, 6)`` for actions and angles ``(*batch, 3)``; NaN where they are NaN.

        Raises
        ------
        ValueError
            If ``potential`` is not an `Isochrone`, the last axis is not 3, J_r < 0, J_z < 0 or an action is
            infinite.
        """
        k, b = _constants(potential)
        check_actions(J)
        J_r, J_phi, J_z = J.unbind(-1)
        theta_r, node, theta_z = split_angles(theta, J_phi)
        L = J_z + J_phi.abs()
        Q = (L**2 + 4 * k * b).sqrt()
        N = J_r + 0.5 * (L + Q)
        A, s = N**2 / k, N / k
        c = (J_r**2 + (J_r + 0.5 * L) * (L + Q)) / k
        ec = safe_sqrt(J_r * (J_r + Q) * (J_r + L) * (J_r + L + Q)) / k
        eta = solve_kepler(ec / A, theta_r)
        q = ec * eta.sin()
        # u = c - ec cos(eta), without its cancellation near the pericentre of a plunging orbit
        total = c + ec
        u = (L * s) ** 2 / torch.where(total > 0, total, 1.0) + 2 * ec * (0.5 * eta).sin() ** 2
        r = safe_sqrt(u * (u + 2 * b))
        central_speed = safe_sqrt(k * c / (A * b))
        v_r = torch.where(r > 0, q / (s * torch.where(r > 0, r, 1.0)), central_speed)
        psi = theta_z + _lag(b, A, s, u, q, L, Q)
        return to_phase_space(r, v_r, J_phi, J_z, node, psi)

    @takes_tensors(J="action")
    def energy(self, potential: Potential, J: Tensor) -> Tensor:
        """Return H(J) ``(*batch,)`` in (km/s)^2; its gradient in J is Omega.

        Raises
        ------
        ValueError
            If ``potential`` is not an `Isochrone`, the last axis is not 3, J_r < 0, J_z < 0 or an action is
            infinite.
        """
        k, b = _constants(potential)
        check_actions(J)
        L = J[..., 2] + J[..., 1].abs()
        return -0.5 * (k / (J[..., 0] + 0.5 * (L + (L**2 + 4 * k * b).sqrt()))) ** 2


def solve_kepler(eccentricity: Tensor, mean_anomaly: Tensor) -> Tensor:
    r"""Solve Kepler's equation :math:`\eta - e \sin\eta = M` to rounding error.

    Newton's method, started above the root, where it converges monotonically since the left side is convex
    on [0, pi]. The last two steps are differentiated: each squares the error that the detached start has as a
    function of e and M, so derivatives are right up to third order.

    Parameters
    ----------
    eccentricity : Float[Tensor, "*batch"]
        In [0, 1).
    mean_anomaly : Float[Tensor, "*batch"]
        In [-pi, pi], in radians.
    """
    with torch.no_grad():
        e, M = torch.broadcast_tensors(eccentricity, mean_anomaly.abs())
        # three upper bounds of the root; the last one since sin(eta) <= eta - eta^3 / 6 + eta^5 / 120
        eta = torch.minimum(torch.minimum(M + e, M / (1 - e)), 1.3 * (6 * M / e.clamp_min(1e-3)) ** (1 / 3))
        for _ in range(60):
            step = (eta - e * eta.sin() - M) / (1 - e * eta.cos())
            eta = eta - step
            if not bool((step.abs() > 1e-15 * (1 + eta)).any()):
                break
        eta = torch.where(mean_anomaly < 0, -eta, eta)
    for _ in range(2):
        eta = eta - (eta - eccentricity * eta.sin() - mean_anomaly) / (1 - eccentricity * eta.cos())
    return eta


class _RadialOrbit(NamedTuple):
    """The quantities of the class docstring, for a star whose speed is capped below escape."""

    excess: Tensor
    A: Tensor
    c: Tensor
    s: Tensor
    u: Tensor
    q: Tensor
    L: Tensor
    Q: Tensor


def _constants(potential: Potential) -> tuple[Tensor, Tensor]:
    """Return (k, b); each attribute is read once, since it may be a sample site."""
    if not isinstance(potential, Isochrone):
        raise ValueError(
            f"IsochroneActions needs an Isochrone potential, got {type(potential).__name__}; "
            "use SphericalActions for other spheres"
        )
    return G * potential.m_tot, potential.r_s


def _radial_orbit(k: Tensor, b: Tensor, w: Tensor, L: Tensor) -> _RadialOrbit:
    x, v = split(w)
    r2, v2 = (x**2).sum(-1), (v**2).sum(-1)
    a = (b**2 + r2).sqrt()
    phi = -k / (a + b)
    energy, excess = cap_energy(v2 / 2 + phi, phi, torch.zeros_like(phi))
    # every root below is of a positive number, also for unbound stars: their derivatives stay finite
    v2 = torch.where(excess > 0, 2 * (energy - phi), v2)
    minus_2E = -2 * phi - v2
    u = r2 / (a + b)
    c = (b * v2 - phi * u) / minus_2E
    A = b + c
    s = (A / k).sqrt()
    return _RadialOrbit(excess, A, c, s, u, (x * v).sum(-1) * s, L, (L**2 + 4 * k * b).sqrt())


def _radial_action(k: Tensor, orbit: _RadialOrbit) -> Tensor:
    """Return J_r = k / sqrt(-2E) - (L + Q) / 2, written so that it is exactly >= 0 near circular orbits."""
    N = k * orbit.s
    # (e c)^2 of a capped star is what its energy and angular momentum allow
    capped = (orbit.c**2 - (orbit.L * orbit.s) ** 2).clamp_min(0.0)
    ec2 = torch.where(orbit.excess > 0, capped, (orbit.c - orbit.u) ** 2 + orbit.q**2)
    low = k * orbit.c + orbit.L * N
    return k**2 * ec2 / (torch.where(low > 0, low, 1.0) * (N + 0.5 * (orbit.Q - orbit.L)))


def _lag(b: Tensor, A: Tensor, s: Tensor, u: Tensor, q: Tensor, L: Tensor, Q: Tensor) -> Tensor:
    """Return psi - theta_z of the class docstring."""
    ratio = L / Q
    swept = safe_atan2(q, u + L * s) + ratio * torch.atan2(q, u + 2 * b + Q * s)
    return swept + 0.5 * (1 + ratio) * q / A


def _bound_only(values: Tensor, excess: Tensor) -> Tensor:
    return torch.where(excess[..., None] > 0, torch.nan, values)
