"""Short lives of a few requests and segments, each built so that a move and a copy, or compute, would collide.

A scenario takes a `SegmentServer` whose pool has four segments of four blocks, all mapped, and ends with every request
gone and all of them mapped again.
"""

from __future__ import annotations

from collections.abc import Callable

from layerkv.core.segments import SegmentState
from tests.fakes.segment_server import SegmentServer

SegmentScenario = Callable[[SegmentServer], None]


def resident_in(server: SegmentServer, segment: int, request_id: str, num_tokens: int) -> None:
    """A resident prompt of at most 16 tokens is computed, in that segment's blocks."""
    server.pool.prefers = segment
    server.arrive(request_id, num_tokens, layered=False)
    server.step(**{request_id: num_tokens})
    assert {server.layout.segment_of(block) for block in server.requests[request_id].block_ids} == {segment}
    server.pool.prefers = 0


def parked_and_its_segment_leaves_in_the_same_step(server: SegmentServer) -> None:
    """Of stores that compute waits for layer by layer, the later ones have not begun when the step has."""
    resident_in(server, 1, "other", 5)
    resident_in(server, 2, "r", 14)
    server.park("r")
    server.shrink(2)
    server.step(other=1)
    server.fetch("r")
    server.await_fetch("r")
    server.step(r=1)
    server.end()


def prefix_stored_in_the_background_while_its_segment_leaves(server: SegmentServer) -> None:
    resident_in(server, 2, "r", 14)
    said = server.finish("r", keeps=True)
    server.shrink(2)
    server.step()
    assert server.arrive_again("again", said, 15) == 3
    server.step(again=3)
    server.end()


def parked_steps_after_it_was_stored_ahead(server: SegmentServer) -> None:
    """What was stored ahead is not stored by the park; the step that parks settles, and unmaps."""
    resident_in(server, 3, "r", 13)
    server.store_ahead("r")
    server.step(r=1)
    server.park("r")
    server.shrink(3)
    server.step()
    server.fetch("r")
    server.await_fetch("r")
    server.step(r=1)
    server.end()


def finished_and_its_segment_leaves_while_its_last_step_is_under_way(server: SegmentServer) -> None:
    resident_in(server, 2, "r", 16)
    server.finish("r")
    server.shrink(2)
    server.step()
    server.end()


def segment_comes_back_for_somebody_else(server: SegmentServer) -> None:
    resident_in(server, 2, "r", 16)
    server.finish("r")
    server.shrink(2)
    server.step()
    while server.table.state(2) is not SegmentState.UNMAPPED:
        server.step()
        server.poll(wait_s=5.0)
    assert server.grow() == [2]
    server.await_moves()
    resident_in(server, 2, "next", 13)
    server.everything_ends()
    for _ in range(3):
        server.step(next=1)
    server.park("next")
    server.step()
    server.fetch("next")
    server.await_fetch("next")
    server.step(next=1)
    server.end()


def fetched_into_a_segment_that_has_just_come(server: SegmentServer) -> None:
    resident_in(server, 1, "r", 14)
    server.park("r")
    server.shrink(1)
    server.await_moves()
    server.step()
    server.await_moves()
    server.grow()
    server.await_moves()
    server.pool.prefers = 1
    server.fetch("r")
    server.await_fetch("r")
    server.step(r=1)
    server.end()


def moves_beside_a_layered_prompt(server: SegmentServer) -> None:
    resident_in(server, 3, "r", 9)
    server.arrive("a", 26, layered=True)
    server.step(r=1, a=9)
    server.park("r")
    server.shrink(3)
    server.step(a=9)
    server.step(a=8)
    server.grow()
    server.park("a")
    server.await_moves()
    server.fetch("a")
    server.fetch("r")
    for request_id in ("a", "r"):
        server.await_fetch(request_id)
    server.step(a=1, r=1)
    server.end()


def leaving_and_wanted_again(server: SegmentServer) -> None:
    resident_in(server, 2, "r", 9)
    server.shrink(2)
    server.step(r=1)
    server.stay(2)
    server.step(r=1)
    server.shrink(2)
    server.park("r")
    server.fetch("r")
    server.step()
    server.await_fetch("r")
    server.step(r=1)
    server.end()


def whole_pool_comes_and_goes(server: SegmentServer) -> None:
    for turn in range(3):
        for segment in (1, 2, 3):
            resident_in(server, segment, f"r{segment}-{turn}", 16)
        for segment in (1, 2, 3):
            server.park(f"r{segment}-{turn}")
            server.shrink(segment)
        server.step()
        server.await_moves()
        assert server.table.num_held == 1
        server.grow(3)
        server.await_moves()
        for segment in (1, 2, 3):
            server.fetch(f"r{segment}-{turn}")
        for segment in (1, 2, 3):
            server.await_fetch(f"r{segment}-{turn}")
            server.step(**{f"r{segment}-{turn}": 1})
            server.finish(f"r{segment}-{turn}")
    server.end()


SEGMENT_SCENARIOS: tuple[SegmentScenario, ...] = (
    parked_and_its_segment_leaves_in_the_same_step,
    prefix_stored_in_the_background_while_its_segment_leaves,
    parked_steps_after_it_was_stored_ahead,
    finished_and_its_segment_leaves_while_its_last_step_is_under_way,
    segment_comes_back_for_somebody_else,
    fetched_into_a_segment_that_has_just_come,
    moves_beside_a_layered_prompt,
    leaving_and_wanted_again,
    whole_pool_comes_and_goes,
)
