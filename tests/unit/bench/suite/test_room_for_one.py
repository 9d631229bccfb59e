"""What is said of KV memory before any engine starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from layerkv.bench.suite.case import Case, load_case
from layerkv.bench.suite.engines import kv_memory_bytes
from layerkv.bench.suite.room_for_one import bytes_for_one, check_room_for_one
from layerkv.bench.suite.run import RunOptions, run_suite
from layerkv.bench.tiny_model import SHAPES
from layerkv.errors import ConfigError

CASES = Path(__file__).parents[4] / "benchmarks" / "cases"


def case_file(folder: Path, engine: dict[str, Any], **more: Any) -> Path:
    document = {
        "version": 1,
        "case": "made",
        "question": "Does it start?",
        "axis": "requests per second",
        "engine": {"model": "demo", "kv_memory": "18MiB", "max_model_len": 2560, **engine},
        "workload": {"classes": [{"prompt_tokens": {"fixed": 8}, "output_tokens": {"fixed": 6}}]},
        "points": [{"rate": 40, "requests": 6}],
        "engines": ["stock", "layerkv", "oracle"],
        "sizes": {"full": {"seeds": 1}},
        **more,
    }
    path = folder / "made.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def check(folder: Path, engine: dict[str, Any], **more: Any) -> list[str]:
    case = load_case(case_file(folder, engine, **more))
    return check_room_for_one(case, memory(case), where="made.yaml")


def memory(case: Case) -> dict[str, int]:
    return {engine: kv_memory_bytes(case, engine, [0]) for engine in case.engines}


def test_too_little_kv_memory_is_named_before_anything_starts(tmp_path: Path) -> None:
    def serve(*_: object, **__: object) -> list[str]:
        raise AssertionError("an engine was started")

    with pytest.raises(ConfigError) as caught:
        run_suite(case_file(tmp_path, {}), RunOptions(out_dir=tmp_path / "out"), serve=serve)
    said = str(caught.value)
    assert "made.yaml: $.engine.kv_memory: stock has 18MiB of KV memory" in said
    assert "one request of max_model_len 2560 needs 30.38MiB" in said
    assert "set kv_memory to 31MiB or more, max_model_len lower" in said
    assert not (tmp_path / "out").exists()


# Of vLLM 0.32.0, CPU build: with 48 blocks of 384 KiB it says "the estimated maximum model length is 1504", 47 blocks.
BLOCK_BYTES = 384 << 10


def test_exactly_enough_is_enough_and_a_byte_less_is_not(tmp_path: Path) -> None:
    assert check(tmp_path, {"max_model_len": 1504, "block_tokens": 32}) == []
    less = {"max_model_len": 1504, "block_tokens": 32, "kv_memory": f"{48 * BLOCK_BYTES - 1}B"}
    with pytest.raises(ConfigError, match="stock has"):
        check(tmp_path, less)


def test_a_last_block_that_is_not_full_counts_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len 1505 needs 18\.38MiB"):
        check(tmp_path, {"max_model_len": 1505, "block_tokens": 32})
    assert bytes_for_one(SHAPES["demo"], max_model_len=1505, block_tokens=32) == 49 * BLOCK_BYTES


def test_an_engine_that_the_case_expects_to_fail_is_a_note(tmp_path: Path) -> None:
    notes = check(tmp_path, {"long_contexts": True}, expected_to_fail=["stock"])
    assert len(notes) == 1
    assert notes[0].startswith("stock has 18MiB of KV memory")
    assert "it will not start, as the case expects" in notes[0]


def test_layerkv_without_long_contexts_needs_the_room_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_memory: layerkv has 18MiB"):
        check(tmp_path, {}, expected_to_fail=["stock"])


def test_options_that_overrule_the_cases_keys_are_not_second_guessed(tmp_path: Path) -> None:
    assert check(tmp_path, {"options": ["--max-model-len", "1024"]}) == []
    assert check(tmp_path, {"options": ["--kv-cache-memory-bytes=99999999"]}) == []


def test_of_a_model_that_is_not_ours_nothing_is_known(tmp_path: Path) -> None:
    assert check(tmp_path, {"model": "somebody/model"}) == []


def test_the_oracle_has_room_for_one_however_small_the_load(tmp_path: Path) -> None:
    case = load_case(case_file(tmp_path, {"kv_memory": "31MiB"}))
    needed = bytes_for_one(SHAPES["demo"], max_model_len=2560, block_tokens=case.settings.block_tokens)
    assert kv_memory_bytes(case, "oracle", [0]) >= needed


@pytest.mark.parametrize("size", ["full", "ci"])
def test_every_case_of_the_suite_has_room_or_says_that_it_has_not(size: str) -> None:
    for path in sorted(CASES.glob("*.yaml")):
        if path.stem in ("all", "trace"):  # a list, and one that needs a trace
            continue
        case = load_case(path, size)
        notes = check_room_for_one(case, memory(case), where=str(path))
        assert [note.split()[0] for note in notes] == list(case.expected_to_fail)
