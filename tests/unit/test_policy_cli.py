"""`layerkv policy`, and how running engines are found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerkv.cli import main
from layerkv.runtime import announce, num_rings, running_engines, runtime_dir

POLICY = """
version: 1
default_class: chat
overload: reject
classes:
  chat: {ttft: 500ms, tpot: 50ms, weight: 4, max_stall: 2s}
  batch: {ttft: 30s, tpot: 200ms, overload: queue}
"""


@pytest.fixture
def policy_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    path = tmp_path / "slo.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def engine(policy_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that announced itself and prints a line whenever its bell rings."""
    program = (
        "import sys, time\n"
        "from layerkv.runtime import announce, num_rings\n"
        "path, heard = announce(sys.argv[1]), 0\nprint('ready', flush=True)\n"
        "while True:\n"
        "    if num_rings(path) > heard: heard += 1; print('again', flush=True)\n"
        "    time.sleep(0.01)\n"
    )
    command = [sys.executable, "-c", program, str(policy_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_check_says_what_each_class_is_promised(policy_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(policy_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "chat (default): first token within 500ms, then 50ms per token, waits of 1s in all at most, never more "
        "than 2s between tokens; weight 4; "
        "when late, refused",
        "batch: first token within 30s, then 200ms per token, waits of 1s in all at most; weight 1; when late, "
        "served behind the others",
    ]


def test_check_says_whose_streams_are_paced(policy_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy_path.write_text(POLICY.replace("tpot: 50ms", "tpot: 50ms, smooth: true"))
    assert main(["policy", "check", str(policy_path)]) == 0
    chat, batch = capsys.readouterr().out.splitlines()
    assert "per token, waits of 1s in all at most, streamed at that pace, never more than" in chat
    assert "pace" not in batch


@pytest.mark.parametrize(
    ("promises", "warnings"),
    [
        (
            "{ttft: 500, tpot: 50}",
            [
                'ttft: found 500 without a unit: 500 s; write 500ms if milliseconds are meant, else "500s"',
                'tpot: found 50 without a unit: 50 s; write 50ms if milliseconds are meant, else "50s"',
                "tpot: found 50s per token, at which nobody reads along; expected at most 10s; leave it out if the "
                "answer is used when it is whole",
            ],
        ),
        (
            "{ttft: 50ms, tpot: 500ms}",
            [
                "tpot: found 500ms, more than ttft (50ms): each token may take longer than the first; expected less; "
                "are the two swapped?"
            ],
        ),
        (
            "{ttft: 30s, max_lag: 5s}",
            ["max_lag: found '5s' where nobody reads along (no tpot): it has no effect; leave it out"],
        ),
        (
            "{ttft: 30s, tpot: 1s, stream: false, max_lag: 0}",
            ["max_lag: found 0 where nobody reads along (stream: false): it has no effect; leave it out"],
        ),
        (
            "{ttft: 30s, tpot: 1s, max_stall: 500ms}",
            [
                "max_stall: found 500ms, less than tpot (1s): every token would have to come sooner than it is due; "
                "expected more"
            ],
        ),
        ("{ttft: 2, tpot: 0.2, max_lag: 0, max_stall: 3}", []),
        ("{ttft: 500s, tpot: 10s, stream: false}", []),
    ],
)
def test_check_warns_of_what_is_allowed_and_hardly_meant(
    policy_path: Path, capsys: pytest.CaptureFixture[str], promises: str, warnings: list[str]
) -> None:
    policy_path.write_text(f"version: 1\ndefault_class: 'a [b]'\nclasses:\n  'a [b]': {promises}\n")
    assert main(["policy", "check", str(policy_path)]) == 0
    promise, *lines = capsys.readouterr().out.splitlines()
    assert promise.startswith("a [b] (default): first token within")
    assert lines == [f"warning: {policy_path}: $.classes['a [b]'].{warning}" for warning in warnings]


@pytest.mark.parametrize(
    ("promises", "pace"),
    [
        ("tpot: 50ms", "then 50ms per token, waits of 1s in all at most"),
        ("tpot: 50ms, max_lag: 0", "then 50ms per token, no wait at most"),
        ("tpot: 50ms, stream: false", "then 50ms per token on average (nobody reads along)"),
        ("weight: 1", "the rest when it is ready (nobody reads along)"),
    ],
)
def test_check_says_who_reads_along_and_how_long_it_may_wait(
    policy_path: Path, capsys: pytest.CaptureFixture[str], promises: str, pace: str
) -> None:
    policy_path.write_text(f"version: 1\ndefault_class: a\nclasses:\n  a: {{ttft: 1s, {promises}}}\n")
    assert main(["policy", "check", str(policy_path)]) == 0
    assert f"first token within 1s, {pace};" in capsys.readouterr().out


def test_check_refuses_what_is_wrong(policy_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy_path.write_text(POLICY.replace("500ms", "soon"))
    assert main(["policy", "check", str(policy_path)]) == 2
    assert "$.classes.chat.ttft" in capsys.readouterr().err


def test_reload_rings_at_a_running_engine(
    engine: subprocess.Popen[str], policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["policy", "reload"]) == 0
    assert engine.stdout is not None
    assert engine.stdout.readline() == "again\n"
    assert f"engine {engine.pid}: told to read {policy_path} again" in capsys.readouterr().out
    assert main(["policy", "reload", "--pid", str(engine.pid)]) == 0
    assert engine.stdout.readline() == "again\n"
    assert main(["policy", "reload", "--pid", "1"]) == 1
    assert "process id 1" in capsys.readouterr().err


def test_an_invalid_policy_is_not_sent(
    engine: subprocess.Popen[str], policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy_path.write_text("version: 2")
    assert main(["policy", "reload"]) == 2
    assert "$.version" in capsys.readouterr().err
    policy_path.write_text(POLICY)
    assert main(["policy", "reload"]) == 0
    assert engine.stdout is not None
    assert engine.stdout.readline() == "again\n", "the first one that it gets"


def test_a_policy_in_a_config_map_that_was_updated_is_found(
    policy_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("..2024_a", "..2024_b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mounted.yaml").write_text(POLICY)
    (tmp_path / "..data").symlink_to("..2024_a")
    mounted = tmp_path / "mounted.yaml"
    mounted.symlink_to("..data/mounted.yaml")
    announcement = announce(mounted)
    assert announcement is not None
    (tmp_path / "..new").symlink_to("..2024_b")
    (tmp_path / "..new").rename(tmp_path / "..data")
    shutil.rmtree(tmp_path / "..2024_a")
    assert main(["policy", "reload"]) == 0
    assert f"told to read {mounted} again" in capsys.readouterr().out
    assert num_rings(announcement) == 1


def test_engines_that_ended_are_forgotten(engine: subprocess.Popen[str]) -> None:
    assert [found.pid for found in running_engines()] == [engine.pid]
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    left = runtime_dir() / f"{engine.pid}.json"
    assert left.exists()
    assert running_engines() == []
    assert not left.exists()


def test_an_engine_that_ends_by_itself_takes_its_announcement_along(policy_path: Path) -> None:
    program = f"from layerkv.runtime import announce; print(announce({str(policy_path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    assert not Path(done.stdout.strip()).exists()


def test_foreign_files_among_announcements_are_left_alone(policy_path: Path) -> None:
    folder = runtime_dir()
    folder.mkdir(parents=True)
    (folder / "notes.json").write_text("hello")
    (folder / "12.json").write_text(json.dumps({"other": 1}))
    assert running_engines() == []
    assert sorted(path.name for path in folder.iterdir()) == ["12.json", "notes.json"]


def test_a_folder_that_cannot_be_written_hides_the_engine_and_harms_nobody(policy_path: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    assert announce(policy_path) is None
