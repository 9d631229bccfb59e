"""A class named at the top level of a request's body, where vLLM ignores it, is reported once."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.heard import heard_by

pytest.importorskip("vllm")

from layerkv.vllm_plugin import stray_class
from layerkv.vllm_plugin.overload import RetryAfter

pytestmark = pytest.mark.vllm


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the watch has logged."""
    with heard_by(logging.getLogger(stray_class.logger.name)) as heard:
        yield heard


def send(middleware: RetryAfter, *parts: bytes, method: str = "POST", kind: str = "http") -> bytes:
    """Send a body in these parts; returns what the application behind the middleware got."""

    async def run() -> bytes:
        left = [{"type": "http.request", "body": p, "more_body": i < len(parts)} for i, p in enumerate(parts, start=1)]

        async def receive() -> Any:
            return left.pop(0) if left else {"type": "http.disconnect"}

        async def app_send(message: Any) -> None: ...

        await middleware({"type": kind, "method": method, "path": "/v1/completions"}, receive, app_send)
        return got.pop()

    return asyncio.run(run())


got: list[bytes] = []


async def app(_scope: Any, receive: Any, send_on: Any) -> None:
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
    got.append(body)
    await send_on({"type": "http.response.start", "status": 200, "headers": []})
    await send_on({"type": "http.response.body", "body": b"ok"})


STRAY = json.dumps({"model": "m", "prompt": "x", "slo_class": "chat"}).encode()


def test_it_is_reported_once_with_what_to_write_instead(warnings: list[str]) -> None:
    middleware = RetryAfter(app)
    assert send(middleware, STRAY) == STRAY
    assert send(middleware, STRAY) == STRAY
    [warning] = warnings
    assert '"slo_class": "chat"' in warning
    assert "vllm_xargs" in warning
    assert "/v1/completions" in warning


def test_a_body_that_comes_in_parts_is_seen_whole(warnings: list[str]) -> None:
    assert send(RetryAfter(app), STRAY[:40], STRAY[40:50], STRAY[50:]) == STRAY
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": {"slo_class": "chat"}},
        {"vllm_xargs": {"slo_class": "chat"}, "slo_class": "chat"},
        {"messages": [{"content": 'what does {"slo_class": "chat"} mean?'}]},
        {"prompt": '"slo_class"'},
        [{"slo_class": "chat"}],
    ],
)
def test_a_class_in_its_place_or_in_a_text_is_none_of_its_business(body: Any, warnings: list[str]) -> None:
    assert json.loads(send(RetryAfter(app), json.dumps(body).encode())) == body
    assert warnings == []


@pytest.mark.parametrize("body", [b'{"slo_class": "chat"', b'"slo_class"', b'\xff{"slo_class": 1}'])
def test_what_is_no_request_passes_through(body: bytes, warnings: list[str]) -> None:
    assert send(RetryAfter(app), body) == body
    assert warnings == []
