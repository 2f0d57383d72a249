"""Progress of long work: a bar on a terminal, one line per stage in the log of a batch job, or nothing."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Literal, TypeAlias

#: True, False, None (a bar on a terminal, else nothing) or "lines" (a bar on a terminal, else a line per stage).
Show: TypeAlias = bool | Literal["lines"] | None


class Progress:
    """Progress on stderr: a single line that moves, or a line per stage with its time.

    Parameters
    ----------
    show
        True: a bar, False: nothing; None: a bar when stderr is a terminal; ``"lines"``: a bar there, and elsewhere (a
        batch job's log) one line per stage.
    """

    def __init__(self, show: Show = None) -> None:
        terminal = sys.stderr.isatty()
        self._show = terminal if show is None or show == "lines" else show
        self._lines = show == "lines" and not terminal
        self._begun: float | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._show:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._end_line()

    def stage(self, description: str, total: int | None = None) -> None:
        """Begin a stage of ``total`` steps (None: unknown)."""
        if self._lines:
            self._end_line()
            sys.stderr.write(f"{description} ...")
            sys.stderr.flush()
            self._begun = time.perf_counter()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(description, total=total, note="")

    def step(self, note: str = "", n: int = 1) -> None:
        """Advance the stage by ``n`` steps."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=n, note=note)

    def _end_line(self) -> None:
        if self._begun is not None:
            sys.stderr.write(f" {time.perf_counter() - self._begun:.1f} s\n")
            sys.stderr.flush()
            self._begun = None
