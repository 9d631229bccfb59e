"""The controller's books: what it remembers of requests, that it forgets those who have left, and what it logs."""

from __future__ import annotations

import pytest

from layerkv.scheduler.lengths import UNKNOWN_TOKENS
from layerkv.scheduler.reasons import End, Event, LogEntry, Reason
from tests.fakes.tiny_controller import CHAT, arrive, controller, engine


def names(entries: list[LogEntry]) -> list[tuple[str, Event, Reason | None]]:
    return [(entry.request_id, entry.event, entry.reason) for entry in entries]


def test_a_whole_life_leaves_nothing_behind() -> None:
    c = controller(keep_log=True)
    arrive(c, "a")
    assert "a" in c.waiting
    c.decide(engine(), 10.0)
    assert c.admitted("a", layered=True, reason=Reason.FITS, step=1, now_s=10.25) == pytest.approx(0.25)
    assert "a" not in c.waiting
    assert c.first_token("a", 10.5) == (CHAT, True)
    c.park("a", num_computed=160, num_tokens=161, num_output=1, reason=Reason.FIRST_TOKEN_DONE, now_s=10.5)
    assert [(p.request_id, p.num_blocks) for p in c.parked.views] == [("a", 11)]
    c.decide(engine(step=2), 10.5)
    c.fetched("a", step=2, now_s=10.6)
    assert "a" not in c.parked
    c.stored_ahead("a", 10.7)
    c.leave("a", num_output=50, end=End.FINISHED, now_s=11.0)
    assert not any((c.tracked, c.waiting.views, c.parked.views, c.overtaken, c.flows.blocks(0.0)))
    assert names(c.take_log()) == [
        ("a", Event.ARRIVED, None),
        ("a", Event.ADMITTED_LAYERED, Reason.FITS),
        ("a", Event.FIRST_TOKEN, None),
        ("a", Event.PARKED, Reason.FIRST_TOKEN_DONE),
        ("a", Event.FETCHED, Reason.ITS_TURN),
        ("a", Event.STORED_AHEAD, None),
        ("a", Event.FINISHED, None),
    ]
    assert c.take_log() == []


@pytest.mark.parametrize("state", ["waiting", "running", "parked", "fetching", "stored ahead", "unknown"])
def test_a_request_may_leave_from_anywhere(state: str) -> None:
    c = controller()
    if state != "unknown":
        arrive(c, "a")
    if state in ("running", "parked", "fetching", "stored ahead"):
        c.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
    if state in ("parked", "fetching"):
        c.park("a", num_computed=160, num_tokens=161, num_output=1, reason=Reason.FIRST_TOKEN_DONE, now_s=10.5)
    if state == "fetching":
        c.fetched("a", step=2, now_s=10.6)
    if state == "stored ahead":
        c.stored_ahead("a", 10.5)
    c.leave("a", num_output=0, end=End.LEFT, now_s=11.0)
    assert not any((c.tracked, c.waiting.views, c.parked.views, c.overtaken, c.flows.blocks(0.0)))


def test_a_wait_is_counted_only_until_the_first_admission() -> None:
    c = controller()
    arrive(c, "a")
    assert c.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=12.0) == 2.0
    c.recomputes("a", 161, 1, Reason.PREEMPTED, 13.0)
    assert "a" in c.waiting
    assert c.admitted("a", layered=False, reason=Reason.FITS, step=2, now_s=14.0) is None


def test_a_prompt_is_due_by_its_class_and_after_its_first_token_by_its_slack() -> None:
    c = controller(policy="slo", length_prediction="none")
    arrive(c, "a")
    assert c.waiting.views[0].deadline_s == 11.0
    c.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
    c.first_token("a", 10.5)
    c.recomputes("a", 170, 10, Reason.PREEMPTED, 11.0)
    assert c.waiting.views[0].deadline_s == pytest.approx(10.5 + 50 * 0.05), "all 50 tokens, in steps of no time yet"
    assert c.waiting.views[0].tokens_left == UNKNOWN_TOKENS - 10, "nothing is known: memory for a while ahead"
    assert c.waiting.views[0].num_blocks == 11


