"""The form of what `layerkv bench sharing --json` writes, part by part as they end.

Other tools read this file: a key that is there keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from layerkv.bench.machine import Machine
from layerkv.bench.priorities import Priorities
from layerkv.bench.sharing_constant import ConstantLoad
from layerkv.bench.sharing_figures import (
    GiveFigures,
    GiveRatios,
    IdleFigures,
    IdleSeen,
    Runs,
    SharingRatios,
    figures_of,
    give_figures,
    give_ratios,
    have_equal_tokens,
    idle_figures,
    sharing_ratios,
)
from layerkv.bench.sharing_load import BURSTS, GIVE, PERIOD_S
from layerkv.bench.sharing_resize import ResizeSpeed, ResizingSteps
from layerkv.bench.suite.result import Figures

WAYS = ("static_stock", "static", "shared")
GIVES = ("nothing", "wait", "recompute", "park")


class SharingResult(msgspec.Struct, kw_only=True):
    """The command's JSON; what belongs to a part that was not run is null.

    A burst of `burst_requests` came to one engine after the other, every `period_s` seconds.
    `static_stock`, `static` and `shared` are the figures of each engine, as those of `layerkv bench run`; `give` those
    of each way to give, with bursts at `give_bursts_at_s`. `idle_freed_fraction` and
    `first_token_after_idle_over_static` are the medians of two figures of `idle`, `step_over_median_while_resizing` is
    that of `resizing_steps`. `tokens_equal`: every request was answered the same tokens, whatever way the engines had
    their memory; null where no part compares that.
    """

    schema: int = 1
    parts: list[str]
    engines: int
    burst_requests: int
    period_s: float = PERIOD_S
    capacity_bytes: int = BURSTS.capacity_bytes
    static_stock: dict[str, Figures] | None = None
    static: dict[str, Figures] | None = None
    shared: dict[str, Figures] | None = None
    ratios: SharingRatios | None = None
    give: dict[str, GiveFigures] | None = None
    give_ratios: GiveRatios | None = None
    give_capacity_bytes: int = GIVE.capacity_bytes
    give_bursts_at_s: list[float] | None = None
    idle_freed_fraction: float | None = None
    first_token_after_idle_over_static: float | None = None
    idle: IdleFigures | None = None
    constant_load: ConstantLoad | None = None
    resize_ms_per_gib: ResizeSpeed | None = None
    step_over_median_while_resizing: float | None = None
    resizing_steps: ResizingSteps | None = None
    tokens_equal: bool | None = None
    priorities: Priorities
    seeds: list[int]
    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    commit: str | None


def set_bursts(result: SharingResult, runs: Mapping[str, Runs]) -> None:
    """Enter what the ways of `bursts` did."""
    by_way = {way: figures_of(runs[way]) for way in WAYS}
    result.static_stock, result.static, result.shared = (by_way[way] for way in WAYS)
    result.ratios = sharing_ratios(runs, by_way)
    _note_tokens(result, runs)


def set_give(result: SharingResult, runs: Mapping[str, Runs]) -> None:
    """Enter what the ways of `give` did."""
    result.give = {way: give_figures(runs[way]) for way in GIVES}
    result.give_ratios = give_ratios(result.give)
    _note_tokens(result, runs)


def set_idle(result: SharingResult, seen: Sequence[IdleSeen]) -> None:
    """Enter what was seen of idle engines."""
    result.idle = idle_figures(seen)
    result.idle_freed_fraction = result.idle.freed_fraction.median
    result.first_token_after_idle_over_static = result.idle.first_token_over_static.median
    runs = {name: {seed: {0: getattr(of, name)} for seed, of in enumerate(seen)} for name in ("static", "elastic")}
    _note_tokens(result, runs)


def _note_tokens(result: SharingResult, runs: Mapping[str, Runs]) -> None:
    result.tokens_equal = result.tokens_equal is not False and have_equal_tokens(runs)
