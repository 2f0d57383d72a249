"""`bayespot models` and `bayespot fit`: from a catalogue to a run folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bayespot.cli.catalogs import (
    ALLOW_MISSING,
    DROP_DUPLICATES,
    DROP_INVALID,
    HDU,
    R_SUN,
    V_SUN,
    Z_SUN,
    read_catalog,
    read_projected,
    show_notes,
)
from bayespot.cli.tables import OUTPUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from bayespot.catalog.catalog import Catalog
    from bayespot.inference.result import FitConfig, FitResult
    from bayespot.likelihood.model import SnapshotModel
    from bayespot.posterior.posterior import PotentialDraws


def models() -> None:
    """List the built-in models."""
    for name, text in builtin_models().items():
        typer.echo(f"{name:32s} {text}")


def fit(
    model: Annotated[str, typer.Argument(help="Built-in model (`bayespot models`) or a .py file with build(catalog).")],
    catalog: Annotated[Path, typer.Argument(help="FITS, ECSV, CSV, Parquet, NPZ, VOTable or HDF5 file.")],
    output: Annotated[Path, OUTPUT],
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
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
            help="full_rank, low_rank, mean_field (too narrow), laplace, emulated (flattened potentials), marginal "
            "(f(J) integrated out: velocities given positions), svgd (up to 3 latents) or nuts (few stars); default: "
            "emulated or marginal where they can be, else full_rank.",
            parser=str,
            metavar="TEXT",
        ),
    ] = None,
    df_guide: Annotated[
        Any,
        typer.Option(
            help="Guide over f(J): point, mean_field, low_rank, full_rank or joint; default: joint with errors, a "
            "selection or nuts, else point.",
            parser=str,
        ),
    ] = None,
    svi_steps: Annotated[int, typer.Option(min=0, help="Steps of variational inference.")] = 300,
    outliers: Annotated[
        bool | None,
        typer.Option(
            "--outliers/--no-outliers",
            help="Allow for stars that are no members; default: yes, but with a selection, the literal likelihood or a "
            "trained f(J) only if the model says so.",
        ),
    ] = None,
    ensemble: Annotated[
        int | None, typer.Option(min=2, help="Fit so many members from different starts and keep their mixture.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Members fitted at a time (with --ensemble); default: one per core.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted fit.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")] = False,
    drop_invalid: Annotated[bool, DROP_INVALID] = False,
    drop_duplicates: Annotated[bool, DROP_DUPLICATES] = False,
    allow_missing: Annotated[bool, ALLOW_MISSING] = False,
    hdu: Annotated[str | None, HDU] = None,
    r_sun: Annotated[float | None, R_SUN] = None,
    z_sun: Annotated[float | None, Z_SUN] = None,
    v_sun: Annotated[str | None, V_SUN] = None,
    ignore_errors: Annotated[
        bool, typer.Option("--ignore-errors", help="Take measured coordinates as exact; the verdict says so.")
    ] = False,
    distance: Annotated[
        float | None,
        typer.Option(
            help="Distance of a system on the sky, kpc: stars are ra dec (or x y) and radial_velocity with its error."
        ),
    ] = None,
    distance_error: Annotated[float, typer.Option(min=0, help="Error of --distance, kpc.")] = 0.0,
    centre: Annotated[
        str | None, typer.Option(help="RA,DEC of the system's centre, deg; default: the stars' medians.")
    ] = None,
    systemic_velocity: Annotated[
        float | None, typer.Option(help="Of the system, km/s; default: the median of the stars'; it is fitted.")
    ] = None,
    photometry: Annotated[
        Path | None,
        typer.Option(
            help="Stars of which the places count (ra dec or x y): a sample complete within its outermost star."
        ),
    ] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="The catalogue with velocities is complete like that: its places count.")
    ] = False,
) -> None:
    """Fit a model to a catalogue; the run is a folder.

    Columns: x y z vx vy vz (Galactocentric, kpc and km/s) or Gaia's ra dec distance (or parallax) pmra pmdec
    radial_velocity; for the members of a dwarf on the sky ra dec radial_velocity radial_velocity_error, with
    --distance. An interrupted fit goes on with --resume.

    Example: `bayespot fit spherical stars.ecsv -o run --seed 1`

    Example: `bayespot fit spherical stars.ecsv -o run --ensemble 4 --jobs 2`

    Example: `bayespot fit dwarf_spheroidal members.csv -o run --distance 86 --distance-error 6`
    """
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
        outliers=outliers,
    )
    module, path = load_model(model)  # arguments the wrong way round: said of the model, not of a file that is none
    inputs = [one for one in (catalog, path, photometry) if one is not None]
    check_output(output, inputs, overwrite, resume)
    stars: Catalog
    if distance is not None or getattr(module, "PROJECTED", False):
        stars = read_projected(catalog, distance, distance_error, centre, systemic_velocity, hdu, photometry, complete)
    else:
        stars = read_catalog(
            catalog,
            drop_invalid=drop_invalid,
            drop_duplicates=drop_duplicates,
            allow_missing=allow_missing,
            hdu=hdu,
            r_sun=r_sun,
            z_sun=z_sun,
            v_sun=v_sun,
        )
    show_notes(stars)
    fit_to_folder(
        model,
        stars,
        config,
        output,
        resume=resume,
        overwrite=overwrite,
        n_members=ensemble or 1,
        jobs=jobs,
        inputs=inputs,
        ignore_errors=ignore_errors,
    )
    typer.echo(f"{output}: done; next: bayespot report {output}{_trust_options(output, path)}")


def _trust_options(folder: Path, path: Path | None) -> str:
    """What the commands that read a run must be given, when it holds code of the user's own."""
    from bayespot.report.manifest import read_config

    if path is None:
        return ""
    config = read_config(folder)
    if config["pickles"]:
        return " --trust-model"
    return f" --model-file {path}" if config["code"] else ""


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

    from bayespot.report.model_file import load_model_module

    if model.endswith(".py"):
        path = Path(model)
        module = load_model_module(path)
    elif model in builtin_models():
        return importlib.import_module(f"bayespot.models.{model}"), None
    else:
        meant = f"; {model.lower()} is meant?" if model.lower() in builtin_models() else ""
        raise ValueError(
            f"unknown model {model!r}{meant or ';'} choose {', '.join(builtin_models())}, or give a .py file: "
            "bayespot fit MODEL CATALOG -o RUN"
        )
    if not callable(getattr(module, "build", None)):
        raise ValueError(f"{model} has no function build(catalog) -> SnapshotModel; add it")
    return module, path


