"""What a step without a decision does that goes on like the ones before it: known without a look at its requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerkv.core.cost import StepWork
from layerkv.vllm_plugin.scheduler_view import SchedulerView

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide
    from layerkv.vllm_plugin.engine_reader import EngineReader


class QuietWork:
    """See the module. While nobody comes, leaves or moves, the same requests make one token each in every step."""

    def __init__(self, scheduler: SchedulerView, side: SchedulerSide, reader: EngineReader) -> None:
        self._scheduler = scheduler
        self._side = side
        self._reader = reader
        self._last: tuple[int, int, StepWork] | None = None  # count of moves, step, what it did

    def forget(self) -> None:
        """Something was decided: requests may have been paused, or gone on."""
        self._last = None

    def of(self, output: SchedulerOutput) -> StepWork:
        """What the step just scheduled will do."""
        num_tokens, moves = output.total_num_scheduled_tokens, self._side.ledger.residency.version
        step = self._scheduler.current_step
        if self._last is not None and self._side.last_plan is None:
            last_moves, last_step, last = self._last
            if moves == last_moves and num_tokens == len(output.num_scheduled_tokens) == last.num_decodes:
                return last._replace(decode_context=last.decode_context + num_tokens * (step - last_step))
        work = self._reader.work(output, self._side.last_plan)
        only_decodes = not work.prefill_tokens and self._side.last_plan is None
        self._last = (moves, step, work) if only_decodes else None
        return work
