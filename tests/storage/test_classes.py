"""Every part that a model of the package can have is on the list, and comes back bit for bit."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints, transforms

from bayespot.actions.base import ActionFinder
from bayespot.actions.meridional import Equatorial
from bayespot.actions.spherical import TabulatedActions
from bayespot.actions.staeckel import TabulatedFudge
from bayespot.df.base import DistributionFunction
from bayespot.df.chart import ActionChart
from bayespot.df.flow import SplineFlow
from bayespot.likelihood.selection import SelectionFunction
from bayespot.potential import SymbolicPotential
from bayespot.potential.base import Potential
from bayespot.storage import StorageError, describe, read, write
from bayespot.storage.classes import CLASSES, is_listed
from bayespot.storage.distributions import OTHER, PLAIN


def test_every_part_of_a_model_is_listed():
    """Potentials, finders, densities, selections: all that can be made; and the list names nothing that is gone.

    `TabulatedActions`, `TabulatedFudge` and `Equatorial` live as long as one evaluation of a likelihood and are part of
    no model that is kept.
    """
    passing = (TabulatedActions, TabulatedFudge, Equatorial)
    missing = []
    for room in ("potential", "actions", "df", "likelihood"):
        for found in pkgutil.iter_modules(importlib.import_module(f"bayespot.{room}").__path__):
            if found.name.endswith("_bridge"):
                continue
            module = importlib.import_module(f"bayespot.{room}.{found.name}")
            for cls in vars(module).values():
                if not inspect.isclass(cls) or cls.__module__ != module.__name__ or inspect.isabstract(cls):
                    continue
                bases = (Potential, ActionFinder, DistributionFunction, SelectionFunction)
                if issubclass(cls, bases) and not is_listed(cls) and cls not in passing:
                    missing.append(f"{cls.__module__}:{cls.__qualname__}")
    assert not missing, f"add these to bayespot/storage/classes.py: {missing}"
    for name, classes in CLASSES.items():
        for cls in classes:
            assert inspect.isclass(getattr(importlib.import_module(name), cls)), f"{name}:{cls}"


def examples() -> dict[str, dist.Distribution]:
    one, two, matrix = torch.tensor(1.3).double(), torch.tensor([0.4, 0.7]).double(), torch.eye(2).double()
    special = {
        "Delta": dist.Delta(one),
        "Dirichlet": dist.Dirichlet(two),
        "LowRankMultivariateNormal": dist.LowRankMultivariateNormal(two, two[:, None], two),
        "Uniform": dist.Uniform(one, 2 * one),
        "Categorical": dist.Categorical(logits=two),
        "Independent": dist.Normal(two, two).to_event(1),
        "ImproperUniform": dist.ImproperUniform(constraints.interval(0.0, one), (), (2,)),
        "MixtureSameFamily": dist.MixtureSameFamily(dist.Categorical(logits=two), dist.Normal(two, two)),
        "MultivariateNormal": dist.MultivariateNormal(two, scale_tril=matrix),
        "TransformedDistribution": dist.TransformedDistribution(
            dist.Normal(one, one), [transforms.AffineTransform(1.0, one), transforms.ExpTransform()]
        ),
    }
    plain = {name: getattr(dist, name)(*(one,) * len(names)) for name, names in PLAIN.items() if name not in special}
    return plain | special


@pytest.mark.parametrize("name", sorted(PLAIN | OTHER))
def test_priors(name, tmp_path):
    """Every distribution of the list: the same log-density, shape and support."""
    prior = examples()[name]
    write(prior, tmp_path / "p.safetensors")
    found = read(tmp_path / "p.safetensors")
    assert type(found) is type(prior)
    assert (found.batch_shape, found.event_shape) == (prior.batch_shape, prior.event_shape)
    if name != "ImproperUniform":
        torch.manual_seed(0)
        x = prior.sample()
        assert torch.equal(found.log_prob(x), prior.log_prob(x))
    assert describe(found).digest() == describe(prior).digest()


def test_values(tmp_path):
    """Everything that a state is made of comes back with its type; what appears twice is one object again."""
    shared = torch.arange(3)
    content = {
        "numbers": [1, 1.5, float("inf"), True, None, "text", np.float64(0.1), np.arange(3.0)],
        "tuple": (torch.Size([2, 3]), {3, 1}, torch.float32),
        5: shared, "again": shared,
        "flags": torch.tensor([True, False]), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5).double(),
    }  # fmt: skip
    write(content, tmp_path / "v.safetensors")
    found = read(tmp_path / "v.safetensors")
    assert found["numbers"][:-1] == content["numbers"][:-1]
    assert isinstance(found["numbers"][6], np.float64)
    np.testing.assert_array_equal(found["numbers"][-1], np.arange(3.0))
    assert found["tuple"] == content["tuple"]
    assert found[5] is found["again"]
    for name in ("flags", "empty", "scalar"):
        assert torch.equal(found[name], content[name])
        assert found[name].dtype == content[name].dtype


def test_flow(tmp_path):
    """A network with zuko's modules is rebuilt from its arguments and weights."""
    J = 1000 * torch.rand(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flow = SplineFlow(ActionChart.for_actions(J, False), 2, 4, (8,)).double().eval().requires_grad_(False)
    for parameter in flow.parameters():
        parameter.add_(0.1)
    write(flow, tmp_path / "f.safetensors")
    found = read(tmp_path / "f.safetensors")
    y = flow.chart.smooth(J)
    assert torch.equal(found.log_q(found.coordinates(y)), flow.log_q(flow.coordinates(y)))
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())


def test_formulas_are_not_code(tmp_path):
    """A symbolic potential whose stored text is Python instead of a formula is refused where it would be read."""
    potential = SymbolicPotential("-G*M/r", {"M": 1e11})
    potential.formula_text = "__import__('os').system('touch x')"
    write(potential, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="not a formula"):
        read(tmp_path / "s.safetensors").phi_r(torch.ones(1))


def test_damaged_files(tmp_path):
    """No safetensors file, and one of other software."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"junk")
    with pytest.raises(StorageError, match="not a readable file"):
        read(path)
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(StorageError, match="not a readable file"):
        read(path)
