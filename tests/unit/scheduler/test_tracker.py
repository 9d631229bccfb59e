from __future__ import annotations

from bisect import bisect_left
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from layerkv.config import SloClass
from layerkv.scheduler import tracker
from layerkv.scheduler.snapshot import ParkedRequest
from layerkv.scheduler.tracker import LATE_SHARE, UNREADY_LOOKS, DeadlineQueue, TrackedRequest

CHAT = SloClass(name="chat", ttft_s=2.0, tpot_s=0.1)


# DeadlineQueue ----------------------------------------------------------------------------------------------------


class Queue(RuleBasedStateMachine):
    """The queue beside a dictionary that is sorted anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: DeadlineQueue[ParkedRequest] = DeadlineQueue()
        self.here: dict[str, ParkedRequest] = {}

    @rule(
        request_id=st.sampled_from("abcdefghij"),
        deadline_s=st.sampled_from((-1e6, 0.0, 1.0, 2.5, 2.5, 1e9)),
        rank=st.sampled_from((-1, 0, 0, 3)),
    )
    def come_or_go(self, request_id: str, deadline_s: float, rank: int) -> None:
        if request_id in self.here:
            self.queue.discard(request_id)
            del self.here[request_id]
        else:
            view = ParkedRequest(request_id, deadline_s, num_blocks=1, rank=rank)
            self.queue.add(view)
            self.here[request_id] = view

    @rule(request_id=st.sampled_from("abcxyz"))
    def go_if_here(self, request_id: str) -> None:
        self.queue.discard(request_id)
        self.here.pop(request_id, None)

    @rule(
        most=st.integers(1, 12),
        now_s=st.sampled_from((-2e6, 0.5, 2.5, 2e9)),
        ready=st.sets(st.sampled_from("abcdefghij")),
    )
    def show_its_head(self, most: int, now_s: float, ready: set[str]) -> None:
        """Of those that are ready: rank by rank, first who is on time, by deadline; then late ones, at least one."""
        here = [view for view in self.queue.views if view.request_id in ready]
        head = self.queue.head(most, now_s, lambda view: view.request_id in ready)
        assert len(head) == min(most, len(here)), "nobody is left out while there is room"
        assert [view.rank for view in head] == [view.rank for view in here][: len(head)], "the best ranks"
        for rank in {view.rank for view in head}:
            shown = [view for view in head if view.rank == rank]
            late = [view for view in here if view.rank == rank and view.deadline_s < now_s]
            on_time = [view for view in here if view.rank == rank and view.deadline_s >= now_s]
            num_late = sum(view.deadline_s < now_s for view in shown)
            num_on_time = len(shown) - num_late
            assert shown == on_time[:num_on_time] + late[:num_late], "on time first, each kind in its order"
            assert num_late > 0 or not late, "late ones are seen at all"
            room = most - sum(view.rank < rank for view in head)
            assert num_on_time >= min(len(on_time), room - max(room // LATE_SHARE, 1))

    @rule(now_s=st.sampled_from((-2e6, 0.5, 2.5, 2e9)), due_in_s=st.sampled_from((0.0, 1.0, 2.0, 3e9)))
    def stand_in_line(self, now_s: float, due_in_s: float) -> None:
        due_s = now_s + due_in_s
        better = [view for view in self.queue.views if view.rank < 0]
        equal = [view for view in self.queue.views if view.rank == 0]
        sooner = [view for view in equal if now_s <= view.deadline_s <= due_s]
        assert self.queue.due_before(now_s, due_s) == better + sooner
        late = [view for view in equal if view.deadline_s < now_s]
        assert self.queue.late(now_s, 100) == late
        assert self.queue.late(now_s, 2) == late[:2]

    @invariant()
    def is_sorted_and_complete(self) -> None:
        expected = sorted(self.here.values(), key=lambda view: (view.rank, view.deadline_s, view.request_id))
        assert list(self.queue.views) == expected
        assert len(self.queue) == len(expected)
        for request_id in "abcdefghijxyz":
            assert (request_id in self.queue) == (request_id in self.here)
            assert self.queue.view(request_id) == self.here.get(request_id)


Queue.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestQueue = Queue.TestCase


def test_a_request_may_come_back_with_another_deadline() -> None:
    queue: DeadlineQueue[ParkedRequest] = DeadlineQueue()
    for request_id, deadline_s in (("a", 3.0), ("b", 2.0), ("c", 1.0)):
        queue.add(ParkedRequest(request_id, deadline_s, 1))
    queue.discard("a")
    queue.add(ParkedRequest("a", 0.5, 1))
    assert [view.request_id for view in queue.views] == ["a", "c", "b"]


def queue_of(*views: ParkedRequest) -> DeadlineQueue[ParkedRequest]:
    queue: DeadlineQueue[ParkedRequest] = DeadlineQueue()
    for view in views:
        queue.add(view)
    return queue


def ids(views: list[ParkedRequest]) -> str:
    return "".join(view.request_id for view in views)


def test_the_head_shows_who_is_on_time_first_and_a_few_of_the_late() -> None:
    views = [ParkedRequest(name, deadline_s, 1) for deadline_s, name in enumerate("abcdefghijklmnopqrst")]
    queue = queue_of(*views)
    assert ids(queue.head(20, now_s=4.0)) == "efghijklmnopqrst" + "abcd"
    assert ids(queue.head(8, now_s=4.0)) == "efghijk" + "a", "one in eight"
    assert ids(queue.head(16, now_s=4.0)) == "efghijklmnopqr" + "ab"
    assert ids(queue.head(4, now_s=4.0)) == "efg" + "a", "but one at least"
    assert ids(queue.head(4, now_s=18.0)) == "st" + "ab"
    assert ids(queue.head(4, now_s=0.0)) == "abcd", "due now is not late"


def test_who_stays_ready_is_asked_once() -> None:
    queue = queue_of(*(ParkedRequest(name, deadline_s, 1) for deadline_s, name in enumerate("abc")))
    asked: list[str] = []

    def is_ready(view: ParkedRequest) -> bool:
        asked.append(view.request_id)
        return view.request_id != "b"

    def head() -> str:
        asked.clear()
        return ids(queue.head(9, 0.0, is_ready, stays_ready=True))

    assert (head(), asked) == ("ac", ["a", "b", "c"])
    assert (head(), asked) == ("ac", ["b"]), "others are not asked again"
    queue.discard("a")
    queue.add(ParkedRequest("a", 5.0, 1))
    assert (head(), asked) == ("ca", ["b", "a"]), "one that comes back is"
    assert queue.has_unready


def test_a_lower_rank_is_shown_first() -> None:
    queue = queue_of(ParkedRequest("a", 1.0, 1, rank=1), ParkedRequest("b", 9.0, 1), ParkedRequest("c", 8.0, 1))
    assert ids(queue.head(3, now_s=0.0)) == "cba"
    assert ids(queue.head(2, now_s=0.0)) == "cb"
    assert ids(list(queue.views)) == "cba"


def test_a_late_request_of_better_rank_is_shown_before_any_of_worse_rank() -> None:
    queue = queue_of(ParkedRequest("late", 1.0, 1), ParkedRequest("x", 9.0, 1, rank=1), ParkedRequest("y", 8.0, 1))
    assert [view.request_id for view in queue.head(3, now_s=5.0)] == ["y", "late", "x"]


@pytest.mark.parametrize("now_s", [0.0, 1e6])
def test_however_many_ranks_wait_only_those_that_are_shown_are_looked_for(
    now_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all are on time or none is."""
    queue = queue_of(*(ParkedRequest(f"r{rank:04d}", 10.0 + rank, 1, rank=rank) for rank in range(1000)))
    searches = []

    def counted(*args: Any) -> int:
        searches.append(args)
        return bisect_left(*args)

    monkeypatch.setattr(tracker, "bisect_left", counted)
    assert [view.request_id for view in queue.head(10, now_s)] == [f"r{rank:04d}" for rank in range(10)]
    assert len(searches) <= 2 * 10


