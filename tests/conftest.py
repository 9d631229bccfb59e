"""What every test needs: an environment that keeps vLLM quiet and steady, its turn, and skips for what is not here."""

import atexit
import fcntl
import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

ALONE = (
    "tests/monitoring/test_scrape.py",
    "tests/vllm/server/",
    "tests/vllm/test_demo_runner.py",
    "tests/vllm/test_sharing_bench.py",
    "tests/vllm/test_suite_case.py",
)
"""Real servers and their clients, which need both cores: no other test runs beside these, whose names begin so.
Fixtures of files and of the session come before a test's turn: what those start, and run, may be beside others."""

# Without a deadline: on a shared machine the first example of a test may take seconds.
settings.register_profile("layerkv", deadline=None)
settings.load_profile("layerkv")


def pytest_configure() -> None:
    """Give a bare `pytest` the environment of `make test`; of what is already set, only the log is not kept."""
    # What a script starts in the background is deaf to SIGINT, as are all its children: tests end programs by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Tests read what a user sees in the log with vLLM's default settings, and a machine may have made vLLM silent.
    for name in ("VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_CONFIG_PATH", "VLLM_LOGGING_PREFIX", "VLLM_PLUGINS"):
        os.environ.pop(name, None)
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    # Engines under test announce themselves here, and not among the user's own, whom `layerkv policy reload` signals.
    os.environ["XDG_RUNTIME_DIR"] = folder = tempfile.mkdtemp(prefix="layerkv-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Before torch is imported: OpenMP reads its variable once.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run in several processes: a file's all in one, for its fixtures, and all that run alone in one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "alone" if nodeid.startswith(ALONE) else nodeid.partition("::")[0]

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; and what takes longest comes first, so that no process ends with it alone."""
    items.sort(key=lambda item: (not item.nodeid.startswith(ALONE), not item.get_closest_marker("vllm")))
    if any(item.get_closest_marker("vllm") for item in items) and not importlib.util.find_spec("vllm"):
        _skip(items, "vllm", "vLLM is not installed; pip install '.[cpu]'")
    if any(item.get_closest_marker("gpu") for item in items) and not _sees_cuda():
        _skip(items, "gpu", "no CUDA device is visible")


@pytest.fixture(autouse=True)
def turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In several processes, a test of :data:`ALONE` waits for those of the others to end, and they for it."""
    if "PYTEST_XDIST_TESTRUNUID" not in os.environ:
        yield
        return
    is_alone = request.node.nodeid.startswith(ALONE)
    folder = tmp_path_factory.getbasetemp().parent  # of this run, over those of its processes
    with (folder / "door").open("w+") as door, (folder / "room").open("w+") as room:
        # Who waits for the room keeps the door: one that wants to be alone would wait for as long as others come.
        fcntl.lockf(door, fcntl.LOCK_EX)
        fcntl.lockf(room, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        fcntl.lockf(door, fcntl.LOCK_UN)
        yield


def _sees_cuda() -> bool:
    if not importlib.util.find_spec("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
