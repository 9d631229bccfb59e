"""Greedy tokens are stock vLLM's with several KV-cache groups, in float32, whatever the mix; every block comes back.

As tests/vllm/test_exact.py, of whose settings those are here that groups have a part in, for models with windows,
chunks and states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.family_rows import Head, Rows
from tests.vllm.forked import Forks
from tests.vllm.test_exact import MIXES, STREAMED, Results, Setting, engine_args, require_same, run_engine
from tests.vllm.tiny_groups import make_tiny

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PLENTIFUL_BYTES = 128 << 20

NO_CACHE = {"enable_prefix_caching": False}
_POOLS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"kv_cache_memory_bytes": 3 << 20},
    "gemma3": {"kv_cache_memory_bytes": 3 << 20},
    "granite_h": {"kv_cache_memory_bytes": 4 << 20, **NO_CACHE},
}
"""Engine arguments of each: a pool that holds two or three requests. (Others are tried in test_families.py.)"""
TITLES = {
    "gpt_oss": ("gpt-oss-groups", "gpt-oss", "windows and full attention in turn: two groups"),
    "gemma3": ("gemma3-groups", "Gemma 3", "two windows to one full attention: three groups"),
    "granite_h": ("granite-h", "Granite 4 H", "two states to one attention: three groups"),
}
"""Of each its name, title and remark in the docs' table."""
FAMILIES = {family: {"skip_tokenizer_init": True, **args} for family, args in _POOLS.items()}

RESIDENT, ZONE = {"mode": "resident"}, {"zone_tokens": 384}

EVERY = [
    Setting("resident", RESIDENT, must_move=("parks", "fetches")),
    Setting("layered-ahead", ZONE, ahead=True),
]
"""What every family is tried with,"""
MORE = [
    Setting("resident-ahead", RESIDENT, ahead=True, must_move=("parks", "fetches")),
    Setting("layered", ZONE),
    Setting("one-lane-odd-chunks", {"lanes": 1, **ZONE}, {"max_num_batched_tokens": 77}),
    Setting("layers-of-their-own", {"retained_layers": 1, **ZONE}, {"kv_cache_memory_bytes": 4 << 20}),
    Setting("failing-fetches", ZONE, fail_every=3),
    Setting("ahead-failing-fetches", ZONE, ahead=True, fail_every=3, must_move=("fetches", "recomputes")),
    Setting("failing-copies", ZONE, fail_copies_every=61, must_move=("fetches", "recomputes")),
    Setting("ahead-failing-copies", ZONE, ahead=True, fail_copies_every=61, must_move=("fetches", "recomputes")),
    Setting("reset-while-fetching", ZONE, reset_while_fetching=True, must_move=("fetches", "recomputes")),
    Setting("host-memory-too-small", {"host_memory": "1MiB", **ZONE}, must_move=("recomputes",)),
    Setting("3-slots", ZONE, {"max_num_seqs": 3}, ahead=True, must_move=("pauses",)),
    Setting("streamed-decode", ZONE, policy=STREAMED, must_move=("layered_admissions",)),
    Setting("paused-in-between", ZONE, pause_step=12),
]
"""and some with more."""
TENSOR_PARALLEL = Setting("tensor-parallel-2", ZONE, {"tensor_parallel_size": 2}, alone=True)


def of_states(setting: Setting) -> Setting:
    """The same with fewer and larger copies: more of them fail, and less often is anything to be computed again."""
    moves = tuple(move for move in setting.must_move if move != "recomputes") or ("parks",)
    return replace(setting, must_move=moves, fail_copies_every=19 if setting.fail_copies_every else 0)


OF_GEMMA = ("one-lane-odd-chunks", "layers-of-their-own", "ahead-failing-copies", "reset-while-fetching", "3-slots")
OF_GRANITE = (
    "layered",
    "ahead-failing-fetches",
    "failing-copies",
    "reset-while-fetching",
    "3-slots",
    "streamed-decode",
)
"""What differs most from gpt-oss, with which all are tried: each takes seconds. (All of them ran on 2026-11-29.)"""

ASKED = [
    *((family, setting) for family in FAMILIES for setting in EVERY),
    *(("gpt_oss", setting) for setting in MORE),
    *(("gemma3", setting) for setting in MORE if setting.name in OF_GEMMA),
    *(("granite_h", of_states(setting)) for setting in MORE if setting.name in OF_GRANITE),
    ("gpt_oss", TENSOR_PARALLEL),
    ("granite_h", replace(TENSOR_PARALLEL, engine={**TENSOR_PARALLEL.engine, "kv_cache_memory_bytes": 2 << 20})),
]
CASES = sorted(ASKED, key=lambda case: list(FAMILIES).index(case[0]))  # the engines of one family in turn


class FamilyResults(Results):
    """What each setting's engine did for one family."""

    def __init__(self, family: str, forks: Forks, model: Path, folder: Path, settings: list[Setting]) -> None:
        self._args = FAMILIES[family]
        super().__init__(
            forks,
            model,
            folder,
            [replace(each, engine={**self._args, **each.engine}) for each in settings],
        )

    def _run_reference(self) -> list[list[list[int]]]:
        folder = self._folder / "reference"
        folder.mkdir()
        mixes = [{**mix, "unaborted": True} for mix in MIXES]
        args = {**engine_args(self._model), **self._args, "kv_cache_memory_bytes": PLENTIFUL_BYTES}
        spec = {"engine_args": args, "mixes": mixes}
        return [result["tokens"] for result in run_engine(self._forks, folder, spec)]


class AllResults:
    """Of the families that this session asks for, each made when its first test comes."""

    def __init__(self, forks: Forks, folder: Path, asked: list[tuple[str, Setting]]) -> None:
        self._forks, self._folder, self._asked = forks, folder, asked
        self._found: dict[str, FamilyResults] = {}
        self.rows = Rows()

    def of(self, family: str) -> FamilyResults:
        if family not in self._found:
            self.close()
            settings = [setting for name, setting in self._asked if name == family]
            model, folder = make_tiny(family, self._folder / "models"), self._folder / family
            folder.mkdir()
            self._found[family] = FamilyResults(family, self._forks, model, folder, settings)
        return self._found[family]

    def close(self) -> None:
        for results in self._found.values():
            results.close()


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AllResults]:
    asked = [item.callspec.params["case"] for item in request.session.items if item.module is request.module]
    found = AllResults(forks, tmp_path_factory.mktemp("groups"), asked)
    yield found
    found.close()
    heads = {}
    for family, (name, title, remark) in TITLES.items():
        heads[name] = Head(title, remark, sum(family == each for each, _ in CASES))
    found.rows.write_if_asked(heads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1].name}")
def test_tokens_are_stock_vllms_and_every_block_comes_back(case: tuple[str, Setting], results: AllResults) -> None:
    family, setting = case
    of_family = results.of(family)
    found = of_family.of(setting)
    moves = found[-1]["books"]["moves"]
    num_compared = require_same(setting, MIXES, of_family.reference(), found)
    results.rows.note(TITLES[family][0], setting.name, moves, num_compared=num_compared)
