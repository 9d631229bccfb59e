"""The tools that tests here run: from the PATH, or the tests that need them skip themselves."""

from __future__ import annotations

import os
import shutil

import pytest


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not on the PATH; on Debian and Ubuntu: apt-get install prometheus"
        if os.environ.get("LAYERKV_REQUIRE_TOOLS") == "1":
            pytest.fail(f"{reason} (LAYERKV_REQUIRE_TOOLS=1: no skipping)")
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def promtool() -> str:
    """The path of promtool."""
    return _tool("promtool")


@pytest.fixture(scope="session")
def prometheus_binary() -> str:
    """The path of prometheus."""
    return _tool("prometheus")
