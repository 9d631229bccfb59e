"""A case on a slower machine than the one it was sized on: all its times longer by one factor, so that the load asks
as much of this machine as the case meant to ask. What remains of the case is its ratios."""

from __future__ import annotations

import math
from dataclasses import replace

from msgspec.structs import replace as with_fields

from layerkv.bench.suite.case import Case, Point
from layerkv.config import SloClass
from layerkv.errors import ConfigError

__all__ = ["stretched"]


def stretched(case: Case, factor: float) -> Case:
    """The case with arrivals `factor` times slower, and objectives, lags and thinking `factor` times longer.

    Numbers of requests and tokens, memory and the names of points stay; a note of the result says what was done.

    Raises:
        ConfigError: the factor is not a number above zero.
    """
    if not (0 < factor < math.inf):
        raise ConfigError(f"--stretch: found {factor:g}; expected a number above zero; set it to 2, say")
    if factor == 1:
        return case
    classes = {name: _longer(each, factor) for name, each in case.policy.classes.items()}
    note = (
        f"All times of the case were stretched by {factor:g}: arrivals {factor:g} times slower than points are "
        f"named, objectives, lags and thinking {factor:g} times longer."
    )
    return replace(
        case,
        policy=with_fields(case.policy, classes=classes),
        points=tuple(_slower(point, factor) for point in case.points),
        notes=(*case.notes, note),
    )


def _longer(each: SloClass, factor: float) -> SloClass:
    return with_fields(
        each,
        ttft_s=each.ttft_s * factor,
        tpot_s=each.tpot_s * factor,
        max_lag_s=each.max_lag_s * factor,
        max_stall_s=None if each.max_stall_s is None else each.max_stall_s * factor,
    )


def _slower(point: Point, factor: float) -> Point:
    sessions = point.sessions and replace(point.sessions, think_s=point.sessions.think_s * factor)
    return replace(point, rate_per_s=point.rate_per_s / factor, sessions=sessions)
