"""Sends one load to one server, open loop: `python -m layerkv.bench.suite.generator PLAN.json OUT.json`.

A process of its own, so that neither the server nor whoever draws progress bars delays it. Standard output carries
one `Progress` line per second and nothing else.

Open loop: a request is sent when it is due, whatever became of those before it; there is no limit to how many are
under way, and every latency counts from the due time. An event loop's own timers are a millisecond coarse, so a
thread sleeps to each due time and sends by itself; the loop reads.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

import msgspec
import uvloop

from layerkv.bench.child import run_spec
from layerkv.bench.load import PlannedRequest
from layerkv.bench.priorities import preferred
from layerkv.bench.records import HUNG_UP, STOPPED, RequestRecord, Sample
from layerkv.bench.suite.health_probe import HealthProbe, Probe
from layerkv.bench.suite.http_stream import Begun, StreamError, Target, fetch
from layerkv.bench.suite.plan import LoadPlan
from layerkv.bench.suite.server_metrics import ServerMetrics, read_metrics

PROGRESS_INTERVAL_S = 1.0
# How soon a thread that waits for the interpreter gets it from the event loop; the default, 5 ms, would show.
SWITCH_INTERVAL_S = 0.0002
ERROR_CHARS = 300


class GeneratorRun(msgspec.Struct, frozen=True, kw_only=True):
    """What the generator saw: see `records`.

    `before` and `after` are the server's metrics around the load; `start_s` is when it began, on the machine's
    monotonic clock. `longest_probe` is the server's slowest answer to `/health` from then until the last token; None
    if it never answered.
    """

    requests: list[RequestRecord]
    samples: list[Sample]
    before: ServerMetrics
    after: ServerMetrics
    start_s: float
    wall_s: float
    longest_probe: Probe | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    error: object = None


@dataclass(slots=True)
class _Flight:
    """A request under way; times are `time.monotonic()` seconds."""

    request: PlannedRequest
    due_s: float = 0.0
    prompt: list[int] = field(default_factory=list)
    sent_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    status: int | None = None
    end: str | None = None
    error: str | None = None
    is_done: bool = False


class Generator:
    """Drives one plan; use once."""

    def __init__(self, plan: LoadPlan, report_progress: Callable[[int, int], None]) -> None:
        self._plan = plan
        self._target = Target(plan.url)
        self._report_progress = report_progress
        self._flights = {request.request_id: _Flight(request) for request in plan.requests}
        self._followers: dict[str, list[str]] = {}
        for request in plan.requests:
            if request.after is not None:
                self._followers.setdefault(request.after, []).append(request.request_id)
        self._num_open = len(self._flights)
        self._samples: list[tuple[float, ServerMetrics]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._start_s = 0.0

    async def run(self) -> GeneratorRun:
        """Warm up, send everything when it is due, and wait for the last token.

        Raises:
            StreamError: the server is gone, or fails a request, before the start.
        """
        for flight in map(_Flight, self._plan.warm_up):
            await self._finish(flight, self._target.begin(self._encoded(flight.request, flight.request.prompt)))
            if flight.error is not None and flight.status != HTTPStatus.TOO_MANY_REQUESTS:
                raise StreamError(f"{flight.request.request_id}: {flight.error}")
        before = await self._metrics()
        self._finished = asyncio.Event()
        self._start_clock()
        probe = HealthProbe(self._plan.url)
        probe.start(self._start_s)
        watchers = [asyncio.create_task(watch()) for watch in (self._sample_until_done, self._report_until_done)]
        if self._num_open:
            await self._finished.wait()
        wall_s = time.monotonic() - self._start_s
        longest_probe = probe.stop()
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        try:
            after = await self._metrics()
        except StreamError:  # the server died; whoever started it reports how it ended
            after = before
        self._report()
        return GeneratorRun(
            requests=[self._record(flight) for flight in self._flights.values()],
            samples=[_sample(time_s - self._start_s, metrics, self._plan) for time_s, metrics in self._samples],
            before=before,
            after=after,
            start_s=self._start_s,
            wall_s=wall_s,
            longest_probe=longest_probe,
        )

    def _start_clock(self) -> None:
        """From now on, a thread sends what is due; the loop reads the answers."""
        loop = asyncio.get_running_loop()
        # Encoded before the start: an 8,000-token prompt takes milliseconds.
        due = sorted(
            (request.arrival_s, request.request_id, self._encoded(request, request.prompt))
            for request in self._plan.requests
            if request.after is None
        )
        gc.collect()
        gc.freeze()  # a collection over all prompts takes as long as a token
        time.sleep(max(0.0, self._plan.not_before_s - time.monotonic()))
        self._start_s = time.monotonic()

        def tick() -> None:
            for arrival_s, request_id, encoded in due:
                due_s = self._start_s + arrival_s
                time.sleep(max(0.0, due_s - time.monotonic()))
                begun = self._target.begin(encoded)
                loop.call_soon_threadsafe(self._follow_up, request_id, due_s, begun)

        threading.Thread(target=tick, name="clock", daemon=True).start()

    def _follow_up(self, request_id: str, due_s: float, begun: Begun) -> None:
        flight = self._flights[request_id]
        flight.due_s = due_s
        task = asyncio.create_task(self._fly(flight, begun))
        self._tasks.add(task)  # the loop alone would let it be collected
        task.add_done_callback(self._tasks.discard)

    async def _fly(self, flight: _Flight, begun: Begun) -> None:
        if not flight.prompt:
            flight.prompt = flight.request.prompt
        await self._finish(flight, begun)
        self._land(flight)

    def _land(self, flight: _Flight) -> None:
        flight.is_done = True
        self._num_open -= 1
        for follower_id in self._followers.get(flight.request.request_id, ()):
            self._prepare_next_turn(flight, self._flights[follower_id])
        if not self._num_open:
            self._finished.set()

    def _prepare_next_turn(self, before: _Flight, flight: _Flight) -> None:
        """Send the next turn when its user has thought, or give up the session if there is no answer to reply to."""
        if before.error is not None:
            flight.error = f"the turn before failed: {before.error}"[:ERROR_CHARS]
            flight.due_s = time.monotonic()
            self._land(flight)
            return
        said_before = before.prompt + before.token_ids if flight.request.history else []
        flight.prompt = said_before + flight.request.prompt
        encoded = self._encoded(flight.request, flight.prompt)
        due_s = time.monotonic() + flight.request.arrival_s

        def send() -> None:
            self._follow_up(flight.request.request_id, due_s, self._target.begin(encoded))

        asyncio.get_running_loop().call_later(flight.request.arrival_s, send)

    async def _finish(self, flight: _Flight, begun: Begun) -> None:
        """The answer's stream, into `flight`; whatever goes wrong becomes its error."""
        answer = _Answer(flight)
        try:
            flight.status = await begun.finish(answer.take)
        except StreamError as error:
            flight.error = flight.error or str(error)[:ERROR_CHARS]
            return
        finally:
            flight.sent_s = begun.sent_s
        if flight.status != HTTPStatus.OK:
            flight.error = f"HTTP {flight.status}: {answer.rest.decode(errors='replace')}"[:ERROR_CHARS]
        elif flight.error is None and not _is_whole(flight):
            got, asked = len(flight.token_ids), flight.request.output_tokens
            flight.error = f"the stream ended after {got} of {asked} tokens"
            if flight.end is not None:
                flight.error += f" ({flight.end})"

    def _encoded(self, request: PlannedRequest, prompt: Sequence[int]) -> bytes:
        body: dict[str, object] = {
            "model": self._plan.model,
            "prompt": list(prompt),
            "max_tokens": request.max_tokens or request.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "return_token_ids": True,
        }
        if request.stop:
            body["stop"] = request.stop
        if self._plan.names_classes and request.slo_class is not None:
            body["vllm_xargs"] = {"slo_class": request.slo_class}
        return self._target.encoded("POST", "/v1/completions", msgspec.json.encode(body))

    async def _metrics(self) -> ServerMetrics:
        return read_metrics(await fetch(self._target, "/metrics"))

    async def _sample_until_done(self) -> None:
        while True:
            try:
                metrics = await self._metrics()
            except StreamError:
                return
            self._samples.append((time.monotonic(), metrics))
            await asyncio.sleep(self._plan.sample_interval_s)

    async def _report_until_done(self) -> None:
        while True:
            self._report()
            await asyncio.sleep(PROGRESS_INTERVAL_S)

    def _report(self) -> None:
        num_done = sum(f.request.output_tokens if f.is_done else len(f.token_ids) for f in self._flights.values())
        self._report_progress(num_done, sum(r.output_tokens for r in self._plan.requests))

    def _record(self, flight: _Flight) -> RequestRecord:
        finished = flight.error is None
        return RequestRecord(
            request_id=flight.request.request_id,
            slo_class=flight.request.slo_class,
            arrival_s=flight.due_s - self._start_s,
            sent_s=None if flight.sent_s is None else flight.sent_s - self._start_s,
            prompt_tokens=len(flight.prompt or flight.request.prompt),
            output_tokens=flight.request.output_tokens,
            token_times_s=[time_s - self._start_s for time_s in flight.token_times_s],
            token_digest=hashlib.sha256(repr(flight.token_ids).encode()).hexdigest()[:16] if finished else None,
            end=flight.end if finished else None,
            error=flight.error,
        )


