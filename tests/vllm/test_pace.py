"""A stream that asks for it reaches its client at the reader's pace, and everything else as it is."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from layerkv.config import SloClass, SloPolicy
from layerkv.scheduler.pacer import END_S, HELD_BYTES
from tests.fakes.heard import heard_by
from tests.fakes.virtual_loop import run

pytest.importorskip("vllm")

from layerkv.vllm_plugin import pace
from layerkv.vllm_plugin.overload import RetryAfter
from layerkv.vllm_plugin.pace import SmoothStream

pytestmark = pytest.mark.vllm

TPOT_S = 0.1
SMOOTH = SloClass(name="chat", ttft_s=1.0, tpot_s=TPOT_S, smooth=True)
PLAIN = SloClass(name="batch", ttft_s=1.0, tpot_s=0.5)
POLICY = SloPolicy(classes={"chat": SMOOTH, "batch": PLAIN}, default_class="chat")

App = Callable[[Any, Any, Any], Awaitable[None]]
DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\n'


def token(text: str, index: int = 0, **more: Any) -> bytes:
    return f"data: {json.dumps({'choices': [{'index': index, 'text': text, **more}]})}\n\n".encode()


@dataclass
class Client:
    """What a client has got, and when, in seconds from the time of its request."""

    got: list[tuple[float, bytes]] = field(default_factory=list)
    messages: list[Any] = field(default_factory=list)
    app_done_s: float = -1.0

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.got)

    def times(self) -> list[float]:
        """When each event came."""
        return [round(at_s, 6) for at_s, part in self.got for _ in range(part.count(b"\n\n"))]

    def whole(self) -> bool:
        """Whether the response has ended, once, with its last message."""
        bodies = [message for message in self.messages if message["type"] == "http.response.body"]
        return [message.get("more_body", False) for message in bodies] == [True] * (len(bodies) - 1) + [False]


Part = tuple[float, bytes]


def engine(*parts: Part, content_type: bytes = b"text/event-stream; charset=utf-8", status: int = 200) -> App:
    """An application that answers so: each part after a wait."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})
        for wait_s, part in parts:
            await asyncio.sleep(wait_s)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def request(**more: Any) -> bytes:
    return json.dumps({"prompt": "x", "stream": True, **more}).encode()


def ask(
    app: App,
    body: bytes | Sequence[bytes] = request(),
    *,
    path: str = "/v1/completions",
    policy: SloPolicy | None = POLICY,
    leaves_s: float | None = None,
    takes_s: float = 0.0,
    around: Callable[[App], App] = lambda middleware: middleware,
) -> Client:
    """Send a request through the middleware on a virtual clock; `takes_s` is how long a client needs per message."""
    client = Client()

    async def talk() -> None:
        clock = asyncio.get_running_loop()
        begun_s = clock.time()
        parts = [body] if isinstance(body, bytes) else list(body)
        left = [{"type": "http.request", "body": p, "more_body": i < len(parts)} for i, p in enumerate(parts, 1)]

        async def receive() -> Any:
            if left:
                return left.pop(0)
            await (asyncio.sleep(leaves_s) if leaves_s is not None else asyncio.Event().wait())
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(takes_s)
            client.messages.append(message)
            if message.get("body"):
                client.got.append((clock.time() - begun_s, message["body"]))

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            client.app_done_s = clock.time() - begun_s

        scope = {"type": "http", "method": "POST", "path": path}
        await around(SmoothStream(watched, lambda: policy))(scope, receive, send)

    run(talk())
    return client


SLICE = [token(text) for text in "abcde"]
AT_ONCE: list[Part] = [(0.0, event) for event in SLICE]


# Who is paced -----------------------------------------------------------------------------------------------------


def test_a_slice_goes_out_at_one_token_per_tpot_of_the_class() -> None:
    client = ask(engine(*AT_ONCE, (1.0, DONE)))
    assert client.times() == [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]
    assert client.body == b"".join(SLICE) + DONE
    assert client.whole()


def test_a_stream_that_is_behind_its_reader_goes_out_as_it_comes() -> None:
    client = ask(engine(*((0.3, event) for event in SLICE), (0.0, DONE)))
    assert client.times() == [0.3, 0.6, 0.9, 1.2, 1.5, 1.5]


@pytest.mark.parametrize("smooth", [True, 1])
def test_a_request_asks_for_itself(smooth: object) -> None:
    body = request(vllm_xargs={"slo_class": "batch", "smooth": smooth})
    assert ask(engine(*AT_ONCE[:2], (5.0, DONE)), body).times() == [0.0, 0.5, 5.0]


