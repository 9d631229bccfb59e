"""The scheduler policy: who is parked, fetched, admitted or refused in a step, and how much prefill it does.

:func:`decide` is pure: same snapshot, same decision. It looks at the heads of the queues only, so its cost does not
grow with the number of waiting requests.

Two lines form (:mod:`layerkv.scheduler.lines`). Prompts stand in line for *compute*, by TTFT deadline; those that
cannot be on time (Moore-Hodgson) behind those that can. Whoever can only go on in the pool, that is parked requests and
prompts that cannot run layered, stands in line for *pool blocks*, by the latest time to go on; those too late for their
objectives behind those that are not.

Ranks (vLLM's request priorities) are served one after the other: while a request of better rank waits for room, worse
ranks get none of it, as in vLLM. They starve as long as better ones take everything; within a rank nobody does. There,
of those left behind in a line, the first and the one due first may be overtaken in ``max_overtakes`` steps; then nobody
passes it any more, and the room is left to drain for it: any single request fits an empty pool and an empty zone.
Prefill itself never stops for more than ``max_idle_steps`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from layerkv.core.cost import StepWork
from layerkv.scheduler.forecast import Forecast
from layerkv.scheduler.lines import Claim, by_rank, in_order, overtaken_in
from layerkv.scheduler.prefill import late_prompts, prefill_budget
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import (
    Admission,
    Decision,
    ParkedRequest,
    PrefixHit,
    Refusal,
    ResidentRequest,
    WaitingRequest,
)

Snapshot = Any  # whose values are named without the part that holds them

_NO_HIT = PrefixHit()
_WAITS_FOR_ROOM = frozenset(
    {Reason.NO_SLOT, Reason.POOL_FULL, Reason.ZONE_FULL, Reason.HOST_FULL, Reason.WAIT_IS_SHORTER}
)
"""And not for a step's tokens, of which the next step has more."""


@dataclass(frozen=True, slots=True)
class PolicyLimits:
    """Constants of the policy.

    Attributes:
        headroom_tokens: Tokens that every resident request can still make before the pool runs short, kept free
            when one more is let in, whatever the forecast says. Hysteresis: a fetch that would be parked again at
            once is not worth its copies.
        min_resident_steps: A request fetched or admitted less long ago is parked only if nobody else of its rank, or
            of a worse one, can be.
        max_overtakes: In how many steps one of those left behind may be overtaken.
        min_prefill_tokens: Prompt tokens computed although decodes have no slack,
        max_idle_steps: after this many steps without any.
        scan: How many waiting prompts are looked at in one step,
        scan_parked: and how many parked requests.
        ahead_steps: The forecast's horizon: shortages that near are prepared for by storing ahead.
        overcommit: How many times the pool the forecast may fill it. A wrong guess costs a park, which was stored
            ahead; a tenth of the pool kept empty costs throughput in every step.
        rescue_steps: A request whose latest time to go on is nearer than so many steps may have room made for it.
    """

    headroom_tokens: int = 16
    min_resident_steps: int = 32
    max_overtakes: int = 64
    min_prefill_tokens: int = 256
    max_idle_steps: int = 8
    scan: int = 64
    scan_parked: int = 32
    ahead_steps: int = 64
    rescue_steps: int = 4
    overcommit: float = 1.1


@dataclass(slots=True)
class _Draft:
    """The decision while it is put together, and the room that is left."""

    pool: int
    zone: int
    host: int
    early_host: int
    slots: int
    residents: int
    park: list[str] = field(default_factory=list)
    recompute: list[str] = field(default_factory=list)
    store_ahead: list[str] = field(default_factory=list)
    fetch: list[str] = field(default_factory=list)
    resident_prompts: set[str] = field(default_factory=set)
    admit: list[Admission] = field(default_factory=list)
    refuse: list[Refusal] = field(default_factory=list)
    overtaken: list[str] = field(default_factory=list)
    reasons: dict[str, Reason] = field(default_factory=dict)
    waits: dict[str, Reason] = field(default_factory=dict)
    blocked: Claim | None = None
    made_room: bool = False
    whole_tokens: int = 0
    is_closed: bool = False
    by_reluctance: list[ResidentRequest] | None = None


