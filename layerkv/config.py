"""The typed configuration: SLO policy files (YAML) and the `kv_connector_extra_config` of vLLM's flag.

Read by every process that is handed the flag (front end, engine core, workers) and by `layerkv doctor`;
frozen afterwards. Invariant: whatever is wrong with the input is one `ConfigError`, raised before anything is
allocated, whose one-line message says where it is, what was found, what was expected, and what to set.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta

from layerkv.strict_yaml import above_zero, at_least_zero, did_you_mean, join_path, load_yaml, read_keys, show, wrong
from layerkv.units import format_bytes, parse_bytes, parse_seconds

__all__ = [
    "EXTRA_CONFIG",
    "EngineConfig",
    "Give",
    "Mode",
    "OnUnsupported",
    "Overload",
    "PolicyName",
    "SloClass",
    "SloPolicy",
    "asks_for_smooth",
    "default_policy",
    "experimental_keys",
    "load_policy",
    "load_policy_document",
    "parse_policy",
    "slo_class_of",
]

EXTRA_CONFIG: Final = "kv_connector_extra_config"

Mode: TypeAlias = Literal["auto", "resident", "layered"]
Give: TypeAlias = Literal["park", "wait", "recompute"]
"""What becomes of requests with blocks in memory that a pool gives back: they are parked; or they go on there until
they leave by themselves; or their KV is given up and computed again. The last two exist to compare with."""
OnUnsupported: TypeAlias = Literal["error", "passthrough"]
Overload: TypeAlias = Literal["queue", "reject"]
LengthPrediction: TypeAlias = Literal["quantile", "none"]
PolicyName: TypeAlias = Literal["fluid", "slo", "arrival"]
"""How decisions are made: by when each reader runs dry; by slack on the mean; or in order of arrival. The last two
exist to compare with."""

LEAST_BARE_BYTES: Final = 1 << 20
"""A number without a unit below this was meant in another unit than bytes."""


class SloClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one class of requests was promised.

    `ttft_s` bounds the time to the first token, `tpot_s` the mean time per output token after it; both are
    seconds above zero. `weight` says how much a missed promise of this class counts against another's.
    `max_stall_s` bounds the time between any two tokens, `None` leaves it to the mean. `max_lag_s` bounds all waits
    together of a reader who takes a token every `tpot_s` from the first one on. `stream` says whether there is such a
    reader: False for what is used when it is whole (batches). Without a TPOT (`tpot_s` is infinite) nobody reads.
    `overload` says what becomes of a request that cannot have its first token in time: it queues behind those that can,
    or is rejected.
    `smooth` asks the front end to let its streams go at one token per `tpot_s`, however the engine makes them.
    """

    name: str
    ttft_s: float
    tpot_s: float
    weight: float = 1.0
    max_stall_s: float | None = None
    max_lag_s: float = 1.0
    stream: bool = True
    overload: Overload = "queue"
    smooth: bool = False

    @property
    def has_reader(self) -> bool:
        """Whether somebody reads its tokens as they come, at the pace of its TPOT."""
        return self.stream and self.tpot_s < math.inf

    @property
    def pace_s(self) -> float:
        """Seconds in which its reader takes a token; infinite where nobody reads."""
        return self.tpot_s if self.stream else math.inf


class SloPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All SLO classes of an engine, by name. `default_class` is always one of them.

    `streamed_decode` allows a layered request to go on decoding while its KV stays in host memory (experimental without
    `long_contexts`). `policy` and `length_prediction` exist to compare with: `slo` decides by slack on the mean
    TPOT and not by when readers run dry, `arrival` leaves the objectives out of every decision (arrival order, no
    prefill budget); lengths are learned per class from requests that ended
    (`quantile`), or stay unknown (`none`).
    """

    classes: dict[str, SloClass]
    default_class: str
    streamed_decode: bool = False
    policy: PolicyName = "fluid"
    length_prediction: LengthPrediction = "quantile"

    @property
    def slo_scheduling(self) -> bool:
        """Whether objectives count in decisions."""
        return self.policy != "arrival"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that the flag's `kv_connector_extra_config` says, checked; `None` means "layerkv chooses".

    `mode` is `auto` (layered when it helps), `resident` (never layered) or, to compare with, `layered` (every prompt
    that can be: `compare: {mode: layered}`). `give` says what becomes of requests in memory that is given back; all but
    `park` exists to compare with as well (`compare: {give: wait}`). `on_unsupported` says whether something layerkv
    cannot serve ends start-up or runs as stock vLLM. `allow_untested_vllm` runs with a vLLM that is newer than those
    tested, if it has all that layerkv stands on. `cost_profile` is a file that `layerkv profile` wrote; without one,
    costs are learned from the first steps. `retained_layers` many layers keep memory of their own in the lane zone:
    streamed decode does not load them (experimental without `long_contexts`). `decision_log` is a file that decisions
    are appended to, for `layerkv explain`. `host_prefix_cache` keeps the KV of finished requests in host memory that
    nobody else needs, for prompts that begin alike. `long_contexts` serves requests longer than the KV pool: they
    decode in the lane zone, and `max_model_len` may exceed the pool. `kv_floor_bytes` and `kv_ceiling_bytes` are the
    least and the most KV memory of each worker: between them the pool grows and shrinks. Without requests for
    `idle_after_s` the engine gives back all that it can do without. `broker` is the socket of a memory broker that says
    how much it may hold beside others, and `weight` its share among them. `allow_untested_elastic_cuda` lets it do so
    on CUDA too, where no GPU has run it yet.
    """

    policy_path: str | None = None
    host_memory_bytes: int | None = None
    lanes: int | None = None
    retained_layers: int = 0
    zone_tokens: int | None = None
    mode: Mode = "auto"
    on_unsupported: OnUnsupported = "error"
    allow_untested_vllm: bool = False
    cost_profile: str | None = None
    decision_log: str | None = None
    host_prefix_cache: bool = True
    long_contexts: bool = False
    kv_floor_bytes: int | None = None
    kv_ceiling_bytes: int | None = None
    idle_after_s: float = 2.0
    broker: str | None = None
    weight: float = 1.0
    allow_untested_elastic_cuda: bool = False
    give: Give = "park"

    @property
    def is_elastic(self) -> bool:
        """Whether the pool grows and shrinks."""
        return not (self.kv_floor_bytes is None and self.kv_ceiling_bytes is None and self.broker is None)

    @classmethod
    def from_extra_config(cls, extra_config: Mapping[str, Any]) -> "EngineConfig":
        """Check the flag's `kv_connector_extra_config`. Reads no file.

        Raises:
            ConfigError: anything about the mapping is wrong.
        """
        _refuse_moved_mode(extra_config)
        keys = read_keys(extra_config, _EngineKeys, where=EXTRA_CONFIG)
        mode, give = _read_compared(keys.compare, keys.mode, where=f"{EXTRA_CONFIG}.compare")
        return cls(
            policy_path=keys.policy,
            host_memory_bytes=_read_size("host_memory", keys.host_memory),
            lanes=keys.lanes,
            retained_layers=keys.retained_layers,
            zone_tokens=keys.zone_tokens,
            mode=mode,
            on_unsupported=keys.on_unsupported,
            allow_untested_vllm=keys.allow_untested_vllm,
            cost_profile=keys.cost_profile,
            decision_log=keys.decision_log,
            host_prefix_cache=keys.host_prefix_cache,
            long_contexts=keys.long_contexts,
            kv_floor_bytes=_read_size("kv_floor", keys.kv_floor),
            kv_ceiling_bytes=_read_size("kv_ceiling", keys.kv_ceiling),
            idle_after_s=above_zero(parse_seconds, keys.idle_after, where=f"{EXTRA_CONFIG}.idle_after", example="2s"),
            broker=keys.broker,
            weight=keys.weight,
            allow_untested_elastic_cuda=keys.allow_untested_elastic_cuda,
            give=give,
        )

    def read_policy(self) -> SloPolicy:
        """The policy in the file that the flag names, or the one that is built in.

        For front ends and schedulers. Workers take no policy: one that is broken since must not end a worker that
        starts again. A relative path is relative to the working directory of the process.

        Raises:
            ConfigError: the file is missing or unreadable, or does not describe a policy.
        """
        return default_policy() if self.policy_path is None else load_policy(self.policy_path)


def experimental_keys(config: EngineConfig, policy: SloPolicy) -> tuple[str, ...]:
    """What is set of the keys whose speed was never measured: decoding in the zone of requests that the pool holds."""
    if config.long_contexts:
        return ()
    keys = {"retained_layers": config.retained_layers > 0, "streamed_decode": policy.streamed_decode}
    return tuple(key for key, is_set in keys.items() if is_set)