def build_model(module: Any, path: Path | None, catalog: Catalog) -> SnapshotModel:
    """Return what a model's build(catalog) makes; what is wrong with a user's file is said in one sentence."""
    import inspect

    from bayespot.likelihood.model import SnapshotModel
    from bayespot.report.model_file import in_words

    name = module.__name__ if path is None else path
    try:
        inspect.signature(module.build).bind(catalog)
    except TypeError as error:
        raise ValueError(
            f"{name}: build{inspect.signature(module.build)} must take one argument, the catalogue: build(catalog)"
        ) from error
    try:
        built = module.build(catalog)
    except (ValueError, RuntimeError, OSError):
        raise  # they say what is wrong in words, this package's do
    except Exception as error:
        if path is None:
            raise
        raise ValueError(f"{path}: build(catalog) failed: {in_words(error, path)}; correct it") from error
    if not isinstance(built, SnapshotModel):
        what = "nothing" if built is None else f"a {type(built).__name__}"
        raise ValueError(f"{name}: build(catalog) returned {what}, not a SnapshotModel: end it with return model")
    return built


def check_output(folder: Path, inputs: Sequence[Path], overwrite: bool, resume: bool) -> None:
    """Refuse an output before the catalogue is read, which may take minutes."""
    from bayespot.report.output import output_folder

    with output_folder(folder, overwrite, resume, inputs, look=True):
        pass


