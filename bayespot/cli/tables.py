"""What commands share: tables on the terminal and in files, and the radii that they ask for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from astropy.table import QTable

#: The option of every command that writes one file or folder.
OUTPUT = typer.Option("-o", "--output", help="File or folder to write.")
#: Options of every command that reads a run.
TRUST = typer.Option("--trust-model", help="Run the code of the run's author: its model.py.")
MODEL_FILE = typer.Option("--model-file", help="The model file that the run was made with, if it is your own.")


def parse_radii(text: str) -> Any:
    """Return the log-spaced radii that ``LO:HI:N`` stands for."""
    import numpy as np

    low, high, n = _parts(text, "--radii", "0.1:100:50")
    if not 0 < low <= high < np.inf or n < 1:
        raise ValueError(f"--radii needs 0 < LO <= HI, finite, and N >= 1; got {text!r}")
    return np.geomspace(low, high, n)


def parse_heights(text: str) -> Any:
    """Return the evenly spaced heights that ``LO:HI:N`` stands for."""
    import numpy as np

    low, high, n = _parts(text, "--heights", "0:3:7")
    if not -np.inf < low <= high < np.inf or n < 1:
        raise ValueError(f"--heights needs LO <= HI, finite, and N >= 1; got {text!r}")
    return np.linspace(low, high, n)


def _parts(text: str, option: str, example: str) -> tuple[float, float, int]:
    try:
        low, high, n = text.split(":")
        return float(low), float(high), int(n)
    except ValueError as error:
        raise ValueError(f"{option} takes LO:HI:N, for instance {example} (kpc); got {text!r}") from error


def check_table_place(path: Path, overwrite: bool) -> None:
    """Refuse a place where `write_table` could not write, before the work that it takes to fill it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file name, for instance {path / 'fields.ecsv'}")
    if path.suffix.lower() not in ("", ".ecsv", ".txt"):
        raise ValueError(f"{path}: tables are written as ECSV (text with units); give a name that ends in .ecsv")
    check_file_place(path, overwrite)


def check_file_place(path: Path, overwrite: bool) -> None:
    """Refuse a file that exists, one that a run keeps its results in, and a folder that cannot be written to."""
    from bayespot.files import replacing
    from bayespot.report.manifest import is_run, own_files

    for folder in path.absolute().parents:
        if is_run(folder) and path.absolute() in own_files(folder):
            raise ValueError(
                f"{path} belongs to the run {folder}, which could not be read without it: choose another name"
            )
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass --overwrite")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first")
    trial = path.with_name(f"{path.name}.trial")
    with replacing(trial) as temporary:
        temporary.touch()
    trial.unlink()


def write_table(table: QTable, path: Path) -> None:
    """Write an ECSV file, complete or not at all."""
    from bayespot.files import replacing

    with replacing(path) as temporary:
        table.write(temporary, format="ascii.ecsv", overwrite=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def interval(values: Any) -> str:
    return f"{values[1]:.4g} [{values[0]:.4g}, {values[2]:.4g}]"
