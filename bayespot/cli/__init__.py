"""The command line: simulate, snapshot, forecast, fit, predict, report, distill, demo; a file per group of commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bayespot.cli.catalogs import in_options
from bayespot.cli.demonstration import demo
from bayespot.cli.fitting import fit, models
from bayespot.cli.forecasting import forecast
from bayespot.cli.formulas import distill
from bayespot.cli.results import check, predict, report
from bayespot.cli.simulation import simulate
from bayespot.cli.snapshots import snapshot

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Infer a galaxy's gravitational potential, with error bars, from one snapshot of stars.

A first session:

- `bayespot simulate isochrone --n-stars 5000 --seed 1 -o stars.ecsv`
- `bayespot fit spherical stars.ecsv -o run`
- `bayespot predict run --radii 0.5:80:50 -o fields.ecsv`
- `bayespot report run`
- `bayespot distill run --budget-minutes 5`
""",
)
_debug = {"on": False}


def _show_version(asked: bool) -> None:
    if asked:
        from bayespot import __version__

        typer.echo(f"bayespot {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    _debug["on"] = debug


# in the order in which the help lists them
for _command in (simulate, snapshot, models, fit, predict, report, check, distill, forecast, demo):
    app.command()(_command)


def main() -> None:
    """Run the command line; an expected error is one message on stderr and exit status 2 (failed fit: 1)."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if _debug["on"]:
            raise
        typer.echo(f"bayespot: {in_options(str(error))}", err=True)
        sys.exit(1 if isinstance(error, RuntimeError) else 2)
