"""What the suite's engines and points are called in tables, sentences and plots.

Pure functions of a case's result. Invariant: everything that lists engines lists them in the order of `ENGINE_TITLES`.
"""

from __future__ import annotations

import math

from layerkv.bench.suite.result import CaseResult, Figures, PointResult

ENGINE_TITLES = {
    "stock": "stock vLLM",
    "stock-watermark": "stock + watermark",
    "vllm-cpu-offload": "vLLM CPU offload",
    "lmcache": "LMCache",
    "layerkv": "layerkv",
    "layerkv-no-slo": "layerkv without SLO",
    "oracle": "oracle",
}
ENGINE_NOTES = {
    "stock": "unmodified vLLM",
    "stock-watermark": "stock with --watermark 0.02",
    "vllm-cpu-offload": "stock that also keeps KV in host memory",
    "lmcache": "stock that also keeps KV in a cache server of LMCache's",
    "layerkv": "same KV memory as stock",
    "layerkv-no-slo": "layerkv without objectives",
    "oracle": "stock with KV memory for everything: nobody waits for it",
}
"""The oracle's is said by :func:`engine_note`: a case may give it more than memory."""


def engine_note(result: CaseResult, name: str) -> str:
    """What an engine of this case is."""
    if name != "oracle" or not _has_more_slots(result):
        return ENGINE_NOTES[name]
    return f"stock with {oracle_has(result)}"


def oracle_has(result: CaseResult) -> str:
    """What the case's oracle has and the others do not."""
    if not _has_more_slots(result):
        return "KV memory for everything"
    slots = result.max_num_seqs
    others = max(most for name, most in slots.items() if name != "oracle")
    return f"{slots['oracle']} slots (max_num_seqs) where the others have {others}, and KV memory for all in them"


def _has_more_slots(result: CaseResult) -> bool:
    slots = result.max_num_seqs
    return slots.get("oracle", 0) > max((most for name, most in slots.items() if name != "oracle"), default=math.inf)


def engine_order(result: CaseResult) -> tuple[str, ...]:
    """The engines that have figures or a failure anywhere, in their usual order."""
    there = {*result.engines, *result.failures}
    for point in result.points:
        there |= {*point.engines, *point.failures}
    return tuple(name for name in ENGINE_TITLES if name in there)


def point_label(result: CaseResult, point: PointResult) -> str:
    """A point as a reader knows it: `2.5 requests per second`."""
    return f"{point.x:g} {result.axis}"


def main_point(result: CaseResult) -> PointResult | None:
    """The point that `result.engines` is about; None if nothing was measured there."""
    return next((point for point in result.points if point.name == result.main_point), None)


def has_first_tokens(figures: Figures) -> bool:
    """Whether any request had a first token: without one, latencies are 0 s, which would look like a win."""
    return figures.ttft_s.mean.median > 0
