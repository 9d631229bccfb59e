"""Requests several times as long as device KV memory: exact tokens from host memory, and clear refusals without it."""

from __future__ import annotations

from typing import Any

import pytest

from layerkv.bench.tiny_model import SHAPES, make_tiny_model
from tests.vllm.engines_in_turn import Case, Turns, flag, prompt, run_in_turn
from tests.vllm.forked import Forks

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KV_BYTES = 3 << 20
KV_TOKENS = KV_BYTES // SHAPES["test"].kv_bytes_per_token
LONG = 4 * KV_TOKENS
MAX_TOKENS = 24
PROMPTS = [
    *(prompt(n, seed=n) for n in (30, 90, 60)),
    prompt(LONG, seed=1),  # a prompt that is longer than the pool
    *(prompt(n, seed=n) for n in (20, 70)),
    prompt(LONG, seed=3),  # and another: they take turns in the zone, which holds one of them
    prompt(140, seed=2),  # one that becomes so with its output
]


@pytest.fixture(scope="module")
def turns(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Turns:
    folder = tmp_path_factory.mktemp("long")
    zone = -(-(LONG + MAX_TOKENS) // 32) * 32
    layerkv: dict[str, Any] = {"long_contexts": True, "host_memory": "64MiB", "zone_tokens": zone}
    engine = {
        "model": str(make_tiny_model("test", folder)),
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": LONG + MAX_TOKENS,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": KV_BYTES,
    }
    calls: list[Any] = [(PROMPTS, {})]

    def case(name: str, extra: dict[str, Any], calls: list[Any] = calls) -> Case:
        return Case(name, {**engine, "kv_transfer_config": flag(**extra)}, calls, max_tokens=MAX_TOKENS)

    return run_in_turn(
        forks,
        [
            Case("stock", {**engine, "kv_cache_memory_bytes": 128 << 20}, calls, max_tokens=MAX_TOKENS),
            case("one lane", {**layerkv, "lanes": 1}),
            Case(
                "one lane and one retained layer",
                {
                    **engine,
                    "kv_cache_memory_bytes": 2 * KV_BYTES,
                    "kv_transfer_config": flag(**layerkv, lanes=1, retained_layers=1),
                },
                calls,
                max_tokens=MAX_TOKENS,
            ),
            case("not allowed", {**layerkv, "long_contexts": False, "lanes": 1}, []),
            case("small zone", {**layerkv, "lanes": 1, "zone_tokens": 512}, []),
            case("small host", {**layerkv, "lanes": 1, "host_memory": "4MiB"}, []),
        ],
        folder,
    )


@pytest.mark.parametrize("name", ["one lane", "one lane and one retained layer"])
def test_tokens_of_a_context_four_times_device_memory_are_stock_vllms(turns: Turns, name: str) -> None:
    stock, ours = turns["stock"], turns[name]
    assert stock.failure is None
    assert ours.failure is None
    [expected], [got] = stock.calls, ours.calls
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        assert have == want, (index, len(PROMPTS[index]))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("not allowed", "set long_contexts to true"),
        ("small zone", f"set zone_tokens to {LONG + MAX_TOKENS} or more"),
        ("small host", "set host_memory to"),
    ],
)
def test_what_cannot_be_served_is_refused_at_start_with_what_to_set(turns: Turns, name: str, advice: str) -> None:
    failure = turns[name].failure
    assert failure is not None
    assert f"max_model_len: found {LONG + MAX_TOKENS}, but the KV pool holds" in failure
    assert advice in failure
