"""Run folders: data instead of code, checksums, what may be replaced, trust; draws come from the prior, no fits."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from pyro.distributions import LogNormal

from bayespot import Isochrone, SnapshotModel, SphericalMixture, load_run, save_run
from bayespot.inference import Diagnostics, FitConfig, FitResult
from bayespot.likelihood.selection import Custom
from bayespot.locks import LockedError, locked
from bayespot.potential.callables import CallablePotential
from bayespot.report import RunError, manifest, model_file, output, runs

pytestmark = pytest.mark.filterwarnings("ignore")

MODEL_FILE = """
from bayespot import Isochrone, SnapshotModel, SphericalMixture
from bayespot.likelihood import MeasurementErrors
from pathlib import Path
Path(__file__).with_name("executed").touch()

class Mine(Isochrone):
    def phi(self, x):
        return 2 * super().phi(x)

def whole_sky(x, v):
    return 0.5 + 0 * x[..., 0]
"""


def result_of(potential, selection=None, n_draws: int = 20) -> FitResult:
    model = SnapshotModel(potential, SphericalMixture(1), selection=selection)
    J = 1000 * torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.df = model.df.resolved(1, J)
    draws = model.sample_prior(n_draws)
    diagnosis = Diagnostics([], 0.1, 0, 0.3, 1, [], 3, {"map": 1.0}, [])
    radii = np.geomspace(0.1, 50, 9).tolist()
    about = {"n_stars": 10, "r_q": radii, "radii": radii, "meta": {}}
    return FitResult(model, draws, {}, FitConfig(n_draws=n_draws), diagnosis, about)


def prior() -> LogNormal:
    return LogNormal(torch.tensor(25.3).double(), torch.tensor(0.3).double())


@pytest.fixture(scope="module")
def result() -> FitResult:
    return result_of(Isochrone(prior(), 3.0))


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures are tested elsewhere, and take seconds."""

    def draw(folder, *_, **__):
        folder.mkdir(exist_ok=True)
        (folder / "potential.png").write_bytes(b"figure")
        return [folder / "potential.png"]

    monkeypatch.setattr(runs, "draw_figures", draw)


@pytest.fixture
def run(result, isochrone_stars, tmp_path) -> Path:
    return save_run(tmp_path / "run", result, isochrone_stars[:100], model_name="isochrone", command="bayespot fit a b")


def reseal(folder: Path, **changes) -> None:
    """Change a configuration as somebody would who knows about checksums."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("checksum")
    files = {name: manifest.file_digest(folder / name) for name in config["files"]}
    manifest.write_config(folder, {**config, "files": files, **changes})


def test_numbers_are_bit_equal(run, result):
    """Draws, density and prior of a run read back are those of the result, to the last bit; no pickle is in it."""
    posterior, _, _ = load_run(run)
    assert posterior.n_draws == 20
    for name, values in result.draws.items():
        assert torch.equal(posterior.draws[name], values)
    own = {name: value[3] for name, value in result.draws.items()}
    w = torch.tensor([[3.0, 1.0, 0.5, 10.0, 80.0, 20.0]], dtype=torch.float64)
    model, values = posterior.source(3)
    assert torch.equal(model.at(values).log_prob(w), result.model.at(own).log_prob(w))
    assert torch.equal(model.log_prior(values), result.model.log_prior(own))
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".pkl")]


def test_flipped_bits_are_refused(run):
    """One flipped bit anywhere in any file that results are read from is refused, and the file named."""
    generator = np.random.default_rng(0)
    load_run(run)
    names = [*manifest.read_config(run)["files"], "config.json"]
    assert {"model.safetensors", "posterior.nc", "stars.npz", "diagnostics.json", "fields.ecsv"} < set(names)
    for name in names:
        path, whole = run / name, (run / name).read_bytes()
        for place in generator.integers(len(whole), size=5):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << generator.integers(8)
            path.write_bytes(damaged)
            with pytest.raises(RunError, match=path.name):
                load_run(run)
        path.write_bytes(whole)
    load_run(run)
    (run / "figures" / "potential.png").write_bytes(b"a better one")
    load_run(run)


def test_file_of_another_run(run, result, isochrone_stars, tmp_path):
    """A posterior copied from another run is refused."""
    draws = {name: 1.01 * value for name, value in result.draws.items()}
    other = save_run(tmp_path / "other", dataclasses.replace(result, draws=draws), isochrone_stars[:100])
    shutil.copy(other / "posterior.nc", run / "posterior.nc")
    with pytest.raises(RunError, match=r"posterior.nc is damaged, was changed, or is of another run"):
        load_run(run)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bayespot.potential.analytic:Isochrone", "subprocess:Popen", "subprocess:Popen"),
        ("bayespot.potential.analytic:Isochrone", "bayespot.report.page:Picture", "report.page:Picture"),
        ('{"distribution": "LogNormal"', '{"distribution": "__init__"', "__init__"),
        ('"class": "bayespot.actions', '"function": "os:system", "class": "bayespot.actions', "os:system"),
    ],
)
def test_classes_off_the_list(run, old, new, words):
    """A description that names another class or function, its checksums made anew, is refused by that name."""
    path = run / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert old in header["__metadata__"]["description"]
    header["__metadata__"]["description"] = header["__metadata__"]["description"].replace(old, new)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    reseal(run)
    with pytest.raises(RunError, match=words):
        load_run(run)


def test_runs_of_format_1(tmp_path):
    """An earlier run is told apart: why it is not read, and the command that makes it again."""
    folder = tmp_path / "old"
    folder.mkdir()
    old = {
        "format": 1,
        "model": "isochrone",
        "command": "bayespot fit isochrone s.csv -o old",
        "fit": {},
        "versions": {},
    }
    (folder / "config.json").write_text(json.dumps(old))
    with pytest.raises(RunError, match=r"run format 1.*pickle.*bayespot fit isochrone s.csv -o old"):
        load_run(folder)
    (folder / "config.json").write_text('{"format": 1, "name": "not of bayespot"}')
    assert not manifest.is_run(folder)


# -- trust ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "theirs" / "mine.py"
    path.parent.mkdir()
    path.write_text(MODEL_FILE)
    return model_file.load_model_module(path), path


@pytest.fixture
def trusted_run(mine, isochrone_stars, tmp_path):
    """A run of a model with a class and a function of its author's; the reader has not imported their file."""
    module, path = mine
    found = result_of(module.Mine(prior(), 3.0), Custom(module.whole_sky, smooth=True))
    folder = save_run(tmp_path / "run", found, isochrone_stars[:100], model_file=path)
    del sys.modules[module.__name__]
    (path.parent / "executed").unlink()
    return folder, found


