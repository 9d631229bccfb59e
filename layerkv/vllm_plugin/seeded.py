"""Requests with a seed of their own, which vLLM's CPU build cannot compute in chunks.

After a chunk that is not a prompt's last, its model runner takes back the random numbers that the discarded sample
drew, by the generator's offset. CPU generators have none, and the exception ends the engine (vLLM 0.32.0, torch 2.13;
`tests/vllm/test_seeded.py` sees stock vLLM die of it, and fails when it no longer does).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.sampling_params import SamplingType

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


def cannot_cut_seeded(vllm_config: VllmConfig) -> bool:
    """Whether the engine would die of a seeded prompt in several chunks."""
    if vllm_config.device_config.device_type != "cpu":
        return False
    try:
        torch.Generator("cpu").get_offset()
    except RuntimeError:
        return True
    return False


def is_seeded(params: SamplingParams | None) -> bool:
    """Whether the request's tokens are drawn by a generator of its own."""
    return params is not None and params.sampling_type is SamplingType.RANDOM_SEED
