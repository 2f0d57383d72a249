r"""The likelihood of a spherical galaxy seen in projection: line-of-sight velocities, and places on the sky.

.. math::
    p(v_{los} | R) = \frac{\int dz \int d^3v\, f(J)\, \delta(v_{los} - v \cdot n)}{\int dz \int d^3v\, f(J)},
    \qquad r^2 = R^2 + z^2

The density of v_los is a Fourier series on [-V, V] with the means of :math:`\cos(q v_{los})` as coefficients, linear
in f by matrices that no parameter changes (`bayespot.likelihood.sky_lattice`). A Gaussian error of v_los multiplies
the coefficients by its own transform, exactly; so does the motion of a binary star about its companion.

The places of stars of a photometric sample, which is complete out to the radius of its outermost star, have the density

.. math::
    p(x, y) = \Sigma(R) / \int_0^{R_{out}} 2 \pi R\, \Sigma(R)\, dR, \qquad \Sigma(R) = \int dz \int d^3v\, f(J)

Those of a spectroscopic sample are given: how many stars were observed where does not matter.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from bayespot.catalog.projected import ProjectedCatalog
from bayespot.likelihood.outliers import logit_normal
from bayespot.likelihood.phase_mixed import PhaseMixed, StarDensity
from bayespot.likelihood.sky_lattice import SkyLattice
from bayespot.units import takes, takes_tensors

#: Share of a uniform density, which keeps that of a star where the series is about zero positive.
_FLOOR = 1e-7
#: Width of the background in velocity, in standard deviations of the catalogue's.
_BACKGROUND = 4.0
#: Of the binaries: median of their share's prior and its width in the logit; of the standard deviation of their
#: velocities (km/s) and its width in the logarithm.
_BINARY_SHARE, _BINARY_SHARE_WIDTH = 0.1, 1.0
_BINARY_SPEED, _BINARY_SPEED_WIDTH = 8.0, 0.5


class LineOfSight(PyroModule):
    """The likelihood of stars on the sky with line-of-sight velocities, for `SnapshotModel(likelihood=...)`.

    Sites: ``velocity``, the systemic velocity (km/s) over the zero of the catalogue's velocities; if
    ``distance_error`` is given, ``ln_distance``, ln of the distance over that of the catalogue's positions; with
    ``binaries`` ``binary_share``, the share of stars that move about a companion, and ``binary_speed``, the standard
    deviation of that motion along the line of sight in km/s: velocities then have broad wings, Gaussian like the
    errors, which count for the galaxy's own where its dispersion is not above a few km/s (Minor et al. 2010, ApJ 721,
    1142; there the wings' shape is that of orbits).

    Parameters
    ----------
    velocity_sd
        Standard deviation of the prior of ``velocity`` in km/s.
    distance_error
        Relative error of the distance; 0: it is known.
    binaries
        Whether velocities have the wings of binaries.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    #: Those stored before there was a choice have none.
    binaries = False

    @takes(velocity_sd="speed", distance_error="number")
    def __init__(self, velocity_sd: float = 5.0, distance_error: float = 0.0, binaries: bool = False) -> None:
        super().__init__()
        if not 0 < velocity_sd < math.inf or not 0 <= distance_error < 0.5:
            raise ValueError(
                "a LineOfSight needs velocity_sd > 0 (km/s) and 0 <= distance_error < 0.5 (relative); "
                f"got {velocity_sd} and {distance_error}"
            )
        zero = torch.zeros((), dtype=torch.float64)
        self.velocity_sd, self.distance_error, self.binaries = velocity_sd, distance_error, binaries
        self.velocity = PyroSample(dist.Normal(zero, velocity_sd))
        self.ln_distance = PyroSample(dist.Normal(zero, distance_error)) if distance_error > 0 else zero
        self.binary_share: Any = zero
        self.binary_speed: Any = zero
        if binaries:
            self.binary_share = PyroSample(logit_normal(_BINARY_SHARE, _BINARY_SHARE_WIDTH))
            self.binary_speed = PyroSample(dist.LogNormal(zero + math.log(_BINARY_SPEED), _BINARY_SPEED_WIDTH))

    @classmethod
    def for_stars(cls, catalog: ProjectedCatalog, binaries: bool = False) -> LineOfSight:
        """Return the likelihood of a catalogue: with the error of its distance, if it has one, and a prior of the
        systemic velocity as wide as the scatter of its velocities.

        Raises
        ------
        ValueError
            If these are not stars on the sky.
        """
        if not isinstance(catalog, ProjectedCatalog):
            raise ValueError("a LineOfSight needs stars on the sky: read them with ProjectedCatalog.read (--distance)")
        v = catalog.stars[torch.isfinite(catalog.stars[:, 3]), 2]
        distance = catalog.meta.get("distance_kpc")
        relative = catalog.meta.get("distance_error_kpc", 0.0) / distance if distance else 0.0
        return cls(1.4826 * float((v - v.median()).abs().median()), relative, binaries)


