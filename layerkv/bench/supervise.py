"""Runs one engine process: starts it, follows its progress, and ends it whatever happens.

Runs in the demo's process. Invariant: when `run_child` returns or raises, the child and everything it started
are gone. The child has a session of its own, so that Ctrl-C reaches only this process, which then ends the
child.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO

import msgspec

import layerkv
from layerkv.bench.log_cause import cause_of
from layerkv.bench.records import EngineFailure, EngineRun, EngineSpec, Progress, read_json, write_json
from layerkv.errors import LayerKVError

ENGINE_COMMAND = (sys.executable, "-m", "layerkv.bench.engine_run")
# Longer than any start-up seen (15-60 s, nearly all imports) and any single step.
STALL_LIMIT_S = 180.0
POLL_INTERVAL_S = 0.5
TERMINATION_GRACE_S = 5.0
LOG_TAIL_LINES = 12
LOG_TAIL_LINE_CHARS = 400
CAUSE_CHARS = 240  # of the line above, so that the prefix of a log's line has room beside it


def run_child(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    log_path: Path,
    on_progress: Callable[[Progress], None],
    stall_limit_s: float = STALL_LIMIT_S,
) -> EngineFailure | None:
    """Runs `command` to its end; returns why it failed, or None when it succeeded.

    Its standard error goes to `log_path`. `on_progress` gets every progress line of its standard output. A
    child that makes no progress for `stall_limit_s` is ended and counts as failed.

    Raises:
        KeyboardInterrupt: Ctrl-C; the child has been ended.
    """
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            start_new_session=True,
        )
    try:
        stalled = _follow(process, on_progress, stall_limit_s)
    finally:
        end_child(process)
    if stalled:
        return EngineFailure(reason=f"made no progress for {stall_limit_s:g} s", log_tail=log_tail(log_path))
    return ended_badly(process.returncode, log_path) if process.returncode else None


def ended_badly(status: int, log_path: Path) -> EngineFailure:
    """What a process's exit status and log say of its end; by its own doing, the error that was the cause."""
    tail = log_tail(log_path)
    if status < 0:
        return EngineFailure(reason=f"was killed by {signal.Signals(-status).name}", log_tail=tail)
    reason = f"ended with exit status {status}"
    cause = cause_of(_lines(log_path), num_last=LOG_TAIL_LINES)
    if cause is None:
        return EngineFailure(reason=reason, log_tail=tail)
    if not any(cause[:CAUSE_CHARS] in line for line in tail):
        tail = [_cut(cause, LOG_TAIL_LINE_CHARS), "...", *tail]
    return EngineFailure(reason=f"{reason} ({_cut(cause, CAUSE_CHARS)})", log_tail=tail)


def try_engine(
    spec: EngineSpec,
    folder: Path,
    on_progress: Callable[[Progress], None],
    command: Sequence[str] = ENGINE_COMMAND,
) -> EngineRun | EngineFailure:
    """Drives one engine's load in a process of its own: `command` SPEC OUT.

    Leaves NAME.spec.json, NAME.json (all its records) and NAME.log in `folder`.
    """
    spec_path, run_path, log_path = (folder / f"{spec.name}.{end}" for end in ("spec.json", "json", "log"))
    write_json(spec, spec_path)
    failure = run_child(
        [*command, str(spec_path), str(run_path)], env=child_env(), log_path=log_path, on_progress=on_progress
    )
    if failure is not None:
        return failure
    try:
        return read_json(run_path, EngineRun)
    except (OSError, msgspec.DecodeError) as error:
        return EngineFailure(reason=f"left no readable result ({error})", log_tail=log_tail(log_path))


def run_engine(spec: EngineSpec, folder: Path, on_progress: Callable[[Progress], None]) -> EngineRun:
    """The same for those who can do nothing without its run.

    Raises:
        LayerKVError: the engine failed; the message has the last lines of its log.
    """
    outcome = try_engine(spec, folder, on_progress)
    if isinstance(outcome, EngineFailure):
        raise LayerKVError(f"{spec.name} {outcome.reason}: " + "\n".join(outcome.log_tail))
    return outcome


def child_env(defaults: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """This environment over `defaults`, with this very layerkv importable, installed or in a checkout."""
    package_parent = str(Path(layerkv.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    return {**defaults, **os.environ, "PYTHONPATH": path}


def log_tail(log_path: Path) -> list[str]:
    """The last lines of a log that say something, each cut to a readable length."""
    return [line[:LOG_TAIL_LINE_CHARS] for line in _lines(log_path)[-LOG_TAIL_LINES:]]


def _lines(log_path: Path) -> list[str]:
    return [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]


def _cut(text: str, num_chars: int) -> str:
    return text if len(text) <= num_chars else f"{text[: num_chars - 4].rsplit(' ', 1)[0].rstrip(' .,;')} ..."


def _follow(process: subprocess.Popen[bytes], on_progress: Callable[[Progress], None], stall_limit_s: float) -> bool:
    """Reads progress until the child's output ends, which is at its exit; True if it stalled instead."""
    assert process.stdout is not None
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
    most_progress = -1
    advanced_s = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=POLL_INTERVAL_S)
        except queue.Empty:
            line = b""
        if line is None:
            process.wait()
            return False
        progress = _parse(line)
        if progress is not None:
            on_progress(progress)
            if progress.progress > most_progress:
                most_progress = progress.progress
                advanced_s = time.monotonic()
        if time.monotonic() - advanced_s > stall_limit_s:
            return True


def _pump(stream: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _parse(line: bytes) -> Progress | None:
    try:
        return msgspec.json.decode(line, type=Progress)
    except msgspec.DecodeError:
        return None


def end_child(process: subprocess.Popen[bytes]) -> None:
    """Ends it and all that it started, by force if it has to be; nothing where it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(TERMINATION_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
