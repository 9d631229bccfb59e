"""What an engine tells its front ends of the prefill that waits."""

from __future__ import annotations

import math

import pytest

from layerkv.config import SloClass, SloPolicy
from layerkv.scheduler.backlog import DEMAND_MEMORY_S, LATE_SHARE, ClassWait, Pace, PrefillLine, Word
from layerkv.scheduler.snapshot import WaitingRequest
from layerkv.scheduler.tracker import DeadlineQueue

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1, overload="reject")
BATCH = SloClass(name="batch", ttft_s=10.0, tpot_s=1.0, overload="reject")
PATIENT = SloClass(name="patient", ttft_s=10.0, tpot_s=1.0)
CLASSES = {slo.name: slo for slo in (CHAT, BATCH, PATIENT)}
NOW_S = 100.0


class Line:
    """A line of waiting prompts, and what is said of it at a pace of 1."""

    def __init__(self, **policy: bool) -> None:
        self.line = PrefillLine()
        self.waiting: DeadlineQueue[WaitingRequest] = DeadlineQueue()
        self.slo_of: dict[str, SloClass] = {}
        self.put_behind: set[str] = set()
        self.policy = SloPolicy(classes=CLASSES, default_class="chat", **policy)

    def add(self, slo: SloClass, cost_s: float, *, due_in_s: float, rank: int = 0) -> None:
        name = f"r{len(self.slo_of)}"
        self.slo_of[name] = slo
        self.waiting.add(WaitingRequest(name, NOW_S + due_in_s, 100, 7, prefill_cost_s=cost_s, rank=rank))

    def word(self, pace: float = 1.0) -> Word:
        return self.line.word(
            self.policy,
            self.waiting,
            self.slo_of.__getitem__,
            self.put_behind,
            now_s=NOW_S,
            age_s=0.0,
            expected_pace=pace,
        )

    def wait_s(self, slo: SloClass, pace: float = 1.0) -> float:
        return self.word(pace).classes[slo.name].wait_s


# Who goes first -------------------------------------------------------------------------------------------------------


def test_those_due_before_a_newcomer_go_first() -> None:
    line = Line()
    line.add(CHAT, 0.3, due_in_s=0.5)
    line.add(BATCH, 2.0, due_in_s=5.0)
    line.add(BATCH, 4.0, due_in_s=11.0)
    assert line.wait_s(CHAT) == pytest.approx(0.3)
    assert line.wait_s(BATCH) == pytest.approx(2.3)


def test_prompts_under_way_end_first() -> None:
    line = Line()
    line.line.look(NOW_S, 0.7)
    assert line.wait_s(CHAT) == pytest.approx(0.7)
    line.line.rest()
    assert line.wait_s(CHAT) == 0.0


def test_late_prompts_hold_up_those_whose_turn_is_no_sooner_and_others_a_little() -> None:
    line = Line()
    line.add(BATCH, 2.0, due_in_s=-1.0)
    assert line.wait_s(BATCH) == pytest.approx(2.0)
    assert line.wait_s(CHAT) == pytest.approx(2.0 * LATE_SHARE)
    line.add(CHAT, 0.5, due_in_s=-1.0)
    assert line.wait_s(BATCH) == pytest.approx(2.5)
    assert line.wait_s(CHAT) == pytest.approx(2.0 * LATE_SHARE + 0.5)


def test_late_prompts_that_nobody_was_promised_hold_up_nobody() -> None:
    line = Line()
    line.add(PATIENT, 5.0, due_in_s=-1.0)
    assert line.wait_s(CHAT) == line.wait_s(BATCH) == 0.0


def test_those_put_behind_because_they_cannot_be_on_time_count_as_late() -> None:
    line = Line()
    line.add(PATIENT, 5.0, due_in_s=0.5)
    line.add(CHAT, 0.4, due_in_s=0.5)
    line.add(CHAT, 0.2, due_in_s=-0.5)
    assert line.wait_s(CHAT) == pytest.approx(5.6)
    line.put_behind = {"r0", "r1", "r2", "one that has begun since"}
    assert line.wait_s(CHAT) == pytest.approx(0.6)


def test_better_ranks_go_first_whenever_they_are_due_and_worse_ones_never() -> None:
    line = Line()
    line.add(PATIENT, 0.2, due_in_s=99.0, rank=-1)
    line.add(PATIENT, 0.4, due_in_s=-99.0, rank=-2)
    line.add(CHAT, 7.0, due_in_s=0.5, rank=1)
    assert line.wait_s(CHAT) == pytest.approx(0.6)


