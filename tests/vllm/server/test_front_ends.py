"""One server of two API server processes, which is what data parallelism makes of itself too."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import httpx
import pytest

from layerkv.cli import main
from layerkv.runtime import running_engines
from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.served import POLL_LIMIT_S, POLL_S, REQUEST_LIMIT_S, Server, body, top_once

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

POLICY = """
version: 1
default_class: patient
classes:
  patient: {ttft: 60s, tpot: 1s}
  strict: {ttft: 100ms, tpot: 1s, overload: reject}
  long: {ttft: 100ms, tpot: 1s, overload: reject}
"""
ENOUGH = 16
"""Connections of which both front ends get some."""


@dataclass(frozen=True)
class TwoFrontEnds:
    """The server and its policy file."""

    server: Server
    policy_path: Path


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoFrontEnds]:
    folder = tmp_path_factory.mktemp("front-ends")
    policy_path = folder / "slo.yaml"
    policy_path.write_text(POLICY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        running = Server(tiny_model, folder / "server.log", "--api-server-count", "2", policy=policy_path)
        try:
            yield TwoFrontEnds(running, policy_path)
        finally:
            running.kill()


def answers(server: Server, requests: list[tuple[dict[str, object], float]]) -> list[httpx.Response]:
    """What each gets, sent so many seconds from now and over a connection of its own."""
    a_connection_each = httpx.Limits(max_connections=None, max_keepalive_connections=0)

    async def send_all() -> list[httpx.Response]:
        # One client: making one takes longer than the gap between two of these requests.
        async with httpx.AsyncClient(
            base_url=server.client.base_url, timeout=REQUEST_LIMIT_S, trust_env=False, limits=a_connection_each
        ) as client:

            async def send(request: dict[str, object], after_s: float) -> httpx.Response:
                await asyncio.sleep(after_s)
                return await client.post("/v1/completions", json=request)

            return await asyncio.gather(*(send(*both) for both in requests))

    return asyncio.run(send_all())


def statuses(server: Server, slo_class: str) -> set[int]:
    """What several requests of a class get, at both front ends: vLLM gives a connection to the one that has fewer."""
    request = body(prompt(10, seed=1), 2, vllm_xargs={"slo_class": slo_class})
    return {response.status_code for response in answers(server, [(request, 0.0)] * ENOUGH)}


def test_they_are_one_engine_to_layerkv_policy_reload(two: TwoFrontEnds) -> None:
    assert [engine.pid for engine in running_engines()] == [two.server.process.pid]


def test_when_the_signal_to_the_server_has_come_every_front_end_knows_the_new_class(two: TwoFrontEnds) -> None:
    assert statuses(two.server, "new") == {400}
    two.policy_path.write_text(POLICY + "  new: {ttft: 1s, tpot: 1s}\n")
    two.server.process.send_signal(signal.SIGHUP)
    end_s = time.monotonic() + POLL_LIMIT_S
    while two.server.num_logged("the policy is reloaded from") < 4:  # the server, two front ends, the engine core
        assert time.monotonic() < end_s, two.server.log()[-2000:]
        time.sleep(POLL_S)
    assert statuses(two.server, "new") == {200}
    for front_end in range(2):
        assert re.search(rf"ApiServer_{front_end}\b.*Received request", two.server.log()), "both got some"


def test_when_the_command_is_over_every_front_end_refuses_the_class_that_is_gone(two: TwoFrontEnds) -> None:
    two.policy_path.write_text(POLICY + "  old: {ttft: 1s, tpot: 1s}\n")
    assert main(["policy", "reload"]) == 0
    assert statuses(two.server, "old") == {200}
    two.policy_path.write_text(POLICY)
    assert main(["policy", "reload"]) == 0
    assert statuses(two.server, "old") == {400}


def test_while_the_policy_changes_nobody_gets_a_server_error(two: TwoFrontEnds) -> None:
    request = body(prompt(10, seed=2), 2, vllm_xargs={"slo_class": "now and then"})

    has_ended = threading.Event()

    def change() -> None:
        for text in cycle((POLICY + "  now and then: {ttft: 1s, tpot: 1s}\n", POLICY)):
            two.policy_path.write_text(text)
            assert main(["policy", "reload"]) == 0
            if has_ended.wait(0.1) and text is POLICY:
                return

    with ThreadPoolExecutor() as pool:
        changing = pool.submit(change)
        try:
            found = answers(two.server, [(request, 0.02 * index) for index in range(60)])
        finally:
            has_ended.set()
        changing.result(POLL_LIMIT_S)
    assert {response.status_code for response in found} <= {200, 400}


def test_both_refuse_under_overload_and_let_in_again_after_it(two: TwoFrontEnds) -> None:
    server = two.server

    def long(seed: int) -> dict[str, object]:
        return body(prompt(900, seed=seed), 8, vllm_xargs={"slo_class": "long"})

    def wait_until_all_are_let_in() -> None:
        server.wait_until_idle()
        end_s = time.monotonic() + POLL_LIMIT_S
        while statuses(server, "strict") != {200}:
            assert time.monotonic() < end_s, server.log()[-2000:]
            time.sleep(POLL_S)

    wait_until_all_are_let_in()
    for seed in range(8):  # What a request of this class costs is learned: a gate that lets some in counts with it.
        assert answers(server, [(long(200 + seed), 0.0)])[0].status_code == 200
    counted_before = server.metrics()("layerkv_overload_refused_total", "long")
    patient = [(body(prompt(900, seed=seed), 8, vllm_xargs={"slo_class": "patient"}), 0.0) for seed in range(40)]
    at_once = [(long(100 + index), 0.0) for index in range(60)]
    found = [response.status_code for response in answers(server, [*patient, *at_once])]
    assert set(found[:40]) == {200}
    # Some are let in before and after: whether one of these is, is a matter of milliseconds.
    assert {429} <= set(found[40:]) <= {200, 429}
    assert server.metrics()("layerkv_overload_refused_total", "long") - counted_before == found.count(429)
    wait_until_all_are_let_in()
    assert answers(server, [(long(300), 0.0)])[0].status_code == 200


def test_layerkv_top_shows_them_as_one_engine_with_all_that_both_counted(two: TwoFrontEnds) -> None:
    assert statuses(two.server, "patient") == {200}
    two.server.wait_until_idle()
    [row] = top_once("--url", two.server.url)["engines"]
    samples = two.server.metrics()
    assert row["requests"] == samples.residencies()
    counted = {
        outcome: sum(value for (name, _), value in samples.values.items() if name == f"layerkv_tokens_{outcome}_total")
        for outcome in ("on_time", "late")
    }
    assert {outcome: row["tokens"][outcome] for outcome in counted} == counted
    assert counted["on_time"] >= 2 * ENOUGH
