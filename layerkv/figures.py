"""What every figure means, once: for the simulator, the benchmarks and `/metrics`.

Times are seconds. A percentile is the linear interpolation between the two nearest of the ordered samples (numpy's
default, Hyndman and Fan's type 7).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from layerkv.config import SloClass

PERCENTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of the samples lie.

    Args:
        ordered: At least one sample, in ascending order.
        share: Which percentile, as a share.
    """
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    if low + 1 >= len(ordered):
        return ordered[-1]
    return ordered[low] + (ordered[low + 1] - ordered[low]) * (at - low)


def distribution(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and percentiles of the values that are there; None if none is."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    found = {"mean": math.fsum(ordered) / len(ordered)}
    found.update((name, percentile(ordered, share)) for name, share in PERCENTILES)
    return found


def tpot_s(first_token_s: float, last_token_s: float, num_tokens: int) -> float | None:
    """Mean time per output token after the first; None with fewer than two tokens."""
    return (last_token_s - first_token_s) / (num_tokens - 1) if num_tokens > 1 else None


def met_ttft(slo: SloClass, ttft_s: float | None) -> bool:
    """Whether the first token came in time."""
    return ttft_s is not None and ttft_s <= slo.ttft_s


def met_slo(slo: SloClass, ttft_s: float | None, tpot_s: float | None, longest_gap_s: float) -> bool:
    """Whether a finished request met all objectives of its class.

    Args:
        slo: The class.
        ttft_s: Arrival to first token; None if none came.
        tpot_s: Mean time per token after the first; None with fewer than two.
        longest_gap_s: Longest time between two of its tokens: it counts where the class has a ``max_stall``.
    """
    return (
        met_ttft(slo, ttft_s)
        and (tpot_s is None or tpot_s <= slo.tpot_s)
        and (slo.max_stall_s is None or longest_gap_s <= slo.max_stall_s)
    )
