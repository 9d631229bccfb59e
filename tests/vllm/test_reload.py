"""SIGHUP makes all processes of an engine read its SLO policy again. Each test is its own process: handlers stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vllm.forked import Forks

pytestmark = pytest.mark.vllm

OLD = "version: 1\ndefault_class: chat\nclasses: {chat: {ttft: 1s, tpot: 50ms}, batch: {ttft: 3m, tpot: 1s}}\n"
NEW = "version: 1\ndefault_class: chat\nclasses: {chat: {ttft: 2s, tpot: 50ms}, voice: {ttft: 100ms, tpot: 20ms}}\n"

COMMON = """
import os, signal, sys, threading, time
from pathlib import Path
from layerkv.config import load_policy
from layerkv.vllm_plugin.reload import follow_policy
path, new = sys.argv[1:]
old_policy = load_policy(path)
def hang_up():
    os.kill(os.getpid(), signal.SIGHUP)
def wait_for(condition):
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s, "it did not come to hold"
        time.sleep(0.01)
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "slo.yaml"
    path.write_text(OLD)
    return path


Run = Callable[..., None]


@pytest.fixture
def run(forks: Forks) -> Run:
    """Run the program in a process of its own, with the policy file and what is to stand in it next."""

    def run(program: str, policy: Path, new: str = NEW) -> None:
        runtime = str(policy.parent / "run")
        ended = forks.run(COMMON + program, str(policy), new, limit_s=120, XDG_RUNTIME_DIR=runtime)
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]

    return run


def test_the_new_policy_is_in_force_after_the_signal_and_not_before(run: Run, policy: Path) -> None:
    run(
        """
source = follow_policy(path, old_policy)
in_force = source.policy
Path(path).write_text(new)
assert source.policy is in_force
hang_up()
wait_for(lambda: source.policy is not in_force)
assert source.policy == load_policy(path)
assert in_force.classes["batch"].ttft_s == 180, "requests under way keep their class"
""",
        policy,
    )


def test_a_wrong_file_is_logged_and_the_old_policy_stays_until_a_right_one_comes(run: Run, policy: Path) -> None:
    run(
        """
import logging
from layerkv.vllm_plugin import reload
told = []
class Listener(logging.Handler):
    def emit(self, record):
        told.append((record.levelname, record.getMessage()))
reload.logger.addHandler(Listener())
reload.logger.setLevel("INFO")
stays = "the policy is not reloaded, the one in force stays: " + path
source = follow_policy(path, old_policy)
Path(path).write_text("version: 3")
hang_up()
wait_for(lambda: len(told) == 1)
assert told[0][0] == "ERROR" and told[0][1].startswith(stays + ": $.version: found 3"), told
Path(path).unlink()
hang_up()
wait_for(lambda: len(told) == 2)
assert told[1][0] == "ERROR" and told[1][1].startswith(stays + ": found no readable file"), told
assert source.policy is old_policy
Path(path).write_text(new)
hang_up()
wait_for(lambda: len(told) == 3)
assert told[2] == ("INFO", f"the policy is reloaded from {path}: classes chat, voice"), told
assert source.policy == load_policy(path)
""",
        policy,
    )


def test_gate_and_scheduler_in_one_process_follow_the_same_policy(run: Run, policy: Path) -> None:
    run(
        """
from vllm import SamplingParams
from layerkv.errors import ConfigError
from layerkv.vllm_plugin.slo_gate import slo_gate
gate = slo_gate(old_policy, path, for_v2=False)
follow_policy(path, old_policy)
scheduler_source = follow_policy(path, old_policy)
def is_known(name):
    try:
        gate.validate_params(SamplingParams(extra_args={"slo_class": name}))
    except ConfigError as error:
        assert str(error).startswith(f"slo_class: found {name!r}; expected one of the classes: ")
        return False
    return True
assert is_known("batch") and not is_known("voice")
Path(path).write_text(new)
hang_up()
wait_for(lambda: is_known("voice"))
assert not is_known("batch")
assert scheduler_source.policy == load_policy(path)
""",
        policy,
    )


def test_a_handler_that_was_there_before_is_still_called(run: Run, policy: Path) -> None:
    run(
        """
called = []
signal.signal(signal.SIGHUP, lambda number, frame: called.append(number))
source = follow_policy(path, old_policy)
Path(path).write_text(new)
hang_up()
wait_for(lambda: source.policy is not old_policy and called == [signal.SIGHUP])
""",
        policy,
    )


def test_without_a_policy_file_there_is_nothing_to_follow(run: Run, policy: Path) -> None:
    run(
        """
from layerkv.runtime import running_engines
assert follow_policy(None, old_policy).policy is old_policy
assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
assert running_engines() == []
""",
        policy,
    )


def test_a_process_that_follows_outside_its_main_thread_has_no_handler_and_is_found_all_the_same(
    run: Run, policy: Path
) -> None:
    run(
        """
from layerkv.runtime import ring, running_engines
sources = []
thread = threading.Thread(target=lambda: sources.append(follow_policy(path, old_policy)))
thread.start()
thread.join()
assert sources[0].policy is old_policy
assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
Path(path).write_text(new)
[engine] = running_engines()
assert sources[0].policy is old_policy
ring(engine.announcement)
assert sources[0].policy == load_policy(path)
""",
        policy,
    )


