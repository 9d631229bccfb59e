import itertools
import json
from dataclasses import replace

import pytest

from layerkv.core.cost import CostView, StepWork, chunk_pairs, parse_profile
from layerkv.errors import ConfigError
from layerkv.sim.presets import ALL_REDUCE_LATENCY_S, DEVICES, MODELS, Preset, derive_profile, kv_memory_bytes, preset

GIB = 1 << 30
ALL = [(device, model, tp) for device, model, tp in itertools.product(DEVICES, MODELS, (1, 2, 4, 8))]


def decode_s(chosen: Preset, *, num_decodes: int = 1, context: int = 1000) -> float:
    return CostView(chosen.profile).step_s(StepWork(num_decodes=num_decodes, decode_context=context))


@pytest.mark.parametrize(
    ("model", "parameters", "kv_kib"),
    [
        ("llama-2-7b", 6_738_415_616, 512),
        ("llama-3.1-8b", 8_030_261_248, 128),
        ("yi-34b", 34_388_917_248, 240),
        ("llama-3.1-70b", 70_553_706_496, 320),
        ("deepseek-v2-lite", 15_706_484_224, 27 * 576 * 2 / 1024),
        ("gpt-oss-20b", 20_914_757_184, 12 * 2 * 8 * 64 * 2 / 1024),
    ],
)
def test_parameters_and_kv_bytes_are_those_of_the_published_model(model: str, parameters: int, kv_kib: float) -> None:
    assert MODELS[model].parameters == parameters
    assert MODELS[model].kv_bytes_per_token == kv_kib * 1024


def test_experts_in_four_bits_make_the_published_checkpoint() -> None:
    assert MODELS["gpt-oss-20b"].weight_bytes == 13_761_264_768
    assert MODELS["deepseek-v2-lite"].weight_bytes == 2 * 15_706_484_224


@pytest.mark.parametrize(("model", "billions"), [("deepseek-v2-lite", 2.4), ("gpt-oss-20b", 3.6)])
def test_a_token_is_computed_by_as_many_parameters_as_published(model: str, billions: float) -> None:
    head = MODELS[model].vocab_size * MODELS[model].hidden_size
    assert (MODELS[model].token_parameters + head) / 1e9 == pytest.approx(billions, abs=0.06)


def test_few_tokens_read_few_experts_and_many_read_all() -> None:
    model, device = MODELS["deepseek-v2-lite"], DEVICES["H100"]
    tokens = derive_profile(device, model, 1).tokens
    bytes_per_s = 0.8 * device.memory_bytes_per_s
    routed_bytes = 26 * 64 * 3 * 2048 * 1408 * 2
    one = model.step_weight_bytes - routed_bytes * 58 / 64
    assert tokens(1) == pytest.approx(one / bytes_per_s)
    assert tokens(2) == pytest.approx((one + routed_bytes * 6 / 64 * 58 / 64) / bytes_per_s)
    assert tokens(128) == pytest.approx(model.step_weight_bytes / bytes_per_s, rel=1e-3)


def test_latent_attention_reads_one_vector_for_all_heads_and_computes_with_each() -> None:
    model, device = MODELS["deepseek-v2-lite"], DEVICES["H100"]
    assert derive_profile(device, model, 1).decode_context(1000) == pytest.approx(
        1000 * 27 * 576 * 2 / (0.8 * device.memory_bytes_per_s)
    )
    # DeepSeek V2 itself has 128 heads: there a decode is bound by computing them.
    many = derive_profile(device, replace(model, num_heads=128), 1)
    flops = 27 * 128 * 2 * (576 + 512)
    assert many.decode_context(1000) == pytest.approx(1000 * flops / (0.55 * device.flops_per_s))
    assert many.pair_s == pytest.approx(27 * 128 * 2 * (192 + 128) / (0.55 * device.flops_per_s))


def test_window_layers_cost_a_request_and_a_token_the_same_whatever_the_context() -> None:
    model, device = MODELS["gpt-oss-20b"], DEVICES["L20"]
    full = replace(model, window=None)
    windowed, without = (derive_profile(device, each, 1) for each in (model, full))
    assert windowed.decode_context(1000) == pytest.approx(without.decode_context(1000) / 2)
    assert windowed.pair_s == pytest.approx(without.pair_s / 2)
    window_bytes = 12 * 128 * 2 * 8 * 64 * 2
    assert windowed.request_s - without.request_s == pytest.approx(window_bytes / (0.8 * 864e9))
    window_flops = 12 * 128 * 64 * 4 * 64
    more_s = windowed.tokens(8192) - without.tokens(8192)
    assert more_s == pytest.approx(8192 * window_flops / (0.55 * device.flops_per_s))


def test_latent_attention_is_not_split_over_gpus() -> None:
    with pytest.raises(ConfigError, match="expected a number that divides the heads of deepseek-v2-lite: 1;"):
        preset("H100", "deepseek-v2-lite", 2)


def test_one_decode_of_a_7b_on_an_a100_takes_as_long_as_reading_its_weights() -> None:
    # 13.2 GB without the embedding at 80 % of 2039 GB/s are 8.1 ms; beside them 2.5 ms of CPU and 0.5 GB of KV.
    assert decode_s(preset("A100", "llama-2-7b", 1), context=0) == pytest.approx(8.1e-3 + 2.5e-3, rel=0.02)
    assert decode_s(preset("A100", "llama-2-7b", 1), context=1000) == pytest.approx(8.1e-3 + 2.5e-3 + 0.32e-3, rel=0.02)