def _built(module: Any, path: Path | None, model: str, catalog: Catalog, ignore_errors: bool) -> SnapshotModel:
    """Return the model of the catalogue, and say what it makes of measurement errors."""
    from bayespot.likelihood.errors import relative_errors

    # built for stars without errors, fitted to the catalogue as it is: the fit then says what it ignores
    built = build_model(module, path, catalog.without_errors() if ignore_errors else catalog)
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
    inputs: Sequence[Path] = (),
    progress: bool | Literal["lines"] | None = "lines",
    ignore_errors: bool = False,
    fitted: Callable[[FitResult], None] | None = None,
) -> PotentialDraws:
    """Fit and write the run; ``fitted`` is called with a single fit's result before it is written."""
    from bayespot.inference.verdict import verdict
    from bayespot.report.output import drop_partial, is_finished, output_folder, tidy_partial
    from bayespot.report.runs import load_run
    from bayespot.report.text import outlier_line

    with output_folder(folder, overwrite, resume, inputs):
        if resume and is_finished(folder):
            # killed after the run was complete: nothing is left to do but to tidy up
            drop_partial(folder)
        else:
            try:
                _fit_and_save(
                    model,
                    catalog,
                    config,
                    folder,
                    resume=resume,
                    overwrite=overwrite,
                    n_members=n_members,
                    jobs=jobs,
                    progress=progress,
                    ignore_errors=ignore_errors,
                    fitted=fitted,
                )
            finally:
                # an empty folder would look like an interrupted fit
                tidy_partial(folder)
        # of this process's own making
        posterior, _, diagnosis = load_run(folder, trust_model=True)
    for one in diagnosis.get("members", [diagnosis]):
        if one.get("n_outliers"):
            typer.echo(f"note: {outlier_line(one)}", err=True)
    for warning in verdict(diagnosis).reasons:
        typer.echo(f"note: {warning}", err=True)
    return posterior


def _fit_and_save(
    model: str,
    catalog: Catalog,
    config: FitConfig,
    folder: Path,
    *,
    resume: bool,
    overwrite: bool,
    n_members: int,
    jobs: int | None,
    progress: bool | Literal["lines"] | None,
    ignore_errors: bool,
    fitted: Callable[[FitResult], None] | None,
) -> None:
    import functools

    from bayespot.inference.ensemble import fit_ensemble
    from bayespot.inference.fit import fit as run_fit
    from bayespot.progress import Progress
    from bayespot.report.model_file import load_model_module
    from bayespot.report.output import partial_folder
    from bayespot.report.runs import save_run

    module, path = load_model(model)
    partial = partial_folder(folder)
    built = _built(module, path, model, catalog, ignore_errors)
    if built.selection is None and not built.conditional:
        catalog.check_geometry()
    command = shlex.join(["bayespot", *sys.argv[1:]])
    about: dict[str, Any] = {"model_name": model, "model_file": path, "command": command, "overwrite": overwrite}
    if resume and (partial / "checkpoint.pt").exists():
        raise ValueError(f"{partial} is of an earlier version of bayespot: fit anew with --overwrite")
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
            with Progress(progress) as bar:
                bar.stage("writing the run")
                save_run(folder, ensemble, catalog, **about)
        else:
            checkpoint = partial / "checkpoint.safetensors"
            result = run_fit(built, catalog, config, checkpoint=checkpoint, resume=resume, progress=progress)
            if fitted is not None:
                fitted(result)
            with Progress(progress) as bar:
                bar.stage("writing the run")
                save_run(folder, result, catalog, **about)
    except KeyboardInterrupt:
        if any(path.is_file() for path in partial.rglob("*")):
            typer.echo(f"interrupted; {partial} keeps what was reached: repeat with --resume", err=True)
        else:
            typer.echo("interrupted before the first checkpoint: nothing is kept, fit again", err=True)
        raise typer.Exit(130) from None
