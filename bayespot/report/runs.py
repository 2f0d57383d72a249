"""Run folders: everything about one fit, written atomically and read back with checks."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from bayespot import diagnostics
from bayespot.files import WriteError, save_torch, write_folder
from bayespot.inference.result import Diagnostics, EnsembleResult, FitResult
from bayespot.likelihood.model import SnapshotModel
from bayespot.posterior.posterior import EnsemblePosterior, Posterior, PotentialDraws, member_spread
from bayespot.posterior.predictive import Predictive
from bayespot.report import plots
from bayespot.report.figures import default_radii, draw_figures

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog

FORMAT = 1
#: Most stars whose positions a run keeps, for maps of their density.
MAX_STARS = 10_000


class RunError(ValueError):
    """A run folder that cannot be read or written; the message says what is wrong and what to do."""


def partial_folder(folder: Path) -> Path:
    """Return where an unfinished fit of ``folder`` keeps its checkpoint."""
    return folder.with_name(folder.name + ".partial")


def check_free(folder: Path, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that exists, or an unfinished fit, unless told what to do with it."""
    if folder.exists() and not overwrite:
        raise RunError(f"{folder} exists; choose another folder or pass --overwrite")
    partial = partial_folder(folder)
    if partial.exists() and not resume:
        if not overwrite:
            raise RunError(f"{partial} holds an interrupted fit; continue it with --resume or drop it with --overwrite")
        shutil.rmtree(partial)


