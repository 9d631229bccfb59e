"""What engines gain that share their KV memory, and what it costs: `layerkv bench sharing`.

Runs in the command's process. Its parts, each of which can be run alone:

- `bursts`: bursts that come to one of several engines after the other, with stock vLLM and layerkv that have a part of
  the memory each, and with layerkv and a broker before it;
- `give`: an engine full of live decodes gives memory to bursts on another one, in four ways;
- `idle`: what an engine gives back that nobody uses, and the first tokens after that;
- `constant`: what a step of an elastic engine costs beside one of a static engine;
- `resize`: how fast memory comes and goes, and what that does to steps.

In the first three, engines are real servers (`vllm serve`) with a load generator each; ways alternate seed by seed.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import psutil
from rich.console import Console

from layerkv.bench.load import PlannedRequest
from layerkv.bench.machine import measured_here, source_commit
from layerkv.bench.priorities import allowed_here
from layerkv.bench.records import LoadRun, write_json
from layerkv.bench.sharing_constant import measure_constant_load
from layerkv.bench.sharing_figures import HeldSample, IdleSeen, Runs, last_token_s
from layerkv.bench.sharing_load import (
    BURSTS,
    DONOR,
    GIVE,
    MOST_PERIOD_S,
    PERIOD_S,
    TAKEN_AT,
    WITHIN_S,
    Bursts,
    Setting,
    give_planned,
    idle_planned,
    planned,
)
from layerkv.bench.sharing_resize import measure_arena, measure_steps
from layerkv.bench.sharing_result import GIVES, SharingResult, set_bursts, set_give, set_idle
from layerkv.bench.sharing_servers import Group, Way, shared, split, started
from layerkv.bench.sharing_tables import print_part
from layerkv.broker.watch import read_roster
from layerkv.errors import BrokerError, ConfigError

PARTS = ("bursts", "give", "idle", "constant", "resize")
LOOK_EVERY_S = 0.05
LOOK_LIMIT_S = 1.0

Load: TypeAlias = Callable[[int, int], list[PlannedRequest]]
"""What an engine gets with a seed."""


def run_sharing(
    json_path: Path | None,
    *,
    num_engines: int,
    burst_requests: int,
    period_s: float = PERIOD_S,
    num_seeds: int,
    only: Sequence[str] = (),
) -> int:
    """Measure, print tables, and write JSON if asked to: anew after each part, so that a later one costs no result.

    `only` names parts, each text one or several with commas between; without, all are run. Returns the command's exit
    status: 1 if tokens differ.

    Raises:
        ConfigError: a part or a number is not one.
        LayerKVError: an engine or a request failed. Nothing that was started runs any more.
    """
    parts, bursts = chosen_parts(only), Bursts(num_engines, burst_requests, period_s)
    _check_numbers(bursts, num_seeds)
    console, seeds = Console(), list(range(num_seeds))
    result = SharingResult(
        parts=[],
        engines=num_engines,
        burst_requests=burst_requests,
        period_s=period_s,
        priorities=allowed_here(),
        seeds=seeds,
        commit=source_commit(),
        **measured_here(),
    )
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        console.print(f"{part}:", highlight=False)
        with tempfile.TemporaryDirectory(prefix="layerkv-sharing-") as name:
            _measure(part, result, bursts, seeds, Path(name), console)
        result.parts.append(part)
        print_part(part, result, console)
        if json_path is not None:
            write_json(result, json_path)
    return 1 if result.tokens_equal is False else 0


def chosen_parts(only: Sequence[str]) -> list[str]:
    """The parts that are named, in the order in which they are run; all where none is.

    Raises:
        ConfigError: there is no such part.
    """
    named = [name.strip() for text in only for name in text.split(",")]
    if unknown := [name for name in named if name not in PARTS]:
        raise ConfigError(f"--only: found {unknown[0]!r}; expected some of {', '.join(PARTS)}, with commas between")
    return [part for part in PARTS if part in named or not named]


def _check_numbers(bursts: Bursts, num_seeds: int) -> None:
    most_engines = BURSTS.capacity_bytes // (2 * BURSTS.floor_bytes)
    for flag, found, least, most in (
        ("--engines", bursts.num_engines, 2, most_engines),
        ("--burst", bursts.burst_requests, 1, 1000),
        ("--seeds", num_seeds, 1, 1000),
    ):
        if not least <= found <= most:
            raise ConfigError(f"{flag}: found {found}; expected {least} to {most}")
    if not WITHIN_S <= bursts.period_s <= MOST_PERIOD_S:
        raise ConfigError(f"--period: found {bursts.period_s:g}; expected {WITHIN_S:g} to {MOST_PERIOD_S:g} seconds")


def _measure(
    part: str, result: SharingResult, bursts: Bursts, seeds: Sequence[int], folder: Path, console: Console
) -> None:
    """Run one part; its figures are the result's afterwards."""
    match part:
        case "bursts":
            ways = [
                split("static_stock", "stock", BURSTS, bursts.num_engines),
                split("static", "layerkv", BURSTS, bursts.num_engines),
                shared("shared", BURSTS, bursts.num_engines),
            ]
            num_engines = bursts.num_engines
            load = partial(planned, bursts)
            set_bursts(result, _run_ways(ways, BURSTS, num_engines, lambda _: load, seeds, folder, console))
        case "give":
            ways = [
                split("nothing", "layerkv", GIVE, 2),
                *(shared(name, GIVE, 2, compare={"give": name}) for name in GIVES[1:]),
            ]
            prepare = partial(_prepare_give, result, console)
            set_give(result, _run_ways(ways, GIVE, 2, prepare, seeds, folder, console))
        case "idle":
            set_idle(result, _run_idle(seeds, folder, console))
        case "constant":
            result.constant_load = measure_constant_load(len(seeds), folder)
        case _:
            result.resize_ms_per_gib = measure_arena()
            result.resizing_steps = measure_steps(folder)
            result.step_over_median_while_resizing = result.resizing_steps.over_median


