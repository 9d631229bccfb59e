"""The load generator against a server that runs in the same event loop."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web

from layerkv.bench.load import PlannedRequest
from layerkv.bench.records import RequestRecord
from layerkv.bench.suite.generator import Generator, GeneratorRun
from layerkv.bench.suite.health_probe import HealthProbe
from layerkv.bench.suite.http_stream import StreamError
from layerkv.bench.suite.plan import LoadPlan
from tests.fakes.toy_server import STARVED_S, ToyServer


def request(number: int, arrival_s: float = 0.0, **more: Any) -> PlannedRequest:
    fields = {"prompt": [3 + number, 4, 5], "output_tokens": 4, **more}
    return PlannedRequest(request_id=f"r{number}", arrival_s=arrival_s, **fields)


def drive(
    requests: list[PlannedRequest],
    behaviour: str = "",
    *,
    beside: Callable[[ToyServer], Coroutine[Any, Any, None]] | None = None,
    **more: Any,
) -> tuple[GeneratorRun, ToyServer]:
    """Runs a plan against a toy server; `beside` runs while it does."""

    async def run() -> tuple[GeneratorRun, ToyServer]:
        toy = ToyServer(behaviour)
        runner = web.AppRunner(toy.app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        fields = {"warm_up": [], "names_classes": True, "sample_interval_s": 0.02, "kv_memory_bytes": 1000}
        plan = LoadPlan(
            url=f"http://127.0.0.1:{port}", model="m", requests=requests, block_bytes=10, **{**fields, **more}
        )
        helper = asyncio.create_task(beside(toy)) if beside else None
        try:
            return await Generator(plan, lambda _done, _total: None).run(), toy
        finally:
            toy.released.set()
            if helper is not None:
                await helper
            await runner.cleanup()

    return asyncio.run(run())


def by_id(run: GeneratorRun) -> dict[str, RequestRecord]:
    return {record.request_id: record for record in run.requests}


def test_every_token_of_every_request_is_stamped_in_order() -> None:
    run, _ = drive([request(i, 0.01 * i) for i in range(5)])
    for record in run.requests:
        assert record.error is None
        assert len(record.token_times_s) == 4
        assert record.token_times_s == sorted(record.token_times_s)
        assert record.sent_s is not None
        assert record.arrival_s <= record.sent_s <= record.token_times_s[0] <= run.wall_s


def test_requests_are_sent_when_they_are_due_though_the_server_gives_no_answer() -> None:
    """Open loop: a server that stalls must see every request all the same."""
    everything_arrived = threading.Event()

    async def release_when_all_are_there(toy: ToyServer) -> None:
        while len(toy.arrivals_s) < 40:
            await asyncio.sleep(0.005)
        everything_arrived.set()
        toy.released.set()

    run, toy = drive([request(i, 0.005 * i) for i in range(40)], "stalls", beside=release_when_all_are_there)
    assert everything_arrived.is_set()
    assert len(toy.bodies) == 40
    last_sent_s = max(record.sent_s or 0.0 for record in run.requests)
    first_token_s = min(record.token_times_s[0] for record in run.requests)
    assert last_sent_s < first_token_s


def test_due_times_are_the_plans_whenever_requests_were_sent() -> None:
    run, _ = drive([request(0, 0.02), request(1, 0.05)])
    assert [record.arrival_s for record in run.requests] == pytest.approx([0.02, 0.05])


def test_the_next_turn_says_everything_again_and_waits_for_the_answer() -> None:
    turns = [
        request(1, prompt=[10, 11]),
        request(2, 0.03, prompt=[20], after="r1"),
        request(3, 0.03, prompt=[30], after="r2"),
    ]
    run, toy = drive(turns)
    first, second, third = (body["prompt"] for body in toy.bodies)
    assert first == [10, 11]
    assert second[:2] == first
    assert second[-1] == 20
    assert len(second) == 2 + 4 + 1
    assert third[: len(second)] == second
    assert len(third) == len(second) + 4 + 1
    records = by_id(run)
    due_s = records["r1"].token_times_s[-1] + 0.03
    assert due_s - 0.005 <= records["r2"].arrival_s <= records["r2"].token_times_s[0]
    assert records["r3"].prompt_tokens == len(third)


def test_a_client_of_a_closed_loop_waits_for_the_answer_and_says_something_new() -> None:
    run, toy = drive([request(1, prompt=[10, 11]), request(2, 0.03, prompt=[20], after="r1", history=False)])
    assert [body["prompt"] for body in toy.bodies] == [[10, 11], [20]]
    records = by_id(run)
    assert records["r2"].arrival_s >= records["r1"].token_times_s[-1] + 0.03
    assert records["r2"].prompt_tokens == 1


def test_a_refused_request_is_an_error_with_the_servers_words() -> None:
    run, _ = drive([request(i, 0.01 * i) for i in range(4)], "refuses")
    errors = [record.error for record in run.requests if record.error is not None]
    assert len(errors) == 2
    assert all(error.startswith("HTTP 429") and "too busy" in error for error in errors)


def test_a_client_that_asks_for_more_than_it_wants_hangs_up() -> None:
    run, toy = drive([request(0, max_tokens=50), request(1)])
    assert [body["max_tokens"] for body in toy.bodies] == [50, 4]
    for record in run.requests:
        assert record.error is None
        assert len(record.token_times_s) == 4
    assert toy.num_given[0] < 50, "it would have waited for all of them"


def test_an_answer_that_ends_by_a_stop_string_is_whole() -> None:
    """The toy's first token of `r0` is 18, an "s"; its text goes on with the alphabet."""
    run, toy = drive([request(0, stop=["zz", "vw"], output_tokens=60), request(1)])
    record = by_id(run)["r0"]
    assert toy.bodies[0]["stop"] == ["zz", "vw"]
    assert "stop" not in toy.bodies[1]
    assert (record.error, record.end, len(record.token_times_s)) == (None, "stop", len("stuvw"))
    assert record.token_digest is not None
    assert by_id(run)["r1"].end == "length"


