"""The benchmark's peer `vllm-cpu-offload` on the CPU build: vLLM's own connector with copies that need no GPU.

vLLM's SimpleCPUOffloadConnector keeps an LRU prefix cache of KV blocks in host memory. Its scheduler side is the same
on every device, but its worker copies with CUDA streams and cuMemcpyBatchAsync. :class:`CpuOffloadPeer` inherits the
connector and exchanges only that worker's copies; it is loaded through vLLM's public `kv_connector_module_path`
(see :func:`layerkv.bench.suite.engines.offload_connector`). On CUDA the benchmark runs vLLM's connector itself.

Runs in vLLM's processes. Invariant: copies are carried out one after the other, in the order in which vLLM asked for
them, and an event ends only after the bytes are there.

What the connector does (vLLM 0.32.0, scheduler side, unchanged here):

- Eager, the default: each step stores the full blocks, prompt or output, of its requests that earlier steps have
  computed; what is left is stored after the request's end. A block that the host has already is not stored again.
- Lazy (`"lazy_offload": true`): each step walks the front of the device's free queue, about two batches of blocks far,
  and stores hashed blocks there, so only what is near eviction.
- A hit is looked up once, when a request is about to be admitted, for the blocks that follow its prefix found on the
  device, and loads asynchronously: the request waits outside the running queue until its blocks are there. At least
  its last token is computed.
- Running requests are never moved out to host memory. A preempted request is computed again, but for the prefix that
  either cache still has.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import SimpleCPUOffloadConnector
from vllm.logger import init_logger
from vllm.v1.simple_kv_offload.worker import SimpleCPUOffloadWorker

from layerkv.core.transfer import merge_runs
from layerkv.device.base import COPY_TIMEOUT_S
from layerkv.errors import ConfigError, TransferError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(f"vllm.{__name__}")  # under vLLM's name, so that vLLM's log configuration applies


class CopyEvent:
    """The part of `torch.Event` that vLLM's worker asks for. Set once, by the thread that copies."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def end(self, error: BaseException | None = None) -> None:
        """Mark the copy ended, well or with an error."""
        self._error = error
        self._ended.set()

    def query(self) -> bool:
        """Whether the copy has ended.

        Raises:
            TransferError: it failed. The worker asks in every step, so this ends the engine.
        """
        if not self._ended.is_set():
            return False
        if self._error is not None:
            raise TransferError(f"a copy of vllm-cpu-offload failed: {self._error}") from self._error
        return True

    def synchronize(self) -> None:
        """Block until the copy has ended.

        Raises:
            TransferError: it failed, or takes longer than any copy can.
        """
        if not self._ended.wait(COPY_TIMEOUT_S):
            raise TransferError(f"a copy of vllm-cpu-offload did not end in {COPY_TIMEOUT_S:.0f} s")
        self.query()