def test_chats_are_paced_like_completions() -> None:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": text} for text in "abc")]
    events = [f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n".encode() for delta in deltas]
    client = ask(engine(*((0.0, event) for event in events), (1.0, DONE)), path="/v1/chat/completions")
    assert client.times() == [0.0, 0.0, 0.1, 0.2, 1.0]


def test_a_request_whose_body_comes_in_parts_is_read_whole() -> None:
    body = request(vllm_xargs={"smooth": True, "slo_class": "batch"})
    assert ask(engine(*AT_ONCE[:2], (5.0, DONE)), [body[:30], body[30:]]).times() == [0.0, 0.5, 5.0]


@pytest.mark.parametrize(
    "body",
    [
        request(vllm_xargs={"smooth": False}),
        request(vllm_xargs={"smooth": 0}),
        request(vllm_xargs={"slo_class": "batch"}),
        request(vllm_xargs={"slo_class": "nobody"}),
        request(vllm_xargs={"smooth": "perhaps"}),
        request(vllm_xargs=[1]),
        request(stream=False),
        json.dumps({"prompt": "x"}).encode(),
        request()[:-1],
        b"",
    ],
)
def test_who_does_not_ask_or_asks_wrongly_gets_everything_as_it_is(body: bytes) -> None:
    assert_untouched(ask(engine(*AT_ONCE, (0.0, DONE)), body))


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/completions/render", "/health"])
def test_other_paths_pass_untouched(path: str) -> None:
    assert_untouched(ask(engine(*AT_ONCE, (0.0, DONE)), path=path))


@pytest.mark.parametrize(("content_type", "status"), [(b"application/json", 200), (b"text/event-stream", 429)])
def test_answers_that_are_no_stream_pass_untouched(content_type: bytes, status: int) -> None:
    assert_untouched(ask(engine(*AT_ONCE, (0.0, DONE), content_type=content_type, status=status)))


def test_a_body_that_is_compressed_passes_untouched() -> None:
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"Content-Type", b"text/event-stream"), (b"Content-Encoding", b"gzip")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in (*SLICE, DONE):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    assert_untouched(ask(app))


def test_where_layerkv_is_off_nothing_is_paced() -> None:
    assert_untouched(ask(engine(*AT_ONCE, (0.0, DONE)), policy=None))


def assert_untouched(client: Client) -> None:
    """Every message is the application's, at its time."""
    assert client.got == [(0.0, event) for event in (*SLICE, DONE)]
    assert client.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


def test_what_is_not_http_passes_through() -> None:
    seen: list[Any] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        await send(scope["type"])

    async def send(message: Any) -> None:
        seen.append(message)

    run(SmoothStream(app, lambda: POLICY)({"type": "lifespan"}, lambda: None, send))  # type: ignore[arg-type, return-value]
    assert seen == ["lifespan"]


def test_the_policy_is_asked_for_at_every_request() -> None:
    policies = [POLICY, SloPolicy(classes={"chat": PLAIN}, default_class="chat")]

    async def talk() -> list[int]:
        middleware, counts = SmoothStream(engine(*AT_ONCE, (0.0, DONE)), lambda: policies.pop(0)), []
        for _ in range(2):
            left, messages = [{"type": "http.request", "body": request()}], []

            async def send(message: Any, messages: list[Any] = messages) -> None:
                messages.append(message)

            async def receive(left: list[Any] = left) -> Any:
                return left.pop()

            await middleware({"type": "http", "method": "POST", "path": "/v1/completions"}, receive, send)
            counts.append(asyncio.get_running_loop().time())
        return counts

    paced_until_s, plain_until_s = run(talk())
    assert paced_until_s > 1000.0
    assert plain_until_s == paced_until_s


# Events -----------------------------------------------------------------------------------------------------------


def test_events_are_found_however_the_body_is_cut() -> None:
    body = b"".join(SLICE)
    parts = [(0.0, body[:10]), (0.0, body[10:75]), (0.0, body[75:]), (1.0, DONE)]
    client = ask(engine(*parts))
    assert client.times() == [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]
    assert client.body == body + DONE


def test_the_end_comes_within_a_second_and_the_usage_before_it() -> None:
    many = [token(str(number)) for number in range(500)]
    last = token("end", finish_reason="length")
    client = ask(engine(*((0.0, event) for event in many), (0.0, last), (0.0, USAGE), (0.0, DONE)))
    assert client.body == b"".join(many) + last + USAGE + DONE
    assert client.times()[-1] == pytest.approx(END_S)
    assert max(b - a for a, b in pairwise(client.times())) < TPOT_S
    assert client.whole()


def test_a_body_that_ends_without_saying_so_goes_out_within_a_second() -> None:
    many = [token(str(number)) for number in range(500)]
    client = ask(engine(*((0.0, event) for event in many), (0.0, b"data: cut off")))
    assert client.body == b"".join(many) + b"data: cut off"
    assert client.got[-1][0] == pytest.approx(END_S)
    assert client.whole()


