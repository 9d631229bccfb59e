"""Engines that share memory: what they are asked for, and what is made of what was seen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from layerkv.bench import sharing
from layerkv.bench.machine import Machine
from layerkv.bench.overhead import Round
from layerkv.bench.overhead_engine import STAGES, Stretch
from layerkv.bench.records import Counters, LoadRun, RequestRecord, read_json, write_json
from layerkv.bench.sharing import chosen_parts, run_sharing
from layerkv.bench.sharing_constant import OUTPUT_TOKENS, RUNNING, constant_load, constant_part
from layerkv.bench.sharing_figures import HeldSample, IdleSeen, have_equal_tokens
from layerkv.bench.sharing_load import (
    BURSTS,
    DONOR,
    DONOR_REQUESTS,
    GIVE,
    IDLE_REQUESTS,
    NUM_BURSTS,
    PROBES_AT_S,
    SEGMENT_BYTES,
    TAKER,
    TAKER_REQUESTS,
    WITHIN_S,
    Bursts,
    engine_case,
    give_planned,
    idle_planned,
    planned,
)
from layerkv.bench.sharing_resize import ArenaMove, resize_speed, resizing_steps
from layerkv.bench.sharing_result import GIVES, WAYS, SharingResult, set_bursts, set_give, set_idle
from layerkv.bench.sharing_servers import Loaded, shared, split
from layerkv.bench.sharing_steps import MOST_STEPS, Move, Swing, watch_move
from layerkv.bench.sharing_tables import lines, print_part
from layerkv.bench.suite.engines import serve_command
from layerkv.errors import ConfigError, LayerKVError
from layerkv.scheduler.elastic import MOST_LEAVING, PoolView

MIB = 1 << 20


def made_result() -> SharingResult:
    made_here = {"command": "", "date": "", "versions": {}, "commit": None, "machine": Machine.here()}
    return SharingResult(parts=[], engines=2, burst_requests=1, priorities="none", seeds=[0], **made_here)


# What they are asked for ----------------------------------------------------------------------------------------------


def test_bursts_come_to_one_engine_after_the_other_and_are_the_same_for_every_way() -> None:
    bursts = Bursts(num_engines=3, burst_requests=4, period_s=7.0)
    for engine in range(3):
        requests = planned(bursts, engine, seed=1)
        assert requests == planned(bursts, engine, seed=1)
        assert len(requests) == NUM_BURSTS * 4
        for index, request in enumerate(requests):
            begins_s = (index // 4 * 3 + engine) * 7.0
            assert begins_s <= request.arrival_s <= begins_s + WITHIN_S
    assert planned(bursts, 0, seed=1) != planned(bursts, 0, seed=2)


def test_a_donor_is_full_of_decodes_before_bursts_come_to_the_other_engine() -> None:
    donor, taker = give_planned((2.0, 5.0), DONOR, 0), give_planned((2.0, 5.0), TAKER, 0)
    assert {request.arrival_s for request in donor} == {0.0}
    assert [request.arrival_s for request in taker] == [at_s for at_s in (2.0, 5.0) for _ in range(TAKER_REQUESTS)]
    assert len(donor) == DONOR_REQUESTS
    wanted = sum(len(request.prompt) + request.output_tokens for request in donor) * GIVE.kv_bytes_per_token
    assert wanted > GIVE.capacity_bytes, "it is short of memory even alone"
    assert 512 * GIVE.kv_bytes_per_token == SEGMENT_BYTES
    longest = max(len(request.prompt) + request.output_tokens for request in (*donor, *taker))
    assert longest < GIVE.max_model_len
    assert donor == give_planned((), DONOR, 0), "it does not depend on the bursts"
    assert donor != give_planned((), DONOR, 1)


def test_bursts_come_by_the_time_that_the_donor_takes_alone_on_this_machine() -> None:
    alone = made_load("nothing", DONOR, [made_request("donor-000", 0.0, [1.0, 30.0])])

    def run(loads: list[Any], seed: int) -> dict[int, Loaded]:
        assert len(loads) == 1
        assert len(loads[DONOR]) == DONOR_REQUESTS
        return {DONOR: Loaded(alone, start_s=100.0)}

    result = made_result()
    load = sharing._prepare_give(result, Console(quiet=True), {"nothing": SimpleNamespace(run=run)})  # type: ignore[dict-item]
    assert result.give_bursts_at_s == pytest.approx([9.0, 21.0])
    assert {request.arrival_s for request in load(TAKER, 0)} == set(result.give_bursts_at_s or ())


def test_an_idle_engine_is_asked_for_one_request_at_a_time_after_a_burst_that_fits_it() -> None:
    burst, probes = idle_planned(0)[:IDLE_REQUESTS], idle_planned(0)[IDLE_REQUESTS:]
    assert max(request.arrival_s for request in burst) <= WITHIN_S
    assert [request.arrival_s for request in probes] == list(PROBES_AT_S)
    needed = sum(len(request.prompt) + request.output_tokens for request in burst) * BURSTS.kv_bytes_per_token
    assert 0.6 * BURSTS.capacity_bytes < needed < 0.9 * BURSTS.capacity_bytes


def test_a_static_split_has_its_part_and_sharing_engines_have_a_floor_and_all_that_others_need_not_keep() -> None:
    static, together = split("static", "layerkv", BURSTS, 3), shared("shared", BURSTS, 3, compare={"give": "wait"})
    assert static.kv_bytes == 40 * MIB
    assert (static.broker_bytes, dict(static.options)) == (None, {})
    assert (together.kv_bytes, together.broker_bytes) == (12 * MIB, 120 * MIB)
    assert together.options == {"kv_floor": 12 * MIB, "kv_ceiling": 96 * MIB, "compare": {"give": "wait"}}


def test_the_way_to_give_reaches_the_command_line_of_the_server(tmp_path: Path) -> None:
    way = shared("wait", GIVE, 2, compare={"give": "wait"})
    assert way.options["kv_ceiling"] == GIVE.ceiling_bytes
    command = serve_command(
        engine_case(GIVE, way.kv_bytes),
        way.engine,
        model="m",
        port=1,
        kv_memory=way.kv_bytes,
        folder=tmp_path,
        connector_options=dict(way.options),
    )
    (flag,) = [text for text in command if text.startswith('{"kv_connector"')]
    assert msgspec.json.decode(flag)["kv_connector_extra_config"]["compare"] == {"give": "wait"}


def test_parts_are_named_alone_together_or_not_at_all() -> None:
    assert chosen_parts([]) == ["bursts", "give", "idle", "constant", "resize"]
    assert chosen_parts(["resize, give", "idle"]) == ["give", "idle", "resize"]
    with pytest.raises(ConfigError, match="--only: found 'giv'; expected some of bursts, give, idle, constant, resize"):
        chosen_parts(["giv"])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_engines": 1}, "--engines: found 1; expected 2 to 5"),
        ({"burst_requests": 0}, "--burst: found 0; expected 1"),
        ({"num_seeds": 0}, "--seeds: found 0; expected 1"),
        ({"period_s": 0.5}, "--period: found 0.5; expected 1 to 600 seconds"),
        ({"period_s": float("nan")}, "--period: found nan; expected 1 to 600 seconds"),
    ],
)
def test_numbers_that_measure_nothing_are_refused_before_anything_is_started(
    numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_sharing(None, **{"num_engines": 2, "burst_requests": 1, "num_seeds": 1, **numbers})


# What is made of it ---------------------------------------------------------------------------------------------------


def made_request(name: str, arrival_s: float, token_times_s: list[float], digest: str = "same") -> RequestRecord:
    return RequestRecord(
        request_id=name,
        arrival_s=arrival_s,
        prompt_tokens=3,
        output_tokens=len(token_times_s),
        token_times_s=token_times_s,
        token_digest=digest,
    )


def made_load(way: str, engine: int, requests: list[RequestRecord], seed: int = 0, **counted: int) -> LoadRun:
    counters = Counters(**counted)
    return LoadRun(
        engine=way, point=f"{engine}", seed=seed, requests=requests, samples=[], counters=counters, wall_s=9.0
    )


def made_run(way: str, engine: int, *, ttft_s: float, second_s: float, digest: str = "same") -> LoadRun:
    times = [1.0 + ttft_s, 1.0 + ttft_s + second_s, 1.0 + ttft_s + second_s + 0.01]
    return made_load(way, engine, [made_request("r", 1.0, times, digest)])


@pytest.mark.parametrize("digest", ["same", "other"])
def test_ratios_of_bursts_are_of_all_engines_together_within_a_seed(digest: str) -> None:
    seen = {"static_stock": (1.2, 0.1), "static": (0.3, 0.8), "shared": (0.3, 0.2)}
    runs = {
        way: {0: {engine: made_run(way, engine, ttft_s=ttft, second_s=second) for engine in range(2)}}
        for way, (ttft, second) in seen.items()
    }
    runs["shared"][0][1] = made_run("shared", 1, ttft_s=0.3, second_s=0.2, digest=digest)
    result = made_result()
    set_bursts(result, runs)
    assert result.ratios is not None
    assert result.ratios.ttft_mean_speedup_over_stock.median == pytest.approx(4.0)
    assert result.ratios.ttft_mean_over_static.median == pytest.approx(1.0)
    assert result.ratios.second_token_speedup_over_static.median == pytest.approx(4.0)
    assert result.tokens_equal is (digest == "same")
    assert result.shared is not None
    assert list(result.shared) == ["0", "1"]
    assert result.give is None


def test_where_no_request_of_a_static_split_is_fluid_there_is_no_ratio() -> None:
    late = {way: {0: {0: made_run(way, 0, ttft_s=5.0, second_s=0.1)}} for way in WAYS}
    result = made_result()
    set_bursts(result, late)
    assert result.ratios is not None
    assert result.ratios.fluid_goodput_over_static is None


def give_runs(gap_s: float, donor_end_s: float, *, recomputed: int = 0, parked: int = 0) -> dict[int, dict[int, Any]]:
    """A burst of two requests at 6 s, of which one waits so long for its third token."""
    donor = made_load(
        "w", DONOR, [made_request("donor", 0.0, [1.0, 2.0, donor_end_s])], preemptions=recomputed, parks=parked
    )
    calm = made_request("taker-0", 6.0, [6.5, 6.6, 6.7])
    held_up = made_request("taker-1", 6.0, [6.5, 6.6, 6.6 + gap_s])
    return {0: {DONOR: donor, TAKER: made_load("w", TAKER, [calm, held_up], parks=1)}}


def test_give_says_the_longest_gap_of_each_stream_the_donors_end_and_who_lost_kv() -> None:
    result = made_result()
    set_give(
        result,
        {
            "nothing": give_runs(0.4, 22.0),
            "wait": give_runs(2.1, 18.0),
            "recompute": give_runs(0.7, 22.0, recomputed=9),
            "park": give_runs(0.5, 20.0, parked=7),
        },
    )
    assert result.give is not None
    assert list(result.give) == ["nothing", "wait", "recompute", "park"]
    park = result.give["park"]
    assert park.longest_gap_max_s.median == pytest.approx(0.5)
    assert park.longest_gap_s.mean.median == pytest.approx((0.1 + 0.5) / 2), "of each stream its longest"
    assert (park.parked.median, park.recomputed.median) == (8, 0), "of both engines"
    assert result.give["recompute"].recomputed.median == 9
    assert park.donor_end_s.median == 20.0
    assert park.donor_was_there
    ratios = result.give_ratios
    assert ratios is not None
    assert ratios.longest_gap_speedup_over_wait.median == pytest.approx(2.1 / 0.5, rel=0.02)
    assert ratios.donor_end_over_recompute.median == pytest.approx(20 / 22)
    assert ratios.donor_end_over_nothing.median == pytest.approx(20 / 22)
    assert result.tokens_equal is True


def test_a_donor_that_had_ended_before_the_burst_is_told() -> None:
    runs = {way: give_runs(0.1, 4.0) for way in GIVES}
    result = made_result()
    set_give(result, runs)
    assert result.give is not None
    assert not result.give["park"].donor_was_there
    console = Console(record=True, width=200)
    print_part("give", result, console)
    assert "the donor had ended before the last burst came" in console.export_text()


def test_tokens_of_one_part_that_differ_are_not_forgotten_for_those_of_the_next() -> None:
    result = made_result()
    give = {way: give_runs(0.1, 9.0) for way in GIVES}
    give["wait"][0][TAKER].requests[0] = made_request("taker-0", 6.0, [6.5, 6.6, 6.7], "other")
    set_give(result, give)
    set_idle(result, [idle_seen()])
    assert result.tokens_equal is False


def test_tokens_are_compared_request_by_request_in_every_seed() -> None:
    def runs(digest: str) -> dict[int, dict[int, LoadRun]]:
        return {seed: {0: made_run("w", 0, ttft_s=0.1, second_s=0.1, digest=digest)} for seed in (0, 1)}

    assert have_equal_tokens({"a": runs("same"), "b": runs("same"), "c": runs("same")})
    assert not have_equal_tokens({"a": runs("same"), "b": runs("same"), "c": runs("other")})


def idle_seen(*, end_s: float = 6.0, first_s: float = 0.11, held_mib: int = 6) -> IdleSeen:
    """Sixty MiB are held until 2 s after the burst's end; each look finds 40 MiB more than the last one available."""

    def run(way: str, ttft_s: float) -> LoadRun:
        burst = made_request("burst-000", 0.0, [0.5, end_s])
        return made_load(
            way, 0, [burst, *(made_request(f"probe-{i}", at, [at + ttft_s]) for i, at in enumerate((16.0, 21.0)))]
        )

    held = [
        HeldSample(0.5 * i, (60 if 0.5 * i < end_s + 2 else held_mib) * MIB, (1000 + 40 * i) * MIB) for i in range(60)
    ]
    return IdleSeen(run("static", 0.1), run("elastic", first_s), held)


