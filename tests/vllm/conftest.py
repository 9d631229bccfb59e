"""What the tests with real engines share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerkv.bench.tiny_model import make_tiny_model
from tests.vllm.forked import Forks


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random float32 Llama."""
    return make_tiny_model("test", tmp_path_factory.mktemp("tiny-models"))


@pytest.fixture(scope="session")
def small_engine(tiny_model: Path) -> dict[str, Any]:
    """Arguments of a stock engine: eager, float32, with KV memory for 68 blocks, which is six prompts of 300 tokens."""
    return {
        "model": str(tiny_model),
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 13 << 20,
    }


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Where programs that need vLLM have its imports for nothing."""
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks
