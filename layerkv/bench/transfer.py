"""`layerkv bench transfer`: how fast blocks are copied beside plain memcpy, and how much of it compute hides.

Real arenas, host memory, transfer engines and lane schedules, without a model. Each figure is a median of rounds in
which the copy and its bound take turns, so that a busy machine slows both alike.
"""

from __future__ import annotations

import ctypes
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch
from rich.console import Console

from layerkv.bench.machine import Machine, measured_here
from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun, StepPlan, merge_runs
from layerkv.device.base import Direction
from layerkv.device.lane_schedule import LaneSchedule
from layerkv.device.mechanism import Mechanism, make_mechanism

FRAGMENTS = tuple(size << 10 for size in (4, 16, 64, 256, 1024))
VOLUME = {"cpu": 128 << 20, "cuda": 1 << 30}
"""Bytes of one copy: far more than caches hold."""
ROUNDS = 9
RATE_LAYERS = 8

LANES = (1, 2, 3)
CHUNK_TOKENS = (128, 512, 2048)
EARLIER_CHUNKS = 3
"""A step of the overlap's prefill loads as many chunks as that and stores its own."""
NUM_LAYERS = 12
BLOCK_TOKENS = 32
HIDDEN = {"cpu": 192, "cuda": 4096}
KV_WIDTH = {"cpu": 128, "cuda": 1024}
"""Keys (and values) per token and layer: those of the demo's model, and of an 8B model."""
STEPS = 4

BOTH = "both"
PIN_LIMIT_S = 60.0


def run_transfer(json_path: Path | None, *, console: Console | None = None, quick: bool = False) -> int:
    """Measure, print, and write the JSON file if one is named; returns the exit status."""
    console = console or Console()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fragments, rounds = (FRAGMENTS[1:3], 3) if quick else (FRAGMENTS, ROUNDS)
    rows = [row for fragment in fragments for row in measure_rates(device, fragment, rounds=rounds)]
    for row in rows:
        share = row["gb_per_s"] / row["memcpy_gb_per_s"]
        console.print(
            f"{row['direction']:5} in pieces of {row['fragment_bytes'] >> 10:4d} KiB: {row['gb_per_s']:6.2f} GB/s, "
            f"plain copy {row['memcpy_gb_per_s']:6.2f} GB/s, {share:.0%}"
        )
    chunks, lanes = (CHUNK_TOKENS[1:2], LANES[:2]) if quick else (CHUNK_TOKENS, LANES)
    overlap = [measure_overlap(device, n, chunk, rounds=rounds) for chunk in chunks for n in lanes]
    for figure in overlap:
        console.print(
            f"{figure['lanes']} lanes, chunks of {figure['chunk_tokens']:4d} tokens: {figure['hidden_fraction']:.0%} "
            f"of {figure['copy_ms']:.2f} ms of copies hidden behind {figure['compute_ms']:.1f} ms of compute"
        )
    result: dict[str, Any] = {
        "schema": 1,
        **msgspec.to_builtins(measured_here()),
        "device": torch.cuda.get_device_name() if device == "cuda" else Machine.here().cpu,
        "volume_bytes": VOLUME[device],
        "rounds": rounds,
        "rows": rows,
        "overlap": overlap,
    }
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


# Rates ------------------------------------------------------------------------------------------------------------


