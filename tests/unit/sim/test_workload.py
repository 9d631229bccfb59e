import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.errors import ConfigError
from layerkv.sim.workload import (
    Arrivals,
    BrokenRow,
    ClassMix,
    FixedLength,
    GammaArrivals,
    Lengths,
    LognormalLength,
    PoissonArrivals,
    Trace,
    TraceArrivals,
    TraceRow,
    UniformArrivals,
    UniformLength,
    WorkloadSpec,
    make_workload,
    read_trace,
)

CHAT = ClassMix("chat", 3.0, UniformLength(100, 300), LognormalLength(100, 0.5, 400))
BATCH = ClassMix("batch", 1.0, FixedLength(2000), FixedLength(50))
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def mixed(num_requests: int = 4000, arrivals: Arrivals | None = None, **others: float) -> WorkloadSpec:
    return WorkloadSpec(num_requests, arrivals or PoissonArrivals(), (CHAT, BATCH), **others)  # type: ignore[arg-type]


def mooncake(*rows: tuple[object, ...]) -> str:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(names, row, strict=False))) + "\n" for row in rows)


def trace_file(folder: Path, text: str) -> Path:
    (folder / "trace").write_text(text)
    return folder / "trace"


def lengths(trace: Trace) -> tuple[tuple[float, int, int], ...]:
    return tuple(row[:3] for row in trace.requests)


def variation(arrivals: Arrivals) -> float:
    at = [request.arrival_s for request in make_workload(mixed(arrivals=arrivals), rate_per_s=5, seed=1)]
    gaps = [after - before for before, after in pairwise(at)]
    return statistics.stdev(gaps) / statistics.mean(gaps)


def test_equal_seeds_give_equal_requests_and_others_do_not() -> None:
    assert make_workload(mixed(), rate_per_s=2, seed=7) == make_workload(mixed(), rate_per_s=2, seed=7)
    assert make_workload(mixed(), rate_per_s=2, seed=7) != make_workload(mixed(), rate_per_s=2, seed=8)


def test_a_workload_is_the_same_on_every_machine_and_python() -> None:
    first = make_workload(mixed(2), rate_per_s=2, seed=0)[0]
    assert first == ("r0", pytest.approx(0.1768566351824887), 139, 116, 116, "chat", ())


@pytest.mark.parametrize("arrivals", [PoissonArrivals(), GammaArrivals(2.0), UniformArrivals()])
def test_rates_differ_in_nothing_but_arrivals_and_are_met(arrivals: Arrivals) -> None:
    slow = make_workload(mixed(arrivals=arrivals), rate_per_s=1, seed=3)
    fast = make_workload(mixed(arrivals=arrivals), rate_per_s=4, seed=3)
    assert [request._replace(arrival_s=0) for request in slow] == [request._replace(arrival_s=0) for request in fast]
    assert slow[-1].arrival_s == pytest.approx(4 * fast[-1].arrival_s)
    assert len(fast) / fast[-1].arrival_s == pytest.approx(4, rel=0.1)


def test_gamma_arrivals_come_in_bursts_and_uniform_ones_do_not() -> None:
    assert variation(UniformArrivals()) == pytest.approx(0, abs=1e-6)
    assert variation(PoissonArrivals()) == pytest.approx(1, rel=0.1)
    assert variation(GammaArrivals(1.0)) == pytest.approx(1, rel=0.1)
    assert variation(GammaArrivals(3.0)) == pytest.approx(3, rel=0.2)


def test_ids_are_unique_and_sort_by_arrival() -> None:
    requests = make_workload(mixed(1001), rate_per_s=2, seed=0)
    assert [request.request_id for request in requests] == sorted({request.request_id for request in requests})
    assert [request.arrival_s for request in requests] == sorted(request.arrival_s for request in requests)


def test_classes_come_in_proportion_to_their_shares_with_their_own_lengths() -> None:
    requests = make_workload(mixed(), rate_per_s=2, seed=0)
    chat = [request for request in requests if request.slo_class == "chat"]
    assert len(chat) / len(requests) == pytest.approx(0.75, abs=0.03)
    assert {(request.prompt_tokens, request.output_tokens) for request in requests if request not in chat} == {
        (2000, 50)
    }
    assert min(request.prompt_tokens for request in chat) == 100
    assert max(request.prompt_tokens for request in chat) == 300
    assert statistics.median(request.output_tokens for request in chat) == pytest.approx(100, rel=0.05)
    assert max(request.output_tokens for request in chat) <= 400