def default_policy() -> SloPolicy:
    """Return the policy of an engine that was given no file: one class, `default`, 2 s and 200 ms."""
    only = SloClass(name="default", ttft_s=2.0, tpot_s=0.2)
    return SloPolicy(classes={only.name: only}, default_class=only.name)


def load_policy(path: str | Path) -> SloPolicy:
    """Read and check an SLO policy file.

    Raises:
        ConfigError: the file is missing or unreadable, is not YAML, or does not describe a policy.
    """
    return parse_policy(load_policy_document(path), where=f"{path}: $")


def load_policy_document(path: str | Path) -> Any:
    """Read what an SLO policy file holds, for :func:`parse_policy`.

    Raises:
        ConfigError: the file is missing or unreadable, or is not YAML.
    """
    document = load_yaml(path, what="an SLO policy", fix="set policy to its path")
    if document is None:
        problem = "found an empty file; expected an SLO policy"
        raise wrong(str(path), problem, "set version, default_class and classes in it")
    return document


def parse_policy(raw: Any, *, where: str) -> SloPolicy:
    """Check what a policy file holds; `where` is the path of its top in messages, such as `slo.yaml: $`.

    Raises:
        ConfigError: it does not describe a policy.
    """
    top = where
    _refuse_moved_switches(raw, where=top)
    keys = read_keys(raw, _PolicyKeys, where=top)
    compare = read_keys(keys.compare, _ComparedPolicyKeys, where=f"{top}.compare")
    classes = {
        name: _read_class(name, promises, where=join_path(f"{top}.classes", name), overload=keys.overload)
        for name, promises in keys.classes.items()
    }
    if keys.default_class not in classes:
        problem = _unknown_class(keys.default_class, classes)
        fix = did_you_mean(keys.default_class, classes) or "set it to one of them, or add the class"
        raise wrong(f"{top}.default_class", problem, fix)
    return SloPolicy(
        classes=classes,
        default_class=keys.default_class,
        streamed_decode=keys.streamed_decode,
        policy=compare.policy,
        length_prediction=compare.length_prediction,
    )


def slo_class_of(extra_args: Mapping[str, Any] | None, policy: SloPolicy) -> SloClass:
    """Return the SLO class that a request names in `SamplingParams.extra_args`, else the default class.

    Raises:
        ConfigError: the request names a class that the policy does not have.
    """
    name = (extra_args or {}).get("slo_class")
    if name is None:
        return policy.classes[policy.default_class]
    if not isinstance(name, str) or name not in policy.classes:
        fix = did_you_mean(name, policy.classes)
        fix = fix or f"set one of them, or leave it out for {policy.default_class}"
        raise wrong("slo_class", _unknown_class(name, policy.classes), fix)
    return policy.classes[name]


def _choices(names: object) -> str:
    """Every name of a `Literal`, as messages put them."""
    *others, last = get_args(names)
    return f"{', '.join(others)} or {last}" if others else str(last)


def asks_for_smooth(extra_args: Mapping[str, Any] | None, slo: SloClass) -> bool:
    """Whether a request of this class is to be streamed at its reader's pace: as it says, else as the class does.

    Raises:
        ConfigError: what the request says is neither yes nor no.
    """
    asked = (extra_args or {}).get("smooth")
    if asked is None:
        return slo.smooth
    if asked in (True, False):  # vLLM makes numbers of what was true or false in the body
        return bool(asked)
    raise wrong(
        "smooth", f"found {show(asked)}; expected true or false", f"leave it out for what class {slo.name} says"
    )


