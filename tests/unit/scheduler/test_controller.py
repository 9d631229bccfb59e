"""The controller's books: what it remembers of requests, and that it forgets those who have left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from layerkv.config import SloClass
from layerkv.core.cost import StepWork
from layerkv.scheduler.controller import EXCHANGE_STEPS, Controller
from layerkv.scheduler.engine import EngineShape, EngineState, Running
from layerkv.scheduler.lengths import MIN_SAMPLES, UNKNOWN_TOKENS, MaxTokens, QuantileLengths
from layerkv.scheduler.reasons import End, Event, LogEntry, Reason
from layerkv.scheduler.snapshot import PrefixHit, WaitingRequest
from tests.fakes.tiny_scheduler import BLOCK_BYTES, BLOCK_TOKENS, policy, profile

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.05)
SHAPE = EngineShape("auto", BLOCK_TOKENS, BLOCK_BYTES, pool_blocks=100, zone_blocks=40, host_blocks=120)


def controller(*, is_measured: bool = True, keep_log: bool = False, **switches: Any) -> Controller:
    return Controller(policy(**switches), SHAPE, profile(), is_measured=is_measured, keep_log=keep_log)


def arrive(c: Controller, *names: str, num_tokens: int = 160, at_s: float = 10.0, slo: SloClass = CHAT) -> None:
    for name in names:
        c.arrive(name, slo, now_s=at_s, arrival_s=at_s, num_tokens=num_tokens, max_tokens=50)


def engine(*running: Running, step: int = 1, **changes: Any) -> EngineState:
    free = EngineState(step, running, (), 100, 0, 40, 120, 16, 2048)
    return free._replace(**changes)


def decoding(name: str, num_output: int = 5, num_tokens: int = 165, **changes: Any) -> Running:
    running = Running(name, num_tokens, num_tokens - 1, num_output, False, -(-num_tokens // BLOCK_TOKENS))
    return running._replace(**changes)


def names(entries: list[LogEntry]) -> list[tuple[str, Event, Reason | None]]:
    return [(entry.request_id, entry.event, entry.reason) for entry in entries]


# Lives ----------------------------------------------------------------------------------------------------------------


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
    c.stored_ahead("a", 10, 10.7)
    c.leave("a", num_output=50, end=End.FINISHED, now_s=11.0)
    assert not any((c.tracked, c.waiting.views, c.parked.views, c.overtaken, c.stored_blocks))
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
        c.stored_ahead("a", 4, 10.5)
    c.leave("a", num_output=0, end=End.LEFT, now_s=11.0)
    assert not any((c.tracked, c.waiting.views, c.parked.views, c.overtaken, c.stored_blocks))


def test_a_wait_is_counted_only_until_the_first_admission() -> None:
    c = controller()
    arrive(c, "a")
    assert c.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=12.0) == 2.0
    c.recomputes("a", 161, 1, Reason.PREEMPTED, 13.0)
    assert "a" in c.waiting
    assert c.admitted("a", layered=False, reason=Reason.FITS, step=2, now_s=14.0) is None


def test_a_prompt_is_due_by_its_class_and_after_its_first_token_by_its_slack() -> None:
    c = controller(length_prediction="none")
    arrive(c, "a")
    assert c.waiting.views[0].deadline_s == 11.0
    c.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
    c.first_token("a", 10.5)
    c.recomputes("a", 170, 10, Reason.PREEMPTED, 11.0)
    assert c.waiting.views[0].deadline_s == pytest.approx(10.5 + 50 * 0.05), "all 50 tokens, in steps of no time yet"
    assert c.waiting.views[0].tokens_left == UNKNOWN_TOKENS - 10, "nothing is known: memory for a while ahead"
    assert c.waiting.views[0].num_blocks == 11


def test_a_parked_request_has_to_go_on_earlier_by_the_time_its_fetch_takes() -> None:
    c = controller(length_prediction="none")
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


def observed_pace(c: Controller) -> float:
    """Nominal seconds of prefill per second, of what was observed alone."""
    return c.line._pace.per_second(0.0)


def begun(c: Controller, num_tokens: int = 100_000, *, computed: int = 1000, seconds: int = 10) -> float:
    """A long prompt is under way and gets on by so many tokens a second, while another waits."""
    arrive(c, "long", num_tokens=num_tokens)
    arrive(c, "next")
    c.admitted("long", layered=False, reason=Reason.FITS, step=0, now_s=10.0)
    for second in range(seconds + 1):
        done = computed * second
        c.decide(engine(Running("long", num_tokens, done, 0, True, 1), step=second, free_slots=0), 10.0 + second)
    return observed_pace(c)


@pytest.mark.parametrize("way", ["leaves", "refused", "recomputes"])
def test_what_a_prompt_had_still_to_compute_when_it_was_given_up_counts_as_no_work(way: str) -> None:
    """Regression: one client that hung up made the pace four times as fast, and the gate opened."""
    c = controller()
    before = begun(c)
    if way == "recomputes":
        c.recomputes("long", 100_000, 0, Reason.PREEMPTED, 20.5)
    else:
        c.leave("long", num_output=0, end=End.LEFT if way == "leaves" else End.REFUSED, now_s=20.5)
    c.decide(engine(step=11, free_slots=0), 20.6)
    assert observed_pace(c) <= before


def test_a_prompt_that_is_given_up_before_its_first_step_counts_as_no_work() -> None:
    c = controller()
    arrive(c, "long", num_tokens=100_000)
    arrive(c, "next")
    c.decide(engine(free_slots=0), 10.0)
    c.admitted("long", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
    c.recomputes("long", 100_000, 0, Reason.PREEMPTED, 10.1)
    c.decide(engine(step=2, free_slots=0), 11.0)
    assert observed_pace(c) == 0.0


@pytest.mark.parametrize("end", ["first token", "parked", "finished", "decodes"])
def test_a_prompt_that_was_computed_to_its_end_counts_as_work_whatever_becomes_of_it_then(end: str) -> None:
    c = controller()
    arrive(c, "a", num_tokens=1000)
    arrive(c, "next")
    c.decide(engine(free_slots=0), 10.0)
    c.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
    if end == "decodes":
        c.decide(engine(decoding("a", 1, 1001), step=2, free_slots=0), 10.5)
    if end == "first token":
        c.first_token("a", 10.5)
    if end == "parked":
        c.park("a", num_computed=1000, num_tokens=1001, num_output=1, reason=Reason.FIRST_TOKEN_DONE, now_s=10.5)
    c.leave("a", num_output=1, end=End.FINISHED if end == "finished" else End.LEFT, now_s=10.6)
    c.decide(engine(step=3, free_slots=0), 11.0)
    assert observed_pace(c) > 0.05


def test_a_first_token_is_noted_once_and_judged_by_its_class() -> None:
    c = controller()
    arrive(c, "a", "b")
    assert c.first_token("a", 11.0) == (CHAT, True)
    assert c.first_token("a", 12.0) is None
    assert c.first_token("b", 11.001) == (CHAT, False)
    assert c.first_token("nobody", 11.0) is None


# Log and counts -------------------------------------------------------------------------------------------------------


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


# Decisions ------------------------------------------------------------------------------------------------------------


def test_steps_without_prefill_are_counted_while_somebody_wants_some() -> None:
    c = controller()
    arrive(c, "a", "d")
    c.admitted("d", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
    c.first_token("d", 10.0)
    c.tracked["d"].low_tokens = 1
    busy = engine(decoding("d"))
    now_s = 10.0 + 5 * 0.05  # its next token is due now: no slack
    seen = []
    for step in range(10):
        snapshot, decision = c.decide(busy._replace(step=step), now_s)
        seen.append((snapshot.steps_without_prefill, decision.prefill_tokens))
    assert seen == [*((n, 0) for n in range(8)), (8, 256), (0, 0)]
    c.leave("a", num_output=0, end=End.LEFT, now_s=now_s)
    c.decide(busy, now_s)
    assert c.snapshot(busy, now_s).steps_without_prefill == 0, "nobody wants any"


def test_after_an_exchange_the_next_has_to_wait_until_its_blocks_are_free() -> None:
    c = controller(length_prediction="none")
    patient = SloClass(name="batch", ttft_s=10.0, tpot_s=1.0)
    arrive(c, "claim", "other")
    arrive(c, "patient", slo=patient)
    for name in ("claim", "patient", "other"):
        c.admitted(name, layered=False, reason=Reason.FITS, step=0, now_s=10.0)
        c.first_token(name, 10.0)
    c.park("claim", num_computed=160, num_tokens=161, num_output=49, reason=Reason.FIRST_TOKEN_DONE, now_s=10.0)
    full = engine(decoding("patient"), decoding("other"), free_blocks=4, step=100)
    now_s = c.parked.views[0].deadline_s - 0.01
    snapshot, decision = c.decide(full, now_s)
    assert snapshot.can_exchange
    assert (decision.park, decision.made_room) == (("patient",), True)
    can_exchange = [c.decide(full._replace(step=100 + n), now_s)[0].can_exchange for n in range(1, EXCHANGE_STEPS + 1)]
    assert can_exchange == [False] * (EXCHANGE_STEPS - 1) + [True]


def test_overtakes_are_remembered_until_it_is_ones_turn() -> None:
    c = controller()
    arrive(c, "late", at_s=5.0)
    arrive(c, "on time", at_s=10.0)
    small = engine(budget_tokens=160)
    c.decide(small, 10.0)
    assert c.snapshot(small, 10.0).lines.overtaken == {"late": 1}
    c.decide(small, 10.0)
    assert c.snapshot(small, 10.0).lines.overtaken == {"late": 2}
    c.admitted("late", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
    assert c.snapshot(small, 10.0).lines.overtaken == {}


def test_the_snapshot_has_the_running_as_they_are() -> None:
    c = controller(length_prediction="none")
    arrive(c, "d", "p", "z", "f")
    for name in ("d", "p", "z", "f"):
        c.admitted(name, layered=name == "z", reason=Reason.FITS, step=3, now_s=10.0)
    c.first_token("d", 10.2)
    c.stored_ahead("d", 7, 10.2)
    state = engine(
        decoding("d", num_output=16, num_tokens=177),
        Running("p", 160, 64, 0, True, 4),
        Running("z", 160, 80, 0, True, 5, num_zone_blocks=5, is_layered=True, num_host_blocks=10),
        step=13,
        arriving=[("f", 11, 1)],
        steps_ahead=1,
        resuming=2,
    )
    c.snapshot(state, 10.5)  # the slack is reckoned with the step time of the last one
    s = c.snapshot(state, 10.5)
    d, p, f = s.load.resident
    assert (d.request_id, d.num_blocks, d.steps_resident, d.num_stored, d.can_park) == ("d", 12, 10, 7, True)
    assert (d.num_tokens, d.tokens_left) == (176, UNKNOWN_TOKENS - 16)
    assert (p.request_id, p.num_blocks, p.can_park) == ("p", 10, False)
    assert (f.request_id, f.num_blocks, f.can_park) == ("f", 11, False)
    [z] = s.load.layered
    assert (z.request_id, z.prefill_done, z.num_blocks, z.num_zone_blocks) == ("z", False, 10, 5)
    assert (s.load.num_resident, s.load.growth_blocks, s.engine.frees_are_deferred) == (3, 6, True)
    assert (s.load.decode_tokens, s.load.decode_context, s.load.prefilling_tokens) == (3, 176, 96 + 80)
    step_s = 0.01 + 3 * 1e-4
    assert s.load.decode_slack_s == pytest.approx(10.2 + 16 * 0.05 + 34 * (0.05 - step_s) - 10.5)
    assert s.load.tightest_tpot_s == 0.05


@pytest.mark.parametrize(
    ("num_tokens", "in_one_step", "cannot"), [(129, True, True), (128, True, False), (305, False, False)]
)
def test_who_must_be_computed_in_one_step_and_has_outgrown_it_is_seen_as_not_to_be_computed_again(
    num_tokens: int, *, in_one_step: bool, cannot: bool
) -> None:
    c = controller()
    c.arrive("d", CHAT, now_s=10.0, arrival_s=10.0, num_tokens=120, max_tokens=500, in_one_step=in_one_step)
    c.admitted("d", layered=False, reason=Reason.FITS, step=0, now_s=10.0)
    c.first_token("d", 10.2)
    [d] = c.snapshot(engine(decoding("d", num_tokens - 120, num_tokens), budget_tokens=128), 10.5).load.resident
    assert d.cannot_recompute is cannot


def test_who_is_late_holds_prefill_back_no_more() -> None:
    c = controller(length_prediction="none")
    arrive(c, "d")
    c.admitted("d", layered=False, reason=Reason.FITS, step=0, now_s=10.0)
    c.first_token("d", 10.2)
    assert c.snapshot(engine(decoding("d")), 10.5).load.decode_slack_s < 10
    assert c.snapshot(engine(decoding("d")), 99.0).load.decode_slack_s == float("inf")


def test_the_longest_stall_of_a_class_bounds_how_long_prefill_may_hold_its_decodes_up() -> None:
    """By its mean time per token it could wait much longer."""
    c = controller(length_prediction="none")
    arrive(c, "d")
    arrive(c, "s", slo=SloClass(name="steady", ttft_s=1.0, tpot_s=0.05, max_stall_s=0.2))
    for name in ("d", "s"):
        c.admitted(name, layered=False, reason=Reason.FITS, step=0, now_s=10.0)
        c.first_token(name, 10.2)
    assert c.snapshot(engine(decoding("d")), 10.2).load.decode_slack_s > 1.0
    s = c.snapshot(engine(decoding("d"), decoding("s")), 10.2)
    assert s.load.decode_slack_s == pytest.approx(0.2)
    assert [r.deadline_s for r in s.load.resident][1] == pytest.approx(10.4)


def test_tokens_of_requests_that_the_engine_takes_up_by_itself_are_taken_from_the_step() -> None:
    c = controller()
    arrive(c, "a", "b")
    prefilling = Running("b", 160, 60, 0, True, 4)
    assert c.snapshot(engine(prefilling, held_tokens=500), 10.0).load.prefilling_tokens == 100 + 500
    assert c.decide(engine(held_tokens=2048), 10.0)[1].waits["a"] is Reason.NO_TOKENS_LEFT
    assert c.decide(engine(held_tokens=2000), 10.0)[1].admit


@pytest.mark.parametrize(("longest_tokens", "blocks"), [(1700, 107), (1601, 101), (1600, 0)])
def test_no_request_is_given_room_for_more_than_the_longest_there_can_be(longest_tokens: int, blocks: int) -> None:
    """1,590 tokens of a prompt and 1,000 more that it asks for; the pool holds 1,600."""
    shape = replace(SHAPE, long_contexts=True, longest_tokens=longest_tokens)
    c = Controller(policy(), shape, profile(), is_measured=True)
    c.arrive("long", CHAT, now_s=10.0, arrival_s=10.0, num_tokens=1590, max_tokens=1000)
    assert c.waiting.views[0].most_blocks == blocks


def test_a_paused_engine_starts_nobody() -> None:
    c = controller()
    arrive(c, "a")
    assert c.decide(engine(is_paused=True), 10.0)[1].admit == ()
    assert len(c.decide(engine(), 10.0)[1].admit) == 1


def test_prefix_hits_are_asked_for_only_while_somebody_could_start() -> None:
    """Regression: a look-up costs time for every block that it finds, and was made in every step."""
    c = controller()
    arrive(c, "a", "b", "z")
    c.admitted("z", layered=True, reason=Reason.POOL_CONTENDED, step=0, now_s=10.0)
    asked: list[list[str]] = []

    def hits(waiting: Sequence[WaitingRequest]) -> dict[str, PrefixHit]:
        asked.append([w.request_id for w in waiting])
        return {"a": PrefixHit(4)}

    leaving = Running("z", 161, 160, 1, False, 11, num_zone_blocks=11, is_layered=True, num_host_blocks=11)
    under_way = leaving._replace(num_tokens=160, num_computed=80, num_output=0, is_prefilling=True)
    for state, is_asked in (
        (engine(), True),
        (engine(free_slots=0), False),
        (engine(leaving, free_slots=0), True),
        (engine(under_way, free_slots=0), False),
        (engine(under_way, budget_tokens=81), True),
        (engine(under_way, budget_tokens=80), False),
        (engine(held_tokens=2048), False),
        (engine(is_paused=True), False),
        (engine(decoding("z", num_tokens=161, num_blocks=10), free_blocks=0, free_slots=0), True),
    ):
        asked.clear()
        snapshot, _ = c.decide(state, 10.0, hits=hits)
        assert asked == ([["a", "b"]] if is_asked else [])
        assert snapshot.lines.hits == ({"a": PrefixHit(4)} if is_asked else {})


def test_the_engine_may_say_who_cannot_start_or_be_fetched_now() -> None:
    c = controller()
    arrive(c, "a", "b", "p")
    c.admitted("p", layered=True, reason=Reason.FITS, step=0, now_s=10.0)
    c.park("p", num_computed=160, num_tokens=161, num_output=1, reason=Reason.FIRST_TOKEN_DONE, now_s=10.0)
    _, decision = c.decide(
        engine(), 10.0, is_startable=lambda w: w.request_id != "a", is_fetchable=lambda p: p.request_id != "p"
    )
    assert [a.request_id for a in decision.admit] == ["b"]
    assert decision.fetch == ()


# Costs, backlog, policies ---------------------------------------------------------------------------------------------


def test_before_anything_is_known_of_costs_the_front_ends_are_told_nothing() -> None:
    c = controller(is_measured=False)
    arrive(c, "a")
    assert c.word(10.0, 10.0) is None
    assert c.snapshot(engine(), 10.0).cost is None
    c.step_done(StepWork(prefill_tokens=100, num_prefills=1), 0.5)
    c.decide(engine(), 10.0)
    assert c.word(10.0, 10.0) is not None
    assert c.snapshot(engine(), 10.0).cost is not None


def test_a_word_says_how_old_its_view_of_the_requests_is() -> None:
    c = controller()
    assert c.word(10.0, 10.25) is None, "nothing was decided, so nothing waits"
    c.decide(engine(), 10.0)
    word = c.word(10.0, 10.25)
    assert word is not None
    assert word.age_s == pytest.approx(0.25)


def test_prompts_count_until_their_prefill_is_over() -> None:
    c = controller()
    assert not c.has_prompts()
    arrive(c, "a", num_tokens=1000)
    assert c.has_prompts()
    c.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
    c.decide(engine(Running("a", 1000, 400, 0, True, 63)), 10.1)
    assert c.has_prompts()
    c.decide(engine(Running("a", 1001, 1000, 1, False, 63)), 10.2)
    assert not c.has_prompts()


def test_a_new_policy_is_for_those_who_come_from_now_on() -> None:
    c = controller()
    arrive(c, "a")
    learned = c.lengths
    c.set_policy(policy(streamed_decode=True))
    assert c.lengths is learned, "what was learned is kept"
    assert c.snapshot(engine(), 10.0).streamed_decode
    assert c.tracked["a"].slo is CHAT
    c.set_policy(policy(length_prediction="none"))
    assert isinstance(c.lengths, MaxTokens)
    c.set_policy(policy())
    assert isinstance(c.lengths, QuantileLengths)


@pytest.mark.parametrize("end", [End.FINISHED, End.LEFT])
def test_lengths_are_learned_from_requests_that_ended_whoever_ended_them(end: End) -> None:
    c = controller()
    for i in range(2 * MIN_SAMPLES):
        arrive(c, f"r{i}")
        c.leave(f"r{i}", num_output=3, end=End.REFUSED, now_s=11.0)
        arrive(c, f"s{i}")
        c.admitted(f"s{i}", layered=False, reason=Reason.FITS, step=0, now_s=10.0)
        c.leave(f"s{i}", num_output=7, end=end, now_s=11.0)
    arrive(c, "new")
    assert c.tracked["new"].middle_tokens == 7


def test_a_request_that_left_before_it_made_a_token_says_nothing_of_lengths() -> None:
    c = controller()
    for i in range(2 * MIN_SAMPLES):
        arrive(c, f"r{i}")
        c.leave(f"r{i}", num_output=0, end=End.LEFT, now_s=11.0)
    arrive(c, "new")
    assert c.tracked["new"].middle_tokens == UNKNOWN_TOKENS


@pytest.mark.parametrize("how", ["parked", "with all others"])
def test_a_request_that_is_cut_off_would_have_become_longer(how: str) -> None:
    c = controller()
    for i in range(MIN_SAMPLES):
        arrive(c, f"long{i}")
        c.admitted(f"long{i}", layered=False, reason=Reason.FITS, step=0, now_s=10.0)
        c.leave(f"long{i}", num_output=40, end=End.FINISHED, now_s=11.0)
        arrive(c, f"cut{i}")
        c.admitted(f"cut{i}", layered=False, reason=Reason.FITS, step=0, now_s=10.0)
        if how == "parked":
            c.park(f"cut{i}", num_computed=160, num_tokens=161, num_output=1, reason=Reason.POOL_SHORT, now_s=10.5)
        c.leave(
            f"cut{i}",
            num_output=1,
            end=End.LEFT if how == "parked" else End.CUT_OFF,
            now_s=11.0,
            made_tokens=how != "parked",
        )
    arrive(c, "new")
    assert c.tracked["new"].middle_tokens == 40


def test_while_nothing_is_known_memory_is_planned_for_a_while_ahead_and_slack_for_all_it_may_make() -> None:
    """Else a client that allows 32,000 tokens would keep a pool empty."""
    c = controller()
    c.arrive("a", CHAT, now_s=10.0, arrival_s=10.0, num_tokens=160, max_tokens=32_000)
    assert (c.tracked["a"].low_tokens, c.tracked["a"].middle_tokens) == (32_000, UNKNOWN_TOKENS)
