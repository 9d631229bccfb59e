"""The ordering rules of segments that move, and the proof that breaking any of them would be seen.

As in `test_ordering.py`, over fakes that do as much harm as the contracts permit, and over the CPU's engine and arena
with guards: there a stray access ends the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from layerkv.core.segments import SegmentLayout, SegmentState
from layerkv.device.base import Event
from tests.cpu.device import segment_scenarios
from tests.cpu.device.segment_scenarios import SEGMENT_SCENARIOS, SegmentScenario
from tests.cpu.device.test_ordering import SHAPES, AnyLife, shape_id
from tests.fakes.segment_server import CUDA_ORDERS, STREAM_ORDERS, SegmentServer, SegmentWorker, make_segment_worker
from tests.fakes.stream_engine import AHEAD, COMPUTE, STORE, StreamEvent
from tests.fakes.workers import small_geometry

HOST_BLOCKS = 18
LAYOUT = SegmentLayout(segment_blocks=4, num_segments=4)
"""Of 16 pool blocks; every piece is a page of the kernel."""


def worker_of(order: str, shape: tuple[int, ...], num_mapped: int = 4) -> SegmentWorker:
    return make_segment_worker(order, small_geometry(*shape), LAYOUT, HOST_BLOCKS, num_mapped=num_mapped)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("scenario", SEGMENT_SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_layer_reads_right_kv_whatever_moves(scenario: SegmentScenario, shape: tuple[int, ...]) -> None:
    for order in (*STREAM_ORDERS, "cpu"):
        server = worker_of(order, shape).server(HOST_BLOCKS)
        scenario(server)
        assert server.model.num_checked > 0
        assert not server.failed
        assert not server.failed_maps


@pytest.mark.parametrize("shape", [(3, 1), (4, 2), (5, 1, 1)], ids=shape_id)
@pytest.mark.parametrize("scenario", SEGMENT_SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_layer_reads_right_kv_with_the_cuda_arena(scenario: SegmentScenario, shape: tuple[int, ...]) -> None:
    """A kernel that touches a segment without memory ends the process."""
    for order in CUDA_ORDERS:
        server = worker_of(order, shape).server(HOST_BLOCKS)
        scenario(server)
        server.everything_ends()
        assert server.model.num_checked > 0
        assert not server.failed


def test_a_pool_that_begins_small_grows() -> None:
    for order in (*STREAM_ORDERS, "cpu"):
        server = worker_of(order, (3, 1), num_mapped=1).server(HOST_BLOCKS)
        assert server.pool.num_free == 3
        assert server.grow(2) == [1, 2]
        server.await_moves()
        assert server.pool.num_free == 11
        segment_scenarios.resident_in(server, 2, "r", 16)
        server.end()


def test_where_one_segment_finds_no_memory_the_others_come_and_it_may_try_again() -> None:
    for order in STREAM_ORDERS:
        worker = worker_of(order, (3, 1), num_mapped=1)
        server = worker.server(HOST_BLOCKS)
        worker.arena.full = {2}
        assert server.grow(3) == [1, 2, 3]
        server.await_moves()
        assert [ended.segment for ended in server.failed_maps] == [2]
        assert server.table.state(2) is SegmentState.UNMAPPED
        assert server.pool.num_free == 11
        worker.arena.full = set()
        assert server.grow() == [2]
        server.await_moves()
        segment_scenarios.resident_in(server, 2, "r", 16)
        server.end()


# Mutants ----------------------------------------------------------------------------------------------------------


class DeafArena:
    """Forwards everything to a `StreamElasticArena` but what one rule asks for."""

    def __init__(self, worker: SegmentWorker, rule: str) -> None:
        self._arena, self._engine, self._rule = worker.arena, worker.engine, rule
        self.geometry, self.tensor = worker.arena.geometry, worker.arena.tensor
        self.num_ignored = 0

    def prepare_map(self, segments: Sequence[int]) -> Event:
        if self._rule == "13":  # and with it the scheduler's: an unmap was told too soon
            for segment in segments:
                pending = self._arena.leaving.pop(segment, None)
                self.num_ignored += pending is not None and not pending.is_done()
        prepared: Event = self._arena.prepare_map(segments)
        if self._rule == "11":
            self.num_ignored += 1
            self._engine.in_background("map", partial(self._arena._clear, segments), [prepared])
            return ended()
        return prepared

    def map(self, segments: Sequence[int]) -> None:
        if self._rule != "11":
            self._arena.map(segments)

    def unmap(self, segments: Sequence[int], *, after: Sequence[StreamEvent] = ()) -> Event:
        deaf_to = {"12, for stores": STORE, "12, for stores in the background": AHEAD, "12, for compute": COMPUTE}
        unheard = [event for event in after if event.operation and event.operation.queue == deaf_to.get(self._rule)]
        self.num_ignored += len(unheard)
        event: Event = self._arena.unmap(segments, after=[event for event in after if event not in unheard])
        return ended() if self._rule == "13" else event


def ended() -> StreamEvent:
    event = StreamEvent()
    event.end()
    return event


MUTANTS = {
    "11": segment_scenarios.segment_comes_back_for_somebody_else,
    "12, for stores": segment_scenarios.parked_and_its_segment_leaves_in_the_same_step,
    "12, for stores in the background": segment_scenarios.prefix_stored_in_the_background_while_its_segment_leaves,
    "12, for compute": segment_scenarios.finished_and_its_segment_leaves_while_its_last_step_is_under_way,
    "13": segment_scenarios.segment_comes_back_for_somebody_else,
}


def run_broken(broken_rule: str, shape: tuple[int, ...]) -> None:
    for order in STREAM_ORDERS:
        worker = worker_of(order, shape)
        deaf = DeafArena(worker, broken_rule)
        MUTANTS[broken_rule](worker.server(HOST_BLOCKS, arena=deaf))
        assert deaf.num_ignored > 0, "the scenario never comes to where the rule matters"


@pytest.mark.parametrize("shape", [(3, 1), (5, 2), (4, 3)], ids=shape_id)
@pytest.mark.parametrize("broken_rule", MUTANTS)
def test_breaking_a_rule_shows_as_wrong_kv(broken_rule: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match=r"read wrong KV|was written without memory"):
        run_broken(broken_rule, shape)


def test_the_mutants_arena_itself_breaks_nothing() -> None:
    for scenario in MUTANTS.values():
        for order in STREAM_ORDERS:
            worker = worker_of(order, (5, 2))
            scenario(worker.server(HOST_BLOCKS, arena=DeafArena(worker, "none")))


# Any life of any requests and segments ----------------------------------------------------------------------------


class AnyMoves(AnyLife):
    """The lives of `test_ordering.py`, while segments come and go."""

    server: SegmentServer

    @initialize(shape=st.sampled_from(SHAPES), order=st.sampled_from(STREAM_ORDERS), seed=st.integers(0, 99))
    def begin(self, shape: tuple[int, ...], order: str, seed: int) -> None:  # type: ignore[override]
        self.server = worker_of(order, shape, num_mapped=seed % 4 + 1).server(HOST_BLOCKS)
        self.server.keeps_fetched = seed % 2 == 0
        self.num_arrived, self.said = 0, []

    @rule(segment=st.integers(1, 3))
    def shrink(self, segment: int) -> None:
        if self.server.table.state(segment) is SegmentState.MAPPED:
            self.server.shrink(segment)

    @rule(segment=st.integers(1, 3))
    def stay(self, segment: int) -> None:
        if self.server.table.state(segment) is SegmentState.LEAVING:
            self.server.stay(segment)

    @rule(num_segments=st.integers(1, 3), prefers=st.integers(0, 3))
    def grow(self, num_segments: int, prefers: int) -> None:
        self.server.grow(num_segments)
        self.server.pool.prefers = prefers

    @precondition(lambda self: self.server.mover.num_under_way)
    @rule()
    def moves_end(self) -> None:
        self.server.await_moves()


class TestAnyMovesReadRightKV(AnyMoves.TestCase):
    """Named for the report."""
