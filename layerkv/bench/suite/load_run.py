"""What a load generator and a server's counters saw of one load, as one record."""

from __future__ import annotations

from layerkv.bench.records import LoadRun
from layerkv.bench.suite.counters import counted
from layerkv.bench.suite.generator import GeneratorRun
from layerkv.bench.suite.health_probe import Probe
from layerkv.bench.suite.scheduler_probe import SchedulerTimes
from layerkv.bench.suite.server import CpuTimes


def longest_probe(run: GeneratorRun) -> Probe:
    """The slowest answer to `/health`; where there was not one in the whole load, that long."""
    return Probe(0.0, run.wall_s) if run.longest_probe is None else run.longest_probe


def load_run(
    run: GeneratorRun,
    *,
    engine: str,
    name: str,
    point: str,
    seed: int,
    cpu: tuple[CpuTimes, CpuTimes],
    times: tuple[SchedulerTimes | None, SchedulerTimes | None],
    peak_rss_bytes: int,
    block_bytes: int | None,
) -> LoadRun:
    """The record of a load.

    Args:
        run: What the generator saw.
        engine: Whose counters they are, as the suite calls it.
        name: What the record calls it.
        point: The point of its case, or what takes that place.
        seed: Of the load.
        cpu: CPU times before the load and after it.
        times: Time in the scheduler before and after, where it was measured.
        peak_rss_bytes: Most resident memory meanwhile.
        block_bytes: Of one block, where that is known.
    """
    counters = counted(
        engine,
        run.before,
        run.after,
        cpu_before=cpu[0],
        cpu_after=cpu[1],
        times_before=times[0],
        times_after=times[1],
        peak_rss_bytes=peak_rss_bytes,
        block_bytes=block_bytes,
    )
    return LoadRun(
        engine=name,
        point=point,
        seed=seed,
        requests=run.requests,
        samples=run.samples,
        counters=counters,
        wall_s=run.wall_s,
        longest_probe_s=longest_probe(run).took_s,
    )
