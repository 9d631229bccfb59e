"""A small random model of which some layers have no attention, as in Nemotron-NAS; made without downloads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL_TYPE = "nemotron-nas"


def make_with_gaps(tiny_model: Path, folder: Path, without: Sequence[int]) -> Path:
    """The tiny Llama with no attention in these layers. Whoever serves it calls :func:`know_gaps` before."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    blocks = [
        {
            "attention": {"no_op": layer in without, "n_heads_in_group": group},
            "ffn": {"no_op": False, "intermediate_size": config["intermediate_size"], "hidden_act": "silu"},
        }
        for layer in range(config["num_hidden_layers"])
    ]
    config |= {"model_type": MODEL_TYPE, "architectures": ["DeciLMForCausalLM"], "block_configs": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    parts = ("self_attn.", "input_layernorm.")
    gone = tuple(f"model.layers.{layer}.{part}" for layer in without for part in parts)
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(gone)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class _Part(dict[str, Any]):
    """What vLLM reads by attributes, and hashes as JSON."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def know_gaps() -> None:
    """Let this process read such a model's configuration, which comes with code of its own elsewhere."""
    from transformers import AutoConfig, LlamaConfig

    class GapsConfig(LlamaConfig):
        model_type = MODEL_TYPE
        block_configs: list[Any] | None = None

        def __post_init__(self, **kwargs: Any) -> None:
            self.block_configs = [
                _Part({name: _Part(values) for name, values in block.items()}) for block in self.block_configs or ()
            ]
            super().__post_init__(**kwargs)

    AutoConfig.register(MODEL_TYPE, GapsConfig)
