"""Host blocks: taken by requests, cached as prefixes, never both and never lost."""

from collections.abc import Hashable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from layerkv.core.host_tier import HostTier
from layerkv.core.segments import SegmentLayout
from layerkv.errors import CapacityError


def test_cached_blocks_count_as_free_and_give_way() -> None:
    tier = HostTier(4)
    blocks = tier.take(3)
    tier.keep(blocks, ["a", "b", "c"])
    assert (tier.num_free, tier.num_cached, tier.num_held) == (1, 3, 0)
    tier.unpin()
    assert (tier.num_free, tier.num_cached, tier.num_held) == (4, 3, 0)
    assert len(tier.take(4)) == 4
    assert tier.num_cached == 0
    assert tier.find(["a"]) == []


def test_the_beginning_of_a_prefix_gives_way_last() -> None:
    tier = HostTier(3)
    tier.keep(tier.take(3), ["a", "b", "c"])
    tier.unpin()
    tier.take(1)
    assert len(tier.find(["a", "b", "c"])) == 2
    tier.take(1)
    assert len(tier.find(["a", "b", "c"])) == 1


def test_what_was_used_last_gives_way_last() -> None:
    tier = HostTier(2)
    tier.keep(tier.take(1), ["a"])
    tier.keep(tier.take(1), ["b"])
    tier.unpin()
    tier.pin(tier.find(["a"]))
    tier.unpin()
    tier.take(1)
    assert tier.find(["a"])
    assert not tier.find(["b"])


def test_a_prefix_is_found_as_far_as_it_goes_without_a_gap() -> None:
    tier = HostTier(4)
    blocks = tier.take(3)
    tier.keep(blocks, ["a", "b", "d"])
    assert tier.find(["a", "b", "c", "d"]) == blocks[:2]


def test_a_second_copy_of_a_prefix_is_not_kept() -> None:
    tier = HostTier(4)
    tier.keep(tier.take(1), ["a"])
    tier.keep(tier.take(1), ["a"])
    assert (tier.num_cached, tier.num_held) == (1, 0)


def test_a_pinned_block_gives_way_to_nobody() -> None:
    tier = HostTier(2)
    tier.keep(tier.take(2), ["a", "b"])
    tier.unpin()
    tier.pin(tier.find(["a"]))
    assert tier.num_free == 1
    with pytest.raises(CapacityError, match="2 blocks wanted, 1 free"):
        tier.take(2)
    tier.unpin()
    assert len(tier.take(2)) == 2


def test_what_is_forgotten_while_a_plan_may_write_it_is_not_found_and_not_taken_before_the_plan_is_made() -> None:
    tier = HostTier(2)
    tier.keep(tier.take(2), ["a", "b"])
    tier.forget_all()
    assert tier.find(["a"]) == []
    assert (tier.num_free, tier.num_cached, tier.num_held) == (0, 0, 0)
    tier.check()
    tier.unpin()
    assert tier.find(["a"]) == []
    assert len(tier.take(2)) == 2


def test_what_comes_and_goes_between_two_looks_is_no_news() -> None:
    tier = HostTier(2)
    news = tier.listen()
    tier.keep(tier.take(2), ["a", "b"])
    tier.unpin()
    tier.take(1)
    assert news.take() == ([], ["a"])
    tier.take(1)
    assert news.take() == (["a"], [])
    assert news.take() == ([], [])


def test_who_begins_to_listen_late_is_told_what_is_cached_already() -> None:
    tier = HostTier(2)
    tier.keep(tier.take(2), ["a", "b"])
    assert tier.listen().take() == ([], ["a", "b"])


def test_news_that_nobody_takes_stay_few() -> None:
    tier = HostTier(4)
    news = tier.listen()
    for i in range(100):
        tier.keep(tier.take(4), [f"{i}.{j}" for j in range(4)])
        tier.unpin()
        if i == 50:
            news.take()
    gone, new = news.take()
    assert (len(gone), len(new)) == (4, 4)


def test_a_shared_block_gives_way_to_nobody_and_is_found_all_the_while() -> None:
    tier = HostTier(3)
    blocks = tier.take(2)
    tier.keep(blocks, ["a", "b"])
    tier.unpin()
    assert tier.num_that_count_as_free(blocks) == 2
    tier.share(blocks)
    tier.share(blocks[:1])
    assert tier.num_that_count_as_free(blocks) == 0
    assert (tier.num_free, tier.num_cached, tier.num_held) == (1, 2, 2)
    assert tier.find(["a", "b"]) == blocks
    tier.give_back(blocks)
    assert [tier.num_sharers(block) for block in blocks] == [1, 0]
    tier.unpin()
    assert tier.num_free == 2
    tier.take(2)
    assert tier.find(["a", "b"]) == blocks[:1]