def test_who_is_not_ready_takes_no_place_in_the_head() -> None:
    queue = queue_of(*(ParkedRequest(name, deadline_s, 1) for deadline_s, name in enumerate("abcdef")))
    assert ids(queue.head(2, 0.0, lambda view: view.request_id not in "ac")) == "bd"


@pytest.mark.parametrize("num_ranks", [1, 5000])
@pytest.mark.parametrize("now_s", [0.0, 1e6])
def test_however_many_are_not_ready_a_few_are_asked_about_in_a_step_and_nobody_is_never_asked(
    now_s: float, num_ranks: int
) -> None:
    queue = queue_of(*(ParkedRequest(f"r{i:04d}", 10.0 + i, 1, rank=i % num_ranks) for i in range(5000)))
    asked: list[str] = []

    def is_ready(view: ParkedRequest) -> bool:
        asked.append(view.request_id)
        return view.request_id in ready

    ready: set[str] = set()
    for _ in range(100):
        before = len(asked)
        assert queue.head(64, now_s, is_ready) == []
        assert len(asked) - before <= 2 * UNREADY_LOOKS
    assert len(set(asked)) == 5000
    ready = {"r0007", "r4990"}
    heads = [[view.request_id for view in queue.head(64, now_s, is_ready)] for _ in range(50)]
    assert heads[-1] == ["r0007", "r4990"], "once seen to be ready they are shown in every step"
    assert len(queue) == len(queue.views) == 5000
    queue.discard("r0007")
    ready = set()
    assert queue.head(64, now_s, is_ready) == []
    assert len(queue) == 4999


