"""A model without arithmetic and a scheduler without vLLM, over real memory, real books and real lanes.

Each layer of `TinyModel` writes a number per new token into the KV cache, as a KV-cache update does, and then reads the
numbers of *all* the request's tokens, as attention does, and compares them with what they must be. A token's number
depends on token, position and layer, so KV of another request, another layer or another place is never right by luck.

`TinyServer` does what the adapter does: block tables, pool and zone ids, vLLM's order of calls. It runs ahead of the
device: nothing here waits for a copy except where the adapter would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from layerkv.core.geometry import KVGeometry
from layerkv.core.residency import Residency
from layerkv.core.runs import RunAllocator
from layerkv.core.transfer import StepPlan
from layerkv.device.base import Arena, TransferEngine
from layerkv.device.lane_schedule import FinishedFetch, LaneSchedule
from tests.fakes.flat_ledger import FlatLedger

WORD_BYTES = 8


@dataclass(frozen=True)
class Row:
    """One request's part of a step."""

    request_id: str
    block_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    num_computed: int


class TinyModel:
    """Enqueues the kernels of a forward pass through `compute`."""

    def __init__(self, arena: Arena, compute: Callable[[Callable[[], None]], None]) -> None:
        geometry = arena.geometry
        words = geometry.page_bytes // geometry.block_tokens // WORD_BYTES
        shape = (geometry.num_layers, geometry.total_blocks, geometry.block_tokens, words)
        self._kv = arena.tensor().numpy().view(np.int64).reshape(shape)
        self._block_tokens = geometry.block_tokens
        self._compute = compute
        self.num_checked = 0

    def layer(self, layer: int, rows: Sequence[Row]) -> None:
        """Enqueue the layer's KV-cache update, then its attention."""
        self._compute(lambda: self._update(layer, rows))
        self._compute(lambda: self._attend(layer, rows))

    def _update(self, layer: int, rows: Sequence[Row]) -> None:
        for row in rows:
            positions = np.arange(row.num_computed, len(row.token_ids))
            blocks = np.asarray(row.block_ids)[positions // self._block_tokens]
            self._kv[layer, blocks, positions % self._block_tokens] = _numbers(row, positions, layer)[:, None]

    def _attend(self, layer: int, rows: Sequence[Row]) -> None:
        for row in rows:
            positions = np.arange(len(row.token_ids))
            blocks = np.asarray(row.block_ids)[positions // self._block_tokens]
            found = self._kv[layer, blocks, positions % self._block_tokens]
            wrong = np.flatnonzero((found != _numbers(row, positions, layer)[:, None]).any(axis=1))
            assert not wrong.size, f"{row.request_id}: layer {layer} read wrong KV at tokens {wrong.tolist()}"
            self.num_checked += len(positions)


def _numbers(row: Row, positions: np.ndarray, layer: int) -> np.ndarray:
    return (np.asarray(row.token_ids)[positions] * 1_000 + positions) * 100 + layer + 1


@dataclass
class Request:
    """What the server knows of one request. Token ids are made up as they are needed."""

    token_ids: list[int]
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    prefix_blocks: list[int] = field(default_factory=list)


class TinyServer:
    """Carries out what a test decides. Every decision that the books refuse raises."""

    def __init__(self, arena: Arena, engine: TransferEngine, model: TinyModel, num_host_blocks: int) -> None:
        self.geometry: KVGeometry = arena.geometry
        self.engine, self.model = engine, model
        self.ledger = FlatLedger(self.geometry, num_host_blocks)
        self.lanes = LaneSchedule(engine, self.geometry.lane_layers())
        self.pool = RunAllocator(1, self.geometry.pool_blocks - 1)
        self.requests: dict[str, Request] = {}
        self.failed: list[FinishedFetch] = []
        self.keeps_fetched = False
        self._users: dict[int, int] = {}
        self._next_token = count(1)
        self._leaving: dict[str, list[int]] = {}

    # Decisions -----------------------------------------------------------------------------------------------

    def arrive(
        self, request_id: str, num_tokens: int, *, layered: bool, prefix_of: str | None = None, num_shared: int = 0
    ) -> None:
        """A prompt comes and is admitted; its first `num_shared` blocks are those that `prefix_of` has in the pool."""
        tokens = self.geometry.block_tokens
        request = Request([next(self._next_token) for _ in range(num_tokens)])
        if prefix_of is not None:
            donor = self.requests[prefix_of]
            request.token_ids[: num_shared * tokens] = donor.token_ids[: num_shared * tokens]
            request.prefix_blocks = donor.block_ids[:num_shared]
        self.ledger.add(request_id)
        self.requests[request_id] = request
        if layered:
            table_blocks = self.blocks(num_tokens)
            self.ledger.admit_layered(
                request_id, table_blocks=table_blocks, zone_blocks=table_blocks - len(request.prefix_blocks)
            )
        request.block_ids = list(request.prefix_blocks)
        for block in request.prefix_blocks:
            self._users[block] += 1
        request.num_computed = len(request.prefix_blocks) * tokens

    def arrive_again(self, request_id: str, token_ids: Sequence[int], num_tokens: int, *, layered: bool = False) -> int:
        """A prompt of so many tokens comes that begins with these; it loads what host memory has of them.

        Returns:
            Blocks that it loads.
        """
        new = (next(self._next_token) for _ in range(num_tokens - len(token_ids)))
        request = Request([*token_ids, *new])
        self.ledger.add(request_id)
        self.requests[request_id] = request
        hashes = self.hashes(request.token_ids)
        last = (num_tokens - 1) // self.geometry.block_tokens
        if layered:
            table_blocks = self.blocks(num_tokens)
            self.ledger.admit_layered(
                request_id, table_blocks=table_blocks, zone_blocks=table_blocks, hashes=hashes[:last]
            )
            found = self.ledger.settle_prefix(request_id, hashes[:last], 0)
            request.block_ids = self.ledger.zone.take(request_id, found)
        else:
            found = self.ledger.num_prefix_blocks(request_id, hashes, range(last))
            request.block_ids = self._take_from_pool(found)
            self._users.update(dict.fromkeys(request.block_ids, 1))
        if found:
            self.ledger.load_prefix(request_id, tuple(request.block_ids), hashes, range(found))
            request.num_computed = found * self.geometry.block_tokens
        return found

    def hashes(self, token_ids: Sequence[int]) -> list[tuple[int, ...]]:
        """What stands for the hashes of the whole blocks: all tokens up to each block's end."""
        tokens = self.geometry.block_tokens
        return [tuple(token_ids[: end * tokens]) for end in range(1, len(token_ids) // tokens + 1)]

    def store_ahead(self, request_id: str) -> None:
        """Copy a resident request's whole blocks in the background."""
        request = self.requests[request_id]
        self.ledger.store_ahead(request_id, tuple(request.block_ids), request.num_computed)

    def park(self, request_id: str) -> None:
        """Park a request that has computed something."""
        request = self.requests[request_id]
        self.ledger.park(request_id, tuple(request.block_ids), request.num_computed)
        self._free(request.block_ids)
        request.block_ids = []

    def fetch(self, request_id: str, *, prefix_of: str | None = None, num_shared: int = 0) -> None:
        """Fetch a parked request, the first `num_shared` blocks of which another one has in the pool."""
        request = self.requests[request_id]
        shared = self.requests[prefix_of].block_ids[:num_shared] if prefix_of is not None else []
        new = self._take_from_pool(self.blocks(request.num_computed + 1) - len(shared))
        for block in shared:
            self._users[block] += 1
        self._users.update(dict.fromkeys(new, 1))
        request.block_ids = [*shared, *new]
        self.ledger.fetch(request_id, tuple(request.block_ids), len(shared) * self.geometry.block_tokens)

    def finish(self, request_id: str, *, keeps: bool = False) -> list[int]:
        """Finish or abort a request; vLLM keeps the blocks of a load under way until it is reported.

        Returns:
            The tokens it has computed; with `keeps`, host memory has their whole blocks from now on.
        """
        request = self.requests.pop(request_id)
        computed = request.token_ids[: request.num_computed]
        if self.ledger.residency[request_id] is Residency.FETCHING:
            self._leaving[request_id] = request.block_ids
        else:
            self._free(request.block_ids)
        self.ledger.finish(
            request_id,
            hashes=self.hashes(computed) if keeps else (),
            block_ids=tuple(request.block_ids),
            num_computed=request.num_computed,
        )
        return computed

    def step(self, **num_scheduled: int) -> StepPlan:
        """One engine step that computes so many tokens of each of these requests."""
        rows = [self._schedule(request_id, num_tokens) for request_id, num_tokens in num_scheduled.items()]
        plan = self._plan(sum(num_scheduled.values()))
        if plan.has_copies:
            self._begin(plan)
        for layer in range(self.geometry.num_layers):
            if rows:
                self.model.layer(layer, rows)
            if self.lanes.has_layer_work:
                self.lanes.layer_done(layer)
        self.lanes.end_step()
        self.poll()
        self.check()
        return plan

    def poll(self, wait_s: float = 0.0) -> None:
        """Learn which fetches have ended."""
        for fetch in self.lanes.poll_fetches(wait_s):
            if fetch.error is not None:
                self.failed.append(fetch)
            request = self.requests.get(fetch.request_id)
            hashes = self.hashes(request.token_ids[: request.num_computed]) if request and not fetch.error else ()
            self.ledger.complete_fetch(fetch.request_id, hashes if self.keeps_fetched else ())
            self._free(self._leaving.pop(fetch.request_id, []))

    def await_fetch(self, request_id: str) -> None:
        """Run empty steps until the request is resident."""
        for _ in range(100):
            if self.ledger.residency[request_id] is Residency.RESIDENT:
                return
            self.step()
            self.poll(wait_s=5.0)
        raise AssertionError(f"the fetch of {request_id} does not end")

    # The end -------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Everybody leaves; every block must be back."""
        for request_id in list(self.requests):
            self.finish(request_id)
        while self.lanes.has_fetches:
            self.poll(wait_s=5.0)
        self.lanes.drain(5.0)
        self.engine.close()
        self.check()
        assert self.ledger.num_host_blocks_used == 0
        assert self.ledger.zone.num_taken == 0
        assert self.ledger.zone.num_available == self.geometry.zone_blocks
        assert self.pool.num_free == self.geometry.pool_blocks - 1

    def check(self) -> None:
        """Assert that books and tables agree."""
        self.ledger.check()
        self.pool.check()
        held = [b for r in self.requests.values() for b in r.block_ids] + [b for t in self._leaving.values() for b in t]
        in_pool = [block for block in held if not self.geometry.is_zone_block(block)]
        assert {block: in_pool.count(block) for block in in_pool} == self._users
        in_zone = [block for block in held if self.geometry.is_zone_block(block)]
        assert len(in_zone) == len(set(in_zone)) == self.ledger.zone.num_taken

    def blocks(self, num_tokens: int) -> int:
        """Blocks of that many tokens."""
        return -(-num_tokens // self.geometry.block_tokens)

    def _plan(self, num_tokens: int) -> StepPlan:
        return self.ledger.take_plan(num_tokens)

    def _begin(self, plan: StepPlan) -> None:
        self.lanes.begin_step(plan)

    def _schedule(self, request_id: str, num_tokens: int) -> Row:
        request, ledger = self.requests[request_id], self.ledger
        num_after = request.num_computed + num_tokens
        missing = self.blocks(num_after) - len(request.block_ids)
        if missing > 0 and ledger.is_layered(request_id):
            request.block_ids += ledger.zone.take(request_id, missing)
        elif missing > 0:
            new = self._take_from_pool(missing)
            self._users.update(dict.fromkeys(new, 1))
            request.block_ids += new
        ledger.started(request_id)
        while len(request.token_ids) < num_after:
            request.token_ids.append(next(self._next_token))
        if ledger.is_layered(request_id):
            block_ids = tuple(request.block_ids)
            ledger.step_layered(request_id, block_ids, num_computed=request.num_computed, num_scheduled=num_tokens)
        row = Row(request_id, tuple(request.block_ids), tuple(request.token_ids[:num_after]), request.num_computed)
        request.num_computed = num_after
        return row

    def _take_from_pool(self, num_blocks: int) -> list[int]:
        blocks = self.pool.take(num_blocks)
        self.ledger.gave_out(blocks)
        return blocks

    def _free(self, block_ids: Sequence[int]) -> None:
        in_zone = [block for block in block_ids if self.geometry.is_zone_block(block)]
        self.ledger.zone.give_back(in_zone)
        for block in block_ids:
            if not self.geometry.is_zone_block(block):
                self._users[block] -= 1
                if not self._users[block]:
                    del self._users[block]
                    self.pool.give_back([block])
