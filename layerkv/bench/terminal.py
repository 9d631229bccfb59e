"""What the demo shows in the terminal: a progress bar per engine, then the table and the sentences.

Runs in the demo's process; shows results, computes none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from layerkv.bench import records, summary
from layerkv.bench.metrics import DemoResult


class ProgressBoard:
    """A bar for every engine, in output tokens; a context manager that owns the terminal's last lines."""

    def __init__(self, engine_names: Iterable[str], console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<10} {task.fields[state]:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: Mapping[str, TaskID] = {
            name: self._progress.add_task(summary.ENGINE_TITLES[name], start=False, total=None, state="waiting")
            for name in engine_names
        }

    def __enter__(self) -> ProgressBoard:
        self._progress.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._progress.stop()

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


def print_result(result: DemoResult, out_dir: Path, console: Console) -> None:
    """Prints the table, the ratios in words, the last log lines of failed engines and where the files are."""
    table = Table(title="the same requests through each engine", title_justify="left")
    table.add_column("")
    for name in summary.engine_order(result):
        failed = " (FAILED)" if name in result.failures else ""
        table.add_column(summary.ENGINE_TITLES[name] + failed, justify="right")
    for row in summary.figure_rows(result):
        table.add_row(row.label, *row.cells)
    console.print()
    console.print(table)
    console.print(summary.headline(result), style="bold", highlight=False)
    for sentence in summary.sentences(result):
        console.print(f"- {sentence}", highlight=False)
    for name, failure in result.failures.items():
        console.print(f"\n[bold red]{name} {failure.reason}[/]; its log is {out_dir / name}.log")
        for line in failure.log_tail:
            console.print(f"  {line}", markup=False, highlight=False)
    console.print(f"\nresult  {out_dir / 'result.json'}\nreport  {out_dir / 'report.html'}", highlight=False)
