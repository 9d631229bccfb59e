"""The mechanism on a real GPU: aliased lanes, pinned memory, the order of copies on streams, and the kernels.

The same scenarios run on the CPU engine, so that only the device is new here.
"""

from __future__ import annotations

import pytest
import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun
from layerkv.device.base import Direction
from layerkv.device.mechanism import make_mechanism
from tests.cpu.device.scenarios import SCENARIOS, Scenario
from tests.cpu.device.segment_scenarios import SEGMENT_SCENARIOS, SegmentScenario
from tests.fakes.torch_model import device_server, segment_device_server

pytestmark = pytest.mark.gpu

SHAPES = ((3, 1, 0), (5, 2, 0), (6, 2, 2))
HOST_BLOCKS = 18
GEOMETRY = KVGeometry(num_layers=5, page_bytes=256 << 10, block_tokens=16, pool_blocks=16, zone_blocks=16, lanes=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_layer_reads_right_kv(scenario: Scenario, shape: tuple[int, int, int]) -> None:
    server = device_server("cuda", *shape, HOST_BLOCKS)
    scenario(server)
    assert server.model.num_checked > 0
    assert server.model.num_wrong == 0  # type: ignore[attr-defined]
    assert not server.failed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scenario", SEGMENT_SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_layer_reads_right_kv_while_segments_move(scenario: SegmentScenario, shape: tuple[int, int, int]) -> None:
    server = segment_device_server("cuda", *shape, HOST_BLOCKS)
    scenario(server)
    assert server.model.num_checked > 0
    assert server.model.num_wrong == 0  # type: ignore[attr-defined]


def test_segments_that_leave_are_free_for_others_and_come_back_zero() -> None:
    server = segment_device_server("cuda", 5, 2, 0, HOST_BLOCKS)
    server.model._kv.fill_(7)  # type: ignore[attr-defined]
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    for segment in (1, 2, 3):
        server.shrink(segment)
    server.step()
    server.await_moves()
    after, _ = torch.cuda.mem_get_info()
    assert after - before >= 3 * 5 * (2 << 20)
    server.grow(3)
    server.await_moves()
    assert not server.model._kv[:, 4:16].any()  # type: ignore[attr-defined]
    server.end()


def test_layers_of_one_lane_share_memory_and_the_pool_does_not() -> None:
    mechanism = make_mechanism("cuda", GEOMETRY, 4)
    kv = mechanism.arena.tensor().view(5, 32, -1)
    for layer in range(5):
        kv[layer, :16] = layer + 1
        kv[layer, 16:] = 10 + layer
    torch.cuda.synchronize()
    assert [int(kv[layer, :16].max()) for layer in range(5)] == [1, 2, 3, 4, 5]
    assert [int(kv[layer, 16:].max()) for layer in range(5)] == [14, 13, 14, 13, 14]
    mechanism.engine.close()


@pytest.mark.parametrize("page_bytes", [16 << 10, 256 << 10], ids=["by-kernel", "by-copy-engine"])
def test_a_round_trip_brings_every_byte_back(page_bytes: int) -> None:
    num_blocks = (4 << 20) // page_bytes
    geometry = KVGeometry(3, page_bytes, 16, pool_blocks=2 * num_blocks, zone_blocks=0, lanes=1)
    mechanism = make_mechanism("cuda", geometry, num_blocks)
    assert mechanism.wait_ready(60.0), "or copies go another way"
    kv = mechanism.arena.tensor()
    kv.copy_(torch.randint(-128, 128, kv.shape, dtype=torch.int8, device=kv.device))
    wanted = kv.clone()
    runs = [BlockRun(2 * i, num_blocks - 1 - i, 1) for i in range(num_blocks)]
    stored = mechanism.engine.submit(Direction.STORE, range(3), runs, after=[mechanism.engine.record_compute()])
    mechanism.engine.wait_compute(stored)
    kv.view(3, -1, 2 * page_bytes)[:, :, :page_bytes] = 77
    loaded = mechanism.engine.submit(Direction.LOAD, range(3), runs, after=[mechanism.engine.record_compute()])
    mechanism.engine.wait_compute(loaded)
    assert torch.equal(kv, wanted)
    mechanism.engine.close()
