"""What other tests stand on: a fork is as fresh as a process of its own, and its end is told as it was."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.vllm.forked import Forks, run_module

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('no')", 1),
        ("raise ValueError", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_a_program_ends_with_the_status_of_a_process_of_its_own(forks: Forks, code: str, status: int) -> None:
    assert forks.run(code).returncode == status


def test_a_program_is_main_with_its_arguments_its_environment_and_its_outputs(forks: Forks) -> None:
    code = "import os, sys; print(__name__, sys.argv, os.environ['OURS']); print(1 / 0)"
    ended = forks.run(code, "a", "b", OURS="set")
    assert ended.stdout == "__main__ ['-c', 'a', 'b'] set\n"
    assert ended.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_both_outputs_go_to_one_log_if_there_is_one(forks: Forks, tmp_path: Path) -> None:
    forks.run("import sys; print('out', flush=True); print('err', file=sys.stderr)", log_path=tmp_path / "log")
    assert (tmp_path / "log").read_text() == "out\nerr\n"


def test_vllm_is_imported_and_layerkv_is_not_nor_anything_that_an_earlier_program_did(forks: Forks) -> None:
    look = """
import os, sys
from vllm.engine.arg_utils import EngineArgs
assert "vllm.v1.worker.cpu_worker" in sys.modules
assert not any(name.startswith("layerkv") for name in sys.modules)
assert not hasattr(EngineArgs.create_engine_config, "wrapped_by_layerkv")
assert "OURS" not in os.environ
"""
    change = "import os; os.environ['OURS'] = 'set'; from layerkv.vllm_plugin import register; register()"
    for code in (look, change, look):
        ended = forks.run(code)
        assert ended.returncode == 0, ended.stderr


def test_what_is_registered_for_the_end_is_done_and_threads_are_waited_for(forks: Forks) -> None:
    code = """
import atexit, threading, time
atexit.register(print, "the end")
threading.Thread(target=lambda: (time.sleep(0.05), print("a thread"))).start()
"""
    assert forks.run(code).stdout == "a thread\nthe end\n"


def test_a_program_beyond_its_limit_is_killed_and_others_go_on(forks: Forks) -> None:
    hangs, goes_on = forks.start("import time; time.sleep(600)", limit_s=0.2), forks.start("print('done')")
    assert goes_on.result().stdout == "done\n"
    assert hangs.result().returncode == -signal.SIGKILL


def test_a_module_is_run_as_by_python_m(forks: Forks) -> None:
    assert forks.run(run_module("platform")).stdout.startswith("Linux")
