"""Plans: the same for every engine, and what a case says."""

import json
from dataclasses import replace
from itertools import combinations, pairwise, permutations, takewhile
from pathlib import Path

import pytest

from layerkv.bench.suite.case import ENGINE_NAMES, SIZES, Case, load_case
from layerkv.bench.suite.engines import is_layerkv, kv_memory_bytes, serve_command
from layerkv.bench.suite.plan import plan_requests, total_tokens, warm_up_requests
from layerkv.bench.suite.run import rotated
from layerkv.config import load_policy

CASES = Path(__file__).parents[4] / "benchmarks" / "cases"


def case_of(name: str) -> Case:
    return load_case(CASES / f"{name}.yaml")


def test_a_plan_depends_on_point_and_seed_alone() -> None:
    case = case_of("rate_sweep")
    point = case.points[0]
    assert plan_requests(case, point, 1) == plan_requests(case, point, 1)
    assert plan_requests(case, point, 1) != plan_requests(case, point, 2)


def test_rates_differ_in_nothing_but_arrivals() -> None:
    case = case_of("rate_sweep")
    slow, fast = (plan_requests(case, replace(p, workload=case.points[0].workload), 0) for p in case.points[:2])
    assert [len(r.prompt) for r in slow] == [len(r.prompt) for r in fast]
    assert slow[-1].arrival_s > fast[-1].arrival_s


def test_later_turns_wait_for_the_turn_before_and_sessions_share_their_prefix() -> None:
    case = case_of("multi_turn")
    plan = plan_requests(case, case.points[0], 0)
    ids = {request.request_id for request in plan}
    first = [request for request in plan if request.after is None]
    assert len(first) == case.points[0].workload.num_requests
    assert all(request.after in ids for request in plan if request.after is not None)
    assert len({tuple(request.prompt[:256]) for request in first}) == 1
    assert len({tuple(request.prompt) for request in first}) == len(first)


def test_clients_of_a_closed_loop_ask_one_thing_after_the_other() -> None:
    case = case_of("closed_loop")
    point = case.points[0]
    plan = plan_requests(case, point, 0)
    first = [request for request in plan if request.after is None]
    assert len(first) == point.x == point.workload.num_requests
    assert max(request.arrival_s for request in first) < 0.1
    assert sorted(request.after for request in plan if request.after) == sorted(
        request.request_id for request in plan if not request.request_id.endswith("-5")
    )
    assert not any(request.history for request in plan if request.after)
    # No turn adds to the last one: lengths are those of single requests.
    assert all(200 <= len(request.prompt) <= 800 for request in plan)


def test_what_is_said_before_every_turn_of_a_client_is_the_shared_prefix() -> None:
    case = case_of("closed_loop")
    point = replace(case.points[0], sessions=replace(case.points[0].sessions, shared_prefix_tokens=64))
    assert len({tuple(request.prompt[:64]) for request in plan_requests(case, point, 0)}) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", SIZES)
def test_beyond_memory_several_long_requests_come_within_two_seconds(size: str, seed: int) -> None:
    case = load_case(CASES / "beyond_memory.yaml", size)
    plan = plan_requests(case, case.points[-1], seed)
    room = case.settings.kv_memory_bytes // case.settings.shape.kv_bytes_per_token  # type: ignore[union-attr]
    came_s = sorted(request.arrival_s for request in plan if len(request.prompt) > room)
    assert any(later - earlier < 1.0 for earlier, later in pairwise(came_s))


def test_of_requests_that_name_no_length_a_share_hangs_up_and_the_rest_may_fill_the_model() -> None:
    case = case_of("stop_strings")
    plan = plan_requests(case, case.points[0], 0)
    ends = case.points[0].ends
    assert ends is not None
    rooms = [case.settings.max_model_len - len(request.prompt) for request in plan]
    for request, room in zip(plan, rooms, strict=True):
        assert request.stop == list(ends.stop)
        assert (request.max_tokens or request.output_tokens) == room  # no engine is told more than that
        assert request.max_tokens is None or 20 <= request.output_tokens <= 100
    hang_up = [request.max_tokens is not None for request in plan]
    assert sum(hang_up) / len(plan) == pytest.approx(ends.hang_up_share, abs=0.07)
    again = plan_requests(case, replace(case.points[0], rate_per_s=1.0), 0)
    assert [request.max_tokens is not None for request in again] == hang_up


def test_whoever_would_have_more_patience_than_the_model_has_room_does_not_hang_up() -> None:
    case = case_of("stop_strings")
    point = replace(case.points[0], ends=replace(case.points[0].ends, hang_up_share=1.0))
    short = replace(case, settings=replace(case.settings, max_model_len=120))
    for request in plan_requests(short, point, 0):
        room = 120 - len(request.prompt)
        assert request.output_tokens <= room
        assert request.max_tokens == (room if request.output_tokens < room else None)


SHARING = (
    [1, 2, 3],
    [1, 2],
    [1, 2, 4, 5],
    [6, 2],
    [1, 2, 3, 40_000],
)