def test_idle_says_what_was_given_back_in_time_and_what_the_next_first_token_cost() -> None:
    result = made_result()
    set_idle(result, [idle_seen(), idle_seen(held_mib=9), idle_seen(first_s=0.1)])
    assert result.idle_freed_fraction == pytest.approx(0.9)
    assert result.first_token_after_idle_over_static == pytest.approx(1.1)
    assert result.idle is not None
    assert result.idle.freed_fraction.values == pytest.approx([0.9, 0.85, 0.9])
    assert result.idle.held_bytes_before.median == 60 * MIB
    assert result.idle.available_bytes_rise.median == 5 * 40 * MIB, "from the last token to 2.5 s after it"
    assert "90.0% of 60MiB" in lines("idle", result)[0]


def test_memory_that_comes_back_too_late_does_not_count() -> None:
    seen = idle_seen()
    late = [sample._replace(held_bytes=60 * MIB) if sample.at_s <= 8.5 else sample for sample in seen.held]
    result = made_result()
    set_idle(result, [seen._replace(held=late)])
    assert result.idle_freed_fraction == 0.0


def test_without_a_pause_before_the_next_request_there_is_no_figure_but_an_error() -> None:
    with pytest.raises(LayerKVError, match=r"last token came 14\.0 s after its start; expected 13\.5 s at the latest"):
        set_idle(made_result(), [idle_seen(end_s=14.0)])
    with pytest.raises(LayerKVError, match="nobody looked"):
        set_idle(made_result(), [idle_seen()._replace(held=[])])


