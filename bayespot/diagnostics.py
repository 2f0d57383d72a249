"""Every call of ArviZ: InferenceData, its file, and Pareto-smoothed importance sampling.

ArviZ 0.20 to 1.x: from 1.0 on InferenceData is xarray's DataTree, and defaults of intervals changed (89 % equal-tailed
for 94 % highest-density), so nothing here or elsewhere relies on a default interval. No torch: a run's posterior can be
read where there is none.
"""

from __future__ import annotations

import errno
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import arviz
    import xarray

    InferenceData: TypeAlias = "arviz.InferenceData | xarray.DataTree"


def load_arviz() -> Any:
    """Return the arviz module, without the notice that 0.23 prints at import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.23 announces the 1.0 refactoring at import
        import arviz
    return arviz


def _is_tree(az: Any) -> bool:
    """Whether this ArviZ keeps its groups in an xarray DataTree (1.0 and later)."""
    return int(az.__version__.split(".")[0]) >= 1


def _from_dict(groups: Mapping[str, Mapping[str, Any]], **coords_and_dims: Any) -> Any:
    az = load_arviz()
    groups = {name: values for name, values in groups.items() if values}
    return az.from_dict(groups, **coords_and_dims) if _is_tree(az) else az.from_dict(**groups, **coords_and_dims)


def _set_group(data: Any, name: str, dataset: Any) -> None:
    if hasattr(data, "add_groups"):
        if name in data:
            delattr(data, name)
        data.add_groups({name: dataset})
    else:
        data[name] = type(data)(dataset)


def _dataset(data: Any, name: str) -> Any:
    group = data[name]
    return group.to_dataset() if hasattr(group, "to_dataset") else group


def to_inference_data(
    draws: Mapping[str, Any],
    sample_stats: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
    n_chains: int = 1,
) -> InferenceData:
    """Return posterior draws (leading axis: draws, chain after chain) with per-draw statistics."""

    def chains(values: Mapping[str, Any]) -> dict[str, Any]:
        # copies: torch moves a tensor that is sent to another process, and leaves views of it on freed memory
        arrays = {name: np.asarray(value).copy() for name, value in values.items()}
        return {name: x.reshape(n_chains, -1, *x.shape[1:]) for name, x in arrays.items()}

    data = _from_dict({"posterior": chains(draws), "sample_stats": chains(sample_stats or {})})
    data.attrs.update(attrs or {})
    return data


def with_fields(data: Any, coords: Mapping[str, NDArray[Any]], fields: Mapping[str, Any]) -> InferenceData:
    """Add fields (objects with ``draws`` and ``unit``) to the group ``posterior``.

    ``coords`` are the places in kpc along each axis: draws are ``(n_draws, n)`` of one, of two ``(n_draws, m n)``.
    """
    shape = [len(values) for values in coords.values()]
    more = _dataset(
        _from_dict(
            {"posterior": {name: field.draws.reshape(1, -1, *shape) for name, field in fields.items()}},
            coords=dict(coords),
            dims={name: list(coords) for name in fields},
        ),
        "posterior",
    )
    for name, field in fields.items():
        more[name].attrs["unit"] = field.unit
    for name in coords:
        more[name].attrs["unit"] = "kpc"
    _set_group(data, "posterior", _dataset(data, "posterior").merge(more))
    return data


def no_inference_data() -> InferenceData:
    """Return InferenceData without groups."""
    az = load_arviz()
    if _is_tree(az):
        import xarray

        return xarray.DataTree()
    return az.InferenceData()


def with_predictive(
    data: Any, observed: Mapping[str, Any], replicated: Mapping[str, Any], attrs: Mapping[str, Any]
) -> InferenceData:
    """Add groups ``observed_data`` and ``posterior_predictive`` of discrepancy statistics, leading axis draws.

    Statistics that depend on the draw's potential (angles) are in ``observed_data`` with their own axis of draws.
    """
    more = _from_dict(
        {
            "posterior_predictive": {name: np.asarray(value)[None] for name, value in replicated.items()},
            "observed_data": {name: np.asarray(value) for name, value in observed.items()},
        }
    )
    for group in ("posterior_predictive", "observed_data"):
        _set_group(data, group, _dataset(more, group))
    data["posterior_predictive"].attrs.update(attrs)
    return data


def save_netcdf(data: Any, path: str | os.PathLike[str]) -> None:
    """Write InferenceData to a NetCDF file; a full disk is an OSError."""
    _require_room(path, 65_536 + sum(_dataset(data, name).nbytes for name in _groups(data)))
    try:
        data.to_netcdf(str(path), engine="h5netcdf")
    except RuntimeError as error:
        # HDF5's own text has the number of the system's error, where there was one
        code = re.search(r"errno = (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _groups(data: Any) -> list[str]:
    return list(data.children) if hasattr(data, "children") else list(data.groups())


def _require_room(path: str | os.PathLike[str], size: int) -> None:
    """Raise OSError unless the disk takes so many bytes: HDF5 may crash where it runs out of room."""
    try:
        with open(path, "wb") as file:
            for _ in range(0, size, 1 << 20):
                file.write(bytes(min(size, 1 << 20)))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        Path(path).unlink(missing_ok=True)


def load_netcdf(path: str | os.PathLike[str]) -> InferenceData:
    """Read InferenceData; ValueError names the file when it cannot be read."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file; a complete run has it, so fit again")
    try:
        data = load_arviz().from_netcdf(str(path), engine="h5netcdf")
        data.load()
        data.close()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable NetCDF posterior ({error}); fit again") from error
    return data


