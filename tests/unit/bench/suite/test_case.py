"""Benchmark cases: those that are shipped, and what is said about wrong ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerkv.bench.suite.case import ENGINE_NAMES, SIZES, load_case, load_suite
from layerkv.errors import ConfigError

CASES = Path(__file__).parents[4] / "benchmarks" / "cases"
NAMES = (
    "context_sweep",
    "rate_sweep",
    "overload",
    "burst",
    "long_behind_short",
    "two_classes",
    "multi_turn",
    "plentiful",
    "closed_loop",
    "slots",
    "demo_windows",
    "demo_states",
    "unknown_lengths",
    "stop_strings",
    "beyond_memory",
    "trace",
    "soak",
)


def good() -> dict[str, Any]:
    return {
        "version": 1,
        "case": "made",
        "question": "Why?",
        "axis": "requests per second",
        "engine": {"kv_memory": "72MiB", "max_model_len": 2560},
        "policy": {"version": 1, "default_class": "chat", "classes": {"chat": {"ttft": "1s", "tpot": "50ms"}}},
        "workload": {"classes": [{"prompt_tokens": {"fixed": 100}, "output_tokens": {"fixed": 50}}]},
        "points": [{"rate": 1.0, "requests": 5}, {"rate": 2.0, "requests": 5}],
        "sizes": {"full": {"seeds": 3}, "ci": {"seeds": 1, "requests": 2, "points": ["2"]}},
    }


def written(tmp_path: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    document = good()
    if change is not None:
        change(document)
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_case_loads_in_every_size(name: str, size: str) -> None:
    case = load_case(CASES / f"{name}.yaml", size)
    assert case.name == name
    assert case.main_point in [point.name for point in case.points]


def test_the_suite_of_all_cases_names_each_of_them() -> None:
    paths = load_suite(CASES / "all.yaml")
    assert paths is not None
    assert sorted(path.stem for path in paths) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_full_sizes_have_three_seeds_but_for_the_soak(name: str) -> None:
    assert load_case(CASES / f"{name}.yaml").num_seeds >= (1 if name == "soak" else 3)


def test_a_size_chooses_points_requests_and_engines(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["sizes"]["ci"]["engines"] = ["stock"]

    path = written(tmp_path, change)
    case = load_case(path, "ci")
    assert [(point.name, point.workload.num_requests) for point in case.points] == [("2", 2)]
    assert case.engines == ("stock",)
    assert case.num_seeds == 1
    assert case.main_point == "2"
    assert load_case(path, "full").engines == ENGINE_NAMES


def test_a_point_changes_what_it_names_and_keeps_the_rest(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["points"][1] |= {"name": "bursts", "x": 7, "workload": {"arrivals": {"gamma": {"cv": 2}}}}
        document["sizes"]["ci"]["points"] = ["bursts"]

    case = load_case(written(tmp_path, change))
    first, second = case.points
    assert (second.name, second.x, second.rate_per_s) == ("bursts", 7, 2.0)
    assert type(first.workload.arrivals) is not type(second.workload.arrivals)
    assert first.workload.classes == second.workload.classes


def test_sessions_are_read(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["workload"]["sessions"] = {"turns": {"fixed": 3}, "think": "2s", "shared_prefix_tokens": 64}

    sessions = load_case(written(tmp_path, change)).points[0].sessions
    assert sessions is not None
    assert (sessions.turns.most, sessions.think_s, sessions.shared_prefix_tokens) == (3, 2.0, 64)
    assert sessions.history


def test_turns_without_history_are_no_longer_than_one_of_them(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["workload"]["sessions"] = {"turns": {"fixed": 1000}, "history": False}

    sessions = load_case(written(tmp_path, change)).points[0].sessions
    assert sessions is not None
    assert not sessions.history


def test_ends_are_read(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["workload"]["ends"] = {"stop": ["##", "\n\n"], "hang_up": 0.25}
        document["points"][1]["workload"] = {"ends": {"stop": ["x"]}}

    first, second = load_case(written(tmp_path, change)).points
    assert first.ends is not None
    assert (first.ends.stop, first.ends.hang_up_share) == (("##", "\n\n"), 0.25)
    assert second.ends is not None
    assert (second.ends.stop, second.ends.hang_up_share) == (("x",), 0.0)
    assert load_case(written(tmp_path)).points[0].ends is None


def test_a_trace_given_by_flag_replaces_the_cases_own_and_its_broken_rows_are_named(tmp_path: Path) -> None:
    trace = tmp_path / "mine.jsonl"
    rows = ['{"timestamp": 0, "input_length": 100, "output_length": 10}', "oops", '{"timestamp": 5}']
    trace.write_text("\n".join([*rows, '{"timestamp": 900, "input_length": 50, "output_length": 20}']))
    case = load_case(CASES / "trace.yaml", trace_path=trace)
    assert "2 requests" in case.notes[0]
    assert "2 broken rows" in case.notes[1]
    assert "line 2:" in case.notes[1]
    assert "line 3:" in case.notes[1]


def set_key(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_key("version", to=2), ("$.version", "the number 1")),
        (set_key("enginee", to={}), ("$.enginee", "did you mean engine?")),
        (set_key("case", to="A b"), ("$.case", "small letters")),
        (set_key("engine", "kv_memory", to=0), ("$.engine.kv_memory", "more than zero", "8GiB")),
        (set_key("engine", "max_model_len", to=9000), ("$.engine.max_model_len", "8192")),
        (set_key("engines", to=["stock", "layrkv"]), ("$.engines[1]", "did you mean layerkv?")),
        (set_key("engines", to=[]), ("$.engines", "a list of some of")),
        (set_key("points", to=[]), ("$.points", "at least one point")),
        (set_key("points", 0, "rate", to=-1), ("$.points[0].rate", "above zero")),
        (set_key("points", 1, "rate", to=1.0), ("$.points[1]", "a second time")),
        (set_key("points", 0, "requests", to=None), ("requests", "found nothing")),
        (set_key("points", 0, "workload", to={"clases": []}), ("$.points[0].workload.clases", "did you mean classes?")),
        (set_key("workload", "rates", to=[1]), ("$.workload.rates", "set rate of each point")),
        (set_key("workload", "clases", to=[]), ("$.workload.clases", "did you mean classes?")),
        (set_key("workload", "classes", 0, "slo_class", to="chta"), ("slo_class", "did you mean chat?")),
        (set_key("workload", "sessions", to={"turns": {"fixed": 99}}), ("sessions", "max_model_len, 2560")),
        (
            lambda document: document["workload"].update(max_tokens_factor=2, sessions={"turns": {"fixed": 2}}),
            ("sessions", "found sessions beside max_tokens_factor"),
        ),
        (set_key("workload", "ends", to={}), ("$.workload.ends.stop", "found nothing")),
        (set_key("workload", "ends", to=["x"]), ("$.workload.ends", "expected a mapping")),
        (set_key("workload", "ends", to={"stop": []}), ("$.workload.ends.stop", "none of them empty")),
        (set_key("workload", "ends", to={"stop": ["x", ""]}), ("$.workload.ends.stop", "none of them empty")),
        (set_key("workload", "ends", to={"stop": "x"}), ("$.workload.ends.stop", "a list of 1 to 16")),
        (set_key("workload", "ends", to={"stop": ["x"] * 17}), ("$.workload.ends.stop", "a list of 1 to 16")),
        (set_key("workload", "ends", to={"stop": ["x", "x"]}), ("$.workload.ends.stop[1]", "a second time")),
        (set_key("workload", "ends", to={"stop": ["x"], "hang_up": 2}), ("$.workload.ends.hang_up", "from 0 to 1")),
        (set_key("workload", "ends", to={"stop": ["x"], "hangup": 1}), ("ends.hangup", "did you mean hang_up?")),
        (
            lambda document: document["workload"].update(max_tokens_factor=2, ends={"stop": ["x"]}),
            ("$.workload.ends", "found ends beside max_tokens_factor"),
        ),
        (
            lambda document: document["workload"].update(sessions={"turns": {"fixed": 2}}, ends={"stop": ["x"]}),
            ("$.workload.ends", "found ends beside sessions"),
        ),
        (set_key("expected_to_fail", to=["stok"]), ("$.expected_to_fail[0]", "did you mean stock?")),
        (set_key("workload", "sessions", to={"turn": 1}), ("sessions.turn", "did you mean turns?")),
        (set_key("sizes", "big", to={"seeds": 1}), ("$.sizes", "ci or full")),
        (set_key("sizes", "ci", "points", to=["3"]), ("$.sizes.ci.points[0]", "expected one of 1, 2")),
        (set_key("sizes", "ci", "seeds", to=0), ("$.sizes.ci.seeds", "1 or more")),
        (set_key("main_point", to="9"), ("$.main_point", "expected one of 1, 2")),
        (set_key("policy", "classes", "chat", "ttft", to="soon"), ("$.policy.classes.chat.ttft", "soon")),
    ],
)
def test_a_wrong_case_is_refused_with_its_place_and_what_to_set(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_case(written(tmp_path, change), "ci" if "$.sizes.ci" in words[0] else "full")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_size_is_named(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        del document["sizes"]["ci"]

    with pytest.raises(ConfigError, match=r"\$\.sizes\.ci: found nothing"):
        load_case(written(tmp_path, change), "ci")


@pytest.mark.parametrize("content", ["suite: []", "suite: burst.yaml", "suite: [1]", "suite: [a.yaml, a.yaml]"])
def test_a_wrong_suite_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"\$\.suite"):
        load_suite(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: found no readable file"):
        load_case(tmp_path / "none.yaml")
