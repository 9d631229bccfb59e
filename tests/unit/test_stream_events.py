"""Server-sent events: cut out of a body in any parts, and what is read of each."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.vllm_plugin.stream_events import EventReader, EventSplitter, StreamEvent

BODY = 'data: {"choices": [{"text": "ä\\n\\n"}]}\n\n: ping\n\ndata: x\r\n\r\ndata: [DONE]\n\nrest'.encode()
EVENTS = ['data: {"choices": [{"text": "ä\\n\\n"}]}\n\n', ": ping\n\n", "data: x\r\n\r\n", "data: [DONE]\n\n"]


@given(st.lists(st.integers(0, len(BODY)), max_size=30))
def test_events_are_the_same_however_the_body_is_cut(cuts: list[int]) -> None:
    splitter, events = EventSplitter(), []
    places = [0, *sorted(cuts), len(BODY)]
    for start, end in pairwise(places):
        events += splitter.feed(BODY[start:end])
    assert [event.decode() for event in events] == EVENTS
    assert splitter.rest() == b"rest"
    assert splitter.rest() == b""


@given(st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"a", b"data: "]), max_size=40))
def test_no_byte_is_lost_or_changed(parts: list[bytes]) -> None:
    splitter = EventSplitter()
    events = [event for part in parts for event in splitter.feed(part)]
    assert b"".join(events) + splitter.rest() == b"".join(parts)


def event(**chunk: Any) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def choice(index: int = 0, **more: Any) -> bytes:
    return event(choices=[{"index": index, "text": "a", **more}])


@pytest.mark.parametrize(
    ("raw", "seen"),
    [
        (b"data: [DONE]\n\n", StreamEvent(is_done=True)),
        (b"data:[DONE]\r\n\r\n", StreamEvent(is_done=True)),
        (b": keep-alive\n\n", StreamEvent(is_comment=True)),
        (b"\n\n", StreamEvent(is_comment=True)),
        (event(error={"message": "no", "code": 400}), StreamEvent(is_error=True)),
        (event(choices=[], usage={"completion_tokens": 7}), StreamEvent()),
        (b"data: {nonsense\n\n", StreamEvent()),
        (b"data: [1]\n\n", StreamEvent()),
        (event(choices=[{"index": "0"}]), StreamEvent()),
        (event(choices=[{"index": 0}, {"index": 1}]), StreamEvent()),
        (choice(), StreamEvent(choice=0, num_tokens=1)),
        (choice(3), StreamEvent(choice=3, num_tokens=1)),
        (choice(finish_reason="length"), StreamEvent(choice=0, num_tokens=1, ends_choice=True)),
        (b"event: chunk\n" + choice(), StreamEvent(choice=0, num_tokens=1)),
    ],
)
def test_an_event_is_seen_for_what_it_is(raw: bytes, seen: StreamEvent) -> None:
    assert EventReader().read(raw) == seen


@pytest.mark.parametrize(
    ("first", "second", "counts"),
    [
        (choice(token_ids=[1, 2, 3]), choice(token_ids=[4, 5]), [3, 2]),
        (choice(token_ids=[]), choice(token_ids=[4]), [0, 1]),
        (choice(), choice(logprobs={"tokens": ["a", "b"]}), [1, 2]),
        (choice(), choice(logprobs={"content": [{"token": "a"}, {"token": "b"}]}), [1, 2]),
        (choice(logprobs={"tokens": ["the prompt", "of", "echo", "a"]}), choice(), [1, 1]),
        (event(choices=[{"delta": {"role": "assistant", "content": ""}}]), event(choices=[{"delta": {}}]), [0, 1]),
        (event(choices=[{"delta": {"tool_calls": [{}]}}]), event(choices=[{"delta": {"content": "x"}}]), [0, 1]),
    ],
)
def test_tokens_are_counted_where_the_event_tells_how_many_there_are(
    first: bytes, second: bytes, counts: list[int]
) -> None:
    reader = EventReader()
    assert [reader.read(first).num_tokens, reader.read(second).num_tokens] == counts


def test_a_continuous_usage_tells_the_tokens_of_each_choice() -> None:
    reader = EventReader()
    counts = []
    for index, total in ((0, 1), (1, 2), (0, 4), (0, 4), (1, 3)):
        raw = event(choices=[{"index": index, "text": "a"}], usage={"prompt_tokens": 9, "completion_tokens": total})
        counts.append(reader.read(raw).num_tokens)
    assert counts == [1, 2, 3, 0, 1]
