from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from layerkv.cli import main
from layerkv.errors import LayerKVError
from layerkv.explain import ACTIONS, SENTENCES, run_explain
from layerkv.scheduler.decision_log import DecisionLog
from layerkv.scheduler.reasons import Event, LogEntry, Reason

CHAT = {"slo_class": "chat", "ttft_s": 0.5, "tpot_s": 0.05, "prompt_tokens": 900}
FREE = {"free_blocks": 9, "free_zone_blocks": 3, "free_host_blocks": 7, "prefill_tokens": 64}
LATE = [
    LogEntry(10.0, "cmpl-late-0-77", Event.ARRIVED, None, CHAT),
    LogEntry(10.1, "cmpl-late-0-77", Event.WAITS, Reason.ZONE_FULL, FREE),
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
    """The lines about one request."""
    return [" ".join(line.split()) for line in explained(path, request).splitlines()]


def test_every_reason_has_a_sentence_of_its_own_and_every_event_a_word() -> None:
    assert set(SENTENCES) == set(Reason)
    assert len(set(SENTENCES.values())) == len(SENTENCES)
    assert set(ACTIONS) == set(Event)


@pytest.mark.parametrize("event", list(Event))
@pytest.mark.parametrize("reason", [None, Reason.FITS])
def test_every_event_can_be_told(tmp_path: Path, event: Event, reason: Reason | None) -> None:
    path = write_log(tmp_path / "log", [LogEntry(1.0, "a", event, reason)])
    assert len(story(path, "a")) == 1
    assert "a" in explained(path)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_can_be_told(tmp_path: Path, reason: Reason) -> None:
    path = write_log(tmp_path / "log", [LogEntry(1.0, "a", Event.WAITS, reason)])
    assert SENTENCES[reason] in story(path, "a")[0]


def test_a_late_request_is_told_from_arrival_to_end(log_path: Path) -> None:
    assert story(log_path, "cmpl-late-0-77") == [
        "0.000 s arrived: class chat, 900 prompt tokens, first token due within 500 ms, then 50 ms per token",
        "0.100 s waited 310 ms: the lane zone had no room for it (free: 9 pool, 3 zone, 7 host blocks; prefill budget "
        "64 tokens)",
        f"0.410 s started through the lane zone: {SENTENCES[Reason.POOL_CONTENDED]}",
        "0.800 s first token after 800 ms, late",
        f"0.800 s parked: {SENTENCES[Reason.FIRST_TOKEN_DONE]}",
        f"1.000 s fetched back into the pool: {SENTENCES[Reason.ITS_TURN]}",
        "2.000 s finished with 20 output tokens",
    ]


def test_other_ends_are_told_as_what_they_are(log_path: Path) -> None:
    assert story(log_path, "good")[-2:] == [
        "0.200 s first token after 200 ms, on time",
        "0.900 s aborted with 1 output tokens",
    ]
    assert story(log_path, "big")[1] == "0.000 s refused: needs 900 blocks, 64 are there"
    assert story(log_path, "wait")[-1].startswith("0.500 s waited: another prompt stood before it")


@pytest.mark.parametrize("request_name", ["cmpl-late-0-77", "cmpl-late", "0-77", "late"])
def test_a_request_is_found_by_its_id_a_prefix_or_a_part(log_path: Path, request_name: str) -> None:
    assert json.loads(explained(log_path, request_name, as_json=True))["request_id"] == "cmpl-late-0-77"


def test_an_exact_id_wins_over_ids_that_begin_with_it(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log", [LogEntry(1.0, name, Event.ARRIVED) for name in ("r-1", "r-11", "xr-1")])
    assert json.loads(explained(path, "r-1", as_json=True))["request_id"] == "r-1"


@pytest.mark.parametrize(
    ("request_name", "problem"),
    [
        ("cmpl", "4 requests go by 'cmpl': cmpl-late-0-77"),
        ("nobody", "has no request 'nobody', but 4 others; leave it out to see the worst"),
    ],
)
def test_a_name_that_means_none_or_several_is_refused(log_path: Path, request_name: str, problem: str) -> None:
    with pytest.raises(LayerKVError) as refusal:
        run_explain(log_path, request_name, as_json=False)
    assert problem in str(refusal.value)


def test_the_summary_begins_with_the_latest(log_path: Path) -> None:
    worst = {row["request_id"]: row for row in json.loads(explained(log_path, as_json=True))}
    assert len(worst) == 4
    assert next(iter(worst)) == "cmpl-late-0-77"
    assert worst["cmpl-late-0-77"]["late_by_s"] == pytest.approx(0.3)
    assert worst["cmpl-late-0-77"]["waited_s"] == {"zone_full": 0.31}
    assert worst["cmpl-late-0-77"]["parks"] == 1
    assert worst["cmpl-good-0-78"]["late_by_s"] == pytest.approx(-0.3)
    assert worst["cmpl-wait-0-80"]["ttft_s"] is None


def test_the_tables_show_the_same(log_path: Path) -> None:
    text = explained(log_path)
    assert "The latest first tokens among 4 requests" in text
    [row] = [line for line in text.splitlines() if line.startswith("cmpl-late-0-77")]
    assert row.split()[1:7] == ["800", "ms", "300", "ms", "1", "310"]
    assert f"0.3  {SENTENCES[Reason.ZONE_FULL]}" in text


def test_the_history_as_json_has_the_same_lines(log_path: Path) -> None:
    told = json.loads(explained(log_path, "late", as_json=True))
    assert told["ttft_s"] == pytest.approx(0.8)
    assert [" ".join(line.split()) for line in told["history"]] == story(log_path, "late")


def test_the_command_hands_its_arguments_over(log_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(log_path), "late", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request_id"] == "cmpl-late-0-77"
    assert main(["explain", str(log_path), "nobody"]) == 1
    assert main(["explain", str(log_path.parent / "none")]) == 2
    assert "found no readable file" in capsys.readouterr().err
