r"""Velocities given positions: a likelihood that needs no selection function where it depends on position alone.

.. math:: p(v | x) = \frac{f(J(x, v))}{(2\pi)^3\, n(x)}, \qquad n(x) = \int \frac{f(J(x, v))}{(2\pi)^3}\, d^3v

Stars that are in the catalogue with a probability S(x), known or not, have the velocities of all stars there: S
cancels. What is lost is what the positions say of f(J) and the potential, and with it the score identity: n depends on
both, so that they are inferred together.

n is a sum over a lattice of velocities (`VelocityLattice`) at nodes in ln r, interpolated at the stars: no random
numbers, and differentiable in potential and f(J).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import gaussian_kde
from torch import Tensor

from bayespot.actions.base import ActionFinder
from bayespot.df.base import DistributionFunction, LogFraction
from bayespot.likelihood.normalisation import escape_speed
from bayespot.likelihood.phase_mixed import UNBOUND_STEEPNESS, PhaseMixed, StarDensity
from bayespot.numerics import lagrange, midpoint_angles, unit_rule
from bayespot.potential.base import Potential, radius
from bayespot.potential.extent import log_radius
from bayespot.units import takes, takes_tensors

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog

#: Distance of the nodes in ln r, and nodes of the polynomials between them.
_DS, _STENCIL = 0.25, 6
#: Nodes in the speed, in the angle between velocity and radius, and, for an f(J) with a preferred axis, in the
#: tangential direction of motion and in latitude.
_SPEEDS, _ANGLES, _TURNS, _LATITUDES = 48, 16, 6, 4
#: Of a draw: cells of the table in speed and angle, the share of proposals all over it, and candidates per star.
_CELLS, _FLAT, _CANDIDATES = (32, 16), 0.02, 16
#: Nodes at which the density of the catalogue's radii is tabulated.
_RADII = 400


@takes(v_s="speed")
@takes_tensors(w="phase_space", log_weight="internal")
@dataclass(frozen=True, eq=False)
class VelocityLattice:
    r"""Points of phase space whose sum over velocities is n(x), at nodes in ln r and, if it matters, in latitude.

    Speeds are :math:`v_s \sinh y` below the speed of escape, with Gauss-Legendre nodes in y: however deep a potential,
    speeds like those of the stars are resolved. Angles eta from the radius are nodes in :math:`\eta^{1/2}`,
    which resolves the narrow cones of radial orbits. Nodes are multiples of a quarter in ln r, between which ln n is a
    polynomial of fifth degree; in :math:`\sin^2 b` it is one of third degree.

    Parameters
    ----------
    first, n
        First node, in steps of ln r, and their number.
    v_s
        Speed in km/s below which speeds are evenly spaced.
    axial
        Whether f(J) has a preferred axis, z, so that n depends on latitude b.
    finer
        Times as many nodes in velocity, to tell the error of the sum.
    w : Float[Tensor, "n speeds angles ... 6"], optional
        The points in one potential, see `laid`, innermost nodes first.
    log_weight : Float[Tensor, "n speeds angles ..."], optional
        Logarithm of the volume of velocities (km/s)^3 that a point stands for.
    """

    first: int
    n: int
    v_s: float
    axial: bool = False
    finer: int = 1
    w: Tensor | None = None
    log_weight: Tensor | None = None

    @classmethod
    @takes_tensors(w="phase_space")
    def covering(cls, w: Tensor, axial: bool = False) -> VelocityLattice:
        """Return the lattice whose radii hold those of stars ``w (*batch, 6)``, with their median speed as v_s.

        Raises
        ------
        ValueError
            If no star has a finite radius.
        """
        s = log_radius(radius(w[..., :3]))
        s = s[torch.isfinite(s)]
        if not len(s):
            raise ValueError("no star has a finite position: nothing to take the density of velocities at")
        room = _STENCIL // 2 - 1
        low, high = math.floor(float(s.min()) / _DS), math.floor(float(s.max()) / _DS) + 1
        speeds = radius(w[..., 3:6])
        speeds = speeds[torch.isfinite(speeds) & (speeds > 0)]
        v_s = float(speeds.median()) if len(speeds) else 1.0
        return cls(low - room, high - low + 2 * room + 1, v_s, axial)

    def laid(self, potential: Potential) -> VelocityLattice:
        """Return the lattice with its points in a potential, below its speeds of escape; differentiable in it."""
        r = (_DS * (self.first + torch.arange(self.n, dtype=torch.float64))).exp()
        u, u_weight = unit_rule(_SPEEDS * self.finer)
        y, y_weight = unit_rule(_ANGLES * self.finer)
        eta = math.pi / 2 * y**2
        escape = escape_speed(potential, r)
        top = (escape / self.v_s).asinh()[:, None]
        v, dv = self.v_s * (top * u).sinh(), self.v_s * (top * u).cosh() * top * u_weight
        # dv^3 = 2 pi v^2 sin(eta) dv d eta, and as much again for motion inwards
        log_weight = math.log(4 * math.pi) + (v**2 * dv).log()[..., None]
        log_weight = log_weight + (eta.sin() * math.pi * y * y_weight).log()
        v_r, v_t = v[..., None] * eta.cos(), v[..., None] * eta.sin()
        r = r[:, None, None].expand_as(v_r)
        zero = torch.zeros_like(v_r)
        if not self.axial:
            return replace(self, w=torch.stack([r, zero, zero, v_r, v_t, zero], -1), log_weight=log_weight)
        turn = midpoint_angles(_TURNS * self.finer)
        sin_b = unit_rule(_LATITUDES)[0].sqrt()
        cos_b = (1 - sin_b**2).sqrt()
        # with the star at azimuth 0: its radius, and the directions of rising latitude and azimuth
        east, north = turn.sin(), turn.cos()
        shape = (*r.shape, len(sin_b), len(turn))
        r, v_r, v_t, zero = (part[..., None, None].expand(shape) for part in (r, v_r, v_t, zero))
        cos_b, sin_b = cos_b[:, None], sin_b[:, None]
        up = v_t * north
        velocity = (v_r * cos_b - up * sin_b, v_t * east, v_r * sin_b + up * cos_b)
        w = torch.stack([r * cos_b, zero, r * sin_b, *velocity], -1)
        return replace(self, w=w, log_weight=log_weight[..., None, None] - math.log(len(turn)))

    def log_n(self, density: PhaseMixed) -> Tensor:
        """Return ln n at the nodes, in kpc^-3: ``(n,)``, or ``(n, n_latitudes)``."""
        laid = self if self.w is not None else self.laid(density.potential)
        assert laid.w is not None  # both are laid together
        assert laid.log_weight is not None
        log_f = density.log_prob(laid.w.reshape(-1, 6)).reshape(laid.w.shape[:-1])
        return torch.logsumexp(laid.log_weight + log_f, self._over_velocities)

    @takes_tensors(log_n="internal", w="phase_space")
    def at(self, log_n: Tensor, w: Tensor) -> Tensor:
        """Return ln n at the positions of stars ``w (*batch, 6)`` by interpolation of `log_n`."""
        x = w[..., :3]
        place = log_radius(radius(x)) / _DS - self.first
        room = _STENCIL // 2 - 1
        cell = place.detach().nan_to_num(0.0).floor().long().clamp(room, self.n - 2 - room)
        nodes = torch.arange(_STENCIL, dtype=torch.float64)
        along_r = lagrange(place - cell + room, nodes)
        near = cell[..., None] - room + torch.arange(_STENCIL)
        # the derivative of index_select is a third of that of indexing
        values = log_n.index_select(0, near.flatten()).reshape(*near.shape, *log_n.shape[1:])
        if not self.axial:
            return (along_r * values).sum(-1)
        sin2_b = x[..., 2] ** 2 / (x**2).sum(-1).clamp(min=1e-300)
        along_b = lagrange(sin2_b, unit_rule(_LATITUDES)[0])
        return torch.einsum("...i,...ij,...j->...", along_r, values, along_b)

    @takes_tensors(w="phase_space")
    def in_actions(self, potential: Potential, finder: ActionFinder, w: Tensor) -> LogFraction:
        """Return the mean of ln n at stars ``w`` as a function of f(J) alone, in a fixed potential."""
        laid = self.laid(potential)
        assert laid.w is not None  # both were laid
        assert laid.log_weight is not None
        log_weight, shape, over = laid.log_weight, laid.w.shape[:-1], self._over_velocities
        with torch.no_grad():
            J, excess = finder.capped_actions(potential, laid.w.reshape(-1, 6))
            lost = UNBOUND_STEEPNESS * excess + 3 * math.log(2 * math.pi)

        def mean(df: DistributionFunction) -> Tensor:
            log_f = (df.log_prob(J) - lost).reshape(shape)
            return self.at(torch.logsumexp(log_weight + log_f, over), w).mean()

        return mean

    @property
    def _over_velocities(self) -> tuple[int, ...]:
        return (1, 2, 4) if self.axial else (1, 2)


class VelocityDensity(StarDensity):
    r"""Density of velocities given positions, :math:`p(v | x) = f(J) / ((2\pi)^3 n(x))` in (km/s)^-3.

    Parameters
    ----------
    density
        The population, in a spherical potential.
    lattice
        Lattice that covers the stars; None: that of the stars at hand.
    log_n
        ln n at its nodes, if it is known.

    References
    ----------
    Binney & Tremaine (2008), section 4.1.1: the probability of a velocity at a given place (equation 4.4).
    """

    @takes_tensors(log_n="internal")
    def __init__(
        self, density: PhaseMixed, lattice: VelocityLattice | None = None, log_n: Tensor | None = None
    ) -> None:
        self.density, self.lattice, self.log_n = density, lattice, log_n
        super().__init__()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln p(v | x) in (km/s)^-3 for ``value`` ``(*batch, 6)`` in kpc and km/s."""
        lattice = self.lattice or VelocityLattice.covering(value, self.density.df.symmetry != "spherical")
        log_n = lattice.log_n(self.density) if self.log_n is None else self.log_n
        return self.density.log_prob(value) - lattice.at(log_n, value)

    def shared(self) -> Tensor | None:
        return None if self.lattice is None else self.lattice.log_n(self.density)

    def sharing(self, shared: Tensor) -> VelocityDensity:
        found = copy.copy(self)
        found.log_n = shared
        return found

    def log_position(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value[..., 0])


