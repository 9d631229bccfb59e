from itertools import pairwise

from layerkv.bench.timeline import phases
from tests.unit.bench.made_records import request


def told(found: list) -> list[tuple[str, float, float]]:
    return [(phase.kind.value, phase.start_s, phase.end_s) for phase in found]


def test_a_request_that_never_stops_is_queued_then_prefills_then_decodes() -> None:
    plain = request(0, 1.0, 2.0, [3.0, 4.0, 5.0])
    assert told(phases(plain, 9.0)) == [("queued", 1, 2), ("prefill", 2, 3), ("decoding", 3, 5)]


def test_parking_lasts_until_the_first_token_after_the_fetch() -> None:
    states = [(1.0, "layered"), (2.5, "parked"), (6.0, "fetching"), (7.0, "resident"), (9.0, "gone")]
    parked = request(0, 1.0, 1.0, [2.0, 8.0, 9.0], states)
    assert told(phases(parked, 9.0)) == [
        ("prefill", 1, 2),
        ("decoding", 2, 2.5),
        ("parked", 2.5, 8),
        ("decoding", 8, 9),
    ]


def test_a_token_under_way_when_its_request_is_parked_begins_the_parking() -> None:
    parked = request(0, 0.0, 0.0, [2.0, 8.0], [(1.5, "parked"), (7.0, "resident")])
    assert told(phases(parked, 9.0)) == [("prefill", 0, 2), ("parked", 2, 8)]


def test_a_preemption_during_prefill_ends_when_the_request_runs_again() -> None:
    preempted = request(0, 0.0, 1.0, [6.0, 7.0], [(1.0, "resident"), (2.0, "preempted"), (4.0, "resident")])
    assert told(phases(preempted, 9.0)) == [
        ("queued", 0, 1),
        ("prefill", 1, 2),
        ("preempted", 2, 4),
        ("prefill", 4, 6),
        ("decoding", 6, 7),
    ]


def test_phases_never_overlap_when_a_request_stops_again_before_its_next_token() -> None:
    moves = [(3.0, "preempted"), (4.0, "resident"), (5.0, "preempted"), (6.0, "resident")]
    found = phases(request(0, 0.0, 0.0, [1.0, 2.0, 8.0, 9.0], moves), 9.0)
    assert told(found)[-2:] == [("preempted", 3, 8), ("decoding", 8, 9)]
    assert all(one.end_s == other.start_s for one, other in pairwise(found))


def test_a_request_that_was_never_scheduled_is_queued_to_the_end_of_the_run() -> None:
    assert told(phases(request(0, 1.0, None, [], [(1.0, "waiting")]), 9.0)) == [("queued", 1, 9)]


def test_of_a_request_whose_engine_tells_nothing_only_the_wait_is_known() -> None:
    assert told(phases(request(0, 1.0, None, []), 9.0)) == [("waiting", 1, 9)]


def test_a_request_that_stopped_for_good_is_shown_so_up_to_its_last_token() -> None:
    stopped = request(0, 0.0, 0.0, [1.0, 2.0, 4.0], [(3.0, "parked")])
    assert told(phases(stopped, 9.0))[-1] == ("parked", 3, 4)
