r"""What a fit of stars on the sky says: velocities along the line of sight, anisotropy, factors J and D, checks.

Of a halo of dark matter at a distance D, within an angle :math:`\theta` of its centre,

.. math::
    J = \frac{1}{D^2} \int \rho^2\, dV, \qquad D(\theta) = \frac{1}{D^2} \int \rho\, dV

over the cylinder of radius :math:`D\theta` (Geringer-Sameth, Koushiappas & Walker 2015, ApJ 801, 74, equations 2 and
4, for small angles): what annihilation and decay are proportional to. The stars' mass, which the potential has too, is
in them. A centre steeper than r^-3/2 has an infinite J: of such draws J is that outside of 10^-5 of the field's
radius, and the upper end of its interval is what the prior allows where no star is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.callers_state import keeps_callers_state
from bayespot.catalog.projected import ProjectedCatalog
from bayespot.likelihood.line_of_sight import LineOfSightVelocities, stretch
from bayespot.likelihood.model import SnapshotModel
from bayespot.likelihood.outliers import LIKELY
from bayespot.likelihood.phase_mixed import PhaseMixed
from bayespot.likelihood.sky_lattice import SkyLattice
from bayespot.posterior.posterior import PotentialDraws
from bayespot.posterior.predictive import MIN_DRAWS, SURPRISING, Predictive, bins_of, chi_square_p_value
from bayespot.potential.fields import QUANTILES, Field, positive_radii
from bayespot.units import UNITS, takes

if TYPE_CHECKING:
    from astropy.table import QTable
    from numpy.typing import ArrayLike, NDArray

#: Radii of the integrals over rho, from 10^-5 to 10^4 times that of the cylinder.
_N_RADII = 1200
#: Bins of the histograms of velocities, over this many of their standard deviations on both sides.
_N_VELOCITIES, _WIDE = 9, 3.0
#: Velocities between which those of replicas are drawn, per bin.
_FINE = 24


@takes(radii="length")
def line_of_sight_fields(
    posterior: PotentialDraws, catalog: ProjectedCatalog, radii: ArrayLike, tick: Callable[[], None] | None = None
) -> dict[str, Field]:
    """Return the dispersion ``sigma_los(R)`` (km/s) on the sky and the anisotropy ``beta(r)`` in space.

    beta = 1 - <v_theta^2> / <v_r^2>. Both are of the stars, without errors and binaries, and extrapolations beyond
    them.

    Parameters
    ----------
    posterior, catalog
        A fit of stars on the sky, and the stars.
    radii : (n,)
        In kpc, both of R and of r.
    tick
        Called after each draw.

    Raises
    ------
    ValueError
        If the fit is of other stars, or a radius is not positive.
    """
    from scipy.interpolate import CubicSpline

    at = np.log(positive_radii(radii))
    dispersion, anisotropy = [], []
    with torch.no_grad():
        for i in range(posterior.n_draws):
            density, lattice = _density(*posterior.source(i), catalog, np.exp(at))
            found = lattice.moments(density.density)
            r, radial, tangential, R, los = (part.numpy() for part in found)
            dispersion.append(np.exp(CubicSpline(np.log(R), np.log(los))(at) / 2))
            anisotropy.append(1 - CubicSpline(np.log(r), tangential / (2 * radial))(at))
            if tick:
                tick()
    draws = {"sigma_los": np.stack(dispersion), "beta": np.stack(anisotropy)}
    return {name: Field(name, UNITS[name], np.exp(at), values) for name, values in draws.items()}


def _density(
    model: SnapshotModel, values: Any, catalog: ProjectedCatalog, radii: NDArray[Any] | None = None
) -> tuple[LineOfSightVelocities, SkyLattice]:
    """The density of the members among the stars in one draw, and its lattice, which also covers ``radii``."""
    fixed = model.at(values)
    sky = fixed.projection
    if sky is None or not isinstance(catalog, ProjectedCatalog):
        raise ValueError(
            "these are not stars on the sky: take a fit with likelihood=LineOfSight(...) and its catalogue"
        )
    stars = catalog.stars
    if radii is not None:
        more = stars[:1].expand(2, 6).clone()
        more[:, 0], more[:, 1], more[:, 3] = torch.as_tensor([radii.min(), radii.max()]), 0.0, math.inf
        more[:, 4] = 0.0
        stars = torch.cat([stars, more])
    lattice = SkyLattice.covering(stars, stretch(sky))
    finder = fixed.finder.tabulated(fixed.potential, lattice.w.reshape(-1, 6))
    return LineOfSightVelocities(PhaseMixed(fixed.potential, finder, fixed.df), sky, lattice), lattice


@takes(angles="angle", J="internal", D="internal")
@dataclass(frozen=True)
class Factors:
    """Draws of the factors of annihilation and decay.

    Parameters
    ----------
    angles : (n,)
        Radius of the field in deg.
    J, D : (n_draws, n)
        In GeV^2 cm^-5 and in GeV cm^-2.
    """

    angles: NDArray[Any]
    J: NDArray[Any]
    D: NDArray[Any]

    def to_table(self) -> QTable:
        """Return a table with ``angle`` and the quantiles ``J_q2.5`` to ``D_q97.5``, with units."""
        from astropy import units as u
        from astropy.table import QTable

        table = QTable({"angle": self.angles * u.deg})
        for name, draws in (("J", self.J), ("D", self.D)):
            for q, values in zip(QUANTILES, np.quantile(draws, QUANTILES, axis=0), strict=True):
                table[f"{name}_q{100 * q:g}"] = values * u.Unit(UNITS[f"{name}_factor"])
        return table


@takes(angles="angle", distance="length")
def astrophysical_factors(posterior: PotentialDraws, angles: ArrayLike, distance: float | None = None) -> Factors:
    """Return J and D of a sphere within angles (deg) of its centre.

    Parameters
    ----------
    posterior
        A fit with a spherical potential.
    angles : (n,)
        In deg.
    distance
        In kpc; None: that of the catalogue. Where the fit has an error of it, its draws count.

    Raises
    ------
    ValueError
        If the distance is not known, or an angle or the distance is not positive.
    """
    theta = np.atleast_1d(np.asarray(angles, dtype=float))
    distance = distance or posterior.meta.get("meta", {}).get("distance_kpc")
    if distance is None or not distance > 0:
        raise ValueError(f"the factors need the distance of the system: give distance (kpc), got {distance}")
    if not ((theta > 0) & (theta < 90)).all():
        raise ValueError(f"angles must be between 0 and 90 deg, got {theta.tolist()}")
    D = np.array([distance * math.exp(_ln_distance(posterior.source(i)[1])) for i in range(posterior.n_draws)])
    edge = distance * np.tan(np.radians(theta))
    ln_r = np.log(edge.min()) + np.linspace(math.log(1e-5), math.log(1e4 * edge.max() / edge.min()), _N_RADII)
    rho = posterior.field("density", np.exp(ln_r)).draws
    shell = 4 * math.pi * np.exp(3 * ln_r) * (ln_r[1] - ln_r[0])
    J, decay = np.empty((len(D), len(theta))), np.empty((len(D), len(theta)))
    for k, angle in enumerate(theta):
        # of a shell of radius r within a cylinder of radius R the share 1 - (1 - R^2/r^2)^(1/2)
        R = (D * math.tan(math.radians(angle)))[:, None]
        inside = 1 - np.sqrt(np.clip(1 - (R / np.exp(ln_r)) ** 2, 0, None))
        J[:, k] = (rho**2 * inside * shell).sum(1) / D**2
        decay[:, k] = (rho * inside * shell).sum(1) / D**2
    rest_energy, kpc = _units()
    return Factors(theta, J * rest_energy**2 / kpc**5, decay * rest_energy / kpc**2)


def _ln_distance(values: Any) -> float:
    return float(values.get("sky.ln_distance", 0.0))


def _units() -> tuple[float, float]:
    """The rest energy of a solar mass in GeV and a kiloparsec in cm."""
    from astropy import constants
    from astropy import units as u

    return float((1 * u.Msun * constants.c**2).to_value("GeV")), float((1 * u.kpc).to_value("cm"))


@keeps_callers_state
def velocity_check(
    posterior: PotentialDraws,
    catalog: ProjectedCatalog,
    n_draws: int = 100,
    seed: int = 0,
    n_bins: int = 4,
    tick: Callable[[], None] | None = None,
) -> Predictive:
    """Compare the line-of-sight velocities in bins of R with replicas at the same places and with the same errors.

    ``velocities`` are their histograms, ``sigma_los`` their dispersions; with a photometric sample, ``counts`` are its
    stars. Stars that are more likely outliers are left out. The stars are used twice, as in `posterior_predictive`.

    Parameters
    ----------
    posterior, catalog
        A fit of stars on the sky, and the stars.
    n_draws, seed
        Posterior draws used, at least `bayespot.posterior.predictive.MIN_DRAWS`, and seed.
    n_bins
        Bins of R, of equal numbers of stars.
    tick
        Called after each draw.

    Raises
    ------
    ValueError
        If the fit is of other stars, or has too few draws.
    """
    few = posterior.thinned(n_draws)
    if few.n_draws < MIN_DRAWS:
        raise ValueError(f"{few.n_draws} draws cannot give a p-value below {SURPRISING}: take at least {MIN_DRAWS}")
    if few.has_outliers():
        catalog = catalog[torch.as_tensor(few.outliers(catalog) < LIKELY)]
    stars = catalog.stars
    measured, placed = stars[torch.isfinite(stars[:, 3])], stars[stars[:, 4] > 0]
    R, v = _radius(measured), measured[:, 2].numpy()
    edges, middle = bins_of(R, n_bins)
    index = np.clip(np.searchsorted(edges, R, side="right") - 1, 0, n_bins - 1)
    width = 1.4826 * np.median(np.abs(v - np.median(v)))
    v_edges = np.median(v) + width * np.linspace(-_WIDE, _WIDE, _N_VELOCITIES + 1)
    fine = torch.as_tensor(np.median(v) + width * np.linspace(-2 * _WIDE, 2 * _WIDE, 2 * _FINE * _N_VELOCITIES + 1))
    R_edges = None if not len(placed) else bins_of(_radius(placed), 2 * n_bins)[0]

    def statistics(velocity: NDArray[Any]) -> dict[str, NDArray[Any]]:
        found = [velocity[index == k] for k in range(n_bins)]
        # what is beyond the outermost edge belongs to the outermost bin
        inner = np.concatenate([[-np.inf], v_edges[1:-1], [np.inf]])
        return {
            "velocities": np.stack([np.histogram(some, inner)[0] for some in found]).astype(float),
            "sigma_los": np.array([some.std() for some in found]),
        }

    seen, replicated = statistics(v), []
    counts = None if R_edges is None else np.histogram(_radius(placed), R_edges)[0].astype(float)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for i in range(few.n_draws):
            density, lattice = _density(*few.source(i), catalog)
            shared = lattice.sums(density.density)
            below = density.sharing(shared).cumulative(measured, fine)
            drawn = statistics(_drawn(below.numpy(), fine.numpy(), rng))
            if R_edges is not None:
                share = _shares(lattice, shared, R_edges, math.exp(_ln_distance(few.source(i)[1])))
                drawn["counts"] = rng.multinomial(len(placed), share).astype(float)
            replicated.append(drawn)
            if tick:
                tick()
    if counts is not None:
        seen["counts"] = counts
    observed = {name: np.repeat(value[None], few.n_draws, 0) for name, value in seen.items()}
    drawn = {name: np.stack([one[name] for one in replicated]) for name in seen}
    p = {
        name: chi_square_p_value(*(store[name].reshape(few.n_draws, -1) for store in (observed, drawn)))
        for name in seen
    }
    return Predictive(edges, middle, observed, drawn, p, _verdict(p, few.n_draws), v_edges=v_edges, R_edges=R_edges)


def _radius(stars: Tensor) -> NDArray[Any]:
    return torch.linalg.vector_norm(stars[:, :2], dim=-1).numpy()


def _drawn(below: NDArray[Any], v: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """A velocity for each star from its distribution function at v."""
    rank = below[:, 0] + (below[:, -1] - below[:, 0]) * rng.random(len(below))
    cell = np.clip((below <= rank[:, None]).sum(1) - 1, 0, len(v) - 2)
    row = np.arange(len(below))
    low, high = below[row, cell], below[row, cell + 1]
    return v[cell] + (v[cell + 1] - v[cell]) * (rank - low) / np.maximum(high - low, 1e-300)


def _shares(lattice: SkyLattice, sums: Tensor, edges: NDArray[Any], stretched: float) -> NDArray[Any]:
    """Share of the photometric sample in each bin of R."""
    R = torch.as_tensor(np.concatenate([edges[1:-1], [lattice.R_out]])) * stretched
    inside = np.array([float(lattice.log_inside(sums, one)) for one in R])
    share = np.diff(np.exp(inside - inside[-1]), prepend=0.0).clip(min=0)
    return np.asarray(share / share.sum())


def _verdict(p_values: dict[str, float], n: int) -> list[str]:
    words = {
        "velocities": "the distribution of line-of-sight velocities",
        "sigma_los": "the line-of-sight dispersion",
        "counts": "the surface density of the photometric sample",
    }
    return [
        f"{words[name]} is not reproduced (posterior predictive p = {p:.2g} from {n} replicas)"
        for name, p in p_values.items()
        if p < SURPRISING
    ]


__all__ = ["Factors", "astrophysical_factors", "line_of_sight_fields", "velocity_check"]
