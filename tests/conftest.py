"""Shared fixtures: one thread per process (tests run in parallel), small catalogues; a limit on every test's time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
import pytest
import torch

from bayespot.catalog import Catalog
from bayespot.mock import mock

matplotlib.use("Agg")
torch.set_num_threads(1)

#: Seconds of one core that a test may use, and what it sets up, unless it is marked slow. Of the processor, not of the
#: clock: a busy machine fails nothing.
LIMIT = 90.0


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


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Runs are saved without figures, for tests that look at none: drawing them takes most of the time."""
    monkeypatch.setattr("bayespot.report.runs.draw_figures", lambda *_: None)


@pytest.fixture(scope="session")
def isochrone_stars() -> Catalog:
    """2 000 stars of the isotropic isochrone, M = 1e11 Msun, b = 3 kpc, seed 5."""
    return mock("isochrone", n_stars=2000, seed=5)
