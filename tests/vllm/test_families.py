"""The models and features that people serve: layerkv's greedy tokens are stock vLLM's, family by family.

As :mod:`tests.vllm.test_exact`: random mixes of requests through real engines, parked, layered, with fetches that fail
and host memory that is too small; the reference is stock vLLM with KV memory for everything. Where stock's own tokens
depend on what shares a batch, the family says what is compared instead.

With ``LAYERKV_WRITE_FAMILIES`` set, what ran is written to ``docs/families.json``, from which
``tools/families.py --write`` makes the table of ``docs/models.md``. Then families run in all their settings; otherwise,
for time's sake, in those that ask most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from tests.vllm.families import AHEAD, FAMILIES, HOST_SMALL, MIXES, NUM_ADAPTERS, SCARCE, Family
from tests.vllm.family_rows import WRITES_ROWS, Head, Rows
from tests.vllm.forked import Forks
from tests.vllm.test_exact import PLENTIFUL_BYTES, Setting, engine_args, require_same, run_engine
from tests.vllm.tiny_families import make_adapter, make_draft_model, make_eagle_head

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

WITH_LITTLE_HOST_MEMORY = "qwen3-moe"
CPU_FLAGS = set(Path("/proc/cpuinfo").read_text().split())


def is_quick(family: Family, setting: Setting) -> bool:
    """Whether a run without much time has it: those with failing fetches ask most, and what one family does with little
    host memory says enough of the others; how little is too little depends on how fast a machine is."""
    if family.is_grouped:
        return setting is AHEAD
    return setting.name not in (SCARCE.name, HOST_SMALL.name) or family.name == WITH_LITTLE_HOST_MEMORY


CASES = [
    (family, setting)
    for family in FAMILIES
    for setting in family.settings
    if (WRITES_ROWS or is_quick(family, setting))
    # Few CPUs have kernels for bfloat16, and it has run seldom: so it stands in the way of no change yet.
    and (not family.cpu_flag or (WRITES_ROWS and family.cpu_flag in CPU_FLAGS))
]


def mixes_of(family: Family) -> list[dict[str, Any]]:
    return [{**mix, **family.mix} for mix in MIXES]


class Runs:
    """What the engines of the families did that this session asks for, a family to a process, two at a time."""

    def __init__(self, forks: Forks, tiny_model: Path, folder: Path, cases: Sequence[tuple[Family, Setting]]) -> None:
        self._forks, self._tiny_model, self._folder = forks, tiny_model, folder
        self.rows = Rows()
        self._makes_model = Lock()
        self._pool = ThreadPoolExecutor(2)
        self._outcomes: dict[tuple[str, str], Future[dict[str, Any]]] = {}
        for family in {family.name: family for family, _ in cases}.values():
            asked = [setting for each, setting in cases if each is family]
            together = [setting for setting in asked if not setting.alone]
            future = self._pool.submit(self._run, family, together, has_reference=True)
            names = ("reference", *(setting.name for setting in together))
            self._outcomes |= {(family.name, name): future for name in names}
        for family, setting in cases:  # engines of several processes come last
            if setting.alone:
                own = family.ranks_differ and "tensor_parallel_size" in setting.engine
                future = self._pool.submit(self._run, family, [setting], has_reference=own)
                self._outcomes[family.name, setting.name] = future
                if own:
                    self._outcomes[family.name, f"reference of {setting.name}"] = future

    def of(self, family: Family, name: str) -> list[dict[str, Any]]:
        """What each mix gave in one of its engines."""
        return _results(self._outcomes[family.name, name].result()[name])

    def reference(self, family: Family, setting: Setting) -> list[list[list[int]]]:
        """The tokens that each request of each mix would have, had it not been aborted."""
        own = self._outcomes.get((family.name, f"reference of {setting.name}"))
        future = own or self._outcomes[family.name, "reference"]
        return [result["tokens"] for result in _results(future.result()["reference"])]

    def close(self) -> None:
        """Start no more of them."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, family: Family, settings: Sequence[Setting], *, has_reference: bool) -> dict[str, Any]:
        folder = self._folder / f"{family.name}-{settings[0].name if settings else 'reference'}"
        folder.mkdir()
        model = self._tiny_model if family.recipe is None else self._model(family)
        more = {**family.spec, "mixes": mixes_of(family)}
        stock = {**engine_args(model), **family.engine}
        if family.mix.get("adapters"):
            more["adapters"] = [str(make_adapter(folder / f"adapter-{i}", i)) for i in range(NUM_ADAPTERS)]
        if method := family.spec.get("drafter"):
            make = make_eagle_head if method == "eagle" else make_draft_model
            drafter = str(make(model, folder / "drafter"))
            stock["speculative_config"] = {"method": method, "model": drafter, "num_speculative_tokens": 3}
        if family.mix.get("embeds"):
            more["embeds_of"] = str(model)
        specs: dict[str, Any] = {}
        if has_reference:
            unaborted = [{**mix, "unaborted": True} for mix in more["mixes"]]
            ranks = settings[0].engine.get("tensor_parallel_size", 1) if settings else 1
            engine = {**stock, "kv_cache_memory_bytes": PLENTIFUL_BYTES, "tensor_parallel_size": ranks}
            specs["reference"] = {**more, "engine_args": engine, "mixes": unaborted}
        for setting in settings:
            extra = {"host_memory": "64MiB", **setting.extra}
            connector = {"kv_connector": "LayerKVConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
            specs[setting.name] = {
                **more,
                "engine_args": {**stock, **setting.engine, "kv_transfer_config": connector},
                "ahead": setting.ahead,
                "fail_every": setting.fail_every,
            }
        return run_engine(self._forks, folder, specs, family.env)

    def _model(self, family: Family) -> Path:
        parent = self._folder / ("grouped" if family.is_grouped else "plain")
        folder = parent / str(family.recipe)
        with self._makes_model:
            if not folder.exists():
                parent.mkdir(exist_ok=True)
                program = MAKE_GROUPED if family.is_grouped else MAKE_FAMILY
                made = self._forks.run(program, str(family.recipe), str(self._tiny_model), str(folder))
                assert made.returncode == 0, made.stderr[-4000:]
        return folder


def _results(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    assert "error" not in outcome, outcome["error"]
    return outcome["results"]


MAKE_FAMILY = """
import sys
from pathlib import Path
from tests.vllm.tiny_families import make_family
make_family(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
"""
MAKE_GROUPED = """
import sys
from pathlib import Path
from tests.vllm.tiny_groups import make_tiny
make_tiny(sys.argv[1], Path(sys.argv[3]).parent)
"""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    cases = [(item.callspec.params["family"], item.callspec.params["setting"]) for item in items]
    found = Runs(forks, tiny_model, tmp_path_factory.mktemp("families"), cases)
    yield found
    found.close()
    found.rows.write_if_asked({each.name: Head(each.title, each.remark, len(each.settings)) for each in FAMILIES})


@pytest.mark.parametrize(("family", "setting"), CASES, ids=lambda value: value.name)
def test_tokens_are_stock_vllms_and_every_block_comes_back(family: Family, setting: Setting, runs: Runs) -> None:
    reference, found = runs.reference(family, setting), runs.of(family, setting.name)
    moves = found[-1]["books"]["moves"]
    num_compared = require_same(setting, mixes_of(family), reference, found, family.is_compared)
    assert 2 * num_compared > sum(len(result["tokens"]) for result in found), "most were left out: that says little"
    runs.rows.note(family.name, setting.name, moves, num_compared=num_compared)
