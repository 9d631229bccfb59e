"""Asks a server for `/health` all through a load, and keeps the longest answer.

What it measures: from the moment a client connects, on a connection of its own, until it has the whole answer. vLLM's
front end answers by itself, without the engine's next step, so a long answer says that front end or client got no CPU,
or that the front end's loop was held up: readers of all streams waited as long. A thread of its own asks, so that
neither the generator's loop nor its sending delays it by more than the interpreter's switch interval.
"""

from __future__ import annotations

import contextlib
import threading
import time
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

import msgspec

INTERVAL_S = 0.1
# Nobody waits longer for one answer; it counts as one that took so long.
ANSWER_LIMIT_S = 60.0


class Probe(msgspec.Struct, frozen=True):
    """One question: asked `at_s` seconds into the load, and answered `took_s` seconds later."""

    at_s: float
    took_s: float


class HealthProbe:
    """Asks from `start` to `stop`, every `interval_s`, or as soon as the answer before is there; use once."""

    def __init__(self, url: str, *, interval_s: float = INTERVAL_S) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._start_s = 0.0
        self._asked_s: float | None = None
        self.longest: Probe | None = None
        """Of the answers that are there."""

    def start(self, start_s: float) -> None:
        """Begins; times count from `start_s`, on the machine's monotonic clock."""
        self._start_s = start_s
        threading.Thread(target=self._ask_until_ended, name="health probe", daemon=True).start()

    def stop(self) -> Probe | None:
        """The longest so far, a question without an answer yet included; None if the server never answered."""
        self._ended.set()
        asked_s = self._asked_s
        if asked_s is not None:
            self._keep(asked_s)
        return self.longest

    def _ask_until_ended(self) -> None:
        pause_s = 0.0
        while not self._ended.wait(pause_s):
            asked_s = self._asked_s = time.monotonic()
            try:
                self._ask()
            except TimeoutError:
                self._keep(asked_s)
            except (OSError, HTTPException):
                pass  # the server is gone, and whoever started it says how it ended
            else:
                self._keep(asked_s)
            self._asked_s = None
            pause_s = max(0.0, asked_s + self._interval_s - time.monotonic())

    def _ask(self) -> None:
        connection = HTTPConnection(self._host, self._port, timeout=ANSWER_LIMIT_S)
        with contextlib.closing(connection):
            connection.request("GET", "/health", headers={"Connection": "close"})
            connection.getresponse().read()

    def _keep(self, asked_s: float) -> None:
        took_s = time.monotonic() - asked_s
        if self.longest is None or took_s > self.longest.took_s:
            self.longest = Probe(asked_s - self._start_s, took_s)
