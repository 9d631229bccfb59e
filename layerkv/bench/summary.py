"""What a demo result says, as table rows and as sentences; the terminal and the HTML report both show these.

Pure functions of a `DemoResult`. Invariant: a sentence claims only what the figures beside it show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from layerkv.bench.metrics import DemoResult, Distribution, EngineFigures
from layerkv.units import format_bytes

# Two engines whose times differ by less than this share are called equal: repeated runs differ by as much.
SAME_WITHIN = 0.05
MISSING = "-"

ENGINE_TITLES = {"stock": "stock vLLM", "layerkv": "layerkv", "oracle": "oracle"}
ENGINE_NOTES = {
    "stock": "unmodified vLLM",
    "layerkv": "same KV memory as stock",
    "oracle": "stock with KV memory for every request: nobody waits for it",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of all engines: `cells[i]` belongs to the i-th engine asked for."""

    label: str
    meaning: str
    cells: tuple[str, ...]


def format_duration(duration_s: float) -> str:
    """Three digits with the unit that suits: `0.52 ms`, `12.3 ms`, `1.23 s`, `37.3 s`."""
    if duration_s == 0:
        return "0 s"
    value, unit = (duration_s, "s") if abs(duration_s) >= 0.9995 else (duration_s * 1e3, "ms")
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def format_ratio(ratio: float) -> str:
    """`0.97`, `1.05`, `8.3`, `25`: as many digits as a ratio of measured times deserves."""
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


_ROWS: tuple[tuple[str, str, Callable[[EngineFigures], str]], ...] = (
    ("TTFT mean", "time to first token, from scheduled arrival", lambda e: format_duration(e.ttft_s.mean)),
    (
        "TTFT p50",
        "half of the requests had their first token by then",
        lambda e: format_duration(e.ttft_s.p50),
    ),
    ("TTFT p99", "the slowest first tokens", lambda e: format_duration(e.ttft_s.p99)),
    (
        "Queue mean",
        "arrival until the scheduler takes the request up",
        lambda e: format_duration(e.queue_s.mean),
    ),
    ("Second token mean", "gap between tokens 1 and 2", lambda e: format_duration(e.second_token_s.mean)),
    ("Second token p99", "gap between tokens 1 and 2", lambda e: format_duration(e.second_token_s.p99)),
    ("TPOT mean", "mean gap between a request's tokens", lambda e: format_duration(e.tpot_s.mean)),
    ("TPOT p99", "mean gap between a request's tokens", lambda e: format_duration(e.tpot_s.p99)),
    (
        "Between tokens p99",
        "all gaps of all requests pooled",
        lambda e: format_duration(e.time_between_tokens_s.p99),
    ),
    ("Throughput", "output tokens per second", lambda e: f"{e.output_tokens_per_s:.0f} tok/s"),
    ("Wall time", "from the start of the load to its last token", lambda e: format_duration(e.wall_s)),
    ("Preemptions", "KV thrown away and computed again", lambda e: str(e.preemptions)),
    ("Parks / fetches", "KV moved to host memory / back", lambda e: f"{e.parks} / {e.fetches}"),
    ("Stored", "copied from device to host memory", lambda e: _format_size(e.bytes_stored)),
    ("Loaded", "copied from host to device memory", lambda e: _format_size(e.bytes_loaded)),
    (
        "Host time per step",
        "step outside the model's forward pass",
        lambda e: format_duration(e.host_s_per_step),
    ),
)


def _format_size(size_bytes: int) -> str:
    return format_bytes(size_bytes) if size_bytes else "0"


def engine_order(result: DemoResult) -> tuple[str, ...]:
    """The engines that were asked for and ended, with figures or without, in their usual order."""
    there = result.engines.keys() | result.failures.keys()
    return tuple(name for name in ENGINE_TITLES if name in there)


def figure_rows(result: DemoResult) -> list[Row]:
    """The table: one row per figure, one cell per engine of `engine_order`."""
    figures = [result.engines.get(name) for name in engine_order(result)]
    return [
        Row(label, meaning, tuple(MISSING if engine is None else cell(engine) for engine in figures))
        for label, meaning, cell in _ROWS
    ]


def headline(result: DemoResult) -> str:
    """One sentence with the measured ratios, or what is missing for them."""
    stock, layerkv = result.engines.get("stock"), result.engines.get("layerkv")
    ratios = result.ratios
    if stock is None or layerkv is None or not ratios.ttft_mean_speedup or not ratios.ttft_p99_speedup:
        missing = [ENGINE_TITLES[name] for name in ("stock", "layerkv") if name not in result.engines]
        return f"Nothing to compare: no figures of {' and '.join(missing) or 'first tokens'}."
    mean, p99 = ratios.ttft_mean_speedup, ratios.ttft_p99_speedup
    stock_ttft, layerkv_ttft = format_duration(stock.ttft_s.mean), format_duration(layerkv.ttft_s.mean)
    return (
        f"First tokens came {_speedup(mean)} {_conjunction(mean)} with stock vLLM on average "
        f"({layerkv_ttft} against {stock_ttft}) and {_speedup(p99)} at p99, "
        f"at {_percent(ratios.throughput_ratio)} of its throughput."
    )


def sentences(result: DemoResult) -> list[str]:
    """The ratios and checks in plain words, and what the first token's speed costs; one sentence each."""
    said = []
    over_oracle = result.ratios.ttft_mean_over_oracle
    if over_oracle is not None:
        said.append(
            f"The mean wait for a first token was {format_ratio(over_oracle)} times that of the oracle, "
            "which has KV memory for every request."
        )
    stock, layerkv = result.engines.get("stock"), result.engines.get("layerkv")
    if stock is not None and layerkv is not None and layerkv.parks:
        said.append(
            "Requests that KV memory has no room for wait after their first token, not before it: the second "
            f"token followed after {_mean_and_p99(layerkv.second_token_s)} "
            f"(stock: {_mean_and_p99(stock.second_token_s)})."
        )
    if result.tokens_equal is True:
        num_requests = result.load.num_requests
        said.append(f"All {num_requests} requests got exactly the same tokens from layerkv and the oracle.")
    elif result.tokens_equal is False:
        said.append("WRONG: layerkv and the oracle gave different tokens; these figures must not be used.")
    said.extend(f"{ENGINE_TITLES[name]} has no figures: it {f.reason}." for name, f in result.failures.items())
    if result.interrupted:
        said.append("The demo was interrupted; engines that had not ended are missing.")
    return said


def _mean_and_p99(distribution: Distribution) -> str:
    return f"{format_duration(distribution.mean)} on average, p99 {format_duration(distribution.p99)}"


def _is_same(ratio: float) -> bool:
    return 1 / (1 + SAME_WITHIN) <= ratio <= 1 + SAME_WITHIN


def _speedup(ratio: float) -> str:
    if _is_same(ratio):
        return "about as soon"
    return f"{format_ratio(ratio)}x sooner" if ratio > 1 else f"{format_ratio(1 / ratio)}x later"


def _conjunction(ratio: float) -> str:
    return "as" if _is_same(ratio) else "than"


def _percent(ratio: float | None) -> str:
    return "an unknown share" if ratio is None else f"{ratio * 100:.1f} %"
