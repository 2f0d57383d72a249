"""Model files that a user has not finished: one sentence each, with the line, before the fit; and places in the way."""

from __future__ import annotations

import sys

import pytest

from bayespot import cli
from bayespot.catalog.catalog import Catalog
from bayespot.cli.fitting import build_model, load_model
from bayespot.cli.tables import check_file_place
from bayespot.mock.sample import mock
from bayespot.report import manifest


@pytest.fixture(scope="module")
def stars() -> Catalog:
    return mock("isochrone", n_stars=30, seed=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build(catalog):\n    pass\n", "returned nothing, not a SnapshotModel: end it with return model"),
        ("def build(catalog):\n    return 3\n", "returned a int"),
        ("def build():\n    return None\n", r"build\(\) must take one argument, the catalogue"),
        ("def build(catalog, prior):\n    return None\n", r"build\(catalog, prior\) must take one argument"),
        (
            "import no_such_module\n",
            "cannot be imported: line 1: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("x = 1\ndef build(catalog:\n", "cannot be imported: line 2: SyntaxError"),
        ("x = 1\n\nraise SystemExit('bye')\n", "cannot be imported: line 3: SystemExit: bye"),
        ("def build(catalog):\n    return catalog.no_such\n", r"build\(catalog\) failed: line 2: AttributeError"),
        ("model = 1\n", r"has no function build\(catalog\)"),
    ],
)
def test_unfinished_model_files(text, words, stars, tmp_path):
    """What is wrong, in which line, and what to do."""
    path = tmp_path / "unfinished.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        build_model(*load_model(str(path)), stars)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_catalogue(tmp_path, monkeypatch, capsys):
    """An NPZ file without content was taken for Ctrl-D: "Aborted."."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stars.npz").touch()
    monkeypatch.setattr(sys, "argv", ["bayespot", "fit", "isochrone", "stars.npz", "-o", "run"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "stars.npz" in message
    assert "empty" in message
    assert [p.name for p in tmp_path.iterdir()] == ["stars.npz"]


def test_catalogue_as_output(tmp_path, monkeypatch, capsys):
    """`fit ... -o stars.ecsv` and `-o` of the catalogue's folder, with --overwrite: refused, the catalogue stays."""
    folder = tmp_path / "thesis"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    mock("isochrone", n_stars=30, seed=0).write(folder / "stars.ecsv")
    content = (folder / "stars.ecsv").read_bytes()
    for place in ("thesis", "thesis/stars.ecsv"):
        arguments = ["fit", "isochrone", "thesis/stars.ecsv", "-o", place, "--overwrite"]
        monkeypatch.setattr(sys, "argv", ["bayespot", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        assert "contains the input thesis/stars.ecsv" in capsys.readouterr().err
    assert (folder / "stars.ecsv").read_bytes() == content
    assert [p.name for p in folder.iterdir()] == ["stars.ecsv"]


def test_outputs_inside_a_run(tmp_path):
    """A table in place of one of a run's files would make the run unreadable."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "fields.ecsv").write_text("r")
    manifest.seal(run, {"model": "isochrone"})
    with pytest.raises(ValueError, match=r"fields\.ecsv belongs to the run"):
        check_file_place(run / "fields.ecsv", True)
    check_file_place(run / "mine.ecsv", False)
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "fields.ecsv"]
