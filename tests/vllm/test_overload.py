"""A request that would be late is refused at the HTTP edge, if its class asks for that."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from layerkv.config import SloClass, SloPolicy
from layerkv.metrics import METRICS
from layerkv.scheduler.admission import Backlog
from layerkv.scheduler.backlog import ClassWait, Word

pytest.importorskip("vllm")

from layerkv.vllm_plugin import overload
from layerkv.vllm_plugin.overload import GAUGE, OverloadedError, RetryAfter, refuse_if_late

pytestmark = pytest.mark.vllm

REJECTS = SloClass(name="chat", ttft_s=0.5, tpot_s=0.05, overload="reject")
QUEUES = SloClass(name="batch", ttft_s=0.5, tpot_s=0.05, overload="queue")
POLICY = SloPolicy(classes={"chat": REJECTS, "batch": QUEUES}, default_class="chat")


@pytest.fixture
def backlog(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backlog]:
    """This process's backlog, empty before and after."""
    monkeypatch.setattr(overload.BACKLOG, "_words", {})
    monkeypatch.setattr(overload.BACKLOG, "_engines", set())
    monkeypatch.setattr(overload.BACKLOG, "_let_in", deque())
    return overload.BACKLOG


def waits(backlog: Backlog, wait_s: float, now_s: float) -> None:
    """So long a request of any class would wait."""
    backlog.note(0, Word(0.0, {name: ClassWait(wait_s, 0.0) for name in POLICY.classes}), now_s)


def test_the_gauge_that_shows_it_is_a_metric_by_class() -> None:
    [spec] = [spec for spec in METRICS if spec.name == GAUGE]
    assert (spec.kind, spec.label) == ("gauge", "slo_class")


# Who is refused --------------------------------------------------------------------------------------------------


def test_a_request_that_would_be_late_is_refused_with_the_time_to_come_back_after() -> None:
    backlog = Backlog()
    waits(backlog, 3.2, 100.0)
    with pytest.raises(OverloadedError) as refusal:
        refuse_if_late(REJECTS, backlog, 100.0)
    assert refusal.value.http_status == 429
    assert str(refusal.value) == (
        "overloaded: about 3.2 s of prompts wait before a request of class 'chat', whose first token is due within "
        "0.5 s; retry after 3 s"
    )


def test_every_refusal_is_counted_by_class() -> None:
    backlog, counted = Backlog(), []
    backlog.count_refusals_with(counted.append)
    waits(backlog, 3.2, 100.0)
    with pytest.raises(OverloadedError):
        refuse_if_late(REJECTS, backlog, 100.0)
    refuse_if_late(REJECTS, backlog, 200.0)
    assert counted == ["chat"]


@pytest.mark.parametrize(("wait_s", "retry"), [(0.51, "after 1 s"), (1.5, "after 1 s"), (1.51, "after 2 s")])
def test_the_time_to_come_back_after_is_in_whole_seconds_from_one_on(wait_s: float, retry: str) -> None:
    backlog = Backlog()
    waits(backlog, wait_s, 100.0)
    with pytest.raises(OverloadedError, match=retry):
        refuse_if_late(REJECTS, backlog, 100.0)


@pytest.mark.parametrize(
    ("slo", "wait_s", "now_s"), [(REJECTS, 0.3, 100.0), (QUEUES, 60.0, 100.0), (REJECTS, 60.0, 160.0)]
)
def test_who_is_in_time_or_queues_or_finds_the_engine_idle_is_let_in(
    slo: SloClass, wait_s: float, now_s: float
) -> None:
    backlog = Backlog()
    waits(backlog, wait_s, 100.0)
    refuse_if_late(slo, backlog, now_s)


@pytest.mark.parametrize("for_v2", [False, True])
def test_the_gate_refuses_by_the_class_that_a_request_names_or_by_the_default(
    backlog: Backlog, *, for_v2: bool
) -> None:
    from vllm import SamplingParams

    from layerkv.vllm_plugin.slo_gate import slo_gate

    gate: Any = slo_gate(POLICY, "a-policy-of-this-test.yaml", for_v2=for_v2)
    gate.validate_params(SamplingParams())
    waits(backlog, 60.0, time.monotonic())
    for params in (SamplingParams(), SamplingParams(extra_args={"slo_class": "chat"})):
        with pytest.raises(OverloadedError):
            gate.validate_params(params)
    gate.validate_params(SamplingParams(extra_args={"slo_class": "batch"}))
    with pytest.raises(ValueError, match="slo_class: found 'nope'"):
        gate.validate_params(SamplingParams(extra_args={"slo_class": "nope"}))


