"""How the commands here build engines of the tiny models: keyword arguments of vLLM's `EngineArgs`, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLOCK_TOKENS = 32
MAX_BATCHED_TOKENS = 2048


def tiny_engine_args(
    model_dir: Path, *, max_model_len: int, max_num_seqs: int, kv_bytes: int, **more: Any
) -> dict[str, Any]:
    """In float32, without compilation, which takes longer than the load; `more` adds to it or says otherwise."""
    return {
        "model": str(model_dir),
        "dtype": "float32",
        "block_size": BLOCK_TOKENS,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_num_seqs": max_num_seqs,
        "enforce_eager": True,
        "kv_cache_memory_bytes": kv_bytes,
        "seed": 0,
        **more,
    }


def layerkv_connector(**extra_config: Any) -> dict[str, Any]:
    """The value of `kv_transfer_config` that makes an engine layerkv's."""
    return {"kv_connector": "LayerKVConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra_config}
