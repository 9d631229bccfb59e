"""What readers got, counted by class, and their waits told with what they were for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from layerkv.config import SloClass
from layerkv.metrics import METRICS, MetricSamples, Payload
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.engine import EngineShape
from layerkv.scheduler.reasons import End, Event, LogEntry, Reason
from layerkv.scheduler.streams import REPORT_TOKENS
from tests.fakes.tiny_scheduler import BLOCK_BYTES, BLOCK_TOKENS, policy, profile

CHAT = SloClass(name="chat", ttft_s=2.0, tpot_s=0.5)
STRICT = SloClass(name="strict", ttft_s=2.0, tpot_s=0.5, max_lag_s=0.0)
BATCH = SloClass(name="batch", ttft_s=2.0, tpot_s=math.inf)
WHOLE = SloClass(name="whole", ttft_s=2.0, tpot_s=0.5, stream=False, max_stall_s=5.0)
SHAPE = EngineShape("auto", BLOCK_TOKENS, BLOCK_BYTES, pool_blocks=100, zone_blocks=40, host_blocks=120)
ARRIVAL_S = 10.0


class Served:
    """A controller with requests that arrived at :data:`ARRIVAL_S`."""

    def __init__(self, slo: SloClass = CHAT, *, has_reader: bool = True) -> None:
        self.controller = Controller(policy(), SHAPE, profile(), is_measured=True, keep_log=True)
        self.slo, self.has_reader = slo, has_reader
        self.arrive("a")

    def arrive(self, name: str) -> None:
        self.controller.arrive(
            name,
            self.slo,
            now_s=ARRIVAL_S,
            arrival_s=ARRIVAL_S,
            num_tokens=160,
            max_tokens=1000,
            has_reader=self.has_reader,
        )

    def token(self, *times_s: float, num_tokens: int = 1) -> None:
        for at_s in times_s:
            self.controller.made_tokens("a", at_s, num_tokens)

    def parks(self, at_s: float, reason: Reason = Reason.POOL_SHORT) -> None:
        self.controller.park("a", num_computed=160, num_tokens=161, num_output=1, reason=reason, now_s=at_s)

    def fetched(self, at_s: float) -> None:
        self.controller.fetched("a", step=1, now_s=at_s)

    def leaves(self, at_s: float, end: End = End.FINISHED) -> None:
        num_output = self.controller.tracked["a"].reader.num_tokens
        self.controller.leave("a", num_output=num_output, end=end, now_s=at_s)

    def reported(self) -> Payload:
        samples = MetricSamples()
        self.controller.streams.report(samples)
        return samples.take()

    def counts(self) -> tuple[float, float, float, float]:
        """Tokens on time and late, requests fluid and not."""
        counters, name = self.reported()["counters"], self.slo.name
        kinds = ("tokens_on_time", "tokens_late", "fluid_requests", "not_fluid_requests")
        on_time, late, fluid, not_fluid = (counters.get(f"layerkv_{kind}|{name}", 0) for kind in kinds)
        return on_time, late, fluid, not_fluid

    def told(self) -> list[LogEntry]:
        return [entry for entry in self.controller.take_log() if entry.event is Event.READER_WAITED]

    def facts_at_end(self) -> dict[str, Any]:
        return self.controller.take_log()[-1].facts


# What is counted ------------------------------------------------------------------------------------------------------


def test_a_stream_that_flows_is_fluid_and_its_tokens_on_time() -> None:
    served = Served()
    served.token(11.0, 11.5, 12.0)
    served.leaves(12.0)
    payload = served.reported()
    assert payload["counters"] == {
        "layerkv_tokens_on_time|chat": 3,
        "layerkv_tokens_late|chat": 0,
        "layerkv_fluid_requests|chat": 1,
        "layerkv_not_fluid_requests|chat": 0,
    }
    assert payload["histograms"] == {"layerkv_lag_seconds|chat": [0.0], "layerkv_longest_pause_seconds|chat": [0.0]}
    assert served.facts_at_end() == {"output_tokens": 3, "end": "finished", "lag_s": 0.0, "longest_pause_s": 0.0}


def test_all_that_is_reported_is_a_metric_by_class() -> None:
    served = Served()
    served.token(11.0)
    served.leaves(11.0)
    payload = served.reported()
    kinds = {spec.name: (f"{spec.kind}s", spec.label) for spec in METRICS}
    for kind in ("counters", "histograms"):
        assert payload[kind]
        for key in payload[kind]:
            assert kinds[key.partition("|")[0]] == (kind, "slo_class")


def test_a_token_is_on_time_by_its_own_due_time_and_a_stream_by_its_readers_waits() -> None:
    served = Served()
    served.token(13.0, 13.1, 13.2, 13.4)  # due at 12.0, 12.5, 13.0, 13.5: late, and then read without a wait
    served.leaves(13.4)
    assert served.counts() == (1, 3, 0, 1), "its first token was late"
    served = Served()
    served.token(10.1, 11.9, 12.2)  # 1.3 s of waiting, and every token before its due time
    served.leaves(12.2)
    assert served.counts() == (3, 0, 0, 1)


@pytest.mark.parametrize(("slo", "fluid"), [(CHAT, 1), (STRICT, 0)])
def test_how_long_a_reader_may_wait_is_its_classs(slo: SloClass, fluid: int) -> None:
    served = Served(slo)
    served.token(11.0, 12.0)
    served.leaves(12.0)
    assert served.counts()[2:] == (fluid, 1 - fluid)


def test_tokens_that_come_together_are_each_judged() -> None:
    served = Served()
    served.token(12.6, num_tokens=4)  # due at 12.0, 12.5, 13.0, 13.5
    served.leaves(12.6)
    assert served.counts()[:2] == (2, 2)


def test_a_client_that_hangs_up_is_counted_as_what_it_saw() -> None:
    served = Served()
    served.token(11.0, 11.1)
    served.leaves(11.2, End.LEFT)
    assert served.counts()[2:] == (1, 0)
    payloads = served.reported()["histograms"]
    assert payloads == {}, "once"


def test_the_wait_in_which_a_client_hangs_up_counts() -> None:
    """The tokens alone say nothing of it: a reader who gave up after a minute would have had a fluid stream."""
    served = Served()
    served.token(11.0)
    served.parks(11.1)
    served.leaves(71.5, End.LEFT)
    payload = served.reported()
    assert payload["counters"]["layerkv_not_fluid_requests|chat"] == 1
    assert payload["histograms"]["layerkv_longest_pause_seconds|chat"] == [pytest.approx(60.0)]
    log = served.controller.take_log()
    assert [(entry.event, entry.reason) for entry in log[-2:]] == [
        (Event.READER_WAITED, Reason.POOL_SHORT),
        (Event.FINISHED, None),
    ]
    assert log[-1].facts["longest_pause_s"] == pytest.approx(60.0)


def test_the_time_between_the_last_token_and_an_end_of_the_engines_own_is_nobodys_wait() -> None:
    served = Served(STRICT)
    served.token(11.0, 11.5)
    served.leaves(13.0)
    assert served.counts()[2:] == (1, 0)


@pytest.mark.parametrize(
    ("end", "at_s", "not_fluid"),
    [(End.LEFT, 11.9, 0), (End.LEFT, 12.1, 1), (End.CUT_OFF, 12.1, 1), (End.REFUSED, 99.0, 0), (End.FINISHED, 99.0, 0)],
)
def test_who_got_no_token_is_counted_only_if_one_was_owed(end: End, at_s: float, not_fluid: int) -> None:
    served = Served()
    served.leaves(at_s, end)
    payload = served.reported()
    assert payload["counters"].get("layerkv_not_fluid_requests|chat", 0) == not_fluid
    assert payload["counters"].get("layerkv_fluid_requests|chat", 0) == 0
    assert payload["histograms"] == {}, "nobody had begun to read"


def test_a_stream_that_the_engine_ends_with_an_error_was_not_fluid() -> None:
    served = Served()
    served.token(11.0, 11.1)
    served.leaves(11.2, End.REFUSED)
    assert served.counts()[2:] == (0, 1)


@pytest.mark.parametrize(
    ("times_s", "fluid"),
    [
        ((11.0, 14.0, 14.1, 14.2, 14.3, 14.4, 14.5, 14.5), 1),  # 500 ms on average, though 3 s once
        ((11.0, 14.0, 14.1, 14.2, 14.3, 14.4, 14.5, 14.6), 0),
        ((12.1, 12.2), 0),  # its first one was late
        ((11.0, *(16.1 + k / 10 for k in range(20))), 0),  # longer than max_stall between two
    ],
)
def test_without_a_reader_a_request_is_judged_by_its_objectives(times_s: tuple[float, ...], fluid: int) -> None:
    served = Served(WHOLE)
    served.token(*times_s)
    served.leaves(times_s[-1])
    payload = served.reported()
    assert payload["counters"]["layerkv_fluid_requests|whole"] == fluid
    assert payload["histograms"] == {}
    assert "lag_s" not in served.facts_at_end()


def test_a_request_of_a_read_class_whose_client_takes_it_whole_has_no_reader_either() -> None:
    served = Served(CHAT, has_reader=False)
    served.token(11.0, *(14.0 + k / 100 for k in range(20)))
    served.leaves(14.2)
    payload = served.reported()
    assert payload["counters"]["layerkv_fluid_requests|chat"] == 1, "its mean is kept"
    assert payload["histograms"] == {}
    assert served.told() == []


def test_who_waits_for_a_whole_answer_and_hangs_up_has_waited_for_its_next_token() -> None:
    for at_s, fluid in ((11.9, 1), (12.2, 0)):
        served = Served(WHOLE)
        served.token(11.0, 11.1)
        served.leaves(at_s, End.LEFT)
        assert served.counts()[2] == fluid


def test_without_a_tpot_only_the_first_token_can_be_late() -> None:
    served = Served(BATCH)
    served.token(12.1, 99.0)
    served.token(500.0, num_tokens=5)
    served.leaves(500.0)
    assert served.counts() == (6, 1, 0, 1)


# Reports --------------------------------------------------------------------------------------------------------------


def test_tokens_are_reported_many_at_a_time_and_all_of_them_by_the_end() -> None:
    served = Served()
    for k in range(REPORT_TOKENS - 1):
        served.token(11.0 + k / 100)
    assert not served.reported()["counters"], "a payload for every step would cost more than what it tells"
    served.token(14.0)
    assert served.counts()[0] == REPORT_TOKENS
    served.token(14.1)
    served.leaves(14.1)
    assert served.counts() == (1, 0, 1, 0)


def test_of_who_is_gone_nothing_is_counted() -> None:
    served = Served()
    served.leaves(10.5, End.LEFT)
    served.token(11.0)
    assert served.counts() == (0, 0, 0, 0)


# What is told ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [Reason.POOL_SHORT, Reason.MAKES_ROOM, Reason.FIRST_TOKEN_DONE])
def test_a_wait_is_told_with_what_the_request_was_parked_for(reason: Reason) -> None:
    served = Served()
    served.token(11.0)
    served.parks(11.1, reason)
    served.fetched(14.0)
    served.token(14.5)
    [told] = served.told()
    assert told == LogEntry(
        14.5, "a", Event.READER_WAITED, reason, {"wait_s": pytest.approx(3.0), "token": 1, "left": "parked"}
    )


def test_a_wait_for_kv_that_is_computed_again_is_told_so() -> None:
    served = Served()
    served.token(11.0)
    served.controller.recomputes("a", 161, 1, Reason.PREEMPTED, 11.1)
    served.controller.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=13.0)
    served.token(14.5)
    [told] = served.told()
    assert (told.reason, told.facts["left"]) == (Reason.PREEMPTED, "recomputes")


def test_a_park_that_the_buffer_covers_is_not_blamed_for_what_comes_later() -> None:
    served = Served()
    served.token(11.0, num_tokens=10)  # read until 16.0
    served.parks(11.1)
    served.fetched(12.0)
    served.token(12.5)
    served.token(20.0)
    [told] = served.told()
    assert (told.reason, told.facts["token"]) == (None, 11)
    assert "left" not in told.facts


def test_a_token_that_was_on_its_way_when_the_request_was_parked_ends_no_park() -> None:
    served = Served()
    served.token(11.0)
    served.parks(11.1)
    served.token(11.2)
    served.fetched(14.0)
    served.token(14.5)
    assert [told.reason for told in served.told()] == [Reason.POOL_SHORT]


def test_what_took_a_request_out_first_is_what_its_reader_waited_for() -> None:
    served = Served()
    served.token(11.0)
    served.parks(11.1)
    served.fetched(12.0)
    served.controller.recomputes("a", 161, 1, Reason.LOAD_FAILED, 12.1)
    served.controller.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=13.0)
    served.token(14.5, 17.0)
    assert [told.reason for told in served.told()] == [Reason.POOL_SHORT, None]


def test_slow_steps_make_few_entries() -> None:
    served = Served()
    for k in range(1000):
        served.token(11.0 + k * 0.7)  # each 200 ms after its reader wants it
    assert len(served.told()) == 1
    served.token(11.0 + 999 * 0.7 + 1.5)
    assert len(served.told()) == 1, "twice as long is news"


def test_short_waits_are_in_the_figures_only() -> None:
    served = Served()
    served.token(11.0, 11.55)
    assert served.told() == []
    served.leaves(11.55)
    assert served.facts_at_end()["lag_s"] == pytest.approx(0.05)
