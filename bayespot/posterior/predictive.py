"""Posterior predictive checks: replicated catalogues and discrepancy statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from bayespot.actions.base import TorusMap
from bayespot.actions.staeckel import StaeckelFudge
from bayespot.callers_state import keeps_callers_state
from bayespot.inference.phase_mixing import AngleTest, angle_statistic, angle_test
from bayespot.inference.symmetry import directions_and_planes, moments
from bayespot.likelihood.chain import Chain
from bayespot.likelihood.conditional import sample_velocities
from bayespot.likelihood.errors import ErrorScatter
from bayespot.likelihood.model import SnapshotModel
from bayespot.likelihood.outliers import LIKELY
from bayespot.likelihood.phase_mixed import PhaseMixed, sample_log_weights
from bayespot.mock.flattened import orbit_sample
from bayespot.posterior.cylindrical import CYLINDRICAL_STATISTICS, cylindrical_profiles
from bayespot.posterior.posterior import PotentialDraws
from bayespot.units import takes, takes_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayespot.catalog.catalog import Catalog
    from bayespot.mock.orbits import OrbitPopulation

#: Below this posterior predictive p-value a statistic is called not reproduced.
SURPRISING = 0.01
#: With fewer draws no p-value can be that small.
MIN_DRAWS = 50
#: Most stars that are compared, of spherical and of axisymmetric models.
_MAX_STARS = (5000, 2000)
#: Most stars of the population drawn at once.
_BATCH = 50_000


@dataclass(frozen=True)
class Predictive:
    """Observed and replicated discrepancy statistics.

    Parameters
    ----------
    r_edges : (n_bins + 1,)
        Edges of the radial bins in kpc: quantiles of the observed stars. For an axisymmetric potential of their
        cylindrical radius R.
    r : (n_bins,)
        Median radius of the observed stars in each, in kpc.
    observed, replicated
        By statistic: the observed value per posterior draw and the replicated one, each ``(n_draws, *shape)``.
        Statistics of the catalogue alone are the same for every draw.
    p_values
        By statistic: the fraction of draws whose replicated chi-square exceeds the observed one.
    warnings
        In words, what speaks against the model.
    z_edges : (n_bins + 1,), z : (n_bins,)
        The same of the stars' heights, for an axisymmetric potential; None for others.
    v_edges : (n_velocities + 1,), R_edges : (n_R + 1,)
        Edges of histograms of line-of-sight velocities (km/s), and of the bins of a photometric sample on the sky, of
        `bayespot.posterior.velocity_check`; None for others.
    """

    r_edges: NDArray[Any]
    r: NDArray[Any]
    observed: dict[str, NDArray[Any]]
    replicated: dict[str, NDArray[Any]]
    p_values: dict[str, float]
    warnings: list[str]
    z_edges: NDArray[Any] | None = None
    z: NDArray[Any] | None = None
    v_edges: NDArray[Any] | None = None
    R_edges: NDArray[Any] | None = None


@keeps_callers_state
def posterior_predictive(
    posterior: PotentialDraws,
    catalog: Catalog,
    n_draws: int = 100,
    seed: int = 0,
    n_bins: int = 8,
    max_stars: int | None = None,
    tick: Callable[[], None] | None = None,
) -> Predictive:
    """Compare the catalogue with catalogues replicated from posterior draws.

    Every draw gives a population; stars are sampled from it by the chain, scattered by errors like the
    catalogue's and passed through the selection until there are as many as observed. Compared are the radial
    profile (``counts``), the dispersion profiles ``sigma_r`` and ``sigma_t``, the anisotropy ``beta``, the
    quadrupoles of `orientations`, which test the model's symmetry through errors and selection, and
    ``angles``, the uniformity of the angles given the actions (`angle_statistic`). The last is a realised
    discrepancy: it is computed in each draw's potential, for the catalogue and for the draw's replica, and its
    p-value is the fraction of draws in which the replica's is larger. With an axisymmetric potential the profiles are
    `bayespot.posterior.cylindrical_profiles` instead.

    A model of velocities given positions (``likelihood="conditional"``) replicates the velocities at the catalogue's
    positions; then ``counts`` test nothing.

    Replicas are of members: stars that are more likely outliers are left out of the comparison.

    The stars are used twice, for the fit and for the check, so that a true model's p-values crowd about 1/2
    instead of being uniform: small ones are rarer than their value says, and a value near 1/2 proves little. A fit of a
    sphere does not use how stars are oriented: there ``directions`` and ``planes`` have uniform p-values.

    Parameters
    ----------
    posterior
        A finished fit.
    catalog
        The stars it was fitted to.
    n_draws, seed
        Posterior draws used, at least `MIN_DRAWS`, and seed.
    n_bins
        Radial bins, of equal numbers of observed stars, at least five.
    max_stars
        Larger catalogues are represented by a random subset of this size; None: 5000, with an axisymmetric potential
        2000, whose replicas and angles cost more.
    tick
        Called after each draw.

    Returns
    -------
    Predictive

    Raises
    ------
    ValueError
        If there are too few draws for a small p-value, the selection keeps nearly nothing, or the model's finder
        has no inverse.

    References
    ----------
    Gelman, Meng & Stern (1996), Statistica Sinica 6, 733, equation 7: realised discrepancies. Meng (1994), Annals of
    Statistics 22, 1142: p-values of a true model are less spread than uniform ones.
    """
    few = posterior.thinned(n_draws)
    if few.n_draws < MIN_DRAWS:
        raise ValueError(
            f"{few.n_draws} draws cannot give a p-value below {SURPRISING}: ask for at least {MIN_DRAWS}, of a "
            "posterior that has them"
        )
    if few.has_outliers():
        catalog = catalog[torch.as_tensor(few.outliers(catalog) < LIKELY)]
    axial = few.symmetry == "axisymmetric"
    most = max_stars or _MAX_STARS[axial]
    if len(catalog) > most:
        catalog = catalog.subsample(most, seed)
    n_bins = max(1, min(n_bins, len(catalog) // 5))
    x = catalog.x.numpy()
    edges, middle = bins_of(np.linalg.norm(x[:, :2] if axial else x, axis=-1), n_bins)
    z_edges, z = bins_of(np.abs(x[:, 2]), n_bins) if axial else (None, None)

    def statistics(w: Tensor) -> dict[str, NDArray[Any]]:
        stars = w.numpy()
        found = profiles(stars, edges) if z_edges is None else cylindrical_profiles(stars, edges, z_edges)
        return found | orientations(w)

    replicas: dict[int, Replicator] = {}
    observed_profile = statistics(catalog.w)
    observed: dict[str, list[Any]] = {name: [] for name in (*observed_profile, "angles")}
    replicated: dict[str, list[Any]] = {name: [] for name in (*observed_profile, "angles")}
    with torch.no_grad():
        for i in range(few.n_draws):
            model, values = few.source(i)
            if id(model) not in replicas:
                replicas[id(model)] = Replicator(model, catalog)
            replica, fixed = replicas[id(model)].draw(values, seed * 1_000_003 + i), model.at(values)
            observed["angles"].append(angle_statistic(fixed, catalog.w).statistic)
            replicated["angles"].append(replica.angle_test(fixed).statistic)
            for name, value in statistics(replica.w).items():
                replicated[name].append(value)
                observed[name].append(observed_profile[name])
            if tick:
                tick()
    seen, drawn = ({k: np.asarray(v) for k, v in store.items()} for store in (observed, replicated))
    p_values = {name: chi_square_p_value(seen[name], drawn[name]) for name in seen}
    return Predictive(edges, middle, seen, drawn, p_values, _verdict(p_values, few.n_draws, axial), z_edges, z)


def bins_of(values: NDArray[Any], n_bins: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return edges of bins with equal numbers, the first from zero and the last without end, and their medians."""
    edges = np.quantile(values, np.linspace(0, 1, n_bins + 1))
    middle = np.quantile(values, (np.arange(n_bins) + 0.5) / n_bins)
    edges[0], edges[-1] = 0.0, np.inf
    return edges, middle