def test_code_of_others_asks_for_trust(trusted_run, mine, tmp_path):
    """Nothing of the author's runs unless it is trusted or the same file is given; then the numbers are the same."""
    folder, found = trusted_run
    with pytest.raises(RunError, match=r"mine\.py.*run/model\.py.*--trust-model.*--model-file"):
        load_run(folder)
    assert not (folder / "executed").exists()
    changed = tmp_path / "mine.py"
    changed.write_text(MODEL_FILE.replace("2 *", "3 *"))
    with pytest.raises(RunError, match=r"not the file that .* was made with"):
        load_run(folder, model_file=changed)
    posterior, _, _ = load_run(folder, model_file=mine[1])
    assert (mine[1].parent / "executed").exists()
    assert not (folder / "executed").exists()
    own = {name: value[0] for name, value in found.draws.items()}
    r = torch.tensor([4.0], dtype=torch.float64)
    assert torch.equal(posterior.potential_at(0).phi_r(r), found.model.at(own).potential.phi_r(r))
    del sys.modules[mine[0].__name__]
    load_run(folder, trust_model=True)
    assert (folder / "executed").exists()


def test_tampered_model_file(trusted_run):
    """A changed model.py is refused even where it is trusted."""
    folder, _ = trusted_run
    (folder / "model.py").write_text(MODEL_FILE + "\n# more\n")
    with pytest.raises(RunError, match=r"model\.py is damaged, was changed"):
        load_run(folder, trust_model=True)


def test_built_in_classes_in_a_model_file_need_no_trust(isochrone_stars, result, tmp_path):
    """A model file that only puts classes of the package together is kept, and never run."""
    path = tmp_path / "plain.py"
    path.write_text("raise SystemExit('run')\n")
    folder = save_run(tmp_path / "run", result, isochrone_stars[:100], model_file=path)
    assert (folder / "model.py").read_text() == path.read_text()
    load_run(folder)


class Harmonic:
    """A potential of another package, as far as a run can tell."""

    __slots__ = ()

    def __reduce__(self):
        return Harmonic, ()

    def phi(self, x):
        return (x**2).sum(-1) / 2

    def gradient(self, x):
        return x

    def hessian(self, x):
        return np.broadcast_to(np.eye(3), (len(x), 3, 3))


def test_objects_of_other_packages(isochrone_stars, tmp_path):
    """They are kept as pickles, which only trust loads; the message names the class."""
    folder = save_run(tmp_path / "run", result_of(CallablePotential(Harmonic())), isochrone_stars[:100])
    with pytest.raises(RunError, match=r"pickled .*Harmonic.*--trust-model"):
        load_run(folder)
    posterior, _, _ = load_run(folder, trust_model=True)
    assert posterior.potential_at(0).circular_speed(torch.tensor([2.0]).double()).item() == pytest.approx(2.0)


