"""How much host memory an engine keeps and asks for, from numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from layerkv.scheduler.elastic import MOST_LEAVING
from layerkv.scheduler.elastic_host import HostResize, HostSegment, HostView, leavers, resize_host

BUSY = HostView(
    segment_blocks=10,
    ceiling=20,
    floor=3,
    limit=20,
    num_staying=3,
    num_held=3,
    kept_blocks=0,
    cached_blocks=0,
    wanted_blocks=0,
    is_idle=False,
)


def test_whoever_might_be_parked_needs_room_there() -> None:
    decided = resize_host(BUSY._replace(kept_blocks=25, wanted_blocks=31))
    assert decided.need == 6
    assert decided.target == decided.like == 7, "and a segment for prefixes to grow into"


def test_cached_prefixes_are_of_use_and_are_not_needed() -> None:
    decided = resize_host(BUSY._replace(kept_blocks=10, cached_blocks=90, num_staying=10, num_held=10))
    assert (decided.need, decided.like) == (1, 11)
    assert decided.target == 11
    assert decided.can_leave == 0, "of what is needed nothing can go"


def test_what_is_needed_and_not_in_use_can_leave_at_once() -> None:
    decided = resize_host(BUSY._replace(num_staying=8, num_held=8, kept_blocks=25, wanted_blocks=55))
    assert (decided.need, decided.can_leave) == (8, 5)


def test_a_need_that_falls_gives_nothing_back_and_a_limit_that_falls_does() -> None:
    full = BUSY._replace(num_staying=12, num_held=12)
    assert resize_host(full).target == 12
    assert resize_host(full._replace(limit=5)).target == 5
    assert resize_host(full._replace(limit=0)).target == 1


def test_nobody_divides_host_memory_so_all_of_it_is_in_service() -> None:
    for is_idle in (False, True):
        assert resize_host(BUSY._replace(limit=None, is_idle=is_idle)).target == 20


def test_an_engine_that_nobody_uses_keeps_prefixes_up_to_its_floor() -> None:
    idle = BUSY._replace(is_idle=True, num_staying=12, num_held=12, cached_blocks=75)
    assert resize_host(idle)[:3] == (3, 1, 3)
    assert resize_host(idle._replace(cached_blocks=11)).target == 2
    assert resize_host(idle._replace(cached_blocks=0)).target == 1
    assert resize_host(idle._replace(kept_blocks=45))[:2] == (5, 5), "sessions are parked there"


views = st.builds(
    HostView,
    segment_blocks=st.integers(1, 40),
    ceiling=st.integers(4, 30),
    floor=st.integers(1, 4),
    limit=st.none() | st.integers(0, 40),
    num_staying=st.integers(1, 4),
    num_held=st.integers(4, 4),
    kept_blocks=st.integers(0, 2000),
    cached_blocks=st.integers(0, 2000),
    wanted_blocks=st.integers(0, 2000),
    is_idle=st.booleans(),
)


@given(views)
def test_it_never_keeps_more_than_it_may_and_says_nothing_absurd(host: HostView) -> None:
    decided = resize_host(host)
    assert 1 <= decided.target <= host.ceiling
    if host.limit is not None:
        assert decided.target <= max(host.limit, 1)
    assert 1 <= decided.need <= decided.like <= host.ceiling
    assert 0 <= decided.can_leave < host.num_held


def test_the_segments_that_nobody_needs_leave_first_and_of_those_the_one_with_the_oldest_prefixes() -> None:
    segments = [
        HostSegment(1, num_kept=1, num_copied=0, newest=-1),
        HostSegment(2, num_kept=0, num_copied=3, newest=-1),
        HostSegment(3, num_kept=0, num_copied=0, newest=9),
        HostSegment(4, num_kept=0, num_copied=0, newest=4),
        HostSegment(5, num_kept=0, num_copied=0, newest=-1),
        HostSegment(6, num_kept=5, num_copied=0, newest=-1),
    ]
    assert leavers(segments, 6) == (5, 4, 3, 2, 1, 6)
    assert leavers(segments, 2) == (5, 4)
    assert leavers(segments, 6, parks_stay=True) == (5, 4, 3, 2)
    many = [HostSegment(i, 0, 0, -1) for i in range(1, 30)]
    assert leavers(many, 25) == tuple(range(29, 29 - MOST_LEAVING, -1))


def test_at_rest_host_memory_that_is_kept_is_needed_and_not_offered():
    assert HostResize(target=3, need=5, like=6, can_leave=4).at_rest(4) == HostResize(3, 4, 4, 0)
