"""`bayespot models` and `bayespot fit`: from a catalogue to a run folder."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayespot.cli.tables import OUTPUT

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog
    from bayespot.inference.result import FitConfig
    from bayespot.likelihood.model import SnapshotModel
    from bayespot.posterior.posterior import PotentialDraws


def models() -> None:
    """List the built-in models."""
    for name, text in builtin_models().items():
        typer.echo(f"{name:32s} {text}")


def fit(
    model: Annotated[str, typer.Argument(help="Built-in model (`bayespot models`) or a .py file with build(catalog).")],
    catalog: Annotated[Path, typer.Argument(help="FITS, ECSV, CSV, Parquet or NPZ file.")],
    output: Annotated[Path, OUTPUT],
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    n_draws: Annotated[int, typer.Option(min=2, help="Posterior draws to keep.")] = 1000,
    n_components: Annotated[
        int | None, typer.Option(min=1, help="Components of f(J), if it is a mixture; default: the data choose.")
    ] = None,
    df: Annotated[
        Any,
        typer.Option(
            help="f(J) in place of the model's: mixture, gaussian, gaussian_lnJ (the paper's), flow, diffusion, "
            "energy or logistic_gp.",
            parser=str,
            metavar="TEXT",
        ),
    ] = None,
    guide: Annotated[
        Any,
        typer.Option(
            help="full_rank, low_rank, mean_field (too narrow), laplace, svgd (up to 3 latents) or nuts (few stars).",
            parser=str,
            metavar="TEXT",
        ),
    ] = "full_rank",
    df_guide: Annotated[
        Any,
        typer.Option(
            help="Guide over f(J): point, mean_field, low_rank, full_rank or joint; default: joint with errors, a "
            "selection or nuts, else point.",
            parser=str,
        ),
    ] = None,
    svi_steps: Annotated[int, typer.Option(min=0, help="Steps of variational inference.")] = 300,
    ensemble: Annotated[
        int | None, typer.Option(min=2, help="Fit so many members from different starts and keep their mixture.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Members fitted at a time (with --ensemble); default: one per core.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted fit.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")] = False,
    drop_invalid: Annotated[bool, typer.Option("--drop-invalid", help="Drop rows with NaN or bad parallaxes.")] = False,
    allow_missing: Annotated[
        bool,
        typer.Option("--allow-missing", help="Keep stars without radial velocity or distance, for models with errors."),
    ] = False,
    ignore_errors: Annotated[
        bool, typer.Option("--ignore-errors", help="Take measured coordinates as exact; the verdict says so.")
    ] = False,
) -> None:
    """Fit a model to a catalogue; the run is a folder.

    Columns: x y z vx vy vz (Galactocentric, kpc and km/s) or Gaia's ra dec distance (or parallax) pmra pmdec
    radial_velocity. An interrupted fit goes on with --resume.

    Example: `bayespot fit spherical stars.ecsv -o run --seed 1`

    Example: `bayespot fit spherical stars.ecsv -o run --ensemble 4 --jobs 2`
    """
    from bayespot.catalog.catalog import Catalog
    from bayespot.inference.result import FitConfig

    if jobs is not None and ensemble is None:
        raise ValueError("--jobs is for ensembles: add --ensemble K")
    config = FitConfig(
        seed=seed,
        n_draws=n_draws,
        n_components=n_components,
        df=df,
        guide=guide,
        df_guide=df_guide,
        svi_steps=svi_steps,
    )
    load_model(model)  # arguments the wrong way round: said of the model, not of a file that is none
    # whether the stars may be one side of the system depends on the model's selection
    stars = Catalog.read(catalog, drop_invalid=drop_invalid, allow_missing=allow_missing, check_offset=False)
    for doubt in stars.doubts():
        typer.echo(f"note: {doubt}", err=True)
    fit_to_folder(
        model,
        stars,
        config,
        output,
        resume=resume,
        overwrite=overwrite,
        n_members=ensemble or 1,
        jobs=jobs,
        ignore_errors=ignore_errors,
    )
    typer.echo(f"{output}: done; next: bayespot report {output}")


def _holds_files(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*"))


def builtin_models() -> dict[str, str]:
    import ast
    from importlib.resources import files

    found = {}
    for path in files("bayespot.models").iterdir():
        if path.name.endswith(".py") and path.name != "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            found[path.name.removesuffix(".py")] = text.splitlines()[0] if text else ""
    return dict(sorted(found.items()))


def load_model(model: str) -> tuple[Any, Path | None]:
    """Return the module with build(catalog), and its file when it is the user's."""
    import importlib

    from bayespot.report.runs import load_model_module

    if model.endswith(".py"):
        path = Path(model)
        module = load_model_module(path)
    elif model in builtin_models():
        return importlib.import_module(f"bayespot.models.{model}"), None
    else:
        raise ValueError(
            f"unknown model {model!r}; choose {', '.join(builtin_models())}, or give a .py file: "
            "bayespot fit MODEL CATALOG -o RUN"
        )
    if not callable(getattr(module, "build", None)):
        raise ValueError(f"{model} has no function build(catalog) -> SnapshotModel; add it")
    return module, path


