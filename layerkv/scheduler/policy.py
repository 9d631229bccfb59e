"""The first scheduler policy: earliest TTFT deadline first, layered when the pool is full, fetch by least laxity.

:func:`decide` is pure: same snapshot, same decision. It looks at the head of each queue only, so its cost does
not grow with the number of waiting requests.

Who gets pool blocks: parked requests, and prompts that cannot run layered, form one queue of *claims* ordered by
deadline. The head may be overtaken by smaller claims while it does not fit, but only ``max_overtakes`` times:
then the pool is left to drain for it. Deadlines never move, so every claim becomes the head in the end, and an
empty pool fits any of them: nobody starves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import islice

from layerkv.scheduler.snapshot import (
    Admission,
    Decision,
    ParkedRequest,
    PrefixHit,
    ResidentRequest,
    Snapshot,
    WaitingRequest,
)

_NO_HIT = PrefixHit()


@dataclass(frozen=True, slots=True)
class PolicyLimits:
    """Constants of the policy.

    Attributes:
        headroom_tokens: Tokens that every resident request can still make before the pool runs short, kept free
            when one more is let in. Hysteresis: a fetch that would be parked again at once is not worth its copies.
        min_resident_steps: A request fetched or admitted less long ago is parked only if nobody else can be.
        max_overtakes: How often the head of the pool's queue may be overtaken.
        min_prefill_tokens: Prefill goes on at this rate even when every decode is late: no starvation.
        scan: How many entries of a queue are looked at in one step.
    """

    headroom_tokens: int = 32
    min_resident_steps: int = 32
    max_overtakes: int = 64
    min_prefill_tokens: int = 512
    scan: int = 64


@dataclass(slots=True)
class _Room:
    """What is left while the decision is being put together."""

    pool: int
    zone: int
    host: int
    slots: int
    residents: int


def decide(snapshot: Snapshot, limits: PolicyLimits | None = None) -> Decision:
    """Choose what to park, fetch and admit before one engine step."""
    s, limits = snapshot, limits or PolicyLimits()
    room = _Room(
        pool=s.free_blocks - s.reserved_blocks,
        zone=s.free_zone_blocks,
        host=s.free_host_blocks,
        slots=s.free_slots,
        residents=s.num_resident,
    )
    leave_zone = _choose_leavers(s)
    leaving = set(leave_zone)
    for r in s.layered:
        if r.request_id not in leaving:
            room.zone -= r.needs_zone_block
            room.host -= r.needs_host_block
        elif not s.frees_are_deferred:
            room.zone += r.num_zone_blocks
    victims = _choose_victims(s, limits, room)
    room.slots += len(victims) + len(leave_zone)
    room.pool -= s.growth_blocks

    prefill_tokens = prefill_budget(s, limits)
    if victims:  # hysteresis: nobody comes in through the door by which others must leave
        fetches: list[str] = []
        resident: list[Admission] = []
        blocked, overtaken = True, None
    else:
        fetches, resident, blocked, overtaken = _grant_claims(s, limits, room)
    admitted, refused = _admit(s, limits, room, resident, prefill_tokens, pool_is_contended=blocked)
    return Decision(
        park=(*leave_zone, *victims),
        fetch=tuple(fetches),
        admit=tuple(admitted),
        prefill_tokens=prefill_tokens,
        refuse=tuple(refused),
        overtaken=overtaken,
    )


def prefill_budget(snapshot: Snapshot, limits: PolicyLimits) -> int:
    """Most prompt tokens whose step time fits the smallest decode slack (LayerKV Eq. 1, restated per step)."""
    s = snapshot
    most = max(s.budget_tokens - s.decode_tokens, 0)
    if s.prefill_s_per_token <= 0 or s.decode_slack_s == float("inf"):
        return most
    fitting = int(s.decode_slack_s / s.prefill_s_per_token)
    return min(most, max(fitting, limits.min_prefill_tokens))


def _choose_victims(s: Snapshot, limits: PolicyLimits, room: _Room) -> list[str]:
    """Park residents until the running requests' growth fits: those with most laxity and least weight first."""
    deficit = s.growth_blocks - s.free_blocks
    if deficit <= 0:
        return []

    def reluctance(r: ResidentRequest) -> tuple[bool, float, float]:
        return (r.steps_resident < limits.min_resident_steps, r.weight, -r.deadline_s)

    victims: list[str] = []
    for r in sorted((r for r in s.resident if r.can_park), key=reluctance):
        if deficit <= 0 or len(victims) + 1 >= max(s.num_resident, 2):
            break  # the last resident goes on: the pool holds any single request
        if r.num_blocks > room.host:
            continue
        victims.append(r.request_id)
        deficit -= r.num_blocks
        room.host -= r.num_blocks
        room.pool += r.num_blocks
        room.residents -= 1
    return victims


def _choose_leavers(s: Snapshot) -> list[str]:
    """Layered requests that leave the zone: after their first token, or when streaming stops being worth it."""
    done = [r for r in s.layered if r.prefill_done]
    if not s.streamed_decode:
        return [r.request_id for r in done]
    leavers: list[str] = []
    zone, host = s.free_zone_blocks, s.free_host_blocks
    pool = s.free_blocks - s.reserved_blocks - s.growth_blocks
    wanted = min((w.num_blocks for w in s.waiting[:1]), default=0)
    for r in done:
        zone -= r.needs_zone_block
        host -= r.needs_host_block
        # a first token matters more than streaming, and the pool is better than it
        if zone < wanted or host < 0 or r.num_blocks <= pool:
            leavers.append(r.request_id)
            zone += r.needs_zone_block if s.frees_are_deferred else r.num_zone_blocks
            host += r.needs_host_block
            pool -= r.num_blocks
    return leavers


