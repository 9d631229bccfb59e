"""Our KV-cache specs and their managers: where a layered request's blocks come from.

Importing this module registers them with vLLM, in whichever process it is imported: workers make the specs, and the
engine core imports the module when it unpickles one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from layerkv.core.ledger import KVLedger
from layerkv.core.segments import SegmentPlan
from layerkv.core.zone import ZoneLedger
from layerkv.vllm_plugin.host_memory import WorkerMemory

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Registering the first spec of all would keep vLLM from registering its own (it does so only while there is none).
KVCacheSpecRegistry._ensure_registered()


class ZonePool:
    """What vLLM gives zone blocks back to. vLLM routes every free, deferred ones too, by ``KVCacheBlock.pool``."""

    def __init__(self, zone: ZoneLedger) -> None:
        self._zone = zone

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Give blocks back to the zone."""
        freed = []
        for block in ordered_blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt == 0, "a zone block has one owner"
            freed.append(block.block_id)
        self._zone.give_back(freed)


class WatchedPool(BlockPool):
    """vLLM's pool, which it is in all but name, for a manager that is to tell which blocks it gives out.

    It has the pool's own state: whoever gets no blocks pays nothing for it, not even a look-up.
    """

    __slots__ = ("_gave_out",)

    def __init__(self, pool: BlockPool, gave_out: Callable[[list[int]], None]) -> None:
        self.__dict__ = pool.__dict__  # type: ignore[misc]  # vLLM sees a class without slots
        self._gave_out = gave_out

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """The pool's blocks, which are told of."""
        new: list[KVCacheBlock] = super().get_new_blocks(num_blocks)
        if new:
            self._gave_out([block.block_id for block in new])
        return new


_OF_LAYERED = (
    "get_num_blocks_to_allocate",
    "cache_blocks",
    "allocate_new_blocks",
    "allocate_external_computed_blocks",
)
"""What is overridden for layered requests' sake."""


class LayeredBlocks(SingleTypeKVCacheManager):
    """Takes a layered request's new blocks from the lane zone, and everybody else's from the pool.

    Before one of vLLM's managers in a class's bases. Until :meth:`attach` is called it is vLLM's own. Zone blocks never
    enter the pool's free queue and are never hashed for prefix caching, because what they hold changes from layer to
    layer.
    """

    block_pool: BlockPool
    _ledger: KVLedger | None = None
    _stands_aside = False

    def attach(self, ledger: KVLedger) -> None:
        """Called once, before the first request, when the zone's ids have been withheld from the pool."""
        self._ledger = ledger

    def stand_aside(self, *, aside: bool) -> None:
        """Whether what is overridden below is vLLM's own from now on: nobody is there whom it concerns.

        vLLM calls these methods for every running request in every step.
        """
        if aside == self._stands_aside:
            return
        self._stands_aside = aside
        for name in _OF_LAYERED:
            if aside:
                setattr(self, name, getattr(super(), name))
            else:
                del self.__dict__[name]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Pool blocks needed: for a layered request only its hits on the device that nobody holds yet.

        With the zone or host memory full the answer is more than the pool has, so that ``allocate_slots`` declines.
        With ``apply_admission_cap`` vLLM asks for all that a request may come to need. Of one under way, it keeps that
        of the pool, room for drafts included: nothing.
        """
        if self._ledger is None or not self._ledger.is_layered(request_id):
            return super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
        held = self.req_to_blocks.get(request_id, ())
        if held and kwargs.get("apply_admission_cap"):
            return 0
        num_held = len(held) + len(new_computed_blocks)
        num_from_zone = max(cdiv(num_tokens, self.block_size) - num_held, 0)
        can_take = self._ledger.zone.can_take(request_id, num_from_zone, self.kv_cache_group_id)
        if not can_take or self._ledger.lacks_host_blocks(request_id):
            return self.block_pool.num_gpu_blocks + 1
        return self._get_num_evictable_blocks(new_computed_blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Give the request slots for ``num_tokens``, from the zone if it is layered."""
        if self._ledger is None or not self._ledger.is_layered(request_id):
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        return self._take_from_zone(self._ledger.zone, request_id, num_tokens)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Blocks to load a cached prefix into, from the zone if the request is layered."""
        if self._ledger is None or not self._ledger.is_layered(request_id):
            super().allocate_external_computed_blocks(
                request_id, num_local_computed_tokens, num_external_computed_tokens, *args, **kwargs
            )
        else:
            num_tokens = num_local_computed_tokens + num_external_computed_tokens
            self._take_from_zone(self._ledger.zone, request_id, num_tokens)

    def _take_from_zone(self, zone: ZoneLedger, request_id: str, num_tokens: int) -> list[KVCacheBlock]:
        held = self.req_to_blocks[request_id]
        num_new = cdiv(num_tokens, self.block_size) - len(held)
        if num_new <= 0:
            return []
        taken = zone.take(request_id, num_new, self.kv_cache_group_id)
        new = [self.block_pool.blocks[block_id] for block_id in taken]
        for block in new:
            block.ref_cnt = 1
        held.extend(new)
        return new

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Hash full blocks for prefix caching, except a layered request's: its hits are hashed already."""
        if self._ledger is None or not self._ledger.is_layered(request.request_id):
            super().cache_blocks(request, num_tokens, *args, **kwargs)


