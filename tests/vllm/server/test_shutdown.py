from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.served import POLL_LIMIT_S, STOP_LIMIT_S, Completion, Server, body

if TYPE_CHECKING:
    import psutil

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def shared_memory_of(processes: list[psutil.Process]) -> set[Path]:
    """Named shared memory that these processes have mapped."""
    lines = [line for process in processes for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
    names = {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}
    return {Path(name) for name in names if not name.endswith(" (deleted)")}


def test_sigterm_ends_a_busy_server_and_leaves_nothing_behind(server_to_stop: Server) -> None:
    import psutil

    server = server_to_stop
    processes = server.processes()
    shared = shared_memory_of(processes)
    assert len(processes) > 2  # the API server, the engine and its worker
    log_before: list[str] = []
    end_s = time.monotonic() + POLL_LIMIT_S

    def until(completions: list[Completion]) -> None:
        while not all(completion.token_ids for completion in completions):  # six of them resident, the others parked
            assert time.monotonic() < end_s
            time.sleep(0.001)
        log_before.append(server.log())
        server.terminate()

    server.stream([body(prompt(300, seed=seed), 600) for seed in range(500, 524)], until)
    assert server.process.wait(STOP_LIMIT_S) == 0
    _, alive = psutil.wait_procs(processes, timeout=STOP_LIMIT_S)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert [name for name in shared if name.exists()] == []
    after = server.log().removeprefix(log_before[0])
    assert re.findall(r"layerkv/(?:core|device|vllm_plugin)/.*", after) == []  # no traceback goes through our code
