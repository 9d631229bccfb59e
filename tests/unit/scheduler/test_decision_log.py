from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from layerkv.errors import ConfigError
from layerkv.scheduler.decision_log import DecisionLog, read_log
from layerkv.scheduler.reasons import Event, LogEntry, Reason

ARRIVED = LogEntry(1.0, "a", Event.ARRIVED, None, {"slo_class": "chat", "ttft_s": 0.5, "prompt_tokens": 900})
WAITS = LogEntry(1.25, "a", Event.WAITS, Reason.ZONE_FULL, {"free_zone_blocks": 3})
FINISHED = LogEntry(3.0, "a", Event.FINISHED)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "decisions.jsonl"


def lines_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written_is_read_again(path: Path) -> None:
    log = DecisionLog(path)
    log.write([ARRIVED, WAITS])
    log.write([FINISHED])
    log.close()
    assert list(read_log(path)) == [ARRIVED, WAITS, FINISHED]


def test_the_first_line_is_a_header_and_empty_fields_are_left_out(path: Path) -> None:
    log = DecisionLog(path)
    log.write([FINISHED])
    log.close()
    header, line = lines_in(path)
    assert header["layerkv_decision_log"] == 1
    assert line == {"time_s": 3.0, "request_id": "a", "event": "finished"}


def test_entries_reach_the_file_once_per_second(path: Path) -> None:
    log = DecisionLog(path)
    log.write([ARRIVED], 100.0)
    assert list(read_log(path)) == [ARRIVED]
    log.write([WAITS], 100.9)
    assert list(read_log(path)) == [ARRIVED]
    log.write([], 101.0)
    assert list(read_log(path)) == [ARRIVED, WAITS]
    log.write([FINISHED], 101.5)
    log.close()
    assert list(read_log(path)) == [ARRIVED, WAITS, FINISHED]


def test_without_a_time_entries_reach_the_file_at_once(path: Path) -> None:
    log = DecisionLog(path)
    log.write([ARRIVED])
    assert list(read_log(path)) == [ARRIVED]
    log.close()


def test_a_closed_log_takes_nothing_more(path: Path) -> None:
    log = DecisionLog(path)
    log.close()
    log.write([ARRIVED])
    log.close()
    assert list(read_log(path)) == []


def test_another_run_of_the_engine_goes_on_in_the_same_file(path: Path) -> None:
    for entry in (ARRIVED, FINISHED):
        log = DecisionLog(path)
        log.write([entry])
        log.close()
    assert list(read_log(path)) == [ARRIVED, FINISHED]


def test_a_file_that_grew_too_large_is_put_aside(path: Path) -> None:
    log = DecisionLog(path, max_bytes=1000)
    for step in range(30):
        log.write([LogEntry(float(step), f"request-{step}", Event.ARRIVED)])
    log.close()
    older, newer = list(read_log(f"{path}.1")), list(read_log(path))
    assert path.stat().st_size < 1200
    assert newer[-1].request_id == "request-29"
    kept = [int(entry.time_s) for entry in [*older, *newer]]
    assert kept == list(range(kept[0], 30))


def test_a_last_line_that_is_not_whole_yet_is_left_out(path: Path) -> None:
    log = DecisionLog(path)
    log.write([ARRIVED])
    log.close()
    with path.open("a") as file:
        file.write('{"time_s": 9.0, "requ')
    assert list(read_log(path)) == [ARRIVED]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "line 1: found ''"),
        ("request,time\n1,2\n", "line 1: found 'request,time'"),
        ('{"requests": []}\n', "line 1: found"),
        ('{"layerkv_decision_log": 2}\n', "line 1: found"),
        ('{"layerkv_decision_log": 1}\nx\n', "line 2: found 'x'"),
        ('{"layerkv_decision_log": 1}\n{"time_s": 1}\n', "line 2: found"),
        ('{"layerkv_decision_log": 1}\n{"time_s": 1, "request_id": "a", "event": "flew"}\n', "line 2: found"),
    ],
)
def test_another_file_is_refused_by_line(path: Path, content: str, found: str) -> None:
    path.write_text(content)
    with pytest.raises(ConfigError) as refusal:
        list(read_log(path))
    assert str(refusal.value).startswith(f"{path}: {found}")
    assert "expected a decision log; write one with decision_log" in str(refusal.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_refused(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"found no readable file \(.+\); expected a decision log"):
        list(read_log(path))


def test_a_log_that_cannot_be_begun_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decision_log: found .+ cannot be written \(No such file or directory\)"):
        DecisionLog(tmp_path / "gone" / "log")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_ends_the_log_and_is_told_once(path: Path) -> None:
    errors: list[str] = []
    log = DecisionLog(path, on_error=errors.append)
    log._file = open("/dev/full", "w")  # noqa: SIM115 (the log gives it up)
    for _ in range(3):
        log.write([ARRIVED])
    log.close()
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
