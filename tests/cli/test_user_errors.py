"""What a user meets when something is wrong: every message says what, where and what to do, and nothing half-written
is left. Commands run in this process through `bayespot.cli.main`, but for the interrupted one.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table

from bayespot import Catalog, Isochrone, cli
from bayespot.cli.fitting import fit_to_folder
from bayespot.files import WriteError, replacing, write_folder
from bayespot.inference import FitConfig
from bayespot.storage import read

FAST = ["--svi-steps", "10", "--n-draws", "60", "--n-components", "1"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with a mock catalogue and a finished run."""
    folder = tmp_path_factory.mktemp("desk")
    here = os.getcwd()
    os.chdir(folder)
    try:
        for arguments in (
            ["simulate", "isochrone", "--n-stars", "300", "--seed", "1", "-o", "stars.ecsv"],
            ["fit", "isochrone", "stars.ecsv", "-o", "run", *FAST],
        ):
            assert call(*arguments) == 0
    finally:
        os.chdir(here)
    return folder


def call(*arguments: str) -> int:
    """Run a command; return its exit status."""
    kept = sys.argv
    sys.argv = ["bayespot", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = kept
    return 0


@pytest.fixture
def refused(desk, monkeypatch, capsys):
    """A function that runs a command in the folder, wants status 2, one line of message and no new file."""
    monkeypatch.chdir(desk)

    def run(*arguments: str, status: int = 2) -> str:
        before = sorted(p.relative_to(desk) for p in desk.rglob("*"))
        assert call(*arguments) == status
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert message.splitlines()[-1].startswith("bayespot: "), message
        assert sorted(p.relative_to(desk) for p in desk.rglob("*")) == before
        return message

    return run


def bare(desk: Path, name: str, **changes) -> None:
    """Write the mock's columns without units to a CSV file, some of them changed."""
    table = Table.read(desk / "stars.ecsv")
    columns = {c: np.asarray(table[c]) for c in ("x", "y", "z", "vx", "vy", "vz")}
    Table({c: changes.get(c, lambda x: x)(value) for c, value in columns.items()}).write(desk / name, overwrite=True)


def test_wrong_units(desk, refused, capsys):
    """A unit that is none of the quantity's names the column; velocities in m/s without units are faster than light or
    doubted with the remedy."""
    table = Table.read(desk / "stars.ecsv")
    table["x"].unit = "km / s"
    table.write(desk / "speed.ecsv")
    message = refused("fit", "isochrone", "speed.ecsv", "-o", "new", *FAST)
    for words in ("speed.ecsv", "column x", "km / s", "kpc", "convert or correct"):
        assert words in message
    bare(desk, "fast.csv", vx=lambda v: v * 1e4, vy=lambda v: v * 1e4)
    message = refused("fit", "isochrone", "fast.csv", "-o", "new", *FAST)
    for words in ("fast.csv", "faster than light", "in row", "km/s"):
        assert words in message


def test_wrong_kind_of_file(desk, refused):
    """A picture, a letter, a folder, a file with another's suffix: the file and what it should be."""
    (desk / "picture.png").write_bytes((desk / "run" / "figures" / "density.png").read_bytes())
    (desk / "picture.csv").write_bytes((desk / "picture.png").read_bytes())
    (desk / "letter.csv").write_text("Dear reader,\nthis is no table\n")
    (desk / "fake.fits").write_text("x,y,z\n1,2,3\n")
    for name, words in (
        ("picture.png", ("unknown suffix '.png'", ".ecsv")),
        ("picture.csv", ("not a readable csv file", "wrong suffix")),
        ("letter.csv", ("missing columns x, y, z", "rename or add")),
        ("fake.fits", ("not a readable fits file", "wrong suffix")),
        ("run", ("is a folder", "give a file")),
    ):
        message = refused("fit", "isochrone", name, "-o", "new", *FAST)
        for text in (name, *words):
            assert text in message, message


def test_swapped_arguments(refused):
    """The catalogue where the model should be: the models are listed."""
    message = refused("fit", "stars.ecsv", "isochrone", "-o", "new", *FAST)
    for words in ("unknown model 'stars.ecsv'", "spherical", "MODEL CATALOG"):
        assert words in message


def test_too_few_stars(desk, refused):
    """Fewer stars than parameters: both numbers, and how many to add."""
    Table.read(desk / "stars.ecsv")[:5].write(desk / "few.csv")
    for model in ("isochrone", "spherical"):
        message = refused("fit", model, "few.csv", "-o", "new", *FAST)
        for words in ("5 stars", "free parameters", "add at least"):
            assert words in message
    assert not (desk / "new.partial").exists()


def test_version(capsys):
    """--version is the package's."""
    import bayespot

    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == f"bayespot {bayespot.__version__}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("simulate", "Isochrone", "-o", "new.csv"), ("'Isochrone'", "'isochrone' is meant?")),
        (("simulate", "isochrone", "--n-stars", "100000000000", "-o", "new.csv"), ("n_stars = 1e+11", "4.8e+03 GB")),
        (("fit", "Spherical", "stars.ecsv", "-o", "new"), ("unknown model 'Spherical'; spherical is meant?",)),
        (("fit", "isochrone", "stars.ecsv", "-o", "new", "--r-sun", "8122"), ("--r-sun 8122 kpc", "8.122")),
        (("fit", "isochrone", "stars.ecsv", "-o", "new", "--v-sun", "220"), ("--v-sun takes VX,VY,VZ", "'220'")),
        (
            ("fit", "isochrone", "stars.ecsv", "-o", "new", "--hdu", "2"),
            ("--hdu 2 chooses", "ascii.ecsv", "leave it out"),
        ),
        (("fit", "isochrone", "one.csv", "-o", "new"), ("1 stars", "add at least")),
    ],
)
def test_numbers_and_names_that_cannot_be(desk, refused, arguments, words):
    """Capitals, too many stars, one star, a Sun in other units, a table of a file with one: one sentence each."""
    Table.read(desk / "stars.ecsv")[:1].write(desk / "one.csv", overwrite=True)
    message = refused(*arguments)
    for text in words:
        assert text in message, message