def test_what_cannot_be_stored(result, isochrone_stars, tmp_path):
    """A class of the running script and a lambda are refused when a run is saved, with the part and the remedy."""
    script = """
    import sys, pickle
    from bayespot import Isochrone, save_run, Catalog
    import dataclasses, torch
    sys.path.insert(0, sys.argv[1])
    from bayespot.storage import describe
    class Mine(Isochrone):
        pass
    try:
        describe(Mine(1e11, 3.0))
    except ValueError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, check=True
    )
    for words in ("Mine", "__main__", "file of its own", "import it from there"):
        assert words in done.stdout
    unsavable = dataclasses.replace(result, model=SnapshotModel(Isochrone(1e11, 3.0), SphericalMixture(1)))
    unsavable.model.selection = Custom(lambda x, v: x[..., 0] ** 0)
    with pytest.raises(RunError, match=r"model\.selection\.function is a lambda.*at the top of a \.py file"):
        save_run(tmp_path / "run", unsavable, isochrone_stars[:100])
    assert not list(tmp_path.iterdir())


# -- replacing -----------------------------------------------------------------------------------------------------


def test_only_runs_are_replaced(run, result, isochrone_stars, tmp_path):
    """A folder that is no run, a file, and a run with a file of the user's are refused and stay as they are."""
    stars = isochrone_stars[:100]
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "stars.csv").write_text("x,y,z")
    (thesis / "config.json").write_text('{"model": "of something else", "format": 1}')
    for place in (thesis, thesis / "stars.csv"):
        with pytest.raises(RunError, match=r"not a run of bayespot|is a file"):
            save_run(place, result, stars, overwrite=True)
    assert sorted(p.name for p in thesis.iterdir()) == ["config.json", "stars.csv"]
    (run / "figures" / "mine.png").write_bytes(b"mine")
    (run / ".notes").write_text("mine too")
    with pytest.raises(RunError, match=r"\.notes, figures/mine\.png, which the run did not write"):
        save_run(run, result, stars, overwrite=True)
    load_run(run)
    (run / "figures" / "mine.png").unlink()
    (run / ".notes").unlink()
    (run / "figures" / ".potential.123.png").write_bytes(b"left by a killed process")
    save_run(run, result, stars, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "thesis"]
    empty = tmp_path / "empty"
    empty.mkdir()
    load_run(save_run(empty, result, stars, overwrite=True))


def test_names_that_lead_out_of_a_run(run, result, isochrone_stars, tmp_path):
    """A configuration that counts files outside of the run among its own has none of them removed."""
    outside = tmp_path / "thesis.tex"
    outside.write_text("years of work")
    config = json.loads((run / "config.json").read_text())
    reseal(run, free=[*config["free"], "../thesis.tex", str(outside)])
    save_run(run, result, isochrone_stars[:100], overwrite=True)
    assert outside.read_text() == "years of work"


def test_inputs_inside_the_output(tmp_path):
    """Before the fit: the catalogue as the output, or inside of it."""
    stars = tmp_path / "thesis" / "stars.csv"
    stars.parent.mkdir()
    stars.write_text("x")
    for place in (stars, stars.parent, tmp_path):
        with pytest.raises(RunError, match="contains the input"), output.output_folder(place, True, False, [stars]):
            pass
    assert stars.exists()


def test_unfinished_fits_with_files_of_the_user(tmp_path):
    """Nothing but checkpoints is dropped."""
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "checkpoint.safetensors").write_bytes(b"")
    (partial / "stars.csv").write_text("x")
    with pytest.raises(RunError, match=r"stars\.csv, which no fit wrote"):
        output.check_free(tmp_path / "run", True, False)
    assert len(list(partial.iterdir())) == 2
    (partial / "stars.csv").unlink()
    output.check_free(tmp_path / "run", True, False)
    assert not partial.exists()


def test_nothing_but_a_temporary(tmp_path):
    """A fit that was killed at its first checkpoint left nothing to resume, and is in nobody's way."""
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / ".checkpoint.999999999.safetensors").write_bytes(b"half")
    with output.output_folder(tmp_path / "run", False, False):
        pass
    assert not list(tmp_path.iterdir())


def test_replacement_killed_half_way(run, result, isochrone_stars, tmp_path):
    """Between the two renames: the old run comes back with the next fit."""
    os.rename(run, tmp_path / ".run.old")
    (tmp_path / ".run.999999999").mkdir()
    with pytest.raises(RunError, match="exists"), output.output_folder(run, False, False):
        pass
    load_run(run)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_two_writers(tmp_path):
    """The second is refused with process, host and age of the first; the lock of a killed process is taken over."""
    holder = (
        "import sys, time; from pathlib import Path; from bayespot.locks import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(100)\n"
    )
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", holder, str(folder)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=rf"written by process {first.pid} on .* since \d+ s: wait"),
            locked(folder),
        ):
            pass
    finally:
        first.kill()
        first.wait()
    assert (tmp_path / ".run.lock").exists()
    with locked(folder), pytest.raises(LockedError, match=rf"process {os.getpid()}"), locked(folder):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / ".run.lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": 0.0}))
    with pytest.raises(LockedError, match=r"on elsewhere since .* h: .*delete .*\.run\.lock"), locked(folder):
        pass
