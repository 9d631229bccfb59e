"""Tokens delivered over time beside the line on which they were due."""

from collections.abc import Mapping

import msgspec
import pytest

from layerkv.bench.records import LoadRun, RequestRecord
from layerkv.bench.suite.charts import Plot
from layerkv.bench.suite.stream_charts import MAX_STEPS, Stream, streams
from layerkv.config import SloClass, SloPolicy
from tests.unit.bench.suite import made_results as made

POLICY = SloPolicy(
    classes={
        "chat": SloClass(name="chat", ttft_s=1.0, tpot_s=0.1),
        "whole": SloClass(name="whole", ttft_s=1.0, tpot_s=0.1, stream=False),
    },
    default_class="chat",
)


def request(number: int, times_s: list[float], arrival_s: float = 2.0, **more: object) -> RequestRecord:
    times_s = [arrival_s + time_s for time_s in times_s]
    fields = {"prompt_tokens": 8, "output_tokens": len(times_s), "token_times_s": times_s}
    return RequestRecord(request_id=f"r{number}", arrival_s=arrival_s, **{**fields, **more})


def runs(**by_engine: list[RequestRecord]) -> dict[str, LoadRun]:
    run = made.load_run("stock", 4.0, 0, 1)
    return {name: msgspec.structs.replace(run, engine=name, requests=of) for name, of in by_engine.items()}


def drawn(of: Mapping[str, LoadRun]) -> list[Stream]:
    return streams(of, POLICY)


def line(plot: Plot, gid: str) -> list[tuple[float, float]]:
    (found,) = [line for line in plot.axes.get_lines() if line.get_gid() == gid]
    return [(float(x), float(y)) for x, y in zip(found.get_xdata(), found.get_ydata(), strict=True)]


def test_the_latest_and_the_median_request_are_chosen_and_drawn_for_every_engine() -> None:
    late = {number: [0.5, 0.6, 0.7 + number] for number in range(5)}
    prompt = [request(number, [0.5, 0.6, 0.7]) for number in range(5)]
    ours = [request(number, times_s) for number, times_s in late.items()]
    found = drawn(runs(stock=ours, layerkv=prompt[:3] + ours[3:4] + prompt[4:], oracle=prompt))
    assert [stream.title for stream in found] == [
        "Request 4: the latest with layerkv",
        "Request 3: the median with layerkv",
        "Request 5: the latest with stock vLLM",
    ]
    assert [[plot.engine for plot in stream.plots] for stream in found] == [["stock", "layerkv", "oracle"]] * 3
    names = [plot.name for stream in found for plot in stream.plots]
    assert len(set(names)) == len(names)


def test_the_due_line_begins_with_ttft_and_rises_by_a_token_each_tpot() -> None:
    ((plot,),) = [stream.plots for stream in drawn(runs(layerkv=[request(0, [0.5, 0.6, 2.0])]))]
    assert line(plot, "due") == [(1.0, 0.0), (1.0, 1.0), (pytest.approx(1.2), 3.0)]
    assert line(plot, "layerkv|") == [(0.5, 0), (0.5, 1), (pytest.approx(0.6), 2), (pytest.approx(2.0), 3)]


def test_a_pause_is_shaded_from_when_the_reader_has_read_all_and_said() -> None:
    ((plot,),) = [stream.plots for stream in drawn(runs(layerkv=[request(0, [0.5, 0.5, 2.0])]))]
    (pause,) = plot.axes.patches
    assert (pause.get_x(), pause.get_width()) == (pytest.approx(0.7), pytest.approx(1.3))
    assert str(pause.get_gid()) == "|its reader waited 1.30 s for token 3"
    assert plot.note == (
        "first token after 500 ms; its reader waited 1.30 s in all, 1.30 s at most at once; 1 of 3 tokens late"
    )


def test_a_request_that_failed_or_was_answered_by_some_engines_only_or_that_nobody_reads_is_not_drawn() -> None:
    answered = [request(number, [0.5, 0.6]) for number in range(3)]
    broken = [request(0, [0.5], error="gone"), request(1, []), request(2, [0.5, 0.6])]
    found = drawn(runs(stock=answered, layerkv=broken))
    assert [stream.title.partition(":")[0] for stream in found] == ["Request 3"]
    assert drawn(runs(layerkv=[request(0, [0.5], slo_class="whole")])) == []
    assert drawn({}) == []


def test_a_long_answer_keeps_few_corners_and_both_ends_of_its_pauses() -> None:
    times_s = [0.5 + 0.01 * k for k in range(700)] + [60 + 0.01 * k for k in range(700)]
    ((plot,),) = [stream.plots for stream in drawn(runs(layerkv=[request(0, times_s, arrival_s=0.0)]))]
    corners = line(plot, "layerkv|")
    assert len(corners) <= MAX_STEPS + 5
    assert {(times_s[699], 700), (60.0, 701), (times_s[-1], 1400)} <= set(corners)
