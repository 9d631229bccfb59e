"""Bytes and seconds as people write them; the only place where text and numbers are converted.

Pure functions, any process. Invariant: inside layerkv sizes are int bytes and durations are float seconds;
`parse_x(format_x(v))` gives `v` back up to the printed precision.
"""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import Final

__all__ = ["format_bytes", "format_seconds", "parse_bytes", "parse_seconds"]

# Decimal, so that 0.1s is the float 0.1 and 9007199254740993B loses no byte.
_BYTES_PER_UNIT: Final[Mapping[str, Decimal]] = MappingProxyType(
    {
        "TiB": Decimal(1024**4),
        "GiB": Decimal(1024**3),
        "MiB": Decimal(1024**2),
        "KiB": Decimal(1024),
        "TB": Decimal(1000**4),
        "GB": Decimal(1000**3),
        "MB": Decimal(1000**2),
        "KB": Decimal(1000),
        "B": Decimal(1),
    }
)
_SECONDS_PER_UNIT: Final[Mapping[str, Decimal]] = MappingProxyType(
    {"h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6")}
)
_QUANTITY: Final = re.compile(r"\s*(?P<number>[+-]?(\d+(\.\d*)?|\.\d+))\s*(?P<unit>[^\W\d]*)\s*", re.ASCII)

_BYTES_EXPECTED: Final = "a number of bytes or a size such as 8GiB (units: TiB, GiB, MiB, KiB, TB, GB, MB, KB, B)"
_SECONDS_EXPECTED: Final = "a number of seconds or a duration such as 500ms (units: h, m, s, ms, us)"


def parse_bytes(value: str | int) -> int:
    """Turn `8GiB`, `1.5 MB` or a whole number of bytes into bytes, rounded down.

    Raises:
        ValueError: negative, a float or text without a unit, or an unknown unit. The message names what was
            found and what was expected.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"found {value}, a negative size; expected {_BYTES_EXPECTED}")
        return value
    if not isinstance(value, str):
        raise ValueError(f"found {value!r} ({type(value).__name__}); expected {_BYTES_EXPECTED}")
    return int(_read_quantity(value, _BYTES_PER_UNIT, kind="size", expected=_BYTES_EXPECTED))


def parse_seconds(value: str | float) -> float:
    """Turn `500ms`, `30 s`, `2m` or a plain number of seconds into seconds.

    Raises:
        ValueError: negative, not finite, text without a unit, or an unknown unit. The message names what was
            found and what was expected.
    """
    if isinstance(value, str):
        quantity = _read_quantity(value, _SECONDS_PER_UNIT, kind="duration", expected=_SECONDS_EXPECTED)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        quantity = Decimal(str(value))
    else:
        raise ValueError(f"found {value!r} ({type(value).__name__}); expected {_SECONDS_EXPECTED}")
    seconds = float(quantity)
    if not math.isfinite(seconds):
        raise ValueError(f"found {_clip(value)}, which is not finite; expected {_SECONDS_EXPECTED}")
    if seconds < 0:
        raise ValueError(f"found {value}, a negative duration; expected {_SECONDS_EXPECTED}")
    return seconds


def format_bytes(size_bytes: float) -> str:
    """Write a size in the largest binary unit that keeps it at one or more: `8GiB`, `1.5MiB`, `12B`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        bytes_per_unit = int(_BYTES_PER_UNIT[unit])
        if abs(size_bytes) >= bytes_per_unit:
            return f"{_short(size_bytes / bytes_per_unit)}{unit}"
    return f"{_short(size_bytes)}B"


def format_seconds(duration_s: float) -> str:
    """Write a duration as people say it: `150us`, `500ms`, `1.25s`, `2m` (minutes from two on)."""
    # The thresholds allow for rounding to two decimals: 0.999999 s is written 1s, not 1000ms.
    if abs(duration_s) >= 120:
        return f"{_short(duration_s / 60)}m"
    if abs(duration_s) >= 0.999995 or duration_s == 0:
        return f"{_short(duration_s)}s"
    if abs(duration_s) >= 0.999995e-3:
        return f"{_short(duration_s * 1e3)}ms"
    return f"{_short(duration_s * 1e6)}us"


def _read_quantity(text: str, units: Mapping[str, Decimal], *, kind: str, expected: str) -> Decimal:
    """Return the quantity in base units (bytes or seconds); zero or more."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"found {_clip(text)}, which is not a {kind}; expected {expected}")
    unit = match["unit"]
    if not unit:
        raise ValueError(f"found {_clip(text)} without a unit; expected {expected}")
    if unit not in units:
        same_letters = [known for known in units if known.lower() == unit.lower()]
        close = same_letters or [known for known in units if known[0].lower() == unit[0].lower()]
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"found {_clip(text)} with the unknown unit {_clip(unit)}; expected {expected}{hint}")
    number = Decimal(match["number"])
    if number < 0:
        raise ValueError(f"found {_clip(text)}, a negative {kind}; expected {expected}")
    return number * units[unit]


def _clip(value: object) -> str:
    """`repr`, kept short enough for one line of an error message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _short(number: float) -> str:
    """At most two decimals, no trailing zeros, never an exponent."""
    text = f"{number:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
