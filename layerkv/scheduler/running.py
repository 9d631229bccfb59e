"""The one pass over running requests that a decision takes: what they hold, need and are due at."""

from __future__ import annotations

import math

from layerkv.scheduler.books import RequestBooks
from layerkv.scheduler.engine import EngineShape, EngineState, Running
from layerkv.scheduler.snapshot import LayeredRequest, Load, ResidentRequest

LAG_SHARE = 1 / 8
"""Of the lag that its reader may still have, what one step may cost a stream for the sake of a prompt. Not measured:
chosen by judgement: the whole of it would be spent on the first prompt."""


def may_start(engine: EngineState, load: Load, tokens_per_decode: int = 1) -> bool:
    """Whether a waiting prompt could start at all: there are tokens for it, and a slot, or somebody may leave one."""
    decoding = load.decode_tokens - engine.resuming
    has_tokens = load.prefilling_tokens + decoding * tokens_per_decode < engine.budget_tokens
    somebody_leaves = any(r.prefill_done for r in load.layered) or load.growth_blocks > engine.free_blocks
    return has_tokens and (engine.free_slots > 0 or somebody_leaves or any(r.can_pause for r in load.resident))


def look(books: RequestBooks, engine: EngineState, now_s: float, soon_steps: int = 0) -> tuple[Load, float]:
    """One pass over the running requests; with hundreds of them, the dearest part of a decision.

    Args:
        books: What is remembered of them.
        engine: The engine before the step.
        now_s: Current time.
        soon_steps: See :class:`Load`.

    Returns:
        What it finds, and seconds of prefill under way by the profile.
    """
    shape, steps_ahead, budget = books.shape, engine.steps_ahead, engine.budget_tokens
    tokens, lookahead, has_groups = shape.block_tokens, shape.lookahead_tokens, bool(shape.groups)
    decode_tokens = shape.tokens_per_decode * (1 + steps_ahead) + lookahead
    soon_tokens = soon_steps * shape.tokens_per_decode
    step_s, step = books.step_s, engine.step
    tracked_of = books.tracked
    resident: list[ResidentRequest] = []
    layered: list[LayeredRequest] = []
    growth = soon = num_decodes = context = prefilling = num_resident = num_paused = 0
    under_way_s = 0.0
    slack_s = tpot_s = math.inf
    by_reader = books.policy.policy == "fluid"
    for r in engine.running:
        tracked = tracked_of.get(r.request_id)
        due_s = dry_s = math.inf
        left = 1
        remaining = r.num_tokens - r.num_computed
        if tracked is not None:
            if r.num_output >= tracked.predict_again_at:
                books.refresh(tracked, r.num_output)
            left = max(tracked.middle_tokens - r.num_output, 1)
            if not r.is_prefilling:
                if by_reader:
                    dry_s = tracked.dry_s(r.num_output, now_s, step_s)
                    due_s = tracked.flows_until_s(dry_s)
                    spare_s = max(dry_s - now_s, 0.0) + (due_s - max(dry_s, now_s)) * LAG_SHARE
                else:
                    due_s = tracked.start_by_s(r.num_output, now_s, step_s)
                    spare_s = due_s - now_s
                if due_s >= now_s and spare_s < slack_s:  # who is late already holds nobody back
                    slack_s = spare_s
                if tracked.tpot_s < tpot_s:
                    tpot_s = tracked.tpot_s
                if tracked.prefill_rest_s:
                    tracked.prefill_rest_s = 0.0
        if r.is_prefilling:
            prefilling += remaining
            if tracked is not None:
                tracked.prefill_rest_s = tracked.prefill_cost_s * remaining / r.num_tokens
                under_way_s += tracked.prefill_rest_s
            new_tokens = min(remaining, budget) + lookahead
        elif r.is_paused:
            num_paused += 1
            new_tokens = 0
        else:
            num_decodes += 1
            context += r.num_computed
            new_tokens = decode_tokens
        if has_groups:
            missing, soon_missing = _growth_in_groups(shape, r, new_tokens, soon_tokens)
        else:
            room = r.num_blocks * tokens - r.num_computed - new_tokens
            missing = -(room // tokens) if room < 0 else 0
            spare = room % tokens
            soon_missing = -(-(soon_tokens - spare) // tokens) if spare < soon_tokens else 0
        if r.is_layered:
            layered.append(
                LayeredRequest(
                    r.request_id,
                    not r.is_prefilling,
                    shape.blocks_to_fetch(r.num_tokens, r.num_computed),
                    r.num_zone_blocks,
                    missing > 0 and not r.is_prefilling,  # a prompt's room is reserved
                    _host_blocks_missing(shape, r, new_tokens)
                    if has_groups
                    else max(-(-(r.num_computed + new_tokens) // tokens) - r.num_host_blocks, 0),
                    tracked is not None and tracked.outgrows_pool,
                    0 if tracked is None else max(tracked.most_blocks, r.num_zone_blocks),
                    due_s,
                    dry_s,
                    0 if tracked is None else tracked.rank,
                    math.inf if tracked is None or not tracked.parked_tokens else now_s - tracked.resident_since_s,
                    tracked is None or r.num_computed > tracked.parked_tokens,
                )
            )
            continue
        num_resident += 1
        growth += missing
        if soon_missing:
            soon += soon_missing
        if tracked is not None:
            num_blocks = shape.blocks_at_most(r.num_tokens) if r.is_prefilling else r.num_blocks
            resident.append(
                ResidentRequest(
                    r.request_id,
                    due_s,
                    num_blocks,
                    step - tracked.resident_since_step,
                    tracked.can_layer and r.num_computed > 0 and not r.is_prefilling,
                    tracked.weight,
                    left,
                    r.num_computed,
                    r.num_host_blocks,
                    tracked.rank,
                    tracked.in_one_step and r.num_tokens > budget,
                    dry_s,
                    tracked.tpot_s,
                    now_s - tracked.resident_since_s,
                    (has_run := r.num_computed > tracked.parked_tokens),
                    r.num_shared,
                    has_run and tracked.can_pause and by_reader and not (r.is_prefilling or r.is_paused),
                    r.is_paused,
                    step - tracked.turn_since_step,
                )
            )
    loading = 0
    for request_id, num_blocks, num_output in engine.arriving:
        num_resident += 1
        tracked = tracked_of.get(request_id)
        if tracked is not None and tracked.can_layer:  # others were not parked: a session between two turns
            loading += num_blocks
        left = 1 if tracked is None else max(tracked.middle_tokens - num_output, 1)
        pace_s = math.inf if tracked is None else tracked.tpot_s
        resident.append(
            ResidentRequest(
                request_id, math.inf, num_blocks, 0, can_park=False, tokens_left=left, tpot_s=pace_s, resident_s=0.0
            )
        )
    load = Load(
        resident,
        layered,
        num_resident,
        growth,
        num_decodes + engine.resuming,
        context,
        prefilling + engine.held_tokens,
        slack_s,
        tpot_s,
        loading,
        soon,
        num_paused,
    )
    return load, under_way_s


def _growth_in_groups(shape: EngineShape, r: Running, new_tokens: int, soon_tokens: int) -> tuple[int, int]:
    """Blocks that a request lacks for its next tokens, what its window leaves behind given back, and soon after them.

    What a step in flight still reads comes back only after it: of a chunk, that is a window before its first token.
    """
    num_after = r.num_computed + new_tokens
    num_processed = max(r.num_computed - r.num_in_flight, 0)
    needed = shape.blocks_for(num_after, num_processed)
    soon = shape.blocks_for(num_after + soon_tokens, num_processed)
    return max(needed - r.num_blocks, 0), soon - needed


def _host_blocks_missing(shape: EngineShape, r: Running, new_tokens: int) -> int:
    return max(shape.host_blocks_for(r.num_computed + new_tokens) - r.num_host_blocks, 0)
