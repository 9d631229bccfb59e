"""What the tests here share whose servers are toys."""

import pytest


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy is ready within a fraction of the time that the suite lets pass between two looks at a real server."""
    monkeypatch.setattr("layerkv.bench.suite.server.POLL_S", 0.02)
