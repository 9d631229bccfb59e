"""A request that layerkv refuses inside the engine ends with its reason and, where vLLM has such errors, with one.

With one before its first token only: vLLM puts it in the place of whatever the client has not read yet.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from layerkv.scheduler.reasons import Reason
from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("has_answered", [False, True])
@pytest.mark.parametrize(
    ("reason", "exception", "status"),
    [
        (Reason.NEVER_FITS, "VLLMValidationError", 400),
        (Reason.COPIES_FAIL, "RetryableRequestError", 503),
        (Reason.OVERLOAD, "RetryableRequestError", 503),
    ],
)
def test_who_is_refused_is_told_why(
    tiny_model: Path, reason: Reason, exception: str, status: int, has_answered: bool
) -> None:
    from vllm.v1.engine import EngineCoreOutput

    engine = HandEngine(tiny_model)
    engine.add("refused", [*range(20)])
    engine.force(prefill_tokens=20 if has_answered else 8)
    engine.step()
    assert bool(engine.scheduler.requests["refused"].num_output_tokens) is has_answered
    engine.force(prefill_tokens=8)
    engine.scheduler._arrivals.refuse("refused", "there is no room for it", reason)
    step = engine.schedule()
    engine.in_flight.clear()
    outputs = engine.scheduler.update_from_output(step.scheduled, step.output)
    [output] = [each for of_client in outputs.values() for each in of_client.outputs if each.finish_reason is not None]
    assert str(output.finish_reason) == "error"
    assert output.stop_reason == "there is no room for it"
    assert "refused" not in engine.scheduler.requests
    if not hasattr(EngineCoreOutput, "error"):  # before 0.33 every such end is HTTP 500
        return
    if has_answered:
        assert output.error is None
        return
    raised = output.error.to_exception()
    assert type(raised).__name__ == exception
    assert "there is no room for it" in str(raised)
    assert getattr(raised, "status_code", 400) == status
