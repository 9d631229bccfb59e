from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from layerkv.config import SloClass
from layerkv.scheduler.snapshot import ParkedRequest
from layerkv.scheduler.tracker import RANK_STEP_S, DeadlineQueue, StepTimer, TrackedRequest

CHAT = SloClass(name="chat", ttft_s=2.0, tpot_s=0.1)


# DeadlineQueue ----------------------------------------------------------------------------------------------------


class Queue(RuleBasedStateMachine):
    """The queue beside a dictionary that is sorted anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: DeadlineQueue[ParkedRequest] = DeadlineQueue()
        self.here: dict[str, ParkedRequest] = {}

    @rule(request_id=st.sampled_from("abcdefghij"), deadline_s=st.sampled_from((-1e6, 0.0, 1.0, 2.5, 2.5, 1e9)))
    def come_or_go(self, request_id: str, deadline_s: float) -> None:
        if request_id in self.here:
            self.queue.discard(request_id)
            del self.here[request_id]
        else:
            view = ParkedRequest(request_id, deadline_s, num_blocks=1)
            self.queue.add(view)
            self.here[request_id] = view

    @rule(request_id=st.sampled_from("abcxyz"))
    def go_if_here(self, request_id: str) -> None:
        self.queue.discard(request_id)
        self.here.pop(request_id, None)

    @invariant()
    def is_sorted_and_complete(self) -> None:
        expected = sorted(self.here.values(), key=lambda view: (view.deadline_s, view.request_id))
        assert list(self.queue.views) == expected
        assert len(self.queue) == len(expected)
        for request_id in "abcdefghijxyz":
            assert (request_id in self.queue) == (request_id in self.here)


Queue.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestQueue = Queue.TestCase


def test_a_request_may_come_back_with_another_deadline() -> None:
    queue: DeadlineQueue[ParkedRequest] = DeadlineQueue()
    for request_id, deadline_s in (("a", 3.0), ("b", 2.0), ("c", 1.0)):
        queue.add(ParkedRequest(request_id, deadline_s, 1))
    queue.discard("a")
    queue.add(ParkedRequest("a", 0.5, 1))
    assert [view.request_id for view in queue.views] == ["a", "c", "b"]


# TrackedRequest ---------------------------------------------------------------------------------------------------


def test_the_first_token_is_due_its_class_time_after_arrival() -> None:
    assert TrackedRequest(CHAT, arrival_s=10.0).ttft_deadline_s == 12.0


def test_the_next_token_is_due_when_the_average_keeps_the_objective() -> None:
    tracked = TrackedRequest(CHAT, arrival_s=10.0, first_token_s=11.0)
    assert tracked.next_token_deadline_s(1, now_s=50.0) == pytest.approx(11.1)
    assert tracked.next_token_deadline_s(20, now_s=50.0) == pytest.approx(13.0)


def test_while_the_first_token_is_on_its_way_now_stands_for_it() -> None:
    tracked = TrackedRequest(CHAT, arrival_s=10.0)
    assert tracked.next_token_deadline_s(0, now_s=50.0) == pytest.approx(50.1)
    assert tracked.next_token_deadline_s(1, now_s=50.0) == pytest.approx(50.1)


def test_a_rank_goes_before_any_deadline() -> None:
    patient_first = TrackedRequest(SloClass(name="batch", ttft_s=3_600.0, tpot_s=1.0), arrival_s=90_000.0, rank=-1)
    urgent_later = TrackedRequest(CHAT, arrival_s=0.0)
    assert patient_first.ttft_deadline_s < urgent_later.ttft_deadline_s
    assert patient_first.rank_shift_s == -RANK_STEP_S
    tracked = TrackedRequest(CHAT, arrival_s=0.0, rank=5, first_token_s=1.0)
    assert tracked.next_token_deadline_s(1, now_s=2.0) == pytest.approx(1.1), "not shifted: it is compared with now"


# StepTimer --------------------------------------------------------------------------------------------------------

steps = st.lists(st.tuples(st.floats(1e-4, 1e3), st.integers(0, 8192)), min_size=1, max_size=40)


@given(steps)
def test_estimates_stay_among_what_was_observed_and_move_by_little(observed: list[tuple[float, int]]) -> None:
    timer = StepTimer(smoothing=0.15)
    decode_steps_s = [step_s for step_s, num_tokens in observed if num_tokens == 0]
    for step_s, num_tokens in observed:
        before = (timer.decode_step_s, timer.prefill_s_per_token)
        timer.observe(step_s, num_tokens)
        for old, new in zip(before, (timer.decode_step_s, timer.prefill_s_per_token), strict=True):
            assert math.isfinite(new)
            assert new >= 0.0
            if old > 0.0:
                assert old * (1 - 0.15 / 2) * 0.999 <= new <= old * 1.15 * 1.001
    if decode_steps_s:
        assert min(decode_steps_s) * 0.999 <= timer.decode_step_s <= max(decode_steps_s) * 1.001
    else:
        assert timer.decode_step_s == 0.0


def test_estimates_settle_on_steady_costs() -> None:
    timer = StepTimer()
    for _ in range(60):
        timer.observe(0.02, 0)
        timer.observe(0.02 + 500 * 1e-4, 500)
    assert timer.decode_step_s == pytest.approx(0.02)
    assert timer.prefill_s_per_token == pytest.approx(1e-4)


def test_one_stall_does_not_throw_the_estimates_off() -> None:
    timer = StepTimer()
    for _ in range(20):
        timer.observe(0.02, 0)
        timer.observe(0.07, 500)
    timer.observe(30.0, 0)
    timer.observe(30.0, 500)
    assert timer.decode_step_s < 0.02 * 1.2
    assert timer.prefill_s_per_token < 1e-4 * 1.2


def test_estimates_follow_a_lasting_change() -> None:
    timer = StepTimer()
    for _ in range(20):
        timer.observe(0.02, 0)
    for _ in range(60):
        timer.observe(0.2, 0)
    assert timer.decode_step_s == pytest.approx(0.2, rel=0.05)


def test_a_step_with_prompts_says_nothing_about_decode_and_a_quick_one_nothing_at_all() -> None:
    timer = StepTimer()
    timer.observe(0.05, 0)
    timer.observe(0.04, 100)
    assert timer.decode_step_s == 0.05
    assert timer.prefill_s_per_token == 0.0, "0.04 s is less than a decode step: no cost can be read from it"
