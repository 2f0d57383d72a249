"""How well N stars of a simulated system would constrain a model's potential: Cramer-Rao bounds, without a fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayespot.callers_state import keeps_callers_state
from bayespot.df import SphericalMixture
from bayespot.inference.latent import LatentSpace
from bayespot.inference.linearised import responds
from bayespot.likelihood.model import SnapshotModel
from bayespot.mock.orbits import orbits_from_description
from bayespot.mock.sample import equilibrium, truth_potential
from bayespot.posterior.information import closest_flattened, closest_sphere, differences, of_flattened, of_sphere
from bayespot.posterior.posterior import Posterior
from bayespot.potential.axial_fields import AXIAL_FIELDS, axial_fields, meridional_fields
from bayespot.potential.base import Potential, radius
from bayespot.potential.fields import positive_radii, truth_field
from bayespot.units import takes, unit

if TYPE_CHECKING:
    from astropy.table import QTable
    from numpy.typing import ArrayLike, NDArray

    from bayespot.catalog.catalog import Catalog

#: Fields that a forecast of a sphere tabulates, and of a flattened galaxy, against R in the plane.
FORECAST_FIELDS = ("potential", "enclosed_mass", "circular_speed")
FLATTENED_FIELDS = ("potential", "circular_speed", "vertical_acceleration")
_N_GROUPS = 16
#: Eigenvalues of the information (in units of its diagonal) below this are rounding errors.
_LEAST = 1e-11


@dataclass(frozen=True)
class Forecast:
    """Information per star on a model's potential, and what follows for any number of stars.

    Parameters
    ----------
    space
        Latents of the potential alone.
    u
        Their values (unconstrained) closest to the true potential.
    groups : (n_groups, K, K)
        Information per star of groups of simulated stars; their mean is `information`.
    prior : (K, K)
        Curvature of minus the log prior at ``u``.
    misfit
        Largest error of ln M(<r) of the model at ``u``, over the stars' radii; of a flattened galaxy the error of the
        acceleration over its size, which nineteen of twenty stars keep: what no number of stars removes.
    stars_r
        Radii in kpc of simulated stars, sorted; in a flattened galaxy those in the plane.
    """

    space: LatentSpace
    u: Tensor
    groups: Tensor
    prior: Tensor
    misfit: float
    stars_r: NDArray[np.float64]

    @property
    def information(self) -> Tensor:
        """Fisher information per star ``(K, K)``, with f(J) free."""
        return self.groups.mean(0)

    @property
    def flattened(self) -> bool:
        """Whether the model's potential is axisymmetric: radii are those in the plane then."""
        return self.space.model.potential.symmetry == "axisymmetric"

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that `table` and figures have."""
        return FLATTENED_FIELDS if self.flattened else FORECAST_FIELDS

    @property
    def potential(self) -> Potential:
        """The model's potential closest to the true one."""
        return self._potential(self.u)

    def covariance(self, n_stars: float, prior: bool = False) -> Tensor:
        """Return the covariance of the latents ``(K, K)`` in u: the logarithm of positive parameters.

        With ``prior`` the inverse of information plus prior curvature, otherwise the Cramer-Rao bound; infinite or
        NaN where the stars do not constrain it.
        """
        return self._covariance_times(torch.eye(len(self.u), dtype=torch.float64), n_stars, prior, self.information)[1]

    def parameters(self, n_stars: float, prior: bool = True) -> dict[str, float]:
        """Return the standard deviation of every scalar latent (of its logarithm if it is positive)."""
        sd = self.covariance(n_stars, prior).diagonal().sqrt()
        return {name: float(sd[part.start]) for name, part in self.space.slices.items() if part.stop - part.start == 1}

    @takes(radii="length")
    def relative_sd(self, field: str, radii: ArrayLike, n_stars: float, prior: bool = False) -> NDArray[np.float64]:
        """Return sd / |value| of a field at radii (kpc) for ``n_stars`` stars.

        Parameters
        ----------
        field
            A name of `bayespot.potential.RADIAL_FIELDS`; the potential counts from the model's own zero, at infinity
            where that exists. In a flattened galaxy of `bayespot.potential.AXIAL_FIELDS` as well, or of
            `bayespot.potential.MERIDIONAL_FIELDS` at places ``(n, 2)``.
        radii
            In kpc: ``(n,)``, in the plane of a flattened galaxy; or (R, z) there, ``(n, 2)``.
        n_stars
            Number of stars.
        prior
            Whether the model's prior helps. Without it the result is the Cramer-Rao bound of free f(J), infinite where
            the stars leave the field free.

        Raises
        ------
        ValueError
            If the field is unknown, a radius or the number of stars is not positive.
        """
        if not n_stars >= 1:
            raise ValueError(f"n_stars must be at least 1, got {n_stars}")
        return self._relative_sd(self._log_slopes(field, radii), n_stars, prior, self.information)

    @takes(radii="length")
    def monte_carlo_error(self, field: str, radii: ArrayLike, n_stars: float, prior: bool = False) -> float:
        """Return the largest relative error of `relative_sd` that the number of simulated stars leaves (jackknife)."""
        slopes, n = self._log_slopes(field, radii), len(self.groups)
        left_out = (self.groups.sum(0) - self.groups) / (n - 1)
        sd = np.stack([self._relative_sd(slopes, n_stars, prior, information) for information in left_out])
        with np.errstate(invalid="ignore"):
            return float(np.nanmax(sd.std(0) * math.sqrt(n - 1) / sd.mean(0), initial=0.0))

    @takes(r="length", accuracy="number")
    def stars_needed(self, field: str, r: float, accuracy: float, prior: bool = False) -> float:
        """Return the least number of stars for a relative sd of ``accuracy`` at ``r`` kpc; infinite if none suffices.

        Raises
        ------
        ValueError
            As `relative_sd`, or if the accuracy is not positive.
        """
        if not 0 < accuracy < math.inf:
            raise ValueError(f"accuracy must be positive (0.01 is one per cent), got {accuracy}")
        slopes = self._log_slopes(field, [r])

        def sd(n: float) -> float:
            return float(self._relative_sd(slopes, n, prior, self.information)[0])

        if sd(1) <= accuracy:
            return 1.0
        if not prior:
            # the bound is proportional to 1/sqrt(N)
            return float(np.ceil((sd(1) / accuracy) ** 2))
        low, high = 0.0, 1.0
        while sd(math.exp(high)) > accuracy:
            low, high = high, high + 2
            if high > 60:
                return math.inf
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if sd(math.exp(middle)) > accuracy else (low, middle)
        return math.ceil(math.exp(high))

    def posterior(self, n_stars: float, n_draws: int, seed: int) -> Posterior:
        """Return draws such as a fit of ``n_stars`` stars would give, about the truth, with the prior.

        Their fields have the bands that the latents' Gaussian has, also where a field is not linear in them: the outer
        potential of a free form with few stars is wider than `relative_sd` says.
        """
        generator = torch.Generator().manual_seed(seed)
        scatter = torch.linalg.cholesky(self.covariance(n_stars, prior=True))
        draws = self.u + torch.randn(n_draws, len(self.u), dtype=torch.float64, generator=generator) @ scatter.T
        r_q = np.quantile(self.stars_r, [0, 0.01, 0.05, 0.16, 0.5, 0.84, 0.95, 0.99, 1]).tolist()
        meta = {"n_stars": n_stars, "r_q": r_q, "radii": self.stars_r.tolist()}
        return Posterior(self.space.model, self.space.values(draws), meta)

    @takes(radii="length")
    def table(self, radii: ArrayLike, n_stars: float) -> QTable:
        """Return a table of `fields` with units: value, ``_bound`` and ``_with_prior`` (both relative sd)."""
        from astropy.table import QTable

        r = positive_radii(radii)
        table = QTable({"r": r * unit("r")}, meta={"n_stars": n_stars, "misfit_ln_mass": self.misfit})
        for name in self.fields:
            table[name] = self._values(name, torch.as_tensor(r), self.u).numpy() * unit(name)
            for suffix, prior in (("bound", False), ("with_prior", True)):
                table[f"{name}_{suffix}"] = self.relative_sd(name, r, n_stars, prior)
        return table

    # ------------------------------------------------------------------------------------------- linear algebra

    def _potential(self, u: Tensor) -> Potential:
        return self.space.model.at(self.space.values(u)).potential

    def _values(self, field: str, places: Tensor, u: Tensor) -> Tensor:
        potential = self._potential(u)
        if places.dim() == 2:
            R, z = places.unbind(-1)
            return meridional_fields(potential, R, z, [field])[field].detach()
        if field in AXIAL_FIELDS and self.flattened:
            return axial_fields(potential, places, [field])[field].detach()
        return torch.as_tensor(truth_field(potential, field, places.numpy()))

    def _log_slopes(self, field: str, radii: ArrayLike) -> Tensor:
        """Return d ln|field| / du ``(n, K)``."""
        places = self._checked(radii)
        value = self._values(field, places, self.u)
        return differences(lambda u: self._values(field, places, u), self.u) / value.abs()[:, None]

    def _checked(self, places: ArrayLike) -> Tensor:
        x = np.asarray(places, dtype=float)
        if x.ndim != 2:
            return torch.as_tensor(positive_radii(x))
        if x.shape[1] != 2 or not self.flattened:
            raise ValueError(f"places must be radii (n,), or in a flattened galaxy (R, z) (n, 2); got {x.shape}")
        bad = ~(np.isfinite(x).all(1) & (x[:, 0] > 0))
        if bad.any():
            raise ValueError(f"places (R, z) must be finite (kpc) with R > 0, got {x[bad][:3].tolist()}")
        return torch.as_tensor(x)

    def _relative_sd(self, slopes: Tensor, n_stars: float, prior: bool, information: Tensor) -> NDArray[np.float64]:
        return self._covariance_times(slopes, n_stars, prior, information)[0].sqrt().numpy()

    def _covariance_times(self, g: Tensor, n_stars: float, prior: bool, information: Tensor) -> tuple[Tensor, Tensor]:
        """Return the variances of the rows of ``g`` ``(n, K)`` and the matrix g C g^T."""
        total = n_stars * information + (self.prior if prior else 0.0)
        # a latent of which the stars know nothing counts in units of its prior
        known = torch.where(total.diagonal() > 0, total.diagonal(), self.prior.diagonal())
        scale = torch.where(known > 0, known, 1.0).rsqrt()
        values, vectors = torch.linalg.eigh(scale[:, None] * total * scale)
        part = (g * scale) @ vectors
        # a direction that nothing constrains has infinite variance, unless the field does not move along it
        free = values < _LEAST
        inverse = torch.where(free, 0.0, 1 / torch.where(free, 1.0, values))
        moved = (part[:, free].abs() > 1e-6 * torch.linalg.vector_norm(part, dim=-1, keepdim=True)).any(-1)
        matrix = (part * inverse) @ part.T
        matrix[moved] = torch.inf
        matrix[:, moved] = torch.inf
        return matrix.diagonal(), matrix


