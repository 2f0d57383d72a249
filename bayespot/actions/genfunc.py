"""Actions, angles and frequencies in any potential, from integrated orbits and a generating function."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayespot.actions.base import ActionAngles, ActionFinder, CappedActions, cap_energy
from bayespot.actions.isochrone import IsochroneActions
from bayespot.actions.orbit import integrate_transformed
from bayespot.actions.plane import split, wrap
from bayespot.potential.analytic import Isochrone
from bayespot.potential.base import Potential, Symmetry
from bayespot.units import G, takes, takes_tensors

#: Orbit families of `OrbitActions.family`.
FAMILIES = ("box", "tube about z", "tube about x")

#: Relative energy error above which an orbit is integrated again with four times as many steps, and how often.
_ENERGY_ERROR, _MAX_SUBSTEPS = 1e-5, 64

#: Ridge of the normal equations, relative to their diagonal: resonant modes, constant along the orbit, belong to J.
_RIDGE = 1e-6

#: Toy isochrones tried: ln(b / median radius).
_LN_B = (-6.0, 4.0)


class OrbitActions(NamedTuple):
    """What an orbit tells of its torus; the first five are ``(*batch, 3)``.

    ``J``, ``theta``, ``Omega`` as in `ActionAngles`; ``error`` is the estimated error of J and ``scatter`` the rms of
    J along the orbit once the generating function is applied, both in kpc km/s; ``family (*batch,)`` indexes
    `FAMILIES`.
    """

    J: Tensor
    theta: Tensor
    Omega: Tensor
    error: Tensor
    scatter: Tensor
    family: Tensor


class GeneratingFunctionActions(ActionFinder):
    r"""Action finder of every potential with the three principal planes for symmetry planes.

    The orbit is integrated to both sides of the star, and a toy potential with known actions J' and angles theta' is
    fitted to it: an isochrone for tubes, a triaxial harmonic oscillator for boxes. The canonical map from toy to
    true torus has the generating function :math:`\theta' \cdot J + 2 \sum_n S_n(J) \sin n \cdot \theta'`, so

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
    or too short.

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

    @takes(n_periods="number")
    def __init__(self, n_periods: float = 32.0, n_max: int = 6, steps_per_period: int = 64, chunk: int = 256) -> None:
        for name, value, least in (
            ("n_periods", n_periods, 4),
            ("n_max", n_max, 1),
            ("steps_per_period", steps_per_period, 4 * n_max),
            ("chunk", chunk, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.n_periods, self.n_max, self.steps_per_period, self.chunk = n_periods, n_max, steps_per_period, chunk

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
            parts = [self._orbits(potential, part) for part in flat.split(self.chunk)]
            found = OrbitActions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        shape = w.shape[:-1]
        return OrbitActions(*(part.reshape(shape + part.shape[1:]) for part in found))

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        found = self.orbits(potential, w)
        return ActionAngles(*(_refusing(part, potential, w) for part in (found.J, found.theta, found.Omega)))

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        with torch.no_grad():
            x, v = split(w.detach())
            phi = potential.phi(x)
            kinetic = (v**2).sum(-1) / 2
            energy, excess = cap_energy(kinetic + phi, phi, _escape_energy(potential, x))
            slower = torch.where(excess > 0, ((energy - phi) / kinetic).sqrt(), 1.0)
            J = self.orbits(potential, torch.cat([x, v * slower[..., None]], -1)).J
        return CappedActions(_refusing(J, potential, w), _refusing(excess, potential, w))

    def _orbits(self, potential: Potential, w: Tensor) -> OrbitActions:
        x, v = w[:, :3], w[:, 3:]
        phi = potential.phi(x)
        energy = (v**2).sum(-1) / 2 + phi
        far = _escape_energy(potential, x)
        good = torch.isfinite(w).all(-1) & (energy < far)
        nan = w.new_full((len(w), 3), torch.nan)
        J, theta, Omega, error, scatter = (nan.clone() for _ in range(5))
        result = OrbitActions(J, theta, Omega, error, scatter, torch.zeros(len(w), dtype=torch.long))
        if not bool(good.any()):
            return result
        run = self._integrate(potential, w[good], energy[good])
        followed = torch.isfinite(run.energy_error)
        run = _Orbit(*(field[followed] for field in run))
        family = _families(run.w, potential.symmetry)
        rows = good.nonzero()[followed, 0]
        result.family[rows] = family
        for kind in range(len(FAMILIES)):
            chosen = family == kind
            if bool(chosen.any()):
                part = _Orbit(*(field[chosen] for field in run))
                for whole, found in zip(result[:5], self._fit(part, kind, potential.symmetry), strict=True):
                    whole[rows[chosen]] = found
        return result

    def _integrate(self, potential: Potential, w: Tensor, energy: Tensor) -> _Orbit:
        """Integrate to both sides of every star."""
        radius = _circular_radius(potential, w, energy)
        period = 2 * math.pi * (radius / -potential.radial_acceleration(radius)).sqrt()
        step = period / self.steps_per_period
        half = round(self.n_periods * self.steps_per_period / 2)
        # impact parameter: no orbit comes much closer to the centre, and the closest need not be resolved
        impact = torch.linalg.vector_norm(torch.linalg.cross(w[:, :3], w[:, 3:]), dim=-1) / (
            torch.linalg.vector_norm(w[:, 3:], dim=-1).clamp(min=1e-300)
        )
        closest = torch.minimum(torch.maximum(impact / 3, 1e-6 * radius), 1e-3 * radius)
        n = 2 * half + 1
        run = _Orbit(w.new_empty(len(w), n), w.new_empty(len(w), n, 6), w.new_empty(len(w), n), w.new_empty(len(w)))
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

    def _fit(self, run: _Orbit, kind: int, symmetry: Symmetry) -> tuple[Tensor, ...]:
        orbit = run.w
        if FAMILIES[kind] == "box":
            J_toy, theta_toy = _oscillator(orbit)
            modes = _box_modes(self.n_max)
        else:
            if FAMILIES[kind] == "tube about x":
                orbit = orbit[..., [1, 2, 0, 4, 5, 3]]
            J_toy, theta_toy, _ = IsochroneActions().actions_angles(_toy_isochrone(orbit), orbit)
            modes = _tube_modes(self.n_max, symmetry)
        theta_toy = _unwrap(theta_toy)
        n = orbit.shape[1]
        whole = _torus(run, orbit, J_toy, theta_toy, modes, slice(0, n))
        first, last = (
            _torus(run, orbit, J_toy, theta_toy, modes, part).J for part in (slice(0, n - n // 3), slice(n // 3, n))
        )
        drift = run.energy_error * J_toy.abs().sum(-1).mean(1)
        error = ((first - last) ** 2 + whole.moved**2 + drift[:, None] ** 2).sqrt()
        return whole.J, wrap(whole.theta), whole.Omega, error, whole.scatter


class _Orbit(NamedTuple):
    """``times (n, T)`` around zero, ``w (n, T, 6)``, ``rate (n, T)`` and the relative ``energy_error (n,)``."""

    times: Tensor
    w: Tensor
    rate: Tensor
    energy_error: Tensor


class _Torus(NamedTuple):
    """Each (n, 3); ``moved`` is the change of J that made Omega . J the mean square speed."""

    J: Tensor
    theta: Tensor
    Omega: Tensor
    scatter: Tensor
    moved: Tensor


def _torus(run: _Orbit, orbit: Tensor, J_toy: Tensor, theta_toy: Tensor, modes: Tensor, part: slice) -> _Torus:
    times, J_toy, theta_toy = run.times[:, part], J_toy[:, part], theta_toy[:, part]
    weight = _window(times) * run.rate[:, part]
    weight = weight / weight.sum(1, keepdim=True)
    phase = theta_toy @ modes.T
    J, coefficients = _actions(J_toy, phase, modes, weight)
    theta, Omega = _angles(times, theta_toy, phase, weight)
    along = J_toy - 2 * (phase.cos() * coefficients[:, None]) @ modes
    variance = (weight[..., None] * (along - J[:, None]) ** 2).sum(1)
    v2 = (weight * (orbit[:, part, 3:] ** 2).sum(-1)).sum(1)
    spread = (variance * Omega**2).sum(-1)
    lack = (v2 - (Omega * J).sum(-1)) / torch.where(spread > 0, spread, 1.0)
    moved = variance * Omega * lack[:, None]
    return _Torus(J + moved, theta, Omega, variance.sqrt(), moved)


def _escape_energy(potential: Potential, x: Tensor) -> Tensor:
    """Least potential on the axes at 1e6 times the largest radius: infinity for all a star can tell."""
    far = 1e6 * torch.linalg.vector_norm(x[torch.isfinite(x).all(-1)], dim=-1).max() if x.numel() else x.sum()
    return potential.phi(far * torch.eye(3, dtype=x.dtype)).min()


def _circular_radius(potential: Potential, w: Tensor, energy: Tensor) -> Tensor:
    """Radius of the circular orbit on the x axis with the star's energy, by bisection in ln r."""
    r = torch.linalg.vector_norm(w[:, :3], dim=-1)
    low, high = (r * 1e-6).log(), (r * 1e6).log()
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


def _families(orbit: Tensor, symmetry: Symmetry) -> Tensor:
    """Tubes keep the sense of rotation about their axis, boxes about none (n, T, 6) -> (n,)."""
    tube_z = torch.full((len(orbit),), FAMILIES.index("tube about z"))
    if symmetry != "triaxial":
        return tube_z
    L = torch.linalg.cross(orbit[..., :3], orbit[..., 3:])
    keeps = (L > 0).all(1) | (L < 0).all(1)
    return torch.where(keeps[:, 2], tube_z, torch.where(keeps[:, 0], FAMILIES.index("tube about x"), 0))


def _toy_isochrone(orbit: Tensor) -> Isochrone:
    r"""Isochrones (n, 1) whose energy varies least along the orbits (n, T, 6).

    For a given b the energy is linear in k = G M, which is solved for; b by a scan and golden-section search.
    """
    r2 = (orbit[..., :3] ** 2).sum(-1)
    kinetic = (orbit[..., 3:] ** 2).sum(-1) / 2
    scale = r2.median(1).values.sqrt().log()

    def at(ln_b: Tensor) -> tuple[Tensor, Tensor]:
        b = ln_b.exp()[:, None]
        g = 1 / (b + (b**2 + r2).sqrt())
        dg, dk = g - g.mean(1, keepdim=True), kinetic - kinetic.mean(1, keepdim=True)
        k = (dg * dk).mean(1) / (dg**2).mean(1).clamp(min=1e-300)
        # the whole orbit must be bound in it
        k = torch.maximum(k, 1.02 * (kinetic / g).amax(1))
        return (dk - k[:, None] * dg).square().mean(1), k

    grid = torch.linspace(*_LN_B, 41, dtype=orbit.dtype)
    tried = torch.stack([at(scale + offset)[0] for offset in grid])
    best = grid[tried.argmin(0)] + scale
    width = float(grid[1] - grid[0])
    low, high = best - width, best + width
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        inner, outer = high - ratio * (high - low), low + ratio * (high - low)
        left = at(inner)[0] <= at(outer)[0]
        low, high = torch.where(left, low, inner), torch.where(left, outer, high)
    ln_b = (low + high) / 2
    k = at(ln_b)[1]
    # a circular orbit has no energy variation to fit: any isochrone with its speed will do
    circular = r2.std(1) < 1e-6 * r2.mean(1)
    middle = r2.mean(1)
    turning = (2 * kinetic.mean(1)) * (1 + math.sqrt(2)) ** 2 * math.sqrt(2) * middle.sqrt()
    ln_b = torch.where(circular, middle.log() / 2, ln_b)
    k = torch.where(circular, turning, k)
    return Isochrone(m_tot=k[:, None] / G, r_s=ln_b.exp()[:, None])


def _oscillator(orbit: Tensor) -> tuple[Tensor, Tensor]:
    """Actions and angles (n, T, 3) of the harmonic oscillator whose energy varies least along the orbits."""
    x, v = orbit[..., :3], orbit[..., 3:]
    x2, v2 = x**2 / 2, v**2 / 2
    dx2, dk = x2 - x2.mean(1, keepdim=True), v2.sum(-1) - v2.sum(-1).mean(1, keepdim=True)
    fitted = -torch.linalg.lstsq(dx2, dk[..., None]).solution[..., 0]
    virial = (v2.mean(1) / x2.mean(1).clamp(min=1e-300)).clamp(min=1e-300)
    omega = torch.where((fitted > 0).all(-1, keepdim=True), fitted, virial).sqrt()[:, None]
    return (v2 + omega**2 * x2) / omega, torch.atan2(omega * x, v)


@functools.cache
def _half_space(reach: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
    """All n inside the ellipsoid with these axes but zero, one of each pair n and -n."""
    spans = [range(-m, m + 1) for m in reach]
    return tuple(
        n
        for n in itertools.product(*spans)
        if n > (0, 0, 0) and sum((i / m) ** 2 for i, m in zip(n, reach, strict=True)) <= 1
    )


def _tube_modes(n_max: int, symmetry: Symmetry) -> Tensor:
    def allowed(n: tuple[int, ...]) -> bool:
        if symmetry == "spherical":
            return n[1] == n[2] == 0
        if symmetry == "axisymmetric":
            return n[1] == 0 and n[2] % 2 == 0
        return n[1] % 2 == 0 and n[2] % 2 == 0

    modes = [n for n in _half_space((2 * n_max, n_max, n_max)) if allowed(n)]
    return torch.tensor(modes, dtype=torch.float64)


def _box_modes(n_max: int) -> Tensor:
    # even in every angle
    reach = max(n_max // 2, 1)
    return 2 * torch.tensor(_half_space((reach, reach, reach)), dtype=torch.float64)


def _window(times: Tensor) -> Tensor:
    """Squared Hann window over the times (n, T) of each star."""
    u = (times - times[:, :1]) / (times[:, -1:] - times[:, :1])
    return (math.pi * u).sin() ** 4


def _unwrap(angle: Tensor) -> Tensor:
    """Make angles (n, T, 3) continuous in time, keeping the middle one."""
    step = angle.diff(dim=1)
    step = torch.remainder(step + math.pi, 2 * math.pi) - math.pi
    whole = torch.cat([torch.zeros_like(angle[:, :1]), step.cumsum(1)], 1)
    middle = angle.shape[1] // 2
    return whole - whole[:, middle, None] + angle[:, middle, None]


def _actions(J_toy: Tensor, phase: Tensor, modes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares for J (n, 3) and S (n, N) from toy actions (n, T, 3) and n . theta' (n, T, N)."""
    c = phase.cos()
    wc = weight[..., None] * c
    n = len(phase)
    mean_c = wc.sum(1)
    cross = 2 * mean_c[:, None, :] * modes.T
    square = 4 * (wc.transpose(1, 2) @ c) * (modes @ modes.T)
    eye = torch.eye(3, dtype=J_toy.dtype).expand(n, 3, 3)
    matrix = torch.cat([torch.cat([eye, cross], 2), torch.cat([cross.transpose(1, 2), square], 2)], 1)
    right = torch.cat([(weight[..., None] * J_toy).sum(1), 2 * ((wc.transpose(1, 2) @ J_toy) * modes).sum(-1)], -1)
    solution = _solve(matrix, right[..., None], 3)[..., 0]
    return solution[:, :3], solution[:, 3:]


def _angles(times: Tensor, theta_toy: Tensor, phase: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares for theta at t = 0 and Omega (n, 3)."""
    scale = times[:, -1:, None]
    design = torch.cat(
        [torch.ones_like(scale.expand(-1, times.shape[1], 1)), times[..., None] / scale, -2 * phase.sin()], -1
    )
    weighted = weight[..., None] * design
    solution = _solve(weighted.transpose(1, 2) @ design, weighted.transpose(1, 2) @ theta_toy, 2)
    return solution[:, 0], solution[:, 1] / scale[:, 0]


def _solve(matrix: Tensor, right: Tensor, n_free: int) -> Tensor:
    """Solve normal equations; all but the first unknowns have a ridge, for modes that an orbit does not tell apart."""
    broken = ~torch.isfinite(matrix).all((1, 2))
    diagonal = matrix.diagonal(dim1=1, dim2=2).clone()
    diagonal = diagonal + 1e-6 * diagonal.amax(1, keepdim=True)
    diagonal[:, :n_free] = 0
    ridge = _RIDGE * torch.diag_embed(diagonal)
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype)
    solution = torch.linalg.solve(torch.where(broken[:, None, None], eye, matrix + ridge), right)
    return torch.where(broken[:, None, None], torch.nan, solution)


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
