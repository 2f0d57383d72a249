"""What the commands' tests share: fits in this process are short, since none of these tests asks for their
numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from bayespot.inference import FitConfig

#: Points that normalise a selection: a quarter of those on the way to the maximum, and no more.
POINTS = {"selection_points": 4096, "selection_max_points": 4096}


@pytest.fixture(autouse=True, scope="module")
def whole_fit() -> Iterator[Callable[..., Any]]:
    """Have `fit` stop its climb early, once, with few points for a selection, and weigh few draws; yields the function
    as it is."""
    module = importlib.import_module("bayespot.inference.fit")
    fit = module.fit

    def short(model: Any, catalog: Any, config: FitConfig, **options: Any) -> Any:
        few = replace(config, adam_steps=10, map_iterations=5, k_hat_draws=min(25, config.k_hat_draws), **POINTS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bayespot.inference.map._ROUNDS", 1)
            return fit(model, catalog, few, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit", short)
        yield fit
