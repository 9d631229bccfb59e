"""Refusal under overload, at the HTTP edge: 429 before a request enters the engine, with the time to come back after.

The scheduler tells how much prefill waits per class, with its metrics; the front end keeps the newest word of each
engine here, and the SLO gate refuses a request whose class asks for that (``overload: reject``) and whose first token
would be late. vLLM's error responses carry no headers, so ``Retry-After`` is added by a middleware, which users switch
on with vLLM's own flag: ``--middleware layerkv.vllm_plugin.overload.RetryAfter``. The body says it in any case.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError

from layerkv.config import SloClass

GAUGE = "layerkv_prefill_backlog_seconds"
STALE_S = 5.0
"""An idle engine says nothing, so an old word means that nothing waits."""

_RETRY_AFTER = re.compile(rb"retry after (\d+) s")

Message = MutableMapping[str, Any]


class OverloadedError(GracefulHTTPError):
    """HTTP 429: this request's first token would be late, and its class asks to be refused then."""


class Backlog:
    """The newest word of each engine on how long a new request of a class would wait. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[tuple[str, int], tuple[float, float]] = {}

    def note(self, slo_class: str, engine: int, backlog_s: float, now_s: float) -> None:
        """An engine says how many seconds of prefill wait before a new request of the class."""
        with self._lock:
            self._seconds[slo_class, engine] = (backlog_s, now_s)

    def seconds(self, slo_class: str, now_s: float) -> float:
        """The shortest wait among the engines that said something lately; 0 if none did."""
        with self._lock:
            fresh = [
                backlog_s
                for (name, _), (backlog_s, said_s) in self._seconds.items()
                if name == slo_class and now_s - said_s <= STALE_S
            ]
        return min(fresh, default=0.0)


BACKLOG = Backlog()
"""This process's; metrics come in on one thread, requests on another."""


def refuse_if_late(slo: SloClass, backlog: Backlog = BACKLOG, now_s: float | None = None) -> None:
    """Refuse a request of a class that asks for it when what waits already takes longer than its TTFT objective.

    Raises:
        OverloadedError: it would be late.
    """
    if slo.overload != "reject":
        return
    wait_s = backlog.seconds(slo.name, time.monotonic() if now_s is None else now_s)
    if wait_s <= slo.ttft_s:
        return
    retry_s = max(math.ceil(wait_s - slo.ttft_s), 1)
    raise OverloadedError(
        f"overloaded: about {wait_s:.1f} s of prompts wait before a request of class {slo.name!r}, whose first token "
        f"is due within {slo.ttft_s:g} s; retry after {retry_s} s",
        HTTPStatus.TOO_MANY_REQUESTS,
    )


class RetryAfter:
    """ASGI middleware: adds ``Retry-After`` to our 429 responses, from the seconds that their body names."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Pass everything through; hold a 429's head back until its body is there."""
        held: Message | None = None

        async def send_on(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.TOO_MANY_REQUESTS:
                held = message
                return
            if held is not None:
                head, held = held, None
                found = _RETRY_AFTER.search(message.get("body", b""))
                if found is not None:
                    head = {**head, "headers": [*head.get("headers", ()), (b"retry-after", found[1])]}
                await send(head)
            await send(message)

        await self._app(scope, receive, send_on)
