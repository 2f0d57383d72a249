"""Symbolic regression of the potential with physo; the only module that imports it."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.callers_state import keeps_callers_state
from bayespot.distill.formulas import distinct
from bayespot.distill.grammar import START, UNITS, DistillConfig, Family
from bayespot.distill.least_squares import levenberg_marquardt
from bayespot.distill.ranking import rank, reference, stars_of
from bayespot.distill.result import Distillation
from bayespot.distill.rewriting import Candidate
from bayespot.distill.search import (
    DistillError,
    Found,
    Search,
    Task,
    prepare_folder,
    register_results,
    run_searches,
)
from bayespot.distill.target import Metric, Target, shape_of
from bayespot.locks import locked
from bayespot.progress import Progress, Show

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog
    from bayespot.posterior.posterior import PotentialDraws

#: Formulas that a search keeps.
KEPT = 60
#: A search ends after so many epochs without a better formula once one lies within the posterior.
PATIENCE = 8
#: Before that it starts afresh after so many: on draws of an isochrone 8 of 8 searches then needed 5 epochs on average,
#: where 2 of 8 single starts of 14 epochs did.
STUCK = 4
#: Seconds that a search is given when only the whole budget is known.
SEARCH_SECONDS = 25.0


@keeps_callers_state
def distill(
    posterior: PotentialDraws,
    config: DistillConfig | None = None,
    executor: Executor | None = None,
    folder: Path | None = None,
    resume: bool = False,
    progress: Show = None,
    *,
    catalog: Catalog | None = None,
    jobs: int = 1,
    overwrite: bool = False,
) -> Distillation:
    """Turn the posterior of a spherical potential into formulas with uncertain constants and weights.

    Searches over families and seeds, then one list of distinct formulas with constants refitted to every draw, then
    the stars' likelihood of each with f(J) fitted again.

    Parameters
    ----------
    posterior
        Posterior of a fit, or of an ensemble: its members' draws are pooled.
    config
        `DistillConfig`.
    executor
        Runs the searches: any `concurrent.futures` executor. Default: ``jobs`` processes. A script that
        calls this needs ``if __name__ == "__main__":``, since the processes import it.
    folder
        Receives finished searches, and the result: ``table.ecsv``, ``candidates.json``, ``formulas.tex`` and a
        figure. Nothing is written without one.
    resume
        Do not repeat searches that the folder holds.
    progress
        Show progress on stderr; None: only on a terminal; ``"lines"``: elsewhere a line per stage.
    catalog
        The stars of the fit, for the ranking; None: those that the run keeps. Without any, formulas are ranked by
        the posterior of Phi alone.
    jobs
        Number of processes; with an executor of your own, how many searches it runs at a time.
    overwrite
        Replace an earlier distillation in the folder.

    Raises
    ------
    ValueError
        If the posterior has no draws or no stars, is not spherical, or the folder is taken or written by another
        process.
    DistillError
        If every search fails or nothing was found.
    """
    config = DistillConfig() if config is None else config
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    target = Target.of(posterior, config.n_radii)
    stars = stars_of(posterior, catalog, config.max_stars, config.seed)
    tasks, seconds = plan(config, jobs)
    gauges = {family.name: config.gauge_of(family) for family in config.resolved()}
    with Progress(progress) as bar, contextlib.ExitStack() as stack:
        kept = None
        if folder is not None:
            folder = Path(folder)
            stack.enter_context(locked(folder))
            kept = prepare_folder(folder, target, config, resume, overwrite)
        bar.stage("searching", len(tasks))
        if executor is None:
            # processes of their own, fresh: importing physo changes settings of the whole process
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
            executor = stack.enter_context(pool)
        searches, failures = run_searches(
            tasks, search, lambda task: (target, task.family, config, task.seed, seconds), executor, kept, bar
        )
        bar.stage("distinct formulas")
        formulas = distinct(_candidates(searches, gauges), target, config.max_candidates, config.gauge)
        if not formulas:
            raise DistillError("no formula found: give a larger budget or more families")
        ranking = None
        # formulas that physics forbids come last and are not weighed
        formulas.sort(key=lambda f: (bool(config.forbidden(f.faults, f.gauge)), -f.ln_evidence))
        allowed = [f for f in formulas if not config.forbidden(f.faults, f.gauge)][: config.max_ranked]
        if stars is not None and allowed:
            bar.stage("the stars' likelihood", len(allowed))
            ranking = rank(allowed, reference(posterior), target, stars, config.seed, bar.step)
            failures += ranking.failures
            order = np.argsort(-ranking.weights, kind="stable")
            formulas = [formulas[i] for i in order] + formulas[len(order) :]
            ranking = ranking.ordered(order)
        result = Distillation(tuple(formulas), ranking, config, target, tuple(searches), tuple(failures))
        if folder is not None:
            result.save(folder)
            register_results(folder)
    return result


def plan(config: DistillConfig, jobs: int) -> tuple[list[Task], float | None]:
    """Return the searches to make and the seconds that each is given (None: its epochs count)."""
    families = config.resolved()
    total = None if config.budget_epochs is not None or config.budget_minutes is None else config.budget_minutes * 60
    n = config.searches
    if n is None:
        n = 4 if total is None else max(1, round(total * jobs / (SEARCH_SECONDS * len(families))))
    # seeds first: a distillation that is interrupted has seen every family
    tasks = [Task(family, config.seed * 1000 + k) for k in range(n) for family in families]
    return tasks, None if total is None else total * jobs / len(tasks)


def _candidates(searches: list[Search], gauges: dict[str, Any]) -> list[Candidate]:
    """Pool the formulas of all searches: the best of each first."""
    pooled = [
        (rank_in_search, one.misfit, Candidate(one.text, one.constants, gauges[search.family], search.name))
        for search in searches
        for rank_in_search, one in enumerate(search.found)
    ]
    return [candidate for *_, candidate in sorted(pooled, key=lambda p: p[:2])]


def search(target: Target, family: Family, config: DistillConfig, seed: int, seconds: float | None = None) -> Search:
    """Search one family with physo from one seed.

    Parameters
    ----------
    target
        Posterior of the potential.
    family, config
        What may be used, and how.
    seed
        Of numpy's and torch's global generators, which are restored.
    seconds
        Wall-clock limit; None: ``config.budget_epochs`` alone.
    """
    physo = _physo()
    run = _Run(physo, target, family, config, seconds)
    with _seeded(seed), _quiet(), contextlib.suppress(_Finished):
        while True:
            with contextlib.suppress(_Stuck):
                run.start()
    return Search(family.name, seed, run.epochs, time.perf_counter() - run.begun, run.best())


class _Finished(Exception):
    """Raised out of physo's loop when the budget is spent."""