@pytest.mark.parametrize("command", [("simulate", "isochrone"), ("fit", "isochrone", "stars.ecsv")])
def test_seeds_below_zero(desk, monkeypatch, capsys, command):
    """A seed below 0 is refused by its option's name."""
    monkeypatch.chdir(desk)
    assert call(*command, "--seed", "-1", "-o", "new") == 2
    message = capsys.readouterr().err
    assert "--seed" in message
    # as this version of Typer puts it, or another
    assert re.search(r"-1 is not in the range x>=0|greater than or equal to 0", message)


def test_notes_before_the_fit(desk, monkeypatch, capsys):
    """What is odd about the stars is said with the command line's options; those options do what they say; the Sun of
    the options is the catalogue's."""
    monkeypatch.chdir(desk)
    from astropy.table import vstack

    table = Table.read(desk / "stars.ecsv")
    table.meta.clear()
    vstack([table, table[:4]]).write(desk / "twice.csv", overwrite=True)
    fitted = []
    monkeypatch.setattr("bayespot.cli.fitting.fit_to_folder", lambda _, stars, *__, **___: fitted.append(stars))
    assert call("fit", "isochrone", "twice.csv", "-o", "new") == 0
    note = capsys.readouterr().err
    assert "note: 4 of 304 rows repeat a star" in note
    assert "keep one of each with --drop-duplicates" in note
    assert call("fit", "isochrone", "twice.csv", "-o", "new", "--drop-duplicates", "--r-sun", "8.3") == 0
    assert "4 of 304 rows dropped as copies" in capsys.readouterr().err
    assert [len(stars) for stars in fitted] == [304, 300]
    assert fitted[1].frame.r_sun == 8.3


def test_unbound_stars(desk, refused):
    """A model whose mass is far too small to bind any star: a failed fit, with status 1, says how many and what to
    check; nothing is left to resume."""
    (desk / "light.py").write_text(
        "import torch\n"
        "from pyro.distributions import LogNormal\n"
        "from bayespot import Isochrone, SnapshotModel, SphericalMixture\n"
        "def build(catalog):\n"
        "    size = LogNormal(torch.tensor(1.0).double(), torch.tensor(0.1).double())\n"
        "    return SnapshotModel(Isochrone(1e6, size), SphericalMixture())\n"
    )
    message = refused("fit", "light.py", "stars.ecsv", "-o", "new", *FAST, status=1)
    for words in ("300 of 300 stars stay unbound", "units (kpc, km/s)", "prior of the mass"):
        assert words in message, message


def test_implausible_units_are_noted(desk, monkeypatch, capsys):
    """Bare metres per second too slow for light speed: the fit goes on, with a note that asks for the unit."""
    monkeypatch.chdir(desk)
    bare(desk, "metres.csv", vx=lambda v: v * 100, vy=lambda v: v * 100, vz=lambda v: v * 100)
    monkeypatch.setattr("bayespot.cli.fitting.fit_to_folder", lambda *_, **__: None)
    assert call("fit", "isochrone", "metres.csv", "-o", "metres") == 0
    note = capsys.readouterr().err
    for words in ("note: ", "median speed", "m/s", "Give the units"):
        assert words in note


