"""What a case's result says, as table rows and as sentences; the terminal and the HTML report both show these.

Pure functions of a :class:`CaseResult`. Invariant: a sentence claims only what the figures beside it show, and where
layerkv is worse that is said in the same words as where it is better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from layerkv.bench.records import HUNG_UP, PROBE_LIMIT_S, STOPPED
from layerkv.bench.suite.result import CaseResult, Distribution, Figures, PointResult, Ratios, Spread
from layerkv.bench.suite.tables import DISTURBED, POINT_COLUMNS, PointRow, figure_rows, point_rows
from layerkv.bench.suite.titles import (
    ENGINE_NOTES,
    ENGINE_TITLES,
    engine_order,
    has_first_tokens,
    oracle_has,
    point_label,
)
from layerkv.bench.words import NOTABLE_WAIT_S, SAME_WITHIN, format_duration, format_ratio, is_same
from layerkv.units import format_bytes

__all__ = [
    "ENGINE_NOTES",
    "ENGINE_TITLES",
    "POINT_COLUMNS",
    "PointRow",
    "engine_order",
    "figure_rows",
    "headline",
    "point_rows",
    "sentences",
]

# The oracle has more KV memory than the others: it is a reference, not a rival.
PEERS = ("stock-watermark", "vllm-cpu-offload", "lmcache", "layerkv-no-slo")
# Shares of fluid requests that differ by no more than this are called equal.
FLUID_SAME = 0.05
RIVALS = ("stock", "stock-watermark", "vllm-cpu-offload", "lmcache")


def headline(result: CaseResult) -> str:
    """One sentence on the main point: whose readers were served fluidly; else, on first tokens."""
    ours, theirs = _readers(result, "layerkv"), _readers(result, "stock")
    if ours and theirs:
        return f"{ours} readers served in time, with hardly a pause; stock vLLM: {theirs}."
    return _first_tokens(result) or _nothing(result)


def _readers(result: CaseResult, name: str) -> str:
    """`28 of 28`, over all seeds; empty where it is not known.

    A request that nobody reads as it comes counts if it met its objectives.
    """
    figures = _served(result, name)
    if figures is None or figures.fluid is None:
        return ""
    counts = zip(figures.fluid.values, figures.num_requests.values, strict=True)
    return f"{sum(round(share * num) for share, num in counts)} of {sum(figures.num_requests.values):g}"


def _nothing(result: CaseResult) -> str:
    missing = [ENGINE_TITLES[name] for name in ("stock", "layerkv") if _served(result, name) is None]
    return f"Nothing to compare: no figures of {' and '.join(missing) or 'first tokens'}."


def _first_tokens(result: CaseResult) -> str:
    """How much sooner they came, by the measured ratios; empty where there are none."""
    stock, layerkv = _served(result, "stock"), _served(result, "layerkv")
    mean, p99 = result.ratios.ttft_mean_speedup, result.ratios.ttft_p99_speedup
    if stock is None or layerkv is None or not _positive(mean) or not _positive(p99):
        return ""
    stock_ttft, layerkv_ttft = format_duration(stock.ttft_s.mean.median), format_duration(layerkv.ttft_s.mean.median)
    joined = "as" if is_same(mean.median) else "than"
    return (
        f"First tokens came {_sooner(mean)} {joined} with stock vLLM on average "
        f"({layerkv_ttft} against {stock_ttft}) and {_sooner(p99)} at p99, "
        f"at {_share(result.ratios.throughput_ratio)} of its throughput."
    )


def sentences(result: CaseResult) -> list[str]:
    """What the main point and the other points show, in plain words; one fact each, losses among them."""
    said = [text for text in (_first_tokens(result), *_waits(result)) if text and text != headline(result)]
    said.extend(_unsaid_lengths(result))
    stock, layerkv = _served(result, "stock"), _served(result, "layerkv")
    if stock is not None and layerkv is not None:
        said.append(_goodput(result, stock, layerkv))
        said.extend(_range_over_seeds(result))
    if layerkv is not None:
        said.extend(_against_peer(result, name, layerkv) for name in PEERS if _served(result, name) is not None)
    over_oracle = result.ratios.ttft_mean_over_oracle
    if over_oracle is not None:
        said.append(
            f"The mean wait for a first token was {format_ratio(over_oracle.median)} times that of the oracle, "
            f"which has {oracle_has(result)}."
        )
    if stock is not None and layerkv is not None:
        if layerkv.parks.median:
            said.append(
                "Requests that KV memory has no room for wait after their first token, not before it: the second "
                f"token followed after {_mean_and_p99(layerkv.second_token_s)} "
                f"(stock: {_mean_and_p99(stock.second_token_s)})."
            )
        losses = _losses(result.ratios, stock, layerkv)
        if losses:
            said.append(f"Worse than stock with layerkv: {', '.join(losses)}.")
    said.extend(_points_behind(result))
    said.extend(_checks(result))
    return said


def _waits(result: CaseResult) -> list[str]:
    """What readers waited for tokens after the first, where both engines' are known."""
    stock, layerkv = _served(result, "stock"), _served(result, "layerkv")
    if stock is None or layerkv is None:
        return []
    ours, theirs = layerkv.lag_s, stock.lag_s
    if ours is None or theirs is None or layerkv.tokens_on_time is None or stock.tokens_on_time is None:
        return []
    return [
        f"After its first token a reader waited, in all, {_mean_and_p99(ours)} (stock: {_mean_and_p99(theirs)}); "
        f"{_share(layerkv.tokens_on_time)} of the tokens came on time (stock: {_share(stock.tokens_on_time)})."
    ]


