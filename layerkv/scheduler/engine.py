"""The engine as its host describes it: what never changes, and what it looks like before a step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layerkv.config import Give, Mode
from layerkv.core.groups import Group, blocks_held, host_blocks, most_blocks_held, whole_blocks


def drafting_blocks(tokens_per_decode: int, lookahead_tokens: int, block_tokens: int) -> int:
    """Free blocks beside a request's own that the engine wants for a fetch, because the step after it drafts.

    Arguments as in :class:`EngineShape`.
    """
    return -(-(tokens_per_decode + lookahead_tokens) // block_tokens) if tokens_per_decode > 1 else 0


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What does not change while the engine runs.

    Attributes:
        mode: The engine's ``mode`` option.
        block_tokens: Tokens per block; of several KV-cache groups, tokens for each block that a request grows by.
        block_bytes: Bytes of a block over all layers, of whatever ranks the profile's copy curves are.
        streamed_block_bytes: Of those, what a step loads of a zone block for a request that decodes in the zone; 0 is
            all.
        pool_blocks: Pool blocks that requests can always come to hold; of a pool that grows and shrinks, what the
            engine gets back whenever it needs that much.
        zone_blocks: Size of the lane zone.
        host_blocks: Host blocks that requests can always come to hold; where a broker divides host memory, those that
            the engine gets back whenever it needs them.
        can_chunk: Whether prompts may be computed in chunks; without, a prompt needs its whole length in one step.
        longest_tokens: Most tokens of one request (``max_model_len``).
        long_contexts: Whether it may be longer than the pool.
        slots: Requests that a step may compute.
        give: The engine's ``give`` option.
        groups: The KV-cache groups, unless there is one that keeps all blocks: what a request holds is counted by them.
        zone_block_tokens: Of those, tokens of a block of the lane zone.
        tokens_per_decode: Most tokens that a request which decodes computes in a step: one, and its drafts where there
            are any.
        lookahead_tokens: Slots that the engine gives a request beyond the tokens of a step, for drafts to come.
    """

    mode: Mode
    block_tokens: int
    block_bytes: int
    pool_blocks: int
    zone_blocks: int
    host_blocks: int
    streamed_block_bytes: int = 0
    long_contexts: bool = False
    can_chunk: bool = True
    longest_tokens: int = sys.maxsize
    slots: int = sys.maxsize
    give: Give = "park"
    groups: tuple[Group, ...] = ()
    zone_block_tokens: int = 0
    tokens_per_decode: int = 1
    lookahead_tokens: int = 0

    def blocks_for(self, num_tokens: int, num_computed: int = 0) -> int:
        """Pool blocks of a request with room for so many tokens, when those computed have given theirs back."""
        if not self.groups:
            return -(-num_tokens // self.block_tokens)
        return blocks_held(self.groups, num_tokens, num_computed)

    def blocks_at_most(self, num_tokens: int) -> int:
        """Pool blocks that a prompt of so many tokens comes to hold while it is computed."""
        if not self.groups:
            return -(-num_tokens // self.block_tokens)
        return most_blocks_held(self.groups, num_tokens)

    def whole_blocks(self, num_computed: int) -> int:
        """Of those of a request that has computed so many tokens, what a copy holds for good."""
        if not self.groups:
            return num_computed // self.block_tokens
        return whole_blocks(self.groups, num_computed)

    @property
    def blocks_per_token(self) -> int:
        """Blocks that a request's next token may take."""
        return sum(not group.is_state for group in self.groups) or 1

    def host_blocks_for(self, num_tokens: int) -> int:
        """Host blocks that hold all that a request of up to so many tokens needs to go on."""
        if not self.groups:
            return -(-num_tokens // self.block_tokens)
        return host_blocks(self.groups, num_tokens)

    @property
    def state_blocks(self) -> int:
        """Pool blocks that a layered request holds: its states never pass through lanes."""
        return sum(group.most_blocks for group in self.groups if group.is_state)

    @property
    def drafting_blocks(self) -> int:
        """See the function of that name."""
        return drafting_blocks(self.tokens_per_decode, self.lookahead_tokens, self.block_tokens)

    def blocks_to_fetch(self, num_tokens: int, num_computed: int) -> int:
        """Free pool blocks that a request of so many tokens needs to come back from host memory."""
        return self.blocks_for(max(num_computed + 1, num_tokens), num_computed) + self.drafting_blocks

    @property
    def step_blocks(self) -> int:
        """Most blocks that a step of a request which decodes may take."""
        return max(self.drafting_blocks, self.blocks_per_token)

    @property
    def fetchable_blocks(self) -> int:
        """Blocks of the largest request that the whole pool could fetch."""
        return self.pool_blocks - self.drafting_blocks


class Running(NamedTuple):
    """A running request as the engine sees it.

    Attributes:
        request_id: The request.
        num_tokens: Its tokens, prompt and output, those on their way included.
        num_computed: Of those, tokens with KV.
        num_output: Output tokens made.
        is_prefilling: Whether prompt tokens are still to be computed.
        num_blocks: Blocks it holds.
        num_zone_blocks: Of those, blocks of the lane zone.
        is_layered: Whether its new blocks come from the zone.
        num_host_blocks: Host blocks it holds, or, resident, leading blocks that host memory holds too.
        num_shared: Of those of a resident one, blocks that it shares: they are not free at once when it gives them up.
        is_paused: It is left out of steps: it keeps its blocks, and has no slot.
        num_in_flight: Of the tokens computed, those that steps in flight compute.
    """

    request_id: str
    num_tokens: int
    num_computed: int
    num_output: int
    is_prefilling: bool
    num_blocks: int
    num_zone_blocks: int = 0
    is_layered: bool = False
    num_host_blocks: int = 0
    num_shared: int = 0
    is_paused: bool = False
    num_in_flight: int = 0


class EngineState(NamedTuple):
    """The engine before a step.

    Attributes:
        step: Its number.
        running: All running requests, paused ones too.
        arriving: Requests being fetched: of each the id, its blocks, and output tokens made.
        free_blocks: Pool blocks free now.
        freeing_blocks: Pool blocks given up already that come back when a step in flight has ended,
        freeing_zone_blocks: and zone blocks.
        reserved_blocks: Pool blocks promised to prefills and fetches under way.
        free_zone_blocks: Zone blocks neither taken nor promised.
        free_host_blocks: Host blocks free now.
        free_slots: Requests that may still be admitted, or go on after a pause.
        budget_tokens: Tokens that the step may compute.
        resuming: Requests whose fetch has ended and that decode from this step on.
        steps_ahead: Steps in flight when this one is scheduled; frees are deferred exactly when there are any.
        is_paused: Whether no new request may start: what gives its KV up now could not be computed again.
        held_tokens: Tokens to compute of requests that hold KV and wait for neither compute nor a fetch by our books
            (a fetch that failed, the next turn of a session): vLLM takes them up by itself.
        moves: Changes with every arrival, move and departure.
        blocks_in_service: Pool blocks that are there, the null block left out; None where that never changes (it is
            the shape's).
        host_blocks_in_service: Host blocks that are there; None where that never changes (it is the shape's).
        vacating: Requests with blocks in memory that the pool gives back, and how many: they do not come free.
        owed_blocks: Of the free blocks, those that the pool gives back as soon as prompts under way have ended.
    """

    step: int
    running: Iterable[Running]
    arriving: Sequence[tuple[str, int, int]]
    free_blocks: int
    reserved_blocks: int
    free_zone_blocks: int
    free_host_blocks: int
    free_slots: int
    budget_tokens: int
    resuming: int = 0
    steps_ahead: int = 0
    is_paused: bool = False
    held_tokens: int = 0
    freeing_blocks: int = 0
    moves: int = 0
    freeing_zone_blocks: int = 0
    blocks_in_service: int | None = None
    host_blocks_in_service: int | None = None
    vacating: Mapping[str, int] = {}
    owed_blocks: int = 0

    @property
    def frees_are_deferred(self) -> bool:
        """Whether blocks given up now come back only after the step in flight (asynchronous scheduling), so that this
        step cannot use them."""
        return self.steps_ahead > 0
