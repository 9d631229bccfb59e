"""vLLM's own schedulers, timed: see :mod:`layerkv.bench.suite.scheduler_probe`. Runs in the engine-core process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from layerkv.bench.suite.scheduler_probe import TimedSchedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TimedScheduler(TimedSchedule, Scheduler):
    """vLLM's synchronous scheduler, timed."""


class TimedAsyncScheduler(TimedSchedule, AsyncScheduler):
    """vLLM's asynchronous scheduler, timed."""


class ProbedScheduler:
    """Constructs the timed form of the class that vLLM would choose; is never instantiated itself."""

    def __new__(cls, *, vllm_config: VllmConfig, **kwargs: Any) -> Any:
        """A scheduler for the resolved configuration."""
        chosen = TimedAsyncScheduler if vllm_config.scheduler_config.async_scheduling else TimedScheduler
        return chosen(vllm_config=vllm_config, **kwargs)
