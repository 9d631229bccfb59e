"""What shows in the terminal while engines run: bars that tell how many output tokens are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from layerkv.bench import records
from layerkv.bench.suite.titles import ENGINE_TITLES


class _Bars:
    """A context manager that owns the terminal's last lines."""

    def __init__(self, text: TextColumn, amount: Sequence[ProgressColumn], console: Console) -> None:
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._console = console
        self._progress = Progress(SpinnerColumn(), text, BarColumn(), *amount, *times, console=console)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class ProgressBoard(_Bars):
    """A bar for every engine, in output tokens."""

    def __init__(self, engine_names: Iterable[str], console: Console) -> None:
        text = TextColumn("{task.description:<10} {task.fields[state]:<8}")
        super().__init__(text, (MofNCompleteColumn(), TextColumn("tokens")), console)
        self._tasks: Mapping[str, TaskID] = {
            name: self._progress.add_task(ENGINE_TITLES.get(name, name), start=False, total=None, state="waiting")
            for name in engine_names
        }

    def starts(self, engine_name: str) -> None:
        """The engine's process has been started; its model is loading."""
        self._progress.update(self._tasks[engine_name], state="starting")
        self._progress.start_task(self._tasks[engine_name])

    def advances(self, engine_name: str, line: records.Progress) -> None:
        """The engine has produced `line.progress` of `line.total` output tokens."""
        task = self._tasks[engine_name]
        self._progress.update(task, completed=line.progress, total=line.total, state="running")

    def ends(self, engine_name: str, state: str) -> None:
        """The engine's process has ended, in `state`: one short word."""
        self._progress.update(self._tasks[engine_name], state=state)
        self._progress.stop_task(self._tasks[engine_name])


class SuiteBoard(_Bars):
    """One bar for a whole case, in output tokens over all engines, and what runs now."""

    def __init__(self, total_tokens: int, num_seeds: int, console: Console) -> None:
        self._num_seeds = num_seeds
        self._before = 0
        self._line = ""
        self._done_points = 0
        self._in_point = 0
        super().__init__(TextColumn("{task.description}"), (TaskProgressColumn(),), console)
        self._task = self._progress.add_task("starting", total=total_tokens)

    def starts(self, engine: str, seed: int) -> None:
        """An engine's server is being started for a seed."""
        self._line = f"seed {seed + 1}/{self._num_seeds} {engine}"
        self._done_points = self._in_point = 0
        self._progress.update(self._task, description=f"{self._line}: starting")

    def loads(self, point: str) -> None:
        """The server gets the load of a point."""
        self._done_points += self._in_point
        self._in_point = 0
        self._progress.update(self._task, description=f"{self._line} at {point}")

    def advances(self, line: records.Progress) -> None:
        """So many output tokens of the point's load are there."""
        self._in_point = line.progress
        self._progress.update(self._task, completed=self._before + self._done_points + self._in_point)

    def repeats(self) -> None:
        """The point's load counts for nothing so far: it is run again."""
        self._in_point = 0

    def ends(self, tokens: int) -> None:
        """The engine is through with a seed, whose points were to give so many tokens, or has failed."""
        self._before += tokens
        self._progress.update(self._task, completed=self._before)

    def note(self, text: str) -> None:
        """Says something above the bar."""
        self._console.print(f"- {text}", markup=False, highlight=False)