def test_what_is_forgotten_while_it_is_shared_stays_with_its_sharers_and_is_not_kept_again() -> None:
    tier = HostTier(2)
    blocks = tier.take(2)
    tier.keep(blocks, ["a", "b"])
    tier.share(blocks)
    tier.share(blocks)
    tier.forget_all()
    assert tier.find(["a"]) == []
    assert (tier.num_free, tier.num_cached, tier.num_held) == (0, 0, 2)
    tier.keep(blocks, ["a", "b"])
    assert (tier.find(["a"]), tier.num_held) == ([], 2)
    tier.give_back(blocks)
    assert (tier.num_free, tier.num_held) == (0, 0), "the plan that is being made may read it"
    tier.check()
    tier.unpin()
    assert tier.num_free == 2


def test_who_shares_a_block_and_leaves_its_copy_as_a_prefix_leaves_one_of_it() -> None:
    tier = HostTier(3)
    tier.keep(shared := tier.take(1), ["a"])
    tier.share(shared)
    own = tier.take(1)
    tier.keep([*shared, *own], ["a", "b"])
    assert (tier.num_cached, tier.num_held) == (2, 0)
    assert tier.find(["a", "b"]) == [*shared, *own]
    tier.check()


LAYOUT = SegmentLayout(segment_blocks=3, num_segments=4)


def test_of_a_segment_out_of_service_nothing_is_handed_out_or_found() -> None:
    tier = HostTier(12, LAYOUT)
    tier.keep(tier.take(4), ["a", "b", "c", "d"])
    tier.unpin()
    tier.withhold(0)
    assert (tier.num_in_service, tier.num_free, tier.num_cached, tier.num_loose) == (9, 9, 1, 8)
    assert tier.find(["a"]) == []
    assert tier.known(["d"]) == [3]
    assert tier.is_empty(0)
    assert sorted(tier.take(9)) == list(range(3, 12))
    with pytest.raises(CapacityError):
        tier.take(1)
    tier.restore(0)
    assert sorted(tier.take(3)) == [0, 1, 2]


def test_what_requests_hold_of_it_stays_theirs_and_is_nobodys_afterwards() -> None:
    tier = HostTier(12, LAYOUT)
    mine = tier.take(5)
    tier.withhold(0)
    tier.withhold(1)
    assert (tier.num_held, tier.num_free) == (5, 6)
    tier.give_back(mine[:4])
    tier.check()
    assert (tier.is_empty(0), tier.is_empty(1)) == (True, False)
    with pytest.raises(ValueError, match="block 3 is given back twice"):
        tier.give_back([3])
    tier.keep(mine[4:], ["a"])
    assert tier.find(["a"]) == [], "new requests would begin with it, and it would never be empty"
    assert tier.is_empty(1)
    assert (tier.num_held, tier.num_free) == (0, 6)


def test_what_a_plan_may_still_write_keeps_its_segment_until_the_plan_is_made() -> None:
    tier = HostTier(12, LAYOUT)
    tier.keep(tier.take(1), ["a"])
    tier.withhold(0)
    assert not tier.is_empty(0)
    assert tier.num_held == 0
    tier.check()
    tier.unpin()
    assert tier.is_empty(0)


def test_a_shared_block_keeps_its_segment_until_the_last_sharer_has_left_and_nobody_new_finds_it() -> None:
    tier = HostTier(12, LAYOUT)
    blocks = tier.take(1)
    tier.keep(blocks, ["a"])
    tier.share(blocks)
    tier.withhold(0)
    assert tier.find(["a"]) == []
    tier.give_back(blocks)
    tier.unpin()
    assert tier.is_empty(0)


def test_segments_are_told_apart_by_what_they_cache() -> None:
    tier = HostTier(12, LAYOUT)
    for i in range(9):
        tier.keep(tier.take(1), [f"h{i}"])
        tier.unpin()
    tier.pin(tier.find(["h1"]))
    tier.unpin()
    newest = tier.newest_in()
    assert sorted(newest, key=newest.__getitem__) == [1, 2, 0]


