"""What engines that share memory are asked for, as data: each part of `layerkv bench sharing` has engines and a load.

Pure functions. Invariant: a load depends on its part, the engine and the seed alone, so that every way of having the
memory gets the same requests at the same times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from layerkv.bench.engine_args import BLOCK_TOKENS, MAX_BATCHED_TOKENS
from layerkv.bench.load import FIRST_ORDINARY_TOKEN_ID, PlannedRequest
from layerkv.bench.suite.case import Case, EngineSettings
from layerkv.bench.tiny_model import SHAPES
from layerkv.config import SloPolicy, parse_policy

HOST_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """The engines of one part.

    Attributes:
        model: A name of `tiny_model.SHAPES`.
        max_model_len: Tokens of the longest request.
        capacity_bytes: KV memory of all engines together.
        floor_bytes: Of that, what each gets back whenever it needs it, where they share it.
        ceiling_bytes: Where they share it, what each may have at most; None: all but others' floors.
    """

    model: str
    max_model_len: int
    capacity_bytes: int
    floor_bytes: int
    ceiling_bytes: int | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the model, in all layers."""
        return SHAPES[self.model].kv_bytes_per_token


# Bursts ---------------------------------------------------------------------------------------------------------------

BURSTS = Setting(model="test", max_model_len=1536, capacity_bytes=120 << 20, floor_bytes=12 << 20)
"""Memory for 21 requests."""
PROMPT_TOKENS, OUTPUT_TOKENS = 700, 250
NUM_BURSTS = 2
WITHIN_S = 1.0
"""A burst's requests come within so long, at random."""
PERIOD_S = 5.0
"""Between a burst to one engine and the next one to another, if nobody says otherwise."""

MOST_PERIOD_S = 600.0
"""A longer one is a slip: bursts last for seconds."""


@dataclass(frozen=True, slots=True)
class Bursts:
    """So many requests in each burst, to so many engines in turn, one every `period_s`."""

    num_engines: int
    burst_requests: int
    period_s: float = PERIOD_S


def planned(bursts: Bursts, engine: int, seed: int) -> list[PlannedRequest]:
    """What one engine is asked for, in order of arrival."""
    rng = Random(f"{seed}: {engine}")
    arrivals = sorted(
        (burst * bursts.num_engines + engine) * bursts.period_s + rng.uniform(0.0, WITHIN_S)
        for burst in range(NUM_BURSTS)
        for _ in range(bursts.burst_requests)
    )
    return _requests(BURSTS, rng, f"{engine}", arrivals, PROMPT_TOKENS, OUTPUT_TOKENS)


# Give -----------------------------------------------------------------------------------------------------------------

SEGMENT_BYTES = 8 << 20
"""512 tokens of the model: whole huge pages in each layer. So coarse, a segment has blocks of many requests, as those
of large models have."""
GIVE = Setting(
    model="flat",
    max_model_len=512,
    capacity_bytes=12 * SEGMENT_BYTES,
    floor_bytes=3 * SEGMENT_BYTES,
    ceiling_bytes=20 * SEGMENT_BYTES,
)
"""Ten segments, and two lane zones of one each. The donor's requests want a third more than all of it. The ceiling says
only that pools are large enough for huge pages."""
DONOR, TAKER = 0, 1
"""The engines: one is full of live decodes, and bursts come to the other."""
DONOR_REQUESTS, DONOR_OUTPUT_TOKENS = 14, 420
TAKER_REQUESTS, TAKER_OUTPUT_TOKENS = 12, 90
GIVE_PROMPT_TOKENS = 64
TAKEN_AT = (0.3, 0.7)
"""When the bursts come, as shares of the time that the donor would take alone with half of the memory."""


def give_planned(taken_at_s: Sequence[float], engine: int, seed: int) -> list[PlannedRequest]:
    """What the donor is asked for, or the taker, to which a burst comes at each of these times."""
    rng = Random(f"give {seed}: {engine}")
    if engine == DONOR:
        return _requests(GIVE, rng, "donor", [0.0] * DONOR_REQUESTS, GIVE_PROMPT_TOKENS, DONOR_OUTPUT_TOKENS)
    arrivals = [at_s for at_s in taken_at_s for _ in range(TAKER_REQUESTS)]
    return _requests(GIVE, rng, "taker", arrivals, GIVE_PROMPT_TOKENS, TAKER_OUTPUT_TOKENS)


# Idle -----------------------------------------------------------------------------------------------------------------

IDLE_REQUESTS = 16
"""They fill most of what one engine may have of :data:`BURSTS`."""
PROBE = "probe"
PROBES_AT_S = (16.0, 21.0, 26.0, 31.0)
"""When a single request comes to an engine that has been idle for more than its `idle_after`."""
PROBE_OUTPUT_TOKENS = 8


def idle_planned(seed: int) -> list[PlannedRequest]:
    """A burst, and long after it one request at a time."""
    rng = Random(f"idle {seed}")
    arrivals = sorted(rng.uniform(0.0, WITHIN_S) for _ in range(IDLE_REQUESTS))
    return [
        *_requests(BURSTS, rng, "burst", arrivals, PROMPT_TOKENS, OUTPUT_TOKENS),
        *_requests(BURSTS, rng, PROBE, PROBES_AT_S, PROMPT_TOKENS, PROBE_OUTPUT_TOKENS),
    ]


# Engines --------------------------------------------------------------------------------------------------------------


def policy() -> SloPolicy:
    """One class for everybody."""
    raw = {"version": 1, "default_class": "default", "classes": {"default": {"ttft": "2s", "tpot": "100ms"}}}
    return parse_policy(raw, where="sharing")


def engine_case(setting: Setting, kv_bytes: int) -> Case:
    """An engine of the study as the suite starts one: its settings and its policy; the load is not the case's."""
    return Case(
        name="sharing",
        question="What do engines gain that share their KV memory?",
        axis="",
        size="full",
        settings=EngineSettings(
            model=setting.model,
            shape=SHAPES[setting.model],
            dtype="float32",
            kv_memory_bytes=kv_bytes,
            oracle_kv_memory_bytes=None,
            host_memory_bytes=HOST_BYTES,
            block_tokens=BLOCK_TOKENS,
            max_model_len=setting.max_model_len,
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


def _requests(
    setting: Setting, rng: Random, name: str, arrivals_s: Iterable[float], prompt_tokens: int, output_tokens: int
) -> list[PlannedRequest]:
    ids = range(FIRST_ORDINARY_TOKEN_ID, SHAPES[setting.model].num_words)
    return [
        PlannedRequest(
            request_id=f"{name}-{index:03d}",
            arrival_s=arrival_s,
            prompt=rng.choices(ids, k=prompt_tokens),
            output_tokens=output_tokens,
        )
        for index, arrival_s in enumerate(arrivals_s)
    ]
