"""Which engines run on this machine with a policy file: each announces itself in a small file of its own.

``layerkv policy reload`` finds them here. A file whose process is gone is stale and is removed by whoever reads it.
"""

from __future__ import annotations

import atexit
import json
import os
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
        path.write_text(json.dumps({"policy_path": str(Path(policy_path).resolve()), "started_unix_s": time.time()}))
    except OSError:
        return None
    pid = os.getpid()
    atexit.register(lambda: path.unlink(missing_ok=True) if os.getpid() == pid else None)  # not in forked children
    return path


def running_engines() -> list[RunningEngine]:
    """All that announced themselves and still run, oldest first."""
    found: list[RunningEngine] = []
    for path in sorted(runtime_dir().glob("*.json")):
        try:
            pid = int(path.stem)
            fields = json.loads(path.read_text())
            engine = RunningEngine(pid, str(fields["policy_path"]), float(fields["started_unix_s"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if _is_running(pid):
            found.append(engine)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda engine: engine.started_unix_s)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
