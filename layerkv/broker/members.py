"""The engines that a broker knows, in memory and in a file: a broker that starts again waits for those it knew."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from layerkv.broker.messages import Hello
from layerkv.broker.processes import Processes
from layerkv.errors import BrokerError

_FORMAT = 1


@dataclass(slots=True)
class Member:
    """An engine: its processes, and what it said first; None until it is back after a new start of the broker."""

    engine: str
    processes: Processes
    hello: Hello | None = None


class _Record(msgspec.Struct):
    engine: str
    processes: list[tuple[int, int]]


class _File(msgspec.Struct):
    format: int
    boot: str
    engines: list[_Record]


class Members:
    """All engines of which a process lives, by name. The file says the same after each change.

    Raises:
        BrokerError: the file is there and cannot be read: who knows what engines have.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members: dict[str, Member] = {}
        for record in self._read():
            processes = Processes.still_running(record.processes)
            if processes.descriptors:
                self._members[record.engine] = Member(record.engine, processes)

    def __iter__(self) -> Iterator[Member]:
        return iter([*self._members.values()])

    def get(self, engine: str) -> Member | None:
        """The engine of that name, if there is one."""
        return self._members.get(engine)

    def admit(self, hello: Hello) -> Member:
        """An engine is there, or back. Its processes are those that it says now, and those from before that live.

        The caller closes those of the member before, which this one replaces.

        Raises:
            BrokerError: all of them have ended, one cannot be watched, or the file cannot be written. Nothing changes.
        """
        processes = Processes(hello.pids)
        if not processes.descriptors:
            raise BrokerError("all its processes have ended")
        before = self._members.get(hello.engine)
        member = Member(hello.engine, processes, hello)
        try:
            if before is not None:
                processes.add_living(before.processes)
            if before is None or before.processes.identities != processes.identities:
                self._write({**self._members, hello.engine: member})
        except OSError as error:
            processes.close()
            raise BrokerError(f"the broker cannot write it down at {self._path}: {error.strerror}") from None
        self._members[hello.engine] = member
        return member

    def remove(self, engine: str) -> None:
        """All of its processes have ended."""
        self._members.pop(engine).processes.close()
        with contextlib.suppress(OSError):  # whoever reads the file sees for himself that they have ended
            self._write(self._members)

    def close(self) -> None:
        """Give descriptors back; the file stays."""
        for member in self._members.values():
            member.processes.close()
        self._members.clear()

    def _read(self) -> list[_Record]:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unreadable(error.strerror) from None
        with open(descriptor, "rb") as file:
            if os.fstat(descriptor).st_uid != os.getuid():
                raise self._unreadable("it is another user's")
            try:
                found = msgspec.json.decode(file.read(), type=_File)
            except (OSError, msgspec.DecodeError) as error:
                raise self._unreadable(str(error)) from None
        if found.format != _FORMAT:
            raise self._unreadable(f"it has format {found.format}, and this is layerkv with format {_FORMAT}")
        return found.engines if found.boot == _boot() else []

    def _unreadable(self, reason: object) -> BrokerError:
        return BrokerError(
            f"{self._path} says which engines have memory, and cannot be read: {reason}; end the engines that run, "
            "then remove it"
        )

    def _write(self, members: Mapping[str, Member]) -> None:
        records = [_Record(member.engine, member.processes.identities) for member in members.values()]
        whole = self._path.with_name(self._path.name + ".new")  # never seen half written
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(whole, flags, 0o600), "wb") as file:
            file.write(msgspec.json.encode(_File(_FORMAT, _boot(), records)))
        whole.replace(self._path)


def _boot() -> str:
    """The same from one start of the machine to the next: numbers and times of processes begin anew with it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