def test_those_that_are_ready_are_shown_behind_however_many_that_are_not_after_a_few_steps() -> None:
    queue = queue_of(*(ParkedRequest(f"r{i:04d}", 10.0 + i, 1) for i in range(1000)))
    heads = [queue.head(64, 0.0, lambda view: view.request_id >= "r0900") for _ in range(8)]
    assert [view.request_id for view in heads[-1]] == [f"r{i:04d}" for i in range(900, 964)]


# TrackedRequest ---------------------------------------------------------------------------------------------------


def test_the_first_token_is_due_its_class_time_after_arrival() -> None:
    assert TrackedRequest(CHAT, arrival_s=10.0).ttft_deadline_s == 12.0


def test_the_next_token_is_due_when_the_average_keeps_the_objective() -> None:
    tracked = TrackedRequest(CHAT, arrival_s=10.0, first_token_s=11.0)
    assert tracked.start_by_s(1, 50.0, CHAT.tpot_s) == pytest.approx(11.1)
    assert tracked.start_by_s(20, 50.0, CHAT.tpot_s) == pytest.approx(13.0)


def test_while_the_first_token_is_on_its_way_now_stands_for_it() -> None:
    tracked = TrackedRequest(CHAT, arrival_s=10.0)
    assert tracked.start_by_s(0, 50.0, CHAT.tpot_s) == pytest.approx(50.1)
    assert tracked.start_by_s(1, 50.0, CHAT.tpot_s) == pytest.approx(50.1)


def tracked_with(low_tokens: int = 1, **slo: float) -> TrackedRequest:
    objectives = SloClass(name="chat", ttft_s=2.0, tpot_s=0.1, **slo)
    return TrackedRequest(objectives, arrival_s=10.0, first_token_s=11.0, low_tokens=low_tokens)


def test_the_latest_time_to_go_on_is_layerkvs_equation_1() -> None:
    """20 tokens made, 30 to come at 40 ms each, 100 ms allowed: now + 0.1 * (20 + 30) - (now - 11) - 30 * 0.04."""
    now_s = 12.5
    slack_s = 0.1 * (20 + 30) - ((now_s - 11.0) + 30 * 0.04)
    assert tracked_with(50).start_by_s(20, now_s, 0.04) == pytest.approx(now_s + slack_s)


def test_tokens_to_come_earn_nothing_where_decoding_is_slower_than_the_objective() -> None:
    assert tracked_with(50).start_by_s(20, 12.5, 0.2) == pytest.approx(13.0)
    assert tracked_with(10).start_by_s(20, 12.5, 0.04) == pytest.approx(13.0), "nor where it has outrun its prediction"


def test_the_longest_stall_bounds_the_time_away() -> None:
    assert tracked_with(50, max_stall_s=0.5).start_by_s(20, 12.5, 0.04) == pytest.approx(13.0)
    assert tracked_with(50, max_stall_s=0.2).start_by_s(20, 12.5, 0.04) == pytest.approx(12.7)
    assert tracked_with(50, max_stall_s=9.0).start_by_s(20, 12.5, 0.04) == tracked_with(50).start_by_s(20, 12.5, 0.04)
