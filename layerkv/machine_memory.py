"""How much memory this process may use, and how much of it it has already.

The machine's memory is an upper bound. Below it stand the limits of control groups: the group that this process is in
and every one above it may have one, and exceeding the smallest ends processes.
Reads ``/proc`` and ``/sys`` when asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_V2_LIMITS = ("memory.max", "memory.high")  # above the second, the kernel slows processes down until they are below it
_V1_LIMITS = ("memory.limit_in_bytes",)


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A bound on memory.

    Attributes:
        size_bytes: How much may be used.
        owner: Whose limit it is, as the subject of a sentence.
    """

    size_bytes: int
    owner: str


@dataclass(frozen=True, slots=True)
class _Hierarchy:
    """Where the groups of one hierarchy that has memory limits are found."""

    mount_point: Path
    mount_root: str
    group: str
    limit_files: tuple[str, ...]

    def folders(self) -> Iterator[tuple[str, Path]]:
        """The group of this process and those above it, as far as they are visible here."""
        inside = os.path.normpath(os.path.relpath(self.group, self.mount_root))
        if inside.startswith(".."):  # outside of what is mounted: what is seen first is the top of that
            inside = "."
        place = PurePosixPath(inside)
        for part in (place, *place.parents):
            yield f"/{part}" if str(part) != "." else "/", self.mount_point / part


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """The smallest limit that holds for this process; ``root`` is where ``proc`` and ``sys`` are found."""
    limits = [MemoryLimit(_machine_bytes(root), "this machine")]
    for hierarchy in _hierarchies(root):
        for name, folder in hierarchy.folders():
            for file in hierarchy.limit_files:
                try:
                    size_bytes = int((folder / file).read_text())
                except (OSError, ValueError):  # no such file, or "max"
                    continue
                limits.append(MemoryLimit(size_bytes, f"control group {name} ({file})"))
    return min(limits, key=lambda limit: limit.size_bytes)


def held_bytes(root: Path = Path("/")) -> int:
    """Memory that this process uses and that no file can give back: its weights, on a CPU, and all else."""
    found = re.findall(r"^Rss(?:Anon|Shmem):\s*(\d+) kB", (root / "proc/self/status").read_text(), re.MULTILINE)
    return sum(map(int, found)) * 1024


def _machine_bytes(root: Path) -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None, "the kernel always says MemTotal"
    return int(found[1]) * 1024


def _hierarchies(root: Path) -> Iterator[_Hierarchy]:
    """The unified hierarchy and the one of the version-1 memory controller: a machine may have either, or both."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        number, controllers, group = line.split(":", 2)
        if number == "0":
            limit_files: tuple[str, ...] = _V2_LIMITS
        elif "memory" in controllers.split(","):
            limit_files = _V1_LIMITS
        else:
            continue
        for mount in mounts:
            # 36 35 98:0 /root /mount/point rw,noatime shared:1 - type source options
            left, _, right = mount.partition(" - ")
            mount_root, mount_point = left.split()[3:5]
            kind, _, options = right.split(maxsplit=2)
            is_v1 = kind == "cgroup" and "memory" in options.split(",")
            if kind == "cgroup2" if number == "0" else is_v1:
                place = root / _unescaped(mount_point).lstrip("/")
                yield _Hierarchy(place, _unescaped(mount_root), group, limit_files)


def _unescaped(path: str) -> str:
    """The kernel writes blanks and backslashes in paths as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
