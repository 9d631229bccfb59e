"""One moment of all sources together: what `layerkv top` shows, and its JSON (docs/monitoring.md has the fields).

Pure functions. Invariant: what no source tells is None, not 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from layerkv.broker.messages import Entry, Memory, Roster, Share
from layerkv.errors import LayerKVError
from layerkv.top.servers import Engine, Figures

SCHEMA = 1
"""Of the JSON; grows when a field goes or changes what it means."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What all sources said at ``at_s``, a monotonic clock's; ``errors`` by the source that failed."""

    at_s: float
    at_unix_s: float
    roster: Roster | None = None
    servers: Mapping[str, Mapping[Engine, Figures]] = field(default_factory=dict)
    errors: Mapping[str, LayerKVError] = field(default_factory=dict)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's part of one resource: whole segments held, and bytes."""

    segments: int
    segment_bytes: int
    held: int
    need: int
    like: int
    limit: int
    floor: int
    ceiling: int


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Since the server's start, and of those between two readings the share that was on time."""

    on_time: int
    late: int
    on_time_share: float | None
    on_time_share_now: float | None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One engine."""

    engine: str
    title: str
    url: str | None = None
    pids: list[int] | None = None
    is_connected: bool | None = None
    device: Part | None = None
    host: Part | None = None
    requests: dict[str, int] | None = None
    paused: int | None = None
    waits_for: dict[str, int] | None = None
    bytes_per_second: dict[str, float] | None = None
    tokens: Tokens | None = None


class BrokerPart(msgspec.Struct, frozen=True, kw_only=True):
    """The broker, and each memory that it divides."""

    socket: str
    device: Memory
    host: Memory | None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A source that told nothing."""

    source: str
    error: str


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """The whole; the JSON of `layerkv top --json`."""

    schema: int
    at_unix_s: float
    interval_s: float | None
    broker: BrokerPart | None
    engines: list[Row]
    errors: list[Failure]


def picture(now: Reading, before: Reading | None, socket: str) -> Picture:
    """Everything, with rates since the reading before.

    An engine of the broker and one of a server are one row where the broker's title is the server's model name, and
    either is the only one of that name.
    """
    roster = now.roster
    interval_s = None if before is None else now.at_s - before.at_s
    rows = _rows_of_servers(now, before, interval_s)
    return Picture(
        schema=SCHEMA,
        at_unix_s=now.at_unix_s,
        interval_s=interval_s,
        broker=None if roster is None else BrokerPart(socket=socket, device=roster.device, host=roster.host),
        engines=_joined([] if roster is None else roster.engines, rows),
        errors=[Failure(source=source, error=str(error)) for source, error in now.errors.items()],
    )


def _rows_of_servers(now: Reading, before: Reading | None, interval_s: float | None) -> list[Row]:
    rows = []
    for url, engines in now.servers.items():
        earlier = {} if before is None else before.servers.get(url, {})
        for (model, number), figures in sorted(engines.items()):
            rows.append(_row_of_server(url, (model, number), figures, earlier.get((model, number)), interval_s))
    return rows


def _row_of_server(url: str, engine: Engine, figures: Figures, before: Figures | None, interval_s: float | None) -> Row:
    model, number = engine
    if before is not None and _has_begun_anew(figures, before):
        before = None
    rates = None
    if before is not None and interval_s:
        rates = {
            direction: (count - before.num_bytes.get(direction, 0.0)) / interval_s
            for direction, count in figures.num_bytes.items()
        }
    recent = None
    if before is not None:
        recent = _share(figures.num_on_time - before.num_on_time, figures.num_late - before.num_late)
    return Row(
        engine=f"{model}/{number}",
        title=model,
        url=url,
        requests=figures.requests,
        paused=figures.num_paused,
        waits_for=figures.waits_for,
        bytes_per_second=rates,
        tokens=Tokens(
            on_time=int(figures.num_on_time),
            late=int(figures.num_late),
            on_time_share=_share(figures.num_on_time, figures.num_late),
            on_time_share_now=recent,
        ),
    )


def _has_begun_anew(now: Figures, before: Figures) -> bool:
    return (
        now.num_on_time < before.num_on_time
        or now.num_late < before.num_late
        or any(now.num_bytes.get(direction, 0.0) < count for direction, count in before.num_bytes.items())
    )


def _share(on_time: float, late: float) -> float | None:
    return on_time / (on_time + late) if on_time + late > 0 else None


def _joined(entries: Sequence[Entry], rows: Sequence[Row]) -> list[Row]:
    titles, models = Counter(entry.title for entry in entries), Counter(row.title for row in rows)
    of_server = {row.title: row for row in rows if row.title and models[row.title] == titles[row.title] == 1}
    joined = []
    for entry in entries:
        row = of_server.get(entry.title, Row(engine=entry.engine, title=entry.title))
        joined.append(
            msgspec.structs.replace(
                row,
                engine=entry.engine,
                pids=entry.pids,
                is_connected=entry.is_connected,
                device=_part(entry.device),
                host=_part(entry.host),
            )
        )
    return joined + [row for row in rows if row.title not in of_server]


def _part(share: Share | None) -> Part | None:
    if share is None:
        return None
    return Part(
        segments=share.held // share.segment_bytes,
        segment_bytes=share.segment_bytes,
        held=share.held,
        need=share.need,
        like=share.like,
        limit=share.limit,
        floor=share.floor,
        ceiling=share.ceiling,
    )
