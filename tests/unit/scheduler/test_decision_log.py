from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layerkv.errors import ConfigError
from layerkv.scheduler.decision_log import DecisionLog, read_log, read_runs
from layerkv.scheduler.reasons import Event, LogEntry, Reason

ARRIVED = LogEntry(1.0, "a", Event.ARRIVED, None, {"slo_class": "chat", "ttft_s": 0.5, "prompt_tokens": 900})
WAITS = LogEntry(1.25, "a", Event.WAITS, Reason.ZONE_FULL, {"free_zone_blocks": 3})
FINISHED = LogEntry(3.0, "a", Event.FINISHED)


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "decisions.jsonl"


@pytest.fixture
def errors() -> list[str]:
    return []


def lines_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written_is_read_again(path: Path) -> None:
    log = DecisionLog(path)
    log.write([ARRIVED, WAITS])
    log.write([FINISHED])
    log.close()
    assert read_log(path) == [ARRIVED, WAITS, FINISHED]


def test_the_first_line_is_a_header_and_empty_fields_are_left_out(path: Path) -> None:
    log = DecisionLog(path)
    log.write([FINISHED])
    log.close()
    header, line = lines_in(path)
    assert header["layerkv_decision_log"] == 1
    assert header["started_unix_s"] > 1e9
    assert line == {"time_s": 3.0, "request_id": "a", "event": "finished"}


def test_entries_reach_the_file_once_per_interval(path: Path) -> None:
    clock = Clock()
    log = DecisionLog(path, clock=clock, flush_interval_s=60.0)
    log.write([ARRIVED])
    assert read_log(path) == []
    clock.now_s += 60.0
    log.write([WAITS])
    assert read_log(path) == [ARRIVED, WAITS]
    clock.now_s += 59.0
    log.write([FINISHED])
    assert read_log(path) == [ARRIVED, WAITS]
    log.close()
    assert read_log(path) == [ARRIVED, WAITS, FINISHED]


def test_the_last_entries_of_an_engine_that_falls_idle_come_out_too(path: Path) -> None:
    log = DecisionLog(path, flush_interval_s=0.05)
    log.write([ARRIVED])
    timer = log._timer
    assert timer is not None
    timer.join(30)
    assert read_log(path) == [ARRIVED]
    log.close()


def test_the_end_of_the_process_writes_the_rest(path: Path) -> None:
    program = (
        "import sys\n"
        "from layerkv.scheduler.decision_log import DecisionLog\n"
        "from layerkv.scheduler.reasons import Event, LogEntry\n"
        "log = DecisionLog(sys.argv[1], flush_interval_s=3600)\n"
        "log.write([LogEntry(3.0, 'a', Event.FINISHED)])\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=60)
    assert read_log(path) == [FINISHED]


def test_another_run_of_the_engine_goes_on_in_the_same_file(path: Path) -> None:
    for entry in (ARRIVED, FINISHED):
        log = DecisionLog(path)
        log.write([entry])
        log.close()
    assert list(read_runs(path).values()) == [[ARRIVED], [FINISHED]]
    assert read_log(path) == [ARRIVED, FINISHED]


def test_a_file_that_grew_too_large_is_put_aside(path: Path) -> None:
    clock = Clock()
    log = DecisionLog(path, clock=clock, max_bytes=1000, flush_interval_s=1.0)
    for step in range(30):
        clock.now_s += 1.0
        log.write([LogEntry(float(step), f"request-{step}", Event.ARRIVED)])
    log.close()
    older, newer = read_log(f"{path}.1"), read_log(path)
    assert path.stat().st_size < 1200
    assert newer[-1].request_id == "request-29"
    kept = [int(entry.time_s) for entry in [*older, *newer]]
    assert kept == list(range(kept[0], 30))
    assert read_runs(path).keys() == read_runs(f"{path}.1").keys(), "one run, in two files"


@pytest.mark.parametrize("torn", ['{"time_s": 9.0, "requ', "{", '{"time_s": 1}'[:-1]])
def test_a_line_that_a_crash_cut_off_is_left_out_also_when_a_new_run_goes_on_behind_it(path: Path, torn: str) -> None:
    log = DecisionLog(path)
    log.write([ARRIVED])
    log.close()
    with path.open("a") as file:
        file.write(torn)
    assert read_log(path) == [ARRIVED]
    log = DecisionLog(path)
    log.write([FINISHED])
    log.close()
    assert read_log(path) == [ARRIVED, FINISHED]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("request,time\n1,2\n", "line 1: found no JSON object"),
        ('{"requests": []}\n', "line 1: found no header"),
        ('{"layerkv_decision_log": 2}\n', "line 1: found version 2"),
        ('{"layerkv_decision_log": 1}\nx\n{"time_s": 1}\n', "line 2: found no JSON object"),
        ('{"layerkv_decision_log": 1}\n{"time_s": 1}\n', "line 2: found a line that is no entry (KeyError"),
        (
            '{"layerkv_decision_log": 1}\n{"time_s": 1, "request_id": "a", "event": "flew"}\n',
            "'flew' is not a valid Event",
        ),
    ],
)
def test_another_file_is_refused_by_line(path: Path, content: str, found: str) -> None:
    path.write_text(content)
    with pytest.raises(ConfigError) as refusal:
        read_log(path)
    assert str(refusal.value).startswith(f"{path}: line ")
    assert found in str(refusal.value)
    assert "expected a decision log of version 1; give the file" in str(refusal.value)


def test_a_file_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no readable file \(No such file or directory\); expected a decision"):
        read_log(path)


def test_another_file_is_never_written_to(path: Path, errors: list[str]) -> None:
    path.write_text("dear diary\n")
    log = DecisionLog(path, on_error=errors.append)
    log.write([ARRIVED])
    log.close()
    assert path.read_text() == "dear diary\n"
    assert len(errors) == 1
    assert "another file is there" in errors[0]


def test_a_folder_that_is_gone_turns_the_log_off_and_is_told_once(tmp_path: Path, errors: list[str]) -> None:
    log = DecisionLog(tmp_path / "gone" / "log", on_error=errors.append)
    assert not log.is_on
    log.write([ARRIVED])
    log.flush()
    log.close()
    assert len(errors) == 1
    assert "No such file or directory" in errors[0]
    assert "set decision_log" in errors[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_turns_the_log_off_and_is_told_once(path: Path, errors: list[str]) -> None:
    clock = Clock()
    log = DecisionLog(path, clock=clock, on_error=errors.append)
    log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 (the log closes it)
    for _ in range(3):
        clock.now_s += 10.0
        log.write([ARRIVED])
    assert not log.is_on
    log.close()
    assert len(errors) == 1
    assert "No space left on device" in errors[0]


def test_a_fact_that_json_cannot_say_does_not_reach_the_scheduler(path: Path, errors: list[str]) -> None:
    log = DecisionLog(path, on_error=errors.append)
    log.write([LogEntry(1.0, "a", Event.ARRIVED, None, {"what": object()})])
    log.close()
    assert len(errors) == 1
    assert "not JSON serializable" in errors[0]