class _Stuck(Exception):
    """Raised out of physo's loop when nothing better comes: a fresh start finds more than patience does."""


class _Run:
    """One run of physo: logger, visualiser, reward and optimiser of constants in one object."""

    def __init__(
        self, physo: Any, target: Target, family: Family, config: DistillConfig, seconds: float | None
    ) -> None:
        self.physo, self.target, self.family, self.config, self.seconds = physo, target, family, config, seconds
        self.gauge = config.gauge_of(family)
        self.metric: Metric = target.metric(self.gauge)
        self.rows = torch.as_tensor(self.metric.rows)
        n_draws = len(self.metric.draws)
        index = np.linspace(0, n_draws - 1, min(config.class_draws, n_draws)).round().astype(int)
        draws = self.metric.draws[index] if config.mode == "class" else self.metric.mean[None]
        #: What each realisation is compared with, (K, k).
        self.wanted = torch.as_tensor(draws)
        #: Size of the target in posterior standard deviations.
        self.scale = float(np.sqrt((self.metric.mean**2).mean()))
        self.asked = [
            name
            for name in ("density", "asymptote", "centre")
            if getattr(config, name) and (name != "asymptote" or family.vanishes)
        ]
        self.kept: dict[str, Found] = {}
        self.epochs, self.begun = 0, time.perf_counter()
        #: Least misfit of all, and of the current start; when it last fell.
        self.least, self.here, self.improved = math.inf, math.inf, 0

    # -- what physo calls --------------------------------------------------------------------------------

    def residual(self, y: Tensor) -> Tensor:
        """Return residuals ``(*batch, K, k)`` in posterior sd of values ``(*batch, K, n_nodes)``."""
        return y @ self.rows.T - self.wanted

    def reward(self, y_target: Tensor, y_pred: Tensor, y_weights: Any = 1.0) -> float:
        """Return a reward in [0, 1]: 1/(1 + misfit in sd over the size of the target), less for every fault."""
        y = self._values(y_pred.detach())
        misfit = float((self.residual(y) ** 2).mean())
        if not math.isfinite(misfit):
            return 0.0
        # within the posterior a better fit is no better formula
        value = 1 / (1 + math.sqrt(1 + misfit) / self.scale)
        if self.asked:
            shape = shape_of(y.mean(0).numpy(), len(self.target.x))
            faults = shape.faults(self.gauge)
            for name in self.asked:
                if faults[name]:
                    # a slope towards fewer negative densities; a wrong limit is simply wrong
                    value *= 0.7 - 0.4 * shape.negative_density if name == "density" else 0.5
        return value

    def loss(self, func: Callable[[Any], Tensor], params: Any, y_target: Tensor, y_weights: Any = 1.0) -> Tensor:
        """Return the formula's values ``(*batch, K, n_nodes)``; `optimise` makes residuals of them."""
        return self._values(func(params))

    def optimise(self, params: list[Tensor], f: Callable[[Any], Tensor], **_: Any) -> np.ndarray[Any, Any]:
        """Fit the constants of one formula in place, each realisation's own in class mode."""
        by_class = self.config.mode == "class"
        kept = params[1].data if by_class else params[0].data
        tensor = params[1] if by_class else params[0]
        start = kept[0].T.clone() if by_class else kept.clone()

        def residual(c: Tensor) -> Tensor:
            if by_class:
                values = []
                for one in c:
                    tensor.data = one.T[None]
                    values.append(f(params))
                return self.residual(torch.stack(values))
            # constants (p, B, 1) broadcast against the radii: one evaluation for the whole batch
            tensor.data = c.movedim(-1, 0)[None]
            y = f(params)
            return self.residual(y if y.dim() == 3 else y.expand(len(c), 1, self.rows.shape[1]))

        try:
            minimum = levenberg_marquardt(residual, start, iterations=12, tolerance=1e-4)
        finally:
            tensor.data = kept
        good = torch.isfinite(minimum.residual).all()
        if good:
            kept.copy_(minimum.parameters.T[None] if by_class else minimum.parameters)
        return np.zeros(1)

    def _values(self, y: Tensor) -> Tensor:
        n = self.rows.shape[1]
        if self.config.mode == "class":
            return y.reshape(-1, n) if y.numel() > 1 else y.expand(len(self.wanted), n)
        if y.dim() == 1:
            return y[None] if len(y) == n else y.expand(1, n)
        if y.dim() == 0:
            return y.expand(1, n)
        return y[:, None, :] if y.shape[-1] == n else y[:, None, :].expand(-1, 1, n)

    def log(self, epoch: int, batch: Any, model: Any, rewards: Any, **_: Any) -> None:
        """Keep the best formulas of an epoch."""
        self.epochs += 1
        misfits = []
        for i in np.argsort(rewards)[::-1][:KEPT]:
            if rewards[i] <= 0:
                break
            program = batch.programs.get_prog(i, detach=True)
            text = program.get_infix_str()
            # what the reward hides: the misfit without penalties
            y = self._values(
                program(batch.dataset.multi_X_flatten, n_samples_per_dataset=batch.dataset.n_samples_per_dataset)
            )
            misfit = float((self.residual(y.detach()) ** 2).mean())
            misfits.append(misfit)
            if text in self.kept and not misfit < self.kept[text].misfit:
                continue
            table = program.free_consts
            values = table.spe_values[0].mean(-1) if self.config.mode == "class" else table.class_values[0]
            names = sorted(self.family.constants)
            constants = {name: float(values[j]) for j, name in enumerate(names) if name in _tokens(program)}
            self.kept[text] = Found(text, constants, misfit, program.size)
        best = min(misfits, default=math.inf)
        if best < 0.99 * self.here:
            self.here, self.improved = best, self.epochs
        self.least = min(self.least, best)

    def visualise(self, run_logger: Any, batch: Any) -> None:
        """End the run when its budget is spent, or when nothing better comes."""
        late = self.seconds is not None and time.perf_counter() - self.begun > self.seconds
        full = self.config.budget_epochs is not None and self.epochs >= self.config.budget_epochs
        idle = self.epochs - self.improved
        if late or full or (self.least < 1 and idle >= PATIENCE):
            raise _Finished
        if self.least >= 1 and idle >= STUCK:
            self.here, self.improved = math.inf, self.epochs
            raise _Stuck

    def best(self) -> list[Found]:
        """Return the formulas kept: the shortest of every misfit first, then by misfit."""
        ranked = sorted(self.kept.values(), key=lambda f: (f.length, f.misfit))
        front, least = [], math.inf
        for one in ranked:
            if one.misfit < least:
                front.append(one)
                least = one.misfit
        rest = sorted((f for f in ranked if f not in front), key=lambda f: f.misfit)
        return (front + rest)[:KEPT]

    # -- set-up ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run physo until `_Finished` is raised."""
        free_const = self.physo.physym.free_const
        free_const.OPTIMIZERS["levenberg_marquardt"] = self.optimise
        free_const.LOSSES["values"] = self.loss
        names = sorted(self.family.constants)
        units = [[*UNITS[name], 0] for name in names] if self.config.units else None
        nodes = self.target.nodes[None]
        by_class = self.config.mode == "class"
        n_realisations = len(self.wanted)
        constants = {
            "consts_names": names,
            "consts_units": units or [[0, 0, 0]] * len(names),
            "consts_init_val": [START[name] for name in names],
        }
        kind = "spe_free_" if by_class else "class_free_"
        self.physo.ClassSR(
            [nodes] * n_realisations,
            [np.ones(nodes.shape[1])] * n_realisations,
            [1.0] * n_realisations,
            X_names=["r"],
            X_units=[[*UNITS["r"], 0]] if units else [[0, 0, 0]],
            y_name="y",
            y_units=[*UNITS["y"], 0] if units else [0, 0, 0],
            fixed_consts=[1.0],
            fixed_consts_units=[[0, 0, 0]],
            **{f"{kind}{key}": value for key, value in constants.items()},
            op_names=list(self.family.operators),
            use_protected_ops=False,
            stop_reward=2.0,
            epochs=10**9,
            run_config=self.run_config(),
            get_run_logger=lambda: self,
            get_run_visualiser=lambda: self,
            parallel_mode=False,
        )

    def run_config(self) -> dict[str, Any]:
        """Return physo's configuration: that of config0b with the settings of PhySO's measured recipe."""
        config, family = self.config, self.family
        # the stock configuration is changed by every run
        found = copy.deepcopy(self.physo.config.config0b.config0b)
        found["reward_config"].update(
            reward_function=self.reward, zero_out_unphysical=config.units, zero_out_duplicates=True
        )
        found["learning_config"].update(
            batch_size=config.batch_size, max_time_step=config.max_length, observe_units=config.units
        )
        found["free_const_opti_args"] = {"loss": "values", "method": "levenberg_marquardt", "method_args": {}}
        once = [name for name in ("GM", "V2", "E0") if name in family.constants]
        priors: list[tuple[str, Any]] = [
            ("HardLengthPrior", {"min_length": max(3, len(family.prefix) + 1), "max_length": config.max_length}),
            ("NoUselessInversePrior", None),
            ("OccurrencesPrior", {"targets": once, "max": [1] * len(once)}),
        ]
        if config.complexity:
            # physo's "scale" is a variance; the isochrone's tenth token comes with e^-2.5
            priors.append(("SoftLengthPrior", {"length_loc": 4, "scale": 5}))
        if config.units:
            priors.append(("PhysicalUnitsPrior", {"prob_eps": float(np.finfo(np.float32).eps)}))
        for name in ("log", "exp"):
            if name in family.operators:
                priors.append(("NestedFunctions", {"functions": [name], "max_nesting": 1}))
        if family.prefix:
            priors.append(("SymbolicPrior", {"expression": list(family.prefix)}))
        found["priors_config"] = priors
        return found


def _tokens(program: Any) -> set[str]:
    return {str(token) for token in program.tokens}


def _physo() -> Any:
    """Import physo, and undo what its import does to the process: start method, printing, font sizes."""
    import matplotlib

    method = multiprocessing.get_start_method(allow_none=True)
    with _quiet(), matplotlib.rc_context():
        import physo
        import physo.config.config0b
    multiprocessing.set_start_method(method, force=True)
    return physo


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which physo draws from, set the dtype that it takes for granted, and restore all."""
    state, dtype = np.random.get_state(), torch.get_default_dtype()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # its network mixes the default with arrays of this one
        torch.set_default_dtype(torch.float32)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            np.random.set_state(state)  # noqa: NPY002