def test_expanding_system(desk, monkeypatch, capsys):
    """Stars that all move outward are fitted, with a note and a verdict that the system is not phase-mixed."""
    monkeypatch.chdir(desk)
    table = Table.read(desk / "stars.ecsv")
    x, v = (np.stack([np.asarray(table[c]) for c in names], -1) for names in (("x", "y", "z"), ("vx", "vy", "vz")))
    outward = (x * v).sum(-1, keepdims=True)
    v = np.where(outward < 0, v - 2 * outward * x / (x**2).sum(-1, keepdims=True), v)
    Table(np.hstack([x, v]), names=["x", "y", "z", "vx", "vy", "vz"]).write(desk / "outward.csv")
    assert call("fit", "isochrone", "outward.csv", "-o", "outward", *FAST) == 0
    assert "angles" in capsys.readouterr().err
    assert call("report", "outward") == 0
    shown = capsys.readouterr().out
    assert "not to be trusted" in shown
    assert "Verdict: not to be trusted" in (desk / "outward" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: edit(run / "config.json", bayespot_run=9), ("config.json", "run format 9", "fit again")),
        (lambda run: (run / "config.json").write_text('{"format": 1}'), ("run format 1", "pickle", "fit again")),
        (lambda run: edit(run / "config.json", model="spherical"), ("config.json was changed", "restore it")),
        (lambda run: edit(run / "diagnostics.json", k_hat=0.1), ("diagnostics.json", "was changed", "fit again")),
        (lambda run: (run / "model.safetensors").unlink(), ("model.safetensors is missing", "fit again")),
        (lambda run: (run / "model.safetensors").write_bytes(b"PK\x03\x04rest"), ("model.safetensors is damaged",)),
        (lambda run: (run / "posterior.nc").write_bytes(b"no"), ("posterior.nc is damaged", "fit again")),
    ],
)
def test_run_of_another_version(desk, tmp_path, refused, damage, words):
    """A run folder that is older, newer, incomplete or damaged: which file, what is wrong, what to do."""
    run = shutil.copytree(desk / "run", tmp_path / "other")
    damage(run)
    message = refused("report", str(run))
    for text in words:
        assert text in message, message


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_places_that_do_not_exist(refused):
    """Output into a missing folder, a folder or a file in the way: the path and the remedy, before any work."""
    message = refused("predict", "run", "-o", "nowhere/fields.ecsv")
    assert "nowhere" in message
    assert "create" in message
    assert "is a folder" in refused("predict", "run", "-o", "run", "--overwrite")
    assert "not a run folder" in refused("report", "stars.ecsv")
    assert "exists" in refused("predict", "run", "-o", "stars.ecsv")
    message = refused("predict", "run", "-o", "fields.fits")
    assert ".ecsv" in message


class FullDisk:
    """Patches writing so that it fails as on a full disk after so many writes."""

    def __init__(self, monkeypatch, after: int = 0) -> None:
        self.left = after
        for name in ("write_bytes", "write_text"):
            monkeypatch.setattr(Path, name, self._failing(getattr(Path, name)))

    def _failing(self, write):
        def failing(path, *arguments, **options):
            if self.left == 0:
                path.touch()  # as a full disk does: an empty file, then the error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= 1
            return write(path, *arguments, **options)

        return failing


def test_full_disk_during_a_fit(desk, monkeypatch, refused):
    """The first checkpoint cannot be written: the place, the reason and the remedy; no run, nothing half-written."""
    with monkeypatch.context() as patch:
        FullDisk(patch)
        message = refused("fit", "isochrone", "stars.ecsv", "-o", "new", *FAST)
    for words in ("new.partial", "No space left on device", "free some space"):
        assert words in message


