"""The command line: simulate, forecast, fit, predict, report, distill, demo."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from astropy.table import QTable

    from bayespot.catalog import Catalog
    from bayespot.distillation import Distillation
    from bayespot.fit_result import FitConfig
    from bayespot.forecast import Forecast
    from bayespot.posterior import PotentialDraws

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Infer a galaxy's gravitational potential, with error bars, from one snapshot of stars.

A first session:

    bayespot simulate isochrone --n-stars 5000 --seed 1 -o stars.ecsv
    bayespot fit spherical stars.ecsv -o run
    bayespot predict run --radii 0.5:100:50 -o fields.ecsv
    bayespot report run
    bayespot distill run --budget-minutes 5
""",
)
_DEBUG = {"on": False}
_Out = typer.Option("-o", "--output", help="File or folder to write.")


@app.callback()
def _common(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    _DEBUG["on"] = debug


@app.command()
def simulate(
    name: Annotated[str, typer.Argument(help="System; `list` shows them all.")],
    output: Annotated[Path | None, _Out] = None,
    n_stars: Annotated[int, typer.Option(min=1, help="Number of stars.")] = 5000,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    anisotropy_radius: Annotated[float | None, typer.Option(help="Osipkov-Merritt radius in kpc.")] = None,
    observed: Annotated[
        bool, typer.Option("--observed", help="Heliocentric columns with errors instead of exact positions.")
    ] = False,
    distance_error: Annotated[float, typer.Option(min=0, help="Relative error of distances (with --observed).")] = 0.1,
    pm_error: Annotated[float, typer.Option(min=0, help="Error of proper motions, mas/yr.")] = 0.05,
    v_error: Annotated[float, typer.Option(min=0, help="Error of radial velocities, km/s.")] = 2.0,
    max_distance: Annotated[float | None, typer.Option(help="Keep observed distances up to this, kpc.")] = None,
    min_latitude: Annotated[float | None, typer.Option(help="Keep Galactic latitudes beyond this, deg.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write an exact equilibrium snapshot with known truth.

    With --observed it is what a survey from the Sun would list; n-stars counts the stars before cuts.

    Example: `bayespot simulate hernquist-in-nfw --n-stars 10000 --seed 3 -o stars.fits`

    Example: `bayespot simulate isochrone --n-stars 20000 --observed --max-distance 10 --min-latitude 15 -o gaia.fits`
    """
    from bayespot.mock import MOCKS, mock

    if name == "list":
        typer.echo("\n".join(MOCKS))
        return
    if output is None:
        raise ValueError("give the file to write with -o, for instance -o stars.ecsv")
    if not observed and (max_distance is not None or min_latitude is not None):
        raise ValueError("--max-distance and --min-latitude are cuts on what is observed: add --observed")
    catalog = mock(name, n_stars=n_stars, seed=seed, anisotropy_radius=anisotropy_radius)
    if observed:
        from bayespot.observe import observe
        from bayespot.selection import GalacticLatitude, HeliocentricDistance

        far = None if max_distance is None else HeliocentricDistance(max_distance)
        low = None if min_latitude is None else GalacticLatitude(min_latitude)
        cut = far * low if far and low else far or low
        catalog = observe(catalog, seed + 1, distance_error, pm_error, v_error, cut)
    catalog.write(output, overwrite=overwrite)
    typer.echo(f"{output}: {catalog.summary()}")


@app.command()
def models() -> None:
    """List the built-in models."""
    for name, text in _builtin_models().items():
        typer.echo(f"{name:32s} {text}")


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="Built-in model (`bayespot models`) or a .py file with build(catalog).")],
    catalog: Annotated[Path, typer.Argument(help="FITS, ECSV, CSV, Parquet or NPZ file.")],
    output: Annotated[Path, _Out],
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    n_draws: Annotated[int, typer.Option(min=2, help="Posterior draws to keep.")] = 1000,
    n_components: Annotated[
        int | None, typer.Option(min=1, help="Components of f(J); default: the data choose.")
    ] = None,
    df: Annotated[
        Any,
        typer.Option(
            help="f(J) in place of the model's: mixture, gaussian, gaussian_lnJ (the paper's), flow, diffusion or "
            "energy.",
            parser=str,
            metavar="TEXT",
        ),
    ] = None,
    guide: Annotated[
        Any,
        typer.Option(
            help="full_rank, low_rank, mean_field (too narrow), laplace, svgd (few parameters) or nuts (few stars).",
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
) -> None:
    """Fit a model to a catalogue; the run is a folder.

    Columns: x y z vx vy vz (Galactocentric, kpc and km/s) or Gaia's ra dec distance (or parallax) pmra pmdec
    radial_velocity. An interrupted fit goes on with --resume.

    Example: `bayespot fit spherical stars.ecsv -o run --seed 1`

    Example: `bayespot fit spherical stars.ecsv -o run --ensemble 4 --jobs 2`
    """
    from bayespot.catalog import Catalog
    from bayespot.fit_result import FitConfig

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
    # whether the stars may be one side of the system depends on the model's selection
    stars = Catalog.read(catalog, drop_invalid=drop_invalid, allow_missing=allow_missing, check_offset=False)
    _fit_to_folder(model, stars, config, output, resume=resume, overwrite=overwrite, n_members=ensemble or 1, jobs=jobs)
    typer.echo(f"{output}: done; next: bayespot report {output}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    output: Annotated[Path, _Out],
    radii: Annotated[str, typer.Option(help="LO:HI:N, N log-spaced radii in kpc.")] = "1:30:30",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write potential, acceleration, density, enclosed mass and circular speed with quantiles (ECSV, units).

    Example: `bayespot predict run --radii 0.1:100:60 -o fields.ecsv`
    """
    from bayespot.runs import load_run

    r = parse_radii(radii)
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; choose another name or pass --overwrite")
    posterior, _, _ = load_run(run)
    _write_table(posterior.predict(r), output)
    typer.echo(f"{output}: {len(r)} radii, {posterior.n_draws} draws")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Say in words what a run found and whether it can be trusted, and draw its figures again.

    Example: `bayespot report run`
    """
    from bayespot.runs import draw_figures, load_run

    posterior, config, diagnosis = load_run(run)
    _print_report(posterior, config, diagnosis)
    for path in draw_figures(run / "figures", posterior, diagnosis["elbo"]):
        typer.echo(f"wrote {path}")


@app.command()
def check(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    catalog: Annotated[Path, typer.Argument(help="The catalogue that was fitted.")],
    n_draws: Annotated[int, typer.Option(min=50, help="Posterior draws, each with a replicated catalogue.")] = 100,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    drop_invalid: Annotated[bool, typer.Option("--drop-invalid", help="As in the fit.")] = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="As in the fit.")] = False,
) -> None:
    """Compare the catalogue with catalogues replicated from the posterior (posterior predictive checks).

    Radial profile, velocity dispersions, anisotropy and the uniformity of the angles, the mark of a phase-mixed
    system; replicas pass through the model's errors and selection.

    Example: `bayespot check run stars.ecsv`
    """
    from bayespot.catalog import Catalog
    from bayespot.predictive import posterior_predictive
    from bayespot.progress import Progress
    from bayespot.runs import RunError, load_run, save_predictive

    posterior, config, _ = load_run(run)
    stars = Catalog.read(catalog, drop_invalid=drop_invalid, allow_missing=allow_missing, check_offset=False)
    if len(stars) != config["catalog"]["n_stars"]:
        raise RunError(f"{catalog} has {len(stars)} stars, {run} was fitted to {config['catalog']['n_stars']}")
    reach, fitted = float((stars.x**2).sum(-1).max() ** 0.5), config["catalog"]["r_q"][-1]
    if abs(reach / fitted - 1) > 1e-6:
        raise RunError(f"{catalog} reaches {reach:.6g} kpc, the stars that {run} was fitted to {fitted:.6g} kpc")
    with Progress(None) as bar:
        bar.stage("replicating the catalogue", n_draws)
        found = posterior_predictive(posterior, stars, n_draws, seed, tick=bar.step)
    path = save_predictive(run, found)
    _print_checks(found.p_values, found.warnings)
    typer.echo(f"wrote {path} and the groups posterior_predictive and observed_data of {run / 'posterior.nc'}")


@app.command()
def distill(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    budget_minutes: Annotated[float, typer.Option(help="Wall-clock time of all searches together, minutes.")] = 5.0,
    budget_epochs: Annotated[
        int | None, typer.Option(help="Epochs per search instead: the same result on every run.")
    ] = None,
    families: Annotated[
        str | None, typer.Option(help="Comma-separated families of formulas; `list` shows them.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    mode: Annotated[
        Any,
        typer.Option(
            help="mean: search on the posterior mean; class: one form for many draws.", parser=str, metavar="TEXT"
        ),
    ] = "mean",
    gauge: Annotated[
        Any, typer.Option(help="absolute (Phi), offset (Phi - Phi(r_0)) or force (v_c^2).", parser=str, metavar="TEXT")
    ] = "absolute",
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    catalog: Annotated[
        Path | None, typer.Option(help="The catalogue that was fitted; needed for more than 10 000 stars.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the searches that are finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier distillation.")] = False,
) -> None:
    """Turn a run's potential into formulas with uncertain constants and weights (symbolic regression with physo).

    Writes table.ecsv, candidates.json, formulas.tex and formulas.png to RUN/distillation.

    Example: `bayespot distill run --budget-minutes 5 --jobs 2 --seed 1`
    """
    from importlib.util import find_spec

    from bayespot.grammar import DEFAULT_FAMILIES, FAMILIES, DistillConfig

    if families == "list":
        for family in FAMILIES.values():
            typer.echo(f"{family.name:12s} {' '.join(family.prefix) or '-':14s} {' '.join(family.operators)}")
        return
    names = DEFAULT_FAMILIES if families is None else tuple(name.strip() for name in families.split(","))
    config = DistillConfig(
        seed=seed, families=names, mode=mode, budget_minutes=budget_minutes, budget_epochs=budget_epochs, gauge=gauge
    )
    if find_spec("physo") is None:
        raise ValueError("distill needs physo, which is not installed: pip install 'bayespot[distill]'")
    from bayespot.catalog import Catalog
    from bayespot.distill import distill as run_distill
    from bayespot.runs import load_run

    posterior, _, _ = load_run(run)
    stars = None if catalog is None else Catalog.read(catalog, check_offset=False)
    folder = run / "distillation"
    try:
        found = run_distill(
            posterior, config, folder=folder, resume=resume, catalog=stars, jobs=jobs, overwrite=overwrite
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {folder} keeps finished searches: repeat with --resume", err=True)
        raise typer.Exit(130) from None
    _print_formulas(found)
    typer.echo(f"wrote table.ecsv, candidates.json, formulas.tex and formulas.png to {folder}")


@app.command()
def forecast(
    model: Annotated[str, typer.Argument(help="Built-in model (`bayespot models`) or a .py file with build(catalog).")],
    n_stars: Annotated[int, typer.Option(min=1, help="Number of stars to forecast for.")] = 10_000,
    system: Annotated[str, typer.Option(help="Simulated system; `bayespot simulate list` shows them.")] = "isochrone",
    n_simulated: Annotated[int, typer.Option(help="Simulated stars that the forecast averages over.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    radii: Annotated[
        str | None, typer.Option(help="LO:HI:N, log-spaced radii in kpc; default: 1 to 99 % of the stars' radii.")
    ] = None,
    accuracy: Annotated[
        float | None, typer.Option(help="Say how many stars give this relative sd, in per cent.")
    ] = None,
    field: Annotated[str, typer.Option(help="Of which field (with --accuracy).")] = "circular_speed",
    radius: Annotated[
        float | None, typer.Option(help="At which radius in kpc (with --accuracy); default: the stars' median.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Table to write (ECSV), with a figure.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Figure to write (PNG or PDF); with -o by default beside the table.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Say how well so many stars would constrain a model's potential, before any are observed or fitted.

    The Cramer-Rao bound with f(J) free ("bound"), and the posterior sd with the model's prior, for stars of a simulated
    system with known f(J): complete, without errors. A free-form potential is bounded weakly where few stars are; there
    its prior decides.

    Example: `bayespot forecast spherical --system hernquist-in-nfw --n-stars 10000 -o forecast.ecsv`

    Example: `bayespot forecast spherical --accuracy 1 --field circular_speed --radius 8`
    """
    import numpy as np

    from bayespot.forecast import forecast as run_forecast
    from bayespot.mock import mock

    if output is not None and figure is None:
        figure = output.with_suffix(".png")
    for path in (output, figure):
        if path is not None and path.exists() and not overwrite:
            raise ValueError(f"{path} exists; choose another name or pass --overwrite")
    if figure is not None and figure.suffix not in (".png", ".pdf"):
        raise ValueError(f"a figure is a .png or .pdf file, got {figure}")
    module, _ = _load_model(model)
    stars = mock(system, n_stars=n_simulated, seed=seed)
    found = run_forecast(module.build(stars), stars)
    low, high = np.quantile(found.stars_r, [0.01, 0.99])
    r = np.geomspace(low, high, 12) if radii is None else parse_radii(radii)
    # all that may be wrong with the options is found before anything is written
    needed = None if accuracy is None else _stars_needed(found, field, radius, accuracy)
    _print_forecast(found, r, n_stars, f"model {model}, {n_stars} stars of {system}")
    if needed:
        typer.echo(needed)
    if found.misfit > 0.1:
        typer.echo(
            f"note: no potential of {model} is close to that of {system}: M(<r) is wrong by up to "
            f"{100 * found.misfit:.0f} % however many the stars; these figures do not contain that",
            err=True,
        )
    if output is not None:
        _write_table(found.table(r, n_stars), output)
        typer.echo(f"wrote {output}")
    if figure is not None:
        from bayespot import plots

        with plots.style():
            plots.save(plots.forecast_figure(found, np.geomspace(r[0], r[-1], 60), n_stars), figure)
        typer.echo(f"wrote {figure}")


@app.command()
def demo(
    output: Annotated[Path, _Out] = Path("bayespot-demo"),
    seed: Annotated[int, typer.Option(help="Random seed.")] = 1,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo.")] = False,
) -> None:
    """Fit a simulated isochrone sphere, whose truth is known, and the Milky Way's globular clusters.

    Example: `bayespot demo`
    """
    from bayespot.catalog import Catalog
    from bayespot.fit_result import FitConfig
    from bayespot.mock import mock
    from bayespot.runs import check_free

    started = time.perf_counter()
    folders = [output / "isochrone", output / "milky_way"]
    for folder in folders:
        check_free(folder, overwrite, False)
    typer.echo("1. An isochrone sphere, 1e11 Msun, b = 3 kpc: 5000 stars, free-form potential")
    posterior = _fit_to_folder(
        "spherical", mock("isochrone", n_stars=5000, seed=seed), FitConfig(seed=seed), folders[0], overwrite=overwrite
    )
    _print_truth(posterior)
    _demo_formulas(posterior, folders[0] / "distillation", seed)
    typer.echo("\n2. The Milky Way from 161 globular clusters (Vasiliev & Baumgardt 2021), as a sphere")
    posterior = _fit_to_folder(
        "milky_way_globular_clusters",
        Catalog.example("globular_clusters"),
        FitConfig(seed=seed),
        folders[1],
        overwrite=overwrite,
    )
    _print_milky_way(posterior)
    typer.echo(f"\nFigures: {folders[0]}/figures, {folders[1]}/figures; {time.perf_counter() - started:.0f} s in all")


def main() -> None:
    """Run the command line; an expected error is one message on stderr and exit status 2 (failed fit: 1)."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if _DEBUG["on"]:
            raise
        typer.echo(f"bayespot: {error}", err=True)
        sys.exit(1 if isinstance(error, RuntimeError) else 2)


def parse_radii(text: str) -> Any:
    """Return the log-spaced radii that ``LO:HI:N`` stands for."""
    import numpy as np

    try:
        low, high, n = text.split(":")
        low_r, high_r, count = float(low), float(high), int(n)
    except ValueError as error:
        raise ValueError(f"--radii takes LO:HI:N, for instance 0.1:100:50 (kpc); got {text!r}") from error
    if not 0 < low_r <= high_r or count < 1:
        raise ValueError(f"--radii needs 0 < LO <= HI and N >= 1; got {text!r}")
    return np.geomspace(low_r, high_r, count)


def _write_table(table: QTable, path: Path) -> None:
    """Write an ECSV file, complete or not at all."""
    import os

    temporary = path.with_name(f".{path.name}.tmp")
    table.write(temporary, format="ascii.ecsv", overwrite=True)
    os.replace(temporary, path)


def _builtin_models() -> dict[str, str]:
    import ast
    from importlib.resources import files

    found = {}
    for path in files("bayespot.models").iterdir():
        if path.name.endswith(".py") and path.name != "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            found[path.name.removesuffix(".py")] = text.splitlines()[0] if text else ""
    return dict(sorted(found.items()))


def _load_model(model: str) -> tuple[Any, Path | None]:
    """Return the module with build(catalog), and its file when it is the user's."""
    import importlib

    from bayespot.runs import load_model_module

    if model.endswith(".py"):
        path = Path(model)
        module = load_model_module(path)
    elif model in _builtin_models():
        return importlib.import_module(f"bayespot.models.{model}"), None
    else:
        raise ValueError(f"unknown model {model!r}; choose {', '.join(_builtin_models())}, or give a .py file")
    if not callable(getattr(module, "build", None)):
        raise ValueError(f"{model} has no function build(catalog) -> SnapshotModel; add it")
    return module, path


def _fit_to_folder(
    model: str,
    catalog: Catalog,
    config: FitConfig,
    folder: Path,
    resume: bool = False,
    overwrite: bool = False,
    n_members: int = 1,
    jobs: int | None = None,
) -> PotentialDraws:
    import functools

    from bayespot.ensemble import fit_ensemble
    from bayespot.inference import fit as run_fit
    from bayespot.runs import check_free, load_model_module, load_run, partial_folder, save_ensemble, save_run
    from bayespot.verdict import verdict

    check_free(folder, overwrite, resume)
    module, path = _load_model(model)
    partial = partial_folder(folder)
    built = module.build(catalog)
    if built.selection is None:
        catalog.check_geometry()
    command = " ".join(["bayespot", *sys.argv[1:]])
    about: dict[str, Any] = {"model_name": model, "model_file": path, "command": command, "overwrite": overwrite}
    try:
        if n_members > 1:
            if resume and not partial.exists():
                raise ValueError(f"nothing to resume: {partial} does not exist; fit without resuming")
            partial.mkdir(parents=True, exist_ok=True)
            prepare = None if path is None else functools.partial(load_model_module, path)
            ensemble = fit_ensemble(
                built, catalog, config, n_members, jobs=jobs, checkpoint=partial, resume=resume, prepare=prepare
            )
            save_ensemble(folder, ensemble, catalog, **about)
        else:
            result = run_fit(built, catalog, config, checkpoint=partial / "checkpoint.pt", resume=resume)
            save_run(folder, result, catalog, **about)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {partial} keeps what was reached: repeat with --resume", err=True)
        raise typer.Exit(130) from None
    posterior, _, diagnosis = load_run(folder)
    for warning in verdict(diagnosis).reasons:
        typer.echo(f"note: {warning}", err=True)
    return posterior


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _interval(values: Any) -> str:
    return f"{values[1]:.4g} [{values[0]:.4g}, {values[2]:.4g}]"


def _print_report(posterior: PotentialDraws, config: dict[str, Any], diagnosis: dict[str, Any]) -> None:
    import numpy as np

    from bayespot.report import describe, reweighted_where_it_matters
    from bayespot.verdict import verdict

    catalog = config["catalog"]
    typer.echo(f"model {config['model']}, {catalog['n_stars']} stars, seed {config['fit']['seed']}")
    typer.echo("\n".join(describe(diagnosis)))
    if "predictive" in diagnosis:
        _print_checks(diagnosis["predictive"]["p_values"], diagnosis["predictive"]["warnings"])
    typer.echo(str(verdict(diagnosis)))
    r = np.geomspace(catalog["r_q"][2], catalog["r_q"][6], 6)
    title = "Median and 68 % interval (5 to 95 % of the stars' radii)"
    _print_fields(title, posterior.thinned(300), r)
    exact = reweighted_where_it_matters(posterior, diagnosis, r)
    if exact is not None:
        _print_fields("The same, draws re-weighted to the exact posterior, which moves them by over 0.1 sd", exact, r)


def _print_fields(title: str, few: PotentialDraws, r: Any) -> None:
    fields = {
        name: few.field(name, r).quantile([0.16, 0.5, 0.84]) for name in ("circular_speed", "enclosed_mass", "density")
    }
    rows = [[f"{r[i]:.3g}", *(_interval(q[:, i]) for q in fields.values())] for i in range(len(r))]
    _table(title, ["r [kpc]", "v_c [km/s]", "M(<r) [Msun]", "rho [Msun/kpc3]"], rows)


def _print_checks(p_values: dict[str, float], warnings: list[str]) -> None:
    typer.echo("posterior predictive p-values: " + ", ".join(f"{name} {p:.2g}" for name, p in p_values.items()))
    typer.echo("\n".join(warnings) or "the replicas look like the catalogue")


def _print_formulas(found: Distillation, most: int = 10) -> None:
    table = found.table()
    rows = []
    for row in table[: min(most, len(found.formulas))]:
        rows.append(
            [row["formula"], f"{row['weight']:.3f}", f"{row['chi2']:.1f}/{row['n_directions']}", row["constants"]]
        )
    _table("Formulas for Phi(r), r in kpc, Phi in (km/s)^2", ["formula", "weight", "chi2", "constants"], rows)
    if found.ranking is None:
        typer.echo("weights from the posterior of Phi: without the stars' coordinates (--catalog) none from the stars")
    else:
        typer.echo(f"weights from {found.ranking.n_stars} stars with f(J) fitted for every formula")
    typer.echo(found.verdict())
    for failure in found.failures:
        typer.echo(f"note: {failure}", err=True)


def _print_forecast(found: Forecast, r: Any, n_stars: int, title: str) -> None:
    typer.echo(
        f"{title}; the model's potential is within {100 * found.misfit:.2g} % of the true M(<r) at the stars' radii; "
        f"Monte-Carlo error of the figures {100 * found.monte_carlo_error('circular_speed', r, n_stars, True):.2g} %"
    )
    sd = found.parameters(n_stars)
    if sd:
        names = ", ".join(f"{name.removeprefix('potential.')} {value:.3g}" for name, value in sd.items())
        typer.echo(f"sd of parameters with the prior (of the logarithm of positive ones): {names}")
    columns = {"Phi": "potential", "M(<r)": "enclosed_mass", "v_c": "circular_speed"}
    values = [found.relative_sd(name, r, n_stars, prior) for name in columns.values() for prior in (False, True)]
    rows = [[f"{r[i]:.3g}", *(_per_cent(100 * value[i]) for value in values)] for i in range(len(r))]
    heads = [f"{name} {kind}" for name in columns for kind in ("bound", "+prior")]
    _table("Relative sd in per cent: the bound with f(J) free, and with the model's prior", ["r [kpc]", *heads], rows)


def _per_cent(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else ">1000"


def _stars_needed(found: Forecast, field: str, radius: float | None, accuracy: float) -> str:
    import numpy as np

    if not accuracy > 0:
        raise ValueError(f"--accuracy must be positive (per cent), got {accuracy:g}")
    r = float(np.median(found.stars_r)) if radius is None else radius
    bound, helped = (found.stars_needed(field, r, accuracy / 100, prior) for prior in (False, True))
    return (
        f"{accuracy:g} % in {field} at {r:.3g} kpc: {_number(helped)} stars with the model's prior, {_number(bound)} "
        "without"
    )


def _number(n: float) -> str:
    """Two digits: more would be noise of the simulation."""
    import math

    if not math.isfinite(n):
        return "no number of"
    digits = max(len(str(round(n))) - 2, 0)
    return str(math.ceil(n / 10**digits) * 10**digits)


def _print_truth(posterior: PotentialDraws) -> None:
    import numpy as np

    from bayespot.mock import truth_potential
    from bayespot.posterior import truth_field

    truth = truth_potential(posterior.meta["meta"])
    assert truth is not None  # the demo simulated it
    r = np.array([0.6, 1.5, 3.0, 6.0, 15.0, 60.0])
    few = posterior.thinned(300)
    rows = []
    for i, radius in enumerate(r):
        row = [f"{radius:.3g}"]
        for name in ("potential", "circular_speed", "enclosed_mass"):
            field, true = few.field(name, r), truth_field(truth, name, r)
            error, sd = 100 * (field.mean / true - 1), 100 * field.sd / np.abs(true)
            row.append(f"{error[i]:+.2f} +- {sd[i]:.2f} %")
        rows.append(row)
    _table("Error against the truth +- posterior sd", ["r [kpc]", "potential", "v_c", "M(<r)"], rows)


def _demo_formulas(posterior: PotentialDraws, folder: Path, seed: int) -> None:
    """Distil for half a minute if physo is there; the true formula is -G M/(b + sqrt(b^2 + r^2))."""
    from importlib.util import find_spec

    if find_spec("physo") is None:
        typer.echo("no formulas: physo is not installed (pip install 'bayespot[distill]')")
        return
    from bayespot.distill import distill as run_distill
    from bayespot.grammar import DistillConfig
    from bayespot.runs import load_run

    # the run keeps its stars, the posterior in memory does not
    stored, _, _ = load_run(folder.parent)
    config = DistillConfig(seed=seed, budget_minutes=0.5, families=("kepler",), max_ranked=3)
    _print_formulas(run_distill(stored, config, folder=folder), 5)


def _print_milky_way(posterior: PotentialDraws) -> None:
    from bayespot.literature import MILKY_WAY

    few = posterior.thinned(500)
    rows = []
    wanted = [("circular_speed", 8.2), ("circular_speed", 20.0), ("enclosed_mass", 20.0), ("enclosed_mass", 50.0)]
    for name, r in wanted:
        scale, label = (
            (1e11, f"M(<{r:g} kpc) [1e11 Msun]") if name == "enclosed_mass" else (1, f"v_c({r:g} kpc) [km/s]")
        )
        q = few.field(name, [r]).quantile([0.16, 0.5, 0.84])[:, 0] / scale
        near = [m for m in MILKY_WAY if m.field == name and abs(m.r / r - 1) < 0.25]
        known = "; ".join(
            f"{m.value / scale:.4g}" + (f" +{m.plus / scale:.2g} -{m.minus / scale:.2g}" if m.plus else "")
            + f" at {m.r:g} ({m.source})"
            for m in near
        )  # fmt: skip
        rows.append([label, _interval(q), known])
    _table("Milky Way, median and 68 % interval", ["quantity", "this fit", "literature"], rows)
