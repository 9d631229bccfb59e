"""How long a decision stands: the steps after one that moves nobody need not decide again while nothing happens.

What happens are arrivals, ends, moves and fetches that end, all of them in the engine's count of moves, and blocks that
come free. What time alone changes is looked at every few steps: rules that act in time look as many steps ahead, and
some time besides.
"""

from __future__ import annotations

from typing import NamedTuple

from layerkv.scheduler.engine import EngineState
from layerkv.scheduler.reasons import WAITS_FOR, Reason, Resource
from layerkv.scheduler.slots import SOON_S
from layerkv.scheduler.snapshot import Decision, Snapshot

_WAITS_FOR_TOKENS = frozenset(reason for reason, resource in WAITS_FOR.items() if resource is Resource.COMPUTE)

LOOK_S = SOON_S / 2
"""Steps that are short are looked at at least so often, and not every few of them: half of the time that rules which
act in time look ahead beside their steps. Not measured: chosen by judgement."""


class Standing(NamedTuple):
    """A decision that stands, and what the engine looked like.

    Attributes:
        until_step: The first step that decides again, whatever happens.
        moves: The engine's count of moves,
        num_running: its running requests,
        free_blocks: and its free blocks: with more of them somebody might come in.
    """

    until_step: int
    moves: int
    num_running: int
    free_blocks: int

    def holds(self, step: int, moves: int, num_running: int, free_blocks: int) -> bool:
        """Whether nothing has happened since."""
        return (
            step < self.until_step
            and moves == self.moves
            and num_running == self.num_running
            and free_blocks <= self.free_blocks
        )


def standing(snapshot: Snapshot, decision: Decision, every_steps: int) -> Standing | None:
    """For how long a decision stands; None if the next step must decide again.

    Until the next step whose number is a multiple of ``every_steps``. One that had all there is to decide, and no copy
    to make in the background, stands for as many steps as fit :data:`LOOK_S`, if the pool has a block for everybody, of
    each KV-cache group.

    Args:
        snapshot: What it was decided from.
        decision: What was decided.
        every_steps: Rules that act in time look so many steps ahead.
    """
    engine, load, shape = snapshot.engine, snapshot.load, snapshot.shape
    if decision.moves_somebody or not _is_settled(engine) or load.layered or load.prefilling_tokens:
        return None
    spare_blocks = (
        engine.free_blocks - engine.reserved_blocks - load.growth_blocks - engine.resuming * shape.step_blocks
    )
    if spare_blocks < load.soon_blocks:
        return None
    reasons = set(decision.waits.values())
    if not reasons.isdisjoint(_WAITS_FOR_TOKENS) or (engine.resuming and Reason.LINK_BUSY in reasons):
        return None  # the next step has more of what they wait for
    num_steps = every_steps - engine.step % every_steps
    looks_far = snapshot.policy == "fluid"  # others act on what is due within ``every_steps`` only
    for_all = load.num_resident * shape.blocks_per_token
    if looks_far and num_steps == every_steps and not decision.store_ahead and spare_blocks >= for_all:
        # nobody needs two blocks of a KV-cache group in so many steps
        in_a_block = shape.block_tokens // shape.tokens_per_decode
        most = min(LOOK_S // snapshot.token_s if snapshot.token_s > 0 else 0, in_a_block)
        num_steps = max(int(most) // every_steps * every_steps, every_steps)
    num_running = load.num_resident - len(engine.arriving) + engine.resuming
    return Standing(engine.step + num_steps, engine.moves, num_running, engine.free_blocks)


def _is_settled(engine: EngineState) -> bool:
    """Whether nothing is on its way that the engine's counts do not tell of."""
    return not (engine.is_paused or engine.freeing_blocks or engine.freeing_zone_blocks)