@takes_tensors(x="length")
@torch.no_grad()
def sample_velocities(density: PhaseMixed, x: Tensor, seed: int) -> Tensor:
    """Draw one velocity at each position from p(v | x).

    Of `_CANDIDATES` proposals per star from a coarse table of f at nodes in ln r, one by its weight.

    Parameters
    ----------
    density
        The population, in a spherical potential.
    x : Float[Tensor, "n 3"]
        Positions in kpc.
    seed
        Random seed.

    Returns
    -------
    w : Float[Tensor, "n 6"]
        Positions (kpc) and velocities (km/s).
    """
    generator = torch.Generator().manual_seed(seed)
    r = radius(x)
    step = (log_radius(r) / _DS).round().long()
    first = int(step.min())
    nodes = (_DS * (first + torch.arange(int(step.max()) - first + 1, dtype=torch.float64))).exp()
    u, y = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in _CELLS)
    log_q = _log_velocity_density(density, nodes, *torch.meshgrid(u, y, indexing="ij")).flatten(1)
    # proposals are wider than the table, which is coarse
    q = torch.softmax(log_q, -1) * (1 - _FLAT) + _FLAT / log_q.shape[1]
    shape = (len(x), _CANDIDATES)
    cell = torch.multinomial(q[step - first], _CANDIDATES, replacement=True, generator=generator)
    jitter = torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    u_1 = (cell // _CELLS[1] + jitter[..., 0]) / _CELLS[0]
    y_1 = (cell % _CELLS[1] + jitter[..., 1]) / _CELLS[1]
    # in, out, and all directions across
    inward = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.5
    turn = 2 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float64)
    v = _velocities(density.potential, x, u_1, y_1, inward, turn)
    w = torch.cat([x[:, None].expand_as(v), v], -1)
    log_p = density.log_prob(w) + (u_1**2 * (math.pi / 2 * y_1**2).sin() * y_1).log()
    weight = torch.softmax(log_p - q[step - first].gather(1, cell).log(), -1)
    chosen = torch.multinomial(weight, 1, generator=generator)
    return w.gather(1, chosen[..., None].expand(-1, 1, 6))[:, 0]


