from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerkv.broker.messages import (
    MOST_BYTES,
    VERSION,
    Bye,
    Entry,
    Memory,
    Roster,
    Share,
    State,
    Terms,
    Usage,
    Watch,
    encode,
    from_engine,
    to_observer,
)
from layerkv.broker.server import ENGINES_A_ROSTER, MOST_PIDS_SHOWN, Broker
from layerkv.broker.watch import read_roster
from layerkv.errors import BrokerError
from tests.fakes.forked_engine import connect, forked, hello, quiet_engine

WAIT_S = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.sock"


@pytest.fixture
def broker(path: Path) -> Iterator[Broker]:
    broker, is_over = Broker(path, 100, 50), threading.Event()
    thread = threading.Thread(target=broker.run, args=(is_over.is_set,))
    thread.start()
    yield broker
    is_over.set()
    thread.join()
    broker.close()


@pytest.mark.usefixtures("broker")
def test_an_observer_sees_what_all_have_and_takes_no_part(path: Path) -> None:
    assert read_roster(path, WAIT_S).engines == []
    terms = Terms(segment_bytes=10, floor=20, ceiling=1000)
    with connect(path) as connection:
        connection.settimeout(WAIT_S)
        connection.send(encode(hello("a", device=terms)))
        for _ in range(2):
            connection.recv(MOST_BYTES)
        connection.send(encode(State(device=Usage(revision=2, held=20, need=35, like=36))))
        connection.recv(MOST_BYTES)
        for _ in range(2):
            assert read_roster(path, WAIT_S) == Roster(
                device=Memory(capacity=100, committed=40),
                host=Memory(capacity=50, committed=0),
                engines=[
                    Entry(
                        engine="a",
                        title="a model",
                        pids=[os.getpid()],
                        is_connected=True,
                        device=Share(segment_bytes=10, floor=20, ceiling=1000, limit=40, held=20, need=35, like=36),
                    )
                ],
                is_last=True,
            )


@pytest.mark.usefixtures("broker")
def test_more_engines_than_one_message_holds_are_all_seen(path: Path) -> None:
    names = [f"{number:03}" for number in range(2 * ENGINES_A_ROSTER + 1)]
    connections = []
    for name in names:
        connections.append(connect(path))
        connections[-1].settimeout(WAIT_S)
        connections[-1].send(encode(hello(name)))
        connections[-1].recv(MOST_BYTES)
    assert [entry.engine for entry in read_roster(path, WAIT_S).engines] == names
    for connection in connections:
        connection.close()


def test_the_longest_answer_fits_a_message() -> None:
    share = Share(**dict.fromkeys(Share.__struct_fields__, 1 << 60))
    entry = Entry(
        engine="\U0001f600" * 256,
        title="\U0001f600" * 256,
        pids=[1 << 30] * MOST_PIDS_SHOWN,
        is_connected=True,
        device=share,
        host=share,
    )
    memory = Memory(capacity=1 << 60, committed=1 << 62)
    roster = Roster(device=memory, host=memory, engines=[entry] * ENGINES_A_ROSTER, is_last=False)
    assert to_observer(encode(roster)) == roster


def test_an_engine_that_is_not_back_is_seen_without_its_part(path: Path) -> None:
    first = Broker(path, 100)
    with forked(quiet_engine, path, "silent") as pid:
        while "silent" not in first.ledgers["device"].limits:
            first.step(0.01)
        first.close()
        os.kill(pid, signal.SIGSTOP)
        again = Broker(path, 100)
        assert again._roster("").engines == [Entry(engine="silent", title="", pids=[pid], is_connected=False)]
        again.close()


def test_who_asks_in_another_version_is_refused(path: Path, broker: Broker) -> None:
    assert from_engine(encode(Watch(version=VERSION))) == Watch(version=VERSION)
    with connect(path) as connection:
        connection.settimeout(WAIT_S)
        connection.send(encode(Watch(version=7)))
        answer = to_observer(connection.recv(MOST_BYTES))
    assert isinstance(answer, Bye)
    assert "speaks version 7" in answer.reason
    assert broker.ledgers["device"].limits == {}


def test_no_broker_is_one_clear_line(path: Path) -> None:
    with pytest.raises(BrokerError, match=rf"^no memory broker at {path} \(No such file or directory\); start"):
        read_roster(path, WAIT_S)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(BrokerError, match=r"has not answered for 0\.05 s"):
            read_roster(path, 0.05)
    with pytest.raises(BrokerError, match="Connection refused"):
        read_roster(path, WAIT_S)