def stretch(wall_s: float, host_s: float) -> Stretch:
    return Stretch(
        wall_s=wall_s,
        cpu_s=wall_s,
        steps=10,
        scheduled_tokens=300,
        output_tokens=100,
        ttft_s={},
        host_s=dict.fromkeys(STAGES, host_s),
        is_last=True,
    )


def test_constant_load_is_of_150_requests_that_fit_and_says_ratio_and_host_time_per_step() -> None:
    part = constant_part()
    assert len(part.bursts[RUNNING]) == RUNNING == part.max_num_seqs == 150
    assert part.kv_blocks * 32 > RUNNING * OUTPUT_TOKENS
    rounds: list[Round] = [{"elastic": [stretch(1.25, 3e-3)], "static": [stretch(1.0, 1e-3)]}]
    found = constant_load(rounds)
    assert found.throughput_ratio == pytest.approx(0.8)
    assert found.host_ms_per_step == pytest.approx({"static": 0.5, "elastic": 1.5})
    assert found.host_ms_per_step_added == pytest.approx(1.0)
    assert found.step_ms == pytest.approx({"static": 100.0, "elastic": 125.0})


def test_resize_speed_is_per_gib_and_leads_with_giving_back() -> None:
    moves = [ArenaMove(256 * MIB, grow_s=1e-4, touch_s=0.1, shrink_s=s * 1e-3) for s in (1, 2, 3)]
    found = resize_speed(moves)
    assert found.p50 == found.shrink.p50 == pytest.approx(8.0)
    assert found.p99 == pytest.approx(11.92)
    assert found.first_touch.p50 == pytest.approx(400.0)
    assert found.grow.p50 == pytest.approx(0.4)
    assert (found.moves, found.move_bytes) == (3, 256 * MIB)


