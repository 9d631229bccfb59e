"""What one engine did under one load: raw records, as JSON between the generator's process and the suite's.

Invariant: all times are seconds on one monotonic clock, counted from the start of the load. Figures are made from
these in :mod:`layerkv.bench.suite.figures`.
"""

from __future__ import annotations

import msgspec

STOPPED, HUNG_UP = "stop", "hang_up"


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request as its client saw it.

    Attributes:
        request_id: The same for every engine that gets this load.
        slo_class: Its SLO class in the case's policy; None is the policy's default class.
        arrival_s: When it was due; every latency counts from here, whenever it was really sent. The due time of a
            conversation's next turn follows from the end of the turn before.
        sent_s: When the generator handed it to the socket; None if it never did.
        prompt_tokens: Length of its prompt.
        output_tokens: Tokens that it asked for; with stop strings, at most.
        token_times_s: When each token arrived.
        token_digest: Hash of all token ids; None if it did not finish.
        end: How it finished: as the server says (`length`, or `STOPPED` by a stop string), or `HUNG_UP` when its client
            had what it wanted; None if it did not, or the server does not say.
        error: Why it did not finish; None if it did.
    """

    request_id: str
    slo_class: str | None = None
    arrival_s: float
    sent_s: float | None = None
    prompt_tokens: int
    output_tokens: int
    token_times_s: list[float] = []
    token_digest: str | None = None
    end: str | None = None
    error: str | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The server's state at one moment, read from ``/metrics``.

    `device_kv_bytes` and `host_kv_bytes` are KV in each tier, cached prefixes on the host included (None for the host
    memory of vLLM's offload, which does not say, and where the size of a block is not known); `waiting` counts
    requests before their first compute or preempted, `parked` those whose KV is in host memory only.
    """

    time_s: float
    device_kv_bytes: int
    host_kv_bytes: int | None
    running: int
    waiting: int
    parked: int


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What the server counted between the start and the end of one load.

    Attributes:
        preemptions: Requests whose KV was thrown away and computed again (parks are not among them).
        parks: Requests whose KV was moved to host memory.
        fetches: Parked requests moved back.
        bytes_stored: KV bytes copied from device to host memory; None for vLLM's offload, which does not count them.
        bytes_loaded: KV bytes copied back; None where only blocks of an unknown size were counted.
        prompt_tokens: Prompt tokens of all requests taken up.
        device_hit_tokens: Of these, found in the device's prefix cache.
        host_hit_tokens: Of these, loaded from host memory.
        queue_count: Requests that left the queue.
        queue_sum_s: Their time in the queue, all together.
        queue_buckets: Upper bounds and cumulative counts of that time's histogram, without the infinite one.
        engine_cpu_s: CPU seconds of the engine's process and its workers.
        front_end_cpu_s: CPU seconds of the HTTP front end.
        scheduler_cpu_s: CPU seconds in the scheduler's `schedule()`; None where they were not measured.
        num_steps: Calls of `schedule()`; None where they were not counted.
        peak_rss_bytes: Most resident memory of all the server's processes together, since it started.
    """

    preemptions: int = 0
    parks: int = 0
    fetches: int = 0
    bytes_stored: int | None = 0
    bytes_loaded: int | None = 0
    prompt_tokens: int = 0
    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    queue_count: int = 0
    queue_sum_s: float = 0.0
    queue_buckets: list[tuple[float, float]] = []
    engine_cpu_s: float = 0.0
    front_end_cpu_s: float = 0.0
    scheduler_cpu_s: float | None = None
    num_steps: int | None = None
    peak_rss_bytes: int = 0


class LoadRun(msgspec.Struct, frozen=True, kw_only=True):
    """One load through one engine."""

    engine: str
    point: str
    seed: int
    requests: list[RequestRecord]
    samples: list[Sample]
    counters: Counters
    wall_s: float
