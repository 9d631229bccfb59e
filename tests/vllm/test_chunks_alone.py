"""All layers attend within chunks: a step that ends with one stores nothing, and reads what is right all the same."""

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
from layerkv.core.groups import host_blocks
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import Admission
from tests.vllm.engines_in_turn import prompt
from tests.vllm.mix_engine import build

def run(num_tokens):
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
    engine.add_request("it", tokens_input(prompt_token_ids=prompt(num_tokens, seed=num_tokens)), params)
    plans = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                return list(output.outputs[0].token_ids), plans
        plans.append(side.last_plan)

def in_the_zone(decide):
    def decided(*args, **kwargs):
        snapshot, decision = decide(*args, **kwargs)
        admit = tuple(Admission(each.request_id, True, *room(each.request_id)) for each in decision.admit)
        reasons = {**decision.reasons, **{each.request_id: Reason.POOL_CONTENDED for each in admit}}
        return snapshot, replace(decision, admit=admit, reasons=reasons)

    return decided

def room(request_id):
    num_tokens, geometry = scheduler.requests[request_id].num_tokens, side.geometry
    return -(-num_tokens // geometry.block_tokens), host_blocks(geometry.groups, num_tokens)

engine = build(json.loads(sys.argv[1]))
scheduler = engine.engine_core.engine_core.scheduler
side, controller = scheduler.connector.scheduler_side, scheduler._controller
lengths = (64, 128, 192, 150)
in_pool = [run(length)[0] for length in lengths]
controller.decide = in_the_zone(controller.decide)
runs = [run(length) for length in lengths]
steps = [[plan is not None and bool(plan.loads) and not plan.stores for plan in plans] for _, plans in runs]
groups = [(group.chunk, group.num_layers) for group in side.geometry.groups]
print("OUT", json.dumps({
    "groups": groups,
    "in_pool": in_pool,
    "in_zone": [tokens for tokens, _ in runs],
    "loads_alone": sum(map(sum, steps)),
    "layered": side.ledger.counters.layered_admissions,
}), flush=True)
engine.engine_core.shutdown()
"""


def test_a_prompt_that_ends_with_a_chunk_has_the_same_tokens_in_the_zone_as_in_the_pool(
    forks: Forks, tmp_path: Path
) -> None:
    """Its last step reads what earlier ones left, which other layers have overwritten in the lanes since."""
    args: dict[str, Any] = {
        **engine_args(make_tiny("llama4_chunks", tmp_path)),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 48,
        "kv_cache_memory_bytes": 8 << 20,
        "kv_transfer_config": flag(zone_tokens=384, host_memory="16MiB"),
    }
    ran = forks.run(PROGRAM, json.dumps({"engine_args": args}), VLLM_ENABLE_V1_MULTIPROCESSING="0", limit_s=200)
    out = [line for line in ran.stdout.splitlines() if line.startswith("OUT ")]
    assert out, ran.stderr[-3000:]
    found = json.loads(out[0].removeprefix("OUT "))
    assert found["groups"] == [[64, 8]], "vLLM takes such a model, and makes one group of it"
    assert found["layered"] == len(found["in_pool"])
    assert found["loads_alone"] > 0, "or the test has not tested what it is there for"
    assert found["in_zone"] == found["in_pool"]
