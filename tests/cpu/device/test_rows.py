"""Layers of several KV-cache groups: which memory they share in the zone, and when what is copied is waited for."""

from __future__ import annotations

import pytest

from layerkv.core.geometry import KVGeometry
from layerkv.core.groups import Group
from layerkv.core.transfer import BlockRun
from layerkv.device.rows import Rows

torch = pytest.importorskip("torch")

PAGE = 4096
WINDOW = Group(4, 3, window=8, most_blocks=6, places=(0, 1, 3))
FULL = Group(8, 2, places=(2, 4))
STATE = Group(1000, 2, window=2, is_state=True, most_blocks=1, places=(5, 6))


def geometry_of(*groups: Group) -> KVGeometry:
    return KVGeometry(
        num_layers=3, page_bytes=PAGE, block_tokens=8, pool_blocks=6, zone_blocks=2, lanes=2, groups=groups
    )


def test_rows_of_a_lane_share_its_memory_and_blocks_of_the_pool_are_their_own() -> None:
    from layerkv.device.mmap_arena import MmapArena

    geometry = geometry_of(WINDOW, FULL)
    memory = MmapArena(geometry).tensor()

    def page(row: int, block: int) -> torch.Tensor:
        return memory[geometry.offset(geometry.rows()[row].slot, block) :][:PAGE]

    def first_zone_page(row: int) -> torch.Tensor:
        return page(row, geometry.first_zone_block(geometry.rows()[row].group))

    lane_of = {row: lane for lane, rows in enumerate(geometry.lane_layers()) for row in rows}
    assert lane_of == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0}
    for row in lane_of:
        memory[:] = 0
        first_zone_page(row)[:] = 7
        assert {other for other in lane_of if first_zone_page(other)[0] == 7} == {
            other for other in lane_of if lane_of[other] == lane_of[row]
        }
        assert not memory.view(3, -1)[:, : geometry.pool_blocks * PAGE].any()
    memory[:] = 0
    page(0, 3)[:] = 7
    assert int((memory == 7).sum()) == PAGE


def test_runs_go_to_the_group_whose_zone_they_are_of() -> None:
    rows = Rows.of(geometry_of(WINDOW, STATE, FULL))
    window, full = BlockRun(6, 0, 4), BlockRun(10, 9, 2)
    assert [list(runs) for runs in rows.divide((window, full))] == [[window], [], [full]]
    plain = Rows.of_one_group(3)
    runs = (window, full)
    assert plain.divide(runs)[0] is runs, "the very same, whose blocks are worked out once"


def test_slots_are_waited_for_before_the_first_layer_that_uses_them() -> None:
    rows = Rows.of(geometry_of(WINDOW, FULL))
    assert [rows[layer] for layer in range(5)] == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1)]
    assert rows.slot_groups(8) == [(0, [0]), (1, [1]), (3, [2])]
    assert rows.slot_groups(2) == [(0, [0]), (1, [1, 2])]
    with_states = Rows.of(geometry_of(WINDOW, STATE))
    assert with_states.slot_groups(8) == [(0, range(3))], "a layer with a state may use any slot"
