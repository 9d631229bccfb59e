"""Why a request waits, runs, is parked or refused: one word each, for decisions, metrics and the decision log."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple


class Reason(StrEnum):
    """Why the scheduler did what it did with a request in a step, or why that happened to it.

    The value is the word in the decision log, and for what was decided the label in ``/metrics``.
    """

    # it starts, or goes on
    FITS = "fits"
    """Admitted to the pool: it fits without hurting anyone."""
    POOL_CONTENDED = "pool_contended"
    """Admitted layered: the pool has no room for it, or others stand in line for the pool."""
    HOST_FULL_RESIDENT = "host_full_resident"
    """Admitted to the pool although others stand in line: host memory is too full to run it layered."""
    ITS_TURN = "its_turn"
    """Fetched: pool blocks for it are free, and whoever stands before it may be passed."""
    ZONE_TURN = "zone_turn"
    """It goes on in the zone: it outgrows the pool, and the zone has room for it and no prompt that needs that now."""
    SLOT_FREE = "slot_free"
    """Resumed: there is a slot for it, or another gives one up whose reader has more to read."""
    # it waits
    NO_TOKENS_LEFT = "no_tokens_left"
    """The step's prefill budget is spent: decodes need the rest, or prompts before it took it."""
    NO_SLOT = "no_slot"
    """max_num_seqs requests run already."""
    POOL_FULL = "pool_full"
    """It can only run in the pool (parked, or not able to run layered), and the pool has no room now."""
    ZONE_FULL = "zone_full"
    """It is to run layered, and the lane zone has no room now."""
    HOST_FULL = "host_full"
    """It is to run layered, and host memory has no room now."""
    SMALL_REST = "small_rest"
    """A layered prompt is not begun with a small rest of the step's tokens: every chunk re-loads the earlier ones."""
    BEHIND = "behind"
    """Another prompt that is to run layered, and cannot just now, stands before it in line for the zone."""
    BEHIND_OVERDUE = "behind_overdue"
    """One stands before it in line, for compute or for the pool, whom nobody passes: it has been overtaken too often,
    or only the pool takes it and by arrival it would be there."""
    BEHIND_RANK = "behind_rank"
    """One of better priority waits: what there is of room is kept for it."""
    LATE = "late"
    """It cannot have its first token in time, so those that can go first (bounded)."""
    WAIT_IS_SHORTER = "wait_is_shorter"
    """Pool blocks will be free sooner than parking and fetching it would take: LAYERED would help nobody."""
    LINK_BUSY = "link_busy"
    """It can be fetched, but the link has fetches enough under way: blocks given to one that waits would be idle."""
    HELD = "held"
    """The streams that flow already need all of the pool's time: if this one joined them, some would stop flowing."""
    VICTIMS_LEAVE = "victims_leave"
    """Running requests are being parked for want of blocks: nobody comes in by the door through which others leave."""
    # it is parked or paused, or gives its KV up
    FIRST_TOKEN_DONE = "first_token_done"
    """Parked: its layered prefill is over, and it waits for pool blocks to decode."""
    POOL_SHORT = "pool_short"
    """Parked: running requests need more blocks than are free, and it can best afford to wait."""
    SEGMENT_LEAVES = "segment_leaves"
    """Parked (or, to compare with, its KV is given up): some of its blocks are in memory that the pool gives back."""
    MAKES_ROOM = "makes_room"
    """Parked: another is about to miss its objective for want of blocks, and it can afford to wait."""
    TURN_OVER = "turn_over"
    """Parked: its reader has enough to read for now, and another's is about to run dry."""
    ZONE_TURN_OVER = "zone_turn_over"
    """Parked: it decodes in the zone, and a prompt, or a reader about to run dry, needs the zone's blocks."""
    SLOT_LENT = "slot_lent"
    """Paused: another needs a slot, and its reader has enough to read for now. Its KV stays in the pool."""
    STREAM_BUDGET = "stream_budget"
    """Parked: streaming its KV in every step costs more than the objectives leave."""
    RECOMPUTE_CHEAPER = "recompute_cheaper"
    """Its KV is given up: computing it again costs less than copying it there and back."""
    NO_ROOM_TO_PARK = "no_room_to_park"
    """Its KV is given up: running requests need its blocks, and host memory has no room for it."""
    LONGER_THAN_POOL = "longer_than_pool"
    """Its KV is given up: it grows out of the pool, or of the room it has in zone and host memory, and comes back
    with all the room it may need in both."""
    # it gives its KV up, and nobody decided that
    PREEMPTED = "preempted"
    """Its KV is given up: vLLM itself preempted it, because a running request found no block."""
    CACHE_RESET = "cache_reset"
    """Its KV is given up: the prefix cache was reset, and running requests were to start over."""
    LOAD_FAILED = "load_failed"
    """Its KV is given up: it was read, or computed from what was read, from host memory by a load that failed."""
    # it is refused
    NEVER_FITS = "never_fits"
    """Refused: it cannot run here at all."""
    COPIES_FAIL = "copies_fail"
    """Ended with an error: copies of its KV failed again and again, and it has got no further in between."""
    OVERLOAD = "overload"
    """Refused: its first token would be late, and its class asks to be refused then."""


