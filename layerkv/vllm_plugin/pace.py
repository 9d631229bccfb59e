"""Token streams at their reader's pace: a middleware for front ends, switched on with vLLM's own flag.

``--middleware layerkv.vllm_plugin.pace.SmoothStream``. An engine that serves requests in slices makes a hundred tokens
of one at once, and then none for a while. Where a request asks for it (``vllm_xargs: {"smooth": true}``), or its class
(``smooth: true``), its events go out as :class:`~layerkv.scheduler.pacer.Pacer` says: one token per ``tpot`` of the
class. When nobody asks nothing changes, and neither does anything but streams of completions and chats.

The application never waits for the pace. vLLM merges what it has made for a stream that does not take it, into events
of many tokens that cannot be spread any more, so events are held here, at most ``HELD_BYTES`` of them per response;
only where the client itself is slower than the engine does the application wait, as it does without us.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind

from layerkv.config import SloClass, SloPolicy, asks_for_smooth, slo_class_of
from layerkv.errors import ConfigError
from layerkv.scheduler.pacer import Pacer
from layerkv.vllm_plugin.our_classes import SMOOTH_MIDDLEWARE
from layerkv.vllm_plugin.reload import followed_policy
from layerkv.vllm_plugin.stream_events import EventReader, EventSplitter

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")

_PATHS: Final = ("/v1/completions", "/v1/chat/completions")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class SmoothStream:
    """ASGI middleware: lets the events of a token stream go when they are due."""

    is_installed: ClassVar[bool] = False
    """Whether this process has one. vLLM makes it before the first request."""

    def __init__(
        self, app: Callable[..., Awaitable[None]], policy: Callable[[], SloPolicy | None] = followed_policy
    ) -> None:
        self._app = app
        self._policy = policy
        SmoothStream.is_installed = True

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass everything through; hold back what a stream has made ahead of its reader."""
        if scope["type"] != "http" or scope.get("method") != "POST" or not scope["path"].endswith(_PATHS):
            await self._app(scope, receive, send)
            return
        request = _RequestWatch(receive, self._policy)
        stream: _PacedBody | None = None

        async def receive_on() -> Message:
            message = await request.receive()
            if message["type"] == "http.disconnect" and stream is not None:
                stream.drop()
            return message

        async def send_on(message: Message) -> None:
            nonlocal stream
            if stream is not None and message["type"] == "http.response.body":
                await stream.put(message)
                return
            await send(message)
            if request.slo is not None and _begins_stream(message):
                stream = _PacedBody(send, request.slo.tpot_s)

        try:
            await self._app(scope, receive_on, send_on)
        except asyncio.CancelledError:
            if stream is not None:
                stream.drop()
            raise
        finally:
            if stream is not None:  # what was made before a failure belongs to the client
                await stream.finish()


def tell_if_not_paced(slo: SloClass, sampling_params: SamplingParams) -> None:
    """Say once per class that a stream which asks for it is not paced: vLLM tells no plugin which middleware it has."""
    if SmoothStream.is_installed or sampling_params.output_kind is not RequestOutputKind.DELTA:
        return
    logger.warning_once(
        "a request of class %s asks for a smooth stream, but nobody paces streams here: they go out as the engine "
        "makes them; give vllm serve --middleware %s",
        slo.name,
        SMOOTH_MIDDLEWARE,
    )


def _begins_stream(message: Message) -> bool:
    if message["type"] != "http.response.start" or message["status"] != HTTPStatus.OK:
        return False
    headers = {name.lower(): value for name, value in message.get("headers", ())}
    is_plain = b"content-encoding" not in headers
    return is_plain and bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))


class _Body(msgspec.Struct):
    """What is read of a request's body; everything else is skipped."""

    stream: Any = None
    vllm_xargs: dict[str, Any] | None = None