class Replica(NamedTuple):
    """A replicated catalogue: ``w (n, 6)`` as observed and, if that is without errors, ``J`` and ``theta (n, 3)``."""

    w: Tensor
    J: Tensor | None = None
    theta: Tensor | None = None

    def angle_test(self, fixed: SnapshotModel) -> AngleTest:
        """Return `angle_statistic` of the replica in the potential that it was drawn in."""
        if self.J is None or self.theta is None:
            return angle_statistic(fixed, self.w)
        return angle_test(self.J, self.theta)


class Replicator:
    """Draws catalogues like the given one: as many stars, with errors and selection of the model.

    Parameters
    ----------
    model
        The fitted model.
    catalog
        Number of stars and measurement errors.

    Raises
    ------
    ValueError
        For a model of line-of-sight velocities.
    """

    def __init__(self, model: SnapshotModel, catalog: Catalog) -> None:
        if model.projection is not None:
            raise ValueError(
                "stars on the sky have checks of their own: take bayespot.posterior.velocity_check (bayespot check)"
            )
        self.model, self.n = model, len(catalog)
        self.scatter = None if model.errors is None else ErrorScatter(catalog)
        #: The stars, of which a conditional likelihood keeps the places.
        self.data = model.prepare(catalog) if model.conditional else None

    def draw(self, values: Mapping[str, Tensor], seed: int) -> Replica:
        """Return the catalogue as it would be observed, for one set of values of the sites.

        Raises
        ------
        ValueError
            If the selection keeps less than one star in 10^4 of the population.
        """
        if self.model.conditional:
            return self._at_the_same_places(values, seed)
        chain, selection = self.model.chain(values), self.model.selection
        kept: list[tuple[Tensor, ...]] = []
        fraction, tried, found = 1.0, 0, 0
        generator = torch.Generator().manual_seed(seed)
        while found < self.n:
            if tried > 1e4 * (found + 1):
                raise ValueError(f"{selection} keeps {found} of {tried} stars of the population: nothing to replicate")
            ask = min(int(1.2 * (self.n - found) / fraction) + 50, _BATCH)
            true, *stars = self._observed(chain, ask, generator)
            if selection is not None:
                s = selection(true if self.model.selection_sees == "true" else stars[0])
                seen = torch.rand(s.shape, generator=generator, dtype=torch.float64) < s
                stars = [part[seen] for part in stars]
            kept.append(tuple(stars))
            tried += ask
            found += len(stars[0])
            fraction = max(found, 1) / tried
        w, *angles = (torch.cat(parts)[: self.n] for parts in zip(*kept, strict=True))
        return Replica(w, *angles) if self.scatter is None else Replica(w)

    def _at_the_same_places(self, values: Mapping[str, Tensor], seed: int) -> Replica:
        """Return the catalogue with other velocities: of its positions the model says nothing."""
        generator = torch.Generator().manual_seed(seed)
        first, second = torch.randint(2**31, (2,), generator=generator).tolist()
        fixed = self.model.at(values)
        stars = self.data
        assert stars is not None  # the likelihood is conditional
        if stars.dim() == 3:
            # where each may truly be, given what was observed of it
            weight = torch.softmax(sample_log_weights(fixed.true_density(), stars), -1)
            stars = stars[torch.arange(self.n), torch.multinomial(weight, 1, generator=generator)[:, 0]]
        w = sample_velocities(PhaseMixed(fixed.potential, fixed.finder, fixed.df), stars[:, :3], first)
        return Replica(w if self.scatter is None else self.scatter(w, second))

    def _observed(self, chain: Chain, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return true and observed w of about n stars without selection, and J and theta where they are known."""
        # seeds of their own: equal ones would tie actions, angles and errors together
        first, second = torch.randint(2**31, (2,), generator=generator).tolist()
        if isinstance(chain.finder, StaeckelFudge) and chain.finder.delta is None:
            # by rejection on the density itself, at a hundredth of the cost of inverting the fudge star by star
            true, angles = orbit_sample(chain.potential, cast("OrbitPopulation", chain.df), n, first), ()
        else:
            true, *angles = self._mapped(chain, n, first, generator)
        return true, true if self.scatter is None else self.scatter(true, second), *angles

    def _mapped(self, chain: Chain, n: int, seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return w, J and theta of about n stars, by the torus map."""
        torus_map = cast("TorusMap", chain.finder.rough())
        J = chain.df.sample(n, seed)
        J = J[torus_map.reaches(chain.potential, J)]
        theta = 2 * math.pi * torch.rand(J.shape, generator=generator, dtype=torch.float64)
        return torus_map.phase_space(chain.potential, J, theta), J, theta


@takes(w="phase_space", edges="length")
def profiles(w: NDArray[Any], edges: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return ``counts``, ``sigma_r`` and ``sigma_t`` (km/s, per tangential axis) and ``beta`` in radial bins.

    beta = 1 - sigma_t^2 / sigma_r^2; NaN where a bin has fewer than two stars.
    """
    x, v = w[:, :3], w[:, 3:]
    r = np.linalg.norm(x, axis=-1)
    v_r = (x * v).sum(-1) / r
    v_t2 = (v**2).sum(-1) - v_r**2
    index = np.clip(np.searchsorted(edges, r, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(index, minlength=len(edges) - 1).astype(float)
    n = np.where(counts > 1, counts, np.nan)
    sigma_r = np.sqrt(np.bincount(index, v_r**2, len(counts)) / n)
    sigma_t = np.sqrt(np.bincount(index, v_t2, len(counts)) / (2 * n))
    return {"counts": counts, "sigma_r": sigma_r, "sigma_t": sigma_t, "beta": 1 - (sigma_t / sigma_r) ** 2}


@takes_tensors(w="phase_space")
@torch.no_grad()
def orientations(w: Tensor) -> dict[str, NDArray[Any]]:
    r"""Return the mean quadrupole moments of the stars' ``directions`` within their orbital planes, and of ``planes``.

    .. math:: \langle x x^T - (1 - n n^T)/2 \rangle, \qquad \langle n n^T - 1/3 \rangle

    for unit vectors x along the positions and n along the angular momenta; each as five moments (`QUADRUPOLE`),
    orthonormal as matrices. In a sphere the first vanishes but for errors and selection, see
    `bayespot.inference.symmetry.symmetry_test`; replicas pass through both.
    """
    x, n = directions_and_planes(w)
    within = (moments(x) - moments(torch.linalg.cross(n, x))) / 2
    return {"directions": within.mean(0).numpy(), "planes": moments(n).mean(0).numpy()}


def chi_square_p_value(observed: NDArray[Any], replicated: NDArray[Any]) -> float:
    """Posterior predictive p-value of the chi-square about the replicas' mean and variance, or of a scalar itself."""
    if observed.ndim == 1:
        exceeds = replicated >= observed
        return float((exceeds.sum() + 0.5) / (len(exceeds) + 1))
    mean, var = np.nanmean(replicated, 0), np.nanvar(replicated, 0)
    scale = np.where(var > 0, var, np.inf)
    seen, drawn = (np.nansum((x - mean) ** 2 / scale, -1) for x in (observed, replicated))
    return float(((drawn >= seen).sum() + 0.5) / (len(seen) + 1))


def _verdict(p_values: Mapping[str, float], n: int, axial: bool) -> list[str]:
    words = {
        "counts": "the radial profile",
        "sigma_r": "the radial velocity dispersion",
        "sigma_t": "the tangential velocity dispersion",
        "beta": "the velocity anisotropy",
        "directions": "how stars are spread over their orbital planes (the symmetry of the potential)",
        "planes": "the distribution of orbital planes (the symmetry of f(J))",
        "angles": "the uniformity of the angles (phase mixing)",
    }
    if axial:
        about = "the stars' directions (the symmetry of the potential)"
        words |= CYLINDRICAL_STATISTICS | {"directions": about}
    return [
        f"{words[name]} is not reproduced (posterior predictive p = {p:.2g} from {n} replicas)"
        for name, p in p_values.items()
        if p < SURPRISING
    ]
