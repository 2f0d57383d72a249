"""Shared fixtures: one thread per process (tests run in parallel), small catalogues."""

from __future__ import annotations

import matplotlib
import pytest
import torch

from bayespot.catalog import Catalog
from bayespot.mock import mock

matplotlib.use("Agg")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def isochrone_stars() -> Catalog:
    """2 000 stars of the isotropic isochrone, M = 1e11 Msun, b = 3 kpc, seed 5."""
    return mock("isochrone", n_stars=2000, seed=5)
