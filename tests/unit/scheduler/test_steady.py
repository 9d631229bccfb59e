"""Tokens of like steps are noted together, and nobody's figures differ for that."""

from __future__ import annotations

from random import Random

import pytest

from layerkv.scheduler.reasons import End, Reason
from layerkv.scheduler.steady import LONGEST_RUN_S, MOST_DIFFERENCE_S, MOST_STEPS, SteadySteps
from tests.fakes.tiny_controller import arrive, controller, decoding, engine

NAMES = ("a", "b", "c")


def test_like_steps_are_one_run_of_tokens() -> None:
    steady = SteadySteps()
    assert steady.take() is None
    assert steady.add({"a", "b"}, 0.99)
    assert not steady.add({"a", "b"}, 1.0), "of the first it is not known how long it took"
    assert steady.take() == pytest.approx((0.99, 1, 0.0))
    assert all(steady.add({"a", "b"}, 1.0 + 0.01 * k) for k in range(5))
    assert steady.take() == pytest.approx((1.0, 5, 0.01))
    assert steady.request_ids == {"a", "b"}
    assert steady.take() is None


def test_what_is_not_like_the_steps_before_is_noted_apart() -> None:
    steady = after_a_step_at(0.999)
    assert steady.add({"a", "b"}, 1.0)
    assert not steady.add({"a"}, 1.01), "one of them made no token"
    assert not steady.add({"a", "b"}, 1.001 + 1.01 * MOST_DIFFERENCE_S), "a reader may have waited"
    for k in range(1, MOST_STEPS):
        assert steady.add({"a", "b"}, 1.0 + 0.001 * k)
    assert not steady.add({"a", "b"}, 1.0 + 0.001 * MOST_STEPS), "that would be noted too late"


def test_long_steps_are_noted_together_if_they_are_alike_and_not_for_long() -> None:
    steady, step_s = after_a_step_at(0.7), 0.3
    num_steps = 0
    while steady.add({"a"}, 1.0 + num_steps * step_s):
        num_steps += 1
    assert num_steps == 1 + int(LONGEST_RUN_S / step_s)
    assert steady.take() == pytest.approx((1.0, num_steps, step_s))


@pytest.mark.parametrize(("slow_s", "fast_s"), [(0.07, 0.025), (0.025, 0.07)])
def test_no_token_is_noted_much_earlier_or_later_than_it_came(slow_s: float, fast_s: float) -> None:
    """Each step is like the others, and in all they are not."""
    steady, at_s = after_a_step_at(1.0 - slow_s), 1.0
    came: list[float] = []
    for step_s in [slow_s] * 10 + [fast_s] * 10:
        if not steady.add({"a"}, at_s):
            break
        came.append(at_s)
        at_s += step_s
    first_s, num_tokens, every_s = steady.take() or (0.0, 0, 0.0)
    assert num_tokens == len(came) > 10
    assert max(abs(first_s + k * every_s - at) for k, at in enumerate(came)) <= MOST_DIFFERENCE_S * (1 + 1e-9)


def after_a_step_at(at_s: float) -> SteadySteps:
    steady = SteadySteps()
    assert steady.add({"a", "b"}, at_s)
    assert steady.take()
    return steady


def test_the_others_go_on_when_one_ends() -> None:
    steady = after_a_step_at(0.99)
    assert steady.add({"a", "b", "c"}, 1.0)
    assert steady.add({"a", "b", "c"}, 1.01)
    assert steady.leave("b") == pytest.approx((1.0, 2, 0.01))
    assert steady.leave("b") is None
    assert steady.add({"a", "b", "c"}, 1.02), "in its last step it was there still"
    assert steady.add({"a", "c"}, 1.03)
    assert steady.take() == pytest.approx((1.0, 4, 0.01))
    assert steady.request_ids == {"a", "c"}


@pytest.mark.parametrize("steps_s", [(0.01, 0.01, 0.01, 0.01, 0.2), (0.2, 0.2, 0.2, 0.01)], ids=["short", "long"])
@pytest.mark.parametrize("seed", range(20))
def test_readers_clocks_are_those_of_tokens_noted_one_by_one(seed: int, steps_s: tuple[float, ...]) -> None:
    """Whatever happens between, up to what a step's time differs from the steps beside it."""
    rng = Random(seed)
    together, one_by_one = controller(), controller()
    for c in (together, one_by_one):
        arrive(c, *NAMES)
        for name in NAMES:
            c.admitted(name, layered=False, reason=Reason.FITS, step=1, now_s=10.0)
            c.first_token(name, 10.1)
            c.made_tokens(name, 10.1)
    here, now_s = list(NAMES), 10.1
    for step in range(120):
        now_s += rng.choice(steps_s)
        together.made_one_each(here, now_s)
        for name in here:
            one_by_one.made_tokens(name, now_s)
        if rng.random() < 0.1:
            together.decide(engine(*(decoding(name) for name in here), step=step), now_s)
        if step == 60:
            for c in (together, one_by_one):
                c.leave("b", num_output=60, end=End.FINISHED, now_s=now_s)
            here.remove("b")
    together.catch_up()
    for name in here:
        ours, theirs = together.tracked[name].reader, one_by_one.tracked[name].reader
        assert ours.num_tokens == theirs.num_tokens == 121
        assert ours.lag_s == pytest.approx(theirs.lag_s, abs=1e-6)
        assert ours.wants_next_s == pytest.approx(theirs.wants_next_s, abs=1e-6)
        assert ours.longest_pause_s == pytest.approx(theirs.longest_pause_s, abs=1e-6)
