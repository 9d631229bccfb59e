"""The server under a policy that refuses under overload and changes while it runs; its decisions are explained."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from layerkv.cli import main
from layerkv.explain import run_explain
from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.served import POLL_LIMIT_S, POLL_S, REQUEST_LIMIT_S, Server, body

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

POLICY = """
version: 1
default_class: patient
classes:
  patient: {ttft: 60s, tpot: 1s}
  strict: {ttft: 100ms, tpot: 1s, overload: reject}
"""


@dataclass(frozen=True)
class Reloadable:
    """The server, and its policy and its log of decisions."""

    server: Server
    policy_path: Path
    log_path: Path


@pytest.fixture(scope="module")
def reloadable(server: Server) -> Iterator[Reloadable]:
    """The server under the policy above; its own is in force again afterwards."""
    folder = server.log_path.parent
    policy_path = folder / "slo.yaml"
    own = policy_path.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        policy_path.write_text(POLICY)
        assert main(["policy", "reload"]) == 0
        yield Reloadable(server, policy_path, folder / "decisions.jsonl")
        policy_path.write_text(own)
        assert main(["policy", "reload"]) == 0


def status_of(server: Server, slo_class: str) -> int:
    return server.post(body(prompt(10, seed=1), 2, vllm_xargs={"slo_class": slo_class})).status_code


def wait_for_status(server: Server, slo_class: str, status: int) -> None:
    end_s = time.monotonic() + POLL_LIMIT_S
    while status_of(server, slo_class) != status:
        assert time.monotonic() < end_s, server.log()[-2000:]
        time.sleep(POLL_S)


def test_under_overload_a_class_that_asks_for_it_is_refused_with_429_and_when_to_come_back(
    reloadable: Reloadable,
) -> None:
    server = reloadable.server
    assert status_of(server, "strict") == 200, "nothing waits: it is served"
    counted_before = server.metrics()("layerkv_overload_refused_total", "strict")

    async def flood() -> list[httpx.Response]:
        options = {"base_url": server.client.base_url, "timeout": REQUEST_LIMIT_S, "trust_env": False}
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), **options) as client:

            async def send(seed: int, slo_class: str, after_s: float) -> httpx.Response:
                await asyncio.sleep(after_s)
                request = body(prompt(900, seed=seed), 8, vllm_xargs={"slo_class": slo_class})
                return await client.post("/v1/completions", json=request)

            sent = [send(seed, "patient", 0.0) for seed in range(40)]
            sent += [send(100 + index, "strict", 0.02 * index) for index in range(60)]
            return await asyncio.gather(*sent)

    responses = asyncio.run(flood())
    assert all(response.status_code == 200 for response in responses[:40]), "who does not ask for it is not refused"
    refused = [response for response in responses[40:] if response.status_code == 429]
    assert refused
    assert {response.status_code for response in responses[40:]} <= {200, 429}
    assert server.metrics()("layerkv_overload_refused_total", "strict") - counted_before == len(refused)
    for response in refused:
        message = response.json()["error"]["message"]
        assert "overloaded" in message
        assert f"retry after {response.headers['retry-after']} s" in message
        assert int(response.headers["retry-after"]) >= 1
    server.wait_until_idle()
    wait_for_status(server, "strict", 200)


def test_reasons_are_counted_and_the_log_explains_a_request(reloadable: Reloadable) -> None:
    server = reloadable.server
    server.complete(prompt(50, seed=7), 4, request_id=EXPLAINED)
    reasons = {label for (name, label) in server.metrics().values if name == "layerkv_decisions_total"}
    assert "fits" in reasons
    end_s = time.monotonic() + POLL_LIMIT_S
    while "finished with" not in (told := explained(reloadable.log_path)):
        assert time.monotonic() < end_s, told
        time.sleep(POLL_S)
        server.complete(prompt(10, seed=8), 1)  # what is buffered is written when steps are made
    assert "arrived: class" in told


EXPLAINED = "to-be-explained"


def explained(log_path: Path) -> str:
    from layerkv.explain import read_histories

    found = [request_id for request_id in read_histories(log_path) if EXPLAINED in request_id]
    if not found:
        return ""
    console = Console(record=True, quiet=False, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    run_explain(log_path, found[0], as_json=False, console=console)
    return console.export_text()


def test_layerkv_policy_reload_brings_a_new_class_in(reloadable: Reloadable) -> None:
    server = reloadable.server
    assert status_of(server, "new") == 400
    reloadable.policy_path.write_text(POLICY + "  new: {ttft: 1s, tpot: 1s}\n")
    assert main(["policy", "reload"]) == 0
    wait_for_status(server, "new", 200)
    served = server.metrics()("layerkv_ttft_slo_met_total", "new") + server.metrics()(
        "layerkv_ttft_slo_missed_total", "new"
    )
    assert served > 0, "the engine core counts it under the new class"


def test_an_invalid_policy_is_refused_and_the_old_one_stays(
    reloadable: Reloadable, capsys: pytest.CaptureFixture[str]
) -> None:
    server, known = reloadable.server, reloadable.policy_path.read_text()
    stays = "the policy is not reloaded, the one in force stays"
    num_before = server.num_logged(stays)
    reloadable.policy_path.write_text("version: 1\ndefault_class: nobody\nclasses: {}\n")
    assert main(["policy", "reload"]) == 2
    assert "classes" in capsys.readouterr().err
    server.process.send_signal(signal.SIGHUP)
    end_s = time.monotonic() + POLL_LIMIT_S
    while server.num_logged(stays) < num_before + 2:  # front end and engine core
        assert time.monotonic() < end_s, server.log()[-2000:]
        time.sleep(POLL_S)
    assert status_of(server, "patient") == 200
    assert server.process.poll() is None
    reloadable.policy_path.write_text(known)


def test_reload_says_when_there_is_nobody_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main(["policy", "reload"]) == 1
    assert "no engine with a policy file runs here" in capsys.readouterr().err
