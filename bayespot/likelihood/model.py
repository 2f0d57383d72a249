"""The complete probabilistic model of one snapshot, as a Pyro module."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from bayespot.actions.base import ActionFinder
from bayespot.actions.spherical import SphericalActions
from bayespot.actions.staeckel import StaeckelFudge
from bayespot.callers_state import keeps_callers_state
from bayespot.catalog.catalog import Catalog
from bayespot.catalog.projected import ProjectedCatalog
from bayespot.df import TrainedDensity
from bayespot.df.base import DistributionFunction
from bayespot.likelihood.augmented import Smoothing
from bayespot.likelihood.axes import require_axes
from bayespot.likelihood.chain import Chain
from bayespot.likelihood.conditional import BackgroundVelocities, RadialProfileOfStars, VelocityDensity, VelocityLattice
from bayespot.likelihood.errors import ErrorScatter, MeasurementErrors
from bayespot.likelihood.line_of_sight import BackgroundAlongLine, LineOfSight, LineOfSightVelocities, stretch
from bayespot.likelihood.normalisation import FixedPoints
from bayespot.likelihood.outliers import Outliers
from bayespot.likelihood.phase_mixed import ObservedStars, PhaseMixed, StarDensity
from bayespot.likelihood.selection import SelectionFunction, require_selected
from bayespot.likelihood.sky_lattice import SkyLattice
from bayespot.likelihood.streams import Stream, Streams
from bayespot.potential.base import Potential, SumPotential
from bayespot.pyro_modules import freeze
from bayespot.units import plain, takes_tensors


class SnapshotModel(PyroModule):
    """Potential, action finder, density of orbits and likelihood of one snapshot.

    Called as ``model(w)`` it is a Pyro model: the sites of the potential and of f(J) under the names
    ``potential.*`` and ``df.*``, and the stars as the observed site ``w`` in the plate ``stars``.

    Parameters
    ----------
    potential, df
        Potential and density of orbits, with their priors.
    finder
        Action finder; by default `StaeckelFudge` for an axisymmetric potential, else `SphericalActions`, which refuses
        triaxial ones.
    likelihood
        ``"jeans"``, the closed form of the phase-mixed density; ``"conditional"``, the density of velocities given
        positions, for catalogues whose selection is not known but depends on position alone, in spherical potentials
        (`bayespot.likelihood.conditional`); a `LineOfSight`, that of line-of-sight velocities given positions on the
        sky, for a `ProjectedCatalog`; or ``"augmented"``, a smooth density of stars sampled by the chain; or a
        `Smoothing`, the latter with its settings.
    selection
        S(x, v), the probability that a star is in the catalogue; None: 1.
    errors
        How the catalogue's measurement errors enter; None: its coordinates count as exact.
    selection_sees
        Whether S applies to the ``"observed"`` coordinates, scattered by errors, or to the ``"true"`` ones;
        the same without errors.
    streams
        Stellar streams whose stars add to the likelihood, see `bayespot.likelihood.streams`. They are not among the
        catalogue's stars.
    outliers
        Component for stars that are no members: `Outliers`, or None for none. A fit adds the default one where it
        costs nothing, see `with_outliers`.

    Raises
    ------
    ValueError
        If ``likelihood``, ``selection_sees`` or ``outliers`` is unknown, or a conditional likelihood is asked for in a
        potential that is not spherical or with a selection.
    """

    #: Models stored before there was a choice have none of their own.
    conditional: bool = False
    #: Lattice of the conditional likelihood that covers the stars of `tabulated`; None: that of the stars at hand.
    lattice: VelocityLattice | SkyLattice | None = None

    def __init__(
        self,
        potential: Potential,
        df: DistributionFunction,
        finder: ActionFinder | None = None,
        likelihood: Literal["jeans", "conditional", "augmented"] | Smoothing | LineOfSight = "jeans",
        selection: SelectionFunction | None = None,
        errors: MeasurementErrors | None = None,
        selection_sees: Literal["observed", "true"] = "observed",
        streams: Sequence[Stream] = (),
        outliers: Outliers | None = None,
    ) -> None:
        super().__init__()
        if outliers is not None and not isinstance(outliers, Outliers):
            raise ValueError(f"outliers must be None or Outliers(), got {outliers!r}")
        known = likelihood in ("jeans", "conditional", "augmented")
        if not known and not isinstance(likelihood, Smoothing | LineOfSight):
            raise ValueError(
                "likelihood must be 'jeans', 'conditional', 'augmented', a LineOfSight or a Smoothing, got "
                f"{likelihood!r}"
            )
        if likelihood == "conditional" or isinstance(likelihood, LineOfSight):
            _require_sphere_without_selection(potential, selection, likelihood)
        if isinstance(likelihood, LineOfSight):
            _require_line_of_sight(df, errors)
        if selection_sees not in ("observed", "true"):
            raise ValueError(f"selection_sees must be 'observed' or 'true', got {selection_sees!r}")
        self.potential = potential
        self.df = df
        default = StaeckelFudge if potential.symmetry == "axisymmetric" else SphericalActions
        self.finder: ActionFinder = default() if finder is None else finder
        self.smoothing = Smoothing() if likelihood == "augmented" else None
        if isinstance(likelihood, Smoothing):
            self.smoothing = likelihood
        # Pyro names a module after the one it is part of: two models must not share it
        if isinstance(likelihood, LineOfSight):
            self.sky = copy.deepcopy(likelihood)
        #: Whether the likelihood is of velocities given positions.
        self.conditional = likelihood == "conditional" or isinstance(likelihood, LineOfSight)
        self.selection, self.errors, self.selection_sees = selection, errors, selection_sees
        self.streams = Streams(streams)
        # Pyro names a module after the one it is part of: two models must not share it
        self.outliers = copy.deepcopy(outliers)
        #: Points that normalise the selection, see `select_at`.
        self.points: FixedPoints | None = None

    @takes_tensors(w="phase_space")
    def forward(self, w: Tensor, subsample: Tensor | None = None) -> None:
        """Score the stars ``w``, as `prepare` returns them; with ``subsample`` (indices) a minibatch, scaled to all."""
        fixed = self._drawn()
        with pyro.plate("stars", len(w), subsample=subsample):
            batch = w if subsample is None else w.index_select(0, subsample)
            pyro.sample("w", fixed.density(), obs=batch)

    def _drawn(self) -> SnapshotModel:
        """Sample every site, and the potential's factors; return the model fixed there.

        All sites are sampled here: handlers evaluate the likelihood after the model's call, when an access to a
        site would be a new draw.
        """
        root: Any = self
        fixed = self.at({name: functools.reduce(getattr, name.split("."), root) for name in self.sites()})
        fixed.register_factors()
        return fixed

    def register_factors(self) -> None:
        """Add the potential's named factors and the streams' likelihoods; fix the sites with `at` first."""
        self.potential.register_factors()
        self.streams.register_factors(self.potential, self.finder)

    def prepare(self, catalog: Catalog, seed: int = 0) -> Tensor:
        """Return what the likelihood conditions on, stars along the first axis.

        ``(n, 6)``, the coordinates, or with measurement errors ``(n, S, 7)``, samples of where each star may be.

        Raises
        ------
        ValueError
            If the selection rejects stars of the catalogue, errors are asked for and it has none, or a model without
            errors meets stars that lack a distance or a radial velocity; if stars, potential and selection are not
            about the same axes, or an axisymmetric potential meets stars that are only in the plane (`require_axes`).
        """
        if self.projection is not None:
            if not isinstance(catalog, ProjectedCatalog):
                raise ValueError(
                    "a LineOfSight likelihood is for stars on the sky, not a Catalog of coordinates: read them with "
                    "ProjectedCatalog.read (--distance), or take likelihood='jeans'"
                )
            return catalog.stars
        if isinstance(catalog, ProjectedCatalog):
            raise ValueError(
                "stars on the sky, without depth and velocities across, need likelihood=LineOfSight(...): take the "
                "model dwarf_spheroidal"
            )
        require_axes(self.potential, self.selection, catalog)
        seen = self.selection is not None and (self.errors is None or self.selection_sees == "observed")
        if self.selection is not None and seen:
            require_selected(self.selection, catalog.w)
        if self.errors is None:
            n_lost = 0 if catalog.observed is None else int(torch.isnan(catalog.observed.values).any(-1).sum())
            if n_lost:
                raise ValueError(
                    f"{n_lost} of {len(catalog)} stars have no distance or no radial velocity, and the model has no "
                    "errors to marginalise over them with: give it errors=MeasurementErrors(), or drop those stars"
                )
            return catalog.w
        if self.errors.method == "latent":
            raise ValueError(
                "errors with method='latent' are for Pyro's own samplers and guides: see latent_model(catalog); "
                "a fit needs method='marginal'"
            )
        samples = self._placed(catalog, self.errors.samples(catalog, seed))
        if self.selection is not None and not seen:
            samples[..., 6] += self.selection(samples[..., :6]).log()
            lost = torch.isneginf(samples[..., 6]).all(-1)
            if bool(lost.any()):
                raise ValueError(
                    f"{self.selection} rejects star {int(lost.int().argmax())} (counting from 0) wherever within its "
                    "errors it may be; correct the selection or drop it"
                )
        return samples

    def _placed(self, catalog: Catalog, samples: Tensor) -> Tensor:
        """Return where stars may be ``(n, S, 7)``, weighted by how many stars of the catalogue are there.

        The other likelihoods know how many there are; one of velocities given positions does not.
        """
        if not self.conditional:
            return samples
        there = RadialProfileOfStars(catalog)(samples[..., :3])
        return torch.cat([samples[..., :6], (samples[..., 6] + there)[..., None]], -1)

    def select_at(self, values: Mapping[str, Tensor], catalog: Catalog, n: int, seed: int) -> SnapshotModel:
        """Return a copy whose selection is normalised with about n points.

        In a sphere by `FixedPoints.lattice`, whose speeds of escape and radii are those of the population at ``values``
        of all sites, and rotations those of ``seed``; otherwise by `FixedPoints.near_stars`. Without a selection the
        model itself.
        """
        if self.selection is None:
            return self
        model = copy.copy(self)
        blurred = self.errors is not None and self.selection_sees == "observed"
        scatter = ErrorScatter(catalog) if blurred else None
        r = torch.linalg.vector_norm(catalog.x, dim=-1)
        r_range = (float(r.min()) / 2, float(r.max()) * 1.5)
        # errors are drawn per rotation, at the price of an observation each; catalogues that have them are small
        m = 16 if blurred else 128
        chain = self.chain(values)
        if self.potential.symmetry == "spherical":
            model.points = FixedPoints.lattice(chain, self.selection, n, seed, r_range, m, scatter)
        else:
            w = catalog.w
            if catalog.observed is not None:
                # those without a distance or a radial velocity have place-holders
                w = w[torch.isfinite(catalog.observed.values).all(-1)]
            model.points = FixedPoints.near_stars(chain, self.selection, w, max(n, 20), seed, m, scatter)
        return model

    def chain(self, values: Mapping[str, Tensor]) -> Chain:
        """Return the population at ``values`` of all sites."""
        fixed = self.at(values)
        return Chain(fixed.potential, fixed.df, fixed.finder)

    def latent_model(self, catalog: Catalog) -> Callable[[], None]:
        """Return a Pyro model whose sites include the true observables of every star, for NUTS or own guides.

        The sites are those of the potential and of f(J), and ``stars.truth`` ``(n, 6)``: each star's errors, in
        standard deviations (quantiles of the range where an observable is missing).

        Raises
        ------
        ValueError
            If the model has no errors with ``method="latent"``.
        """
        errors = self.errors
        if errors is None or errors.method != "latent":
            raise ValueError("build the model with errors=MeasurementErrors(method='latent')")

        def model() -> None:
            # as in a call of the module: outside of its context sites are drawn without a sample statement
            with self._pyro_context:
                fixed = self._drawn()
            with pyro.plate("stars.plate", len(catalog)):
                zero = torch.zeros(6, dtype=torch.float64)
                z = pyro.sample("stars.truth", dist.Normal(zero, 1.0).to_event(1))
            w = self._placed(catalog, errors.place(catalog, z[:, None]))
            if self.selection is not None and self.selection_sees == "true":
                w = torch.cat([w[..., :6], w[..., 6:] + self.selection(w[..., :6]).log()[..., None]], -1)
            pyro.factor("stars.density", fixed.density().log_prob(w).sum())

        return model

    @property
    def projection(self) -> LineOfSight | None:
        """Systemic velocity and distance of a system that is seen in projection; None: coordinates are known."""
        return cast("LineOfSight | None", self._modules.get("sky"))

    @property
    def is_plain(self) -> bool:
        """Whether the likelihood is f(J) alone: the closed form, without errors or selection."""
        return self.smoothing is None and self.separable

    @property
    def separable(self) -> bool:
        """Whether f(J) and the potential are independent to first order: the likelihood is f(J) at known places."""
        return self.selection is None and self.errors is None and not self.conditional

    def closed_form(self) -> SnapshotModel:
        """Return a copy with the ``jeans`` likelihood: what an augmented one tends to with more stars."""
        model = copy.copy(self)
        model.smoothing = None
        return model

    @takes_tensors(w="phase_space")
    def with_outliers(self, w: Tensor, wanted: bool | None = None) -> SnapshotModel:
        """Return a copy whose outlier component has its background, or none.

        Parameters
        ----------
        w : Float[Tensor, "n 6"]
            The stars, which the background is broad about.
        wanted
            True or False: with the model's own component or the default one, or without. None: with it wherever there
            can be one, but under a selection only if the model has its own: its normalisation, which outliers do not
            share, would have to be computed for every block of stars.

        Raises
        ------
        ValueError
            If the component is asked for where it cannot be.
        """
        model = copy.copy(self)
        chosen = self.outliers if wanted is not False else None
        obstacle = self._outlier_obstacle()
        if wanted is None and chosen is None and obstacle is None and self.selection is None:
            wanted = True
        if wanted or chosen is not None:
            if obstacle is not None:
                raise ValueError(f"no outlier component {obstacle}: fit with outliers=False (--no-outliers)")
            chosen = chosen or Outliers()
        if self.projection is not None and chosen is not None and chosen.background is None:
            # stand-ins have the places and velocities that are known
            chosen = Outliers(BackgroundAlongLine.of_stars(w), chosen.median, chosen.width)
        model._modules = dict(self._modules)
        model.outliers = None if chosen is None else chosen.about(w)
        if self.conditional and model.outliers is not None:
            # refused now if it does not know the density of its positions
            cast("StarDensity", model.outliers.background).log_position(w[:1])
        return model

    def _outlier_obstacle(self) -> str | None:
        if self.smoothing is not None:
            return "with the augmented likelihood"
        if isinstance(self.df, TrainedDensity):
            return f"with a {type(self.df).__name__}, which is trained on the actions of all stars"
        return None if self.df.proper else f"with {type(self.df).__name__}, which is no density of orbits"

    def unnormalised(self) -> SnapshotModel:
        """Return a copy without the normalisation of a selection, which all stars share; outliers do not share it."""
        model = copy.copy(self)
        if self.outliers is not None:
            return model
        # that of a conditional likelihood is each star's own
        model.selection = model.points = None
        return model

    def plain(self, outliers: bool = False) -> SnapshotModel:
        """Return a copy with the closed form of positions and velocities, no errors, selection or slopes of streams.

        That is what a fit starts with. On request it keeps its outlier component.
        """
        model = self.closed_form()
        model.selection = model.errors = model.points = None
        model.conditional = False
        model._modules = dict(self._modules) | {"streams": self.streams.without_slopes()}
        if model._modules.pop("sky", None) is not None:
            # it starts with stand-ins for what is not seen, which are all members
            outliers = False
        if not outliers:
            model.outliers = None
        return model

    @takes_tensors(w="phase_space")
    def tabulated(self, w: Tensor) -> SnapshotModel:
        """Return a copy whose finder serves the stars ``w``, as `prepare` returns them, and any part of them.

        What no star changes is computed once (`ActionFinder.tabulated`); fix the sites with `at` first. A literal
        likelihood, whose sampled stars go elsewhere, is returned as it is.
        """
        if self.smoothing is not None:
            return self
        rows = w[..., :6].reshape(-1, 6)
        model = copy.copy(self)
        if self.points is not None:
            rows = torch.cat([rows, self.points.w])
        if self.projection is not None:
            lattice = SkyLattice.covering(w, stretch(self.projection))
            model.lattice = lattice
            model.finder = self.finder.tabulated(self.potential, lattice.w.reshape(-1, 6))
            return model
        if self.conditional:
            model.lattice = VelocityLattice.covering(w, self.df.symmetry != "spherical").laid(self.potential)
            assert model.lattice.w is not None  # it was laid
            rows = torch.cat([rows, model.lattice.w.reshape(-1, 6)])
        model.finder = self.finder.tabulated(self.potential, rows)
        return model

    def density(self) -> ObservedStars:
        """Return the density of the stars as observed; fix the sites with `at` first."""
        if self.selection is not None and self.points is None:
            raise ValueError("a selection needs its normalisation: call select_at(values, catalog, n, seed) first")
        if self.outliers is None:
            return ObservedStars(self.true_density(), self.points)
        if self.outliers.background is None:
            raise ValueError("the outlier component needs its background: call with_outliers(w) first")
        fraction = cast("Tensor", self.outliers.fraction)
        background = self.outliers.background
        if self.conditional and self.projection is None:
            background = BackgroundVelocities(background)
        return ObservedStars(self.true_density(), self.points, background, fraction)

    def true_density(self) -> StarDensity:
        """Return the density of the members' true coordinates, without errors or selection; if so, given positions."""
        if self.smoothing is None:
            mixed = PhaseMixed(self.potential, self.finder, self.df)
            if self.projection is not None:
                return LineOfSightVelocities(mixed, self.projection, cast("SkyLattice | None", self.lattice))
            return VelocityDensity(mixed, cast("VelocityLattice | None", self.lattice)) if self.conditional else mixed
        return self.smoothing.density(Chain(self.potential, self.df, self.finder))

    @takes_tensors(w="phase_space")
    def log_prob(self, w: Tensor) -> Tensor:
        """Return ln p per star of ``w``, as `prepare` returns them; fix the sites with `at` first."""
        return self.density().log_prob(w)

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
        for part in ("potential", "streams", "sky", "df", "outliers"):
            own = {k.removeprefix(part + "."): v for k, v in values.items() if k.startswith(part + ".")}
            if (module := self._modules.get(part)) is not None:
                fixed._modules[part] = freeze(module, own)
        return fixed

    def initial_values(self) -> dict[str, Tensor]:
        """Return a starting value of every site but those of f(J): the prior's centre or the module's own."""
        own = {f"potential.{k}": v for k, v in self.potential.initial_values().items()}
        start = {}
        for name, prior in self.sites().items():
            if name.startswith("potential."):
                start[name] = own[name] if name in own else _centre(name, prior)
            if name.startswith("sky."):
                start[name] = _centre(name, prior) if "binary" in name else torch.zeros((), dtype=torch.float64)
        orbits = self.streams.start(self.at(start).potential, self.finder)
        return start | {f"streams.{name}": value for name, value in orbits.items()}

    def log_prior(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the log prior density of ``values``, with named factors and streams."""
        total = torch.zeros((), dtype=torch.float64)
        for name, prior in self.sites().items():
            total = total + prior.log_prob(plain(values[name], "internal", name)).sum()
        return total + self.log_factors(values) if self.has_factors else total

    @property
    def has_factors(self) -> bool:
        """Whether there may be named factors beside the sites' priors."""
        parts = [part for part in self.potential.modules() if isinstance(part, Potential)]
        own = (type(part).register_factors for part in parts if not isinstance(part, SumPotential))
        return bool(self.streams) or any(method is not Potential.register_factors for method in own)

    def log_factors(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the named factors and of the streams' log-likelihood at ``values``."""
        # an optimiser's trial step may overflow a factor: it must see the NaN and turn back
        with pyro.validation_enabled(False):
            factors = poutine.trace(self.at(values).register_factors).get_trace()
            total = factors.log_prob_sum() if len(factors) > 2 else 0.0
            return torch.as_tensor(total, dtype=torch.float64)

    @keeps_callers_state
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


def _require_sphere_without_selection(
    potential: Potential, selection: SelectionFunction | None, likelihood: object
) -> None:
    what = "likelihood='conditional'" if likelihood == "conditional" else "a LineOfSight likelihood"
    if potential.symmetry != "spherical":
        raise ValueError(
            f"{what} is for spherical potentials, not the {potential.symmetry} "
            f"{type(potential).__name__}: take likelihood='jeans' and state the selection"
        )
    if selection is not None:
        raise ValueError(
            f"{what} allows for any selection in position and takes none, got {selection}: "
            "leave the selection out, or take likelihood='jeans'"
        )


def _require_line_of_sight(df: DistributionFunction, errors: MeasurementErrors | None) -> None:
    if df.symmetry != "spherical":
        raise ValueError(
            f"a LineOfSight likelihood is for f(J) of a sphere, not the {df.symmetry} {type(df).__name__}: leave out "
            "rotation"
        )
    if errors is not None:
        raise ValueError("a LineOfSight likelihood has the errors of its stars: leave out errors")
