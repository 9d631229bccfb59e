"""layerkv's schedulers, timed: see :mod:`layerkv.bench.suite.scheduler_probe`. Runs in the engine-core process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerkv.bench.suite.scheduler_probe import TimedSchedule
from layerkv.vllm_plugin.scheduler import LayerKVAsyncScheduler, LayerKVScheduler, LayerKVSchedulerMixin

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TimedLayerKVScheduler(TimedSchedule, LayerKVScheduler):
    """layerkv's synchronous scheduler, timed."""


class TimedLayerKVAsyncScheduler(TimedSchedule, LayerKVAsyncScheduler):
    """layerkv's asynchronous scheduler, timed."""


class ProbedLayerKVScheduler(LayerKVSchedulerMixin):
    """Constructs the timed form of the class that layerkv would choose; is never instantiated itself.

    It derives from layerkv's mixin because layerkv keeps a scheduler class given by flag only if that does.
    """

    def __new__(cls, *, vllm_config: VllmConfig, **kwargs: Any) -> Any:
        """A scheduler for the resolved configuration."""
        use_async = vllm_config.scheduler_config.async_scheduling
        chosen = TimedLayerKVAsyncScheduler if use_async else TimedLayerKVScheduler
        return chosen(vllm_config=vllm_config, **kwargs)
