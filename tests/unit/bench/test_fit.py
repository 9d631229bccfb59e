from dataclasses import replace

import numpy as np
import pytest

from layerkv.bench.fit import Sample, fit_copies, fit_profile, prediction_error, robust_nnls, shape_medians
from layerkv.core.cost import CostProfile, CostView, Curve, StepWork, chunk_pairs, parse_profile

LINK = Curve([(1e5, 3e-5), (1e8, 2e-2)])
TRUE = CostProfile(
    name="true",
    step_s=2e-3,
    request_s=1e-4,
    tokens=Curve([(0, 0.0), (64, 0.008), (1024, 0.05), (4096, 0.25)]),
    decode_context=Curve([(0, 0.0), (1024, 0.0002), (65536, 0.05)]),
    pair_s=3e-8,
    store=LINK,
    load=LINK,
    layered_step_s=2e-3,
    exposed_share=0.3,
)


def random_work(rng: np.random.Generator, *, layered: bool = False) -> StepWork:
    num_decodes = int(rng.integers(0, 33))
    chunk = int(2 ** rng.uniform(3, 11)) if layered or num_decodes == 0 or rng.random() < 0.6 else 0
    behind = int(rng.integers(0, 3000))
    return StepWork(
        num_decodes=num_decodes,
        decode_context=int(num_decodes * 2 ** rng.uniform(5, 11)),
        prefill_tokens=chunk,
        prefill_pairs=chunk_pairs(chunk, behind) if chunk else 0.0,
        num_prefills=1 if chunk else 0,
        stored_bytes=chunk * 12288 if layered else 0,
        loaded_bytes=behind * 12288 if layered else 0,
        is_layered=layered,
    )


def made_samples(seed: int, count: int, *, noise: float = 0.05, outliers: float = 0.0) -> list[Sample]:
    """Steps that cost what `TRUE` says, give or take; every third is layered; some take several times as long."""
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for index in range(count):
        work = random_work(rng, layered=index % 3 == 0)
        seconds = CostView(TRUE).step_s(work) * np.exp(rng.normal(0, noise))
        samples.append((work, float(seconds * (rng.uniform(2, 6) if rng.random() < outliers else 1))))
    return samples


def test_known_costs_are_found_again_in_spite_of_noise_and_outliers() -> None:
    profile = fit_profile(made_samples(1, 900, outliers=0.1), store=LINK, load=LINK)
    assert profile.step_s == pytest.approx(TRUE.step_s, rel=0.25)
    assert profile.pair_s == pytest.approx(TRUE.pair_s, rel=0.1)
    assert profile.exposed_share == pytest.approx(TRUE.exposed_share, abs=0.1)
    assert profile.layered_step_s == pytest.approx(TRUE.layered_step_s, rel=0.5)
    for tokens in (64, 256, 1024, 2048):
        assert profile.tokens(tokens) == pytest.approx(TRUE.tokens(tokens), rel=0.15)
    for context in (4096, 16384, 32768):
        assert profile.decode_context(context) == pytest.approx(TRUE.decode_context(context), rel=0.15)


def test_steps_that_were_not_fitted_are_predicted_within_the_noise() -> None:
    profile = fit_profile(made_samples(1, 900, outliers=0.1), store=LINK, load=LINK)
    error = prediction_error(profile, made_samples(2, 300))
    assert error.num_shapes == 300
    assert error.median < 0.06
    assert error.median < error.p90 < 0.15


def test_exact_times_are_explained_exactly() -> None:
    profile = fit_profile(made_samples(3, 600, noise=0.0), store=LINK, load=LINK)
    assert prediction_error(profile, made_samples(4, 200, noise=0.0)).median < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_whatever_was_measured_no_cost_is_negative_and_no_curve_falls(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [(random_work(rng, layered=index % 2 == 0), float(rng.exponential(0.01))) for index in range(60)]
    profile = fit_profile(samples, store=LINK, load=LINK)
    terms = (profile.step_s, profile.request_s, profile.pair_s, profile.layered_step_s, profile.exposed_share)
    assert min(terms) >= 0
    assert profile.exposed_share <= 1
    for curve in (profile.tokens, profile.decode_context):
        values = [y for _, y in curve.points]
        assert values == sorted(values)
        assert values[0] == 0


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_samples_are_enough_for_a_profile_that_can_be_read_back(count: int) -> None:
    profile = fit_profile(made_samples(5, count), store=LINK, load=LINK)
    assert parse_profile(profile.to_json(), where="here") == replace(profile, made={})


def test_what_layers_add_is_taken_against_the_same_step_without_them_where_it_was_measured() -> None:
    layered = StepWork(
        prefill_tokens=256, prefill_pairs=chunk_pairs(256, 0), num_prefills=1, stored_bytes=3 << 20, is_layered=True
    )
    resident = layered._replace(stored_bytes=0, is_layered=False)
    others = [(work, 2 * seconds) for work, seconds in made_samples(6, 300, noise=0.0) if not work.is_layered]
    profile = fit_profile([*others, (resident, 0.020), (layered, 0.025)], store=LINK, load=LINK)
    hidden_s = LINK(3 << 20)
    assert profile.layered_step_s + profile.exposed_share * hidden_s == pytest.approx(0.005)


def test_without_layered_steps_layers_cost_nothing() -> None:
    profile = fit_profile([sample for sample in made_samples(7, 90) if not sample[0].is_layered])
    assert (profile.layered_step_s, profile.exposed_share) == (0, 0)


def test_equal_steps_count_once_with_their_median() -> None:
    one, other = StepWork(num_decodes=1), StepWork(num_decodes=2)
    assert shape_medians([(one, 1.0), (other, 5.0), (one, 9.0), (one, 2.0)]) == {one: 2.0, other: 5.0}


def test_copies_go_through_their_medians_and_never_get_cheaper_with_size() -> None:
    curve = fit_copies([(100, 1.0), (100, 1.2), (100, 9.0), (400, 1.1), (1600, 5.0)])
    assert curve.points == ((100.0, 1.2), (400.0, 1.2), (1600.0, 5.0))


def test_without_samples_nothing_is_off() -> None:
    assert prediction_error(TRUE, []).num_shapes == 0


def test_a_coefficient_that_would_be_negative_is_zero() -> None:
    x = np.linspace(1, 2, 50)
    found = robust_nnls(np.column_stack([np.ones(50), x]), 3 - x)
    assert found[1] == 0
    assert found[0] > 0
