"""`TinyModel` in torch: its kernels are enqueued on the current stream of whatever device the arena is on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout, SegmentPlan
from layerkv.device.mechanism import ALIGNMENT_BYTES, make_mechanism
from tests.fakes.segment_server import SegmentServer
from tests.fakes.tiny_server import Row, TinyServer

WORD_BYTES = 8


class TorchModel:
    """Writes and checks the same numbers. Nothing waits for the device: what was wrong is counted there."""

    def __init__(self, tensor: torch.Tensor, geometry: KVGeometry) -> None:
        words = geometry.page_bytes // geometry.block_tokens // WORD_BYTES
        shape = (geometry.num_layers, geometry.total_blocks, geometry.block_tokens, words)
        self._kv = tensor.view(torch.int64).view(shape)
        self._block_tokens = geometry.block_tokens
        self._num_wrong = torch.zeros((), dtype=torch.int64, device=tensor.device)
        self.num_checked = 0

    @property
    def num_wrong(self) -> int:
        """Words that some layer read and that were not its own; waits for the device."""
        return int(self._num_wrong)

    def layer(self, layer: int, rows: Sequence[Row]) -> None:
        """Enqueue the layer's KV-cache update, then its attention."""
        kv, device = self._kv[layer], self._kv.device
        for row in rows:
            blocks, tokens = (torch.tensor(ids, device=device) for ids in (row.block_ids, row.token_ids))
            positions = torch.arange(len(row.token_ids), device=device)
            places = blocks[positions // self._block_tokens], positions % self._block_tokens
            numbers = ((tokens * 1_000 + positions) * 100 + layer + 1)[:, None]
            new = slice(row.num_computed, None)
            kv[places[0][new], places[1][new]] = numbers[new].expand(-1, kv.shape[-1])
            self._num_wrong += (kv[places] != numbers).sum()
            self.num_checked += len(row.token_ids)


def device_server(
    device_type: str, num_layers: int, lanes: int, retained_layers: int, num_host_blocks: int
) -> TinyServer:
    """A tiny server over the real mechanism of a device, with blocks large enough that copies take their time."""
    page_bytes = ALIGNMENT_BYTES["cuda"] // 8
    geometry = KVGeometry(
        num_layers=num_layers,
        page_bytes=page_bytes,
        block_tokens=4,
        pool_blocks=16,
        zone_blocks=16,
        lanes=lanes,
        retained_layers=retained_layers,
    )
    mechanism = make_mechanism(device_type, geometry, num_host_blocks)
    assert mechanism.wait_ready(60.0), "host memory cannot be pinned"
    model = TorchModel(mechanism.arena.tensor(), geometry)
    return TinyServer(mechanism.arena, mechanism.engine, model, num_host_blocks)  # type: ignore[arg-type]


def segment_device_server(
    device_type: str, num_layers: int, lanes: int, retained_layers: int, num_host_blocks: int
) -> SegmentServer:
    """The same with a pool of four segments, of four blocks each."""
    layout = SegmentLayout(segment_blocks=4, num_segments=4)
    geometry = KVGeometry(
        num_layers=num_layers,
        page_bytes=ALIGNMENT_BYTES["cuda"] // layout.segment_blocks,
        block_tokens=4,
        pool_blocks=16,
        zone_blocks=16,
        lanes=lanes,
        retained_layers=retained_layers,
    )
    mechanism = make_mechanism(device_type, geometry, num_host_blocks, SegmentPlan(layout, 4), guards=True)
    assert mechanism.wait_ready(60.0), "host memory cannot be pinned"
    arena = mechanism.elastic_arena
    assert arena is not None
    model = TorchModel(arena.tensor(), geometry)
    return SegmentServer(arena, mechanism.engine, model, num_host_blocks, layout, 4)  # type: ignore[arg-type]
