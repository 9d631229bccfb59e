"""Sessions between two turns: whom their blocks keep out, and that their clients' own time is nobody's lag."""

from __future__ import annotations

import pytest

from layerkv.metrics import MetricSamples
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import End, Event, Reason
from layerkv.scheduler.sessions import turn_begins, turn_ended
from layerkv.scheduler.snapshot import Snapshot
from tests.fakes.snapshots import NOW_S, POOL, changed, cost, parked, prompt, resident, snapshot
from tests.fakes.tiny_controller import arrive, controller

NEED = 50


def beside_a_session(num_blocks: int) -> Snapshot:
    """A prompt whose turn by arrival has come, a stream that is due, and a session that waits for its client."""
    return snapshot(
        policy="fluid",
        cost=cost(),
        arriving=[("session", num_blocks, 5)],
        free_blocks=POOL - num_blocks - 10,
        resident=[resident("r", dry_s=NOW_S, tpot_s=1.0, tokens_left=500, resident_s=0.0)],
        num_resident=2,
        waiting=[prompt("long", NEED, NOW_S + 5.0, can_layer=False, ticket_blocks=POOL)],
        parked=[parked("due", dry_s=NOW_S)],
        can_store_ahead=False,
    )


@pytest.mark.parametrize("is_overdue", [False, True])
def test_nobody_stands_behind_a_prompt_that_waits_for_a_sessions_client(*, is_overdue: bool) -> None:
    overtaken = {"long": 64} if is_overdue else {}
    d = decide(changed(beside_a_session(POOL - NEED + 1), overtaken=overtaken))
    assert d.fetch == ("due",)
    assert d.waits["long"] is Reason.POOL_FULL
    assert "long" not in d.overtaken
    d = decide(changed(beside_a_session(POOL - NEED), overtaken=overtaken))
    assert (d.fetch, d.waits["due"]) == ((), Reason.BEHIND_OVERDUE)


def test_the_next_in_line_has_its_turn_in_the_place_of_one_that_waits_for_a_sessions_client() -> None:
    s = beside_a_session(POOL - NEED + 1)
    shorter = prompt("shorter", 45, NOW_S + 5.0, can_layer=False, ticket_blocks=POOL)
    d = decide(changed(s, waiting=[*s.lines.waiting, shorter]))
    assert (d.waits["shorter"], d.waits["due"]) == (Reason.POOL_FULL, Reason.BEHIND_OVERDUE)


def test_nor_do_worse_ranks() -> None:
    s = beside_a_session(POOL - NEED + 1)
    d = decide(changed(s, parked=[parked("due", dry_s=NOW_S, rank=1)]))
    assert d.fetch == ("due",)


def test_a_fetch_under_way_is_no_session() -> None:
    d = decide(changed(beside_a_session(POOL - NEED + 1), loading_blocks=POOL - NEED + 1))
    assert d.waits["due"] is Reason.BEHIND_OVERDUE


def test_each_turn_is_a_stream_of_its_own_and_its_clients_time_is_no_lag() -> None:
    c = controller(keep_log=True)
    arrive(c, "session")
    c.first_token("session", 10.5)
    c.made_tokens("session", 10.5, 3, 0.05)
    turn_ended(c, "session", 10.6)
    turn_begins(c, "session", arrival_s=60.0, now_s=60.0, num_tokens=20, max_tokens=9)
    tracked = c.tracked["session"]
    assert (tracked.ttft_deadline_s, tracked.max_tokens) == (61.0, 9)
    assert c.first_token("session", 60.5) == (tracked.slo, True)
    c.made_tokens("session", 60.5, 3, 0.05)
    assert tracked.reader.lag_s == 0.0
    assert tracked.flows_until_s(tracked.dry_s(3, 60.6, 0.01)) > 60.6
    turn_ended(c, "session", 60.6)
    c.leave("session", num_output=3, end=End.LEFT, now_s=500.0)
    samples = MetricSamples()
    c.streams.report(samples)
    counters = samples.take()["counters"]
    assert counters["layerkv_fluid_requests|chat"] == 2
    assert counters.get("layerkv_not_fluid_requests|chat", 0) == 0
    assert counters["layerkv_tokens_on_time|chat"] == 6
    log = c.take_log()
    assert [entry.facts["lag_s"] for entry in log if entry.event is Event.FINISHED] == [0.0, 0.0]
    assert not [entry for entry in log if entry.event is Event.READER_WAITED]


def test_a_turn_begins_once_and_only_after_the_last_one_has_ended() -> None:
    c = controller()
    arrive(c, "session")
    turn_begins(c, "session", arrival_s=20.0, now_s=20.0, num_tokens=20, max_tokens=9)
    assert c.tracked["session"].arrival_s == 10.0
    turn_begins(c, "gone", arrival_s=20.0, now_s=20.0, num_tokens=20, max_tokens=9)
    turn_ended(c, "gone", 20.0)
