"""What a case's result shows in the terminal: the tables, then what they say in words."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from layerkv.bench.suite import summary
from layerkv.bench.suite.result import CaseResult


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
