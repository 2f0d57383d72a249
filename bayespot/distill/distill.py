"""From the posterior of a potential to formulas: searches, one list of distinct formulas, the stars' weights."""

from __future__ import annotations

import contextlib
import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayespot.callers_state import keeps_callers_state
from bayespot.distill.formulas import distinct
from bayespot.distill.grammar import DistillConfig
from bayespot.distill.physo_search import search
from bayespot.distill.ranking import rank, reference, stars_of
from bayespot.distill.result import Distillation
from bayespot.distill.rewriting import Candidate
from bayespot.distill.search import (
    DistillError,
    Search,
    Task,
    prepare_folder,
    register_results,
    run_searches,
)
from bayespot.distill.target import Target
from bayespot.locks import locked
from bayespot.progress import Progress, Show

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog
    from bayespot.posterior.posterior import PotentialDraws

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
