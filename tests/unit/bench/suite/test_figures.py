"""Figures from records small enough to check by hand."""

import msgspec
import pytest

from layerkv.bench.records import Counters, LoadRun, RequestRecord, Sample
from layerkv.bench.suite.figures import engine_figures, engine_ratios, have_equal_tokens
from layerkv.bench.suite.readers import reading_of
from layerkv.config import SloClass, SloPolicy

POLICY = SloPolicy(
    classes={
        "chat": SloClass(name="chat", ttft_s=1.0, tpot_s=0.1),
        "batch": SloClass(name="batch", ttft_s=10.0, tpot_s=1.0),
        "whole": SloClass(name="whole", ttft_s=10.0, tpot_s=1.0, stream=False),
    },
    default_class="chat",
)


def record(number: int, arrival_s: float, times_s: list[float], **more: object) -> RequestRecord:
    fields = {"prompt_tokens": 10, "output_tokens": len(times_s), "token_digest": f"d{number}", "sent_s": arrival_s}
    return RequestRecord(request_id=f"r{number}", arrival_s=arrival_s, token_times_s=times_s, **{**fields, **more})


def run_of(*requests: RequestRecord, engine: str = "layerkv", seed: int = 0, **counters: object) -> LoadRun:
    return LoadRun(
        engine=engine,
        point="1",
        seed=seed,
        requests=list(requests),
        samples=[Sample(time_s=0, device_kv_bytes=5, host_kv_bytes=7, running=1, waiting=0, parked=0)],
        counters=Counters(**counters),
        wall_s=4.0,
    )


def test_latencies_count_from_the_due_time() -> None:
    run = run_of(record(0, 1.0, [1.5, 1.6, 1.8], sent_s=1.2), record(1, 2.0, [3.0]))
    figures = engine_figures([run], POLICY)
    assert figures.ttft_s.mean.median == pytest.approx(0.75)
    assert figures.tpot_s.mean.median == pytest.approx(0.15)
    assert figures.second_token_s.mean.median == pytest.approx(0.1)
    assert figures.time_between_tokens_s.p99.median == pytest.approx(0.2, abs=0.01)
    assert figures.end_to_end_s.mean.median == pytest.approx(0.9)
    assert figures.arrival_error_s.mean.median == pytest.approx(0.1)
    assert figures.output_tokens_per_s.median == pytest.approx(4 / 2.0)
    assert figures.peak_host_kv_bytes is not None
    assert figures.peak_host_kv_bytes.median == 7


def test_an_objective_is_met_with_ttft_and_tpot_and_an_end() -> None:
    assert reading_of(record(0, 0.0, [0.9, 0.95]), POLICY).met_slo
    assert not reading_of(record(0, 0.0, [1.1, 1.15]), POLICY).met_slo
    assert not reading_of(record(0, 0.0, [0.5, 0.7]), POLICY).met_slo
    assert reading_of(record(0, 0.0, [5.0, 5.5], slo_class="batch"), POLICY).met_slo
    assert not reading_of(record(0, 0.0, [0.5, 0.55], error="broke off"), POLICY).met_slo
    assert not reading_of(record(0, 0.0, []), POLICY).met_slo
    assert reading_of(record(0, 0.0, [0.5]), POLICY).met_slo


def test_failed_requests_are_counted_and_missed() -> None:
    run = run_of(record(0, 0.0, [0.5, 0.55]), record(1, 0.0, [], error="HTTP 500", token_digest=None))
    figures = engine_figures([run], POLICY)
    assert figures.num_failed.median == 1
    assert figures.slo_attainment.median == 0.5
    assert figures.slo_attainment_by_class["chat"].median == 0.5
    assert "batch" not in figures.slo_attainment_by_class
    assert figures.ttft_s.mean.median == 0.5


