"""One server, and one load on it, for all tests in this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from layerkv.vllm_plugin.our_classes import SMOOTH_MIDDLEWARE
from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.served import POLICY, Completion, Samples, Server, body


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among the tests that use the server, those that stop it come last."""
    used = [getattr(item, "fixturenames", ()) for item in items]
    places = [place for place, names in enumerate(used) if "server" in names]
    users = [items[place] for place in sorted(places, key=lambda place: "server_to_stop" in used[place])]
    for place, item in zip(places, users, strict=True):
        items[place] = item


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A `vllm serve` with layerkv and little KV memory, in whose folder are its policy and its log of decisions.

    It announces itself in that folder too: whoever changes its policy changes it back.
    """
    folder = tmp_path_factory.mktemp("server")
    policy = shutil.copy(POLICY, folder / "slo.yaml")
    middleware = ("--middleware", "layerkv.vllm_plugin.overload.RetryAfter", "--middleware", SMOOTH_MIDDLEWARE)
    decisions = str(folder / "decisions.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        running = Server(tiny_model, folder / "server.log", *middleware, policy=policy, decision_log=decisions)
    try:
        yield running
    finally:
        running.kill()


@pytest.fixture
def server_to_stop(server: Server) -> Server:
    """The server, for a test that takes it away from all others."""
    return server


@dataclass(frozen=True)
class PressedLoad:
    """What a load did whose KV needs several times the device memory."""

    prompts: list[list[int]]
    max_tokens: list[int]
    completions: list[Completion]
    before: Samples
    after: Samples

    def grown(self, counter: str, label: str = "") -> float:
        """How much a counter rose during the load."""
        return self.after(counter, label) - self.before(counter, label)


@pytest.fixture(scope="session")
def pressed(server: Server) -> PressedLoad:
    """24 streaming requests at once, among them prompts of several chunks; run to the end, the server idle again."""
    prompts = [prompt(700 if seed % 8 == 5 else 300, seed=seed) for seed in range(24)]
    max_tokens = [40 + 10 * (seed % 7) for seed in range(24)]
    before = server.metrics()
    requests = [body(*both) for both in zip(prompts, max_tokens, strict=True)]
    completions = server.stream(requests)
    return PressedLoad(prompts, max_tokens, completions, before, server.wait_until_idle())
