"""What `layerkv doctor --model` says, and what an engine of the same model has: `python -m ... ENGINE.json OUT.json`.

The engine has random weights; with `kv_transfer_config` it is layerkv's, else stock.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def _told(args: dict[str, Any]) -> dict[str, Any]:
    from layerkv.cli import main as layerkv

    others = {key: value for key, value in args.items() if key != "model"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = layerkv(["doctor", "--model", args["model"], "--engine-args", json.dumps(others), "--json"])
    document: dict[str, Any] = json.loads(printed.getvalue())
    return {**document, "status": status}


def _has(args: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    llm = LLM(**args, load_format="dummy", disable_log_stats=True)
    core = llm.llm_engine.engine_core.engine_core
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    found: dict[str, Any] = {
        "groups": [
            {
                "layers": len(group.layer_names),
                "block_tokens": group.kv_cache_spec.block_size,
                "page_bytes": group.kv_cache_spec.page_size_bytes,
                "spec": type(group.kv_cache_spec).__name__,
            }
            for group in groups
        ],
    }
    if args.get("kv_transfer_config"):
        side = core.scheduler.connector.scheduler_side
        found["sizes"] = {
            "pool_blocks": side.geometry.pool_blocks,
            "zone_blocks": side.geometry.total_blocks - side.geometry.pool_blocks,
            "zone_bytes": side.geometry.num_lanes * side.geometry.lane_bytes,
        }
    core.shutdown()
    return found


def main() -> None:
    given, taken = map(Path, sys.argv[1:])
    args = json.loads(given.read_text())
    told = _told(args)
    taken.write_text(json.dumps({"told": told, "has": _has(args)}))


if __name__ == "__main__":
    main()
