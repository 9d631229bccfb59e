"""`layerkv doctor`: what is installed here, whether layerkv can work with it, and what to do where it cannot; with a
checkpoint, what its configuration means here.

Runs in a process of its own and changes nothing. Invariant: a check never raises; whatever goes wrong inside
it is what it reports.
"""

import contextlib
import ctypes
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Final, Literal, TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerkv.bench.machine import Machine, installed_versions
from layerkv.config import SloPolicy, load_policy
from layerkv.device import libc
from layerkv.doctor_facts import ModelFacts, Question, groups_table, model_rows, one_line
from layerkv.errors import ConfigError, IncompatibleVLLMError
from layerkv.units import format_bytes, format_seconds

__all__ = ["Check", "examine", "run_doctor"]

PLUGIN_GROUP: Final = "vllm.general_plugins"
_ASKED_FOR_A_MODEL: Final = ("torch", "vLLM", "vLLM platform", "vLLM surfaces")

# A note is something to know that stops nothing.
Verdict: TypeAlias = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report. `advice` says what to do about a problem, and is empty otherwise."""

    subject: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


def run_doctor(
    policy_path: str | None = None,
    *,
    question: Question | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Examine this installation, print the report, and return 0 if nothing stands in the way, else 1.

    With a question, a checkpoint's configuration as well; as JSON, everything as one object.
    """
    console = console or Console()
    # The report is about vLLM; vLLM's own remarks while it is imported would drown it.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if question is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported: nothing is looked up
    facts = None
    # What others print is no part of the report.
    with contextlib.redirect_stdout(sys.stderr) if as_json else console.status("importing torch and vLLM"):
        checks = list(examine())
        if question is not None:
            facts, check = _check_model(question, checks)
            checks.append(check)
    policy = None
    if policy_path is not None:
        policy, check = _check_policy(policy_path)
        checks.append(check)
    if policy is not None:
        checks.extend(_check_smooth(policy))
    problems = [check for check in checks if check.verdict == "problem"]
    if as_json:
        model = None if facts is None else facts.as_json()
        print(json.dumps({"checks": [asdict(check) for check in checks], "model": model}, indent=1))
        return 1 if problems else 0
    _print_checks(checks, console)
    if facts is not None:
        _print_model(facts, console)
    if policy is not None:
        _print_classes(policy, console)
    for check in problems:
        console.print(f"[bold]{check.subject}:[/bold] {escape(check.advice)}", highlight=False, soft_wrap=True)
    if not problems:
        console.print("Everything is all right.", highlight=False)
    return 1 if problems else 0


def examine() -> Iterator[Check]:
    """Check versions, vLLM's surfaces, the plugin's registration, and the memory of this machine."""
    versions = installed_versions()
    yield Check(subject="Python", found=versions["python"])
    yield Check(subject="layerkv", found=versions["layerkv"])
    yield from _guarded("torch", lambda: _check_torch(versions["torch"]))
    yield from _guarded("vLLM", lambda: _check_vllm(versions["vllm"]))
    yield from _guarded("plugin", _check_plugin)
    machine = Machine.here()
    yield Check(subject="machine", found=f"{format_bytes(machine.memory_bytes)}, {machine.num_cpus} CPUs")
    yield from _guarded("lane aliasing (CPU)", _check_aliasing)


def _guarded(subject: str, check: Callable[[], list[Check]]) -> list[Check]:
    """Run a check that imports or maps something; a broken installation may raise anything there."""
    try:
        return check()
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        return [Check(subject=subject, found=found, verdict="problem", advice="mend or reinstall it")]


def _check_torch(version: str) -> list[Check]:
    if version == "not installed":
        return [_missing("torch")]
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cuda = Check(subject="CUDA device", found=", ".join(devices) or "none visible", verdict="ok" if devices else "note")
    return [Check(subject="torch", found=version), cuda]


