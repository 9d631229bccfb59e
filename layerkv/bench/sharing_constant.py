"""What an engine pays for being able to grow and shrink while it does neither: `layerkv bench sharing --only constant`.

By the means of :mod:`layerkv.bench.overhead`: two engines at full speed with the same bursts, in turns of a few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec

from layerkv.bench.load import FIRST_ORDINARY_TOKEN_ID, PlannedRequest
from layerkv.bench.overhead import TURN_STEPS, Part, Round, blocks_for_all, closed_loop, measure
from layerkv.bench.tiny_model import SHAPES

MODEL = "test"
RUNNING, PROMPT_TOKENS, OUTPUT_TOKENS = 150, 32, 200
ENGINES = ("static", "elastic")
HOST_MEMORY = "1GiB"


class ConstantLoad(msgspec.Struct, frozen=True, kw_only=True):
    """An elastic engine at its ceiling beside a static one with the same KV memory, `running` requests at once.

    `throughput_ratio` is elastic / static, a median over rounds of medians over turns. `host_ms_per_step` is the time
    of all stages (:data:`layerkv.bench.overhead_engine.STAGES`) by engine, `host_ms_per_step_added` what the elastic
    one has more, and `step_ms` a whole step.
    """

    running: int
    throughput_ratio: float
    throughput_ratio_by_round: list[float]
    host_ms_per_step: dict[str, float]
    host_ms_per_step_added: float
    step_ms: dict[str, float]


def measure_constant_load(rounds: int, folder: Path) -> ConstantLoad:
    """Run both engines, so many times.

    Raises:
        LayerKVError: an engine failed; the message has the last lines of its log.
    """
    part = constant_part()
    kv_bytes = part.kv_bytes(MODEL)
    connectors: dict[str, dict[str, object]] = {
        "static": {"host_memory": HOST_MEMORY},
        "elastic": {"host_memory": HOST_MEMORY, "kv_floor": kv_bytes, "kv_ceiling": kv_bytes},
    }
    return constant_load(measure(part, MODEL, rounds, folder, connectors)[RUNNING])


def constant_part() -> Part:
    """KV memory for all requests, which come at once."""
    rng = Random(0)
    ids = range(FIRST_ORDINARY_TOKEN_ID, SHAPES[MODEL].vocab_size)
    requests = [
        PlannedRequest(
            request_id=f"r{i}", arrival_s=0.0, prompt=rng.choices(ids, k=PROMPT_TOKENS), output_tokens=OUTPUT_TOKENS
        )
        for i in range(RUNNING)
    ]
    return Part(RUNNING, blocks_for_all(requests), {RUNNING: requests}, TURN_STEPS)


def constant_load(rounds: Sequence[Round]) -> ConstantLoad:
    """What rounds of both engines come to."""
    found = closed_loop(MODEL, RUNNING, rounds, ENGINES)
    host_ms = {name: sum(found.host_us[name].values()) / 1e3 for name in ENGINES}
    return ConstantLoad(
        running=RUNNING,
        throughput_ratio=found.throughput_ratio,
        throughput_ratio_by_round=found.throughput_ratio_by_round,
        host_ms_per_step=host_ms,
        host_ms_per_step_added=host_ms["elastic"] - host_ms["static"],
        step_ms=found.step_ms,
    )