class LineOfSightVelocities(StarDensity):
    """Density of line-of-sight velocities given places on the sky, in (km/s)^-1, and of places, in kpc^-2.

    Stars are ``(*batch, 6)``: x and y on the sky in kpc from the centre, the line-of-sight velocity and its error in
    km/s (infinite: not measured), whether its place counts (1 or 0), and the prior probability that it is a member.

    Parameters
    ----------
    density
        The population, in a spherical potential.
    sky
        The systemic velocity and the distance, fixed.
    lattice
        That of all stars; None: of the stars at hand.
    sums
        Of the lattice, if they are known.
    """

    @takes_tensors(sums="internal")
    def __init__(
        self,
        density: PhaseMixed,
        sky: LineOfSight,
        lattice: SkyLattice | None = None,
        sums: Tensor | None = None,
    ) -> None:
        self.density, self.sky, self.lattice, self.sums = density, sky, lattice, sums
        super().__init__()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln p of each star: of its velocity, if it has one, and of its place, if that counts."""
        lattice = self.lattice or SkyLattice.covering(value, stretch(self.sky))
        known = lattice.sums(self.density) if self.sums is None else self.sums
        ln_distance = torch.as_tensor(self.sky.ln_distance, dtype=torch.float64)
        at = lattice.at(known, torch.linalg.vector_norm(value[..., :2], dim=-1) * ln_distance.exp())
        v = value[..., 2] - torch.as_tensor(self.sky.velocity)
        q = math.pi / lattice.V * torch.arange(1, known.shape[-1], dtype=torch.float64)
        wave = (q * v[..., None]).cos() * self._blur(q, value[..., 3])
        series = (1 + 2 * (wave * at[..., 1:]).sum(-1)).clamp(min=0)
        series = torch.where(v.abs() < lattice.V, series, 0.0)
        log_p = (series + _FLOOR).log() - math.log(2 * lattice.V)
        log_p = torch.where(torch.isfinite(value[..., 3]), log_p, 0.0)
        if lattice.R_out == 0:
            return log_p
        log_inside = lattice.log_inside(known, lattice.R_out * ln_distance.exp())[..., None]
        log_place = at[..., 0] + 2 * ln_distance - log_inside
        return log_p + torch.where(value[..., 4] > 0, log_place, 0.0)

    @takes_tensors(value="internal", v="speed")
    def cumulative(self, value: Tensor, v: Tensor) -> Tensor:
        """Return the probability ``(n, m)`` that the velocity of each star ``(n, 6)``, with its error, is below v
        ``(m,)`` in km/s."""
        lattice = self.lattice or SkyLattice.covering(value, stretch(self.sky))
        known = lattice.sums(self.density) if self.sums is None else self.sums
        R = torch.linalg.vector_norm(value[..., :2], dim=-1) * torch.as_tensor(self.sky.ln_distance).exp()
        q = math.pi / lattice.V * torch.arange(1, known.shape[-1], dtype=torch.float64)
        amplitude = lattice.at(known, R)[..., 1:] * self._blur(q, value[..., 3]) / (lattice.V * q)
        at = (v - torch.as_tensor(self.sky.velocity)).clamp(-lattice.V, lattice.V)
        found = (at + lattice.V) / (2 * lattice.V) + amplitude @ (q[:, None] * at).sin()
        return found.clamp(0, 1).cummax(-1).values

    def _blur(self, q: Tensor, error: Tensor) -> Tensor:
        """Transform ``(*batch, n_terms)`` of the errors, and of the motion of binaries."""
        blur = (-0.5 * (q * error[..., None]) ** 2).exp()
        if not self.sky.binaries:
            return blur
        share, speed = (torch.as_tensor(one) for one in (self.sky.binary_share, self.sky.binary_speed))
        return blur * (1 + share * (-0.5 * (q * speed) ** 2).expm1())

    @takes_tensors(value="phase_space")
    def log_membership(self, value: Tensor) -> Tensor:
        return value[..., 5].log()

    def shared(self) -> Tensor | None:
        return None if self.lattice is None else self.lattice.sums(self.density)

    def sharing(self, shared: Tensor) -> LineOfSightVelocities:
        found = copy.copy(self)
        found.sums = shared
        return found

    def log_position(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value[..., 0])


class BackgroundAlongLine(StarDensity):
    """Density of a background: normal line-of-sight velocities, convolved with their errors, in (km/s)^-1, and places
    spread evenly over the field, in kpc^-2.

    Parameters
    ----------
    centre, sd
        In km/s.
    R_out
        Radius of the field of the photometric sample in kpc.
    """

    @takes(centre="speed", sd="speed", R_out="length")
    def __init__(self, centre: float, sd: float, R_out: float = 1.0) -> None:
        self.centre, self.sd, self.R_out = centre, sd, R_out
        super().__init__()

    @classmethod
    @takes_tensors(w="phase_space")
    def of_stars(cls, w: Tensor) -> BackgroundAlongLine:
        """Return one that is four times as broad as the velocities along z of stars ``w (n, 6)``, by medians."""
        v, R = w[:, 5], torch.linalg.vector_norm(w[:, :2], dim=-1)
        centre = v.median()
        return cls(float(centre), _BACKGROUND * max(1.4826 * float((v - centre).abs().median()), 1e-3), float(R.max()))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln p of each star, as `LineOfSightVelocities`."""
        variance = self.sd**2 + value[..., 3] ** 2
        log_p = -0.5 * (value[..., 2] - self.centre) ** 2 / variance - 0.5 * (2 * math.pi * variance).log()
        log_p = torch.where(torch.isfinite(value[..., 3]), log_p, 0.0)
        return log_p - torch.where(value[..., 4] > 0, math.log(math.pi * self.R_out**2), 0.0)

    def log_position(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value[..., 0])


def stretch(sky: LineOfSight) -> float:
    """Return the largest factor by which the distance may grow or shrink: five standard deviations of its prior."""
    return math.exp(5 * sky.distance_error)
