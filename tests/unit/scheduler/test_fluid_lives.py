"""Whole lives of streams under the fluid policy: readers are served in turns, and what goes wrong loses nothing.

What is checked after every step is in `tests/fakes/tiny_scheduler.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

from layerkv.config import PolicyName, SloClass
from layerkv.figures import ReaderClock, is_fluid
from layerkv.scheduler.reasons import End, Reason
from layerkv.sim.engine import Live, SimRequest
from layerkv.sim.outcome import SimOutcome
from tests.fakes.tiny_scheduler import TinyScheduler, job, policy, profile


class Readers(TinyScheduler):
    """A pool of 24 blocks, in which two or three of eight streams have room, and host memory for all."""

    def __init__(self, jobs: list[SimRequest], name: PolicyName = "fluid", **engine: Any) -> None:
        sizes: dict[str, Any] = {"pool_blocks": 24, "zone_blocks": 16, "num_host_blocks": 200, "budget_tokens": 256}
        super().__init__(jobs, slo=policy(policy=name), **{**sizes, **engine})
        self.readers: dict[str, ReaderClock] = {}

    def made_tokens(self, live: Live, at_s: float, num_tokens: int, every_s: float) -> None:
        super().made_tokens(live, at_s, num_tokens, every_s)
        self.readers[live.request_id] = live.tally.reader

    def served(self) -> SimOutcome:
        """All requests to their ends; each got what it asked for."""
        asked = {r.request_id: r.output_tokens for r in self.to_come}
        asked |= {name: live.request.output_tokens for name, live in self.lives.items()}
        outcome = self.run(max_steps=20_000)
        assert {r.request_id: r.output_tokens for r in outcome.requests} == asked
        self.check_is_empty()
        return outcome

    def num_fluid(self, outcome: SimOutcome) -> int:
        return sum(is_fluid(r.slo, r.ttft_s, self.readers[r.request_id].lag_s) for r in outcome.requests)


def streams(num: int = 8, num_output: int = 200, **slo: Any) -> list[SimRequest]:
    return [job(f"r{i}", 64, num_output, i * 0.01, **slo) for i in range(num)]


def num_parks(outcome: SimOutcome, reason: Reason) -> int:
    return outcome.reasons.get(reason.value, 0)


@pytest.mark.parametrize("frees_are_deferred", [False, True])
@pytest.mark.parametrize("stride", [1, 4])
def test_more_readers_are_served_without_a_pause_than_the_pool_holds(frees_are_deferred: bool, stride: int) -> None:
    """Each needs its blocks for a fifth of the time; by slack on the mean they wait for seconds."""
    engine = {"frees_are_deferred": frees_are_deferred, "stride": stride}
    turns, mean = Readers(streams(tpot_s=0.06), **engine), Readers(streams(tpot_s=0.06), "slo", **engine)
    in_turns, by_mean = turns.served(), mean.served()
    assert turns.num_fluid(in_turns) == 8
    assert mean.num_fluid(by_mean) < 8
    assert num_parks(in_turns, Reason.TURN_OVER) > 0
    assert in_turns.end_s < 1.2 * by_mean.end_s


def test_turns_store_less_than_they_load_because_copies_stay() -> None:
    scheduler = Readers(streams(tpot_s=0.06))
    outcome = scheduler.served()
    assert any(r.num_parks > 1 for r in outcome.requests)
    counters = scheduler.ledger.counters
    assert counters.stored_blocks < 0.7 * counters.loaded_blocks
    assert counters.stored_ahead_blocks > 0.5 * counters.stored_blocks, "and most of that in the background"


def test_where_decoding_is_slower_than_reading_nobody_rotates_in_vain() -> None:
    """Nobody has anything to spare: who flows no longer, or is held, makes room for one that flows, and that is all."""
    scheduler = Readers(streams(tpot_s=0.005, num_output=250))
    outcome = scheduler.served()
    assert num_parks(outcome, Reason.TURN_OVER) <= 2 * 8, "and 17 s are 68 slices"
    assert outcome.end_s < 1.1 * Readers(streams(tpot_s=0.005, num_output=250), "slo").served().end_s


def test_a_pace_that_no_engine_keeps_and_one_that_any_does_are_served_together() -> None:
    jobs = [job(f"r{i}", 64, 100, i * 0.01, tpot_s=(1e-6, 1e4)[i % 2], name=f"c{i % 2}") for i in range(8)]
    Readers(jobs).served()


@pytest.mark.parametrize("num_host_blocks", [0, 10, 20, 30])
@pytest.mark.parametrize("frees_are_deferred", [False, True])
def test_where_host_memory_fills_in_mid_rotation_requests_are_computed_again_and_nothing_is_lost(
    num_host_blocks: int, frees_are_deferred: bool
) -> None:
    jobs = streams(tpot_s=0.06)
    scheduler = Readers(jobs, num_host_blocks=num_host_blocks, frees_are_deferred=frees_are_deferred)
    outcome = scheduler.served()
    assert num_parks(outcome, Reason.NO_ROOM_TO_PARK) > 0
    assert outcome.preemptions > 0


def test_the_less_host_memory_there_is_the_fewer_turns_there_are_but_never_fewer_readers_than_by_the_mean() -> None:
    for num_host_blocks in (0, 20, 60):
        turns = Readers(streams(tpot_s=0.06), num_host_blocks=num_host_blocks)
        mean = Readers(streams(tpot_s=0.06), "slo", num_host_blocks=num_host_blocks)
        assert turns.num_fluid(turns.served()) >= mean.num_fluid(mean.served())


@pytest.mark.parametrize("jump_s", [3600.0, 1e7])
@pytest.mark.parametrize("after_steps", [3, 40, 120])
def test_a_clock_that_jumps_ahead_makes_everybody_late_and_nobody_stops(jump_s: float, after_steps: int) -> None:
    scheduler = Readers(streams(tpot_s=0.06))
    for _ in range(after_steps):
        scheduler.advance()
    scheduler.now_s += jump_s
    begun = scheduler.step
    outcome = scheduler.served()
    assert scheduler.step - begun < 2 * sum(r.output_tokens for r in outcome.requests)


@pytest.mark.parametrize("tokens_when_it_left", [1, 2, 30, 90])
def test_a_client_that_hangs_up_in_mid_slice_leaves_its_place_to_others(tokens_when_it_left: int) -> None:
    gone = [job(f"g{i}", 64, tokens_when_it_left, i * 0.01, tpot_s=0.06, max_tokens=500, end=End.LEFT) for i in (0, 3)]
    scheduler = Readers([*gone, *streams(6, tpot_s=0.06)])
    outcome = scheduler.served()
    assert scheduler.num_fluid(outcome) == 8


def test_a_client_that_hangs_up_while_it_is_parked_or_fetched_leaves_nothing_behind() -> None:
    """Whoever is there first: it is looked for in each step until it has been found."""
    for where in ("parked", "fetched"):
        scheduler = Readers(streams(tpot_s=0.06), costs=profile(block_copy_s=0.004))
        while True:
            scheduler.advance()
            parked = [view.request_id for view in scheduler.controller.parked.views]
            found = parked if where == "parked" else list(scheduler._loading)
            found = [name for name in found if scheduler.lives[name].num_made > 20]
            if found:
                break
        live = scheduler.lives.pop(found[0])
        scheduler.free(live)
        scheduler.desk.leave(live.request_id, num_output=live.num_made, end=End.LEFT, now_s=scheduler.now_s)
        scheduler.end(live, None)
        if where == "fetched":
            del scheduler._loading[live.request_id]
            scheduler.ledger.complete_fetch(live.request_id)
        scheduler.run(max_steps=20_000)
        scheduler.check_is_empty()


def test_what_nobody_reads_keeps_its_mean_and_leaves_readers_their_turns() -> None:
    """Four jobs of 200 tokens have 20 s; the readers beside them have 60 ms a token."""
    batch = [job(f"b{i}", 64, 200, 0.0, name="batch", tpot_s=0.1, stream=False) for i in range(4)]
    scheduler = Readers([*batch, *streams(4, tpot_s=0.06)])
    outcome = scheduler.served()
    for r in outcome.requests:
        assert r.finish_s is not None
        assert r.first_token_s is not None
        if r.slo.name == "batch":
            assert (r.finish_s - r.first_token_s) / 199 <= 0.1
        else:
            assert is_fluid(r.slo, r.ttft_s, scheduler.readers[r.request_id].lag_s)


def test_a_class_without_a_pace_is_served_beside_readers() -> None:
    jobs = [job(f"b{i}", 64, 200, 0.0, name="batch", tpot_s=float("inf"), ttft_s=1e6) for i in range(4)]
    scheduler = Readers([*jobs, *streams(4, tpot_s=0.06)])
    outcome = scheduler.served()
    flowing = [r for r in outcome.requests if r.slo.name == "chat"]
    assert all(is_fluid(r.slo, r.ttft_s, scheduler.readers[r.request_id].lag_s) for r in flowing)


def test_the_heavier_class_flows_where_not_all_can() -> None:
    """The pool's time is asked for one and a half times."""
    classes = [SloClass(name="free", ttft_s=1.0, tpot_s=0.03)] * 6
    classes += [SloClass(name="paid", ttft_s=1.0, tpot_s=0.03, weight=50.0)] * 2
    scheduler = Readers([SimRequest(f"j{i}", i * 0.01, 64, 150, 150, slo) for i, slo in enumerate(classes)])
    outcome = scheduler.served()
    flows = [(r.slo.name, is_fluid(r.slo, r.ttft_s, scheduler.readers[r.request_id].lag_s)) for r in outcome.requests]
    assert flows.count(("paid", True)) == 2
    assert flows.count(("free", False)) > 1


def test_objectives_may_be_as_tight_as_nothing() -> None:
    """A reader who may never wait at all, and a first token that comes late whatever happens."""
    strict = SloClass(name="strict", ttft_s=1e-9, tpot_s=0.06, max_lag_s=0.0, max_stall_s=1e-3)
    Readers([SimRequest(f"r{i}", 0.0, 64, 100, 100, strict) for i in range(8)]).served()
