"""How long a decision stands: the steps after one that moves nobody need not decide again while nothing happens.

What happens are arrivals, ends, moves and fetches that end, all of them in the engine's count of moves, and blocks that
come free. What time alone changes is looked at every few steps: rules that act in time look as many steps ahead.
"""

from __future__ import annotations

from typing import NamedTuple

from layerkv.scheduler.engine import EngineState
from layerkv.scheduler.reasons import WAITS_FOR, Resource
from layerkv.scheduler.snapshot import Decision, Snapshot


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

    Args:
        snapshot: What it was decided from.
        decision: What was decided.
        every_steps: Steps between two looks at the least; rules that act in time look that many steps ahead.
    """
    engine, load = snapshot.engine, snapshot.load
    if decision.moves_somebody or not _is_settled(engine) or load.layered or load.prefilling_tokens:
        return None
    if engine.free_blocks - engine.reserved_blocks < load.growth_blocks + load.soon_blocks:
        return None
    if any(WAITS_FOR[reason] is Resource.COMPUTE for reason in decision.waits.values()):
        return None  # of which the next step has more
    until_step = engine.step + every_steps - engine.step % every_steps
    return Standing(until_step, engine.moves, load.num_resident - len(engine.arriving), engine.free_blocks)


def _is_settled(engine: EngineState) -> bool:
    """Whether nothing is on its way that the engine's counts do not tell of."""
    return not (engine.is_paused or engine.resuming or engine.freeing_blocks or engine.freeing_zone_blocks)