def test_steps_in_which_segments_move_are_held_against_the_calm_ones_before_them() -> None:
    shrinks = Move(grows=False, moved_bytes=100, calm_s=[1.0, 1.0, 1.5], moving_s=[1.0, 1.3])
    slower = Move(grows=False, moved_bytes=100, calm_s=[2.0, 2.0, 2.0], moving_s=[2.2, 2.0])
    grows = Move(grows=True, moved_bytes=100, calm_s=[2.0, 2.0, 2.0], moving_s=[2.4])
    found = resizing_steps([shrinks, grows, slower])
    assert found.over_median == pytest.approx(1.2)
    assert found.growing == pytest.approx(1.2)
    assert found.shrinking == pytest.approx((1.3 + 1.1) / 2)
    assert found.worst == pytest.approx(1.3)
    assert found.calm == pytest.approx(1.0)
    assert (found.step_ms, found.moved_bytes, found.moves) == (2000.0, 100, 3)


POOL = PoolView(
    segment_blocks=10,
    ceiling=30,
    limit=30,
    in_service=[(segment, 5 if segment < 3 else 0) for segment in range(1, 20)],
    leaving=(),
    num_arriving=0,
    num_releasing=0,
    used_blocks=20,
    free_blocks=170,
    kept_blocks=0,
    wanted_blocks=0,
    parkable_blocks=0,
    ahead=0,
    idle_s=0.0,
    idle_after_s=2.0,
)


