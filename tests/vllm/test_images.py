"""An image that a prefix covered when its request came is there when the request has to be computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines_in_turn import flag
from tests.vllm.forked import Forks
from tests.vllm.test_exact import engine_args
from tests.vllm.test_families import LIMITS, MAKE_FAMILY

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROGRAM = """
import json, sys
from tests.vllm.mix import MixRequest
from tests.vllm.mix_engine import build, prompt_of

def serve(engine, names, most_steps=10_000):
    from vllm import SamplingParams
    scheduler = engine.engine_core.engine_core.scheduler
    tokens = {name: [] for name in names}
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)
    for name in names:
        request = MixRequest(tuple(range(10, 90)), 12, 0, None, images=((5, 1),))
        engine.add_request(name, prompt_of(request, {}), params)
    steps = 0
    while engine.has_unfinished_requests():
        if steps == 4 and names == ["again"]:
            assert scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        assert steps < most_steps
    return tokens

engine = build(json.loads(sys.argv[1]))
first = serve(engine, ["first"])
again = serve(engine, ["again"])
print("SAME", first["first"] == again["again"] and len(first["first"]) == 12, flush=True)
engine.engine_core.shutdown()
"""


def test_a_reset_computes_an_image_again_that_a_prefix_had_covered(
    forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    assert forks.run(MAKE_FAMILY, "qwen2_5_vl", str(tiny_model), str(folder)).returncode == 0
    args: dict[str, Any] = {**engine_args(folder), **LIMITS, "kv_transfer_config": flag(host_memory="64MiB")}
    ran = forks.run(
        PROGRAM, json.dumps({"engine_args": args, "sees": True}), VLLM_ENABLE_V1_MULTIPROCESSING="0", limit_s=200
    )
    assert "SAME True" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-3000:]
