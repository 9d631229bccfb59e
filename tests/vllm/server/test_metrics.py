import pytest

from layerkv.metrics import METRICS, MetricSpec
from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.conftest import PressedLoad
from tests.vllm.server.served import BLOCK_BYTES, BLOCK_TOKENS, CLASSES, KV_BLOCKS, LANES, SHAPE, Server, is_idle

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_every_metric_is_exported_with_its_type_and_help(server: Server, spec: MetricSpec) -> None:
    samples = server.metrics()
    assert samples.helps[spec.name] == spec.help
    assert samples.kinds[spec.name] == spec.kind


def test_what_is_stored_and_loaded_fits_the_parks_and_fetches(pressed: PressedLoad) -> None:
    parks, fetches = pressed.grown("layerkv_parks_total"), pressed.grown("layerkv_fetches_total")
    stored, loaded = (pressed.grown("layerkv_bytes_total", way) for way in ("store", "load"))
    assert stored % BLOCK_BYTES == loaded % BLOCK_BYTES == 0
    fewest_blocks = -(-min(map(len, pressed.prompts)) // BLOCK_TOKENS)
    assert stored >= parks * fewest_blocks * BLOCK_BYTES  # whoever is parked has its whole prompt in host memory
    assert 0 < fetches <= parks  # the others found their KV in the prefix cache
    assert loaded >= fetches * BLOCK_BYTES
    for way in ("store", "load"):
        assert pressed.grown("layerkv_copy_seconds_total", way) > 0


def test_every_request_is_counted_once_in_waits_and_first_tokens(pressed: PressedLoad) -> None:
    num_requests = len(pressed.prompts)
    assert pressed.grown("layerkv_admission_wait_seconds_count") == num_requests
    by_class = [
        pressed.grown(f"layerkv_ttft_slo_{outcome}_total", name) for name in CLASSES for outcome in ("met", "missed")
    ]
    assert sum(by_class) == num_requests


def test_vllms_preemptions_are_layerkvs_parks(pressed: PressedLoad) -> None:
    assert pressed.grown("layerkv_recomputes_total") == 0
    assert pressed.grown("vllm:num_preemptions_total") == pressed.grown("layerkv_parks_total")


def test_an_idle_server_says_that_nothing_is_taken(server: Server) -> None:
    server.wait_until_idle()
    server.complete(prompt(10, seed=400), 4)  # its last step copies nothing and counts nothing: only gauges change
    assert is_idle(server.wait_until_idle())


def test_pool_and_zone_fit_the_kv_memory_that_was_given(server: Server) -> None:
    samples = server.metrics()
    pool, zone = samples("layerkv_pool_blocks"), samples("layerkv_zone_blocks")
    null_block = 1
    assert zone > 0
    assert (pool + null_block) * SHAPE.num_layers + zone * LANES <= KV_BLOCKS * SHAPE.num_layers


@pytest.mark.parametrize("name", CLASSES)
def test_first_tokens_are_counted_under_the_class_that_the_request_names(server: Server, name: str) -> None:
    def counted() -> dict[str, float]:
        samples = server.metrics()
        return {
            each: samples("layerkv_ttft_slo_met_total", each) + samples("layerkv_ttft_slo_missed_total", each)
            for each in CLASSES
        }

    server.wait_until_idle()
    before = counted()
    server.complete(prompt(50, seed=401), 4, vllm_xargs={"slo_class": name})
    server.wait_until_idle()
    assert counted() == {**before, name: before[name] + 1}