def test_a_pool_swings_between_all_segments_and_those_in_use_and_one() -> None:
    swing = Swing()
    assert swing(POOL).arrive == 10
    swing.grows = False
    decided = swing(POOL)
    assert decided.leave == tuple(range(12, 20))
    assert len(decided.leave) == MOST_LEAVING
    assert not {1, 2, 3} & set(swing(POOL._replace(in_service=POOL.in_service[:4])).leave), "3 is for tokens to come"
    swing.has_acted = False
    swing(POOL._replace(in_service=POOL.in_service[:3]))
    assert not swing.has_acted
    assert swing.is_settled


def test_steps_of_a_move_are_those_in_which_something_moves() -> None:
    swing, seconds = Swing(), iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    moving = iter([False, True, False, True, False])

    def step() -> float:
        step_s = next(seconds)
        swing.is_settled = step_s > 0.4  # between two batches nobody has looked yet
        return step_s

    assert watch_move(swing, step, lambda: next(moving)) == [0.2, 0.4]
    with pytest.raises(LayerKVError, match=f"not at its end after {MOST_STEPS} steps"):
        watch_move(swing, lambda: 0.1, lambda: True)


def test_other_tools_find_the_keys_that_they_were_promised_and_null_for_what_was_not_run(tmp_path: Path) -> None:
    result = made_result()
    set_give(result, {way: give_runs(0.1, 9.0) for way in GIVES})
    write_json(result, tmp_path / "sharing.json")
    written = read_json(tmp_path / "sharing.json", dict)
    assert written["schema"] == 1
    for key in (
        "static_stock",
        "static",
        "shared",
        "ratios",
        "idle_freed_fraction",
        "first_token_after_idle_over_static",
        "resize_ms_per_gib",
        "constant_load",
        "step_over_median_while_resizing",
    ):
        assert written[key] is None
    assert set(written["give"]) == {"nothing", "wait", "recompute", "park"}


def test_each_part_that_ends_is_in_the_file_though_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = resize_speed([ArenaMove(256 * MIB, grow_s=1e-4, touch_s=0.1, shrink_s=1e-3)])

    def no_engine(rounds: int, folder: Path) -> Any:
        raise LayerKVError("static was killed by SIGKILL: its log")

    move = Move(grows=True, moved_bytes=100, calm_s=[2.0], moving_s=[2.4])
    steps = resizing_steps([move, msgspec.structs.replace(move, grows=False)])
    monkeypatch.setattr(sharing, "PARTS", ("resize", "constant"))
    monkeypatch.setattr(sharing, "measure_arena", lambda: speed)
    monkeypatch.setattr(sharing, "measure_steps", lambda folder: steps)
    monkeypatch.setattr(sharing, "measure_constant_load", no_engine)
    path = tmp_path / "out" / "sharing.json"
    with pytest.raises(LayerKVError, match="killed by SIGKILL"):
        run_sharing(path, num_engines=2, burst_requests=1, num_seeds=1)
    written = read_json(path, dict)
    assert written["parts"] == ["resize"]
    assert written["resize_ms_per_gib"]["p50"] == pytest.approx(4.0)
    assert written["step_over_median_while_resizing"] == pytest.approx(1.2)
    assert written["constant_load"] is None
