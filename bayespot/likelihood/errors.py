r"""Measurement errors: the likelihood of a star is its density averaged over where it may truly be.

With observables o (what the errors are Gaussian in), :math:`p(o_i) = \int N(o_i | o, C_i)\, f(w(o))\,
|\partial w/\partial o|\, do`, estimated with samples o_is drawn once from N(o_i, C_i):
:math:`\ln p(o_i) = \ln \mathrm{mean}_s\, f(w(o_{is}))\, |\partial w / \partial o|_{is}`.
Half-known velocities are drawn where stars may be bound, with importance weights, see `_Proposal`.

Errors of distances are Gaussian in ln d, with the relative error for standard deviation, as those of photometric
distances are; errors of parallaxes, proper motions and velocities are Gaussian in these. An error must not depend on
the noise itself: a fixed relative error of a distance does so in d, and does not in ln d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayespot.catalog.catalog import Catalog, Observed
from bayespot.catalog.frame import galactocentric_w, heliocentric
from bayespot.df.distributions import uniform_points
from bayespot.units import takes, takes_tensors

#: Errors below this fraction of the radius, and of the velocity dispersion, do not matter.
NEGLIGIBLE = 0.01


@takes(v_r_range="speed", distance_range="length")
@dataclass(frozen=True)
class MeasurementErrors:
    r"""How measurement errors enter the likelihood.

    Parameters
    ----------
    method
        ``"marginal"``: the average over ``n_samples`` fixed samples per star. ``"latent"``: the true observables
        of every star are sample sites (``stars.truth``, standardised) for Pyro's samplers and guides; for small
        catalogues.
    n_samples
        Samples per star; the effective number of them is reported.
    v_r_range
        Where a radial velocity is missing: it is marginalised over this range (km/s), flat.
    distance_range
        Where a distance is missing: it is marginalised over this range (kpc), flat.

    Raises
    ------
    ValueError
        If a range is empty or a number is out of range.
    """

    method: Literal["marginal", "latent"] = "marginal"
    n_samples: int = 32
    v_r_range: tuple[float, float] = (-600.0, 600.0)
    distance_range: tuple[float, float] = (0.1, 100.0)

    def __post_init__(self) -> None:
        for name in ("v_r_range", "distance_range"):
            low, high = getattr(self, name)
            object.__setattr__(self, name, (float(low), float(high)))
        if self.method not in ("marginal", "latent"):
            raise ValueError(f"method must be 'marginal' or 'latent', got {self.method!r}")
        if self.n_samples < 2:
            raise ValueError(f"n_samples must be at least 2, got {self.n_samples}")
        if not self.v_r_range[0] < self.v_r_range[1]:
            raise ValueError(f"v_r_range must increase, got {self.v_r_range} km/s")
        if not 0 < self.distance_range[0] < self.distance_range[1]:
            raise ValueError(f"distance_range must be positive and increase, got {self.distance_range} kpc")

    @classmethod
    def where_needed(cls, catalog: Catalog, **settings: Any) -> MeasurementErrors | None:
        """Return errors with these settings for a catalogue that has some, None where they are negligible.

        Negligible (`relative_errors`): no star lacks a distance or radial velocity, and 95 % of the stars are known to
        1 % of their radius and to 1 % of the stars' velocity dispersion.

        Examples
        --------
        >>> MeasurementErrors.where_needed(Catalog.example("globular_clusters"), n_samples=64).n_samples
        64
        """
        found = relative_errors(catalog)
        return None if found is None or found.negligible else cls(**settings)

    def samples(self, catalog: Catalog, seed: int) -> Tensor:
        """Return where each star may truly be: ``(n, n_samples, 7)``, w and the logarithm of its weight.

        The average over samples of weight times density is the star's likelihood, up to a factor that depends
        on no parameter. Drawn with scrambled Sobol points, shifted at random from star to star, from `_Proposal`.

        Raises
        ------
        ValueError
            If the catalogue has no errors.
        """
        u = uniform_points(self.n_samples, 6, seed)
        generator = torch.Generator().manual_seed(seed)
        shift = torch.rand(len(catalog), 1, 6, generator=generator, dtype=torch.float64)
        u = torch.remainder(u + shift, 1).clamp(1e-12, 1 - 1e-12)
        z = math.sqrt(2) * torch.erfinv(2 * u - 1)
        proposal = _Proposal(self, _typical_speed(catalog))
        # blocks bound the memory of the Jacobians
        rows = torch.arange(len(catalog)).split(max(1, 500_000 // self.n_samples))
        return torch.cat([proposal(catalog[part], z[part]) for part in rows])

    @takes_tensors(z="number")
    def place(self, catalog: Catalog, z: Tensor) -> Tensor:
        """Return w and log-weight ``(n, S, 7)`` at standardised errors ``z (n, S, 6)`` of each star; differentiable.

        For standard normal z the expectation of weight times density is the star's likelihood.
        """
        if catalog.observed is None:
            if catalog.covariance is None:
                raise ValueError(
                    "the model has measurement errors but the catalogue has none; add *_error columns or a "
                    "covariance, or build the model without errors"
                )
            w = catalog.w[:, None] + torch.einsum("nij,nsj->nsi", roots(catalog.covariance), z)
            return torch.cat([w, torch.zeros_like(w[..., :1])], -1)
        observed = catalog.observed
        centre, root = _gaussian(observed)
        log_share = torch.zeros_like(z[..., 0])
        if "parallax" in observed.names:
            z, log_share = _positive_parallax(z, centre, root)
        columns = list((centre[:, None] + _from_arc(torch.einsum("nij,nsj->nsi", root, z), centre)).unbind(-1))
        # an observable that is missing has its range instead; that of a distance uniform in ln d
        ranges = (
            ("radial_velocity", 5, self.v_r_range),
            ("distance", 2, (math.log(self.distance_range[0]), math.log(self.distance_range[1]))),
        )
        for name, j, (low, high) in ranges:
            lost = torch.isnan(observed.values[:, j])
            if bool(lost.any()):
                if name not in observed.names:
                    raise ValueError(f"stars without {observed.names[j]} cannot be marginalised over; drop them")
                spread = low + (high - low) * torch.special.ndtr(z[..., j])
                columns[j] = torch.where(lost[:, None], spread, columns[j])
        # |dw/do| = k^2 d^4 for o with d itself, d more for ln d and d^2 more for a parallax
        if "parallax" in observed.names:
            positive = columns[2] > 0
            columns[2] = torch.where(positive, columns[2], centre[:, 2, None])
            log_weight = torch.where(positive, log_share - 6 * columns[2].log(), -torch.inf)
        else:
            log_weight = 5 * columns[2]
            columns[2] = columns[2].exp()
        w = galactocentric_w(dict(zip(observed.names, columns, strict=True)), observed.frame)
        return torch.cat([w, log_weight[..., None]], -1)


def _positive_parallax(z: Tensor, centre: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Move standardised errors ``z (n, S, 6)`` to where the parallax is positive, with ln of the share that is.

    So a star whose parallax was measured to be negative, or not far above zero, keeps all its samples. Given the errors
    of ra and dec the parallax is Gaussian; its upper tail is mapped onto the positive part.
    """
    mean = centre[:, None, 2] + (root[:, None, 2, :2] * z[..., :2]).sum(-1)
    sd = root[:, None, 2, 2]
    ratio = mean / torch.where(sd > 0, sd, 1.0)
    share = torch.special.ndtr(ratio)
    # elsewhere nothing is below zero: what was drawn stays, to the last digit
    cut = (sd > 0) & (share < 1 - 1e-12)
    upper = torch.where(cut, share * torch.special.ndtr(-z[..., 2]), 0.5).clamp(min=1e-300)
    moved = torch.where(cut, -torch.special.ndtri(upper), z[..., 2])
    log_share = torch.where(cut, torch.special.log_ndtr(ratio), 0.0)
    return torch.cat([z[..., :2], moved[..., None], z[..., 3:]], -1), log_share


