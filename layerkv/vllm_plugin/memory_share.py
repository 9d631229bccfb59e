"""How many segments this engine may hold, of KV and of host memory, and whom it asks: a broker, or nobody."""

from __future__ import annotations

import multiprocessing
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vllm.logger import init_logger

from layerkv.broker.client import BrokerClient, Introduction
from layerkv.broker.messages import UNDIVIDED, Resource, Terms

logger = init_logger(f"vllm.{__name__}")

START_TIMEOUT_S = 60.0
"""How long an engine that starts waits for its floor. Not measured: chosen by judgement: others that must give memory
up park first, and a broker that is started with it may come a little later."""

WANTS_FOR_S = 1.0
"""So long an engine needs more than it may hold, and has no broker to ask, before it says so. Not measured: chosen by
judgement: long beside a broker that is started anew."""


class Share(Protocol):
    """What the engine asks before it takes memory, in whole segments. Nothing here waits for anybody."""

    def limit(self) -> int:
        """Segments that may be held."""
        ...

    def try_hold(self, num_segments: int) -> bool:
        """Say how many are held: before more are taken, and after some were given back. Whether that may be."""
        ...

    def ask(
        self, *, need: int, like: int, can_leave: int, token_rate: float, tpot_s: float, has_requests: bool
    ) -> None:
        """Say what would be of use, see :class:`layerkv.scheduler.elastic.Resize`, how fast tokens are made, and
        whether there are requests."""
        ...

    def could_not_get(self, num_segments: int) -> None:
        """Memory that may be held was not there."""
        ...

    def close(self) -> None:
        """The engine ends."""
        ...


class HostShare(Protocol):
    """What the engine asks before it takes host memory, in whole segments. Nothing here waits for anybody."""

    def limit(self) -> int | None:
        """Segments that may be held; None: nobody divides host memory, and all of them may."""
        ...

    def try_hold(self, num_segments: int) -> bool:
        """As of :class:`Share`."""
        ...

    def ask(self, *, need: int, like: int, can_leave: int) -> None:
        """Say what would be of use, see :class:`layerkv.scheduler.elastic_host.HostResize`."""
        ...


class OwnShare:
    """An engine alone: it may grow to its ceiling whenever it needs to."""

    def __init__(self, ceiling: int) -> None:
        self._ceiling = ceiling

    def limit(self) -> int:
        return self._ceiling

    def try_hold(self, num_segments: int) -> bool:
        return num_segments <= self._ceiling

    def ask(
        self, *, need: int, like: int, can_leave: int, token_rate: float, tpot_s: float, has_requests: bool
    ) -> None:
        """Nobody listens."""

    def could_not_get(self, num_segments: int) -> None:
        """Nobody listens."""

    def close(self) -> None:
        """Nothing to do."""


class BrokerHostShare:
    """What a broker allows of host memory, if it divides that."""

    def __init__(self, client: BrokerClient, segment_bytes: int) -> None:
        self._client, self._segment_bytes = client, segment_bytes

    def limit(self) -> int | None:
        num_bytes = self._client.limit("host")
        return None if num_bytes == UNDIVIDED else num_bytes // self._segment_bytes

    def try_hold(self, num_segments: int) -> bool:
        return self._client.try_hold(num_segments * self._segment_bytes, "host")

    def ask(self, *, need: int, like: int, can_leave: int) -> None:
        size = self._segment_bytes
        self._client.ask(need=need * size, like=like * size, can_leave=can_leave * size, resource="host")


@dataclass(frozen=True, slots=True)
class HostTerms:
    """What an engine wants of host memory: segments of so many bytes, over all ranks."""

    segment_bytes: int
    floor: int
    ceiling: int


class BrokerShare:
    """What a broker allows. Beside the segments the engine always holds the lane zone, counted in whole segments too.

    ``host`` is what it allows of host memory, of which the engine holds one segment from the start.

    Raises:
        BrokerError: the broker does not answer, has refused this engine, or has not its floors to give within
            ``timeout_s``.
    """

    def __init__(
        self,
        path: Path,
        *,
        title: str,
        segment_bytes: int,
        zone_bytes: int,
        floor: int,
        ceiling: int,
        held: int,
        token_bytes: int,
        weight: float,
        host: HostTerms | None,
        timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._segment_bytes = segment_bytes
        self._zone_segments = -(-zone_bytes // segment_bytes)
        terms: dict[Resource, Terms] = {
            "device": Terms(segment_bytes=segment_bytes, floor=self._bytes(floor), ceiling=self._bytes(ceiling)),
        }
        if host is not None:
            terms["host"] = Terms(
                segment_bytes=host.segment_bytes,
                floor=host.floor * host.segment_bytes,
                ceiling=host.ceiling * host.segment_bytes,
            )
        introduction = Introduction(
            engine=uuid.uuid4().hex,
            title=title,
            pids=_pids(),
            token_bytes=token_bytes,
            terms=terms,
            weight=weight,
        )
        self._path = path
        self._wants_since_s: float | None = None
        self._has_told = False
        self._client = BrokerClient(path, introduction)
        self.host = None if host is None else BrokerHostShare(self._client, host.segment_bytes)
        try:
            self._client.wait_for(self._bytes(floor), timeout_s)
            self._client.try_hold(self._bytes(held))
            if self.host is not None:
                self._client.wait_for(terms["host"].floor, timeout_s, "host")
                self.host.try_hold(1)
        except BaseException:
            self._client.close()
            raise

    def limit(self) -> int:
        return self._client.limit() // self._segment_bytes - self._zone_segments

    def try_hold(self, num_segments: int) -> bool:
        return self._client.try_hold(self._bytes(num_segments))

    def ask(
        self, *, need: int, like: int, can_leave: int, token_rate: float, tpot_s: float, has_requests: bool
    ) -> None:
        self._client.ask(
            need=self._bytes(need),
            like=self._bytes(like),
            can_leave=can_leave * self._segment_bytes,
            token_rate=token_rate,
            tpot_s=tpot_s,
            has_requests=has_requests,
        )
        self._tell_if_alone(need)

    def could_not_get(self, num_segments: int) -> None:
        self._client.could_not_get(num_segments * self._segment_bytes)

    def close(self) -> None:
        self._client.close()

    def _tell_if_alone(self, need: int) -> None:
        """Once for each time that the broker is away, if requests want memory that only it could give."""
        if self._client.is_connected:
            self._has_told = False
        if self._client.is_connected or need <= self.limit():
            self._wants_since_s = None
            return
        now_s = time.monotonic()
        if self._wants_since_s is None:
            self._wants_since_s = now_s
        elif not self._has_told and now_s - self._wants_since_s >= WANTS_FOR_S:
            self._has_told = True
            logger.warning(
                "requests need %d segments of the KV pool, this engine may hold %d, and the memory broker at %s is "
                "away: they share what there is until `layerkv broker` runs again",
                need,
                self.limit(),
                self._path,
            )

    def _bytes(self, num_segments: int) -> int:
        return (num_segments + self._zone_segments) * self._segment_bytes


def _pids() -> tuple[int, ...]:
    """This process and its workers': the memory is theirs until all of them have ended."""
    return (os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid is not None))
