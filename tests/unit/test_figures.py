"""What every figure means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.config import SloClass
from layerkv.figures import distribution, met_slo, percentile, tpot_s

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0.0, 1.0))
def test_a_percentile_is_numpys(samples: list[float], share: float) -> None:
    expected = float(np.percentile(samples, share * 100))
    assert percentile(sorted(samples), share) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_values_that_are_not_there_are_left_out() -> None:
    assert distribution([None, 2.0, None]) == {"mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert distribution([None]) is None
    assert distribution([3.0, 1.0]) == {"mean": 2.0, "p50": 2.0, "p90": pytest.approx(2.8), "p99": pytest.approx(2.98)}


def test_one_token_has_no_time_per_token() -> None:
    assert tpot_s(1.0, 1.0, 1) is None
    assert tpot_s(1.0, 3.0, 3) == 1.0


@pytest.mark.parametrize(
    ("ttft_s", "tpot", "gap_s", "stall_s", "is_met"),
    [
        (1.0, 0.1, 9.0, None, True),
        (1.01, 0.1, 0.1, None, False),
        (None, None, 0.0, None, False),
        (0.5, 0.11, 0.2, None, False),
        (0.5, None, 0.0, None, True),
        (0.5, 0.1, 2.0, 2.0, True),
        (0.5, 0.1, 2.1, 2.0, False),
    ],
)
def test_an_slo_is_met_if_every_objective_of_the_class_is(
    ttft_s: float | None, tpot: float | None, gap_s: float, stall_s: float | None, is_met: bool
) -> None:
    slo = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1, max_stall_s=stall_s)
    assert met_slo(slo, ttft_s, tpot, gap_s) is is_met
