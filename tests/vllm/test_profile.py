"""`layerkv profile --quick` on a real engine: one run that every test here looks at. Nothing asserts how fast it is."""

import pytest

from layerkv.bench.engine_args import parse_engine_args
from layerkv.bench.profile import run_profile
from layerkv.core.cost import CostProfile, CostView, load_profile
from layerkv.errors import ConfigError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> CostProfile:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    assert run_profile(None, path, quick=True) == 0
    return load_profile(path)


def test_more_work_costs_more(profile: CostProfile) -> None:
    assert profile.step_s > 0
    assert profile.pair_s > 0
    for curve in (profile.tokens, profile.decode_context, profile.store, profile.load):
        most = curve.points[-1][0]
        # Equal is right too: on a busy machine a stretch may measure as flat.
        assert 0 <= curve(most / 2) <= curve(most) <= curve(2 * most)
        assert curve(most) > 0


def test_a_link_has_a_bandwidth(profile: CostProfile) -> None:
    assert 0 < CostView(profile).load_bytes_in(0.1) < 1 << 40
    assert 0 <= profile.exposed_share <= 1


def test_it_was_checked_against_a_load_that_it_was_not_fitted_to(profile: CostProfile) -> None:
    assert int(profile.made["held_out_shapes"]) >= 30
    assert int(profile.made["held_out_layered_shapes"]) >= 5
    assert 0 < float(profile.made["held_out_median_error"]) <= float(profile.made["held_out_p90_error"])


def test_the_file_says_what_was_measured_and_how(profile: CostProfile) -> None:
    assert profile.kv_bytes_per_token == 12 * 2 * 2 * 64 * 4
    assert profile.made["dtype"] == "float32"
    assert int(profile.made["num_samples"]) > int(profile.made["fit_shapes"]) > 50
    assert all(profile.made[name] for name in ("command", "date", "layerkv", "vllm", "cpu", "threads", "block_size"))


def test_engine_arguments_are_a_json_object_or_nothing() -> None:
    assert parse_engine_args(None) == {}
    assert parse_engine_args('{"block_size": 16}') == {"block_size": 16}
    for wrong in ("block_size=16", "[16]"):
        with pytest.raises(ConfigError, match="--engine-args: found"):
            parse_engine_args(wrong)