class LayerKVManager(LayeredBlocks, FullAttentionManager):
    """See :class:`LayeredBlocks`."""


class LayerKVWindowManager(LayeredBlocks, SlidingWindowManager):
    """See :class:`LayeredBlocks`. What a window leaves behind vLLM gives back to where it came from."""


class LayerKVChunkManager(LayeredBlocks, ChunkedLocalAttentionManager):
    """See :class:`LayeredBlocks`. What a chunk leaves behind vLLM gives back to where it came from."""


@register_kv_cache_spec(manager_class=LayerKVManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class LayerKVSpec(FullAttentionSpec):
    """Full attention whose blocks may come from the lane zone: the same fields, another manager.

    ``memory`` is what the first worker found: it goes from there to the scheduler and to all workers. ``segments`` is
    how the pool grows and shrinks; None: it does not.
    """

    memory: WorkerMemory | None = field(default=None, compare=False)
    segments: SegmentPlan | None = field(default=None, compare=False)

    @classmethod
    def merge(cls, specs: list[LayerKVSpec]) -> LayerKVSpec:
        """vLLM's merge, which does not know our fields."""
        return replace(super().merge(specs), memory=specs[0].memory, segments=specs[0].segments)


@register_kv_cache_spec(manager_class=LayerKVWindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclass(frozen=True, kw_only=True)
class LayerKVWindowSpec(SlidingWindowSpec):
    """As :class:`LayerKVSpec`, of attention within a sliding window."""

    memory: WorkerMemory | None = field(default=None, compare=False)


@register_kv_cache_spec(manager_class=LayerKVChunkManager, uniform_type_base_spec=ChunkedLocalAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class LayerKVChunkSpec(ChunkedLocalAttentionSpec):
    """As :class:`LayerKVSpec`, of attention within a chunk."""

    memory: WorkerMemory | None = field(default=None, compare=False)


@register_kv_cache_spec(manager_class=LayerKVManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class LayerKVMLASpec(LayerKVSpec, MLAAttentionSpec):
    """The same for the latent vectors of MLA, of which each rank holds all."""

    head_size_v: int = 0  # as MLA has it: the default that we inherit first is that of keys and values apart


OUR_SPECS = (LayerKVSpec, LayerKVWindowSpec, LayerKVChunkSpec)

OURS: dict[type[KVCacheSpec], type[KVCacheSpec]] = {
    FullAttentionSpec: LayerKVSpec,
    MLAAttentionSpec: LayerKVMLASpec,
    SlidingWindowSpec: LayerKVWindowSpec,
    ChunkedLocalAttentionSpec: LayerKVChunkSpec,
}
"""Which of ours stands for which of vLLM's. What derives from these means something else, and is none of them."""


def is_supported(spec: KVCacheSpec) -> bool:
    """Whether layers of this kind may be served."""
    return type(spec) in OURS or type(spec) is MambaSpec


def ours(spec: KVCacheSpec, memory: WorkerMemory) -> KVCacheSpec:
    """The same spec as ours; a state's stays as it is: it never passes through a lane."""
    if (own := OURS.get(type(spec))) is None:
        return spec
    values = {each.name: getattr(spec, each.name) for each in fields(type(spec))}
    return own(**values, memory=memory)  # type: ignore[call-arg]