def decide(snapshot: Snapshot, limits: PolicyLimits | None = None) -> Decision:
    """Choose what to park, fetch and admit before one engine step."""
    s, limits = snapshot, limits or PolicyLimits()
    draft = _Draft(
        pool=s.free_blocks - s.reserved_blocks,
        zone=s.free_zone_blocks,
        host=s.free_host_blocks,
        early_host=s.free_host_blocks if s.early_host_blocks is None else s.early_host_blocks,
        slots=s.free_slots,
        residents=s.num_resident,
    )
    _let_layered_leave(s, draft)
    _relieve_pool(s, limits, draft)
    draft.pool -= s.growth_blocks
    forecast = _forecast(s, limits)
    prefill_tokens = prefill_budget(s, min_tokens=limits.min_prefill_tokens, max_idle_steps=limits.max_idle_steps)
    waiting = s.waiting[: limits.scan]
    late = late_prompts(s, s.waiting, prefill_tokens)
    is_relieving = bool(draft.recompute) or Reason.POOL_SHORT in draft.reasons.values()
    turn = _Turn(
        tokens=max(prefill_tokens - s.prefilling_tokens, 0),
        prefill_tokens=prefill_tokens,
        late=late,
        forecast=forecast,
        is_relieving=is_relieving,
    )
    overdue = {r for r, num in s.overtaken.items() if num >= limits.max_overtakes}
    ranks = by_rank(_claims(s, limits, waiting, late, overdue), _by_turn(s, waiting, late, overdue))
    for claims, prompts in ranks:
        _serve_rank(s, limits, draft, claims, prompts, turn)
        if len(ranks) > 1:
            _close_to_worse_ranks(s, draft, claims, prompts, turn)
    _store_ahead(s, limits, draft, forecast)
    return Decision(
        park=tuple(draft.park),
        recompute=tuple(draft.recompute),
        store_ahead=tuple(draft.store_ahead),
        fetch=tuple(draft.fetch),
        admit=tuple(draft.admit),
        prefill_tokens=max(prefill_tokens, draft.whole_tokens),
        has_whole_prompt=draft.whole_tokens > 0,
        refuse=tuple(draft.refuse),
        overtaken=tuple(draft.overtaken),
        made_room=draft.made_room,
        reasons=draft.reasons,
        waits=draft.waits,
    )


@dataclass(slots=True)
class _Turn:
    """What serving one leaves for the next; the last two what a rank leaves for worse ones."""

    tokens: int
    prefill_tokens: int
    late: set[str]
    forecast: Forecast
    is_relieving: bool
    zone_is_promised: bool = False
    pool_is_closed: bool = False
    compute_is_closed: bool = False
    step_is_promised: bool = False


def _serve_rank(
    s: Snapshot,
    limits: PolicyLimits,
    draft: _Draft,
    claims: Sequence[Claim],
    prompts: Sequence[WaitingRequest],
    turn: _Turn,
) -> None:
    """Give those of one rank what better ones have left: pool blocks, then compute."""
    if turn.is_relieving:  # hysteresis: nobody comes in through the door by which others must leave
        draft.blocked = draft.blocked or (claims[0] if claims else None)
        draft.waits.update((claim.request_id, Reason.VICTIMS_LEAVE) for claim in claims)
    elif turn.pool_is_closed:
        draft.waits.update((claim.request_id, Reason.BEHIND_RANK) for claim in claims)
    else:
        if turn.compute_is_closed:  # a prompt would take blocks that it could not use
            claims = [claim for claim in claims if isinstance(claim, ParkedRequest)]
        _grant_claims(s, limits, draft, claims, turn.forecast)
        _make_room(s, limits, draft)
    _admit(s, limits, draft, prompts, turn)
    _note_overtaken(draft, claims, prompts)


