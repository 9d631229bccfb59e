"""When the events of a stream go out, for any arrivals."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.scheduler.pacer import END_S, HELD_BYTES, Pacer

TPOT_S = 0.1


@dataclass(frozen=True)
class Come:
    """An event of a choice, when it came and how many tokens it has."""

    at_s: float
    choice: int
    num_tokens: int
    number: int


@dataclass(frozen=True)
class Stream:
    """What an engine made for a response, and when it was done."""

    events: list[Come]
    end_s: float


@st.composite
def streams(draw: st.DrawFn, num_choices: int = 1) -> Stream:
    """Slices: many events at once, then none for a while."""
    gaps_s = st.one_of(st.just(0.0), st.floats(0.0, 0.05), st.floats(0.0, 5.0))
    now_s, events = draw(st.floats(0.0, 1e6)), []
    for number in range(draw(st.integers(1, 60))):
        now_s += draw(gaps_s)
        choice = draw(st.integers(0, num_choices - 1))
        events.append(Come(now_s, choice, draw(st.sampled_from([1, 1, 1, 0, 2, 7])), number))
    return Stream(events, now_s + draw(gaps_s))


def released(stream: Stream, *, ends: bool = True) -> list[tuple[float, Come]]:
    """Play a stream; returns when each event went out, in the order in which they did."""
    pacer, gone = Pacer(TPOT_S), []

    def let_go(until_s: float) -> None:
        while (next_s := pacer.next_s) is not None and next_s <= until_s:
            gone.extend((next_s, stream.events[int(event)]) for event in pacer.take(next_s))

    for come in stream.events:
        let_go(come.at_s)
        pacer.put(str(come.number).encode(), come.at_s, come.choice, come.num_tokens)
    if ends:
        let_go(stream.end_s)
        pacer.end(stream.end_s)
    let_go(float("inf"))
    assert pacer.is_empty
    return gone


def read_at(events: list[Come]) -> list[float]:
    """When a reader takes each event's first token who gets them as they come: one token per TPOT."""
    times, next_s = [], events[0].at_s
    for come in events:
        at_s = max(come.at_s, next_s)
        times.append(at_s)
        next_s = at_s + come.num_tokens * TPOT_S
    return times


# One choice ------------------------------------------------------------------------------------------------------


@given(streams())
def test_events_go_out_in_the_order_in_which_they_came_and_not_before(stream: Stream) -> None:
    gone = released(stream)
    assert [come for _, come in gone] == stream.events
    assert all(at_s >= come.at_s for at_s, come in gone)


@given(streams())
def test_no_event_goes_out_after_its_reader_gets_to_it(stream: Stream) -> None:
    for (at_s, _), due_s in zip(released(stream), read_at(stream.events), strict=True):
        assert at_s <= due_s + 1e-6


@given(streams())
def test_until_the_end_every_event_with_tokens_goes_out_when_its_reader_gets_to_it(stream: Stream) -> None:
    for (at_s, come), due_s in zip(released(stream, ends=False), read_at(stream.events), strict=True):
        if come.num_tokens:
            assert at_s == pytest.approx(due_s, abs=1e-6)


@given(streams())
def test_the_end_is_delayed_by_a_second_at_most(stream: Stream) -> None:
    assert all(at_s <= stream.end_s + END_S + 1e-6 for at_s, _ in released(stream))


def test_the_first_token_goes_out_when_it_comes_and_a_slice_behind_it_at_the_readers_pace() -> None:
    pacer = Pacer(TPOT_S)
    for event in (b"a", b"b", b"c"):
        pacer.put(event, 5.0, 0, 1)
    assert pacer.take(5.0) == [b"a"]
    assert pacer.take(5.09) == []
    assert pacer.take(5.1) == [b"b"]
    assert pacer.take(5.2) == [b"c"]


def test_a_wait_moves_the_reader_on_and_is_not_made_good() -> None:
    pacer = Pacer(TPOT_S)
    pacer.put(b"a", 0.0, 0, 1)
    pacer.put(b"b", 9.0, 0, 1)
    pacer.put(b"c", 9.0, 0, 1)
    assert pacer.take(9.0) == [b"a", b"b"]
    assert pacer.next_s == pytest.approx(9.1)


def test_what_went_out_late_makes_nothing_behind_it_later() -> None:
    pacer = Pacer(TPOT_S)
    for event in (b"a", b"b", b"c"):
        pacer.put(event, 0.0, 0, 1)
    assert pacer.take(0.17) == [b"a", b"b"]
    assert pacer.next_s == pytest.approx(0.2)


def test_an_event_of_several_tokens_gives_the_reader_as_many_to_read() -> None:
    pacer = Pacer(TPOT_S)
    pacer.put(b"abc", 0.0, 0, 3)
    pacer.put(b"d", 0.0, 0, 1)
    assert pacer.take(0.29) == [b"abc"]
    assert pacer.next_s == pytest.approx(0.3)


