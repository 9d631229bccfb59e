"""One `vllm serve` as a child process: started, watched, and ended whatever happens.

Invariant: after `stop`, nothing that the server started is left. The server has a session of its own, so that Ctrl-C
reaches only the suite, which then ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from layerkv.bench.priorities import Priorities, prioritise
from layerkv.bench.records import EngineFailure
from layerkv.bench.supervise import ended_badly, log_tail
from layerkv.errors import ConfigError

# A limit for what takes 15-60 s here and some minutes with a large model on a GPU: it ends a hang.
START_LIMIT_S = 900.0
STOP_LIMIT_S = 30.0
POLL_S = 0.25


class CpuTimes(msgspec.Struct, frozen=True):
    """CPU seconds since the server started: of its HTTP front end, and of all other processes."""

    front_end_s: float = 0.0
    engine_s: float = 0.0


class Server:
    """A running server; a context manager. `failure` says why it is not running, once it is not.

    `helper` is a server that this one works with: it was started before and is ended after it by whoever did so, counts
    among this one's processes, and this one has failed when it has.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        port: int,
        log_path: Path,
        health_path: str = "/health",
        helper: Server | None = None,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._health_url = f"{self.url}{health_path}"
        self._helper = helper
        self._log_path = log_path
        self._peak_rss_bytes = 0
        self._cpu = CpuTimes()
        self._is_stopped = False
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, limit_s: float = START_LIMIT_S) -> EngineFailure | None:
        """Returns None as soon as the server answers, or why it never will."""
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            failure = self.failure()
            if failure is not None:
                return failure
            with contextlib.suppress(OSError, urllib.error.URLError), _open(self._health_url):
                return None
            time.sleep(POLL_S)
        return EngineFailure(reason=f"was not ready after {limit_s:g} s", log_tail=log_tail(self._log_path))

    def failure(self, *, within_s: float = 0.0) -> EngineFailure | None:
        """Why the server's process has ended, or ends within that time; None while it runs."""
        lost = None if self._helper is None else self._helper.failure()
        if lost is not None:
            return EngineFailure(reason=f"lost the server beside it, which {lost.reason}", log_tail=lost.log_tail)
        try:
            status = self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None
        return ended_badly(status, self._log_path)

    def prioritise(self, priorities: Priorities) -> None:
        """Puts the front end before the engine, and before the helper: see :mod:`layerkv.bench.priorities`."""
        beside = () if self._helper is None else (self._helper._process.pid,)
        prioritise(self._process.pid, priorities, engine_pids=beside)

    def forget_peak(self) -> None:
        """The most resident memory is looked for anew."""
        self._peak_rss_bytes = 0

    def observe(self) -> tuple[CpuTimes, int]:
        """CPU times now, and the most resident memory seen in bytes; the last known ones once it has ended.

        Memory that processes share counts in each of them.
        """
        cpu, rss_bytes = self._look()
        if self._helper is not None:
            helper_cpu, helper_rss_bytes = self._helper._look()
            cpu = CpuTimes(cpu.front_end_s, cpu.engine_s + helper_cpu.front_end_s + helper_cpu.engine_s)
            rss_bytes += helper_rss_bytes
        self._peak_rss_bytes = max(self._peak_rss_bytes, rss_bytes)
        return cpu, self._peak_rss_bytes

    def _look(self) -> tuple[CpuTimes, int]:
        front_end_s = engine_s = 0.0
        rss_bytes = 0
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self._process.pid)
            for process in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    rss_bytes += process.memory_info().rss
                    if process.pid == parent.pid:
                        front_end_s = times.user + times.system
                    else:
                        engine_s += times.user + times.system
            self._cpu = CpuTimes(front_end_s, engine_s)
        return self._cpu, rss_bytes

    def stop(self) -> None:
        """Ends the server as an operator does, and by force if that takes too long or a second Ctrl-C comes.

        Idempotent: the number of a process that is gone may be another's.
        """
        if self._is_stopped:
            return
        try:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)  # killed at once, vLLM would leave shared memory behind
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._is_stopped = True


def _open(url: str) -> contextlib.closing[Any]:
    # Without the environment's proxy: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return contextlib.closing(opener.open(url, timeout=5.0))


def free_port(wanted: int | None = None) -> int:
    """A port that nobody listens on now: `wanted`, if it is given.

    Raises:
        ConfigError: somebody listens on `wanted`.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise ConfigError(
                f"--port: found {wanted} in use or refused ({error.strerror}); expected a free port; "
                "set another one, or leave --port out and one is chosen"
            ) from None
        port: int = listener.getsockname()[1]
        return port
