"""Small random float32 models of the families that people serve, made without downloads.

As :mod:`layerkv.bench.tiny_model` does it: transformers makes random weights from a configuration, and nobody reads
what they say. All have the tokenizer of the tiny Llama, six layers and, but for MLA, keys and values of the same size,
so that the same sizes of KV memory are scarce for all.
"""

from __future__ import annotations

import functools
import importlib.machinery
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerkv.bench.tiny_model import INITIALIZER_RANGE

NUM_LAYERS = 6
VOCABULARY_SIZE = 512
WINDOW = 64
SHAPE = {
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
    "vocab_size": VOCABULARY_SIZE,
    "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 64}
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""They come after the tokenizer's own, so that no random prompt holds one."""
START_TOKEN, END_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN = range(VOCABULARY_SIZE, VOCABULARY_SIZE + len(VISION_TOKENS))
IMAGE_TOKENS = (START_TOKEN, IMAGE_TOKEN, END_TOKEN)
"""Of one image in a prompt: vLLM puts as many in the place of the middle one as the image has."""


def _moe(name: str, **experts: int) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(architectures=[f"{name}ForCausalLM"], **SHAPE, **HEADS, **experts)
    return getattr(transformers, f"{name}ForCausalLM"), config


def qwen3_moe() -> Any:
    """Four experts, of which a token takes two, in every layer."""
    return _moe("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)


def mixtral() -> Any:
    """Four experts, of which a token takes two."""
    return _moe("Mixtral", num_local_experts=4, num_experts_per_tok=2)


def gpt_oss() -> Any:
    """Every other layer with a window and attention sinks, and experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    rope = {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    config = GptOssConfig(
        architectures=["GptOssForCausalLM"],
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        rope_parameters=rope,
        **SHAPE,
        **HEADS,
    )
    return GptOssForCausalLM, config


def gemma3() -> Any:
    """Two layers of three with a window."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(NUM_LAYERS)]
    config = Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        sliding_window=WINDOW,
        layer_types=kinds,
        query_pre_attn_scalar=64,
        **SHAPE | {"tie_word_embeddings": True},
        **HEADS,
    )
    return Gemma3ForCausalLM, config


LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": 64}
"""The size of the latent vectors is the only one that vLLM's CPU build computes with."""
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def deepseek_v2() -> Any:
    """MLA, and experts in all layers but the first."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        architectures=["DeepseekV2ForCausalLM"],
        num_key_value_heads=4,
        topk_method="greedy",
        **SHAPE,
        **LATENT,
        **ROUTED,
    )
    return DeepseekV2ForCausalLM, config


def deepseek_v3() -> Any:
    """As V2, with V3's routing."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        num_key_value_heads=4,
        num_mtp_layers=0,
        topk_method="noaux_tc",
        **SHAPE,
        **LATENT,
        **ROUTED,
    )
    return DeepseekV3ForCausalLM, config


VISION_IDS = {
    "vision_start_token_id": START_TOKEN,
    "vision_end_token_id": END_TOKEN,
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": INITIALIZER_RANGE,
}
SIGHTED = SHAPE | {"num_key_value_heads": 4, "vocab_size": VOCABULARY_SIZE + len(VISION_TOKENS)}


def qwen2_5_vl() -> Any:
    """Images, a vision tower with windows, and positions in three dimensions."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={**SIGHTED, "rope_parameters": rope},
        vision_config={**VISION, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        tie_word_embeddings=False,
        **VISION_IDS,
    )
    return Qwen2_5_VLForConditionalGeneration, config


def qwen3_vl() -> Any:
    """Images, whose features enter deeper layers too."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        text_config={**SIGHTED, "head_dim": 32, "rope_parameters": rope},
        vision_config={
            **VISION,
            "patch_size": 16,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=False,
        **VISION_IDS,
    )
    return Qwen3VLForConditionalGeneration, config


RECIPES: dict[str, Callable[[], Any]] = {
    recipe.__name__: recipe
    for recipe in (qwen3_moe, mixtral, gpt_oss, gemma3, deepseek_v2, deepseek_v3, qwen2_5_vl, qwen3_vl)
}


