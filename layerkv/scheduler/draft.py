"""A decision while it is put together: the room that is left, and the verdicts so far.

The only place where either changes. Rules ask, and speak in verbs; each verb takes what its verdict costs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from layerkv.scheduler import needs
from layerkv.scheduler.forecast import Forecast
from layerkv.scheduler.lines import Claim
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import WAITS_FOR, Reason, Resource
from layerkv.scheduler.snapshot import (
    Admission,
    Decision,
    LayeredRequest,
    ParkedRequest,
    Refusal,
    ResidentRequest,
    StoreAhead,
    WaitingRequest,
)


@dataclass(slots=True)
class Draft:
    """See the module.

    Attributes:
        pool: Pool blocks left, what running requests need in this step deducted.
        zone: Zone blocks left.
        host: Host blocks left.
        slots: Free slots left,
        kept_slots: less those that are kept for requests that wait for blocks.
        loads_s: Seconds of the link that fetches take which are under way or begin with this step.
        tokens: Prompt tokens of this step that are left for prompts that start.
        residents: Requests in the pool, those let in so far included.
        headroom: Blocks that stay free when one more comes in.
        blocked: The first claim that the pool has no room for; None while there is none.
        is_relieving: Residents leave for want of blocks.
        is_closed: The room is left to drain for a prompt that was overtaken too often.
        zone_promised_for: What a request lacks that is next in the zone; None if nobody is.
        step_is_promised: A prompt that cannot be cut waits for a step of its own: it is next.
        vacated: Residents that leave because the pool gives memory back.
        pool_closed_for: What a request of better rank lacks that waits for the pool,
        compute_closed_for: or for compute; None if none does.
        behind: Of who waits behind another, what that one lacks.
    """

    now: Outlook
    pool: int = field(init=False)
    zone: int = field(init=False)
    host: int = field(init=False)
    slots: int = field(init=False)
    loads_s: float = field(init=False)
    tokens: int = field(init=False)
    residents: int = field(init=False)
    headroom: int = field(init=False)
    kept_slots: int = 0
    blocked: Claim | None = None
    is_relieving: bool = False
    is_closed: bool = False
    zone_promised_for: Resource | None = None
    step_is_promised: bool = False
    pool_closed_for: Resource | None = None
    compute_closed_for: Resource | None = None
    park: list[str] = field(default_factory=list)
    vacated: list[ResidentRequest] = field(default_factory=list)
    recompute: list[str] = field(default_factory=list)
    paused: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    stored_ahead: list[StoreAhead] = field(default_factory=list)
    fetch: list[str] = field(default_factory=list)
    back_to_zone: list[Admission] = field(default_factory=list)
    granted: set[str] = field(default_factory=set)
    admit: list[Admission] = field(default_factory=list)
    refuse: list[Refusal] = field(default_factory=list)
    overtaken: list[str] = field(default_factory=list)
    reasons: dict[str, Reason] = field(default_factory=dict)
    waits: dict[str, Reason] = field(default_factory=dict)
    behind: dict[str, Resource] = field(default_factory=dict)
    made_room: bool = False
    room_for: list[str] = field(default_factory=list)
    whole_tokens: int = 0
    _forecast: Forecast | None = None
    _entered: list[Claim] = field(default_factory=list)

    def __post_init__(self) -> None:
        s = self.now.s
        self.pool = s.engine.free_blocks - s.engine.reserved_blocks - s.engine.owed_blocks - s.load.growth_blocks
        self.zone = s.engine.free_zone_blocks
        self.host = s.engine.free_host_blocks
        self.slots = s.engine.free_slots
        self.loads_s = self.now.load_s(s.load.loading_blocks) if s.load.loading_blocks else 0.0
        self.tokens = max(self.now.prefill_tokens - s.load.prefilling_tokens, 0)
        self._count(s.load.num_resident)

    # Leaving ------------------------------------------------------------------------------------------------------

    def stay_in_zone(self, r: LayeredRequest) -> None:
        """A layered request goes on, and takes what its next token needs."""
        if not r.outgrows_pool:  # all its room is reserved
            self.zone -= int(r.needs_zone_block)
            self.host -= r.needs_host_block

    def park_layered(self, r: LayeredRequest, reason: Reason) -> None:
        """Its KV is in host memory already. What it was promised of the zone, and does not hold, is free at once."""
        self.zone += max(r.room_blocks - r.num_zone_blocks, 0)
        if not self.now.s.engine.frees_are_deferred:
            self.zone += r.num_zone_blocks
        self.slots += 1
        self.park.append(r.request_id)
        self.reasons[r.request_id] = reason

    def give_up_layered(self, r: LayeredRequest, reason: Reason) -> None:
        """It leaves the zone, and is computed again."""
        self.slots += 1
        self._give_up(r.request_id, reason)

    def park_resident(self, r: ResidentRequest, reason: Reason) -> None:
        """It leaves the pool, and takes host blocks.

        Its pool blocks are there for this step if it must leave, or if its turn is over and frees are not deferred: a
        fetch begins when the stores of its step have ended.
        """
        if reason is Reason.POOL_SHORT:
            self.is_relieving = True
            self.pool += self.blocks_to_free(r)
        elif reason is Reason.TURN_OVER and not self.now.s.engine.frees_are_deferred:
            self.pool += r.num_blocks
        elif reason is Reason.SEGMENT_LEAVES:
            self.is_relieving = True
            self.vacated.append(r)
            if not self.now.s.engine.frees_are_deferred:
                self.pool += self.blocks_to_free(r)
        else:
            self.made_room = True
        self.host -= self.blocks_to_store(r)
        self._leave_pool(r)
        self.park.append(r.request_id)
        self.reasons[r.request_id] = reason

    def blocks_to_free(self, r: ResidentRequest) -> int:
        """Pool blocks that others can have when it leaves: not those in memory that the pool gives back."""
        return r.num_blocks - self.now.s.engine.vacating.get(r.request_id, 0)

    def give_up_resident(self, r: ResidentRequest, reason: Reason) -> None:
        """It leaves the pool, and is computed again."""
        if reason is Reason.SEGMENT_LEAVES:
            self.vacated.append(r)
        self.pool += self.blocks_to_free(r)
        self._leave_pool(r)
        self._give_up(r.request_id, reason)

    def store_ahead(self, r: ResidentRequest, num_blocks: int) -> None:
        """So many of its blocks are copied in the background."""
        self.host -= num_blocks
        self.stored_ahead.append(StoreAhead(r.request_id, num_blocks))

    def drop_copy(self, r: ResidentRequest) -> None:
        """Its copy in host memory gives way."""
        self.host += r.num_stored - r.num_shared
        self.dropped.append(r.request_id)

    def num_stored(self, r: ResidentRequest) -> int:
        """Its leading blocks that host memory holds, if its copy does not give way."""
        return 0 if r.request_id in self.dropped else r.num_stored

    def blocks_to_store(self, r: ResidentRequest) -> int:
        """Host blocks that its park takes: what was stored ahead has its own."""
        return r.num_blocks - self.num_stored(r)

    # Slots --------------------------------------------------------------------------------------------------------

    def has_slot(self, claim: Claim) -> bool:
        """Whether there is a slot for it, or somebody lends one."""
        if self.slots > 0 and not self.now.s.load.num_paused:  # asked for each claim
            return True
        return self.now.free_slots(self, claim) > 0 or self._lender(claim) is not None

    def holds_slot(self, r: ResidentRequest) -> bool:
        """Whether a slot comes free when a resident leaves: not of one that is paused, or has lent its slot."""
        return r.request_id in self.resumed or not (r.is_paused or r.request_id in self.paused)

    def resume(self, r: ResidentRequest, lender: ResidentRequest | None = None) -> None:
        """A paused request goes on, in a free slot or in that of the lender."""
        self.pool -= needs.blocks_to_resume(self.now.s, r)
        if lender is None:
            self.slots -= 1
        else:
            self._pause(lender)
        self.resumed.append(r.request_id)
        self.reasons[r.request_id] = Reason.SLOT_FREE

    def may_resume(self, r: ResidentRequest) -> bool:
        """Whether a paused request is where it was, and the pool has a block for it if its next token needs one."""
        return r.request_id not in self.left and needs.blocks_to_resume(self.now.s, r) <= max(self.pool, 0)

    @property
    def left(self) -> frozenset[str]:
        """Residents that are not where they were."""
        return frozenset((*self.park, *self.recompute, *self.paused, *self.resumed))

    @property
    def unused_slots(self) -> int:
        """Free slots, those too that are kept for requests that this step does not start."""
        return self.slots + self.kept_slots

    # Coming in ----------------------------------------------------------------------------------------------------

    def fits_pool(self, claim: Claim) -> bool:
        """Whether there are blocks for it now, and will be for as long as the policy looks ahead."""
        lines = self.now.s.lines
        if self.headroom + (0 if lines.hits else claim.num_blocks) > self.pool:  # asked for each claim
            return False
        return self.now.has_room(self, claim)

    @property
    def forecast(self) -> Forecast:
        """The pool's future with those let in so far; worked out when it is first asked for."""
        if self._forecast is None:
            s = self.now.s
            held = [(r.tokens_left, r.num_blocks) for r in s.load.resident]
            usable = s.engine.free_blocks - s.engine.reserved_blocks + sum([num_blocks for _, num_blocks in held])
            self._forecast = Forecast(int(usable * self.now.limits.overcommit), s.shape.block_tokens, held)
            for claim in self._entered:
                self._forecast.add(needs.pool_blocks(s, claim), claim.tokens_left)
        return self._forecast

    def has_link(self, claim: Claim) -> bool:
        """Whether a claim's blocks need not be loaded, or the link has time for that soon."""
        if not isinstance(claim, ParkedRequest) or self.loads_s <= 0:
            return True
        return self.loads_s + self.now.load_s(claim.num_blocks) <= self.now.most_loads_s

    def grant(self, claim: Claim) -> None:
        """Give a claim its slot and pool blocks: a parked request is fetched, a prompt may start if tokens are left."""
        self._enter_pool(claim)
        self.waits.pop(claim.request_id, None)
        if isinstance(claim, ParkedRequest):
            self.fetch.append(claim.request_id)
            self.loads_s += self.now.load_s(claim.num_blocks)
            self.reasons[claim.request_id] = Reason.ITS_TURN
        else:
            self.granted.add(claim.request_id)

    def start_resident(self, w: WaitingRequest, reason: Reason) -> None:
        """A prompt starts in the pool."""
        if w.request_id not in self.granted:
            self._enter_pool(w)
        self._take_tokens(w)
        self._admit(Admission(w.request_id, layered=False), reason)

    def start_layered(self, w: WaitingRequest, reason: Reason) -> None:
        """A prompt starts in the zone, with room for all of it there and in host memory."""
        zone_blocks, host_blocks = needs.zone_blocks(self.now.s, w), needs.host_blocks(self.now.s, w)
        self.zone -= zone_blocks
        self.host -= needs.host_blocks_to_take(self.now.s, w)
        self.pool -= needs.pool_blocks_layered(self.now.s, w)
        self._take_slot(w)
        self._take_tokens(w)
        self._admit(Admission(w.request_id, layered=True, zone_blocks=zone_blocks, host_blocks=host_blocks), reason)

    def return_to_zone(self, p: ParkedRequest) -> None:
        """A parked request goes on in the zone, with room there for all of it; its host blocks it has."""
        self.zone -= p.zone_blocks
        self._take_slot(p)
        self.back_to_zone.append(
            Admission(p.request_id, layered=True, zone_blocks=p.zone_blocks, host_blocks=p.zone_blocks)
        )
        self.reasons[p.request_id] = Reason.ZONE_TURN
        self.waits.pop(p.request_id, None)

    def turn_away(self, w: WaitingRequest, reason: Reason) -> None:
        """A prompt is not served."""
        self.refuse.append(Refusal(w.request_id, reason))
        self.reasons[w.request_id] = reason
        self.waits.pop(w.request_id, None)

    # Waiting ------------------------------------------------------------------------------------------------------

    def wait(self, claim: Claim, reason: Reason, resource: Resource | None = None) -> None:
        """It waits, and for this, whatever else it waits for; behind another, for the resource that this one lacks."""
        self.waits[claim.request_id] = reason
        self.behind.pop(claim.request_id, None)
        if resource is not None:
            self.behind[claim.request_id] = resource

    def wait_too(self, claim: Claim, reason: Reason, resource: Resource | None = None) -> None:
        """It waits for this, if nothing else has been said."""
        if claim.request_id not in self.waits:
            self.wait(claim, reason, resource)

    def lacks(self, request_id: str) -> Resource:
        """What somebody who waits waits for."""
        return self.behind.get(request_id) or WAITS_FOR[self.waits[request_id]]

    def wait_for_pool(self, claims: Sequence[Claim], next_in_pool: Collection[str]) -> None:
        """All of these wait for room in the pool, or behind the first of them if nobody passes that."""
        first, *others = [claim.request_id for claim in claims]
        self.waits.update(dict.fromkeys((first, *others), Reason.POOL_FULL))
        if self.block(claims[0]) and first in next_in_pool:
            self.waits.update(dict.fromkeys(others, Reason.BEHIND_OVERDUE))

    def block(self, claim: Claim) -> bool:
        """The pool has no room for it; whether it is the first such claim, for which room may be made."""
        if self.blocked is not None:
            return False
        self.blocked = claim
        return True

    def keep_slots(self, num_slots: int) -> None:
        """So many are kept for requests that wait for blocks."""
        self.slots -= num_slots
        self.kept_slots += num_slots

    def overtake(self, request_ids: Sequence[str]) -> None:
        """Others started that stand behind these."""
        self.overtaken += [r for r in request_ids if r not in self.overtaken]

    def decision(self) -> Decision:
        """All verdicts."""
        return Decision(
            park=tuple(self.park),
            recompute=tuple(self.recompute),
            pause=tuple(self.paused),
            resume=tuple(self.resumed),
            drop_copy=tuple(self.dropped),
            store_ahead=tuple(self.stored_ahead),
            fetch=tuple(self.fetch),
            back_to_zone=tuple(self.back_to_zone),
            admit=tuple(self.admit),
            prefill_tokens=max(self.now.prefill_tokens, self.whole_tokens),
            has_whole_prompt=self.whole_tokens > 0,
            refuse=tuple(self.refuse),
            overtaken=tuple(self.overtaken),
            made_room=self.made_room,
            room_for=tuple(self.room_for),
            reasons=self.reasons,
            waits=self.waits,
            behind={request_id: lacks for request_id, lacks in self.behind.items() if request_id in self.waits},
        )

    def _give_up(self, request_id: str, reason: Reason) -> None:
        self.is_relieving = True
        self.recompute.append(request_id)
        self.reasons[request_id] = reason

    def _leave_pool(self, r: ResidentRequest) -> None:
        self._count(self.residents - 1)
        self.slots += self.holds_slot(r)
        for moved in (self.paused, self.resumed):
            if r.request_id in moved:
                moved.remove(r.request_id)

    def _take_slot(self, claim: Claim) -> None:
        lender = None if self.slots > 0 else self._lender(claim)
        if lender is None:
            self.slots -= 1
        else:
            self._pause(lender)

    def _lender(self, claim: Claim) -> ResidentRequest | None:
        if self.tokens <= 0 and not isinstance(claim, ParkedRequest):
            return None  # it would not start in this step
        return self.now.lender(claim, self.left)

    def _pause(self, r: ResidentRequest) -> None:
        self.paused.append(r.request_id)
        self.reasons[r.request_id] = Reason.SLOT_LENT

    def _enter_pool(self, claim: Claim) -> None:
        need = needs.pool_blocks(self.now.s, claim)
        self.pool -= need
        self._take_slot(claim)
        self._count(self.residents + 1)
        self._entered.append(claim)
        if self._forecast is not None:
            self._forecast.add(need, claim.tokens_left)

    def _count(self, residents: int) -> None:
        self.residents = residents
        self.headroom = needs.headroom_blocks(self.now.s, residents, self.now.limits.headroom_tokens)

    def _take_tokens(self, w: WaitingRequest) -> None:
        if not w.in_one_step:
            self.tokens -= needs.tokens_to_compute(self.now.s, w)
            return
        self.whole_tokens = w.num_tokens + len(self.fetch)  # each may resume at once, which takes a token
        self.tokens -= w.num_tokens

    def _admit(self, admission: Admission, reason: Reason) -> None:
        self.admit.append(admission)
        self.reasons[admission.request_id] = reason
        self.waits.pop(admission.request_id, None)
