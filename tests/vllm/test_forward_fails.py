"""An exception in the forward pass is what the user sees: our own look at the layers' hooks does not hide it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from layerkv.core.transfer import BlockRun, StepPlan
from layerkv.errors import TransferError
from layerkv.vllm_plugin.layer_places import LayerPlaces
from tests.fakes.workers import Worker, make_worker, small_geometry

pytestmark = pytest.mark.vllm

NUM_LAYERS, LANES, ZONE = 4, 2, 16
LAYERED = StepPlan(stores=(BlockRun(ZONE, 0, 1),), num_tokens=4)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = make_worker("cpu", small_geometry(NUM_LAYERS, LANES), 8)
    yield worker
    worker.engine.close()


@pytest.fixture
def connector(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The connector of a worker without a model, where vLLM's runner finds it."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.worker import kv_connector_model_runner_mixin as runner

    from layerkv.device.mechanism import Mechanism
    from layerkv.vllm_plugin.connector import LayerKVConnector
    from layerkv.vllm_plugin.connector_worker import WorkerSide

    geometry = small_geometry(NUM_LAYERS, LANES)
    names = [str(layer) for layer in range(NUM_LAYERS)]
    side = WorkerSide(geometry, LayerPlaces([names]), Mechanism(worker.arena, worker.host, worker.engine))
    connector = object.__new__(LayerKVConnector)
    connector._role = KVConnectorRole.WORKER
    connector._connector_metadata = None
    connector.scheduler_side, connector.worker_side, connector._has_layer_work = None, side, False
    monkeypatch.setattr(runner, "get_kv_transfer_group", lambda: connector)
    monkeypatch.setattr(runner, "get_forward_context", lambda: None)
    return connector


def run_step(plan: StepPlan, forward: Any) -> Any:
    """A step as vLLM's model runner makes it."""
    from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

    from layerkv.vllm_plugin.connector import LayerKVMetadata

    output = SimpleNamespace(
        kv_connector_metadata=LayerKVMetadata(plan), has_sync_kv_loads=False, finished_req_ids=set()
    )
    with KVConnectorModelRunnerMixin._get_kv_connector_output(output) as result:
        forward()
    return result


def fail() -> None:
    raise ValueError("the model's own fault")


def test_an_exception_in_the_forward_pass_is_what_comes_out(connector: Any) -> None:
    with pytest.raises(ValueError, match="the model's own fault"):
        run_step(LAYERED, fail)


def test_it_comes_out_after_some_layers_too(connector: Any) -> None:
    def forward() -> None:
        connector.save_kv_layer("0", None, None)
        fail()

    with pytest.raises(ValueError, match="the model's own fault"):
        run_step(LAYERED, forward)
    result = run_step(LAYERED, layers(connector))
    assert not result.invalid_block_ids, "and what is begun afterwards is a step of its own"


def layers(connector: Any) -> Any:
    return lambda: [connector.save_kv_layer(str(i), None, None) for i in range(NUM_LAYERS)]


def test_hooks_that_did_not_run_are_still_an_error(connector: Any) -> None:
    with pytest.raises(TransferError, match="hooks of 0 of 4 layers"):
        run_step(LAYERED, lambda: None)


def test_they_are_even_where_the_step_is_run_while_another_exception_is_handled(connector: Any) -> None:
    try:
        fail()
    except ValueError:
        with pytest.raises(TransferError, match="hooks of 0 of 4 layers"):
            run_step(LAYERED, lambda: None)