@given(
    lengths=st.one_of(
        st.builds(FixedLength, st.integers(1, 10**6)),
        st.integers(1, 1000).flatmap(lambda least: st.builds(UniformLength, st.just(least), st.integers(least, 2000))),
        st.builds(LognormalLength, st.floats(1, 1000), st.floats(0.01, 10), st.integers(1000, 2000)),
    ),
    seed=st.integers(0, 2**64),
)
def test_no_length_is_below_one_or_above_the_most(lengths: Lengths, seed: int) -> None:
    spec = WorkloadSpec(20, UniformArrivals(), (ClassMix(None, 1.0, lengths, lengths),))
    for request in make_workload(spec, rate_per_s=1, seed=seed):
        assert 1 <= request.prompt_tokens <= lengths.most
        assert 1 <= request.output_tokens <= lengths.most


def test_clients_ask_for_the_factor_times_what_they_get_up_to_the_models_length() -> None:
    for request in make_workload(mixed(100, max_tokens_factor=1.1), rate_per_s=1, seed=0):
        assert request.max_tokens == -(-request.output_tokens * 11 // 10)
    for request in make_workload(mixed(100), rate_per_s=1, seed=0):
        assert request.max_tokens == request.output_tokens
    limited = make_workload(mixed(100, max_tokens_factor=9.0, max_model_len=2060), rate_per_s=1, seed=0)
    assert {request.max_tokens for request in limited if request.slo_class == "batch"} == {60}


def test_a_trace_gives_arrivals_and_lengths_and_is_squeezed_to_the_rate() -> None:
    trace = Trace("made", (TraceRow(0, 10, 5), TraceRow(3, 20, 6), TraceRow(6, 30, 7)))
    spec = WorkloadSpec(9, TraceArrivals(trace), (ClassMix("chat"),))
    assert trace.rate_per_s == 0.5
    recorded = make_workload(spec, rate_per_s=trace.rate_per_s, seed=0)
    assert [request[1:6] for request in recorded] == [
        (0, 10, 5, 5, "chat"),
        (3, 20, 6, 6, "chat"),
        (6, 30, 7, 7, "chat"),
    ]
    assert [request.arrival_s for request in make_workload(spec, rate_per_s=1.5, seed=0)] == [0, 1, 2]


def test_each_seed_replays_other_rows_of_a_trace_and_at_the_rate() -> None:
    arrivals_s = [0, 1, 2, 3, 100, 200, 300, 400, 401, 402]
    trace = Trace("made", tuple(TraceRow(at_s, 10 + at_s, 5) for at_s in arrivals_s))
    spec = WorkloadSpec(4, TraceArrivals(trace), (ClassMix("chat"),))
    loads = [make_workload(spec, rate_per_s=2.0, seed=seed) for seed in range(3)]
    assert [[request.prompt_tokens - 10 for request in load] for load in loads] == [
        arrivals_s[0:4],
        arrivals_s[4:8],
        arrivals_s[1:5],
    ]
    for load in loads:
        assert load[0].arrival_s == 0
        assert load[-1].arrival_s == pytest.approx(4 / 2.0)
    recorded = make_workload(spec, rate_per_s=trace.rate_per_s, seed=1)
    assert [request.arrival_s for request in recorded] == [0, 100, 200, 300]


def test_a_class_may_draw_lengths_of_its_own_at_the_arrivals_of_a_trace() -> None:
    trace = Trace("made", (TraceRow(0, 10, 5), TraceRow(3, 90, 6)))
    spec = WorkloadSpec(2, TraceArrivals(trace), (ClassMix(output_tokens=FixedLength(50)),), max_model_len=90)
    # The second prompt fills the model's length: vLLM would refuse it.
    assert [request[2:6] for request in make_workload(spec, rate_per_s=1, seed=0)] == [(10, 50, 50, None)]


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        (mooncake((1000, 10, 5), (3500, 20, 6)), "Mooncake JSONL"),
        (f"{VIDUR}1.0,10,5\n3.5,20,6\n", "Azure CSV of Vidur"),
        (f"\ufeff{VIDUR}1.0,10,5\r\n\r\n3.5,20,6".replace("\n", "\r\n"), "Azure CSV of Vidur"),
        (f"{AZURE}2023-11-16 18:15:46.6805900,10,5\n2023-11-16 18:15:49.1805900,20,6\n", "Azure CSV"),
        (f"{AZURE}2024-05-10 23:59:59+00:00,10,5\n2024-05-11 00:00:01.5+00:00,20,6\n", "Azure CSV"),
        (f"{BURST}45,ChatGPT,10,5,15,Conversation log\n47.5,GPT-4,20,6,26,API log\n", "BurstGPT CSV"),
    ],
)
def test_every_layout_is_told_by_its_first_line(tmp_path: Path, text: str, layout: str) -> None:
    trace = read_trace(trace_file(tmp_path, text))
    assert trace == Trace(layout, (TraceRow(0.0, 10, 5), TraceRow(pytest.approx(2.5, abs=1e-5), 20, 6)))


