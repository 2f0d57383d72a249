"""A deep ensemble: the same fit from different starts and feature banks, in parallel processes."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bayespot.callers_state import keeps_callers_state
from bayespot.inference.checkpoint import Checkpoints
from bayespot.inference.fit import fit
from bayespot.inference.result import NO_EVIDENCE, EnsembleResult, FitConfig, FitResult, Weighting
from bayespot.inference.verdict import RESAMPLED
from bayespot.likelihood.model import SnapshotModel
from bayespot.potential.neural import MassSlopeNetwork
from bayespot.progress import Progress, Show

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog

#: Displacement of the members' starts, in the unconstrained coordinates of the potential's latents.
SCATTER = 0.2


def member_model(model: SnapshotModel, k: int, n_members: int) -> SnapshotModel:
    """Return the model of member k: the features of mass-slope networks shifted by a fraction of their spacing.

    Members fill the spacing evenly; member 0 is the model itself. What a network cannot represent between its
    features differs from member to member, and so appears as scatter between them.
    """
    own = copy.deepcopy(model)
    fraction = (k / n_members + 0.5) % 1 - 0.5
    for part in own.potential.modules():
        if isinstance(part, MassSlopeNetwork):
            part.shift_features(fraction)
    return own


def member_config(config: FitConfig, k: int) -> FitConfig:
    """Return the settings of member k: another seed and a displaced start; member 0 has the settings given."""
    if k == 0:
        return config
    return dataclasses.replace(config, seed=config.seed + 100_003 * k, start_scatter=config.start_scatter or SCATTER)


@keeps_callers_state
def fit_ensemble(
    model: SnapshotModel,
    catalog: Catalog,
    config: FitConfig | None = None,
    n_members: int = 5,
    *,
    jobs: int | None = None,
    weighting: Weighting = "equal",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Show = None,
    prepare: Callable[[], Any] | None = None,
) -> EnsembleResult:
    """Fit the model ``n_members`` times, from different starts and feature banks, and keep all.

    The members' mixture holds what a single fit leaves out: other local maxima, other f(J), and what depends on where
    the network's features are (Lakshminarayanan, Pritzel & Blundell 2017, NeurIPS). Member 0 is the fit that `fit`
    returns. With ``jobs`` above 1 members run in processes of their own, started afresh ("spawn"): a script that calls
    this needs ``if __name__ == "__main__":``.

    Parameters
    ----------
    model, catalog, config
        As for `fit`.
    n_members
        Number of members, at least 2.
    jobs
        Processes at a time; None: one per core, at most the members. 1: none, one member after the other.
    weighting
        Weights of the mixture: ``"equal"`` or ``"evidence"``, see `EnsembleResult`.
    checkpoint
        Folder for the state of unfinished members and the results of finished ones.
    resume
        Take finished members from there and continue the others.
    progress
        Show progress on stderr; None: only on a terminal; ``"lines"``: elsewhere a line per stage.
    prepare
        Called first in every process, for instance to import a user's model file.

    Raises
    ------
    ValueError
        If there are fewer than 2 members, if they will have no evidence to be weighted by, or as `fit`.
    FitError
        As `fit`, for the first member that fails.
    """
    config = FitConfig() if config is None else config
    if n_members < 2:
        raise ValueError(f"an ensemble needs at least 2 members, got {n_members}")
    if weighting == "evidence" and (config.guide in ("nuts", "svgd", *RESAMPLED) or config.k_hat_draws == 0):
        raise ValueError(NO_EVIDENCE)
    jobs = min(n_members, os.cpu_count() or 1) if jobs is None else min(jobs, n_members)
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    tasks = [
        _Task(member_model(model, k, n_members), catalog, member_config(config, k), _place(checkpoint, k), resume)
        for k in range(n_members)
    ]
    alone = jobs == 1
    members = [task.run(progress) for task in tasks] if alone else _in_processes(tasks, jobs, prepare, progress)
    return EnsembleResult(members, weighting)


@dataclasses.dataclass(frozen=True)
class _Task:
    """One member to be fitted; ``place`` is the path of its result, its checkpoint lies beside it."""

    model: SnapshotModel
    catalog: Catalog
    config: FitConfig
    place: Path | None
    resume: bool

    def run(self, progress: Show) -> FitResult:
        """Return the member's result: fitted, continued, or read if it was finished before."""
        if self.place is None:
            return fit(self.model, self.catalog, self.config, progress=progress)
        finished = Checkpoints(self.place, self.model, self.catalog, self.config)
        if self.resume and self.place.exists():
            return finished.load()
        checkpoint = self.place.with_name(f"{self.place.stem}.checkpoint{self.place.suffix}")
        resume = self.resume and checkpoint.exists()
        result = fit(self.model, self.catalog, self.config, checkpoint=checkpoint, resume=resume, progress=progress)
        finished.save(result)
        checkpoint.unlink(missing_ok=True)
        return result


def _place(folder: Path | None, k: int) -> Path | None:
    return None if folder is None else folder / f"member-{k}.safetensors"


def _in_processes(tasks: list[_Task], jobs: int, prepare: Callable[[], Any] | None, progress: Show) -> list[FitResult]:
    threads = max(1, torch.get_num_threads() // jobs)
    found: dict[int, FitResult] = {}
    # forking a process in which torch has started threads may hang
    context = multiprocessing.get_context("spawn")
    with (
        Progress(progress) as bar,
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads, prepare)) as pool,
    ):
        bar.stage(f"ensemble, {jobs} members at a time", len(tasks))
        # as bytes: torch would share tensors through file descriptors, of which there may be too few
        futures = {pool.submit(_run, pickle.dumps(task)): k for k, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                found[futures[future]] = pickle.loads(future.result())
                bar.step(f"{len(found)} done")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [found[k] for k in range(len(tasks))]


def _begin(threads: int, prepare: Callable[[], Any] | None) -> None:
    torch.set_num_threads(threads)
    if prepare is not None:
        prepare()


def _run(task: bytes) -> bytes:
    return pickle.dumps(pickle.loads(task).run(False))
