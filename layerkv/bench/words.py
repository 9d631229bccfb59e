"""How benchmarks write figures: durations, ratios, what counts as the same, and what stands for a missing one."""

from __future__ import annotations

# Two engines whose times differ by less than this share are called equal: repeated runs differ by as much.
SAME_WITHIN = 0.05
MISSING = "-"
# Readers do not notice less than this in a whole answer.
NOTABLE_WAIT_S = 0.1


def format_duration(duration_s: float) -> str:
    """Three digits with the unit that suits: `0.52 ms`, `12.3 ms`, `1.23 s`, `37.3 s`."""
    if duration_s == 0:
        return "0 s"
    value, unit = (duration_s, "s") if abs(duration_s) >= 0.9995 else (duration_s * 1e3, "ms")
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def format_ratio(ratio: float) -> str:
    """`0.97`, `1.05`, `8.3`, `25`: as many digits as a ratio of measured times deserves."""
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


def is_same(ratio: float) -> bool:
    """Whether a ratio is as near to 1 as repeated runs are to each other."""
    return 1 / (1 + SAME_WITHIN) <= ratio <= 1 + SAME_WITHIN


def share(value: float) -> str:
    """A share in per cent, for a table."""
    return f"{value:.1%}" if value < 1 else "100%"


def seconds(value: float | None) -> str:
    """A time in three digits, for a table."""
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
