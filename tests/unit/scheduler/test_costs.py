"""The online correction of a cost profile."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.core.cost import CostView, StepWork, chunk_pairs, generic_profile
from layerkv.scheduler.costs import GAIN, MEASURED_BOUND, OUTLIER, UNKNOWN_BOUND, OnlineCost
from tests.fakes.tiny_scheduler import BLOCK_BYTES, BLOCK_COPY_S, profile

DECODES = StepWork(num_decodes=32, decode_context=20_000)
MIXED = StepWork(
    num_decodes=32, decode_context=20_000, prefill_tokens=500, prefill_pairs=chunk_pairs(500, 0), num_prefills=1
)
LAYERED = MIXED._replace(stored_bytes=256 * 100, is_layered=True)


def measured() -> OnlineCost:
    return OnlineCost(profile(pair_s=1e-9), is_measured=True)


def unknown() -> OnlineCost:
    return OnlineCost(generic_profile(), is_measured=False)


@pytest.mark.parametrize(("decode_factor", "prefill_factor"), [(1.0, 1.0), (0.5, 3.0), (2.5, 0.4)])
def test_the_factors_converge_to_what_steps_take(decode_factor: float, prefill_factor: float) -> None:
    online = measured()
    truth = CostView(online.view.profile, decode_factor, prefill_factor)
    for _ in range(150):
        for work in (DECODES, MIXED, LAYERED):
            online.observe(work, truth.step_s(work))
    assert online.view.decode_factor == pytest.approx(decode_factor, rel=0.02)
    assert online.view.prefill_factor == pytest.approx(prefill_factor, rel=0.02)
    assert online.view.step_s(MIXED) == pytest.approx(truth.step_s(MIXED), rel=0.02)


@pytest.mark.parametrize("scale", [1e-3, 0.2, 50.0])
def test_a_generic_profile_has_the_right_scale_after_its_first_steps(scale: float) -> None:
    online = unknown()
    online.observe(DECODES, online.view.profile.decode_part_s(DECODES) * scale)
    assert online.view.decode_factor == pytest.approx(scale)
    assert online.view.prefill_factor == 1.0, "nothing has been seen of that"
    online.observe(MIXED, CostView(online.view.profile, scale, scale * 3).step_s(MIXED))
    assert online.view.prefill_factor == pytest.approx(scale * 3)


def test_the_first_steps_of_an_unknown_scale_are_not_taken_at_their_word() -> None:
    online = unknown()
    profile_s = online.view.profile
    for factor in (60.0, 1.0, 1.0):  # the first one compiled something
        online.observe(DECODES, profile_s.decode_part_s(DECODES) * factor)
        online.observe(MIXED, CostView(profile_s, 1.0, factor).step_s(MIXED))
    assert online.view.decode_factor == pytest.approx(1.0)
    assert online.view.prefill_factor == pytest.approx(1.0, rel=0.01)


def test_what_a_step_waited_for_copies_is_no_cost_of_its_work() -> None:
    online = measured()
    truth = CostView(online.view.profile, 1.0, 3.0)
    parking = MIXED._replace(parked_bytes=BLOCK_BYTES * 200)
    for _ in range(150):
        assert online.observe(parking, truth.step_s(MIXED) + 0.7, waited_s=0.7)
    assert online.view.prefill_factor == pytest.approx(3.0, rel=0.02)


def test_where_nobody_tells_the_wait_the_profile_does() -> None:
    online = measured()
    truth = CostView(online.view.profile, 1.0, 3.0)
    few, many = (MIXED._replace(parked_bytes=BLOCK_BYTES * n, hit_bytes=BLOCK_BYTES * n) for n in (20, 2000))
    for _ in range(150):
        assert online.observe(few, truth.step_s(few) + 2 * 20 * BLOCK_COPY_S)
    assert online.view.prefill_factor == pytest.approx(3.0, rel=0.02)
    assert not online.observe(many, truth.step_s(many) + 2 * 2000 * BLOCK_COPY_S), "copies took the time"


def test_a_first_step_with_prompts_sets_both_factors_alike() -> None:
    online = unknown()
    online.observe(MIXED, online.view.step_s(MIXED) * 7)
    assert online.view[1:] == (pytest.approx(7.0), pytest.approx(7.0))


def test_one_outlier_moves_a_factor_by_little() -> None:
    for seconds in (1e4, 1e-9):
        online = measured()
        online.observe(DECODES, seconds)
        online.observe(MIXED, seconds)
        for factor in online.view[1:]:
            assert OUTLIER**-GAIN <= factor <= OUTLIER**GAIN


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_what_is_no_duration_is_left_out(seconds: float) -> None:
    for online in (measured(), unknown()):
        before = online.view
        online.observe(DECODES, seconds)
        online.observe(MIXED, seconds)
        assert online.view == before


def test_a_step_without_work_says_nothing() -> None:
    online = OnlineCost(profile(step_s=0.0), is_measured=True)
    online.observe(StepWork(), 1.0)
    assert online.view == CostView(profile(step_s=0.0))


works = st.sampled_from((DECODES, MIXED, LAYERED, StepWork(prefill_tokens=1, prefill_pairs=1.0, num_prefills=1)))
times = st.floats(allow_nan=True, allow_infinity=True)


@given(st.booleans(), st.lists(st.tuples(works, times), max_size=60))
def test_the_factors_stay_within_their_bounds_whatever_is_observed(
    is_measured: bool, observed: list[tuple[StepWork, float]]
) -> None:
    online = OnlineCost(generic_profile(), is_measured=is_measured)
    bound = MEASURED_BOUND if is_measured else UNKNOWN_BOUND
    for work, seconds in observed:
        online.observe(work, seconds)
        for factor in online.view[1:]:
            assert 1 / bound <= factor <= bound
        assert math.isfinite(online.view.step_s(MIXED))


def test_a_measured_profile_is_corrected_to_its_bound_and_no_further() -> None:
    online = measured()
    for _ in range(300):
        online.observe(DECODES, 1e3)
    assert online.view.decode_factor == MEASURED_BOUND
