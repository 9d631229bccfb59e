"""layerkv's greedy tokens are stock vLLM's, in float32, whatever the mix; and afterwards every block is back.

Each engine takes random mixes one after the other, six of ten if its requests have moved by then as they should; and a
few engines in turn share a process. The reference is stock vLLM with KV memory for everything, whose tokens depend on
the prompt alone.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from layerkv.bench.tiny_model import make_tiny_model
from tests.vllm.family_rows import WRITES_ROWS
from tests.vllm.forked import Forks, run_module
from tests.vllm.mix import MixRequest, make_mix

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PLENTIFUL_BYTES = 128 << 20
SCARCE_BYTES = 6 << 20  # 32 blocks of the tiny model: two or three requests
ENGINES_PER_PROCESS = 6
MIXES = [
    {"seed": seed, "sharing": sharing, "aborts": aborts}
    for seed, sharing, aborts in product(range(3), (False, True), (False, True))
][:10]
ENOUGH_MIXES = len(MIXES) if WRITES_ROWS else 6


@dataclass(frozen=True)
class Setting:
    """How one engine differs from the others."""

    name: str
    extra: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    policy: str | None = None
    ahead: bool = False
    fail_every: int = 0
    fail_copies_every: int = 0
    pause_step: int | None = None
    reset_while_fetching: bool = False
    shake_pool: int | None = None
    has_broker: bool = False
    alone: bool = False
    must_move: tuple[str, ...] = ("parks", "fetches", "layered_admissions")


STREAMED = "version: 1\ndefault_class: all\nstreamed_decode: true\nclasses:\n  all: {ttft: 1s, tpot: 100ms}\n"
TIGHT = "version: 1\ndefault_class: all\nclasses:\n  all: {ttft: 10ms, tpot: 5ms}\n"

SETTINGS = [
    Setting("one-lane", {"lanes": 1, "zone_tokens": 320}),
    Setting("two-lanes-no-prefix-cache", {"zone_tokens": 640}, {"enable_prefix_caching": False}),
    Setting("three-lanes-odd-chunks", {"lanes": 3, "zone_tokens": 384}, {"max_num_batched_tokens": 77}),
    Setting("a-lane-per-layer", {"lanes": 99, "zone_tokens": 320}, {"kv_cache_memory_bytes": 7 << 20}),
    Setting("tight-objectives", {"zone_tokens": 320}, {"max_num_batched_tokens": 600}, policy=TIGHT),
    Setting(
        "host-memory-too-small",
        {"zone_tokens": 64, "host_memory": "1MiB"},
        {"kv_cache_memory_bytes": 3 << 20},
        must_move=("recomputes",),
    ),
    Setting("paused-in-between", {"zone_tokens": 320}, pause_step=12),
    *(
        Setting(
            f"{'ahead-' if ahead else ''}reset-while-fetching",
            {"zone_tokens": 320},
            ahead=ahead,
            reset_while_fetching=True,
            must_move=("fetches", "recomputes"),
        )
        for ahead in (False, True)
    ),
    Setting("never-layered", {"mode": "resident"}, {"kv_cache_memory_bytes": 3 << 20}, must_move=("parks", "fetches")),
    Setting("always-layered", {"compare": {"mode": "layered"}, "zone_tokens": 320}, {"max_num_batched_tokens": 96}),
    Setting("streamed-decode", {"zone_tokens": 640}, policy=STREAMED, must_move=("layered_admissions",)),
    Setting("streamed-host-small", {"zone_tokens": 640, "host_memory": "2MiB"}, policy=STREAMED, must_move=("parks",)),
    Setting("scheduled-ahead", {"zone_tokens": 320}, ahead=True),
    Setting("ahead-host-too-small", {"zone_tokens": 320, "host_memory": "3MiB"}, ahead=True, must_move=("parks",)),
    Setting("failing-fetches", {"zone_tokens": 320}, fail_every=3),
    Setting(
        "ahead-failing-fetches",
        {"zone_tokens": 320},
        ahead=True,
        fail_every=3,
        must_move=("fetches", "recomputes"),
    ),
    *(
        Setting(
            f"{'ahead-' if ahead else ''}failing-copies{'-streamed' if policy else ''}",
            {"zone_tokens": 320 if policy is None else 640},
            ahead=ahead,
            # A streamed decode copies all its layers in each step; one that fails three times in a row is refused.
            fail_copies_every=61 if policy is None else 181,
            policy=policy,
            must_move=("layered_admissions", "fetches", "recomputes"),
        )
        for ahead in (False, True)
        for policy in (None, STREAMED)
    ),
    Setting(
        "longer-than-the-pool",
        {"lanes": 1, "zone_tokens": 416, "long_contexts": True},
        {"kv_cache_memory_bytes": 2 << 20},
        must_move=("layered_admissions", "recomputes"),
    ),
    Setting(
        "tensor-parallel-2",
        {"zone_tokens": 320},
        {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 3 << 20},
        alone=True,
    ),
    Setting("compiled", {"zone_tokens": 320}, {"enforce_eager": False}, env={"VLLM_CPU_CI_ENV": "1"}, alone=True),
    *(
        Setting(
            f"{'ahead-' if ahead else ''}{slots}-slots",
            {"zone_tokens": 320},
            {"max_num_seqs": slots, "kv_cache_memory_bytes": 16 << 20},
            ahead=ahead,
            must_move=("pauses",),
        )
        for ahead in (False, True)
        for slots in (1, 3)
    ),
    Setting(
        "3-slots-small-pool", {"zone_tokens": 320}, {"max_num_seqs": 3}, must_move=("pauses", "parks", "fetches")
    ),
    Setting("3-slots-priorities", {}, {"max_num_seqs": 3, "scheduling_policy": "priority"}, must_move=("pauses",)),
    Setting("priorities", {"zone_tokens": 320}, {"scheduling_policy": "priority"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("test", tmp_path_factory.mktemp("models"))


def engine_args(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 400,
        "kv_cache_memory_bytes": SCARCE_BYTES,
        "max_num_batched_tokens": 160,
        "max_num_seqs": 16,
        "enable_prefix_caching": True,
        "seed": 0,
    }


def run_engine(forks: Forks, folder: Path, spec: dict[str, Any], env: dict[str, str] | None = None) -> Any:
    spec_path, out_path, log_path = folder / "spec.json", folder / "out.json", folder / "log"
    spec_path.write_text(json.dumps(spec))
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(env or {})}
    program = run_module("tests.vllm.mix_engine")
    done = forks.run(program, str(spec_path), str(out_path), log_path=log_path, **environment)
    assert done.returncode == 0, log_path.read_text(errors="replace")[-6000:]
    return json.loads(out_path.read_text())


def spec_of(setting: Setting, model: Path, folder: Path) -> dict[str, Any]:
    extra = {"host_memory": "64MiB", **setting.extra}
    if setting.policy is not None:
        policy_path = folder / f"{setting.name}.yaml"
        policy_path.write_text(setting.policy)
        extra["policy"] = str(policy_path)
    if setting.has_broker:
        # A socket's path has 108 bytes at most.
        extra["broker"] = str(folder.parent / f"{zlib.crc32(setting.name.encode()):x}.sock")
    connector = {"kv_connector": "LayerKVConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return {
        "engine_args": {**engine_args(model), **setting.engine, "kv_transfer_config": connector},
        "mixes": MIXES,
        "enough": {"mixes": ENOUGH_MIXES, "moves": setting.must_move},
        "ahead": setting.ahead,
        "fail_every": setting.fail_every,
        "fail_copies_every": setting.fail_copies_every,
        "pause_step": setting.pause_step,
        "reset_while_fetching": setting.reset_while_fetching,
        "shake_pool": setting.shake_pool,
        "has_broker": setting.has_broker,
    }


class Results:
    """What each setting's engine did, and the reference; those that this session asks for, a few to a process.

    Two processes at a time, since an engine in its own process keeps one core busy. Engines of several processes come
    last and alone.
    """

    def __init__(self, forks: Forks, model: Path, folder: Path, settings: Sequence[Setting]) -> None:
        self._forks, self._model, self._folder = forks, model, folder
        together = [setting for setting in settings if not setting.alone]
        groups = [together[i : i + ENGINES_PER_PROCESS] for i in range(0, len(together), ENGINES_PER_PROCESS)]
        groups += [[setting] for setting in settings if setting.alone]
        self._pool = ThreadPoolExecutor(2)
        self._reference = self._pool.submit(self._run_reference)
        self._outcomes: dict[str, Future[dict[str, Any]]] = {}
        last = [group for group in groups if any("tensor_parallel_size" in each.engine for each in group)]
        for group in [*(group for group in groups if group not in last), *last]:
            before = [self._reference, *self._outcomes.values()] if group in last else []
            future = self._pool.submit(self._run, group, before)
            self._outcomes |= dict.fromkeys((setting.name for setting in group), future)

    def reference(self) -> list[list[list[int]]]:
        """The tokens that each request of each mix would have, had it not been aborted."""
        return self._reference.result()

    def of(self, setting: Setting) -> list[dict[str, Any]]:
        # An engine that ends its process leaves nothing: each test of that process says so.
        outcome = self._outcomes[setting.name].result()[setting.name]
        assert "error" not in outcome, outcome["error"]
        return outcome["results"]

    def close(self) -> None:
        """Start no more of them."""
        self._pool.shutdown(cancel_futures=True)

    def _run_reference(self) -> list[list[list[int]]]:
        folder = self._folder / "reference"
        folder.mkdir()
        mixes = [{**mix, "unaborted": True} for mix in MIXES]
        args = {**engine_args(self._model), "kv_cache_memory_bytes": PLENTIFUL_BYTES}
        return [result["tokens"] for result in run_engine(self._forks, folder, {"engine_args": args, "mixes": mixes})]

    def _run(self, group: Sequence[Setting], before: Sequence[Future[Any]]) -> dict[str, Any]:
        wait(before)
        folder = self._folder / group[0].name
        folder.mkdir()
        return run_engine(
            self._forks, folder, {each.name: spec_of(each, self._model, folder) for each in group}, group[0].env
        )


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, forks: Forks, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Results]:
    asked = [item.callspec.params["setting"] for item in request.session.items if item.module is request.module]
    found = Results(forks, model, tmp_path_factory.mktemp("exact"), asked)
    yield found
    found.close()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_tokens_are_stock_vllms_and_every_block_comes_back(setting: Setting, results: Results) -> None:
    require_exact(setting, results)


def require_exact(setting: Setting, results: Results) -> None:
    """Assert that the setting's tokens are the reference's, and that all is given back."""
    require_same(setting, MIXES, results.reference(), results.of(setting))


def require_same(
    setting: Setting,
    mixes: Sequence[dict[str, Any]],
    reference: Sequence[list[list[int]]],
    found: Sequence[dict[str, Any]],
    is_compared: Callable[[MixRequest, bool], bool] = lambda request, in_other_steps: True,
) -> int:
    """As :func:`require_exact`, of any mixes; how many requests were compared, by what each is and was through."""
    assert min(len(mixes), ENOUGH_MIXES) <= len(found) <= len(mixes) == len(reference)
    num_compared = 0
    for mix, expected, result in zip(mixes[: len(found)], reference[: len(found)], found, strict=True):
        for number, (request, want, got) in enumerate(zip(make_mix(**mix), expected, result["tokens"], strict=True)):
            assert len(want) == request.max_tokens
            if not is_compared(request, number in {*result["recomputed"], *result["cut"]}):
                continue
            num_compared += 1
            assert got == (want if request.abort_step is None else want[: len(got)]), mix
        books = result["books"]
        moves = books.pop("moves")
        assert books == {
            "pool_all_free": True,
            "host_all_free": True,
            "zone_all_free": True,
            "no_requests": True,
            "usage": 0.0,
            "tracked": 0,
        }, mix
    for move in setting.must_move:  # or the setting has not tested what it is there for
        assert moves[move] > 0, moves
    return num_compared
