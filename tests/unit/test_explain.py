from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layerkv.cli import main
from layerkv.errors import ConfigError
from layerkv.explain import WHY, histories, run_explain
from layerkv.scheduler.decision_log import DecisionLog
from layerkv.scheduler.reasons import Event, LogEntry, Reason

CHAT = {"slo_class": "chat", "ttft_s": 0.5, "tpot_s": 0.05, "prompt_tokens": 900}
LATE = [
    LogEntry(10.0, "cmpl-late-0-77", Event.ARRIVED, None, CHAT),
    LogEntry(10.1, "cmpl-late-0-77", Event.WAITS, Reason.ZONE_FULL, {"need_blocks": 28, "free_zone_blocks": 3}),
    LogEntry(10.41, "cmpl-late-0-77", Event.ADMITTED_LAYERED, Reason.POOL_CONTENDED),
    LogEntry(10.8, "cmpl-late-0-77", Event.FIRST_TOKEN, None, {"ttft_s": 0.8, "on_time": False}),
    LogEntry(10.8, "cmpl-late-0-77", Event.PARKED, Reason.FIRST_TOKEN_DONE),
    LogEntry(11.0, "cmpl-late-0-77", Event.FETCHED, Reason.ITS_TURN),
    LogEntry(12.0, "cmpl-late-0-77", Event.FINISHED, None, {"output_tokens": 20, "aborted": False}),
]
ON_TIME = [
    LogEntry(10.0, "cmpl-good-0-78", Event.ARRIVED, None, CHAT),
    LogEntry(10.0, "cmpl-good-0-78", Event.ADMITTED_RESIDENT, Reason.FITS),
    LogEntry(10.2, "cmpl-good-0-78", Event.FIRST_TOKEN, None, {"ttft_s": 0.2, "on_time": True}),
    LogEntry(10.9, "cmpl-good-0-78", Event.FINISHED, None, {"output_tokens": 1, "aborted": True}),
]
REFUSED = [
    LogEntry(11.0, "cmpl-big-0-79", Event.ARRIVED, None, CHAT),
    LogEntry(11.0, "cmpl-big-0-79", Event.REFUSED, Reason.NEVER_FITS, {"text": "needs 900 blocks, 64 are there"}),
    LogEntry(11.0, "cmpl-big-0-79", Event.FINISHED, None, {"output_tokens": 0, "aborted": True}),
]
STARVING = [
    LogEntry(10.0, "cmpl-wait-0-80", Event.ARRIVED, None, CHAT),
    LogEntry(10.5, "cmpl-wait-0-80", Event.WAITS, Reason.BEHIND),
]
ALL = [*LATE, *ON_TIME, *REFUSED, *STARVING]


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log", ALL)


def write_log(path: Path, entries: list[LogEntry]) -> Path:
    log = DecisionLog(path)
    log.write(sorted(entries, key=lambda entry: entry.time_s))
    log.close()
    return path


def explained(path: Path, request: str | None = None, *, as_json: bool = False) -> str:
    console = Console(width=140, color_system=None)
    with console.capture() as captured:
        assert run_explain(path, request, as_json=as_json, console=console) == 0
    return captured.get()


def story(path: Path, request: str) -> list[str]:
    """The lines about one request, without its name."""
    return [" ".join(line.split()) for line in explained(path, request).splitlines()[1:]]


def test_every_reason_has_a_sentence_of_its_own() -> None:
    assert set(WHY) == set(Reason)
    assert len(set(WHY.values())) == len(WHY)


@pytest.mark.parametrize("event", list(Event))
@pytest.mark.parametrize("reason", [None, Reason.FITS])
def test_every_event_can_be_told(tmp_path: Path, event: Event, reason: Reason | None) -> None:
    path = write_log(tmp_path / "log", [LogEntry(1.0, "a", event, reason)])
    assert len(story(path, "a")) == 1
    assert "a" in explained(path)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_can_be_told(tmp_path: Path, reason: Reason) -> None:
    path = write_log(tmp_path / "log", [LogEntry(1.0, "a", Event.WAITS, reason, {"free_blocks": 1})])
    assert WHY[reason] in story(path, "a")[0]


def test_a_late_request_is_told_from_arrival_to_end(log_path: Path) -> None:
    assert story(log_path, "cmpl-late-0-77") == [
        "0.000 s arrived (chat: first token due within 500ms, 900 prompt tokens)",
        "0.100 s waited 0.31 s: the lane zone had no room (needs 28 blocks, 3 free)",
        "0.410 s admitted layered: the pool had no room for it, or others stood in line for the pool",
        "0.800 s first token after 0.80 s, 0.30 s late",
        "0.800 s parked: its layered prefill was over, and it waited for pool blocks to decode",
        "1.000 s fetched: pool blocks for it were free and nobody stood before it",
        "2.000 s finished with 20 output tokens",
    ]


