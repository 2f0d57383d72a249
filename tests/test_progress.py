"""Progress in the log of a batch job, and a disk that fills while a file is closed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from bayespot.progress import Progress


def test_one_line_per_stage(capsys):
    """With "lines", and no terminal: each stage with its time; None and False: nothing."""
    with Progress("lines") as bar:
        for name in ("start", "maximum a posteriori"):
            bar.stage(name, 10)
            bar.step("note", 5)
    shown = capsys.readouterr().err
    assert re.fullmatch(r"start \.\.\. \d+\.\d s\nmaximum a posteriori \.\.\. \d+\.\d s\n", shown)
    for show in (None, False):
        with Progress(show) as bar:
            bar.stage("silent")
    assert capsys.readouterr().err == ""


def test_line_of_a_failed_stage(capsys):
    """The line ends, so that the message begins on its own."""

    def fail() -> None:
        with Progress("lines") as bar:
            bar.stage("start")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capsys.readouterr().err.endswith(" s\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files")
@pytest.mark.parametrize("limit", [2000, 20_000])
def test_disk_that_fills_while_netcdf_closes(tmp_path, limit):
    """HDF5 writes most of a file when it is closed: what it raises then is an OSError with the system's reason."""
    code = f"""
import resource, signal, sys, numpy as np
from bayespot.diagnostics import save_netcdf, to_inference_data
data = to_inference_data({{"a": np.random.default_rng(0).normal(size=(1000, 20))}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    save_netcdf(data, sys.argv[1])
except OSError as error:
    print("OSError", error.errno, error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "p.nc")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("OSError"), done.stderr
    assert "too large" in done.stdout
