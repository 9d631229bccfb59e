"""Our scheduler classes where layerkv manages no KV cache (`on_unsupported: passthrough`): vLLM's own, and no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


class Stock:
    """Stands for vLLM's scheduler: answers a call with its name and arguments."""

    def schedule(self, *args: Any) -> Any:
        return ("schedule", *args)

    def update_from_output(self, *args: Any) -> Any:
        return ("update_from_output", *args)

    def reset_prefix_cache(self, *args: Any) -> Any:
        return ("reset_prefix_cache", *args)

    def finish_requests(self, *args: Any) -> Any:
        return ("finish_requests", *args)

    def set_pause_state(self, *args: Any) -> Any:
        self.told = args

    @property
    def pause_state(self) -> Any:
        return ("pause_state", *self.told)

    def get_num_unfinished_requests(self) -> Any:
        return ("get_num_unfinished_requests",)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("schedule", (False,)),
        ("update_from_output", ("scheduled", SimpleNamespace(kv_connector_output=None))),
        ("reset_prefix_cache", (True, False)),
        ("finish_requests", ("a", "aborted")),
        ("get_num_unfinished_requests", ()),
    ],
)
def test_a_scheduler_without_our_spec_does_what_vllm_does(name: str, args: tuple[Any, ...]) -> None:
    """Regression: processing a step's output asked for what only a scheduler with our spec has."""
    from layerkv.vllm_plugin.scheduler import LayerKVSchedulerMixin

    scheduler = object.__new__(type("Passthrough", (LayerKVSchedulerMixin, Stock), {}))
    scheduler._is_active = False
    assert getattr(scheduler, name)(*args) == (name, *args)


def test_a_pause_without_our_spec_is_vllms() -> None:
    from vllm.v1.core.sched.interface import PauseState

    from layerkv.vllm_plugin.scheduler import LayerKVSchedulerMixin

    scheduler = object.__new__(type("Passthrough", (LayerKVSchedulerMixin, Stock), {}))
    scheduler._is_active = False
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert scheduler.pause_state == ("pause_state", PauseState.PAUSED_NEW)
    assert scheduler.get_num_unfinished_requests() == ("get_num_unfinished_requests",)