def case_of_trace(folder: Path, token_scale: float) -> Case:
    """It replays a Mooncake trace with these ids, the last block of each prompt not whole, at a scale."""
    rows = [
        {"timestamp": i, "input_length": 512 * len(ids) - 100, "output_length": 5, "hash_ids": ids}
        for i, ids in enumerate(SHARING)
    ]
    (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (CASES / "trace.yaml").read_text().replace("token_scale: 0.1", f"token_scale: {token_scale}")
    (folder / "case.yaml").write_text(text.replace("traces/made_up.jsonl", "trace.jsonl"))
    return load_case(folder / "case.yaml")


def plan_of_trace(folder: Path, token_scale: float, seed: int = 0) -> list[list[int]]:
    case = case_of_trace(folder, token_scale)
    return [request.prompt for request in plan_requests(case, case.points[0], seed)]


def test_a_result_says_how_much_of_its_load_repeats(tmp_path: Path) -> None:
    """The last prompt repeats a block only as far as it was there before."""
    repeated = 924 + 1024 + (1024 + 412)
    total = 15 * 512 - 5 * 100
    assert round(100 * repeated / total) == 47
    assert any(
        "47% of its prompt tokens" in n and "47.1% of those of the 5 req" in n for n in case_of_trace(tmp_path, 1).notes
    )
    assert not any("hash_ids" in note for note in case_of("trace").notes)


@pytest.mark.parametrize("token_scale", [0.1, 0.73, 0.05])
def test_prompts_of_a_trace_begin_alike_exactly_as_far_as_their_hash_ids(tmp_path: Path, token_scale: float) -> None:
    prompts = plan_of_trace(tmp_path, token_scale)
    assert [len(prompt) for prompt in prompts] == [round((512 * len(ids) - 100) * token_scale) for ids in SHARING]
    for (one, ids), (other, other_ids) in combinations(zip(prompts, SHARING, strict=True), 2):
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, other_ids, strict=False)))
        expected = min(round(512 * num_shared * token_scale), len(one), len(other))
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        assert same == expected, (ids, other_ids)


def test_a_block_says_the_same_wherever_it_stands_and_something_else_with_another_seed(tmp_path: Path) -> None:
    prompts = plan_of_trace(tmp_path, 0.1)
    assert prompts == plan_of_trace(tmp_path, 0.1)
    assert prompts[3][51:92] == prompts[0][51:92]
    other = plan_of_trace(tmp_path, 0.1, seed=1)
    assert other[0] != prompts[0]


def test_no_request_is_longer_than_the_model_takes() -> None:
    for name in ("rate_sweep", "context_sweep", "trace", "burst"):
        case = case_of(name)
        for point in case.points:
            for request in plan_requests(case, point, 0):
                assert len(request.prompt) + request.output_tokens <= case.settings.max_model_len
        for request in warm_up_requests(case):
            assert len(request.prompt) + request.output_tokens <= case.settings.max_model_len


def test_only_the_oracle_has_more_kv_memory_and_enough_for_all() -> None:
    case = case_of("burst")
    others = {kv_memory_bytes(case, engine, [0, 1]) for engine in case.engines if engine != "oracle"}
    assert others == {case.settings.kv_memory_bytes}
    assert case.settings.shape is not None
    for seed in (0, 1):
        needed = total_tokens(plan_requests(case, case.points[0], seed)) * case.settings.shape.kv_bytes_per_token
        assert kv_memory_bytes(case, "oracle", [0, 1]) > needed


def flags(tmp_path: Path, engine: str) -> list[str]:
    case = case_of("rate_sweep")
    return serve_command(case, engine, model="M", port=1234, kv_memory=99, folder=tmp_path)


def test_engines_differ_in_their_connector_and_nothing_else(tmp_path: Path) -> None:
    def common(engine: str) -> list[str]:
        given = flags(tmp_path, engine)
        for flag in ("--kv-transfer-config", "--watermark"):
            if flag in given:
                place = given.index(flag)
                del given[place : place + 2]
        return given

    stock = flags(tmp_path, "stock")
    for engine in ("stock-watermark", "vllm-cpu-offload", "layerkv", "layerkv-no-slo"):
        assert common(engine) == stock
        assert flags(tmp_path, engine) != stock


def test_only_the_oracle_has_a_slot_for_everybody_where_slots_are_short(tmp_path: Path) -> None:
    case = case_of("slots")

    def slots(engine: str) -> int:
        command = serve_command(case, engine, model="M", port=1234, kv_memory=99, folder=tmp_path)
        return int(command[command.index("--max-num-seqs") + 1])

    assert {engine: slots(engine) for engine in case.engines} == {"stock": 4, "layerkv": 4, "oracle": 64}
    needed = total_tokens(plan_requests(case, case.points[0], 0)) * case.settings.shape.kv_bytes_per_token  # type: ignore[union-attr]
    assert kv_memory_bytes(case, "stock", [0]) > needed


def test_without_objectives_the_policy_is_the_same_but_for_the_switch(tmp_path: Path) -> None:
    flags(tmp_path, "layerkv")
    flags(tmp_path, "layerkv-no-slo")
    ours, without = load_policy(tmp_path / "layerkv.slo.yaml"), load_policy(tmp_path / "layerkv-no-slo.slo.yaml")
    assert ours == case_of("rate_sweep").policy
    assert ours.policy == "fluid"
    assert without.policy == "arrival"
    assert without.classes == ours.classes


def test_only_layerkv_is_told_classes() -> None:
    assert [engine for engine in ENGINE_NAMES if is_layerkv(engine)] == ["layerkv", "layerkv-no-slo"]


@pytest.mark.parametrize("engines", [["a", "b"], ["a", "b", "c"], list("abcdef")])
def test_every_engine_comes_before_every_other_as_often_as_after_it(engines: list[str]) -> None:
    orders = [rotated(engines, seed) for seed in range(2 * len(engines))]
    assert all(sorted(order) == engines for order in orders)
    assert {order[0] for order in orders} == set(engines)
    for one, other in permutations(engines, 2):
        for pair in (orders[i : i + 2] for i in range(0, len(orders), 2)):
            assert [order.index(one) < order.index(other) for order in pair].count(True) == 1