class AnyUse(RuleBasedStateMachine):
    """Requests take and leave, prefixes are kept, found, read and forgotten, and somebody listens; segments come and
    go."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(12, LAYOUT)
        self.withheld: set[int] = set()
        self.held: list[list[int]] = []
        self.shared: list[list[int]] = []
        self.content: dict[int, str] = {}
        self.news = self.tier.listen()
        self.heard: set[Hashable] = set()

    @rule(num_blocks=st.integers(0, 8))
    def take(self, num_blocks: int) -> None:
        free = self.tier.num_free
        if num_blocks > free:
            with pytest.raises(CapacityError):
                self.tier.take(num_blocks)
            assert self.tier.num_free == free
            return
        blocks = self.tier.take(num_blocks)
        assert len(set(blocks)) == num_blocks
        assert not {block for mine in (*self.held, *self.shared) for block in mine} & set(blocks)
        assert not any(map(self.is_withheld, blocks))
        for block in blocks:
            self.content.pop(block, None)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.tier.give_back(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(prefix=st.sampled_from("pq"), num_hashes=st.integers(1, 9))
    def share(self, prefix: str, num_hashes: int) -> None:
        found = self.tier.find([f"{prefix}{i}" for i in range(num_hashes)])
        assert not any(map(self.is_withheld, found))
        free, counted = self.tier.num_free, self.tier.num_that_count_as_free(found)
        self.tier.share(found)
        assert self.tier.num_free == free - counted
        self.shared.append(found)

    @precondition(lambda self: self.shared)
    @rule(data=st.data(), keeps=st.booleans())
    def end_share(self, data: st.DataObject, keeps: bool) -> None:
        blocks = self.shared.pop(data.draw(st.integers(0, len(self.shared) - 1)))
        if keeps:
            self.tier.keep(blocks, [self.content[block] for block in blocks])
        else:
            self.tier.give_back(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), prefix=st.sampled_from("pq"))
    def keep(self, data: st.DataObject, prefix: str) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        hashes = [f"{prefix}{i}" for i in range(len(blocks))]
        new = [
            known is None and not self.is_withheld(block)
            for block, known in zip(blocks, self.tier.known(hashes), strict=True)
        ]
        self.tier.keep(blocks, hashes)
        self.content |= {b: h for b, h, is_new in zip(blocks, hashes, new, strict=True) if is_new}

    @rule(prefix=st.sampled_from("pq"), num_hashes=st.integers(0, 9), pins=st.booleans())
    def find(self, prefix: str, num_hashes: int, pins: bool) -> None:
        hashes = [f"{prefix}{i}" for i in range(num_hashes)]
        found = self.tier.find(hashes)
        assert [self.content[block] for block in found] == hashes[: len(found)]
        if pins:
            self.tier.pin(found)

    @rule(segment=st.integers(0, 3))
    def move_a_segment(self, segment: int) -> None:
        if segment in self.withheld:
            self.tier.restore(segment)
        else:
            self.tier.withhold(segment)
        self.withheld ^= {segment}

    def is_withheld(self, block: int) -> bool:
        return LAYOUT.segment_of(block) in self.withheld

    @rule()
    def unpin(self) -> None:
        self.tier.unpin()

    @rule()
    def forget_all(self) -> None:
        self.tier.forget_all()

    @rule(loses_all=st.booleans())
    def hear(self, loses_all: bool) -> None:
        """Who listens knows exactly what is cached, even after it has dropped everything, if it is told again."""
        if loses_all:
            self.heard.clear()
            self.tier.tell_again()
        gone, new = self.news.take()
        if not loses_all:
            assert self.heard >= set(gone), "it is told only of the end of what it was told of"
        self.heard = (self.heard - set(gone)) | set(new)
        cached = {block_hash for prefix in "pq" for block_hash in self._cached_of(prefix)}
        assert self.heard == cached
        assert len(cached) == self.tier.num_cached

    @rule()
    def tell_again(self) -> None:
        self.tier.tell_again()

    def _cached_of(self, prefix: str) -> list[str]:
        hashes = [f"{prefix}{i}" for i in range(8)]
        return [h for h, block in zip(hashes, self.tier.known(hashes), strict=True) if block is not None]

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        self.tier.check()
        shared = [block for blocks in self.shared for block in blocks]
        assert self.tier.num_held == sum(map(len, self.held)) + len(set(shared))
        assert all(self.tier.num_sharers(block) == shared.count(block) for block in range(12))
        assert self.tier.num_in_service == 12 - 3 * len(self.withheld)
        theirs = {block for mine in (*self.held, *self.shared) for block in mine}
        for segment in self.withheld:
            assert not (self.tier.is_empty(segment) and theirs.intersection(LAYOUT.blocks(segment)))


TestAnyUse = AnyUse.TestCase


def test_prefixes_that_were_just_kept_do_not_give_way_first():
    tier = HostTier(12, SegmentLayout(4, 3))
    blocks = tier.take(12)
    tier.keep(blocks[4:8], ["a", "b", "c", "d"])
    tier.unpin()
    tier.keep(blocks[8:12], ["e", "f", "g", "h"])  # of a request that has just ended: pinned until the next plan
    newest = tier.newest_in()
    assert newest[1] < newest[2]
