from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layerkv.runtime import announce, checks_books, num_rings, ring, running_engines, runtime_dir

ANNOUNCE_AND_WAIT = """
import os, sys
from layerkv.runtime import announce
assert announce(sys.argv[1]) is not None
print(os.getpid(), flush=True)
sys.stdin.read()
"""
FORK_AFTER_ANNOUNCING = """
import os, sys
from layerkv.runtime import announce
path = announce(sys.argv[1])
child = os.fork()
if child == 0:
    sys.exit(0)
os.waitpid(child, 0)
print(path.exists())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime folder of this test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "layerkv"


def ended_process() -> int:
    """The id of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_folder_is_the_users_own() -> None:
    assert runtime_dir({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/layerkv")
    assert runtime_dir({}).name == f"layerkv-{os.getuid()}"


def test_where_nobody_has_announced_anything_nobody_runs() -> None:
    assert running_engines() == []


def test_an_engine_is_found_with_the_whole_path_of_its_policy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before_s = time.time()
    path = announce("slo.yaml")
    assert path == folder / f"{os.getpid()}.json"
    [engine] = running_engines()
    assert (engine.pid, engine.policy_path) == (os.getpid(), str(tmp_path / "slo.yaml"))
    assert before_s <= engine.started_unix_s <= time.time()


def test_nobody_else_may_look_into_the_folder(folder: Path) -> None:
    announce("slo.yaml")
    assert folder.stat().st_mode & 0o077 == 0


def test_announcing_again_leaves_one_announcement(folder: Path) -> None:
    announce("old.yaml")
    announce("new.yaml")
    assert [Path(engine.policy_path).name for engine in running_engines()] == ["new.yaml"]


def test_an_engine_is_found_until_it_ends(folder: Path) -> None:
    command = [sys.executable, "-c", ANNOUNCE_AND_WAIT, "slo.yaml"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert int(process.stdout.readline()) == process.pid
        assert [engine.pid for engine in running_engines()] == [process.pid]
        process.stdin.close()
        assert process.wait(30) == 0
        assert list(folder.iterdir()) == []


def test_a_forked_child_that_ends_does_not_withdraw_its_parent() -> None:
    command = [sys.executable, "-c", FORK_AFTER_ANNOUNCING, "slo.yaml"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "True\n"


def test_what_a_killed_engine_left_behind_is_ignored_and_removed(folder: Path) -> None:
    announce("slo.yaml")
    stale = folder / f"{ended_process()}.json"
    stale.write_text(json.dumps({"policy_path": "/old.yaml", "started_unix_s": 1.0, "start_ticks": 1}))
    assert [engine.pid for engine in running_engines()] == [os.getpid()]
    assert not stale.exists()


def test_a_process_that_has_got_the_id_of_a_killed_engine_is_not_taken_for_it(folder: Path) -> None:
    path = announce("slo.yaml")
    assert path is not None
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "start_ticks": fields["start_ticks"] - 1}))
    assert running_engines() == []
    assert not path.exists()


def test_a_folder_into_which_others_can_write_is_not_believed(folder: Path) -> None:
    announce("slo.yaml")
    folder.chmod(0o777)
    assert running_engines() == []
    assert announce("slo.yaml") is None


def test_every_ring_is_counted_and_the_announcement_stays_readable(folder: Path) -> None:
    path = announce("slo.yaml")
    assert path is not None
    assert num_rings(path) == 0
    for count in (1, 2, 3):
        ring(path)
        assert num_rings(path) == count
    assert [engine.announcement for engine in running_engines()] == [path]
    assert announce("other.yaml", num_rings=3) == path
    assert num_rings(path) == 3, "announced again it is not taken for rung"


def test_who_is_gone_cannot_be_rung(folder: Path) -> None:
    path = announce("slo.yaml")
    assert path is not None
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        ring(path)
    assert not path.exists()
    with pytest.raises(OSError, match="No such file"):
        num_rings(path)


def test_links_in_the_path_of_a_policy_are_kept(tmp_path: Path) -> None:
    """A Kubernetes ConfigMap: an update makes a new folder, points ``..data`` to it, and removes the old one."""
    volume = tmp_path / "volume"
    (volume / "..2024_a").mkdir(parents=True)
    (volume / "..2024_a" / "slo.yaml").touch()
    (volume / "..data").symlink_to("..2024_a")
    (volume / "slo.yaml").symlink_to("..data/slo.yaml")
    announce(volume / "slo.yaml")
    [engine] = running_engines()
    assert engine.policy_path == str(volume / "slo.yaml")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"policy_path": "/slo.yaml"}'])
def test_a_file_that_is_no_announcement_is_passed_over(folder: Path, content: str) -> None:
    announce("slo.yaml")
    (folder / "1.json").write_text(content)
    (folder / "notes.json").write_text('{"policy_path": "/slo.yaml", "started_unix_s": 1.0, "start_ticks": 1}')
    assert [engine.pid for engine in running_engines()] == [os.getpid()]


def test_engines_are_listed_from_the_oldest_on(folder: Path) -> None:
    announce("slo.yaml")
    start_ticks = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
    fields = {"policy_path": "/slo.yaml", "started_unix_s": 1.0, "start_ticks": start_ticks}
    (folder / f"{os.getppid()}.json").write_text(json.dumps(fields))
    assert [engine.pid for engine in running_engines()] == [os.getppid(), os.getpid()]


def test_without_a_folder_to_write_to_an_engine_runs_unannounced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    assert announce("slo.yaml") is None
    assert running_engines() == []


@pytest.mark.parametrize(("value", "checks"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_books_are_checked_where_the_environment_says_so(value: str | None, checks: bool) -> None:
    assert checks_books({} if value is None else {"LAYERKV_CHECK": value}) is checks
