"""The families of :mod:`tests.vllm.test_families`: what is tried of each, with which models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.vllm.mix import MixRequest
from tests.vllm.test_exact import SCARCE_BYTES, Setting

MIXES: list[dict[str, Any]] = [{"seed": 0, "sharing": True}, {"seed": 1}, {"seed": 2, "sharing": True, "aborts": True}]
NUM_ADAPTERS = 3

SCARCE = Setting("scarce", {"zone_tokens": 320})
AHEAD = Setting(
    "ahead-failing-fetches", {"zone_tokens": 320}, ahead=True, fail_every=2, must_move=("fetches", "recomputes")
)
FAILING = Setting("failing-fetches", {"zone_tokens": 320}, fail_every=2, must_move=("fetches", "recomputes"))
HOST_SMALL = Setting(
    "host-memory-too-small",
    {"zone_tokens": 64, "host_memory": "1MiB"},
    {"kv_cache_memory_bytes": 3 << 20},
    must_move=("recomputes",),
)
TWO_RANKS = Setting(
    "tensor-parallel-2",
    {"zone_tokens": 320},
    {"tensor_parallel_size": 2, "kv_cache_memory_bytes": SCARCE_BYTES // 2},
    alone=True,
)


@dataclass(frozen=True)
class Family:
    """Models of one kind, or one feature.

    Attributes:
        name: In the tests' names.
        title: In the table of the docs.
        recipe: Its model's, in :mod:`tests.vllm.tiny_families`; None for the tiny Llama.
        mix: What its requests have that others have not.
        engine: Arguments of its engines, stock ones too.
        spec: What else :mod:`tests.vllm.mix_engine` is told.
        env: Of its engines' processes.
        settings: What is tried.
        is_compared: Whether a request's tokens are the same however stock vLLM came by them, given whether it was
            computed in other steps than stock's: again, or its prompt in parts (a step's budget follows the clock).
        ranks_differ: Whether stock's tokens change with tensor parallelism: then the reference has as many ranks.
        remark: What the table says of it.
        is_grouped: Whether its recipe is in :mod:`tests.vllm.tiny_groups`.
        cpu_flag: What a CPU has to have for it, as Linux calls that.
    """

    name: str
    title: str
    recipe: str | None = None
    mix: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    settings: tuple[Setting, ...] = (SCARCE, AHEAD, HOST_SMALL)
    is_compared: Callable[[MixRequest, bool], bool] = lambda request, in_other_steps: True
    ranks_differ: bool = False
    remark: str = ""
    is_grouped: bool = False
    cpu_flag: str = ""


def sized(setting: Setting, **changes: Any) -> Setting:
    """The setting with other engine arguments."""
    return replace(setting, engine={**setting.engine, **changes})


SEEING = {"mix": {"images": True, "max_prompt": 200}, "spec": {"sees": True}}
LIMITS = {"limit_mm_per_prompt": {"image": 2, "video": 0}, "mm_processor_cache_gb": 0}
# MLA on a CPU: blocks of 16 tokens and 216 KiB, prompts in one chunk, no prefix caching; tokens change with the batch.
LATENT = {
    "block_size": 16,
    "max_num_seqs": 1,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 10 << 20,
    "attention_backend": "CPU_MLA",  # where there is AMX vLLM prefers a backend that takes no float32
}
LATENT_HOST_SMALL = replace(
    sized(HOST_SMALL, kv_cache_memory_bytes=9 << 20), extra={"zone_tokens": 64, "host_memory": "2MiB"}
)
DRAFTED = ("accepted_drafts", "rejected_drafts")
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}

FAMILIES = [
    Family("qwen3-moe", "Qwen3-MoE", "qwen3_moe", settings=(SCARCE, AHEAD, HOST_SMALL, TWO_RANKS)),
    Family("mixtral", "Mixtral", "mixtral"),
    Family("qwen2.5-vl", "Qwen2.5-VL, with images", "qwen2_5_vl", engine=LIMITS, **SEEING),
    Family(
        "qwen3-vl",
        "Qwen3-VL, with images",
        "qwen3_vl",
        mix=SEEING["mix"],
        engine=LIMITS,
        spec={**SEEING["spec"], "encoder_cache": 40},
        remark="with an encoder cache of about one image",
    ),
    *(
        Family(
            name,
            title,
            name.replace("-", "_"),
            engine=LATENT,
            is_compared=lambda request, in_other_steps: not in_other_steps,
            ranks_differ=True,
            settings=(SCARCE, AHEAD, LATENT_HOST_SMALL, *others),
            remark="a request a step, and none that was computed again: on a CPU, stock's tokens change with the batch",
        )
        for name, title, others in (
            ("deepseek-v2", "DeepSeek V2 (MLA)", (sized(TWO_RANKS, kv_cache_memory_bytes=10 << 20),)),
            ("deepseek-v3", "DeepSeek V3 (MLA)", ()),
        )
    ),
    *(
        Family(
            name,
            title,
            name.replace("-", "_"),
            engine={"disable_hybrid_kv_cache_manager": True},
            remark="with `--disable-hybrid-kv-cache-manager`",
        )
        for name, title in (("gpt-oss", "gpt-oss"), ("gemma3", "Gemma 3"))
    ),
    Family(
        "ngram",
        "n-gram speculation",
        mix={"repeats": True},
        engine={"speculative_config": NGRAM},
        settings=tuple(
            # with numba in its process, vLLM starts no second engine there
            replace(setting, must_move=(*setting.must_move, *DRAFTED), alone=True)
            for setting in (SCARCE, FAILING, HOST_SMALL)
        ),
    ),
    *(
        Family(
            name,
            title,
            spec={"drafter": method},
            engine={"kv_cache_memory_bytes": scarce},
            settings=tuple(
                replace(setting, must_move=(*setting.must_move, *DRAFTED))
                for setting in (
                    SCARCE,
                    FAILING,
                    replace(
                        sized(HOST_SMALL, kv_cache_memory_bytes=scarce // 2),
                        extra={"zone_tokens": 64, "host_memory": "1500KiB"},
                    ),
                )
            ),
            remark=remark,
        )
        for name, title, method, scarce, remark in (
            ("eagle", "EAGLE", "eagle", 9 << 20, "a head of three layers"),
            ("draft-model", "a draft model", "draft_model", 10 << 20, "of four layers of six"),
        )
    ),
    Family(
        "lora",
        "LoRA, several adapters",
        mix={"adapters": NUM_ADAPTERS},
        engine={"enable_lora": True, "max_loras": 1, "max_lora_rank": 8, "max_cpu_loras": NUM_ADAPTERS},
        spec={"adapters": None},
        is_compared=lambda request, in_other_steps: request.adapter > 0,
        remark="`--max-loras 1`; of requests with an adapter: on a CPU, stock's tokens of others change with the batch",
    ),
    Family("embeds", "prompt embeddings", mix={"embeds": True}, engine={"enable_prompt_embeds": True}),
    Family(
        "fp8",
        "FP8 KV cache",
        engine={"kv_cache_dtype": "fp8", "kv_cache_memory_bytes": SCARCE_BYTES // 4},
        settings=(
            SCARCE,
            AHEAD,
            replace(
                sized(HOST_SMALL, kv_cache_memory_bytes=3 << 18), extra={"zone_tokens": 64, "host_memory": "256KiB"}
            ),
        ),
    ),
]

# Several KV-cache groups ----------------------------------------------------------------------------------------------

RESIDENT = Setting("resident", {"mode": "resident"}, must_move=("parks", "fetches"))
JUST_AHEAD = Setting("scheduled-ahead", SCARCE.extra, ahead=True)
NO_CACHE = {"enable_prefix_caching": False}  # vLLM keeps states at block boundaries otherwise
BATCH_DEPENDENT = (
    "a request a step, prompts whole, and none that was computed again: on a CPU, stock's tokens change with the batch"
)


def _grouped(
    name: str,
    title: str,
    remark: str,
    *,
    kib: int,
    resident_kib: int = 0,
    host_kib: int = 1024,
    engine: dict[str, Any] | None = None,
    **more: Any,
) -> Family:
    """A family as vLLM groups its layers, with its recipe in :mod:`tests.vllm.tiny_groups`.

    Args:
        name: Its recipe's, with dashes.
        title: In the table of the docs.
        remark: Likewise.
        kib: KV memory, zone included, in which two or three requests find room.
        resident_kib: The same without a zone, where residents outgrow the pool; 0 where they do not, since what they
            leave behind makes room for what they add.
        host_kib: Host memory that holds one request or two.
        engine: Further arguments of its engines.
        more: Of :class:`Family`.
    """
    small = replace(SCARCE, name="host-memory-small", extra={**SCARCE.extra, "host_memory": f"{host_kib}KiB"})
    first = sized(RESIDENT, kv_cache_memory_bytes=resident_kib << 10) if resident_kib else JUST_AHEAD
    return Family(
        name,
        title,
        name.replace("-", "_"),
        engine={"skip_tokenizer_init": True, "kv_cache_memory_bytes": kib << 10, **(engine or {})},
        settings=(first, SCARCE, AHEAD, small),
        remark=remark,
        is_grouped=True,
        **more,
    )


FAMILIES += [
    _grouped("gemma4", "Gemma 4", "windows in blocks of 64 tokens, full attention of 32", kib=3072, resident_kib=2560),
    _grouped("olmo3", "Olmo 3", "three windows to one full attention: four groups", kib=3584),
    _grouped("cohere2", "Cohere 2", "four groups of one layer each", kib=2048),
    _grouped("mistral", "Mistral", "windows in all layers: one group that gives blocks back", kib=2048, host_kib=512),
    _grouped(
        "llama4",
        "Llama 4",
        "three layers of chunks to one of full attention: four groups",
        kib=3584,
        env={"VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE": "1"},  # vLLM makes one group of them otherwise
    ),
    _grouped(
        "falcon-h1", "Falcon H1", "attention and a state in every layer", kib=6144, resident_kib=4096, engine=NO_CACHE
    ),
    _grouped(
        "nemotron-h", "Nemotron H", "layers of states beside attention", kib=3072, resident_kib=2048, engine=NO_CACHE
    ),
    _grouped(
        "lfm2",
        "LFM2",
        f"short convolutions beside attention; {BATCH_DEPENDENT}",
        kib=2560,
        engine={**NO_CACHE, "max_num_seqs": 1, "max_num_batched_tokens": 400},
        is_compared=lambda request, in_other_steps: not in_other_steps,
    ),
    _grouped(
        "qwen3-next",
        "Qwen3-Next",
        "gated delta nets beside attention, in bfloat16; a request a step, prompts whole, and none that was computed "
        "again: on a CPU, stock's tokens change with the chunks",
        kib=6144,
        host_kib=3072,
        engine={**NO_CACHE, "max_num_seqs": 1, "max_num_batched_tokens": 400, "dtype": "bfloat16"},
        cpu_flag="avx512_bf16",
        is_compared=lambda request, in_other_steps: not in_other_steps,
    ),
]
