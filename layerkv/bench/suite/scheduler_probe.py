"""Time in the scheduler: what the probed scheduler classes measure, and where the suite reads it.

The classes stand in :mod:`layerkv.bench.suite.stock_probe` and :mod:`layerkv.bench.suite.layerkv_probe`, apart from
here so that the suite reads without importing vLLM and a stock engine runs without layerkv's scheduler.

:class:`TimedSchedule` runs in the engine-core process and does nothing but read two clocks around `schedule()` and
write totals into a mapped file; the suite reads that file whenever it likes. A total holds the step's decisions, vLLM's
allocation, and the connector's metadata, but not `update_from_output()`.

Which class an engine gets (vLLM 0.32.0): stock takes `AsyncScheduler` if `async_scheduling` resolves to true and
`Scheduler` if not. That is resolved without a look at `scheduler_cls` (the CPU platform always turns it off), so the
flag does not change it; but a class given by flag is taken as it is, without this choice. The two names that
:func:`probe_options` gives therefore choose when they are constructed, from the resolved configuration, as stock does.
Apart from its warning about custom schedulers, vLLM reads the flag nowhere else (but for diffusion models).
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from layerkv.errors import ConfigError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    _VLLMScheduler = Any  # a checker sees vLLM as Any: its methods are found there at run time
else:
    _VLLMScheduler = object

TIMES_VARIABLE = "LAYERKV_BENCH_SCHEDULER_TIMES"
"""Environment variable with the path of the file. Data-parallel engine n > 0 writes `PATH.rankN`."""

_LAYOUT = struct.Struct(
    "<QddQ"
)  # calls, seconds, CPU seconds, calls again: a reader between two writes sees them differ
_READ_ATTEMPTS = 1000


class SchedulerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Totals since the engine started.

    Attributes:
        num_calls: Calls of `schedule()`: one per engine step, steps that only poll for transfers included.
        seconds: Time from their beginnings to their ends.
        cpu_seconds: CPU time of the scheduler's thread in them.
    """

    num_calls: int
    seconds: float
    cpu_seconds: float


def probe_options(*, engine_is_layerkv: bool) -> list[str]:
    """The server options that turn the probe on; the server's environment must have :data:`TIMES_VARIABLE`."""
    if engine_is_layerkv:
        return ["--scheduler-cls", "layerkv.bench.suite.layerkv_probe.ProbedLayerKVScheduler"]
    return ["--scheduler-cls", "layerkv.bench.suite.stock_probe.ProbedScheduler"]


def read_scheduler_times(path: Path) -> SchedulerTimes | None:
    """The totals as they are now, or None if no engine has started to write them.

    Raises:
        RuntimeError: no whole reading could be had, which means that something else writes the file.
    """
    for _ in range(_READ_ATTEMPTS):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        if len(raw) < _LAYOUT.size:
            return None
        num_calls, seconds, cpu_seconds, num_calls_again = _LAYOUT.unpack_from(raw)
        if num_calls == num_calls_again:
            return SchedulerTimes(num_calls=num_calls, seconds=seconds, cpu_seconds=cpu_seconds)
    raise RuntimeError(f"{path}: no consistent reading in {_READ_ATTEMPTS} attempts")


class TimedSchedule(_VLLMScheduler):
    """A scheduler class's outermost mixin: times :meth:`schedule`, and changes nothing.

    Raises:
        ConfigError: the environment does not say where the times go.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        path = os.environ.get(TIMES_VARIABLE)
        if not path:
            raise ConfigError(f"{TIMES_VARIABLE}: not set; {type(self).__name__} needs the path of a file to write to")
        if (rank := self.vllm_config.parallel_config.data_parallel_index) > 0:
            path = f"{path}.rank{rank}"
        Path(path).unlink(missing_ok=True)  # an engine that is still shutting down may have the old one mapped
        with open(path, "x+b") as file:
            file.write(bytes(_LAYOUT.size))
            file.flush()
            self._probe_times = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._probe_num_calls, self._probe_s, self._probe_cpu_s = 0, 0.0, 0.0

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:  # noqa: FBT001, FBT002 (vLLM's signature)
        """The scheduler's own, timed."""
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        output = super().schedule(throttle_prefills)
        self._probe_cpu_s += time.thread_time() - started_cpu_s
        self._probe_s += time.perf_counter() - started_s
        self._probe_num_calls += 1
        _LAYOUT.pack_into(
            self._probe_times, 0, self._probe_num_calls, self._probe_s, self._probe_cpu_s, self._probe_num_calls
        )
        return output
