"""Reading `/metrics`."""

import pytest

from layerkv.bench.suite.server_metrics import quantile, read_metrics

TEXT = """# HELP vllm:num_requests_running Number of requests
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="m",source="device"} 32.0
vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="m",source="host"} 64.0
vllm:prompt_tokens_cached_by_source_created{engine="0",model_name="m",source="host"} 1.7e+09
vllm:request_queue_time_seconds_bucket{engine="0",le="0.5",model_name="m"} 3.0
vllm:request_queue_time_seconds_bucket{engine="0",le="1.0",model_name="m"} 4.0
vllm:request_queue_time_seconds_bucket{engine="0",le="+Inf",model_name="m"} 5.0
vllm:request_queue_time_seconds_count{engine="0",model_name="m"} 5.0
vllm:request_queue_time_seconds_sum{engine="0",model_name="m"} 7.5
layerkv_requests{engine="0",model_name="a{b}\\"c",residency="parked"} 6.0
layerkv_requests{engine="0",model_name="m",residency="resident"} 1.0
layerkv_waiting_requests{engine="0",model_name="m",resource="pool"} 3.0
layerkv_waiting_requests{engine="1",model_name="m",resource="pool"} 1.0
layerkv_waiting_requests{engine="0",model_name="m",resource="slot"} 2.0
layerkv_waiting_requests{engine="0",model_name="m",resource="link"} 0.0
layerkv_bytes_total{direction="store",engine="0",model_name="m"} 1.5e+06
layerkv_bytes_total{direction="load",engine="0",model_name="m"} 100.0
layerkv_recomputes_total{engine="0",model_name="m"} 2.0
process_cpu_seconds_total 12.5
not a metric at all
"""


def test_engines_are_added_up_and_labels_told_apart() -> None:
    metrics = read_metrics(TEXT)
    assert metrics.running == 5
    assert metrics.device_usage == 0.25
    assert (metrics.device_hit_tokens, metrics.host_hit_tokens) == (32, 64)
    assert metrics.parked == 6
    assert (metrics.bytes_stored, metrics.bytes_loaded) == (1_500_000, 100)
    assert metrics.recomputes == 2
    assert metrics.waiting_for == {"pool": 4, "slot": 2}


def test_host_blocks_are_those_of_requests_and_of_cached_prefixes() -> None:
    text = 'layerkv_host_blocks_used{engine="0"} 3.0\nlayerkv_host_blocks_cached{engine="0"} 4.0\n'
    assert read_metrics(text).host_blocks == 7


def test_the_queue_histogram_is_read_without_its_infinite_bound() -> None:
    metrics = read_metrics(TEXT)
    assert metrics.queue_buckets == [(0.5, 3.0), (1.0, 4.0)]
    assert (metrics.queue_count, metrics.queue_sum_s) == (5, 7.5)


def test_what_a_server_does_not_have_counts_as_nothing() -> None:
    metrics = read_metrics("")
    assert metrics.parks == 0
    assert metrics.queue_buckets == []


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, 0.0), (0.3, 0.25), (0.6, 0.5), (0.7, 0.75), (0.99, 1.0)],
)
def test_quantiles_are_interpolated_within_their_bucket(share: float, expected: float) -> None:
    assert quantile([(0.5, 3.0), (1.0, 4.0)], 5, share) == pytest.approx(expected)


def test_an_empty_histogram_has_quantile_zero() -> None:
    assert quantile([], 0, 0.5) == 0.0
