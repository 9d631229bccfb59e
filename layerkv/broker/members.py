"""The engines that a broker knows, in memory and in a file: a broker that starts again waits for those it knew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from layerkv.broker.messages import Hello
from layerkv.broker.processes import Processes

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
    engines: list[_Record]


class Members:
    """All engines of which a process lives, by name. The file says the same after each change."""

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
        """An engine is there, or back; its processes are those that it says now.

        Raises:
            ValueError: all of them have ended.
        """
        processes = Processes(hello.pids)
        if not processes.descriptors:
            raise ValueError("all its processes have ended")
        if before := self._members.get(hello.engine):
            before.processes.close()
        member = self._members[hello.engine] = Member(hello.engine, processes, hello)
        self._write()
        return member

    def remove(self, engine: str) -> None:
        """All of its processes have ended."""
        self._members.pop(engine).processes.close()
        self._write()

    def close(self) -> None:
        """Give descriptors back; the file stays."""
        for member in self._members.values():
            member.processes.close()
        self._members.clear()

    def _read(self) -> list[_Record]:
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except (OSError, msgspec.DecodeError):
            return []
        return found.engines if found.format == _FORMAT else []

    def _write(self) -> None:
        records = [_Record(member.engine, member.processes.identities) for member in self]
        whole = self._path.with_name(self._path.name + ".new")  # never seen half written
        whole.write_bytes(msgspec.json.encode(_File(_FORMAT, records)))
        whole.replace(self._path)
