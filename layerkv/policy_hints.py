"""What in an SLO policy is allowed and hardly meant: hints for whoever wrote it, not errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from layerkv.config import SloClass, SloPolicy
from layerkv.strict_yaml import join_path, show
from layerkv.units import format_seconds

SLOWEST_TPOT_S = 10.0
"""Nobody reads along at more than this per token."""

LEAST_DOUBTFUL_S: Mapping[str, float] = {"ttft": 10.0, "tpot": 1.0, "max_stall": 10.0, "max_lag": 10.0}
"""From so much on, a number without a unit is rather one of milliseconds, by key."""


def hints(policy: SloPolicy, document: Any, *, where: str) -> list[str]:
    """A line for each doubt.

    Args:
        policy: The policy,
        document: and the YAML that it was read from: what is written there as a number without a unit, and what is
            not written at all, a policy no longer says.
        where: The path of the document's top, such as ``slo.yaml: $``.
    """
    found: list[str] = []
    for slo in policy.classes.values():
        written = document["classes"][slo.name]
        found += _of_class(slo, written, where=join_path(f"{where}.classes", slo.name))
    return found


def _of_class(slo: SloClass, written: Mapping[str, Any], *, where: str) -> Iterator[str]:
    for key, least_s in LEAST_DOUBTFUL_S.items():
        value = written.get(key)
        if isinstance(value, (int, float)) and value >= least_s:
            yield (
                f"{where}.{key}: found {show(value)} without a unit: {value:g} s; write {value:g}ms if milliseconds "
                f'are meant, else "{value:g}s"'
            )
    if "tpot" in written:
        if slo.tpot_s > SLOWEST_TPOT_S:
            yield (
                f"{where}.tpot: found {format_seconds(slo.tpot_s)} per token, at which nobody reads along; expected at "
                f"most {format_seconds(SLOWEST_TPOT_S)}; leave it out if the answer is used when it is whole"
            )
        elif slo.tpot_s > slo.ttft_s:
            yield (
                f"{where}.tpot: found {format_seconds(slo.tpot_s)}, more than ttft ({format_seconds(slo.ttft_s)}): "
                "each token may take longer than the first; expected less; are the two swapped?"
            )
    if "max_lag" in written and not slo.has_reader:
        yield (
            f"{where}.max_lag: found {show(written['max_lag'])} where nobody reads along "
            f"({'no tpot' if slo.stream else 'stream: false'}): it has no effect; leave it out"
        )
    if slo.max_stall_s is not None and slo.max_stall_s < slo.tpot_s and "tpot" in written:
        yield (
            f"{where}.max_stall: found {format_seconds(slo.max_stall_s)}, less than tpot "
            f"({format_seconds(slo.tpot_s)}): every token would have to come sooner than it is due; expected more"
        )
