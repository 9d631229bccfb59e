"""`layerkv bench overhead` on real engines, with a load of a few requests: what is counted adds up."""

from pathlib import Path
from random import Random

import pytest

from layerkv.bench.load import PlannedRequest
from layerkv.bench.overhead import ENGINES, Part, Round, measure
from layerkv.errors import LayerKVError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPT_TOKENS, OUTPUT_TOKENS, TURN_STEPS = 40, 25, 10


def load(num_requests: int) -> list[PlannedRequest]:
    """Prompts of which none begins as another one does, also of another load."""
    rng = Random(num_requests)
    return [
        PlannedRequest(
            request_id=f"r{i}",
            arrival_s=0.01 * i,
            prompt=rng.choices(range(3, 512), k=PROMPT_TOKENS),
            output_tokens=OUTPUT_TOKENS,
        )
        for i in range(num_requests)
    ]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Round]]:
    pytest.importorskip("vllm")
    part = Part(max_num_seqs=4, kv_blocks=40, bursts={1: load(1), 3: load(3)}, turn_steps=TURN_STEPS)
    return measure(part, "test", 1, tmp_path_factory.mktemp("overhead"))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_all_tokens_of_a_burst_are_there_and_pauses_between_turns_lose_none(
    rounds: dict[int, list[Round]], engine: str, size: int
) -> None:
    (round_,) = rounds[size]
    stretches = round_[engine]
    assert [stretch.is_last for stretch in stretches] == [False] * (len(stretches) - 1) + [True]
    assert all(stretch.steps == TURN_STEPS for stretch in stretches[:-1])
    assert sum(stretch.output_tokens for stretch in stretches) == size * OUTPUT_TOKENS
    # The last token of each is made and not computed with.
    assert sum(stretch.scheduled_tokens for stretch in stretches) == size * (PROMPT_TOKENS + OUTPUT_TOKENS - 1)
    assert {i for stretch in stretches for i in stretch.ttft_s} == {f"r{i}" for i in range(size)}


def test_stages_are_parts_of_a_turn_and_stock_has_no_connector(rounds: dict[int, list[Round]]) -> None:
    for round_ in (found for of_size in rounds.values() for found in of_size):
        for stretch in (*round_["stock"], *round_["layerkv"]):
            assert sum(stretch.host_s.values()) < stretch.wall_s
            assert stretch.cpu_s > 0
            assert min(stretch.host_s[stage] for stage in ("schedule", "update", "front_end")) > 0
        for stage in ("metadata", "worker"):
            assert all(stretch.host_s[stage] == 0 for stretch in round_["stock"])
            assert all(stretch.host_s[stage] > 0 for stretch in round_["layerkv"])


def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    too_small = Part(max_num_seqs=4, kv_blocks=2, bursts={1: load(1)})
    with pytest.raises(LayerKVError, match="stock ended with exit status 1"):
        measure(too_small, "test", 1, tmp_path)
