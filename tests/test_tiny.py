"""The whole surface in ten seconds: `python -m pytest tests/test_tiny.py` says whether a checkout works at all.

One way through each part, in the order of the house's rows; what each does in every case is tested in its own folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from layerkv.cli import _parser, main
from layerkv.config import EngineConfig
from layerkv.core.geometry import KVGeometry
from layerkv.core.residency import Residency
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason
from tests.fakes.flat_ledger import FlatLedger
from tests.fakes.snapshots import admitted, crowd, prompt, snapshot

ROOT = Path(__file__).parents[1]


def test_the_flag_and_its_policy_file_are_read() -> None:
    policy = ROOT / "configs" / "slo" / "chat-and-batch.yaml"
    config = EngineConfig.from_extra_config({"policy": str(policy), "host_memory": "8GiB"})
    assert (set(config.read_policy().classes), config.host_memory_bytes) == ({"chat", "batch"}, 8 << 30)


def test_a_prompt_starts_in_the_zone_while_the_pool_is_full() -> None:
    decision = decide(snapshot(waiting=[prompt("a")], free_blocks=0, **crowd(3)))
    assert admitted(decision) == [("a", True)]
    assert decision.reasons == {"a": Reason.POOL_CONTENDED}


def test_the_books_follow_a_request_through_zone_host_memory_and_pool() -> None:
    ledger = FlatLedger(KVGeometry(3, page_bytes=64, block_tokens=4, pool_blocks=16, zone_blocks=8, lanes=1), 8)
    ledger.add("a")
    ledger.admit_layered("a", table_blocks=3, zone_blocks=3)
    table = ledger.zone.take("a", 3)
    ledger.started("a")
    ledger.step_layered("a", table, num_computed=0, num_scheduled=10)
    assert ledger.take_plan(10).stores
    ledger.park("a", table, 10)
    ledger.zone.give_back(table)
    ledger.fetch("a", (1, 2, 3), 0)
    assert [fetch.request_id for fetch in ledger.take_plan(0).fetches] == ["a"]
    ledger.complete_fetch("a")
    assert ledger.residency["a"] is Residency.RESIDENT
    ledger.finish("a")
    assert (ledger.num_host_blocks_used, ledger.zone.num_taken) == (0, 0)
    ledger.check()


def test_copies_in_the_right_order_bring_every_layers_kv_back() -> None:
    """Over the CPU engine: layer by layer through the lanes into host memory, and back into the pool."""
    pytest.importorskip("torch")
    from tests.cpu.device.scenarios import prompt_in_chunks_that_end_inside_blocks
    from tests.fakes.workers import make_worker, small_geometry

    server = make_worker("cpu", small_geometry(5, 2), 18).server(18)
    prompt_in_chunks_that_end_inside_blocks(server)
    assert server.model.num_checked > 0


def test_the_simulator_compares_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = yaml.safe_load((ROOT / "configs" / "sim" / "quickstart.yaml").read_text())
    document["workload"]["requests"], document["policies"] = 100, ["stock", "layerkv"]
    path = tmp_path / "few.yaml"
    path.write_text(yaml.safe_dump(document))
    assert not main(["simulate", str(path)])
    printed = capsys.readouterr().out
    assert "stock" in printed
    assert "layerkv" in printed


def commands(parser: argparse.ArgumentParser, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command, those within commands included."""
    yield path
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from commands(child, *path, name)


@pytest.mark.parametrize("command", list(commands(_parser())), ids=lambda command: " ".join(command) or "layerkv")
def test_every_command_has_help(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(("usage: layerkv", *command)))


@pytest.mark.vllm
def test_the_installed_vllm_has_all_that_the_adapter_stands_on() -> None:
    from layerkv.vllm_plugin.compat import require_compatible

    require_compatible()