def test_a_client_hangs_up_though_no_stop_string_came_yet() -> None:
    run, toy = drive(
        [
            request(0, stop=["vw"], output_tokens=4, max_tokens=60),
            request(0 + 26, stop=["vw"], output_tokens=5, max_tokens=60),
        ]
    )
    assert [body["max_tokens"] for body in toy.bodies] == [60, 60]
    records = by_id(run)
    assert (records["r0"].end, len(records["r0"].token_times_s), records["r0"].error) == ("hang_up", 4, None)
    assert records["r26"].end == "stop"  # in the very token after which its client would have left
    assert toy.num_given[0] < 60


def test_an_answer_that_reaches_the_models_length_without_its_stop_string_is_whole() -> None:
    run, _ = drive([request(0, stop=["!"], output_tokens=9)])
    (record,) = run.requests
    assert (record.error, record.end, len(record.token_times_s)) == (None, "length", 9)


@pytest.mark.parametrize("stop", [[], ["vw"]])
def test_an_answer_that_breaks_off_is_an_error_with_and_without_stop_strings(stop: list[str]) -> None:
    run, _ = drive([request(0, stop=stop)], "breaks")
    (record,) = run.requests
    assert record.error is not None
    assert (record.end, record.token_digest) == (None, None)


def test_an_answer_that_ends_early_for_another_reason_than_a_stop_string_is_an_error() -> None:
    run, _ = drive([request(0, stop=["vw"]), request(1)], "aborts")
    errors = [record.error for record in run.requests]
    assert errors == ["the stream ended after 2 of 4 tokens (abort)"] * 2


def test_a_warm_up_that_fails_is_no_start() -> None:
    with pytest.raises(StreamError, match="r7: the connection ended"):
        drive([request(0)], "breaks", warm_up=[request(7)])


def test_a_stream_that_breaks_off_keeps_its_tokens_and_is_an_error() -> None:
    run, _ = drive([request(0)], "breaks")
    (record,) = run.requests
    assert record.error is not None
    assert len(record.token_times_s) == 2
    assert record.token_digest is None


def test_a_session_whose_turn_failed_is_given_up_and_nothing_hangs() -> None:
    run, _ = drive([request(1), request(2, 0.01, after="r1"), request(3, 0.01, after="r2")], "breaks")
    records = by_id(run)
    assert "the turn before failed" in (records["r2"].error or "")
    assert "the turn before failed" in (records["r3"].error or "")
    assert records["r3"].sent_s is None


def test_classes_are_named_only_where_they_are_understood() -> None:
    _, toy = drive([request(0, slo_class="chat")])
    assert toy.bodies[0]["vllm_xargs"] == {"slo_class": "chat"}
    _, toy = drive([request(0, slo_class="chat")], names_classes=False)
    assert "vllm_xargs" not in toy.bodies[0]


def test_warm_up_is_sent_before_the_load_and_not_recorded() -> None:
    run, toy = drive([request(0)], warm_up=[request(7), request(8)])
    assert len(toy.bodies) == 3
    assert [record.request_id for record in run.requests] == ["r0"]
    assert run.before.prompt_tokens == 20
    assert run.after.prompt_tokens == 30


def test_the_servers_state_is_sampled_in_bytes() -> None:
    run, _ = drive([request(0, output_tokens=40)])
    assert run.samples
    assert {sample.device_kv_bytes for sample in run.samples} == {500}


def test_equal_tokens_have_equal_digests() -> None:
    one, _ = drive([request(0), request(1)])
    two, _ = drive([request(0), request(1)])
    assert [r.token_digest for r in one.requests] == [r.token_digest for r in two.requests]
    assert one.requests[0].token_digest != one.requests[1].token_digest


def test_health_is_asked_for_all_through_a_load_and_the_slowest_answer_is_kept() -> None:
    run, toy = drive([request(i, 0.15 * i) for i in range(3)], "starved")
    assert toy.num_asked > 1
    assert run.longest_probe is not None
    assert run.longest_probe.took_s >= STARVED_S
    assert 0.0 <= run.longest_probe.at_s <= run.wall_s


def test_a_question_that_is_never_answered_counts_for_as_long_as_it_waited() -> None:
    run, _ = drive([request(0), request(1, 0.4)], "mute")
    assert run.longest_probe is not None
    assert run.longest_probe.at_s + run.longest_probe.took_s >= run.wall_s


def test_a_server_that_is_gone_gives_no_answer_however_often_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Semaphore(0)

    def refuse(_: HealthProbe) -> None:
        asked.release()
        raise ConnectionRefusedError

    monkeypatch.setattr(HealthProbe, "_ask", refuse)
    probe = HealthProbe("http://127.0.0.1:1", interval_s=0.0)
    probe.start(0.0)
    for _ in range(3):
        asked.acquire()
    assert probe.longest is None
    probe.stop()