def test_requests_that_end_by_a_stop_string_or_whose_client_leaves_have_not_failed() -> None:
    run = run_of(
        record(0, 0.0, [0.5], output_tokens=90, end="stop"),
        record(1, 0.0, [0.5, 0.55, 0.6], output_tokens=3, end="hang_up"),
        record(2, 0.0, [0.5, 0.55], output_tokens=90, end="stop"),
        record(3, 0.0, [0.5], error="broke off", token_digest=None),
    )
    other = run_of(record(0, 0.0, [0.5, 0.6], end="length"), seed=1)
    figures = engine_figures([run, other], POLICY)
    assert {end: count.values for end, count in figures.ends.items()} == {
        "stop": [2, 0],
        "hang_up": [1, 0],
        "length": [0, 1],
    }
    assert figures.output_tokens is not None
    assert figures.output_tokens.values == [2.0, 2.0]
    assert figures.num_failed.values == [1, 0]
    assert figures.slo_attainment.values == [0.75, 1.0]


def test_lengths_of_answers_are_unknown_where_none_came_to_its_end() -> None:
    figures = engine_figures([run_of(record(0, 0.0, [], error="gone"))], POLICY)
    assert (figures.output_tokens, figures.ends) == (None, {})


def test_a_figure_is_the_median_over_seeds_with_its_spread() -> None:
    runs = [run_of(record(0, 0.0, [ttft]), seed=seed) for seed, ttft in enumerate((0.1, 0.5, 0.2))]
    mean = engine_figures(runs, POLICY).ttft_s.mean
    assert mean.values == pytest.approx([0.1, 0.5, 0.2])
    assert (mean.median, mean.spread) == (pytest.approx(0.2), pytest.approx(0.4))


def test_nothing_at_all_gives_figures_of_zero() -> None:
    figures = engine_figures([run_of(record(0, 0.0, [], error="gone"))], POLICY)
    assert figures.output_tokens_per_s.median == 0
    assert figures.goodput_rps.median == 0


def test_queue_percentiles_are_read_off_the_histogram() -> None:
    run = run_of(
        record(0, 0.0, [0.1]), queue_count=4, queue_sum_s=2.0, queue_buckets=[(0.5, 2.0), (1.0, 4.0)], num_steps=4
    )
    queue = engine_figures([run], POLICY).queue_s
    assert queue.mean.median == 0.5
    assert queue.p50.median == pytest.approx(0.5)
    assert queue.p90.median == pytest.approx(0.9)


def test_scheduler_time_is_missing_where_it_was_not_measured() -> None:
    assert engine_figures([run_of(record(0, 0.0, [0.1]))], POLICY).scheduler_s_per_step is None
    measured = engine_figures([run_of(record(0, 0.0, [0.1]), scheduler_cpu_s=0.2, num_steps=100)], POLICY)
    assert measured.scheduler_s_per_step is not None
    assert measured.scheduler_s_per_step.median == pytest.approx(0.002)


def test_ratios_are_taken_within_a_seed() -> None:
    ours = {seed: run_of(record(0, 0.0, [ttft, 2.0]), seed=seed) for seed, ttft in enumerate((0.1, 0.2))}
    stock = {seed: run_of(record(0, 0.0, [ttft, 2.0]), engine="stock", seed=seed) for seed, ttft in enumerate((1, 4))}
    ratios = engine_ratios({"layerkv": ours, "stock": stock}, POLICY)
    assert ratios.ttft_mean_speedup is not None
    assert ratios.ttft_mean_speedup.values == pytest.approx([10, 20])
    assert ratios.throughput_ratio is not None
    assert ratios.throughput_ratio.median == pytest.approx(1.0)
    assert ratios.ttft_mean_over_oracle is None
    assert ratios.ttft_mean_speedup_over.keys() == {"stock"}


def test_a_seed_that_an_engine_did_not_finish_is_left_out_of_ratios() -> None:
    ours = {seed: run_of(record(0, 0.0, [0.1]), seed=seed) for seed in (0, 1)}
    ratios = engine_ratios({"layerkv": ours, "stock": {1: run_of(record(0, 0.0, [0.3]), seed=1)}}, POLICY)
    assert ratios.ttft_mean_speedup is not None
    assert ratios.ttft_mean_speedup.values == pytest.approx([3.0])


