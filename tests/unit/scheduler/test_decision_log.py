"""The decision log: what is written is read back, and no disk or file can do harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerkv.errors import ConfigError
from layerkv.scheduler.decision_log import DecisionLog, read_log, require_writable
from layerkv.scheduler.reasons import Event, LogEntry, Reason

ENTRIES = [
    LogEntry(1.0, "a", Event.ARRIVED, None, {"slo_class": "chat", "ttft_s": 0.5}),
    LogEntry(1.25, "a", Event.WAITS, Reason.ZONE_FULL, {"free_blocks": 3}),
    LogEntry(2.0, "a", Event.FINISHED),
]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log")
    log.write(ENTRIES[:2], 1.0)
    log.write(ENTRIES[2:], 1.1)
    log.close()
    log.write(ENTRIES)  # closed: does nothing
    assert list(read_log(tmp_path / "log")) == ENTRIES


def test_a_second_engine_appends_and_both_are_read(tmp_path: Path) -> None:
    for part in (ENTRIES[:1], ENTRIES[1:]):
        log = DecisionLog(tmp_path / "log")
        log.write(part)
        log.close()
    assert list(read_log(tmp_path / "log")) == ENTRIES


def test_entries_reach_the_disk_about_once_per_second(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log")
    log.write(ENTRIES[:1], 10.0)
    log.write(ENTRIES[1:2], 10.5)
    assert len(list(read_log(tmp_path / "log"))) == 1
    log.write(ENTRIES[2:], 11.1)
    assert len(list(read_log(tmp_path / "log"))) == 3
    log.close()


def test_a_large_log_is_begun_anew_and_the_old_one_kept(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log", max_bytes=200)
    log.write(ENTRIES)
    log.write(ENTRIES[:1])
    log.close()
    assert list(read_log(tmp_path / "log.1")) == ENTRIES
    assert list(read_log(tmp_path / "log")) == ENTRIES[:1]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log")
    log.write(ENTRIES)
    log.close()
    path = tmp_path / "log"
    path.write_text(path.read_text()[:-10])
    assert list(read_log(path)) == ENTRIES[:2]


@pytest.mark.parametrize("text", ["", "hello\n", '{"other": 1}\n', "[1]\n"])
def test_a_foreign_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"line 1: found .* expected a decision log; write one with decision_log"):
        list(read_log(path))


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"layerkv_decision_log": 1}\n{"time_s": 1, "request_id": "a", "event": "danced"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        list(read_log(path))
    with pytest.raises(ConfigError, match="no readable file"):
        list(read_log(tmp_path / "none"))


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decision_log: .*cannot be written"):
        DecisionLog(tmp_path / "no" / "folder")


def test_a_disk_that_fills_ends_the_log_with_one_message() -> None:
    messages: list[str] = []
    log = DecisionLog("/dev/full", on_error=messages.append)
    log.write(ENTRIES)
    log.write(ENTRIES)
    log.close()
    assert len(messages) == 1
    assert "/dev/full ends here" in messages[0]


def test_a_line_in_which_an_engine_was_killed_is_left_out_when_the_next_one_goes_on_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        log = DecisionLog(path)
        log.write(ENTRIES)
        log.close()
        with path.open("a") as file:
            file.write('{"time_s": 9.0, "requ')
    assert list(read_log(path)) == [*ENTRIES, *ENTRIES]


def test_another_file_is_never_written_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("dear diary\n")
    with pytest.raises(ConfigError, match="another file is there"):
        DecisionLog(path)
    assert path.read_text() == "dear diary\n"


def test_a_place_for_a_log_is_checked_without_writing_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    require_writable(path)
    assert not path.exists()
    DecisionLog(path).close()
    written = path.read_bytes()
    require_writable(path)
    assert path.read_bytes() == written
    empty = tmp_path / "empty"
    empty.touch()
    require_writable(empty)


def test_a_place_where_no_log_can_be_is_refused_as_when_it_is_opened(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not a log\n")
    for path in (other, tmp_path, tmp_path / "no" / "log.jsonl"):
        with pytest.raises(ConfigError) as checked:
            require_writable(path)
        with pytest.raises(ConfigError) as opened:
            DecisionLog(path)
        assert str(checked.value) == str(opened.value)
