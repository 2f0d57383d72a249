"""Checkpoints are of one fit only: what may differ, how that is said, and that they hold no code. No fits are made."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from pyro.distributions import LogNormal

from bayespot import FitConfig, Isochrone, SnapshotModel, SphericalMixture
from bayespot.catalog.catalog import Catalog
from bayespot.inference.checkpoint import Checkpoints
from bayespot.likelihood import HeliocentricDistance, MeasurementErrors
from bayespot.potential import Plummer
from bayespot.storage import write


def model(potential=Isochrone, scale: float = 3.0, **options) -> SnapshotModel:
    mass = LogNormal(torch.tensor(25.0).double(), torch.tensor(1.0).double())
    return SnapshotModel(potential(mass, scale), SphericalMixture(), **options)


@pytest.fixture(scope="module")
def stars() -> Catalog:
    w = torch.rand(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Catalog(w, covariance=0.01 * torch.eye(6, dtype=torch.float64).expand(20, 6, 6).clone())


def with_errors(stars: Catalog, factor: float) -> Catalog:
    assert stars.covariance is not None
    return Catalog(stars.w, covariance=factor * stars.covariance)


def test_another_fit_is_refused(stars, tmp_path):
    """Model, prior, selection, errors, stars, their errors and settings: each is noticed, and named."""
    path, config = tmp_path / "c.safetensors", FitConfig(seed=1)
    own = Checkpoints(path, model(), stars, config)
    with pytest.raises(ValueError, match="nothing to resume"):
        own.load()
    state = {"model": model(), "u": torch.arange(3.0), "chains": [], "optimiser": {0: {"step": torch.tensor(3.0)}}}
    own.save(state)
    found = Checkpoints(path, model(), stars, FitConfig(seed=1)).load()
    assert torch.equal(found["u"], state["u"])
    assert found["optimiser"][0]["step"] == 3
    moved = Catalog(stars.w + 1e-12, covariance=stars.covariance)
    for other, catalog, settings, words in (
        (model(Plummer), stars, config, r"\(another model\)"),
        (model(scale=3.1), stars, config, r"\(another model\)"),
        (model(selection=HeliocentricDistance(10.0)), stars, config, r"\(another model\)"),
        (model(errors=MeasurementErrors(n_samples=8)), stars, config, r"\(another model\)"),
        (model(), moved, config, r"\(another catalogue\)"),
        (model(), with_errors(stars, 2.0), config, r"\(another catalogue\)"),
        (model(), stars, dataclasses.replace(config, seed=2), r"\(seed 1 there, 2 here\)"),
    ):
        with pytest.raises(ValueError, match=words):
            Checkpoints(path, other, catalog, settings).load()


def imported(path: Path, name: str = "model_of_a_user"):
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_model_file(stars, tmp_path):
    """The same class in a file that has changed since."""
    source = tmp_path / "mine.py"
    source.write_text("from bayespot import Isochrone\nclass Mine(Isochrone):\n    pass\n")
    path = tmp_path / "c.safetensors"
    own = model(imported(source).Mine)
    Checkpoints(path, own, stars, FitConfig()).save({"model": own})
    found = Checkpoints(path, model(imported(source).Mine), stars, FitConfig()).load()
    assert type(found["model"].potential).__name__ == "Mine"
    source.write_text(source.read_text() + "    # another law\n")
    with pytest.raises(ValueError, match=r"\(another model file\)"):
        Checkpoints(path, model(imported(source).Mine), stars, FitConfig()).load()


def test_checkpoints_without_a_fingerprint(stars, tmp_path):
    """Damaged, or of something else: one sentence that says what to do."""
    path = tmp_path / "c.safetensors"
    checkpoints = Checkpoints(path, model(), stars, FitConfig())
    for content in ({"content": 1}, {"fingerprint": 3, "content": 1}, [1]):
        write(content, path)
        with pytest.raises(ValueError, match=r"fit anew"):
            checkpoints.load()
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"not a readable checkpoint .*delete it and fit anew"):
        checkpoints.load()


def test_models_that_cannot_be_stored(stars, tmp_path):
    """A lambda as a selection is refused before the fit, not at its first checkpoint."""
    from bayespot.likelihood.selection import Custom

    with pytest.raises(ValueError, match=r"model\.selection\.function is a lambda"):
        Checkpoints(tmp_path / "c", model(selection=Custom(lambda x, v: x[..., 0] ** 0)), stars, FitConfig())
