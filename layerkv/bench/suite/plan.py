"""The load of a run as data: every request, when it is due, and what it says.

Pure functions. Invariant: a plan depends on the case's point and the seed alone, so that all engines get the same
requests at the same times. Only the later turns of a conversation wait for something: for the answer before them.
"""

from __future__ import annotations

from random import Random

import msgspec

from layerkv.bench.load import FIRST_ORDINARY_TOKEN_ID, PlannedRequest
from layerkv.bench.priorities import Priorities
from layerkv.bench.suite.case import Case, Point
from layerkv.bench.suite.ends import Ends
from layerkv.bench.suite.prompts import Prompts
from layerkv.sim.workload import SimRequest, make_workload


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the generator is told.

    `names_classes` says whether requests name their class to the server: only layerkv knows what that is.
    `warm_up` are sent one after the other before the start and are not recorded. `kv_memory_bytes` and `block_bytes`
    turn the server's shares and blocks into bytes (None where the size of a block is not known, as of a model that is
    not ours); `tells_host_memory` says whether it has metrics of the latter. `priorities` is how the load generator is
    to run. The load does not begin before `not_before_s`, by the machine's monotonic clock.
    """

    url: str
    model: str
    requests: list[PlannedRequest]
    warm_up: list[PlannedRequest]
    names_classes: bool
    sample_interval_s: float
    kv_memory_bytes: int
    block_bytes: int | None
    tells_host_memory: bool = True
    priorities: Priorities = "none"
    not_before_s: float = 0.0


def plan_requests(case: Case, point: Point, seed: int) -> list[PlannedRequest]:
    """The requests of one point, first those that wait for nothing, in order of arrival."""
    drawn = make_workload(point.workload, rate_per_s=point.rate_per_s, seed=seed)
    ordinary = range(FIRST_ORDINARY_TOKEN_ID, vocab_size(case))
    prompts = Prompts(seed, point.name, ordinary)
    if point.sessions is not None:
        return _sessions(point, drawn, prompts.rng, ordinary, seed)
    planned = [
        PlannedRequest(
            request_id=request.request_id,
            arrival_s=request.arrival_s,
            prompt=prompts.write(request),
            output_tokens=request.output_tokens,
            max_tokens=request.max_tokens if request.max_tokens > request.output_tokens else None,
            slo_class=request.slo_class,
        )
        for request in drawn
    ]
    if point.ends is None:
        return planned
    return _with_ends(planned, point.ends, Random(f"{seed}: who hangs up"), case.settings.max_model_len)


def _with_ends(planned: list[PlannedRequest], ends: Ends, rng: Random, max_model_len: int) -> list[PlannedRequest]:
    """Nobody names a length; who does not hang up has the patience for all that the model can say."""
    with_ends = []
    for request in planned:
        # What vLLM's chat API puts in the place of a `max_tokens` that is left out; its completions API would put 16.
        room = max_model_len - len(request.prompt)
        hangs_up = rng.random() < ends.hang_up_share and request.output_tokens < room
        with_ends.append(
            msgspec.structs.replace(
                request,
                stop=list(ends.stop),
                output_tokens=request.output_tokens if hangs_up else room,
                max_tokens=room if hangs_up else None,
            )
        )
    return with_ends


def vocab_size(case: Case) -> int:
    """How many token ids prompts are drawn from: all of a tiny model's, a safe part of any other's."""
    return case.settings.shape.vocab_size if case.settings.shape is not None else 16384


def warm_up_requests(case: Case) -> list[PlannedRequest]:
    """A few requests that make the engine do everything once."""
    longest = min(case.settings.max_model_len // 2, case.settings.max_num_batched_tokens)
    return [
        PlannedRequest(
            request_id=f"warm-up-{i}", arrival_s=0.0, prompt=[FIRST_ORDINARY_TOKEN_ID + i] * length, output_tokens=8
        )
        for i, length in enumerate((16, longest, longest))
    ]


def total_tokens(requests: list[PlannedRequest]) -> int:
    """KV that all requests need at most if none is ever freed; turns of a session share what was said before."""
    return sum(len(request.prompt) + request.output_tokens for request in requests)


def _sessions(point: Point, drawn: list[SimRequest], rng: Random, ordinary: range, seed: int) -> list[PlannedRequest]:
    """Each drawn request begins a session; its further turns draw lengths of the same class."""
    assert point.sessions is not None
    shared = Random(f"{seed}: shared prefix").choices(ordinary, k=point.sessions.shared_prefix_tokens)
    repeated = [] if point.sessions.history else shared
    mixes = {mix.slo_class: mix for mix in point.workload.classes}
    first: list[PlannedRequest] = []
    later: list[PlannedRequest] = []
    for session in drawn:
        mix = mixes[session.slo_class]
        assert mix.prompt_tokens is not None
        assert mix.output_tokens is not None
        num_turns = point.sessions.turns.draw(rng)
        first.append(
            PlannedRequest(
                request_id=f"{session.request_id}-1",
                arrival_s=session.arrival_s,
                prompt=shared + rng.choices(ordinary, k=session.prompt_tokens),
                output_tokens=session.output_tokens,
                slo_class=session.slo_class,
            )
        )
        later += [
            PlannedRequest(
                request_id=f"{session.request_id}-{turn}",
                arrival_s=point.sessions.think_s,
                prompt=repeated + rng.choices(ordinary, k=mix.prompt_tokens.draw(rng)),
                output_tokens=mix.output_tokens.draw(rng),
                slo_class=session.slo_class,
                after=f"{session.request_id}-{turn - 1}",
                history=point.sessions.history,
            )
            for turn in range(2, num_turns + 1)
        ]
    return first + later
