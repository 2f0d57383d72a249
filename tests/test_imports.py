"""The structure: imports point one way, and importing the package is quick and has no side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import bayespot

ROOT = Path(bayespot.__file__).parent
#: A module may import from its own rank or from those before it.
ORDER = [
    ("units", "numerics", "least_squares", "progress", "files"),
    ("pyro_modules",),
    ("potential",),
    ("frame",),
    ("catalog_columns",),
    ("catalog_io", "catalog_checks", "catalog_gaia"),
    ("catalog",),
    ("equilibrium",),
    ("mock", "literature"),
    ("orbit",),
    ("actions",),
    ("df",),
    ("selection", "chain"),
    ("normalisation", "errors", "observe"),
    ("likelihood",),
    ("augmented", "streams"),
    ("model",),
    ("latent", "phase_mixing"),
    ("guides", "optimise", "diagnostics", "samplers", "verdict"),
    ("fit_result",),
    ("climb", "diagnosis", "variational", "alternating"),
    ("inference",),
    ("ensemble",),
    ("fields",),
    ("posterior",),
    ("predictive", "forecast", "report", "target"),
    ("grammar",),
    ("plots",),
    ("figures",),
    ("rewriting",),
    ("formulas", "searches"),
    ("ranking",),
    ("distillation",),
    ("distill",),
    ("runs",),
    ("page",),
    ("cli",),
    ("__main__",),
]
RANK = {name: i for i, names in enumerate(ORDER) for name in names}


def _package_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "bayespot" else [f"bayespot.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("bayespot.")}
    return found


def test_imports_point_down():
    """No module of the package imports one that comes after it in ORDER; every module has a rank."""
    wrong = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ("__init__", "data", "models"):
            continue
        assert parts[0] in RANK, f"{parts[0]} has no place in the import order"
        for target in _package_imports(path):
            if target in RANK and RANK[target] > RANK[parts[0]]:
                wrong.append(f"{'/'.join(parts)} imports {target}")
    assert not wrong, wrong


def test_import_is_light():
    """`import bayespot` loads none of the heavy libraries; its core loads no astropy, arviz or matplotlib."""
    heavy = "'astropy', 'arviz', 'matplotlib', 'pandas', 'physo'"
    for code in ("import bayespot", "from bayespot import SnapshotModel, fit, MassSlopeNetwork"):
        check = f"import sys; {code}; found = {{{heavy}}} & set(sys.modules); assert not found, found"
        subprocess.run([sys.executable, "-c", check], check=True)


def test_public_names_resolve():
    """Every name of __all__ exists; an unknown one is an AttributeError."""
    for name in bayespot.__all__:
        assert getattr(bayespot, name) is not None
    assert not hasattr(bayespot, "no_such_name")
