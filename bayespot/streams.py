r"""Stellar streams: stars that nearly share an orbit, as a term of the likelihood.

Each star of a stream has actions from a narrow Gaussian about those of the stream,

.. math:: p(w) = N(J(w)\,|\,J_s, \mathrm{diag}\,\sigma_s^2) / (2\pi)^3,

with the stream's J_s and dispersions latent (Tenachi, Ibata & Diakogiannis 2023, section 5). In a wrong potential the
actions vary along the stream, by more than the dispersion. Angles count as uniform: a stream covers only part of
them, which biases the potential by a fraction of order (dispersion / variation of J along the arc)^2 and is
negligible where the stream is cold and long. Which part of a stream was observed does not matter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from bayespot.actions.base import ActionFinder
from bayespot.catalog import Catalog
from bayespot.df.base import DistributionFunction
from bayespot.df.distributions import OrbitSample
from bayespot.errors import MeasurementErrors
from bayespot.likelihood import UNBOUND_STEEPNESS, ObservedStars, StarDensity
from bayespot.potential.base import Potential


class Stream(PyroModule):
    r"""Stars of one stream.

    The site ``orbit`` is (ln J_r, J_phi, ln J_z) and ``ln_spread`` the logarithms of the three dispersions, with
    actions in units of ``scale``, the median of \|x\| \|v\| of the stars; both have broad normal priors.

    Parameters
    ----------
    name
        Names the sites: ``streams.<name>.orbit`` and ``streams.<name>.ln_spread``.
    catalog
        The member stars.
    errors
        How measurement errors enter; None: coordinates count as exact.
    seed
        Seed of the error samples.

    Raises
    ------
    ValueError
        If the name is not an identifier, or there are fewer than three stars.
    """

    def __init__(self, name: str, catalog: Catalog, errors: MeasurementErrors | None = None, seed: int = 0) -> None:
        super().__init__()
        if not name.isidentifier():
            raise ValueError(f"the name of a stream must be an identifier (letters, digits, _), got {name!r}")
        if len(catalog) < 3:
            raise ValueError(f"stream {name!r} has {len(catalog)} stars; at least 3 tell an orbit from its dispersion")
        self.stream_name = name
        self.w: Tensor
        self.data: Tensor
        self.register_buffer("w", catalog.w.clone())
        self.register_buffer("data", catalog.w.clone() if errors is None else errors.samples(catalog, seed))
        size = torch.linalg.vector_norm(catalog.x, dim=-1) * torch.linalg.vector_norm(catalog.v, dim=-1)
        self.scale = float(size.median())
        zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        self.orbit = PyroSample(dist.Normal(zero, 2 * one).to_event(1))
        self.ln_spread = PyroSample(dist.Normal(zero + math.log(0.1), 2 * one).to_event(1))

    @property
    def J(self) -> Tensor:
        """Actions of the stream's orbit (3,) in kpc km/s; its sites must be fixed."""
        orbit = cast("Tensor", self.orbit)
        return self.scale * torch.stack([orbit[..., 0].exp(), orbit[..., 1], orbit[..., 2].exp()], -1)

    @torch.no_grad()
    def start(self, potential: Potential, finder: ActionFinder) -> dict[str, Tensor]:
        """Return values of the sites from the median and rms spread of the stars' actions in a potential.

        In a wrong potential the spread is wide, outliers included, which makes the way to the right one smooth.
        """
        J, _ = finder.capped_actions(potential, self.w)
        J = J / self.scale
        centre = J.median(0).values
        spread = (J - centre).square().mean(0).sqrt()
        floor = 1e-4
        orbit = torch.stack([centre[0].clamp(min=floor).log(), centre[1], centre[2].clamp(min=floor).log()])
        return {"orbit": orbit, "ln_spread": spread.clamp(min=floor).log()}

    def log_likelihood(self, potential: Potential, finder: ActionFinder) -> Tensor:
        """Return the sum of ln p over the stream's stars; its sites must be fixed."""
        spread = self.scale * cast("Tensor", self.ln_spread).exp()
        density = _StreamDensity(potential, finder, self.J, spread)
        return ObservedStars(density).log_prob(self.data).sum()


class Streams(PyroModule):
    """All streams of a model, each under its name."""

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        super().__init__()
        for stream in streams:
            if hasattr(self, stream.stream_name):
                raise ValueError(f"two streams are called {stream.stream_name!r}, or the name is taken; rename one")
            # Pyro names a module after the one it is part of: two models must not share it
            setattr(self, stream.stream_name, copy.deepcopy(stream))

    def __iter__(self) -> Any:
        return iter(self.children())

    def __len__(self) -> int:
        return len(self._modules)

    def start(self, potential: Potential, finder: ActionFinder) -> dict[str, Tensor]:
        """Return values of all sites, relative names."""
        found = {}
        for stream in self:
            for name, value in stream.start(potential, finder).items():
                found[f"{stream.stream_name}.{name}"] = value
        return found

    def register_factors(self, potential: Potential, finder: ActionFinder) -> None:
        """Add the streams' log-likelihoods to a Pyro model; sites must be fixed."""
        for stream in self:
            pyro.factor(f"streams.{stream.stream_name}.stars", stream.log_likelihood(potential, finder))


class UniformOrbits(DistributionFunction):
    """No density of orbits: every bound star is as good as any other. For fits to streams alone.

    Fit ``SnapshotModel(potential, UniformOrbits(), streams=streams)`` to ``stacked(streams)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_components = 1

    proper = False

    def log_prob(self, J: Tensor) -> Tensor:
        return torch.zeros_like(J[..., 0])

    def sample(self, n: int, seed: int) -> Tensor:
        raise ValueError("streams alone say nothing of other orbits: there is no population to draw from")

    def stratified(self, n: int, seed: int, n_spare: int = 0) -> OrbitSample:
        raise ValueError("streams alone say nothing of other orbits: there is no population to draw from")

    def resolved(self, n_components: int, J: Tensor) -> UniformOrbits:
        return self

    def fit_actions(self, J: Tensor, seed: int, max_iterations: int = 100) -> dict[str, Tensor]:
        return {}


class _StreamDensity(StarDensity):
    """Gaussian in the actions, cut at J_r = 0 and J_z = 0, over (2 pi)^3."""

    def __init__(self, potential: Potential, finder: ActionFinder, J: Tensor, spread: Tensor) -> None:
        self.potential, self.finder, self.J, self.spread = potential, finder, J, spread
        super().__init__()

    def log_prob(self, value: Tensor) -> Tensor:
        J, excess = self.finder.capped_actions(self.potential, value)
        z = (J - self.J) / self.spread
        inside = torch.special.log_ndtr(self.J / self.spread)[[0, 2]].sum()
        norm = self.spread.log().sum() + 1.5 * math.log(2 * math.pi) + inside
        return -0.5 * (z**2).sum(-1) - norm - 3 * math.log(2 * math.pi) - UNBOUND_STEEPNESS * excess


def stacked(streams: Sequence[Stream]) -> Catalog:
    """Return all stream stars as one catalogue, for fits to streams alone."""
    return Catalog(torch.cat([stream.w for stream in streams]))
