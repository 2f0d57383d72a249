"""Statistics of stars about the z axis, for predictive checks of axisymmetric models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.units import takes

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The statistics by name, and what they are about in words.
CYLINDRICAL_STATISTICS = {
    "counts": "the profile in R",
    "heights": "the vertical profile",
    "mean_v_phi": "the rotation",
    "sigma_R": "the dispersion of v_R",
    "sigma_phi": "the dispersion of v_phi",
    "sigma_z": "the dispersion of v_z",
}


@takes(w="phase_space", R_edges="length", z_edges="length")
def cylindrical_profiles(w: NDArray[Any], R_edges: NDArray[Any], z_edges: NDArray[Any]) -> dict[str, NDArray[Any]]:
    r"""Return statistics of stars in bins of the cylindrical radius, and their numbers in bins of \|z\|.

    ``counts`` and, in km/s, ``mean_v_phi``, ``sigma_R``, ``sigma_phi`` (about the mean) and ``sigma_z`` in bins of R;
    ``heights``, numbers of stars in bins of \|z\|. NaN where a bin has fewer than two stars.

    Parameters
    ----------
    w : (n, 6)
        Stars in kpc and km/s.
    R_edges, z_edges
        Edges of the bins in kpc; stars beyond the last belong to the last.
    """
    x, y, z, v_x, v_y, v_z = w.T
    R = np.hypot(x, y)
    safe = np.where(R > 0, R, 1.0)
    v_R, v_phi = (x * v_x + y * v_y) / safe, (x * v_y - y * v_x) / safe
    index, n_bins = _bins(R, R_edges), len(R_edges) - 1
    counts = np.bincount(index, minlength=n_bins).astype(float)
    n = np.where(counts > 1, counts, np.nan)

    def mean(values: NDArray[Any]) -> NDArray[Any]:
        return np.bincount(index, values, n_bins) / n

    rotation = mean(v_phi)
    return {
        "counts": counts,
        "heights": np.bincount(_bins(np.abs(z), z_edges), minlength=len(z_edges) - 1).astype(float),
        "mean_v_phi": rotation,
        "sigma_R": np.sqrt(mean(v_R**2)),
        # about the bin's mean: a difference of squares would lose a cold disc's digits
        "sigma_phi": np.sqrt(mean((v_phi - rotation[index]) ** 2)),
        "sigma_z": np.sqrt(mean(v_z**2)),
    }


def _bins(values: NDArray[Any], edges: NDArray[Any]) -> NDArray[Any]:
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