class BackgroundVelocities(StarDensity):
    """Density of the velocities of a background given positions.

    Parameters
    ----------
    background
        A density that knows that of its positions (`StarDensity.log_position`).
    """

    def __init__(self, background: StarDensity) -> None:
        self.background = background
        super().__init__()

    def log_prob(self, value: Tensor) -> Tensor:
        return self.background.log_prob(value) - self.background.log_position(value)


class RadialProfileOfStars:
    r"""The density of a catalogue's stars in space, up to a factor, from their radii alone.

    Errors of distances blur positions, and where a star truly is depends on how many of the catalogue's stars are
    there: the density of the selected ones, of which a model of velocities says nothing. It is estimated from those
    with a measured distance (a kernel in ln r), the same in all directions.

    Parameters
    ----------
    catalog
        Stars with finite positions; those without a distance are left out.

    Raises
    ------
    ValueError
        If fewer than ten stars have a distance.
    """

    def __init__(self, catalog: Catalog) -> None:
        x = catalog.x
        if catalog.observed is not None:
            x = x[torch.isfinite(catalog.observed.values[:, 2])]
        s = log_radius(radius(x)).numpy()
        s = s[np.isfinite(s)]
        if len(s) < 10:
            raise ValueError(
                f"{len(s)} stars have a distance, too few to tell where the others may be: drop the stars without"
            )
        kernel = gaussian_kde(s)
        wide = 3 * float(kernel.factor) * s.std()
        self.nodes = np.linspace(s.min() - wide, s.max() + wide, _RADII)
        self.log_density = np.log(np.maximum(kernel(self.nodes), 1e-300)) - 3 * self.nodes

    @takes_tensors(x="length")
    def __call__(self, x: Tensor) -> Tensor:
        """Return ln of the density at ``x (*batch, 3)``; minus infinity beyond the stars."""
        s = log_radius(radius(x)).detach().numpy()
        return torch.as_tensor(np.interp(s, self.nodes, self.log_density, left=-np.inf, right=-np.inf))


