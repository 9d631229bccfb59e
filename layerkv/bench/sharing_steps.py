"""One engine whose pool shrinks and grows while it decodes: `python -m layerkv.bench.sharing_steps SPEC.json OUT.json`.

Runs with the engine inside. What it decides about its pool is replaced: every few steps all free segments but one go,
or all come. How they do is the product's: withheld, unmapped in the background, answered for, in service again. Memory
that came is written between two steps, so that there is something to give back.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from layerkv.bench.child import ReportProgress, run_spec
from layerkv.bench.engine_run import ENGINE_ENV, add_request
from layerkv.bench.load import PlannedRequest
from layerkv.errors import LayerKVError
from layerkv.scheduler.elastic import MOST_LEAVING, PoolView, Resize

MOST_STEPS = 400
"""A move that is not over then hangs."""
KEPT = 1
"""Empty segments that stay, for the tokens to come."""


class SwingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The engine, what it decodes meanwhile, and how often its pool moves, after so many calm steps each time."""

    engine_args: dict[str, Any]
    requests: list[PlannedRequest]
    num_moves: int
    calm_steps: int


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One move: seconds of the steps before it, and of those in which segments came or went."""

    grows: bool
    moved_bytes: int
    calm_s: list[float]
    moving_s: list[float]


class SwingRun(msgspec.Struct, frozen=True, kw_only=True):
    """All moves, in order."""

    moves: list[Move]


class Swing:
    """Chooses in the place of :func:`layerkv.scheduler.elastic.resize`.

    `has_acted` and `is_settled` say whether it moved something, and at its last look found nothing to move, since
    somebody set them back: the pool is looked at in every step only while something moves.
    """

    def __init__(self) -> None:
        self.grows = True
        self.has_acted = self.is_settled = False

    def __call__(self, pool: PoolView) -> Resize:
        """All that may be held, or all segments gone that nobody uses."""
        if self.grows:
            decided = Resize(arrive=max(pool.ceiling - pool.num_held, 0))
        else:
            empty = [segment for segment, num_used in pool.in_service if not num_used]
            decided = Resize(leave=tuple(empty[KEPT:][-MOST_LEAVING:]))
        self.is_settled = not (decided.arrive or decided.leave)
        self.has_acted |= not self.is_settled
        return decided


def watch_move(swing: Swing, step: Callable[[], float], is_moving: Callable[[], bool]) -> list[float]:
    """Step until what the swing wants has happened; seconds of the steps in which something moved.

    Raises:
        LayerKVError: nothing moved, or it does not end.
    """
    moving_s: list[float] = []
    swing.is_settled = False
    for _ in range(MOST_STEPS):
        swing.has_acted = False
        step_s = step()
        if swing.has_acted or is_moving():
            moving_s.append(step_s)
        elif moving_s and swing.is_settled:
            return moving_s
    raise LayerKVError(
        f"a pool that {'grows' if swing.grows else 'shrinks'} was not at its end after {MOST_STEPS} steps "
        f"({len(moving_s)} of them moved something)"
    )


def run_swings(spec: SwingSpec, report_progress: ReportProgress) -> SwingRun:
    """Builds the engine in this process and moves its pool while it decodes; `ENGINE_ENV` must be set before.

    Raises:
        LayerKVError: a move hangs, or the requests end too soon.
    """
    from vllm import EngineArgs
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**spec.engine_args))
    side = engine.engine_core.engine_core.scheduler.connector.scheduler_side
    elastic, layout = side.elastic, side.sizes.plan.layout
    tensor: Any = get_kv_transfer_group().worker_side._arena.tensor()
    blocks = tensor.view(side.geometry.num_layers, side.geometry.total_blocks, side.geometry.page_bytes)
    swing = elastic.choose = Swing()
    for request in spec.requests:
        add_request(engine, request)

    def step() -> float:
        began_s = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - began_s
        if engine.get_num_unfinished_requests() < len(spec.requests):
            raise LayerKVError("requests ended before the last move; give them more output tokens")
        return seconds

    watch_move(swing, step, lambda: elastic.is_moving)  # from its floor to its ceiling, beside the prompts
    for _ in range(spec.calm_steps):
        step()
    moves: list[Move] = []
    for number in range(spec.num_moves):
        if swing.grows:
            queue = elastic._queue
            for segment in range(1, layout.num_segments):
                if not queue.blocks.num_used(segment):
                    first = segment * layout.segment_blocks
                    blocks[:, first : first + layout.segment_blocks].fill_(1)
        calm_s = [step() for _ in range(spec.calm_steps)]
        swing.grows, held = not swing.grows, elastic.num_held
        moving_s = watch_move(swing, step, lambda: elastic.is_moving)
        moved_bytes = abs(elastic.num_held - held) * side.sizes.segment_bytes
        moves.append(Move(grows=swing.grows, moved_bytes=moved_bytes, calm_s=calm_s, moving_s=moving_s))
        report_progress(number + 1, spec.num_moves)
    return SwingRun(moves=moves)


def main(argv: list[str]) -> int:
    """Runs the spec file `argv[0]` and writes the outcome to `argv[1]`; returns the exit status."""
    os.environ.update(ENGINE_ENV)
    return run_spec(argv, "layerkv.bench.sharing_steps", SwingSpec, run_swings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
