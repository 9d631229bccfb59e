"""Prometheus' text format, as far as those need it who read `/metrics` beside a load or without its packages.

A full Prometheus parser takes ten times as long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)(?: -?\d+)?$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")


def samples(text: str, prefixes: tuple[str, ...]) -> Iterator[tuple[str, str, float]]:
    """Name, labels as they stand there, and value of each sample whose name begins with one of ``prefixes``.

    What is no sample is passed over.
    """
    for line in text.splitlines():
        if line.startswith(prefixes) and (match := _LINE.match(line)):
            try:
                value = float(match["value"])
            except ValueError:
                continue
            yield match["name"], match["labels"] or "", value


def labels_in(text: str) -> dict[str, str]:
    """The labels of a sample, without their quotes and escapes."""
    return {name: _ESCAPED.sub(_plain, value) if "\\" in value else value for name, value in _LABEL.findall(text)}


def _plain(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]
