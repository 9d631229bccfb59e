"""Which engines run on this machine with a policy file: each announces itself in a small file of its own.

``layerkv policy reload`` finds them here. A file whose process is gone is stale and is removed by whoever reads it;
process ids are used again, so the file says when its process started.
"""

from __future__ import annotations

import atexit
import json
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """An engine that announced itself.

    Attributes:
        pid: Its front-end process, the one to signal.
        policy_path: The policy file it was started with, absolute.
        started_unix_s: When it was announced.
    """

    pid: int
    policy_path: str
    started_unix_s: float


def runtime_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of announcements: one per user."""
    base = environment.get("XDG_RUNTIME_DIR")
    return Path(base) / "layerkv" if base else Path(tempfile.gettempdir()) / f"layerkv-{os.getuid()}"


def announce(policy_path: str | Path) -> Path | None:
    """Announce this process until it ends; None where the folder cannot be written (then nobody finds it)."""
    path = runtime_dir() / f"{os.getpid()}.json"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(path.parent):
            return None
        fields = {
            "policy_path": str(Path(policy_path).resolve()),
            "started_unix_s": time.time(),
            "start_ticks": _start_ticks(os.getpid()),
        }
        path.write_text(json.dumps(fields))
    except OSError:
        return None
    pid = os.getpid()
    atexit.register(lambda: path.unlink(missing_ok=True) if os.getpid() == pid else None)  # not in forked children
    return path


def running_engines() -> list[RunningEngine]:
    """All that announced themselves and still run, oldest first."""
    found: list[RunningEngine] = []
    if not _is_private(runtime_dir()):
        return found
    for path in sorted(runtime_dir().glob("*.json")):
        try:
            pid = int(path.stem)
            fields = json.loads(path.read_text())
            engine = RunningEngine(pid, str(fields["policy_path"]), float(fields["started_unix_s"]))
            is_running = _start_ticks(pid) == int(fields["start_ticks"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if is_running:
            found.append(engine)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda engine: engine.started_unix_s)


def catches_signal(pid: int, signal_number: int) -> bool:
    """Whether a process has a handler for a signal, which would end it otherwise."""
    try:
        lines = Path("/proc", str(pid), "status").read_text(errors="replace").splitlines()
    except OSError:
        return False
    caught = next((line for line in lines if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (signal_number - 1) & 1)


def _is_private(folder: Path) -> bool:
    """Whether the folder is this user's own: in a shared one, others must not choose whom we signal."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o022


def _start_ticks(pid: int) -> int:
    """When a process started, on the kernel's clock; -1 if there is none."""
    try:
        line = Path("/proc", str(pid), "stat").read_text(errors="replace")
    except OSError:
        return -1
    fields = line.rpartition(")")[2].split()  # its name, which is before that, may hold blanks and brackets
    return -1 if fields[0] == "Z" else int(fields[19])
