"""The policy in force in this process, read again from its file on SIGHUP.

The front end checks requests against it, the engine core schedules by it; each process has one. The front end passes
the signal on to the engine cores that it started. A file that is invalid is refused and the old policy stays.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from vllm.logger import init_logger

from layerkv.config import SloPolicy, load_policy
from layerkv.errors import ConfigError
from layerkv.runtime import catches_signal

logger = init_logger(f"vllm.{__name__}")

ENGINE_CORE = "EngineCore"
"""What vLLM names its engine-core processes; workers must not get the signal, they do not handle it."""


class PolicySource:
    """The policy in force. ``policy`` is replaced as a whole: read it once per use."""

    def __init__(self, path: str | None, policy: SloPolicy) -> None:
        self.path = path
        self.policy = policy
        self.require: Callable[[SloPolicy], None] = lambda _: None
        """What a new policy must pass besides: it raises ConfigError where this engine could not keep it."""

    def reload(self) -> bool:
        """Read the file again; False, and nothing changes, if it is invalid or there is none."""
        if self.path is None:
            return False
        try:
            policy = load_policy(self.path)
            self.require(policy)
        except ConfigError as error:
            logger.error("the policy is not reloaded, the one in force stays: %s", error)
            return False
        self.policy = policy
        logger.info("the policy is reloaded from %s: classes %s", self.path, ", ".join(policy.classes))
        return True


@dataclass
class _Bell:
    """What the SIGHUP handler of a process needs: where to write, and whom to call besides."""

    writer: int
    before: Any


_sources: dict[str | None, PolicySource] = {}
_bells: list[_Bell] = []
"""The bell of this process, once it listens."""


def follow_policy(path: str | None, policy: SloPolicy) -> PolicySource:
    """This process's source for a policy file, made at the first call, which also begins to listen to SIGHUP."""
    absolute = None if path is None else os.path.abspath(path)
    source = _sources.get(absolute)
    if source is None:
        source = _sources[absolute] = PolicySource(absolute, policy)
    if absolute is not None and not is_listening():
        _listen()
    return source


def is_listening() -> bool:
    """Whether SIGHUP reloads policies in this process. If not, it may end the process."""
    return bool(_bells)


def _listen() -> None:
    if threading.current_thread() is not threading.main_thread():
        logger.debug("SIGHUP does not reload the policy here: this is not the main thread")
        return
    # The handler only writes a byte: it may have interrupted code that holds a lock which logging or threads need.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_reload_at_every_ring, args=(reader,), name="layerkv-reload", daemon=True).start()
    _bells.append(_Bell(writer, signal.getsignal(signal.SIGHUP)))
    signal.signal(signal.SIGHUP, _hang_up)


def _reload_at_every_ring(reader: int) -> None:
    while os.read(reader, 4096):
        try:
            _reload_all()
        except Exception:  # the edge of this thread, which must hear the next ring too
            logger.exception("reloading the policy failed")


def _forget_parent() -> None:
    """In a forked process, which has not its parent's thread: the signal does what it did before ours."""
    if _bells:
        signal.signal(signal.SIGHUP, _bells[-1].before)
    _bells.clear()
    _sources.clear()


os.register_at_fork(after_in_child=_forget_parent)


def _hang_up(signum: int, frame: FrameType | None) -> None:
    bell = _bells[-1]
    with contextlib.suppress(BlockingIOError):  # so many rings wait already that one more says nothing
        os.write(bell.writer, b"!")
    if callable(bell.before):
        bell.before(signum, frame)


def _reload_all() -> None:
    for source in list(_sources.values()):
        source.reload()
    for child in multiprocessing.active_children():
        # One that is still starting has no handler yet and would end; it reads the new file anyway.
        if child.name.startswith(ENGINE_CORE) and child.pid is not None and catches_signal(child.pid, signal.SIGHUP):
            os.kill(child.pid, signal.SIGHUP)
