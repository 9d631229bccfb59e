import json

import msgspec
import pytest

from layerkv.bench.demo import Outcomes
from layerkv.bench.metrics import (
    DemoResult,
    Distribution,
    EngineFailure,
    differing_requests,
    engine_figures,
    engine_ratios,
)
from tests.unit.bench import made_records as made

ENGINE_KEYS = {
    "ttft_s",
    "tpot_s",
    "time_between_tokens_s",
    "second_token_s",
    "end_to_end_s",
    "lag_s",
    "longest_pause_s",
    "queue_s",
    "fluid",
    "tokens_on_time",
    "fluid_goodput_rps",
    "fluidity_index",
    "output_tokens_per_s",
    "preemptions",
    "bytes_stored",
    "bytes_loaded",
    "wall_s",
}
RATIO_KEYS = {"ttft_mean_speedup", "ttft_p99_speedup", "throughput_ratio", "ttft_mean_over_oracle", "fluid_gain"}


def test_percentiles_interpolate_between_samples() -> None:
    distribution = Distribution.of(range(101))
    assert (distribution.mean, distribution.p50, distribution.p90, distribution.p99) == (50, 50, 90, 99)
    assert Distribution.of([1.0, 2.0]).p50 == 1.5


def test_a_distribution_of_nothing_is_zero() -> None:
    assert Distribution.of([]) == Distribution(0.0, 0.0, 0.0, 0.0)


def test_times_to_first_token_count_from_the_scheduled_arrival() -> None:
    figures = engine_figures(made.stock_run())  # 1 s, and 11 s - 1 s
    assert figures.ttft_s.mean == pytest.approx((1 + 10) / 2)
    assert figures.ttft_s.p99 == pytest.approx(1 + 0.99 * 9)


def test_queueing_ends_with_the_first_scheduling() -> None:
    assert engine_figures(made.stock_run()).queue_s.mean == pytest.approx((0 + 9) / 2)


def test_a_stall_shows_in_second_token_and_pooled_gaps_and_is_averaged_in_tpot() -> None:
    figures = engine_figures(made.layerkv_run())  # gaps 1, 1 and 10, 1
    assert figures.second_token_s.mean == pytest.approx((1 + 10) / 2)
    assert figures.tpot_s.mean == pytest.approx((1 + 5.5) / 2)
    assert figures.time_between_tokens_s.mean == pytest.approx(13 / 4)
    assert figures.time_between_tokens_s.p99 == pytest.approx(1 + 0.97 * 9)


def test_throughput_runs_from_the_first_arrival_to_the_last_token() -> None:
    late = [made.request(0, 2.0, 2.0, [3.0, 4.0]), made.request(1, 3.0, 3.0, [5.0, 6.0])]
    assert engine_figures(made.engine_run("stock", late)).output_tokens_per_s == pytest.approx(4 / (6 - 2))


def test_requests_without_tokens_are_left_out_of_the_figures_that_need_them() -> None:
    run = made.engine_run(
        "stock",
        [made.request(0, 0.0, None, []), made.request(1, 0.0, 1.0, [2.0]), *made.stock_run().requests[:1]],
    )
    figures = engine_figures(run)
    assert figures.ttft_s.mean == pytest.approx((2 + 1) / 2)
    assert figures.second_token_s.mean == 1.0
    assert figures.queue_s.mean == pytest.approx((1 + 0) / 2)


def test_a_run_without_any_token_has_zero_throughput() -> None:
    assert engine_figures(made.engine_run("stock", [made.request(0, 0.0, None, [])])).output_tokens_per_s == 0.0


def test_ratios_put_stock_over_layerkv_for_times_and_layerkv_over_stock_for_throughput() -> None:
    ratios = made.result().ratios
    assert ratios.ttft_mean_speedup == pytest.approx(5.5 / 1.0)
    assert ratios.ttft_p99_speedup == pytest.approx(9.91 / 1.0)
    assert ratios.throughput_ratio == pytest.approx(1.0)
    assert ratios.ttft_mean_over_oracle == pytest.approx(1.0)


@pytest.mark.parametrize("missing", ["stock", "layerkv", "oracle"])
def test_ratios_against_a_missing_engine_are_none(missing: str) -> None:
    runs = {name: run for name, run in made.all_runs().items() if name != missing}
    ratios = msgspec.to_builtins(engine_ratios(runs))
    against_stock = {key: ratios[key] for key in RATIO_KEYS - {"ttft_mean_over_oracle"}}
    assert all((value is None) == (missing != "oracle") for value in against_stock.values())
    assert (ratios["ttft_mean_over_oracle"] is None) == (missing != "stock")


def test_differing_requests_are_named_whether_changed_or_missing() -> None:
    left, right = made.stock_run(), made.oracle_run()
    assert differing_requests(left, right) == []
    right.requests[1].token_ids[-1] += 1
    assert differing_requests(left, right) == ["request-001"]
    left.requests.pop(0)
    assert differing_requests(left, right) == ["request-000", "request-001"]


def test_result_json_has_the_keys_that_other_tools_read() -> None:
    written = json.loads(msgspec.json.encode(made.result()))
    assert written["schema"] == 1
    assert set(written["engines"]) == {"stock", "layerkv", "oracle"}
    for engine in written["engines"].values():
        assert set(engine) >= ENGINE_KEYS
        for key in ENGINE_KEYS:
            if key.endswith("_s") and key not in ("wall_s", "output_tokens_per_s"):
                assert set(engine[key]) == {"mean", "p50", "p90", "p99"}
    assert set(written["ratios"]) == RATIO_KEYS
    assert written["tokens_equal"] is True
    assert {"command", "machine", "versions", "seed", "date", "load"} <= set(written)


def test_a_result_with_a_failed_engine_is_marked_and_reads_back_as_it_was() -> None:
    runs = {name: run for name, run in made.all_runs().items() if name != "layerkv"}
    failure = EngineFailure(reason="ended with exit status 1", log_tail=["boom"])
    result = made.result(Outcomes(runs=runs, failures={"layerkv": failure}))
    assert not result.complete
    assert result.tokens_equal is None
    assert msgspec.json.decode(msgspec.json.encode(result), type=DemoResult) == result
