r"""Measurement errors: the likelihood of a star is its density averaged over where it may truly be.

With observables o (what the errors are Gaussian in), :math:`p(o_i) = \int N(o_i | o, C_i)\, f(w(o))\,
|\partial w/\partial o|\, do`, estimated with samples o_is drawn once from N(o_i, C_i):
:math:`\ln p(o_i) = \ln \mathrm{mean}_s\, f(w(o_{is}))\, |\partial w / \partial o|_{is}`.

Errors of distances are Gaussian in ln d, with the relative error for standard deviation, as those of photometric
distances are; errors of parallaxes, proper motions and velocities are Gaussian in these. An error must not depend on
the noise itself: a fixed relative error of a distance does so in d, and does not in ln d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayespot.catalog import Catalog, Observed
from bayespot.df.distributions import uniform_points
from bayespot.frame import galactocentric_w, heliocentric


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
        if self.method not in ("marginal", "latent"):
            raise ValueError(f"method must be 'marginal' or 'latent', got {self.method!r}")
        if self.n_samples < 2:
            raise ValueError(f"n_samples must be at least 2, got {self.n_samples}")
        if not self.v_r_range[0] < self.v_r_range[1]:
            raise ValueError(f"v_r_range must increase, got {self.v_r_range} km/s")
        if not 0 < self.distance_range[0] < self.distance_range[1]:
            raise ValueError(f"distance_range must be positive and increase, got {self.distance_range} kpc")

    def samples(self, catalog: Catalog, seed: int) -> Tensor:
        """Return where each star may truly be: ``(n, n_samples, 7)``, w and the logarithm of its weight.

        The average over samples of weight times density is the star's likelihood, up to a factor that depends
        on no parameter. Drawn with scrambled Sobol points, shifted at random from star to star.

        Raises
        ------
        ValueError
            If the catalogue has no errors.
        """
        u = uniform_points(self.n_samples, 6, seed)
        generator = torch.Generator().manual_seed(seed)
        shift = torch.rand(len(catalog), 1, 6, generator=generator, dtype=torch.float64)
        u = torch.remainder(u + shift, 1).clamp(1e-12, 1 - 1e-12)
        return self.place(catalog, math.sqrt(2) * torch.erfinv(2 * u - 1))

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
            log_weight = torch.where(positive, -6 * columns[2].log(), -torch.inf)
        else:
            log_weight = 5 * columns[2]
            columns[2] = columns[2].exp()
        w = galactocentric_w(dict(zip(observed.names, columns, strict=True)))
        return torch.cat([w, log_weight[..., None]], -1)


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
        true = {name: torch.as_tensor(value) for name, value in heliocentric(w.numpy()).items()}
        ln_d = true["distance"].log()
        third = 1 / true["distance"] if "parallax" in self._names else ln_d
        values = torch.stack([third if i == 2 else true[n] for i, n in enumerate(self._names)], -1)
        seen = values + _from_arc(noise(ln_d)[:, None], values)[:, 0]
        # a parallax scattered to below zero would not be in a catalogue
        positive = torch.where(seen[:, 2] > 0, seen[:, 2], third)
        far = positive if "parallax" in self._names else seen[:, 2].exp()
        columns = [far if i == 2 else seen[:, i] for i in range(6)]
        return galactocentric_w(dict(zip(self._names, columns, strict=True)))


def _gaussian(observed: Observed) -> tuple[Tensor, Tensor]:
    """Return the observables that errors are Gaussian in ``(n, 6)``, ln d for d, and roots of their covariance."""
    if "parallax" in observed.names:
        return observed.values, roots(observed.covariance)
    d = observed.values[:, 2]
    scale = torch.ones_like(observed.values)
    scale[:, 2] = 1 / d.nan_to_num(1.0)
    values = observed.values.clone()
    values[:, 2] = d.log()
    return values, roots(observed.covariance * scale[:, :, None] * scale[:, None, :])


def roots(covariance: Tensor) -> Tensor:
    """Return R with R R^T the covariance ``(n, 6, 6)``, also where variances vanish."""
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(covariance / (safe[:, :, None] * safe[:, None, :]))
    return scale[:, :, None] * vectors * values.clamp(min=0).sqrt()[:, None, :]


def _from_arc(noise: Tensor, values: Tensor) -> Tensor:
    """Turn noise ``(n, S, 6)`` in ra cos(dec) into noise in ra."""
    cos_dec = torch.deg2rad(values[:, 1]).cos()[:, None]
    return torch.cat([(noise[..., 0] / cos_dec)[..., None], noise[..., 1:]], -1)