def stored_arrays(path: str | os.PathLike[str], group: str = "posterior") -> dict[str, NDArray[Any]]:
    """Return `posterior_arrays` of a file, without ArviZ and xarray, whose import takes seconds.

    Raises
    ------
    ValueError
        Names the file when it cannot be read.
    """
    import h5py

    if not Path(path).exists():
        raise ValueError(f"{path}: no such file; a complete run has it, so fit again")
    try:
        with h5py.File(path, "r") as file:
            stored = file.get(group)
            if not isinstance(stored, h5py.Group):
                return {}
            # a NetCDF coordinate is a dimension scale in HDF5
            variables = {
                name: one for name, one in stored.items() if isinstance(one, h5py.Dataset) and not one.is_scale
            }
            return {name: one[()].reshape(-1, *one.shape[2:]) for name, one in variables.items()}
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: not a readable NetCDF posterior ({error}); fit again") from error


def psis(log_weights: ArrayLike) -> tuple[NDArray[Any], float]:
    """Return Pareto-smoothed log importance weights, same sum of weights, and the shape k (`psis_k_hat`).

    Where k cannot be had (few draws, infinite weights) the weights are returned as they are.
    """
    weights = np.asarray(log_weights, dtype=float)
    if len(weights) < 25:
        return weights, math.nan
    if not np.isfinite(weights).all():
        return weights, math.inf
    az = load_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _is_tree(az):
            from arviz_stats.base import array_stats

            # arviz-stats 1.x takes ln p of what is left out, the negative of ln w (findings/arviz_stats_psislw_sign.sh)
            smoothed, k = array_stats.psislw(-weights)
        else:
            smoothed, k = az.psislw(weights.copy())
    # ArviZ returns weights that add up to one
    return np.asarray(smoothed) + np.logaddexp.reduce(weights), float(k)


def weight_fraction(log_weights: ArrayLike) -> float:
    r"""Return the effective fraction of weighted draws, :math:`(\sum w)^2 / (n \sum w^2)`.

    1 / fraction - 1 estimates the chi-square divergence of the weights' target: its square root bounds by how many sd
    of the draws weighting moves a mean, and half of it the change of any probability.
    """
    weights = np.asarray(log_weights, dtype=float)
    return float(np.exp(2 * np.logaddexp.reduce(weights) - np.logaddexp.reduce(2 * weights))) / len(weights)


def psis_k_hat(log_weights: ArrayLike) -> float:
    """Return the Pareto shape k of importance weights (Vehtari et al. 2024, JMLR 25, 72).

    Below 0.7 the guide is close enough to the posterior for reliable re-weighting; NaN with fewer than 25
    draws, infinite where a weight is not finite.
    """
    return psis(log_weights)[1]


def chain_statistics(chains: ArrayLike) -> tuple[float, float]:
    """Return the largest r-hat and the least bulk ESS over quantities ``(n_chains, n_draws, n_quantities)``.

    Rank-normalised and split (Vehtari et al. 2021, Bayesian Analysis 16, 667).
    """
    az = load_arviz()
    arrays = list(np.moveaxis(np.asarray(chains, dtype=float), -1, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r_hat = max(float(az.rhat(x, method="rank")) for x in arrays)
        return r_hat, min(float(az.ess(x, method="bulk")) for x in arrays)


def compare_loo(pointwise: Mapping[Any, NDArray[Any]]) -> dict[Any, dict[str, float]]:
    """Compare models by PSIS leave-one-out cross-validation (Vehtari, Gelman & Gabry 2017).

    Parameters
    ----------
    pointwise
        ln p of every star in every draw ``(n_draws, n_stars)`` by model; two models at least.

    Returns
    -------
    dict
        By model ``elpd``, how far it is below the best (``elpd_diff``, not negative) with standard error ``dse``, the
        stacking ``weight``, and the fraction of stars whose Pareto shape is above 0.7 (``bad_k``).
    """
    az = load_arviz()
    names = {str(i): name for i, name in enumerate(pointwise)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loos = {}
        for label, name in names.items():
            values = np.asarray(pointwise[name])[None]
            data = _from_dict(
                {"posterior": {"draw_index": np.zeros(values.shape[:2])}, "log_likelihood": {"w": values}}
            )
            loos[label] = az.loo(data, pointwise=True, reff=1.0)
        elpd = {label: float(one.elpd if _is_tree(az) else one.elpd_loo) for label, one in loos.items()}
        dse, weight = dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0)
        if len(loos) > 1:
            # 1.x rounds unless told not to, and gives elpd_diff the other sign
            table = az.compare(loos, method="stacking", **({"round_to": "none"} if _is_tree(az) else {"ic": "loo"}))
            dse, weight = ({label: float(table.loc[label, key]) for label in names} for key in ("dse", "weight"))
    best = max(elpd.values())
    return {
        name: {
            "elpd": elpd[label],
            "elpd_diff": best - elpd[label],
            "dse": dse[label],
            "weight": weight[label],
            "bad_k": float((np.asarray(loos[label].pareto_k) > 0.7).mean()),
        }
        for label, name in names.items()
    }


def posterior_arrays(data: Any, group: str = "posterior") -> dict[str, NDArray[Any]]:
    """Return a group's arrays by name (the posterior's: by site), chains joined, leading axis draws."""
    if group not in data:
        return {}
    return {
        str(name): np.asarray(value).reshape(-1, *value.shape[2:]).copy()
        for name, value in data[group].data_vars.items()
    }