def measure_rates(device: str, fragment_bytes: int, *, rounds: int) -> list[dict[str, Any]]:
    """GB/s of stores, loads and both at once, in pieces of that size that touch no other, beside plain copies.

    One submission for all layers, as for a park.
    """
    num_pieces = VOLUME[device] // fragment_bytes // RATE_LAYERS
    geometry = KVGeometry(
        num_layers=RATE_LAYERS,
        page_bytes=fragment_bytes,
        block_tokens=1,
        pool_blocks=2 * num_pieces,
        zone_blocks=0,
        lanes=1,
    )
    mechanism = make_mechanism(device, geometry, 2 * num_pieces)
    assert mechanism.wait_ready(PIN_LIMIT_S), "host memory cannot be pinned"
    ctypes.memset(mechanism.host.address(0, 0), 1, 2 * VOLUME[device])  # memory that was never touched is not there
    even, odd = (scattered(num_pieces, parity) for parity in (0, 1))
    plain = PlainCopies(device, mechanism)
    names = (*Direction, BOTH)
    ours: dict[str, list[float]] = {name: [] for name in names}
    bound: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for direction in Direction:
            ours[direction].append(_seconds(partial(_copy, mechanism, {direction: even})))
            bound[direction].append(_seconds(partial(plain.copy, [direction])))
        ours[BOTH].append(_seconds(lambda: _copy(mechanism, {Direction.STORE: even, Direction.LOAD: odd})))
        bound[BOTH].append(_seconds(lambda: plain.copy(list(Direction))))
    mechanism.engine.close()
    return [
        {
            "direction": str(name),
            "fragment_bytes": fragment_bytes,
            "gb_per_s": (2 if name == BOTH else 1) * VOLUME[device] / median(ours[name]) / 1e9,
            "memcpy_gb_per_s": (2 if name == BOTH else 1) * VOLUME[device] / median(bound[name]) / 1e9,
        }
        for name in names
    ]


def scattered(num_pieces: int, parity: int) -> tuple[BlockRun, ...]:
    """As an engine that has run for a while has them: device blocks anywhere, none beside another; host blocks in line.

    Every run is one block.
    """
    device = [2 * i + parity for i in range(num_pieces)]
    random.Random(parity).shuffle(device)
    return merge_runs(device, range(parity * num_pieces, (parity + 1) * num_pieces))


def _copy(mechanism: Mechanism, runs: dict[Direction, Sequence[BlockRun]]) -> None:
    layers = range(RATE_LAYERS)
    events = [mechanism.engine.submit(direction, layers, those) for direction, those in runs.items()]
    for event in events:
        assert mechanism.engine.wait_host(event, 60.0)
        assert event.error is None


class PlainCopies:
    """One contiguous copy each way: memcpy, each on a thread of its own, or the copy engines from pinned memory."""

    def __init__(self, device: str, mechanism: Mechanism) -> None:
        self._volume = VOLUME[device]
        self._tensor = mechanism.arena.tensor()
        self._host = mechanism.host
        self._is_cuda = device == "cuda"
        if self._is_cuda:
            self._pinned = [torch.empty(self._volume, dtype=torch.int8, pin_memory=True) for _ in Direction]
            self._streams = [torch.cuda.Stream() for _ in Direction]

    def copy(self, directions: Sequence[Direction]) -> None:
        """Copy the volume in each of the directions, at the same time."""
        if self._is_cuda:
            self._copy_cuda(directions)
            return
        device, host, volume = self._tensor.data_ptr(), self._host.address(0, 0), self._volume
        pairs = {Direction.STORE: (host, device), Direction.LOAD: (device + volume, host + volume)}
        threads = [threading.Thread(target=ctypes.memmove, args=(*pairs[d], volume)) for d in directions[1:]]
        for thread in threads:
            thread.start()
        ctypes.memmove(*pairs[directions[0]], volume)
        for thread in threads:
            thread.join()

    def _copy_cuda(self, directions: Sequence[Direction]) -> None:
        halves = dict(zip(Direction, self._tensor.split(self._volume), strict=True))
        for direction, pinned, stream in zip(Direction, self._pinned, self._streams, strict=True):
            if direction in directions:
                with torch.cuda.stream(stream):
                    ends = (pinned, halves[direction])
                    to, source = ends if direction is Direction.STORE else ends[::-1]
                    to.copy_(source, non_blocking=True)
        for stream in self._streams:
            stream.synchronize()


# Overlap ----------------------------------------------------------------------------------------------------------


