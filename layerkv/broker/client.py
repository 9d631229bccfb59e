"""An engine's side of the broker: a thread that talks, and what the engine may hold, at hand without waiting.

The engine's own thread never waits for the broker: it asks :meth:`BrokerClient.try_hold`, says what it would like, and
goes on. Without a broker it keeps what it has and may still take what it was allowed, which is its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from layerkv.broker.messages import (
    MOST_BYTES,
    UNDIVIDED,
    VERSION,
    Bye,
    Failed,
    FromEngine,
    Hello,
    Limit,
    Resource,
    State,
    Terms,
    Usage,
    encode,
    from_broker,
)
from layerkv.broker.sockets import connect
from layerkv.errors import BrokerError

FIRST_RETRY_S = 0.1
"""Seconds until the first try to connect again; each later wait is twice as long. Not measured: chosen by judgement."""

LAST_RETRY_S = 5.0
"""Most seconds between two tries. Not measured: chosen by judgement."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Side:
    """One resource: what the broker has said of it, and what the engine has."""

    terms: Terms
    held: int = 0
    limit: int = 0
    revision: int = 0
    need: int = 0
    like: int = 0
    can_leave: int = 0

    def usage(self) -> Usage:
        return Usage(revision=self.revision, held=self.held, need=self.need, like=self.like, can_leave=self.can_leave)


@dataclass(frozen=True, slots=True)
class Introduction:
    """What never changes of an engine; see :class:`layerkv.broker.messages.Hello`."""

    engine: str
    title: str
    pids: tuple[int, ...]
    token_bytes: int
    terms: Mapping[Resource, Terms]
    weight: float = 1.0


