"""What a load that fails makes wrong, and who held that."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from layerkv.core.suspects import StepsInFlight, Table, follow

TABLES = st.lists(st.lists(st.integers(0, 12), unique=True, max_size=6), max_size=6)


def test_what_follows_a_wrong_block_is_wrong_and_so_is_who_shares_it() -> None:
    tables = [Table("shares what it computed", [20, 12, 30]), Table("loads", [10, 11, 12]), Table("other", [10, 20])]
    assert follow([11], tables) == ({11, 12, 30}, ["shares what it computed", "loads"])


def test_an_earlier_block_that_turns_out_wrong_later_makes_the_ones_between_wrong() -> None:
    tables = [Table("first", [1, 2, 3]), Table("second", [9, 1]), Table("third", [2, 8])]
    assert follow([3, 9], tables) == ({9, 1, 2, 3, 8}, ["first", "second", "third"])


@given(st.sets(st.integers(0, 12), min_size=1), TABLES)
def test_every_table_is_right_up_to_its_first_wrong_block_and_wrong_from_there(
    wrong: set[int], ids: list[list[int]]
) -> None:
    tables = [Table(str(index), block_ids) for index, block_ids in enumerate(ids)]
    blocks, held = follow(wrong, tables)
    assert wrong <= blocks <= wrong.union(*ids)
    for table in tables:
        is_wrong = [block in blocks for block in table.block_ids]
        assert is_wrong == sorted(is_wrong)
        assert (table.request_id in held) == any(is_wrong)


def test_what_was_given_up_is_known_until_the_steps_that_may_have_used_it_are_processed() -> None:
    steps = StepsInFlight()
    steps.scheduled(loads_prefixes=True)
    steps.left("a", [1, 2])
    steps.scheduled(loads_prefixes=False)
    steps.left("b", [3])
    assert steps.are_loading
    assert steps.tables_left() == [("a", [1, 2]), ("b", [3])]
    steps.processed()
    assert not steps.are_loading
    assert steps.tables_left() == [("b", [3])]
    steps.processed()
    assert steps.tables_left() == []
