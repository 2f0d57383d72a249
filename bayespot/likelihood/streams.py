r"""Stellar streams: stars that nearly share an orbit, as a term of the likelihood.

The actions of a stream's stars scatter about a mean that changes linearly along the stream,

.. math:: p(w) = N(J(w)\,|\,J_s + a_s\,s(w), \mathrm{diag}\,\sigma_s^2) / (2\pi)^3,

cut at J_r = 0 and J_z = 0, where s is the azimuth along the stream about the Galactic centre, standardised, and
the orbit J_s, the slopes a_s and the dispersions sigma_s are latent (one orbit per stream: Tenachi, Ibata &
Diakogiannis 2023, section 5). In a wrong potential the actions vary along the stream by more than that. Which part of
a stream was observed does not matter.

Slopes are there because stars with other actions drift to other angles: actions are ordered along a stream
that was stripped from a progenitor. A linear mean does not describe that fully, and posteriors come out too narrow.
Measured on three streams of 80 stars alone (rms z of ln M and ln b over 8 mocks, tests/benchmarks/streams.py): 0.9
where actions are independent of the angles; 1.7 where stars of Gaussian actions drifted apart (2.1 with
``slope=False``), 1.2 beside a snapshot of 2000 stars; 3.3 in particle-spray streams, with leading and trailing arms
(4.0). So the term is for streams whose actions are nearly independent of the place along them; a posterior from real
streams is too narrow. ``slope=False`` is up to twice as narrow again where it is right.

Covering a part of the angles only biases the potential by a fraction of order (dispersion / variation of J along
the arc)^2: a short stream alone may prefer a wrong potential. A stream must span less than one turn about
the centre. Errors that scatter actions beyond the dispersions need many samples per star; a fit warns.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import cast

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from bayespot.actions.base import ActionFinder, CappedActions
from bayespot.catalog.catalog import Catalog
from bayespot.df.base import DistributionFunction, LogFraction
from bayespot.df.distributions import OrbitSample
from bayespot.likelihood.errors import MeasurementErrors
from bayespot.likelihood.phase_mixed import UNBOUND_STEEPNESS
from bayespot.potential.base import Potential
from bayespot.pyro_modules import freeze
from bayespot.units import takes_tensors

#: Least action and dispersion of a start, in units of a stream's scale.
_FLOOR = 1e-4


class Stream(PyroModule):
    r"""Stars of one stream.

    The site ``orbit`` is (ln J_r, J_phi, ln J_z) in the middle of the stars, ``slope`` the change of (J_r, J_phi,
    J_z) per standard deviation of their azimuth along the stream, and ``ln_spread`` the logarithms of the three
    dispersions about that, with actions in units of ``scale``, the median of \|x\| \|v\| of the stars. All have broad
    normal priors.

    Parameters
    ----------
    name
        Names the sites: ``streams.<name>.orbit``, ``streams.<name>.slope`` and ``streams.<name>.ln_spread``.
    catalog
        The member stars.
    errors
        How measurement errors enter, with ``method="marginal"``; None: coordinates count as exact.
    seed
        Seed of the error samples.
    slope
        Whether the mean actions may change along the stream. False: they are independent of the angles, which
        says more of the potential, and is wrong for streams stripped from a progenitor.

    Raises
    ------
    ValueError
        If the name is not an identifier, there are fewer than three stars, or ``errors`` has another method.

    Examples
    --------
    A stream beside a snapshot, and on its own:

    >>> import torch
    >>> from bayespot import Isochrone, SnapshotModel, SphericalMixture
    >>> from bayespot.mock.sample import mock
    >>> from pyro.distributions import LogNormal
    >>> potential = Isochrone(LogNormal(torch.tensor(25.0), torch.tensor(1.0)), 3.0)
    >>> stream = Stream("gd1", mock("isochrone", n_stars=20, seed=0))
    >>> model = SnapshotModel(potential, SphericalMixture(), streams=[stream])
    >>> [name for name in model.sites() if name.startswith("streams.")]
    ['streams.gd1.orbit', 'streams.gd1.ln_spread', 'streams.gd1.slope']
    >>> alone, stars = SnapshotModel(potential, UniformOrbits(), streams=[stream]), stacked([stream])
    >>> len(stars)
    20
    """

    def __init__(
        self,
        name: str,
        catalog: Catalog,
        errors: MeasurementErrors | None = None,
        seed: int = 0,
        slope: bool = True,
    ) -> None:
        super().__init__()
        if not name.isidentifier():
            raise ValueError(f"the name of a stream must be an identifier (letters, digits, _), got {name!r}")
        if len(catalog) < 3:
            raise ValueError(f"stream {name!r} has {len(catalog)} stars; at least 3 tell an orbit from its dispersion")
        if errors is not None and errors.method != "marginal":
            raise ValueError(f"streams need errors with method='marginal', got {errors.method!r} for stream {name!r}")
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
        self.has_slope = slope
        if slope:
            self.slope = PyroSample(dist.Normal(zero, one).to_event(1))
        self._frame = _plane_of(catalog)
        azimuth = self._azimuth(self.w)
        self._middle, self._unit = float(azimuth.mean()), float(azimuth.std())

    def _azimuth(self, w: Tensor) -> Tensor:
        along, across = (w[..., :3] @ self._frame).unbind(-1)
        return torch.atan2(across, along)

    @takes_tensors(w="phase_space")
    def along(self, w: Tensor) -> Tensor:
        """Return the place along the stream of ``w (*batch, 6)``: azimuth in its mean orbital plane, standardised.

        Fixed by the stream's own stars, of mean 0 and standard deviation 1 over these; it has no unit.
        """
        return (self._azimuth(w) - self._middle) / self._unit

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
        orbit = torch.stack([centre[0].clamp(min=_FLOOR).log(), centre[1], centre[2].clamp(min=_FLOOR).log()])
        found = {"orbit": orbit, "ln_spread": spread.clamp(min=_FLOOR).log()}
        return found | ({"slope": torch.zeros(3, dtype=torch.float64)} if self.has_slope else {})

    def log_likelihood(self, potential: Potential, finder: ActionFinder) -> Tensor:
        """Return the sum of ln p over the stream's stars, in (kpc km/s)^-3 each; its sites must be fixed."""
        return self.log_likelihood_at(finder.capped_actions(potential, self.data[..., :6]))

    def log_likelihood_at(self, actions: CappedActions) -> Tensor:
        """Return the sum of ln p, given the actions of ``data``."""
        log_p = self._log_prob(*actions)
        if self.data.dim() == 3:
            log_p = torch.logsumexp(log_p + self.data[..., 6], -1) - math.log(self.data.shape[1])
        return log_p.sum()

    def effective_samples(self, potential: Potential, finder: ActionFinder) -> Tensor:
        """Return the effective number of error samples of each star (n,); its sites must be fixed.

        A stream is narrow: where few samples of a star lie within its dispersions the likelihood is noise.

        Raises
        ------
        ValueError
            If the stream has no measurement errors.
        """
        if self.data.dim() != 3:
            raise ValueError(f"stream {self.stream_name!r} was made without errors: it has no samples")
        log_p = self._log_prob(*finder.capped_actions(potential, self.data[..., :6])) + self.data[..., 6]
        return 1 / (torch.softmax(log_p, -1) ** 2).sum(-1)

    def _log_prob(self, J: Tensor, excess: Tensor) -> Tensor:
        """Gaussian in the actions, cut at J_r = 0 and J_z = 0, over (2 pi)^3."""
        spread, mean = self.scale * cast("Tensor", self.ln_spread).exp(), self.J
        if self.has_slope:
            mean = mean + self.along(self.data)[..., None] * (self.scale * cast("Tensor", self.slope))
        positive = torch.special.log_ndtr(mean / spread)[..., [0, 2]].sum(-1)
        norm = spread.log().sum() + 1.5 * math.log(2 * math.pi) + positive
        z = (J - mean) / spread
        return -0.5 * (z**2).sum(-1) - norm - 3 * math.log(2 * math.pi) - UNBOUND_STEEPNESS * excess