class Resource(StrEnum):
    """What a request waits for. The value is the label in ``/metrics``."""

    POOL = "pool"
    ZONE = "zone"
    SLOT = "slot"
    LINK = "link"
    COMPUTE = "compute"
    HOST_MEMORY = "host_memory"


WAITS_FOR: Mapping[Reason, Resource] = {
    Reason.NO_TOKENS_LEFT: Resource.COMPUTE,
    Reason.NO_SLOT: Resource.SLOT,
    Reason.POOL_FULL: Resource.POOL,
    Reason.ZONE_FULL: Resource.ZONE,
    Reason.HOST_FULL: Resource.HOST_MEMORY,
    Reason.SMALL_REST: Resource.COMPUTE,
    Reason.BEHIND: Resource.ZONE,
    Reason.BEHIND_OVERDUE: Resource.POOL,
    Reason.BEHIND_RANK: Resource.POOL,
    Reason.LATE: Resource.COMPUTE,
    Reason.WAIT_IS_SHORTER: Resource.POOL,
    Reason.LINK_BUSY: Resource.LINK,
    Reason.HELD: Resource.POOL,
    Reason.VICTIMS_LEAVE: Resource.POOL,
}
"""The resource that each reason to wait is a want of. Behind another one waits for what that one lacks: the decision
says what that was (``Decision.behind``), and this is what it nearly always is."""


class Event(StrEnum):
    """What happened to a request, in the decision log."""

    ARRIVED = "arrived"
    WAITS = "waits"
    ADMITTED_RESIDENT = "admitted_resident"
    ADMITTED_LAYERED = "admitted_layered"
    FIRST_TOKEN = "first_token"
    PARKED = "parked"
    FETCHED = "fetched"
    BACK_IN_ZONE = "back_in_zone"
    PAUSED = "paused"
    RESUMED = "resumed"
    RECOMPUTES = "recomputes"
    STORED_AHEAD = "stored_ahead"
    READER_WAITED = "reader_waited"
    REFUSED = "refused"
    FINISHED = "finished"


class End(StrEnum):
    """How a request came to its end."""

    FINISHED = "finished"
    """It made all its tokens, by the engine's own account."""
    LEFT = "left"
    """Its client's side ended it: a stop string was found in its text, which the engine does not see, or somebody hung
    up. vLLM calls both an abort."""
    CUT_OFF = "cut_off"
    """It was ended with all others, in mid-output."""
    REFUSED = "refused"
    """It was not served."""


class LogEntry(NamedTuple):
    """One line of the decision log: a change in what happens to one request.

    In JSON an object with these keys, ``reason`` and ``facts`` left out when empty. A request waits for the same
    reason until its next entry: only changes are written.

    Attributes:
        time_s: On the engine's monotonic clock.
        request_id: The request.
        event: What happened.
        reason: Why, if there was a choice.
        facts: Figures behind it. On arrival ``slo_class``, ``ttft_s``, ``tpot_s``, ``prompt_tokens``; with a wait
            ``free_blocks``, ``free_zone_blocks``, ``free_host_blocks``, ``prefill_tokens`` of the step, and behind
            another ``lacks``, the resource that this one waited for just then; with the first
            token ``ttft_s``, ``on_time``; with a reader's wait, told when that is over, ``wait_s``, ``token`` (the
            number of the token it was for; the first is 0) and ``left``, the event that took the request out of the
            batch, if one did: the reason is that event's; at the end ``output_tokens``, ``end`` and, if somebody read
            them, ``lag_s`` (all waits together) and ``longest_pause_s``; with a refusal its ``text``.
    """

    time_s: float
    request_id: str
    event: Event
    reason: Reason | None = None
    facts: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default; never changed)
