"""SIGHUP makes a process read its SLO policy again. Each test is a process of its own: handlers stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.engines_in_turn import ROOT

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


def run(program: str, policy: Path, new: str = NEW) -> None:
    """Run the program in a process of its own, with the policy file and what is to stand in it next."""
    command = [sys.executable, "-c", COMMON + program, str(policy), new]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]


def test_the_new_policy_is_in_force_after_the_signal_and_not_before(policy: Path) -> None:
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


def test_a_wrong_file_is_logged_and_the_old_policy_stays_until_a_right_one_comes(policy: Path) -> None:
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


def test_gate_and_scheduler_in_one_process_follow_the_same_policy(policy: Path) -> None:
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


def test_a_handler_that_was_there_before_is_still_called(policy: Path) -> None:
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


def test_without_a_policy_file_and_outside_the_main_thread_no_handler_is_installed(policy: Path) -> None:
    run(
        """
assert follow_policy(None, old_policy).policy is old_policy
assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
sources = []
thread = threading.Thread(target=lambda: sources.append(follow_policy(path, old_policy)))
thread.start()
thread.join()
assert sources[0].policy is old_policy
assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
from layerkv.vllm_plugin.reload import is_listening
assert not is_listening()
""",
        policy,
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_front_end_passes_the_signal_on_to_engine_cores_and_to_nobody_else(
    policy: Path, tmp_path: Path, method: str
) -> None:
    module = tmp_path / "engine_core_child.py"
    module.write_text(
        """
import signal
from layerkv.config import load_policy
from layerkv.vllm_plugin.reload import follow_policy

def serve(path, old_policy, told):
    source = follow_policy(path, old_policy)
    told.send("ready")
    while source.policy.classes.keys() == old_policy.classes.keys():
        signal.sigtimedwait([], 0.02)
    told.send(sorted(source.policy.classes))

def be_other(told):
    signal.signal(signal.SIGHUP, lambda number, frame: told.send("hung up"))
    told.send("ready")
    while True:
        signal.pause()
"""
    )
    run(
        f"""
import multiprocessing
if __name__ == "__main__":
    sys.path.insert(0, {str(tmp_path)!r})
    import engine_core_child
    context = multiprocessing.get_context({method!r})
    source = follow_policy(path, old_policy)
    core_ear, core_mouth = context.Pipe(False)
    other_ear, other_mouth = context.Pipe(False)
    core = context.Process(
        name="EngineCore_DP0", target=engine_core_child.serve, args=(path, old_policy, core_mouth), daemon=True
    )
    other = context.Process(name="Worker", target=engine_core_child.be_other, args=(other_mouth,), daemon=True)
    core.start(), other.start()
    assert core_ear.poll(60) and core_ear.recv() == "ready"
    assert other_ear.poll(60) and other_ear.recv() == "ready"
    Path(path).write_text(new)
    hang_up()
    assert core_ear.poll(30) and core_ear.recv() == ["chat", "voice"]
    wait_for(lambda: source.policy is not old_policy)
    assert not other_ear.poll(0.2)
    core.join(30)
    other.kill()
""",
        policy,
    )