def make_family(name: str, tiny_model: Path, folder: Path) -> Path:
    """Write the model of that recipe into ``folder``, with the tiny Llama's tokenizer. Needs transformers' classes."""
    import torch
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model_class, config = RECIPES[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).to(torch.float32).save_pretrained(folder)
    if "vision_config" in json.loads((folder / "config.json").read_text()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)})
        tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, seed: int, *, rank: int = 8) -> Path:
    """A random LoRA adapter for the tiny Llama's attention, strong enough to change what it says."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    sizes = {"q_proj": (128, 256), "v_proj": (128, 128)}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(NUM_LAYERS):
        for module, (size_in, size_out) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, size_in, generator=generator) * INITIALIZER_RANGE
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size_out, rank, generator=generator) * INITIALIZER_RANGE
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def make_draft_model(tiny_model: Path, folder: Path, *, num_layers: int = 4) -> Path:
    """The tiny Llama without its last layers: what it drafts is right now and then."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config))
    kept = ("model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{layer}." for layer in range(num_layers)))
    weights = load_file(folder / "model.safetensors")
    kept_weights = {name: weight for name, weight in weights.items() if name.startswith(kept)}
    save_file(kept_weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_eagle_head(tiny_model: Path, folder: Path, *, num_layers: int = 3) -> Path:
    """A head for EAGLE: the tiny Llama's first layers, which look at tokens alone. It is right now and then."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    size = config["hidden_size"]
    config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    of_head = {
        name.removeprefix("model."): weight
        for name, weight in weights.items()
        if name.startswith(tuple(f"model.layers.{layer}." for layer in range(num_layers)))
    }
    del of_head["layers.0.input_layernorm.weight"]  # which vLLM leaves out: the embedding has to be what it makes of it
    for projection in "qkv":
        of_head[f"layers.0.self_attn.{projection}_proj.weight"] /= INITIALIZER_RANGE
    of_head["fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1)
    save_file(of_head, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# In the engine's process ----------------------------------------------------------------------------------------------


def can_see() -> None:
    """Let vLLM serve Qwen's vision models without torchvision, which PyPI has for CUDA only.

    vLLM's module for them imports it, and so do transformers' video processors: it is there by name. Images go through
    transformers' own processor for PIL. To be called before an engine is made.
    """
    if "torchvision" in sys.modules:
        return
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []  # type: ignore[attr-defined]
    functional = types.ModuleType("torchvision.transforms.v2.functional")
    sys.modules[functional.__name__] = sys.modules["torchvision.transforms.v2"].functional = functional  # type: ignore[attr-defined]

    from vllm.model_executor.models import ModelRegistry, qwen2_5_vl, qwen3_vl
    from vllm.model_executor.models.qwen2_vl import Qwen2VLProcessingInfo

    for model_class in (qwen2_5_vl.Qwen2_5_VLForConditionalGeneration, qwen3_vl.Qwen3VLForConditionalGeneration):
        ModelRegistry.register_model(model_class.__name__, model_class)
    for info in (Qwen2VLProcessingInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo, qwen3_vl.Qwen3VLProcessingInfo):
        info.get_hf_processor = lambda self, **_: _processor(self.ctx.model_config.model)


def _no_videos() -> Any:
    """What Qwen's processors and vLLM ask of a video processor that never gets a video."""
    from transformers.processing_utils import VideosKwargs

    return types.SimpleNamespace(merge_size=2, temporal_patch_size=2, valid_kwargs=VideosKwargs, size=SIZE)


@functools.lru_cache
def _processor(model: str) -> Any:
    from transformers import AutoTokenizer
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    config = json.loads((Path(model) / "config.json").read_text())
    base: Any = Qwen3VLProcessor if config["model_type"] == "qwen3_vl" else Qwen2_5_VLProcessor

    def check_argument_for_proper_class(self: Any, name: str, argument: Any) -> None:
        """Anything will do for videos."""

    processor_class = type(base.__name__, (base,), {"check_argument_for_proper_class": check_argument_for_proper_class})
    images = Qwen2VLImageProcessorPil(patch_size=config["vision_config"]["patch_size"], size=SIZE)
    return processor_class(images, AutoTokenizer.from_pretrained(model), _no_videos())


SIZE = {"shortest_edge": 28 * 28, "longest_edge": 168 * 168}
"""Pixels of an image."""


def image(seed: int) -> Any:
    """A random image of 4 to 36 of the model's tokens; the same seed, the same image."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(seed)
    height, width = (int(draw.integers(2, 6)) * 28 for _ in range(2))
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


@functools.lru_cache
def embedding_table(model: str) -> Any:
    """The rows of a tiny Llama's embedding, by token id."""
    from safetensors import safe_open

    with safe_open(str(Path(model) / "model.safetensors"), "pt") as weights:
        return weights.get_tensor("model.embed_tokens.weight")
