"""What speculative decoding asks for beside a request's own blocks, from vLLM's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerkv.scheduler import engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DRAFTS_WITHOUT_KV = ("ngram", "suffix")
"""Methods of speculative decoding that draft from the tokens alone."""

DRAFTS_WITH_KV = ("eagle", "draft_model")
"""Methods whose KV is that of further layers, which vLLM's model runner lists after the model's."""


def tokens_per_decode(vllm_config: VllmConfig) -> int:
    """Tokens that a step computes of a request which decodes: one, its drafts, and what drafts them."""
    speculation = vllm_config.speculative_config
    num_drafts = 0 if speculation is None else speculation.num_speculative_tokens
    return 1 + num_drafts + num_drafting_slots(vllm_config)


def drafting_blocks(vllm_config: VllmConfig, block_tokens: int) -> int:
    """As :func:`layerkv.scheduler.engine.drafting_blocks`, for start-up, when there is no scheduler to ask.

    What drafts with a model writes KV for as many tokens again.
    """
    speculation = vllm_config.speculative_config
    if speculation is None:
        return 0
    num_lookahead = 0 if speculation.method in DRAFTS_WITHOUT_KV else speculation.num_speculative_tokens
    return engine.drafting_blocks(tokens_per_decode(vllm_config), num_lookahead, block_tokens)


def num_drafting_layers(vllm_config: VllmConfig, num_layers: int) -> int:
    """Of so many layers with KV, how many are of what drafts."""
    speculation = vllm_config.speculative_config
    if speculation is None or speculation.method in DRAFTS_WITHOUT_KV:
        return 0
    of_model: int = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    return max(num_layers - of_model, 0)


def num_drafting_slots(vllm_config: VllmConfig) -> int:
    """Tokens of a step's budget that a request takes beside those that it computes, for what drafts."""
    speculation = vllm_config.speculative_config
    return 0 if speculation is None else speculation.max_num_new_slots_for_drafting