def _built(module: Any, model: str, catalog: Catalog, ignore_errors: bool) -> SnapshotModel:
    """Return the model of the catalogue, and say what it makes of measurement errors."""
    from bayespot.likelihood.errors import relative_errors

    # built for stars without errors, fitted to the catalogue as it is: the fit then says what it ignores
    built: SnapshotModel = module.build(catalog.without_errors() if ignore_errors else catalog)
    if ignore_errors and built.errors is not None:
        raise ValueError(
            f"{model} takes measurement errors into account whatever the catalogue: leave --ignore-errors out, or let "
            "its build(catalog) use MeasurementErrors.where_needed(catalog)"
        )
    sizes = relative_errors(catalog)
    if sizes is not None and not sizes.negligible and not ignore_errors:
        done = "ignored by this model" if built.errors is None else "taken into account (--ignore-errors: not)"
        typer.echo(f"note: measurement errors are {done}: {sizes}", err=True)
    return built


def fit_to_folder(
    model: str,
    catalog: Catalog,
    config: FitConfig,
    folder: Path,
    resume: bool = False,
    overwrite: bool = False,
    n_members: int = 1,
    jobs: int | None = None,
    progress: bool | None = None,
    ignore_errors: bool = False,
) -> PotentialDraws:
    import functools

    from bayespot.inference.ensemble import fit_ensemble
    from bayespot.inference.fit import fit as run_fit
    from bayespot.inference.verdict import verdict
    from bayespot.report.runs import check_free, load_model_module, load_run, partial_folder, save_run

    check_free(folder, overwrite, resume)
    module, path = load_model(model)
    partial = partial_folder(folder)
    built = _built(module, model, catalog, ignore_errors)
    if built.selection is None:
        catalog.check_geometry()
    command = shlex.join(["bayespot", *sys.argv[1:]])
    about: dict[str, Any] = {"model_name": model, "model_file": path, "command": command, "overwrite": overwrite}
    try:
        if n_members > 1:
            if resume and not partial.exists():
                raise ValueError(f"nothing to resume: {partial} does not exist; fit without resuming")
            partial.mkdir(parents=True, exist_ok=True)
            prepare = None if path is None else functools.partial(load_model_module, path)
            ensemble = fit_ensemble(
                built,
                catalog,
                config,
                n_members,
                jobs=jobs,
                checkpoint=partial,
                resume=resume,
                prepare=prepare,
                progress=progress,
            )
            save_run(folder, ensemble, catalog, **about)
        else:
            result = run_fit(
                built, catalog, config, checkpoint=partial / "checkpoint.pt", resume=resume, progress=progress
            )
            save_run(folder, result, catalog, **about)
    except KeyboardInterrupt:
        if _holds_files(partial):
            typer.echo(f"interrupted; {partial} keeps what was reached: repeat with --resume", err=True)
        else:
            typer.echo("interrupted before the first checkpoint: nothing is kept, fit again", err=True)
        raise typer.Exit(130) from None
    finally:
        # an empty folder would look like an interrupted fit
        if not _holds_files(partial):
            shutil.rmtree(partial, ignore_errors=True)
    posterior, _, diagnosis = load_run(folder)
    for warning in verdict(diagnosis).reasons:
        typer.echo(f"note: {warning}", err=True)
    return posterior