def test_rows_out_of_order_are_sorted_and_equal_times_keep_their_order(tmp_path: Path) -> None:
    trace = read_trace(trace_file(tmp_path, f"{VIDUR}5,9,1\n5,8,1\n2,7,1\n"))
    assert lengths(trace) == ((0, 7, 1), (3, 9, 1), (3, 8, 1))


def test_time_is_scaled_and_reading_ends_at_the_limit(tmp_path: Path) -> None:
    path = trace_file(tmp_path, f"{VIDUR}0,10,5\n3,20,6\n6,30,7\nnonsense\n")
    trace = read_trace(path, time_scale=2.0, limit=2)
    assert lengths(trace) == ((0, 10, 5), (6, 20, 6))
    assert not trace.broken


def test_requests_that_failed_or_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    text = (
        f"{BURST}0,GPT-4,10,0,10,API log\n1,GPT-4,10,5,15,API log\n2,GPT-4,90,5,95,API log\n3,GPT-4,50,45,95,API log\n"
    )
    path = trace_file(tmp_path, text)
    trace = read_trace(path, max_prompt_tokens=60)
    assert (len(trace.requests), trace.num_failed, trace.num_too_long, trace.broken) == (2, 1, 1, ())
    trace = read_trace(path, max_total_tokens=94)
    assert (len(trace.requests), trace.num_failed, trace.num_too_long) == (1, 1, 2)


def test_broken_rows_are_named_by_line_and_the_rest_is_read(tmp_path: Path) -> None:
    rows = ["0,10,5", "x,10,5", "1,ten,5", "2,10", "nan,10,5", "3,-1,5", "4,10,2.5", "", '5,"10,5', "6,20,6"]
    trace = read_trace(trace_file(tmp_path, VIDUR + "\n".join(rows)))
    assert lengths(trace) == ((0, 10, 5), (6, 20, 6))
    assert [row.line for row in trace.broken] == [3, 4, 5, 6, 7, 8, 10]
    assert trace.broken[1] == BrokenRow(4, "found 'ten' as num_prefill_tokens; expected a whole number, 1 or more")
    assert trace.broken[2] == BrokenRow(5, "found 2 cells; expected 3")


def test_broken_json_is_named_by_line_and_the_rest_is_read(tmp_path: Path) -> None:
    text = (
        mooncake((0, 10, 5), (None, 10, 5), (1, True, 5), (2, 1e999, 5))
        + '[1]\n{"timestamp"\n'
        + "[" * 100_000
        + "\n{}\n"
    )
    trace = read_trace(trace_file(tmp_path, text))
    assert len(trace.requests) == 1
    assert [row.line for row in trace.broken] == [2, 3, 4, 5, 6, 7, 8]
    assert trace.broken[0].reason == "found None (NoneType) as its time; expected a number"


def test_a_date_that_is_none_breaks_its_row_only(tmp_path: Path) -> None:
    trace = read_trace(trace_file(tmp_path, f"{AZURE}2023-11-16 18:15:46,10,5\nyesterday,20,6\n"))
    assert (len(trace.requests), trace.broken[0].line) == (1, 3)


def test_a_byte_that_is_no_text_breaks_its_row_only(tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(VIDUR.encode() + b"0,10,5\n\xff,10,5\n")
    trace = read_trace(tmp_path / "trace")
    assert (len(trace.requests), [row.line for row in trace.broken]) == (1, [3])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "found '' in its first line; expected JSON (Mooncake) or one of the headers arrived_at,.."),
        ("time,length\n1,2\n", "found 'time,length' in its first line"),
        (VIDUR, "found no good row (0 broken, 0 failed, 0 too long); expected at least one"),
        (f"{VIDUR}x,1,1\n", "found no good row (1 broken, 0 failed, 0 too long); line 2: found 'x' as its time"),
        (f"{VIDUR}0,1,0\n", "found no good row (0 broken, 1 failed, 0 too long)"),
    ],
)
def test_a_file_without_a_good_row_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = trace_file(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}: {complaint}")
    assert "; set path to " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: found no readable file \(No such file or directory\)"):
        read_trace(tmp_path / "nowhere")


