"""What a run shows in the terminal: one bar for the whole case, one line for what runs now, then the tables."""

from __future__ import annotations

from types import TracebackType

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from layerkv.bench import records
from layerkv.bench.suite import summary
from layerkv.bench.suite.result import CaseResult


class SuiteBoard:
    """A context manager that owns the terminal's last lines. Progress is in output tokens over all engines."""

    def __init__(self, total_tokens: int, num_seeds: int, console: Console) -> None:
        self._console = console
        self._num_seeds = num_seeds
        self._before = 0
        self._line = ""
        self._done_points = 0
        self._in_point = 0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=total_tokens)

    def __enter__(self) -> SuiteBoard:
        self._progress.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._progress.stop()

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

    def ends(self, tokens: int) -> None:
        """The engine is through with a seed, whose points were to give so many tokens, or has failed."""
        self._before += tokens
        self._progress.update(self._task, completed=self._before)

    def note(self, text: str) -> None:
        """Says something above the bar."""
        self._console.print(f"- {text}", markup=False, highlight=False)


def print_result(result: CaseResult, console: Console) -> None:
    """Prints the main point's table, the table of all points, and what both say in words."""
    order = summary.engine_order(result)
    table = Table(title=f"{result.case} at {result.main_point}", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("")
    for name in order:
        failed = " (FAILED)" if name in result.failures else ""
        table.add_column(summary.ENGINE_TITLES[name] + failed, justify="right")
    for row in summary.figure_rows(result):
        table.add_row(row.label, *row.cells)
    console.print()
    console.print(table)
    if len(result.points) > 1:
        console.print(_points(result))
    console.print(summary.headline(result), style="bold", highlight=False)
    for sentence in summary.sentences(result):
        console.print(f"- {sentence}", highlight=False, markup=False)
    for name, failure in result.failures.items():
        console.print(f"\n[bold red]{name} {failure.reason}[/]")
        for line in failure.log_tail:
            console.print(f"  {line}", markup=False, highlight=False)


def _points(result: CaseResult) -> Table:
    table = Table(title=f"by {result.axis}", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column(result.axis)
    table.add_column("engine")
    for heading in summary.POINT_COLUMNS:
        table.add_column(heading, justify="right")
    for row in summary.point_rows(result):
        table.add_row(row.point, summary.ENGINE_TITLES[row.engine], *row.cells)
    return table
