"""Priorities of a process tree like a server's: a front end with threads, and an engine with threads below it."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest

from layerkv.bench.priorities import ENGINE_NICENESS, allowed_here, preferred, prioritise

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="priorities are a thread's on Linux alone")
needs_realtime = pytest.mark.skipif(allowed_here() != "realtime", reason="real-time priority is not allowed here")

# A thread beside the main one; a line says that it is there. Whoever reads the end of its input ends.
THREADED = "import sys, threading; threading.Thread(target=sys.stdin.read, daemon=True).start()"
ENGINE = f"{THREADED}; print('up', flush=True); threading.Event().wait()"
FRONT_END = f"""
import subprocess, sys
titles = sys.argv[1:]
children = [subprocess.Popen([title, "-c", {ENGINE!r}], executable=sys.executable, stdin=subprocess.PIPE,
    stdout=subprocess.PIPE) for title in titles]
for child in children:
    child.stdout.readline()
print(*(child.pid for child in children), flush=True)
{THREADED}
sys.stdout.flush()
threading.Event().wait()
"""

Start = Callable[..., tuple[int, list[int]]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a front end with a child for each title; gives their process ids."""
    started: list[subprocess.Popen[str]] = []

    def run(*titles: str) -> tuple[int, list[int]]:
        command = [sys.executable, "-c", FRONT_END, *titles]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process.pid, [int(pid) for pid in process.stdout.readline().split()]

    yield run
    for process in started:
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.kill()
        process.communicate()


def niceness(pid: int) -> set[int]:
    return {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in psutil.Process(pid).threads()}


def policies(pid: int) -> set[int]:
    return {os.sched_getscheduler(thread.id) for thread in psutil.Process(pid).threads()}


def test_by_niceness_every_thread_of_the_engine_gives_way_and_none_of_the_front_end(start: Start) -> None:
    front_end, (engine,) = start("VLLM::EngineCore")
    before = niceness(front_end)
    prioritise(front_end, "niceness")
    assert len(psutil.Process(engine).threads()) > 1
    assert niceness(engine) == {ENGINE_NICENESS}
    assert niceness(front_end) == before != {ENGINE_NICENESS}


def test_further_front_ends_are_no_engines(start: Start) -> None:
    launcher, (front_end, engine) = start("VLLM::APIServer_0", "VLLM::EngineCore")
    prioritise(launcher, "niceness")
    assert niceness(engine) == {ENGINE_NICENESS}
    assert niceness(front_end) == niceness(launcher) != {ENGINE_NICENESS}


def test_a_server_beside_the_engine_gives_way_like_the_engine(start: Start) -> None:
    front_end, _ = start("VLLM::EngineCore")
    beside, (its_child,) = start("worker")
    prioritise(front_end, "niceness", engine_pids=[beside])
    assert niceness(beside) == niceness(its_child) == {ENGINE_NICENESS}


@needs_realtime
def test_by_real_time_every_thread_of_the_front_end_goes_first_and_none_of_the_engine(start: Start) -> None:
    front_end, (engine,) = start("VLLM::EngineCore")
    prioritise(front_end, "realtime")
    assert policies(front_end) == {os.SCHED_RR}
    assert policies(engine) == {os.SCHED_OTHER}


@needs_realtime
def test_an_engine_that_has_inherited_real_time_priority_loses_it(start: Start) -> None:
    with preferred("realtime"):
        front_end, (engine,) = start("VLLM::EngineCore")
    assert policies(engine) == {os.SCHED_RR}
    prioritise(front_end, "realtime")
    assert policies(front_end) == {os.SCHED_RR}
    assert policies(engine) == {os.SCHED_OTHER}


def test_nothing_is_changed_where_nothing_is_allowed(start: Start) -> None:
    front_end, (engine,) = start("VLLM::EngineCore")
    before = [(niceness(pid), policies(pid)) for pid in (front_end, engine)]
    prioritise(front_end, "none")
    assert [(niceness(pid), policies(pid)) for pid in (front_end, engine)] == before


def test_a_server_that_has_ended_is_no_error() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    prioritise(ended.pid, "niceness")


def test_asking_what_is_allowed_changes_nothing_here() -> None:
    before = niceness(os.getpid()), policies(os.getpid())
    assert allowed_here() in ("realtime", "niceness")
    assert (niceness(os.getpid()), policies(os.getpid())) == before


def test_without_the_right_to_real_time_priority_niceness_is_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert allowed_here() == "niceness"


@needs_realtime
def test_the_load_generators_threads_inherit_and_its_own_process_is_afterwards_what_it_was() -> None:
    before, seen = os.sched_getscheduler(0), []
    with preferred("realtime"):
        thread = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
        thread.start()
        thread.join()
        assert os.sched_getscheduler(0) == os.SCHED_RR
    assert seen == [os.SCHED_RR]
    assert os.sched_getscheduler(0) == before


def test_by_niceness_the_load_generator_stays_as_it_is() -> None:
    before = policies(os.getpid()), niceness(os.getpid())
    with preferred("niceness"):
        assert (policies(os.getpid()), niceness(os.getpid())) == before
