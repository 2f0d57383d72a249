"""The structure: imports point one way, and importing the package is quick and has no side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import bayespot

ROOT = Path(bayespot.__file__).parent
#: Rooms and single modules, in the order in which they may import: only from lines above, or within a room.
ORDER = [
    ("callers_state", "files", "literature", "numerics", "optimisers", "progress", "units"),
    ("locks", "pyro_modules"),
    ("diagnostics", "storage"),
    ("potential", "catalog"),
    ("actions", "df"),
    ("likelihood",),
    ("mock", "inference"),
    ("posterior",),
    ("report",),
    ("distill",),
    ("cli",),
    ("__main__",),
]
RANK = {name: i for i, names in enumerate(ORDER) for name in names}


def _package_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports anywhere, in functions and for types as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("bayespot.")}


def _modules() -> dict[str, Path]:
    """Return every file of the package by its dotted name without the package's."""
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("__init__", "data", "models"):
            names[".".join(parts)] = path
    return names


def test_imports_point_down():
    """No room imports one of its own line of ORDER or of a later one; every room has a place."""
    wrong = []
    for name, path in _modules().items():
        room = name.split(".")[0]
        assert room in RANK, f"{room} has no place in the import order"
        for target in _package_imports(path):
            other = target.split(".")[1]
            if other in RANK and other != room and RANK[other] >= RANK[room]:
                wrong.append(f"{name} imports {target}")
    assert not wrong, wrong


def test_no_circles_within_rooms():
    """The files of a room import each other in one direction, local imports and those for types included."""
    modules = _modules()
    arrows = {
        name: {
            other
            for target in _package_imports(path)
            for other in (target.split(".", 1)[1], target.split(".", 1)[1].rpartition(".")[0])
            if other in modules and other != name
        }
        for name, path in modules.items()
        if not name.endswith("__init__")
    }
    while leaves := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}
    assert not arrows, f"these import each other in a circle, or something that does: {sorted(arrows)}"


def test_rooms_export_what_exists():
    """Every name of a room's __all__ resolves, and so does every one of the package."""
    code = "import importlib, bayespot"
    for room in sorted({name.split(".")[0] for name in _modules() if name.endswith(".__init__")} - {"cli"}):
        code += f"\nroom = importlib.import_module('bayespot.{room}')\n[getattr(room, name) for name in room.__all__]"
    code += "\n[getattr(bayespot, name) for name in bayespot.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not hasattr(bayespot, "no_such_name")


def test_import_is_light():
    """`import bayespot` loads none of the heavy libraries; its core loads no astropy, arviz or matplotlib."""
    heavy = "'astropy', 'arviz', 'matplotlib', 'pandas', 'physo'"
    for code in ("import bayespot", "from bayespot import SnapshotModel, fit, MassSlopeNetwork"):
        check = f"import sys; {code}; found = {{{heavy}}} & set(sys.modules); assert not found, found"
        subprocess.run([sys.executable, "-c", check], check=True)
