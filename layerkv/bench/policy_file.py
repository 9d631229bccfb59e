"""Writes an SLO policy as the YAML file that an engine is given."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from layerkv.config import SloPolicy


def write_policy(policy: SloPolicy, path: Path) -> Path:
    """Writes `policy` to `path`, which is returned: `load_policy` reads an equal policy from it."""
    classes: dict[str, dict[str, Any]] = {}
    for slo in policy.classes.values():
        promises: dict[str, Any] = {"ttft": slo.ttft_s, "tpot": slo.tpot_s, "weight": slo.weight}
        promises["overload"] = slo.overload
        promises |= {"max_lag": slo.max_lag_s, "stream": slo.stream, "smooth": slo.smooth, "max_stall": slo.max_stall_s}
        # What is not promised is not in the file: no bound for stalls, nor for the time per token.
        classes[slo.name] = {key: value for key, value in promises.items() if value not in (None, math.inf)}
    document = {
        "version": 1,
        "default_class": policy.default_class,
        "classes": classes,
        "streamed_decode": policy.streamed_decode,
        "compare": {"policy": policy.policy, "length_prediction": policy.length_prediction},
    }
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path
