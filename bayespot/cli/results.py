"""`bayespot predict`, `report` and `check`: what a run found and whether it can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayespot.cli.catalogs import read_fitted
from bayespot.cli.tables import (
    MODEL_FILE,
    OUTPUT,
    TRUST,
    check_table_place,
    interval,
    parse_radii,
    print_table,
    write_table,
)

if TYPE_CHECKING:
    from bayespot.posterior.posterior import PotentialDraws


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    output: Annotated[Path, OUTPUT],
    radii: Annotated[str, typer.Option(help="LO:HI:N, N log-spaced radii in kpc.")] = "1:30:30",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    trust_model: Annotated[bool, TRUST] = False,
    model_file: Annotated[Path | None, MODEL_FILE] = None,
) -> None:
    """Write potential, acceleration, density, enclosed mass and circular speed with quantiles (ECSV, units).

    Example: `bayespot predict run --radii 0.1:80:60 -o fields.ecsv`
    """
    from bayespot.potential import RADIAL_FIELDS
    from bayespot.progress import Progress
    from bayespot.report.runs import load_run

    r = parse_radii(radii)
    check_table_place(output, overwrite)
    posterior, _, _ = load_run(run, trust_model=trust_model, model_file=model_file)
    with Progress("lines") as bar:
        bar.stage(f"fields at {len(r)} radii", posterior.n_draws * len(RADIAL_FIELDS))
        table = posterior.predict(r, tick=bar.step)
    write_table(table, output)
    typer.echo(f"{output}: {len(r)} radii, {posterior.n_draws} draws")


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    trust_model: Annotated[bool, TRUST] = False,
    model_file: Annotated[Path | None, MODEL_FILE] = None,
) -> None:
    """Say in words what a run found and whether it can be trusted; write RUN/report.html and the figures.

    The page holds everything (figures, tables, verdict, diagnostics, checks, formulas, versions, the command) and needs
    no other file; figures/ has every figure as PNG and PDF. Those that are there are kept: delete what shall be drawn
    anew.

    Example: `bayespot report run`
    """
    from bayespot.progress import Progress
    from bayespot.report.figures import FIGURES, draw_figures
    from bayespot.report.manifest import register
    from bayespot.report.page import write_page
    from bayespot.report.runs import load_run

    posterior, config, diagnosis = load_run(run, trust_model=trust_model, model_file=model_file)
    _print_report(posterior, config, diagnosis)
    with Progress("lines") as bar:
        bar.stage("figures", len(FIGURES) + 4)
        written = draw_figures(
            run / "figures", posterior, diagnosis["elbo"], ("png", "pdf"), bar.step, missing_only=True
        )
        bar.stage("page")
        page = write_page(run, posterior, config, diagnosis)
    register(run, [*written, page])
    typer.echo(
        f"figures: {', '.join(path.name for path in written if path.suffix == '.png')}, and as PDF, in {run}/figures"
    )
    typer.echo(f"wrote {page}")


def check(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    catalog: Annotated[Path, typer.Argument(help="The catalogue that was fitted.")],
    n_draws: Annotated[int, typer.Option(min=50, help="Posterior draws, each with a replicated catalogue.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    drop_invalid: Annotated[bool, typer.Option("--drop-invalid", help="As in the fit.")] = False,
    drop_duplicates: Annotated[bool, typer.Option("--drop-duplicates", help="As in the fit.")] = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="As in the fit.")] = False,
    hdu: Annotated[str | None, typer.Option("--hdu", help="As in the fit.")] = None,
    r_sun: Annotated[float | None, typer.Option("--r-sun", help="As in the fit.")] = None,
    z_sun: Annotated[float | None, typer.Option("--z-sun", help="As in the fit.")] = None,
    v_sun: Annotated[str | None, typer.Option("--v-sun", help="As in the fit.")] = None,
    trust_model: Annotated[bool, TRUST] = False,
    model_file: Annotated[Path | None, MODEL_FILE] = None,
) -> None:
    """Compare the catalogue with catalogues replicated from the posterior (posterior predictive checks).

    Radial profile, velocity dispersions, anisotropy, the symmetry that the stars' directions and orbital planes show,
    and the uniformity of the angles, the mark of a phase-mixed system; replicas pass through the model's errors and
    selection.

    Example: `bayespot check run stars.ecsv`
    """
    from bayespot.posterior.predictive import posterior_predictive
    from bayespot.progress import Progress
    from bayespot.report.runs import load_run, save_predictive

    posterior, config, _ = load_run(run, trust_model=trust_model, model_file=model_file)
    stars = read_fitted(
        run,
        config,
        catalog,
        drop_invalid=drop_invalid,
        drop_duplicates=drop_duplicates,
        allow_missing=allow_missing,
        hdu=hdu,
        r_sun=r_sun,
        z_sun=z_sun,
        v_sun=v_sun,
    )
    with Progress("lines") as bar:
        bar.stage("replicating the catalogue", n_draws)
        found = posterior_predictive(posterior, stars, n_draws, seed, tick=bar.step)
    path = save_predictive(run, found)
    _print_checks(found.p_values, found.warnings)
    typer.echo(f"wrote {path} and the groups posterior_predictive and observed_data of {run / 'posterior.nc'}")


def _print_report(posterior: PotentialDraws, config: dict[str, Any], diagnosis: dict[str, Any]) -> None:
    import numpy as np

    from bayespot.inference.verdict import verdict
    from bayespot.report.text import describe, quote, reweighted_where_it_matters

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
        typer.echo(quote(verdict(diagnosis)))


def _print_fields(title: str, few: PotentialDraws, r: Any) -> None:
    found = few.radial_fields(r, ("circular_speed", "enclosed_mass", "density"))
    fields = {name: field.quantile([0.16, 0.5, 0.84]) for name, field in found.items()}
    rows = [[f"{r[i]:.3g}", *(interval(q[:, i]) for q in fields.values())] for i in range(len(r))]
    print_table(title, ["r [kpc]", "v_c [km/s]", "M(<r) [Msun]", "rho [Msun/kpc3]"], rows)


def _print_checks(p_values: dict[str, float], warnings: list[str]) -> None:
    typer.echo("posterior predictive p-values: " + ", ".join(f"{name} {p:.2g}" for name, p in p_values.items()))
    typer.echo("\n".join(warnings) or "the replicas look like the catalogue")
