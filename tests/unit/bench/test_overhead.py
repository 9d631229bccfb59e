"""What a step costs: the loads, whose turn it is, and what follows from what engines did."""

from collections.abc import Callable

import msgspec
import pytest

from layerkv.bench.load import PlannedRequest
from layerkv.bench.overhead import (
    BLOCK_TOKENS,
    ENGINES,
    ClosedLoop,
    Overload,
    Round,
    closed_loop,
    in_turns,
    overload,
    parts,
)
from layerkv.bench.overhead_engine import STAGES, Stretch, Turn


def stretch(wall_s: float, *, steps: int = 10, host_s: float = 0.0, is_last: bool = False, **ttft_s: float) -> Stretch:
    return Stretch(
        wall_s=wall_s,
        cpu_s=wall_s / 2,
        steps=steps,
        scheduled_tokens=300,
        output_tokens=100,
        ttft_s=ttft_s,
        host_s=dict.fromkeys(STAGES, host_s),
        is_last=is_last,
    )


def request(number: int, prompt_tokens: int = 2) -> PlannedRequest:
    return PlannedRequest(request_id=f"r{number}", arrival_s=0.0, prompt=[5] * prompt_tokens, output_tokens=3)


def test_where_memory_is_for_all_all_of_them_fit_beside_the_zone() -> None:
    made = parts(512)
    for name in ("closed_loop", "slots"):
        for requests in made[name].bursts.values():
            needed = sum(-(-(len(r.prompt) + r.output_tokens) // BLOCK_TOKENS) for r in requests)
            assert 1.1 * needed < made[name].kv_blocks
    assert made["closed_loop"].max_num_seqs >= max(made["closed_loop"].bursts)
    (queued,) = made["slots"].bursts.values()
    assert len(queued) > made["slots"].max_num_seqs


def test_the_saturated_load_comes_faster_than_its_pool_can_hold_it_and_no_slot_is_missing() -> None:
    part = parts(512)["saturated"]
    (requests,) = part.bursts.values()
    assert [len(r.prompt) for r in requests[:8]] == [300] * 7 + [700]
    assert requests[-1].arrival_s == pytest.approx(3.6, abs=0.05)
    assert {r.arrival_s for r in requests[:1]} == {0.0}
    assert part.max_num_seqs == len(requests) == 120
    assert sum(len(r.prompt) for r in requests) > 10 * part.kv_blocks * BLOCK_TOKENS


def test_every_round_of_a_part_gets_the_same_prompts() -> None:
    assert parts(512) == parts(512)


def engine(lengths: list[bool], heard: list[tuple[str, Turn]], name: str) -> Callable[[Turn], Stretch]:
    left = list(lengths)

    def run(turn: Turn) -> Stretch:
        heard.append((name, turn))
        return stretch(1.0, is_last=left.pop(0))

    return run


def test_engines_take_turns_until_each_is_through() -> None:
    heard: list[tuple[str, Turn]] = []
    engines = {"a": engine([False, True], heard, "a"), "b": engine([False, False, True], heard, "b")}
    round_ = in_turns(engines, [request(0)], 20)
    assert [name for name, _ in heard] == ["a", "b", "a", "b", "b"]
    assert [len(turn.requests) for _, turn in heard] == [1, 1, 0, 0, 0]
    assert {turn.steps for _, turn in heard} == {20}
    assert {name: len(stretches) for name, stretches in round_.items()} == {"a": 2, "b": 3}


def test_ratios_are_taken_turn_by_turn_and_a_disturbed_turn_does_not_count() -> None:
    stock = [stretch(1.0), stretch(2.0), stretch(4.0)]
    ours = [stretch(1.25), stretch(2.5), stretch(80.0)]
    rounds: list[Round] = [{"stock": stock, "layerkv": ours}, {"stock": stock, "layerkv": stock}]
    row = closed_loop("demo", 8, rounds)
    assert row.throughput_ratio_by_round == pytest.approx([0.8, 1.0])
    assert row.throughput_ratio == pytest.approx(0.9)
    assert row.step_ms == pytest.approx({"stock": 200.0, "layerkv": 225.0})
    assert row.cpu_ms == pytest.approx({"stock": 100.0, "layerkv": 112.5})


def test_host_time_is_per_step_by_engine_and_stage() -> None:
    rounds: list[Round] = [{"stock": [stretch(1.0)], "layerkv": [stretch(1.0, host_s=1e-3)]}]
    row = closed_loop("demo", 1, rounds)
    assert row.host_us == {"stock": dict.fromkeys(STAGES, 0.0), "layerkv": dict.fromkeys(STAGES, pytest.approx(100.0))}


def test_first_tokens_of_long_prompts_are_told_apart() -> None:
    requests = [request(0, 300), request(1, 700)]
    rounds: list[Round] = [{name: [stretch(1.0, r0=0.5, r1=2.0)] for name in ENGINES}]
    row = overload("test", requests, rounds)
    assert row.long_ttft_p99_s == {"stock": 2.0, "layerkv": 2.0}
    assert row.ttft_p99_s["stock"] == pytest.approx(2.0, abs=0.02)
    assert row.tokens_per_step["stock"] == 30.0
    assert overload("test", requests[:1], rounds).long_ttft_p99_s == {}


def test_other_tools_find_the_keys_that_they_were_promised() -> None:
    rounds: list[Round] = [{name: [stretch(1.0, r0=0.5)] for name in ENGINES}]
    promised = {"model", "throughput_ratio", "host_us"}
    closed: ClosedLoop = closed_loop("demo", 8, rounds)
    assert set(msgspec.to_builtins(closed)) >= promised | {"running", "step_ms"}
    waiting: Overload = overload("demo", [request(0)], rounds)
    assert set(msgspec.to_builtins(waiting)) >= promised | {"wall_s", "steps", "tokens_per_step"}
