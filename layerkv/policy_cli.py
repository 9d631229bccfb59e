"""`layerkv policy check` and `layerkv policy reload`."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console

from layerkv.config import SloClass, SloPolicy, load_policy, load_policy_document, parse_policy
from layerkv.errors import LayerKVError
from layerkv.policy_hints import hints
from layerkv.runtime import ring, running_engines
from layerkv.units import format_seconds


def run_check(path: Path, console: Console | None = None) -> int:
    """Check a policy file and print what it promises, and what in it is hardly meant.

    Raises:
        ConfigError: the file is wrong.
    """
    console = console or Console()
    document = load_policy_document(path)
    policy = parse_policy(document, where=f"{path}: $")
    warnings = [f"warning: {hint}" for hint in hints(policy, document, where=f"{path}: $")]
    for line in [*describe(policy), *warnings]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return 0


def run_reload(pid: int | None, console: Console | None = None) -> int:
    """Have running engines read their policy files again; an invalid file is refused here and nobody is told.

    Raises:
        ConfigError: a policy file is wrong.
        LayerKVError: no such engine.
    """
    console = console or Console()
    engines = [engine for engine in running_engines() if pid is None or engine.pid == pid]
    if not engines:
        which = (
            "no engine with a policy file runs here" if pid is None else f"no engine with process id {pid} runs here"
        )
        raise LayerKVError(f"{which} (as this user); start one with policy in kv_connector_extra_config")
    for engine in engines:
        load_policy(engine.policy_path)
    for engine in engines:
        try:
            ring(engine.announcement)
        except OSError as error:
            raise LayerKVError(f"engine {engine.pid} cannot be told: {error.strerror or error}") from None
        console.print(f"engine {engine.pid}: told to read {engine.policy_path} again", highlight=False, soft_wrap=True)
    return 0


def describe(policy: SloPolicy) -> list[str]:
    """The policy in plain words, a line per class."""
    lines = []
    for slo in policy.classes.values():
        stall = "" if slo.max_stall_s is None else f", never more than {format_seconds(slo.max_stall_s)} between tokens"
        late = "refused" if slo.overload == "reject" else "served behind the others"
        pace = ", streamed at that pace" if slo.smooth else ""
        default = " (default)" if slo.name == policy.default_class else ""
        lines.append(
            f"{slo.name}{default}: first token within {format_seconds(slo.ttft_s)}, {_pace(slo)}{pace}{stall}; "
            f"weight {slo.weight:g}; when late, {late}"
        )
    return lines


def _pace(slo: SloClass) -> str:
    if slo.tpot_s == math.inf:
        return "the rest when it is ready (nobody reads along)"
    if not slo.stream:
        return f"then {format_seconds(slo.tpot_s)} per token on average (nobody reads along)"
    waits = f"waits of {format_seconds(slo.max_lag_s)} in all" if slo.max_lag_s else "no wait"
    return f"then {format_seconds(slo.tpot_s)} per token, {waits} at most"
