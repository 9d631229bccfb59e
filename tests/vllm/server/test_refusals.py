"""A request that cannot be served is refused with a reason, and the server goes on."""

import json
from typing import Any

import pytest

from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.served import CLASSES, MAX_MODEL_LEN, Server, body

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def message_of_refusal(server: Server, request: dict[str, Any], path: str = "/v1/completions") -> str:
    """Send a request that must be refused with HTTP 400, and one after it that must not."""
    response = server.client.post(path, json=request)
    assert response.status_code == 400, response.text
    assert len(server.complete(prompt(10, seed=300), 4).token_ids) == 4
    return str(response.json()["error"]["message"])


def test_an_unknown_class_is_refused_by_naming_the_known_ones(server: Server) -> None:
    message = message_of_refusal(server, body(prompt(10, seed=301), 4, vllm_xargs={"slo_class": "nope"}))
    assert "slo_class" in message
    assert "nope" in message
    for name in CLASSES:
        assert name in message


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        pytest.param({"vllm_xargs": {"slo_class": "nope"}}, "slo_class: found 'nope'", id="ours"),
        pytest.param({"logit_bias": {"99999": 1.0}}, "out-of-vocab", id="vllms-own"),
    ],
)
def test_a_stream_with_an_unknown_class_ends_as_with_any_parameter_that_vllm_refuses(
    server: Server, refused: dict[str, Any], message: str
) -> None:
    # vLLM checks parameters when the stream has begun: HTTP 200, and the 400 is its only event.
    response = server.post(body(prompt(10, seed=304), 4, stream=True, **refused))
    event, end = (line.removeprefix("data: ") for line in response.text.splitlines() if line)
    error = json.loads(event)["error"]
    assert (error["code"], end) == (400, "[DONE]")
    assert message in error["message"]


def test_an_unknown_class_is_refused_in_a_chat_too(server: Server) -> None:
    request = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "vllm_xargs": {"slo_class": "chatt"},
    }
    assert "did you mean chat?" in message_of_refusal(server, request, "/v1/chat/completions")


@pytest.mark.parametrize("name", [3, 0.5, ["chat"], {"chat": 1}, True])
def test_a_class_that_is_not_a_name_is_refused(server: Server, name: object) -> None:
    message = message_of_refusal(server, body(prompt(10, seed=302), 4, vllm_xargs={"slo_class": name}))
    assert "slo_class" in message


def test_a_prompt_longer_than_the_model_allows_is_refused(server: Server) -> None:
    message = message_of_refusal(server, body(prompt(MAX_MODEL_LEN + 1, seed=303), 4))
    assert str(MAX_MODEL_LEN) in message
