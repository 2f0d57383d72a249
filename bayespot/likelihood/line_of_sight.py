r"""Line-of-sight velocities given positions on the sky: the likelihood of a spherical galaxy seen in projection.

.. math::
    p(v_{los} | R) = \frac{\int dz \int d^3v\, f(J)\, \delta(v_{los} - v \cdot n)}{\int dz \int d^3v\, f(J)},
    \qquad r^2 = R^2 + z^2

Of a star that moves with speed v at an angle eta from the radius, where the line of sight makes an angle with the
radius of which the cosine is :math:`\mu = z/r`, v_los is :math:`v (\mu \cos\eta + \sqrt{1-\mu^2} \sin\eta \cos\psi)`
with psi uniform, and the mean of :math:`\cos(q v_{los})` is
:math:`\cos(q v \mu \cos\eta)\, J_0(q v \sqrt{1-\mu^2} \sin\eta)`. The density of v_los is a Fourier series on
[-V, V] with these as coefficients: linear in f, by one matrix that no parameter changes. A Gaussian error of
v_los multiplies the coefficients by its own transform, exactly.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from bayespot.catalog.projected import ProjectedCatalog
from bayespot.likelihood.phase_mixed import PhaseMixed, StarDensity
from bayespot.numerics import lagrange, unit_rule
from bayespot.units import takes, takes_tensors

#: Distance of nodes in ln R and ln r, and nodes of the polynomials between them.
_DS, _STENCIL = 0.25, 6
#: Nodes along the line of sight per unit of t, z = R sinh t, and the largest radius over that of the outermost star.
_LINE, _FARTHEST = 6, 30.0
#: Nodes in speed and in the angle between velocity and radius.
_SPEEDS, _ANGLES = 32, 16
#: Coefficients of the series, and half its period V in standard deviations of the catalogue's velocities.
_TERMS, _PERIOD = 24, 8.0
#: Share of a uniform density, which keeps that of a star where the series is about zero positive.
_FLOOR = 1e-7
#: Radius on the sky, over the median, inside of which the series is that at this radius.
_INNERMOST = 0.01
#: Width of the background in velocity, in standard deviations of the catalogue's.
_BACKGROUND = 4.0


class LineOfSight(PyroModule):
    """The likelihood of line-of-sight velocities given positions on the sky, for `SnapshotModel(likelihood=...)`.

    Sites: ``velocity``, the systemic velocity (km/s) over the zero of the catalogue's velocities, and, if
    ``distance_error`` is given, ``ln_distance``, ln of the distance over that of the catalogue's positions.

    Parameters
    ----------
    velocity_sd
        Standard deviation of the prior of ``velocity`` in km/s.
    distance_error
        Relative error of the distance; 0: it is known.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    @takes(velocity_sd="speed", distance_error="number")
    def __init__(self, velocity_sd: float = 5.0, distance_error: float = 0.0) -> None:
        super().__init__()
        if not 0 < velocity_sd < math.inf or not 0 <= distance_error < 0.5:
            raise ValueError(
                "a LineOfSight needs velocity_sd > 0 (km/s) and 0 <= distance_error < 0.5 (relative); "
                f"got {velocity_sd} and {distance_error}"
            )
        zero = torch.zeros((), dtype=torch.float64)
        self.velocity_sd, self.distance_error = velocity_sd, distance_error
        self.velocity = PyroSample(dist.Normal(zero, velocity_sd))
        self.ln_distance = PyroSample(dist.Normal(zero, distance_error)) if distance_error > 0 else zero

    @classmethod
    def for_stars(cls, catalog: ProjectedCatalog) -> LineOfSight:
        """Return the likelihood of a catalogue: with the error of its distance, if it has one, and a prior of the
        systemic velocity as wide as the scatter of its velocities.

        Raises
        ------
        ValueError
            If these are not stars on the sky.
        """
        if not isinstance(catalog, ProjectedCatalog):
            raise ValueError("a LineOfSight needs stars on the sky: read them with ProjectedCatalog.read (--distance)")
        v = catalog.stars[:, 2]
        distance = catalog.meta.get("distance_kpc")
        relative = catalog.meta.get("distance_error_kpc", 0.0) / distance if distance else 0.0
        return cls(1.4826 * float((v - v.median()).abs().median()), relative)


