"""The policy in force in this process, read again from its file when the engine's bell rings.

Front ends check requests against it, engine cores schedule by it; each process has one. The first process of an engine
announces it (:mod:`layerkv.runtime`), and its children listen to the same announcement: SIGHUP to any of them, or
``layerkv policy reload``, rings there, and whoever uses a policy looks first whether it has rung since. So a change
is in force in all processes of an engine on a machine as soon as the ring is over: however they were started, whoever
got the signal, with or without a main thread of their own. A file that is invalid is refused and the old policy stays.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from vllm.logger import init_logger

from layerkv.config import SloClass, SloPolicy, load_policy
from layerkv.errors import ConfigError
from layerkv.runtime import announce, num_rings, ring, running_engines

logger = init_logger(f"vllm.{__name__}")

LOOK_S = 0.5
"""How often a process that uses no policy just now looks, so that an idle one says in its log what it did. Not
measured: chosen by judgement."""


class _Bell:
    """What this process listens to. Survives a fork: a child listens to the same.

    A file that a cleaner of temporary files took away is put back by the process that it announces; where none can be
    written, the bell rings in this process alone.
    """

    def __init__(self, announcement: Path | None) -> None:
        self._announcement = announcement
        self._own_rings = self._file_rings = 0

    def ring(self) -> None:
        """Called in a signal handler: it may have interrupted code that holds a lock, so it takes none."""
        try:
            if self._announcement is None:
                raise FileNotFoundError
            ring(self._announcement)
        except OSError:
            self._own_rings += 1

    def num_rings(self) -> int:
        if self._announcement is not None:
            with contextlib.suppress(OSError):
                self._file_rings = num_rings(self._announcement)
        return self._own_rings + self._file_rings

    def announce(self, path: str) -> None:
        """Announce this process with its newest policy file, unless another one announced the engine."""
        if self._announcement is None or self._announcement.stem == str(os.getpid()):
            self._announcement = announce(path, self._file_rings)
            if self._announcement is None:
                logger.warning(
                    "the runtime folder cannot be written: `layerkv policy reload` does not find this engine, and "
                    "SIGHUP changes the policy in the process that gets it only; set XDG_RUNTIME_DIR to a folder of "
                    "this user's own"
                )

    def is_lost(self) -> bool:
        """Whether this process's own announcement is gone."""
        path = self._announcement
        return path is not None and path.stem == str(os.getpid()) and not path.exists()


class PolicySource:
    """The policy in force, of one file. Thread-safe."""

    def __init__(self, path: str | None, policy: SloPolicy, bell: _Bell | None = None) -> None:
        self.path = path
        self.require: Callable[[SloPolicy], None] = lambda _: None
        """What a new policy must pass besides: it raises ConfigError where this engine could not keep it."""
        self._policy = policy
        self._bell = bell
        self._heard = 0
        self._reloading = threading.Lock()
        self._past: dict[str, SloClass] = dict(policy.classes)

    @property
    def policy(self) -> SloPolicy:
        """The policy, as of the last ring. Replaced as a whole: read it once per use."""
        if self._bell is not None and self._bell.num_rings() != self._heard:
            with self._reloading:  # whoever comes meanwhile waits for the new one
                heard = self._bell.num_rings()
                if heard != self._heard:
                    self._reload()
                    self._heard = heard
        return self._policy

    def past_class(self, name: object) -> SloClass | None:
        """A class of an earlier policy as it was last: for a request let in under that."""
        return self._past.get(name) if isinstance(name, str) else None

    def put(self, policy: SloPolicy) -> None:
        """From now on this policy is in force, until the bell rings."""
        self._past.update(policy.classes)
        self._policy = policy

    def _reload(self) -> None:
        """Read the file again; nothing changes if it is invalid."""
        assert self.path is not None
        try:
            policy = load_policy(self.path)
            self.require(policy)
        except ConfigError as error:
            logger.error("the policy is not reloaded, the one in force stays: %s", error)
            return
        self.put(policy)
        logger.info("the policy is reloaded from %s: classes %s", self.path, ", ".join(policy.classes))


_sources: dict[str | None, PolicySource] = {}
_bells: list[_Bell] = []
"""The bell of this process, once it follows a file."""
_handled: list[Any] = []
"""What SIGHUP did before, once we handle it."""


def follow_policy(path: str | None, policy: SloPolicy) -> PolicySource:
    """This process's source for a policy file; from the first call on, the process listens to its engine's bell."""
    if path is None:
        return _sources.setdefault(None, PolicySource(None, policy))
    absolute = os.path.abspath(path)
    source = _sources.get(absolute)
    if source is None:
        is_first = not any(_sources)
        if not _bells:
            _bells.append(_Bell(_announcement_of_parent()))
        _bells[-1].announce(absolute)
        source = _sources[absolute] = PolicySource(absolute, policy, _bells[-1])
        if is_first:
            threading.Thread(target=_look_now_and_then, name="layerkv-reload", daemon=True).start()
    if not _handled and threading.current_thread() is threading.main_thread():
        _handled.append(signal.getsignal(signal.SIGHUP))
        signal.signal(signal.SIGHUP, _hang_up)
    return source


def followed_policy() -> SloPolicy | None:
    """The policy in force in this process, for whoever is not told its path; None where layerkv is off.

    A front end follows one policy, that of its engine, from before its first request on.
    """
    source = next(reversed(_sources.values()), None)
    return None if source is None else source.policy


def _announcement_of_parent() -> Path | None:
    """What the process announced that started this one as a part of itself."""
    parent = multiprocessing.parent_process()  # None in a command of its own, whoever ran that
    if parent is None:
        return None
    return next((engine.announcement for engine in running_engines() if engine.pid == parent.pid), None)


def _look_now_and_then() -> None:
    while True:
        time.sleep(LOOK_S)
        try:
            for path, source in list(_sources.items()):
                _ = source.policy
                if path is not None and _bells[-1].is_lost():
                    _bells[-1].announce(path)
        except Exception:  # the edge of this thread, which must hear the next ring too
            logger.exception("reloading the policy failed")


def _hang_up(signum: int, frame: FrameType | None) -> None:
    _bells[-1].ring()
    if callable(before := _handled[-1]):
        before(signum, frame)


def _forget_sources() -> None:
    """In a forked process, which has not its parent's thread, and perhaps a lock that nobody gives back."""
    _sources.clear()


os.register_at_fork(after_in_child=_forget_sources)
