"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import bayespot

MODULES = [m.name for m in pkgutil.walk_packages(bayespot.__path__, "bayespot.") if ".models" not in m.name]


class Finder(doctest.DocTestFinder):
    """Finds the examples of functions that are wrapped (`bayespot.units.takes`) as well."""

    def _from_module(self, module, object):
        return super()._from_module(module, inspect.unwrap(object) if inspect.isroutine(object) else object)


@pytest.mark.filterwarnings("ignore::UserWarning:galpy", "ignore::DeprecationWarning:gala")
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    """Every `>>>` of the module; the bridges to other packages only where these are installed."""
    if name.endswith("_bridge"):
        pytest.importorskip(name.split(".")[-1].removesuffix("_bridge"))
    module, runner = importlib.import_module(name), doctest.DocTestRunner()
    for example in Finder().find(module, name):
        runner.run(example)
    assert runner.summarize().failed == 0
