"""Prompts that cannot be computed in chunks start in a step that has tokens for all of them, and before all others."""

from __future__ import annotations

from typing import Any

import pytest

from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason, Resource
from layerkv.scheduler.refusals import refusal_text
from layerkv.scheduler.snapshot import Decision, PrefixHit
from tests.fakes.snapshots import BLOCK, cost, parked, prompt, resident, snapshot


def whole(name: str, blocks: int = 30, **changes: Any) -> Any:
    return prompt(name, blocks, in_one_step=True, **changes)


def admitted(decision: Decision) -> list[str]:
    return [admission.request_id for admission in decision.admit]


def test_it_starts_with_all_its_tokens_although_the_slack_allows_fewer() -> None:
    tight = {"cost": cost(), "decode_slack_s": 0.0, "decode_tokens": 1, "steps_without_prefill": 100}
    decision = decide(snapshot(waiting=(whole("a"),), **tight))
    assert admitted(decision) == ["a"]
    assert decision.has_whole_prompt
    assert decision.prefill_tokens == 30 * BLOCK
    assert decide(snapshot(waiting=(prompt("a", 30),), **tight)).prefill_tokens == 256, "others are cut"


def test_it_does_not_start_beside_a_prompt_under_way_and_holds_others_back_until_it_can() -> None:
    waiting = (whole("a"), prompt("b", 2))
    decision = decide(snapshot(waiting=waiting, prefilling_tokens=40))
    assert admitted(decision) == []
    assert decision.waits == {"a": Reason.NO_TOKENS_LEFT, "b": Reason.BEHIND}
    assert decision.behind == {"b": Resource.COMPUTE}
    assert not decision.has_whole_prompt


def test_it_does_not_start_after_another_in_the_same_step() -> None:
    decision = decide(snapshot(waiting=(prompt("a", 2, deadline_s=100.5), whole("b"))))
    assert admitted(decision) == ["a"]
    assert decision.waits["b"] is Reason.NO_TOKENS_LEFT


def test_others_start_after_it_with_what_it_leaves() -> None:
    decision = decide(snapshot(waiting=(whole("a"), prompt("b", 2))))
    assert admitted(decision) == ["a", "b"]


@pytest.mark.parametrize(("decode_tokens", "starts"), [(20, True), (21, False)])
def test_decodes_leave_it_what_they_leave(decode_tokens: int, starts: bool) -> None:
    decision = decide(snapshot(waiting=(whole("a"),), budget_tokens=500, decode_tokens=decode_tokens))
    assert admitted(decision) == (["a"] if starts else [])


def test_a_token_for_each_that_is_fetched_is_left() -> None:
    residents = (resident("r"),)
    free = {"resident": residents, "num_resident": 1, "parked": (parked("p"),)}
    assert admitted(decide(snapshot(waiting=(whole("a"),), budget_tokens=480, **free))) == []
    decision = decide(snapshot(waiting=(whole("a"),), budget_tokens=481, **free))
    assert (decision.fetch, admitted(decision)) == (("p",), ["a"])
    assert decision.prefill_tokens == 481


def test_hits_are_not_counted_on() -> None:
    """They may be evicted before the engine looks for them."""
    hits = {"a": PrefixHit(num_blocks=29)}
    assert admitted(decide(snapshot(waiting=(whole("a"),), hits=hits, budget_tokens=500, decode_tokens=100))) == []


@pytest.mark.parametrize("where", [{}, {"mode": "resident"}, {"can_layer": False}])
def test_one_that_no_step_holds_is_refused(where: dict[str, Any]) -> None:
    can_layer, mode = where.get("can_layer", True), where.get("mode", "auto")
    s = snapshot(waiting=(whole("a", can_layer=can_layer),), mode=mode, budget_tokens=479)
    [refusal] = decide(s).refuse
    assert refusal.reason is Reason.NEVER_FITS
    assert "--max-num-batched-tokens" in refusal_text(s, refusal)


def test_one_that_can_only_run_in_the_pool_starts_alike() -> None:
    decision = decide(snapshot(waiting=(whole("a", can_layer=False), prompt("b", 2, can_layer=False))))
    assert admitted(decision) == ["a", "b"]
    decision = decide(
        snapshot(waiting=(whole("a", can_layer=False), prompt("b", 2, can_layer=False)), prefilling_tokens=1)
    )
    assert admitted(decision) == []
