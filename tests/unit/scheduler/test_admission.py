"""What a front end makes of its engines' words."""

from __future__ import annotations

import pytest

from layerkv.config import SloClass
from layerkv.scheduler.admission import CERTAIN_SHARE, FORGET_S, Backlog, would_be_late
from layerkv.scheduler.backlog import ClassWait, Word

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1, overload="reject")
BATCH = SloClass(name="batch", ttft_s=10.0, tpot_s=1.0, overload="reject")


def word(*, chat: float = 0.0, batch: float = 0.0, age_s: float = 0.0) -> Word:
    """Requests of both classes cost something: a chat 0.1 s, a batch 0.5 s."""
    return Word(age_s, {"chat": ClassWait(chat, 0.1), "batch": ClassWait(batch, 0.5)})


def test_of_each_engine_the_newest_word_counts() -> None:
    backlog = Backlog()
    backlog.note(0, word(chat=9.0, batch=9.0), 100.0)
    backlog.note(0, word(chat=2.0, batch=7.0), 100.1)
    assert backlog.meets(CHAT, 100.1) == (2.0, 0.1)
    assert backlog.meets(BATCH, 100.1) == (7.0, 0.5)


def test_of_a_class_that_an_engine_does_not_know_nothing_is_known() -> None:
    backlog = Backlog()
    backlog.note(0, word(chat=9.0), 100.0)
    assert backlog.meets(SloClass(name="voice", ttft_s=1.0, tpot_s=0.1), 100.0) == (0.0, 0.0)


def test_between_words_a_seconds_work_is_done_in_a_second() -> None:
    backlog = Backlog()
    backlog.note(0, word(chat=2.0), 100.0)
    assert backlog.meets(CHAT, 100.5).wait_s == pytest.approx(1.5)
    assert backlog.meets(CHAT, 103.0).wait_s == 0.0


def test_what_was_let_in_since_the_word_is_added() -> None:
    backlog = Backlog()
    backlog.note(0, word(), 100.0)
    for _ in range(20):
        backlog.let_in(CHAT, 100.1)
    assert backlog.meets(CHAT, 100.1).wait_s == pytest.approx(2.0)
    assert backlog.meets(CHAT, 100.3).wait_s == pytest.approx(1.8)
    backlog.note(0, word(chat=1.5), 100.4)
    assert backlog.meets(CHAT, 100.4).wait_s == pytest.approx(1.5), "the word counts them"


def test_what_the_engine_had_not_taken_in_when_it_spoke_is_not_in_its_word() -> None:
    backlog = Backlog()
    backlog.note(0, word(), 100.0)
    backlog.let_in(CHAT, 100.1)
    backlog.let_in(CHAT, 100.3)
    backlog.note(0, word(chat=0.5, age_s=0.2), 100.4)
    assert backlog.meets(CHAT, 100.4).wait_s == pytest.approx(0.6)


def test_an_idle_time_is_no_credit_for_those_who_come_after_it() -> None:
    backlog = Backlog()
    backlog.note(0, word(), 100.0)
    for _ in range(20):
        backlog.let_in(CHAT, 160.0)
    assert backlog.meets(CHAT, 160.0).wait_s == pytest.approx(2.0)


def test_those_let_in_that_are_due_later_do_not_count() -> None:
    backlog = Backlog()
    backlog.note(0, word(), 100.0)
    backlog.let_in(BATCH, 100.1)
    assert backlog.meets(CHAT, 100.1).wait_s == 0.0
    assert backlog.meets(BATCH, 100.1).wait_s == pytest.approx(0.5)
    backlog.let_in(CHAT, 100.1)
    assert backlog.meets(BATCH, 100.1).wait_s == pytest.approx(0.6)


def test_one_of_several_front_ends_takes_its_own_for_as_many() -> None:
    backlog = Backlog()
    backlog.expect(0, num_front_ends=4)
    backlog.note(0, word(), 100.0)
    backlog.let_in(CHAT, 100.0 + 1e-9)
    assert backlog.meets(CHAT, 100.0 + 1e-9).wait_s == pytest.approx(0.4)


def test_of_several_engines_the_one_with_the_least_to_do_counts_and_gets_its_share() -> None:
    backlog = Backlog()
    for engine, wait_s in ((0, 9.0), (1, 3.0)):
        backlog.expect(engine)
        backlog.note(engine, word(chat=wait_s), 100.0)
    assert backlog.meets(CHAT, 100.0).wait_s == 3.0
    backlog.let_in(CHAT, 100.0 + 1e-9)
    assert backlog.meets(CHAT, 100.0 + 1e-9).wait_s == pytest.approx(3.05)


def test_beside_busy_engines_one_that_says_nothing_has_room() -> None:
    backlog = Backlog()
    backlog.expect(0)
    backlog.expect(1)
    backlog.note(0, word(chat=9.0), 100.0)
    assert backlog.meets(CHAT, 100.0).wait_s == 0.0


def test_what_was_let_in_is_not_kept_for_ever() -> None:
    backlog = Backlog()
    backlog.let_in(CHAT, 1.0)
    backlog.note(0, word(), 2.0)
    for second in range(1000):
        backlog.let_in(CHAT, 100.0 + second)
        backlog.note(1, word(), 100.0 + second)
    assert len(backlog._let_in) <= FORGET_S + 1


def test_who_would_begin_at_once_is_never_late_however_long_it_takes_itself() -> None:
    assert not would_be_late(CHAT, ClassWait(0.0, 60.0))
    assert would_be_late(CHAT, ClassWait(0.001, 60.0))


@pytest.mark.parametrize(("wait_s", "is_late"), [(CERTAIN_SHARE - 0.2, False), (CERTAIN_SHARE - 0.05, True)])
def test_a_request_is_to_begin_early_enough_for_its_own_prefill(wait_s: float, *, is_late: bool) -> None:
    assert would_be_late(CHAT, ClassWait(wait_s, 0.1)) is is_late


def test_a_request_for_several_answers_counts_as_so_many() -> None:
    """The engine gets each of them as a request of its own."""
    one_by_one, at_once = Backlog(), Backlog()
    for backlog in (one_by_one, at_once):
        backlog.note(0, Word(0.0, {"chat": ClassWait(0.2, 0.1)}), 100.0)
    for _ in range(5):
        one_by_one.let_in(CHAT, 100.1)
    at_once.let_in(CHAT, 100.1, 5)
    assert at_once.meets(CHAT, 100.1) == one_by_one.meets(CHAT, 100.1)
    assert at_once.meets(CHAT, 100.1).wait_s == pytest.approx(0.1 + 5 * 0.1)
