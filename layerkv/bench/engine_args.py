"""Keyword arguments of vLLM's `EngineArgs`, as data: those of the tiny models' engines, and what users give as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerkv.errors import ConfigError

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


def parse_engine_args(text: str | None) -> dict[str, Any]:
    """What `--engine-args` holds; nothing for None.

    Raises:
        ConfigError: it is not a JSON object.
    """
    try:
        args = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise ConfigError(f"--engine-args: found what is not JSON ({error}); {_ARGS_EXAMPLE}") from None
    if not isinstance(args, dict):
        raise ConfigError(f"--engine-args: found {text}; {_ARGS_EXAMPLE}")
    return args


_ARGS_EXAMPLE = 'expected a JSON object of vLLM engine arguments such as {"dtype": "bfloat16", "block_size": 32}'
