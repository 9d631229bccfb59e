"""What the server counted during one load, from two readings of what it counts since it started.

Pure functions. Invariant: what an engine does not tell is None, not 0.
"""

from __future__ import annotations

from layerkv.bench.records import Counters
from layerkv.bench.suite.engines import KEEPERS, is_layerkv
from layerkv.bench.suite.scheduler_probe import SchedulerTimes
from layerkv.bench.suite.server import CpuTimes
from layerkv.bench.suite.server_metrics import ServerMetrics


def counted(
    engine: str,
    before: ServerMetrics,
    after: ServerMetrics,
    *,
    cpu_before: CpuTimes,
    cpu_after: CpuTimes,
    times_before: SchedulerTimes | None,
    times_after: SchedulerTimes | None,
    peak_rss_bytes: int,
    block_bytes: int | None,
) -> Counters:
    """The difference between two readings, with the CPU times and scheduler times of the same two moments."""
    buckets_before = dict(before.queue_buckets)
    preemptions, recomputes = after.preemptions - before.preemptions, after.recomputes - before.recomputes
    scheduler_cpu_s = num_steps = None
    if times_before is not None and times_after is not None:
        scheduler_cpu_s = times_after.cpu_seconds - times_before.cpu_seconds
        num_steps = times_after.num_calls - times_before.num_calls
    return Counters(
        preemptions=recomputes if is_layerkv(engine) else preemptions,
        parks=after.parks - before.parks,
        fetches=after.fetches - before.fetches,
        bytes_stored=None if engine in KEEPERS else after.bytes_stored - before.bytes_stored,
        bytes_loaded=_bytes_loaded(engine, before, after, block_bytes),
        prompt_tokens=after.prompt_tokens - before.prompt_tokens,
        device_hit_tokens=after.device_hit_tokens - before.device_hit_tokens,
        host_hit_tokens=after.host_hit_tokens - before.host_hit_tokens,
        queue_count=after.queue_count - before.queue_count,
        queue_sum_s=after.queue_sum_s - before.queue_sum_s,
        queue_buckets=[(bound, count - buckets_before.get(bound, 0.0)) for bound, count in after.queue_buckets],
        engine_cpu_s=cpu_after.engine_s - cpu_before.engine_s,
        front_end_cpu_s=cpu_after.front_end_s - cpu_before.front_end_s,
        scheduler_cpu_s=scheduler_cpu_s,
        num_steps=num_steps,
        peak_rss_bytes=peak_rss_bytes,
    )


def _bytes_loaded(engine: str, before: ServerMetrics, after: ServerMetrics, block_bytes: int | None) -> int | None:
    if engine == "lmcache":
        return None
    num_onloaded = after.blocks_onloaded - before.blocks_onloaded
    if num_onloaded and block_bytes is None:
        return None
    return after.bytes_loaded - before.bytes_loaded + num_onloaded * (block_bytes or 0)
