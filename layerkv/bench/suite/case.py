"""A benchmark case (YAML): which engines, which load, at which points of an axis.

Invariant, as for all of layerkv's configuration: whatever is wrong with the file, or with a file that it names, is
one `ConfigError` of one line that says where it is, what was found, what was expected, and what to set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta

from layerkv.bench.suite.ends import Ends, read_ends
from layerkv.bench.suite.sessions import Sessions, read_sessions
from layerkv.bench.tiny_model import SHAPES, ModelShape

# One way of reading YAML and of writing refusals for all of layerkv: these helpers are private to the package.
from layerkv.config import SloPolicy
from layerkv.sim.prompt_blocks import repeated_share
from layerkv.sim.workload import Trace, TraceArrivals, WorkloadSpec, make_workload
from layerkv.sim.workload_config import (
    check_distinct,
    count_meta,
    load_document,
    read_policy,
    read_workload,
)
from layerkv.strict_yaml import above_zero, did_you_mean, read_keys, show, wrong
from layerkv.units import parse_bytes

__all__ = ["ENGINE_NAMES", "SIZES", "Case", "EngineSettings", "Point", "load_case", "load_suite"]

ENGINE_NAMES: Final = (
    "stock",
    "stock-watermark",
    "vllm-cpu-offload",
    "lmcache",
    "layerkv",
    "layerkv-no-slo",
    "oracle",
)
"""What can be compared, in the order of tables."""

SIZES: Final = ("ci", "full")
MAX_BROKEN_ROWS_NAMED: Final = 5


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How every engine of a case is built; they differ in KV memory and connector only.

    `model` is the name of a shape in `tiny_model.SHAPES`, then `shape` is that shape, or what `vllm serve` takes.
    `oracle_kv_memory_bytes` None means enough for every request of the largest load, `oracle_max_num_seqs` None as many
    as the others have. `options` are further flags
    for `vllm serve`.
    """

    model: str
    shape: ModelShape | None
    dtype: str
    kv_memory_bytes: int
    oracle_kv_memory_bytes: int | None
    host_memory_bytes: int
    block_tokens: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    oracle_max_num_seqs: int | None
    lanes: int | None
    zone_tokens: int | None
    long_contexts: bool
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One load of the case. With `sessions`, `workload` says how sessions begin and what each turn adds.

    With `ends`, its `output_tokens` are the patience of those who hang up.
    """

    name: str
    x: float
    rate_per_s: float
    workload: WorkloadSpec
    sessions: Sessions | None = None
    ends: Ends | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A case in one of its sizes, checked.

    Attributes:
        axis: What `x` of its points is, for people.
        main_point: The point that the headline is about.
        num_seeds: How many seeds unless the command says otherwise.
        expected_to_fail: Engines that cannot serve this load at all: the result is complete without them.
        can_compare_tokens: Whether equal tokens are to be expected: float32 and greedy.
        notes: What a reader of the result must know, such as broken rows of a trace.
    """

    name: str
    question: str
    axis: str
    size: str
    settings: EngineSettings
    policy: SloPolicy
    engines: tuple[str, ...]
    points: tuple[Point, ...]
    main_point: str
    num_seeds: int
    expected_to_fail: tuple[str, ...]
    can_compare_tokens: bool
    notes: tuple[str, ...]


