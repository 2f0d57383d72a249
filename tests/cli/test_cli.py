"""The command line end to end: a first session, its errors, and an interrupted fit."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.table import QTable, Table
from contracts.commands import bayespot, in_a_process, quick_figures

from bayespot import Catalog
from bayespot.cli.fitting import builtin_models, fit_to_folder
from bayespot.cli.tables import parse_radii
from bayespot.mock import mock

FAST = ["--svi-steps", "10", "--n-draws", "60", "--n-components", "1"]
GAIA_MODEL = str(Path(__file__).parents[2] / "models" / "gaia_sphere.py")
pytestmark = pytest.mark.filterwarnings("ignore")
OBSERVED = ["ra", "dec", "distance", "pmra", "pmdec", "radial_velocity"]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A folder with a mock catalogue and a finished run."""
    folder = tmp_path_factory.mktemp("session")
    done = bayespot("simulate", "isochrone", "--n-stars", "200", "--seed", "1", "-o", "stars.ecsv", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = in_a_process("fit", "isochrone", "stars.ecsv", "-o", "run", *FAST, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_first_session(session):
    """predict writes an ECSV with units; report says in words what was found and draws it; in a pipe a line per
    stage."""
    done = bayespot("predict", "run", "--radii", "1:30:5", "-o", "fields.ecsv", cwd=session)
    assert done.returncode == 0, done.stderr
    table = QTable.read(session / "fields.ecsv")
    assert len(table) == 5
    assert str(table["circular_speed_q50"].unit) == "km / s"
    with quick_figures(draw=True):
        done = bayespot("report", "run", cwd=session)
    assert done.returncode == 0, done.stderr
    for words in ("200 stars", "k-hat", "v_c [km/s]", "circular_speed.png", "uncertainty_maps.png", "report.html"):
        assert words in done.stdout
    assert [line.split(" ...")[0] for line in done.stderr.splitlines()] == ["figures", "page"]


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
        (("simulate", "bulge", "-o", "a.ecsv"), "disc+halo"),
        (("simulate", "disc", "--anisotropy-radius", "3", "-o", "a.ecsv"), "--anisotropy-radius"),
        (("fit", "isochron", "stars.ecsv", "-o", "new"), "isochrone"),
        (("fit", "isochrone", "none.csv", "-o", "new"), "none.csv"),
        (("fit", "nofile.py", "stars.ecsv", "-o", "new"), "no such model file"),
        (("fit", "isochrone", "stars.ecsv", "-o", "new", "--guide", "wide"), "full_rank"),
        (("fit", "isochrone", "stars.ecsv", "-o", "new", "--resume"), "nothing to resume"),
        (("fit", "isochrone", "stars.ecsv", "-o", "new", "--ensemble", "2", "--resume"), "nothing to resume"),
        (("fit", "isochrone", "stars.ecsv", "-o", "new", "--jobs", "2"), "add --ensemble"),
        (("fit", "spherical", "stars.ecsv", "-o", "new", "--guide", "svgd", "--df-guide", "joint"), "SVGD moves"),
        (("predict", "run", "--radii", "1-30", "-o", "a.ecsv"), "LO:HI:N"),
        (("report", "none"), "not a run folder"),
        (("distill", "run", "--families", "keplr"), "unknown family 'keplr'; choose of kepler"),
        (("distill", "run", "--budget-minutes", "0"), "budget_minutes must be positive"),
        (("distill", "run", "--mode", "median"), "mean or class"),
        (("distill", "none"), "not a run folder"),
        (("distill", "run", "--resume"), "nothing to resume"),
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


@pytest.mark.parametrize(("df", "words"), [("energy", "EnergyDensity, trained in"), ("gaussian", "f(J): 1 components")])
def test_other_densities(session, df, words, monkeypatch):
    """--df replaces the model's f(J), the run is read back, and an unknown name is one message."""
    module = importlib.import_module("bayespot.inference.fit")
    real = module.fit
    monkeypatch.setattr(module, "fit", lambda m, stars, config, **k: real(m, stars, replace(config, df_rounds=1), **k))
    done = bayespot("fit", "isochrone", "stars.ecsv", "-o", f"run_{df}", "--df", df, *FAST, cwd=session)
    assert done.returncode == 0, done.stderr
    done = bayespot("report", f"run_{df}", cwd=session)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    done = bayespot("fit", "isochrone", "stars.ecsv", "-o", "new", "--df", "gauss", cwd=session)
    assert done.returncode == 2
    assert "df must be one of" in done.stderr
    assert "gaussian_lnJ" in done.stderr


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
    assert done.returncode == 2
    for words in ("mine.py", "mine_run/model.py", "--trust-model", "--model-file"):
        assert words in done.stderr
    done = bayespot("report", "mine_run", "--trust-model", cwd=session)
    assert done.returncode == 0, done.stderr
    # elsewhere the class is not in memory
    done = in_a_process("predict", "mine_run", "--trust-model", "-o", "mine.ecsv", cwd=session)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_ensemble_session(session):
    """Two members of a user's model in two processes: a run with a folder per member, weights adding up to one; predict
    and report work on it, the report judges in words, also after a check."""
    (session / "member.py").write_text(
        "from bayespot.models import isochrone\n"
        "from bayespot.potential import Isochrone\n"
        "class Own(Isochrone):\n"
        "    pass\n"
        "def build(catalog):\n"
        "    model = isochrone.build(catalog)\n"
        "    model.potential.__class__ = Own\n"
        "    return model\n"
    )
    done = bayespot(
        "fit", "member.py", "stars.ecsv", "-o", "both", "--ensemble", "2", "--jobs", "2", *FAST, cwd=session
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (session / "both").glob("member-*")) == ["member-0", "member-1"]
    assert not (session / "both.partial").exists()
    assert len(QTable.read(session / "both" / "fields.ecsv")) == 60
    assert (session / "both" / "figures" / "uncertainty_maps.png").exists()
    done = bayespot("predict", "both", "--radii", "1:30:3", "-o", "both.ecsv", "--model-file", "member.py", cwd=session)
    assert done.returncode == 0, done.stderr
    done = bayespot("check", "both", "stars.ecsv", "--n-draws", "50", "--trust-model", cwd=session)
    assert done.returncode == 0, done.stderr
    done = bayespot("report", "both", "--trust-model", cwd=session)
    assert done.returncode == 0, done.stderr
    for words in ("ensemble of 2", "member 1, weight 0.50", "The posterior", "posterior predictive p-values"):
        assert words in done.stdout


@pytest.mark.parametrize(("guide", "words"), [("low_rank", "PSIS k-hat"), ("mean_field", "too narrow by construction")])
def test_guides(session, guide, words):
    """--guide reaches the fit and the report says what that guide can be judged by."""
    name = f"run_{guide}"
    done = bayespot("fit", "isochrone", "stars.ecsv", "-o", name, "--guide", guide, *FAST, cwd=session)
    assert done.returncode == 0, done.stderr
    assert words in bayespot("report", name, cwd=session).stdout


def test_python_dash_m(tmp_path):
    """`python -m bayespot` is the same command; so is its exit status."""

    def run(*arguments):
        # elsewhere than in a checkout, whose folder would be imported in place of the installed package
        command = [sys.executable, "-m", "bayespot", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = run("models")
    assert (done.returncode, "spherical" in done.stdout) == (0, True), done.stderr
    done = run("report", "none")
    assert (done.returncode, "not a run folder" in done.stderr) == (2, True), done.stderr


def test_help_teaches():
    """Every command's help has an example; the models are listed with a line each."""
    done = bayespot("--help", cwd=".")
    assert "• bayespot fit spherical stars.ecsv -o run" in map(str.strip, done.stdout.splitlines())
    for command in ("simulate", "forecast", "fit", "predict", "report", "check", "distill", "demo"):
        shown = bayespot(command, "--help", cwd=".").stdout
        assert "Example:" in shown
        assert "\N{HUNDRED POINTS SYMBOL}" not in shown  # what the help makes of ":100:"
    assert set(builtin_models()) == {
        "axisymmetric", "disc_and_halo", "isochrone", "spherical", "milky_way_globular_clusters", "gaia_sphere",
        "unknown_selection", "dwarf_spheroidal",
    }  # fmt: skip
    assert all(builtin_models().values())


def test_parse_radii():
    """Log-spaced, both ends included."""
    assert parse_radii("1:100:3").tolist() == pytest.approx([1, 10, 100])
    for text in ("1:2", "0:10:5", "5:1:3", "1:10:0"):
        with pytest.raises(ValueError, match="--radii"):
            parse_radii(text)


def test_interrupted_fit_goes_on(session, monkeypatch, capsys):
    """Ctrl-C in SVI: status 130, a hint, a checkpoint and no run; refused without --resume, finished with it."""
    import typer

    from bayespot import Catalog, FitConfig
    from bayespot.inference import svi as variational

    folder = session / "stopped"
    stars = Catalog.read(session / "stars.ecsv")
    config = FitConfig(seed=2, n_components=1, svi_steps=20, n_draws=50, k_hat_draws=25)
    mix, calls = variational.step_seed, iter(range(1000))

    def interrupt(seed: int, step: int) -> int:
        if next(calls) == 15:
            raise KeyboardInterrupt
        return mix(seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(variational, "step_seed", interrupt)
        with pytest.raises(typer.Exit) as stopped:
            fit_to_folder("isochrone", stars, config, folder)
    assert stopped.value.exit_code == 130
    assert "--resume" in capsys.readouterr().err
    assert not folder.exists()
    assert (session / "stopped.partial" / "checkpoint.safetensors").exists()
    with pytest.raises(ValueError, match=r"interrupted fit.*--resume"):
        fit_to_folder("isochrone", stars, config, folder)
    posterior = fit_to_folder("isochrone", stars, config, folder, resume=True)
    assert posterior.n_draws == 50
    assert not (session / "stopped.partial").exists()


def test_stars_of_a_selection_that_is_not_known(session, tmp_path):
    """Stars of one half of space, which surround no centre, are fitted given their positions; the report says what was
    done, and that the bands are not to be trusted."""
    stars = Catalog.read(session / "stars.ecsv")
    stars[stars.x[:, 0] > 0].write(tmp_path / "half.ecsv")
    done = bayespot("fit", "unknown_selection", "half.ecsv", "-o", "run", "--guide", "laplace", *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "take guide marginal with df logistic_gp" in done.stderr
    done = bayespot("report", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the likelihood is that of velocities given positions" in done.stdout
    assert "The posterior is not to be trusted" in done.stdout


def test_a_dwarf_on_the_sky(tmp_path):
    """Members with ra, dec and radial velocities: a run and its report; what is missing is named by its option."""
    true = mock("dwarf-in-nfw", n_stars=150, seed=3)
    x, y, v = (part.numpy() for part in (true.x[:, 0], true.x[:, 1], true.v[:, 2]))
    per_kpc = np.degrees(1 / 80.0)
    dec = 10 + per_kpc * y
    table = Table({"ra": 150 + per_kpc * x / np.cos(np.radians(dec)), "dec": dec, "radial_velocity": v + 223.0})
    table["radial_velocity_error"] = 2.0
    table.write(tmp_path / "members.csv")
    fit = ("fit", "dwarf_spheroidal", "members.csv", "-o", "run")
    done = bayespot(*fit, cwd=tmp_path)
    assert done.returncode != 0
    assert "--distance" in done.stderr
    done = bayespot(*fit, "--distance", "80", "--centre", "10", cwd=tmp_path)
    assert "--centre takes RA,DEC" in done.stderr
    done = bayespot(*fit, "--distance", "80", "--centre", "158,10", cwd=tmp_path)
    assert "the centre is wrong" in done.stderr
    table["ra", "dec"].write(tmp_path / "places.csv")
    known = ("--distance", "80", "--distance-error", "4", "--photometry", "places.csv")
    done = bayespot(*fit, *known, "--guide", "laplace", *FAST[:2], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "without places it has not been measured" in done.stderr
    done = bayespot("check", "run", "members.csv", "--n-draws", "50", cwd=tmp_path)
    assert "has 150 stars, run was fitted to 300" in done.stderr
    done = bayespot("check", "run", "members.csv", "--photometry", "places.csv", "--n-draws", "50", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("velocities", "counts", "sigma_los", "log10 J"):
        assert said in done.stdout
    assert (tmp_path / "run" / "figures" / "predictive.png").exists()
    done = bayespot("report", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of line-of-sight velocities given places on the sky" in done.stdout


@pytest.fixture(scope="module")
def gaia(tmp_path_factory):
    """A folder with a mock of the whole sky and one with the cuts of models/gaia_sphere.py."""
    folder = tmp_path_factory.mktemp("gaia")
    cuts = ("--max-distance", "10", "--min-latitude", "15")
    for name, n, options in (("whole.fits", "100", ()), ("mock_gaia.fits", "800", cuts)):
        arguments = ("simulate", "isochrone", "--n-stars", n, "--seed", "4", "--observed", *options, "-o", name)
        done = bayespot(*arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def heliocentric_columns(path: Path) -> Table:
    """The observed columns and their errors, as a survey's table has them, without the mock's words about itself."""
    table = Table.read(path)
    table.meta.clear()
    return table[[c for c in table.colnames if c.removesuffix("_error") in OBSERVED]]


def test_simulated_survey(gaia):
    """The cuts hold in the file's own columns: all observed distances below 10 kpc, some beyond 9, no star within 14.8
    deg of the Galactic plane (the model's plane is tilted against it by 0.15 deg); errors are those asked for."""
    from astropy import units as u
    from astropy.coordinates import SkyCoord

    table = QTable.read(gaia / "mock_gaia.fits")
    assert 50 < len(table) < 300
    assert table["distance"].max() < 10 * u.kpc
    assert table["distance"].max() > 9 * u.kpc
    b = SkyCoord(table["ra"], table["dec"]).galactic.b
    assert abs(b).min() > 14.8 * u.deg
    assert np.allclose(table["distance_error"] / table["distance"], 0.1)
    assert np.allclose(table["pmra_error"].to_value("mas/yr"), 0.05)
    assert np.allclose(table["radial_velocity_error"].to_value("km/s"), 2.0)
    assert QTable.read(gaia / "whole.fits")["distance"].max() > 10 * u.kpc


def test_gaia_like_fit(gaia):
    """From heliocentric columns of 60 stars alone, some without radial velocity: refused with the remedy, fitted with
    --allow-missing; the report says how many error samples count and what fraction the selection keeps."""
    table = heliocentric_columns(gaia / "mock_gaia.fits")[:60]
    table["radial_velocity"][:5] = np.nan
    table.write(gaia / "columns.fits")
    done = bayespot("fit", GAIA_MODEL, "columns.fits", "-o", "run", *FAST, cwd=gaia)
    assert done.returncode == 2
    for words in ("column radial_velocity: 5 of", "row 0", "--allow-missing"):
        assert words in done.stderr
    assert not (gaia / "run").exists()
    few = ("--svi-steps", "4", "--n-draws", "30", "--n-components", "1")
    done = bayespot("fit", GAIA_MODEL, "columns.fits", "-o", "run", "--allow-missing", *few, cwd=gaia)
    assert done.returncode == 0, done.stderr
    with quick_figures(draw=True):
        done = bayespot("report", "run", cwd=gaia)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert "effective samples per star" in done.stdout
    assert "of the population is in the catalogue" in done.stdout
    fraction = float(words[words.index("selection:") + 1])
    # 17 % of the mock's stars pass the cuts; the fit knows only those that did
    assert 5 < fraction < 40


def test_gaia_like_errors(gaia):
    """Stars that the model's selection rejects, a covariance that is not positive definite, S = 1.5, missing radial
    velocities in a model without errors, stars on one side in a model without selection: status 2, one message with
    the culprit and the remedy, no run."""
    broken = Table.read(gaia / "mock_gaia.fits")
    broken["cov_x_y"][3] = 10 * broken["cov_x_x"][3]
    broken.write(gaia / "broken.fits")
    lost = heliocentric_columns(gaia / "whole.fits")
    lost["radial_velocity"][7] = np.nan
    lost.write(gaia / "lost.fits")
    far = Table.read(gaia / "whole.fits")[["x", "y", "z", "vx", "vy", "vz"]]
    far["x"] += 40.0
    far.write(gaia / "far.fits")
    (gaia / "wrong.py").write_text(
        "from bayespot import *\n"
        "from bayespot.likelihood.selection import Custom\n"
        "def s(x, v):\n"
        "    return 1.5 + 0 * x[..., 0]\n"
        "def build(catalog):\n"
        "    return SnapshotModel(MassSlopeNetwork.for_stars(catalog.w), SphericalMixture(), selection=Custom(s))\n"
    )
    (gaia / "plain.py").write_text(
        "from bayespot import *\n"
        "def build(catalog):\n"
        "    return SnapshotModel(MassSlopeNetwork.for_stars(catalog.w), SphericalMixture())\n"
    )
    for model, catalog, options, words in (
        (GAIA_MODEL, "whole.fits", (), ("rejects", "in row", "correct the selection or drop those stars")),
        (GAIA_MODEL, "broken.fits", (), ("broken.fits", "not positive definite", "in row 3", "or drop the star")),
        ("wrong.py", "mock_gaia.fits", (), ("S = 1.5", "between 0 and 1", "normalise or clamp it")),
        ("plain.py", "lost.fits", ("--allow-missing",), ("1 of 100 stars have no", "MeasurementErrors")),
        ("isochrone", "lost.fits", ("--allow-missing", "--ignore-errors"), ("1 of 100 stars lack", "drop those stars")),
        (GAIA_MODEL, "whole.fits", ("--ignore-errors",), ("rejects", "in row")),
        ("isochrone", "far.fits", (), ("do not look Galactocentric", "declare the model's selection")),
    ):
        done = bayespot("fit", model, catalog, "-o", "bad", *FAST, *options, cwd=gaia)
        assert done.returncode == 2, (catalog, done.stderr)
        for text in words:
            assert text in done.stderr, (text, done.stderr)
        assert "Traceback" not in done.stderr
        assert not (gaia / "bad").exists()
    done = bayespot("simulate", "isochrone", "--max-distance", "10", "-o", "new.fits", cwd=gaia)
    assert done.returncode == 2
    assert "add --observed" in done.stderr
