"""Commands as a user gives them, in a process of their own or in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bayespot import cli
from bayespot.files import replacing
from bayespot.report import plots


def in_a_process(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, but for figures, which are not drawn."""
    code = (
        "import sys, torch; torch.set_num_threads(1); from bayespot.cli import main; sys.path.append(sys.argv.pop(1));"
        "from contracts.commands import quick_figures\nwith quick_figures(): main()"
    )
    arguments = (str(Path(__file__).parents[1]), *arguments)
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "NO_COLOR": "1", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, env=environment, check=False
    )


def bayespot(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which saves the seconds of starting one."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.dict(os.environ, {"NO_COLOR": "1", "COLUMNS": "160"}),
        patch.object(sys, "argv", ["bayespot", *arguments]),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def quick_figures(draw: bool = False) -> Iterator[None]:
    """Have every figure made and its file written, but not drawn: the file is a blank page of its format.

    Drawing eight figures takes 6 s as PNG and 6 s more as PDF; the tests of the report and of the README draw them.
    With ``draw`` the PNG is drawn, coarsely and without a layout.
    """

    def save(figure: Figure, path: Any) -> None:
        if not (draw and Path(path).suffix == ".png"):
            figure = Figure(figsize=(1, 1))
        FigureCanvasAgg(figure)
        figure.set_layout_engine("none")
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, dpi=20)

    with patch.object(plots, "save", save):
        yield
