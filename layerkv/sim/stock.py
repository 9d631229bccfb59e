"""vLLM 0.32's own scheduling on the virtual engine: first come, first served, preemption by recompute.

A prompt is admitted when blocks for all of it are free (``scheduler_reserve_full_isl``), beside the watermark if one is
set; running requests go first; when one of them finds no block, the last admitted gives its KV up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from layerkv.sim.engine import EngineSetup, Live, Scheduled, SimRequest, VirtualEngine
from layerkv.sim.outcome import SimOutcome


class StockEngine(VirtualEngine):
    """See the module."""

    def __init__(self, setup: EngineSetup, requests: Iterable[SimRequest], *, watermark: float = 0.0) -> None:
        super().__init__(setup, requests)
        self._waiting: deque[Live] = deque()
        self._watermark_blocks = int(watermark * setup.geometry.pool_blocks)
        self._preemptions = 0

    def arrive(self, live: Live) -> None:
        self._waiting.append(live)

    def schedule(self) -> Scheduled:
        tokens = self.setup.max_num_batched_tokens
        scheduled: Scheduled = []
        preempted = self._schedule_running(scheduled, tokens)
        tokens -= sum(num_tokens for _, num_tokens in scheduled)
        while not preempted and self._waiting and tokens > 0 and len(self.running) < self.setup.max_num_seqs:
            live = self._waiting[0]
            watermark = self._watermark_blocks if scheduled else 0
            if self.blocks(live.num_tokens) + watermark > len(self.free_ids):
                break
            num_tokens = min(live.remaining, tokens)
            self.hold(live, num_tokens)
            self._waiting.popleft()
            self.running.append(live)
            scheduled.append((live, num_tokens))
            tokens -= num_tokens
        return scheduled

    def left(self, live: Live) -> None:
        self.free(live)

    def num_needed(self) -> int:
        return sum(self.blocks(live.num_tokens + 1) for live in (*self.running, *self._waiting))

    def outcome(self) -> SimOutcome:
        return SimOutcome(self.outcomes, self.gaps, self.now_s, self.step, preemptions=self._preemptions)

    def _schedule_running(self, scheduled: Scheduled, tokens: int) -> bool:
        """Whether somebody was preempted."""
        preempted = False
        at = 0
        while at < len(self.running) and tokens > 0:
            live = self.running[at]
            num_tokens = min(live.remaining, tokens)
            while not self.hold(live, live.num_computed + num_tokens):
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                if victim is live:
                    return True
            scheduled.append((live, num_tokens))
            tokens -= num_tokens
            at += 1
        return preempted

    def free(self, live: Live) -> None:
        super().free(live)
        self._give_back_freed()  # vLLM defers frees only for a KV connector's sake

    def _preempt(self, live: Live) -> None:
        self.running.remove(live)
        self.free(live)
        live.num_computed = 0
        live.num_recomputes += 1
        self._preemptions += 1
        self._waiting.appendleft(live)
