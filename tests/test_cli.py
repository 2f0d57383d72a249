"""The command line end to end in subprocesses: a first session, its errors, and an interrupted fit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from astropy.table import QTable

from bayespot.cli import _builtin_models, parse_radii

FAST = ["--svi-steps", "10", "--n-draws", "60", "--n-components", "1"]


def bayespot(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    code = "import torch; torch.set_num_threads(1); from bayespot.cli import main; main()"
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "NO_COLOR": "1", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A folder with a mock catalogue and a finished run."""
    folder = tmp_path_factory.mktemp("session")
    done = bayespot("simulate", "isochrone", "--n-stars", "400", "--seed", "1", "-o", "stars.ecsv", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = bayespot("fit", "isochrone", "stars.ecsv", "-o", "run", *FAST, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_first_session(session):
    """predict writes an ECSV with units; report says in words what was found; progress is silent in a pipe."""
    done = bayespot("predict", "run", "--radii", "1:30:5", "-o", "fields.ecsv", cwd=session)
    assert done.returncode == 0, done.stderr
    table = QTable.read(session / "fields.ecsv")
    assert len(table) == 5
    assert str(table["circular_speed_q50"].unit) == "km / s"
    done = bayespot("report", "run", cwd=session)
    assert done.returncode == 0, done.stderr
    for words in ("400 stars", "k-hat", "v_c [km/s]", "circular_speed.png"):
        assert words in done.stdout
    assert done.stderr == ""


def test_existing_files_are_kept(session):
    """Nothing is overwritten without being told to."""
    for arguments in (
        ("simulate", "plummer", "--n-stars", "10", "-o", "stars.ecsv"),
        ("fit", "isochrone", "stars.ecsv", "-o", "run", *FAST),
        ("predict", "run", "-o", "stars.ecsv"),
    ):
        done = bayespot(*arguments, cwd=session)
        assert done.returncode == 2
        assert "exists" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("simulate", "disc", "-o", "a.ecsv"), "disc"),
        (("fit", "isochron", "stars.ecsv", "-o", "new"), "isochrone"),
        (("fit", "isochrone", "none.csv", "-o", "new"), "none.csv"),
        (("fit", "nofile.py", "stars.ecsv", "-o", "new"), "no such model file"),
        (("fit", "isochrone", "stars.ecsv", "-o", "new", "--guide", "wide"), "full_rank"),
        (("fit", "isochrone", "stars.ecsv", "-o", "new", "--resume"), "nothing to resume"),
        (("predict", "run", "--radii", "1-30", "-o", "a.ecsv"), "LO:HI:N"),
        (("report", "none"), "not a run folder"),
    ],
)
def test_errors_are_one_message(session, arguments, words):
    """Exit status 2, one message with the offending word and the remedy, no traceback, nothing written."""
    before = sorted(p.name for p in session.iterdir())
    done = bayespot(*arguments, cwd=session)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in session.iterdir()) == before


def test_user_model(session):
    """A model file with its own potential class is fitted, and its run is read back from another folder."""
    (session / "mine.py").write_text(
        "import torch\n"
        "from pyro.distributions import LogNormal\n"
        "from bayespot import Potential, SnapshotModel, SphericalMixture\n"
        "from bayespot.units import G\n"
        "class Mine(Potential):\n"
        "    symmetry = 'spherical'\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self._set_parameter('m', LogNormal(torch.tensor(25.3).double(), torch.tensor(1.0).double()))\n"
        "    def phi(self, x):\n"
        "        return -G * self.m / (3.0 + (9.0 + (x**2).sum(-1)).sqrt())\n"
        "def build(catalog):\n"
        "    return SnapshotModel(Mine(), SphericalMixture())\n"
    )
    done = bayespot("fit", "mine.py", "stars.ecsv", "-o", "mine_run", *FAST, cwd=session)
    assert done.returncode == 0, done.stderr
    (session / "mine.py").unlink()
    done = bayespot("report", "mine_run", cwd=session)
    assert done.returncode == 0, done.stderr


def test_help_teaches():
    """Every command's help has an example; the models are listed with a line each."""
    done = bayespot("--help", cwd=".")
    assert "bayespot fit spherical stars.ecsv -o run" in done.stdout
    for command in ("simulate", "fit", "predict", "report", "demo"):
        assert "Example:" in bayespot(command, "--help", cwd=".").stdout
    assert set(_builtin_models()) == {"isochrone", "spherical", "milky_way_globular_clusters", "gaia_sphere"}
    assert all(_builtin_models().values())


def test_parse_radii():
    """Log-spaced, both ends included."""
    assert parse_radii("1:100:3").tolist() == pytest.approx([1, 10, 100])
    for text in ("1:2", "0:10:5", "5:1:3", "1:10:0"):
        with pytest.raises(ValueError, match="--radii"):
            parse_radii(text)


def test_interrupted_fit_goes_on(session, monkeypatch, capsys):
    """Ctrl-C in SVI: status 130, a hint, a checkpoint and no run; refused without --resume, finished with it."""
    import typer

    from bayespot import Catalog, FitConfig, inference
    from bayespot.cli import _fit_to_folder

    folder = session / "stopped"
    stars = Catalog.read(session / "stars.ecsv")
    config = FitConfig(seed=2, n_components=1, svi_steps=20, n_draws=50, k_hat_draws=25)
    mix, calls = inference._mix, iter(range(1000))

    def interrupt(seed: int, step: int) -> int:
        if next(calls) == 15:
            raise KeyboardInterrupt
        return mix(seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(inference, "_mix", interrupt)
        with pytest.raises(typer.Exit) as stopped:
            _fit_to_folder("isochrone", stars, config, folder)
    assert stopped.value.exit_code == 130
    assert "--resume" in capsys.readouterr().err
    assert not folder.exists()
    assert (session / "stopped.partial" / "checkpoint.pt").exists()
    with pytest.raises(ValueError, match=r"interrupted fit.*--resume"):
        _fit_to_folder("isochrone", stars, config, folder)
    posterior = _fit_to_folder("isochrone", stars, config, folder, resume=True)
    assert posterior.n_draws == 50
    assert not (session / "stopped.partial").exists()