def load_model_module(path: Path) -> Any:
    """Import a user's model file under a name that pickles of its classes can find again."""
    name = f"bayespot_user_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise RunError(f"{path}: no such model file; give a .py file with build(catalog) -> SnapshotModel")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


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

    The folder holds ``config.json``, ``posterior.nc`` (ArviZ InferenceData), ``model.pt``, ``stars.npz`` (positions of
    up to `MAX_STARS` stars, and the coordinates of all if there are no more), ``diagnostics.json``, ``summary.ecsv``,
    ``fields.ecsv`` and ``figures/``. An ensemble's holds such a folder per member, ``member-0`` and so on, and
    ``config.json``, ``diagnostics.json``, tables and figures of the mixture.

    Raises
    ------
    RunError
        If the folder exists and ``overwrite`` is False, or it cannot be written.
    """
    origin = _Origin(model_name, model_file, command)
    write = _write_ensemble if isinstance(result, EnsembleResult) else _write
    return _save(Path(folder), lambda place: write(place, result, catalog, origin), overwrite)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Origin:
    """Where a run comes from: its model's name, the user's model file, and the command line."""

    model_name: str
    model_file: Path | None
    command: str


def _save(folder: Path, write: Callable[[Path], None], overwrite: bool) -> Path:
    """Have a run written beside its place and move it there when it is complete."""
    if folder.exists() and not overwrite:
        raise RunError(f"{folder} exists; choose another folder or pass --overwrite")
    partial = partial_folder(folder)
    kept = f"; nothing is lost, {partial} keeps the fit: repeat with --resume" if partial.exists() else ""
    write_folder(folder, write, kept)
    shutil.rmtree(partial, ignore_errors=True)
    return folder


def _config(result: FitResult, origin: _Origin) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": origin.model_name,
        "model_file": origin.model_file.stem if origin.model_file else None,
        "command": origin.command,
        "fit": asdict(result.config),
        "catalog": result.catalog,
        "versions": versions(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def _write_tables(folder: Path, posterior: PotentialDraws, elbo: list[float]) -> None:
    posterior.summary().write(folder / "summary.ecsv")
    posterior.thinned(400).predict(default_radii(posterior.meta)).write(folder / "fields.ecsv")
    draw_figures(folder / "figures", posterior, elbo)


def _write(folder: Path, result: FitResult, catalog: Catalog, origin: _Origin) -> None:
    _write_json(folder / "config.json", _config(result, origin))
    _write_json(folder / "diagnostics.json", asdict(result.diagnostics))
    save_torch(result.model, folder / "model.pt")
    if origin.model_file:
        shutil.copy(origin.model_file, folder / "model.py")
    attrs = {"n_stars": len(catalog), "seed": result.config.seed, "model": origin.model_name}
    data = diagnostics.to_inference_data(result.draws, result.sample_stats, attrs, result.n_chains)
    diagnostics.save_netcdf(data, folder / "posterior.nc")
    positions = _star_sample(catalog)
    # few stars are kept whole: what a distillation ranks formulas with
    few = catalog.w.numpy() if len(catalog) <= MAX_STARS else np.empty((0, 6))
    np.savez_compressed(folder / "stars.npz", positions=positions, w=few)
    _write_tables(folder, _posterior(result, positions), result.diagnostics.elbo)


def _write_ensemble(folder: Path, result: EnsembleResult, catalog: Catalog, origin: _Origin) -> None:
    for k, member in enumerate(result.members):
        (folder / f"member-{k}").mkdir()
        _write(folder / f"member-{k}", member, catalog, origin)
    first = result.members[0]
    config = _config(first, origin)
    config["ensemble"] = {"n_members": len(result.members), "weighting": result.weighting}
    _write_json(folder / "config.json", config)
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
    diagnosis = _read_json(folder / "diagnostics.json")
    summary = {"p_values": check.p_values, "warnings": check.warnings, "n_draws": len(check.observed["counts"])}
    observed = {name: value if name == "angles" else value[0] for name, value in check.observed.items()}
    data = diagnostics.with_predictive(
        _inference_data(folder),
        {**observed, "r_edges": check.r_edges},
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
        os.replace(temporary / "posterior.nc", folder / "posterior.nc")
        os.replace(temporary / "diagnostics.json", folder / "diagnostics.json")
        for suffix in (".png", ".pdf"):
            place = figure_path.with_suffix(suffix)
            os.replace(temporary / place.name, place)
    except OSError as error:
        raise WriteError.of(folder, error, "; the run is as it was") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return figure_path


def _inference_data(folder: Path) -> Any:
    """The InferenceData of a run; of an ensemble, whose posteriors are its members', that of earlier checks or none."""
    if "ensemble" in _read_json(folder / "config.json") and not (folder / "posterior.nc").exists():
        return diagnostics.no_inference_data()
    return diagnostics.load_netcdf(folder / "posterior.nc")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    from importlib.metadata import version

    names = ("bayespot", "torch", "pyro-ppl", "numpy", "arviz", "astropy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def load_run(folder: str | os.PathLike[str]) -> tuple[PotentialDraws, dict[str, Any], dict[str, Any]]:
    """Return posterior, configuration and diagnostics of a run, or of an ensemble's.

    The model is unpickled: load only runs you trust.

    Raises
    ------
    RunError
        Names the file that is missing, damaged or of another version, and the remedy.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder} is not a run folder; fit first: bayespot fit MODEL CATALOG -o {folder}")
    config = _read_json(folder / "config.json")
    found = config.get("format")
    if found != FORMAT:
        raise RunError(
            f"{folder / 'config.json'}: run format {found}, this bayespot reads {FORMAT}; fit again or install "
            f"bayespot {config.get('versions', {}).get('bayespot', 'of that version')}"
        )
    _require(folder / "config.json", config, ("model", "command", "fit", "catalog", "versions"))
    diagnosis = _read_json(folder / "diagnostics.json")
    wanted = [f.name for f in fields(Diagnostics) if f.default is MISSING and f.default_factory is MISSING]
    _require(folder / "diagnostics.json", diagnosis, ("weights", "members") if "ensemble" in config else wanted)
    if "ensemble" in config:
        n = config["ensemble"]["n_members"]
        members = [cast("Posterior", load_run(folder / f"member-{k}")[0]) for k in range(n)]
        return EnsemblePosterior(members, diagnosis["weights"]), config, diagnosis
    if config.get("model_file"):
        _restore_user_module(folder / "model.py", config["model_file"])
    try:
        model = torch.load(folder / "model.pt", weights_only=False)
    except FileNotFoundError as error:
        raise RunError(f"{folder / 'model.pt'} is missing; the run is incomplete: fit again") from error
    except Exception as error:  # unpickling raises whatever the damaged bytes suggest
        raise RunError(f"{folder / 'model.pt'}: not a readable model ({error}); fit again") from error
    if not isinstance(model, SnapshotModel):
        raise RunError(f"{folder / 'model.pt'} holds a {type(model).__name__}, not a SnapshotModel; fit again")
    data = diagnostics.load_netcdf(folder / "posterior.nc")
    draws = {name: torch.as_tensor(value) for name, value in diagnostics.posterior_arrays(data).items()}
    log_weights = diagnostics.posterior_arrays(data, "sample_stats").get("log_weights")
    weights = None if log_weights is None else torch.as_tensor(log_weights)
    meta = {**config["catalog"], **_read_stars(folder / "stars.npz")}
    return Posterior(model, draws, meta, weights), config, diagnosis


def _read_stars(path: Path) -> dict[str, np.ndarray]:
    # runs of earlier versions have no such file
    if not path.exists():
        return {}
    try:
        with np.load(path) as stars:
            return {name: stars[name] for name in ("positions", "w") if name in stars and len(stars[name])}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: not a readable table of stars ({error}); delete it or fit again") from error


def _restore_user_module(path: Path, stem: str) -> None:
    module = load_model_module(path)
    sys.modules[f"bayespot_user_model_{stem}"] = module


def _require(path: Path, content: dict[str, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise RunError(
            f"{path} has no {', '.join(missing)}: it is of another version or was changed; fit again, or restore it"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; {path.parent} is no complete run: fit again") from error
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: not valid JSON ({error}); restore it or fit again") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}, not an object; restore it or fit again")
    return content
