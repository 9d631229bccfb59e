"""A case's figures as table cells: the median over seeds and, after ` ±`, half of the spread in the same unit.

Pure functions of a :class:`CaseResult`; the terminal and the HTML report show the same cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from layerkv.bench.suite.result import CaseResult, Distribution, Figures, Spread
from layerkv.bench.suite.titles import ENGINE_TITLES, engine_order, has_first_tokens
from layerkv.bench.words import MISSING, format_duration
from layerkv.units import format_bytes

# Between a cell's figure and its uncertainty; the report prints what follows it small.
PLUS_MINUS = " ±"
# After a figure of a disturbed run; a sentence with the same mark says what that is.
DISTURBED = "*"
SLOS_MET = "SLOs met by mean TPOT"
# By their names in layerkv's metrics.
RESOURCES = {
    "pool": "KV pool",
    "zone": "Lane zone",
    "slot": "Slots",
    "link": "Link",
    "compute": "Compute",
    "host_memory": "Host memory",
}
POINT_COLUMNS = ("Fluid", SLOS_MET, "TTFT mean", "TTFT p99", "Fluid goodput", "Goodput", "Throughput")


# What only a server tells: these rows are left out where no engine was one.
_OF_SERVERS = frozenset(
    (
        "Hits device / host",
        "Peak device KV",
        "Peak host KV",
        "Peak resident memory",
        "Engine CPU",
        "Scheduler per step",
        "Longest probe",
    )
)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of all engines: `cells[i]` belongs to the i-th engine of `engine_order`."""

    label: str
    meaning: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PointRow:
    """One engine at one point.

    Attributes:
        point: Where the point lies on the case's axis; the same for all its engines.
        engine: Its name; `engine_title` is how tables call it.
        cells: `cells[i]` belongs to the i-th of `POINT_COLUMNS`, which are labels of `figure_rows`, or of `RESOURCES`.
        failure: Why some or all of the figures are missing; empty if none are.
        is_main: Whether this is the case's main point.
    """

    point: str
    engine: str
    engine_title: str
    cells: tuple[str, ...]
    failure: str
    is_main: bool


def figure_rows(result: CaseResult) -> list[Row]:
    """The main point's table: one row per figure, one cell per engine of `engine_order`."""
    engines = [result.engines.get(name) for name in engine_order(result)]
    has_servers = not result.engines or any(figures.peak_rss_bytes.median for figures in result.engines.values())
    return [
        Row(
            label,
            meaning,
            tuple(MISSING if figures is None else _marked(cell(figures), figures) for figures in engines),
        )
        for label, meaning, cell in _ROWS
        if has_servers or label not in _OF_SERVERS
    ]


def point_rows(result: CaseResult) -> list[PointRow]:
    """All points' table: for each point in order, one row per engine that has figures or a failure there."""
    rows = []
    for point in result.points:
        for name in engine_order(result):
            figures, failure = point.engines.get(name), point.failures.get(name)
            if figures is None and failure is None:
                continue
            cells = (MISSING,) * len(POINT_COLUMNS)
            if figures is not None:
                cells = tuple(_marked(_CELLS[label](figures), figures) for label in POINT_COLUMNS)
            rows.append(
                PointRow(
                    point=f"{point.x:g}",
                    engine=name,
                    engine_title=ENGINE_TITLES[name],
                    cells=cells,
                    failure="" if failure is None else failure.reason,
                    is_main=point.name == result.main_point,
                )
            )
    return rows


def wait_rows(result: CaseResult) -> list[PointRow]:
    """What requests waited for: for each point, a row per engine that tells, with a cell for each of `RESOURCES`."""
    rows = []
    for point in result.points:
        for name in engine_order(result):
            figures = point.engines.get(name)
            if figures is None or not figures.waited_for:
                continue
            of = figures.waited_for
            cells = [percent_cell(of[key]) if key in of else "0.0 %" for key in RESOURCES]
            rows.append(
                PointRow(
                    point=f"{point.x:g}",
                    engine=name,
                    engine_title=ENGINE_TITLES[name],
                    cells=tuple(_marked(cell, figures) for cell in cells),
                    failure="",
                    is_main=point.name == result.main_point,
                )
            )
    return rows


def duration_cell(value: Spread) -> str:
    """`1.23 s ±0.10`."""
    text = format_duration(value.median)
    number, unit = text.split()
    decimals = len(number.partition(".")[2])
    return _with_spread(text, value.spread * (1e3 if unit == "ms" else 1.0), decimals)


def number_cell(value: Spread | None, decimals: int = 0, unit: str = "") -> str:
    """`120 tok/s ±3`; `unit` stands after the number as it is; a dash where it is not known."""
    if value is None:
        return MISSING
    return _with_spread(f"{value.median:.{decimals}f}{unit}", value.spread, decimals)


def percent_cell(share: Spread | None) -> str:
    """`97.5 % ±0.4` of a share between 0 and 1; a dash where it is not known."""
    if share is None:
        return MISSING
    return _with_spread(f"{share.median * 100:.1f} %", share.spread * 100, 1)


def size_cell(size: Spread | None) -> str:
    """`1.5GiB ±12MiB`; a dash where it is not known."""
    if size is None:
        return MISSING
    text = format_bytes(size.median) if size.median else "0"
    return f"{text}{PLUS_MINUS}{format_bytes(size.spread / 2)}" if size.spread else text


def _with_spread(text: str, spread: float, decimals: int) -> str:
    return f"{text}{PLUS_MINUS}{spread / 2:.{decimals}f}" if spread else text


