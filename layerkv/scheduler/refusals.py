"""What the user of a refused request is told."""

from __future__ import annotations

from layerkv.scheduler.needs import layered_blocks, needs_longer_step
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import Refusal, Snapshot, WaitingRequest


def refusal_text(s: Snapshot, refusal: Refusal) -> str:
    """Why, and what helps. The request must be among those that ``s`` shows waiting."""
    w = next(w for w in s.lines.waiting if w.request_id == refusal.request_id)
    if refusal.reason is Reason.OVERLOAD:
        return _overload(s, w)
    return _needs_longer_step(s, w) if needs_longer_step(s, w) else _never_fits(s, w)


def _never_fits(s: Snapshot, w: WaitingRequest) -> str:
    return (
        f"the prompt's {w.num_tokens} tokens and its output may need {layered_blocks(w)} KV blocks; the pool has "
        f"{s.shape.pool_blocks}, the lane zone {s.shape.zone_blocks}, host memory {s.shape.host_blocks}: raise KV "
        "memory, or, with long_contexts, zone_tokens and host_memory"
    )


def _needs_longer_step(s: Snapshot, w: WaitingRequest) -> str:
    return (
        f"{w.num_tokens} tokens must be computed in one step, which takes {s.engine.budget_tokens}: vLLM's CPU build "
        "cannot cut a prompt that is sampled with a seed of its own; raise --max-num-batched-tokens, or "
        "leave out the seed"
    )


def _overload(s: Snapshot, w: WaitingRequest) -> str:
    late_s = max(s.now_s - w.deadline_s, 0.0)
    return (
        "the engine is overloaded: this prompt's first token cannot come in time"
        + (f" ({late_s:.1f} s late already)" if late_s else "")
        + "; its SLO class asks to be refused then (overload: reject); try again later"
    )
