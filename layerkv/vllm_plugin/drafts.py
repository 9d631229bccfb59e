"""What speculative decoding asks for beside a request's own blocks, from vLLM's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerkv.scheduler import engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DRAFTS_WITHOUT_KV = ("ngram", "suffix")
"""Methods of speculative decoding that draft from the tokens alone."""

DRAFTS_WITH_KV = ("eagle", "draft_model")
"""Methods whose KV is that of further layers, which vLLM's model runner lists after the model's."""

_DRAFT_MODEL = "draft_model."


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


def num_drafting_layers(vllm_config: VllmConfig, names: Sequence[str]) -> int | None:
    """How many of these layers with KV, the last, are of what drafts; None if their names do not tell.

    The model may have fewer of them than layers. vLLM puts those of a draft model under a name of their own, and
    numbers those of an EAGLE head on from the model's last layer, with KV or without.

    Args:
        vllm_config: Of the engine.
        names: vLLM's, of all layers with KV, in the order in which they run.
    """
    speculation = vllm_config.speculative_config
    if speculation is None or speculation.method in DRAFTS_WITHOUT_KV:
        return 0
    if speculation.method == "draft_model":
        drafting = [name.startswith(_DRAFT_MODEL) for name in names]
    else:
        of_model = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        drafting = [_number(name) >= of_model for name in names]
    num_drafting = sum(drafting)
    return num_drafting if 0 < num_drafting < len(names) and all(drafting[-num_drafting:]) else None


def _number(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1)


def num_drafting_slots(vllm_config: VllmConfig) -> int:
    """Tokens of a step's budget that a request takes beside those that it computes, for what drafts."""
    speculation = vllm_config.speculative_config
    return 0 if speculation is None else speculation.max_num_new_slots_for_drafting
