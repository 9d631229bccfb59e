"""Which engines run on this machine with a policy file: each announces itself in a small file of its own.

``layerkv policy reload`` finds them here. A file whose process is gone is stale and is removed by whoever reads it;
process ids are used again, so the file says when its process started.

The file is also a bell: whoever wants the policy read again appends a byte (:func:`ring`), and every process of the
engine, whatever started it, looks at the size now and then. No process needs to know of the others, or to be able to
catch a signal.

What a user sets for this process in its environment is read here too.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SILENT_BYTES = 8192
"""Size of an announcement that was not rung: longer than any path, so that rings can be counted without reading."""


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """An engine that announced itself.

    Attributes:
        pid: The process that announced it: of a server the first one, which started the others.
        policy_path: The policy file it was started with: absolute, and otherwise as it was given.
        started_unix_s: When it was announced.
        announcement: The file, to :func:`ring`.
    """

    pid: int
    policy_path: str
    started_unix_s: float
    announcement: Path


def runtime_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of announcements: one per user."""
    base = environment.get("XDG_RUNTIME_DIR")
    return Path(base) / "layerkv" if base else Path(tempfile.gettempdir()) / f"layerkv-{os.getuid()}"


def checks_books(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether engines of this environment check their books when they are idle: ``LAYERKV_CHECK=1``, to find faults."""
    return environment.get("LAYERKV_CHECK", "") not in ("", "0")


def announce(policy_path: str | Path, num_rings: int = 0) -> Path | None:
    """Announce this process until it ends; None where the folder cannot be written (then nobody finds it).

    Args:
        policy_path: The policy file. Links in it are kept: what they point to is what changes.
        num_rings: How often its bell has rung, if it was announced before.
    """
    path = runtime_dir() / f"{os.getpid()}.json"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(path.parent):
            return None
        fields = {
            "policy_path": os.path.abspath(policy_path),
            "started_unix_s": time.time(),
            "start_ticks": start_ticks(os.getpid()),
        }
        text = json.dumps(fields, ensure_ascii=False).encode(errors="surrogateescape")
        whole = path.with_suffix(".new")  # never seen half written
        whole.write_bytes(text.ljust(_SILENT_BYTES) + b"\n" * num_rings)
        whole.replace(path)
    except OSError:
        return None
    pid = os.getpid()
    atexit.register(lambda: path.unlink(missing_ok=True) if os.getpid() == pid else None)  # not in forked children
    return path


def ring(announcement: Path) -> None:
    """Have every process of that engine read its policy again. May be called in a signal handler.

    Raises:
        OSError: the announcement is gone.
    """
    bell = os.open(announcement, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(bell, b"\n")
    finally:
        os.close(bell)


def num_rings(announcement: Path) -> int:
    """How often that bell has rung.

    Raises:
        OSError: the announcement is gone.
    """
    return announcement.stat().st_size - _SILENT_BYTES


def running_engines() -> list[RunningEngine]:
    """All that announced themselves and still run, oldest first."""
    found: list[RunningEngine] = []
    if not _is_private(runtime_dir()):
        return found
    for path in sorted(runtime_dir().glob("*.json")):
        try:
            pid = int(path.stem)
            fields = json.loads(path.read_bytes().decode(errors="surrogateescape"))
            engine = RunningEngine(pid, str(fields["policy_path"]), float(fields["started_unix_s"]), path)
            is_running = start_ticks(pid) == int(fields["start_ticks"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if is_running:
            found.append(engine)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return sorted(found, key=lambda engine: engine.started_unix_s)


def _is_private(folder: Path) -> bool:
    """Whether the folder is this user's own: in a shared one, others must not choose whom we tell what."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o022


def start_ticks(pid: int) -> int:
    """When a process started, on the kernel's clock; -1 if there is none."""
    try:
        line = Path("/proc", str(pid), "stat").read_text(errors="replace")
    except OSError:
        return -1
    fields = line.rpartition(")")[2].split()  # its name, which is before that, may hold blanks and brackets
    return -1 if fields[0] == "Z" else int(fields[19])
