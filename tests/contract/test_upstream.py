"""Changes that vLLM could make, imitated one by one: each is noticed, at start or by the contract, or makes no odds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerkv.vllm_plugin import compat
from tests.contract.mixes import SETTINGS, WEAKENED, run_mix

pytestmark = pytest.mark.vllm

Patch = pytest.MonkeyPatch


def _scheduler() -> Any:
    from vllm.v1.core.sched.scheduler import Scheduler

    return Scheduler


def _manager() -> Any:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    return SingleTypeKVCacheManager


def ends_are_not_told(patch: Patch) -> None:
    """The connector hears of a request's end no more."""
    patch.setattr(_scheduler(), "_connector_finished", lambda self, request: (False, None))


def blocks_go_to_one_pool(patch: Patch) -> None:
    """Freed blocks go to the manager's pool, whichever they belong to."""
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from layerkv.vllm_plugin.spec import ZonePool

    patch.setattr(ZonePool, "free_blocks", lambda self, blocks: _all_free(list(blocks)))

    def _all_free(blocks: list[KVCacheBlock]) -> None:
        for block in blocks:
            block.ref_cnt -= 1


def a_preemption_keeps_its_count(patch: Patch) -> None:
    """A preempted request still says that it has computed tokens."""
    from layerkv.vllm_plugin.scheduler import LayerKVSchedulerMixin

    preempt = LayerKVSchedulerMixin._preempt_request

    def other(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        computed = request.num_computed_tokens
        preempt(self, request, *args, **kwargs)
        request.num_computed_tokens = computed

    patch.setattr(LayerKVSchedulerMixin, "_preempt_request", other)


def loads_are_not_waited_for(patch: Patch) -> None:
    """Whether a load is asynchronous is asked for elsewhere: what the connector answers counts as done."""
    from layerkv.vllm_plugin.connector import LayerKVConnector

    found = LayerKVConnector.get_num_new_matched_tokens
    patch.setattr(LayerKVConnector, "get_num_new_matched_tokens", lambda self, *args: (found(self, *args)[0], False))


def loads_are_allocated_unseen(patch: Patch) -> None:
    """The connector is not told of blocks any more that a request got."""
    from layerkv.vllm_plugin.connector import LayerKVConnector

    patch.setattr(LayerKVConnector, "update_state_after_alloc", lambda self, *args: None)


def arrivals_are_not_told(patch: Patch) -> None:
    """What workers report goes past the connector."""
    from layerkv.vllm_plugin.connector import LayerKVConnector

    patch.setattr(LayerKVConnector, "update_connector_output", lambda self, output: None)


def the_scan_ignores_what_is_shown(patch: Patch) -> None:
    """Requests are taken from the waiting queue in another way."""
    from layerkv.vllm_plugin.waiting_queue import WaitingQueue

    patch.setattr(WaitingQueue, "__bool__", lambda self: len(self) > 0)
    patch.setattr(WaitingQueue, "peek_request", lambda self: next(iter(self)))

    def pop_request(self: Any) -> Any:
        request = next(iter(self))
        self.remove_request(request)
        return request

    patch.setattr(WaitingQueue, "pop_request", pop_request)


def blocks_are_allocated_under_another_name(patch: Patch) -> None:
    """The manager's method that gives blocks is not the one that is overridden."""
    patch.setattr("layerkv.vllm_plugin.spec.LayerKVManager.allocate_new_blocks", _manager().allocate_new_blocks)


def blocks_are_zeroed_though_a_fetch_fills_them(patch: Patch) -> None:
    """Beside states, new blocks that an asynchronous load fills are zeroed like others."""
    from vllm.v1.request import RequestStatus

    found = _scheduler()._get_new_block_ids_to_zero
    loading: set[str] = set()

    def other(self: Any) -> list[int]:
        zeroed, before = list(found(self) or ()), set(loading)
        loading.clear()
        for request in self.requests.values():
            if request.status is RequestStatus.WAITING_FOR_REMOTE_KVS:
                loading.add(request.request_id)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            for request_id in loading - before if manager.records_new_block_ids else ():
                zeroed += [block.block_id for block in manager.req_to_blocks[request_id]]
        return zeroed

    patch.setattr(_scheduler(), "_get_new_block_ids_to_zero", other)


CHANGES: list[Callable[[Patch], None]] = [
    ends_are_not_told,
    blocks_go_to_one_pool,
    a_preemption_keeps_its_count,
    loads_are_not_waited_for,
    loads_are_allocated_unseen,
    arrivals_are_not_told,
    the_scan_ignores_what_is_shown,
    blocks_are_allocated_under_another_name,
    blocks_are_zeroed_though_a_fetch_fills_them,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_meaning_that_changes_is_noticed(
    tiny_model: Path, monkeypatch: Patch, change: Callable[[Patch], None]
) -> None:
    change(monkeypatch)
    for name in WEAKENED:
        setting = SETTINGS[name]
        try:
            seen = run_mix(tiny_model, setting, seed=0)
        except Exception:  # whatever goes wrong first
            return
        if any(seen[what] < least for what, least in setting.least.items()):
            return
    raise AssertionError(f"{change.__doc__} Nothing noticed it")


def test_a_pause_that_means_something_else_makes_no_odds(tiny_model: Path, monkeypatch: Patch) -> None:
    """As on 0.31: nobody who waits is looked at, and only who runs counts."""
    from vllm.v1.core.sched.interface import PauseState

    scheduler = _scheduler()
    count, schedule = scheduler.get_num_unfinished_requests, scheduler.schedule

    def counted(self: Any) -> int:
        return len(self.running) if self._pause_state == PauseState.PAUSED_NEW else count(self)

    def scheduled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._pause_state != PauseState.PAUSED_NEW:
            return schedule(self, *args, **kwargs)
        waiting, self.kv_holding_waiting = self.kv_holding_waiting, type(self.kv_holding_waiting)()
        try:
            return schedule(self, *args, **kwargs)
        finally:
            self.kv_holding_waiting = waiting

    monkeypatch.setattr(scheduler, "get_num_unfinished_requests", counted)
    monkeypatch.setattr(scheduler, "schedule", scheduled)
    seen = run_mix(tiny_model, SETTINGS["a pause that drains"], seed=0)
    assert seen["parks"] > 0


def test_a_name_that_goes_is_named(monkeypatch: Patch) -> None:
    monkeypatch.delattr(_scheduler(), "_handle_blocked_waiting_request")
    assert [problem.what for problem in compat.check_surfaces()] == [
        "vllm.v1.core.sched.scheduler.Scheduler._handle_blocked_waiting_request"
    ]