def _unsaid_lengths(result: CaseResult) -> list[str]:
    """How requests ended at the main point, where they did not say themselves how long their answers get."""
    for name in ("layerkv", *result.engines):
        figures = result.engines.get(name)
        if figures is None or figures.output_tokens is None:
            continue
        kinds = [f"{figures.ends[end].median:g} {words}" for end, words in _ENDS.items() if end in figures.ends]
        if kinds:
            of = f"Of {figures.num_requests.median:g} requests to {ENGINE_TITLES[name]}"
            return [f"{of}, {' and '.join(kinds)}; answers had {figures.output_tokens.median:.0f} tokens on average."]
    return []


_ENDS = {STOPPED: "ended by a stop string", HUNG_UP: "when their client hung up"}


def _goodput(result: CaseResult, stock: Figures, layerkv: Figures) -> str:
    ours, theirs = layerkv.goodput_rps.median, stock.goodput_rps.median
    shares = f"{_share(layerkv.slo_attainment)} of requests against {_share(stock.slo_attainment)}, TPOT on the mean"
    if not ours and not theirs:
        return "No request met its objectives, neither with layerkv nor with stock: goodput is zero for both."
    ratio = result.ratios.goodput_ratio
    if not theirs or not ours or not _positive(ratio):
        return f"Objectives were met by {ours:.2f} requests per second with layerkv, {theirs:.2f} with stock: {shares}."
    times = "about stock's" if is_same(ratio.median) else f"{format_ratio(ratio.median)}x stock's"
    return f"Goodput was {times} ({_over_seeds(ratio)}{ours:.2f} against {theirs:.2f} requests per second): {shares}."


def _range_over_seeds(result: CaseResult) -> list[str]:
    mean = result.ratios.ttft_mean_speedup
    if mean is None:
        return []
    if len(mean.values) < 2:
        return ["One seed only: how much these figures vary is not known."]
    low, high = format_ratio(min(mean.values)), format_ratio(max(mean.values))
    return [f"Over {len(mean.values)} seeds, stock's mean TTFT was {low} to {high} times layerkv's."]


def _against_peer(result: CaseResult, name: str, layerkv: Figures) -> str:
    peer = result.engines[name]
    speedup, goodput = result.ratios.ttft_mean_speedup_over.get(name), result.ratios.goodput_ratio_over.get(name)
    parts = []
    if _positive(speedup):
        times = f"{format_duration(layerkv.ttft_s.mean.median)} against {format_duration(peer.ttft_s.mean.median)}"
        parts.append(f"first tokens {_sooner(speedup)} on average ({times})")
    throughput = result.ratios.throughput_ratio_over.get(name)
    if throughput is not None:
        parts.append(f"{_share(throughput)} of its throughput")
    rates = f"{layerkv.goodput_rps.median:.2f} against {peer.goodput_rps.median:.2f} requests per second"
    if _positive(goodput):
        same = is_same(goodput.median)
        times = "about the same" if same else f"{format_ratio(goodput.median)}x its"
        parts.append(f"{times} goodput ({_over_seeds(goodput)}{rates})")
    else:
        parts.append(f"goodput {rates}")
    return f"Against {ENGINE_TITLES[name]} ({ENGINE_NOTES[name]}): {', '.join(parts)}."


_COSTS: tuple[tuple[str, Callable[[Figures], Spread], Callable[[float], str]], ...] = (
    ("second token p99", lambda f: f.second_token_s.p99, format_duration),
    ("TPOT mean", lambda f: f.tpot_s.mean, format_duration),
    ("between tokens p99", lambda f: f.time_between_tokens_s.p99, format_duration),
    ("end to end mean", lambda f: f.end_to_end_s.mean, format_duration),
    ("engine CPU", lambda f: f.engine_cpu_s, format_duration),
    ("peak resident memory", lambda f: f.peak_rss_bytes, format_bytes),
)


