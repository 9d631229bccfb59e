"""What engines that share memory are asked for: bursts that come to one of them after the other, as data."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from layerkv.bench.engine_args import BLOCK_TOKENS, MAX_BATCHED_TOKENS
from layerkv.bench.load import FIRST_ORDINARY_TOKEN_ID, PlannedRequest
from layerkv.bench.suite.case import Case, EngineSettings
from layerkv.bench.tiny_model import SHAPES
from layerkv.config import SloPolicy, parse_policy

MODEL = "test"
PROMPT_TOKENS, OUTPUT_TOKENS = 700, 250
MAX_MODEL_LEN = 1536
CAPACITY_BYTES = 120 << 20
"""KV memory of all engines together: 21 requests."""
HOST_BYTES = 512 << 20
NUM_BURSTS = 2
WITHIN_S = 1.0
"""A burst's requests come within so long, at random."""
PERIOD_S = 5.0
"""Between a burst to one engine and the next one to another."""


@dataclass(frozen=True, slots=True)
class Bursts:
    """So many requests in each burst, to so many engines in turn."""

    num_engines: int
    burst_requests: int


def policy() -> SloPolicy:
    """One class for everybody."""
    raw = {"version": 1, "default_class": "default", "classes": {"default": {"ttft": "2s", "tpot": "100ms"}}}
    return parse_policy(raw, where="sharing")


def planned(bursts: Bursts, engine: int, seed: int) -> list[PlannedRequest]:
    """What one engine is asked for, in order of arrival."""
    rng = Random(f"{seed}: {engine}")
    ids = range(FIRST_ORDINARY_TOKEN_ID, SHAPES[MODEL].vocab_size)
    arrivals = sorted(
        (burst * bursts.num_engines + engine) * PERIOD_S + rng.uniform(0.0, WITHIN_S)
        for burst in range(NUM_BURSTS)
        for _ in range(bursts.burst_requests)
    )
    return [
        PlannedRequest(
            request_id=f"{engine}-{index:03d}",
            arrival_s=arrival_s,
            prompt=rng.choices(ids, k=PROMPT_TOKENS),
            output_tokens=OUTPUT_TOKENS,
        )
        for index, arrival_s in enumerate(arrivals)
    ]


def engine_case(kv_bytes: int) -> Case:
    """An engine of the study as the suite starts one: its settings and its policy; the load is not the case's."""
    return Case(
        name="sharing",
        question="What do engines gain that share their KV memory?",
        axis="",
        size="full",
        settings=EngineSettings(
            model=MODEL,
            shape=SHAPES[MODEL],
            dtype="float32",
            kv_memory_bytes=kv_bytes,
            oracle_kv_memory_bytes=None,
            host_memory_bytes=HOST_BYTES,
            block_tokens=BLOCK_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            max_num_seqs=64,
            oracle_max_num_seqs=None,
            lanes=None,
            zone_tokens=None,
            long_contexts=False,
            options=(),
        ),
        policy=policy(),
        engines=("stock", "layerkv"),
        points=(),
        main_point="",
        num_seeds=1,
        expected_to_fail=(),
        can_compare_tokens=True,
        notes=(),
    )
