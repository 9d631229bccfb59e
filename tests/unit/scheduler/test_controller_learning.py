"""The controller: what it learns of costs, pace and lengths, and what it tells the front ends."""

from __future__ import annotations

import pytest

from layerkv.config import SloClass
from layerkv.core.cost import StepWork
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.engine import Running
from layerkv.scheduler.lengths import MIN_SAMPLES, UNKNOWN_TOKENS, MaxTokens, QuantileLengths
from layerkv.scheduler.reasons import End, Reason
from tests.fakes.tiny_controller import CHAT, arrive, controller, decoding, engine
from tests.fakes.tiny_scheduler import policy

# Pace -------------------------------------------------------------------------------------------------------------


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


def test_prompts_that_are_held_back_for_readers_say_nothing_of_the_pace_at_which_they_could_get_on() -> None:
    """Regression: nobody was in a hurry, so the gate took the pace for all that there is, and refused the next."""
    picky = SloClass(name="chat", ttft_s=30.0, tpot_s=0.05, overload="reject")
    c = controller()
    c.policy.classes["chat"] = picky
    arrive(c, "d", "long", "next", slo=picky)
    for name in ("d", "long"):
        c.admitted(name, layered=False, reason=Reason.FITS, step=0, now_s=10.0)
    waits_s = {}
    for step in range(50):  # a hundredth of what the engine could do
        now_s = 10.0 + step * 0.05
        c.made_tokens("d", now_s)
        running = (decoding("d", step + 1, 161 + step), Running("long", 160, step, 0, True, 1))
        _, decision = c.decide(engine(*running, step=step, free_slots=0), now_s)
        assert decision.prefill_tokens < 2047
        word = c.word(now_s, now_s)
        assert word is not None
        waits_s[step] = word.classes["chat"].wait_s
    assert waits_s[49] < waits_s[0]


# Costs, words, policies -------------------------------------------------------------------------------------------


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


# Lengths ----------------------------------------------------------------------------------------------------------


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
    c = controller(policy="slo")
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
    c = controller(policy="slo")
    c.arrive("a", CHAT, now_s=10.0, arrival_s=10.0, num_tokens=160, max_tokens=32_000)
    assert (c.tracked["a"].low_tokens, c.tracked["a"].middle_tokens) == (32_000, UNKNOWN_TOKENS)