def test_tokens_are_compared_request_by_request() -> None:
    one, same = run_of(record(0, 0.0, [1.0])), run_of(record(0, 5.0, [9.0]))
    other = run_of(record(0, 0.0, [1.0], token_digest="else"))
    assert have_equal_tokens({0: one}, {0: same}) is True
    assert have_equal_tokens({0: one}, {0: other}) is False
    assert have_equal_tokens({0: one}, {1: same}) is None


def test_tokens_of_requests_that_one_engine_did_not_finish_are_not_compared() -> None:
    one = run_of(record(0, 0.0, [1.0]), record(1, 0.0, [1.0], token_digest=None, error="HTTP 429"))
    other = run_of(record(0, 0.0, [1.0]), record(1, 0.0, [1.0]))
    assert have_equal_tokens({0: one}, {0: other}) is True
    nothing = run_of(record(0, 0.0, [], token_digest=None, error="gone"))
    assert have_equal_tokens({0: nothing}, {0: nothing}) is None


def test_an_engine_that_drops_requests_gets_no_ratio_of_first_tokens() -> None:
    ours = {0: run_of(record(0, 0.0, [0.1]), record(1, 0.0, [], error="HTTP 500"))}
    stock = {0: run_of(record(0, 0.0, [1.0]), record(1, 0.0, [9.0]), engine="stock")}
    ratios = engine_ratios({"layerkv": ours, "stock": stock}, POLICY)
    assert ratios.ttft_mean_speedup is None
    assert ratios.goodput_ratio is not None


def test_a_seed_without_first_tokens_does_not_count_as_the_fastest() -> None:
    runs = [run_of(record(0, 0.0, [0.5])), run_of(record(0, 0.0, [], error="gone"), seed=1)]
    assert engine_figures(runs, POLICY).ttft_s.mean.values == [0.5]


def test_what_an_engine_does_not_tell_is_not_zero() -> None:
    run = run_of(record(0, 0.0, [0.1]), bytes_stored=None)
    silent = [Sample(time_s=0, device_kv_bytes=5, host_kv_bytes=None, running=1, waiting=0, parked=0)]
    figures = engine_figures(
        [LoadRun(**{**{f: getattr(run, f) for f in run.__struct_fields__}, "samples": silent})], POLICY
    )
    assert figures.bytes_stored is None
    assert figures.peak_host_kv_bytes is None


def test_what_was_waited_for_is_shared_out_by_samples_of_the_seeds_in_which_anybody_waited() -> None:
    waited = [[{"pool": 3, "slot": 1}, {}, {"pool": 3, "compute": 1}], [{"slot": 2}], [{}]]
    runs = []
    for seed, of in enumerate(waited):
        at = {"device_kv_bytes": 5, "host_kv_bytes": 7, "running": 1, "waiting": 4, "parked": 0}
        samples = [Sample(time_s=i, waiting_for=each, **at) for i, each in enumerate(of)]
        run = run_of(record(0, 0.0, [0.1]), seed=seed)
        runs.append(msgspec.structs.replace(run, samples=samples))
    found = engine_figures(runs, POLICY).waited_for
    assert {name: spread.values for name, spread in found.items()} == {
        "compute": [0.125, 0.0],
        "pool": [0.75, 0.0],
        "slot": [0.125, 1.0],
    }
    assert not engine_figures(runs[2:], POLICY).waited_for


def probed(seed: int, longest_probe_s: float | None) -> LoadRun:
    return msgspec.structs.replace(run_of(record(0, 0.0, [1.0]), seed=seed), longest_probe_s=longest_probe_s)