def test_the_gate_counts_every_answer_that_a_request_asks_for(backlog: Backlog) -> None:
    """Regression: vLLM asks the gate once for all of them, and gives the engine each as a request of its own."""
    from vllm import SamplingParams

    from layerkv.vllm_plugin.slo_gate import slo_gate

    gate: Any = slo_gate(POLICY, "a-policy-of-this-test.yaml", for_v2=False)
    backlog.note(0, Word(0.0, {"chat": ClassWait(0.0, 10.0)}), time.monotonic())
    gate.validate_params(SamplingParams(n=8))
    assert backlog.meets(REJECTS, time.monotonic()).wait_s > 70.0
    with pytest.raises(OverloadedError):
        gate.validate_params(SamplingParams())


def test_vllms_own_validation_lets_the_refusal_through_as_it_is(backlog: Backlog) -> None:
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters

    from layerkv.vllm_plugin.slo_gate import slo_gate

    waits(backlog, 60.0, time.monotonic())
    gate = slo_gate(POLICY, "a-policy-of-this-test.yaml", for_v2=False)
    with pytest.raises(OverloadedError):
        validate_logits_processors_parameters([gate], SamplingParams())


# The answer ------------------------------------------------------------------------------------------------------


def answer(app: Callable[..., Awaitable[None]], path: str = "/") -> httpx.Response:
    """What a client of an ASGI application gets."""

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(get())


def test_vllms_error_response_gets_the_header_and_keeps_its_body(backlog: Backlog) -> None:
    from fastapi import FastAPI
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    init_exception_handler(app)
    app.add_middleware(RetryAfter)

    @app.get("/")
    async def complete() -> dict[str, str]:
        refuse_if_late(REJECTS)
        return {"text": "hello"}

    response = answer(app)
    assert (response.status_code, response.json()) == (200, {"text": "hello"})
    assert "retry-after" not in response.headers
    waits(backlog, 4.0, time.monotonic() + 0.5)
    response = answer(app)
    assert response.status_code == 429
    retry_after = response.headers["retry-after"]
    assert 1 < int(retry_after) <= 4
    error = response.json()["error"]
    assert (error["code"], error["type"]) == (429, "Too Many Requests")
    assert error["message"].endswith(f"retry after {retry_after} s")
    assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize("stream_types", [b"text/event-stream", b"text/event-stream; charset=utf-8"])
def test_a_stream_whose_first_event_refuses_becomes_an_answer_429(stream_types: bytes) -> None:
    message = "overloaded: about 9.0 s of prompts wait before a request of class 'chat'; retry after 7 s"
    error = json.dumps({"error": {"message": message, "type": "Too Many Requests", "param": None, "code": 429}})
    parts = (f"data: {error}\n\n".encode(), b"data: [DONE]\n\n", b"")
    response = answer(answering(200, *parts, content_type=stream_types))
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.headers["content-type"] == "application/json"
    assert response.json() == json.loads(error)


@pytest.mark.parametrize(
    "first",
    [
        b'data: {"choices": [{"text": "overloaded: retry after 3 s"}]}\n\n',
        b'data: {"error": {"message": "slo_class: found nope", "code": 400}}\n\n',
        b": keep-alive\n\n",
    ],
)
def test_any_other_stream_passes_through_event_by_event(first: bytes) -> None:
    response = answer(answering(200, first, b"data: [DONE]\n\n", content_type=b"text/event-stream"))
    assert (response.status_code, response.content) == (200, first + b"data: [DONE]\n\n")


def answering(status: int, *parts: bytes, content_type: bytes = b"text/plain") -> Callable[..., Awaitable[None]]:
    """An application behind the middleware that answers this, part by part."""

    async def app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"x-test", b"1"), (b"content-type", content_type)],
            }
        )
        for number, part in enumerate(parts, start=1):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})

    return RetryAfter(app)


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        (200, [b"overloaded: ...; retry after 3 s"]),
        (503, [b"retry after 3 s"]),
        (429, [b'{"error": "too many"}']),
        (429, [b""]),
        (200, [b"data: 1\n\n", b"data: 2\n\n"]),
        (429, [b"too ", b"many"]),
    ],
)
def test_other_answers_pass_through_unchanged(status: int, parts: list[bytes]) -> None:
    response = answer(answering(status, *parts))
    assert (response.status_code, response.content) == (status, b"".join(parts))
    assert "retry-after" not in response.headers
    assert response.headers["x-test"] == "1"


def test_what_is_not_http_passes_through() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        seen.append(scope["type"])
        await send({"type": "lifespan.startup.complete"})

    async def send(message: Any) -> None:
        seen.append(message["type"])

    asyncio.run(RetryAfter(app)({"type": "lifespan"}, lambda: None, send))  # type: ignore[arg-type, return-value]
    assert seen == ["lifespan", "lifespan.startup.complete"]


# From the engine to the front ends --------------------------------------------------------------------------------


WORD = Word(0.02, {"chat": ClassWait(2.5, 0.1), "batch": ClassWait(0.0, 0.7)})


