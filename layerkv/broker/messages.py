"""What engines and broker tell each other: MessagePack, one message per packet.

Amounts are absolute, and limits have revisions: a message that is lost with its connection, or comes twice, changes
nothing (:class:`Failed` is said once, or is lost). An engine says :class:`Hello` first; whoever says :class:`Bye` says
no more. An observer says :class:`Watch` as often as it likes, takes no part, and is told nothing else.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from layerkv.errors import BrokerError

VERSION = 3
"""Of this protocol. Both sides must have the same."""

MOST_BYTES = 64 << 10
"""Length of the longest message. Not measured: chosen by judgement."""

UNDIVIDED = 1 << 61
"""As a limit: the broker does not divide that memory, and each engine has its own. Derived: above every size here."""

Resource: TypeAlias = Literal["device", "host"]
Bytes = Annotated[int, Meta(ge=0, le=1 << 60)]
SomeBytes = Annotated[int, Meta(ge=1, le=1 << 60)]
Weight = Annotated[float, Meta(gt=0, le=1e9)]  # so that no weight of an engine is infinite
Rate = Annotated[float, Meta(ge=0, le=1e12)]
Duration = Annotated[float, Meta(ge=1e-9)]  # infinite where nobody reads along
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Pids = Annotated[tuple[Annotated[int, Meta(ge=1, le=1 << 30)], ...], Meta(min_length=1, max_length=4096)]


class Terms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine wants of one resource as long as it lives, and what it has as it says so.

    Attributes:
        segment_bytes: What its memory comes and goes in.
        floor: What it gets back whenever it needs that much.
        ceiling: More it cannot use.
        held: What it holds now.
        limit: What it was last told that it may hold; 0 for an engine that begins.
    """

    segment_bytes: SomeBytes
    floor: Bytes
    ceiling: Bytes
    held: Bytes = 0
    limit: Bytes = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine has of one resource and asks for; see :class:`layerkv.core.sharing.Wish`.

    ``revision`` is that of the limit which it keeps to.
    """

    revision: Annotated[int, Meta(ge=0)]
    held: Bytes
    need: Bytes
    like: Bytes
    can_leave: Bytes = 0


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", forbid_unknown_fields=True):
    """An engine begins, or comes back after its connection or the broker was gone.

    Attributes:
        version: See :data:`VERSION`.
        engine: Its name for the broker, the same as long as it lives.
        title: Its name for people.
        pids: All processes that use the memory, the one that says this among them. It is free when all have ended.
        token_bytes: Device bytes of one token.
        device: Of device memory.
        host: Of host memory; None where it cannot come and go.
        weight: Beside other engines.
    """

    version: int
    engine: Name
    title: Name
    pids: Pids
    token_bytes: SomeBytes
    device: Terms
    host: Terms | None = None
    weight: Weight = 1.0


class State(msgspec.Struct, frozen=True, kw_only=True, tag="state", forbid_unknown_fields=True):
    """What an engine has, asks for, and makes: tokens per second, each within ``tpot_s``; whether anybody uses it."""

    device: Usage
    host: Usage | None = None
    token_rate: Rate = 0.0
    tpot_s: Duration = 1.0
    has_requests: bool = True


class Limit(msgspec.Struct, frozen=True, kw_only=True, tag="limit", forbid_unknown_fields=True):
    """The broker says: hold so much and no more. Of two the one with the higher revision holds.

    For a resource that the engine has named and the broker does not divide, it is :data:`UNDIVIDED`, once.
    """

    resource: Resource
    revision: Annotated[int, Meta(ge=0)]
    num_bytes: Annotated[int, Meta(ge=0, le=UNDIVIDED)]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed", forbid_unknown_fields=True):
    """An engine could not get memory that it may hold: somebody else has it."""

    resource: Resource
    num_bytes: SomeBytes


class Bye(msgspec.Struct, frozen=True, kw_only=True, tag="bye", forbid_unknown_fields=True):
    """Says no more; the broker with a reason."""

    reason: Annotated[str, Meta(max_length=1024)] = ""


class Watch(msgspec.Struct, frozen=True, kw_only=True, tag="watch", forbid_unknown_fields=True):
    """An observer asks who is there: for the first names behind ``after``."""

    version: int
    after: Annotated[str, Meta(max_length=256)] = ""


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's part of one resource, in bytes; ``limit`` is the broker's word, the others the engine's."""

    segment_bytes: int
    floor: int
    ceiling: int
    limit: int
    held: int
    need: int
    like: int


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An engine as an observer sees it.

    Attributes:
        engine: Its name for the broker.
        title: Its name for people; "" for one that is not back since the broker began.
        pids: Those of its processes that are watched.
        is_connected: Whether it listens now.
        device: Its part; None for one that is not back.
        host: Its part; None where it takes none.
    """

    engine: str
    title: str
    pids: list[int]
    is_connected: bool
    device: Share | None = None
    host: Share | None = None


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """One resource: bytes in all, and those that engines have or may take."""

    capacity: int
    committed: int


class Roster(msgspec.Struct, frozen=True, kw_only=True, tag="roster"):
    """The broker's answer to :class:`Watch`: some engines, by name; behind the last of them come more unless
    ``is_last``."""

    device: Memory
    host: Memory | None = None
    engines: list[Entry]
    is_last: bool


FromEngine: TypeAlias = Hello | State | Failed | Bye | Watch
FromBroker: TypeAlias = Limit | Bye
ToObserver: TypeAlias = Roster | Bye

Said = TypeVar("Said")

_ENCODER = msgspec.msgpack.Encoder()
_FROM_ENGINE = msgspec.msgpack.Decoder(FromEngine)
_FROM_BROKER: msgspec.msgpack.Decoder[FromBroker] = msgspec.msgpack.Decoder(FromBroker)
_TO_OBSERVER: msgspec.msgpack.Decoder[ToObserver] = msgspec.msgpack.Decoder(ToObserver)


class _AnyHello(msgspec.Struct):
    version: int = VERSION


def encode(message: FromEngine | FromBroker | ToObserver) -> bytes:
    """One packet."""
    packet = _ENCODER.encode(message)
    assert len(packet) <= MOST_BYTES
    return packet


def from_engine(packet: bytes) -> FromEngine:
    """What an engine says.

    Raises:
        BrokerError: it is of another version, or no message.
    """
    try:
        message: FromEngine = _FROM_ENGINE.decode(packet)
    except msgspec.DecodeError as error:
        raise BrokerError(_other_version(packet) or f"not a message: {error}") from None
    if isinstance(message, Hello | Watch) and message.version != VERSION:
        raise BrokerError(_other_version(packet))
    return message


def from_broker(packet: bytes) -> FromBroker:
    """What the broker says.

    Raises:
        BrokerError: no message.
    """
    return _decoded(_FROM_BROKER, packet)


def to_observer(packet: bytes) -> ToObserver:
    """What the broker says to an observer.

    Raises:
        BrokerError: no message.
    """
    return _decoded(_TO_OBSERVER, packet)


def _decoded(decoder: msgspec.msgpack.Decoder[Said], packet: bytes) -> Said:
    try:
        return decoder.decode(packet)
    except msgspec.DecodeError as error:
        raise BrokerError(f"not a message: {error}") from None


def _other_version(packet: bytes) -> str:
    try:
        version = msgspec.msgpack.decode(packet, type=_AnyHello).version
    except msgspec.DecodeError:
        return ""
    if version == VERSION:
        return ""
    return f"the other side speaks version {version} of the protocol and the broker {VERSION}; run one layerkv for both"
