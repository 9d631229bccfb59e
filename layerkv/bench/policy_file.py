"""Writes an SLO policy as the YAML file that an engine is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from layerkv.config import SloPolicy


def write_policy(policy: SloPolicy, path: Path) -> Path:
    """Writes `policy` to `path`, which is returned: `load_policy` reads an equal policy from it."""
    classes: dict[str, dict[str, Any]] = {}
    for slo in policy.classes.values():
        promises = {"ttft": slo.ttft_s, "tpot": slo.tpot_s, "weight": slo.weight, "overload": slo.overload}
        promises |= {"smooth": slo.smooth}
        classes[slo.name] = promises if slo.max_stall_s is None else {**promises, "max_stall": slo.max_stall_s}
    document = {
        "version": 1,
        "default_class": policy.default_class,
        "classes": classes,
        "streamed_decode": policy.streamed_decode,
        "compare": {"policy": policy.policy, "length_prediction": policy.length_prediction},
    }
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path
