"""How much host memory an engine may take: what ``host_memory`` asks for, or a default, within what its machine allows.

Beside it stand the workers' own memory and, on a CPU, the KV cache. What the first worker found is carried by our
KV-cache spec, so that the scheduler and every worker count the same host blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerkv.config import EngineConfig
from layerkv.core.geometry import KVGeometry
from layerkv.errors import ConfigError
from layerkv.machine_memory import MemoryLimit, held_bytes, memory_limit
from layerkv.units import format_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_DEFAULT_SHARE = 0.25
"""Of the memory limit, at most so much is host memory. Not measured: chosen by judgement."""
_DEFAULT_SHARE_OF_REST = 0.5
"""Front ends and engine cores need memory too, and what is free now may be needed by others. Not measured: chosen by
judgement."""
_DEFAULT_FACTOR = 4
"""Host memory is so many times the KV memory. Not measured: chosen by judgement."""
_KV_MEMORY = "--kv-cache-memory-bytes (on a CPU also VLLM_CPU_KVCACHE_SPACE)"
_WHERE = "kv_connector_extra_config.host_memory"


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """What a worker finds once its weights are loaded: the limit that holds for it, and what it has of that."""

    limit: MemoryLimit
    held_bytes: int

    @classmethod
    def here(cls) -> WorkerMemory:
        """As it is in this process now."""
        return cls(memory_limit(), held_bytes())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Everything of one machine's engines that is in its memory, but host memory.

    Attributes:
        limit: What all of them may use together.
        engines: Engines on this machine (data parallelism).
        workers: Workers of each (tensor parallelism).
        kv_bytes: KV cache of a worker, if that is in the same memory.
        held_bytes: What else a worker has.
        kv_setting: What the size of the KV cache comes from.
    """

    limit: MemoryLimit
    engines: int = 1
    workers: int = 1
    kv_bytes: int = 0
    held_bytes: int = 0
    kv_setting: str = _KV_MEMORY

    @property
    def rest_bytes(self) -> int:
        """What is left for the host memory of one engine. May be below 0."""
        return self.limit.size_bytes // self.engines - self.workers * (self.kv_bytes + self.held_bytes)

    def default_bytes(self, kv_bytes: int) -> int:
        """Host memory of an engine that was not told how much, with ``kv_bytes`` of KV memory on each worker."""
        share = int(self.limit.size_bytes * _DEFAULT_SHARE) // self.engines
        rest = max(int(self.rest_bytes * _DEFAULT_SHARE_OF_REST), 0)
        return min(_DEFAULT_FACTOR * kv_bytes * self.workers, share, rest)

    def require(self, host_bytes: int) -> None:
        """Refuse more host memory than there is.

        Raises:
            ConfigError: with all figures, and what to set.
        """
        if host_bytes <= self.rest_bytes:
            return
        raise ConfigError(f"{_WHERE}: found {format_bytes(host_bytes)}{self.sum_beside(host_bytes)}")

    def sum_beside(self, host_bytes: int) -> str:
        """The rest of a sentence: what stands beside that much host memory, what there is, and what to set."""
        parts = [f" for each of this machine's {self.engines} engines"] if self.engines > 1 else []
        beside = []
        if self.kv_bytes:
            beside.append(f"{format_bytes(self.kv_bytes * self.workers)} of KV memory")
        if self.held_bytes:
            beside.append(f"{format_bytes(self.held_bytes * self.workers)} that its workers hold already (weights)")
        if beside:
            parts.append(f" beside {' and '.join(beside)}")
        if parts:
            total = self.engines * (host_bytes + self.workers * (self.kv_bytes + self.held_bytes))
            parts.append(f", together {format_bytes(total)}")
        limit = f", but {self.limit.owner} has {format_bytes(self.limit.size_bytes)} of memory"
        advice = []
        if self.rest_bytes > 0:
            advice.append(f"set host_memory to less than {format_bytes(self.rest_bytes)}")
        if self.kv_bytes:
            advice.append(f"set {self.kv_setting} to less")
        return "".join(parts) + limit + "; " + (", or ".join(advice) or "run it where there is more memory")


def require_host_memory(vllm_config: VllmConfig, config: EngineConfig, limit: MemoryLimit | None = None) -> None:
    """Check ``host_memory`` as far as it needs no engine, so that a mistake ends start-up at once.

    Raises:
        ConfigError: it is more than this process may use.
    """
    if config.host_memory_bytes is not None:
        kv_bytes = vllm_config.cache_config.kv_cache_memory_bytes or 0
        if config.broker is not None:
            kv_bytes = config.kv_floor_bytes or 0
        elif config.kv_ceiling_bytes is not None:
            kv_bytes = config.kv_ceiling_bytes
        plan = _plan(vllm_config, config, limit or memory_limit(), kv_bytes=kv_bytes, held_bytes=0)
        plan.require(config.host_memory_bytes)


def host_blocks_per_worker(
    vllm_config: VllmConfig, config: EngineConfig, geometry: KVGeometry, memory: WorkerMemory
) -> int:
    """Host blocks of each worker: ``host_memory`` is for the whole engine, divided among tensor-parallel ranks.

    Raises:
        ConfigError: it is more than this process may use, or less than one block.
    """
    kv_bytes = geometry.physical_bytes
    plan = _plan(vllm_config, config, memory.limit, kv_bytes=kv_bytes, held_bytes=memory.held_bytes)
    if config.host_memory_bytes is not None:
        plan.require(config.host_memory_bytes)
    total = plan.default_bytes(kv_bytes) if config.host_memory_bytes is None else config.host_memory_bytes
    blocks = total // plan.workers // geometry.block_bytes
    if blocks:
        return blocks
    needed = plan.workers * geometry.block_bytes
    if config.host_memory_bytes is None:
        raise ConfigError(f"{_WHERE}: the default leaves {format_bytes(total)}{plan.sum_beside(needed)}")
    raise ConfigError(
        f"{_WHERE}: found {format_bytes(total)} for {plan.workers} worker(s), but one host block takes "
        f"{format_bytes(geometry.block_bytes)} on each; set host_memory to more"
    )


def _plan(
    vllm_config: VllmConfig, config: EngineConfig, limit: MemoryLimit, *, kv_bytes: int, held_bytes: int
) -> MemoryPlan:
    parallel = vllm_config.parallel_config
    kv_setting = _KV_MEMORY
    if config.broker is not None and config.kv_floor_bytes is not None:
        kv_setting = "kv_floor"
    elif config.broker is None and config.kv_ceiling_bytes is not None:
        kv_setting = "kv_ceiling"
    return MemoryPlan(
        limit,
        engines=max(parallel.data_parallel_size_local, 1),
        workers=parallel.tensor_parallel_size,
        kv_bytes=kv_bytes if vllm_config.device_config.device_type == "cpu" else 0,
        held_bytes=held_bytes,
        kv_setting=kv_setting,
    )
