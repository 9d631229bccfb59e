"""What layerkv uses of vLLM is read from its source, and is what is listed and checked at start-up."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from layerkv.vllm_plugin import surfaces
from layerkv.vllm_plugin.compat import NOT_IN_ALL
from tests.unit.tools.test_vllm_tree import write
from tools.vllm_tree import VLLMTree
from tools.vllm_uses import PLUGIN, SURFACES, Reader, Uses, text_of, uses_of_plugin

HEAD = """
from __future__ import annotations
from typing import TYPE_CHECKING
from vllm.v1.request import Request, RequestStatus
from layerkv.vllm_plugin.scheduler_view import SchedulerView
if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
"""
VIEW = """
from typing import Protocol
class SchedulerView(Protocol):
    running: list[Request]
    def free(self) -> None: ...
"""
REQUEST = "vllm.v1.request.Request"
SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"


def uses(body: str, vllm: VLLMTree | None = None) -> Uses:
    return Reader([("scheduler_view", HEAD + VIEW), ("made_up", HEAD + body)], vllm).uses


@pytest.mark.parametrize(
    ("body", "owner"),
    [
        ("def f(request: Request) -> int:\n    return request.new_name", REQUEST),
        ("def f(request: Request | None) -> None:\n    request.new_name = 1", REQUEST),
        ("def f(request: Request) -> None:\n    other = request\n    other.new_name += 1", REQUEST),
        ("def f(requests: list[Request]) -> None:\n    for each in requests:\n        print(each.new_name)", REQUEST),
        ("def f(rs: dict[str, Request]) -> None:\n    for k, r in rs.items():\n        r.new_name()", REQUEST),
        ("def f(rs: dict[str, Request]) -> bool:\n    return any(r.new_name for r in rs.values())", REQUEST),
        ("def f(rs: dict[str, Request]) -> None:\n    if (r := rs.get('a')) is not None:\n        r.new_name", REQUEST),
        ("def f(rs: dict[str, Request]) -> int:\n    return rs['a'].new_name", REQUEST),
        ("def f(r: Request) -> int:\n    def g() -> int:\n        return r.new_name\n    return g()", REQUEST),
        ("def f(r: Request) -> object:\n    return getattr(r, 'new_name')", REQUEST),
        ("def f(r: Request) -> object:\n    return getattr(r, 'new_name', None)", REQUEST),
        (
            "def f(c: VllmConfig) -> list[object]:\n"
            "    layers = c.compilation_config.static_forward_context.values()\n"
            "    return [getattr(layer, 'new_name', None) for layer in layers]",
            "vllm.model_executor.layers.attention.attention.Attention",
        ),
        ("def f(r: Request) -> bool:\n    return r.status is RequestStatus.new_name", "vllm.v1.request.RequestStatus"),
        ("def f(s: SchedulerView) -> int:\n    return s.new_name", SCHEDULER),
        ("def f(s: SchedulerView) -> list[int]:\n    return [r.new_name for r in (*s.running, 1)]", REQUEST),
        ("def f(s: SchedulerView) -> None:\n    for r in sorted(s.running):\n        r.new_name", REQUEST),
        ("def f(s: SchedulerView) -> int:\n    return next(iter(s.running)).new_name", REQUEST),
        (
            "def f(s: SchedulerView) -> int:\n    return s.kv_cache_manager.block_pool.new_name",
            "vllm.v1.core.block_pool.BlockPool",
        ),
        ("def f(c: VllmConfig) -> int:\n    return c.parallel_config.new_name", "vllm.config.ParallelConfig"),
        (
            "class A:\n    def __init__(self, s: SchedulerView) -> None:\n        self._s = s\n"
            "    def f(self) -> int:\n        return self._s.new_name",
            SCHEDULER,
        ),
        ("class A(Request):\n    def f(self) -> int:\n        return self.new_name", REQUEST),
        ("class A(Request):\n    def f(self) -> int:\n        return super().new_name()", REQUEST),
        ("class B(Request): ...\nclass A(B):\n    def f(self) -> int:\n        return self.new_name", REQUEST),
    ],
)
def test_what_is_read_of_one_of_vllms_objects_is_seen(body: str, owner: str) -> None:
    assert "new_name" in uses(body).members[owner]


@pytest.mark.parametrize(
    "body",
    [
        "class A(Request):\n    def __init__(self) -> None:\n        self.new_name = 1\n"
        "    def f(self):\n        return self.new_name",
        "class A(Request):\n    new_name = 1\n    def f(self) -> int:\n        return self.new_name",
        "class A:\n    def f(self) -> int:\n        return self.new_name",
        "def f(request: Request) -> None:\n    request = object()\n    request.new_name",
    ],
)
def test_what_is_ours_is_not(body: str) -> None:
    assert not any("new_name" in names for names in uses(body).members.values())


def test_what_is_passed_by_name_is_seen() -> None:
    found = uses("def f(s: SchedulerView, r: Request) -> None:\n    s.free(delay=1)\n    Request(first=2)")
    assert found.parameters[f"{SCHEDULER}.free"] == {"delay"}
    assert found.parameters[REQUEST] == {"first"}


def test_what_is_passed_at_its_place_is_seen(tmp_path: Path) -> None:
    text = (
        "class Request:\n"
        "    def step(self, first, second, third=0, *, fourth=0): ...\n"
        "    @staticmethod\n"
        "    def of(text): ...\n"
    )
    vllm = VLLMTree(write(tmp_path, {"vllm/v1/request.py": text}))
    body = (
        "def f(r: Request) -> None:\n"
        "    r.step(1, 2, fourth=3)\n"
        "    r.of('a')\n"
        "def g(r: Request, more: list[int]) -> None:\n"
        "    r.of(*more)\n"
    )
    found = uses(body, vllm).parameters
    assert found[f"{REQUEST}.step"] == {"first", "second", "fourth"}
    assert found[f"{REQUEST}.of"] == {"text"}


def test_what_an_override_takes_is_listed(tmp_path: Path) -> None:
    methods = ("step", "end", "declared", "both", "is_so")
    text = "class Request:\n" + "".join(f"    def {name}(self, a, b=0): ...\n" for name in methods)
    vllm = VLLMTree(write(tmp_path, {"vllm/v1/request.py": text}))
    body = (
        "class A(Request):\n"
        "    def step(self, a, *args, c=0, **more): return 1\n"
        "    def end(self, a, *, b=0): return 1\n"
        "    def declared(self, a, b=0): ...\n"
        "    def both(self, *args): return 1\n"
        "    @property\n"
        "    def is_so(self): return 1\n"
        "    def other(self, a): return 1\n"
        "class B(Request):\n"
        "    def both(self, a): return 1\n"
    )
    assert uses(body, vllm).tables()["OVERRIDES"] == {
        f"{REQUEST}.both": ["a"],
        f"{REQUEST}.end": ["a", "*", "b"],
        f"{REQUEST}.step": ["a", "*args", "c", "**more"],
    }


def test_only_what_is_imported_when_the_program_runs_is_a_name() -> None:
    found = uses("def f() -> None:\n    from vllm.utils import late")
    assert found.names["vllm.v1.request"] == {"Request", "RequestStatus"}
    assert found.names["vllm.utils"] == {"late"}
    assert "vllm.config" not in found.names


def test_overrides_are_those_methods_that_vllm_has(tmp_path: Path) -> None:
    text = "class Request:\n    def __init__(self):\n        self.held = 0\n    def step(self): ...\n"
    vllm = VLLMTree(write(tmp_path, {"vllm/v1/request.py": text}))
    body = "class A(Request):\n    held: int\n    def step(self): ...\n    def other(self):\n        return self.held"
    assert uses(body, vllm).members[REQUEST] == {"step", "held"}


def test_what_only_some_releases_have_is_not_required() -> None:
    found = uses("def f() -> None:\n    from vllm.outputs import RequestError, Other")
    assert found.tables()["NAMES"]["vllm.outputs"] == ["Other"]
    for path in NOT_IN_ALL:
        owner, _, name = path.rpartition(".")
        for table in (surfaces.NAMES, surfaces.MEMBERS):
            assert name not in table.get(owner, "").split()


needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@needs_vllm
def test_what_is_used_is_what_is_listed() -> None:
    """If it is not: python tools/vllm_uses.py --write."""
    assert (PLUGIN / SURFACES).read_text() == text_of(uses_of_plugin(VLLMTree.installed()))


@needs_vllm
def test_what_is_listed_is_much_of_what_a_reader_of_the_source_finds() -> None:
    """The reader has not gone blind: of each kind, uses that are known to be there."""
    members = {path.rpartition(".")[2]: set(names.split()) for path, names in surfaces.MEMBERS.items()}
    for owner, names in {
        "Request": "num_computed_tokens num_output_placeholders num_in_flight_tokens block_hashes session_id "
        "get_finished_reason take_events trace_headers",
        "RequestStatus": "PREEMPTED WAITING_FOR_STREAMING_REQ",
        "Scheduler": "running kv_holding_waiting deferred_waiting _inflight_prefills _preempt_request schedule",
        "KVCacheManager": "block_pool coordinator get_block_ids watermark_blocks",
        "SingleTypeKVCacheManager": "req_to_blocks allocate_new_blocks _get_num_evictable_blocks",
        "FreeKVCacheBlockQueue": "remove popleft_n",
        "KVConnectorBase_V1": "get_finished has_pending_push_work",
        "SupportsHMA": "request_finished_all_groups",
        "ParallelConfig": "tensor_parallel_size _api_process_count",
        "EngineArgs": "create_engine_config kv_transfer_config",
        "SchedulerOutput": "num_scheduled_tokens kv_connector_metadata",
        "KVCacheBlock": "ref_cnt pool",
        "Attention": "kv_sharing_target_layer_name",
    }.items():
        assert set(names.split()) <= members[owner], owner
    assert sum(map(len, members.values())) > 200
    passed = {".".join(path.split(".")[-2:]): names for path, names in surfaces.PARAMETERS.items()}
    for method, names in {
        "KVCacheManager.evict_blocks": "block_ids",
        "KVCacheCoordinator.find_longest_cache_hit": "block_hashes max_cache_hit_length",
        "BlockPool.get_cached_block": "block_hash kv_cache_group_ids",
        "ModelConfig.get_num_layers": "parallel_config",
    }.items():
        assert passed[method] == names, method
    assert len(surfaces.OVERRIDES) > 60
