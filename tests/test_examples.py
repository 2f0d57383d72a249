"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import bayespot

MODULES = [m.name for m in pkgutil.walk_packages(bayespot.__path__, "bayespot.") if ".models" not in m.name]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    """Every `>>>` of the module."""
    assert doctest.testmod(importlib.import_module(name)).failed == 0
