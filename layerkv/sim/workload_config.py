"""The requests of a configuration file (YAML): the part that simulations and benchmark cases write alike.

Invariant, as for all of layerkv's configuration: whatever is wrong with the file, or with a file that it names, is
one `ConfigError` of one line that says where it is, what was found, what was expected, and what to set.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta

from layerkv.config import SloPolicy, default_policy, load_policy, parse_policy
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

# One way of reading YAML and of writing refusals for all of layerkv: these helpers are private to the package.
from layerkv.strict_yaml import did_you_mean, join_path, load_yaml, read_keys, show, wrong

__all__ = ["check_distinct", "count_meta", "load_document", "read_lengths", "read_policy", "read_workload"]


# What the file looks like, as in layerkv/config.py: `description` completes "expected ...", `examples[0]` completes
# "set <key> to ...".
def count_meta(what: str, example: int) -> Meta:
    """How a whole number, 1 or more, of `what` is described in a refusal."""
    return Meta(description=f"a whole number of {what}, 1 or more", examples=[example])


_NOT_EMPTY: Final = Meta(min_length=1)
_AboveZero: TypeAlias = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
_AtLeastOne: TypeAlias = Annotated[int, Meta(ge=1)]

_Requests: TypeAlias = Annotated[_AtLeastOne | None, count_meta("requests", 1000)]
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
_TokenScale: TypeAlias = Annotated[
    float, Meta(gt=0, le=1e3, description="a number above zero (0.1 makes all lengths a tenth)", examples=[1.0])
]
_Limit: TypeAlias = Annotated[_AtLeastOne | None, count_meta("requests", 1000)]
_MaxPrompt: TypeAlias = Annotated[_AtLeastOne | None, count_meta("tokens", 8192)]
_Median: TypeAlias = Annotated[float, Meta(ge=1, le=1e9, description="a number of at least 1", examples=[100])]
_Sigma: TypeAlias = Annotated[float, Meta(gt=0, le=10, description="a number above 0 and not above 10", examples=[0.5])]
_Most: TypeAlias = Annotated[_AtLeastOne, count_meta("tokens", 400)]


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
    token_scale: _TokenScale = 1.0
    limit: _Limit = None
    max_prompt_tokens: _MaxPrompt = None


class _LognormalKeys(msgspec.Struct, frozen=True):
    median: _Median
    sigma: _Sigma
    most: _Most


def read_workload(
    raw: Any, policy: SloPolicy, *, max_model_len: int, where: str, folder: Path
) -> tuple[WorkloadSpec, tuple[float, ...]]:
    """The requests that a mapping describes, and the rates at which they come; paths are relative to `folder`.

    Raises:
        ConfigError: the mapping, or a trace that it names, is wrong.
    """
    keys = read_keys(raw, _WorkloadKeys, where=where)
    most = max_model_len
    arrivals = _arrivals(keys.arrivals, where=f"{where}.arrivals", folder=folder, max_model_len=most)
    classes = _classes(keys.classes, policy, where=f"{where}.classes", with_trace=isinstance(arrivals, TraceArrivals))
    _check_fit(classes, where=f"{where}.classes", max_model_len=most)
    if isinstance(arrivals, TraceArrivals):
        num_requests = keys.requests or len(arrivals.trace.requests)
        rates = keys.rates or [arrivals.trace.rate_per_s]
    else:
        num_requests = _needed(keys.requests, where=f"{where}.requests", example="1000")
        rates = _needed(keys.rates, where=f"{where}.rates", example="[1.0]")
    check_distinct(rates, where=f"{where}.rates")
    return WorkloadSpec(num_requests, arrivals, classes, keys.max_tokens_factor, most), tuple(rates)


def _needed(value: Any, *, where: str, example: str) -> Any:
    if value is None:
        name = where.rpartition(".")[2]
        raise wrong(
            where, f"found nothing; expected {name} wherever there is no trace", f"set {name} to {example}, say"
        )
    return value


def _arrivals(raw: str | dict[Any, Any], *, where: str, folder: Path, max_model_len: int) -> Arrivals:
    plain: dict[str, Arrivals] = {"poisson": PoissonArrivals(), "uniform": UniformArrivals()}
    if isinstance(raw, str):
        if raw not in plain:
            problem = f"found {show(raw)}; expected poisson, uniform, {{gamma: ..}} or {{trace: ..}}"
            raise wrong(where, problem, did_you_mean(raw, plain) or "set arrivals to poisson, say")
        return plain[raw]
    kind, value = _only_key(raw, ("gamma", "trace"), where=where)
    if kind == "gamma":
        return GammaArrivals(read_keys(value, _GammaKeys, where=f"{where}.gamma").cv)
    keys = read_keys(value, _TraceKeys, where=f"{where}.trace")
    trace = read_trace(
        folder / keys.path,
        time_scale=keys.time_scale,
        token_scale=keys.token_scale,
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
    keys = read_keys(raw, _ClassKeys, where=where)
    if keys.slo_class is not None and keys.slo_class not in policy.classes:
        problem = f"found {show(keys.slo_class)}; expected one of the policy's classes: {', '.join(policy.classes)}"
        fix = did_you_mean(keys.slo_class, policy.classes) or "set it to one of them, or add the class to policy"
        raise wrong(f"{where}.slo_class", problem, fix)
    lengths = {}
    for name in ("prompt_tokens", "output_tokens"):
        given = getattr(keys, name)
        if given is None and not with_trace:
            _needed(None, where=f"{where}.{name}", example="{fixed: 100}")
        lengths[name] = None if given is None else read_lengths(given, where=f"{where}.{name}")
    return ClassMix(keys.slo_class, keys.share, **lengths)


def read_lengths(raw: dict[Any, Any], *, where: str) -> Lengths:
    """Lengths such as ``{fixed: 100}``.

    Raises:
        ConfigError: the mapping is not one of the known kinds.
    """
    kind, value = _only_key(raw, tuple(_LENGTHS), where=where)
    return _LENGTHS[kind](value, where=f"{where}.{kind}")


def _fixed(value: Any, *, where: str) -> Lengths:
    if not _is_count(value):
        raise wrong(
            where, f"found {show(value)}; expected a whole number of tokens, 1 or more", "set fixed to 100, say"
        )
    return FixedLength(value)


def _uniform(value: Any, *, where: str) -> Lengths:
    is_pair = isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))
    if not is_pair or value[0] > value[1]:
        problem = f"found {show(value)}; expected [least, most] in whole tokens, 1 <= least <= most"
        raise wrong(where, problem, "set uniform to [100, 300], say")
    return UniformLength(*value)


def _lognormal(value: Any, *, where: str) -> Lengths:
    keys = read_keys(value, _LognormalKeys, where=where)
    if keys.most < keys.median:
        problem = f"found {keys.most}; expected at least the median, {keys.median:g}"
        raise wrong(f"{where}.most", problem, f"set most to {keys.median * 4:.0f}, say")
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
            raise wrong(join_path(where, key), problem, did_you_mean(key, known))
    if len(raw) != 1:
        raise wrong(where, f"found {len(raw)} keys; expected exactly one of {', '.join(known)}", "keep one of them")
    return next(iter(raw.items()))


def _check_fit(classes: Sequence[ClassMix], *, where: str, max_model_len: int) -> None:
    for i, mix in enumerate(classes):
        # A length that is left to the trace counts as 1: the trace's own requests were cut to fit.
        longest = sum(1 if lengths is None else lengths.most for lengths in (mix.prompt_tokens, mix.output_tokens))
        if longest > max_model_len:
            problem = f"found requests of up to {longest} tokens; expected at most max_model_len, {max_model_len}"
            raise wrong(
                f"{where}[{i}]", problem, "set shorter prompt_tokens or output_tokens, or a larger max_model_len"
            )


def read_policy(raw: str | dict[Any, Any] | None, *, where: str, folder: Path) -> SloPolicy:
    """The policy that stands in a file, or in a file of its own, or the default one.

    Raises:
        ConfigError: the policy is wrong.
    """
    if raw is None:
        return default_policy()
    return load_policy(folder / raw) if isinstance(raw, str) else parse_policy(raw, where=where)


def load_document(path: str | Path, *, what: str, example: str) -> Any:
    """What the YAML file holds, with duplicate keys refused; `what` and `example` are for the refusal.

    Raises:
        ConfigError: the file is unreadable, or not YAML.
    """
    return load_yaml(path, what=what, fix=f"give the path of one, such as {example}")


def check_distinct(items: Sequence[object], *, where: str) -> None:
    """Raises ConfigError if an item is there twice."""
    for i, item in enumerate(items):
        if item in items[:i]:
            raise wrong(f"{where}[{i}]", f"found {show(item)} a second time; expected it once", "remove it")