def test_the_longest_probe_is_that_of_all_seeds_and_one_disturbed_seed_disturbs_the_figures() -> None:
    figures = engine_figures([probed(0, 0.02), probed(1, 0.31), probed(2, 0.01)], POLICY)
    assert (figures.longest_probe_s, figures.disturbed) == (0.31, True)
    figures = engine_figures([probed(0, 0.02), probed(1, 0.3)], POLICY)
    assert (figures.longest_probe_s, figures.disturbed) == (0.3, False)


def test_where_nobody_asked_for_health_nothing_is_said_of_it() -> None:
    figures = engine_figures([probed(0, None)], POLICY)
    assert (figures.longest_probe_s, figures.disturbed) == (None, False)


def paused(number: int, pause_s: float, **more: object) -> RequestRecord:
    """Four tokens at the pace of its reader, but for one pause before the third."""
    return record(number, 0.0, [0.5, 0.6, 0.7 + pause_s, 0.8 + pause_s], **more)


def test_readers_are_served_without_a_pause_if_they_begin_in_time_and_wait_for_at_most_a_second() -> None:
    run = run_of(paused(0, 0.0), paused(1, 0.9), paused(2, 1.5), record(3, 0.0, [1.2, 1.3]), paused(4, 0.0, error="x"))
    figures = engine_figures([run], POLICY)
    assert figures.fluid is not None
    assert figures.fluid_goodput_rps is not None
    assert figures.fluid.values == [2 / 5]
    assert figures.fluid_goodput_rps.median == pytest.approx(2 / 2.3)
    assert figures.lag_s is not None
    assert figures.longest_pause_s is not None
    assert figures.lag_s.mean.median == pytest.approx((0.9 + 1.5) / 5)
    assert figures.longest_pause_s.p99.median == pytest.approx(1.5 - 0.04 * 0.6)


def test_tokens_on_time_are_a_share_of_those_that_came() -> None:
    # Due by 1.0, 1.1, 1.2 and 1.3 s: a pause of 0.9 s makes two of four late.
    figures = engine_figures([run_of(paused(0, 0.9), paused(1, 0.0), record(2, 0.0, [], error="gone"))], POLICY)
    assert figures.tokens_on_time is not None
    assert figures.tokens_on_time.median == 6 / 8
    assert figures.fluidity_index is not None
    assert figures.fluidity_index.median < 1


def test_what_nobody_reads_as_it_comes_flows_if_it_met_its_objectives_and_has_no_lag() -> None:
    late = record(0, 0.0, [0.5, 0.6, 2.4], slo_class="whole")
    too_late = record(1, 0.0, [0.5, 0.6, 3.5], slo_class="whole")
    figures = engine_figures([run_of(late, too_late)], POLICY)
    assert figures.fluid is not None
    assert figures.fluid.median == 0.5
    assert (figures.lag_s, figures.longest_pause_s) == (None, None)
    assert figures.tokens_on_time is not None
    assert figures.tokens_on_time.median == 1.0  # due by 10 s and later
    beside = engine_figures([run_of(late, paused(2, 0.2))], POLICY)
    assert beside.lag_s is not None
    assert beside.lag_s.mean.median == pytest.approx(0.2)


def test_an_engine_that_served_nothing_has_no_lag_and_no_fluid_request() -> None:
    figures = engine_figures([run_of(record(0, 0.0, [], error="gone"))], POLICY)
    assert figures.fluid is not None
    assert figures.fluid.median == 0
    assert (figures.lag_s, figures.tokens_on_time, figures.fluidity_index) == (None, None, None)


def test_what_layerkv_gains_for_readers_is_a_difference_of_shares_within_a_seed() -> None:
    ours = {0: run_of(paused(0, 0.0), paused(1, 0.0)), 1: run_of(paused(0, 0.0), paused(1, 2.0), seed=1)}
    stock = {seed: run_of(paused(0, 2.0), paused(1, 0.0), engine="stock", seed=seed) for seed in (0, 1)}
    gain = engine_ratios({"layerkv": ours, "stock": stock}, POLICY).fluid_gain
    assert gain is not None
    assert gain.values == [0.5, 0.0]