def test_other_ends_are_told_as_what_they_are(log_path: Path) -> None:
    assert story(log_path, "good")[-2:] == [
        "0.200 s first token after 0.20 s, in time",
        "0.900 s aborted with 1 output token",
    ]
    assert story(log_path, "big")[-1] == "0.000 s refused: it cannot run here at all (needs 900 blocks, 64 are there)"
    assert story(log_path, "wait")[-1].startswith("0.500 s waited 1.50 s, and still does: another stood before it")


@pytest.mark.parametrize("request_name", ["cmpl-late-0-77", "cmpl-late", "0-77", "late"])
def test_a_request_is_found_by_its_id_a_prefix_or_a_part(log_path: Path, request_name: str) -> None:
    assert explained(log_path, request_name).startswith("cmpl-late-0-77\n")


def test_an_exact_id_wins_over_ids_that_begin_with_it(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log", [LogEntry(1.0, name, Event.ARRIVED) for name in ("r-1", "r-11", "xr-1")])
    assert explained(path, "r-1").startswith("r-1\n")


@pytest.mark.parametrize(
    ("request_name", "problem"),
    [
        ("cmpl", "found 4 requests with 'cmpl': cmpl-late-0-77"),
        ("nobody", "found no request with 'nobody' among 4; expected an id or a part of one"),
    ],
)
def test_a_name_that_means_none_or_several_is_refused(log_path: Path, request_name: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        run_explain(log_path, request_name)
    assert problem in str(refusal.value)


def test_the_summary_begins_with_the_latest(log_path: Path) -> None:
    summary = json.loads(explained(log_path, as_json=True))
    assert (summary["num_requests"], summary["num_late"]) == (4, 2)
    worst = {row["request_id"]: row for row in summary["worst"]}
    assert list(worst) == ["cmpl-wait-0-80", "cmpl-late-0-77", "cmpl-good-0-78", "cmpl-big-0-79"]
    assert worst["cmpl-wait-0-80"]["late_s"] == 1.5, "no first token yet, and the objective is long past"
    assert worst["cmpl-late-0-77"]["late_s"] == pytest.approx(0.3)
    assert worst["cmpl-late-0-77"]["waited_for"] == "zone_full"
    assert [row["outcome"] for row in worst.values()] == ["waits", "finished", "aborted", "refused"]
    reasons = {row["reason"]: row for row in summary["reasons"]}
    assert reasons["zone_full"]["waited_s"] == pytest.approx(0.31)
    assert reasons["its_turn"]["times"] == 1


def test_the_tables_show_the_same(log_path: Path) -> None:
    text = explained(log_path)
    assert "4 requests, 2 with a late first token" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["cmpl-late-0-77", "chat", "900", "0.80", "s", "0.30", "s", "0.31", "s", "zone_full", "finished"] in rows
    assert "another stood before it in line for the same room" in text


def test_the_history_as_json_has_the_same_lines(log_path: Path) -> None:
    told = json.loads(explained(log_path, "late", as_json=True))
    assert told["outcome"] == "finished"
    first: dict[str, Any] = told["history"][1]
    assert (first["at_s"], first["event"], first["reason"]) == (0.1, "waits", "zone_full")
    assert first["text"] == "waited 0.31 s: the lane zone had no room (needs 28 blocks, 3 free)"
    assert first["facts"] == {"need_blocks": 28, "free_zone_blocks": 3}


def test_lateness_that_the_log_states_is_believed(tmp_path: Path) -> None:
    first = LogEntry(12.0, "a", Event.FIRST_TOKEN, None, {"late_by_s": 0.2})
    path = write_log(tmp_path / "log", [LogEntry(10.0, "a", Event.ARRIVED), first])
    assert story(path, "a")[-1] == "2.000 s first token after 2.00 s, 0.20 s late"


def test_an_id_that_comes_again_is_another_request() -> None:
    runs = [
        [LogEntry(1.0, "a", Event.ARRIVED), LogEntry(2.0, "a", Event.FINISHED)],
        [LogEntry(900.0, "a", Event.WAITS)],
    ]
    found = histories(runs)
    assert [(history.name, len(history.entries)) for history in found] == [("a", 2), ("a#2", 1)]
    assert found[0].log_end_s == 2.0, "another run's clock says nothing about it"


def test_what_was_put_aside_when_the_file_grew_is_told_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    clock_s = iter(range(1000))
    log = DecisionLog(path, clock=lambda: next(clock_s), max_bytes=150, flush_interval_s=0.5)
    for entry in LATE[:3]:
        log.write([entry])
    log.close()
    assert (tmp_path / "log.1").exists()
    assert len(story(path, "late")) >= 2


def test_the_command_hands_its_arguments_over(log_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(log_path), "late", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request_id"] == "cmpl-late-0-77"
    assert main(["explain", str(log_path.parent / "none")]) == 2
    assert "found no readable file" in capsys.readouterr().err