# What the files and the flag look like before units are read. `description` completes "expected ...",
# `examples[0]` completes "set <key> to ...".
_Count: TypeAlias = Annotated[int, Meta(ge=1)]
_Duration: TypeAlias = Annotated[
    str | int | float,
    Meta(description="a duration above zero such as 500ms, 30s or 2m", examples=["500ms"]),
]
_Weight: TypeAlias = Annotated[
    float,
    Meta(gt=0, le=sys.float_info.max, description="a finite number above zero", examples=[1]),
]
_Version: TypeAlias = Annotated[Literal[1], Meta(description="the number 1", examples=[1])]
_ClassName: TypeAlias = Annotated[str, Meta(description="the name of one of the classes, as text", examples=["chat"])]
_Classes: TypeAlias = Annotated[
    dict[str, Any],
    Meta(
        min_length=1,
        description="a mapping from at least one class name (as text) to its promises",
        examples=[{"chat": {"ttft": "500ms", "tpot": "50ms"}}],
    ),
]
_Switch: TypeAlias = Annotated[bool, Meta(description="true or false", examples=[False])]
_Overload: TypeAlias = Annotated[Overload, Meta(description="queue or reject", examples=["queue"])]
_ClassOverload: TypeAlias = Annotated[Overload | None, Meta(description="queue or reject", examples=["queue"])]
_Stall: TypeAlias = Annotated[
    str | int | float | None,
    Meta(description="a duration above zero such as 500ms, 30s or 2m", examples=["2s"]),
]
_Tpot: TypeAlias = Annotated[
    str | int | float | None,
    Meta(description="a duration above zero such as 50ms, or no such key where nobody reads along", examples=["50ms"]),
]
_Lag: TypeAlias = Annotated[
    str | int | float, Meta(description="a duration such as 500ms or 2s, or 0", examples=["1s"])
]
_LengthPrediction: TypeAlias = Annotated[
    LengthPrediction, Meta(description=_choices(LengthPrediction), examples=["quantile"])
]
_PolicyName: TypeAlias = Annotated[PolicyName, Meta(description=_choices(PolicyName), examples=["slo"])]
_ComparedPolicy: TypeAlias = Annotated[
    dict[str, Any],
    Meta(description="a mapping with the keys policy, length_prediction", examples=[{"policy": "arrival"}]),
]
_ComparedEngine: TypeAlias = Annotated[
    dict[str, Any] | None, Meta(description="a mapping with the keys mode, give", examples=[{"mode": "layered"}])
]
_ProfilePath: TypeAlias = Annotated[
    str | None, Meta(description="the path of a file that `layerkv profile` wrote", examples=["profile.json"])
]
_LogPath: TypeAlias = Annotated[
    str | None, Meta(description="the path of a file to append decisions to", examples=["decisions.jsonl"])
]
_PolicyPath: TypeAlias = Annotated[
    str | None, Meta(description="the path of an SLO policy file", examples=["slo.yaml"])
]
_HostMemory: TypeAlias = Annotated[
    str | int | None, Meta(description="a size above zero such as 8GiB", examples=["8GiB"])
]
_KVMemory: TypeAlias = Annotated[
    str | int | None, Meta(description="a size above zero such as 8GiB", examples=["8GiB"])
]
_BrokerPath: TypeAlias = Annotated[
    str | None, Meta(description="the path of a socket that `layerkv broker` listens at", examples=["broker.sock"])
]
_Lanes: TypeAlias = Annotated[_Count | None, Meta(description="a whole number of lanes, 1 or more", examples=[1])]
_RetainedLayers: TypeAlias = Annotated[int, Meta(ge=0, description="a whole number of layers, 0 or more", examples=[0])]
_ZoneTokens: TypeAlias = Annotated[
    _Count | None, Meta(description="a whole number of tokens, 1 or more", examples=[8192])
]
_ServingMode: TypeAlias = Annotated[
    Literal["auto", "resident"], Meta(description="auto or resident", examples=["auto"])
]
_ComparedMode: TypeAlias = Annotated[Literal["layered"] | None, Meta(description="layered", examples=["layered"])]
_Give: TypeAlias = Annotated[Give, Meta(description=_choices(Give), examples=["wait"])]
_OnUnsupported: TypeAlias = Annotated[OnUnsupported, Meta(description="error or passthrough", examples=["error"])]


class _ClassKeys(msgspec.Struct, frozen=True):
    """One entry under `classes`."""

    ttft: _Duration
    tpot: _Tpot = None
    weight: _Weight = 1.0
    max_stall: _Stall = None
    max_lag: _Lag = "1s"
    stream: _Switch = True
    overload: _ClassOverload = None
    smooth: _Switch = False


class _PolicyKeys(msgspec.Struct, frozen=True):
    """The top of a policy file. Classes are read one by one: msgspec's own path leaves their names out."""

    version: _Version
    default_class: _ClassName
    classes: _Classes
    streamed_decode: _Switch = False
    overload: _Overload = "queue"
    compare: _ComparedPolicy = msgspec.field(default_factory=dict)


class _ComparedPolicyKeys(msgspec.Struct, frozen=True):
    """What stands under `compare` in a policy file: decisions that nobody wants, to measure the others by."""

    policy: _PolicyName = "fluid"
    length_prediction: _LengthPrediction = "quantile"


