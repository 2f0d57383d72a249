"""Many searches on an executor: results saved as they come, failures reported, finished ones not repeated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bayespot.distill.grammar import DistillConfig, Family
from bayespot.distill.target import Target
from bayespot.files import remove_leftovers, replacing
from bayespot.progress import Progress
from bayespot.report.manifest import DISTILLATION, distillation_files, named, register, remove_files, strangers


@dataclass(frozen=True)
class Found:
    """A formula as a search left it, for y in normalised units.

    ``constants`` are those of the posterior mean, or in class mode the mean over the draws; ``misfit`` is chi-square
    per direction of the posterior.
    """

    text: str
    constants: dict[str, float]
    misfit: float
    length: int


@dataclass(frozen=True)
class Search:
    """One search: what was asked and what came out."""

    family: str
    seed: int
    epochs: int
    seconds: float
    found: list[Found] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Family and seed, by which a formula's source is named."""
        return f"{self.family}:{self.seed}"


@dataclass(frozen=True)
class Task:
    """A search to be made."""

    family: Family
    seed: int

    @property
    def file(self) -> str:
        """Name of the file of its result."""
        return f"{self.family.name}-{self.seed}.json"


class DistillError(RuntimeError):
    """A distillation that cannot go on; the message says why and what to do."""


def run_searches(
    tasks: Sequence[Task],
    call: Callable[..., Search],
    arguments: Callable[[Task], tuple[Any, ...]],
    executor: Executor,
    folder: Path | None,
    bar: Progress,
) -> tuple[list[Search], list[str]]:
    """Run ``call(*arguments(task))`` for every task that ``folder`` has no result of.

    Returns
    -------
    searches, failures
        In the order of the tasks; one message per search that failed.

    Raises
    ------
    DistillError
        If every search failed.
    """
    done: dict[int, Search] = {}
    for i, task in enumerate(tasks):
        if folder is not None and (folder / task.file).exists():
            done[i] = _read(folder / task.file)
    bar.step(_best(done.values()), len(done))
    futures = {executor.submit(call, *arguments(task)): i for i, task in enumerate(tasks) if i not in done}
    failures = []
    try:
        for future in as_completed(futures):
            i = futures[future]
            # whatever a worker raises, or the death of its process, must not cost the other searches
            if (error := future.exception()) is not None:
                message = str(error) or type(error).__name__
                failures.append(f"{tasks[i].family.name}:{tasks[i].seed}: {type(error).__name__}: {message}")
            else:
                done[i] = future.result()
                if folder is not None:
                    write_json(folder / tasks[i].file, asdict(done[i]))
            bar.step(_best(done.values()))
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    if not done:
        raise DistillError(f"every search failed; the first: {failures[0]}")
    return [done[i] for i in sorted(done)], failures


def prepare_folder(
    folder: Path,
    target: Target,
    config: DistillConfig,
    resume: bool,
    overwrite: bool,
) -> Path:
    """Return the folder of finished searches; refuse one of other settings or data.

    Raises
    ------
    ValueError
        If the folder exists and is neither resumed nor overwritten, belongs to another posterior or other settings, or
        holds files that no distillation wrote.
    """
    mark = folder / "settings.json"
    settings = {"config": config.summary(), "target": fingerprint(target)}
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a distillation is a folder: choose another name")
    # empty folders and temporary files are what is left of one that was killed at its beginning
    if folder.exists() and strangers(folder, set()):
        if overwrite and not resume:
            _remove(folder)
        elif not resume:
            raise ValueError(f"{folder} exists; go on with --resume or replace it with --overwrite")
        elif not mark.exists() or _settings(mark) != json.loads(json.dumps(settings)):
            raise ValueError(f"{folder} holds searches of another posterior or other settings; use --overwrite")
    elif resume:
        raise ValueError(f"nothing to resume: {folder} has no searches; distil without resuming")
    # while they are written anew a run does not vouch for them
    register(folder.parent, [], forget=[f"{folder.name}/{name}" for name in DISTILLATION])
    (folder / "searches").mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / "searches"):
        remove_leftovers(place)
    write_json(mark, settings)
    return folder / "searches"


def register_results(folder: Path) -> None:
    """Have the run that a distillation is in, if it is in one, vouch for its files."""
    register(folder.parent, [path for path in sorted(distillation_files(folder)) if path.exists()])


def _remove(folder: Path) -> None:
    """Remove an earlier distillation; a folder that is none, or holds other files, is refused."""
    own = distillation_files(folder)
    if not own:
        raise ValueError(f"{folder} is not a distillation, and only that is replaced: move it away")
    if others := strangers(folder, own):
        raise ValueError(f"{folder} holds {named(others, folder)}, which no distillation wrote: move that away")
    register(folder.parent, [], forget=[path.relative_to(folder.parent).as_posix() for path in own])
    remove_files(folder, own)


def _settings(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); distil anew with --overwrite") from error


def fingerprint(target: Target) -> str:
    """Return a hash of the posterior that is distilled."""
    return hashlib.sha256(target.x.tobytes() + target.draws.tobytes()).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def _read(path: Path) -> Search:
    try:
        content = json.loads(path.read_text())
        return Search(**{**content, "found": [Found(**one) for one in content["found"]]})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable search ({error}); delete it and resume") from error


def _best(searches: Any) -> str:
    """The formula so far that is shortest among those within the posterior, else the closest."""
    found = [one for search in searches for one in search.found]
    if not found:
        return ""
    good = [one for one in found if one.misfit < 1]
    best = min(good, key=lambda f: f.length) if good else min(found, key=lambda f: f.misfit)
    return f"{best.text}, chi2 per direction {best.misfit:.2g}"