def measure_overlap(device: str, lanes: int, chunk_tokens: int, *, rounds: int) -> dict[str, Any]:
    """How much of a layered prefill step's copies is hidden behind its compute.

    A step computes one chunk (the matrix products of a transformer layer, for every layer), loads
    :data:`EARLIER_CHUNKS` earlier ones layer by layer and stores its own. What is not hidden is what a step takes
    longer than the same step without copies: on CPU, where compute waits in the calls of the lane schedule, the time
    spent in them.
    """
    kv_bytes = 2 * KV_WIDTH[device] * (4 if device == "cpu" else 2)
    chunk_blocks = chunk_tokens // BLOCK_TOKENS
    zone_blocks = (1 + EARLIER_CHUNKS) * chunk_blocks
    geometry = KVGeometry(
        num_layers=NUM_LAYERS,
        page_bytes=BLOCK_TOKENS * kv_bytes,
        block_tokens=BLOCK_TOKENS,
        pool_blocks=64,
        zone_blocks=zone_blocks,
        lanes=lanes,
    )
    mechanism = make_mechanism(device, geometry, zone_blocks)
    assert mechanism.wait_ready(PIN_LIMIT_S), "host memory cannot be pinned"
    ctypes.memset(mechanism.host.address(0, 0), 1, NUM_LAYERS * zone_blocks * geometry.page_bytes)
    plan = StepPlan(
        stores=(BlockRun(64 + EARLIER_CHUNKS * chunk_blocks, EARLIER_CHUNKS * chunk_blocks, chunk_blocks),),
        loads=(BlockRun(64, 0, EARLIER_CHUNKS * chunk_blocks),),
        num_tokens=chunk_tokens,
    )
    compute = LayerCompute(device, chunk_tokens)
    measured = [_step_times(device, mechanism, geometry, plan, compute) for _ in range(rounds)]
    mechanism.engine.close()
    stall_s, copy_s, compute_s = (median(times) for times in zip(*measured, strict=True))
    return {
        "lanes": lanes,
        "chunk_tokens": chunk_tokens,
        "hidden_fraction": median(1 - stall / copy for stall, copy, _ in measured),
        "stall_ms": stall_s * 1e3,
        "copy_ms": copy_s * 1e3,
        "compute_ms": compute_s * 1e3,
    }


class LayerCompute:
    """The matrix products of one transformer layer over a chunk, on one thread or on the GPU's current stream."""

    def __init__(self, device: str, chunk_tokens: int) -> None:
        hidden, kv = HIDDEN[device], KV_WIDTH[device]
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._x = torch.randn(chunk_tokens, hidden, dtype=dtype, device=device)
        shapes = [(hidden, hidden + 2 * kv), (hidden, hidden), (hidden, 3 * hidden), (hidden, 3 * hidden)]
        self._weights = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
        self._down = torch.randn(3 * hidden, hidden, dtype=dtype, device=device)

    def enqueue(self) -> None:
        """One layer's products."""
        for weight in self._weights:
            product = self._x @ weight
        product @ self._down


def _step_times(
    device: str, mechanism: Mechanism, geometry: KVGeometry, plan: StepPlan, compute: LayerCompute
) -> tuple[float, float, float]:
    """Seconds that one step was held up by copies, of its copies, and of its compute; means over :data:`STEPS`."""
    schedule = LaneSchedule(mechanism.engine, geometry.lane_layers())
    mechanism.engine.take_seconds()
    in_schedule_s = 0.0

    def timed(call: Callable[[], None]) -> None:
        nonlocal in_schedule_s
        in_schedule_s += _seconds(call)

    def steps(*, with_copies: bool) -> None:
        for _ in range(STEPS):
            if with_copies:
                timed(partial(schedule.begin_step, plan))
            for layer in range(geometry.num_layers):
                compute.enqueue()
                if with_copies:
                    timed(partial(schedule.layer_done, layer))
        if device == "cuda":
            torch.cuda.current_stream().synchronize()

    alone_s = _seconds(lambda: steps(with_copies=False))
    together_s = _seconds(lambda: steps(with_copies=True))
    schedule.drain(60.0)
    copy_s = sum(mechanism.engine.take_seconds().values())
    stall_s = in_schedule_s if device == "cpu" else together_s - alone_s
    return stall_s / STEPS, copy_s / STEPS, alone_s / STEPS


def _seconds(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