def test_in_order_of_arrival_all_go_first() -> None:
    line = Line(policy="arrival")
    line.add(BATCH, 2.0, due_in_s=-8.0)
    line.add(CHAT, 1.0, due_in_s=-1.0)
    assert line.wait_s(CHAT) == line.wait_s(BATCH) == pytest.approx(3.0)


def test_a_class_that_is_not_refused_is_not_reckoned_for() -> None:
    line = Line()
    line.line.look(NOW_S, 0.7)
    assert line.wait_s(PATIENT) == 0.0


def test_what_those_due_sooner_ask_for_is_not_for_the_others() -> None:
    line = Line()
    line.add(BATCH, 2.0, due_in_s=5.0)
    for _ in range(10):
        line.line.came(CHAT, DEMAND_MEMORY_S / 20, NOW_S)
    assert line.wait_s(BATCH) == pytest.approx(4.0), "chats take half of the pace while it waits"
    line.add(CHAT, 0.3, due_in_s=0.5)
    assert line.wait_s(CHAT) == pytest.approx(0.3)


def test_however_much_those_ask_for_the_others_are_said_some_finite_time() -> None:
    line = Line()
    line.add(BATCH, 2.0, due_in_s=5.0)
    line.line.came(CHAT, 1e6, NOW_S)
    assert 2.0 < line.wait_s(BATCH) < math.inf


def test_a_request_of_a_class_costs_what_its_like_did_lately() -> None:
    line = Line()
    for cost_s in (0.1, 0.3):
        line.line.came(CHAT, cost_s, NOW_S)
    said = line.word(pace=0.5).classes
    assert said["chat"] == ClassWait(0.0, pytest.approx(0.4))
    assert said["batch"].request_s == 0.0
    line.line.came(CHAT, 0.5, NOW_S + 20 * DEMAND_MEMORY_S)
    assert line.word().classes["chat"].request_s == pytest.approx(0.5)


# The pace -------------------------------------------------------------------------------------------------------------


def busy(pace: Pace, rate: float, *, begin_s: float = 0.0, seconds: float = 30.0, step_s: float = 0.1) -> None:
    """So many nominal seconds of a long prompt per second."""
    pace.look(begin_s, 0.0)
    pace.started(rate * seconds + 1, was_last=True)
    for step in range(1, round(seconds / step_s) + 1):
        pace.look(begin_s + step * step_s, rate * seconds + 1 - rate * step * step_s)


def test_before_anything_is_seen_the_pace_is_the_expected_one() -> None:
    assert Pace().per_second(0.8) == 0.8


def test_the_pace_is_what_is_done_while_there_is_more_to_do() -> None:
    pace = Pace()
    busy(pace, 0.25)
    assert pace.per_second(1.0) == pytest.approx(0.25, rel=0.5)
    assert pace.per_second(0.25) == pytest.approx(0.25)


def test_a_line_that_does_not_move_slows_the_pace() -> None:
    pace = Pace()
    busy(pace, 1.0)
    before = pace.per_second(1.0)
    pace.started(0.1, was_last=False)
    for step in range(30):  # somebody waits, for blocks say, and nothing is computed
        pace.look(30.0 + 0.1 * step, 0.0)
    assert pace.per_second(1.0) < before / 2


def test_while_nobody_waits_nothing_is_learned_and_what_was_learned_fades() -> None:
    pace = Pace()
    busy(pace, 0.25, seconds=10.0)
    slow = pace.per_second(1.0)
    for step in range(200):
        pace.started(0.001, was_last=True)
        pace.look(10.0 + 0.1 * step, 0.0)
    assert slow < 0.5 < 0.9 < pace.per_second(1.0) <= 1.0


def test_a_rest_teaches_nothing() -> None:
    pace = Pace()
    pace.look(0.0, 0.0)
    pace.rest()
    pace.look(50.0, 0.0)
    assert pace.per_second(0.8) == pytest.approx(0.8)


def test_clocks_that_stand_still_or_go_back_are_survived() -> None:
    pace = Pace()
    for now_s in (5.0, 5.0, 4.0, 6.0):
        pace.started(1.0, was_last=False)
        pace.look(now_s, 0.0)
    assert 0.0 < pace.per_second(1.0) < math.inf
