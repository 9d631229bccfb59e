"""An engine's segments under a real broker: whole segments, the zone beside them, and a start that waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from layerkv.broker.server import Broker
from layerkv.errors import BrokerError

pytestmark = pytest.mark.vllm

SEGMENT, HOST_SEGMENT = 100, 30
WAIT_S = 60.0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Path]:
    """One that divides 20 segments, and 10 of host memory."""
    path, is_over = tmp_path / "broker.sock", threading.Event()
    its = Broker(path, 20 * SEGMENT, 10 * HOST_SEGMENT)
    thread = threading.Thread(target=its.run, args=(is_over.is_set,))
    thread.start()
    yield path
    is_over.set()
    thread.join()
    its.close()


def share(path: Path, *, floor: int = 4, host_floor: int = 2, timeout_s: float = WAIT_S) -> Any:
    """The lane zone takes a segment and a half, which is two."""
    from layerkv.vllm_plugin.memory_share import BrokerShare, HostTerms

    return BrokerShare(
        path,
        title="a model",
        segment_bytes=SEGMENT,
        zone_bytes=150,
        floor=floor,
        ceiling=30,
        held=1,
        token_bytes=1,
        weight=1.0,
        host=HostTerms(HOST_SEGMENT, floor=host_floor, ceiling=12),
        timeout_s=timeout_s,
    )


def wait_until(is_so: Callable[[], object]) -> None:
    waiting = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        if is_so():
            return
        waiting.wait(0.01)
    raise AssertionError


def ask(of: Any, need: int) -> None:
    of.ask(need=need, like=need, can_leave=0, token_rate=1.0, tpot_s=0.05, has_requests=True)


def test_it_starts_with_its_floor_and_may_hold_what_it_needs(broker: Path) -> None:
    engine = share(broker)
    assert engine.limit() >= 4
    ask(engine, 30)
    wait_until(lambda: engine.limit() == 18)  # 20, and 2 of them are the zone
    assert engine.try_hold(18)
    assert not engine.try_hold(19)
    engine.close()


def test_host_memory_is_divided_too_in_segments_of_its_own(broker: Path) -> None:
    first, second = share(broker), share(broker)
    assert first.host.limit() == 2
    first.host.ask(need=12, like=12, can_leave=0)
    wait_until(lambda: first.host.limit() == 8)  # the other one has its floor
    assert first.host.try_hold(8)
    assert not first.host.try_hold(9)
    second.host.ask(need=5, like=5, can_leave=0)
    first.host.ask(need=12, like=12, can_leave=8)
    wait_until(lambda: first.host.limit() == 5)
    assert first.host.try_hold(5)
    wait_until(lambda: second.host.limit() == 5)
    first.close()
    second.close()


def test_where_nobody_divides_host_memory_there_is_no_limit(tmp_path: Path) -> None:
    path, is_over = tmp_path / "broker.sock", threading.Event()
    its = Broker(path, 20 * SEGMENT)
    thread = threading.Thread(target=its.run, args=(is_over.is_set,))
    thread.start()
    engine = share(path)
    assert engine.host.limit() is None
    assert engine.host.try_hold(12)
    engine.close()
    is_over.set()
    thread.join()
    its.close()


def test_of_two_one_gives_what_the_other_needs(broker: Path) -> None:
    first = share(broker)
    ask(first, 16)
    wait_until(lambda: first.limit() >= 16)
    assert first.try_hold(16)
    ask(first, 1)
    assert first.try_hold(1)
    second = share(broker)
    ask(second, 12)
    wait_until(lambda: second.limit() >= 12)
    first.close()
    second.close()


def test_needs_that_only_a_broker_could_meet_that_is_away_are_told_once(
    broker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerkv.vllm_plugin import memory_share

    engine, told, now_s = share(broker), list[tuple[Any, ...]](), 0.0
    engine.close()
    engine._client = SimpleNamespace(is_connected=True, limit=lambda: 3 * SEGMENT, ask=lambda **_: None)
    monkeypatch.setattr(memory_share, "logger", SimpleNamespace(warning=lambda *message: told.append(message)))
    monkeypatch.setattr(memory_share, "time", SimpleNamespace(monotonic=lambda: now_s))
    for now_s, is_connected, need, num_told in [
        (0.0, True, 9, 0),
        (5.0, False, 9, 0),
        (5.9, False, 9, 0),
        (6.0, False, 1, 0),
        (7.0, False, 9, 0),  # from here
        (8.1, False, 9, 1),
        (9.0, False, 1, 1),
        (10.0, False, 9, 1),
        (12.0, False, 9, 1),  # of one absence once
        (13.0, True, 9, 1),
        (14.0, False, 9, 1),
        (15.1, False, 9, 2),
    ]:
        engine._client.is_connected = is_connected
        ask(engine, need)
        assert len(told) == num_told, now_s


def test_without_a_broker_or_its_floor_it_does_not_start(broker: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r"nowhere\.sock does not answer \(start `layerkv broker`\)"):
        share(tmp_path / "nowhere.sock", timeout_s=0.2)
    with pytest.raises(BrokerError, match="device memory: a floor of 2700 bytes"):
        share(broker, floor=25)
    with pytest.raises(
        BrokerError, match="host memory: a floor of 330 bytes, beside 0 of others, where 300 are shared"
    ):
        share(broker, host_floor=11)