def test_full_disk_at_the_end(desk, monkeypatch):
    """The run cannot be written after the fit: nothing of it is left but the checkpoint, which --resume takes up."""
    stars = Catalog.read(desk / "stars.ecsv")
    config = FitConfig(seed=2, n_components=1, svi_steps=10, n_draws=50, k_hat_draws=25)
    folder = desk / "full"
    with monkeypatch.context() as patch:
        patch.setattr("bayespot.report.runs.draw_figures", lambda *_: full())
        with pytest.raises(WriteError, match=r"full: cannot be written \(No space left on device\).*--resume"):
            fit_to_folder("isochrone", stars, config, folder)
    assert [p.name for p in desk.iterdir() if "full" in p.name] == ["full.partial"]
    assert [p.name for p in (desk / "full.partial").iterdir()] == ["checkpoint.safetensors"]
    assert fit_to_folder("isochrone", stars, config, folder, resume=True).n_draws == 50
    assert [p.name for p in desk.iterdir() if "full" in p.name] == ["full"]


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_tables_are_written(desk, tmp_path, monkeypatch):
    """predict, simulate, report and to_agama: an old file stays as it was, no temporary file is left."""
    run = shutil.copytree(desk / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    old = {"fields.ecsv": "old", "stars.csv": "old", "a.ini": "old"}
    for name, text in old.items():
        Path(name).write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: full())
        for arguments in (
            ("predict", "run", "-o", "fields.ecsv", "--overwrite"),
            ("simulate", "plummer", "--n-stars", "10", "-o", "stars.csv", "--overwrite"),
            ("report", "run"),
        ):
            assert call(*arguments) == 2
        with pytest.raises(WriteError, match=r"a.ini: cannot be written \(No space left"):
            Isochrone(1e11, 3.0).to_agama("a.ini", overwrite=True)
    assert {name: Path(name).read_text() for name in old} == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ini", "fields.ecsv", "run", "stars.csv"]
    assert not list(run.rglob(".*"))


def half_written(path: Path, code: int) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(code, os.strerror(code))


def test_write_errors(tmp_path):
    """The remedy follows the reason; the error survives the way back from a worker process."""
    path = tmp_path / "a.txt"
    for code, remedy in ((errno.ENOSPC, "free some space"), (errno.EACCES, "may write to"), (errno.EIO, "try again")):
        with pytest.raises(WriteError, match=remedy) as caught:
            half_written(path, code)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert caught.value.errno == code
    words = WriteError.of(path, OSError("Not enough space on disk: requested 960000, available 0"))
    assert "free some space" in str(words)
    nested = WriteError.of(tmp_path, WriteError.of(path, OSError(errno.ENOSPC, "No space left on device")))
    assert str(nested).count("cannot be written (No space left on device)") == 1
    assert path.name not in str(nested)
    with pytest.raises(WriteError, match="nothing is lost"):
        write_folder(tmp_path / "folder", lambda place: full(), "; nothing is lost")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_by_a_signal(desk, whole_fit, monkeypatch):
    """Ctrl-C (SIGINT) in a fit: status 130 and the hint; the same command without --resume is refused, with it the run
    is finished and equals one that was never interrupted."""
    options = ["fit", "isochrone", "stars.ecsv", "--svi-steps", "60", "--n-draws", "40", "--n-components", "1"]
    # as in the other process
    monkeypatch.setattr(importlib.import_module("bayespot.inference.fit"), "fit", whole_fit)
    # a test run in the background ignores SIGINT, and so would its children
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from bayespot.cli import main; main()"
    )
    started = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *options, "-o", "stopped"],
        cwd=desk,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    checkpoint, deadline = desk / "stopped.partial" / "checkpoint.safetensors", time.monotonic() + 300
    stage = ""
    while stage != "svi" and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.05)
        if checkpoint.exists():
            stage = read(checkpoint, only="content")["stage"]
    started.send_signal(signal.SIGINT)
    message = started.communicate(timeout=300)[1]
    assert started.returncode == 130, message
    assert "stopped.partial keeps what was reached: repeat with --resume" in message
    assert not (desk / "stopped").exists()
    here = os.getcwd()
    os.chdir(desk)
    try:
        assert call(*options, "-o", "stopped") == 2
        assert call(*options, "-o", "stopped", "--resume") == 0
        assert call(*options, "-o", "whole") == 0
    finally:
        os.chdir(here)
    tables = [Table.read(desk / name / "summary.ecsv") for name in ("stopped", "whole")]
    np.testing.assert_allclose(tables[0]["mean"], tables[1]["mean"], rtol=1e-10)


def test_interrupted_before_a_checkpoint(desk, monkeypatch, capsys):
    """Ctrl-C while nothing has been reached promises nothing, and leaves nothing in the way."""
    import typer

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("bayespot.inference.fit"), "fit", interrupt)
    with pytest.raises(typer.Exit) as stopped:
        fit_to_folder("isochrone", Catalog.read(desk / "stars.ecsv"), FitConfig(), desk / "early")
    assert stopped.value.exit_code == 130
    assert "fit again" in capsys.readouterr().err
    assert not list(desk.glob("early*"))
