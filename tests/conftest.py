"""Shared fixtures: one thread per process (tests run in parallel), small catalogues; a limit on every test's time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
import pytest
import torch
from contracts.commands import quick_figures

from bayespot.catalog import Catalog
from bayespot.mock import mock
from bayespot.report import plots
from bayespot.report.plots.style import save

matplotlib.use("Agg")
torch.set_num_threads(1)

#: Seconds of one core that a test may use, and what it sets up, unless it is marked slow. Of the processor, not of the
#: clock: a busy machine fails nothing.
LIMIT = 60.0

#: Modules by their cost, the dearest first: begun last, one would keep a process busy while the others have ended.
DEAREST = (
    "test_guides", "test_cli", "test_predictive", "test_genfunc", "test_augmented", "test_fit", "test_distill",
    "test_notebooks", "test_user_errors", "test_densities", "test_forecast", "test_selection", "test_orbit",
    "test_docs", "test_outliers", "test_streams", "test_polar", "test_mock", "test_callers_state", "test_posterior",
    "test_calibration", "test_errors",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order modules by `DEAREST`, their tests as they are."""
    place = {name: i for i, name in enumerate(DEAREST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@contextmanager
def _limited(item: pytest.Item, what: str) -> Iterator[None]:
    before = sum(os.times()[:4])
    yield
    used = sum(os.times()[:4]) - before
    item.user_properties.append((f"cpu {what}", used))
    if used > LIMIT and item.get_closest_marker("slow") is None:
        pytest.fail(f"{what} used {used:.0f} s of one core, the limit is {LIMIT:.0f}: share its fit, take fewer stars")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with _limited(item, "setup"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with _limited(item, "test"):
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def blank_figures() -> Iterator[None]:
    """Figures are made but not drawn, which takes most of a short run's time; `drawn_figures` draws them."""
    with quick_figures():
        yield


@pytest.fixture
def drawn_figures(monkeypatch) -> None:
    """Figures are drawn, for tests that look at them."""
    monkeypatch.setattr(plots, "save", save)


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Runs are saved without figures, for tests that look at none: drawing them takes most of the time."""
    monkeypatch.setattr("bayespot.report.runs.draw_figures", lambda *_: None)


@pytest.fixture(scope="session")
def isochrone_stars() -> Catalog:
    """2 000 stars of the isotropic isochrone, M = 1e11 Msun, b = 3 kpc, seed 5."""
    return mock("isochrone", n_stars=2000, seed=5)
