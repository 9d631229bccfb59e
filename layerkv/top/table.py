"""The picture as lines of text. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layerkv.broker.messages import Memory
from layerkv.top.picture import Part, Picture, Row
from layerkv.units import format_bytes

NOTHING = "-"


def lines(whole: Picture) -> list[str]:
    """What a person reads: memory in all, a line per engine, and the sources that failed.

    Columns of which nothing is known are left out.
    """
    said = []
    if whole.broker is not None:
        host = "" if whole.broker.host is None else f"; host {_memory(whole.broker.host)}"
        said.append(f"broker at {_plain(whole.broker.socket)}: device {_memory(whole.broker.device)}{host}")
    if whole.engines:
        said += _table(whole.engines)
    elif not whole.errors:
        said.append("no engine is here")
    return said + [f"error: {_plain(failure.error)}" for failure in whole.errors]


def _memory(memory: Memory) -> str:
    return f"{format_bytes(memory.committed)} of {format_bytes(memory.capacity)} given"


def _table(rows: Sequence[Row]) -> list[str]:
    columns = []
    for title, cell, is_left in _COLUMNS:
        cells = [cell(row) for row in rows]
        if any(text != NOTHING for text in cells):
            width = max(map(len, [title, *cells]))
            columns.append([text.ljust(width) if is_left else text.rjust(width) for text in [title, *cells]])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _request_count(*residencies: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        if row.requests is None:
            return NOTHING
        return str(sum(row.requests.get(residency, 0) for residency in residencies))

    return cell


def _engine(row: Row) -> str:
    return _plain(row.engine) + (" (away)" if row.is_connected is False else "")


def _title(row: Row) -> str:
    title = _plain(row.title) or NOTHING
    return NOTHING if row.pids is None else title  # that of a server is in its engine's name


def _segments(row: Row) -> str:
    return NOTHING if row.device is None else str(row.device.segments)


def _bytes_of(part: Part | None) -> str:
    if part is None:
        return NOTHING
    return "/".join(format_bytes(size) for size in (part.held, part.need, part.limit))


def _waits_for(row: Row) -> str:
    if row.waits_for is None:
        return NOTHING
    most_first = sorted(row.waits_for.items(), key=lambda wait: (-wait[1], wait[0]))
    return ", ".join(f"{_plain(resource)} {count}" for resource, count in most_first) or "nothing"


def _rate(direction: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        rate = None if row.bytes_per_second is None else row.bytes_per_second.get(direction)
        return NOTHING if rate is None else f"{format_bytes(round(rate))}/s"

    return cell


def _on_time(row: Row) -> str:
    if row.tokens is None:
        return NOTHING
    share = row.tokens.on_time_share_now
    if share is None:
        share = row.tokens.on_time_share
    return NOTHING if share is None else f"{share:.1%}"


_COLUMNS: Sequence[tuple[str, Callable[[Row], str], bool]] = (
    ("ENGINE", _engine, True),
    ("MODEL", _title, True),
    ("SEGMENTS", _segments, False),
    ("DEVICE HELD/NEED/LIMIT", lambda row: _bytes_of(row.device), False),
    ("HOST HELD/NEED/LIMIT", lambda row: _bytes_of(row.host), False),
    ("RUNNING", _request_count("resident"), False),
    ("LAYERED", _request_count("layered"), False),
    ("PARKED", _request_count("parked", "fetching"), False),
    ("WAITING", _request_count("waiting"), False),
    ("STORED", _rate("store"), False),
    ("LOADED", _rate("load"), False),
    ("ON TIME", _on_time, False),
    ("WAITS FOR", _waits_for, True),
)


def _plain(text: str) -> str:
    """Names are the engines' and the servers': what would move the cursor is shown as a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