class Streams(PyroModule):
    """All streams of a model, each under its name."""

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        super().__init__()
        for stream in streams:
            if hasattr(self, stream.stream_name):
                raise ValueError(f"two streams are called {stream.stream_name!r}, or the name is taken; rename one")
            # Pyro names a module after the one it is part of: two models must not share it
            setattr(self, stream.stream_name, copy.deepcopy(stream))

    def __iter__(self) -> Iterator[Stream]:
        return (cast("Stream", child) for child in self.children())

    def __len__(self) -> int:
        return len(self._modules)

    def start(self, potential: Potential, finder: ActionFinder) -> dict[str, Tensor]:
        """Return values of all sites, relative names."""
        found = {}
        for stream in self:
            for name, value in stream.start(potential, finder).items():
                found[f"{stream.stream_name}.{name}"] = value
        return found

    def without_slopes(self) -> Streams:
        """Return a copy whose slopes are fixed at zero.

        Far from the truth slopes absorb what a wrong potential does to the actions, and a fit stays there.
        """
        zero = torch.zeros(3, dtype=torch.float64)
        return freeze(self, {f"{stream.stream_name}.slope": zero for stream in self if stream.has_slope})

    def register_factors(self, potential: Potential, finder: ActionFinder) -> None:
        """Add the streams' log-likelihoods to a Pyro model, as ``streams.<name>.stars``; sites must be fixed."""
        streams = list(self)
        if not streams:
            return
        rows = [stream.data[..., :6].reshape(-1, 6) for stream in streams]
        # one call: what costs time is the finder's table, not the stars
        actions = finder.capped_actions(potential, torch.cat(rows))
        parts = zip(*(part.split([len(r) for r in rows]) for part in actions), strict=True)
        for stream, (J, excess) in zip(streams, parts, strict=True):
            shape = stream.data.shape[:-1]
            own = CappedActions(J.reshape(*shape, 3), excess.reshape(shape))
            pyro.factor(f"streams.{stream.stream_name}.stars", stream.log_likelihood_at(own))


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

    def resolved(self, n_components: int, J: Tensor, near_data: bool = False) -> UniformOrbits:
        return self

    def fit_actions(
        self, J: Tensor, seed: int, max_iterations: int = 100, log_z: LogFraction | None = None
    ) -> dict[str, Tensor]:
        return {}


def stacked(streams: Sequence[Stream]) -> Catalog:
    """Return all stream stars as one catalogue, for fits to streams alone."""
    return Catalog(torch.cat([stream.w for stream in streams]))


def _plane_of(catalog: Catalog) -> Tensor:
    """Return two axes (3, 2) of the stars' mean orbital plane, the first towards their mean direction."""
    normalize = torch.nn.functional.normalize
    normal = normalize(torch.linalg.cross(catalog.x, catalog.v).mean(0), dim=-1)
    towards = normalize(catalog.x, dim=-1).mean(0)
    first = normalize(towards - (towards @ normal) * normal, dim=-1)
    return torch.stack([first, torch.linalg.cross(normal, first)], -1)
