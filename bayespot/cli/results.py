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
    parse_heights,
    parse_radii,
    print_table,
    write_table,
)

if TYPE_CHECKING:
    from bayespot.catalog.projected import ProjectedCatalog
    from bayespot.posterior.posterior import PotentialDraws


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    output: Annotated[Path, OUTPUT],
    radii: Annotated[
        str, typer.Option(help="LO:HI:N, N log-spaced radii in kpc; with --plane the cylindrical radius R.")
    ] = "1:30:30",
    plane: Annotated[
        bool, typer.Option("--plane", help="Fields over (R, z) in place of those against radius.")
    ] = False,
    heights: Annotated[
        str | None, typer.Option(help="LO:HI:N, N evenly spaced heights z in kpc (with --plane; default: 0:5:11).")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    trust_model: Annotated[bool, TRUST] = False,
    model_file: Annotated[Path | None, MODEL_FILE] = None,
) -> None:
    """Write potential, acceleration, density, enclosed mass and circular speed with quantiles (ECSV, units).

    Of an axisymmetric potential against the radius in the plane z = 0, with vertical force and surface density at 1.1
    kpc, frequencies and flattenings. With --plane potential, density and acceleration at every (R, z).

    Example: `bayespot predict run --radii 0.1:80:60 -o fields.ecsv`

    Example: `bayespot predict run --plane --radii 1:20:20 --heights 0:3:7 -o plane.ecsv`
    """
    from bayespot.potential import AXIAL_FIELDS, MERIDIONAL_FIELDS, RADIAL_FIELDS
    from bayespot.progress import Progress
    from bayespot.report.runs import load_run

    if heights is not None and not plane:
        raise ValueError("--heights are those of fields over (R, z): add --plane")
    r = parse_radii(radii)
    z = parse_heights(heights or "0:5:11")
    check_table_place(output, overwrite)
    posterior, _, _ = load_run(run, trust_model=trust_model, model_file=model_file)
    axial = posterior.symmetry == "axisymmetric"
    n_fields = len(MERIDIONAL_FIELDS) if plane else len(RADIAL_FIELDS) + axial * len(AXIAL_FIELDS)
    places = f"{len(r)} x {len(z)} places (R, z)" if plane else f"{len(r)} radii"
    with Progress("lines") as bar:
        bar.stage(f"fields at {places}", posterior.n_draws * n_fields)
        table = posterior.predict_plane(r, z, tick=bar.step) if plane else posterior.predict(r, tick=bar.step)
    write_table(table, output)
    typer.echo(f"{output}: {places}, {posterior.n_draws} draws")


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
    from bayespot.report.figures import draw_figures, run_figures
    from bayespot.report.manifest import register
    from bayespot.report.page import write_page
    from bayespot.report.runs import load_run

    posterior, config, diagnosis = load_run(run, trust_model=trust_model, model_file=model_file)
    _print_report(posterior, config, diagnosis)
    with Progress("lines") as bar:
        bar.stage("figures", sum(1 for _ in run_figures(posterior, diagnosis["elbo"])))
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
    photometry: Annotated[Path | None, typer.Option(help="As in the fit, of stars on the sky.")] = None,
    trust_model: Annotated[bool, TRUST] = False,
    model_file: Annotated[Path | None, MODEL_FILE] = None,
) -> None:
    """Compare the catalogue with catalogues replicated from the posterior (posterior predictive checks).

    Radial profile, velocity dispersions, anisotropy, the symmetry that the stars' directions and orbital planes show,
    and the uniformity of the angles, the mark of a phase-mixed system; replicas pass through the model's errors and
    selection. For an axisymmetric potential the profiles are those in R and |z|, with rotation and the dispersions of
    v_R, v_phi and v_z. Of stars on the sky: histograms and dispersions of the line-of-sight velocities in bins of R,
    and the places of a photometric sample; with a table of what the fit says of the system.

    Example: `bayespot check run stars.ecsv`
    """
    from bayespot.catalog.projected import ProjectedCatalog
    from bayespot.posterior import posterior_predictive, velocity_check
    from bayespot.progress import Progress
    from bayespot.report.runs import load_run, save_predictive

    posterior, config, _ = load_run(run, trust_model=trust_model, model_file=model_file)
    stars = read_fitted(
        run,
        config,
        catalog,
        photometry,
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
        if isinstance(stars, ProjectedCatalog):
            found = velocity_check(posterior, stars, n_draws, seed, tick=bar.step)
            _print_system(posterior.thinned(n_draws), stars)
        else:
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
    from bayespot.report.text import bands_in_columns

    heads = {"circular_speed": "v_c [km/s]", "enclosed_mass": "M(<r) [Msun]", "density": "rho [Msun/kpc3]"}
    place = "r [kpc]"
    if few.symmetry == "axisymmetric":
        heads |= {"vertical_acceleration": "K_z(1.1) [km2/s2/kpc]", "density_flattening": "q(rho)"}
        place = "R [kpc]"
    columns = bands_in_columns(few, r, tuple(heads))
    rows = [[f"{r[i]:.3g}", *(interval(q[:, i]) for q in columns)] for i in range(len(r))]
    print_table(title, [place, *heads.values()], rows)


def _print_system(few: PotentialDraws, stars: ProjectedCatalog) -> None:
    """Print what a fit of stars on the sky says of their system, and its factors J and D."""
    import numpy as np

    from bayespot.posterior import astrophysical_factors, line_of_sight_fields

    half = float(np.median(np.hypot(*stars.sky_positions.T)))
    r = np.sort(np.array([0.15, *(half * np.array([0.5, 1.0, 2.0]))]))
    found = line_of_sight_fields(few, stars, r)
    fields = {name: few.field(name, r) for name in ("enclosed_mass", "density", "density_slope")} | found
    heads = ["M(<r) [Msun]", "rho [Msun/kpc3]", "dln(rho)/dln(r)", "sigma_los [km/s]", "beta"]
    bands = [field.quantile((0.16, 0.5, 0.84)) for field in fields.values()]
    rows = [[f"{r[i]:.3g}", *(interval(q[:, i]) for q in bands)] for i in range(len(r))]
    print_table(f"Median and 68 % interval (half of the stars within {half:.3g} kpc)", ["r [kpc]", *heads], rows)
    if "distance_kpc" in few.meta.get("meta", {}):
        factors = astrophysical_factors(few, [0.1, 0.5])
        logs = [np.quantile(np.log10(part), (0.16, 0.5, 0.84), axis=0) for part in (factors.J, factors.D)]
        rows = [[f"{factors.angles[i]:g}", *(interval(q[:, i]) for q in logs)] for i in range(2)]
        print_table("", ["angle [deg]", "log10 J [GeV2/cm5]", "log10 D [GeV/cm2]"], rows)


def _print_checks(p_values: dict[str, float], warnings: list[str]) -> None:
    typer.echo("posterior predictive p-values: " + ", ".join(f"{name} {p:.2g}" for name, p in p_values.items()))
    typer.echo("\n".join(warnings) or "the replicas look like the catalogue")
