"""The configuration of a simulation: which engine, which policies, which requests (a YAML file).

Invariant, as for all of layerkv's configuration: whatever is wrong with the file, or with a file that it names, is
one `ConfigError` of one line that says where it is, what was found, what was expected, and what to set.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
import yaml
from msgspec import Meta

# One way of reading YAML and of writing refusals for all of layerkv: these helpers are private to the package.
from layerkv.config import (
    SloPolicy,
    _above_zero,
    _did_you_mean,
    _join,
    _read,
    _show,
    _UniqueKeyLoader,
    _wrong,
    default_policy,
    load_policy,
    parse_policy,
)
from layerkv.core.cost import CostProfile, load_profile
from layerkv.sim.presets import DEVICES, MODELS, kv_memory_bytes, preset
from layerkv.sim.workload import (
    Arrivals,
    ClassMix,
    FixedLength,
    GammaArrivals,
    Lengths,
    LognormalLength,
    PoissonArrivals,
    TraceArrivals,
    UniformArrivals,
    UniformLength,
    WorkloadSpec,
    read_trace,
)
from layerkv.units import parse_bytes

__all__ = ["POLICIES", "SimConfig", "load_sim_config"]

POLICIES: Final = (
    "stock",
    "stock-watermark",
    "layerkv",
    "layerkv-no-slo",
    "layerkv-no-length-prediction",
    "layerkv-streamed",
)
"""What can be simulated, by name."""

DEFAULT_POLICIES: Final = ("stock", "layerkv")

HOST_MEMORY_FACTOR: Final = 4
"""Host memory that a configuration without `host_memory` has, as a multiple of its KV memory."""


@dataclass(frozen=True, slots=True)
class SimConfig:
    """A simulation, checked: one run for each policy, rate and seed.

    Sizes are over all ranks. `policy` holds the SLO classes, `policies` the names of what is compared.
    `zone_tokens` None means the default rule of the engine. With a trace, `rates` may be the trace's own.
    """

    profile: CostProfile
    num_layers: int
    kv_memory_bytes: int
    host_memory_bytes: int
    block_tokens: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    lanes: int
    zone_tokens: int | None
    async_scheduling: bool
    policy: SloPolicy
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    workload: WorkloadSpec
    rates: tuple[float, ...]


# What the file looks like, as in layerkv/config.py: `description` completes "expected ...", `examples[0]` completes
# "set <key> to ...".
def _count(what: str, example: int) -> Meta:
    return Meta(description=f"a whole number of {what}, 1 or more", examples=[example])


_NOT_EMPTY: Final = Meta(min_length=1)
_AboveZero: TypeAlias = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
_AtLeastOne: TypeAlias = Annotated[int, Meta(ge=1)]

_Version: TypeAlias = Annotated[Literal[1], Meta(description="the number 1", examples=[1])]
_Engine: TypeAlias = Annotated[
    dict[Any, Any], Meta(description="a mapping that describes the engine", examples=[{"device": "L20"}])
]
_Workload: TypeAlias = Annotated[
    dict[Any, Any], Meta(description="a mapping that describes the requests", examples=[{"requests": 1000}])
]
_Policy: TypeAlias = Annotated[
    str | dict[Any, Any] | None,
    Meta(description="the path of an SLO policy file, or what stands in one", examples=["slo.yaml"]),
]
_Policies: TypeAlias = Annotated[
    list[str],
    Meta(min_length=1, description=f"a list of some of {', '.join(POLICIES)}", examples=[list(DEFAULT_POLICIES)]),
]
_Seeds: TypeAlias = Annotated[
    list[Annotated[int, Meta(ge=0)]],
    Meta(min_length=1, description="a list of at least one whole number, 0 or more", examples=[[0]]),
]
_Device: TypeAlias = Annotated[str | None, Meta(description=f"one of {', '.join(DEVICES)}", examples=["L20"])]
_Model: TypeAlias = Annotated[str | None, Meta(description=f"one of {', '.join(MODELS)}", examples=["llama-2-7b"])]
_Profile: TypeAlias = Annotated[str | None, Meta(description="the path of a cost profile", examples=["profile.json"])]
_Ranks: TypeAlias = Annotated[_AtLeastOne | None, _count("GPUs", 1)]
_Size: TypeAlias = Annotated[str | int | None, Meta(description="a size above zero such as 8GiB", examples=["8GiB"])]
_Layers: TypeAlias = Annotated[_AtLeastOne | None, _count("layers", 32)]
_BlockTokens: TypeAlias = Annotated[_AtLeastOne, _count("tokens", 16)]
_StepTokens: TypeAlias = Annotated[_AtLeastOne, _count("tokens", 2048)]
_Seqs: TypeAlias = Annotated[_AtLeastOne, _count("requests", 256)]
_ModelLen: TypeAlias = Annotated[_AtLeastOne, _count("tokens", 32768)]
_Lanes: TypeAlias = Annotated[_AtLeastOne, _count("lanes", 2)]
_ZoneTokens: TypeAlias = Annotated[_AtLeastOne | None, _count("tokens", 8192)]
_Switch: TypeAlias = Annotated[bool, Meta(description="true or false", examples=[False])]
_Requests: TypeAlias = Annotated[_AtLeastOne | None, _count("requests", 1000)]
_Rates: TypeAlias = Annotated[
    Annotated[list[_AboveZero], _NOT_EMPTY] | None,
    Meta(description="a list of at least one number above zero (requests per second)", examples=[[1.0]]),
]
_Arrivals: TypeAlias = Annotated[
    str | dict[Any, Any],
    Meta(description="poisson, uniform, {gamma: {cv: 2}} or {trace: {path: FILE}}", examples=["poisson"]),
]
_Classes: TypeAlias = Annotated[
    Annotated[list[Any], _NOT_EMPTY] | None,
    Meta(description="a list of at least one class", examples=[[{"slo_class": "chat"}]]),
]
_Factor: TypeAlias = Annotated[float, Meta(ge=1, le=1e6, description="a number of at least 1", examples=[1.5])]
_ClassName: TypeAlias = Annotated[str | None, Meta(description="the name of a class of the policy", examples=["chat"])]
_Share: TypeAlias = Annotated[
    float, Meta(gt=0, le=1e9, description="a number above zero, in proportion to the other shares", examples=[1])
]
_Lengths: TypeAlias = Annotated[
    dict[Any, Any] | None,
    Meta(
        description="{fixed: 100}, {uniform: [100, 300]} or {lognormal: {median: 100, sigma: 0.5, most: 400}}",
        examples=[{"fixed": 100}],
    ),
]
_Cv: TypeAlias = Annotated[
    float, Meta(ge=0.01, le=100, description="a number from 0.01 to 100 (1 is Poisson)", examples=[2])
]
_TracePath: TypeAlias = Annotated[str, Meta(description="the path of a trace", examples=["trace.jsonl"])]
_TimeScale: TypeAlias = Annotated[
    float, Meta(gt=0, le=1e9, description="a number above zero (2 makes the trace twice as long)", examples=[1.0])
]
_Limit: TypeAlias = Annotated[_AtLeastOne | None, _count("requests", 1000)]
_MaxPrompt: TypeAlias = Annotated[_AtLeastOne | None, _count("tokens", 8192)]
_Median: TypeAlias = Annotated[float, Meta(ge=1, le=1e9, description="a number of at least 1", examples=[100])]
_Sigma: TypeAlias = Annotated[float, Meta(gt=0, le=10, description="a number above 0 and not above 10", examples=[0.5])]
_Most: TypeAlias = Annotated[_AtLeastOne, _count("tokens", 400)]


class _TopKeys(msgspec.Struct, frozen=True):
    version: _Version
    engine: _Engine
    workload: _Workload
    policy: _Policy = None
    policies: _Policies = msgspec.field(default_factory=lambda: list(DEFAULT_POLICIES))
    seeds: _Seeds = msgspec.field(default_factory=lambda: [0])


class _EngineKeys(msgspec.Struct, frozen=True):
    device: _Device = None
    model: _Model = None
    tensor_parallel: _Ranks = None
    profile: _Profile = None
    num_layers: _Layers = None
    kv_memory: _Size = None
    host_memory: _Size = None
    block_tokens: _BlockTokens = 16
    max_num_batched_tokens: _StepTokens = 2048
    max_num_seqs: _Seqs = 256
    max_model_len: _ModelLen = 32768
    lanes: _Lanes = 2
    zone_tokens: _ZoneTokens = None
    async_scheduling: _Switch = False


class _WorkloadKeys(msgspec.Struct, frozen=True):
    requests: _Requests = None
    rates: _Rates = None
    arrivals: _Arrivals = "poisson"
    classes: _Classes = None
    max_tokens_factor: _Factor = 1.0


class _ClassKeys(msgspec.Struct, frozen=True):
    slo_class: _ClassName = None
    share: _Share = 1.0
    prompt_tokens: _Lengths = None
    output_tokens: _Lengths = None


class _GammaKeys(msgspec.Struct, frozen=True):
    cv: _Cv


class _TraceKeys(msgspec.Struct, frozen=True):
    path: _TracePath
    time_scale: _TimeScale = 1.0
    limit: _Limit = None
    max_prompt_tokens: _MaxPrompt = None


class _LognormalKeys(msgspec.Struct, frozen=True):
    median: _Median
    sigma: _Sigma
    most: _Most


class _Hardware(NamedTuple):
    """What the engine runs on."""

    profile: CostProfile
    num_layers: int
    kv_memory_bytes: int


def load_sim_config(path: str | Path) -> SimConfig:
    """Read and check a simulation; the paths in it are relative to its own folder.

    Raises:
        ConfigError: the file, or one that it names, is missing or unreadable, or does not say what it should.
    """
    top, folder = f"{path}: $", Path(path).parent
    keys = _read(_load_document(path), _TopKeys, where=top)
    engine = _read(keys.engine, _EngineKeys, where=f"{top}.engine")
    hardware = _hardware(engine, where=f"{top}.engine", folder=folder)
    host_memory_bytes = _size(engine.host_memory, where=f"{top}.engine.host_memory")
    policy = _policy(keys.policy, where=f"{top}.policy", folder=folder)
    workload, rates = _workload(keys.workload, engine, policy, where=f"{top}.workload", folder=folder)
    _check_names(keys.policies, where=f"{top}.policies")
    _check_distinct(keys.seeds, where=f"{top}.seeds")
    return SimConfig(
        profile=hardware.profile,
        num_layers=hardware.num_layers,
        kv_memory_bytes=hardware.kv_memory_bytes,
        host_memory_bytes=host_memory_bytes or HOST_MEMORY_FACTOR * hardware.kv_memory_bytes,
        block_tokens=engine.block_tokens,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
        max_model_len=engine.max_model_len,
        lanes=engine.lanes,
        zone_tokens=engine.zone_tokens,
        async_scheduling=engine.async_scheduling,
        policy=policy,
        policies=tuple(keys.policies),
        seeds=tuple(keys.seeds),
        workload=workload,
        rates=rates,
    )


def _load_document(path: str | Path) -> Any:
    try:
        return yaml.load(Path(path).read_bytes(), Loader=_UniqueKeyLoader)
    except OSError as error:
        problem = f"found no readable file ({error.strerror}); expected a simulation in YAML"
        raise _wrong(str(path), problem, "give the path of one, such as configs/sim/quickstart.yaml") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}: line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise _wrong(
            where, f"found what is not YAML ({reason}); expected a simulation", "mend the YAML there"
        ) from None


def _hardware(keys: _EngineKeys, *, where: str, folder: Path) -> _Hardware:
    """Read the hardware from presets or from a profile: one of the two, and no key of the other."""
    if (keys.device is None) == (keys.profile is None):
        found = "neither device nor profile" if keys.device is None else "both device and profile"
        raise _wrong(where, f"found {found}; expected one of them", "set device and model, or profile and num_layers")
    return _from_presets(keys, where=where) if keys.profile is None else _from_profile(keys, where=where, folder=folder)


def _from_presets(keys: _EngineKeys, *, where: str) -> _Hardware:
    _check_absent(keys, ("num_layers",), where=where, reason="only beside profile: presets know it")
    if keys.model is None:
        raise _wrong(
            f"{where}.model", "found nothing; expected the model that runs on device", "set it to llama-2-7b, say"
        )
    assert keys.device is not None
    chosen = preset(keys.device, keys.model, keys.tensor_parallel or 1, where=where)
    given_bytes = _size(keys.kv_memory, where=f"{where}.kv_memory")
    left_bytes = given_bytes or kv_memory_bytes(chosen.device, chosen.model, chosen.tensor_parallel, where=where)
    return _Hardware(chosen.profile, chosen.model.num_layers, left_bytes)


def _from_profile(keys: _EngineKeys, *, where: str, folder: Path) -> _Hardware:
    _check_absent(keys, ("model", "tensor_parallel"), where=where, reason="only beside device: a profile knows them")
    if keys.num_layers is None:
        raise _wrong(f"{where}.num_layers", "found nothing; expected the model's layers", "set num_layers to 32, say")
    given_bytes = _size(keys.kv_memory, where=f"{where}.kv_memory")
    if given_bytes is None:
        problem = "found nothing; expected the KV memory of all ranks, which a profile does not know"
        raise _wrong(f"{where}.kv_memory", problem, "set kv_memory to 8GiB, say")
    assert keys.profile is not None
    profile = load_profile(folder / keys.profile)
    if not profile.kv_bytes_per_token:
        problem = f"found a profile without kv_bytes_per_token ({folder / keys.profile}); expected it above zero"
        raise _wrong(f"{where}.profile", problem, "add it to the profile")
    return _Hardware(profile, keys.num_layers, given_bytes)


def _check_absent(keys: _EngineKeys, names: Sequence[str], *, where: str, reason: str) -> None:
    for name in names:
        if (value := getattr(keys, name)) is not None:
            raise _wrong(f"{where}.{name}", f"found {_show(value)}; expected {name} {reason}", f"remove {name}")


def _size(value: str | int | None, *, where: str) -> int | None:
    return None if value is None else _above_zero(parse_bytes, value, where=where, example="8GiB")


def _policy(raw: str | dict[Any, Any] | None, *, where: str, folder: Path) -> SloPolicy:
    if raw is None:
        return default_policy()
    return load_policy(folder / raw) if isinstance(raw, str) else parse_policy(raw, where=where)


def _workload(
    raw: Any, engine: _EngineKeys, policy: SloPolicy, *, where: str, folder: Path
) -> tuple[WorkloadSpec, tuple[float, ...]]:
    keys = _read(raw, _WorkloadKeys, where=where)
    most = engine.max_model_len
    arrivals = _arrivals(keys.arrivals, where=f"{where}.arrivals", folder=folder, max_model_len=most)
    classes = _classes(keys.classes, policy, where=f"{where}.classes", with_trace=isinstance(arrivals, TraceArrivals))
    _check_fit(classes, where=f"{where}.classes", max_model_len=most)
    if isinstance(arrivals, TraceArrivals):
        num_requests = keys.requests or len(arrivals.trace.requests)
        rates = keys.rates or [arrivals.trace.rate_per_s]
    else:
        num_requests = _needed(keys.requests, where=f"{where}.requests", example="1000")
        rates = _needed(keys.rates, where=f"{where}.rates", example="[1.0]")
    _check_distinct(rates, where=f"{where}.rates")
    return WorkloadSpec(num_requests, arrivals, classes, keys.max_tokens_factor, most), tuple(rates)


def _needed(value: Any, *, where: str, example: str) -> Any:
    if value is None:
        name = where.rpartition(".")[2]
        raise _wrong(
            where, f"found nothing; expected {name} wherever there is no trace", f"set {name} to {example}, say"
        )
    return value


def _arrivals(raw: str | dict[Any, Any], *, where: str, folder: Path, max_model_len: int) -> Arrivals:
    plain: dict[str, Arrivals] = {"poisson": PoissonArrivals(), "uniform": UniformArrivals()}
    if isinstance(raw, str):
        if raw not in plain:
            problem = f"found {_show(raw)}; expected poisson, uniform, {{gamma: ..}} or {{trace: ..}}"
            raise _wrong(where, problem, _did_you_mean(raw, plain) or "set arrivals to poisson, say")
        return plain[raw]
    kind, value = _only_key(raw, ("gamma", "trace"), where=where)
    if kind == "gamma":
        return GammaArrivals(_read(value, _GammaKeys, where=f"{where}.gamma").cv)
    keys = _read(value, _TraceKeys, where=f"{where}.trace")
    trace = read_trace(
        folder / keys.path,
        time_scale=keys.time_scale,
        limit=keys.limit,
        max_prompt_tokens=keys.max_prompt_tokens,
        max_total_tokens=max_model_len,
    )
    return TraceArrivals(trace)


def _classes(raw: list[Any] | None, policy: SloPolicy, *, where: str, with_trace: bool) -> tuple[ClassMix, ...]:
    if raw is None and with_trace:
        return (ClassMix(),)
    entries = _needed(raw, where=where, example="[{prompt_tokens: {fixed: 100}, output_tokens: {fixed: 100}}]")
    return tuple(_class(entry, policy, where=f"{where}[{i}]", with_trace=with_trace) for i, entry in enumerate(entries))


def _class(raw: Any, policy: SloPolicy, *, where: str, with_trace: bool) -> ClassMix:
    keys = _read(raw, _ClassKeys, where=where)
    if keys.slo_class is not None and keys.slo_class not in policy.classes:
        problem = f"found {_show(keys.slo_class)}; expected one of the policy's classes: {', '.join(policy.classes)}"
        fix = _did_you_mean(keys.slo_class, policy.classes) or "set it to one of them, or add the class to policy"
        raise _wrong(f"{where}.slo_class", problem, fix)
    lengths = {}
    for name in ("prompt_tokens", "output_tokens"):
        given = getattr(keys, name)
        if given is None and not with_trace:
            _needed(None, where=f"{where}.{name}", example="{fixed: 100}")
        lengths[name] = None if given is None else _lengths(given, where=f"{where}.{name}")
    return ClassMix(keys.slo_class, keys.share, **lengths)


def _lengths(raw: dict[Any, Any], *, where: str) -> Lengths:
    kind, value = _only_key(raw, tuple(_LENGTHS), where=where)
    return _LENGTHS[kind](value, where=f"{where}.{kind}")


def _fixed(value: Any, *, where: str) -> Lengths:
    if not _is_count(value):
        raise _wrong(
            where, f"found {_show(value)}; expected a whole number of tokens, 1 or more", "set fixed to 100, say"
        )
    return FixedLength(value)


def _uniform(value: Any, *, where: str) -> Lengths:
    is_pair = isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))
    if not is_pair or value[0] > value[1]:
        problem = f"found {_show(value)}; expected [least, most] in whole tokens, 1 <= least <= most"
        raise _wrong(where, problem, "set uniform to [100, 300], say")
    return UniformLength(*value)


def _lognormal(value: Any, *, where: str) -> Lengths:
    keys = _read(value, _LognormalKeys, where=where)
    if keys.most < keys.median:
        problem = f"found {keys.most}; expected at least the median, {keys.median:g}"
        raise _wrong(f"{where}.most", problem, f"set most to {keys.median * 4:.0f}, say")
    return LognormalLength(keys.median, keys.sigma, keys.most)


_LENGTHS: Final[Mapping[str, Callable[..., Lengths]]] = {
    "fixed": _fixed,
    "uniform": _uniform,
    "lognormal": _lognormal,
}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _only_key(raw: dict[Any, Any], known: Sequence[str], *, where: str) -> tuple[str, Any]:
    """Return the one entry of a mapping whose key says what kind of thing it holds."""
    for key in raw:
        if key not in known:
            problem = f"found an unknown key; expected one of {', '.join(known)}"
            raise _wrong(_join(where, key), problem, _did_you_mean(key, known))
    if len(raw) != 1:
        raise _wrong(where, f"found {len(raw)} keys; expected exactly one of {', '.join(known)}", "keep one of them")
    return next(iter(raw.items()))


def _check_fit(classes: Sequence[ClassMix], *, where: str, max_model_len: int) -> None:
    for i, mix in enumerate(classes):
        # A length that is left to the trace counts as 1: the trace's own requests were cut to fit.
        longest = sum(1 if lengths is None else lengths.most for lengths in (mix.prompt_tokens, mix.output_tokens))
        if longest > max_model_len:
            problem = f"found requests of up to {longest} tokens; expected at most max_model_len, {max_model_len}"
            raise _wrong(
                f"{where}[{i}]", problem, "set shorter prompt_tokens or output_tokens, or a larger max_model_len"
            )


def _check_names(names: Sequence[str], *, where: str) -> None:
    for i, name in enumerate(names):
        if name not in POLICIES:
            problem = f"found {_show(name)}; expected one of {', '.join(POLICIES)}"
            raise _wrong(f"{where}[{i}]", problem, _did_you_mean(name, POLICIES) or "set one of them")
    _check_distinct(names, where=where)


def _check_distinct(items: Sequence[object], *, where: str) -> None:
    for i, item in enumerate(items):
        if item in items[:i]:
            raise _wrong(f"{where}[{i}]", f"found {_show(item)} a second time; expected it once", "remove it")
