"""Which blocks the stores of cached prefixes use: nobody waits for those stores but who writes such a block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from layerkv.core.transfer import BlockRun

SETTLE_IDLE_STEPS = 64
"""After so many steps in a row without copies the next one settles, and nobody need look any more whether a prefix's
store reads what is given out. Not measured: chosen by judgement, so that by then the stores have long ended."""


class PrefixStores:
    """The pool blocks that stores in the background read, and the host blocks that they write.

    Only workers know when a store has ended, so those that were planned are under way until a step settles. Such a step
    hardly waits: vLLM gives those free blocks out last that were freed last, and by then their store has ended.
    """

    def __init__(self, runs: Sequence[BlockRun] = ()) -> None:
        self._pool_blocks: set[int] = set()
        self._host_blocks: set[int] = set()
        self._num_idle_steps = 0  # since the last plan
        self.add(runs)

    def __bool__(self) -> bool:
        return bool(self._pool_blocks)

    def add(self, runs: Sequence[BlockRun]) -> None:
        """A step with copies is planned, these stores among them."""
        self._num_idle_steps = 0
        for run in runs:
            self._pool_blocks.update(range(run.device_block, run.device_block + run.num_blocks))
            self._host_blocks.update(range(run.host_block, run.host_block + run.num_blocks))

    def pass_idle_step(self) -> bool:
        """A step is scheduled without copies; whether the next one is to settle, and will hardly wait."""
        if not self._pool_blocks:
            return False
        self._num_idle_steps += 1
        return self._num_idle_steps >= max(SETTLE_IDLE_STEPS, len(self._pool_blocks))  # a step for each is time enough

    def read(self, pool_blocks: Iterable[int]) -> bool:
        """Whether they read any of these."""
        return not self._pool_blocks.isdisjoint(pool_blocks)

    def write(self, runs: Iterable[BlockRun]) -> bool:
        """Whether they write any host block of these runs."""
        return any(
            not self._host_blocks.isdisjoint(range(run.host_block, run.host_block + run.num_blocks)) for run in runs
        )

    def clear(self) -> None:
        """All of them have ended, or are waited for."""
        self._pool_blocks.clear()
        self._host_blocks.clear()
