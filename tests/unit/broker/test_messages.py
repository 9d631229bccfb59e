from __future__ import annotations

import math

import msgspec
import pytest

from layerkv.broker.messages import (
    MOST_BYTES,
    VERSION,
    Bye,
    Failed,
    Hello,
    Limit,
    State,
    Terms,
    Usage,
    encode,
    from_broker,
    from_engine,
)
from layerkv.errors import BrokerError
from tests.fakes.forked_engine import hello

USAGE = Usage(revision=3, held=20, need=30, like=40, can_leave=10)
TERMS = Terms(segment_bytes=10, floor=20, ceiling=90)


@pytest.mark.parametrize(
    "message",
    [
        hello("a", 1, 2, host=TERMS, weight=2.0),
        State(device=USAGE, host=USAGE, token_rate=99.5, tpot_s=0.05),
        State(device=USAGE),
        Failed(resource="host", num_bytes=5),
        Bye(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_an_engine_says_is_heard(message: Hello | State | Failed | Bye) -> None:
    assert from_engine(encode(message)) == message


@pytest.mark.parametrize("message", [Limit(resource="device", revision=1, num_bytes=0), Bye(reason="no")], ids=str)
def test_what_the_broker_says_is_heard(message: Limit | Bye) -> None:
    assert from_broker(encode(message)) == message


def test_the_longest_hello_fits_a_message() -> None:
    longest = hello("e" * 256, *range(2**29, 2**29 + 4096), title="é" * 256)
    assert len(encode(longest)) < MOST_BYTES


def changed(message: object, **fields: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.to_builtins(message) | fields)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\xc1",
        b"hello",
        msgspec.msgpack.encode([1, 2]),
        changed(hello("a", 1), type="helo"),
        changed(hello("a", 1), surprise=1),
        changed(hello("a", 1), engine=""),
        changed(hello("a", 1), pids=[]),
        changed(hello("a", 1), pids=[0]),
        changed(hello("a", 1), weight=0),
        changed(hello("a", 1), weight=math.inf),
        changed(State(device=USAGE), token_rate=math.inf),
        changed(State(device=USAGE), token_rate=math.nan),
        changed(State(device=USAGE), tpot_s=math.nan),
        changed(hello("a", 1), token_bytes=1 << 61),
        changed(State(device=USAGE), tpot_s=0),
        changed(State(device=USAGE), token_rate=-1),
        changed(State(device=USAGE), device={"held": -1}),
        changed(Failed(resource="device", num_bytes=1), resource="disk"),
        encode(Limit(resource="device", revision=1, num_bytes=0)),
    ],
    ids=str,
)
def test_what_is_no_message_of_an_engine_is_refused(packet: bytes) -> None:
    with pytest.raises(BrokerError, match="not a message"):
        from_engine(packet)


def test_what_is_no_message_of_the_broker_is_refused() -> None:
    with pytest.raises(BrokerError, match="not a message"):
        from_broker(encode(hello("a", 1)))


@pytest.mark.parametrize("others", [{}, {"something": "new"}])
def test_another_version_is_named_even_where_nothing_else_is_understood(others: dict[str, object]) -> None:
    with pytest.raises(BrokerError, match=f"speaks version 7 of the protocol and the broker {VERSION}"):
        from_engine(changed(hello("a", 1), version=7, **others))
