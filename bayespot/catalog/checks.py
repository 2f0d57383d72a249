"""What a catalogue must satisfy."""

from __future__ import annotations

import torch
from torch import Tensor

from bayespot.catalog.refusal import CatalogError

#: Speed of light in km/s.
LIGHT = 299_792.458


def check_speeds(v: Tensor) -> None:
    """Raise CatalogError if a star moves faster than light, which no unit but a wrong one explains."""
    speed = torch.linalg.vector_norm(v, dim=-1)
    if bool((speed >= LIGHT).any()):
        row = int(speed.argmax())
        raise CatalogError(
            f"columns vx, vy, vz: {int((speed >= LIGHT).sum())} of {len(v)} stars are faster than light, the fastest "
            f"in row {row} (counting from 0) with {float(speed[row]):.4g} km/s; the velocities are in another unit "
            "(m/s?) or wrong: convert them to km/s"
        )


def check_spread(x: Tensor, v: Tensor, offset: bool) -> None:
    """Raise CatalogError unless the stars differ from one another and, if ``offset``, surround the origin.

    `bayespot.catalog.Catalog.check_geometry` says how that is measured.
    """
    n = len(x)
    spread = {}
    for what, values in (("at one point", x), ("moving alike", v)):
        distance = torch.linalg.vector_norm(values - values.median(0).values, dim=-1)
        size = torch.linalg.vector_norm(values, dim=-1).max()
        if n > 1 and float(distance.max()) <= 1e-12 * float(size):
            raise CatalogError(
                f"all stars are {what}: {n} rows have the same "
                f"{'x, y, z' if what == 'at one point' else 'vx, vy, vz'}; check which columns were read"
            )
        spread[what] = float(distance.median())
    centre = x.median(0).values
    distance_off, size_all = float(torch.linalg.vector_norm(centre)), spread["at one point"]
    if offset and n >= 10 and distance_off > (0.5 + 4 / n**0.5) * size_all:
        raise CatalogError(
            f"columns x, y, z: the median position of {n} stars, ({', '.join(f'{c:.3g}' for c in centre)}) kpc, is "
            f"{distance_off:.3g} kpc from the origin, with a spread of {size_all:.3g} kpc: the coordinates do not "
            "look Galactocentric (or centred on the system). Subtract the centre, or if the stars are one side of "
            "the system on purpose declare the model's selection, and read with check_offset=False in Python"
        )


def require_positive(what: str, covariance: Tensor) -> None:
    """Raise unless every matrix is symmetric and has no negative eigenvalue, in units of its own variances."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    scale = variance.clamp(min=0).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)
    correlation = covariance / (safe[:, :, None] * safe[:, None, :])
    odd = (correlation - correlation.transpose(1, 2)).abs().amax((1, 2)) > 1e-6
    # a coordinate without variance has no covariance either
    loose = ((scale == 0)[:, :, None] & (covariance.abs() > 0)).any(-1).any(-1)
    lowest = torch.linalg.eigvalsh((correlation + correlation.transpose(1, 2)) / 2)[:, 0]
    bad = odd | loose | (variance < 0).any(-1) | (lowest < -1e-6)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise CatalogError(
            f"{what}: {int(bad.sum())} of {len(bad)} matrices are not positive definite, the first in row {row} "
            f"(counting from 0; lowest eigenvalue of its correlation matrix {float(lowest[row]):.3g}); correct its "
            "variances and correlations or drop the star"
        )


def require_finite(what: str, values: Tensor) -> None:
    bad = ~torch.isfinite(values).all(-1)
    if bool(bad.any()):
        raise CatalogError(
            f"{what}: {int(bad.sum())} of {len(bad)} stars have NaN or infinite entries, the first in row "
            f"{int(bad.int().argmax())} (counting from 0); drop them"
        )
