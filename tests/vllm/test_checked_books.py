"""`LAYERKV_CHECK=1`: an engine whose books do not add up ends, instead of serving on with fewer and fewer blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm


def engine_with_a_fault(model: Path, fault: str) -> HandEngine:
    """A request decodes, while a host block is lost or somebody who never was stays in the books."""
    engine = HandEngine(model)
    engine.add("a", range(40), max_tokens=20)
    engine.step()
    if fault == "a lost host block":
        engine.ledger.host.take(1)
    else:
        engine.ledger.add("ghost")
    return engine


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a lost host block", "host memory: 1 blocks are taken; requests hold 0"),
        ("a ghost", "requests that vLLM no longer has are in the books: ghost"),
    ],
)
def test_with_the_switch_the_next_step_without_copies_says_what_does_not_add_up(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setenv("LAYERKV_CHECK", "1")
    engine = engine_with_a_fault(tiny_model, fault)
    with pytest.raises(AssertionError, match=message):
        engine.schedule()


@pytest.mark.parametrize("fault", ["a lost host block", "a ghost"])
def test_without_it_nothing_is_checked(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.delenv("LAYERKV_CHECK", raising=False)
    engine_with_a_fault(tiny_model, fault).schedule()


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_sound_books_pass_in_every_step(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    monkeypatch.setenv("LAYERKV_CHECK", "1")
    engine = HandEngine(tiny_model, ahead=ahead, pool_blocks=30, fetch_steps=2)
    checked: list[int] = []
    check = engine.scheduler._side._check_books
    engine.scheduler._side._check_books = lambda: (checked.append(1), check())
    for index in range(12):
        engine.add(f"r{index}", [index, *range(60 + 7 * index)], max_tokens=20)
    engine.step()
    engine.abort("r3", "r11")
    engine.run()
    assert len(checked) > 5