def _marked(cell: str, figures: Figures) -> str:
    return f"{cell}{DISTURBED}" if figures.disturbed and cell != MISSING else cell


def _probe(figures: Figures) -> str:
    return MISSING if figures.longest_probe_s is None else format_duration(figures.longest_probe_s)


def _latency(pick: Callable[[Figures], Spread]) -> Callable[[Figures], str]:
    """A latency's cell; 0 s is that of no sample."""
    return lambda figures: duration_cell(pick(figures)) if pick(figures).median > 0 else MISSING


def _wait(pick: Callable[[Figures], Distribution | None], part: str) -> Callable[[Figures], str]:
    """A reader's wait: 0 s is a good one, and a dash what was not measured."""

    def cell(figures: Figures) -> str:
        waits = pick(figures)
        return MISSING if waits is None else duration_cell(getattr(waits, part))

    return cell


def _queue(figures: Figures) -> str:
    return duration_cell(figures.queue_s.mean) if has_first_tokens(figures) else MISSING


def _pair(first: Spread, second: Spread) -> str:
    return f"{first.median:g} / {second.median:g}"


def _shares(parts: Spread, of: Spread) -> Spread:
    pairs = zip(parts.values, of.values, strict=True)
    return Spread.of([part / whole if whole else 0.0 for part, whole in pairs])


def _hits(figures: Figures) -> str:
    device = _shares(figures.device_hit_tokens, figures.prompt_tokens)
    host = _shares(figures.host_hit_tokens, figures.prompt_tokens)
    return f"{device.median * 100:.1f} / {host.median * 100:.1f} %"


def _scheduler_time(figures: Figures) -> str:
    return MISSING if figures.scheduler_s_per_step is None else duration_cell(figures.scheduler_s_per_step)


_ROWS: tuple[tuple[str, str, Callable[[Figures], str]], ...] = (
    (
        "Fluid",
        "first token in time, and at most a second (`max_lag`) of waiting after it",
        lambda f: percent_cell(f.fluid),
    ),
    (SLOS_MET, "requests that met TTFT and, on the mean, TPOT", lambda f: percent_cell(f.slo_attainment)),
    ("Fluid goodput", "fluid requests per second", lambda f: number_cell(f.fluid_goodput_rps, 2, "/s")),
    ("Goodput", "requests per second that met TTFT and mean TPOT", lambda f: number_cell(f.goodput_rps, 2, "/s")),
    ("Tokens on time", "by arrival + TTFT + k x TPOT", lambda f: percent_cell(f.tokens_on_time)),
    ("Lag mean", "all waits of a request's reader", _wait(lambda f: f.lag_s, "mean")),
    ("Lag p99", "all waits of a request's reader", _wait(lambda f: f.lag_s, "p99")),
    ("Longest pause p99", "a reader's longest single wait", _wait(lambda f: f.longest_pause_s, "p99")),
    ("TTFT mean", "time to first token, from when the request was due", _latency(lambda f: f.ttft_s.mean)),
    ("TTFT p50", "half of the first tokens came by then", _latency(lambda f: f.ttft_s.p50)),
    ("TTFT p90", "nine of ten first tokens", _latency(lambda f: f.ttft_s.p90)),
    ("TTFT p99", "the slowest first tokens", _latency(lambda f: f.ttft_s.p99)),
    ("Queue mean", "until the scheduler takes the request up", _queue),
    ("Second token mean", "gap between tokens 1 and 2", _latency(lambda f: f.second_token_s.mean)),
    ("Second token p99", "gap between tokens 1 and 2", _latency(lambda f: f.second_token_s.p99)),
    ("TPOT mean", "mean gap between a request's tokens", _latency(lambda f: f.tpot_s.mean)),
    ("TPOT p99", "mean gap between a request's tokens", _latency(lambda f: f.tpot_s.p99)),
    ("Between tokens p99", "all gaps of all requests pooled", _latency(lambda f: f.time_between_tokens_s.p99)),
    ("End to end mean", "until the request's last token", _latency(lambda f: f.end_to_end_s.mean)),
    ("Throughput", "output tokens per second", lambda f: number_cell(f.output_tokens_per_s, unit=" tok/s")),
    ("Fluidity index", "Etalon's: 1 - token deadlines missed / all", lambda f: number_cell(f.fluidity_index, 3)),
    ("Preemptions", "KV thrown away and computed again", lambda f: number_cell(f.preemptions)),
    ("Parks / fetches", "KV moved to host memory / back", lambda f: _pair(f.parks, f.fetches)),
    ("Hits device / host", "share of prompt tokens found there", _hits),
    ("Stored", "copied from device to host memory", lambda f: size_cell(f.bytes_stored)),
    ("Loaded", "copied from host to device memory", lambda f: size_cell(f.bytes_loaded)),
    ("Peak device KV", "most in use at once", lambda f: size_cell(f.peak_device_kv_bytes)),
    ("Peak host KV", "most held at once, cached prefixes included", lambda f: size_cell(f.peak_host_kv_bytes)),
    ("Peak resident memory", "all processes of the server", lambda f: size_cell(f.peak_rss_bytes)),
    ("Engine CPU", "CPU seconds of engine and workers", lambda f: duration_cell(f.engine_cpu_s)),
    ("Scheduler per step", "CPU time in the scheduler's schedule()", _scheduler_time),
    ("Longest probe", "slowest answer to /health while the load ran", _probe),
    (
        "Failed requests",
        "of all that were due",
        lambda f: f"{sum(f.num_failed.values):g} of {sum(f.num_requests.values):g}",
    ),
)
_CELLS = {label: cell for label, _, cell in _ROWS}
