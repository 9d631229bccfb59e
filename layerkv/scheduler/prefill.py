"""How much prefill a step may do, and which prompts can have their first token in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import NamedTuple

from layerkv.core.cost import CostView, StepWork, chunk_pairs
from layerkv.scheduler.snapshot import Snapshot, WaitingRequest

ROUND_TOKENS = 64
"""Budgets are whole multiples of this, or everything: finer ones only make ragged chunks. Not measured: chosen by
judgement."""


def prefill_budget(s: Snapshot, *, slack_s: float, min_tokens: int, max_idle_steps: int) -> int:
    """Most prompt tokens whose step time fits the smallest slack (LayerKV Eq. 1-3, restated per step).

    LayerKV admits whole prompts while their prefill times sum up to less than the smallest slack
    ``T_allow = TPOT_SLO (N_past + N_future) - (T_past + N_future TPOT_now)``. With chunked prefill the slack is
    spent step by step: the step with this many prompt tokens takes no longer than what is left of it.

    Args:
        s: The engine before the step.
        slack_s: The smallest slack of those who wait for its end; infinite if nobody does.
        min_tokens: Prompt tokens computed even without slack,
        max_idle_steps: after this many steps without any (so prefill never starves).
    """
    most = s.most_prefill_tokens
    if s.cost is None or slack_s == math.inf:
        return most
    seconds = _seconds_by_tokens(s, s.cost)
    if seconds(most) <= slack_s:
        return most
    low, high = 0, -(-most // ROUND_TOKENS)
    while high - low > 1:
        middle = (low + high) // 2
        if seconds(middle * ROUND_TOKENS) <= slack_s:
            low = middle
        else:
            high = middle
    fitting = low * ROUND_TOKENS
    if fitting < min_tokens and s.steps_without_prefill >= max_idle_steps:
        return min(min_tokens, most)
    return fitting


class PrefillShare(NamedTuple):
    """What a step may compute.

    Attributes:
        step_tokens: Tokens in all, of decodes and prompts.
        prompt_tokens: Most tokens of each prompt.
    """

    step_tokens: int
    prompt_tokens: int


def prefill_share(
    budget_tokens: int, *, decode_tokens: int, prefill_tokens: int, num_prompts: int, spare_tokens: int = 0
) -> PrefillShare:
    """Divide a step's tokens: every decode gets its own, and prompts under way share alike what was decided.

    Args:
        budget_tokens: Tokens that a step may compute.
        decode_tokens: Requests that decode.
        prefill_tokens: Prompt tokens decided.
        num_prompts: Prompts under way; without any, the first to start may take all.
        spare_tokens: Tokens that nobody is to take.
    """
    step_tokens = min(budget_tokens, max(decode_tokens + prefill_tokens + spare_tokens, 1))
    if num_prompts == 0:
        return PrefillShare(step_tokens, step_tokens)
    room = step_tokens - decode_tokens - spare_tokens
    return PrefillShare(step_tokens, max(min(room, prefill_tokens) // num_prompts, 1))


def step_seconds(s: Snapshot, cost: CostView, prefill_tokens: int) -> float:
    """Predicted seconds of a step that decodes whoever decodes now and computes so many prompt tokens.

    Where prompts run layered their KV is stored during the step: with a slow link the copies are what takes the time
    (LayerKV Eq. 4), and so limit how much of the zone one step uses.
    """
    is_layered = bool(s.load.layered) or s.shape.mode == "layered"
    return cost.step_s(
        StepWork(
            num_decodes=s.load.decode_tokens,
            decode_context=s.load.decode_context,
            prefill_tokens=prefill_tokens,
            prefill_pairs=chunk_pairs(prefill_tokens, 0),
            num_prefills=1 if prefill_tokens else 0,
            stored_bytes=prefill_tokens * s.shape.block_bytes // s.shape.block_tokens if is_layered else 0,
            is_layered=is_layered and prefill_tokens > 0,
        )
    )


def _seconds_by_tokens(s: Snapshot, cost: CostView) -> Callable[[int], float]:
    """:func:`step_seconds` of any number of prompt tokens; what all have in common is worked out once."""
    if s.load.layered or s.shape.mode == "layered":
        return partial(step_seconds, s, cost)
    num_decodes, profile, factor = s.load.decode_tokens, cost.profile, cost.prefill_factor
    decode_s = cost.step_s(StepWork(num_decodes, s.load.decode_context))
    tokens_s, request_s, pair_s = profile.tokens, profile.request_s, profile.pair_s
    of_decodes_s = tokens_s(num_decodes)

    def seconds(prefill_tokens: int) -> float:
        if not prefill_tokens:
            return decode_s
        linear_s = tokens_s(num_decodes + prefill_tokens) - of_decodes_s
        return decode_s + (max(linear_s, 0.0) + request_s + pair_s * chunk_pairs(prefill_tokens, 0)) * factor

    return seconds


def late_prompts(
    s: Snapshot,
    waiting: Sequence[WaitingRequest],
    prefill_tokens: int,
    spare_s: dict[str, float] | None = None,
) -> set[str]:
    """Prompts that cannot all have their first token in time: the fewest, by weight (Moore-Hodgson).

    Rank by rank, and in order of deadline, each takes the engine for its prefill; when the sum passes the newest
    deadline, the prompt of that rank is left out that frees most time per weight. Within a rank of equal weights that
    maximises the number on time (Moore 1968; Prism uses it per GPU). Those whose deadline has passed are late anyway.

    Of those on time, ``spare_s`` gets by how much: so long could all of them be put off.
    """
    late: set[str] = set()
    if not s.slo_scheduling or not waiting:
        return late
    stretch, end_s = 0.0, s.now_s
    if s.cost is not None:
        # decodes take their share of every step, so a prompt's prefill takes longer than its own work
        tokens = max(prefill_tokens, ROUND_TOKENS)
        alone_s, step_s = s.cost.prefill_s(tokens), step_seconds(s, s.cost, tokens)
        stretch = step_s / alone_s * s.cost.prefill_factor if alone_s > 0 else 0.0
        # prompts under way, as so many steps of the full budget
        end_s += step_s * s.load.prefilling_tokens / tokens
    on_time: list[tuple[float, str, float]] = []
    rank = waiting[0].rank if waiting else 0
    for w in waiting:
        if w.rank != rank:  # nobody of better rank is put behind for it
            on_time, rank = [], w.rank
        if w.deadline_s < s.now_s:
            late.add(w.request_id)
            continue
        seconds = w.prefill_cost_s * stretch
        end_s += seconds
        heappush(on_time, (-seconds / w.weight, w.request_id, seconds))
        if end_s > w.deadline_s:
            _, request_id, freed_s = heappop(on_time)
            end_s -= freed_s
            late.add(request_id)
            if spare_s is not None:
                spare_s.pop(request_id, None)
        if spare_s is not None and w.request_id not in late:
            spare_s[w.request_id] = w.deadline_s - end_s
    return late
