"""A request whose moment of sending counts, and its response as a stream: HTTP/1.1 over one connection of its own.

A usual client sends from its event loop, when the loop comes to it; under load that is a millisecond late and more.
Here :func:`begin` sends from whatever thread calls it and never blocks, and the loop only reads. Parsing is left to
httptools, the parser of uvicorn.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httptools

from layerkv.errors import LayerKVError


class StreamError(LayerKVError):
    """The connection could not be made, or ended before the response did."""


class Target:
    """Where requests go. Looked up once: a name's address does not change within a run."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host = parts.netloc
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        self._family, self._address = found[0][0], found[0][4]

    def encoded(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A whole request as bytes."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + body

    def begin(self, request: bytes) -> Begun:
        """Connects and sends as much of `request` as the system takes at once. Never blocks; any thread may call it."""
        try:
            connection = socket.socket(self._family, socket.SOCK_STREAM)
        except OSError as error:  # no file descriptor is left: this request fails, those under way go on
            return Begun(None, self._address, b"", None, error)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect_ex(self._address)
        try:
            num_sent = connection.send(request)
        except OSError:  # not connected yet, or refused: connecting again in the loop will tell
            num_sent = 0
        return Begun(connection, self._address, request[num_sent:], time.monotonic() if num_sent else None)


class Begun:
    """A request under way. `sent_s` is when its first bytes went out; None until :meth:`finish` has sent them."""

    def __init__(
        self,
        connection: socket.socket | None,
        address: object,
        rest: bytes,
        sent_s: float | None,
        error: OSError | None = None,
    ) -> None:
        self._connection = connection
        self._error = error
        self._address = address
        self._rest = rest
        self.sent_s = sent_s

    async def finish(self, on_body: Callable[[bytes], bool | None]) -> int:
        """Reads the response to its end, giving `on_body` each piece as it arrives; returns the HTTP status.

        Hangs up before the end when `on_body` returns True.

        Raises:
            StreamError: there was no whole response.
        """
        loop = asyncio.get_running_loop()
        if self._connection is None:
            raise StreamError(f"no connection ({self._error})")
        try:
            if self.sent_s is None:
                await loop.sock_connect(self._connection, self._address)  # type: ignore[arg-type]
                self.sent_s = time.monotonic()
            transport, reader = await loop.create_connection(lambda: _Reader(on_body), sock=self._connection)
        except OSError as error:
            self._connection.close()
            raise StreamError(f"no connection ({error.strerror or error})") from None
        try:
            if self._rest:
                transport.write(self._rest)
            return await reader.status
        finally:
            transport.abort()


class _Reader(asyncio.Protocol):
    """Feeds the parser, which calls the methods below; `status` is set when the response is complete, or enough."""

    def __init__(self, take: Callable[[bytes], bool | None]) -> None:
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._take = take
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(StreamError(f"not HTTP ({error.__context__ or error})"))

    def on_body(self, body: bytes) -> None:
        if self._take(body):
            self.on_message_complete()

    def on_message_complete(self) -> None:
        if not self.status.done():
            self.status.set_result(self._parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(StreamError(f"the connection ended before the response did ({error or 'closed'})"))

    def _fail(self, error: StreamError) -> None:
        if not self.status.done():
            self.status.set_exception(error)


async def fetch(target: Target, path: str) -> str:
    """The text at `path`.

    Raises:
        StreamError: there was no whole response, or its status was not 200.
    """
    pieces: list[bytes] = []
    status = await target.begin(target.encoded("GET", path)).finish(pieces.append)
    if status != 200:
        raise StreamError(f"{path}: HTTP {status}")
    return b"".join(pieces).decode(errors="replace")
