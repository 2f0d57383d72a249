"""Kill (SIGKILL) a fit, an ensemble and a distillation at 20 random moments; --resume ends with the same numbers.

Slow: minutes. Each victim is a command line of its own with other random moments; afterwards the run is that of a
command that nobody interrupted, bit for bit, its checksums hold, and neither temporary files nor locks are left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bayespot import load_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
KILLS = int(os.environ.get("BAYESPOT_KILLS", "20"))
FIT = ["fit", "isochrone", "stars.ecsv", "--svi-steps", "60", "--n-draws", "60", "--n-components", "1"]
ENSEMBLE = [*FIT, "--ensemble", "2", "--jobs", "2"]
DISTILL = ["distill", "whole-fit", "--budget-epochs", "2", "--families", "kepler", "--seed", "1"]
#: A checkpoint every 0.1 s instead of 20 s: more moments to be killed at.
CODE = (
    "import importlib, torch; torch.set_num_threads(1)\n"
    "importlib.import_module('bayespot.inference.fit')._CHECKPOINT_SECONDS = 0.1\n"
    "from bayespot.cli import main; main()\n"
)


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CODE, *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(arguments: list[str], folder: Path) -> float:
    """Run a command to its end; return the seconds that it took."""
    begun = time.monotonic()
    process = start(arguments, folder)
    message = process.communicate()[1]
    assert process.returncode == 0, message
    return time.monotonic() - begun


def kill(arguments: list[str], folder: Path, seconds: float) -> bool:
    """Kill a command, with its workers, after so many seconds; return whether it had ended before."""
    process = start(arguments, folder)
    try:
        process.communicate(timeout=seconds)
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.startswith(".") or p.name.endswith(".partial")]


def resumable(output: Path) -> bool:
    """Whether anything was reached: a checkpoint, or the settings of a distillation."""
    if output.name == "distillation":
        return (output / "settings.json").exists()
    partial = output.with_name(output.name + ".partial")
    return partial.exists() and any(not p.name.startswith(".") for p in partial.iterdir())


def until_done(arguments: list[str], folder: Path, output: Path, seconds: float, random: np.random.Generator) -> int:
    """Kill at random moments, resume each time, and let it end at last; return how many kills met it at work."""
    met = 0
    for _ in range(KILLS):
        resume = ["--resume"] if resumable(output) else []
        if output.exists() and not resume and output.name != "distillation":
            break
        # most moments early enough that work is left for the kills to come
        met += not kill([*arguments, *resume], folder, float(random.uniform(0.1, 1.0)) * seconds)
    if resumable(output) or not output.exists():
        finish([*arguments, *(["--resume"] if resumable(output) else [])], folder)
    return met


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    finish(["simulate", "isochrone", "--n-stars", "300", "--seed", "1", "-o", "stars.ecsv"], folder)
    return folder


@pytest.mark.parametrize(("name", "arguments"), [("fit", FIT), ("ensemble", ENSEMBLE)])
def test_killed_fit(desk, name, arguments):
    """Draws to the last bit, the verdict's numbers but for the times, and a folder as of a fit left alone."""
    random = np.random.default_rng(7)
    seconds = finish([*arguments, "-o", f"whole-{name}"], desk)
    met = until_done([*arguments, "-o", f"killed-{name}"], desk, desk / f"killed-{name}", seconds, random)
    assert met >= 1
    (whole, _, one), (killed, _, other) = (load_run(desk / f"{kind}-{name}") for kind in ("whole", "killed"))
    for i in range(whole.n_draws):
        for site, value in whole.source(i)[1].items():
            assert np.array_equal(value, killed.source(i)[1][site]), site
    for member, same in zip(one.get("members", [one]), other.get("members", [other]), strict=True):
        changed = {k for k in member if json.dumps(member[k]) != json.dumps(same[k])}
        # LAPACK rounds by where its arrays happen to lie in memory, which shows in the 16th digit of this one number
        assert changed <= {"seconds", "gradient_norm"}
        assert member["gradient_norm"] == pytest.approx(same["gradient_norm"], rel=1e-9)
    assert not leftovers(desk)


def candidates(folder: Path) -> dict:
    """What a distillation found, but for the time that each search took."""
    found = json.loads((folder / "candidates.json").read_text())
    for search in found["searches"]:
        del search["seconds"]
    return found


def test_killed_distillation(desk):
    """The formulas of a distillation by epochs, in order, with their weights."""
    if not (desk / "whole-fit").exists():
        finish([*FIT, "-o", "whole-fit"], desk)
    random = np.random.default_rng(8)
    output = desk / "whole-fit" / "distillation"
    seconds = finish(DISTILL, desk)
    whole = candidates(output)
    finish([*DISTILL, "--overwrite"], desk)
    assert candidates(output) == whole, "not the same without any kill"
    from bayespot.distill.search import _remove

    _remove(output)
    assert until_done(DISTILL, desk, output, seconds, random) >= 1
    assert candidates(output) == whole
    load_run(desk / "whole-fit")
    assert not leftovers(desk)