def _losses(ratios: Ratios, stock: Figures, layerkv: Figures) -> list[str]:
    """Costs that are higher with layerkv by more than repeated runs differ; TTFT stands elsewhere."""
    found = []
    throughput = ratios.throughput_ratio
    if ratios.fluid_gain is not None and ratios.fluid_gain.median < 0:
        found.append(f"fluid requests ({_share(layerkv.fluid)} against {_share(stock.fluid)})")
    lags = [None if figures.lag_s is None else figures.lag_s.p99.median for figures in (layerkv, stock)]
    if lags[0] is not None and lags[1] is not None and lags[0] > lags[1] + NOTABLE_WAIT_S:
        found.append(f"a reader's lag p99 ({format_duration(lags[0])} against {format_duration(lags[1])})")
    if throughput is not None and throughput.median < 1 / (1 + SAME_WITHIN):
        found.append(f"throughput ({_over_seeds(throughput)}{_share(throughput)} of stock's)")
    for label, pick, write in _COSTS:
        ours, theirs = pick(layerkv).median, pick(stock).median
        if ours > theirs * (1 + SAME_WITHIN):
            found.append(f"{label} ({write(ours)} against {write(theirs)})")
    return found


def _points_behind(result: CaseResult) -> list[str]:
    """For each rival the points at which layerkv's TTFT, goodput or readers are worse off; then those without any."""
    said, never = [], []
    for name in RIVALS:
        both = [point for point in result.points if {name, "layerkv"} <= point.engines.keys()]
        behind = [text for point in both if (text := _behind(result, point, name))]
        if behind:
            said.append(f"Behind {ENGINE_TITLES[name]} at {len(behind)} of {len(both)} points: {'; '.join(behind)}.")
        elif len(both) > 1:
            never.append(ENGINE_TITLES[name])
    if never:
        margin = f"more than {SAME_WITHIN * 100:.0f} %"
        said.append(
            f"At no point was layerkv {margin} behind {_listed(never)} in mean TTFT, goodput or fluid requests."
        )
    return said


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _behind(result: CaseResult, point: PointResult, name: str) -> str:
    other, layerkv = point.engines[name], point.engines["layerkv"]
    parts = []
    if other.fluid is not None and layerkv.fluid is not None and other.fluid.median > layerkv.fluid.median + FLUID_SAME:
        parts.append(f"fluid {_share(layerkv.fluid)} against {_share(other.fluid)}")
    ours, theirs = layerkv.ttft_s.mean.median, other.ttft_s.mean.median
    if has_first_tokens(other) and has_first_tokens(layerkv) and ours > theirs * (1 + SAME_WITHIN):
        parts.append(f"TTFT {format_duration(ours)} against {format_duration(theirs)}")
    ours, theirs = layerkv.goodput_rps.median, other.goodput_rps.median
    if theirs > ours * (1 + SAME_WITHIN):
        parts.append(f"goodput {ours:.2f} against {theirs:.2f} per second")
    return f"{point_label(result, point)} ({', '.join(parts)})" if parts else ""


def _checks(result: CaseResult) -> list[str]:
    said = []
    if result.tokens_equal is True:
        said.append("Every request got exactly the same tokens from layerkv and the oracle.")
    elif result.tokens_equal is False:
        said.append("WRONG: layerkv and the oracle gave different tokens; these figures must not be used.")
    for point in result.points:
        for name, figures in point.engines.items():
            if any(figures.num_failed.values):
                of = f"{sum(figures.num_failed.values):g} of {sum(figures.num_requests.values):g}"
                said.append(
                    f"{ENGINE_TITLES[name]} failed {of} requests at {point_label(result, point)}; "
                    "its latencies there are those of tokens that came."
                )
            if figures.disturbed and figures.longest_probe_s is not None:
                said.append(
                    f"{DISTURBED} Disturbed: {ENGINE_TITLES[name]} at {point_label(result, point)}. Its server took "
                    f"up to {format_duration(figures.longest_probe_s)} to answer /health (a load above "
                    f"{format_duration(PROBE_LIMIT_S)} is run again, three tries in all): server or clients were held "
                    "up, and times and throughput there say little about the engine."
                )
    for name, failure in result.failures.items():
        gap = "lacks some runs" if name in result.engines else "has no figures at the main point"
        said.append(f"{ENGINE_TITLES[name]} {gap}: it {failure.reason}.")
    if result.interrupted:
        said.append("The case was interrupted; what had not ended is missing.")
    return said


def _served(result: CaseResult, name: str) -> Figures | None:
    figures = result.engines.get(name)
    return figures if figures is not None and has_first_tokens(figures) else None


def _positive(ratio: Spread | None) -> TypeGuard[Spread]:
    return ratio is not None and ratio.median > 0


def _mean_and_p99(distribution: Distribution) -> str:
    return f"{format_duration(distribution.mean.median)} on average, p99 {format_duration(distribution.p99.median)}"


def _sooner(ratio: Spread) -> str:
    if is_same(ratio.median):
        return "about as soon"
    median = ratio.median
    return f"{format_ratio(median)}x sooner" if median > 1 else f"{format_ratio(1 / median)}x later"


def _over_seeds(ratio: Spread) -> str:
    """The range of a ratio within seeds, which a ratio of medians may well lie outside of."""
    if len(ratio.values) < 2:
        return ""
    return f"{format_ratio(min(ratio.values))}x to {format_ratio(max(ratio.values))}x over seeds; "


def _share(ratio: Spread | None) -> str:
    return "an unknown share" if ratio is None else f"{ratio.median * 100:.1f} %"
