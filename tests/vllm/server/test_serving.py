import pytest

from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.conftest import PressedLoad
from tests.vllm.server.served import Server, body

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("num_tokens", [1, 100, 700])
def test_a_stream_brings_the_same_tokens_as_the_whole_answer(server: Server, num_tokens: int) -> None:
    tokens = prompt(num_tokens, seed=100)
    whole = server.complete(tokens, 24)
    (streamed,) = server.stream([body(tokens, 24)])
    assert streamed.num_chunks > 1
    assert streamed.token_ids == whole.token_ids
    assert streamed.text == whole.text
    assert len(set(whole.token_ids)) > 8  # not one token over and over


def test_concurrent_streams_under_memory_pressure_all_get_the_tokens_asked_for(pressed: PressedLoad) -> None:
    assert [len(completion.token_ids) for completion in pressed.completions] == pressed.max_tokens
    assert {completion.finish_reason for completion in pressed.completions} == {"length"}
    assert pressed.grown("layerkv_parks_total") > 0
    assert pressed.grown("layerkv_layered_prefills_total") > 0


@pytest.mark.parametrize("index", [5, 6, 22, 23])
def test_a_request_under_memory_pressure_gets_the_same_tokens_as_alone(
    server: Server, pressed: PressedLoad, index: int
) -> None:
    alone = server.complete(pressed.prompts[index], pressed.max_tokens[index])
    assert pressed.completions[index].token_ids == alone.token_ids


def test_the_log_says_once_that_layerkv_is_on_and_what_it_has(server: Server) -> None:
    lines = [line for line in server.log().splitlines() if "layerkv is on" in line]
    assert len(lines) == 1
    assert " INFO " in lines[0]
    for part in ("pool ", "lane zone ", "lane(s)", "host memory ", "policy "):
        assert part in lines[0]
