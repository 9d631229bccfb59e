"""How an engine's word on its backlog gets to every front end: with the metrics, which vLLM sends to only one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

from layerkv.scheduler.backlog import ClassWait, Word

WORD = "word"
"""Its key in a payload of metrics."""


def tell(outputs: dict[int, EngineCoreOutputs], word: Word, front_ends: Iterable[int]) -> None:
    """Send a word to all front ends with a step's outputs.

    Those that vLLM sends no statistics get the gauges of its statistics and no counts, which would be counted twice.
    Where statistics are off there is none to send, and nobody to read it.
    """
    stats = next((sent.scheduler_stats for sent in outputs.values() if sent.scheduler_stats is not None), None)
    if stats is None:
        return
    for front_end in front_ends:
        sent = outputs.setdefault(front_end, EngineCoreOutputs())
        if sent.scheduler_stats is None:
            sent.scheduler_stats = _gauges_of(stats)
        own = sent.scheduler_stats
        own.kv_connector_stats = {**(own.kv_connector_stats or {}), WORD: _plain(word)}


def word_of(payload: dict[str, Any]) -> Word | None:
    """The word in a payload, if there is one."""
    plain = payload.get(WORD)
    if plain is None:
        return None
    return Word(plain["age_s"], {name: ClassWait(*waits) for name, waits in plain["classes"].items()})


def _plain(word: Word) -> dict[str, Any]:
    return {"age_s": word.age_s, "classes": {name: list(waits) for name, waits in word.classes.items()}}


def _gauges_of(stats: SchedulerStats) -> SchedulerStats:
    return replace(
        stats,
        iteration_details=None,
        prefix_cache_stats=PrefixCacheStats(),
        connector_prefix_cache_stats=None,
        kv_cache_eviction_events=[],
        spec_decoding_stats=None,
        kv_connector_stats=None,
        ec_connector_stats=None,
        cudagraph_stats=None,
        perf_stats=None,
    )
