"""`layerkv broker`."""

from __future__ import annotations

import contextlib
import resource
import signal
from pathlib import Path

from rich.console import Console

from layerkv.broker.server import Broker
from layerkv.broker.sockets import default_path
from layerkv.errors import ConfigError
from layerkv.units import format_bytes, parse_bytes


def run_broker(socket: Path | None, capacity: str, host_capacity: str | None, console: Console | None = None) -> int:
    """Divide memory between engines until a signal ends it.

    Raises:
        ConfigError: a size is wrong.
        BrokerError: another broker has that path, or it cannot be made.
    """
    console = console or Console()
    device_bytes = _size(capacity, "--capacity")
    host_bytes = None if host_capacity is None else _size(host_capacity, "--host-capacity")
    path = socket or default_path()

    def say(line: str) -> None:
        line = "".join(letter if letter.isprintable() else "?" for letter in line)  # names are the engines'
        with contextlib.suppress(OSError, SystemExit):  # nobody reads it any more: no reason to leave engines alone
            console.print(line, highlight=False, soft_wrap=True, markup=False)

    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: signals.append(got))
    _, most_descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_descriptors, most_descriptors))  # one per process of each engine
    broker = Broker(path, device_bytes, host_bytes, log=say)
    host = "" if host_bytes is None else f" and {format_bytes(host_bytes)} of host memory"
    say(f"broker at {path}: {format_bytes(device_bytes)} of device memory{host}")
    try:
        broker.run(lambda: bool(signals))
    finally:
        broker.close()
    return 0


def _size(text: str, flag: str) -> int:
    try:
        # In a shell everything is text: digits alone are bytes, as a bare number is in a file.
        num_bytes = parse_bytes(int(text) if text.isascii() and text.isdigit() else text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from None
    if not num_bytes:
        raise ConfigError(f"{flag}: found {text!r}; expected more than nothing")
    return num_bytes