def test_a_parked_request_has_to_go_on_earlier_by_the_time_its_fetch_takes() -> None:
    c = controller(policy="slo", length_prediction="none")
    arrive(c, "a")
    c.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
    c.first_token("a", 10.5)
    c.park("a", num_computed=169, num_tokens=170, num_output=10, reason=Reason.FIRST_TOKEN_DONE, now_s=11.0)
    assert c.parked.views[0].deadline_s == pytest.approx(10.5 + 50 * 0.05 - 11 * 5e-4)


def test_without_objectives_everybody_stands_in_line_by_arrival() -> None:
    c = controller(policy="arrival")
    arrive(c, "a", at_s=10.0)
    arrive(c, "b", at_s=9.0)
    assert [w.request_id for w in c.waiting.views] == ["b", "a"]
    c.admitted("b", layered=False, reason=Reason.FITS, step=1, now_s=12.0)
    c.park("b", num_computed=160, num_tokens=161, num_output=1, reason=Reason.FIRST_TOKEN_DONE, now_s=13.0)
    assert c.parked.views[0].deadline_s == 9.0
    assert c.snapshot(engine(), 13.0).cost is None


def test_a_refused_request_waits_no_more_and_is_counted() -> None:
    c = controller(keep_log=True)
    arrive(c, "a")
    c.refused("a", Reason.NEVER_FITS, "too long", 10.0)
    assert not c.waiting.views
    assert c.reasons[Reason.NEVER_FITS] == 1
    assert c.take_log()[-1] == LogEntry(10.0, "a", Event.REFUSED, Reason.NEVER_FITS, {"text": "too long"})


def test_a_first_token_is_noted_once_and_judged_by_its_class() -> None:
    c = controller()
    arrive(c, "a", "b")
    assert c.first_token("a", 11.0) == (CHAT, True)
    assert c.first_token("a", 12.0) is None
    assert c.first_token("b", 11.001) == (CHAT, False)
    assert c.first_token("nobody", 11.0) is None


# Log and counts ---------------------------------------------------------------------------------------------------


def test_the_log_says_a_wait_once_until_its_reason_changes() -> None:
    c = controller(keep_log=True)
    arrive(c, "a")
    no_slot, no_tokens = engine(free_slots=0), engine(budget_tokens=0)
    for state in (no_slot, no_slot, no_tokens, no_tokens, no_slot):
        c.decide(state, 10.0)
    waits = [entry for entry in c.take_log() if entry.event is Event.WAITS]
    assert [entry.reason for entry in waits] == [Reason.NO_SLOT, Reason.NO_TOKENS_LEFT, Reason.NO_SLOT]
    assert waits[0].facts["free_blocks"] == 100
    assert c.reasons == {Reason.NO_SLOT: 2, Reason.NO_TOKENS_LEFT: 1}


@pytest.mark.parametrize("reason", [Reason.PREEMPTED, Reason.CACHE_RESET, Reason.LOAD_FAILED])
def test_kv_that_is_given_up_without_a_decision_is_not_told_with_the_reason_of_an_earlier_one(reason: Reason) -> None:
    """Regression: a request that vLLM preempted was told that the pool had room for all of it."""
    c = controller(keep_log=True)
    arrive(c, "a")
    _, decision = c.decide(engine(), 10.0)
    c.admitted("a", layered=False, reason=decision.reasons["a"], step=1, now_s=10.0)
    c.recomputes("a", 161, 1, reason, 11.0)
    assert names(c.take_log())[1:] == [("a", Event.ADMITTED_RESIDENT, Reason.FITS), ("a", Event.RECOMPUTES, reason)]


def test_without_a_log_nothing_is_kept_of_it_but_reasons_are_counted() -> None:
    c = controller()
    arrive(c, "a")
    c.decide(engine(), 10.0)
    assert c.take_log() == []
    assert c.reasons == {Reason.FITS: 1}
