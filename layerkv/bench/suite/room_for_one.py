"""What can be known before any engine starts: whether its KV memory holds one request of `max_model_len` tokens.

Pure functions. vLLM ends with an error where it does not, a quarter of a minute later and for each engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from layerkv.bench.suite.case import Case
from layerkv.bench.tiny_model import ModelShape
from layerkv.errors import ConfigError
from layerkv.units import format_bytes

MIB = 1 << 20
# Of these the case's own options may say otherwise, and vLLM goes by them.
OVERRIDES = ("--max-model-len", "--max_model_len", "--kv-cache-memory-bytes", "--kv_cache_memory_bytes")


def bytes_for_one(shape: ModelShape, *, max_model_len: int, block_tokens: int) -> int:
    """KV memory for one request of `max_model_len` tokens in whole blocks, in float32.

    One block more: vLLM keeps it back for itself, and counts without it.
    """
    num_blocks = -(-max_model_len // block_tokens) + 1
    return num_blocks * block_tokens * shape.kv_bytes_per_token


def rounded_up(size_bytes: int) -> str:
    """A size to be set, in whole MiB: no less than it takes."""
    return format_bytes(-(-size_bytes // MIB) * MIB)


def check_room_for_one(case: Case, kv_memory_bytes: Mapping[str, int], *, where: str) -> list[str]:
    """The engines that the case expects to fail and that will, for want of KV memory, as sentences.

    `kv_memory_bytes` is by engine. An engine of layerkv's with `long_contexts` needs no such room; for one without, its
    lane zone comes out of the same memory, so that what passes here may still be too little.

    Raises:
        ConfigError: another engine of the case has too little.
    """
    settings, shape = case.settings, case.settings.shape
    if shape is None or settings.dtype != "float32":
        return []
    if any(option.split("=")[0] in OVERRIDES for option in settings.options):
        return []
    needed = bytes_for_one(shape, max_model_len=settings.max_model_len, block_tokens=settings.block_tokens)
    notes = []
    for engine, found_bytes in kv_memory_bytes.items():
        if found_bytes >= needed or (settings.long_contexts and engine.startswith("layerkv")):
            continue
        problem = (
            f"{engine} has {format_bytes(found_bytes)} of KV memory; one request of max_model_len "
            f"{settings.max_model_len} needs {format_bytes(needed)}"
        )
        if engine not in case.expected_to_fail:
            key = "oracle_kv_memory" if engine == "oracle" and settings.oracle_kv_memory_bytes else "kv_memory"
            raise ConfigError(
                f"{where}: $.engine.{key}: {problem}, and vLLM does not start with less; set {key} to "
                f"{rounded_up(needed)} or more, max_model_len lower, or expected_to_fail to [{engine}], if that is "
                "the point"
            )
        notes.append(f"{problem}: it will not start, as the case expects.")
    return notes
