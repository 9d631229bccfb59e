"""Refusal under overload, at the HTTP edge: 429 before a request enters the engine, with the time to come back after.

The scheduler tells what a new request of each class would meet, with its metrics; the front end keeps the newest word
of each engine and what it has let in since (:mod:`layerkv.scheduler.admission`), and the SLO gate refuses a request
whose class asks for that (``overload: reject``) and whose first token would be late. vLLM's error responses carry no
headers, so ``Retry-After`` is added by a middleware, which users switch on with vLLM's own flag:
``--middleware layerkv.vllm_plugin.overload.RetryAfter``. The body says it in any case.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError

from layerkv.config import SloClass
from layerkv.scheduler.admission import Backlog, would_be_late
from layerkv.vllm_plugin.stray_class import StrayClassWatch

GAUGE = "layerkv_prefill_backlog_seconds"
_RETRY_AFTER = re.compile(rb"retry after (\d+) s")
_REFUSED_STREAM = re.compile(rb'data: \{"error": ?\{"message": ?"overloaded: .*retry after \d+ s"')

_OF_A_STREAM = (b"content-type", b"content-length", b"transfer-encoding")

Message = MutableMapping[str, Any]


class OverloadedError(GracefulHTTPError):
    """HTTP 429: this request's first token would be late, and its class asks to be refused then."""


BACKLOG = Backlog()
"""This process's; metrics come in on one thread, requests on another."""


def refuse_if_late(
    slo: SloClass, backlog: Backlog = BACKLOG, now_s: float | None = None, *, num_answers: int = 1
) -> None:
    """Let a request in, or refuse it if its class asks for that and its first token is not to be expected in time.

    The gate is asked once for a request with ``n`` answers (``num_answers``), of which the engine makes as many.

    Raises:
        OverloadedError: it would be late.
    """
    now_s = time.monotonic() if now_s is None else now_s
    meets = backlog.meets(slo, now_s)
    if slo.overload != "reject" or not would_be_late(slo, meets):
        backlog.let_in(slo, now_s, num_answers)
        return
    backlog.refuse(slo.name)
    retry_s = max(math.ceil(meets.wait_s - slo.ttft_s), 1)
    raise OverloadedError(
        f"overloaded: about {meets.wait_s:.1f} s of prompts wait before a request of class {slo.name!r}, whose first "
        f"token is due within {slo.ttft_s:g} s; retry after {retry_s} s",
        HTTPStatus.TOO_MANY_REQUESTS,
    )


class RetryAfter:
    """ASGI middleware: adds ``Retry-After`` to our 429 responses, from the seconds that their body names.

    vLLM answers a streaming request 200 before it looks at it, and refuses it in the first event. Such a head is held
    back until the first event is there, and the answer becomes a 429 like any other. It also warns of a class that a
    request names where vLLM does not look.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._stray_class = StrayClassWatch()

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Pass everything through; hold a head back while its body may be a refusal."""
        held: Message | None = None
        is_refused = False

        async def send_on(message: Message) -> None:
            nonlocal held, is_refused
            if is_refused:
                return  # the rest of a stream that has been answered
            if message["type"] == "http.response.start" and _may_be_refusal(message):
                held = message
                return
            if held is not None:
                head, held = held, None
                body = message.get("body", b"")
                if head["status"] == HTTPStatus.OK and _REFUSED_STREAM.match(body):
                    is_refused = True
                    head, message = _as_refusal(head, body)
                elif head["status"] == HTTPStatus.TOO_MANY_REQUESTS:
                    head = {**head, "headers": [*head.get("headers", ()), *_retry_after(body)]}
                await send(head)
            await send(message)

        await self._app(scope, self._stray_class.watched(scope, receive), send_on)


def _may_be_refusal(head: Message) -> bool:
    """Whether this head's body is to be seen before it is sent."""
    if head["status"] == HTTPStatus.OK:
        types = [value for name, value in head.get("headers", ()) if name.lower() == b"content-type"]
        return any(value.startswith(b"text/event-stream") for value in types)
    return bool(head["status"] == HTTPStatus.TOO_MANY_REQUESTS)


def _as_refusal(head: Message, event: bytes) -> tuple[Message, Message]:
    """The whole answer that says what the first event of a stream says, with what other headers that had."""
    body = event.removeprefix(b"data: ").partition(b"\n\n")[0]
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    others = [entry for entry in head.get("headers", ()) if entry[0].lower() not in _OF_A_STREAM]
    head = {**head, "status": int(HTTPStatus.TOO_MANY_REQUESTS)}
    return {**head, "headers": [*others, *headers, *_retry_after(body)]}, {"type": "http.response.body", "body": body}


def _retry_after(body: bytes) -> list[tuple[bytes, bytes]]:
    found = _RETRY_AFTER.search(body)
    return [] if found is None else [(b"retry-after", found[1])]