_Version: TypeAlias = Annotated[int, Meta(ge=1, le=1, description="the number 1", examples=[1])]
_Text: TypeAlias = Annotated[str, Meta(min_length=1, description="text", examples=["How does TTFT grow?"])]
_Name: TypeAlias = Annotated[
    str, Meta(pattern="^[a-z0-9_]+$", description="a name of small letters, digits and _", examples=["rate_sweep"])
]
_Mapping: TypeAlias = Annotated[dict[Any, Any], Meta(description="a mapping", examples=[{"kv_memory": "72MiB"}])]
_OptionalMapping: TypeAlias = Annotated[
    dict[Any, Any] | None, Meta(description="a mapping", examples=[{"turns": {"fixed": 4}}])
]
_Policy: TypeAlias = Annotated[
    str | dict[Any, Any] | None,
    Meta(description="the path of an SLO policy file, or what stands in one", examples=["slo.yaml"]),
]
_Names: TypeAlias = Annotated[list[str], Meta(min_length=1)]
_Engines: TypeAlias = Annotated[
    _Names | None,
    Meta(description=f"a list of some of {', '.join(ENGINE_NAMES)}", examples=[["stock", "layerkv"]]),
]
_Points: TypeAlias = Annotated[
    list[Any], Meta(min_length=1, description="a list of at least one point", examples=[[{"rate": 1.0}]])
]
_PointNames: TypeAlias = Annotated[_Names | None, Meta(description="a list of names of points", examples=[["1"]])]
_PointName: TypeAlias = Annotated[str | None, Meta(description="the name of a point, as text", examples=["1"])]
_Seeds: TypeAlias = Annotated[int, Meta(ge=1, description="how many seeds, 1 or more", examples=[3])]
_Requests: TypeAlias = Annotated[Annotated[int, Meta(ge=1)] | None, count_meta("requests", 40)]
_Rate: TypeAlias = Annotated[
    Annotated[float, Meta(gt=0, le=1e6)] | None,
    Meta(description="requests (sessions, where there are some) per second, above zero", examples=[1.0]),
]
_Number: TypeAlias = Annotated[float | None, Meta(description="a number", examples=[1.0])]
_Model: TypeAlias = Annotated[
    str, Meta(min_length=1, description="demo, demo-long, test, or a model as `vllm serve` takes it", examples=["demo"])
]
_Dtype: TypeAlias = Annotated[str, Meta(min_length=1, description="a dtype of vLLM's", examples=["float32"])]
_Size: TypeAlias = Annotated[str | int, Meta(description="a size above zero such as 8GiB", examples=["8GiB"])]
_OptionalSize: TypeAlias = Annotated[
    str | int | None, Meta(description="a size above zero such as 8GiB", examples=["8GiB"])
]
_Tokens: TypeAlias = Annotated[Annotated[int, Meta(ge=1)], count_meta("tokens", 2048)]
_OptionalTokens: TypeAlias = Annotated[Annotated[int, Meta(ge=1)] | None, count_meta("tokens", 2048)]
_Lanes: TypeAlias = Annotated[Annotated[int, Meta(ge=1)] | None, count_meta("lanes", 2)]
_Seqs: TypeAlias = Annotated[Annotated[int, Meta(ge=1)], count_meta("requests", 64)]
_OptionalSeqs: TypeAlias = Annotated[Annotated[int, Meta(ge=1)] | None, count_meta("requests", 64)]
_Switch: TypeAlias = Annotated[bool, Meta(description="true or false", examples=[True])]
_Options: TypeAlias = Annotated[
    list[str], Meta(description="a list of flags for `vllm serve`", examples=[["--tensor-parallel-size=2"]])
]


class _TopKeys(msgspec.Struct, frozen=True):
    version: _Version
    case: _Name
    question: _Text
    axis: _Text
    engine: _Mapping
    workload: _Mapping
    points: _Points
    sizes: _Mapping
    policy: _Policy = None
    engines: _Engines = None
    expected_to_fail: _Engines = None
    main_point: _PointName = None


class _EngineKeys(msgspec.Struct, frozen=True):
    kv_memory: _Size
    max_model_len: _Tokens
    model: _Model = "demo"
    dtype: _Dtype = "float32"
    oracle_kv_memory: _OptionalSize = None
    host_memory: _Size = "2GiB"
    block_tokens: _Tokens = 32
    max_num_batched_tokens: _Tokens = 2048
    max_num_seqs: _Seqs = 64
    oracle_max_num_seqs: _OptionalSeqs = None
    lanes: _Lanes = None
    zone_tokens: _OptionalTokens = None
    long_contexts: _Switch = False
    options: _Options = msgspec.field(default_factory=list)


class _SizeKeys(msgspec.Struct, frozen=True):
    seeds: _Seeds
    requests: _Requests = None
    points: _PointNames = None
    engines: _Engines = None


class _PointKeys(msgspec.Struct, frozen=True):
    name: _PointName = None
    x: _Number = None
    rate: _Rate = None
    requests: _Requests = None
    workload: _OptionalMapping = None


