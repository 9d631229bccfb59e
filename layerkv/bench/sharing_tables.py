"""What `layerkv bench sharing` prints of a part that has ended."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from layerkv.bench.sharing_figures import GiveRatios, SharingRatios
from layerkv.bench.sharing_result import WAYS, SharingResult
from layerkv.bench.suite.result import Figures
from layerkv.bench.words import MISSING, format_duration, format_ratio
from layerkv.units import format_bytes


def print_part(part: str, result: SharingResult, console: Console) -> None:
    """Its table, or lines."""
    match part:
        case "bursts":
            _print_bursts(result, console)
        case "give":
            _print_give(result, console)
        case _:
            for line in lines(part, result):
                console.print(line, highlight=False)
    if part in ("bursts", "give", "idle"):
        console.print(f"tokens equal: {result.tokens_equal}", highlight=False)


def _print_bursts(result: SharingResult, console: Console) -> None:
    size = format_bytes(result.capacity_bytes)
    title = (
        f"{result.engines} engines, {size} of KV memory, {result.burst_requests} requests every {result.period_s:g} s"
    )
    table = Table("", "engine", "fluid", "TTFT mean", "second token p99", "longest pause p99", "tok/s", title=title)
    for way in WAYS:
        of_way: dict[str, Figures] = getattr(result, way)
        for engine, figures in of_way.items():
            table.add_row(
                way,
                engine,
                _fluid(figures),
                format_duration(figures.ttft_s.mean.median),
                format_duration(figures.second_token_s.p99.median),
                format_duration(figures.longest_pause_s.p99.median) if figures.longest_pause_s else MISSING,
                f"{figures.output_tokens_per_s.median:.0f}",
            )
    console.print(table)
    assert result.ratios is not None
    _print_ratios(result.ratios, console)


def _print_give(result: SharingResult, console: Console) -> None:
    assert result.give is not None
    assert result.give_ratios is not None
    size = format_bytes(result.give_capacity_bytes)
    title = f"A donor full of live decodes, and bursts beside it: {size} of KV memory"
    headings = ("gives by", "longest gap p99", "max", "second token", "TTFT", "fluid", "donor's end", "recomputed")
    table = Table(*headings, "parked", title=title)
    for way, figures in result.give.items():
        table.add_row(
            way,
            format_duration(figures.longest_gap_s.p99.median),
            format_duration(figures.longest_gap_max_s.median),
            format_duration(figures.taker.second_token_s.mean.median),
            format_duration(figures.taker.ttft_s.mean.median),
            _fluid(figures.taker),
            format_duration(figures.donor_end_s.median),
            f"{figures.recomputed.median:g}",
            f"{figures.parked.median:g}",
        )
    console.print(table)
    _print_ratios(result.give_ratios, console)
    if not all(figures.donor_was_there for figures in result.give.values()):
        console.print("the donor had ended before the last burst came: this says little", highlight=False)


def _print_ratios(ratios: SharingRatios | GiveRatios, console: Console) -> None:
    for name, ratio in msgspec.structs.asdict(ratios).items():
        console.print(f"{name}: {MISSING if ratio is None else format_ratio(ratio.median)}", highlight=False)


def lines(part: str, result: SharingResult) -> list[str]:
    """What the parts without a table say."""
    if part == "idle":
        assert result.idle is not None
        idle = result.idle
        first = {name: format_duration(spread.median) for name, spread in idle.first_token_s.items()}
        return [
            f"given back within 2.5 s: {idle.freed_fraction.median:.1%} of "
            f"{format_bytes(int(idle.held_bytes_before.median))} (MemAvailable rose by "
            f"{idle.available_bytes_rise.median / (1 << 20):.0f} MiB)",
            f"first token after idle: {first['elastic']}, static {first['static']}: "
            f"{format_ratio(idle.first_token_over_static.median)}",
        ]
    if part == "constant":
        assert result.constant_load is not None
        constant = result.constant_load
        return [
            f"{constant.running} running: throughput {constant.throughput_ratio:.3f} of a static engine's, host time "
            f"{constant.host_ms_per_step_added:+.3f} ms per step of {constant.step_ms['elastic']:.1f} ms"
        ]
    assert result.resize_ms_per_gib is not None
    assert result.resizing_steps is not None
    speed, steps = result.resize_ms_per_gib, result.resizing_steps
    return [
        f"a GiB goes in {speed.shrink.p50:.1f} ms (p99 {speed.shrink.p99:.1f}), and comes with its first touch in "
        f"{speed.first_touch.p50:.1f} ms (p99 {speed.first_touch.p99:.1f})",
        f"longest step of a move over the median: {steps.over_median:.2f} (growing {steps.growing:.2f}, shrinking "
        f"{steps.shrinking:.2f}; of as many calm steps {steps.calm:.2f})",
    ]


def _fluid(figures: Figures) -> str:
    return f"{figures.fluid.median:.0%}" if figures.fluid else MISSING
