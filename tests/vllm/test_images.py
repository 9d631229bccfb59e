"""An image that a prefix covered when its request came is there when the request has to be computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines_in_turn import flag
from tests.vllm.families import LIMITS
from tests.vllm.forked import Forks
from tests.vllm.test_exact import engine_args
from tests.vllm.test_families import MAKE_FAMILY

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROGRAM = """
import json, sys
from tests.vllm.mix import MixRequest
from tests.vllm.mix_engine import build, prompt_of

def serve(engine, reset_step=None, most_steps=10_000):
    from vllm import SamplingParams
    core = engine.engine_core.engine_core
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)
    request = MixRequest(tuple(range(10, 90)), 12, 0, None, images=((5, 1),))
    engine.add_request("r", prompt_of(request, {}), params)
    tokens, num_covered = [], 0
    for step in range(most_steps):
        if not engine.has_unfinished_requests():
            return tokens, num_covered
        if step == reset_step:  # as when the weights change
            core.reset_encoder_cache()
            assert core.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        for output in engine.step():
            num_covered = max(num_covered, output.num_cached_tokens or 0)
            if output.finished:
                tokens = list(output.outputs[0].token_ids)
    raise AssertionError("the engine does not come to an end")

engine = build(json.loads(sys.argv[1]))
served = [serve(engine), *(serve(engine, int(step)) for step in sys.argv[2:])]
print("SERVED", json.dumps(served), flush=True)
engine.engine_core.shutdown()
"""


def test_a_reset_computes_an_image_again_that_a_prefix_had_covered(
    forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    """Served a second time, its prefix is cached with all of its image; then KV is given up, and what was encoded."""
    folder = tmp_path / "model"
    assert forks.run(MAKE_FAMILY, "qwen2_5_vl", str(tiny_model), str(folder)).returncode == 0
    stock: dict[str, Any] = {**engine_args(folder), **LIMITS}
    ours = {**stock, "kv_transfer_config": flag(host_memory="64MiB")}
    running = [
        forks.start(
            PROGRAM,
            json.dumps({"engine_args": args, "sees": True}),
            *reset_steps,
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            limit_s=200,
        )
        for args, reset_steps in ((stock, ()), (ours, ("4",)))
    ]
    served = []
    for ran in (each.result() for each in running):
        found = [line for line in ran.stdout.splitlines() if line.startswith("SERVED ")]
        assert found, ran.stdout[-3000:] + ran.stderr[-3000:]
        served.append(json.loads(found[0].removeprefix("SERVED ")))
    [[expected, _]], [[first, _], [again, num_covered]] = served
    assert num_covered >= 64, "of the second prompt the image was cached"
    assert len(expected) == 12
    assert first == expected
    assert again == expected
