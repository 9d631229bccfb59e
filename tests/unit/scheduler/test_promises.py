"""Rotation over several steps: whose room is on its way, and prompts that can wait while not all streams can flow."""

from __future__ import annotations

from typing import Any

import pytest

from layerkv.scheduler.controller import EXCHANGE_STEPS
from layerkv.scheduler.fluid import SPARE_FOR_LOST_S, START_BY_S
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason
from tests.fakes.snapshots import NOW_S, changed, prompt
from tests.fakes.tiny_controller import arrive, controller, engine
from tests.unit.scheduler.test_fluid import LOST, claims, fluid, outlook, victims
from tests.unit.scheduler.test_fluid import flowing as resident_stream
from tests.unit.scheduler.test_fluid import stream as parked_stream
from tests.unit.scheduler.test_rotate import flowing, full, stream

MOST = PolicyLimits().max_overtakes


def test_whom_room_was_made_for_goes_before_all_but_who_was_overtaken_too_often() -> None:
    line = [
        parked_stream("due", 0.0),
        parked_stream("promised", 3.0),
        parked_stream("lost, promised", 0.0, **LOST),
        parked_stream("overdue", 3.0),
    ]
    s = fluid(parked=line, promised={"promised", "lost, promised"}, overtaken={"overdue": MOST})
    assert claims(s) == ["overdue", "lost, promised", "promised", "due"]


def test_a_stream_with_so_much_to_read_that_lost_ones_take_its_place_goes_behind_them() -> None:
    line = [
        parked_stream("plenty", SPARE_FOR_LOST_S + 0.1, tokens_left=1),
        parked_stream("lost", 0.0, **LOST),
        parked_stream("later", SPARE_FOR_LOST_S - 0.1),
    ]
    assert claims(fluid(parked=line)) == ["later", "lost", "plenty"]


def test_where_frees_are_deferred_it_is_said_for_whom_room_is_made() -> None:
    swap = full(flowing("r"), stream("claim"))
    assert decide(swap).room_for == (), "it is granted at once"
    d = decide(changed(swap, frees_are_deferred=True))
    assert (d.park, d.fetch, d.room_for) == (("r",), (), ("claim",))


def test_blocks_that_are_on_their_way_are_not_taken_from_anybody_else() -> None:
    s = full(flowing("r"), stream("claim"), frees_are_deferred=True, promised={"claim"})
    assert decide(s).park == ("r",)
    assert decide(changed(s, freeing_blocks=14)).park == ()
    assert decide(changed(s, freeing_blocks=12)).park == ("r",), "one is missing of what it needs with its neighbours"
    two = changed(s, parked=[stream("claim"), stream("other")], freeing_blocks=14)
    assert decide(two).park == ("r",), "they are for the first"


def test_a_turn_whose_blocks_lie_idle_for_a_step_is_longer() -> None:
    """A step of 10 ms at least: a twentieth of 0.5 s, with the 5 ms of its load 0.3 s more."""
    others = [resident_stream(name, 50.0, resident_s=0.0, tokens_left=500) for name in ("a", "b")]
    it = resident_stream("it", 50.0, tokens_left=1, num_stored=10, resident_s=0.28)
    assert victims(*others, it)[0] == "it"
    assert victims(*others, it, frees_are_deferred=True)[0] != "it"
    assert victims(*others, it._replace(resident_s=0.4), frees_are_deferred=True)[0] == "it"


@pytest.mark.parametrize("is_held", [False, True])
def test_while_streams_are_held_a_prompt_starts_no_sooner_than_it_must(is_held: bool) -> None:
    """Its prefill takes 16 ms."""
    heavy: dict[str, Any] = {"num_blocks": 60, "tpot_s": 0.01}
    streams = [parked_stream("p", 0.0, **heavy), resident_stream("r", 0.0, **heavy, can_park=False)]
    s = fluid(parked=streams[: 1 + is_held], free_blocks=50)
    s = changed(s, parked=streams[:1], resident=streams[1:] if is_held else [], num_resident=int(is_held))
    assert bool(outlook(s).held) is is_held
    for due_s, starts in ((START_BY_S + 0.015, True), (START_BY_S + 0.02, not is_held)):
        d = decide(changed(s, waiting=[prompt("w", 10, NOW_S + due_s)]))
        assert bool(d.admit) is starts
        assert starts or d.waits["w"] is Reason.HELD


def test_a_promise_is_kept_for_a_few_steps() -> None:
    c = controller()
    arrive(c, "a")
    c._promised["a"] = 100
    kept = [bool(c.snapshot(engine(step=100 + n), 10.0).lines.promised) for n in range(EXCHANGE_STEPS + 2)]
    assert kept == [True] * (EXCHANGE_STEPS + 1) + [False]