def _check_vllm(version: str) -> list[Check]:
    """Whether this vLLM, its platform, and what the adapter uses of it are what layerkv was made for."""
    if version == "not installed":
        return [_missing("vLLM")]
    from layerkv.vllm_plugin.compat import ALLOW_UNTESTED, SUPPORTED_VLLM, check_surfaces, check_version
    from layerkv.vllm_plugin.our_classes import OUR_WORKERS

    try:
        untested = check_version(version, allow_untested=True)
    except IncompatibleVLLMError as error:
        return [Check(subject="vLLM", found=version, verdict="problem", advice=str(error))]
    checks = [Check(subject="vLLM", found=f"{version} (supported: {', '.join(SUPPORTED_VLLM)})")]
    if untested is not None:
        found = f"{version} was not tested ({', '.join(SUPPORTED_VLLM)} were): set {ALLOW_UNTESTED} to run it"
        checks = [Check(subject="vLLM", found=found, verdict="note")]

    from vllm.platforms import current_platform

    platform = current_platform.device_type or "none"
    advice = "" if platform in OUR_WORKERS else f"run a vLLM built for {', '.join(OUR_WORKERS)}: no other yet"
    verdict: Verdict = "problem" if advice else "ok"
    checks.append(Check(subject="vLLM platform", found=platform, verdict=verdict, advice=advice))

    changed = [f"{problem.what} {problem.why}" for problem in check_surfaces()]
    advice = f"reinstall a supported vLLM; {'; '.join(changed)}" if changed else ""
    verdict = "problem" if changed else "ok"
    found = f"{len(changed)} missing or changed" if changed else "all there"
    return [*checks, Check(subject="vLLM surfaces", found=found, verdict=verdict, advice=advice)]


def _check_plugin() -> list[Check]:
    """Whether vLLM will load layerkv: registered once, and not filtered out."""
    entry_points = metadata.entry_points(group=PLUGIN_GROUP, name="layerkv")
    allowed = os.environ.get("VLLM_PLUGINS")
    if len(entry_points) != 1:
        found = f"registered {len(entry_points)} times in {PLUGIN_GROUP}"
        advice = "install layerkv with pip into this environment, once"
        return [Check(subject="plugin", found=found, verdict="problem", advice=advice)]
    if allowed is not None and "layerkv" not in allowed.split(","):
        advice = "add layerkv to VLLM_PLUGINS, or unset it"
        found = f"left out by VLLM_PLUGINS={allowed}"
        return [Check(subject="plugin", found=found, verdict="problem", advice=advice)]
    return [Check(subject="plugin", found=f"registered in {PLUGIN_GROUP}")]


def _check_aliasing() -> list[Check]:
    """Map one file at two addresses of a reserved range, as a lane is; each must show the other's bytes."""
    size_bytes = mmap.PAGESIZE
    file = os.memfd_create("layerkv-doctor", os.MFD_CLOEXEC)
    address = libc.reserve(2 * size_bytes)
    try:
        os.ftruncate(file, size_bytes)
        libc.map_shared_at(address, size_bytes, file, 0)
        libc.map_shared_at(address + size_bytes, size_bytes, file, 0)
        ctypes.memset(address, 0x5A, 1)
        works = ctypes.string_at(address + size_bytes, 1) == b"\x5a"
    finally:
        libc.unmap(address, 2 * size_bytes)
        os.close(file)
    if works:
        return [Check(subject="lane aliasing (CPU)", found="memfd and mmap work")]
    advice = "layerkv cannot run on vLLM's CPU platform with this kernel; use a Linux kernel without emulation"
    return [Check(subject="lane aliasing (CPU)", found="mapped, but not aliased", verdict="problem", advice=advice)]