@keeps_callers_state
def forecast(model: SnapshotModel, catalog: Catalog, tick: Callable[[float], None] | None = None) -> Forecast:
    r"""Forecast how well stars such as those of a mock constrain the potential of a model.

    At fixed (x, v) a change :math:`\delta\Phi` of a spherical potential moves :math:`J_r` by
    :math:`(\delta\Phi(r) - \langle\delta\Phi\rangle_{orbit})/\Omega_r` and leaves L alone, so the information per star
    on parameters :math:`\alpha_k` is

    .. math::
        F_{kl} = E\left[\left(\frac{\partial\ln f}{\partial E}\right)_L^2
                 \mathrm{Cov}_\theta\left(\partial_k\Phi, \partial_l\Phi\right)\right],

    with the covariance over the angle along each star's orbit. It averages to zero given the actions, so every function
    of J is orthogonal to it: 1/(N F) is the Cramer-Rao bound with f(J) unknown. The mock's exact f and the quadrature
    along orbits leave no noise but that of which orbits were drawn.

    In a flattened galaxy the mock's f(J) is known as well, but the actions are those of the Staeckel fudge, so that
    information is what a change of the potential does to the scores
    :math:`\partial\ln f/\partial J \cdot \partial J/\partial\alpha_k`, star by star, where the stars decide, and
    the scores' outer product where the prior does (`bayespot.posterior.information`).

    The model's latents are those closest to the true potential, by least squares in ln M(<r) over the stars' radii, or
    in the acceleration at the stars of a flattened galaxy, without the stars' noise; `Forecast.misfit` says how close
    that is.

    Parameters
    ----------
    model
        A model with a spherical or axisymmetric potential and priors; its f(J) is not used.
    catalog
        A mock, whose metadata hold the truth: of `bayespot.mock.mock` for a sphere, and of `bayespot.mock.galaxy_mock`
        or `bayespot.mock.orbit_mock` for a flattened galaxy; 20 000 stars of a sphere give 1 to 4 %, see
        `Forecast.monte_carlo_error`.
    tick
        Called with the fraction done.

    Raises
    ------
    ValueError
        If the catalogue has no truth, or has errors; if the model has errors, a selection or streams, a triaxial
        potential or one without latent parameters; if the mock's density of orbits is not known in such a potential.

    Examples
    --------
    >>> from bayespot.mock.sample import mock
    >>> from bayespot.models import isochrone
    >>> stars = mock("isochrone", n_stars=2000, seed=0)
    >>> f = forecast(isochrone.build(stars), stars)
    >>> round(float(f.relative_sd("potential", 7.2, n_stars=100)[0]) * 10, 1)  # 0.61 with more stars
    0.6
    """
    truth = truth_potential(catalog)
    _check(model, catalog)
    if truth is None:
        raise ValueError(
            "the catalogue is no mock in an analytic potential: a forecast needs stars whose distribution function is "
            "known"
        )
    only = copy.copy(model).plain()
    # an unresolved mixture has no sites: the latents are those of the potential
    only._modules = dict(only._modules) | {"df": SphericalMixture()}
    space = LatentSpace(only)
    if not space.size:
        raise ValueError("the model's potential has no latent parameters; give some of them priors")
    if model.potential.symmetry == "axisymmetric":
        orbits = catalog.meta["truth"].get("orbits")
        if orbits is None or not responds(space):
            raise ValueError(
                "a forecast in an axisymmetric potential is for stars drawn by their orbits (galaxy_mock, orbit_mock; "
                "`bayespot simulate disc`), and for a model whose finder is the StaeckelFudge"
            )
        u, misfit = closest_flattened(space, truth, catalog.x)
        # as in a fit, focal distances stay where the potential is moved
        only.finder = only.finder.settled(only.at(space.values(u)).potential, catalog.w)
        population = orbits_from_description(orbits)
        groups = of_flattened(population, space, u, catalog.w, _N_GROUPS, tick)
        r = torch.linalg.vector_norm(catalog.x[:, :2], dim=-1).sort().values
    else:
        r = radius(catalog.x).sort().values
        u, misfit = closest_sphere(space, truth, r[torch.linspace(0, len(r) - 1, 202).long()[1:-1]])
        known = equilibrium(catalog)
        groups = torch.stack([of_sphere(known, space, u, part) for part in catalog.w.tensor_split(_N_GROUPS)])
    step = max(1, len(r) // 5000)
    return Forecast(space, u, groups, space.prior_curvature(u), misfit, r[::step].numpy())


def _check(model: SnapshotModel, catalog: Catalog) -> None:
    extras = {
        "a selection": model.selection,
        "measurement errors": model.errors,
        "streams": len(model.streams) or None,
        "a conditional likelihood": model.conditional or None,
    }
    for what, found in extras.items():
        if found is not None:
            raise ValueError(
                f"the model has {what}: forecasts are for complete, exact stars of the system; build it without"
            )
    if catalog.covariance is not None:
        raise ValueError("the catalogue has measurement errors; simulate stars without them")
    if len(catalog) < 10 * _N_GROUPS:
        raise ValueError(f"a forecast needs at least {10 * _N_GROUPS} simulated stars, got {len(catalog)}")
    if model.potential.symmetry == "triaxial":
        raise ValueError(
            f"{type(model.potential).__name__} is triaxial: forecasts are for spherical and axisymmetric potentials; "
            "fit simulated stars instead"
        )
