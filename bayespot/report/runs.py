"""Run folders: everything about one fit, written atomically and read back with checks."""

from __future__ import annotations

import json
import os
import platform
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from bayespot import diagnostics
from bayespot.callers_state import keeps_callers_state
from bayespot.files import WriteError, file_digest, set_aside, write_folder
from bayespot.inference.result import Diagnostics, EnsembleResult, FitResult
from bayespot.likelihood.model import SnapshotModel
from bayespot.posterior.posterior import EnsemblePosterior, Posterior, PotentialDraws, member_spread
from bayespot.posterior.predictive import Predictive
from bayespot.report import plots
from bayespot.report.figures import default_radii, draw_figures
from bayespot.report.manifest import (
    RunError,
    read_config,
    read_json,
    remove_own,
    replace_files,
    require_replaceable,
    seal,
    verify,
)
from bayespot.report.model_file import read_model, source_of
from bayespot.report.output import drop_partial, mark_finished, partial_folder
from bayespot.storage import StorageError, Written, describe

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog

#: Most stars whose positions a run keeps, for maps of their density.
MAX_STARS = 10_000


@keeps_callers_state
def save_run(
    folder: Path,
    result: FitResult | EnsembleResult,
    catalog: Catalog,
    *,
    model_name: str = "",
    model_file: Path | None = None,
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """Write a finished fit, or an ensemble, to ``folder``: complete or not at all.

    The folder holds ``config.json`` with the checksums of all other files, ``posterior.nc`` (ArviZ InferenceData),
    ``model.safetensors`` (classes, priors and numbers of the model; no code), ``stars.npz`` (positions of up to
    `MAX_STARS` stars, the coordinates of all if there are no more, and the probability of every star to be an
    outlier), ``diagnostics.json``, ``summary.ecsv``,
    ``fields.ecsv`` and ``figures/``. An ensemble's holds such a folder per member, ``member-0`` and so on, and
    ``config.json``, ``diagnostics.json``, tables and figures of the mixture. A model with classes or functions of the
    user's own keeps their file as ``model.py``; reading it asks for trust (`load_run`).

    Raises
    ------
    RunError
        If the folder exists and ``overwrite`` is False, or it is not a run or holds other files; if the model has a
        part that cannot be stored: a lambda, or a class of the running script (``__main__``).
    WriteError
        If it cannot be written.
    """
    results = result.members if isinstance(result, EnsembleResult) else [result]
    try:
        models = [describe(one.model) for one in results]
    except StorageError as error:
        raise RunError(f"{folder}: the run cannot be saved: {error}") from error
    origin = _Origin(model_name, None if model_file is None else Path(model_file), command, models)
    write = _write_ensemble if isinstance(result, EnsembleResult) else _write
    return _save(Path(folder), lambda place: write(place, result, catalog, origin), overwrite)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Origin:
    """Where a run comes from: its model's name, the user's model file, and the command line."""

    model_name: str
    model_file: Path | None
    command: str
    #: The models of the results, as data.
    models: list[Written]


def _save(folder: Path, write: Callable[[Path], None], overwrite: bool) -> Path:
    """Have a run written beside its place and move it there when it is complete."""
    if folder.exists():
        if not overwrite:
            raise RunError(f"{folder} exists; choose another folder or pass --overwrite")
        require_replaceable(folder)
    partial = partial_folder(folder)
    kept = f"; nothing is lost, {partial} keeps the fit: repeat with --resume" if partial.exists() else ""

    def complete(place: Path) -> None:
        write(place)
        mark_finished(folder, place)

    write_folder(folder, complete, kept, remove_own)
    if partial.exists():
        drop_partial(folder)
    return folder


def _config(result: FitResult, origin: _Origin, written: Written) -> dict[str, Any]:
    source = source_of(written, origin.model_file)
    stored = None
    if source is not None:
        stored = {"name": source[0].name, "module": source[1], "sha256": file_digest(source[0])}
    return {
        "model": origin.model_name,
        "model_file": stored,
        "code": written.code,
        "pickles": sorted(set(written.pickles.values())),
        "command": origin.command,
        "fit": asdict(result.config),
        "catalog": result.catalog,
        "versions": versions(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def _write_tables(folder: Path, posterior: PotentialDraws, elbo: list[float]) -> None:
    posterior.summary().write(folder / "summary.ecsv")
    # beyond a sphere every draw costs tables of its own and the search for surfaces
    n_draws = 400 if posterior.symmetry == "spherical" else 200
    posterior.thinned(n_draws).predict(default_radii(posterior.meta)).write(folder / "fields.ecsv")
    draw_figures(folder / "figures", posterior, elbo)


def _write(folder: Path, result: FitResult, catalog: Catalog, origin: _Origin, k: int = 0) -> None:
    written = origin.models[k]
    _write_json(folder / "diagnostics.json", asdict(result.diagnostics))
    (folder / "model.safetensors").write_bytes(written.to_bytes())
    if (source := source_of(written, origin.model_file)) is not None:
        shutil.copyfile(source[0], folder / "model.py")
    attrs = {"n_stars": len(catalog), "seed": result.config.seed, "model": origin.model_name}
    data = diagnostics.to_inference_data(result.draws, result.sample_stats, attrs, result.n_chains)
    diagnostics.save_netcdf(data, folder / "posterior.nc")
    positions = _star_sample(catalog)
    # few stars are kept whole: what a distillation ranks formulas with
    few = catalog.w.numpy() if len(catalog) <= MAX_STARS else np.empty((0, 6))
    probability = np.empty(0) if result.outliers is None else result.outliers.numpy()
    np.savez_compressed(
        folder / "stars.npz", positions=positions, w=few, outlier_probability=probability.astype(np.float32)
    )
    _write_tables(folder, _posterior(result, positions), result.diagnostics.elbo)
    seal(folder, _config(result, origin, written))


def _write_ensemble(folder: Path, result: EnsembleResult, catalog: Catalog, origin: _Origin) -> None:
    for k, member in enumerate(result.members):
        (folder / f"member-{k}").mkdir()
        _write(folder / f"member-{k}", member, catalog, origin, k)
    first = result.members[0]
    config = _config(first, origin, origin.models[0])
    config["ensemble"] = {"n_members": len(result.members), "weighting": result.weighting}
    positions = _star_sample(catalog)
    posterior = EnsemblePosterior([_posterior(member, positions) for member in result.members], result.weights)
    r = default_radii(first.catalog)
    diagnosis = {
        "weights": result.weights,
        "spread": member_spread(posterior, r[:: len(r) // 10]),
        "elbo": [],
        "members": [asdict(member.diagnostics) for member in result.members],
    }
    _write_json(folder / "diagnostics.json", diagnosis)
    _write_tables(folder, posterior, [])
    seal(folder, config)


def _posterior(result: FitResult, positions: np.ndarray) -> Posterior:
    return Posterior(
        result.model,
        result.draws,
        {**result.catalog, "positions": positions},
        result.sample_stats.get("log_weights"),
    )


def _star_sample(catalog: Catalog) -> np.ndarray:
    """Positions in kpc of a random subset of the stars."""
    order = torch.randperm(len(catalog), generator=torch.Generator().manual_seed(0))[:MAX_STARS]
    return catalog.x[order.sort().values].numpy().astype(np.float32)


def save_predictive(folder: Path, check: Predictive) -> Path:
    """Add a posterior predictive check to a run: groups of ``posterior.nc``, p-values and a figure; return its path.

    A check made earlier is replaced. Everything is written beside the old files first, so a failure leaves the run
    as it was.
    """
    diagnosis = read_json(folder / "diagnostics.json")
    summary = {
        "p_values": check.p_values,
        "warnings": check.warnings,
        "n_draws": len(next(iter(check.observed.values()))),
    }
    observed = {name: value if name == "angles" else value[0] for name, value in check.observed.items()}
    edges = {"r_edges": check.r_edges}
    if check.z_edges is not None:
        edges = {"R_edges": check.r_edges, "z_edges": check.z_edges}
    if check.v_edges is not None:
        edges = {"R_edges": check.r_edges, "v_edges": check.v_edges}
    data = diagnostics.with_predictive(
        _inference_data(folder),
        {**observed, **edges},
        check.replicated,
        {f"p_value_{name}": p for name, p in check.p_values.items()},
    )
    figure_path = folder / "figures" / "predictive.png"
    temporary = folder / f".predictive.{os.getpid()}"
    try:
        figure_path.parent.mkdir(exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        diagnostics.save_netcdf(data, temporary / "posterior.nc")
        (temporary / "diagnostics.json").write_text(json.dumps({**diagnosis, "predictive": summary}, indent=1))
        with plots.style():
            figure = plots.predictive_figure(check)
            for suffix in (".png", ".pdf"):
                plots.save(figure, temporary / figure_path.with_suffix(suffix).name)
        figures = {f"figures/predictive{suffix}": temporary / f"predictive{suffix}" for suffix in (".png", ".pdf")}
        data_files = {name: temporary / name for name in ("posterior.nc", "diagnostics.json")}
        replace_files(folder, data_files | figures)
    except OSError as error:
        raise WriteError.of(folder, error, "; the run is as it was") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return figure_path


def _inference_data(folder: Path) -> Any:
    """The InferenceData of a run; of an ensemble, whose posteriors are its members', that of earlier checks or none."""
    if "ensemble" in read_json(folder / "config.json") and not (folder / "posterior.nc").exists():
        return diagnostics.no_inference_data()
    return diagnostics.load_netcdf(folder / "posterior.nc")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    from importlib.metadata import version

    names = ("bayespot", "torch", "pyro-ppl", "numpy", "arviz", "astropy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


@keeps_callers_state
def load_run(
    folder: str | os.PathLike[str], *, trust_model: bool = False, model_file: str | os.PathLike[str] | None = None
) -> tuple[PotentialDraws, dict[str, Any], dict[str, Any]]:
    """Return posterior, configuration and diagnostics of a run, or of an ensemble's.

    Runs are data: no code of a run is executed, unless its model has classes or functions of its author's own and
    ``trust_model`` or ``model_file`` says that this is wanted.

    Parameters
    ----------
    folder
        The run.
    trust_model
        Execute the run's ``model.py``, and load objects of other packages that it keeps as pickles.
    model_file
        The model file that the run was made with: executed in place of the run's own, if it is the same.

    Raises
    ------
    RunError
        Names the file that is missing, damaged, changed or of another version, or the code that is not trusted, and
        the remedy.
    """
    folder = Path(folder)
    given = None if model_file is None else Path(model_file)
    if not folder.exists() and set_aside(folder).is_dir():
        raise RunError(
            f"{folder} was being replaced when the process was killed; the old run is {set_aside(folder)}: rename it"
        )
    if not folder.is_dir():
        raise RunError(f"{folder} is not a run folder; fit first: bayespot fit MODEL CATALOG -o {folder}")
    config = read_config(folder)
    _require(folder / "config.json", config, ("model", "command", "fit", "catalog", "versions", "files", "free"))
    verify(folder, config)
    diagnosis = read_json(folder / "diagnostics.json")
    wanted = [f.name for f in fields(Diagnostics) if f.default is MISSING and f.default_factory is MISSING]
    _require(folder / "diagnostics.json", diagnosis, ("weights", "members") if "ensemble" in config else wanted)
    if "ensemble" in config:
        n = config["ensemble"]["n_members"]
        places = [folder / f"member-{k}" for k in range(n)]
        members = [cast("Posterior", load_run(place, trust_model=trust_model, model_file=given)[0]) for place in places]
        return EnsemblePosterior(members, diagnosis["weights"]), config, diagnosis
    model = read_model(folder, config, trust_model, given)
    if not isinstance(model, SnapshotModel):
        raise RunError(f"{folder / 'model.safetensors'} holds a {type(model).__name__}, no SnapshotModel; fit again")
    stored = diagnostics.stored_arrays(folder / "posterior.nc")
    # in the order of the model's sites, which HDF5 does not keep
    names = [
        *(name for name in model.sites() if name in stored),
        *(name for name in stored if name not in model.sites()),
    ]
    draws = {name: torch.as_tensor(stored[name]) for name in names}
    log_weights = diagnostics.stored_arrays(folder / "posterior.nc", "sample_stats").get("log_weights")
    weights = None if log_weights is None else torch.as_tensor(log_weights)
    meta = {**config["catalog"], **_read_stars(folder / "stars.npz")}
    return Posterior(model, draws, meta, weights), config, diagnosis


def _read_stars(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as stars:
            return {
                name: stars[name]
                for name in ("positions", "w", "outlier_probability")
                if name in stars and len(stars[name])
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: not a readable table of stars ({error}); delete it or fit again") from error


def _require(path: Path, content: dict[str, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise RunError(
            f"{path} has no {', '.join(missing)}: it is of another version or was changed; fit again, or restore it"
        )
