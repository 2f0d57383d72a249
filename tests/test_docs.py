"""README and documentation: links lead somewhere, Python blocks compile and import, the first-time user's path works.

The path is the README's code block under "Your own stars", run in a fresh folder on a CSV of 300 stars, and the
Python block below it, both with a smaller fit.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from contracts.commands import quick_figures
from contracts.snapshot import write_snapshot
from typer.testing import CliRunner

from bayespot.cli import app
from bayespot.mock import mock

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
#: Commands from the README's top to figures of one's own stars, installation included.
MAX_COMMANDS = 5


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page):
    """Every relative link and image; `path` names of notebooks and folders in backquotes too."""
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:notebooks|tests|models|docs)/[\w/.-]+)`", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_blocks_import(page):
    """Python blocks are valid, and what they import exists."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Import | ast.ImportFrom)]
        exec("\n".join(map(ast.unparse, imports)), {})


#: Numbers that make a page's blocks quick; all else runs as it stands.
QUICK = {
    # the fit with a map is a slow test of its own, test_the_documentation_goes_from_map_to_fit
    "selection=selection)\nposterior = Posterior.from_result(fit(model, catalog, FitConfig(seed=1)))": (
        "selection=selection)\nposterior = Posterior.prior(model, 20, 0)"
    ),
    "FitConfig(seed=1)": (
        "FitConfig(seed=1, n_components=1, adam_steps=10, map_iterations=5, svi_steps=5, n_draws=60, k_hat_draws=25)"
    ),
    "n_stars=20_000": "n_stars=1000",
    "max_stars=20_000": "max_stars=1000",
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with stars.csv and a run of theirs, as the pages suppose."""
    folder = tmp_path_factory.mktemp("docs")
    mock("isochrone", n_stars=300, seed=1).write(folder / "stars.csv")
    quick = ["--svi-steps", "10", "--n-draws", "60", "--n-components", "1"]
    arguments = ["fit", "isochrone", str(folder / "stars.csv"), "-o", str(folder / "run"), *quick]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    w = mock("hernquist", n_stars=2000, seed=1).w.numpy()
    write_snapshot(folder / "snap_099.hdf5", "arepo", {4: w}, n_files=2)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text() and p.name != "README.md"], ids=lambda p: p.stem
)
def test_python_blocks_run(page, desk, monkeypatch):
    """The blocks of a page run one after the other from a clean namespace: what they use they define.

    What stands under ``if __name__ == "__main__"`` (a search of minutes) is checked for its names alone.
    """
    monkeypatch.chdir(desk)
    space: dict[str, object] = {"__name__": "docs"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        for slow, quick in QUICK.items():
            block = block.replace(slow, quick)
        with contextlib.redirect_stdout(None):
            exec(block, space)
        for guarded in [node for node in ast.parse(block).body if isinstance(node, ast.If)]:
            names = [n for n in ast.walk(guarded) if isinstance(n, ast.Name)]
            made = {n.id for n in names if isinstance(n.ctx, ast.Store)} | set(space) | set(dir(builtins))
            assert {n.id for n in names} <= made


@pytest.mark.usefixtures("drawn_figures")
def test_five_commands_to_a_figure(tmp_path, monkeypatch):
    """README top to figures of a posterior on one's own CSV, in at most MAX_COMMANDS commands.

    The fit draws its figures; that the report draws them again, and as PDF, is a test of the report's.
    """
    monkeypatch.chdir(tmp_path)
    mock("isochrone", n_stars=300, seed=1).write("stars.csv")
    section = (ROOT / "README.md").read_text().split("## Your own stars\n")[1].split("\n## ")[0]
    commands = re.findall(r"^    (bayespot .*)$", section, re.M)
    assert 1 + len(commands) <= MAX_COMMANDS
    quick = {"n_components": 1, "adam_steps": 10, "map_iterations": 5, "svi_steps": 5, "n_draws": 60, "k_hat_draws": 25}
    module = importlib.import_module("bayespot.inference.fit")
    fit = module.fit
    monkeypatch.setattr(
        module, "fit", lambda model, stars, config, **options: fit(model, stars, replace(config, **quick), **options)
    )
    for command in commands:
        arguments = shlex.split(command)[1:]
        with contextlib.nullcontext() if arguments[0] == "fit" else quick_figures():
            done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        if arguments[0] == "fit":
            for name in ("circular_speed", "enclosed_mass", "density"):
                assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 10_000
    assert [shlex.split(command)[1] for command in commands] == ["fit", "report"]
    block = re.search(r"```python\n(.*?)```", section, re.S)[1]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    settings = ", ".join(f"{name}={value}" for name, value in quick.items())
    with contextlib.redirect_stdout(None):
        exec(block.replace("FitConfig(seed=1)", f"FitConfig(seed=1, {settings})"), {})
