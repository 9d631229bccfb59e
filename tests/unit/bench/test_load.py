import numpy as np
import pytest

from layerkv.bench.load import FIRST_ORDINARY_TOKEN_ID, LoadSpec, make_load
from layerkv.errors import ConfigError


def spec(**changes: object) -> LoadSpec:
    fields = {
        "num_requests": 50,
        "rate_per_s": 4.0,
        "prompt_tokens": (5, 9),
        "output_tokens": (2, 4),
        "vocab_size": 100,
    }
    return LoadSpec(**(fields | changes))


def test_equal_specs_give_equal_loads() -> None:
    assert make_load(spec(seed=3)) == make_load(spec(seed=3))


def test_another_seed_gives_other_prompts_and_arrivals() -> None:
    one, other = make_load(spec(seed=3)), make_load(spec(seed=4))
    assert [r.prompt for r in one] != [r.prompt for r in other]
    assert [r.arrival_s for r in one] != [r.arrival_s for r in other]


def test_lengths_and_tokens_stay_within_the_ranges_asked_for_and_reach_both_ends() -> None:
    load = make_load(spec(num_requests=200))
    assert {len(r.prompt) for r in load} == {5, 6, 7, 8, 9}
    assert {r.output_tokens for r in load} == {2, 3, 4}
    tokens = [token for r in load for token in r.prompt]
    assert min(tokens) == FIRST_ORDINARY_TOKEN_ID
    assert max(tokens) == 99


def test_arrivals_are_a_poisson_process_of_the_rate_asked_for() -> None:
    load = make_load(spec(num_requests=5000, prompt_tokens=(1, 1)))
    gaps_s = np.diff([0.0, *(r.arrival_s for r in load)])
    assert (gaps_s >= 0).all()
    assert gaps_s.mean() == pytest.approx(1 / 4.0, rel=0.05)
    assert gaps_s.std() == pytest.approx(gaps_s.mean(), rel=0.05)  # as exponential gaps have it
    arrivals_per_s = np.bincount(np.floor(np.cumsum(gaps_s)).astype(int))[:-1]
    assert arrivals_per_s.var() == pytest.approx(arrivals_per_s.mean(), rel=0.15)


def test_request_ids_are_unique_and_in_order_of_arrival() -> None:
    load = make_load(spec())
    ids = [r.request_id for r in load]
    assert ids == sorted(set(ids))
    assert [r.arrival_s for r in load] == sorted(r.arrival_s for r in load)


def test_every_request_carries_the_slo_class_of_the_spec() -> None:
    assert {r.slo_class for r in make_load(spec(slo_class="chat"))} == {"chat"}


def test_context_lengths_follow_from_the_ranges() -> None:
    assert spec().mean_context_tokens == 7 + 3
    assert spec().max_context_tokens == 9 + 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_requests": 0}, "num_requests is 0"),
        ({"rate_per_s": 0.0}, "rate_per_s is 0.0"),
        ({"prompt_tokens": (9, 5)}, "prompt_tokens is (9, 5)"),
        ({"output_tokens": (0, 5)}, "output_tokens is (0, 5)"),
        ({"vocab_size": 3}, "vocab_size is 3"),
    ],
)
def test_an_impossible_load_is_refused_with_the_value_found(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(**changes)
    assert message in str(caught.value)
