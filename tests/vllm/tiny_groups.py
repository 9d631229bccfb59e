"""Tiny random float32 models with several KV-cache groups, made without downloads; as layerkv.bench.tiny_model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerkv.bench.tiny_model import INITIALIZER_RANGE

_COMMON = {
    "dtype": "float32",
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_ATTENTION = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"


def gpt_oss() -> Any:
    """Windows and full attention in turn, sinks, experts: two groups of three layers."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        architectures=["GptOssForCausalLM"],
        num_hidden_layers=6,
        intermediate_size=128,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=64,
        **_ATTENTION,
        **_COMMON,
    )
    return GptOssForCausalLM(config)


def gemma3() -> Any:
    """Two windows to one full attention: three groups of two layers."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        num_hidden_layers=6,
        intermediate_size=256,
        sliding_window=48,
        layer_types=[_SLIDING, _SLIDING, _FULL] * 2,
        query_pre_attn_scalar=64,
        **_ATTENTION,
        **_COMMON,
    )
    return Gemma3ForCausalLM(config)


def olmo3() -> Any:
    """Three windows to one full attention: four groups of two layers."""
    from transformers import Olmo3Config, Olmo3ForCausalLM

    config = Olmo3Config(
        architectures=["Olmo3ForCausalLM"],
        num_hidden_layers=8,
        intermediate_size=256,
        sliding_window=64,
        layer_types=[_SLIDING, _SLIDING, _SLIDING, _FULL] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **{name: value for name, value in _ATTENTION.items() if name != "head_dim"} | {"hidden_size": 256},
        **_COMMON,
    )
    return Olmo3ForCausalLM(config)


def mistral() -> Any:
    """Windows in all layers: one group that gives blocks back."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        architectures=["MistralForCausalLM"],
        num_hidden_layers=4,
        intermediate_size=256,
        sliding_window=64,
        **_ATTENTION,
        **_COMMON,
    )
    return MistralForCausalLM(config)


def llama4(**changes: Any) -> Any:
    """Three layers of chunked local attention to one of full attention, experts: four groups of two layers."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        architectures=["Llama4ForCausalLM"],
        num_hidden_layers=8,
        intermediate_size=128,
        intermediate_size_mlp=128,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=64,
        **_ATTENTION,
        **{**_COMMON, **changes},
    )
    return Llama4ForCausalLM(config)


def llama4_chunks() -> Any:
    """Chunked local attention in all layers, as no checkpoint has it: one group, of which nothing is kept where a chunk
    ends."""
    return llama4(no_rope_layers=[1] * 8)


def granite_h() -> Any:
    """Two layers with states to one of attention: three groups of two layers, two of them of states."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        architectures=["GraniteMoeHybridForCausalLM"],
        num_hidden_layers=6,
        intermediate_size=128,
        shared_intermediate_size=128,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=[_LINEAR, _LINEAR, _FULL] * 2,
        mamba_n_heads=8,
        mamba_d_state=32,
        mamba_chunk_size=64,
        **_ATTENTION,
        **_COMMON,
    )
    return GraniteMoeHybridForCausalLM(config)


def gemma4(**changes: Any) -> Any:
    """Windows of smaller heads than full attention's: blocks of 64 and of 32 tokens."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        architectures=["Gemma4ForCausalLM"],
        num_hidden_layers=6,
        intermediate_size=256,
        sliding_window=48,
        layer_types=[_SLIDING, _SLIDING, _FULL] * 2,
        global_head_dim=64,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=512,
        **{**_ATTENTION, "head_dim": 32},
        **{**_COMMON, **changes},
    )
    return Gemma4ForCausalLM(config)


def gemma4_shared() -> Any:
    """Its last layers share the KV of others."""
    return gemma4(num_kv_shared_layers=2)


def cohere2() -> Any:
    """Three windows to one full attention, without rotary positions there."""
    from transformers import Cohere2Config, Cohere2ForCausalLM

    config = Cohere2Config(
        architectures=["Cohere2ForCausalLM"],
        num_hidden_layers=4,
        intermediate_size=256,
        sliding_window=64,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{**_COMMON, "tie_word_embeddings": True},
    )
    return Cohere2ForCausalLM(config)


def falcon_h1() -> Any:
    """Attention and a state in every layer."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        architectures=["FalconH1ForCausalLM"],
        num_hidden_layers=4,
        intermediate_size=128,
        mamba_d_ssm=256,
        mamba_n_heads=8,
        mamba_d_state=32,
        mamba_chunk_size=64,
        **_ATTENTION,
        **_COMMON,
    )
    return FalconH1ForCausalLM(config)


def nemotron_h() -> Any:
    """Layers of states, of attention and of neither."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        architectures=["NemotronHForCausalLM"],
        layers_block_type=["mamba", "mlp", "attention", "mamba", "mlp", "attention"],
        intermediate_size=128,
        mamba_num_heads=8,
        mamba_head_dim=32,
        n_groups=2,
        ssm_state_size=32,
        chunk_size=64,
        **_ATTENTION,
        **_COMMON,
    )
    return NemotronHForCausalLM(config)


def lfm2() -> Any:
    """Short convolutions, whose states are small, and full attention."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        architectures=["Lfm2ForCausalLM"],
        num_hidden_layers=6,
        intermediate_size=256,
        conv_dim=256,  # as checkpoints say it, and vLLM asks for it
        block_dim=256,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "conv", _FULL] * 2,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{**_COMMON, "tie_word_embeddings": True},
    )
    return Lfm2ForCausalLM(config)


def qwen3_next() -> Any:
    """Three layers of gated delta nets to one of attention: four groups of two layers, three of them of states."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        architectures=["Qwen3NextForCausalLM"],
        num_hidden_layers=8,
        intermediate_size=256,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        **{**_ATTENTION, "head_dim": 256},
        **_COMMON,
    )
    return Qwen3NextForCausalLM(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        gpt_oss,
        gemma3,
        gemma4,
        gemma4_shared,
        olmo3,
        cohere2,
        mistral,
        llama4,
        llama4_chunks,
        granite_h,
        falcon_h1,
        nemotron_h,
        lfm2,
        qwen3_next,
    )
}


_IN_PARTS = ("qwen3_next",)
"""Families whose checkpoints have each expert by itself, and transformers in memory all in one."""


def make_tiny(family: str, folder: Path) -> Path:
    """Write a model of this family into a new folder of its name, and return that."""
    import torch
    from safetensors.torch import save_file

    target = folder / family
    target.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]().to(torch.float32)
    if family in _IN_PARTS:
        model.save_pretrained(target)
        return target
    model.config.save_pretrained(target)
    weights = {name: weight.contiguous().clone() for name, weight in model.state_dict().items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target
