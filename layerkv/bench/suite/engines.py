"""The engines that a case compares, as command lines of `vllm serve`.

Pure functions. Invariant: engines of one case differ in KV memory and slots (the oracle's) and in the KV connector
(offload, LMCache, layerkv) and in nothing else; all but the oracle get the same KV memory, out of which layerkv pays
for its lane zone, and offload, LMCache and layerkv the same host memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from layerkv.bench.engine_args import layerkv_connector
from layerkv.bench.policy_file import write_policy
from layerkv.bench.suite.case import Case, EngineSettings
from layerkv.bench.suite.lmcache_peer import CacheServer, lmcache_connector
from layerkv.bench.suite.plan import plan_requests, total_tokens
from layerkv.bench.suite.vllm_build import is_cpu_build, vllm_command

KEEPERS = ("vllm-cpu-offload", "lmcache")
"""Peers that keep KV in host memory, and tell little of it in their metrics."""

WATERMARK = 0.02
SERVED_NAME = "model"


def is_layerkv(engine: str) -> bool:
    """Whether this engine runs with layerkv."""
    return engine.startswith("layerkv")


def max_num_seqs(settings: EngineSettings, engine: str) -> int:
    """How many requests may run in a step: the oracle's may be more."""
    return (settings.oracle_max_num_seqs if engine == "oracle" else None) or settings.max_num_seqs


def kv_memory_bytes(case: Case, engine: str, seeds: Sequence[int]) -> int:
    """KV memory of an engine: the oracle's has room for every request of any one load of the case."""
    settings = case.settings
    if engine != "oracle":
        return settings.kv_memory_bytes
    if settings.oracle_kv_memory_bytes is not None:
        return settings.oracle_kv_memory_bytes
    if settings.shape is None:
        return 8 * settings.kv_memory_bytes
    largest = max(_plan_tokens(case, seed) for seed in seeds)
    # No more than so many run at once, and each at most so long; a block each, and one more, for rounding.
    one = settings.max_model_len + 2 * settings.block_tokens
    longest = max_num_seqs(settings, engine) * (settings.max_model_len + settings.block_tokens)
    # vLLM does not start with less than one request needs, however small the load.
    return math.ceil(max(min(largest, longest), one) * 1.1) * settings.shape.kv_bytes_per_token


def _plan_tokens(case: Case, seed: int) -> int:
    plans = [plan_requests(case, point, seed) for point in case.points]
    return max(total_tokens(plan) + len(plan) * case.settings.block_tokens for plan in plans)


def serve_command(
    case: Case,
    engine: str,
    *,
    model: str,
    port: int,
    kv_memory: int,
    folder: Path,
    cache_server: CacheServer | None = None,
    extra: Sequence[str] = (),
    connector_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """The command line that serves `model` as this engine; its policy file is written to `folder`.

    The engine `lmcache` needs a `cache_server`, and runs in that one's environment. `connector_options` are further
    ones of layerkv's.
    """
    settings = case.settings
    options = [
        *("serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME),
        *("--dtype", settings.dtype, "--block-size", str(settings.block_tokens), "--seed", "0"),
        *("--max-model-len", str(settings.max_model_len), "--max-num-seqs", str(max_num_seqs(settings, engine))),
        *("--max-num-batched-tokens", str(settings.max_num_batched_tokens)),
        *("--kv-cache-memory-bytes", str(kv_memory), "--enable-prefix-caching"),
        *("--disable-uvicorn-access-log",),
    ]
    if settings.shape is not None:
        options.append("--enforce-eager")  # compiling a model of this size takes longer than the load
    if engine == "stock-watermark":
        options += ["--watermark", str(WATERMARK)]
    connector = (
        _connector(case, engine, folder, connector_options or {})
        if cache_server is None
        else lmcache_connector(cache_server)
    )
    if connector is not None:
        options += ["--kv-transfer-config", json.dumps(connector)]
    command = vllm_command() if cache_server is None else vllm_command(str(cache_server.lmcache.python))
    return [*command, *options, *settings.options, *extra]


def _connector(case: Case, engine: str, folder: Path, more: Mapping[str, Any]) -> dict[str, Any] | None:
    if is_layerkv(engine):
        return layerkv_connector(**_layerkv_options(case.settings, _policy_path(case, engine, folder)), **more)
    if engine == "vllm-cpu-offload":
        return offload_connector(case.settings.host_memory_bytes, on_cpu=is_cpu_build())
    return None


def offload_connector(host_bytes: int, *, on_cpu: bool) -> dict[str, Any]:
    """The value of `--kv-transfer-config` for vLLM's offload with `host_bytes` of host memory in all.

    Its copies are made for CUDA: on the CPU a subclass of its connector differs there, and only there.
    """
    config = {"kv_role": "kv_both", "kv_connector_extra_config": {"cpu_bytes_to_use": host_bytes}}
    if not on_cpu:
        return {"kv_connector": "SimpleCPUOffloadConnector", **config}
    module = "layerkv.bench.suite.cpu_offload"
    return {"kv_connector": "CpuOffloadPeer", "kv_connector_module_path": module, **config}


def _layerkv_options(settings: EngineSettings, policy_path: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"host_memory": settings.host_memory_bytes, "policy": str(policy_path)}
    if settings.lanes is not None:
        options["lanes"] = settings.lanes
    if settings.zone_tokens is not None:
        options["zone_tokens"] = settings.zone_tokens
    if settings.long_contexts:
        options["long_contexts"] = True
    return options


def _policy_path(case: Case, engine: str, folder: Path) -> Path:
    policy = case.policy
    if engine == "layerkv-no-slo":
        policy = msgspec.structs.replace(policy, policy="arrival")
    return write_policy(policy, folder / f"{engine}.slo.yaml")
