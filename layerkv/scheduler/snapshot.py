"""What the policy sees (:class:`Snapshot`) and what it answers (:class:`Decision`).

Times are seconds on one monotonic clock. Blocks are vLLM's KV-cache blocks. The views of waiting and parked requests
are built once, when one enters its line: a step with 500 of them must stay cheap. Those of running ones are built in
every step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from layerkv.config import PolicyName
from layerkv.core.cost import CostView
from layerkv.scheduler.engine import EngineShape, EngineState
from layerkv.scheduler.reasons import Reason, Resource


class WaitingRequest(NamedTuple):
    """A prompt without KV anywhere.

    Attributes:
        request_id: The request.
        deadline_s: When its first token is due (arrival plus the class's TTFT), or, if it lost its KV after that, the
            latest time to go on; its arrival where objectives do not count.
        num_tokens: Tokens to compute, prefix-cache hits not yet deducted.
        num_blocks: Blocks of those tokens.
        can_layer: Whether vLLM's semantics let it be parked and fetched (not with prompt logprobs, for instance).
        weight: Its class's weight.
        rank: Lower goes first, whatever the deadlines (vLLM's request priority).
        prefill_cost_s: Seconds of its prefill by the profile, not corrected online.
        tokens_left: Output tokens that it is predicted to make.
        may_refuse: Whether its class asks to be refused rather than served late.
        most_blocks: Blocks of all tokens that it may ever have; 0 unless it is expected to become longer than the pool.
        in_one_step: It cannot be computed in chunks: it needs a step that has tokens for all of it.
        ticket_blocks: Blocks of all prompts that came up to it, its own included, since the engine started; infinite
            if it has had its first token.
    """

    request_id: str
    deadline_s: float
    num_tokens: int
    num_blocks: int
    can_layer: bool = True
    weight: float = 1.0
    rank: int = 0
    prefill_cost_s: float = 0.0
    tokens_left: int = 1
    may_refuse: bool = False
    most_blocks: int = 0
    in_one_step: bool = False
    ticket_blocks: float = math.inf


class PrefixHit(NamedTuple):
    """What the prefix caches, the device's and the host's, already hold of a waiting prompt.

    Attributes:
        num_blocks: Leading blocks found.
        num_evictable: Those of them that nobody uses now: taking them costs free blocks.
        num_host_blocks: Blocks after them that host memory caches: it loads them and computes the rest.
        num_host_held: Those of them that somebody shares: run layered, it takes no free host blocks for them.
        num_tokens: With several KV-cache groups, tokens that the blocks found are of.
    """

    num_blocks: int = 0
    num_evictable: int = 0
    num_host_blocks: int = 0
    num_host_held: int = 0
    num_tokens: int = 0


class ParkedRequest(NamedTuple):
    """A request whose KV is in host memory.

    Attributes:
        request_id: The request.
        deadline_s: The latest time for its fetch to begin if its objectives are to be kept (see
            ``TrackedRequest.start_by_s``); its arrival where objectives do not count.
        num_blocks: Pool blocks it needs to run again, those among them that the engine wants for drafts.
        weight: Its class's weight.
        rank: As for a waiting request.
        tokens_left: Output tokens that it is predicted to make still.
        dry_s: When its reader has read all that it made; without a reader, its deadline.
        tpot_s: Its class's TPOT objective.
        is_fresh: It has made no more than its first token.
        zone_blocks: Zone blocks it needs to run again, with room for all of its tokens to come; 0 if it runs in the
            pool.
    """

    request_id: str
    deadline_s: float
    num_blocks: int
    weight: float = 1.0
    rank: int = 0
    tokens_left: int = 1
    dry_s: float = math.inf
    tpot_s: float = math.inf
    is_fresh: bool = False
    zone_blocks: int = 0


class ResidentRequest(NamedTuple):
    """A running request with its KV in the pool, or on its way there.

    Attributes:
        request_id: The request.
        deadline_s: The latest time to go on, were it parked now; infinite for a prompt or a fetch under way.
        num_blocks: Pool blocks that it holds or has been promised: parking it frees them.
        steps_resident: Engine steps since it was admitted or fetched.
        can_park: Whether it may be parked now.
        weight: Its class's weight.
        tokens_left: Output tokens that it is predicted to make still.
        num_tokens: Tokens whose KV it has.
        num_stored: Leading blocks of it that host memory holds already (stored ahead).
        rank: As for a waiting request.
        cannot_recompute: It must be computed in one step and has more tokens than a step: giving its KV up ends it.
        dry_s: When its reader has read all that it made; without a reader, its deadline; infinite for a prompt or a
            fetch under way.
        tpot_s: Its class's TPOT objective.
        resident_s: Seconds since it was admitted or fetched, its load among them.
        has_run: Whether it has computed a token since it was last parked.
        num_shared: Of the blocks stored, those that it shares: they are not free at once when its copy gives way.
        can_pause: Whether it may be paused now: it has computed a token since it last came in or went on.
        is_paused: It keeps its blocks and has no slot.
        turn_steps: Steps since it was paused, or since it last got its slot.
    """

    request_id: str
    deadline_s: float
    num_blocks: int
    steps_resident: int
    can_park: bool = True
    weight: float = 1.0
    tokens_left: int = 1
    num_tokens: int = 0
    num_stored: int = 0
    rank: int = 0
    cannot_recompute: bool = False
    dry_s: float = math.inf
    tpot_s: float = math.inf
    resident_s: float = math.inf
    has_run: bool = True
    num_shared: int = 0
    can_pause: bool = False
    is_paused: bool = False
    turn_steps: int = 0


class LayeredRequest(NamedTuple):
    """A running request in the lane zone.

    Attributes:
        request_id: The request.
        prefill_done: Its first token is computed, or on its way.
        num_blocks: Pool blocks it needs to become resident: as many as a parked one.
        num_zone_blocks: Zone blocks it holds.
        needs_zone_block: Its next token needs one more zone block.
        needs_host_block: Host blocks that its next token needs besides those it has.
        outgrows_pool: It is expected to become longer than the pool: it decodes in the zone, and has the room for that.
        room_blocks: Of such a one, the zone blocks that it holds or has been promised.
        deadline_s: As for a resident request,
        dry_s: and this,
        rank: and this.
        in_zone_s: Seconds since it came back to the zone; infinite before it has left it, because its first token is
            all of its first slice.
        has_run: As for a resident request.
    """

    request_id: str
    prefill_done: bool
    num_blocks: int
    num_zone_blocks: int = 0
    needs_zone_block: bool = False
    needs_host_block: int = 0
    outgrows_pool: bool = False
    room_blocks: int = 0
    deadline_s: float = math.inf
    dry_s: float = math.inf
    rank: int = 0
    in_zone_s: float = math.inf
    has_run: bool = True


class Load(NamedTuple):
    """What one pass over the running requests finds.

    Attributes:
        resident: Running requests in the pool, paused ones too, and requests on their way there.
        layered: All in the lane zone.
        num_resident: Running requests in the pool and requests on their way there, those that nobody tracks too.
        growth_blocks: Pool blocks that running requests need in this step (and in steps scheduled ahead).
        decode_tokens: Requests that decode in this step, or are about to resume decoding.
        decode_context: KV tokens that those read.
        prefilling_tokens: Prompt tokens that running requests still have to compute.
        decode_slack_s: How long decodes may be held up, all in all, before the first of those that are on time
            becomes late (LayerKV Eq. 1-2); infinite when nobody decodes.
        tightest_tpot_s: The smallest TPOT objective among requests that decode.
        loading_blocks: Blocks of fetches under way.
        soon_blocks: Further pool blocks that they may need in the few steps in which a decision may stand.
        num_paused: Residents that are paused.
    """

    resident: Sequence[ResidentRequest] = ()
    layered: Sequence[LayeredRequest] = ()
    num_resident: int = 0
    growth_blocks: int = 0
    decode_tokens: int = 0
    decode_context: int = 0
    prefilling_tokens: int = 0
    decode_slack_s: float = math.inf
    tightest_tpot_s: float = math.inf
    loading_blocks: int = 0
    soon_blocks: int = 0
    num_paused: int = 0


class Lines(NamedTuple):
    """Who waits.

    Attributes:
        waiting: The first of the line for compute: rank by rank those whose deadline is to come, then the others.
        parked: The same of parked requests; only those that can be fetched now.
        parked_long: The same of those that decode in the zone, because they outgrow the pool.
        hits: Prefix-cache hits of the first waiting requests, by id; absent means none known.
        overtaken: In how many steps a request was the one charged with being overtaken, by id.
        promised: Claims that room was made for in a step shortly before.
        gone_blocks: Of all prompts that ever came, blocks of those whose requests are gone.
    """

    waiting: Sequence[WaitingRequest] = ()
    parked: Sequence[ParkedRequest] = ()
    parked_long: Sequence[ParkedRequest] = ()
    hits: Mapping[str, PrefixHit] = {}
    overtaken: Mapping[str, int] = {}
    promised: Collection[str] = ()
    gone_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine before one step.

    Attributes:
        now_s: Current time.
        shape: What never changes.
        engine: The engine as its host sees it; of who runs, only what ``load`` says.
        load: Who runs.
        lines: Who waits.
        cost: The cost model; None while nothing is known of its scale.
        policy: How decisions are made; with ``arrival`` deadlines are arrival times and nobody is late.
        streamed_decode: Whether layered requests may decode in the zone.
        steps_without_prefill: Steps since the last one that computed prompt tokens, while prompts were there.
        can_exchange: Whether a resident request may be parked to make room for another: not while the last such
            exchange is still being carried out.
        token_s: Seconds from token to token of requests that decode of late, prompts' share of the steps included.
        can_store_ahead: Whether to look for a victim to store ahead: every few steps is often enough.
    """

    now_s: float
    shape: EngineShape
    engine: EngineState
    load: Load
    lines: Lines
    cost: CostView | None = None
    policy: PolicyName = "fluid"
    streamed_decode: bool = False
    steps_without_prefill: int = 0
    can_exchange: bool = True
    can_store_ahead: bool = True
    token_s: float = 0.0

    @property
    def slo_scheduling(self) -> bool:
        """Whether objectives count."""
        return self.policy != "arrival"

    @property
    def pool_blocks(self) -> int:
        """Pool blocks that are there now, in use or free."""
        in_service = self.engine.blocks_in_service
        return self.shape.pool_blocks if in_service is None else in_service

    @property
    def host_blocks(self) -> int:
        """Host blocks that are there now, in use or free."""
        in_service = self.engine.host_blocks_in_service
        return self.shape.host_blocks if in_service is None else in_service

    @property
    def most_prefill_tokens(self) -> int:
        """Prompt tokens that the step has room for beside those who decode."""
        return max(self.engine.budget_tokens - self.load.decode_tokens * self.shape.tokens_per_decode, 0)


class Admission(NamedTuple):
    """Start a waiting request.

    Attributes:
        request_id: The request.
        layered: In the lane zone; otherwise in the pool.
        zone_blocks: Zone blocks to promise (layered only),
        host_blocks: and host blocks to take.
    """

    request_id: str
    layered: bool
    zone_blocks: int = 0
    host_blocks: int = 0


class StoreAhead(NamedTuple):
    """Copy blocks of a resident request to host memory in the background.

    Attributes:
        request_id: The request.
        num_blocks: Its next whole blocks that are not there yet, so many.
    """

    request_id: str
    num_blocks: int


class Refusal(NamedTuple):
    """End a request without serving it.

    Attributes:
        request_id: The request.
        reason: Why.
    """

    request_id: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do in this step. Ids are in the order in which to do it.

    Attributes:
        park: Requests to park.
        recompute: Running requests whose KV is given up instead, to be computed again.
        pause: Residents that leave the batch and keep their blocks.
        resume: Paused ones that are in the batch again from this step on.
        drop_copy: Resident requests whose copy in host memory gives way to others.
        store_ahead: Resident requests whose KV is to be copied to host memory in the background, so that a park
            that is coming costs nothing.
        fetch: Parked requests to fetch into the pool.
        back_to_zone: Parked requests that go on in the zone.
        admit: Waiting requests to start.
        prefill_tokens: Most prompt tokens to compute in this step.
        has_whole_prompt: Whether the first of those to start must be given all its tokens, whatever limit a single
            prompt has in a step.
        refuse: Requests not to be served.
        overtaken: Of those left behind in a line whom others overtake, the ones to charge with it
            (:func:`layerkv.scheduler.lines.overtaken_in`).
        made_room: Whether requests are parked to make room for another.
        room_for: The claims that room is made for and that have not been granted it yet.
        reasons: Why, for each request that is parked, recomputed, paused, resumed, fetched, admitted or refused.
        waits: Why each of the other requests that were looked at has to wait.
        behind: Of those who wait behind another, what that one lacks.
    """

    park: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    pause: tuple[str, ...] = ()
    resume: tuple[str, ...] = ()
    drop_copy: tuple[str, ...] = ()
    store_ahead: tuple[StoreAhead, ...] = ()
    fetch: tuple[str, ...] = ()
    back_to_zone: tuple[Admission, ...] = ()
    admit: tuple[Admission, ...] = ()
    prefill_tokens: int = 0
    has_whole_prompt: bool = False
    refuse: tuple[Refusal, ...] = ()
    overtaken: tuple[str, ...] = ()
    made_room: bool = False
    room_for: tuple[str, ...] = ()
    reasons: Mapping[str, Reason] = field(default_factory=dict)
    waits: Mapping[str, Reason] = field(default_factory=dict)
    behind: Mapping[str, Resource] = field(default_factory=dict)

    @property
    def moves_somebody(self) -> bool:
        """Whether it does more than let everybody go on as before; copies in the background are no more than that."""
        return bool(
            self.pause
            or self.resume
            or self.park
            or self.recompute
            or self.drop_copy
            or self.fetch
            or self.back_to_zone
            or self.admit
            or self.refuse
            or self.room_for
        )