def _is_whole(flight: _Flight) -> bool:
    """Whether an answer that ended without an error has all that was to come."""
    if len(flight.token_ids) == flight.request.output_tokens:
        return True
    return bool(flight.request.stop and flight.token_ids) and flight.end == STOPPED


class _Answer:
    """Takes the pieces of a response: server-sent events, or, where the request was refused, the reason in `rest`."""

    def __init__(self, flight: _Flight) -> None:
        self._flight = flight
        self.rest = b""

    def take(self, data: bytes) -> bool:
        """Whether that is all the client wanted, though the server would go on."""
        now_s = time.monotonic()
        flight = self._flight
        *events, self.rest = (self.rest + data).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: ") or event == b"data: [DONE]":
                continue
            try:
                chunk = _DECODER.decode(event[6:])
            except msgspec.DecodeError as error:
                flight.error = f"in the stream: {error}"[:ERROR_CHARS]
                continue
            if chunk.error is not None:
                flight.error = f"in the stream: {chunk.error}"[:ERROR_CHARS]
            for choice in chunk.choices:
                token_ids = choice.token_ids or []
                flight.token_ids.extend(token_ids)
                flight.token_times_s.extend([now_s] * len(token_ids))
                flight.end = choice.finish_reason or flight.end
        if flight.request.max_tokens is None or len(flight.token_ids) < flight.request.output_tokens:
            return False
        if flight.end is None or len(flight.token_ids) > flight.request.output_tokens:
            flight.end = HUNG_UP
        del flight.token_ids[flight.request.output_tokens :], flight.token_times_s[flight.request.output_tokens :]
        return True


