"""vLLM's KV-cache groups as ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from layerkv.core.groups import Group
from layerkv.errors import ConfigError
from layerkv.vllm_plugin.compat import groups_that_vllm_makes
from layerkv.vllm_plugin.spec import OUR_SPECS

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def grouped(vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """The groups that vLLM will divide these layers into."""
    if is_uniform(specs):
        own = list(specs.values())
        return [KVCacheGroupSpec(list(specs), type(own[0]).merge(own))]
    return groups_that_vllm_makes(vllm_config, specs)


def is_uniform(specs: Mapping[str, KVCacheSpec]) -> bool:
    """Whether vLLM puts all these layers into one group of pages of one size."""
    found = list(specs.values())
    try:
        type(found[0]).merge(found)
    except (AssertionError, ValueError):
        return False
    return True


def as_full_attention(specs: Mapping[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """What vLLM makes of the layers when its hybrid KV-cache manager is off: it would do so later, and knows not our
    specs. Where any layer keeps all blocks, all do."""
    if not any(isinstance(spec, FullAttentionSpec) for spec in specs.values()):
        return dict(specs)
    return {name: _as_full_attention(spec) for name, spec in specs.items()}


def _as_full_attention(spec: KVCacheSpec) -> KVCacheSpec:
    if isinstance(spec, SlidingWindowSpec):
        return FullAttentionSpec(**_kept(spec), sliding_window=spec.sliding_window)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return FullAttentionSpec(**_kept(spec), attention_chunk_size=spec.attention_chunk_size)
    return spec


def _kept(spec: AttentionSpec) -> dict[str, Any]:
    return {each.name: getattr(spec, each.name) for each in fields(AttentionSpec)}


def our_groups(vllm_config: VllmConfig, groups: Sequence[KVCacheGroupSpec]) -> tuple[Group, ...] | None:
    """The same groups as ours; None if the spec of one of them is not ours, or a state's."""
    specs = [group.kv_cache_spec for group in groups]
    if not any(isinstance(spec, OUR_SPECS) for spec in specs):
        return None
    if not all(isinstance(spec, (*OUR_SPECS, MambaSpec)) for spec in specs):
        return None
    return tuple(_group(vllm_config, group) for group in groups)


def require_one_page_size(groups: Sequence[KVCacheGroupSpec]) -> int:
    """Bytes of one block in one slot.

    Raises:
        ConfigError: the groups differ in that.
    """
    sizes = {group.kv_cache_spec.page_size_bytes for group in groups}
    if len(sizes) > 1:
        raise ConfigError(
            f"the model's KV-cache groups have pages of {' and '.join(map(str, sorted(sizes)))} bytes, and layerkv "
            "needs one size for all: set --kv-cache-layout to a layout whose name begins with L, or use another model"
        )
    return sizes.pop()


def _group(vllm_config: VllmConfig, group: KVCacheGroupSpec) -> Group:
    spec: Any = group.kv_cache_spec
    tokens, num_layers = spec.block_size, len(group.layer_names)
    if isinstance(spec, MambaSpec):  # of the last token, and of none before it
        return Group(tokens, num_layers, window=2, is_state=True, most_blocks=1 + spec.num_speculative_blocks)
    if not isinstance(spec, SlidingWindowSpec | ChunkedLocalAttentionSpec):
        return Group(tokens, num_layers)
    most_blocks = spec.max_admission_blocks_per_request(
        max_in_flight_tokens=vllm_config.max_in_flight_tokens, max_model_len=vllm_config.model_config.max_model_len
    )
    if isinstance(spec, SlidingWindowSpec):
        window = spec.sliding_window + getattr(spec, "extra_retained_tokens", 0)
        return Group(tokens, num_layers, window=window, most_blocks=most_blocks)
    return Group(tokens, num_layers, chunk=spec.attention_chunk_size, most_blocks=most_blocks)


def zeroes_blocks(specs: Iterable[KVCacheSpec]) -> bool:
    """Whether vLLM zeroes new blocks: states are read before they are written, and other numbers look like none."""
    kinds = {(spec.dtype, spec.kv_quant_mode) if isinstance(spec, AttentionSpec) else None for spec in specs}
    return None in kinds or len(kinds) > 1