def _note_overtaken(draft: _Draft, claims: Sequence[Claim], prompts: Sequence[WaitingRequest]) -> None:
    admitted = {admission.request_id for admission in draft.admit}
    if draft.fetch or draft.resident_prompts:
        # whoever was granted blocks but no tokens neither was left behind in this line nor has started
        if draft.resident_prompts:
            claims = [c for c in claims if c.request_id not in draft.resident_prompts or c.request_id in admitted]
        draft.overtaken += overtaken_in(claims, admitted.union(draft.fetch))
    if admitted:
        if draft.refuse:
            refused = {refusal.request_id for refusal in draft.refuse}
            prompts = [w for w in prompts if w.request_id not in refused]
        draft.overtaken += [r for r in overtaken_in(prompts, admitted) if r not in draft.overtaken]


def _close_to_worse_ranks(
    s: Snapshot, draft: _Draft, claims: Sequence[Claim], prompts: Sequence[WaitingRequest], turn: _Turn
) -> None:
    """Keep the room that somebody of this rank waits for.

    One who waits for tokens needs no room yet; one who outgrows the pool needs none of the pool's, but host memory
    that parked requests have.
    """
    num_blocked = sum(claim.request_id in draft.waits for claim in claims)
    if num_blocked:
        turn.pool_is_closed = True
        draft.slots -= num_blocked
        turn.compute_is_closed |= draft.slots <= 0
    for w in prompts:
        reason = draft.waits.get(w.request_id)
        if reason is not None:
            turn.compute_is_closed = True
            turn.pool_is_closed |= reason in _WAITS_FOR_ROOM and not _outgrows_pool(s, w)


# Leaving --------------------------------------------------------------------------------------------------------------


def _let_layered_leave(s: Snapshot, draft: _Draft) -> None:
    """Park layered requests after their first token, or, when they may stream, once that is not worth it."""
    stream_bytes = _stream_budget(s)
    wanted = min((_layered_blocks(w) for w in s.waiting[:1]), default=0)
    pool = draft.pool - s.growth_blocks
    for r in s.layered:
        zone_cost, host_cost = int(r.needs_zone_block), int(r.needs_host_block)
        if r.outgrows_pool:  # all its room is reserved
            zone_cost = host_cost = 0
        reason: Reason | None = None
        if r.prefill_done:
            stream_bytes -= r.num_zone_blocks * s.streamed_block_bytes
            is_wanted = draft.zone - zone_cost < wanted or draft.host < host_cost or r.num_blocks <= pool
            could_be_fetched = not r.outgrows_pool and r.num_blocks <= s.pool_blocks
            has_room = draft.zone >= zone_cost and draft.host >= host_cost
            if not could_be_fetched and not has_room and not s.is_paused:
                draft.recompute.append(r.request_id)
                draft.reasons[r.request_id] = Reason.LONGER_THAN_POOL
                draft.slots += 1
                continue
            if could_be_fetched and (not s.streamed_decode or is_wanted):  # a first token, or the pool, is better
                reason = Reason.FIRST_TOKEN_DONE
            elif could_be_fetched and stream_bytes < 0:
                reason = Reason.STREAM_BUDGET
        if reason is None:
            draft.zone -= zone_cost
            draft.host -= host_cost
            continue
        stream_bytes += r.num_zone_blocks * s.streamed_block_bytes
        pool -= r.num_blocks
        if not s.frees_are_deferred:
            draft.zone += r.num_zone_blocks
        draft.slots += 1
        draft.park.append(r.request_id)
        draft.reasons[r.request_id] = reason


def _stream_budget(s: Snapshot) -> float:
    """Bytes per step that the TPOT objectives leave time to load: ``(TPOT_SLO - T_step) * link``."""
    if s.cost is None or not s.slo_scheduling or not s.streamed_decode:
        return math.inf
    if s.tightest_tpot_s == math.inf:
        return math.inf
    step_s = s.cost.step_s(StepWork(num_decodes=s.decode_tokens, decode_context=s.decode_context))
    return s.cost.load_bytes_in(s.tightest_tpot_s - step_s)