@takes(V="speed")
@takes_tensors(w="phase_space", of_speed="internal", along="internal", log_r3="internal")
@dataclass(frozen=True, eq=False)
class LineOfSightLattice:
    """Points of phase space of which the coefficients of the series at nodes in ln R are sums.

    No parameter changes them: speeds reach to V, beyond which nothing counts.

    Parameters
    ----------
    first, n
        First node, in steps of ln R and ln r, and their number; those of r go farther.
    V
        Half the period of the series in km/s.
    w : Float[Tensor, "n_r m 6"]
        The points, m velocities at each radius.
    of_speed : Float[Tensor, "n_line m n_terms"]
        Coefficients of each velocity, times its volume, at the nodes along the line of sight.
    along : Float[Tensor, "n_line n n_r"]
        Weights of the nodes in r for each of R.
    log_r3 : Float[Tensor, "n_r"]
        3 ln r: what is between the nodes is r^3 f.
    """

    first: int
    n: int
    V: float
    w: Tensor
    of_speed: Tensor
    along: Tensor
    log_r3: Tensor

    @classmethod
    @takes(stretch="number")
    @takes_tensors(stars="internal")
    def covering(cls, stars: Tensor, stretch: float = 1.0, finer: int = 1) -> LineOfSightLattice:
        """Return the lattice of stars ``(n, 6)``, as `LineOfSightVelocities` takes them.

        Parameters
        ----------
        stars
            Their radii on the sky decide on the nodes, their velocities on V.
        stretch
            Largest factor by which the distance may grow or shrink.
        finer
            Times as many nodes and coefficients, to tell the error of the sums.
        """
        R = torch.linalg.vector_norm(stars[..., :2], dim=-1)
        v = stars[..., 2]
        sd = 1.4826 * float((v - v.median()).abs().median())
        V = _PERIOD * max(sd, 1e-3)
        low = math.log(max(float(R.min()), _INNERMOST * float(R.median())) / stretch) / _DS
        high = math.log(float(R.max()) * stretch) / _DS
        room = _STENCIL // 2 - 1
        first, last = math.floor(low) - room, math.floor(high) + 1 + room
        n = last - first + 1
        t_last = math.log(2 * _FARTHEST) + _DS * (last - first)
        t, t_weight = unit_rule(math.ceil(_LINE * t_last) * finer)
        t, t_weight = t_last * t, t_last * t_weight
        # ln r = ln R + ln cosh t, the same step from every node of R
        up = t.cosh().log() / _DS
        cell = up.floor().long()
        # from the inner nodes the line of sight reaches as far as it does from the outer ones
        n_r = n + math.ceil(math.log(_FARTHEST) / _DS) + 2 * room + 1
        near = lagrange(up - cell + room, torch.arange(_STENCIL, dtype=torch.float64))
        along = torch.zeros(len(t), n, n_r, dtype=torch.float64)
        rows = torch.arange(n)
        R_nodes = (_DS * (first + rows.double())).exp()
        for i in range(len(t)):
            within = rows[rows + int(cell[i]) + _STENCIL <= n_r]
            for k in range(_STENCIL):
                along[i, within, within + int(cell[i]) + k] = near[i, k]
        # dz = R cosh t dt; between the nodes is r^3 f
        along = along * (t_weight * t.cosh() ** -2)[:, None, None] * R_nodes[:, None] ** -2
        u, u_weight = unit_rule(_SPEEDS * finer)
        y, y_weight = unit_rule(_ANGLES * finer)
        top = math.asinh(_PERIOD)
        speed = V / _PERIOD * (top * u).sinh()
        d_speed = V / _PERIOD * (top * u).cosh() * top * u_weight
        eta = math.pi / 2 * y**2
        volume = (speed**2 * d_speed)[:, None] * (eta.sin() * math.pi * y * y_weight)
        v_r, v_t = (speed[:, None] * part for part in (eta.cos(), eta.sin()))
        mu = t.tanh()[:, None, None, None]
        q = math.pi / V * torch.arange(_TERMS * finer, dtype=torch.float64)
        of_speed = (q * v_r[..., None] * mu).cos() * torch.special.bessel_j0(q * v_t[..., None] * (1 - mu**2).sqrt())
        of_speed = (volume[..., None] * of_speed).reshape(len(t), -1, len(q))
        s = _DS * (first - room + torch.arange(n_r, dtype=torch.float64))
        r = s.exp()[:, None].expand(-1, volume.numel())
        v_r, v_t = (part.reshape(-1).expand_as(r) for part in (v_r, v_t))
        zero = torch.zeros_like(r)
        return cls(first, n, V, torch.stack([r, zero, zero, v_r, v_t, zero], -1), of_speed, along, 3 * s)

    def coefficients(self, density: PhaseMixed) -> Tensor:
        """Return the coefficients ``(n, n_terms)`` of the series at the nodes in R, over the first."""
        log_f = density.log_prob(self.w.reshape(-1, 6)).reshape(self.w.shape[:2])
        scaled = log_f + self.log_r3[:, None]
        f = (scaled - scaled.max().detach()).exp()
        # sums over the velocities at each r, then along the line of sight
        at_r = torch.matmul(f, self.of_speed)
        found = torch.matmul(self.along, at_r).sum(0)
        return found[:, 1:] / found[:, :1].clamp(min=1e-300)

    @takes_tensors(coefficients="internal", R="length")
    def at(self, coefficients: Tensor, R: Tensor) -> Tensor:
        """Return coefficients at radii R ``(*batch)`` on the sky by interpolation in ln R."""
        room = _STENCIL // 2 - 1
        place = (R.clamp(min=1e-300).log() / _DS - self.first).clamp(room, self.n - 1 - room)
        cell = place.detach().floor().long().clamp(room, self.n - 2 - room)
        weight = lagrange(place - cell + room, torch.arange(_STENCIL, dtype=torch.float64))
        near = cell[..., None] - room + torch.arange(_STENCIL)
        values = coefficients.index_select(0, near.flatten()).reshape(*near.shape, -1)
        return (weight[..., None] * values).sum(-2)


