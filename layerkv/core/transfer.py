"""What the workers must copy in one step, as data that travels with vLLM's scheduler output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from layerkv.core.segments import SegmentMoves


class BlockRun(NamedTuple):
    """``num_blocks`` consecutive device blocks and the consecutive host blocks they pair with."""

    device_block: int
    host_block: int
    num_blocks: int


class FetchPlan(NamedTuple):
    """Load all layers of a parked request into fresh pool blocks."""

    request_id: str
    runs: tuple[BlockRun, ...]


class StepPlan(NamedTuple):
    """The copies of one step. Block ids are those of vLLM's block tables; host ids those of the host allocator.

    Attributes:
        parks: Pool blocks to store, all layers, before this step's forward pass may overwrite them.
        stores: Zone blocks written in this step, to store layer by layer after each layer's attention.
        loads: Zone blocks written in earlier steps, to load layer by layer before each layer's KV-cache update.
        hits: Pool blocks of prompts that begin with a cached prefix, to load, all layers, before the forward pass.
        zone_hits: Zone blocks of layered prompts that begin with a cached prefix and start in this step, to load layer
            by layer as ``loads``, but in all layers: nothing is there yet of those that have a lane for themselves.
        ahead: Pool blocks to store in the background, all layers: nobody waits for them but a step that settles.
        settle: Whether everything in this step waits until earlier ``ahead`` stores have ended: a host block that
            one of them writes, or a pool block that one of them reads, is given to somebody else from now on.
        fetches: Requests to load into pool blocks while the step runs.
        num_tokens: Tokens computed in this step; with 0 there is no forward pass to overlap with.
        moves: Segments to get memory for, and to give back that nothing in this step uses.
        host_moves: Segments of host memory that are in service from now on, and to give back.
        uses_lanes: Whether layered requests compute in this step. Stores say so too; but where all layers attend within
            chunks, a step that computes up to the end of one leaves nothing to store.
    """

    parks: tuple[BlockRun, ...] = ()
    stores: tuple[BlockRun, ...] = ()
    loads: tuple[BlockRun, ...] = ()
    hits: tuple[BlockRun, ...] = ()
    zone_hits: tuple[BlockRun, ...] = ()
    ahead: tuple[BlockRun, ...] = ()
    settle: bool = False
    fetches: tuple[FetchPlan, ...] = ()
    num_tokens: int = 0
    moves: SegmentMoves = SegmentMoves()
    host_moves: SegmentMoves = SegmentMoves()
    uses_lanes: bool = False

    @property
    def has_copies(self) -> bool:
        """Whether workers have anything to do; and be it to wait, before they compute in lanes, for earlier stores."""
        copies = self.parks or self.is_layered or self.hits or self.ahead or self.settle or self.fetches
        return bool(copies or self.moves or self.host_moves)

    @property
    def needs_layer_hooks(self) -> bool:
        """Whether layers must tell when they are done: without, the copies of this step cannot be ordered."""
        return self.num_tokens > 0 and bool(self.is_layered or self.hits)

    @property
    def is_layered(self) -> bool:
        """Whether layered requests compute in this step."""
        return self.uses_lanes or bool(self.stores)


def merge_runs(device_blocks: Sequence[int], host_blocks: Sequence[int]) -> tuple[BlockRun, ...]:
    """Pair blocks up and merge what is consecutive on both sides.

    The pairs are sorted by device block first: copies of one batch do not depend on each other's order.
    """
    runs: list[BlockRun] = []
    first_device = first_host = length = 0
    for device, host in sorted(zip(device_blocks, host_blocks, strict=True)):
        if length and device == first_device + length and host == first_host + length:
            length += 1
            continue
        if length:
            runs.append(BlockRun(first_device, first_host, length))
        first_device, first_host, length = device, host, 1
    if length:
        runs.append(BlockRun(first_device, first_host, length))
    return tuple(runs)


def cut(runs: Sequence[BlockRun], most_blocks: int) -> list[tuple[BlockRun, ...]]:
    """The same runs in units of at most ``most_blocks`` blocks, in order."""
    units: list[tuple[BlockRun, ...]] = []
    unit: list[BlockRun] = []
    room = most_blocks
    for device, host, length in runs:
        done = 0
        while done < length:
            part = min(length - done, room)
            unit.append(BlockRun(device + done, host + done, part))
            done += part
            room -= part
            if room == 0:
                units.append(tuple(unit))
                unit, room = [], most_blocks
    if unit:
        units.append(tuple(unit))
    return units


def num_blocks(runs: Sequence[BlockRun]) -> int:
    """Blocks in all runs together."""
    return sum(run.num_blocks for run in runs)
