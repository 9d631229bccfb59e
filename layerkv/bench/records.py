"""What one engine did under one load, and what crosses the border to the processes that see it, as JSON.

An `EngineSpec` goes to a process with an engine inside, an `EngineRun` comes out; the suite makes a `LoadRun` of what
its generator saw of a server. `Progress` lines come in between. Invariant: all times of a run are seconds on one
monotonic clock, counted from the start of its load.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from layerkv import figures
from layerkv.bench.load import LoadSpec, PlannedRequest

T = TypeVar("T")

STOPPED, HUNG_UP = "stop", "hang_up"
# A run in which `/health` once took longer is disturbed: the answer takes a few milliseconds where nobody is starved.
PROBE_LIMIT_S = 0.3


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine to build and the load to drive through it.

    `engine_args` are the keyword arguments of vLLM's `EngineArgs`. `planned` takes the place of the requests of
    `load`, of which only the longest prompt is used then, to warm up.
    """

    name: str
    engine_args: dict[str, Any]
    load: LoadSpec
    planned: list[PlannedRequest] = []


class StateChange(msgspec.Struct, frozen=True, array_like=True):
    """From `time_s` on, the request is in `state`."""

    time_s: float
    state: str


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to one request, as its client saw it and, inside an engine's process, as the engine did.

    Attributes:
        request_id: The same for every engine that gets this load.
        slo_class: Its SLO class in the case's policy; None is the policy's default class.
        arrival_s: When it was due; every latency counts from here, whenever it was really sent. The due time of a
            conversation's next turn follows from the end of the turn before.
        sent_s: When the generator handed it to the socket; None if it never did, or there is none.
        prompt_tokens: Length of its prompt.
        output_tokens: Tokens that it asked for; with stop strings, at most.
        first_scheduled_s: When the scheduler first took it up; None if it never did, or no client can see it.
        token_times_s: When each token arrived, or came out of the engine.
        token_ids: The tokens, where they are kept.
        token_digest: Hash of all token ids; None if it did not finish, or they are kept.
        states: Its moves, in order, as the scheduler reported them or as they were seen between steps
            (:mod:`layerkv.bench.engine_run`); none where only a server knows.
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
    first_scheduled_s: float | None = None
    token_times_s: list[float] = []
    token_ids: list[int] = []
    token_digest: str | None = None
    states: list[StateChange] = []
    end: str | None = None
    error: str | None = None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between each two of its tokens."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]


def ttft_s(request: RequestRecord) -> float | None:
    """Seconds from the due time to the first token; None when there was none."""
    return request.token_times_s[0] - request.arrival_s if request.token_times_s else None


def tpot_s(request: RequestRecord) -> float | None:
    """Mean seconds between tokens; None with fewer than two."""
    times = request.token_times_s
    return figures.tpot_s(times[0], times[-1], len(times)) if times else None


class EngineRun(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one engine's run over the whole load.

    `preemptions` counts requests whose KV was thrown away and computed again. `num_steps` counts steps that
    ran the model; `step_s` and `host_s_per_step` are means over them, host time being the part of a step
    outside the model's own forward pass.
    """

    name: str
    requests: list[RequestRecord]
    preemptions: int
    parks: int
    fetches: int
    bytes_stored: int
    bytes_loaded: int
    wall_s: float
    num_steps: int
    step_s: float
    host_s_per_step: float


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The server's state at one moment, read from ``/metrics``.

    `device_kv_bytes` and `host_kv_bytes` are KV in each tier, cached prefixes on the host included (None for the host
    memory of vLLM's offload, which does not say, and where the size of a block is not known); `waiting` counts
    requests before their first compute or preempted, `parked` those whose KV is in host memory only. `waiting_for`
    counts both kinds by the resource that they lack, as far as layerkv has looked at them; other engines do not tell.
    """

    time_s: float
    device_kv_bytes: int
    host_kv_bytes: int | None
    running: int
    waiting: int
    parked: int
    waiting_for: dict[str, int] = {}


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
    """One load through one engine.

    `longest_probe_s` is the longest that the server took to answer `/health` meanwhile; None where nobody asked.
    """

    engine: str
    point: str
    seed: int
    requests: list[RequestRecord]
    samples: list[Sample]
    counters: Counters
    wall_s: float
    longest_probe_s: float | None = None

    @property
    def is_disturbed(self) -> bool:
        """Whether server or clients were starved of CPU for so long that its times mean little."""
        return self.longest_probe_s is not None and self.longest_probe_s > PROBE_LIMIT_S


class EngineFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why an engine has no figures, and the last lines that its process printed.

    Where an error further up was the cause, that stands in front of them.
    """

    reason: str
    log_tail: list[str]


class Progress(msgspec.Struct, frozen=True):
    """A line on the engine process's standard output: `progress` of `total` output tokens are there."""

    progress: int
    total: int


def write_json(value: msgspec.Struct, path: Path) -> None:
    """Writes `value` to `path` as indented JSON, in one rename: a reader never sees half of it."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1))
    draft.replace(path)


def read_json(path: Path, of_type: type[T]) -> T:
    """Reads what `write_json` wrote.

    Raises:
        msgspec.ValidationError: the file is JSON of another form; the message names the place.
    """
    return msgspec.json.decode(path.read_bytes(), type=of_type)