def _headroom(s: Snapshot, limits: PolicyLimits, residents: int) -> int:
    if residents == 0:
        return 0  # whoever comes into an empty pool fits: progress is certain
    return -(-(residents + 1) * limits.headroom_tokens // s.block_tokens)


def _grant_claims(
    s: Snapshot, limits: PolicyLimits, room: _Room
) -> tuple[list[str], list[Admission], bool, str | None]:
    """Give pool blocks to claims by deadline.

    Returns:
        Fetches, resident admissions, whether a claim is left unserved, and the head if it was overtaken.
    """
    fetches: list[str] = []
    admissions: list[Admission] = []
    blocked: str | None = None
    was_overtaken = False
    for claim in islice(_claims(s, limits), limits.scan):
        hit = s.hits.get(claim.request_id, _NO_HIT)
        need = claim.num_blocks - hit.num_blocks + hit.num_evictable
        fits = need + _headroom(s, limits, room.residents) <= room.pool and room.slots > 0
        if not fits:
            if blocked is None:
                blocked = claim.request_id
                if s.overtaken.get(blocked, 0) >= limits.max_overtakes:
                    break
            continue
        was_overtaken = was_overtaken or blocked is not None
        room.pool -= need
        room.slots -= 1
        room.residents += 1
        if isinstance(claim, ParkedRequest):
            fetches.append(claim.request_id)
        else:
            admissions.append(Admission(claim.request_id, layered=False))
    return fetches, admissions, blocked is not None, blocked if was_overtaken else None


def _claims(s: Snapshot, limits: PolicyLimits) -> Iterator[ParkedRequest | WaitingRequest]:
    """Everybody who can only run in the pool, by deadline."""
    only_resident = (w for w in _head(s.waiting, limits) if not _can_ever_layer(s, w))
    return merge(s.parked, only_resident, key=lambda claim: claim.deadline_s)


def _can_ever_layer(s: Snapshot, w: WaitingRequest) -> bool:
    hit = s.hits.get(w.request_id, _NO_HIT)
    return (
        s.mode != "resident"
        and w.can_layer
        and w.num_blocks - hit.num_blocks <= s.zone_blocks
        and w.num_blocks <= s.host_blocks
        and (s.streamed_decode or w.num_blocks <= s.pool_blocks)  # or it could never be fetched
    )


def _head(waiting: Sequence[WaitingRequest], limits: PolicyLimits) -> Sequence[WaitingRequest]:
    return waiting[: limits.scan]


def _admit(
    s: Snapshot,
    limits: PolicyLimits,
    room: _Room,
    resident: list[Admission],
    prefill_tokens: int,
    *,
    pool_is_contended: bool,
) -> tuple[list[Admission], list[tuple[str, str]]]:
    """Start waiting prompts by deadline, each RESIDENT if that hurts nobody, else LAYERED.

    The order among admitted prompts is by deadline whichever way they run. A prompt that can run layered, but not
    just now, holds back later ones that want the zone: it is next.
    """
    granted = {admission.request_id for admission in resident}
    admitted: list[Admission] = []
    refused: list[tuple[str, str]] = []
    tokens = max(prefill_tokens - s.prefilling_tokens, 0)
    zone_is_promised = False
    for w in _head(s.waiting, limits):
        if tokens <= 0:
            break
        hit = s.hits.get(w.request_id, _NO_HIT)
        to_compute = max(w.num_tokens - hit.num_blocks * s.block_tokens, 1)
        if w.request_id in granted:
            admitted.append(Admission(w.request_id, layered=False))
            tokens -= to_compute
            continue
        if not _can_ever_layer(s, w):
            if w.num_blocks > s.pool_blocks:
                refused.append((w.request_id, _refusal(s, w)))
            continue
        if room.slots <= 0:
            continue  # not an end: one further on may have been granted the slot
        need = w.num_blocks - hit.num_blocks + hit.num_evictable
        fits_pool = need + _headroom(s, limits, room.residents) <= room.pool
        if fits_pool and not pool_is_contended and s.mode == "auto":
            admitted.append(Admission(w.request_id, layered=False))
            room.pool -= need
            room.residents += 1
        elif not zone_is_promised and _can_layer_now(
            room, w, hit, in_few_chunks=tokens >= min(to_compute, prefill_tokens // 2)
        ):
            zone_blocks = w.num_blocks - hit.num_blocks
            admitted.append(Admission(w.request_id, layered=True, zone_blocks=zone_blocks))
            room.zone -= zone_blocks
            room.host -= w.num_blocks
            room.pool -= hit.num_evictable
        elif fits_pool and w.num_blocks > room.host and not pool_is_contended:
            admitted.append(Admission(w.request_id, layered=False))  # host memory full: stock behaviour
            room.pool -= need
            room.residents += 1
        else:
            zone_is_promised = True
            continue
        room.slots -= 1
        tokens -= to_compute
    return admitted, refused


def _can_layer_now(room: _Room, w: WaitingRequest, hit: PrefixHit, *, in_few_chunks: bool) -> bool:
    """Whether zone, host memory and this step's tokens have room for the prompt.

    A prompt is not begun with a small rest of the step's budget: every further chunk re-loads the earlier ones.
    """
    return (
        in_few_chunks
        and w.num_blocks - hit.num_blocks <= room.zone
        and w.num_blocks <= room.host
        and hit.num_evictable <= max(room.pool, 0)  # without hits it takes nothing from the pool
    )


def _refusal(s: Snapshot, w: WaitingRequest) -> str:
    return (
        f"the prompt's {w.num_tokens} tokens need {w.num_blocks} KV blocks; the pool has {s.pool_blocks}, the lane "
        f"zone {s.zone_blocks}, host memory {s.host_blocks}: raise KV memory, zone_tokens or host_memory"
    )
