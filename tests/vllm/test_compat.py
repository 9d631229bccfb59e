"""What layerkv stands on in the vLLM that is installed: listed, checked, and overridden as vLLM calls it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from layerkv.vllm_plugin import compat

pytestmark = pytest.mark.vllm


def problems() -> dict[str, str]:
    return {problem.what: problem.why for problem in compat.check_surfaces()}


def test_the_installed_vllm_has_everything() -> None:
    assert problems() == {}


def test_an_imported_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat.NAMES, "vllm.v1.request", "Request Gone")
    monkeypatch.setitem(compat.NAMES, "vllm.v1.gone", "Thing")
    found = problems()
    assert set(found) == {"vllm.v1.request.Gone", "vllm.v1.gone.Thing"}
    assert all("is missing" in why for why in found.values())


def test_an_attribute_of_instances_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    def other_init(self: Any) -> None:
        self.kv_holding_waiting = ()

    def first_use(self: Any) -> None:
        self.sched_step_seq = 0

    path = "vllm.v1.core.sched.scheduler.Scheduler"
    for name in [name for name, value in vars(Scheduler).items() if inspect.isfunction(value)]:
        monkeypatch.setattr(Scheduler, name, lambda self: None)
    monkeypatch.setattr(Scheduler, "__init__", other_init)
    monkeypatch.setattr(Scheduler, "schedule", first_use)
    found = {what for what in problems() if what.startswith(path)}
    assert {f"{path}.deferred_waiting", f"{path}.max_num_active_reqs"} <= found
    assert not {f"{path}.kv_holding_waiting", f"{path}.sched_step_seq"} & found


def test_a_field_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import ParallelConfig

    path = "vllm.config.ParallelConfig"
    fields = {k: v for k, v in ParallelConfig.__dataclass_fields__.items() if k != "tensor_parallel_size"}
    monkeypatch.setattr(ParallelConfig, "__dataclass_fields__", fields)
    if hasattr(ParallelConfig, "tensor_parallel_size"):
        monkeypatch.delattr(ParallelConfig, "tensor_parallel_size")
    assert f"{path}.tensor_parallel_size" in problems()


def test_a_parameter_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    path = "vllm.v1.core.kv_cache_manager.KVCacheManager.get_block_ids"
    monkeypatch.setitem(compat.PARAMETERS, path, "request_id other")
    assert problems() == {path: "no longer takes other"}
    monkeypatch.setattr(KVCacheManager, "get_block_ids", lambda self, **kwargs: None)
    assert problems() == {}


def test_a_parameter_that_was_passed_at_its_place_and_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    monkeypatch.setattr(KVCacheManager, "evict_blocks", lambda self: None)
    path = "vllm.v1.core.kv_cache_manager.KVCacheManager.evict_blocks"
    assert problems() == {path: "no longer takes block_ids"}


def test_a_parameter_that_an_override_cannot_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    def update_state_after_alloc(self: Any, request: Any, group: Any, blocks: Any, num_external_tokens: int) -> None:
        """A new one in the middle moves those behind it."""

    def start_load_kv(self: Any, forward_context: Any, *, step: int = 0, **kwargs: Any) -> None:
        """Ours takes whatever comes by name."""

    def cache_blocks(self: Any, request: Any, num_tokens: int, mask: Any, limit: int) -> None:
        """Ours takes whatever comes."""

    def schedule(self: Any, throttle_prefills: bool = False, *, budget: int = 0) -> None:
        """Ours has no place for it."""

    monkeypatch.setattr(KVConnectorBase_V1, "update_state_after_alloc", update_state_after_alloc)
    monkeypatch.setattr(KVConnectorBase_V1, "start_load_kv", start_load_kv)
    monkeypatch.setattr(FullAttentionManager, "cache_blocks", cache_blocks)
    monkeypatch.setattr(Scheduler, "schedule", schedule)
    base = "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1"
    assert problems() == {
        f"{base}.update_state_after_alloc": "passes group, blocks, num_external_tokens, for which layerkv's own has "
        "no place",
        "vllm.v1.core.sched.scheduler.Scheduler.schedule": "passes budget, for which layerkv's own has no place",
    }


def overrides() -> Iterator[tuple[type, str, Any, Any]]:
    """Methods of ours that vLLM calls by another class's name: ours, and vLLM's."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_worker import Worker

    from layerkv.vllm_plugin.connector import LayerKVConnector
    from layerkv.vllm_plugin.prom import LayerKVPromMetrics, LayerKVStats
    from layerkv.vllm_plugin.scheduler import LayerKVSchedulerMixin
    from layerkv.vllm_plugin.segment_queue import SegmentQueue
    from layerkv.vllm_plugin.spec import LayerKVManager, LayerKVSpec, WatchedPool, ZonePool
    from layerkv.vllm_plugin.waiting_queue import WaitingQueue
    from layerkv.vllm_plugin.worker import LayerKVWorkerMixin

    stands_for: dict[type, list[type]] = {
        LayerKVSchedulerMixin: [Scheduler],
        LayerKVWorkerMixin: [Worker],
        SegmentQueue: [FreeKVCacheBlockQueue],
        ZonePool: [BlockPool],
    }
    derived = (
        LayerKVConnector,
        LayerKVPromMetrics,
        LayerKVStats,
        LayerKVManager,
        LayerKVSpec,
        WatchedPool,
        WaitingQueue,
    )
    stands_for |= {ours: list(ours.__mro__[1:-1]) for ours in derived}
    for ours, theirs in stands_for.items():
        for name, method in vars(ours).items():
            if name.startswith("__"):
                continue
            for owner in theirs:
                method = inspect.unwrap(getattr(method, "__func__", method))
                if name in vars(owner) and inspect.isfunction(method):
                    yield ours, name, method, getattr(vars(owner)[name], "__func__", vars(owner)[name])
                    break


def test_what_vllm_passes_is_taken() -> None:
    """Each parameter of a method that is overridden has a place in ours, at the same position where it has one."""
    refused, num_seen = [], 0
    for ours, name, mine, theirs in overrides():
        num_seen += 1
        taken = list(inspect.signature(mine).parameters.values())
        kinds = {each.kind for each in taken}
        by_name = [each.name for each in taken]
        for position, each in enumerate(inspect.signature(theirs).parameters.values()):
            if each.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                continue
            in_place = position < len(by_name) and by_name[position] == each.name
            is_taken = each.name in by_name and (in_place or each.kind is inspect.Parameter.KEYWORD_ONLY)
            if not is_taken and not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}:
                refused.append(f"{ours.__name__}.{name} does not take {each.name}")
    assert refused == []
    assert num_seen > 40


def test_what_takes_the_free_queues_place_has_all_that_it_can_be_asked() -> None:
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    from layerkv.vllm_plugin.segment_queue import SegmentQueue

    of_offloading = {"iter_blocks_after"}  # vLLM's own CPU offload asks for it, and cannot stand beside layerkv
    asked = {name for name in vars(FreeKVCacheBlockQueue) if not name.startswith("_")} - of_offloading
    assert asked - vars(SegmentQueue).keys() == set()


def test_nothing_that_only_some_releases_have_is_missed_or_expected_wrongly() -> None:
    from vllm import __version__

    for path, since in compat.NOT_IN_ALL.items():
        try:
            compat._found(path)
            is_there = True
        except ImportError:
            is_there = False
        release = ".".join(__version__.split(".")[:2])
        assert is_there == (compat._series(release) >= compat._series(since)), path
