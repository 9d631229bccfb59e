"""How fast KV memory comes and goes, and what that does to steps: `layerkv bench sharing --only resize`.

The real CPU arena with its thread, in this process, without a model; and an engine of its own that decodes while its
pool moves (:mod:`layerkv.bench.sharing_steps`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

import msgspec
import psutil

from layerkv.bench.engine_args import layerkv_connector, tiny_engine_args
from layerkv.bench.load import FIRST_ORDINARY_TOKEN_ID, PlannedRequest
from layerkv.bench.records import read_json, write_json
from layerkv.bench.sharing_steps import Move, SwingRun, SwingSpec
from layerkv.bench.supervise import child_env, run_child
from layerkv.bench.tiny_model import SHAPES, make_tiny_model
from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout
from layerkv.device.base import COPY_TIMEOUT_S, Event
from layerkv.errors import LayerKVError
from layerkv.figures import percentile
from layerkv.scheduler.elastic import MOST_LEAVING
from layerkv.units import format_bytes

GIB = 1 << 30
LAYERS, PAGE_BYTES, SEGMENT_BLOCKS, NUM_SEGMENTS = 24, 64 << 10, 32, 44
"""Segments of 48 MiB in pieces of 2 MiB, as a model of half a billion parameters has them. Every second one moves, so
that no two pieces are neighbours: 1.03 GiB."""
ROUNDS = 16

MODEL = "test"
RUNNING, PROMPT_TOKENS, OUTPUT_TOKENS, MAX_MODEL_LEN = 16, 32, 1200, 1280
CEILING_BYTES = 1152 << 20
NUM_MOVES, CALM_STEPS = 12, 20
ENGINE = (sys.executable, "-m", "layerkv.bench.sharing_steps")


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds per GiB, over moves of as many segments as leave before one step."""

    p50: float
    p99: float


class ResizeSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """How long memory takes to come and go, of moves of `move_bytes`, `moves` in all.

    `p50` and `p99` are those of `shrink`: from the order until the memory is the machine's again. `grow`: until the
    pool may use it, which on a CPU is at once; `first_touch`: writing it for the first time,
    which is where it really comes.
    """

    p50: float
    p99: float
    shrink: Speed
    grow: Speed
    first_touch: Speed
    move_bytes: int
    moves: int


class ArenaMove(NamedTuple):
    """Seconds of one move there and back."""

    num_bytes: int
    grow_s: float
    touch_s: float
    shrink_s: float