def test_small_batches_are_bound_by_memory_and_cost_the_same_tokens_curve() -> None:
    tokens = preset("A100", "llama-2-7b", 1).profile.tokens
    assert tokens(1) == tokens(32) == tokens(100)
    assert tokens(200) > tokens(100)


def test_a_long_prefill_of_a_7b_on_an_l20_is_bound_by_compute() -> None:
    # 2 * 6.48e9 FLOPs per token at 55 % of 119.5 TFLOP/s are 197 us.
    view = CostView(preset("L20", "llama-2-7b", 1).profile)
    pairs_s = 4 * 32 * 4096 * chunk_pairs(4096, 0) / (0.55 * 119.5e12)
    assert view.prefill_s(4096) == pytest.approx(4096 * 197e-6 + pairs_s, rel=0.01)


def test_a_step_without_tokens_reads_no_weights_so_that_a_prefill_alone_pays_for_them() -> None:
    profile = preset("H100", "llama-3.1-8b", 1).profile
    assert profile.tokens(0) == 0
    assert CostView(profile).prefill_s(1) > 16e9 * 0.8 / 3350e9


def test_a_copy_over_pcie_4_takes_a_gigabyte_in_a_24th_of_a_second_and_less_over_two_links() -> None:
    one, two = (preset("L20", "yi-34b", tp).profile for tp in (1, 2))
    assert one.store(10**9) == pytest.approx(1 / 24, rel=0.01)
    assert one.load == one.store
    assert two.load(10**9) == pytest.approx(1 / 48, rel=0.01)


def test_two_gpus_halve_the_work_and_add_two_all_reduces_per_layer() -> None:
    one, two = (preset("L20", "yi-34b", tp).profile for tp in (1, 2))
    reduce_s = 120 * (ALL_REDUCE_LATENCY_S + 4096 * 7168 * 2 / 20e9)  # with two ranks, the ring sends each byte once
    assert two.tokens(4096) == pytest.approx(one.tokens(4096) / 2 + reduce_s, rel=1e-6)
    assert two.pair_s == pytest.approx(one.pair_s / 2)
    assert two.decode_context(10_000) == pytest.approx(one.decode_context(10_000) / 2)
    assert two.kv_bytes_per_token == one.kv_bytes_per_token


def test_faster_devices_are_faster_and_larger_models_slower() -> None:
    by_device = [decode_s(preset(name, "llama-2-7b", 1)) for name in ("L20", "A100", "H100", "H200")]
    assert by_device == sorted(by_device, reverse=True)
    dense = [name for name, model in MODELS.items() if model.experts is None]
    by_model = [decode_s(preset("H200", name, 1)) for name in dense]
    assert by_model == sorted(by_model)


@pytest.mark.parametrize(("device", "model", "tp"), ALL)
def test_every_derived_profile_grows_and_survives_its_json(device: str, model: str, tp: int) -> None:
    profile = derive_profile(DEVICES[device], MODELS[model], tp)
    # The reader refuses curves that fall.
    assert parse_profile(profile.to_json(), where="profile.json") == profile
    costs = [profile.tokens(n) for n in range(0, 20_000, 50)]
    assert costs == sorted(costs)
    assert json.loads(profile.to_json())["made"]["device"] == DEVICES[device].source


def test_every_preset_says_where_its_figures_come_from() -> None:
    assert all("data sheet" in device.source for device in DEVICES.values())
    assert all("config.json" in model.source for model in MODELS.values())
    assert all(name == item.name for items in (DEVICES, MODELS) for name, item in items.items())


def test_kv_memory_is_what_weights_and_activations_leave() -> None:
    # 90 % of 45.0 GiB less 12.6 GiB of weights less 2 GiB.
    assert kv_memory_bytes(DEVICES["L20"], MODELS["llama-2-7b"], 1) / GIB == pytest.approx(25.9, abs=0.1)
    # Twice that of one GPU with half of 64.1 GiB of weights.
    assert kv_memory_bytes(DEVICES["L20"], MODELS["yi-34b"], 2) / GIB == pytest.approx(12.9, abs=0.1)
    more = kv_memory_bytes(DEVICES["L20"], MODELS["llama-2-7b"], 1, utilization=0.95)
    assert more - kv_memory_bytes(DEVICES["L20"], MODELS["llama-2-7b"], 1) == pytest.approx(0.05 * 45 * GIB, rel=0.01)


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        kv_memory_bytes(DEVICES["L20"], MODELS["llama-3.1-70b"], 2, where="sim.yaml: $.engine")
    assert str(error.value) == (
        "sim.yaml: $.engine.model: found 2 x L20 with 81.0GiB to use; expected room for 131.4GiB of weights and 2GiB "
        "per GPU beside them; set a larger tensor_parallel, a smaller model or a larger device"
    )


@pytest.mark.parametrize(
    ("device", "model", "tp", "complaint"),
    [
        ("l20", "yi-34b", 1, "x.device: found 'l20'; expected one of the device presets: L20, A100, H100, H200; did"),
        ("TPU", "yi-34b", 1, "set one of them, or give a cost profile"),
        ("L20", "llama-2-70b", 1, "x.model: found 'llama-2-70b'; expected one of the model presets: llama-2-7b, "),
        (
            "L20",
            "yi-34b",
            3,
            "x.tensor_parallel: found 3; expected a number that divides the heads of yi-34b: 1, 2, 4, 8",
        ),
        ("L20", "yi-34b", 0, "x.tensor_parallel: found 0;"),
    ],
)
def test_an_unknown_preset_is_refused_with_the_known_ones(device: str, model: str, tp: int, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        preset(device, model, tp, where="x")
    assert complaint in str(error.value)