def test_an_event_without_tokens_costs_the_reader_no_time_and_keeps_its_place() -> None:
    pacer = Pacer(TPOT_S)
    for event, num_tokens in ((b"role", 0), (b"a", 1), (b"b", 1), (b"tool", 0), (b"c", 1)):
        pacer.put(event, 0.0, 0, num_tokens)
    assert pacer.take(0.0) == [b"role", b"a"]
    assert pacer.take(0.1) == [b"b", b"tool"]
    assert pacer.take(0.2) == [b"c"]


def test_what_is_left_at_the_end_is_spread_over_a_second() -> None:
    pacer = Pacer(TPOT_S)
    for number in range(101):
        pacer.put(b"%d" % number, 0.0, 0, 1)
    assert len(pacer.take(0.0)) == 1
    pacer.end(0.05)
    assert len(pacer.take(0.551)) == 50
    assert len(pacer.take(1.05)) == 50


def test_what_is_left_at_the_end_waits_no_longer_than_without_one() -> None:
    pacer = Pacer(TPOT_S)
    for event in (b"a", b"b"):
        pacer.put(event, 0.0, 0, 1)
    pacer.end(0.0)
    assert pacer.take(0.1) == [b"a", b"b"]


# Several choices, and what belongs to none ---------------------------------------------------------------------------


@given(streams(num_choices=3))
def test_each_choice_goes_out_as_if_it_were_alone(stream: Stream) -> None:
    together = released(stream)
    for choice in range(3):
        alone = [come for come in stream.events if come.choice == choice]
        if alone:
            moved = [Come(come.at_s, 0, come.num_tokens, number) for number, come in enumerate(alone)]
            times = [at_s for at_s, come in together if come.choice == choice]
            assert [come for _, come in together if come.choice == choice] == alone
            assert times == [at_s for at_s, _ in released(Stream(moved, stream.end_s))]


def test_a_choice_that_has_ended_goes_out_within_a_second_and_the_others_keep_their_pace() -> None:
    pacer = Pacer(TPOT_S)
    for choice in [0, 1] * 30:
        pacer.put(b"%d" % choice, 0.0, choice, 1)
    pacer.end_choice(0, 0.0)
    by_then = pacer.take(END_S)
    assert by_then.count(b"0") == 30
    assert by_then.count(b"1") == 11


@given(streams(), st.floats(0.0, 2.0))
def test_the_usage_goes_out_last_and_within_a_second_of_the_end(stream: Stream, later_s: float) -> None:
    pacer, gone = Pacer(TPOT_S), []
    for come in stream.events:
        pacer.put(b"token", come.at_s, 0, come.num_tokens)
        gone += pacer.take(come.at_s)
    pacer.put_for_all(b"usage", stream.end_s)
    pacer.end(stream.end_s)
    pacer.put_for_all(b"done", stream.end_s)
    gone += pacer.take(stream.end_s + END_S)
    assert gone == [b"token"] * len(stream.events) + [b"usage", b"done"]


def test_an_event_of_no_choice_in_the_middle_keeps_its_place_when_the_choice_ends() -> None:
    pacer = Pacer(TPOT_S)
    for number in range(40):
        pacer.put(b"%d" % number, 0.0, 0, 1)
    pacer.put_for_all(b"odd", 0.0)
    for number in range(40, 80):
        pacer.put(b"%d" % number, 0.0, 0, 1)
    pacer.end_choice(0, 0.0)
    assert pacer.take(END_S) == [*(b"%d" % n for n in range(40)), b"odd", *(b"%d" % n for n in range(40, 80))]


def test_a_comment_waits_for_nobody() -> None:
    pacer = Pacer(TPOT_S)
    for event in (b"a", b"b"):
        pacer.put(event, 0.0, 0, 1)
    pacer.put_first(b": ping", 0.0)
    assert pacer.take(0.0) == [b"a", b": ping"]


# Ends of another kind ------------------------------------------------------------------------------------------------


@given(streams(num_choices=2))
def test_after_a_release_everything_goes_out_at_once_and_each_choice_in_order(stream: Stream) -> None:
    pacer = Pacer(TPOT_S)
    for come in stream.events:
        pacer.put(str(come.number).encode(), come.at_s, come.choice, come.num_tokens)
    pacer.release(stream.end_s)
    gone = [stream.events[int(event)] for event in pacer.take(stream.end_s)]
    assert pacer.is_empty
    for choice in (0, 1):
        assert [e for e in gone if e.choice == choice] == [e for e in stream.events if e.choice == choice]


def test_what_is_dropped_goes_nowhere() -> None:
    pacer = Pacer(TPOT_S)
    pacer.put(b"a", 0.0, 0, 1)
    pacer.drop()
    assert pacer.is_empty
    assert pacer.next_s is None
    assert pacer.take(1e9) == []


@given(st.lists(st.integers(1, HELD_BYTES // 3), max_size=12))
def test_what_is_held_beyond_the_bound_goes_out_early_and_in_order(sizes: list[int]) -> None:
    pacer, gone = Pacer(TPOT_S), []
    events = [b"%d" % (number % 10) * size for number, size in enumerate(sizes)]
    for event in events:
        pacer.put(event, 0.0, 0, 1)
        gone += pacer.take(0.0)
        assert not pacer.is_full
    assert gone == events[: len(gone)]
    if sum(map(len, events[1:])) <= HELD_BYTES:
        assert len(gone) == min(len(events), 1)
