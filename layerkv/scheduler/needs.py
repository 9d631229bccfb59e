"""Block arithmetic: what a request needs of the pool, the zone, host memory and a step's tokens to go on."""

from __future__ import annotations

from layerkv.scheduler.lines import Claim
from layerkv.scheduler.snapshot import PrefixHit, ResidentRequest, Snapshot, WaitingRequest

_NO_HIT = PrefixHit()


def hit_of(s: Snapshot, claim: Claim) -> PrefixHit:
    """What the prefix caches hold of it."""
    return s.lines.hits.get(claim.request_id, _NO_HIT)


def pool_blocks(s: Snapshot, claim: Claim) -> int:
    """Free pool blocks that it takes: its own, and cached ones that nobody uses now."""
    hit = s.lines.hits.get(claim.request_id)
    return claim.num_blocks if hit is None else claim.num_blocks - hit.num_blocks + hit.num_evictable


def blocks_to_resume(s: Snapshot, r: ResidentRequest) -> int:
    """Pool blocks that a paused request takes with its next step."""
    num_tokens = r.num_tokens + s.shape.tokens_per_decode * (1 + s.engine.steps_ahead) + s.shape.lookahead_tokens
    return max(s.shape.blocks_for(num_tokens, r.num_tokens) - r.num_blocks, 0)


def layered_blocks(w: WaitingRequest) -> int:
    """Blocks that a prompt needs room for, in the zone (less its hits) and in host memory, to start layered."""
    return w.most_blocks or w.num_blocks


def zone_blocks(s: Snapshot, w: WaitingRequest) -> int:
    """Zone blocks that a prompt needs, in each KV-cache group, to start layered."""
    if s.shape.groups:
        return -(-w.num_tokens // s.shape.zone_block_tokens)
    return layered_blocks(w) - hit_of(s, w).num_blocks


def host_blocks(s: Snapshot, w: WaitingRequest) -> int:
    """Host blocks that it needs for that."""
    return s.shape.host_blocks_for(w.num_tokens) if s.shape.groups else layered_blocks(w)


def pool_blocks_layered(s: Snapshot, w: WaitingRequest) -> int:
    """Free pool blocks that it takes for that: cached ones that nobody uses now, and for its states."""
    return hit_of(s, w).num_evictable + s.shape.state_blocks


def outgrows_pool(s: Snapshot, w: WaitingRequest) -> bool:
    """Whether it is expected to become longer than the pool: then it decodes in the zone."""
    return layered_blocks(w) > s.shape.fetchable_blocks


def fills_pool(s: Snapshot, r: ResidentRequest) -> bool:
    """Whether it could never be fetched with a block more, and may come to need one."""
    if s.shape.groups:  # the pool holds whatever a request may become
        return False
    return r.num_blocks >= s.shape.fetchable_blocks and r.num_blocks * s.shape.block_tokens < s.shape.longest_tokens


def can_ever_layer(s: Snapshot, w: WaitingRequest) -> bool:
    """Whether an empty zone and empty host memory would take it."""
    return (
        s.shape.mode != "resident"
        and w.can_layer
        and zone_blocks(s, w) <= s.shape.zone_blocks
        and host_blocks(s, w) <= s.shape.host_blocks
        and (s.shape.long_contexts or not outgrows_pool(s, w))
    )


def host_blocks_to_take(s: Snapshot, w: WaitingRequest) -> int:
    """Free host blocks that a prompt takes to start layered: it shares what others hold of its beginning."""
    return host_blocks(s, w) - hit_of(s, w).num_host_held


def tokens_to_compute(s: Snapshot, w: WaitingRequest) -> int:
    """Prompt tokens that neither the device's cache nor the host's has."""
    hit = hit_of(s, w)
    if s.shape.groups:
        return max(w.num_tokens - hit.num_tokens, 1)
    return max(w.num_tokens - (hit.num_blocks + hit.num_host_blocks) * s.shape.block_tokens, 1)


def needs_longer_step(s: Snapshot, w: WaitingRequest) -> bool:
    """Whether it must not be cut, and no step has tokens for all of it."""
    return w.in_one_step and w.num_tokens > s.engine.budget_tokens


def headroom_blocks(s: Snapshot, residents: int, tokens_each: int) -> int:
    """Blocks kept free when one more is let in beside so many residents: room for each to make a few tokens."""
    if residents == 0:
        return 0  # a request that comes into an empty pool fits: progress is certain
    return -(-(residents + 1) * tokens_each * s.shape.tokens_per_decode // s.shape.block_tokens)