def _run_ways(
    ways: Sequence[Way],
    setting: Setting,
    num_engines: int,
    prepare: Callable[[Mapping[str, Group]], Load],
    seeds: Sequence[int],
    folder: Path,
    console: Console,
) -> dict[str, Runs]:
    """The same loads through each way, seed by seed; every second seed has the order turned around.

    `prepare` makes the loads, and may look at the servers before.
    """
    runs: dict[str, dict[int, dict[int, LoadRun]]] = {way.name: {} for way in ways}
    console.print(f"  starting {len(ways) * num_engines} servers", highlight=False)
    with started(ways, setting, num_engines, folder) as groups:
        load = prepare(groups)
        for seed in seeds:
            for way in ways if seed % 2 == 0 else ways[::-1]:
                console.print(f"  seed {seed}: {way.name}", highlight=False)
                loaded = groups[way.name].run([load(engine, seed) for engine in range(num_engines)], seed)
                runs[way.name][seed] = {engine: found.run for engine, found in loaded.items()}
    return dict(runs)


def _prepare_give(result: SharingResult, console: Console, groups: Mapping[str, Group]) -> Load:
    """How long the donor takes alone says when the bursts come, whatever machine this is."""
    console.print("  how long the donor takes alone", highlight=False)
    alone = groups["nothing"].run([give_planned((), DONOR, seed=-1)], seed=-1)[DONOR].run
    alone_s = last_token_s(alone.requests)
    result.give_bursts_at_s = [share * alone_s for share in TAKEN_AT]
    return partial(give_planned, result.give_bursts_at_s)


def _run_idle(seeds: Sequence[int], folder: Path, console: Console) -> list[IdleSeen]:
    """One engine alone, with a broker that would give it all, and one that has the same memory for good."""
    ways = [split("static", "layerkv", BURSTS, 1), shared("elastic", BURSTS, 1)]
    seen: list[IdleSeen] = []
    console.print(f"  starting {len(ways)} servers", highlight=False)
    with started(ways, BURSTS, 1, folder) as groups:
        for seed in seeds:
            console.print(f"  seed {seed}", highlight=False)
            loaded = {}
            samples: list[HeldSample] = []
            for way in ways if seed % 2 == 0 else ways[::-1]:
                with _watched(groups[way.name], samples):
                    loaded[way.name] = groups[way.name].run([idle_planned(seed)], seed)[0]
            start_s = loaded["elastic"].start_s
            held = [sample._replace(at_s=sample.at_s - start_s) for sample in samples]
            seen.append(IdleSeen(loaded["static"].run, loaded["elastic"].run, held))
    return seen


@contextlib.contextmanager
def _watched(group: Group, samples: list[HeldSample]) -> Iterator[None]:
    """What the broker says that the group's engines hold, again and again; nothing where there is none."""
    if group.socket is None:
        yield
        return
    socket, is_over = group.socket, threading.Event()

    def look() -> None:
        while not is_over.wait(LOOK_EVERY_S):
            with contextlib.suppress(BrokerError):  # whoever runs the load finds out that it has gone
                roster = read_roster(socket, LOOK_LIMIT_S)
                held_bytes = sum(entry.device.held for entry in roster.engines if entry.device is not None)
                available_bytes = psutil.virtual_memory().available
                samples.append(HeldSample(time.monotonic(), held_bytes, available_bytes))

    watcher = threading.Thread(target=look, name="watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
