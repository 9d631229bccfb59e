"""What the policy sees (:class:`Snapshot`) and what it answers (:class:`Decision`).

Times are seconds on one monotonic clock. Blocks are vLLM's KV-cache blocks. The per-request views are built
once, when a request changes state, not once per step: a step with 500 waiting requests must stay cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["auto", "resident", "layered"]


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A prompt without KV anywhere.

    Attributes:
        request_id: The request.
        deadline_s: When its first token is due (arrival plus the class's TTFT).
        num_tokens: Tokens to compute, prefix-cache hits not yet deducted.
        num_blocks: Blocks of those tokens.
        can_layer: Whether vLLM's semantics let it be parked and fetched (not with prompt logprobs, for instance).
        weight: Its class's weight.
    """

    request_id: str
    deadline_s: float
    num_tokens: int
    num_blocks: int
    can_layer: bool = True
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """What the device's prefix cache already holds of a waiting prompt.

    Attributes:
        num_blocks: Leading blocks found.
        num_evictable: Those of them that nobody uses now: taking them costs free blocks.
    """

    num_blocks: int = 0
    num_evictable: int = 0


@dataclass(frozen=True, slots=True)
class ParkedRequest:
    """A request whose KV is in host memory.

    Attributes:
        request_id: The request.
        deadline_s: When its next token is due: first token plus TPOT objective times tokens made (its laxity is
            this minus now; all laxities fall at the same speed, so the order never changes while parked).
        num_blocks: Pool blocks it needs to run again.
        weight: Its class's weight.
    """

    request_id: str
    deadline_s: float
    num_blocks: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ResidentRequest:
    """A running request with its KV in the pool, seen only when the pool runs short.

    Attributes:
        request_id: The request.
        deadline_s: When its next token is due.
        num_blocks: Pool blocks that parking it frees.
        steps_resident: Engine steps since it was admitted or fetched.
        can_park: Whether it may be parked.
        weight: Its class's weight.
    """

    request_id: str
    deadline_s: float
    num_blocks: int
    steps_resident: int
    can_park: bool = True
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LayeredRequest:
    """A running request in the lane zone.

    Attributes:
        request_id: The request.
        prefill_done: Its first token is computed, or on its way.
        num_blocks: Pool blocks it needs to become resident.
        num_zone_blocks: Zone blocks it holds.
        needs_zone_block: Its next token needs one more zone block.
        needs_host_block: Its next token needs one more host block.
    """

    request_id: str
    prefill_done: bool
    num_blocks: int
    num_zone_blocks: int = 0
    needs_zone_block: bool = False
    needs_host_block: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine before one step.

    Attributes:
        now_s: Current time.
        mode: The engine's ``mode`` option.
        streamed_decode: Whether layered requests may decode in the zone.
        frees_are_deferred: Whether blocks given up now come back only after the step in flight (asynchronous
            scheduling), so that this step cannot use them.
        block_tokens: Tokens per block.
        pool_blocks: Pool blocks that requests can ever hold.
        free_blocks: Pool blocks free now.
        growth_blocks: Pool blocks that running requests need in this step (and in steps scheduled ahead).
        reserved_blocks: Pool blocks promised to prefills and fetches under way.
        zone_blocks: Size of the lane zone.
        free_zone_blocks: Zone blocks neither taken nor promised.
        host_blocks: Size of host memory.
        free_host_blocks: Host blocks free now.
        free_slots: Requests that may still be admitted (``max_num_seqs``).
        budget_tokens: Tokens that one step may compute.
        decode_tokens: Of those, spoken for by requests that decode or are about to resume decoding.
        prefilling_tokens: Prompt tokens that running requests still have to compute.
        decode_slack_s: How much longer than a bare decode step this step may take before the first running
            request that is on time becomes late; infinite when nobody decodes (LayerKV Eq. 1-2, with N_future = 0).
        prefill_s_per_token: Observed cost of prefill; 0 while unknown.
        num_resident: Running requests in the pool.
        waiting: By deadline.
        parked: By deadline; only those that can be fetched now.
        resident: Filled only when ``growth_blocks > free_blocks``.
        layered: All.
        hits: Prefix-cache hits of the first waiting requests, by id; absent means none known.
        overtaken: How often the request at the head of the queue for pool blocks has been overtaken, by id.
    """

    now_s: float
    mode: Mode
    streamed_decode: bool
    block_tokens: int
    pool_blocks: int
    free_blocks: int
    growth_blocks: int
    reserved_blocks: int
    zone_blocks: int
    free_zone_blocks: int
    host_blocks: int
    free_host_blocks: int
    free_slots: int
    budget_tokens: int
    frees_are_deferred: bool = False
    decode_tokens: int = 0
    prefilling_tokens: int = 0
    decode_slack_s: float = float("inf")
    prefill_s_per_token: float = 0.0
    num_resident: int = 0
    waiting: Sequence[WaitingRequest] = ()
    parked: Sequence[ParkedRequest] = ()
    resident: Sequence[ResidentRequest] = ()
    layered: Sequence[LayeredRequest] = ()
    hits: dict[str, PrefixHit] = field(default_factory=dict)
    overtaken: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Admission:
    """Start a waiting request.

    Attributes:
        request_id: The request.
        layered: In the lane zone; otherwise in the pool.
        zone_blocks: Zone blocks to promise (layered only).
    """

    request_id: str
    layered: bool
    zone_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do in this step. Ids are in the order in which to do it.

    Attributes:
        park: Requests to park.
        fetch: Parked requests to fetch into the pool.
        admit: Waiting requests to start.
        prefill_tokens: Most prompt tokens to compute in this step.
        refuse: Requests that can never run here, with the reason.
        overtaken: The request at the head of the pool's queue that others just overtook, if any.
    """

    park: tuple[str, ...] = ()
    fetch: tuple[str, ...] = ()
    admit: tuple[Admission, ...] = ()
    prefill_tokens: int = 0
    refuse: tuple[tuple[str, str], ...] = ()
    overtaken: str | None = None