class CpuCopyBackend:
    """One thread that copies blocks between two sets of regions, in place of vLLM's `DmaCopyBackend`.

    Args:
        device_regions, host_regions: Pairs of regions, `[num_blocks, block_bytes]` each; their memory is kept for as
            long as this object lives.
    """

    def __init__(self, device_regions: Sequence[torch.Tensor], host_regions: Sequence[torch.Tensor]) -> None:
        self._regions = list(zip(device_regions, host_regions, strict=True))
        self._num_device_blocks, self._num_host_blocks = len(device_regions[0]), len(host_regions[0])
        self._copies: queue.SimpleQueue[tuple[list[int], list[int], bool, CopyEvent] | None] = queue.SimpleQueue()
        self._is_shut_down = False
        self._thread = threading.Thread(target=self._work, name="vllm-cpu-offload", daemon=True)
        self._thread.start()

    def launch_copy(
        self,
        src_blocks: list[int],
        dst_blocks: list[int],
        is_store: bool,  # noqa: FBT001 (vLLM's signature)
        event_idx: int,
        events_list: list[tuple[int, CopyEvent]],
        wait_event: None = None,
    ) -> None:
        """Queue a copy of whole blocks, and append its event to `events_list`.

        The event is appended here, not by the thread, so that a flush before preempted blocks are used again waits for
        copies that have not begun, too.

        Raises:
            TransferError: after :meth:`shutdown`.
        """
        assert wait_event is None  # compute on a CPU is synchronous: what vLLM would wait for has ended
        if self._is_shut_down:
            raise TransferError("a copy was submitted after vllm-cpu-offload was shut down")
        device, host = (src_blocks, dst_blocks) if is_store else (dst_blocks, src_blocks)
        event = CopyEvent()
        events_list.append((event_idx, event))
        self._copies.put((device, host, is_store, event))

    def shutdown(self) -> None:
        """Carry out what is queued, and end the thread."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        self._copies.put(None)
        self._thread.join(COPY_TIMEOUT_S)

    def _work(self) -> None:
        while (copy := self._copies.get()) is not None:
            device, host, is_store, event = copy
            try:
                self._copy(device, host, is_store=is_store)
                event.end()
            except BaseException as error:  # the edge of this thread: whoever waits must hear of it
                event.end(error)

    def _copy(self, device_blocks: list[int], host_blocks: list[int], *, is_store: bool) -> None:
        runs = merge_runs(device_blocks, host_blocks)
        for device_block, host_block, num_blocks in runs:
            if device_block + num_blocks > self._num_device_blocks or host_block + num_blocks > self._num_host_blocks:
                raise TransferError(f"run {device_block}, {host_block}, {num_blocks} is outside")
        memmove = ctypes.memmove  # releases the GIL for the copy, so compute goes on
        for device, host in self._regions:
            block_bytes, on_device, on_host = device.stride(0), device.data_ptr(), host.data_ptr()
            for device_block, host_block, num_blocks in runs:
                ends = on_host + host_block * block_bytes, on_device + device_block * block_bytes
                target, source = ends if is_store else ends[::-1]
                memmove(target, source, num_blocks * block_bytes)


class CpuOffloadWorker(SimpleCPUOffloadWorker):
    """vLLM's worker side over a :class:`CpuCopyBackend`: books, polling and flushes are vLLM's."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the KV memory of each layer, and reserve the host memory that its copies go to.

        As in vLLM: every region is a `[num_blocks, block_bytes]` view of the one KV allocation.

        Raises:
            ConfigError: the layer is not the outermost dimension of the KV memory.
        """
        if not kv_caches:
            logger.warning("No KV caches to offload.")
            return
        self.device = next(iter(kv_caches.values())).device
        self.gpu_kv_caches = _regions(self.kv_cache_config, kv_caches)
        block_bytes = sum(region.stride(0) for region in self.gpu_kv_caches.values())
        self.num_cpu_blocks = max(1, self.cpu_capacity_bytes // block_bytes)
        logger.info(
            "CpuOffloadWorker: %d regions, %d host blocks (%.2f GB)",
            len(self.gpu_kv_caches),
            self.num_cpu_blocks,
            self.num_cpu_blocks * block_bytes / 1024**3,
        )
        self.cpu_kv_caches = {
            name: torch.zeros((self.num_cpu_blocks, region.stride(0)), dtype=torch.int8)
            for name, region in self.gpu_kv_caches.items()
        }
        self._backend = CpuCopyBackend(list(self.gpu_kv_caches.values()), list(self.cpu_kv_caches.values()))

    def wait_for_save(self) -> None:
        """Queue this step's stores. The forward has ended, so there is no compute to order them after."""
        metadata = self._connector_metadata
        if metadata is not None and metadata.store_gpu_blocks:
            assert self._backend is not None
            self._backend.launch_copy(
                metadata.store_gpu_blocks,
                metadata.store_cpu_blocks,
                is_store=True,
                event_idx=metadata.store_event,
                events_list=self._store_events,
            )

    def shutdown(self) -> None:
        """End the copy thread after its last copy."""
        if self._backend is not None:
            self._backend.shutdown()


class CpuOffloadPeer(SimpleCPUOffloadConnector):
    """vLLM's SimpleCPUOffloadConnector for CPU workers."""

    worker_handler: SimpleCPUOffloadWorker | None

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        stock = self.worker_handler
        if stock is None:
            return
        if stock.disk_mode:
            raise ConfigError('kv_offload_backend: CpuOffloadPeer copies to memory only; found "disk", set "cpu"')
        self.worker_handler = CpuOffloadWorker(stock.vllm_config, stock.kv_cache_config, stock.cpu_capacity_bytes)

    def shutdown(self) -> None:
        """End the worker's copies; called when vLLM's worker shuts down."""
        if isinstance(self.worker_handler, CpuOffloadWorker):
            self.worker_handler.shutdown()


def _regions(kv_cache_config: KVCacheConfig | None, kv_caches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each layer's KV as `[num_blocks, block_bytes]`, by name, in the order of the KV configuration."""
    assert kv_cache_config is not None
    num_blocks = kv_cache_config.num_blocks
    regions: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for placed in kv_cache_config.kv_cache_tensors:
        name = next((layer for layer in placed.layers if layer in kv_caches), None)
        if name is None:
            continue
        block_bytes = placed.block_stride
        if placed.layer_stride < num_blocks * block_bytes:
            raise ConfigError(
                f"KV layout: {name} has a layer stride of {placed.layer_stride} bytes for {num_blocks} blocks of "
                f"{block_bytes} bytes; CpuOffloadPeer expects the layer outermost, as vLLM's CPU backend has it"
            )
        raw = torch.empty(0, dtype=torch.int8).set_(kv_caches[name].untyped_storage())
        span = raw[placed.offset : placed.offset + len(placed.layers) * placed.layer_stride]
        views = span.view(-1, num_blocks, block_bytes)
        per_layer, rest = divmod(len(views), len(placed.layers))
        assert rest == 0
        for index, view in enumerate(views):
            if view.data_ptr() in seen:
                continue
            seen.add(view.data_ptr())
            layer = placed.layers[index // per_layer]
            regions[layer if per_layer == 1 else f"{layer}.{index % per_layer}"] = view
    return regions