_DECODER = msgspec.json.Decoder(_Chunk)


def _sample(time_s: float, metrics: ServerMetrics, plan: LoadPlan) -> Sample:
    return Sample(
        time_s=time_s,
        device_kv_bytes=_device_kv_bytes(metrics, plan),
        host_kv_bytes=_host_kv_bytes(metrics, plan),
        running=metrics.running,
        waiting=metrics.waiting,
        parked=metrics.parked,
        waiting_for=metrics.waiting_for,
    )


def _device_kv_bytes(metrics: ServerMetrics, plan: LoadPlan) -> int:
    """KV in use; vLLM's share is one of the pool, which with layerkv is not all of the memory."""
    if plan.block_bytes is None or not metrics.pool_blocks:
        return int(metrics.device_usage * plan.kv_memory_bytes)
    pool_bytes = metrics.pool_blocks * plan.block_bytes
    zone_usage = metrics.zone_blocks_used / metrics.zone_blocks if metrics.zone_blocks else 0.0
    return int(metrics.device_usage * pool_bytes + zone_usage * max(plan.kv_memory_bytes - pool_bytes, 0))


def _host_kv_bytes(metrics: ServerMetrics, plan: LoadPlan) -> int | None:
    if not plan.tells_host_memory:
        return None
    if plan.block_bytes is None:
        return None if metrics.host_blocks else 0
    return metrics.host_blocks * plan.block_bytes


def main(argv: list[str]) -> int:
    """Runs the plan file `argv[0]` and writes the outcome to `argv[1]`; returns the exit status."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a connection each, however many wait
    return run_spec(argv, "layerkv.bench.suite.generator", LoadPlan, _run)


def _run(plan: LoadPlan, report_progress: Callable[[int, int], None]) -> GeneratorRun:
    with preferred(plan.priorities):  # before any other thread, so that all of them are
        return uvloop.run(Generator(plan, report_progress).run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