def _relieve_pool(s: Snapshot, limits: PolicyLimits, draft: _Draft) -> None:
    """Take residents out until the running requests' growth fits."""
    deficit = s.growth_blocks - s.free_blocks
    if deficit <= 0:
        return
    for num_victims, (r, reason) in enumerate(_leavers(s, limits, draft)):
        if deficit <= 0 or num_victims + 1 >= max(s.num_resident, 2):
            break  # the last resident goes on, unless it fills the pool
        if reason is Reason.POOL_SHORT:
            draft.park.append(r.request_id)
            draft.host -= r.num_blocks - r.num_stored
        else:
            draft.recompute.append(r.request_id)
        draft.reasons[r.request_id] = reason
        deficit -= r.num_blocks
        draft.pool += r.num_blocks
        draft.residents -= 1
        draft.slots += 1


def _leavers(s: Snapshot, limits: PolicyLimits, draft: _Draft) -> Iterator[tuple[ResidentRequest, Reason]]:
    """Residents in the order in which they leave the pool, and why: parked if it is short, else computed again."""
    without_room: list[ResidentRequest] = []
    for r in _by_reluctance(s, limits, draft):
        if r.num_blocks >= s.pool_blocks:  # with its next block it could never be fetched
            if not s.is_paused:
                yield r, Reason.LONGER_THAN_POOL
        elif not s.is_paused and _recompute_is_cheaper(s, r):
            yield r, Reason.RECOMPUTE_CHEAPER
        elif r.num_blocks - r.num_stored <= draft.host:
            yield r, Reason.POOL_SHORT
        else:
            without_room.append(r)
    # Left to vLLM, layered prompts would be preempted first, which hold no pool blocks. While paused that must be: KV
    # that is given up then could not be computed again.
    if not s.is_paused:
        yield from ((r, Reason.NO_ROOM_TO_PARK) for r in without_room)


def _by_reluctance(s: Snapshot, limits: PolicyLimits, draft: _Draft) -> list[ResidentRequest]:
    """Who may be parked, most readily first.

    Spared are those of better rank, then those that came a moment ago, those that can be on time, the weighty, and
    the urgent.
    """
    if draft.by_reluctance is None:
        now_s, recent = s.now_s if s.slo_scheduling else math.inf, limits.min_resident_steps
        keyed = [
            (-r.rank, r.steps_resident < recent, r.deadline_s >= now_s, r.weight, -r.deadline_s, r.request_id, r)
            for r in s.resident
            if r.can_park
        ]
        keyed.sort()
        draft.by_reluctance = [entry[-1] for entry in keyed]
    return draft.by_reluctance


def _recompute_is_cheaper(s: Snapshot, r: ResidentRequest) -> bool:
    """Swap or recompute: two copies, less what is stored already, against computing its tokens again."""
    if s.cost is None or not r.num_tokens:
        return False
    stored_s = s.cost.store_s((r.num_blocks - r.num_stored) * s.block_bytes)
    return s.cost.prefill_s(r.num_tokens) < stored_s + s.cost.load_s(r.num_blocks * s.block_bytes)


# The line for pool blocks ---------------------------------------------------------------------------------------------


def _forecast(s: Snapshot, limits: PolicyLimits) -> Forecast:
    requests = [(r.tokens_left, r.num_blocks) for r in s.resident]
    usable = s.free_blocks - s.reserved_blocks + sum([num_blocks for _, num_blocks in requests])
    return Forecast(int(usable * limits.overcommit), s.block_tokens, requests)


