"""`python toy_server.py PORT [BEHAVIOUR]`: a small server that speaks what the suite's load generator asks for.

It gives a token every few milliseconds, a letter each, and ends an answer at a stop string. BEHAVIOUR makes it do what
real ones do on a bad day:

    broken   ends at once, with a traceback
    dies     ends without a word at its tenth request
    fades    breaks its ninth answer off, as a front end does whose engine is gone, and ends a moment later
    stalls   takes requests and gives no token before it is asked for /release
    refuses  answers every other request with HTTP 429
    breaks   breaks off every stream after two tokens
    aborts   ends every answer after two tokens, as one that its engine gave up
    starved  answers /health late from its first request on
    mute     does not answer /health from its first request on
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from aiohttp import web

TOKEN_S = 0.002
STARVED_S = 0.05


def letter_of(token_id: int) -> str:
    """The text of a token."""
    return chr(ord("a") + token_id % 26)


class ToyServer:
    """Counts and stamps what arrives."""

    def __init__(self, behaviour: str = "") -> None:
        self.behaviour = behaviour
        self.arrivals_s: list[float] = []
        self.bodies: list[dict] = []
        self.num_given: list[int] = []
        """Tokens that each request was given."""
        self.num_asked = 0
        self.released = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/arrivals", self._arrivals),
                web.get("/release", self._release),
                web.post("/v1/completions", self._complete),
            ]
        )
        return app

    async def _health(self, _request: web.Request) -> web.Response:
        self.num_asked += 1
        if self.arrivals_s and self.behaviour == "starved":
            await asyncio.sleep(STARVED_S)
        if self.arrivals_s and self.behaviour == "mute":
            await self.released.wait()
        return web.Response()

    async def _metrics(self, _request: web.Request) -> web.Response:
        served = len(self.arrivals_s)
        return web.Response(
            text=f'vllm:prompt_tokens_total{{engine="0"}} {served * 10}\n'
            f'vllm:request_queue_time_seconds_count{{engine="0"}} {served}\n'
            f'vllm:request_queue_time_seconds_bucket{{engine="0",le="1.0"}} {served}\n'
            f'vllm:request_queue_time_seconds_bucket{{engine="0",le="+Inf"}} {served}\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.5\n'
        )

    async def _arrivals(self, _request: web.Request) -> web.Response:
        return web.json_response(self.arrivals_s)

    async def _release(self, _request: web.Request) -> web.Response:
        self.released.set()
        return web.Response()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.arrivals_s.append(time.monotonic())
        body = await request.json()
        self.bodies.append(body)
        number = len(self.num_given)
        self.num_given.append(0)
        if self.behaviour == "dies" and len(self.arrivals_s) == 10:
            os._exit(7)
        if self.behaviour == "fades" and len(self.arrivals_s) == 9:
            asyncio.get_running_loop().call_later(0.5, os._exit, 7)
            request.transport.close()
            return web.Response()
        if self.behaviour == "refuses" and len(self.arrivals_s) % 2 == 0:
            return web.json_response({"error": {"message": "too busy"}}, status=429)
        if self.behaviour == "stalls":
            await self.released.wait()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        # Tokens that depend on the prompt, as those of a greedy model do.
        seed = sum(body["prompt"]) + len(body["prompt"])
        text = ""
        for i in range(body["max_tokens"]):
            if self.behaviour == "breaks" and i == 2:
                request.transport.close()
                return response
            await asyncio.sleep(TOKEN_S)
            token_id = 3 + (seed + i) % 500
            text += letter_of(token_id)
            end = "stop" if any(stop in text for stop in body.get("stop", ())) else None
            if end is None and i == body["max_tokens"] - 1:
                end = "length"
            if self.behaviour == "aborts" and i == 1:
                end = "abort"
            choice = {"index": 0, "text": text[-1], "token_ids": [token_id], "finish_reason": end}
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            self.num_given[number] += 1
            if end is not None:
                break
        await response.write(b"data: [DONE]\n\n")
        return response


if __name__ == "__main__":
    behaviour = sys.argv[2] if len(sys.argv) > 2 else ""
    if behaviour == "broken":
        raise RuntimeError("no such device: toy")
    web.run_app(ToyServer(behaviour).app(), host="127.0.0.1", port=int(sys.argv[1]), print=None)
