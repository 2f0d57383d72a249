"""Actions, angles and frequencies in any potential, from integrated orbits and a generating function."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayespot.actions.base import ActionAngles, ActionFinder, CappedActions, cap_energy
from bayespot.actions.families import (
    FAMILIES,
    into_plane,
    is_flat,
    is_radial,
    is_radial_in_plane,
    off_plane,
    on_axis,
    orbit_family,
)
from bayespot.actions.isochrone import IsochroneActions
from bayespot.actions.orbit import integrate_transformed
from bayespot.actions.plane import split, wrap
from bayespot.actions.torus_fit import Orbit, box_modes, torus, tube_modes, unwrapped
from bayespot.actions.toys import axial_oscillator, fitted_isochrone, oscillator
from bayespot.potential.base import Potential, Symmetry
from bayespot.potential.extent import CENTRE, INFINITY, escape_energy
from bayespot.units import takes, takes_tensors

#: Relative energy error above which an orbit is integrated again with four times as many steps, and how often.
_ENERGY_ERROR, _MAX_SUBSTEPS = 1e-5, 64


class OrbitActions(NamedTuple):
    """What an orbit tells of its torus; the first five are ``(*batch, 3)``.

    ``J``, ``theta``, ``Omega`` as in `ActionAngles`; ``error`` is the estimated error of J and ``scatter`` the rms of
    J along the orbit once the generating function is applied, both in kpc km/s; ``family (*batch,)`` indexes
    `FAMILIES`; ``reliable (*batch,)`` is whether J passes as a result (`GeneratingFunctionActions`, ``max_error``).
    """

    J: Tensor
    theta: Tensor
    Omega: Tensor
    error: Tensor
    scatter: Tensor
    family: Tensor
    reliable: Tensor


class GeneratingFunctionActions(ActionFinder):
    r"""Action finder of every potential with the three principal planes for symmetry planes.

    The orbit is integrated to both sides of the star, and a toy potential with known actions J' and angles theta' is
    fitted to it: an isochrone for tubes, a triaxial harmonic oscillator for boxes. Tubes of small L_z in an
    axisymmetric potential are boxes in the meridional plane, and their L passes through zero, where an isochrone's
    actions have an edge; an oscillator with one frequency in x and y is fitted to tubes as well, and the toy with the
    smaller error counts. A polar orbit (L_z = 0) is the limit of L_z > 0. The canonical map from toy to true torus has
    the generating function :math:`\theta' \cdot J + 2 \sum_n S_n(J) \sin n \cdot \theta'`, so

    .. math::
        J' = J + 2 \sum_n n\, S_n \cos n \cdot \theta', \qquad
        \theta_0 + \Omega t = \theta' + 2 \sum_n \frac{\partial S_n}{\partial J} \sin n \cdot \theta',

    two linear least-squares problems along the orbit, weighted with a window that vanishes at its ends, which keeps
    what the finite series leaves out from leaking in. Terms up to ``n_max`` in each angle, twice that in theta_r;
    even in every angle that a reflection shifts by pi, and without those that the potential's symmetry forbids.

    Angles and frequencies come out far more accurate than actions, which eccentric orbits would need many terms for;
    but :math:`\Omega \cdot J = \langle v^2 \rangle` on every torus, and the mean square speed along the orbit is
    accurate too. J is moved to satisfy it, each action in proportion to the square of its scatter.

    For tubes J = (J_r, J_phi, J_z) and theta as everywhere here; for a tube about the x axis the axes are renamed
    (y, z, x), so J_phi is the circulation about x. For boxes J = (J_x, J_y, J_z), each angle zero where the
    star crosses that plane of symmetry towards positive values.

    ``error`` is the difference between the fits to the first and the last two thirds of the orbit, with the
    energy error of the integration and the move of J added in quadrature: it grows where an orbit is resonant, chaotic
    or too short. An orbit is reliable if its error is below ``max_error`` of the sum of abs(J), no action is negative
    beyond its error, and it is not confined to the axis of a flattened potential, where the families meet. `orbits`
    returns what was found of the others too; `actions`, `actions_angles` and `capped_actions` return NaN for them and
    say how many there are in a RuntimeWarning.

    No derivatives: asking for them raises RuntimeError.

    Parameters
    ----------
    n_periods
        Length of the orbit, about, in periods of the circular orbit of the same energy.
    n_max
        Largest mode: (n_r/2)^2 + n_phi^2 + n_z^2 <= n_max^2.
    steps_per_period
        Steps of the integration, equal in s (`integrate_transformed`), and points of the fit.
    chunk
        Stars at a time.
    max_error
        Largest ``error``, as a fraction of the sum of abs(J), of an action that is passed on.

    References
    ----------
    Sanders & Binney (2014), MNRAS 441, 3284: equations 7 to 15.

    Examples
    --------
    >>> import torch
    >>> from bayespot.potential.analytic import Logarithmic
    >>> w = torch.tensor([[8.0, 0.0, 1.0, 20.0, 150.0, 30.0]], dtype=torch.float64)
    >>> torus = GeneratingFunctionActions().orbits(Logarithmic(v_0=220.0, r_c=1.0, q=0.8), w)
    >>> FAMILIES[int(torus.family)], bool((torus.error < 0.2).all())
    ('tube about z', True)
    """

    @takes(n_periods="number", max_error="number")
    def __init__(
        self,
        n_periods: float = 32.0,
        n_max: int = 6,
        steps_per_period: int = 64,
        chunk: int = 256,
        max_error: float = 0.1,
    ) -> None:
        for name, value, least in (
            ("n_periods", n_periods, 4),
            ("n_max", n_max, 1),
            ("steps_per_period", steps_per_period, 4 * n_max),
            ("chunk", chunk, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not max_error > 0:
            raise ValueError(f"max_error must be positive, a fraction of the sum of abs(J); got {max_error}")
        self.n_periods, self.n_max, self.steps_per_period, self.chunk = n_periods, n_max, steps_per_period, chunk
        self.max_error = max_error

    @takes_tensors(w="phase_space")
    def orbits(self, potential: Potential, w: Tensor) -> OrbitActions:
        """Return actions with their errors; NaN where the star is unbound or no toy potential fits.

        Parameters
        ----------
        potential : Potential
        w : Float[Tensor, "*batch 6"]
            Position (kpc) and velocity (km/s).

        Raises
        ------
        ValueError
            If the last axis of ``w`` is not 6.
        """
        split(w)
        with torch.no_grad():
            flat = w.detach().reshape(-1, 6)
            far = escape_energy(potential)
            parts = [self._orbits(potential, part, far) for part in flat.split(self.chunk)]
            found = OrbitActions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        shape = w.shape[:-1]
        return OrbitActions(*(part.reshape(shape + part.shape[1:]) for part in found))

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        found = self._reliable(potential, w)
        return ActionAngles(*(_refusing(part, potential, w) for part in (found.J, found.theta, found.Omega)))

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        with torch.no_grad():
            x, v = split(w.detach())
            phi = potential.phi(x)
            kinetic = (v**2).sum(-1) / 2
            energy, excess = cap_energy(kinetic + phi, phi, escape_energy(potential))
            slower = torch.where(excess > 0, ((energy - phi) / kinetic).sqrt(), 1.0)
            J = self._reliable(potential, torch.cat([x, v * slower[..., None]], -1)).J
        return CappedActions(_refusing(J, potential, w), _refusing(excess, potential, w))

    def _reliable(self, potential: Potential, w: Tensor) -> OrbitActions:
        """Return `orbits` with NaN for those that are not reliable, and warn of them."""
        found = self.orbits(potential, w)
        dropped = ~found.reliable & torch.isfinite(found.J).all(-1)
        n = int(dropped.sum())
        if n:
            first = dropped.reshape(-1).nonzero()[0].item()
            share = found.error.norm(dim=-1) / found.J.abs().sum(-1)
            warnings.warn(
                f"{n} of {dropped.numel()} stars have no reliable actions and get NaN, the first is row {first}: the "
                f"estimated error of J is up to {100 * float(share[dropped].max()):.2g} % of the sum of abs(J), or an "
                "action came out negative; such orbits are resonant, chaotic or next to another family. "
                "orbits() has what was found; more periods (n_periods) may help",
                RuntimeWarning,
                stacklevel=3,
            )
        hide = dropped[..., None]
        J, theta, Omega = (torch.where(hide, torch.nan, part) for part in found[:3])
        return found._replace(J=J, theta=theta, Omega=Omega)

    def _orbits(self, potential: Potential, w: Tensor, far: Tensor) -> OrbitActions:
        x, v = w[:, :3], w[:, 3:]
        phi = potential.phi(x)
        energy = (v**2).sum(-1) / 2 + phi
        good = torch.isfinite(w).all(-1) & (energy < far)
        nan = w.new_full((len(w), 3), torch.nan)
        J, theta, Omega, error, scatter = (nan.clone() for _ in range(5))
        family = torch.zeros(len(w), dtype=torch.long)
        result = OrbitActions(J, theta, Omega, error, scatter, family, torch.zeros(len(w), dtype=torch.bool))
        if potential.symmetry == "axisymmetric":
            w = off_plane(w)
        # a star at rest in the centre stays there: no orbit, no frequencies
        resting = good & (w == 0).all(-1)
        for field in (J, error, scatter):
            field[resting] = 0.0
        result.reliable[resting] = True
        good = good & ~resting
        if not bool(good.any()):
            return result
        run = self._integrate(potential, w[good], energy[good])
        followed = torch.isfinite(run.energy_error)
        run = Orbit(*(field[followed] for field in run))
        family = orbit_family(run.w, potential.symmetry)
        rows = good.nonzero()[followed, 0]
        result.family[rows] = family
        for kind in range(len(FAMILIES)):
            chosen = family == kind
            if bool(chosen.any()):
                part = Orbit(*(field[chosen] for field in run))
                for whole, found in zip(result[:5], self._fit(part, kind, potential.symmetry), strict=True):
                    whole[rows[chosen]] = found
        result.reliable[rows] = self._passes(result, rows) & ~on_axis(run.w, potential.symmetry)
        return result

    def _passes(self, result: OrbitActions, rows: Tensor) -> Tensor:
        """Which orbits have small errors and possible actions; negative ones within their error become zero."""
        J, error = result.J[rows], result.error[rows]
        size = J.abs().sum(-1, keepdim=True)
        # J_phi, and it alone, may be negative; so may none of a box
        signed = torch.zeros_like(J, dtype=torch.bool)
        signed[:, 1] = result.family[rows] != FAMILIES.index("box")
        negative = (J < 0) & ~signed
        result.J[rows] = torch.where(negative & (J + error + 1e-9 * size >= 0), 0.0, J)
        possible = ~((result.J[rows] < 0) & ~signed).any(-1)
        return possible & (error.norm(dim=-1) <= self.max_error * size[:, 0])

    def _integrate(self, potential: Potential, w: Tensor, energy: Tensor) -> Orbit:
        """Integrate to both sides of every star."""
        radius = _circular_radius(potential, energy)
        period = 2 * math.pi * (radius / -potential.radial_acceleration(radius)).sqrt()
        step = period / self.steps_per_period
        half = round(self.n_periods * self.steps_per_period / 2)
        # impact parameter: no orbit comes much closer to the centre, and the closest need not be resolved
        impact = torch.linalg.vector_norm(torch.linalg.cross(w[:, :3], w[:, 3:]), dim=-1) / (
            torch.linalg.vector_norm(w[:, 3:], dim=-1).clamp(min=1e-300)
        )
        closest = torch.minimum(torch.maximum(impact / 3, 1e-6 * radius), 1e-3 * radius)
        n = 2 * half + 1
        run = Orbit(w.new_empty(len(w), n), w.new_empty(len(w), n, 6), w.new_empty(len(w), n), w.new_empty(len(w)))
        todo, n_substeps = torch.arange(len(w)), 1
        while len(todo) and n_substeps <= _MAX_SUBSTEPS:
            both = integrate_transformed(
                potential,
                w[todo].repeat(2, 1),
                radius[todo].repeat(2),
                closest[todo].repeat(2),
                torch.cat([step[todo], -step[todo]]),
                half,
                n_substeps=n_substeps,
            )
            sides = [field.chunk(2, 1) for field in both]
            parts = [torch.cat([back.flip(0)[:-1], ahead]).transpose(0, 1) for ahead, back in sides]
            for whole, part in zip(run, [*parts, _energy_error(potential, parts[1])], strict=True):
                whole[todo] = part
            todo = todo[~(run.energy_error[todo] < _ENERGY_ERROR)]
            n_substeps *= 4
        return run

    def _fit(self, run: Orbit, kind: int, symmetry: Symmetry) -> tuple[Tensor, ...]:
        """J, theta, Omega, error and scatter of the orbits of one family."""
        if FAMILIES[kind] == "box":
            return self._fit_toy(run, run.w, *oscillator(run.w), box_modes(self.n_max))
        orbit = run.w
        if FAMILIES[kind] == "tube about x":
            orbit = orbit[..., [1, 2, 0, 4, 5, 3]]
        azimuth = torch.zeros(len(orbit), dtype=orbit.dtype)
        if symmetry != "triaxial":
            orbit, azimuth = into_plane(orbit)
        modes = tube_modes(self.n_max, symmetry)
        J_toy, theta_toy, _ = IsochroneActions().actions_angles(fitted_isochrone(orbit), orbit)
        found = self._fit_toy(run, orbit, J_toy, theta_toy, modes)
        if symmetry == "axisymmetric":
            other = self._fit_toy(run, orbit, *axial_oscillator(orbit), modes)
            better = ~(found[3].norm(dim=-1, keepdim=True) <= other[3].norm(dim=-1, keepdim=True))
            found = tuple(torch.where(better, b, a) for a, b in zip(found, other, strict=True))
        J, theta, Omega, *rest = found
        theta = wrap(theta + azimuth[:, None] * theta.new_tensor([0.0, 1.0, 0.0]))
        # a radial orbit has no plane, whose angles would be rounding, and in the plane of a disc no vertical motion
        hidden = torch.tensor([False, True, True]) if symmetry == "spherical" else torch.tensor([False, False, True])
        plain = is_radial_in_plane(orbit) if symmetry == "axisymmetric" else is_radial(orbit)
        hide = (plain & (is_flat(orbit) | (symmetry == "spherical")) & (symmetry != "triaxial"))[:, None] & hidden
        theta, Omega = (torch.where(hide, torch.nan, part) for part in (theta, Omega))
        return J, theta, Omega, *rest

    @staticmethod
    def _fit_toy(run: Orbit, orbit: Tensor, J_toy: Tensor, theta_toy: Tensor, modes: Tensor) -> tuple[Tensor, ...]:
        theta_toy = unwrapped(theta_toy)
        n = orbit.shape[1]
        whole = torus(run, orbit, J_toy, theta_toy, modes, slice(0, n))
        first, last = (
            torus(run, orbit, J_toy, theta_toy, modes, part).J for part in (slice(0, n - n // 3), slice(n // 3, n))
        )
        drift = run.energy_error * J_toy.abs().sum(-1).mean(1)
        error = ((first - last) ** 2 + whole.moved**2 + drift[:, None] ** 2).sqrt()
        return whole.J, wrap(whole.theta), whole.Omega, error, whole.scatter


def _circular_radius(potential: Potential, energy: Tensor) -> Tensor:
    """Radius of the circular orbit on the x axis with the star's energy, by bisection in ln r."""
    low, high = (torch.full_like(energy, end) for end in (CENTRE, INFINITY))
    for _ in range(50):
        middle = (low + high) / 2
        radius = middle.exp()
        above = potential.phi_r(radius) - radius * potential.radial_acceleration(radius) / 2 > energy
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return ((low + high) / 2).exp()


def _energy_error(potential: Potential, orbit: Tensor) -> Tensor:
    """Largest change of the energy over the largest kinetic energy, per star of (n, T, 6)."""
    kinetic = (orbit[..., 3:] ** 2).sum(-1) / 2
    energy = kinetic + potential.phi(orbit[..., :3])
    return (energy - energy[:, energy.shape[1] // 2, None]).abs().amax(1) / kinetic.amax(1)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "GeneratingFunctionActions gives no derivatives: use SphericalActions in spheres to fit a potential"
        )


def _refusing(value: Tensor, potential: Potential, w: Tensor) -> Tensor:
    """Return ``value``, whose derivatives raise where there would have been any."""
    inputs = [w, *potential.parameters()]
    return _Refuse.apply(value, *inputs) if any(t.requires_grad for t in inputs) else value
