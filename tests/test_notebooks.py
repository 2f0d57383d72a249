"""The notebooks run at small size, and those stored are complete: executed in order, at full size, without errors.

Protocol: every notebook is executed in a kernel and a folder of its own with BAYESPOT_NOTEBOOK_SIZE=small; a cell that
raises fails the test, and so does output on stderr. The stored files are read only: cells numbered from 1 without
gaps, no error, no stderr, no path of a machine, less than 1 MB.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
#: The quickest runs with the default tests, all with `pytest -m "slow or not slow" tests/test_notebooks.py`.
QUICK = ("01_isochrone",)
MAX_BYTES = 1_000_000
#: Folders that are those of a machine, and what is left of a traceback.
MACHINE = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|usr|opt|var|Users|work|mnt|private)/|site-packages|[A-Z]:\\\\|ipykernel_"
)


def _execute():
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("bayespot_notebooks", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


def outputs(notebook):
    """All outputs of a notebook as text and data."""
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebook_runs_at_small_size(name):
    """No cell raises or warns, and figures are drawn."""
    found = outputs(_execute()(name, "small", timeout=600))
    assert [o["text"] for o in found if o["output_type"] == "stream" and o["name"] == "stderr"] == []
    assert sum("image/png" in o.get("data", {}) for o in found) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebook_is_complete(name):
    """Executed in order to the end, without errors, warnings or paths of a machine, and not too large."""
    path = FOLDER / f"{name}.ipynb"
    text = path.read_text()
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    found = outputs(notebook)
    assert all(o["output_type"] != "error" and o.get("name") != "stderr" for o in found)
    assert sum("image/png" in o.get("data", {}) for o in found) >= 2
    without_images = re.sub(r'"image/png": "[^"]*"', "", text)
    assert MACHINE.findall(without_images) == []
    assert len(text) < MAX_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_sizes_come_from_one_variable(name):
    """The first code cell reads BAYESPOT_NOTEBOOK_SIZE in one line, full by default; no other cell does."""
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    line = 'full = os.environ.get("BAYESPOT_NOTEBOOK_SIZE", "full") == "full"'
    assert line in code[0].splitlines()
    assert not any("BAYESPOT_NOTEBOOK_SIZE" in source for source in code[1:])


def imported(tree):
    """Names that a notebook's code imports from bayespot, with the objects behind them."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bayespot":
            module = importlib.import_module(node.module)
            for alias in node.names:
                # a submodule is no attribute of its package until it is imported
                whole = f"{node.module}.{alias.name}"
                value = getattr(module, alias.name, None) or importlib.import_module(whole)
                found[alias.asname or alias.name] = value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_calls_have_arguments_that_exist(name):
    """Functions and classes imported from bayespot, and functions of imported modules, know the keywords they get."""
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # magics of a cell or a line are not Python
    lines = "\n".join(c for c in code if not c.startswith("%%")).splitlines()
    tree = ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))))
    objects, checked = imported(tree), 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in objects:
            target = objects[called.id]
        elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in objects:
            target = getattr(objects[called.value.id], called.attr)
        else:
            continue
        parameters = inspect.signature(target).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        unknown = {k.arg for k in node.keywords if k.arg} - set(parameters)
        assert not unknown, f"{ast.unparse(called)} has no {', '.join(sorted(unknown))}"
        checked += 1
    assert checked >= 3
