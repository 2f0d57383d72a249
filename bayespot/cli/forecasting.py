"""`bayespot forecast`: how well so many stars would constrain a potential."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayespot.cli.fitting import build_model, load_model
from bayespot.cli.tables import check_file_place, check_table_place, parse_radii, print_table, write_table

if TYPE_CHECKING:
    from bayespot.posterior.forecast import Forecast


def forecast(
    model: Annotated[str, typer.Argument(help="Built-in model (`bayespot models`) or a .py file with build(catalog).")],
    n_stars: Annotated[int, typer.Option(min=1, help="Number of stars to forecast for.")] = 10_000,
    system: Annotated[str, typer.Option(help="Simulated system; `bayespot simulate list` shows them.")] = "isochrone",
    n_simulated: Annotated[int, typer.Option(help="Simulated stars that the forecast averages over.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
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
    its prior decides. Models of flattened galaxies (`disc_and_halo`, `axisymmetric`) are for the systems disc, halo and
    disc+halo; radii are those in the plane then.

    Example: `bayespot forecast spherical --system hernquist-in-nfw --n-stars 10000 -o forecast.ecsv`

    Example: `bayespot forecast spherical --accuracy 1 --field circular_speed --radius 8`

    Example: `bayespot forecast disc_and_halo --system disc --n-stars 5000 -o forecast.ecsv`
    """
    import numpy as np

    from bayespot.mock.flattened import GALAXY_STARS, galaxy_mock
    from bayespot.mock.sample import mock
    from bayespot.posterior.forecast import forecast as run_forecast
    from bayespot.progress import Progress

    if output is not None and figure is None:
        figure = output.with_suffix(".png")
    if output is not None:
        check_table_place(output, overwrite)
    if figure is not None:
        check_file_place(figure, overwrite)
    if figure is not None and figure.suffix not in (".png", ".pdf"):
        raise ValueError(f"a figure is a .png or .pdf file, got {figure}")
    module, path = load_model(model)
    draw = galaxy_mock if system in GALAXY_STARS else mock
    with Progress("lines") as bar:
        bar.stage("simulating stars")
        stars = draw(system, n_stars=n_simulated, seed=seed)
        bar.stage("information per star", 1000)
        done = [0]

        def tick(fraction: float) -> None:
            bar.step(n=round(1000 * fraction) - done[0])
            done[0] = round(1000 * fraction)

        found = run_forecast(build_model(module, path, stars), stars, tick)
    low, high = np.quantile(found.stars_r, [0.01, 0.99])
    r = np.geomspace(low, high, 12) if radii is None else parse_radii(radii)
    # all that may be wrong with the options is found before anything is written
    needed = None if accuracy is None else _stars_needed(found, field, radius, accuracy)
    _print_forecast(found, r, n_stars, f"model {model}, {n_stars} stars of {system}")
    if needed:
        typer.echo(needed)
    if found.misfit > 0.1:
        typer.echo(
            f"note: no potential of {model} is close to that of {system}: {_misfit(found)} "
            f"{100 * found.misfit:.0f} % however many the stars; these figures do not contain that",
            err=True,
        )
    if output is not None:
        write_table(found.table(r, n_stars), output)
        typer.echo(f"wrote {output}")
    if figure is not None:
        from bayespot.report import plots

        with plots.style():
            plots.save(plots.forecast_figure(found, np.geomspace(r[0], r[-1], 60), n_stars), figure)
        typer.echo(f"wrote {figure}")


def _misfit(found: Forecast) -> str:
    flattened = "the acceleration of one star in twenty is wrong by more than"
    return flattened if found.flattened else "M(<r) is wrong by up to"


def _print_forecast(found: Forecast, r: Any, n_stars: int, title: str) -> None:
    what = "acceleration at nineteen of twenty stars" if found.flattened else "M(<r) at the stars' radii"
    typer.echo(
        f"{title}; the model's potential is within {100 * found.misfit:.2g} % of the true {what}; "
        f"Monte-Carlo error of the figures {100 * found.monte_carlo_error('circular_speed', r, n_stars, True):.2g} %"
    )
    sd = found.parameters(n_stars)
    if sd:
        names = ", ".join(f"{name.removeprefix('potential.')} {value:.3g}" for name, value in sd.items())
        typer.echo(f"sd of parameters with the prior (of the logarithm of positive ones): {names}")
    short = {"potential": "Phi", "enclosed_mass": "M(<r)", "circular_speed": "v_c", "vertical_acceleration": "K_z"}
    values = [found.relative_sd(name, r, n_stars, prior) for name in found.fields for prior in (False, True)]
    rows = [[f"{r[i]:.3g}", *(_per_cent(100 * value[i]) for value in values)] for i in range(len(r))]
    heads = [f"{short[name]} {kind}" for name in found.fields for kind in ("bound", "+prior")]
    place = "R [kpc]" if found.flattened else "r [kpc]"
    print_table("Relative sd in per cent: the bound with f(J) free, and with the model's prior", [place, *heads], rows)


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