def _check_model(question: Question, before: list[Check]) -> tuple[ModelFacts | None, Check]:
    """What a checkpoint's configuration means here; not asked where vLLM itself is a problem."""
    broken = [check.subject for check in before if check.verdict == "problem" and check.subject in _ASKED_FOR_A_MODEL]
    if broken:
        advice = f"mend {', '.join(broken)} first: it is vLLM that is asked"
        return None, Check(subject="model", found="not looked at", verdict="problem", advice=advice)
    try:
        from layerkv.doctor_model import examine_model

        facts = examine_model(question)
    except ConfigError as error:
        return None, Check(subject="model", found=str(question.folder), verdict="problem", advice=str(error))
    except Exception as error:  # a broken installation may raise anything
        advice = f"{type(error).__name__}: {one_line(error)}; start vLLM with this model to see more"
        return None, Check(subject="model", found=str(question.folder), verdict="problem", advice=advice)
    advice = " ".join("; and: ".join(facts.problems).split())
    verdict: Verdict = "problem" if advice else "ok"
    return facts, Check(subject="model", found=facts.folder, verdict=verdict, advice=advice)


def _check_policy(path: str) -> tuple[SloPolicy | None, Check]:
    try:
        policy = load_policy(path)
    except ConfigError as error:
        return None, Check(subject="policy", found=path, verdict="problem", advice=str(error))
    return policy, Check(subject="policy", found=f"{path}: default class {policy.default_class}")


def _check_smooth(policy: SloPolicy) -> list[Check]:
    """Whether somebody paces the streams of classes that ask for it is told by a server's flags only."""
    from layerkv.vllm_plugin.our_classes import SMOOTH_MIDDLEWARE

    asking = ", ".join(slo.name for slo in policy.classes.values() if slo.smooth)
    found = f"asked for by {asking}: give `vllm serve` --middleware {SMOOTH_MIDDLEWARE}"
    return [Check(subject="smooth", found=found, verdict="note")] if asking else []


def _missing(subject: str) -> Check:
    advice = (
        "from layerkv's folder: pip install '.[cpu]' --extra-index-url https://download.pytorch.org/whl/cpu "
        "(or '.[cuda]' on a machine with a CUDA device)"
    )
    return Check(subject=subject, found="not installed", verdict="problem", advice=advice)


def _print_checks(checks: list[Check], console: Console) -> None:
    style = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table(title="layerkv doctor", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for check in checks:
        table.add_row(check.subject, escape(check.found), f"[{style[check.verdict]}]{check.verdict}")
    console.print(table)


def _print_model(facts: ModelFacts, console: Console) -> None:
    table = Table(title=f"model {escape(facts.folder)}", title_justify="left", show_header=False)
    table.add_column("subject", no_wrap=True)
    table.add_column("found", overflow="fold")
    for subject, found in model_rows(facts):
        table.add_row(subject, escape(found))
    console.print(table)
    if not facts.groups:
        return
    table = Table(title="KV-cache groups", title_justify="left")
    for title in ("group", "keeps", "layers", "tokens of a block", "a layer's page", "KV of a token"):
        table.add_column(title, justify="left" if title == "keeps" else "right", no_wrap=title == "group")
    for row in groups_table(facts):
        table.add_row(*map(escape, row))
    console.print(table)


def _print_classes(policy: SloPolicy, console: Console) -> None:
    table = Table(title="SLO classes", title_justify="left")
    table.add_column("class", overflow="fold")
    for title in ("ttft", "tpot", "max_lag", "weight", "max_stall", "overload"):
        table.add_column(title, justify="right", no_wrap=True)
    for slo in policy.classes.values():
        name = f"{slo.name} (default)" if slo.name == policy.default_class else slo.name
        stall = "" if slo.max_stall_s is None else format_seconds(slo.max_stall_s)
        tpot = format_seconds(slo.tpot_s) if slo.tpot_s < math.inf else ""
        lag = format_seconds(slo.max_lag_s) if slo.has_reader else ""
        promises = (format_seconds(slo.ttft_s), tpot, lag, f"{slo.weight:g}", stall, slo.overload)
        table.add_row(escape(name), *promises)
    console.print(table)
