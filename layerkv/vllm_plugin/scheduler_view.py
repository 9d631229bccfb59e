"""What the parts beside our scheduler read and change of vLLM's; the scheduler classes hand themselves to them as this.

With it the parts need not import the scheduler that imports them. vLLM's own types are its own: here they are Any where
vLLM does not export one that is worth naming.
"""

from __future__ import annotations

from typing import Any, Protocol

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus


class SchedulerView(Protocol):
    """See the module."""

    vllm_config: Any
    scheduler_config: Any
    cache_config: Any
    lora_config: Any
    policy: Any
    max_model_len: int

    requests: dict[str, Request]
    running: list[Request]
    waiting: Any
    kv_holding_waiting: Any
    deferred_waiting: Any
    kv_cache_manager: Any

    current_step: int
    max_num_scheduled_tokens: int
    max_num_active_reqs: int
    num_spec_tokens: int
    num_lookahead_tokens: int
    adaptive_long_prefill_threshold: bool
    defer_block_free: bool
    use_v2_model_runner: bool
    sched_step_seq: int
    processed_step_seq: int
    deferred_frees: Any
    finished_recving_kv_req_ids: set[str]
    failed_recving_kv_req_ids: set[str]
    prev_step_scheduled_req_ids: set[str]
    reset_preempted_req_ids: set[str]

    @property
    def pause_state(self) -> PauseState: ...

    _inflight_prefills: Any

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]: ...

    def get_num_unfinished_requests(self) -> int: ...

    def _inflight_prefill_reserved_blocks(self) -> int: ...

    def _handle_blocked_waiting_request(self, request: Request) -> Any: ...

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None: ...  # noqa: FBT001, FBT002 (vLLM's signature)