def test_an_error_goes_out_at_once_behind_what_was_made_before_it() -> None:
    error = b'data: {"error": {"message": "engine died", "code": 500}}\n\n'
    client = ask(engine(*AT_ONCE, (0.05, error), (0.0, DONE)))
    assert client.body == b"".join(SLICE) + error + DONE
    assert client.times() == [0.0, *[0.05] * 6]


def test_an_error_in_the_first_event_goes_out_at_once() -> None:
    error = b'data: {"error": {"message": "slo_class: found nope", "code": 400}}\n\n'
    client = ask(engine((0.0, error), (0.0, DONE)))
    assert client.times() == [0.0, 0.0]
    assert client.body == error + DONE


def test_each_of_several_choices_has_a_reader_of_its_own() -> None:
    ahead = [token("x", 0) for _ in range(4)]
    behind = [token("y", 1) for _ in range(2)]
    parts = [*((0.0, event) for event in ahead), *((0.05, event) for event in behind), (1.0, DONE)]
    client = ask(engine(*parts))
    times = {index: [t for t, part in client.got if b'"index": %d' % index in part] for index in (0, 1)}
    assert times[0] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert times[1] == pytest.approx([0.05, 0.15])


def test_a_choice_that_ends_goes_out_within_a_second_while_another_goes_on() -> None:
    parts = [(0.0, token(str(number), 0)) for number in range(50)]
    parts += [(0.0, token("end", 0, finish_reason="stop")), (0.0, token("y", 1)), (9.0, token("y", 1)), (0.0, DONE)]
    client = ask(engine(*parts))
    assert [at_s for at_s, part in client.got if b'"end"' in part] == pytest.approx([END_S])


def test_a_keep_alive_comment_waits_for_nobody() -> None:
    client = ask(engine(*AT_ONCE, (0.15, b": keep-alive\n\n"), (1.0, DONE)))
    assert [at_s for at_s, part in client.got if part == b": keep-alive\n\n"] == pytest.approx([0.15])


@pytest.mark.parametrize("outer", ["smooth", "retry"])
def test_the_middleware_for_overload_stands_on_either_side(outer: str) -> None:
    message = "overloaded: about 9.0 s of prompts wait before a request of class 'chat'; retry after 7 s"
    refusal = f"data: {json.dumps({'error': {'message': message, 'code': 429}})}\n\n".encode()

    def within(app: App) -> App:
        return RetryAfter(app) if outer == "smooth" else app

    def around(middleware: App) -> App:
        return RetryAfter(middleware) if outer == "retry" else middleware

    paced = ask(within(engine(*AT_ONCE, (1.0, DONE))), around=around)
    assert paced.times() == [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]
    assert paced.body == b"".join(SLICE) + DONE
    refused = ask(within(engine((0.0, refusal), (0.0, DONE))), around=around)
    assert refused.messages[0]["status"] == 429
    assert json.loads(refused.body)["error"]["message"] == message


# The application, and clients that leave --------------------------------------------------------------------------


def test_the_application_never_waits_for_the_pace() -> None:
    client = ask(engine(*AT_ONCE, (0.0, DONE)))
    assert client.app_done_s == 0.0
    assert client.times()[-1] > 0.0


def streaming(parts: list[Part], log: list[str]) -> App:
    """What vLLM's own streaming response does: it sends, listens for the client to leave, and stops then."""
    from starlette.responses import StreamingResponse

    async def made() -> Any:
        try:
            for wait_s, part in parts:
                await asyncio.sleep(wait_s)
                log.append("made")
                yield part
        finally:
            log.append("freed")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await StreamingResponse(made(), media_type="text/event-stream")(scope, receive, send)

    return app


def test_starlettes_own_response_is_paced() -> None:
    client = ask(streaming([*AT_ONCE, (1.0, DONE)], []))
    assert client.times() == [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]
    assert client.whole()


def test_a_client_that_leaves_is_heard_at_once_and_what_was_held_for_it_is_dropped() -> None:
    log: list[str] = []
    client = ask(streaming([*AT_ONCE, *((1.0, event) for event in SLICE)], log), leaves_s=0.25)
    assert client.times() == [0.0, 0.1, 0.2]
    assert log == ["made"] * 5 + ["freed"]
    assert client.app_done_s == pytest.approx(0.25)


def test_a_server_that_says_by_an_error_that_the_client_is_gone_stops_the_application() -> None:
    seen: list[str] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        try:
            for event in SLICE:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                seen.append("sent")
                await asyncio.sleep(0.01)
        except OSError:
            seen.append("stopped")

    async def talk() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": request()}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                raise OSError("the client is gone")

        await SmoothStream(app, lambda: POLICY)(
            {"type": "http", "method": "POST", "path": "/v1/completions"}, receive, send
        )

    with pytest.raises(OSError, match="the client is gone"):
        run(talk())
    assert seen == ["sent", "stopped"]


