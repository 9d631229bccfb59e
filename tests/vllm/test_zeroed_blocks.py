"""Where vLLM zeroes blocks that it gives out, a park has read them before: what is stored is not zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines_in_turn import flag
from tests.vllm.forked import Forks
from tests.vllm.test_exact import engine_args
from tests.vllm.tiny_groups import make_tiny

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROGRAM = """
import json, sys
from dataclasses import replace
from tests.vllm.engines_in_turn import prompt
from tests.vllm.mix_engine import build

def add(engine, name, num_tokens):
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, detokenize=False)
    return engine.add_request(name, tokens_input(prompt_token_ids=prompt(num_tokens, seed=num_tokens)), params)

def run(engine, most_steps=1000):
    tokens = {}
    for _ in range(most_steps):
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    return tokens

def swap(controller, leaves, comes):
    # As the policy decides now and then by itself: one is parked, and another starts in its blocks in the same step.
    from layerkv.scheduler.reasons import Reason
    from layerkv.scheduler.snapshot import Admission
    decide = controller.decide

    def once(*args, **kwargs):
        controller.decide = decide
        snapshot, decision = decide(*args, **kwargs)
        reasons = {**decision.reasons, leaves: Reason.MAKES_ROOM, comes: Reason.FITS}
        admit = (Admission(comes, layered=False),)
        return snapshot, replace(decision, park=(leaves,), admit=admit, prefill_tokens=400, reasons=reasons)

    controller.decide = once

engine = build(json.loads(sys.argv[1]))
core = engine.engine_core.engine_core
scheduler, runner = core.scheduler, core.model_executor.driver_worker.worker.model_runner
found = {}
for name, num_tokens in (("first", 300), ("second", 360)):
    add(engine, name, num_tokens)
    found[name] = run(engine)[name]

first = add(engine, "first", 300)
for _ in range(6):
    engine.step()
swap(scheduler._controller, first, add(engine, "second", 360))
zeroed, zero = set(), runner._zero_block_ids
runner._zero_block_ids = lambda block_ids: (zeroed.update(block_ids), zero(block_ids))
engine.step()
runner._zero_block_ids = zero
parks = scheduler.connector.scheduler_side.last_plan.parks
stored = {block for run in parks for block in range(run.device_block, run.device_block + run.num_blocks)}
print("OUT", json.dumps({"alone": found, "parked": run(engine), "shared": sorted(stored & zeroed)}), flush=True)
engine.engine_core.shutdown()
"""


def test_a_park_has_read_its_blocks_before_vllm_zeroes_them_for_another(forks: Forks, tmp_path: Path) -> None:
    """In one step a request is parked and another one gets its blocks, which vLLM zeroes before the forward pass."""
    args: dict[str, Any] = {
        **engine_args(make_tiny("granite_h", tmp_path)),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 400,
        "kv_cache_memory_bytes": 1280 << 10,
        "kv_transfer_config": flag(mode="resident", host_memory="16MiB"),
    }
    ran = forks.run(PROGRAM, json.dumps({"engine_args": args}), VLLM_ENABLE_V1_MULTIPROCESSING="0", limit_s=200)
    out = [line for line in ran.stdout.splitlines() if line.startswith("OUT ")]
    assert out, ran.stderr[-3000:]
    found = json.loads(out[0].removeprefix("OUT "))
    assert found["shared"], "or the test has not tested what it is there for"
    assert found["parked"] == found["alone"]