class _EngineKeys(msgspec.Struct, frozen=True):
    """The keys of `kv_connector_extra_config`."""

    policy: _PolicyPath = None
    host_memory: _HostMemory = None
    lanes: _Lanes = None
    retained_layers: _RetainedLayers = 0
    zone_tokens: _ZoneTokens = None
    mode: _ServingMode = "auto"
    on_unsupported: _OnUnsupported = "error"
    allow_untested_vllm: _Switch = False
    cost_profile: _ProfilePath = None
    decision_log: _LogPath = None
    host_prefix_cache: _Switch = True
    long_contexts: _Switch = False
    kv_floor: _KVMemory = None
    kv_ceiling: _KVMemory = None
    idle_after: _Duration = "2s"
    broker: _BrokerPath = None
    weight: _Weight = 1.0
    allow_untested_elastic_cuda: _Switch = False
    compare: _ComparedEngine = None


class _ComparedEngineKeys(msgspec.Struct, frozen=True):
    """What stands under `compare` in the flag.

    `resident` is a plain mode: whoever wants parking and no layered prefill (and no zone) serves with it. `layered` has
    no such use: `auto` runs a prompt layered wherever that helps. Nor has `give`: whoever is parked loses nothing.
    """

    mode: _ComparedMode = None
    give: _Give = "park"


def _read_size(key: str, found: str | int | None) -> int | None:
    if found is None:
        return None
    where = f"{EXTRA_CONFIG}.{key}"
    size = above_zero(parse_bytes, found, where=where, example="8GiB")
    if isinstance(found, int) and size < LEAST_BARE_BYTES:
        problem = (
            f"found {found}, which is {format_bytes(size)}, less than any block of KV takes; expected a size above "
            "zero such as 8GiB"
        )
        raise wrong(where, problem, f'set {key} to "8GiB", say')
    return size


def _refuse_moved_mode(extra_config: object) -> None:
    if isinstance(extra_config, Mapping) and extra_config.get("mode") == "layered":
        problem = "found 'layered', which exists to compare with; expected auto or resident here"
        raise wrong(f"{EXTRA_CONFIG}.mode", problem, 'set compare to {"mode": "layered"} instead')


def _read_compared(raw: object, mode: Mode, *, where: str) -> tuple[Mode, Give]:
    compared = read_keys({} if raw is None else raw, _ComparedEngineKeys, where=where)
    if compared.mode is None:
        return mode, compared.give
    if mode != "auto":
        problem = f"found {show(compared.mode)} beside mode: {mode}; expected one of them"
        raise wrong(f"{where}.mode", problem, "leave compare.mode or mode out")
    return compared.mode, compared.give


def _refuse_moved_switches(raw: object, *, where: str) -> None:
    """Policy files from before there was `compare` have its keys at the top."""
    found = raw if isinstance(raw, Mapping) else {}
    problem = "found a key that exists to compare with; expected it under compare"
    if "slo_scheduling" in found:
        fix = "set compare: {policy: arrival} instead" if found["slo_scheduling"] is False else "leave it out"
        raise wrong(f"{where}.slo_scheduling", problem, f"{fix} (compare.policy is {_choices(PolicyName)})")
    if "length_prediction" in found:
        fix = "set compare: {length_prediction: none} instead"
        fix = fix if found["length_prediction"] == "none" else "leave it out: quantile is the default"
        raise wrong(f"{where}.length_prediction", problem, fix)


def _read_class(name: str, promises: Any, *, where: str, overload: Overload) -> SloClass:
    keys = read_keys(promises, _ClassKeys, where=where)
    tpot_s, max_stall_s = math.inf, None
    if keys.tpot is not None:
        tpot_s = above_zero(parse_seconds, keys.tpot, where=f"{where}.tpot", example="50ms")
    if keys.max_stall is not None:
        max_stall_s = above_zero(parse_seconds, keys.max_stall, where=f"{where}.max_stall", example="2s")
    return SloClass(
        name=name,
        ttft_s=above_zero(parse_seconds, keys.ttft, where=f"{where}.ttft", example="500ms"),
        tpot_s=tpot_s,
        weight=keys.weight,
        max_stall_s=max_stall_s,
        max_lag_s=at_least_zero(parse_seconds, keys.max_lag, where=f"{where}.max_lag", example="1s"),
        stream=keys.stream,
        overload=keys.overload or overload,
        smooth=keys.smooth,
    )


def _unknown_class(name: object, known: Iterable[str]) -> str:
    return f"found {show(name)}; expected one of the classes: {', '.join(known)}"