class RelativeErrors(NamedTuple):
    """Errors that 5 % of the stars exceed, and the number of stars without a distance or a radial velocity.

    ``radius``: of the position (root of the summed variances) over the star's distance from the centre. ``velocity``:
    per axis (root of the mean variance) over the stars' velocity dispersion per axis.
    """

    radius: float
    velocity: float
    n_missing: int

    @property
    def negligible(self) -> bool:
        """Whether the fit may take the coordinates as exact."""
        return not self.n_missing and max(self.radius, self.velocity) < NEGLIGIBLE

    def __str__(self) -> str:
        text = (
            f"5 % of the stars have more than {100 * self.radius:.2g} % in radius or more than "
            f"{100 * self.velocity:.2g} % of the velocity dispersion in velocity"
        )
        return text + (f", and {self.n_missing} lack a distance or a radial velocity" if self.n_missing else "")


def relative_errors(catalog: Catalog) -> RelativeErrors | None:
    """Return how large a catalogue's measurement errors are; None if it has none."""
    if catalog.covariance is None or not len(catalog):
        return None
    variance = catalog.covariance.diagonal(dim1=1, dim2=2)
    in_radius = (variance[:, :3].sum(-1) / (catalog.x**2).sum(-1).clamp(min=1e-300)).sqrt()
    in_velocity = variance[:, 3:].mean(-1).sqrt() / _typical_speed(catalog)
    lost = 0 if catalog.observed is None else int(torch.isnan(catalog.observed.values).any(-1).sum())
    return RelativeErrors(float(in_radius.quantile(0.95)), float(in_velocity.quantile(0.95)), lost)


