"""`layerkv bench compare`: two results of the same case, regressions told from noise.

Times of different runs are not comparable where machines drift, so a figure is compared as its ratio to stock vLLM's
in the same run and with the same seed (stock's own figures move with the machine and are left out); without stock in
both, as it is, and the output says so. What readers had is always compared as it is: as a share, or in their seconds.
Loads differ from seed to seed by more than most regressions, so each seed is compared with itself: a difference counts
if every seed moved the same way by at least :data:`LEAST_CHANGE`; anything else is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, TypeAlias

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from layerkv.bench.records import read_json, write_json
from layerkv.bench.suite.result import SCHEMA_VERSION, CaseResult, Figures, PointResult, Spread
from layerkv.bench.suite.titles import ENGINE_TITLES
from layerkv.bench.words import NOTABLE_WAIT_S
from layerkv.errors import ConfigError

# If chance alone moves a figure, with a deviation of a tenth, three seeds are all worse by so much once in 35 times.
LEAST_CHANGE = 0.05
# With one seed nothing is told from noise but a change by half.
LEAST_CHANGE_OF_ONE = 0.5
REFERENCE = "stock"

Verdict: TypeAlias = Literal["worse", "better", "same"]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one engine at one point, in both results.

    `before` and `after` are medians over seeds: of the ratio to stock's figure if `relative_to` is `stock`, else of
    the figure itself.
    """

    point: str
    engine: str
    figure: str
    before: float
    after: float
    relative_to: str | None
    verdict: Verdict


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` writes.

    `same_machine` and `same_versions` say what else differs between the two results; `broken` what went wrong in the
    later one and not in the earlier one.
    """

    schema: int = 1
    case: str
    same_machine: bool
    same_versions: bool
    changes: list[Change]
    missing: list[str]
    broken: list[str]


@dataclass(frozen=True, slots=True)
class _Figure:
    """A figure to compare.

    One that `stands_alone` is compared as it is, not with stock's: that one's may be zero, and a share, or how long a
    reader waits beyond the pace of reading, is not the machine's pace. A difference below `notable` is none.
    """

    name: str
    pick: Callable[[Figures], Spread | None]
    less_is_better: bool
    stands_alone: bool = False
    notable: float = 0.0


_FIGURES = (
    _Figure("fluid", lambda f: f.fluid, less_is_better=False, stands_alone=True),
    _Figure("tokens on time", lambda f: f.tokens_on_time, less_is_better=False, stands_alone=True),
    _Figure("fluid goodput", lambda f: f.fluid_goodput_rps, less_is_better=False, stands_alone=True),
    _Figure(
        "lag p99",
        lambda f: None if f.lag_s is None else f.lag_s.p99,
        less_is_better=True,
        stands_alone=True,
        notable=NOTABLE_WAIT_S,
    ),
    _Figure(
        "longest pause p99",
        lambda f: None if f.longest_pause_s is None else f.longest_pause_s.p99,
        less_is_better=True,
        stands_alone=True,
        notable=NOTABLE_WAIT_S,
    ),
    _Figure("TTFT mean", lambda f: f.ttft_s.mean, less_is_better=True),
    _Figure("TTFT p99", lambda f: f.ttft_s.p99, less_is_better=True),
    _Figure("TPOT mean", lambda f: f.tpot_s.mean, less_is_better=True),
    _Figure("between tokens p99", lambda f: f.time_between_tokens_s.p99, less_is_better=True),
    _Figure("second token p99", lambda f: f.second_token_s.p99, less_is_better=True),
    _Figure("throughput", lambda f: f.output_tokens_per_s, less_is_better=False),
    _Figure("goodput", lambda f: f.goodput_rps, less_is_better=False),
    _Figure("SLOs met", lambda f: f.slo_attainment, less_is_better=False),
)


def compare(before: CaseResult, after: CaseResult) -> Comparison:
    """Every figure that both results have."""
    earlier = {point.name: point for point in before.points}
    later = {point.name: point for point in after.points}
    num_seeds = len(before.seeds) if before.seeds == after.seeds else 0
    changes = [
        change for name in earlier if name in later for change in _changes(earlier[name], later[name], num_seeds)
    ]
    missing = sorted(_rows(later) - _rows(earlier))
    return Comparison(
        case=before.case,
        same_machine=before.machine == after.machine,
        same_versions=before.versions == after.versions,
        changes=changes,
        missing=[f"{engine} at {point}" for point, engine in missing],
        broken=list(_broken(before, after, earlier, later)),
    )


def _broken(
    before: CaseResult, after: CaseResult, earlier: dict[str, PointResult], later: dict[str, PointResult]
) -> Iterator[str]:
    if after.tokens_equal is False and before.tokens_equal is not False:
        yield "layerkv's tokens differ from the oracle's"
    if before.complete and not after.complete:
        yield "the run is not complete"
    for engine in sorted(after.failures.keys() - before.failures.keys()):
        yield f"{ENGINE_TITLES.get(engine, engine)} {after.failures[engine].reason}"
    for name, engine in sorted(_rows(earlier) - _rows(later)):
        yield f"{ENGINE_TITLES.get(engine, engine)} at {name}: no figures any more"
    for name, engine in sorted(_rows(earlier) & _rows(later)):
        old, new = (sum(points[name].engines[engine].num_failed.values) for points in (earlier, later))
        if new > old:
            yield f"{ENGINE_TITLES.get(engine, engine)} at {name}: {new:g} requests failed instead of {old:g}"


def _rows(points: dict[str, PointResult]) -> set[tuple[str, str]]:
    return {(name, engine) for name, point in points.items() for engine in point.engines}


def _changes(before: PointResult, after: PointResult, num_seeds: int) -> Iterator[Change]:
    has_reference = REFERENCE in before.engines and REFERENCE in after.engines
    for engine in before.engines:
        if engine not in after.engines or (has_reference and engine == REFERENCE):
            continue
        for figure in _FIGURES:
            is_relative = has_reference and not figure.stands_alone
            old = _values(before, engine, figure.pick, relative=is_relative)
            new = _values(after, engine, figure.pick, relative=is_relative)
            if old and new:
                yield Change(
                    point=before.name,
                    engine=engine,
                    figure=figure.name,
                    before=median(old),
                    after=median(new),
                    relative_to=REFERENCE if is_relative else None,
                    verdict=verdict(
                        old,
                        new,
                        less_is_better=figure.less_is_better,
                        is_paired=len(old) == len(new) == num_seeds,
                        notable=figure.notable,
                    ),
                )


def _values(
    point: PointResult, engine: str, pick: Callable[[Figures], Spread | None], *, relative: bool
) -> list[float]:
    """By seed; nothing where it is not known, as in results from before there was the figure."""
    found = pick(point.engines[engine])
    if found is None or any(point.engines[engine].num_failed.values):
        return []  # what is missing would make latencies look better; `broken` says it
    if not relative:
        return found.values
    reference = pick(point.engines[REFERENCE])
    bases = [] if reference is None else reference.values
    # An engine that failed has fewer seeds; they are in order, and the first ones belong together.
    return [value / base for value, base in zip(found.values, bases, strict=False) if base]


def verdict(
    before: list[float], after: list[float], *, less_is_better: bool, is_paired: bool, notable: float = 0.0
) -> Verdict:
    """Whether a figure moved by more than chance moves it, and by at least `notable`.

    `is_paired`: the two lists hold the same seeds in the same order. Otherwise the ranges of the two must be apart.
    """
    if is_paired:
        changes = [_change(old, new, notable) for old, new in zip(before, after, strict=True)]
    else:
        overlaps = min(before) <= max(after) and min(after) <= max(before)
        changes = [0.0 if overlaps else _change(median(before), median(after), notable)]
    least = LEAST_CHANGE if min(len(before), len(after)) > 1 else LEAST_CHANGE_OF_ONE
    if all(change >= least for change in changes):
        return "worse" if less_is_better else "better"
    if all(change <= -least for change in changes):
        return "better" if less_is_better else "worse"
    return "same"


def _change(old: float, new: float, notable: float) -> float:
    """Relative to `old`; from nothing to something it is infinite."""
    if abs(new - old) < notable or new == old:
        return 0.0
    return new / old - 1 if old else math.copysign(math.inf, new)


def run_compare(before_path: Path, after_path: Path, *, json_path: Path | None = None) -> int:
    """Prints what changed; returns 1 if anything got worse or broke, else 0.

    Raises:
        ConfigError: a file is not a case's result, or they are results of different cases or sizes.
    """
    before, after = _read(before_path), _read(after_path)
    if before.case != after.case:
        raise ConfigError(
            f"{after_path}: found a result of {after.case}; expected one of {before.case}, as {before_path} is; "
            "compare results of the same case"
        )
    if before.size != after.size:
        raise ConfigError(
            f"{after_path}: found size {after.size}; expected {before.size}, as {before_path} is: their loads differ"
        )
    if before.load and after.load and before.load != after.load:
        raise ConfigError(
            f"{after_path}: found load and settings {after.load}; expected {before.load}, as {before_path} has: the "
            "case was changed between the two; run it again with one of its versions"
        )
    comparison = compare(before, after)
    if json_path is not None:
        write_json(comparison, json_path)
    _print(comparison, Console())
    return int(bool(comparison.broken) or any(change.verdict == "worse" for change in comparison.changes))


def _read(path: Path) -> CaseResult:
    try:
        result = read_json(path, CaseResult)
    except OSError as error:
        raise ConfigError(
            f"{path}: found no readable file ({error.strerror}); expected what `layerkv bench run --json` writes"
        ) from None
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path}: found no result of a case ({error}); expected what `layerkv bench run --json` writes"
        ) from None
    if result.schema != SCHEMA_VERSION:
        raise ConfigError(f"{path}: found schema {result.schema}; expected {SCHEMA_VERSION}; run the case again")
    return result


def _print(comparison: Comparison, console: Console) -> None:
    changed = [change for change in comparison.changes if change.verdict != "same"]
    num_same = len(comparison.changes) - len(changed)
    if changed:
        table = Table(title=comparison.case, title_justify="left", box=SIMPLE, pad_edge=False)
        for heading in ("point", "engine", "figure", "before", "after", "change", ""):
            table.add_column(heading, justify="right" if heading in ("before", "after", "change") else "left")
        for change in changed:
            unit = " x stock" if change.relative_to else ""
            percent = f"{(change.after / change.before - 1) * 100:+.0f} %" if change.before else ""
            style = "red" if change.verdict == "worse" else "green"
            table.add_row(
                change.point,
                ENGINE_TITLES.get(change.engine, change.engine),
                change.figure,
                f"{change.before:.3g}{unit}",
                f"{change.after:.3g}{unit}",
                percent,
                f"[{style}]{change.verdict}[/]",
            )
        console.print(table)
    num_worse = sum(change.verdict == "worse" for change in changed)
    console.print(
        f"{num_worse} figures worse, {len(changed) - num_worse} better, {num_same} within the noise of the seeds.",
        highlight=False,
    )
    alone = {figure.name for figure in _FIGURES if figure.stands_alone}
    if any(change.relative_to is None and change.figure not in alone for change in comparison.changes):
        console.print("Without stock vLLM in both results, times of two runs were compared as they are.")
    if not comparison.same_machine:
        console.print("The two results are from different machines.")
    if not comparison.same_versions:
        console.print("The two results are of different versions.")
    for what in comparison.broken:
        console.print(f"[red]Broken: {what}.[/]", highlight=False)
    for row in comparison.missing:
        console.print(f"New: {row}.", highlight=False)
