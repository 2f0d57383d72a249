"""Commands as a user gives them, in a process of their own or in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from unittest.mock import patch

from bayespot import cli


def in_a_process(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    code = "import torch; torch.set_num_threads(1); from bayespot.cli import main; main()"
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
