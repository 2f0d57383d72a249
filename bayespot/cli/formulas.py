"""`bayespot distill`: formulas for a run's potential."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayespot.cli.catalogs import read_fitted
from bayespot.cli.tables import MODEL_FILE, TRUST, print_table

if TYPE_CHECKING:
    from bayespot.distill.result import Distillation


def distill(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    budget_minutes: Annotated[float, typer.Option(help="Wall-clock time of all searches together, minutes.")] = 5.0,
    budget_epochs: Annotated[
        int | None, typer.Option(help="Epochs per search instead: the same result on every run.")
    ] = None,
    families: Annotated[
        str | None, typer.Option(help="Comma-separated families of formulas; `list` shows them.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
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
    drop_invalid: Annotated[bool, typer.Option("--drop-invalid", help="As in the fit, for --catalog.")] = False,
    drop_duplicates: Annotated[bool, typer.Option("--drop-duplicates", help="As in the fit, for --catalog.")] = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="As in the fit, for --catalog.")] = False,
    hdu: Annotated[str | None, typer.Option("--hdu", help="As in the fit, for --catalog.")] = None,
    r_sun: Annotated[float | None, typer.Option("--r-sun", help="As in the fit, for --catalog.")] = None,
    z_sun: Annotated[float | None, typer.Option("--z-sun", help="As in the fit, for --catalog.")] = None,
    v_sun: Annotated[str | None, typer.Option("--v-sun", help="As in the fit, for --catalog.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the searches that are finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier distillation.")] = False,
    trust_model: Annotated[bool, TRUST] = False,
    model_file: Annotated[Path | None, MODEL_FILE] = None,
) -> None:
    """Turn a run's potential into formulas with uncertain constants and weights (symbolic regression with physo).

    Writes table.ecsv, candidates.json, formulas.tex and formulas.png to RUN/distillation.

    Example: `bayespot distill run --budget-minutes 5 --jobs 2 --seed 1`
    """
    from bayespot.distill.grammar import DEFAULT_FAMILIES, FAMILIES, DistillConfig

    if families == "list":
        for family in FAMILIES.values():
            typer.echo(f"{family.name:12s} {' '.join(family.prefix) or '-':14s} {' '.join(family.operators)}")
        return
    names = DEFAULT_FAMILIES if families is None else tuple(name.strip() for name in families.split(","))
    config = DistillConfig(
        seed=seed, families=names, mode=mode, budget_minutes=budget_minutes, budget_epochs=budget_epochs, gauge=gauge
    )
    from bayespot.distill.distill import distill as run_distill
    from bayespot.report.runs import load_run

    posterior, settings, _ = load_run(run, trust_model=trust_model, model_file=model_file)
    stars = None
    if catalog is not None:
        stars = read_fitted(
            run,
            settings,
            catalog,
            drop_invalid=drop_invalid,
            drop_duplicates=drop_duplicates,
            allow_missing=allow_missing,
            hdu=hdu,
            r_sun=r_sun,
            z_sun=z_sun,
            v_sun=v_sun,
        )
    folder = run / "distillation"
    try:
        found = run_distill(
            posterior,
            config,
            folder=folder,
            resume=resume,
            progress="lines",
            catalog=stars,
            jobs=jobs,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {folder} keeps finished searches: repeat with --resume", err=True)
        raise typer.Exit(130) from None
    print_formulas(found)
    typer.echo(f"wrote table.ecsv, candidates.json, formulas.tex and formulas.png to {folder}")


def print_formulas(found: Distillation, most: int = 10) -> None:
    table = found.table()
    rows = []
    for row in table[: min(most, len(found.formulas))]:
        rows.append(
            [row["formula"], f"{row['weight']:.3f}", f"{row['chi2']:.1f}/{row['n_directions']}", row["constants"]]
        )
    print_table("Formulas for Phi(r), r in kpc, Phi in (km/s)^2", ["formula", "weight", "chi2", "constants"], rows)
    if found.ranking is None:
        typer.echo("weights from the posterior of Phi: without the stars' coordinates (--catalog) none from the stars")
    else:
        typer.echo(f"weights from {found.ranking.n_stars} stars with f(J) fitted for every formula")
    typer.echo(found.verdict())
    for failure in found.failures:
        typer.echo(f"note: {failure}", err=True)