def load_case(path: Path, size: str = "full", *, trace_path: Path | None = None) -> Case:
    """Read and check a case; paths in it are relative to its folder. `trace_path` takes the place of its trace.

    Raises:
        ConfigError: the file, or one that it names, is missing or unreadable, or does not say what it should.
    """
    top, folder = f"{path}: $", path.parent
    document = load_document(path, what="a benchmark case", example="benchmarks/cases/rate_sweep.yaml")
    keys = read_keys(document, _TopKeys, where=top)
    settings = _settings(keys.engine, where=f"{top}.engine")
    policy = read_policy(keys.policy, where=f"{top}.policy", folder=folder)
    chosen = _size(keys.sizes, size, where=f"{top}.sizes")
    points = [
        _point(raw, keys.workload, chosen, settings, policy, trace_path, where=f"{top}.points[{i}]", folder=folder)
        for i, raw in enumerate(keys.points)
    ]
    names = [point.name for point in points]
    check_distinct(names, where=f"{top}.points")
    where_size = f"{top}.sizes.{size}"
    wanted = _known(chosen.points or names, names, where=f"{where_size}.points")
    kept = tuple(point for point in points if point.name in wanted)
    default_main = kept[-1].name
    main_point = keys.main_point if keys.main_point is not None else default_main
    _known([main_point], names, where=f"{top}.main_point")
    where_engines = f"{where_size}.engines" if chosen.engines else f"{top}.engines"
    return Case(
        name=keys.case,
        question=keys.question,
        axis=keys.axis,
        size=size,
        settings=settings,
        policy=policy,
        engines=tuple(_known(chosen.engines or keys.engines or ENGINE_NAMES, ENGINE_NAMES, where=where_engines)),
        points=kept,
        main_point=main_point if main_point in wanted else default_main,
        num_seeds=chosen.seeds,
        expected_to_fail=tuple(_known(keys.expected_to_fail or (), ENGINE_NAMES, where=f"{top}.expected_to_fail")),
        can_compare_tokens=settings.dtype == "float32",
        notes=_trace_notes(kept),
    )


