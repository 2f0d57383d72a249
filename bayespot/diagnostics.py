"""Every call of ArviZ: InferenceData, its file, and Pareto-smoothed importance sampling."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import arviz


def _arviz() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.23 announces the 1.0 refactoring at import
        import arviz
    return arviz


def to_inference_data(
    draws: Mapping[str, Tensor], sample_stats: Mapping[str, Any] | None = None, attrs: Mapping[str, Any] | None = None
) -> arviz.InferenceData:
    """Return posterior draws (leading axis: draws) as one ArviZ chain, with per-draw statistics."""
    posterior = {name: np.asarray(value)[None] for name, value in draws.items()}
    stats = {name: np.asarray(value)[None] for name, value in (sample_stats or {}).items()}
    data = _arviz().from_dict(posterior=posterior, sample_stats=stats or None)
    data.attrs.update(attrs or {})
    return data


def with_predictive(
    data: arviz.InferenceData, observed: Mapping[str, Any], replicated: Mapping[str, Any], attrs: Mapping[str, Any]
) -> arviz.InferenceData:
    """Add groups ``observed_data`` and ``posterior_predictive`` of discrepancy statistics, leading axis draws.

    Statistics that depend on the draw's potential (angles) are in ``observed_data`` with their own axis of draws.
    """
    more = _arviz().from_dict(
        posterior_predictive={name: np.asarray(value)[None] for name, value in replicated.items()},
        observed_data={name: np.asarray(value) for name, value in observed.items()},
    )
    for group in ("posterior_predictive", "observed_data"):
        if group in data.groups():
            delattr(data, group)
    data.extend(more)
    data["posterior_predictive"].attrs.update(attrs)
    return data


def save_netcdf(data: arviz.InferenceData, path: str | os.PathLike[str]) -> None:
    """Write InferenceData to a NetCDF file."""
    data.to_netcdf(str(path), engine="h5netcdf")


def load_netcdf(path: str | os.PathLike[str]) -> arviz.InferenceData:
    """Read InferenceData; ValueError names the file when it cannot be read."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file; a complete run has it, so fit again")
    try:
        data = _arviz().from_netcdf(str(path), engine="h5netcdf")
        data.load()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable NetCDF posterior ({error}); fit again") from error
    return data


def psis_k_hat(log_weights: Tensor) -> float:
    """Return the Pareto shape k of importance weights (Vehtari et al. 2024, JMLR 25, 72).

    Below 0.7 the guide is close enough to the posterior for reliable re-weighting; NaN with fewer than 25
    draws, infinite where a weight is not finite.
    """
    weights = np.asarray(log_weights.detach(), dtype=float)
    if len(weights) < 25:
        return math.nan
    if not np.isfinite(weights).all():
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, k = _arviz().psislw(weights.copy())
    return float(k)


def compare_loo(pointwise: Mapping[Any, np.ndarray]) -> dict[Any, dict[str, float]]:
    """Compare models by PSIS leave-one-out cross-validation (Vehtari, Gelman & Gabry 2017).

    Parameters
    ----------
    pointwise
        ln p of every star in every draw ``(n_draws, n_stars)`` by model; two models at least.

    Returns
    -------
    dict
        By model ``elpd``, its difference from the best (``elpd_diff``) with standard error ``dse``, the stacking
        ``weight``, and the fraction of stars whose Pareto shape is above 0.7 (``bad_k``).
    """
    arviz = _arviz()
    names = {str(i): name for i, name in enumerate(pointwise)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loos = {}
        for label, name in names.items():
            values = np.asarray(pointwise[name])[None]
            data = arviz.from_dict(posterior={"draw_index": np.zeros(values.shape[:2])}, log_likelihood={"w": values})
            loos[label] = arviz.loo(data, pointwise=True, reff=1.0)
        if len(loos) == 1:
            rows = {label: [float(one.elpd_loo), 0.0, 0.0, 1.0] for label, one in loos.items()}
        else:
            table = arviz.compare(loos, ic="loo", method="stacking")
            keys = ("elpd_loo", "elpd_diff", "dse", "weight")
            rows = {label: [float(table.loc[label, key]) for key in keys] for label in names}
    return {
        name: dict(zip(("elpd", "elpd_diff", "dse", "weight"), rows[label], strict=True))
        | {"bad_k": float((np.asarray(loos[label].pareto_k) > 0.7).mean())}
        for label, name in names.items()
    }


def posterior_arrays(data: arviz.InferenceData) -> dict[str, np.ndarray]:
    """Return the posterior draws by site name, chains joined, leading axis draws."""
    return {
        str(name): np.asarray(value).reshape(-1, *value.shape[2:]).copy()
        for name, value in data["posterior"].data_vars.items()
    }
