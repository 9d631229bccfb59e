"""`layerkv top` beside a real server: what it shows is what `/metrics` has, and what clients got."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from layerkv.core.residency import Residency
from layerkv.scheduler.reasons import Resource
from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.served import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    PATIENT_TOP,
    POLL_LIMIT_S,
    Completion,
    Samples,
    Server,
    body,
    top_once,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

WAYS = ("store", "load")


def row_of(picture: Mapping[str, Any], server: Server) -> dict[str, Any]:
    """What is told of the one engine, which no broker knows."""
    assert picture["broker"] is None
    assert picture["errors"] == []
    [row] = picture["engines"]
    model = server.client.get("/v1/models").json()["data"][0]["id"]
    assert (row["title"], row["engine"], row["url"]) == (model, f"{model}/0", f"{server.url}/metrics")
    assert {key for key, value in row.items() if value is None} >= {"pids", "is_connected", "device", "host"}
    assert set(row["requests"]) == set(Residency)
    assert set(row["waits_for"]) <= set(Resource)
    return dict(row)


def num_tokens(samples: Samples, *outcomes: str) -> int:
    """Tokens of all classes."""
    names = [f"layerkv_tokens_{outcome}_total" for outcome in outcomes or ("on_time", "late")]
    return int(sum(value for (name, _), value in samples.values.items() if name in names))


def settled(server: Server) -> Samples:
    """What the idle server says once nothing waits to be counted: aborted requests are, with a later step."""
    server.wait_until_idle()
    server.complete(prompt(10, seed=600), 4)
    return server.wait_until_idle()


@pytest.mark.usefixtures("pressed")  # so that one class has tokens that are late, and the other none
def test_of_an_idle_server_every_figure_is_that_of_its_metrics(server: Server) -> None:
    settled(server)
    row = row_of(top_once("--url", server.url), server)
    samples = server.metrics()
    assert row["requests"] == {residency.value: 0 for residency in Residency} == samples.residencies()
    assert row["paused"] == samples("layerkv_paused_requests") == 0
    assert row["waits_for"] == {}
    assert row["bytes_per_second"] == dict.fromkeys(WAYS, 0.0)
    on_time, late = num_tokens(samples, "on_time"), num_tokens(samples, "late")
    share = on_time / (on_time + late)
    assert row["tokens"] == {"on_time": on_time, "late": late, "on_time_share": share, "on_time_share_now": None}


def test_every_token_that_a_client_got_is_counted_once(server: Server) -> None:
    def counted() -> int:
        tokens = row_of(top_once("--url", server.url), server)["tokens"]
        return int(tokens["on_time"] + tokens["late"])

    settled(server)
    before = counted()
    classes = ("chat", "batch", "batch")
    requests = [
        body(prompt(50, seed=610 + index), 20 + index, vllm_xargs={"slo_class": name})
        for index, name in enumerate(classes)
    ]
    got = sum(len(completion.token_ids) for completion in server.stream(requests))
    server.wait_until_idle()
    assert got == 20 + 21 + 22
    assert counted() - before == got


def test_under_a_load_every_request_is_somewhere_and_the_pool_holds_no_more_than_it_can(server: Server) -> None:
    num_requests, prompt_tokens = 24, 300
    before = settled(server)
    found: dict[str, Any] = {}

    def has_them_all(samples: Samples) -> bool:
        requests = samples.residencies()
        return sum(requests.values()) == num_requests and requests["parked"] >= num_requests // 4

    def until(_: list[Completion]) -> None:
        server.wait_for(has_them_all)
        wait_for_lines(lines, 3)  # the last one's two readings came after that
        found.update(lines[-1])

    with live(server) as lines:
        wait_for_lines(lines, 1)
        completions = server.stream([body(prompt(prompt_tokens, seed=seed), 700) for seed in range(620, 644)], until)
    assert not any(completion.finish_reason for completion in completions), "all were there all the time"
    row, after = row_of(found, server), settled(server)
    requests = row["requests"]
    assert sum(requests.values()) == num_requests
    most_resident = before("layerkv_pool_blocks") // -(-prompt_tokens // BLOCK_TOKENS)
    assert 0 < requests["resident"] <= most_resident
    assert requests["parked"] > 0
    assert row["waits_for"].get("pool", 0) > 0
    tokens = row["tokens"]
    assert num_tokens(before) < tokens["on_time"] + tokens["late"] <= num_tokens(after)
    for way in WAYS:
        moved = row["bytes_per_second"][way] * found["interval_s"]
        assert 0 <= moved <= after("layerkv_bytes_total", way) - before("layerkv_bytes_total", way)


@contextmanager
def live(server: Server) -> Iterator[list[dict[str, Any]]]:
    """The lines of `layerkv top --json` so far, one a second, until this context ends; then it must end well."""
    command = [*PATIENT_TOP, "--json", "--url", server.url]
    lines: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda out: lines.extend(map(json.loads, out)), args=(process.stdout,))
        reader.start()
        try:
            yield lines
            process.send_signal(signal.SIGINT)
            assert process.wait(POLL_LIMIT_S) == 0
        finally:
            process.kill()
            reader.join()


def wait_for_lines(lines: list[dict[str, Any]], num_more: int) -> None:
    end_s, wanted = time.monotonic() + POLL_LIMIT_S, len(lines) + num_more
    while len(lines) < wanted:
        assert time.monotonic() < end_s, lines
        time.sleep(0.01)


def test_rates_times_their_intervals_are_all_bytes_that_were_copied(server: Server) -> None:
    before = settled(server)
    with live(server) as lines:
        wait_for_lines(lines, 1)
        server.stream([body(prompt(300, seed=seed), 60) for seed in range(650, 674)])
        server.wait_until_idle()
        wait_for_lines(lines, 2)  # stores in the background are counted a little later
        after = server.metrics()
    rows = [row_of(line, server) for line in lines]
    for way in WAYS:
        grown = after("layerkv_bytes_total", way) - before("layerkv_bytes_total", way)
        assert grown >= BLOCK_BYTES
        copied = sum(row["bytes_per_second"][way] * line["interval_s"] for row, line in zip(rows, lines, strict=True))
        assert copied == pytest.approx(grown)
    assert num_tokens(after) - num_tokens(before) == 24 * 60
    shares = [row["tokens"]["on_time_share_now"] for row in rows]
    assert shares[0] is None, "no token came between the first two readings"
    assert any(share is not None for share in shares)
