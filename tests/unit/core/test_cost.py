"""Cost profiles: curves, predictions, and their JSON form with all that can be wrong in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.core.cost import (
    CURE,
    CostProfile,
    CostView,
    Curve,
    StepWork,
    chunk_pairs,
    generic_profile,
    load_profile,
    parse_profile,
)
from layerkv.errors import ConfigError

PROFILE = CostProfile(
    name="a model on a machine",
    step_s=0.01,
    request_s=1e-5,
    tokens=Curve([(0, 0.0), (256, 0.02), (2048, 0.2)]),
    decode_context=Curve([(0, 0.0), (100_000, 0.01)]),
    pair_s=1e-9,
    store=Curve([(0, 1e-5), (1 << 20, 2e-4)]),
    load=Curve([(1 << 20, 1e-4)]),
    layered_step_s=0.001,
    exposed_share=0.1,
    kv_bytes_per_token=28_672,
    made={"command": "layerkv profile", "date": "2026-01-01"},
)

# Curves ---------------------------------------------------------------------------------------------------------------


def test_a_curve_goes_through_its_points_and_straight_between_and_beyond_them() -> None:
    curve = Curve([(10, 1.0), (20, 2.0), (30, 5.0)])
    assert [curve(x) for x in (10, 15, 20, 25, 30, 40)] == pytest.approx([1.0, 1.5, 2.0, 3.5, 5.0, 8.0])
    assert curve(5) == pytest.approx(0.5)


def test_a_curve_is_never_negative() -> None:
    assert Curve([(10, 1.0), (20, 11.0)])(0) == 0.0


def test_one_point_is_a_line_through_the_origin_and_none_is_zero() -> None:
    assert [Curve([(4, 2.0)])(x) for x in (0, 2, 8)] == [0.0, 1.0, 4.0]
    assert [Curve([])(x) for x in (0, 2, 8)] == [0.0, 0.0, 0.0]


def test_curves_with_the_same_points_are_equal() -> None:
    assert Curve([(1, 2), (3, 4)]) == Curve([(1.0, 2.0), (3.0, 4.0)])
    assert len({Curve([(1, 2)]), Curve([(0, 0), (1, 2)]), Curve([(1, 3)])}) == 2
    assert eval(repr(Curve([(1, 2), (3, 4)]))) == Curve([(1, 2), (3, 4)])


growing = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0, 1e3)), min_size=1, max_size=8)


def curve_of(steps: list[tuple[float, float]]) -> Curve:
    points, x, y = [], 0.0, 0.0
    for dx, dy in steps:
        x, y = x + dx, y + dy
        points.append((x, y))
    return Curve(points)


@given(growing, st.floats(0, 1e4), st.floats(0, 1e4))
def test_a_curve_of_growing_points_grows_everywhere(steps: list[tuple[float, float]], a: float, b: float) -> None:
    curve = curve_of(steps)
    low, high = sorted((curve(min(a, b)), curve(max(a, b))))
    assert curve(min(a, b)) == pytest.approx(low)
    assert curve(max(a, b)) == pytest.approx(high)
    assert [curve(x) for x, _ in curve.points] == pytest.approx([y for _, y in curve.points])


# Predictions ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.integers(0, 1000))
def test_chunks_attend_as_many_pairs_as_the_whole(chunks: list[int], num_computed: int) -> None:
    at, pairs = num_computed, 0.0
    for chunk in chunks:
        pairs += chunk_pairs(chunk, at)
        at += chunk
    assert pairs == chunk_pairs(sum(chunks), num_computed)
    assert chunk_pairs(3, 10) == 11 + 12 + 13


def test_a_step_is_the_sum_of_its_parts() -> None:
    work = StepWork(num_decodes=56, decode_context=50_000, prefill_tokens=200, prefill_pairs=1e6, num_prefills=2)
    decode_s = 0.01 + 56e-5 + 56 * 0.02 / 256 + 0.005
    prefill_s = 200 * 0.02 / 256 + 2e-5 + 1e-3
    assert PROFILE.decode_part_s(work) == pytest.approx(decode_s)
    assert PROFILE.prefill_part_s(work) == pytest.approx(prefill_s)
    assert CostView(PROFILE).step_s(work) == pytest.approx(decode_s + prefill_s)
    assert CostView(PROFILE, 2.0, 0.5).step_s(work) == pytest.approx(2 * decode_s + prefill_s / 2)


def test_a_step_without_prompt_tokens_has_no_prefill_part() -> None:
    assert PROFILE.prefill_part_s(StepWork(num_decodes=5, num_prefills=1)) == 0.0


@pytest.mark.parametrize(
    ("stored", "loaded", "compute_s", "expected"),
    [
        (0, 0, 0.1, 0.001),  # only the hooks
        (0, 100 << 20, 0.1, 0.001 + 0.1 * 0.01),  # hidden but for a tenth
        (0, 1000 << 20, 0.04, 0.001 + 0.06 + 0.1 * 0.04),  # longer than compute
        (1 << 20, 100 << 20, 0.1, 0.001 + 0.1 * 0.01),  # the directions run beside each other
    ],
)
def test_layered_copies_cost_what_compute_does_not_hide(
    stored: int, loaded: int, compute_s: float, expected: float
) -> None:
    work = StepWork(stored_bytes=stored, loaded_bytes=loaded, is_layered=True)
    profile = replace(PROFILE, store=Curve([(1 << 20, 1e-4)]))
    assert profile.layered_part_s(work, compute_s) == pytest.approx(expected)
    assert profile.layered_part_s(work._replace(is_layered=False), compute_s) == 0.0


def test_a_view_predicts_prefill_and_copies() -> None:
    view = CostView(PROFILE, prefill_factor=2.0)
    assert view.prefill_s(256) == pytest.approx(2 * (0.02 + 1e-5 + 1e-9 * 256 * 128.5))
    assert view.prefill_s(256, 1000) - view.prefill_s(256) == pytest.approx(2 * 1e-9 * 256 * 1000)
    assert view.store_s(1 << 20) == pytest.approx(2e-4)
    assert view.load_s(1 << 20) == pytest.approx(1e-4)


def test_the_link_budget_leaves_latency_out() -> None:
    assert CostView(PROFILE).load_bytes_in(1e-4) == pytest.approx(1 << 20, rel=1e-6)
    assert CostView(PROFILE).load_bytes_in(-1.0) == 0
    assert CostView(replace(PROFILE, load=Curve([]))).load_bytes_in(1.0) > 1 << 60
    assert CostView(generic_profile()).load_bytes_in(1.0) == pytest.approx(8e9)


# JSON -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [PROFILE, generic_profile(), generic_profile(4096)])
def test_a_profile_survives_the_way_through_json(profile: CostProfile) -> None:
    assert parse_profile(profile.to_json(), where="p.json") == profile


@given(growing, growing, st.floats(0, 1e3), st.floats(0, 1))
def test_any_profile_survives_the_way_through_json(
    tokens: list[tuple[float, float]], link: list[tuple[float, float]], seconds: float, share: float
) -> None:
    profile = replace(
        PROFILE, tokens=curve_of(tokens), store=curve_of(link), step_s=seconds, pair_s=seconds, exposed_share=share
    )
    assert parse_profile(profile.to_json(), where="p.json") == profile


def test_what_may_be_left_out_has_its_default() -> None:
    document = json.loads(PROFILE.to_json())
    for key in ("made", "kv_bytes_per_token"):
        del document[key]
    for key in ("layered_s", "exposed_share"):
        del document["step"][key]
    profile = parse_profile(json.dumps(document), where="p.json")
    assert profile == replace(PROFILE, made={}, kv_bytes_per_token=0, layered_step_s=0.0, exposed_share=0.0)


def test_a_file_is_read_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ConfigError, match=r"profile\.json: found no readable file") as caught:
        load_profile(path)
    assert CURE in str(caught.value)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="found no readable file"):
        load_profile(path)
    path.write_text(PROFILE.to_json())
    assert load_profile(path) == PROFILE


@pytest.mark.parametrize("text", ["", "{", "not json", "[" * 100_000])
def test_what_is_not_json_is_refused_with_the_cure(text: str) -> None:
    with pytest.raises(ConfigError, match=r"p\.json: found what is not JSON") as caught:
        parse_profile(text, where="p.json")
    assert CURE in str(caught.value)


NUMBERS = [
    ("step", "fixed_s"),
    ("step", "request_s"),
    ("step", "prefill_pair_s"),
    ("step", "layered_s"),
    ("step", "exposed_share"),
    ("kv_bytes_per_token",),
]
CURVES = [("step", "tokens_s"), ("step", "decode_context_s"), ("link", "store_s"), ("link", "load_s")]
NO_NUMBER: list[Any] = [-1.0, "fast", True, None, [], float("nan"), float("inf")]
NO_CURVE: list[tuple[Any, str]] = [
    (None, ""),
    ([], ""),
    (3, ""),
    ({}, ""),
    ([[1, 2], 3], "[1]"),
    ([[1]], "[0]"),
    ([[1, 2, 3]], "[0]"),
    ([[1, "x"]], "[0][1]"),
    ([[-1, 2]], "[0][0]"),
    ([[1, 2], [1, 3]], "[1]"),
    ([[1, 2], [2, 1]], "[1]"),
    ([[0, 2]], "[0]"),
]
WRONG: list[tuple[tuple[str, ...], Any, str]] = [
    *((path, value, "") for path in NUMBERS for value in NO_NUMBER),
    *((path, value, at) for path in CURVES for value, at in NO_CURVE),
    *((path, value, "") for path in (("step",), ("link",), ("made",)) for value in ([], "x", 3)),
    *((("schema",), value, "") for value in (None, 0, 2, "1")),
    *((("name",), value, "") for value in (None, 3)),
    (("step", "exposed_share"), 1.5, ""),
]


@pytest.mark.parametrize(("path", "value", "at"), WRONG)
def test_whatever_is_wrong_is_named_with_its_place_and_the_cure(path: tuple[str, ...], value: Any, at: str) -> None:
    document: Any = json.loads(PROFILE.to_json())
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        parse_profile(json.dumps(document), where="some/p.json")
    message = str(caught.value)
    assert message.startswith(f"some/p.json: $.{'.'.join(path)}{at}: found ")
    assert "; expected " in message
    assert message.endswith(CURE)


@pytest.mark.parametrize(
    "path",
    [path for path in (*NUMBERS, *CURVES) if path[-1] not in ("layered_s", "exposed_share", "kv_bytes_per_token")],
)
def test_what_is_missing_is_named(path: tuple[str, ...]) -> None:
    document: Any = json.loads(PROFILE.to_json())
    del document[path[0]][path[1]]
    with pytest.raises(ConfigError, match=f"{path[1]}: found nothing; expected"):
        parse_profile(json.dumps(document), where="p.json")


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "null"])
def test_a_document_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"p\.json: \$: found .*; expected a mapping"):
        parse_profile(text, where="p.json")


def test_long_values_are_shortened_in_messages() -> None:
    document = {"schema": 1, "step": "x" * 5000}
    with pytest.raises(ConfigError) as caught:
        parse_profile(json.dumps(document), where="p.json")
    assert len(str(caught.value)) < 250