class BrokerClient:
    """Connects in a thread of its own from its creation on, as often as it must, until it is closed.

    Threads: all methods may be called from any; none waits for the broker, but for :meth:`wait_for`.
    """

    def __init__(self, path: Path, introduction: Introduction) -> None:
        self._path = path
        self._introduction = introduction
        self._changed = threading.Condition()  # guards all below; nobody waits for anything else while holding it
        self._sides: dict[Resource, _Side] = {
            name: _Side(terms, need=terms.floor) for name, terms in introduction.terms.items()
        }
        self._use = (0.0, 1.0, True)
        self._failed: list[Failed] = []
        self._has_news = False
        self._refusal: str | None = None
        self._is_closed = False
        self.is_connected = False
        """Whether the broker has answered."""
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="layerkv-broker", daemon=True)
        self._thread.start()

    def limit(self, resource: Resource = "device") -> int:
        """Bytes that the engine may hold; :data:`layerkv.broker.messages.UNDIVIDED` if that is its own business."""
        return self._sides[resource].limit

    def held(self, resource: Resource = "device") -> int:
        """Bytes that the engine has said it holds."""
        return self._sides[resource].held

    def try_hold(self, num_bytes: int, resource: Resource = "device") -> bool:
        """Say that the engine holds so much: before it takes memory, and after it has given some back.

        Returns:
            Whether it may. More than before only up to the limit; less always.
        """
        side = self._sides[resource]
        with self._changed:
            if num_bytes > max(side.held, side.limit):
                return False
            if num_bytes != side.held:
                side.held = num_bytes
                self._ring()
        return True

    def ask(
        self,
        *,
        need: int,
        like: int,
        can_leave: int = 0,
        resource: Resource = "device",
        token_rate: float | None = None,
        tpot_s: float | None = None,
        has_requests: bool | None = None,
    ) -> None:
        """Say what the engine needs and would like to hold; the last word holds.

        The rates, and whether it has requests, are the engine's, whatever resource it asks for; None: as before.
        """
        assert min(need, like, can_leave) >= 0, (need, like, can_leave)
        side = self._sides[resource]
        with self._changed:
            before = self._use
            self._use = (
                before[0] if token_rate is None else token_rate,
                before[1] if tpot_s is None else tpot_s,
                before[2] if has_requests is None else has_requests,
            )
            if (need, like, can_leave, self._use) != (side.need, side.like, side.can_leave, before):
                side.need, side.like, side.can_leave = need, like, can_leave
                self._ring()

    def could_not_get(self, num_bytes: int, resource: Resource = "device") -> None:
        """Memory that the engine may hold was not there."""
        with self._changed:
            self._failed.append(Failed(resource=resource, num_bytes=num_bytes))
            self._ring()

    def wait_for(self, num_bytes: int, timeout_s: float, resource: Resource = "device") -> None:
        """Wait, at start-up, until the engine may hold so much.

        Raises:
            BrokerError: it may not yet when the time is up, or the broker has refused it.
        """
        side = self._sides[resource]
        with self._changed:
            self._changed.wait_for(
                lambda: side.limit >= num_bytes or self._refusal is not None or self._is_closed, timeout_s
            )
            if self._refusal is not None:
                raise BrokerError(f"the broker at {self._path} has refused this engine: {self._refusal}")
            if side.limit < num_bytes:
                if self._is_closed:
                    state = "is not asked any more: this side is closed"
                elif self.is_connected:
                    state = "has no memory to spare"
                else:
                    state = "does not answer (start `layerkv broker`)"
                raise BrokerError(f"{num_bytes} bytes of {resource} memory wanted; the broker at {self._path} {state}")

    def close(self) -> None:
        """Say good-bye. Idempotent. What the engine holds is its own until its processes have ended."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            os.eventfd_write(self._bell, 1)
            self._changed.notify_all()
        self._thread.join()
        os.close(self._bell)

    def _ring(self) -> None:
        self._has_news = True
        if not self._is_closed:  # else the bell's number may be another file's by now
            os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        retry_s, told = FIRST_RETRY_S, ""
        while not self._is_closed:
            try:
                with connect(self._path) as connection:
                    try:
                        self._talk(connection)
                    finally:
                        _hang_up(connection)
            except (OSError, BrokerError) as error:
                reason = str(error)
            else:
                return
            if self.is_connected:
                self.is_connected = False
                if self._refusal is None:
                    told, retry_s = "", FIRST_RETRY_S
            if not told or (self._refusal is not None and told != reason):
                logger.warning("no memory broker at %s (%s); this engine keeps what it has", self._path, reason)
                told = reason
            self._sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    def _sleep(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, seconds)

    def _talk(self, connection: socket.socket) -> None:
        unsent: deque[FromEngine] = deque([self._hello()])
        self._has_news = True
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(connection, selectors.EVENT_READ)
                selector.register(self._bell, selectors.EVENT_READ)
                while True:
                    is_last = self._is_closed
                    _send(connection, unsent)
                    if self.is_connected and not unsent:  # while it does not read, what is new is said in one, later
                        unsent += self._news()
                        _send(connection, unsent)
                    if is_last:
                        _send(connection, deque([Bye()] if not unsent else []))
                        return
                    writes = selectors.EVENT_WRITE if unsent else 0
                    selector.modify(connection, selectors.EVENT_READ | writes)
                    for key, events in selector.select():
                        if key.fileobj == self._bell:
                            os.eventfd_read(self._bell)
                        elif events & selectors.EVENT_READ:
                            self._hear(connection)
        except (BrokenPipeError, ConnectionResetError):
            self._hear_last_words(connection)
            raise
        finally:
            with self._changed:
                self._failed[:0] = [message for message in unsent if isinstance(message, Failed)]

    def _hello(self) -> Hello:
        mine = self._introduction
        with self._changed:
            for side in self._sides.values():
                side.revision = 0  # the broker's may have begun anew
            terms = {
                name: msgspec.structs.replace(
                    side.terms,
                    held=side.held,
                    limit=side.terms.ceiling if side.limit == UNDIVIDED else side.limit,
                )
                for name, side in self._sides.items()
            }
        return Hello(
            version=VERSION,
            engine=mine.engine,
            title=mine.title,
            pids=mine.pids,
            token_bytes=mine.token_bytes,
            device=terms["device"],
            host=terms.get("host"),
            weight=mine.weight,
        )

    def _hear(self, connection: socket.socket) -> None:
        packet = connection.recv(MOST_BYTES)
        if not packet:
            raise BrokerError("it has gone")
        message = from_broker(packet)
        with self._changed:
            if isinstance(message, Bye):
                self._refusal = message.reason
                self._changed.notify_all()
                raise BrokerError(message.reason)
            self._keep_to(message)
            self._changed.notify_all()

    def _hear_last_words(self, connection: socket.socket) -> None:
        """The broker has hung up, perhaps with a reason, which is said once: more than that it has gone."""
        with contextlib.suppress(BlockingIOError):
            while True:
                with contextlib.suppress(ConnectionResetError):  # said once; what came before can be read behind it
                    self._hear(connection)

    def _keep_to(self, limit: Limit) -> None:
        self.is_connected, self._refusal = True, None
        side = self._sides.get(limit.resource)
        if side is not None and limit.revision > side.revision:
            side.revision, side.limit = limit.revision, limit.num_bytes
            self._has_news = True

    def _news(self) -> list[FromEngine]:
        with self._changed:
            if not self._has_news:
                return []
            self._has_news = False
            failed, self._failed = self._failed, []
            host = self._sides.get("host")
            token_rate, tpot_s, has_requests = self._use
            state = State(
                device=self._sides["device"].usage(),
                host=host.usage() if host else None,
                token_rate=token_rate,
                has_requests=has_requests,
                tpot_s=tpot_s,
            )
            return [*failed, state]


def _send(connection: socket.socket, messages: deque[FromEngine]) -> None:
    """As many as the broker has room for; the others stay."""
    while messages:
        try:
            connection.send(encode(messages[0]))
        except BlockingIOError:
            return
        messages.popleft()


def _hang_up(connection: socket.socket) -> None:
    """Seen at the other end though a child of this process has the descriptor too."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