# What prompts have in common ------------------------------------------------------------------------------------------

CONVERSATION = mooncake((0, 1400, 5, [7, 8, 9]), (1000, 1024, 5, [7, 8]), (2000, 2000, 5, [7, 8, 10, 11]))


def blocks_of(folder: Path, text: str, **more: float) -> list[tuple[tuple[int, int], ...]]:
    trace = read_trace(trace_file(folder, text), **more)  # type: ignore[arg-type]
    assert not trace.broken
    load = make_workload(WorkloadSpec(len(trace.requests), TraceArrivals(trace)), rate_per_s=1, seed=0)
    assert all(sum(block.num_tokens for block in request.blocks) <= request.prompt_tokens for request in load)
    return [request.blocks for request in load]


def test_a_mooncake_trace_says_what_its_prompts_have_in_common(tmp_path: Path) -> None:
    assert blocks_of(tmp_path, CONVERSATION) == [
        ((7, 512), (8, 512), (9, 376)),
        ((7, 512), (8, 512)),
        ((7, 512), (8, 512), (10, 512), (11, 464)),
    ]


@pytest.mark.parametrize("token_scale", [0.1, 0.037, 0.0015, 3.0])
def test_blocks_are_scaled_with_prompts_and_begin_where_they_did_in_every_prompt(
    tmp_path: Path, token_scale: float
) -> None:
    for (blocks, _), ids in zip(
        zip(blocks_of(tmp_path, CONVERSATION, token_scale=token_scale), range(3), strict=True),
        ([7, 8, 9], [7, 8], [7, 8, 10, 11]),
        strict=True,
    ):
        starts = {hash_id: sum(length for _, length in blocks[:i]) for i, (hash_id, _) in enumerate(blocks)}
        assert [hash_id for hash_id, _ in blocks] == [hash_id for hash_id in ids if hash_id in starts]
        for hash_id, start in starts.items():
            assert start == round(ids.index(hash_id) * 512 * token_scale)


def test_a_last_block_that_is_not_whole_may_have_no_id_and_is_the_prompts_own(tmp_path: Path) -> None:
    assert blocks_of(tmp_path, mooncake((0, 600, 5, [7]), (1, 511, 5, []), (2, 600, 5))) == [((7, 512),), (), ()]


@pytest.mark.parametrize(
    ("hash_ids", "reason"),
    [
        ("7", "found '7' as hash_ids; expected a list of whole numbers, 0 or more"),
        ([7, None], "found [7, None] (list) as hash_ids; expected a list of whole numbers, 0 or more"),
        ([True, 7], "found [True, 7] (list) as hash_ids; expected a list of whole numbers, 0 or more"),
        ([7, -1], "found [7, -1] (list) as hash_ids; expected a list of whole numbers, 0 or more"),
        ([7, 8, 9], "found 3 hash_ids for 600 tokens; expected 2, one for each 512"),
        ([], "found 0 hash_ids for 600 tokens; expected 2, one for each 512"),
    ],
)
def test_hash_ids_that_are_none_break_their_row_only(tmp_path: Path, hash_ids: object, reason: str) -> None:
    trace = read_trace(trace_file(tmp_path, mooncake((0, 10, 5, [1]), (1, 600, 5, hash_ids))))
    assert len(trace.requests) == 1
    assert [(row.line, row.reason) for row in trace.broken] == [(2, reason)]


def test_a_class_with_prompts_of_its_own_has_nothing_of_the_trace_in_common(tmp_path: Path) -> None:
    trace = read_trace(trace_file(tmp_path, CONVERSATION))
    spec = WorkloadSpec(3, TraceArrivals(trace), (ClassMix(prompt_tokens=FixedLength(2000)),))
    assert [request.blocks for request in make_workload(spec, rate_per_s=1, seed=0)] == [()] * 3


def test_the_share_that_repeats_is_what_an_earlier_prompt_began_with(tmp_path: Path) -> None:
    trace = read_trace(trace_file(tmp_path, CONVERSATION + mooncake((3000, 1024, 5, [12, 8]))))
    assert trace.repeated_share == pytest.approx(4 * 512 / (1400 + 1024 + 2000 + 1024))
    assert read_trace(trace_file(tmp_path, f"{VIDUR}0,10,5\n")).repeated_share is None
