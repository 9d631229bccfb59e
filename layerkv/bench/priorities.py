"""Who gets a CPU first while an engine is measured over HTTP: the server's front end and the load generator.

vLLM's engine core and workers wait for each other in busy loops, so that on a machine with few cores all of them look
full; front end and clients, which need little, are then starved for up to seconds, with any engine. Invariant: all
engines of a case are treated alike. Only threads that are there are changed (each by itself, as Linux does it); what
they start later inherits.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeAlias

import psutil

Priorities: TypeAlias = Literal["realtime", "niceness", "none"]
"""What was done: front end and load generator at real-time priority, or else engine processes at niceness 19."""

REALTIME_PRIORITY = 1
ENGINE_NICENESS = 19
# How vLLM calls its front ends where there are several; a single one is the server's own process.
FRONT_END_TITLE = "APIServer"


def allowed_here() -> Priorities:
    """The best that this process may do, for itself and for what it starts; changes nothing.

    Real-time priority needs a right (CAP_SYS_NICE, or an RLIMIT_RTPRIO of 1); niceness needs none. Elsewhere than on
    Linux, where priorities are not a thread's, nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return "none"
    found: list[Priorities] = ["none"]

    def find() -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), ENGINE_NICENESS)
            found.append("niceness")
        with contextlib.suppress(OSError):
            _make_realtime(0)
            found.append("realtime")

    trial = threading.Thread(target=find)  # it ends with what it was given
    trial.start()
    trial.join()
    return found[-1]


@contextlib.contextmanager
def preferred(priorities: Priorities) -> Iterator[None]:
    """The calling thread, and those that it starts meanwhile, before the engine; it is afterwards what it was.

    Raises:
        OSError: that is not allowed.
    """
    if priorities != "realtime":
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    _make_realtime(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def prioritise(server_pid: int, priorities: Priorities, *, engine_pids: Iterable[int] = ()) -> None:
    """Puts a running server's front end before its engine processes, and before those of `engine_pids`.

    To be called when the server has started its processes, since an engine core would inherit its front end's
    real-time priority; an engine process that has it all the same loses it. May be called again: threads that a front
    end has made of threads that nobody knew of are found then.

    Raises:
        OSError: that is not allowed.
    """
    if priorities == "none":
        return
    fronts, engines = _processes(server_pid)
    for pid in engine_pids:
        fronts_beside, engines_beside = _processes(pid)
        engines += fronts_beside + engines_beside
    for process in engines:
        if priorities == "niceness":
            _each_thread(process, _make_nice)
        else:
            _each_thread(process, _end_realtime)
    if priorities == "realtime":
        for process in fronts:
            _each_thread(process, _make_realtime)


def _processes(root_pid: int) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Front ends, and all other processes, of what has been started as `root_pid`."""
    try:
        root = psutil.Process(root_pid)
        children = root.children(recursive=True)
    except psutil.NoSuchProcess:  # it has ended, and whoever watches it says how
        return [], []
    fronts = [root, *(child for child in children if _is_front_end(child))]
    return fronts, [child for child in children if child not in fronts]


def _is_front_end(process: psutil.Process) -> bool:
    try:
        return FRONT_END_TITLE in "".join(process.cmdline()[:1])
    except psutil.Error:
        return False


def _each_thread(process: psutil.Process, change: Callable[[int], None]) -> None:
    """Changes every thread, those too that others start meanwhile."""
    changed: set[int] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        while fresh := {thread.id for thread in process.threads()} - changed:
            for thread_id in fresh:
                with contextlib.suppress(ProcessLookupError):  # threads end at any time
                    change(thread_id)
            changed |= fresh


def _make_realtime(thread_id: int) -> None:
    os.sched_setscheduler(thread_id, os.SCHED_RR, os.sched_param(REALTIME_PRIORITY))


def _end_realtime(thread_id: int) -> None:
    if os.sched_getscheduler(thread_id) == os.SCHED_RR:
        os.sched_setscheduler(thread_id, os.SCHED_OTHER, os.sched_param(0))


def _make_nice(thread_id: int) -> None:
    os.setpriority(os.PRIO_PROCESS, thread_id, ENGINE_NICENESS)
