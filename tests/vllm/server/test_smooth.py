"""Streams at their reader's pace, over real HTTP and with the client that people use."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.served import POLL_LIMIT_S, POLL_S, REQUEST_LIMIT_S, Server

openai = pytest.importorskip("openai")

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_TOKENS = 24
SMOOTH = {"vllm_xargs": {"smooth": True}, "ignore_eos": True, "min_tokens": NUM_TOKENS}
PLAIN = {**SMOOTH, "vllm_xargs": {"smooth": False}}
EXACTLY: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0.0}
MESSAGES: Any = [{"role": "user", "content": "Tell me something long."}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    """An OpenAI client of the server."""
    http = httpx.Client(trust_env=False, timeout=REQUEST_LIMIT_S, limits=httpx.Limits(keepalive_expiry=1.0))
    with openai.OpenAI(
        base_url=f"{str(server.client.base_url).rstrip(chr(47))}/v1", api_key="none", http_client=http, max_retries=0
    ) as made:
        yield made


@pytest.fixture(scope="module")
def model(client: Any) -> str:
    """The name of the one model."""
    return str(client.models.list().data[0].id)


def test_a_smooth_completion_brings_the_same_text_as_the_whole_answer_and_its_usage_last(
    client: Any, model: str
) -> None:
    request = {"model": model, "prompt": prompt(100, seed=400), **EXACTLY}
    whole = client.completions.create(**request, extra_body=PLAIN)
    usage = {"include_usage": True}
    chunks = list(client.completions.create(**request, stream=True, stream_options=usage, extra_body=SMOOTH))
    *told, last = chunks
    assert "".join(chunk.choices[0].text for chunk in told) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in told] == [None] * (len(told) - 1) + ["length"]
    assert len(told) > 1
    assert last.choices == []
    assert last.usage.completion_tokens == NUM_TOKENS


def test_a_smooth_chat_brings_the_same_text_as_the_whole_answer(client: Any, model: str) -> None:
    request = {"model": model, "messages": MESSAGES, **EXACTLY}
    whole = client.chat.completions.create(**request, extra_body=PLAIN)
    chunks = list(client.chat.completions.create(**request, stream=True, extra_body=SMOOTH))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_each_of_several_answers_is_whole(client: Any, model: str) -> None:
    request = {"model": model, "prompt": [prompt(50, seed=401), prompt(200, seed=402)], **EXACTLY}
    whole = client.completions.create(**request, extra_body=PLAIN)
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(**request, stream=True, extra_body=SMOOTH):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {choice.index: choice.text for choice in whole.choices}


def test_a_client_that_hangs_up_in_a_smooth_stream_frees_the_engine(server: Server, client: Any, model: str) -> None:
    server.wait_until_idle()
    num_aborted = server.num_logged(" aborted.")
    extra_body = {**SMOOTH, "vllm_xargs": {"smooth": True, "slo_class": "batch"}, "min_tokens": 900}
    request = {"model": model, "prompt": prompt(100, seed=403), "max_tokens": 900, "temperature": 0.0}
    with client.completions.create(**request, stream=True, extra_body=extra_body) as stream:
        next(iter(stream))
    end_s = time.monotonic() + POLL_LIMIT_S
    while server.num_logged(" aborted.") == num_aborted:
        assert time.monotonic() < end_s
        time.sleep(POLL_S)
    server.wait_until_idle()


def test_what_is_wrong_with_a_request_is_told_in_its_stream(client: Any, model: str) -> None:
    request = {"model": model, "prompt": prompt(10, seed=404), **EXACTLY}
    for xargs, complaint in (
        ({"smooth": True, "slo_class": "nope"}, "slo_class: found 'nope'"),
        ({"smooth": "perhaps"}, "smooth: found 'perhaps'; expected true or false"),
    ):
        with pytest.raises(openai.APIError, match=complaint):
            list(client.completions.create(**request, stream=True, extra_body={**SMOOTH, "vllm_xargs": xargs}))


def test_the_server_does_not_say_that_nobody_paces(server: Server) -> None:
    assert server.num_logged("nobody paces streams here") == 0
