from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from layerkv.broker import client, sockets
from layerkv.broker.client import BrokerClient, Introduction
from layerkv.broker.messages import (
    MOST_BYTES,
    UNDIVIDED,
    Failed,
    FromEngine,
    Hello,
    Limit,
    State,
    Terms,
    encode,
    from_engine,
)
from layerkv.broker.server import Broker
from layerkv.errors import BrokerError

WAIT_S = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.sock"


@contextmanager
def running(path: Path, capacity: int = 100, host_capacity: int | None = None) -> Iterator[Broker]:
    """A broker in a thread."""
    broker, is_over = Broker(path, capacity, host_capacity), threading.Event()
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
    wait_until(lambda: caplog.records)
    threading.Event().wait(0.2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with running(path) as second:
        wait_until(lambda: engine.is_connected)
        wait_until(lambda: second.ledgers["device"].committed == 60)
        engine.ask(need=80, like=80)
        engine.wait_for(80, WAIT_S)
        with_engine.__exit__(None, None, None)


def test_host_memory_is_an_engines_own_until_a_broker_comes_that_divides_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_RETRY_S", 0.01)
    with ExitStack() as stack:
        with running(path) as broker:
            engine = stack.enter_context(connected(path))
            engine.wait_for(20, WAIT_S, "host")
            assert engine.limit("host") == UNDIVIDED
            engine.ask(need=500, like=500, resource="host")
            assert engine.try_hold(500, "host")
            assert broker.ledgers.keys() == {"device"}
        wait_until(lambda: not engine.is_connected)
        with running(path, host_capacity=800) as broker:
            wait_until(lambda: engine.limit("host") == 500)
            wait_until(lambda: broker.ledgers["host"].committed == 500)
            assert not engine.try_hold(510, "host")
        wait_until(lambda: not engine.is_connected)
        with running(path):
            wait_until(lambda: engine.limit("host") == UNDIVIDED)
            stack.close()


def test_an_engine_learns_why_it_does_not_start(path: Path) -> None:
    with connected(path) as engine, pytest.raises(BrokerError, match="does not answer"):
        engine.wait_for(20, 0.05)
    with running(path):
        with (
            connected(path, floor=200) as engine,
            pytest.raises(BrokerError, match="has refused this engine: device memory: a floor of 200"),
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


@contextmanager
def deaf_broker(path: Path, engine: str = "a") -> Iterator[tuple[BrokerClient, socket.socket]]:
    """An engine, and its connection to a broker that has said one limit and reads nothing of itself."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with connected(path, engine) as client, listener.accept()[0] as connection:
            connection.settimeout(WAIT_S)
            connection.send(encode(Limit(resource="device", revision=1, num_bytes=10)))
            yield client, connection


def test_a_broker_that_reads_nothing_for_long_hears_the_last_word(path: Path) -> None:
    with deaf_broker(path) as (engine, connection):
        engine.wait_for(10, WAIT_S)
        need, pause = 0, threading.Event()

        def is_stuck() -> bool:
            return all(engine._has_news and not pause.wait(0.002) for _ in range(100))

        while need < 150 or not is_stuck():  # its thread may only have been held up
            need += 1
            engine.ask(need=need, like=0)
            assert need < 20000, "the connection has no end"
        engine.could_not_get(7)
        engine.ask(need=2 * need, like=0)
        said: list[FromEngine] = []
        while not (said and isinstance(said[-1], State) and said[-1].device.need == 2 * need):
            said.append(from_engine(connection.recv(MOST_BYTES)))
        assert isinstance(said[0], Hello)
        assert Failed(resource="device", num_bytes=7) in said
        assert len(said) > 100, "it was full"
        assert engine.is_connected


def test_memory_that_was_not_there_is_said_to_the_next_broker(path: Path) -> None:
    with deaf_broker(path) as (engine, connection):
        engine.wait_for(10, WAIT_S)
        wait_until(lambda: not engine._has_news)
        path.unlink()  # or the engine may come back to this one, which hears nobody
        connection.close()
        wait_until(lambda: not engine.is_connected)
        engine.could_not_get(7)
        with running(path) as broker:
            wait_until(lambda: broker.ledgers["device"].capacity == 93)


def test_what_is_closed_touches_no_file_that_has_its_number_now(path: Path) -> None:
    with connected(path) as engine:
        bell = engine._bell
        engine.close()
        others = [os.eventfd(0, os.EFD_NONBLOCK)]
        while others[-1] < bell:
            others.append(os.eventfd(0, os.EFD_NONBLOCK))
        assert others[-1] == bell
        engine.ask(need=30, like=30)
        engine.could_not_get(5)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(bell)
        for other in others:
            os.close(other)
        with pytest.raises(BrokerError, match="this side is closed"):
            engine.wait_for(20, WAIT_S)


def test_the_last_word_of_an_engine_that_closes_is_heard(path: Path) -> None:
    with running(path) as broker:
        with connected(path) as engine:
            engine.wait_for(20, WAIT_S)
            engine.try_hold(20)
            engine.try_hold(10)
        wait_until(lambda: (wish := broker.ledgers["device"].wish("a")) and wish.held == 10)


def test_what_an_engine_makes_is_said_once_for_all_it_asks_for(path: Path) -> None:
    with deaf_broker(path) as (engine, connection):
        engine.ask(need=30, like=30, token_rate=50.0, tpot_s=0.1, has_requests=False)
        engine.ask(need=40, like=40, resource="host")
        while not isinstance(message := from_engine(connection.recv(MOST_BYTES)), State) or message.host is None:
            pass
        while message.host.need != 40:
            message = from_engine(connection.recv(MOST_BYTES))
            assert isinstance(message, State)
            assert message.host is not None
        assert (message.token_rate, message.tpot_s, message.has_requests) == (50.0, 0.1, False)


def test_a_broker_of_somebody_else_is_told_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sockets, "peer", lambda _: (1, 12345))
    with running(path) as broker, connected(path):
        wait_until(lambda: "user 12345 runs it" in caplog.text)
        assert broker.ledgers["device"].limits == {}


def test_an_engine_that_says_what_is_refused_says_so_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(client, "LAST_RETRY_S", 0.01)
    caplog.set_level(logging.WARNING, client.__name__)
    with running(path) as broker, connected(path) as engine:
        engine.wait_for(20, WAIT_S)
        engine.ask(need=30, like=30, token_rate=float("inf"))
        wait_until(lambda: (limit := broker.ledgers["device"].limit("a")) and limit.revision > 6)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