class LineOfSightVelocities(StarDensity):
    """Density of line-of-sight velocities given positions on the sky, in (km/s)^-1.

    Stars are ``(*batch, 6)``: x and y on the sky in kpc from the centre, the line-of-sight velocity and its error in
    km/s, and two zeros.

    Parameters
    ----------
    density
        The population, in a spherical potential.
    sky
        The systemic velocity and the distance, fixed.
    lattice
        That of all stars; None: of the stars at hand.
    coefficients
        Of the series, if they are known.
    """

    @takes_tensors(coefficients="internal")
    def __init__(
        self,
        density: PhaseMixed,
        sky: LineOfSight,
        lattice: LineOfSightLattice | None = None,
        coefficients: Tensor | None = None,
    ) -> None:
        self.density, self.sky, self.lattice, self.coefficients = density, sky, lattice, coefficients
        super().__init__()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln p(v_los | R) in (km/s)^-1."""
        lattice = self.lattice or LineOfSightLattice.covering(value, stretch(self.sky))
        known = lattice.coefficients(self.density) if self.coefficients is None else self.coefficients
        R = torch.linalg.vector_norm(value[..., :2], dim=-1) * torch.as_tensor(self.sky.ln_distance).exp()
        v, error = value[..., 2] - torch.as_tensor(self.sky.velocity), value[..., 3]
        q = math.pi / lattice.V * torch.arange(1, known.shape[1] + 1, dtype=torch.float64)
        wave = (q * v[..., None]).cos() * (-0.5 * (q * error[..., None]) ** 2).exp()
        series = (1 + 2 * (wave * lattice.at(known, R)).sum(-1)).clamp(min=0)
        series = torch.where(v.abs() < lattice.V, series, 0.0)
        return (series + _FLOOR).log() - math.log(2 * lattice.V)

    def shared(self) -> Tensor | None:
        return None if self.lattice is None else self.lattice.coefficients(self.density)

    def sharing(self, shared: Tensor) -> LineOfSightVelocities:
        found = copy.copy(self)
        found.coefficients = shared
        return found

    def log_position(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value[..., 0])


class BackgroundAlongLine(StarDensity):
    """Normal density of a background's line-of-sight velocities, convolved with their errors, in (km/s)^-1.

    Parameters
    ----------
    centre, sd
        In km/s.
    """

    @takes(centre="speed", sd="speed")
    def __init__(self, centre: float, sd: float) -> None:
        self.centre, self.sd = centre, sd
        super().__init__()

    @classmethod
    @takes_tensors(v="speed")
    def of_velocities(cls, v: Tensor) -> BackgroundAlongLine:
        """Return one that is four times as broad as line-of-sight velocities ``v (n,)``, by medians."""
        centre = v.median()
        return cls(float(centre), _BACKGROUND * max(1.4826 * float((v - centre).abs().median()), 1e-3))

    def log_prob(self, value: Tensor) -> Tensor:
        variance = self.sd**2 + value[..., 3] ** 2
        return -0.5 * (value[..., 2] - self.centre) ** 2 / variance - 0.5 * (2 * math.pi * variance).log()

    def log_position(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value[..., 0])


def stretch(sky: LineOfSight) -> float:
    """Return the largest factor by which the distance may grow or shrink: five standard deviations of its prior."""
    return math.exp(5 * sky.distance_error)
