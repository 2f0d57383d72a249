"""The complete probabilistic model of one snapshot, as a Pyro module."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from bayespot.actions.base import ActionFinder
from bayespot.actions.spherical import SphericalActions
from bayespot.df.base import DistributionFunction
from bayespot.likelihood import PhaseMixed
from bayespot.potential.base import Potential
from bayespot.pyro_modules import freeze


class SnapshotModel(PyroModule):
    """Potential, action finder, density of orbits and likelihood of one snapshot.

    Called as ``model(w)`` it is a Pyro model: the sites of the potential and of f(J) under the names
    ``potential.*`` and ``df.*``, and the stars as the observed site ``w`` in the plate ``stars``.

    Parameters
    ----------
    potential, df
        Potential and density of orbits, with their priors.
    finder
        Action finder; `SphericalActions` by default.
    likelihood
        ``"jeans"``, the closed form of the phase-mixed density.
    """

    def __init__(
        self,
        potential: Potential,
        df: DistributionFunction,
        finder: ActionFinder | None = None,
        likelihood: Literal["jeans"] = "jeans",
    ) -> None:
        super().__init__()
        if likelihood != "jeans":
            raise ValueError(f"likelihood must be 'jeans', got {likelihood!r}")
        self.potential = potential
        self.df = df
        self.finder = SphericalActions() if finder is None else finder
        self.likelihood = likelihood

    def forward(self, w: Tensor, subsample: Tensor | None = None) -> None:
        """Score the stars ``w`` ``(n, 6)``; with ``subsample`` (indices) a minibatch, scaled to all n."""
        # every site is sampled here: handlers evaluate the likelihood after this call, when an access to a
        # site would be a new draw
        root: Any = self
        fixed = self.at({name: functools.reduce(getattr, name.split("."), root) for name in self.sites()})
        fixed.potential.register_factors()
        with pyro.plate("stars", len(w), subsample=subsample):
            batch = w if subsample is None else w.index_select(0, subsample)
            pyro.sample("w", fixed._density(), obs=batch)

    def _density(self) -> PhaseMixed:
        return PhaseMixed(self.potential, self.finder, self.df)

    def log_prob(self, w: Tensor) -> Tensor:
        """Return ln p(w) per star; fix the sites with `at` first."""
        return self._density().log_prob(w)

    def sites(self) -> dict[str, torch.distributions.Distribution]:
        """Return the prior of every latent site under its full name, in a fixed order."""
        found = {}
        for path, module in self.named_modules():
            if isinstance(module, PyroModule):
                samples: dict[str, Any] = module._pyro_samples
                for name, prior in samples.items():
                    full = f"{path}.{name}" if path else name
                    found[full] = prior if isinstance(prior, torch.distributions.Distribution) else prior(module)
        return found

    def at(self, values: Mapping[str, Tensor]) -> SnapshotModel:
        """Return a copy whose sites are fixed at ``values`` (full names), differentiable in them."""
        fixed = copy.copy(self)
        fixed._modules = dict(self._modules)
        for part in ("potential", "df"):
            own = {k.removeprefix(part + "."): v for k, v in values.items() if k.startswith(part + ".")}
            fixed._modules[part] = freeze(getattr(self, part), own)
        return fixed

    def initial_values(self) -> dict[str, Tensor]:
        """Return a starting value of every site of the potential: the prior's centre or the module's own."""
        own = {f"potential.{k}": v for k, v in self.potential.initial_values().items()}
        start = {}
        for name, prior in self.sites().items():
            if name.startswith("potential."):
                start[name] = own[name] if name in own else _centre(name, prior)
        return start

    def log_prior(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the log prior density of ``values``, named factors included."""
        total = torch.zeros((), dtype=torch.float64)
        for name, prior in self.sites().items():
            total = total + prior.log_prob(values[name]).sum()
        factors = poutine.trace(self.at(values).potential.register_factors).get_trace()
        return total + factors.log_prob_sum() if len(factors) > 2 else total

    def sample_prior(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Return n prior draws of every site, stacked on a leading axis."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return {name: prior.sample(torch.Size([n])) for name, prior in self.sites().items()}


def _centre(name: str, prior: torch.distributions.Distribution) -> Tensor:
    """Median of 1 000 prior draws (seeded): defined for every proper prior and inside its support."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return prior.sample(torch.Size([999])).median(0).values
    except NotImplementedError as error:
        raise ValueError(
            f"site {name!r} has a flat prior, which gives no starting value: return one from the "
            "potential's initial_values()"
        ) from error
