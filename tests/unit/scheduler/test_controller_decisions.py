"""The controller: what it remembers from one decision for the next, and what the engine says that bounds them."""

from __future__ import annotations

from collections.abc import Sequence

from layerkv.config import SloClass
from layerkv.scheduler.controller import EXCHANGE_STEPS
from layerkv.scheduler.engine import Running
from layerkv.scheduler.reasons import End, Event, Reason
from layerkv.scheduler.snapshot import PrefixHit, WaitingRequest
from tests.fakes.tiny_controller import arrive, controller, decoding, engine


def test_steps_without_prefill_are_counted_while_somebody_wants_some() -> None:
    c = controller(policy="slo")
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
    c = controller(policy="slo", length_prediction="none")
    patient = SloClass(name="batch", ttft_s=10.0, tpot_s=1.0)
    arrive(c, "claim", "other")
    arrive(c, "patient", slo=patient)
    for name in ("claim", "patient", "other"):
        c.admitted(name, layered=False, reason=Reason.FITS, step=0, now_s=10.0)
        c.first_token(name, 10.0)
    c.park("claim", num_computed=160, num_tokens=161, num_output=49, reason=Reason.FIRST_TOKEN_DONE, now_s=10.0)
    full = engine(decoding("patient"), decoding("other"), free_blocks=4, step=100, steps_ahead=1)
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


def test_tokens_of_requests_that_the_engine_takes_up_by_itself_are_taken_from_the_step() -> None:
    c = controller()
    arrive(c, "a", "b")
    prefilling = Running("b", 160, 60, 0, True, 4)
    assert c.snapshot(engine(prefilling, held_tokens=500), 10.0).load.prefilling_tokens == 100 + 500
    assert c.decide(engine(held_tokens=2048), 10.0)[1].waits["a"] is Reason.NO_TOKENS_LEFT
    assert c.decide(engine(held_tokens=2000), 10.0)[1].admit


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


def test_a_wait_is_said_again_after_whatever_has_happened_to_the_request() -> None:
    c = controller(keep_log=True)

    def waits_said() -> list[str]:
        c.decide(engine(free_slots=0), 10.0)
        return [entry.request_id for entry in c.take_log() if entry.event is Event.WAITS]

    arrive(c, "a")
    arrive(c, "b")
    assert waits_said() == ["a", "b"]
    assert waits_said() == []
    c.leave("a", num_output=0, end=End.LEFT, now_s=10.0)
    arrive(c, "a")
    assert waits_said() == ["a"], "another request of that name"
    c.recomputes("b", 10, 0, Reason.PREEMPTED, 10.0)
    assert waits_said() == ["b"]
