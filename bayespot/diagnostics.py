"""Every call of ArviZ: InferenceData, its file, and Pareto-smoothed importance sampling."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import arviz


def load_arviz() -> Any:
    """Return the arviz module, without the notice that 0.23 prints at import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.23 announces the 1.0 refactoring at import
        import arviz
    return arviz


def to_inference_data(
    draws: Mapping[str, Tensor],
    sample_stats: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
    n_chains: int = 1,
) -> arviz.InferenceData:
    """Return posterior draws (leading axis: draws, chain after chain) with per-draw statistics."""

    def chains(values: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {name: np.asarray(value) for name, value in values.items()}
        return {name: x.reshape(n_chains, -1, *x.shape[1:]) for name, x in arrays.items()}

    posterior, stats = chains(draws), chains(sample_stats or {})
    data = load_arviz().from_dict(posterior=posterior, sample_stats=stats or None)
    data.attrs.update(attrs or {})
    return data


def with_fields(data: arviz.InferenceData, radii: np.ndarray, fields: Mapping[str, Any]) -> arviz.InferenceData:
    """Add fields of radius (objects with ``draws`` (n_draws, n) and ``unit``) to the group ``posterior``."""
    more = load_arviz().from_dict(
        posterior={name: field.draws[None] for name, field in fields.items()},
        coords={"r": radii},
        dims={name: ["r"] for name in fields},
    )
    for name, field in fields.items():
        more["posterior"][name].attrs["unit"] = field.unit
    more["posterior"]["r"].attrs["unit"] = "kpc"
    merged = data["posterior"].merge(more["posterior"])
    delattr(data, "posterior")
    data.add_groups({"posterior": merged})
    return data


def no_inference_data() -> arviz.InferenceData:
    """Return InferenceData without groups."""
    return load_arviz().InferenceData()


def with_predictive(
    data: arviz.InferenceData, observed: Mapping[str, Any], replicated: Mapping[str, Any], attrs: Mapping[str, Any]
) -> arviz.InferenceData:
    """Add groups ``observed_data`` and ``posterior_predictive`` of discrepancy statistics, leading axis draws.

    Statistics that depend on the draw's potential (angles) are in ``observed_data`` with their own axis of draws.
    """
    more = load_arviz().from_dict(
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
        data = load_arviz().from_netcdf(str(path), engine="h5netcdf")
        data.load()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable NetCDF posterior ({error}); fit again") from error
    return data


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    """Return Pareto-smoothed log importance weights, same sum of weights, and the shape k (`psis_k_hat`).

    Where k cannot be had (few draws, infinite weights) the weights are returned as they are.
    """
    weights = np.asarray(log_weights.detach(), dtype=float)
    if len(weights) < 25:
        return log_weights, math.nan
    if not np.isfinite(weights).all():
        return log_weights, math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smoothed, k = load_arviz().psislw(weights.copy())
    # ArviZ returns weights that add up to one
    return torch.as_tensor(np.asarray(smoothed)) + log_weights.detach().logsumexp(0), float(k)


def weight_fraction(log_weights: Tensor) -> float:
    r"""Return the effective fraction of weighted draws, :math:`(\sum w)^2 / (n \sum w^2)`.

    1 / fraction - 1 estimates the chi-square divergence of the weights' target: its square root bounds by how many sd
    of the draws weighting moves a mean, and half of it the change of any probability.
    """
    log_square = 2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)
    return float(log_square.exp()) / len(log_weights)


def psis_k_hat(log_weights: Tensor) -> float:
    """Return the Pareto shape k of importance weights (Vehtari et al. 2024, JMLR 25, 72).

    Below 0.7 the guide is close enough to the posterior for reliable re-weighting; NaN with fewer than 25
    draws, infinite where a weight is not finite.
    """
    return psis(log_weights)[1]


def chain_statistics(chains: Tensor) -> tuple[float, float]:
    """Return the largest r-hat and the least bulk ESS over quantities ``(n_chains, n_draws, n_quantities)``.

    Rank-normalised and split (Vehtari et al. 2021, Bayesian Analysis 16, 667).
    """
    arviz = load_arviz()
    arrays = [np.asarray(chains[..., k].detach()) for k in range(chains.shape[-1])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return max(float(arviz.rhat(x)) for x in arrays), min(float(arviz.ess(x)) for x in arrays)


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
    arviz = load_arviz()
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


def posterior_arrays(data: arviz.InferenceData, group: str = "posterior") -> dict[str, np.ndarray]:
    """Return a group's arrays by name (the posterior's: by site), chains joined, leading axis draws."""
    if group not in data.groups():
        return {}
    return {
        str(name): np.asarray(value).reshape(-1, *value.shape[2:]).copy()
        for name, value in data[group].data_vars.items()
    }