def test_the_file_is_read_at_a_ring_and_only_then(run: Run, policy: Path) -> None:
    run(
        """
from layerkv.vllm_plugin import reload
reload.LOOK_S = 0.05
source = follow_policy(path, old_policy)
Path(path).write_text(new)
time.sleep(8 * reload.LOOK_S)
assert source.policy is old_policy
hang_up()
read = source.policy
assert read == load_policy(path), "at once: whoever uses it looks"
time.sleep(8 * reload.LOOK_S)
assert source.policy is read
""",
        policy,
    )


def test_an_announcement_that_was_swept_away_is_put_back(run: Run, policy: Path) -> None:
    run(
        """
from layerkv.runtime import ring, running_engines
source = follow_policy(path, old_policy)
[engine] = running_engines()
ring(engine.announcement)
read = source.policy
engine.announcement.unlink()
assert source.policy is read
wait_for(running_engines)
assert source.policy is read, "it is not taken for rung"
Path(path).write_text(new)
ring(running_engines()[0].announcement)
assert sorted(source.policy.classes) == ["chat", "voice"]
""",
        policy,
    )


def test_where_nobody_can_announce_anything_the_signal_still_counts_in_its_process(run: Run, policy: Path) -> None:
    run(
        """
Path(os.environ["XDG_RUNTIME_DIR"]).write_text("a file where the folder should be")
source = follow_policy(path, old_policy)
Path(path).write_text(new)
hang_up()
assert sorted(source.policy.classes) == ["chat", "voice"]
""",
        policy,
    )


FOLLOWERS = """
import sys, threading, time
from layerkv.config import load_policy
from layerkv.runtime import running_engines
from layerkv.vllm_plugin.reload import follow_policy

def follow(path, told):
    old_policy = load_policy(path)
    source = follow_policy(path, old_policy)
    told.send(len(running_engines()))
    while source.policy is old_policy:
        time.sleep(0.02)
    told.send(sorted(source.policy.classes))

def serve(path, told, in_main_thread):
    if in_main_thread:
        return follow(path, told)
    thread = threading.Thread(target=follow, args=(path, told))
    thread.start()
    thread.join()

def start(context, name, path, in_main_thread=True):
    ear, mouth = context.Pipe(False)
    child = context.Process(name=name, target=serve, args=(path, mouth, in_main_thread), daemon=True)
    child.start()
    return child, ear

def has_begun(ear):
    return ear.poll(60) and ear.recv() == 1  # one engine, whatever it consists of
"""


@pytest.mark.parametrize(
    ("method", "told"), [("spawn", "the parent"), ("fork", "a child"), ("forkserver", "reload"), ("fork", "reload")]
)
def test_whoever_gets_the_word_all_processes_of_the_engine_follow(
    run: Run, policy: Path, tmp_path: Path, method: str, told: str
) -> None:
    (tmp_path / "followers.py").write_text(FOLLOWERS)
    run(
        f"""
import multiprocessing
from layerkv.cli import main
if __name__ == "__main__":
    sys.path.insert(0, {str(tmp_path)!r})
    import followers
    context = multiprocessing.get_context({method!r})
    if {method!r} == "forkserver":  # vLLM runs it before any policy is known
        from multiprocessing import forkserver
        context.set_forkserver_preload(["layerkv.vllm_plugin.reload"])
        forkserver.ensure_running()
    source = follow_policy(path, old_policy)
    names = [("EngineCore_DP0", True), ("ApiServer_0", True), ("ApiServer_1", False)]
    children = [followers.start(context, name, path, in_main) for name, in_main in names]
    assert all(followers.has_begun(ear) for _, ear in children)
    Path(path).write_text(new)
    if {told!r} == "reload":
        assert main(["policy", "reload"]) == 0
    else:
        os.kill(os.getpid() if {told!r} == "the parent" else children[1][0].pid, signal.SIGHUP)
    for child, ear in children:
        assert ear.poll(30) and ear.recv() == ["chat", "voice"]
        child.join(30)
    wait_for(lambda: source.policy is not old_policy)
""",
        policy,
    )


def test_a_process_that_begins_to_follow_after_a_ring_has_not_missed_it(run: Run, policy: Path, tmp_path: Path) -> None:
    (tmp_path / "followers.py").write_text(FOLLOWERS)
    run(
        f"""
import multiprocessing
if __name__ == "__main__":
    sys.path.insert(0, {str(tmp_path)!r})
    import followers
    source = follow_policy(path, old_policy)
    hang_up()
    child, ear = followers.start(multiprocessing.get_context("fork"), "ApiServer_0", path)
    assert followers.has_begun(ear)
    assert ear.poll(30) and ear.recv() == ["batch", "chat"], "what it read may be older than the ring: it reads again"
    child.join(30)
""",
        policy,
    )


def test_an_engine_that_another_program_starts_is_an_engine_of_its_own(run: Run, policy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(OLD)
    run(
        f"""
import subprocess
from layerkv.runtime import running_engines
program = "from layerkv.config import load_policy; from layerkv.vllm_plugin.reload import follow_policy; import sys"
program += "; follow_policy(sys.argv[1], load_policy(sys.argv[1])); print('ready', flush=True); sys.stdin.read()"
follow_policy(path, old_policy)
command = [sys.executable, "-c", program, {str(other)!r}]
with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline().strip() == "ready"
    assert [engine.policy_path for engine in running_engines()] == [path, {str(other)!r}]
    process.stdin.close()
""",
        policy,
    )
