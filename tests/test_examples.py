"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import bayespot

MODULES = [m.name for m in pkgutil.walk_packages(bayespot.__path__, "bayespot.") if ".models" not in m.name]


@pytest.mark.filterwarnings("ignore::UserWarning:galpy", "ignore::DeprecationWarning:gala")
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    """Every `>>>` of the module; the bridges to other packages only where these are installed."""
    if name.endswith("_bridge"):
        pytest.importorskip(name.split(".")[-1].removesuffix("_bridge"))
    assert doctest.testmod(importlib.import_module(name)).failed == 0
