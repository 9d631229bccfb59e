"""What requests hold of KV-cache groups, and how a ledger copies them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from layerkv.core.geometry import GeometryRequest, KVGeometry, geometry_for_blocks, geometry_for_memory
from layerkv.core.groups import (
    NULL_BLOCK,
    Group,
    Row,
    blocks_held,
    growth_tokens,
    host_blocks,
    longest_fitting,
    most_blocks_held,
    whole_blocks,
    zone_block_tokens,
)
from layerkv.core.ledger import KVLedger
from layerkv.core.residency import Residency
from layerkv.core.transfer import BlockRun, StepPlan
from layerkv.errors import CapacityError, ConfigError

FULL = Group(4, 3)
WINDOW = Group(4, 2, window=8, most_blocks=6)
CHUNK = Group(4, 1, chunk=12, most_blocks=6)
STATE = Group(1000, 3, window=2, is_state=True, most_blocks=1)
SMALL = Group(2, 3)
GROUPS = (FULL, WINDOW, CHUNK, STATE)


def test_a_window_needs_the_blocks_that_the_next_token_reads() -> None:
    for num_computed in range(60):
        reads = range(max(num_computed - 7, 0), num_computed)  # and itself, which is not there yet
        needed = {token // 4 for token in reads}
        assert needed <= set(WINDOW.needed(num_computed))
        assert WINDOW.first_needed(num_computed) == max(num_computed - 7, 0) // 4, "as vLLM counts it"


@pytest.mark.parametrize("chunk", [12, 10])  # a chunk may begin within a block
def test_a_chunk_needs_what_is_of_the_next_tokens_chunk(chunk: int) -> None:
    group = replace(CHUNK, chunk=chunk)
    for num_computed in range(60):
        reads = range(num_computed // chunk * chunk, num_computed)
        assert {token // 4 for token in reads} == set(group.needed(num_computed))


def test_a_state_is_one_block_however_long_the_request_is() -> None:
    assert [len(STATE.needed(num_computed)) for num_computed in (1, 5, 999)] == [1, 1, 1]


@pytest.mark.parametrize("group", [FULL, WINDOW, CHUNK, STATE])
def test_as_many_host_blocks_as_are_needed_at_most_suffice(group: Group) -> None:
    for num_tokens in range(1, 80):
        needed = [len(group.needed(num_computed)) for num_computed in range(num_tokens + 1)]
        assert max(needed) <= group.most_needed(num_tokens)


def test_needs_are_sums_over_groups() -> None:
    assert blocks_held(GROUPS, 41, 40) == 11 + (11 - 8) + (11 - 9) + 1
    assert most_blocks_held(GROUPS, 41) == 11 + 6 + 6 + 1
    assert whole_blocks(GROUPS, 41) == 10, "only of groups that keep all"
    assert host_blocks(GROUPS, 41) == 11 + 3 + 4 + 1
    assert growth_tokens((FULL, SMALL)) == 1
    assert growth_tokens((FULL, STATE)) == 4
    assert longest_fitting(GROUPS, 24, 999) == 44
    assert longest_fitting((FULL,), 10, 25) == 25


def test_the_zone_has_room_for_as_many_tokens_in_each_group() -> None:
    geometry = KVGeometry(
        num_layers=3, page_bytes=64, block_tokens=4, pool_blocks=20, zone_blocks=5, lanes=2, groups=(STATE, SMALL, FULL)
    )
    assert zone_block_tokens(geometry.groups) == 4
    assert geometry.zone_shares == (0, 2, 1)
    assert [geometry.first_zone_block(group) for group in range(3)] == [20, 20, 30]
    assert geometry.total_blocks == 35
    assert geometry.lane_bytes == 10 * 64, "of the group with most blocks"
    assert geometry.physical_bytes == 20 * 3 * 64 + 2 * 640
    with pytest.raises(ConfigError, match="multiple of each"):
        zone_block_tokens((Group(4, 1), Group(3, 1)))


def test_layers_of_all_groups_take_lanes_in_the_order_in_which_they_run() -> None:
    groups = (
        Group(4, 2, places=(1, 5)),
        Group(1000, 2, window=2, is_state=True, places=(0, 3)),
        Group(4, 1, places=(2,)),
    )
    geometry = KVGeometry(
        num_layers=2, page_bytes=64, block_tokens=4, pool_blocks=8, zone_blocks=4, lanes=2, groups=groups
    )
    assert geometry.rows() == [Row(0, 0), Row(2, 0), Row(0, 1)]
    assert geometry.lane_layers() == [[0, 2], [1]]
    ranges = geometry.lane_ranges()
    layer_bytes = 16 * 64
    assert ranges[0][:2] == [(8 * 64, 4 * 64), (layer_bytes + 8 * 64, 4 * 64)]
    assert ranges[1] == [(12 * 64, 4 * 64)]
    assert ranges[0][2:] == [(layer_bytes + 12 * 64, 4 * 64)], "where no layer is, so that all of it is mapped"


@pytest.mark.parametrize("zone_tokens", [None, 0, 40, 64])
def test_memory_is_divided_among_pool_and_lanes(zone_tokens: int | None) -> None:
    request = GeometryRequest(
        num_layers=3,
        page_bytes=1024,
        block_tokens=4,
        lanes=2,
        step_tokens=64,
        zone_tokens=zone_tokens,
        alignment_bytes=4096,
        longest_tokens=200,
        groups=(FULL, WINDOW, SMALL),
    )
    memory = 3 * 1024 * 400
    geometry = geometry_for_memory(request, memory)
    assert geometry.physical_bytes <= memory
    assert geometry == geometry_for_blocks(request, geometry.total_blocks)
    assert memory - geometry.physical_bytes < 4 * 3 * 4096, "hardly any is left"
    if zone_tokens is not None:
        assert geometry.zone_blocks * 4 >= zone_tokens
    assert (geometry.zone_blocks == 0) == (zone_tokens == 0)


class Server:
    """One request's tables as vLLM keeps them, and the bytes of device and host blocks, by group and entry."""

    def __init__(self, groups: tuple[Group, ...], *, host: int = 60, zone: int = 40) -> None:
        self.geometry = KVGeometry(
            num_layers=3, page_bytes=64, block_tokens=4, pool_blocks=4000, zone_blocks=zone, lanes=2, groups=groups
        )
        self.ledger = KVLedger(self.geometry, host)
        self.tables: list[list[int]] = [[] for _ in groups]
        self.device: dict[int, object] = {}
        self.host: dict[int, object] = {}
        self.next_block = 1
        self.is_layered = False

    def take(self, num_tokens: int) -> None:
        for index, (group, table) in enumerate(zip(self.geometry.groups, self.tables, strict=True)):
            missing = group.num_entries(num_tokens) - len(table)
            if self.is_layered and not group.is_state and missing > 0:
                table += self.ledger.zone.take("a", missing, index)
                continue
            for _ in range(missing):
                table.append(self.next_block)
                self.next_block += 1

    def skip(self, num_computed: int) -> None:
        """What no later token reads is given back."""
        for group, table in zip(self.geometry.groups, self.tables, strict=True):
            for entry in range(min(group.first_needed(num_computed), len(table))):
                if (block := table[entry]) != NULL_BLOCK:
                    table[entry] = NULL_BLOCK
                    if self.geometry.is_zone_block(block):
                        self.ledger.zone.give_back([block])

    def write(self, first: int, end: int) -> None:
        for index, (group, table) in enumerate(zip(self.geometry.groups, self.tables, strict=True)):
            for entry in range(first // group.block_tokens, group.num_entries(end)):
                if table[entry] != NULL_BLOCK:
                    self.device[table[entry]] = (index, entry, end)

    def copy(self, runs: tuple[BlockRun, ...], *, load: bool) -> None:
        for run in runs:
            for i in range(run.num_blocks):
                device, host = run.device_block + i, run.host_block + i
                if load:
                    self.device[device] = self.host[host]
                else:
                    self.host[host] = self.device[device]

    def carry_out(self, plan: StepPlan) -> None:
        self.copy(plan.parks, load=False)
        self.copy((*plan.loads, *plan.zone_hits), load=True)

    def state(self, num_computed: int) -> dict[tuple[int, int], object]:
        """What the next token reads, by group and entry."""
        return {
            (index, entry): self.device[self.tables[index][entry]]
            for index, group in enumerate(self.geometry.groups)
            for entry in group.needed(num_computed)
        }

    def free(self) -> None:
        for table in self.tables:
            self.ledger.zone.give_back([block for block in table if self.geometry.is_zone_block(block)])
        self.tables = [[] for _ in self.geometry.groups]
        self.device.clear()

    def come_back(self, num_computed: int) -> None:
        self.is_layered = False
        for group, table in zip(self.geometry.groups, self.tables, strict=True):
            table += [NULL_BLOCK] * group.first_needed(num_computed)
        self.take(num_computed)
        self.ledger.fetch("a", self.tables, 0)
        (fetch,) = self.ledger.take_plan(0).fetches
        self.copy(fetch.runs, load=True)
        self.ledger.complete_fetch("a")
        self.ledger.check()


def all_groups() -> list[tuple[Group, ...]]:
    return [GROUPS, (FULL,), (WINDOW,), (CHUNK,), (FULL, SMALL), (STATE, FULL), (STATE, CHUNK), (CHUNK, WINDOW, STATE)]


@pytest.mark.parametrize("groups", all_groups(), ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_a_resident_request_comes_back_with_all_that_it_needs(groups: tuple[Group, ...], seed: int) -> None:
    rng, server = random.Random(seed), Server(groups, host=400)
    ledger, num_computed = server.ledger, 0
    ledger.keeps_copies = rng.random() < 0.5
    ledger.add("a")
    ledger.started("a")
    for _ in range(6):
        for _ in range(rng.randrange(1, 5)):
            server.skip(num_computed)
            num_new = rng.choice((1, 1, 7, 20))
            server.take(num_computed + num_new)
            server.write(num_computed, num_computed + num_new)
            num_computed += num_new
        if rng.random() < 0.5:
            ledger.store_ahead("a", server.tables, num_computed, rng.choice((None, 2)))
            server.copy(ledger.take_plan(1).ahead, load=False)
        expected = server.state(num_computed)
        ledger.park("a", server.tables, num_computed)
        ledger.check()
        server.carry_out(ledger.take_plan(1))
        server.free()
        server.come_back(num_computed)
        assert server.state(num_computed) == expected
    ledger.finish("a", tables=server.tables, num_computed=num_computed)
    assert ledger.num_host_blocks_used == 0
    ledger.check()


@pytest.mark.parametrize("groups", all_groups(), ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_a_layered_prompt_comes_back_with_all_that_it_needs(groups: tuple[Group, ...], seed: int) -> None:
    """And every one of its steps finds in the zone what it reads, though other layers wrote there meanwhile."""
    rng = random.Random(seed)
    server = Server(groups, host=host_blocks(groups, 100) if groups != (FULL,) else 25)
    ledger, num_computed = server.ledger, 0
    server.is_layered = True
    ledger.add("a")
    ledger.admit_layered("a", table_blocks=host_blocks(groups, 100), zone_blocks=25)
    while num_computed < 100:
        num_new = min(rng.choice((1, 5, 12, 33)), 100 - num_computed)
        server.skip(num_computed)
        server.take(num_computed + num_new)
        ledger.started("a")
        before = server.state(num_computed)
        for block in [block for block in server.device if server.geometry.is_zone_block(block)]:
            server.device[block] = "another layer's"
        ledger.step_layered("a", server.tables, num_computed=num_computed, num_scheduled=num_new)
        ledger.check()
        plan = ledger.take_plan(num_new)
        assert plan.is_layered, "also where a chunk ends with the step, and nothing of it is stored"
        assert plan.has_copies
        assert plan.needs_layer_hooks
        server.carry_out(plan)
        assert server.state(num_computed) == before
        server.write(num_computed, num_computed + num_new)
        server.copy(plan.stores, load=False)
        num_computed += num_new
    expected = server.state(num_computed)
    ledger.park("a", server.tables, num_computed)
    ledger.check()
    server.carry_out(ledger.take_plan(1))
    server.free()
    assert ledger.zone.num_available == 40
    server.come_back(num_computed)
    assert server.state(num_computed) == expected
    ledger.finish("a")
    assert ledger.num_host_blocks_used == 0


def test_a_park_without_room_changes_nothing() -> None:
    server = Server(GROUPS, host=3)
    server.ledger.add("a")
    server.ledger.started("a")
    server.take(40)
    with pytest.raises(CapacityError):
        server.ledger.park("a", server.tables, 40)
    assert server.ledger.residency["a"] is Residency.RESIDENT
    server.ledger.check()
    assert not server.ledger.take_plan(1).parks


def test_zone_room_is_promised_in_every_group() -> None:
    server = Server((FULL, SMALL), zone=10)
    zone = server.ledger.zone
    zone.reserve("a", 6)
    assert zone.num_available == 4
    assert not zone.can_take("b", 9, group=1)
    assert zone.can_take("b", 8, group=1)
    of_small = zone.take("a", 12, group=1)
    assert zone.num_available == 4
    assert zone.num_taken == 6
    of_full = zone.take("a", 3)
    zone.end_reservation("a")
    assert zone.num_available == 4
    zone.give_back([*of_small, *of_full])
    assert zone.num_available == 10
    zone.check()
