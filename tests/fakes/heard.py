"""What a logger is told while a test listens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heard_by(logger: logging.Logger) -> Iterator[list[str]]:
    """The messages that this logger gets inside, also where it does not pass them on."""
    heard: list[str] = []

    class Hears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    handler = Hears()
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)