def test_every_front_end_hears_a_word_though_vllm_sends_its_statistics_to_one() -> None:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

    from layerkv.vllm_plugin.words import tell, word_of

    hits = PrefixCacheStats(requests=3, queries=40, hits=20)
    payload = {"counters": {"layerkv_parks": 1.0}, "gauges": {}, "histograms": {}}
    stats = SchedulerStats(num_running_reqs=7, kv_cache_usage=0.5, prefix_cache_stats=hits, kv_connector_stats=payload)
    outputs = {1: EngineCoreOutputs(scheduler_stats=stats)}
    tell(outputs, WORD, {0, 1, 2})
    assert sorted(outputs) == [0, 1, 2]
    for front_end in (0, 1, 2):
        sent = outputs[front_end].scheduler_stats
        assert sent is not None
        assert word_of(json.loads(json.dumps(sent.kv_connector_stats))) == WORD
        assert (sent.num_running_reqs, sent.kv_cache_usage) == (7, 0.5), "gauges are as true there"
        is_vllms = front_end == 1
        assert (sent.prefix_cache_stats.queries, "counters" in sent.kv_connector_stats) == (
            (40, True) if is_vllms else (0, False)
        ), "what is counted is counted once"


def test_where_statistics_are_off_no_word_is_sent() -> None:
    from vllm.v1.engine import EngineCoreOutputs

    from layerkv.vllm_plugin.words import tell

    outputs: dict[int, EngineCoreOutputs] = {0: EngineCoreOutputs()}
    tell(outputs, WORD, {0, 1})
    assert list(outputs) == [0]
    assert outputs[0].scheduler_stats is None


class Metrics:
    """What Prometheus would show, without its registry, which holds names once per process."""

    def __init__(self, policy: SloPolicy) -> None:
        from layerkv.vllm_plugin.prom import LayerKVPromMetrics
        from layerkv.vllm_plugin.reload import PolicySource

        self.shown: dict[str, float] = {}
        self.source = PolicySource(None, policy)
        self.metrics = object.__new__(LayerKVPromMetrics)
        self.metrics._policy_source, self.metrics._policy = self.source, policy
        self.metrics._children = {}
        self.metrics.per_engine_labelvalues = {0: ["model", "0"]}
        shown = self.shown

        class Child:
            def __init__(self, key: str) -> None:
                self.key = key
                shown[key] = 0.0

            def set(self, value: float) -> None:
                shown[self.key] = value

            def inc(self, value: float = 1.0) -> None:
                shown[self.key] += value

        class Family:
            def __init__(self, name: str) -> None:
                self.name = name

            def labels(self, model: str, engine: str, label: str | None = None) -> Child:
                return Child(self.name if label is None else f"{self.name}|{label}")

        self.metrics._families = {spec.name: Family(spec.name) for spec in METRICS}

    def observe(self, **payload: Any) -> None:
        self.metrics.observe(json.loads(json.dumps(payload)), engine_idx=0)


def test_the_metrics_that_come_in_bring_the_word(backlog: Backlog) -> None:
    metrics = Metrics(POLICY)
    metrics.observe(gauges={f"{GAUGE}|chat": 2.5, "layerkv_host_blocks": 4})
    assert metrics.shown == {f"{GAUGE}|chat": 2.5, "layerkv_host_blocks": 4}
    assert backlog.meets(REJECTS, time.monotonic()).wait_s == 0.0, "a gauge is for people"
    metrics.observe(word={"age_s": 0.02, "classes": {"chat": [60.0, 0.1], "batch": [0.0, 0.7]}})
    assert 50.0 < backlog.meets(REJECTS, time.monotonic()).wait_s <= 60.0


def test_a_class_that_is_gone_or_refused_no_more_keeps_no_backlog(backlog: Backlog) -> None:
    metrics = Metrics(POLICY)
    metrics.observe(gauges={f"{GAUGE}|chat": 2.5})
    calm = SloClass(name="chat", ttft_s=0.5, tpot_s=0.05)
    for classes in ({"voice": REJECTS}, {"chat": calm, "voice": REJECTS}):
        metrics.source.put(SloPolicy(classes=classes, default_class="voice"))
        metrics.observe(gauges={f"{GAUGE}|chat": 7.5, f"{GAUGE}|voice": 1.5})
        assert metrics.shown[f"{GAUGE}|chat"] == 0.0, "nor by a word that was on its way"
        assert metrics.shown[f"{GAUGE}|voice"] == 1.5


def test_what_a_new_class_counts_begins_at_0(backlog: Backlog) -> None:
    metrics = Metrics(POLICY)
    metrics.source.put(SloPolicy(classes={"voice": REJECTS}, default_class="voice"))
    metrics.observe(counters={"layerkv_parks": 1})
    assert metrics.shown["layerkv_ttft_slo_missed|voice"] == 0.0
    assert metrics.shown["layerkv_overload_refused|voice"] == 0.0
