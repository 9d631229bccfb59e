"""What the GPU tests stand on, here on the CPU: the scenarios in torch, over the real mechanism."""

from __future__ import annotations

import pytest

from tests.cpu.device.scenarios import SCENARIOS
from tests.cpu.device.segment_scenarios import SEGMENT_SCENARIOS
from tests.fakes.torch_model import device_server, segment_device_server


@pytest.mark.parametrize("shape", [(5, 2, 0), (6, 2, 2)], ids=str)
def test_every_layer_reads_right_kv(shape: tuple[int, int, int]) -> None:
    for scenario in SCENARIOS:
        server = device_server("cpu", *shape, 18)
        scenario(server)
        assert server.model.num_checked > 0
        assert server.model.num_wrong == 0  # type: ignore[attr-defined]


def test_wrong_kv_is_counted() -> None:
    server = device_server("cpu", 3, 1, 0, 18)
    server.arrive("a", 9, layered=False)
    server.step(a=9)
    block = server.requests["a"].block_ids[0]
    server.model._kv[1, block] += 1  # type: ignore[attr-defined]
    server.step(a=1)
    assert server.model.num_wrong > 0  # type: ignore[attr-defined]


def test_every_layer_reads_right_kv_while_segments_move() -> None:
    for scenario in SEGMENT_SCENARIOS:
        server = segment_device_server("cpu", 6, 2, 2, 18)
        scenario(server)
        assert server.model.num_checked > 0
        assert server.model.num_wrong == 0  # type: ignore[attr-defined]
