"""What a formula must agree with: the posterior of the potential at radii of the stars, whitened by its covariance."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bayespot.potential.profile import require_spherical

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayespot.posterior.posterior import PotentialDraws

Gauge = Literal["absolute", "offset", "force"]
GAUGES = ("absolute", "offset", "force")
#: Step in ln r of the difference quotients that give a formula's slope and curvature.
STEP = 2e-3
#: Eigenvalues of the covariance below this fraction of the largest count as rounding or as the form of the network:
#: they hold a percent of what the draws say about a formula's constants.
FLOOR = 1e-5
#: Fewest draws that give a covariance.
MIN_DRAWS = 20
#: Most draws that a target keeps.
MAX_DRAWS = 500
#: Where the limits of a formula are looked at, in units of the normalising radius.
FAR, NEAR = (1e6, 1e8), (1e-4, 1e-6)


@dataclass(frozen=True)
class Target:
    r"""Posterior draws of :math:`y = -\Phi/v_0^2` at :math:`x = r/r_0`, and what fits are measured with.

    In gauge ``"absolute"`` a formula is compared with y, in ``"offset"`` with y(x) - y(1), in ``"force"`` with
    :math:`v_c^2/v_0^2 = -dy/d\ln x`.

    Parameters
    ----------
    x : (n,)
        Radii in units of r_0, ascending.
    draws, slopes : (K, n)
        y and dy/d ln x of every draw.
    at_one : (K,)
        y at x = 1.
    r_0, v_0
        Normalisation in kpc and km/s.
    stars_r
        Radii of a sample of the stars in kpc.
    """

    x: NDArray[Any]
    draws: NDArray[Any]
    slopes: NDArray[Any]
    at_one: NDArray[Any]
    r_0: float
    v_0: float
    stars_r: NDArray[Any]

    @classmethod
    def of(cls, posterior: PotentialDraws, n_radii: int = 40) -> Target:
        """Evaluate a posterior at ``n_radii`` quantiles of its stars' radii (0.5 % to 99.5 %).

        Raises
        ------
        ValueError
            If there are fewer than `MIN_DRAWS` draws, the draws know no stars, or the potential is not spherical.
        """
        if posterior.n_draws < MIN_DRAWS:
            raise ValueError(
                f"{posterior.n_draws} posterior draws give no covariance to distil: fit with at least {MIN_DRAWS}, "
                "better 1000"
            )
        if "radii" not in posterior.meta:
            raise ValueError("these draws know no stars (meta has no radii): distil the posterior of a fit")
        few = posterior.thinned(MAX_DRAWS)
        require_spherical(few.potential_at(0))
        stars_r = np.asarray(posterior.meta["radii"])
        r_0 = float(np.median(stars_r))
        r = np.quantile(stars_r, np.linspace(0.005, 0.995, n_radii))
        found = few.radial_fields(np.append(r, r_0), ("potential", "radial_acceleration"))
        phi, force = found["potential"].draws, found["radial_acceleration"].draws
        v2 = -float(force[:, -1].mean()) * r_0
        if not (np.isfinite(phi).all() and np.isfinite(force).all() and v2 > 0):
            raise ValueError("the posterior's potential is not finite or not attractive at the stars' radii")
        return cls(r / r_0, -phi[:, :-1] / v2, force[:, :-1] * r / v2, -phi[:, -1] / v2, r_0, v2**0.5, stars_r)

    def values(self, gauge: Gauge) -> NDArray[Any]:
        """Return the draws ``(K, n)`` of what a formula is compared with."""
        if gauge == "force":
            return -self.slopes
        return self.draws - self.at_one[:, None] if gauge == "offset" else self.draws

    @functools.cached_property
    def nodes(self) -> NDArray[Any]:
        """Radii where a formula is evaluated: x, x up and down by `STEP`, 1, `FAR`, `NEAR` and those by `STEP`."""
        near = np.array(NEAR)
        h = np.exp(STEP)
        return np.concatenate([self.x, self.x * h, self.x / h, [1.0], FAR, near, near * h, near / h])

    def metric(self, gauge: Gauge, floor: float = FLOOR) -> Metric:
        """Return the whitening of a gauge: directions whose eigenvalue is above ``floor`` of the largest."""
        values = self.values(gauge)
        covariance = np.cov(values.T)
        variance, vectors = np.linalg.eigh(covariance)
        kept = variance > floor * variance[-1]
        white = (vectors[:, kept] / np.sqrt(variance[kept])).T
        n, h = len(self.x), STEP
        rows = np.zeros((n, len(self.nodes)))
        if gauge == "force":
            rows[:, n : 2 * n], rows[:, 2 * n : 3 * n] = -np.eye(n) / (2 * h), np.eye(n) / (2 * h)
        else:
            rows[:, :n] = np.eye(n)
            if gauge == "offset":
                rows[:, 3 * n] = -1
        return Metric(gauge, white @ rows, values @ white.T)


@dataclass(frozen=True)
class Metric:
    """A linear map from a formula's values at `Target.nodes` to posterior standard deviations.

    Parameters
    ----------
    gauge
        See `Target`.
    rows : (k, n_nodes)
        The residual of y(nodes) is ``rows @ y - draws.mean(0)``.
    draws : (K, k)
        Whitened draws: unit covariance.
    """

    gauge: Gauge
    rows: NDArray[Any]
    draws: NDArray[Any]

    @property
    def mean(self) -> NDArray[Any]:
        """Whitened posterior mean ``(k,)``."""
        return self.draws.mean(0)

    @property
    def size(self) -> int:
        """Number of directions that the posterior determines."""
        return len(self.rows)


@dataclass(frozen=True)
class Shape:
    r"""What physics asks of a formula.

    ``negative_density`` is the fraction of the radii with negative density or an outward force; ``at_infinity`` is
    \|y\| and ``drift`` its change over two decades far out; ``at_centre`` the mass at the centre over that inside
    the normalising radius (of a point mass 1; of every cusp shallower than r^-3 about 0).
    """

    negative_density: float
    at_infinity: float
    drift: float
    at_centre: float

    def faults(self, gauge: Gauge) -> dict[str, bool]:
        """Say which of the conditions ``density``, ``asymptote`` and ``centre`` fail."""
        limit = self.at_infinity if gauge == "absolute" else self.drift
        return {
            "density": self.negative_density != 0,
            "asymptote": not limit < 1e-3,
            "centre": not self.at_centre < 1e-2,
        }


def shape_of(y: NDArray[Any], n: int) -> Shape:
    """Return the `Shape` of a formula's values at `Target.nodes` of n radii."""
    middle, above, below, rest = y[:n], y[n : 2 * n], y[2 * n : 3 * n], y[3 * n :]
    slope = (above - below) / (2 * STEP)
    curvature = (above - 2 * middle + below) / STEP**2
    # with s = ln x: M ~ -x dy/ds and rho ~ -(dy/ds + d2y/ds2) / x^2; what rounding and the quotients lose is allowed
    lost = 1e-15 * np.abs(middle) / STEP**2 * 8 + 1e-5 * (np.abs(slope) + np.abs(curvature))
    negative = (slope + curvature > lost) | (slope > lost)
    far, near = rest[1:3], (rest[5:7] - rest[7:9]) / (2 * STEP)
    mass = np.abs(near * NEAR).max() / max(float(np.abs(slope[n // 2])), 1e-300)
    return Shape(float(negative.mean()), float(np.abs(far[-1])), float(np.abs(far[1] - far[0])), float(mass))