def ignored_errors(catalog: Catalog) -> list[str]:
    """Return, in words, what a fit to the coordinates alone leaves out; empty where that is negligible."""
    found = relative_errors(catalog)
    if found is None or found.negligible:
        return []
    return [
        f"measurement errors are ignored ({found}): they make orbits hotter and the error bars do not cover that; take "
        "a built-in model without --ignore-errors, or give your own errors=MeasurementErrors()"
    ]


class _Proposal:
    r"""Draws velocities from the errors, and from the errors times Gaussian populations of smaller and smaller spread.

    Where errors are wider than the population (a proper motion at 100 kpc), hardly a sample of theirs is bound. Given
    the position, v = v_0 + B z with z the standardised errors of the velocity observables; with a population
    N(0, sigma^2) of v, z is Gaussian of precision :math:`M = 1 + B^T B/\sigma^2` and mean
    :math:`-M^{-1} B^T v_0/\sigma^2`. Weights are those of the mixture over sigma (balance heuristic; Veach & Guibas
    1995), at most its number of members, and one for small errors.

    Parameters
    ----------
    errors
        Places stars.
    speed
        The population's typical velocity per axis (km/s).
    """

    #: Members of the mixture, in units of 1 / speed: 0 are the errors themselves.
    _INVERSE_SPREADS = (0.0, 1.0, 2.5, 6.0)

    def __init__(self, errors: MeasurementErrors, speed: float) -> None:
        self._errors, self._speed = errors, speed

    def __call__(self, catalog: Catalog, z: Tensor) -> Tensor:
        """Return w and log-weight ``(n, S, 7)`` for standard normal ``z (n, S, 6)``."""
        place = self._errors.place
        lost = torch.zeros(len(catalog), dtype=torch.bool)
        if catalog.observed is not None:
            lost = torch.isnan(catalog.observed.values[:, 5])
        # a radial velocity that is missing is uniform in its range: it stays as drawn
        still = z * z.new_tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
        still[lost, :, 5] = z[lost, :, 5]
        v_0 = place(catalog, still)[..., 3:6]
        unit = torch.eye(6, dtype=torch.float64)
        B = torch.stack([place(catalog, still + unit[j])[..., 3:6] - v_0 for j in (3, 4, 5)], -1)
        B[lost, :, :, 2] = 0.0
        # runs of consecutive Sobol points: those are spread evenly, every fourth point is not
        member = torch.arange(z.shape[1]) * len(self._INVERSE_SPREADS) // z.shape[1]
        inverse = z.new_tensor(self._INVERSE_SPREADS) / self._speed
        mean, root, _ = self._posterior(v_0, B, inverse[member])
        moved = still.clone()
        moved[..., 3:] = mean + torch.linalg.solve_triangular(root.mT, z[..., 3:, None], upper=True)[..., 0]
        placed = place(catalog, moved)
        ratios = []
        for k, t in enumerate(inverse):
            share = float((member == k).sum()) / len(member)
            _, _, log_evidence = self._posterior(v_0, B, t.expand(len(member)))
            ratio = -0.5 * t**2 * (placed[..., 3:6] ** 2).sum(-1) - log_evidence
            ratios.append(ratio + (math.log(share) if share else -math.inf))
        placed[..., 6] -= torch.logsumexp(torch.stack(ratios), 0)
        return placed

    @staticmethod
    def _posterior(v_0: Tensor, B: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean of z, the Cholesky factor of its precision, and the log-evidence, for 1/sigma ``(S,)``.

        The evidence is without the factor of sigma that the population's density has, too.
        """
        t2 = inverse[:, None] ** 2
        root = torch.linalg.cholesky(torch.eye(3, dtype=torch.float64) + t2[..., None] * (B.mT @ B))
        slope = t2 * torch.einsum("...ij,...i->...j", B, v_0)
        mean = -torch.cholesky_solve(slope[..., None], root)[..., 0]
        chi2 = t2[:, 0] * (v_0**2).sum(-1) + (slope * mean).sum(-1)
        return mean, root, -0.5 * chi2 - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _typical_speed(catalog: Catalog) -> float:
    """Return the spread of the velocity per axis (km/s), from the half of the stars whose velocities are best known."""
    speed2 = (catalog.v**2).sum(-1)
    if catalog.covariance is not None:
        variance = catalog.covariance.diagonal(dim1=1, dim2=2)[:, 3:].sum(-1)
        speed2 = speed2[variance <= variance.median()]
    # the median of chi-square with three degrees of freedom is 2.37
    return max(float(speed2.median() / 2.37) ** 0.5, 1e-6)


class ErrorScatter:
    """Adds measurement errors like the catalogue's to any stars.

    Each star takes the errors of one of the catalogue's stars nearest to it: in distance, with relative errors of
    distances and absolute ones of the rest, or in radius if the covariance is Galactocentric.

    Parameters
    ----------
    catalog
        A catalogue with errors.
    """

    _NEAR = 5

    def __init__(self, catalog: Catalog) -> None:
        self._names = None if catalog.observed is None else catalog.observed.names
        self._frame = None if catalog.observed is None else catalog.observed.frame
        if catalog.observed is not None:
            centre, root = _gaussian(catalog.observed)
            ln_d = -centre[:, 2].log() if "parallax" in catalog.observed.names else centre[:, 2]
            known = torch.isfinite(ln_d)
            ln_d, root = ln_d[known], root[known]
        elif catalog.covariance is not None:
            ln_d, root = torch.linalg.vector_norm(catalog.x, dim=-1).log(), roots(catalog.covariance)
        else:
            raise ValueError("the catalogue has no measurement errors to scatter stars with")
        order = ln_d.argsort()
        self._ln_d, self._root = ln_d[order].contiguous(), root[order]

    def __call__(self, w: Tensor, seed: int) -> Tensor:
        """Return what would be observed of stars at true ``w (n, 6)``, as Galactocentric coordinates."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        jitter = torch.randint(-self._NEAR, self._NEAR + 1, (len(w),), generator=generator)

        def noise(ln_d: Tensor) -> Tensor:
            nearest = (torch.searchsorted(self._ln_d, ln_d) + jitter).clamp(0, len(self._ln_d) - 1)
            return torch.einsum("nij,nj->ni", self._root[nearest], z)

        if self._names is None:
            return w + noise(torch.linalg.vector_norm(w[:, :3], dim=-1).log())
        true = {name: torch.as_tensor(value) for name, value in heliocentric(w.numpy(), self._frame).items()}
        ln_d = true["distance"].log()
        third = 1 / true["distance"] if "parallax" in self._names else ln_d
        values = torch.stack([third if i == 2 else true[n] for i, n in enumerate(self._names)], -1)
        seen = values + _from_arc(noise(ln_d)[:, None], values)[:, 0]
        # a parallax scattered to below zero would not be in a catalogue
        positive = torch.where(seen[:, 2] > 0, seen[:, 2], third)
        far = positive if "parallax" in self._names else seen[:, 2].exp()
        columns = [far if i == 2 else seen[:, i] for i in range(6)]
        return galactocentric_w(dict(zip(self._names, columns, strict=True)), self._frame)


def _gaussian(observed: Observed) -> tuple[Tensor, Tensor]:
    """Return the observables that errors are Gaussian in ``(n, 6)``, ln d for d, and roots of their covariance."""
    values = observed.values.clone()
    # nothing is known of what is missing, and what is known does not depend on it
    scale = torch.isfinite(values).double()
    if "distance" in observed.names:
        scale[:, 2] /= values[:, 2].nan_to_num(1.0)
        values[:, 2] = values[:, 2].log()
    return values, roots(observed.covariance * scale[:, :, None] * scale[:, None, :])


def roots(covariance: Tensor) -> Tensor:
    """Return lower-triangular R with R R^T the covariance ``(n, 6, 6)``, also where variances vanish.

    The velocity's errors move no position, and what has no variance moves nothing.
    """
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(covariance / (safe[:, :, None] * safe[:, None, :]))
    symmetric = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT
    triangular = torch.linalg.qr((scale[:, :, None] * symmetric).mT).R.mT
    return torch.where(triangular.diagonal(dim1=1, dim2=2)[:, None, :] < 0, -triangular, triangular)


def _from_arc(noise: Tensor, values: Tensor) -> Tensor:
    """Turn noise ``(n, S, 6)`` in ra cos(dec) into noise in ra."""
    cos_dec = torch.deg2rad(values[:, 1]).cos()[:, None]
    return torch.cat([(noise[..., 0] / cos_dec)[..., None], noise[..., 1:]], -1)
