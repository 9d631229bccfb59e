"""How long a decision stands, and what ends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from layerkv.core.groups import Group, growth_tokens
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import Admission, Decision, LayeredRequest, Refusal, StoreAhead
from layerkv.scheduler.standing import LOOK_S, Standing, standing
from tests.fakes.snapshots import snapshot
from tests.fakes.tiny_controller import arrive, controller, engine

EVERY = PolicyLimits().look_steps
FULL: dict[str, Any] = {"free_blocks": 3, "growth_blocks": 1, "soon_blocks": 2, "num_resident": 5, "moves": 7}
WAITS = Decision(waits={"a": Reason.POOL_FULL}, prefill_tokens=64)


def test_it_stands_until_the_next_look() -> None:
    for step in range(EVERY):
        found = standing(snapshot(step=step, **FULL), WAITS, EVERY)
        assert found == Standing(until_step=EVERY, moves=7, num_running=5, free_blocks=3)
        assert [s for s in range(step + 1, 3 * EVERY) if found.holds(s, 7, 5, 3)] == [*range(step + 1, EVERY)]


def test_requests_on_their_way_are_not_running() -> None:
    found = standing(snapshot(**FULL, arriving=[("a", 2, 5)]), WAITS, EVERY)
    assert found is not None
    assert found.num_running == 4


@pytest.mark.parametrize(
    ("what", "moves", "num_running", "free_blocks"),
    [("somebody moved", 8, 5, 3), ("one is running again", 7, 6, 3), ("blocks came free", 7, 5, 4)],
)
def test_whatever_happens_ends_it(what: str, moves: int, num_running: int, free_blocks: int) -> None:
    found = standing(snapshot(**FULL), WAITS, EVERY)
    assert found is not None
    assert found.holds(1, 7, 5, 3)
    assert found.holds(1, 7, 5, 2), "they grow"
    assert not found.holds(1, moves, num_running, free_blocks), what


@pytest.mark.parametrize(
    "does",
    [
        {"pause": ("a",)},
        {"resume": ("a",)},
        {"park": ("a",)},
        {"recompute": ("a",)},
        {"drop_copy": ("a",)},
        {"fetch": ("a",)},
        {"back_to_zone": (Admission("a", layered=True),)},
        {"admit": (Admission("a", layered=False),)},
        {"refuse": (Refusal("a", Reason.OVERLOAD),)},
        {"room_for": ("a",)},
    ],
)
def test_one_that_moves_somebody_does_not_stand(does: dict[str, Any]) -> None:
    assert standing(snapshot(**FULL), Decision(**does), EVERY) is None


def test_copies_in_the_background_are_no_move() -> None:
    assert standing(snapshot(**FULL), Decision(store_ahead=(StoreAhead("a", 1),)), EVERY) is not None


@pytest.mark.parametrize("reason", [Reason.NO_TOKENS_LEFT, Reason.LATE, Reason.SMALL_REST])
def test_a_prompt_that_waits_for_tokens_is_looked_at_in_every_step(reason: Reason) -> None:
    assert standing(snapshot(**FULL), Decision(waits={"a": Reason.POOL_FULL, "b": reason}), EVERY) is None


@pytest.mark.parametrize(
    "engine",
    [
        {"prefilling_tokens": 10},
        {"layered": [LayeredRequest("a", prefill_done=False, num_blocks=3)]},
        {"resuming": 1},  # which may need a block too
        {"is_paused": True},
        {"freeing_blocks": 2},
        {"freeing_zone_blocks": 2},
        {"free_blocks": 2},
        {"reserved_blocks": 1},
    ],
)
def test_what_is_under_way_is_looked_at_in_every_step(engine: dict[str, Any]) -> None:
    assert standing(snapshot(**{**FULL, **engine}), WAITS, EVERY) is None


def test_one_that_resumes_runs_by_the_next_step() -> None:
    resuming = {**FULL, "free_blocks": 4, "arriving": [("a", 2, 5)], "resuming": 1}
    found = standing(snapshot(**resuming), WAITS, EVERY)
    assert found is not None
    assert found.num_running == 5
    assert standing(snapshot(**resuming), Decision(waits={"a": Reason.LINK_BUSY}), EVERY) is None, "its load is over"


@pytest.mark.parametrize(
    ("token_s", "changes", "does", "num_steps"),
    [
        (LOOK_S / 11, {}, {}, 2 * EVERY),
        (LOOK_S / 1000, {}, {}, 16),
        (LOOK_S / 2, {}, {}, EVERY),
        (0.0, {}, {}, EVERY),
        (LOOK_S / 11, {"step": 1}, {}, EVERY - 1),
        (LOOK_S / 11, {"free_blocks": 5}, {}, EVERY),
        (LOOK_S / 11, {}, {"store_ahead": (StoreAhead("a", 1),)}, EVERY),
    ],
)
def test_short_steps_are_looked_at_by_time(
    token_s: float, changes: dict[str, Any], does: dict[str, Any], num_steps: int
) -> None:
    s = replace(snapshot(**{**FULL, "free_blocks": 6, **changes}, token_s=token_s), policy="fluid")
    assert s.shape.block_tokens == 16
    found = standing(s, Decision(**does), EVERY)
    assert found is not None
    assert found.until_step - s.engine.step == num_steps
    by_mean = standing(replace(s, policy="slo"), Decision(**does), EVERY)
    assert by_mean is not None
    assert by_mean.until_step <= s.engine.step + EVERY, "its rules act on what is due before"


@pytest.mark.parametrize(("free_blocks", "num_steps"), [(10, EVERY), (11, 2 * EVERY)])
def test_of_several_groups_everybody_may_need_a_block_of_each(free_blocks: int, num_steps: int) -> None:
    groups = (Group(16, 3), Group(16, 3, window=64))
    shape: dict[str, Any] = {"groups": groups, "block_tokens": growth_tokens(groups)}
    s = snapshot(**{**FULL, "free_blocks": free_blocks}, **shape, token_s=LOOK_S / 11)
    found = standing(replace(s, policy="fluid"), Decision(), EVERY)
    assert found is not None
    assert found.until_step - s.engine.step == num_steps


def test_an_idle_engine_stands() -> None:
    s = snapshot(step=1)
    assert standing(s, decide(s), EVERY) is not None


def test_whoever_may_become_ready_unseen_is_asked_in_every_step() -> None:
    c = controller()
    arrive(c, "a")
    c.decide(engine(step=0, free_slots=0), 10.0)
    assert c.stands(1, 0, 0, 100)
    c.decide(engine(step=0, free_slots=0), 10.0, is_startable=lambda _: False)
    assert not c.stands(1, 0, 0, 100)


def test_a_new_policy_decides_at_once() -> None:
    c = controller()
    arrive(c, "a")
    c.decide(engine(step=0, free_slots=0), 10.0)
    c.set_policy(c.policy)
    assert not c.stands(1, 0, 0, 100)
