"""What every test needs: an environment that keeps vLLM quiet and steady, and skips for what is not here."""

import importlib.util
import os
import signal
import tempfile

import pytest
from hypothesis import settings

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
    os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="layerkv-tests-")
    # Before torch is imported: OpenMP reads its variable once.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run."""
    if any(item.get_closest_marker("vllm") for item in items) and not importlib.util.find_spec("vllm"):
        _skip(items, "vllm", "vLLM is not installed; pip install layerkv[cpu]")
    if any(item.get_closest_marker("gpu") for item in items) and not _sees_cuda():
        _skip(items, "gpu", "no CUDA device is visible")


def _sees_cuda() -> bool:
    if not importlib.util.find_spec("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
