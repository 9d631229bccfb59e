"""Programs that need vLLM, each in a fork of one process that has imported it and done nothing else.

Importing vLLM takes several times as long as most of what tests do in a process of their own. A fork has the imports
for nothing and is otherwise fresh: no plugin is loaded, no engine was made, and what it does ends with it. Two run at
a time, since an engine in its own process keeps one core busy, or one where tests run in two processes; others wait.

`python -m tests.vllm.forked` is that process. It reads a :class:`Program` as JSON from each line of its standard
input, and for each that has ended writes a line to its standard output: its number and exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from collections import deque
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
AT_ONCE = 1 if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1 else 2
IMPORTED = (
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.worker.cpu_worker",
)
"""What an engine on a CPU imports; of layerkv nothing, which vLLM loads when it is asked for a configuration."""


@dataclass(frozen=True)
class Program:
    """A program as `python -c CODE ARGUMENTS` runs it, and what for: files for its two outputs, and most seconds."""

    number: int
    code: str
    arguments: list[str]
    environment: dict[str, str]
    out: str
    err: str
    limit_s: float


@dataclass(frozen=True)
class Ended:
    """A program that has ended; negative statuses are signals, as in :mod:`subprocess`."""

    returncode: int
    out_path: Path
    err_path: Path

    @property
    def stdout(self) -> str:
        return self.out_path.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.err_path.read_text(errors="replace")


class Forks:
    """The process with the imports; a context manager. Whatever still runs when it ends, ends with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._running: list[tuple[Future[Ended], Path, Path]] = []
        self._log_path = folder / "imports.log"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.vllm.forked"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._hear, daemon=True).start()

    def start(
        self, code: str, *arguments: str, log_path: Path | None = None, limit_s: float = 600.0, **environment: str
    ) -> Future[Ended]:
        """Have a program run in the repository's root, for no longer than ``limit_s``.

        Both its outputs go to ``log_path`` if that is given. ``environment`` is added to this process's.
        """
        ended: Future[Ended] = Future()
        with self._lock:
            number = len(self._running)
            out, err = (log_path or self._folder / f"{number}.{name}" for name in ("out", "err"))
            self._running.append((ended, out, err))
            program = Program(number, code, list(arguments), {**os.environ, **environment}, str(out), str(err), limit_s)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asdict(program)) + "\n")
            self._process.stdin.flush()
        return ended

    def run(self, code: str, *arguments: str, **more: Any) -> Ended:
        """Run a program to its end; see :meth:`start`."""
        return self.start(code, *arguments, **more).result()

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            number, status = json.loads(line)
            ended, out, err = self._running[number]
            ended.set_result(Ended(status, out, err))
        reason = f"the process with the imports has ended:\n{self._log_path.read_text(errors='replace')[-4000:]}"
        for ended, _, _ in self._running:
            if not ended.done():
                ended.set_exception(RuntimeError(reason))


def run_module(name: str) -> str:
    """The program that does what `python -m NAME` does."""
    return f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


# In that process ------------------------------------------------------------------------------------------------------


def _become(program: Program) -> int:
    """In the fork: run the program; its exit status."""
    for descriptor, path in ((1, program.out), (2, program.err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where tests run under nohup
    os.environ.clear()
    os.environ.update(program.environment)
    sys.argv = ["-c", *program.arguments]
    main = types.ModuleType("__main__")
    main.__spec__ = None
    sys.modules["__main__"] = main
    status = 1
    try:
        exec(compile(program.code, "<string>", "exec"), main.__dict__)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does at its end
        atexit._run_exitfuncs()
    return status


def _fork(program: Program, answers: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.close(answers)
        no_input = os.open(os.devnull, os.O_RDONLY)
        os.dup2(no_input, 0)
        status = _become(program)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _serve(given: IO[bytes], answers: int) -> None:
    running: dict[int, tuple[Program, int, float]] = {}  # by the descriptor that tells of the end
    waiting: deque[Program] = deque()
    while True:
        while waiting and len(running) < AT_ONCE:
            program = waiting.popleft()
            pid = _fork(program, answers)
            running[os.pidfd_open(pid)] = (program, pid, time.monotonic() + program.limit_s)
        now_s = time.monotonic()
        wait_s = min((end_s - now_s for _, _, end_s in running.values()), default=None)
        ready, _, _ = select.select([given, *running], [], [], wait_s and max(wait_s, 0.0))
        for descriptor in [each for each in ready if each is not given]:
            program, pid, _ = running.pop(descriptor)
            os.close(descriptor)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(answers, f"{json.dumps([program.number, status])}\n".encode())
        for _, pid, end_s in running.values():
            if end_s <= time.monotonic():
                os.kill(pid, signal.SIGKILL)
        if given in ready:
            line = given.readline()
            if not line:
                return
            waiting.append(Program(**json.loads(line)))


def _import_all() -> None:
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports print goes to the log
    _import_all()
    assert not any(name.startswith("layerkv") for name in sys.modules), "a fork would not be fresh"
    _serve(os.fdopen(os.dup(0), "rb", buffering=0), answers)
