"""The controller: how it sees the requests that run, and those that may outgrow the pool."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerkv.config import SloClass
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.engine import Running
from layerkv.scheduler.lengths import UNKNOWN_TOKENS
from layerkv.scheduler.reasons import Reason
from tests.fakes.tiny_controller import CHAT, SHAPE, arrive, controller, decoding, engine
from tests.fakes.tiny_scheduler import policy, profile


def test_the_snapshot_has_the_running_as_they_are() -> None:
    c = controller(policy="slo", length_prediction="none")
    arrive(c, "d", "p", "z", "f")
    for name in ("d", "p", "z", "f"):
        c.admitted(name, layered=name == "z", reason=Reason.FITS, step=3, now_s=10.0)
    c.first_token("d", 10.2)
    state = engine(
        decoding("d", num_output=16, num_tokens=177, num_host_blocks=7),
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
    c = controller(policy="slo", length_prediction="none")
    arrive(c, "d")
    c.admitted("d", layered=False, reason=Reason.FITS, step=0, now_s=10.0)
    c.first_token("d", 10.2)
    assert c.snapshot(engine(decoding("d")), 10.5).load.decode_slack_s < 10
    assert c.snapshot(engine(decoding("d")), 99.0).load.decode_slack_s == float("inf")


def test_the_longest_stall_of_a_class_bounds_how_long_prefill_may_hold_its_decodes_up() -> None:
    """By its mean time per token it could wait much longer."""
    c = controller(policy="slo", length_prediction="none")
    arrive(c, "d")
    arrive(c, "s", slo=SloClass(name="steady", ttft_s=1.0, tpot_s=0.05, max_stall_s=0.2))
    for name in ("d", "s"):
        c.admitted(name, layered=False, reason=Reason.FITS, step=0, now_s=10.0)
        c.first_token(name, 10.2)
    assert c.snapshot(engine(decoding("d")), 10.2).load.decode_slack_s > 1.0
    s = c.snapshot(engine(decoding("d"), decoding("s")), 10.2)
    assert s.load.decode_slack_s == pytest.approx(0.2)
    assert [r.deadline_s for r in s.load.resident][1] == pytest.approx(10.4)


@pytest.mark.parametrize(("longest_tokens", "blocks"), [(1700, 107), (1601, 101), (1600, 0)])
def test_no_request_is_given_room_for_more_than_the_longest_there_can_be(longest_tokens: int, blocks: int) -> None:
    """1,590 tokens of a prompt and 1,000 more that it asks for; the pool holds 1,600."""
    shape = replace(SHAPE, long_contexts=True, longest_tokens=longest_tokens)
    c = Controller(policy(), shape, profile(), is_measured=True)
    c.arrive("long", CHAT, now_s=10.0, arrival_s=10.0, num_tokens=1590, max_tokens=1000)
    assert c.waiting.views[0].most_blocks == blocks


def test_a_session_between_two_turns_is_no_load_under_way() -> None:
    """Else no fetch would begin before its next turn."""
    c = controller()
    arrive(c, "fetched")
    c.arrive("session", CHAT, now_s=10.0, arrival_s=10.0, num_tokens=160, max_tokens=50, can_layer=False)
    load = c.snapshot(engine(arriving=[("fetched", 11, 5), ("session", 60, 5)]), 10.5).load
    assert (load.loading_blocks, load.num_resident) == (11, 2)
