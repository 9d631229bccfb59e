"""The peer `lmcache`: stock vLLM whose connector keeps KV in a cache server of LMCache's, a process beside the engine.

Both run with the Python of an environment of their own, since LMCache pins versions of packages that differ from this
one's; nothing of layerkv is in it. Invariant: that environment has the vLLM of the other engines, or nothing starts.
Runs in the suite's process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerkv.bench.suite.server import Server, free_port
from layerkv.bench.suite.vllm_build import PACKAGES, is_cpu_build, vllm_versions
from layerkv.errors import ConfigError

PYTHON_VARIABLE = "LAYERKV_LMCACHE_PYTHON"
"""Environment variable that names the Python where `--lmcache-python` does not."""

SHARED_MEMORY = Path("/dev/shm")
ASK_LIMIT_S = 60.0
LMCACHE_ENV = {
    "PYTHONHASHSEED": "0",  # keys of cached chunks are hashes that engine and cache server must agree on
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
}

_ASK = """
import importlib.metadata, json, sys
known = {}
for name in sys.argv[1:]:
    try:
        known[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(known))
"""


@dataclass(frozen=True, slots=True)
class Lmcache:
    """An environment with LMCache: its Python, and LMCache's version there."""

    python: Path
    version: str


@dataclass(frozen=True, slots=True)
class CacheServer:
    """Where a cache server listens: `port` for engines, `http_port` for whoever asks how it is."""

    lmcache: Lmcache
    port: int
    http_port: int

    @property
    def shm_name(self) -> str:
        """What LMCache's shared memory is called, but for LMCache's own prefix."""
        return f"layerkv_bench_{self.port}"


def find_lmcache(python: Path) -> Lmcache:
    """What the environment of `python` has.

    Raises:
        ConfigError: that is no Python, or it lacks LMCache or the vLLM that runs here.
    """
    where = f"--lmcache-python: {python}"
    fix = "make it as benchmarks/README.md says, or leave the option out, and this engine is skipped"
    command = [str(python), "-I", "-c", _ASK, "lmcache", *PACKAGES]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=ASK_LIMIT_S, check=True)
        found = json.loads(ended.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"{where}: found nothing that runs as Python ({error}); expected the Python of an environment with "
            f"LMCache; {fix}"
        ) from None
    if "lmcache" not in found:
        raise ConfigError(f"{where}: found no lmcache in its environment; expected it there; {fix}")
    here, there = vllm_versions(), {name: found[name] for name in PACKAGES if name in found}
    if here != there:
        raise ConfigError(
            f"{where}: found {_written(there)} in its environment; expected {_written(here)}, as the other engines "
            f"run; {fix}"
        )
    return Lmcache(python, found["lmcache"])


@contextlib.contextmanager
def running_cache_server(
    lmcache: Lmcache, *, host_bytes: int, defaults: Mapping[str, str], log_path: Path
) -> Iterator[tuple[CacheServer, Server]]:
    """A cache server that has been started, and is ended with all that was its own; it may not be ready yet."""
    cache_server = CacheServer(lmcache, port=free_port(), http_port=free_port())
    command = cache_server_command(cache_server, host_bytes=host_bytes, on_cpu=is_cpu_build())
    try:
        with Server(
            command,
            env=lmcache_env(defaults),
            port=cache_server.http_port,
            log_path=log_path,
            health_path="/healthcheck",
        ) as server:
            yield cache_server, server
    finally:  # as much memory as it was given, if it had to be killed
        (SHARED_MEMORY / f"lmcache_l1_pool_{cache_server.shm_name}").unlink(missing_ok=True)


def cache_server_command(server: CacheServer, *, host_bytes: int, on_cpu: bool) -> list[str]:
    """The command line of LMCache's server with `host_bytes` of host memory.

    Without a GPU the engine copies into shared memory: the other way, over a socket, is several times slower.
    """
    command = [
        *(str(server.lmcache.python), "-m", "lmcache.cli.main", "server"),
        *("--host", "127.0.0.1", "--port", str(server.port)),
        *("--http-host", "127.0.0.1", "--http-port", str(server.http_port)),
        *("--supported-transfer-mode", "auto", "--eviction-policy", "LRU"),
        *("--l1-size-gb", str(host_bytes / 2**30), "--disable-observability"),
    ]
    return [*command, "--shm-name", server.shm_name] if on_cpu else command


def lmcache_connector(server: CacheServer) -> dict[str, Any]:
    """The value of `--kv-transfer-config`; answers are kept as well as prompts, as the other peers do."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": server.port,
            "lmcache.mp.save_decode_cache": True,
        },
    }


def lmcache_env(defaults: Mapping[str, str]) -> dict[str, str]:
    """This process's environment over `defaults`, but for what would lead its Python to packages of this one."""
    env = {**defaults, **os.environ, **LMCACHE_ENV}
    env.pop("PYTHONPATH", None)
    return env


def _written(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items()) or "no vLLM"
