"""`layerkv explain`: every reason has a sentence, and a history reads as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerkv.cli import main
from layerkv.explain import ACTIONS, RESOURCES, SENTENCES, read_histories
from layerkv.scheduler.decision_log import DecisionLog
from layerkv.scheduler.reasons import Event, LogEntry, Reason, Resource

ROOM = {"free_blocks": 3, "free_zone_blocks": 2, "free_host_blocks": 9, "prefill_tokens": 512}


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    log = DecisionLog(tmp_path / "decisions.jsonl")
    facts = {"slo_class": "chat", "ttft_s": 0.5, "tpot_s": 0.05, "prompt_tokens": 900}
    waited = {"wait_s": 1.4, "token": 3, "left": "parked"}
    ended = {"output_tokens": 7, "end": "finished", "lag_s": 1.5, "longest_pause_s": 1.4}
    log.write(
        [
            LogEntry(10.0, "early-1", Event.ARRIVED, None, facts),
            LogEntry(10.0, "early-1", Event.ADMITTED_RESIDENT, Reason.FITS),
            LogEntry(10.1, "late-2", Event.ARRIVED, None, facts),
            LogEntry(10.2, "late-2", Event.WAITS, Reason.ZONE_FULL, ROOM),
            LogEntry(10.4, "early-1", Event.FIRST_TOKEN, None, {"ttft_s": 0.4, "on_time": True}),
            LogEntry(10.7, "late-2", Event.ADMITTED_LAYERED, Reason.POOL_CONTENDED),
            LogEntry(11.1, "late-2", Event.FIRST_TOKEN, None, {"ttft_s": 1.0, "on_time": False}),
            LogEntry(11.1, "late-2", Event.PARKED, Reason.FIRST_TOKEN_DONE),
            LogEntry(11.2, "late-2", Event.WAITS, Reason.POOL_FULL, ROOM),
            LogEntry(12.0, "late-2", Event.FETCHED, Reason.ITS_TURN),
            LogEntry(12.5, "late-2", Event.READER_WAITED, Reason.FIRST_TOKEN_DONE, waited),
            LogEntry(13.0, "late-2", Event.FINISHED, None, ended),
            LogEntry(13.0, "refused-3", Event.ARRIVED, None, facts),
            LogEntry(13.0, "refused-3", Event.REFUSED, Reason.OVERLOAD, {"text": "too much is waiting"}),
        ]
    )
    log.close()
    return tmp_path / "decisions.jsonl"


def test_every_reason_and_every_event_has_its_words() -> None:
    assert set(SENTENCES) == set(Reason)
    assert set(ACTIONS) == set(Event)
    assert len(set(SENTENCES.values())) == len(Reason)
    assert set(RESOURCES) == set(Resource)


def test_a_history_says_what_happened_when_and_why(log_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(log_path), "late"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [
        "0.000 s  arrived: class chat, 900 prompt tokens, first token due within 500 ms, then 50 ms per token",
        "0.100 s  waited 500 ms for the lane zone: the lane zone had no room for it (free: 3 pool, 2 zone, 9 host "
        "blocks; prefill budget 512 tokens)",
        "0.600 s  started through the lane zone: ",
        "1.000 s  first token after 1.00 s, late",
        "1.000 s  parked: its layered prefill was over",
        "1.100 s  waited 800 ms for the pool: it can only go on in the pool",
        "1.900 s  fetched back into the pool: ",
        "2.400 s  its reader waited 1.40 s at token 3: parked: its layered prefill was over",
        "2.900 s  finished with 7 output tokens; its reader waited 1.50 s in all, 1.40 s at the longest",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.strip().startswith(start)


def test_without_a_request_the_latest_come_first_and_reasons_are_added_up(
    log_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(log_path), "--json"]) == 0
    first, *_ = json.loads(capsys.readouterr().out)
    assert first["request_id"] == "late-2"
    assert first["late_by_s"] == pytest.approx(0.5)
    assert (first["lag_s"], first["longest_pause_s"]) == (1.5, 1.4)
    assert first["waited_s"] == {"pool_full": pytest.approx(0.8), "zone_full": pytest.approx(0.5)}
    assert first["waited_for_s"] == {"pool": pytest.approx(0.8), "zone": pytest.approx(0.5)}
    assert main(["explain", str(log_path)]) == 0
    text = capsys.readouterr().out
    assert "late-2" in text
    assert "the lane zone had no room" in text
    assert "Seconds that readers waited, over all requests" in text


def test_a_wait_that_nothing_explains_is_told_so_and_one_told_in_between_ends_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token on its way when its request is parked may come while that waits again."""
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.write(
        [
            LogEntry(1.0, "a", Event.ARRIVED, None, {"slo_class": "chat", "ttft_s": 0.5, "prompt_tokens": 9}),
            LogEntry(2.0, "a", Event.PARKED, Reason.POOL_SHORT),
            LogEntry(2.1, "a", Event.WAITS, Reason.POOL_FULL, ROOM),
            LogEntry(2.3, "a", Event.READER_WAITED, None, {"wait_s": 0.3, "token": 8}),
            LogEntry(4.1, "a", Event.FETCHED, Reason.ITS_TURN),
            LogEntry(5.0, "a", Event.FINISHED, None, {"output_tokens": 9, "lag_s": 0.0, "longest_pause_s": 0.0}),
        ]
    )
    log.close()
    assert main(["explain", str(tmp_path / "decisions.jsonl"), "a"]) == 0
    text = capsys.readouterr().out
    assert "waited 2.00 s for the pool: it can only go on in the pool" in text
    assert "its reader waited 300 ms at token 8: it was in the batch all the while" in text
    assert "finished with 9 output tokens; its reader never waited" in text
    assert read_histories(tmp_path / "decisions.jsonl")["a"].waited_s == {Reason.POOL_FULL: pytest.approx(2.0)}


def test_a_refusal_is_told_in_its_own_words(log_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(log_path), "refused-3"]) == 0
    assert "refused: too much is waiting" in capsys.readouterr().out


@pytest.mark.parametrize(("request_id", "message"), [("nobody", "has no request 'nobody'"), ("-", "3 requests go by")])
def test_a_request_that_cannot_be_told_is_named(
    log_path: Path, request_id: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["explain", str(log_path), "--", request_id]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_histories_come_in_order_of_arrival(log_path: Path) -> None:
    assert list(read_histories(log_path)) == ["early-1", "late-2", "refused-3"]