class ResizingSteps(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of an engine in which segments come or go.

    Of each move the longest step over the median of the calm ones before it; `over_median` is the median of that over
    all moves, `growing` and `shrinking` over those of one kind, and `worst` the greatest. `calm` is the same of as many
    calm steps: what the machine does by itself. `step_ms` is the median calm step, `moved_bytes` those of one move.
    """

    over_median: float
    growing: float
    shrinking: float
    worst: float
    calm: float
    step_ms: float
    moved_bytes: int
    moves: int


def measure_arena(*, rounds: int = ROUNDS, num_segments: int = NUM_SEGMENTS) -> ResizeSpeed:
    """Move every second segment of the real arena there and back, so often.

    Raises:
        LayerKVError: the machine has not the memory for it.
        MemoryError: the kernel refused.
    """
    from layerkv.device.elastic_mmap_arena import ElasticMmapArena

    layout = SegmentLayout(SEGMENT_BLOCKS, num_segments)
    geometry = KVGeometry(
        num_layers=LAYERS,
        page_bytes=PAGE_BYTES,
        block_tokens=16,
        pool_blocks=num_segments * SEGMENT_BLOCKS,
        zone_blocks=SEGMENT_BLOCKS,
        lanes=2,
    )
    segment_bytes = SEGMENT_BLOCKS * geometry.block_bytes
    odd = range(1, num_segments, 2)
    needed_bytes = (len(odd) + 2) * segment_bytes
    if (available_bytes := psutil.virtual_memory().available) < 2 * needed_bytes:
        raise LayerKVError(
            f"{format_bytes(available_bytes)} of memory are available; expected twice the {format_bytes(needed_bytes)} "
            "that this takes; leave resize out (--only)"
        )
    arena = ElasticMmapArena(geometry, layout, num_mapped=1)
    blocks = arena.tensor().view(geometry.num_layers, geometry.total_blocks, geometry.page_bytes)
    batches = [odd[at : at + MOST_LEAVING] for at in range(0, len(odd), MOST_LEAVING)]
    moves: list[ArenaMove] = []
    for _ in range(rounds):
        come = []
        for batch in batches:
            began_s = time.perf_counter()
            arena.put(batch)
            grown_s = time.perf_counter()
            for segment in batch:
                its = layout.blocks(segment)
                blocks[:, its.start : its.stop].fill_(1)
            come.append((grown_s - began_s, time.perf_counter() - grown_s))
        for batch, (grow_s, touch_s) in zip(batches, come, strict=True):
            began_s = time.perf_counter()
            _wait(arena.unmap(batch))
            moves.append(ArenaMove(len(batch) * segment_bytes, grow_s, touch_s, time.perf_counter() - began_s))
    return resize_speed(moves)


def resize_speed(moves: Sequence[ArenaMove]) -> ResizeSpeed:
    """What moves come to."""

    def speed(seconds: Sequence[float]) -> Speed:
        per_gib = sorted(s * 1e3 * GIB / move.num_bytes for s, move in zip(seconds, moves, strict=True))
        return Speed(p50=percentile(per_gib, 0.5), p99=percentile(per_gib, 0.99))

    shrink = speed([move.shrink_s for move in moves])
    return ResizeSpeed(
        p50=shrink.p50,
        p99=shrink.p99,
        shrink=shrink,
        grow=speed([move.grow_s for move in moves]),
        first_touch=speed([move.touch_s for move in moves]),
        move_bytes=max(move.num_bytes for move in moves),
        moves=len(moves),
    )


def measure_steps(folder: Path) -> ResizingSteps:
    """Let the pool of an engine that decodes shrink and grow.

    Raises:
        LayerKVError: the engine failed or hangs; the message has the last lines of its log.
    """
    rng = Random(0)
    ids = range(FIRST_ORDINARY_TOKEN_ID, SHAPES[MODEL].vocab_size)
    args = tiny_engine_args(
        make_tiny_model(MODEL, folder / "models"),
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=RUNNING,
        kv_bytes=CEILING_BYTES,
        kv_transfer_config=layerkv_connector(host_memory="256MiB", kv_ceiling=CEILING_BYTES),
    )
    spec = SwingSpec(
        engine_args=args,
        requests=[
            PlannedRequest(
                request_id=f"r{i}",
                arrival_s=0.0,
                prompt=rng.choices(ids, k=PROMPT_TOKENS),
                output_tokens=OUTPUT_TOKENS,
            )
            for i in range(RUNNING)
        ],
        num_moves=NUM_MOVES,
        calm_steps=CALM_STEPS,
    )
    spec_path, run_path = folder / "steps.spec.json", folder / "steps.json"
    write_json(spec, spec_path)
    failure = run_child(
        [*ENGINE, str(spec_path), str(run_path)],
        env=child_env(),
        log_path=folder / "steps.log",
        on_progress=lambda _: None,
    )
    if failure is not None:
        raise LayerKVError(f"the engine whose pool moves {failure.reason}: " + "\n".join(failure.log_tail))
    return resizing_steps(read_json(run_path, SwingRun).moves)


def resizing_steps(moves: Sequence[Move]) -> ResizingSteps:
    """What moves did to steps."""

    def over_median(chosen: Sequence[Move]) -> float:
        return median(max(move.moving_s) / median(move.calm_s) for move in chosen)

    return ResizingSteps(
        over_median=over_median(moves),
        growing=over_median([move for move in moves if move.grows]),
        shrinking=over_median([move for move in moves if not move.grows]),
        worst=max(max(move.moving_s) / median(move.calm_s) for move in moves),
        calm=median(max(move.calm_s[-len(move.moving_s) :]) / median(move.calm_s) for move in moves),
        step_ms=median(step_s for move in moves for step_s in move.calm_s) * 1e3,
        moved_bytes=int(median(move.moved_bytes for move in moves)),
        moves=len(moves),
    )


def _wait(event: Event) -> None:
    from layerkv.device.copy_event import CopyEvent

    assert isinstance(event, CopyEvent)
    if not event.wait(COPY_TIMEOUT_S):
        raise LayerKVError(f"a segment did not move within {COPY_TIMEOUT_S:g} s")
    if event.error is not None:
        raise event.error
