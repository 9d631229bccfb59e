"""A fleet: which devices there are, and which models are to stand on them (a YAML file, for `layerkv place`).

What is wrong with it is one `ConfigError` of one line, as in :mod:`layerkv.sim.config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from layerkv.config import LEAST_BARE_BYTES
from layerkv.core.placement import Device, Tenant
from layerkv.core.sharing import token_pressure
from layerkv.policy_hints import SLOWEST_TPOT_S
from layerkv.sim.config import read_size
from layerkv.sim.presets import ACTIVATION_BYTES, DEVICES, MODELS
from layerkv.sim.workload_config import load_document
from layerkv.strict_yaml import above_zero, did_you_mean, join_path, read_keys, show, wrong
from layerkv.units import format_bytes, format_seconds, parse_seconds

DEFAULT_UTILIZATION: Final = 0.9
"""Share of a device's memory that may be used. Derived: vLLM's ``--gpu-memory-utilization``."""

DeviceKind: TypeAlias = Literal["gpu", "cpu"]
"""What computes on a device: a GPU with its own memory, or the processors of a machine, whose memory is divided."""


@dataclass(frozen=True, slots=True)
class FleetModel:
    """A model of the fleet.

    Attributes:
        name: What clients call it.
        source: What vLLM loads: a name or a path.
        tenants: Its replicas, to place.
        kv_floor_bytes: KV memory that each gets whenever it needs that much, over all ranks,
        kv_ceiling_bytes: and the most that it uses; None is all that there is.
        weight: Beside other models.
        max_model_len: Tokens of the longest request; None is what the model says of itself.
    """

    name: str
    source: str
    tenants: tuple[Tenant, ...]
    kv_floor_bytes: int
    kv_ceiling_bytes: int | None
    weight: float
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class Fleet:
    """Devices and models, checked. All devices are of one kind."""

    devices: tuple[Device, ...]
    models: tuple[FleetModel, ...]
    kind: DeviceKind


_Version: TypeAlias = Annotated[int, Meta(ge=1, le=1, description="the number 1", examples=[1])]
_List: TypeAlias = Annotated[
    list[Any], Meta(min_length=1, description="a list of at least one kind of device", examples=[[{"preset": "H100"}]])
]
_Map: TypeAlias = Annotated[
    dict[str, Any], Meta(min_length=1, description="a mapping of at least one model, by name", examples=[{"chat": {}}])
]
_Name: TypeAlias = Annotated[str, Meta(min_length=1, pattern=r"^[\w.-]+$", description="a name", examples=["gpu"])]
_Kind: TypeAlias = Annotated[DeviceKind, Meta(description="gpu or cpu", examples=["cpu"])]
_Device: TypeAlias = Annotated[str | None, Meta(description=f"one of {', '.join(DEVICES)}", examples=["H100"])]
_Model: TypeAlias = Annotated[str | None, Meta(description=f"one of {', '.join(MODELS)}", examples=["llama-3.1-8b"])]
_Source: TypeAlias = Annotated[
    str | None, Meta(description="what vLLM loads: a name or a path", examples=["ORG/MODEL"])
]
_Size: TypeAlias = Annotated[str | int | None, Meta(description="a size above zero such as 8GiB", examples=["8GiB"])]
_NeededSize: TypeAlias = Annotated[str | int, Meta(description="a size above zero such as 2GiB", examples=["2GiB"])]
_Count: TypeAlias = Annotated[int, Meta(ge=1, le=10_000, description="a whole number, 1 or more", examples=[1])]
_Length: TypeAlias = Annotated[
    Annotated[int, Meta(ge=1)] | None, Meta(description="tokens of the longest request, 1 or more", examples=[8192])
]
_Use: TypeAlias = Annotated[float, Meta(gt=0, le=1, description="a number above 0 and not above 1", examples=[0.9])]
_Rate: TypeAlias = Annotated[
    float, Meta(ge=0, le=1e9, description="tokens per second, of prompts and outputs, all replicas", examples=[500])
]
_Time: TypeAlias = Annotated[str | float | int, Meta(description="a time such as 100ms", examples=["100ms"])]
_Weight: TypeAlias = Annotated[float, Meta(gt=0, le=1e9, description="a number above zero", examples=[1.0])]


class _TopKeys(msgspec.Struct, frozen=True):
    version: _Version
    devices: _List
    models: _Map


class _DeviceKeys(msgspec.Struct, frozen=True):
    name: _Name = "gpu"
    count: _Count = 1
    kind: _Kind = "gpu"
    preset: _Device = None
    memory: _Size = None
    utilization: _Use = DEFAULT_UTILIZATION


class _ModelKeys(msgspec.Struct, frozen=True):
    token_rate: _Rate
    tpot: _Time
    kv_floor: _NeededSize
    source: _Source = None
    preset: _Model = None
    weights: _Size = None
    kv_bytes_per_token: _Size = None
    activations: _Size = ACTIVATION_BYTES
    tensor_parallel: _Count = 1
    replicas: _Count = 1
    kv_ceiling: _Size = None
    weight: _Weight = 1.0
    max_model_len: _Length = None


def load_fleet(path: str | Path) -> Fleet:
    """Read and check a fleet.

    Raises:
        ConfigError: the file does not say what it should.
    """
    top = f"{path}: $"
    keys = read_keys(load_document(path, what="a fleet", example="configs/fleet/example.yaml"), _TopKeys, where=top)
    given = [read_keys(raw, _DeviceKeys, where=f"{top}.devices[{i}]") for i, raw in enumerate(keys.devices)]
    devices = [d for i, each in enumerate(given) for d in _devices(each, where=f"{top}.devices[{i}]")]
    kind = given[0].kind
    if any(each.kind != kind for each in given):
        raise wrong(f"{top}.devices", "found both kinds, gpu and cpu; expected one", "place each kind's models apart")
    names = [device.name for device in devices]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise wrong(f"{top}.devices", f"found two devices named {name}; expected each once", "set another name")
    models = tuple(_model(name, raw, where=join_path(f"{top}.models", name)) for name, raw in keys.models.items())
    return Fleet(tuple(devices), models, kind)


def _devices(keys: _DeviceKeys, *, where: str) -> list[Device]:
    given = _read_memory(keys.memory, where=f"{where}.memory")
    if (keys.preset is None) == (given is None):
        found = "neither preset nor memory" if given is None else "both preset and memory"
        raise wrong(where, f"found {found}; expected one of them", "set preset to H100, or memory to 80GiB, say")
    if given is None:
        assert keys.preset is not None
        if keys.preset not in DEVICES:
            problem = f"found {show(keys.preset)}; expected one of {', '.join(DEVICES)}"
            raise wrong(f"{where}.preset", problem, did_you_mean(keys.preset, DEVICES) or "set memory instead")
        if keys.kind == "cpu":
            raise wrong(f"{where}.preset", "found a GPU, but kind is cpu; expected memory", "set memory, to 8GiB say")
        given = DEVICES[keys.preset].memory_bytes
    num_bytes = int(given * keys.utilization)
    return [Device(f"{keys.name}{i}" if keys.count > 1 else keys.name, num_bytes) for i in range(keys.count)]


def _model(name: str, raw: Any, *, where: str) -> FleetModel:
    keys = read_keys(raw, _ModelKeys, where=where)
    weights = _read_memory(keys.weights, where=f"{where}.weights")
    token_bytes = read_size(keys.kv_bytes_per_token, where=f"{where}.kv_bytes_per_token")
    if keys.preset is not None:
        if keys.preset not in MODELS:
            problem = f"found {show(keys.preset)}; expected one of {', '.join(MODELS)}"
            fix = did_you_mean(keys.preset, MODELS) or "set weights and kv_bytes_per_token instead"
            raise wrong(f"{where}.preset", problem, fix)
        weights = weights or MODELS[keys.preset].weight_bytes
        token_bytes = token_bytes or MODELS[keys.preset].kv_bytes_per_token
    for key, value in (("weights", weights), ("kv_bytes_per_token", token_bytes)):
        if value is None:
            raise wrong(f"{where}.{key}", f"found nothing; expected {key} where there is no preset", f"set {key}")
    assert weights is not None
    assert token_bytes is not None
    floor = _read_memory(keys.kv_floor, where=f"{where}.kv_floor")
    assert floor is not None
    ceiling = _read_memory(keys.kv_ceiling, where=f"{where}.kv_ceiling")
    if ceiling is not None and ceiling < floor:
        problem = f"found {show(keys.kv_ceiling)}; expected at least kv_floor, {show(keys.kv_floor)}"
        raise wrong(f"{where}.kv_ceiling", problem, "set a larger kv_ceiling, or a smaller kv_floor")
    if keys.max_model_len is not None and floor < keys.max_model_len * token_bytes:
        problem = (
            f"found {show(keys.kv_floor)}; expected at least {format_bytes(keys.max_model_len * token_bytes)}, which a "
            f"request of max_model_len ({keys.max_model_len}) tokens takes"
        )
        raise wrong(f"{where}.kv_floor", problem, "set a larger kv_floor, or a smaller max_model_len")
    tpot_s = above_zero(parse_seconds, keys.tpot, where=f"{where}.tpot", example="100ms")
    if tpot_s > SLOWEST_TPOT_S:
        problem = f"found {show(keys.tpot)}; expected at most {format_seconds(SLOWEST_TPOT_S)} for a token"
        raise wrong(f"{where}.tpot", problem, "set it to 100ms, say")
    activations = _read_memory(keys.activations, where=f"{where}.activations") or 0
    tenants = tuple(
        Tenant(
            name if keys.replicas == 1 else f"{name}-{i}",
            weight_bytes=weights + activations * keys.tensor_parallel,
            floor_bytes=floor,
            pressure=token_pressure(keys.token_rate / keys.replicas, token_bytes, tpot_s, keys.weight),
            ranks=keys.tensor_parallel,
            model=name,
            # A broker has one device: an engine over several keeps its KV memory to itself.
            shares=keys.tensor_parallel == 1,
        )
        for i in range(keys.replicas)
    )
    return FleetModel(name, keys.source or name, tenants, floor, ceiling, keys.weight, keys.max_model_len)


def _read_memory(value: str | int | None, *, where: str) -> int | None:
    num_bytes = read_size(value, where=where)
    if isinstance(value, int) and value < LEAST_BARE_BYTES:
        problem = f"found {value}, which is {format_bytes(value)}; expected a size such as 8GiB"
        raise wrong(where, problem, f"set {value}GiB, if that is meant")
    return num_bytes
