"""`layerkv top`: asks all sources again and again, and draws."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import msgspec

from layerkv.broker.sockets import default_path
from layerkv.broker.watch import read_roster
from layerkv.errors import BrokerError, LayerKVError
from layerkv.top.picture import Picture, Reading, picture
from layerkv.top.servers import metrics_url, read_server
from layerkv.top.table import lines

EVERY_S = 1.0
"""Seconds between readings."""

TIMEOUT_S = 5.0
"""Seconds that a source may take to answer."""

_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


def run_top(
    socket: Path | None,
    urls: Sequence[str],
    *,
    once: bool,
    as_json: bool,
    out: TextIO | None = None,
    every_s: float = EVERY_S,
) -> int:
    """Show what the broker and the servers tell: the broker at its usual place where neither is named.

    Without a terminal, or with ``once``, one picture; else one after the other until the user ends it. JSON is a line
    each.

    Returns:
        1 if a source failed in the last picture, else 0.

    Raises:
        ConfigError: an address is none.
        LayerKVError: the only source does not answer, or has no layerkv.
    """
    out = out or sys.stdout
    path = socket or (None if urls else default_path())
    addresses = [metrics_url(url) for url in dict.fromkeys(urls)]
    is_live = not once and (as_json or out.isatty())
    now = _read(path, addresses)
    if len(now.errors) == len(addresses) + (path is not None) == 1:
        raise next(iter(now.errors.values()))
    before = None
    if addresses:  # rates need two readings
        time.sleep(every_s)
        before, now = now, _read(path, addresses)
    whole = picture(now, before, str(path))
    if not is_live:
        _print(whole, out, as_json=as_json)
        return 1 if whole.errors else 0
    show = _print_json if as_json else _draw
    try:
        while True:
            show(whole, out)
            time.sleep(every_s)
            before, now = now, _read(path, addresses)
            whole = picture(now, before, str(path))
    except (KeyboardInterrupt, BrokenPipeError):
        return 1 if whole.errors else 0
    finally:
        if not as_json:
            out.write(_SHOW_CURSOR)
            out.flush()


def _read(path: Path | None, addresses: Sequence[str]) -> Reading:
    errors: dict[str, LayerKVError] = {}
    roster, servers = None, {}
    if path is not None:
        try:
            roster = read_roster(path, TIMEOUT_S)
        except BrokerError as error:
            errors[str(path)] = error
    for address in addresses:
        try:
            servers[address] = read_server(address, TIMEOUT_S)
        except LayerKVError as error:
            errors[address] = error
    return Reading(time.monotonic(), time.time(), roster, servers, errors)


def _print(whole: Picture, out: TextIO, *, as_json: bool) -> None:
    if as_json:
        _print_json(whole, out)
        return
    for line in lines(whole):
        out.write(f"{line}\n")
    out.flush()


def _print_json(whole: Picture, out: TextIO) -> None:
    out.write(msgspec.json.encode(whole).decode() + "\n")
    out.flush()


def _draw(whole: Picture, out: TextIO) -> None:
    width, height = shutil.get_terminal_size()
    at = time.strftime("%H:%M:%S", time.localtime(whole.at_unix_s))
    shown = [f"layerkv top, {at}; Ctrl-C ends it", *lines(whole)]
    if len(shown) > height - 1:
        shown = [*shown[: height - 2], f"... and {len(shown) - height + 2} more lines"]
    out.write(f"{_HIDE_CURSOR}{_HOME}" + "".join(f"{line[:width]}{_CLEAR_LINE}\r\n" for line in shown) + _CLEAR_BELOW)
    out.flush()
