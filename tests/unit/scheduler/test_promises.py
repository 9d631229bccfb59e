"""Rotation over several steps: whose room is on its way, and for how long that is remembered."""

from __future__ import annotations

from layerkv.scheduler.controller import EXCHANGE_STEPS
from layerkv.scheduler.policy import decide
from tests.fakes.snapshots import changed
from tests.fakes.tiny_controller import arrive, controller, engine
from tests.unit.scheduler.test_fluid import flowing as resident_stream
from tests.unit.scheduler.test_fluid import victims
from tests.unit.scheduler.test_rotate import flowing, full, stream


def test_where_frees_are_deferred_it_is_said_for_whom_room_is_made() -> None:
    swap = full(flowing("r"), stream("claim"))
    assert decide(swap).room_for == (), "it is granted at once"
    d = decide(changed(swap, frees_are_deferred=True))
    assert (d.park, d.fetch, d.room_for) == (("r",), (), ("claim",))


def test_blocks_that_are_on_their_way_are_not_taken_from_anybody_else() -> None:
    s = full(flowing("r"), stream("claim"), frees_are_deferred=True, promised={"claim"})
    assert decide(s).park == ("r",)
    assert decide(changed(s, freeing_blocks=11)).park == ()
    assert decide(changed(s, freeing_blocks=10)).park == ("r",), "one is missing of what it needs with its neighbours"
    two = changed(s, parked=[stream("claim"), stream("other")], freeing_blocks=11)
    assert decide(two).park == ("r",), "they are for the first"


def test_a_turn_whose_blocks_lie_idle_for_a_step_is_longer() -> None:
    """A step of 10 ms at least: a twentieth of 0.5 s, with the 5 ms of its load 0.3 s more."""
    others = [resident_stream(name, 50.0, resident_s=0.0, tokens_left=500) for name in ("a", "b")]
    it = resident_stream("it", 50.0, tokens_left=1, num_stored=10, resident_s=0.28)
    assert victims(*others, it)[0] == "it"
    assert victims(*others, it, frees_are_deferred=True)[0] != "it"
    assert victims(*others, it._replace(resident_s=0.4), frees_are_deferred=True)[0] == "it"


def test_a_promise_is_kept_for_a_few_steps() -> None:
    c = controller()
    arrive(c, "a")
    c._promised["a"] = 100
    kept = [bool(c.snapshot(engine(step=100 + n), 10.0).lines.promised) for n in range(EXCHANGE_STEPS + 2)]
    assert kept == [True] * (EXCHANGE_STEPS + 1) + [False]