def _log_velocity_density(density: PhaseMixed, r: Tensor, u: Tensor, y: Tensor) -> Tensor:
    """ln f times the volume of velocities ``(n, *shape)`` of v = u v_escape, eta = pi/2 y^2 ``(shape)`` at radii r."""
    x = torch.stack([r, torch.zeros_like(r), torch.zeros_like(r)], -1)
    ones = torch.ones(len(r), *u.shape, dtype=torch.float64)
    u, y = (ones * part for part in (u, y))
    v = _velocities(density.potential, x, u.flatten(1), y.flatten(1), ones.flatten(1) < 0, 0 * ones.flatten(1))
    w = torch.cat([x[:, None].expand_as(v), v], -1).reshape(*u.shape, 6)
    return density.log_prob(w) + (u**2 * (math.pi / 2 * y**2).sin() * y).log()


def _velocities(potential: Potential, x: Tensor, u: Tensor, y: Tensor, inward: Tensor, turn: Tensor) -> Tensor:
    """Velocities ``(n, m, 3)`` at x ``(n, 3)`` of speeds u over escape, and angles from the radius and about it."""
    r = radius(x)
    out = x / r[:, None]
    # any axis that is not the radius
    axis = torch.eye(3, dtype=torch.float64)[out.abs().argmin(-1)]
    first = torch.nn.functional.normalize(torch.linalg.cross(out, axis), dim=-1)
    second = torch.linalg.cross(out, first)
    speed, eta = u * escape_speed(potential, r)[:, None], math.pi / 2 * y**2
    radial = torch.where(inward, -1.0, 1.0) * speed * eta.cos()
    across = turn.cos()[..., None] * first[:, None] + turn.sin()[..., None] * second[:, None]
    return radial[..., None] * out[:, None] + (speed * eta.sin())[..., None] * across
