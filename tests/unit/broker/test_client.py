from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layerkv.broker import client
from layerkv.broker.client import BrokerClient, Introduction
from layerkv.broker.messages import Terms
from layerkv.broker.server import Broker
from layerkv.errors import BrokerError

WAIT_S = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.sock"


@contextmanager
def running(path: Path, capacity: int = 100) -> Iterator[Broker]:
    """A broker in a thread."""
    broker, is_over = Broker(path, capacity), threading.Event()
    thread = threading.Thread(target=broker.run, args=(is_over.is_set,))
    thread.start()
    try:
        yield broker
    finally:
        is_over.set()
        thread.join()
        broker.close()


@contextmanager
def connected(path: Path, engine: str = "a", floor: int = 20) -> Iterator[BrokerClient]:
    terms = Terms(segment_bytes=10, floor=floor, ceiling=1000)
    both = BrokerClient(path, Introduction(engine, "a model", (os.getpid(),), 1, {"device": terms, "host": terms}))
    try:
        yield both
    finally:
        both.close()


def wait_until(is_so: Callable[[], object]) -> None:
    waiting = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        if is_so():
            return
        waiting.wait(0.01)
    raise AssertionError


def test_an_engine_holds_what_it_may_and_is_never_told_to_wait(path: Path) -> None:
    with running(path) as broker, connected(path) as engine:
        assert not engine.try_hold(21)
        engine.wait_for(20, WAIT_S)
        assert engine.try_hold(20)
        assert not engine.try_hold(30)
        engine.ask(need=50, like=50)
        engine.wait_for(50, WAIT_S)
        assert engine.try_hold(50)
        assert engine.held() == 50
        wait_until(lambda: broker.ledgers["device"].committed == 50)


def test_an_engine_that_sleeps_gives_back_what_it_may_no_longer_take(path: Path) -> None:
    """It never runs again, and the broker still hears that it holds less than it might have."""
    with running(path) as broker, connected(path) as idle:
        idle.ask(need=90, like=90)
        idle.wait_for(90, WAIT_S)
        idle.try_hold(10)
        idle.ask(need=10, like=10)
        wait_until(lambda: broker.ledgers["device"].committed == 10)
        assert idle.limit() == 10
        assert not idle.try_hold(20)


def test_without_a_broker_an_engine_keeps_its_limit_says_so_once_and_comes_back(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(client, "LAST_RETRY_S", 0.02)
    caplog.set_level(logging.WARNING, client.__name__)
    with running(path) as first:
        with_engine = connected(path)
        engine = with_engine.__enter__()
        engine.ask(need=60, like=60)
        engine.wait_for(60, WAIT_S)
        assert engine.try_hold(40)
        wait_until(lambda: first.ledgers["device"].committed == 60)
    wait_until(lambda: not engine.is_connected)
    assert engine.try_hold(60), "it was given that"
    assert not engine.try_hold(70)
    threading.Event().wait(0.2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with running(path) as second:
        wait_until(lambda: engine.is_connected)
        wait_until(lambda: second.ledgers["device"].committed == 60)
        engine.ask(need=80, like=80)
        engine.wait_for(80, WAIT_S)
        with_engine.__exit__(None, None, None)


def test_an_engine_learns_why_it_does_not_start(path: Path) -> None:
    with connected(path) as engine, pytest.raises(BrokerError, match="does not answer"):
        engine.wait_for(20, 0.05)
    with running(path):
        with (
            connected(path, floor=200) as engine,
            pytest.raises(BrokerError, match="has refused this engine: a floor of 200"),
        ):
            engine.wait_for(20, WAIT_S)
        with connected(path) as engine:
            engine.wait_for(0, WAIT_S)
            wait_until(lambda: engine.is_connected)
            with pytest.raises(BrokerError, match="has no memory to spare"):
                engine.wait_for(1000, 0.05)


def test_memory_that_was_not_there_is_missing_for_all(path: Path) -> None:
    with running(path) as broker, connected(path) as engine:
        engine.wait_for(20, WAIT_S)
        engine.could_not_get(30)
        wait_until(lambda: broker.ledgers["device"].capacity == 70)
