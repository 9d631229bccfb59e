"""What the demo runs: its loads, and how the three engines that are compared are configured.

Pure data, made in the demo's process. Invariant: the engines of one plan differ only in the KV memory they
get and in the KV connector; stock and layerkv get the same KV memory, out of which layerkv pays for its lane
zone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerkv.bench.engine_args import BLOCK_TOKENS, layerkv_connector, tiny_engine_args
from layerkv.bench.load import LoadSpec
from layerkv.bench.records import EngineSpec
from layerkv.bench.tiny_model import ModelShape
from layerkv.errors import ConfigError

ENGINE_NAMES = ("stock", "layerkv", "oracle")
# KV memory of stock and layerkv, in requests of mean final length: the shortage that the demo is about.
POOL_REQUESTS = 4


def demo_load(shape: ModelShape, *, seed: int, quick: bool) -> LoadSpec:
    """The load of the demo: long enough to show the effect, or (`quick`) just enough to exercise everything.

    The full load keeps an engine with unlimited KV memory 60-80 % busy with prefill while requests arrive, on
    one thread (2026-11-21, AMD EPYC, `tiny_model.SHAPES["demo"]`): waiting is for memory, not for compute.
    """
    if quick:
        return LoadSpec(
            num_requests=10,
            rate_per_s=6.0,
            prompt_tokens=(200, 400),
            output_tokens=(60, 120),
            vocab_size=shape.vocab_size,
            seed=seed,
        )
    return LoadSpec(
        num_requests=28,
        rate_per_s=4.5,
        prompt_tokens=(600, 1400),
        output_tokens=(400, 700),
        vocab_size=shape.vocab_size,
        seed=seed,
    )


def check_engine_names(names: Sequence[str]) -> None:
    """Raises ConfigError unless `names` are some of `ENGINE_NAMES`, each once."""
    if not names or len(set(names)) != len(names) or not set(names) <= set(ENGINE_NAMES):
        found = ", ".join(names) or "none"
        raise ConfigError(f"engines: found {found}; expected some of {', '.join(ENGINE_NAMES)}, each once")


def engine_specs(names: Sequence[str], model_dir: Path, shape: ModelShape, load: LoadSpec) -> list[EngineSpec]:
    """The specs of the named engines, in the order given, for the model of `shape` in `model_dir`.

    Raises:
        ConfigError: see `check_engine_names`.
    """
    check_engine_names(names)
    scarce_bytes = _kv_bytes(shape, math.ceil(POOL_REQUESTS * load.mean_context_tokens))
    # Room for every request at its longest and, since vLLM keeps a block and a watermark back, one more.
    plentiful_bytes = _kv_bytes(shape, (load.num_requests + 1) * load.max_context_tokens)
    common = tiny_engine_args(
        model_dir, max_model_len=load.max_context_tokens, max_num_seqs=load.num_requests, kv_bytes=scarce_bytes
    )
    differing: dict[str, dict[str, Any]] = {
        "stock": {},
        "layerkv": {"kv_transfer_config": layerkv_connector(host_memory=plentiful_bytes)},
        "oracle": {"kv_cache_memory_bytes": plentiful_bytes},
    }
    return [EngineSpec(name=name, engine_args=common | differing[name], load=load) for name in names]


def _kv_bytes(shape: ModelShape, num_tokens: int) -> int:
    num_blocks = math.ceil(num_tokens / BLOCK_TOKENS)
    return num_blocks * BLOCK_TOKENS * shape.kv_bytes_per_token
