"""What crosses the border between the demo and its engine processes, as JSON.

`EngineSpec` goes in, `EngineRun` comes out, and `Progress` lines come in between. Invariant: all times of an
`EngineRun` are seconds on one monotonic clock, counted from the start of its load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from layerkv.bench.load import LoadSpec

T = TypeVar("T")


class PlannedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request of a load that is given request by request; its prompt is random, of that length."""

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo_class: str | None = None


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine to build and the load to drive through it.

    `engine_args` are the keyword arguments of vLLM's `EngineArgs`. `planned` takes the place of the requests of
    `load`, whose vocabulary, seed and longest prompt are used. With a `deep_queue`, the scheduler's time is
    recorded for steps that begin with so many requests queued, and the run ends as soon as enough of them are.
    """

    name: str
    engine_args: dict[str, Any]
    load: LoadSpec
    deep_queue: int | None = None
    planned: list[PlannedRequest] = []


class StateChange(msgspec.Struct, frozen=True, array_like=True):
    """From `time_s` on, the request is in `state`."""

    time_s: float
    state: str


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to one request.

    `first_scheduled_s` is when the scheduler first took it up, None if it never did. `token_times_s[i]` is
    when `token_ids[i]` came out of the engine. `states` are its moves, in order, as the scheduler reported
    them or as they were seen between steps (see `engine_run`).
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    first_scheduled_s: float | None
    token_times_s: list[float]
    token_ids: list[int]
    states: list[StateChange] = []


class EngineRun(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one engine's run over the whole load.

    `preemptions` counts requests whose KV was thrown away and computed again. `num_steps` counts steps that
    ran the model; `step_s` and `host_s_per_step` are means over them, host time being the part of a step
    outside the model's own forward pass. `schedule_s` are the scheduler's times of the steps that began with at
    least `EngineSpec.deep_queue` requests queued.
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
    schedule_s: list[float] = []


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
