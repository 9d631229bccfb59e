"""Sums over parked streams that flow, against adding up all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from layerkv.scheduler.flows import Flows

names = st.sampled_from("abcdef")
adding = st.tuples(
    st.just("add"), names, st.sampled_from((0.05, 0.1, 1.0)), st.integers(1, 50), st.integers(0, 40).map(float)
)
leaving = st.tuples(st.just("discard"), names)
looking = st.tuples(st.just("look"), st.integers(0, 5).map(float))


@given(st.lists(st.one_of(adding, adding, leaving, looking), max_size=60))
def test_the_sums_are_those_of_all_that_flow_at_every_moment(events: list[tuple]) -> None:  # type: ignore[type-arg]
    flows, now_s = Flows(), 0.0
    parked: dict[str, tuple[float, int, float]] = {}
    for kind, *facts in events:
        if kind == "add":
            name, tpot_s, num_blocks, until_s = facts
            flows.add(name, tpot_s, num_blocks, until_s)
            parked[name] = tpot_s, num_blocks, until_s
        elif kind == "discard":
            flows.discard(facts[0])
            parked.pop(facts[0], None)
        else:
            now_s += facts[0]
        expected: dict[float, int] = {}
        for tpot_s, num_blocks, until_s in parked.values():
            if until_s >= now_s:
                expected[tpot_s] = expected.get(tpot_s, 0) + num_blocks
        assert dict(flows.blocks(now_s)) == expected


def test_a_stream_that_is_parked_again_counts_once_and_until_its_new_end() -> None:
    flows = Flows()
    flows.add("a", 0.1, 10, until_s=5.0)
    flows.add("a", 0.1, 12, until_s=9.0)
    assert flows.blocks(6.0) == {0.1: 12}, "its first end says nothing any more"
    assert flows.blocks(9.0) == {0.1: 12}
    assert flows.blocks(9.1) == {}