class _RequestWatch:
    """Sees a request's body pass. `slo` is the class at whose pace it asks to be answered, None if it does not."""

    def __init__(self, receive: Receive, policy: Callable[[], SloPolicy | None]) -> None:
        self.slo: SloClass | None = None
        self._receive = receive
        self._policy = policy
        self._parts: list[bytes] = []

    async def receive(self) -> Message:
        """The next message, as it is."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                self.slo = self._read(b"".join(self._parts))
                self._parts.clear()
        return message

    def _read(self, body: bytes) -> SloClass | None:
        if b'"stream"' not in body:
            return None
        try:
            request = msgspec.json.decode(body, type=_Body)
            policy = self._policy()
            if not request.stream or policy is None:
                return None
            slo = slo_class_of(request.vllm_xargs, policy)
            return slo if slo.tpot_s < math.inf and asks_for_smooth(request.vllm_xargs, slo) else None
        except (msgspec.MsgspecError, ConfigError):  # vLLM, or the gate, says what is wrong with it
            return None


class _PacedBody:
    """The body of one response, on its way to the client at its reader's pace."""

    def __init__(self, send: Send, tpot_s: float) -> None:
        self._send = send
        self._clock = asyncio.get_running_loop()
        self._pacer = Pacer(tpot_s)
        self._splitter, self._reader = EventSplitter(), EventReader()
        self._is_whole, self._is_over, self._is_dropped = False, False, False
        self._has_news, self._has_room = asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._let_go())

    async def put(self, message: Message) -> None:
        """The application sends this. Returns at once, unless the client does not take what has been let go.

        Raises:
            OSError: the client is gone, where the server says so.
        """
        if self._is_dropped:
            return
        if self._task.done():
            self._task.result()
        now_s = self._clock.time()
        for event in self._splitter.feed(message.get("body", b"")):
            self._place(event, now_s)
        if not message.get("more_body", False):
            if rest := self._splitter.rest():
                self._pacer.put_for_all(rest, now_s)
            self._pacer.end(now_s)
            self._is_whole = True
        self._has_news.set()
        while self._pacer.is_full and not self._task.done():
            self._has_room.clear()
            await self._has_room.wait()

    def drop(self) -> None:
        """The client is gone: nothing goes out any more."""
        self._pacer.drop()
        self._is_dropped = True
        self._task.cancel()

    async def finish(self) -> None:
        """Wait until everything has gone out. The application has returned, or failed.

        If it has not ended the body, everything goes out now, and no end of the body is made up.

        Raises:
            OSError: the client is gone, where the server says so.
        """
        if not self._is_whole and not self._is_dropped:
            now_s = self._clock.time()
            if rest := self._splitter.rest():
                self._pacer.put_for_all(rest, now_s)
            self._pacer.release(now_s)
            self._is_over = True
            self._has_news.set()
        try:
            await self._task
        except asyncio.CancelledError:
            if not self._is_dropped:
                raise

    def _place(self, event: bytes, now_s: float) -> None:
        pacer, seen = self._pacer, self._reader.read(event)
        if seen.choice is not None:
            pacer.put(event, now_s, seen.choice, seen.num_tokens)
            if seen.ends_choice:
                pacer.end_choice(seen.choice, now_s)
            return
        if seen.is_comment:
            pacer.put_first(event, now_s)
            return
        if seen.is_done:
            pacer.end(now_s)
        if seen.is_error:
            pacer.release(now_s)
        pacer.put_for_all(event, now_s)

    async def _let_go(self) -> None:
        """Runs beside the application, from the head of the response to its end."""
        try:
            while True:
                self._has_news.clear()
                if events := self._pacer.take(self._clock.time()):
                    self._has_room.set()
                    await self._send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
                elif self._is_whole and self._pacer.is_empty:
                    await self._send({"type": "http.response.body", "body": b"", "more_body": False})
                    return
                elif self._is_over and self._pacer.is_empty:
                    return
                else:
                    await self._wait_until(self._pacer.next_s)
        finally:
            self._has_room.set()

    async def _wait_until(self, time_s: float | None) -> None:
        """Until then, or until there is something new; None: for something new only."""
        timer = None if time_s is None else self._clock.call_at(time_s, self._has_news.set)
        try:
            await self._has_news.wait()
        finally:
            if timer is not None:
                timer.cancel()