def test_an_application_that_fails_has_sent_what_it_made() -> None:
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for event in SLICE:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        raise RuntimeError("broken")

    sent: list[Any] = []

    async def talk() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": request()}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        await SmoothStream(app, lambda: POLICY)(scope, receive, send)

    with pytest.raises(RuntimeError, match="broken"):
        run(talk())
    assert b"".join(message.get("body", b"") for message in sent) == b"".join(SLICE)
    assert all(message["more_body"] for message in sent[1:]), "the server is to see that the body has no end"


def test_a_task_that_is_cancelled_leaves_nothing_behind() -> None:
    async def talk() -> int:
        async def receive() -> Any:
            return {"type": "http.request", "body": request()}

        async def send(_message: Any) -> None: ...

        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        middleware = SmoothStream(engine(*AT_ONCE, (60.0, DONE)), lambda: POLICY)
        task = asyncio.create_task(middleware(scope, receive, send))
        await asyncio.sleep(0.15)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(asyncio.all_tasks())

    assert run(talk()) == 1


def test_a_task_that_is_cancelled_while_the_rest_goes_out_leaves_nothing_behind() -> None:
    async def talk() -> int:
        async def receive() -> Any:
            return {"type": "http.request", "body": request()}

        async def send(_message: Any) -> None: ...

        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        task = asyncio.create_task(SmoothStream(engine(*AT_ONCE, (0.0, DONE)), lambda: POLICY)(scope, receive, send))
        await asyncio.sleep(0.15)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(asyncio.all_tasks())

    assert run(talk()) == 1


def test_what_is_held_is_bounded_though_the_client_takes_nothing() -> None:
    """A client that is slower than the engine: then the application waits, as it does without us."""
    large = token("x" * 100_000)
    parts = [(0.0, large)] * 60
    client = ask(engine(*parts, (0.0, DONE)), takes_s=1.0)
    assert client.body == large * 60 + DONE
    assert client.app_done_s > 0.0
    assert max(len(part) for _, part in client.got) <= HELD_BYTES + len(large)


# Who is told that nobody paces ------------------------------------------------------------------------------------


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the front end has logged."""
    with heard_by(logging.getLogger(pace.logger.name)) as heard:
        yield heard


def validate(**more: Any) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from layerkv.vllm_plugin.slo_gate import slo_gate

    gate: Any = slo_gate(POLICY, None, for_v2=False)
    gate.validate_params(SamplingParams(**{"output_kind": RequestOutputKind.DELTA, **more}))


@pytest.fixture
def no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from layerkv.vllm_plugin import reload

    monkeypatch.setattr(reload, "_sources", {})


@pytest.mark.usefixtures("no_sources")
def test_a_stream_that_asks_where_nobody_paces_is_reported_once(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.sampling_params import RequestOutputKind

    monkeypatch.setattr(SmoothStream, "is_installed", False)
    validate(output_kind=RequestOutputKind.FINAL_ONLY)
    validate(extra_args={"slo_class": "batch"})
    validate(extra_args={"smooth": 0})
    assert warnings == []
    validate()
    validate()
    [warning] = warnings
    assert "class chat" in warning
    assert "--middleware layerkv.vllm_plugin.pace.SmoothStream" in warning
    SmoothStream(engine())
    validate(extra_args={"slo_class": "batch", "smooth": 1})
    assert len(warnings) == 1


@pytest.mark.usefixtures("no_sources")
@pytest.mark.parametrize("smooth", ["perhaps", 2, [1]])
def test_the_gate_refuses_what_is_neither_yes_nor_no(smooth: object) -> None:
    with pytest.raises(ValueError, match=r"smooth: found .*; expected true or false"):
        validate(extra_args={"smooth": smooth})


@pytest.mark.usefixtures("no_sources")
def test_the_middleware_follows_the_policy_that_its_process_follows() -> None:
    from layerkv.vllm_plugin.reload import follow_policy, followed_policy

    assert followed_policy() is None
    source = follow_policy(None, POLICY)
    assert followed_policy() is POLICY
    source.put(other := SloPolicy(classes={"chat": PLAIN}, default_class="chat"))
    assert followed_policy() is other


def test_the_flag_names_the_middleware() -> None:
    from importlib import import_module

    from layerkv.vllm_plugin.our_classes import SMOOTH_MIDDLEWARE

    module, _, name = SMOOTH_MIDDLEWARE.rpartition(".")
    assert getattr(import_module(module), name) is SmoothStream
