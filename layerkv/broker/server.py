"""The broker's process: sockets and ends of processes in, limits out. It decides nothing (:mod:`layerkv.core.sharing`).

One thread. Whatever a peer sends ends at most its own connection; an engine keeps what it has until its processes end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from layerkv.broker.members import Member, Members
from layerkv.broker.messages import (
    MOST_BYTES,
    UNDIVIDED,
    Bye,
    Entry,
    Failed,
    FromBroker,
    FromEngine,
    Hello,
    Limit,
    Memory,
    Resource,
    Roster,
    Share,
    State,
    Terms,
    Usage,
    Watch,
    encode,
    from_engine,
)
from layerkv.broker.sockets import has_hung_up, peer
from layerkv.core.sharing import Wish, token_pressure
from layerkv.core.sharing_ledger import GivenLimit, SharingLedger
from layerkv.errors import BrokerError

SETTLE_EVERY_S = 0.1
"""Seconds after which limits are looked at again though nobody said anything, since needs are forgotten with time. Not
measured: chosen by judgement: a third of the time between falls of limits."""

ENGINES_A_ROSTER = 16
"""Engines that an observer is told of in one message. Derived: with the longest names they fit one."""

MOST_PIDS_SHOWN = 64
"""Processes of one engine that an observer is told of. Derived: so is that."""

_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Broker:
    """Listens at ``path`` from its creation on, until it is closed.

    Raises:
        BrokerError: another broker has that path, or it cannot be made.
    """

    def __init__(
        self,
        path: Path,
        capacity: int,
        host_capacity: int | None = None,
        *,
        log: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._log, self._clock = path, log, clock
        self._user = os.getuid()
        self.ledgers: dict[Resource, SharingLedger] = {"device": SharingLedger(capacity)}
        if host_capacity is not None:
            self.ledgers["host"] = SharingLedger(host_capacity)
        self._selector = selectors.DefaultSelector()
        self._connections: dict[str, socket.socket] = {}
        self._engine_of: dict[socket.socket, str | None] = {}  # None until it has said hello
        with contextlib.ExitStack() as undo:
            self._lock = _lock(path)
            undo.callback(os.close, self._lock)
            self._members = Members(path.with_name(path.name + ".state"))
            undo.callback(self._members.close)
            self._listener = _listen(path)
            undo.pop_all()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        for member in self._members:
            self._watch(member)
            for ledger in self.ledgers.values():
                ledger.expect(member.engine)

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until asked to stop."""
        while not should_stop():
            self.step(SETTLE_EVERY_S)

    def step(self, timeout_s: float) -> None:
        """Wait for something to happen, deal with it, and tell every engine its limit where that changed."""
        for key, _ in self._selector.select(timeout_s):
            if self._selector.get_map().get(key.fd) == key:  # else it went away with what happened before it
                key.data(key.fileobj)
        for resource, ledger in self.ledgers.items():
            for engine, limit in ledger.settle(self._clock()).items():
                self._tell(engine, resource, limit)

    def close(self) -> None:
        """Stop listening. Engines keep what they have, and the next broker at this path knows of them."""
        for connection in list(self._engine_of):
            self._drop(connection)
        self._selector.close()
        self._listener.close()
        self._path.unlink(missing_ok=True)
        self._members.close()
        os.close(self._lock)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        self._engine_of[connection] = None
        pid, user = peer(connection)
        if user != self._user:
            self._refuse(connection, f"this broker serves user {self._user}, and not {user}")
        elif pid == 0:
            self._refuse(connection, "the engine's process cannot be seen from here (another PID namespace)")
        else:
            self._selector.register(connection, selectors.EVENT_READ, self._receive)

    def _receive(self, connection: socket.socket) -> None:
        try:
            packet, _, flags, _ = connection.recvmsg(MOST_BYTES)
        except OSError:
            packet, flags = b"", 0
        if not packet:
            self._drop(connection)
            return
        try:
            if flags & socket.MSG_TRUNC:
                raise BrokerError(f"a message has at most {MOST_BYTES} bytes")
            self._handle(connection, from_engine(packet))
        except (BrokerError, ValueError) as error:
            self._refuse(connection, str(error))

    def _handle(self, connection: socket.socket, message: FromEngine) -> None:
        engine = self._engine_of[connection]
        if isinstance(message, Hello):
            self._welcome(connection, message)
        elif isinstance(message, Watch):
            self._send(connection, self._roster(message.after))
        elif engine is None:
            raise BrokerError("an engine says hello first")
        elif isinstance(message, State):
            self._note(engine, message)
        elif isinstance(message, Failed):
            if message.resource in self.ledgers:
                self.ledgers[message.resource].lower_capacity(message.num_bytes, self._clock())
                self._log(f"{engine}: {message.num_bytes} bytes of {message.resource} memory are somebody else's")
        else:
            self._drop(connection)

    def _welcome(self, connection: socket.socket, hello: Hello) -> None:
        if self._engine_of[connection] is not None:
            raise BrokerError("an engine says hello once")
        pid, _ = peer(connection)
        if pid not in hello.pids:
            raise BrokerError(f"process {pid} is none of those that it named (is it in a container?)")
        before = self._members.get(hello.engine)
        if before is not None and not before.processes.pids & set(hello.pids):
            raise BrokerError(f"an engine named {hello.engine} is here already")
        old = self._connections.get(hello.engine)
        if old is not None and not has_hung_up(old):
            raise BrokerError(f"an engine named {hello.engine} is connected already")
        for resource, ledger in self.ledgers.items():
            if terms := _terms(hello, resource):
                try:
                    ledger.check_join(hello.engine, _first_wish(terms), terms.limit)
                except ValueError as error:
                    raise BrokerError(f"{resource} memory: {error}") from None
        member = self._members.admit(hello)
        if before is not None:
            self._unwatch(before)
            before.processes.close()
        self._watch(member)
        self._join(hello)
        if old is not None:
            self._drop(old)
        self._connections[hello.engine], self._engine_of[connection] = connection, hello.engine
        for resource, ledger in self.ledgers.items():
            if limit := ledger.limit(hello.engine):
                self._tell(hello.engine, resource, limit)
        if hello.host is not None and "host" not in self.ledgers:
            self._tell(hello.engine, "host", GivenLimit(revision=1, num_bytes=UNDIVIDED))
        self._log(f"{hello.engine} ({hello.title}): here with {len(hello.pids)} processes")

    def _join(self, hello: Hello) -> None:
        for resource, ledger in self.ledgers.items():
            if terms := _terms(hello, resource):
                ledger.join(hello.engine, _first_wish(terms), terms.limit)
            else:
                ledger.leave(hello.engine)

    def _leave(self, engine: str) -> None:
        for ledger in self.ledgers.values():
            ledger.leave(engine)

    def _note(self, engine: str, state: State) -> None:
        member = self._members.get(engine)
        assert member is not None
        assert member.hello is not None
        weight = token_pressure(state.token_rate, member.hello.token_bytes, state.tpot_s, member.hello.weight)
        for resource, ledger in self.ledgers.items():
            usage: Usage | None = state.device if resource == "device" else state.host
            if usage is not None and (before := ledger.wish(engine)) is not None:
                wish = replace(
                    before,
                    held=usage.held,
                    need=usage.need,
                    like=usage.like,
                    can_leave=usage.can_leave,
                    weight=weight,
                    has_requests=state.has_requests,
                )
                ledger.report(engine, wish, usage.revision, self._clock())

    def _roster(self, after: str) -> Roster:
        engines = sorted((member for member in self._members if member.engine > after), key=lambda one: one.engine)
        memory = {name: Memory(capacity=one.capacity, committed=one.committed) for name, one in self.ledgers.items()}
        return Roster(
            device=memory["device"],
            host=memory.get("host"),
            engines=[self._entry(member) for member in engines[:ENGINES_A_ROSTER]],
            is_last=len(engines) <= ENGINES_A_ROSTER,
        )

    def _entry(self, member: Member) -> Entry:
        return Entry(
            engine=member.engine,
            title=member.hello.title if member.hello else "",
            pids=sorted(member.processes.pids)[:MOST_PIDS_SHOWN],
            is_connected=member.engine in self._connections,
            device=self._share(member.engine, "device"),
            host=self._share(member.engine, "host"),
        )

    def _share(self, engine: str, resource: Resource) -> Share | None:
        ledger = self.ledgers.get(resource)
        if ledger is None or (wish := ledger.wish(engine)) is None:
            return None
        return Share(
            segment_bytes=wish.segment_bytes,
            floor=wish.floor,
            ceiling=wish.ceiling,
            limit=ledger.limits[engine],
            held=wish.held,
            need=wish.need,
            like=wish.like,
        )

    def _tell(self, engine: str, resource: Resource, limit: GivenLimit) -> None:
        if connection := self._connections.get(engine):
            self._send(connection, Limit(resource=resource, revision=limit.revision, num_bytes=limit.num_bytes))

    def _send(self, connection: socket.socket, message: FromBroker | Roster) -> None:
        try:
            connection.send(encode(message))
        except OSError:  # it is gone, or reads nothing: when it is back it is told again
            self._drop(connection)

    def _refuse(self, connection: socket.socket, reason: str) -> None:
        self._log(f"refused {self._engine_of.get(connection) or 'a connection'}: {reason}")
        self._send(connection, Bye(reason=reason[:1024]))
        self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        if connection not in self._engine_of:
            return
        engine = self._engine_of.pop(connection)
        if engine is not None and self._connections.get(engine) is connection:
            del self._connections[engine]
        if connection.fileno() in self._selector.get_map():
            self._selector.unregister(connection)
        connection.close()

    def _watch(self, member: Member) -> None:
        for descriptor in member.processes.descriptors:
            self._selector.register(descriptor, selectors.EVENT_READ, lambda fd: self._ended(member, fd))

    def _unwatch(self, member: Member) -> None:
        for descriptor in member.processes.descriptors:
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)

    def _ended(self, member: Member, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        if not member.processes.have_ended():
            return
        self._unwatch(member)
        if connection := self._connections.get(member.engine):
            self._drop(connection)
        self._members.remove(member.engine)
        self._leave(member.engine)
        self._log(f"{member.engine}: all its processes have ended")


def _terms(hello: Hello, resource: Resource) -> Terms | None:
    return hello.device if resource == "device" else hello.host


def _first_wish(terms: Terms) -> Wish:
    return Wish(terms.segment_bytes, terms.floor, terms.ceiling, held=terms.held, need=max(terms.held, terms.floor))


def _lock(path: Path) -> int:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = path.parent.stat()
        is_everybodys = folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX
        if is_everybodys or folder.st_uid not in (0, os.getuid()):
            raise BrokerError(f"cannot listen at {path}: other users may change that folder; set --socket")
        lock = os.open(path.with_name(path.name + ".lock"), _LOCK_FLAGS, 0o600)
    except OSError as error:
        raise BrokerError(f"cannot listen at {path}: {error.strerror}; set --socket") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock of the process: no child of it keeps it
    except OSError:
        os.close(lock)
        raise BrokerError(f"a broker listens at {path} already; end it, or set --socket") from None
    return lock


def _listen(path: Path) -> socket.socket:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BrokerError(f"cannot listen at {path}: there is something that is no socket; set --socket")
        path.unlink()  # of a broker that was killed: the lock tells that none lives
    except FileNotFoundError:
        pass
    except OSError as error:
        raise BrokerError(f"cannot listen at {path}: {error.strerror}; set --socket") from None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise BrokerError(f"cannot listen at {path}: {error.strerror or error}; set --socket") from None
    finally:
        os.umask(mask)
    listener.listen(socket.SOMAXCONN)
    listener.setblocking(False)
    return listener
