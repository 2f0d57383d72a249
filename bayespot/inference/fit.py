"""Fit a model to a catalogue: data-based start, MAP, Fisher matrix, guide or sampler, draws."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributions import biject_to

from bayespot.actions.spherical import SphericalActions
from bayespot.callers_state import keeps_callers_state
from bayespot.df import TrainedDensity, density
from bayespot.df.base import LogFraction
from bayespot.df.components import CANDIDATES, choose_n_components
from bayespot.inference.alternating import UNSETTLED, alternate, require_plain
from bayespot.inference.blocks import stars_in
from bayespot.inference.checkpoint import Checkpoints
from bayespot.inference.diagnose import ANGLE_STARS, Draws, diagnose, n_emulated
from bayespot.inference.emulator import Emulator
from bayespot.inference.guides import Family, WhitenedGuide
from bayespot.inference.importance import MOST_ROUNDS
from bayespot.inference.latent import OUTLIERS, LatentSpace
from bayespot.inference.linearised import Responder, gauss_newton, responds
from bayespot.inference.map import Climb
from bayespot.inference.marginal import MarginalPosterior, integrable, marginal, n_marginal_steps
from bayespot.inference.membership import named, outlier_probability, unremarkable
from bayespot.inference.optimise import Report, adam_until_bound, count_unbound, lbfgs
from bayespot.inference.resampling import by_weight
from bayespot.inference.result import FitConfig, FitError, FitResult
from bayespot.inference.samplers import (
    Chain,
    WhitenedPosterior,
    check_svgd_size,
    emulated,
    n_emulated_steps,
    nuts,
    svgd,
)
from bayespot.inference.spherical_start import spherical_start
from bayespot.inference.svi import maximise_elbo, step_seed
from bayespot.inference.verdict import RESAMPLED
from bayespot.likelihood.conditional import VelocityLattice
from bayespot.likelihood.errors import ignored_errors
from bayespot.likelihood.model import SnapshotModel
from bayespot.likelihood.outliers import LIKELY
from bayespot.potential.base import radius
from bayespot.progress import Progress, Show

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog

_CHECKPOINT_SECONDS = 20.0
#: Fewest stars of a subset on the way to the maximum, and how near to its own maximum the climb goes.
_LEAST_SUBSET, _SUBSET_TOLERANCE = 4000, 0.3
#: k-hat from which the mean of weights does not exist, and effective fraction of the draws below which that counts: one
#: draw would stand for the posterior. k-hat of nearly equal weights of few draws is often as large.
_NO_MEAN, _FEW = 1.0, 0.2
#: r-hat of the chains of an emulated posterior up to which they count as mixed.
_MIXED = 1.2
#: Effective draws of importance sampling that are enough, draws asked for per round that it may take, and rows of the
#: data up to which it is the default.
_EFFECTIVE, _DRAWS_A_ROUND, _MOST_ROWS = 200, 100, 100_000
#: Stars of a flattened galaxy that the first climb goes with.
_ON_THE_WAY = 2000
#: Fraction of outliers that a fit starts with.
_START_FRACTION = 0.01
#: Draws over which the probability of an outlier is averaged, and below which probability at their mean it is not.
_OUTLIER_DRAWS, _NEGLIGIBLE = 50, 1e-4
#: Numbers of components to choose from where the guide is joint: fewer bias the potential by more than held-out stars
#: can tell, of more f(J) has directions far from Gaussian.
_JOINT_CANDIDATES = (3, 4)


@keeps_callers_state
def fit(
    model: SnapshotModel,
    catalog: Catalog,
    config: FitConfig | None = None,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Show = None,
) -> FitResult:
    """Infer the posterior of the potential from one snapshot.

    Start from the data or the prior, Adam until every star is bound, choice of the number of components of
    f(J), full-batch L-BFGS to the maximum a posteriori, Fisher matrix, and from there, in whitened coordinates, what
    ``config.guide`` names: stochastic variational inference, Stein particles, NUTS, or Hamiltonian Monte Carlo with an
    emulator. A trained f(J) (`TrainedDensity`)
    is trained and held fixed in turns with the potential first. The model is not changed.

    Parameters
    ----------
    model
        Potential, f(J) and finder with priors.
    catalog
        The stars.
    config
        `FitConfig`.
    checkpoint
        File that receives the state of the fit after every stage, and every 20 s within the last (SVI or sampling),
        written atomically. A resumed fit ends with the numbers of one that was left alone.
    resume
        Continue from ``checkpoint`` instead of starting anew.
    progress
        Show progress on stderr; None: only on a terminal; ``"lines"``: elsewhere a line per stage.

    Raises
    ------
    ValueError
        If the catalogue has fewer stars than the model has parameters, SVGD is asked to move too many latents, the
        checkpoint is of another fit, or the model has a part that no checkpoint can hold.
    FitError
        If no potential is found in which the stars are bound, or the likelihood is not finite.
    """
    config = FitConfig() if config is None else config
    run = _Fit(model, catalog, config, checkpoint)
    if resume:
        run.load()
    with Progress(progress) as bar:
        return run.complete(bar)


class _Fit:
    """One run of the stages; ``state`` is everything a checkpoint must hold."""

    def __init__(self, model: SnapshotModel, catalog: Catalog, config: FitConfig, checkpoint: Path | None) -> None:
        self.catalog, self.config = catalog, config
        self.checkpoints = None if checkpoint is None else Checkpoints(checkpoint, model, catalog, config)
        model = copy.deepcopy(model)
        if config.df is not None:
            flattened = model.potential.symmetry == "axisymmetric"
            model.df = density(config.df, rotation=model.df.symmetry != "spherical", flattened=flattened)
        #: f(J) that is trained in turns with the potential; until then a mixture stands in for it.
        trained = model.df if isinstance(model.df, TrainedDensity) else None
        model = model.with_outliers(catalog.w, config.outliers)
        if trained is not None:
            require_plain(model)
        #: The stars as the likelihood sees them.
        self.data = model.prepare(catalog, config.seed)
        self.config = _resolved(config, model, self.data[..., 0].numel())
        if trained is not None:
            model.df = trained.start()
        #: The finder before its choices are settled, see `_settle`.
        self.finder = model.finder
        #: Their coordinates.
        self.w = catalog.w
        self.generator = torch.Generator().manual_seed(config.seed)
        self.order = torch.randperm(len(self.w), generator=self.generator)
        sharp = self.order if model.errors is None else _sharp(catalog, self.order)
        self.subset = self.w[sharp[: config.subset_size]]
        self.few_rows = self._few(sharp)
        self.few = self.w[self.few_rows]
        #: Those of the few that a start must bind.
        self.core = self.few if model.outliers is None else self.few[unremarkable(self.w)[self.few_rows]]
        if isinstance(model.finder, SphericalActions):
            r = radius(torch.cat([self.w, *(stream.w for stream in model.streams)])[:, :3])
            if float(r.min()) <= 0:
                raise ValueError(f"star {int(r.argmin())} is exactly at the centre; drop it (it has no angles)")
        self.state: dict[str, Any] = {
            "model": model,
            "trained": trained,
            "rounds": [],
            "stage": "start",
            "seconds": {},
            "warnings": [] if model.errors is not None else ignored_errors(catalog),
            "component_table": [],
            "map_iterations": 0,
            "elbo": [],
            "svi_step": 0,
            "chains": [],
            "selection_points": 0,
            "selection_error": 0.0,
        }
        self._saved = time.monotonic()

    def _few(self, order: Tensor) -> Tensor:
        """Rows of a small sample for the start, with the fastest stars of the whole catalogue among it."""
        n = len(order)
        chosen = order[: min(n, 5000)]
        w = self.w[order]
        v2 = (w[:, 3:] ** 2).sum(-1) * radius(w[:, :3])
        extreme = order[v2.topk(min(200, n)).indices]
        return torch.cat([chosen, extreme]).unique()

    # -- checkpoints -------------------------------------------------------------------------------------

    def save(self, force: bool = True) -> None:
        if self.checkpoints is None or not (force or time.monotonic() - self._saved > _CHECKPOINT_SECONDS):
            return
        self.checkpoints.save(self.state)
        self._saved = time.monotonic()

    def load(self) -> None:
        if self.checkpoints is None:
            raise ValueError("nothing to resume: give the checkpoint of the fit")
        self.state = self.checkpoints.load()

    # -- stages ------------------------------------------------------------------------------------------

    def complete(self, bar: Progress) -> FitResult:
        stages: dict[str, Callable[[Progress], None]] = {"start": self._start}
        if self.state["trained"] is not None:
            stages["orbits"] = self._orbits
        stages["map"] = self._map
        others = {"nuts": self._nuts, "svgd": self._svgd, "emulated": self._emulated, "marginal": self._marginal}
        last = others.get(cast("str", self.config.guide), self._svi)
        stages[last.__name__.removeprefix("_")] = last
        names = list(stages)
        for i, name in enumerate(names):
            if self.state["stage"] != name:
                continue
            begun = time.perf_counter()
            stages[name](bar)
            seconds = self.state["seconds"]
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun
            self.state["stage"] = names[i + 1] if i + 1 < len(names) else "draws"
            self.save()
        return self._result(bar)

    @property
    def model(self) -> SnapshotModel:
        return self.state["model"]

    def _start(self, bar: Progress) -> None:
        """Initial f(J) in the initial potential, Adam, and the number of components."""
        values = self._scattered(self.model.initial_values())
        if self.config.guide == "svgd":
            check_svgd_size(sum(v.numel() for v in values.values()))  # before work that would be in vain
        wanted = self.config.n_components or self.model.df.n_components
        # a flexible f(J) is not needed to bind the stars, nor is its number of components known yet
        bar.stage("start: binding the stars")

        def report(u: Tensor, note: str) -> None:
            bar.step(note)

        values = spherical_start(self.model, values, self.core, self.config, report)
        self._settle(values)
        values = self._with_df(values, min(wanted or 3, 3), self.core)
        values = values | self._rough(values, report)
        self._settle(values)
        if self.model.selection is not None or self.model.conditional:
            bar.stage("start: allowing for the selection")
            climb = self._climb(report)
            values = climb.selected(values)
            self.state["model"] = climb.model
        n_components = wanted
        if n_components is None:
            bar.stage("start: choosing the number of components of f(J)", len(CANDIDATES))
            n_components = self._choose(values, bar.step)
        members = self._members(values)
        without = {k: v for k, v in values.items() if not k.startswith("df.")}
        values = self._with_df(without, n_components, members, self._log_fraction(values, members))
        space = LatentSpace(self.model)
        n_orbits = sum(part.stop - part.start for name, part in space.slices.items() if name.startswith("df."))
        self.catalog.require(space.n_potential + (0 if self.model.df.regularised else n_orbits))
        if self.config.guide == "svgd":
            check_svgd_size(space.size if self._joint else space.n_potential)
        self.state["u"] = space.vector(values)

    def _settle(self, values: Mapping[str, Tensor]) -> None:
        """Let the finder choose by the potential at ``values``: on the way from there it chooses no more."""
        potential = self.model.at(values).potential
        self.model.finder = self.finder.settled(potential, self.w)

    def _scattered(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Displace the start at random by ``start_scatter`` in unconstrained coordinates."""
        if self.config.start_scatter == 0:
            return values
        generator = torch.Generator().manual_seed(self.config.seed)
        priors, moved = self.model.sites(), {}
        for name, value in values.items():
            transform = biject_to(priors[name].support)
            raw = transform.inv(value)
            noise = torch.randn(raw.shape, generator=generator, dtype=torch.float64)
            moved[name] = transform(raw + self.config.start_scatter * noise)
        return moved

    def _rough(self, values: Mapping[str, Tensor], report: Report) -> dict[str, Tensor]:
        """Bind the core's stars and climb, in the end with all of the few, each a member or an outlier."""
        config, space = self.config, LatentSpace(self.model.plain())
        advice = "check the units (kpc, km/s), the frame (Galactocentric) and the prior of the mass"
        u = space.vector(dict(values))
        # a start from the sphere that the stars feel binds them already
        steps = 0 if responds(space) and count_unbound(space, u, self.core) == 0 else config.adam_steps
        try:
            u = adam_until_bound(space, u, self.core, steps, config.adam_learning_rate, report)
        except ValueError as error:
            # so torch says of f(J) without a scale that a step made NaN
            if "within the support" not in str(error):
                raise
            unbound = count_unbound(space, u, self.few)
            raise FitError(f"{unbound} of {len(self.few)} stars stay unbound, f(J) has no scale: {advice}") from error
        if count_unbound(space, u, self.core) > len(self.core) // 2:
            unbound, steps = count_unbound(space, u, self.few), 10 * config.adam_steps
            raise FitError(f"{unbound} of {len(self.few)} stars stay unbound after {steps} steps: {advice}")
        if self.model.smoothing is None:
            information, u = self._climbed(space, u, self.core, report)
        values = space.values(u)
        if self.model.outliers is not None:
            values = values | {OUTLIERS: torch.tensor(_START_FRACTION, dtype=torch.float64)}
        if self.model.outliers is not None and self.model.projection is None:
            space = LatentSpace(self.model.plain(outliers=True))
            u = space.vector(values)
            # the fraction comes last, and its information is that of a count
            count = torch.tensor([[_START_FRACTION * len(self.few)]], dtype=torch.float64)
            if responds(space):
                u, _, _ = gauss_newton(space, u, _thinned(self.few), 0.3, 10, report, 3000)
            else:
                u, _, _ = lbfgs(space, u, self.few, torch.block_diag(information, count), 0.3, 60, report)
            values = space.values(u)
        return values

    def _climbed(self, space: LatentSpace, u: Tensor, w: Tensor, report: Report) -> tuple[Tensor, Tensor]:
        """Return the information of a plain model at or near u, and where a short climb leads."""
        if responds(space):
            w = _thinned(w)
            u, _, _ = gauss_newton(space, u, w, 0.3, 10, report, 3000)
            return space.fisher(u, w, 3000, self.config.seed, responder=Responder(space, u, w)), u
        information = space.fisher(u, w, 3000, self.config.seed)
        u, _, _ = lbfgs(space, u, w, information, 0.3, 60, report)
        return information, u

    def _members(self, values: Mapping[str, Tensor]) -> Tensor:
        """The subset's stars that are more likely members than outliers."""
        if self.model.outliers is None:
            return self.subset
        fixed = self.model.plain(outliers=True).at(values)
        return self.subset[outlier_probability([fixed], self.subset) < LIKELY]

    def _with_df(
        self, values: Mapping[str, Tensor], n_components: int, w: Tensor, log_z: LogFraction | None = None
    ) -> dict[str, Tensor]:
        """Resolve f(J) to ``n_components`` and start it at its best fit in the given potential."""
        J = self._actions(values, w)
        self.model.df = self.model.df.resolved(n_components, J, near_data=not self.model.separable)
        start = self.model.df.fit_actions(J[:20_000], self.config.seed, log_z=log_z)
        return dict(values) | {f"df.{name}": value for name, value in start.items()}

    @torch.no_grad()
    def _log_fraction(self, values: Mapping[str, Tensor], w: Tensor) -> LogFraction | None:
        """What normalises the stars w as a function of f(J) alone, in the given potential; None: nothing.

        ln Z of a selection; of velocities given positions the mean of ln n.
        """
        fixed = self.model.at({name: value for name, value in values.items() if not name.startswith("df.")})
        if self.model.projection is not None:
            return None  # it starts with stand-ins for all coordinates
        if self.model.conditional:
            lattice = VelocityLattice.covering(w, self.model.df.symmetry != "spherical")
            return lattice.in_actions(fixed.potential, fixed.finder, w)
        return None if self.model.points is None else self.model.points.in_actions(fixed.potential, fixed.finder)

    @torch.no_grad()
    def _actions(self, values: Mapping[str, Tensor], w: Tensor) -> Tensor:
        fixed = self.model.at(values)
        return fixed.finder.capped_actions(fixed.potential, w).J

    def _choose(self, values: Mapping[str, Tensor], tick: Callable[[str], None]) -> int:
        members = self._members(values)
        J = self._actions(values, members)
        choice = choose_n_components(
            self.model.df,
            J,
            self.config.seed,
            CANDIDATES if self.model.separable else _JOINT_CANDIDATES,
            tick=tick,
            log_z=self._log_fraction(values, members),
            joint=not self.model.separable,
            criterion=self.config.component_choice,
        )
        self.state["component_table"] = [dict(row) for row in choice.table]
        return choice.n_components

    def _orbits(self, bar: Progress) -> None:
        """Train f(J) and maximise over the potential in turns; then f(J) stays."""
        state = self.state
        bar.stage("f(J) and the potential in turns")

        def report(u: Tensor, note: str) -> None:
            bar.step(note)

        for found in alternate(
            self.model, state["trained"], state["u"], self.data, self.config, state["rounds"], report
        ):
            state.update(model=found.model, trained=found.model.df, u=found.u, rounds=found.rounds)
            state["map_iterations"] += found.rounds[-1].iterations
            self.save()
        if (moved := state["rounds"][-1].moved) > UNSETTLED:
            state["warnings"].append(
                f"the last of {len(state['rounds'])} rounds of training f(J) moved the potential by {moved:.2f} "
                "posterior sd: raise df_rounds"
            )

    def _map(self, bar: Progress) -> None:
        """L-BFGS to the MAP: of many stars on ever larger subsets, each of which begins where the last one ended."""
        config = self.config
        sizes = (
            max(stars_in(self.data, rows), _LEAST_SUBSET) for rows in (config.subset_size // 10, config.subset_size)
        )
        sets = [self.data[self.order[:size]] for size in sizes if 2 * size < len(self.data)] + [self.data]
        bar.stage("maximum a posteriori", config.map_iterations * len(sets))

        def report(_: Tensor, note: str) -> None:
            # not kept: L-BFGS goes another way from half-way up, and a resumed fit would end with other numbers
            bar.step(note, 4)

        u, climb = self.state["u"], self._climb(report)
        for k, data in enumerate(sets):
            # the maximum of a subset is as far from that of ten times as many stars as three of its standard deviations
            tolerance = config.map_tolerance if data is self.data else _SUBSET_TOLERANCE
            self._settle(LatentSpace(self.model).values(u))
            u = climb.towards(u, data, tolerance) if k == 0 else climb.onwards(u, data, tolerance)
        if self.model.selection is None:
            bar.stage("Fisher information")
            if climb.emulator is not None:
                information = climb.with_orbits(climb.emulator, u, self.data)
            else:
                information = climb.information(u, self.data, config.fisher_stars, bar.step)
        else:
            u, information, n_points, error = climb.normalised_finely(u, bar.stage)
            self.state.update(selection_points=n_points, selection_error=error)
        self.state["model"] = climb.model
        if climb.emulator is not None:
            self.state["emulator"] = climb.emulator.state()
        self.state["map_iterations"] += climb.iterations
        space = LatentSpace(self.model)
        _, slope = space.gradient(u, self.data)
        if config.guide == "emulated" and climb.emulator is not None:
            slope[: climb.emulator.d] += climb.emulator.derivatives(u).T @ climb.emulator.correction
        norm = float(slope @ torch.linalg.lstsq(information, slope[:, None]).solution[:, 0]) ** 0.5
        if not torch.isfinite(information).all() or not norm == norm:
            raise FitError("the likelihood is not finite at its maximum: look for stars with absurd coordinates")
        self._require_members(u)
        self.state.update(u=u, information=information, gradient_norm=norm)

    @torch.no_grad()
    def _require_members(self, u: Tensor) -> None:
        """Refuse a potential in which most stars are outliers: of these the likelihood says nothing."""
        if self.model.outliers is None:
            return
        few = self.data[self.few_rows[: stars_in(self.data, 5000)]]
        lost = int((outlier_probability([self.model.at(LatentSpace(self.model).values(u))], few) > LIKELY).sum())
        if lost > len(few) // 2:
            raise FitError(
                f"{lost} of {len(few)} stars are outliers in the best potential found: check the units (kpc, km/s), "
                "the frame (Galactocentric) and the prior of the mass, or fit without outliers (--no-outliers)"
            )

    def _climb(self, report: Report) -> Climb:
        few = self.data[self.few_rows[: stars_in(self.data, 5000)]]
        return Climb(self.model, self.catalog, self.data, few, self.config, report)

    def _guide(self, space: LatentSpace) -> WhitenedGuide:
        """The guide before training: the Laplace approximation, up to its families."""
        config = self.config
        family = cast("Family", "full_rank" if config.guide == "laplace" else config.guide)
        df = config.df_guide or ("joint" if self._joint else "point")
        return WhitenedGuide(space, self.state["u"], self.state["information"], family, df, config.guide_rank)

    def _svi(self, bar: Progress) -> None:
        """Train the guide; for the Laplace approximation there is nothing to train."""
        config = self.config
        guide = self._guide(LatentSpace(self.model))
        self.state["guide"] = self.state.get("guide") or guide.state_dict()
        if config.guide != "laplace" and config.svi_steps > 0:
            maximise_elbo(self.model, guide, self.data, config, self.state, lambda: self.save(force=False), bar)

    # -- draws -------------------------------------------------------------------------------------------

    @property
    def _joint(self) -> bool:
        """Whether f(J) is inferred together with the potential."""
        apart = self.model.separable and self.config.guide != "nuts"
        return (self.config.df_guide or ("point" if apart else "joint")) == "joint"

    def _whitened(self) -> WhitenedPosterior:
        space = LatentSpace(self.model)
        return WhitenedPosterior(space, self.data, self.state["u"], self.state["information"], self._joint)

    def _nuts(self, bar: Progress) -> None:
        """Chains of NUTS, one after the other; a finished chain is not run again."""
        config, chains = self.config, self.state["chains"]
        n = max(4, math.ceil(config.n_draws / config.nuts_chains))
        while len(chains) < config.nuts_chains:
            bar.stage(f"NUTS, chain {len(chains) + 1} of {config.nuts_chains}", n + config.nuts_warmup)
            seed = step_seed(config.seed, len(chains))
            chains.append(nuts(self._whitened(), n, config.nuts_warmup, seed, bar.step))
            self.save()

    def _svgd(self, bar: Progress) -> None:
        """Stein particles from the Laplace approximation to the posterior."""
        config, target = self.config, self._whitened()
        bar.stage("Stein particles", config.svgd_steps)
        z, rest = svgd(target, config.svgd_particles, config.svgd_steps, config.seed, bar.step)
        self.state["chains"] = [Chain(z, 0)]
        if rest > 0.2:
            self.state["warnings"].append(
                f"the particles of SVGD still move ({rest:.2f} of the first step's direction): raise svgd_steps"
            )

    def _emulated(self, bar: Progress) -> None:
        """Hamiltonian Monte Carlo with the emulator, f(J) at its maximum or drawn too."""
        config, state = self.config, self.state
        emulator = Emulator.restored(LatentSpace(self.model), state["emulator"])
        n = n_emulated(self.model, config) or config.n_draws
        bar.stage("posterior by Hamiltonian Monte Carlo", n_emulated_steps(n))
        draws, emulator, spread = emulated(emulator, state["u"], self.data, n, config.seed, bar.step)
        state.update(draws=draws, emulator=emulator.state())
        if spread > _MIXED:
            self.state["warnings"].append(
                f"the chains of Hamiltonian Monte Carlo have not mixed (r-hat {spread:.2f} > {_MIXED}): bands may be "
                "too narrow; compare with guide nuts, or another seed"
            )

    def _marginal(self, bar: Progress) -> None:
        """Potentials by adaptive importance sampling, f(J) integrated out in each."""
        config, state = self.config, self.state
        target = MarginalPosterior(LatentSpace(self.model), self.data, state["u"])
        # where these are too few the verdict asks for a larger n_draws
        most = max(MOST_ROUNDS, math.ceil(config.n_draws / _DRAWS_A_ROUND))
        bar.stage("posterior by importance sampling", n_marginal_steps(target, most))
        wanted = min(config.n_draws, _EFFECTIVE)
        draws = marginal(target, state["information"], wanted, config.seed, bar.step, most)
        state.update(draws=draws.u, log_weights=draws.log_weights)

    def _draws(self, space: LatentSpace) -> Draws:
        config, state = self.config, self.state
        if config.guide == "marginal":
            return Draws(state["draws"], None, log_weights=state["log_weights"])
        if config.guide == "emulated":
            u = state["draws"]
            return Draws(u, Emulator.restored(space, state["emulator"]).log_proposal(u))
        if config.guide in ("nuts", "svgd"):
            chains = state["chains"]
            u = self._whitened().u(torch.cat([chain.z for chain in chains]))
            return Draws(u, None, len(chains), sum(chain.n_divergent for chain in chains) / len(u))
        guide = self._guide(space)
        guide.load_state_dict(state["guide"])
        return Draws(*guide.draw(config.n_draws, config.seed))

    def _result(self, bar: Progress) -> FitResult:
        config, space, state = self.config, LatentSpace(self.model), self.state
        begun = time.perf_counter()
        bar.stage("posterior draws and diagnostics")
        drawn = self._draws(space)
        probability = self._outliers(space, drawn.u)
        found, log_weights = diagnose(
            space, self.data, self._angle_stars(probability), drawn, config, state, bar.step, probability
        )
        found.outliers.extend(named(probability, self.catalog.names))
        found.seconds["draws"] = time.perf_counter() - begun
        statistics = {} if drawn.log_q is None else {"log_q": drawn.log_q, "log_weights": log_weights}
        if config.guide == "emulated" and found.k_hat > _NO_MEAN and not (found.weight_fraction or 0.0) >= _FEW:
            found.warnings.append(
                "the emulated posterior is too far from the exact one for weights to correct it: draws are as they came"
            )
        elif config.guide in RESAMPLED and not torch.isnan(log_weights).any():
            rows = by_weight(log_weights, config.n_draws, config.seed)
            drawn = drawn._replace(u=drawn.u[rows])
            statistics = {}
        r = radius(self.w[:, :3])
        q = [0.0, 0.01, 0.05, 0.16, 0.5, 0.84, 0.95, 0.99, 1.0]
        ranked = r.sort().values
        return FitResult(
            model=self.model,
            draws={k: v.detach() for k, v in space.values(drawn.u).items()},
            map={k: v.detach() for k, v in space.values(state["u"]).items()},
            config=config,
            diagnostics=found,
            catalog={
                "n_stars": len(self.w),
                "r_q": [float(ranked[min(int(p * len(r)), len(r) - 1)]) for p in q],
                "radii": [float(x) for x in ranked[:: max(1, len(r) // 500)]],
                "outliers": found.outliers,
                "meta": dict(self.catalog.meta),
            },
            sample_stats=statistics,
            n_chains=drawn.n_chains,
            outliers=probability,
        )

    @torch.no_grad()
    def _outliers(self, space: LatentSpace, u: Tensor) -> Tensor | None:
        """Probability of each star to be an outlier, averaged over draws where it is not negligible at their mean."""
        if self.model.outliers is None:
            return None

        def at(rows: Tensor) -> Iterator[SnapshotModel]:
            return (self.model.at(space.values(row)) for row in rows)

        centre = self.state["u"] if self.config.guide in RESAMPLED else u.mean(0)
        probability = outlier_probability(at(centre[None]), self.data)
        doubtful = (probability > _NEGLIGIBLE).nonzero()[:, 0]
        if len(doubtful):
            rows = u[torch.linspace(0, len(u) - 1, min(_OUTLIER_DRAWS, len(u))).long()]
            probability[doubtful] = outlier_probability(at(rows), self.data[doubtful])
        return probability

    def _angle_stars(self, probability: Tensor | None) -> Tensor:
        """Coordinates of members for the test of phase mixing."""
        rows = self.order[:ANGLE_STARS]
        return self.w[rows if probability is None else rows[probability[rows] < LIKELY]]


def _thinned(w: Tensor) -> Tensor:
    """Return about as many stars as the way to a first f(J) and potential needs."""
    return w[:: max(1, len(w) // _ON_THE_WAY)]


def _resolved(config: FitConfig, model: SnapshotModel, rows: int) -> FitConfig:
    """Return the settings with a guide: of those that ask for none, the best that the model allows."""
    possible = responds(LatentSpace(model))
    if config.guide == "emulated" and not possible:
        raise ValueError(
            "guide 'emulated' is for an axisymmetric potential with StaeckelFudge, a likelihood in closed form and no "
            "streams; take 'full_rank', or None, which chooses"
        )
    fits = possible and config.df_guide in (None, "point" if model.is_plain else "joint")
    if config.guide == "emulated" and not fits:
        kept = "joint" if config.df_guide == "point" else "at a point"
        raise ValueError(f"guide 'emulated' has f(J) {kept} here: leave df_guide to it")
    can_integrate = integrable(model) and config.df_guide in (None, "joint")
    if config.guide == "marginal" and not can_integrate:
        raise ValueError(
            f"guide 'marginal' integrates over a logistic_gp f(J) of a sphere, got {type(model.df).__name__}"
            + (" with the augmented likelihood" if model.smoothing is not None else "")
            + f" ({model.potential.symmetry} potential): take df='logistic_gp', or None, which chooses a guide"
        )
    if config.guide is not None:
        return config
    if model.conditional and can_integrate and rows <= _MOST_ROWS:
        return dataclasses.replace(config, guide="marginal")
    return dataclasses.replace(config, guide="emulated" if fits else "full_rank")


def _sharp(catalog: Catalog, order: Tensor) -> Tensor:
    """Rows of the stars whose coordinates are good enough to start from, in the same order.

    Errors make fast stars of slow ones: a potential that binds all of them where they were observed may be far
    too deep for the fit to come back from. Stars with velocity or position known to 20 % are taken, or
    the better half if these are fewer.
    """
    if catalog.covariance is None:
        return order
    variance = catalog.covariance.diagonal(dim1=1, dim2=2)
    ratio = torch.maximum(
        variance[:, 3:].sum(-1) / (catalog.v**2).sum(-1), variance[:, :3].sum(-1) / (catalog.x**2).sum(-1)
    )
    limit = max(0.04, float(ratio.median()))
    return order[ratio[order] <= limit]
