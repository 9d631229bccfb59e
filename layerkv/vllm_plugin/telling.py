"""What the engine tells of itself: capacity at the start, then reasons, what is waited for and, to front ends, its
backlog."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutputs

from layerkv.config import experimental_keys
from layerkv.core.groups import most_blocks_held
from layerkv.scheduler.reasons import WAITS_FOR, Resource
from layerkv.units import format_bytes
from layerkv.vllm_plugin.scheduler_view import SchedulerView
from layerkv.vllm_plugin.words import tell

if TYPE_CHECKING:
    from layerkv.scheduler.controller import Controller
    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide

logger = init_logger(f"vllm.{__name__}")

BACKLOG_INTERVAL_S = 0.05
"""How often the front ends are told what a new request would meet, if their policy refuses under overload. Not
measured: chosen by judgement."""


WAITS_INTERVAL_S = 0.25
"""How often it is told what requests wait for, while any do. Not measured: chosen by judgement, well below the seconds
between two readings of metrics."""


class Telling:
    """See the module. One per scheduler.

    Attributes:
        taken_in_s: When the engine last took requests in.
    """

    def __init__(self, scheduler: SchedulerView, side: SchedulerSide, controller: Controller) -> None:
        self._scheduler = scheduler
        self._side = side
        self._ledger = side.ledger
        self._controller = controller
        self.taken_in_s = 0.0
        self._last_word_s = 0.0
        self._waiting_for: Counter[Resource] = Counter()
        self._waits_told_s = 0.0
        self._owes_word = False
        self._num_paused = 0
        # Of a server on another node, an engine learns how many there are from its requests only.
        self._front_ends = set(range(scheduler.vllm_config.parallel_config._api_process_count))

    def came_from(self, front_end: int) -> None:
        """A request has come: what a new one would meet has changed."""
        self._front_ends.add(front_end)
        self._owes_word = True

    def step_done(self, outputs: dict[int, EngineCoreOutputs], now_s: float) -> None:
        """A step's output has been processed: tell what is due."""
        self.reasons()
        self.waits(now_s)
        if self._owes_word:
            self.backlog(outputs, now_s)

    def reasons(self) -> None:
        """Count the reasons given since the last call, and who is paused."""
        if (num_paused := len(self._controller.paused)) != self._num_paused:
            self._num_paused = num_paused
            self._side.metrics.set("layerkv_paused_requests", num_paused)
        reasons = self._controller.reasons
        if reasons:
            for reason, count in reasons.items():
                self._side.metrics.add("layerkv_decisions", count, reason)
            reasons.clear()

    def waits(self, now_s: float) -> None:
        """Tell how many requests wait for what: at intervals while any do, and once when none does any more."""
        waits = self._controller.waits
        if not waits and not self._waiting_for:
            return
        if waits and 0 <= now_s - self._waits_told_s < WAITS_INTERVAL_S:
            return
        self._waits_told_s = now_s
        behind = self._controller.behind
        lacking = [behind.get(request_id) or WAITS_FOR[reason] for request_id, reason in waits.items()]
        told, self._waiting_for = self._waiting_for, Counter(lacking)
        for resource in Resource:
            if self._waiting_for[resource] != told[resource]:
                self._side.metrics.set("layerkv_waiting_requests", self._waiting_for[resource], resource)

    def backlog(self, outputs: dict[int, EngineCoreOutputs], now_s: float) -> None:
        """Tell the front ends what a new request would meet, if the policy refuses any under overload.

        As long as there are prompts, and once after the last: nothing waits, and all that came is counted.
        """
        controller = self._controller
        is_due = now_s - self._last_word_s >= BACKLOG_INTERVAL_S
        if not self._owes_word or not (is_due or not controller.has_prompts()):
            return
        rejecting = [slo.name for slo in controller.policy.classes.values() if slo.overload == "reject"]
        if not rejecting:
            self._last_word_s, self._owes_word = now_s, controller.has_prompts()
            return
        word = controller.word(self.taken_in_s, now_s)
        if word is None:
            return
        self._last_word_s, self._owes_word = now_s, controller.has_prompts()
        for name in rejecting:
            self._side.metrics.set("layerkv_prefill_backlog_seconds", word.classes[name].wait_s, name)
        tell(outputs, word, self._front_ends)

    def capacity(self) -> None:
        """Tell what is active, and correct what vLLM counted as capacity."""
        s = self._scheduler
        geometry, config, sizes = self._side.geometry, self._side.config, self._side.sizes
        if sizes is not None:
            layout = sizes.plan.layout
            logger.info(
                "the KV pool grows and shrinks: from %d to %d segments of %d blocks (%s), %s with the lane zone at the "
                "least and %s at the most; what can never fit goes by the least",
                sizes.floor,
                layout.num_segments,
                layout.segment_blocks,
                format_bytes(sizes.segment_bytes),
                format_bytes(sizes.geometry_at_floor.physical_bytes),
                format_bytes(geometry.physical_bytes),
            )
            geometry = sizes.geometry_at_floor
        concurrency = (geometry.pool_blocks - 1) / most_blocks_held(geometry.groups, s.max_model_len)
        pool_tokens = (geometry.pool_blocks - 1) * geometry.block_tokens
        if not geometry.is_plain:
            pool_tokens = int(concurrency * s.max_model_len)  # of requests as long as they may be
        s.cache_config.kv_cache_size_tokens = pool_tokens
        s.cache_config.kv_cache_max_concurrency = pool_tokens / s.max_model_len
        logger.info(
            "layerkv is on (mode %s): pool %d blocks (%d tokens), lane zone %d blocks (%d tokens) in %d lane(s) taking "
            "%s of %s, host memory %d blocks (%s per worker), policy %s (%s); vLLM's own figures above count zone "
            "blocks as if they were pool blocks",
            config.mode,
            geometry.pool_blocks - 1,
            pool_tokens,
            geometry.zone_blocks,
            geometry.zone_blocks * geometry.block_tokens,
            geometry.num_lanes,
            format_bytes(geometry.num_lanes * geometry.lane_bytes),
            format_bytes(geometry.physical_bytes),
            self._ledger.host.count,
            format_bytes(self._ledger.host.count * geometry.block_bytes),
            config.policy_path or "built in",
            ", ".join(self._controller.policy.classes),
        )
        if sizes is not None and s.vllm_config.device_config.device_type == "cuda":
            logger.warning(
                "a KV pool that grows and shrinks has never run on a GPU (allow_untested_elastic_cuda): compare its "
                "answers with those of an engine without kv_ceiling, kv_floor and broker before you rely on them"
            )
        if not geometry.is_plain:
            logger.info(
                "the model has %d KV-cache group(s), windows or states among them: a request takes blocks of each from "
                "one pool, and host memory caches no prefixes of requests that have ended",
                len(geometry.groups),
            )
        if experimental := experimental_keys(config, self._controller.policy):
            logger.warning(
                "experimental without long_contexts, its speed was never measured: %s (docs/configuration.md)",
                " and ".join(experimental),
            )