def load_suite(path: Path) -> list[Path] | None:
    """The cases that a suite file (`suite: [case.yaml, ...]`) names, or None if the file is a case itself.

    Raises:
        ConfigError: the file is unreadable, or its list is wrong.
    """
    document = load_document(path, what="a benchmark case or suite", example="benchmarks/cases/all.yaml")
    if not isinstance(document, Mapping) or "suite" not in document:
        return None
    where, names = f"{path}: $.suite", document["suite"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise wrong(where, f"found {show(names)}; expected a list of paths of cases", "set suite to [burst.yaml], say")
    check_distinct(names, where=where)
    return [path.parent / name for name in names]


def _settings(raw: Any, *, where: str) -> EngineSettings:
    keys = read_keys(raw, _EngineKeys, where=where)

    def size(name: str) -> int:
        return above_zero(parse_bytes, getattr(keys, name), where=f"{where}.{name}", example="8GiB")

    shape = SHAPES.get(keys.model)
    if shape is not None and keys.max_model_len > shape.max_position_tokens:
        problem = f"found {keys.max_model_len}; expected at most {keys.model}'s positions, {shape.max_position_tokens}"
        raise wrong(f"{where}.max_model_len", problem, "set it lower, or model to demo-long")
    return EngineSettings(
        model=keys.model,
        shape=shape,
        dtype=keys.dtype,
        kv_memory_bytes=size("kv_memory"),
        oracle_kv_memory_bytes=None if keys.oracle_kv_memory is None else size("oracle_kv_memory"),
        host_memory_bytes=size("host_memory"),
        block_tokens=keys.block_tokens,
        max_model_len=keys.max_model_len,
        max_num_batched_tokens=keys.max_num_batched_tokens,
        max_num_seqs=keys.max_num_seqs,
        oracle_max_num_seqs=keys.oracle_max_num_seqs,
        lanes=keys.lanes,
        zone_tokens=keys.zone_tokens,
        long_contexts=keys.long_contexts,
        options=tuple(keys.options),
    )


def _size(raw: Mapping[Any, Any], size: str, *, where: str) -> _SizeKeys:
    for key in raw:
        if key not in SIZES:
            problem = f"found {show(key)}; expected {' or '.join(SIZES)}"
            raise wrong(where, problem, did_you_mean(key, SIZES))
    if size not in raw:
        raise wrong(f"{where}.{size}", "found nothing; expected this size", f"set {size} to {{seeds: 3}}, say")
    return read_keys(raw[size], _SizeKeys, where=f"{where}.{size}")


def _point(
    raw: Any,
    common: Mapping[Any, Any],
    size: _SizeKeys,
    settings: EngineSettings,
    policy: SloPolicy,
    trace_path: Path | None,
    *,
    where: str,
    folder: Path,
) -> Point:
    keys = read_keys(raw, _PointKeys, where=where)
    merged = {**common, **(keys.workload or {})}
    # A mistake in what all points share is named there.
    where_workload = f"{where}.workload" if keys.workload else f"{where.partition('.points')[0]}.workload"
    for key in ("requests", "rates"):
        if key in merged:
            problem = f"found {key} among the requests; expected it in points"
            raise wrong(f"{where_workload}.{key}", problem, f"set {key.removesuffix('s')} of each point instead")
    sessions, ends = merged.pop("sessions", None), merged.pop("ends", None)
    arrivals = merged.get("arrivals")
    if trace_path is not None and isinstance(arrivals, dict) and isinstance(arrivals.get("trace"), dict):
        merged["arrivals"] = {"trace": {**arrivals["trace"], "path": str(trace_path.resolve())}}
    merged["requests"] = size.requests or keys.requests
    merged["rates"] = None if keys.rate is None else [keys.rate]
    workload, (rate,) = read_workload(
        merged, policy, max_model_len=settings.max_model_len, where=where_workload, folder=folder
    )
    name = keys.name if keys.name is not None else f"{rate:g}"
    point = Point(name, rate if keys.x is None else keys.x, rate, workload)
    if sessions is not None and ends is not None:
        problem = "found ends beside sessions; expected one of them"
        raise wrong(f"{where_workload}.ends", problem, "remove one of them")
    if sessions is not None:
        where_sessions, most = f"{where_workload}.sessions", settings.max_model_len
        return replace(point, sessions=read_sessions(sessions, workload, max_model_len=most, where=where_sessions))
    if ends is not None:
        return replace(point, ends=read_ends(ends, workload, where=f"{where_workload}.ends"))
    return point


def _known(names: Sequence[str], known: Sequence[str], *, where: str) -> Sequence[str]:
    for i, name in enumerate(names):
        if name not in known:
            problem = f"found {show(name)}; expected one of {', '.join(known)}"
            raise wrong(f"{where}[{i}]", problem, did_you_mean(name, known) or "set one of them")
    check_distinct(names, where=where)
    return names


def _trace_notes(points: Sequence[Point]) -> tuple[str, ...]:
    notes = [
        note
        for point in points
        if isinstance(point.workload.arrivals, TraceArrivals)
        for note in (
            *_notes_of(point.workload.arrivals.trace),
            *_notes_of_prefixes(point, point.workload.arrivals.trace),
        )
    ]
    return tuple(dict.fromkeys(notes))


def _notes_of_prefixes(point: Point, trace: Trace) -> list[str]:
    """How much of the load an engine could find in a prefix cache; few rows of a trace may have little in common."""
    if (of_all := trace.repeated_share) is None:
        return []
    replayed = make_workload(point.workload, rate_per_s=point.rate_per_s, seed=0)
    of_run = repeated_share((request.prompt_tokens, request.blocks) for request in replayed)
    return [
        f"Prompts begin alike where the trace's hash_ids do: {of_all:.0%} of its prompt tokens repeat the beginning of "
        f"an earlier prompt, and {of_run:.1%} of those of the {len(replayed)} requests that the first seed replays."
    ]


def _notes_of(trace: Trace) -> list[str]:
    notes = [f"Trace ({trace.layout}): {len(trace.requests)} requests."]
    if trace.broken:
        named = "; ".join(f"line {row.line}: {row.reason}" for row in trace.broken[:MAX_BROKEN_ROWS_NAMED])
        more = len(trace.broken) - MAX_BROKEN_ROWS_NAMED
        notes.append(
            f"{len(trace.broken)} broken rows were left out: {named}" + (f"; {more} more." if more > 0 else ".")
        )
    if trace.num_failed:
        notes.append(f"{trace.num_failed} requests without output were left out.")
    if trace.num_too_long:
        notes.append(
            f"{trace.num_too_long} requests longer than max_model_len, or than max_prompt_tokens, were left out."
        )
    return notes
