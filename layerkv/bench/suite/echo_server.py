"""A server that does nothing but stamp when requests arrive, to check the load generator against.

`python -m layerkv.bench.suite.echo_server PORT OUT.json`, in a process of its own. It answers a completion with a
stream of tokens at a steady pace and, when it is ended with SIGTERM, writes the arrival times (`time.monotonic()`
seconds, which all processes of a machine share) to OUT.json. Plain sockets: a web framework would add its own delay.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

TOKEN_INTERVAL_S = 0.02
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_MAX_TOKENS = re.compile(rb'"max_tokens":\s*(\d+)')
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = b'data: {"choices":[{"index":0,"text":"x","token_ids":[5]}]}\n\n'


class _Connection(asyncio.Protocol):
    def __init__(self, arrivals_s: list[float]) -> None:
        self._arrivals_s = arrivals_s
        self._received = b""
        self._task: asyncio.Task[None] | None = None
        self._transport: Any = None  # uvloop's own type

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        if not self._received and data.startswith(b"POST"):
            self._arrivals_s.append(now_s)
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not end or len(body) < (int(length[1]) if length else 0):
            return
        tokens = _MAX_TOKENS.search(body)
        self._received = b""
        self._task = asyncio.create_task(self._answer(int(tokens[1]) if tokens else 0))

    async def _answer(self, num_tokens: int) -> None:
        self._transport.write(_HEAD % (b"text/event-stream" if num_tokens else b"text/plain"))
        for _ in range(num_tokens):
            await asyncio.sleep(TOKEN_INTERVAL_S)
            self._transport.write(b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT))
        self._transport.write(b"0\r\n\r\n")


async def _serve(port: int, out_path: Path) -> None:
    arrivals_s: list[float] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(arrivals_s), "127.0.0.1", port)
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    async with server:
        await ended.wait()
    out_path.write_text(json.dumps(arrivals_s))


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), Path(sys.argv[2])))