def _headroom(s: Snapshot, limits: PolicyLimits, residents: int) -> int:
    if residents == 0:
        return 0  # whoever comes into an empty pool fits: progress is certain
    return -(-(residents + 1) * limits.headroom_tokens // s.block_tokens)


def _need(s: Snapshot, claim: Claim) -> int:
    hit = s.hits.get(claim.request_id, _NO_HIT)
    return claim.num_blocks - hit.num_blocks + hit.num_evictable


def _fits_pool(s: Snapshot, limits: PolicyLimits, draft: _Draft, claim: Claim, forecast: Forecast) -> bool:
    """Whether there are blocks for it now, and by the forecast will be until it ends."""
    need = _need(s, claim)
    if need + _headroom(s, limits, draft.residents) > draft.pool:
        return False
    return draft.residents == 0 or forecast.fits(need, claim.tokens_left)


def _claims(
    s: Snapshot, limits: PolicyLimits, waiting: Sequence[WaitingRequest], late: set[str], overdue: set[str]
) -> list[Claim]:
    """Everybody who can only go on in the pool, in order; whoever was overtaken too often stands first.

    So does a prompt that was overtaken too often in the line for compute, though it may still run layered: else those
    who stand in line here would take each slot, and hold the host memory, that it waits for.
    """
    prompts = [
        w
        for w in waiting
        if not _outgrows_pool(s, w) and ((overdue and w.request_id in overdue) or not _can_ever_layer(s, w))
    ]
    for first in waiting if overdue else ():
        if first.request_id in overdue and _outgrows_pool(s, first):  # it does not stand here, and nobody passes it
            prompts = [
                w
                for w in prompts
                if w.rank != first.rank or (w.request_id in overdue and w.deadline_s <= first.deadline_s)
            ]
    late_before_s = s.now_s if s.slo_scheduling else -math.inf
    claims: list[Claim] = [*s.parked[: limits.scan_parked], *prompts]
    return in_order(claims, late=late, late_before_s=late_before_s, overdue=overdue)


def _grant_claims(
    s: Snapshot, limits: PolicyLimits, draft: _Draft, claims: Sequence[Claim], forecast: Forecast
) -> None:
    """Give pool blocks to claims in order, past those that do not fit now."""
    for i, claim in enumerate(claims):
        if draft.slots <= 0 or not _fits_pool(s, limits, draft, claim, forecast):
            draft.waits[claim.request_id] = Reason.NO_SLOT if draft.slots <= 0 else Reason.POOL_FULL
            if draft.blocked is None:
                draft.blocked = claim
                if s.overtaken.get(claim.request_id, 0) >= limits.max_overtakes:
                    draft.waits.update((behind.request_id, Reason.BEHIND_OVERDUE) for behind in claims[i + 1 :])
                    break
            continue
        need = _need(s, claim)
        draft.pool -= need
        draft.slots -= 1
        draft.residents += 1
        forecast.add(need, claim.tokens_left)
        if isinstance(claim, ParkedRequest):
            draft.fetch.append(claim.request_id)
            draft.reasons[claim.request_id] = Reason.ITS_TURN
        else:
            draft.resident_prompts.add(claim.request_id)


def _make_room(s: Snapshot, limits: PolicyLimits, draft: _Draft) -> None:
    """Park residents that can afford it for the first claim if that is about to become late.

    Only for one that still can be on time, and only residents whose laxity covers its whole stay and their own way
    back: each exchange uses laxity up, so exchanges end.
    """
    claim = draft.blocked
    if claim is None or s.cost is None or not s.slo_scheduling or not s.can_exchange or claim.deadline_s < s.now_s:
        return
    step_s, _ = _times(s, claim.num_blocks)
    if claim.deadline_s - s.now_s > limits.rescue_steps * step_s:
        return
    chosen = _who_can_wait(s, limits, draft, claim, step_s)
    if not chosen:
        return
    for r in chosen:
        draft.park.append(r.request_id)
        draft.reasons[r.request_id] = Reason.MAKES_ROOM
        draft.host -= r.num_blocks - r.num_stored
        draft.residents -= 1
        draft.slots += 1
    draft.made_room = True


def _who_can_wait(
    s: Snapshot, limits: PolicyLimits, draft: _Draft, claim: Claim, step_s: float
) -> list[ResidentRequest] | None:
    """Residents whose blocks together make room for the claim; None if there are not enough."""
    stay_s = claim.tokens_left * step_s
    missing = _need(s, claim) + _headroom(s, limits, draft.residents) - draft.pool
    host = draft.host
    chosen: list[ResidentRequest] = []
    for r in _by_reluctance(s, limits, draft):
        if missing <= 0:
            break
        _, back_s = _times(s, r.num_blocks)
        can_wait = r.deadline_s - s.now_s > stay_s + back_s or (r.deadline_s < s.now_s and r.weight < claim.weight)
        needs_host = r.num_blocks - r.num_stored
        may_wait = can_wait and r.rank >= claim.rank and r.steps_resident >= limits.min_resident_steps
        if may_wait and needs_host <= host and r.num_blocks < s.pool_blocks:
            chosen.append(r)
            missing -= r.num_blocks
            host -= needs_host
    return chosen if missing <= 0 and len(chosen) < max(s.num_resident, 2) else None


def _times(s: Snapshot, num_blocks: int) -> tuple[float, float]:
    """Seconds of a bare decode step, and of fetching so many blocks."""
    assert s.cost is not None
    step_s = s.cost.step_s(StepWork(num_decodes=s.decode_tokens, decode_context=s.decode_context))
    return step_s, s.cost.load_s(num_blocks * s.block_bytes) + step_s


def _store_ahead(s: Snapshot, limits: PolicyLimits, draft: _Draft, forecast: Forecast) -> None:
    """Copy one more likely victim to host memory if the pool is going to run short: then its park costs nothing.

    Half of host memory is left to prompts and parks that need it at once: a copy made ahead stays until its request
    is parked or ends.
    """
    if not s.can_store_ahead or draft.park or draft.recompute or s.num_resident < 2:
        return
    if draft.is_closed:  # host memory is left to drain for whoever nobody passes any more
        return
    shortage = forecast.shortage(limits.ahead_steps, draft.pool)
    if shortage <= 0:
        return
    for r in _by_reluctance(s, limits, draft):
        whole_blocks = r.num_tokens // s.block_tokens
        if r.num_stored * 2 < whole_blocks:
            if whole_blocks - r.num_stored <= draft.host - s.host_blocks // 2:
                draft.store_ahead.append(r.request_id)
                draft.host -= whole_blocks - r.num_stored
            return
        shortage -= r.num_blocks
        if shortage <= 0:
            return


# The line for compute -------------------------------------------------------------------------------------------------


def _outgrows_pool(s: Snapshot, w: WaitingRequest) -> bool:
    """Whether it is expected to become longer than the pool: then it decodes in the zone, to its end."""
    return _layered_blocks(w) > s.pool_blocks


def _layered_blocks(w: WaitingRequest) -> int:
    """Blocks that it needs room for, in the zone (less its hits) and in host memory, to start layered."""
    return max(w.num_blocks, w.most_blocks)


def _can_ever_layer(s: Snapshot, w: WaitingRequest) -> bool:
    hit, num_blocks = s.hits.get(w.request_id, _NO_HIT), _layered_blocks(w)
    return (
        s.mode != "resident"
        and w.can_layer
        and num_blocks - hit.num_blocks <= s.zone_blocks
        and num_blocks <= s.host_blocks
        and (s.long_contexts or not _outgrows_pool(s, w))
    )


def _by_turn(
    s: Snapshot, waiting: Sequence[WaitingRequest], late: set[str], overdue: set[str]
) -> Sequence[WaitingRequest]:
    """Prompts in the order in which they get compute."""
    if not late and not overdue:
        return waiting  # they come by rank and deadline
    return in_order(waiting, late=late, late_before_s=-math.inf, overdue=overdue)


def _admit(s: Snapshot, limits: PolicyLimits, draft: _Draft, waiting: Sequence[WaitingRequest], turn: _Turn) -> None:
    """Start prompts in order, each RESIDENT if that hurts nobody, else LAYERED if that helps somebody."""
    closed = Reason.BEHIND_RANK if turn.compute_is_closed else None
    for w in waiting:
        refusal = _refusal(s, draft, w, turn.late)
        if refusal is not None:
            draft.refuse.append(refusal)
            draft.reasons[w.request_id] = refusal.reason
            draft.waits.pop(w.request_id, None)
            continue
        has_place = w.request_id in draft.resident_prompts and not turn.step_is_promised
        if closed is not None and not has_place:  # a granted prompt has its blocks and slot already
            draft.waits.setdefault(w.request_id, closed)
            continue
        where, reason = _where_to_start(s, limits, draft, w, turn)
        if where is None:
            # an overdue one that may run layered stands in line for the pool too, but does not need it
            if w.request_id not in draft.waits or _can_ever_layer(s, w):
                draft.waits[w.request_id] = reason
            if s.overtaken.get(w.request_id, 0) >= limits.max_overtakes:
                closed, draft.is_closed = Reason.BEHIND_OVERDUE, True
            elif turn.step_is_promised:
                closed = Reason.BEHIND
            continue
        _start(s, draft, w, turn, where)
        draft.reasons[w.request_id] = reason
        draft.waits.pop(w.request_id, None)


def _refusal(s: Snapshot, draft: _Draft, w: WaitingRequest, late: set[str]) -> Refusal | None:
    if w.in_one_step and w.num_tokens > s.budget_tokens:
        return Refusal(w.request_id, Reason.NEVER_FITS)
    if w.request_id in draft.resident_prompts:
        return None
    if w.request_id in late and w.may_refuse:
        return Refusal(w.request_id, Reason.OVERLOAD)
    if _outgrows_pool(s, w) and not _can_ever_layer(s, w):
        return Refusal(w.request_id, Reason.NEVER_FITS)
    return None


def _where_to_start(
    s: Snapshot, limits: PolicyLimits, draft: _Draft, w: WaitingRequest, turn: _Turn
) -> tuple[Literal["pool", "zone"] | None, Reason]:
    """Where a prompt may start in this step, if it may, and why there or why not.

    A prompt that is to run layered, but cannot just now, holds back later ones that want the zone: it is next.
    """
    if turn.tokens <= 0:
        return None, Reason.LATE if w.request_id in turn.late else Reason.NO_TOKENS_LEFT
    if w.in_one_step and not _has_step_for_all_of_it(s, draft, w):
        turn.step_is_promised = True
        return None, Reason.NO_TOKENS_LEFT
    if w.request_id in draft.resident_prompts:
        return "pool", Reason.FITS
    if not _can_ever_layer(s, w):
        return None, Reason.POOL_FULL
    if draft.slots <= 0:
        return None, Reason.NO_SLOT  # not an end: one further on may have been granted the slot
    is_contended = draft.blocked is not None or turn.is_relieving
    is_free = not is_contended and not _outgrows_pool(s, w)
    fits = is_free and _fits_pool(s, limits, draft, w, turn.forecast)
    if fits and s.mode == "auto":
        return "pool", Reason.FITS
    if turn.zone_is_promised:
        return None, Reason.LATE if w.request_id in turn.late else Reason.BEHIND
    obstacle = _why_not_layered(s, draft, w, turn)
    if obstacle is None:
        return "zone", Reason.POOL_CONTENDED
    if obstacle is Reason.HOST_FULL and fits:
        return "pool", Reason.HOST_FULL_RESIDENT  # stock behaviour
    turn.zone_is_promised = obstacle is not Reason.WAIT_IS_SHORTER
    return None, obstacle


def _has_step_for_all_of_it(s: Snapshot, draft: _Draft, w: WaitingRequest) -> bool:
    """Whether this step's tokens hold a prompt that must not be cut: no other prompt may come before it.

    Hits are not counted on: they may be gone by the time that the engine looks.
    """
    is_first = not draft.admit and s.prefilling_tokens == 0
    return is_first and w.num_tokens + len(draft.fetch) <= s.budget_tokens - s.decode_tokens


def _start(s: Snapshot, draft: _Draft, w: WaitingRequest, turn: _Turn, where: Literal["pool", "zone"]) -> None:
    """Admit a prompt and deduct what it takes (a granted claim has its blocks and slot already)."""
    hit = s.hits.get(w.request_id, _NO_HIT)
    if w.in_one_step:
        draft.whole_tokens = w.num_tokens + len(draft.fetch)  # each may resume at once, which takes a token
        turn.tokens -= w.num_tokens
    else:
        turn.tokens -= _tokens_to_compute(s, w, hit)
    if where == "zone":
        host_blocks = _layered_blocks(w)
        zone_blocks = host_blocks - hit.num_blocks
        draft.admit.append(Admission(w.request_id, layered=True, zone_blocks=zone_blocks, host_blocks=host_blocks))
        draft.zone -= zone_blocks
        draft.host -= host_blocks
        draft.early_host -= host_blocks
        draft.pool -= hit.num_evictable
        draft.slots -= 1
        return
    draft.admit.append(Admission(w.request_id, layered=False))
    if w.request_id not in draft.resident_prompts:
        need = _need(s, w)
        draft.pool -= need
        draft.residents += 1
        draft.slots -= 1
        turn.forecast.add(need, w.tokens_left)


def _tokens_to_compute(s: Snapshot, w: WaitingRequest, hit: PrefixHit) -> int:
    num_hits = hit.num_blocks + hit.num_host_blocks  # since layered prompts load what host memory caches
    return max(w.num_tokens - num_hits * s.block_tokens, 1)


def _why_not_layered(s: Snapshot, draft: _Draft, w: WaitingRequest, turn: _Turn) -> Reason | None:
    """None if zone, host memory and this step's tokens have room for the prompt and that helps it; else why not."""
    hit, num_blocks = s.hits.get(w.request_id, _NO_HIT), _layered_blocks(w)
    if num_blocks > (draft.host if _outgrows_pool(s, w) else min(draft.host, draft.early_host)):
        return Reason.HOST_FULL
    if num_blocks - hit.num_blocks > draft.zone or hit.num_evictable > max(draft.pool, 0):
        return Reason.ZONE_FULL
    if turn.tokens < min(_tokens_to_compute(s, w, hit), turn.prefill_tokens // 2):
        return Reason.SMALL_REST
    if _waiting_is_shorter(s, draft, w, turn.forecast):
        return Reason.WAIT_IS_SHORTER
    return None


def _waiting_is_shorter(s: Snapshot, draft: _Draft, w: WaitingRequest, forecast: Forecast) -> bool:
    """Whether pool blocks come free sooner than the copies of a layered prefill take, and in time.

    Two copies of its KV is what LAYERED costs; a first token that much sooner is what it gives.
    """
    if s.mode != "auto" or s.cost is None or draft.blocked is not None or draft.residents == 0:
        return False
    if _outgrows_pool(s, w):
        return False
    steps = forecast.steps_until_free(_need(s, w), draft.pool)
    if steps is None:
        return False
    step_s, fetch_s = _times(s, w.num_blocks)
    wait_s = steps * step_s
    in_time = s.now_s + wait_s + w.prefill_cost_s * s.cost.prefill_factor <= w.deadline_s
    return in_time and wait_s < fetch_s


def _never_fits(s: Snapshot, w: WaitingRequest) -> str:
    return (
        f"the prompt's {w.num_tokens} tokens and its output may need {_layered_blocks(w)} KV blocks; the pool has "
        f"{s.pool_blocks}, the lane zone {s.zone_blocks}, host memory {s.host_blocks}: raise KV memory, or, with "
        "long_contexts, zone_tokens and host_memory"
    )


def _needs_a_longer_step(s: Snapshot, w: WaitingRequest) -> str:
    return (
        f"{w.num_tokens} tokens must be computed in one step, which takes {s.budget_tokens}: vLLM's CPU build cannot "
        "cut a prompt that is sampled with a seed of its own; raise --max-num-batched-tokens, or leave out the seed"
    )


def _overload(s: Snapshot, w: WaitingRequest) -> str:
    late_s = max(s.now_s - w.deadline_s, 0.0)
    return (
        "the engine is overloaded: this prompt's first token cannot come in time"
        + (f" ({late_s:.1f} s late already)" if late_s else "")
        + "; its SLO class asks to be refused then (overload: reject); try again later"
    )
