"""The configuration of a simulation: which engine, which policies, which requests (a YAML file).

Invariant, as for all of layerkv's configuration: whatever is wrong with the file, or with a file that it names, is
one `ConfigError` of one line that says where it is, what was found, what was expected, and what to set.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta

from layerkv.config import SloPolicy
from layerkv.core.cost import CostProfile, load_profile
from layerkv.sim.presets import DEVICES, MODELS, kv_memory_bytes, preset
from layerkv.sim.workload import (
    WorkloadSpec,
)
from layerkv.sim.workload_config import check_distinct, count_meta, load_document, read_policy, read_workload

# One way of reading YAML and of writing refusals for all of layerkv: these helpers are private to the package.
from layerkv.strict_yaml import above_zero, did_you_mean, read_keys, show, wrong
from layerkv.units import parse_bytes

__all__ = ["POLICIES", "SimConfig", "load_sim_config", "read_sim_config", "read_size"]

POLICIES: Final = (
    "stock",
    "stock-watermark",
    "layerkv",
    "layerkv-no-slo",
    "layerkv-no-length-prediction",
    "layerkv-streamed",
    "layerkv-slo",
    "oracle",
)
"""What can be simulated, by name."""

DEFAULT_POLICIES: Final = ("stock", "layerkv")

HOST_MEMORY_FACTOR: Final = 4
"""Host memory that a configuration without `host_memory` has, as a multiple of its KV memory. Derived: the engine's
default (`vllm_plugin/host_memory.py`)."""


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


# `description` completes "expected ...", `examples[0]` completes "set <key> to ...".
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
_Ranks: TypeAlias = Annotated[_AtLeastOne | None, count_meta("GPUs", 1)]
_Size: TypeAlias = Annotated[str | int | None, Meta(description="a size above zero such as 8GiB", examples=["8GiB"])]
_Layers: TypeAlias = Annotated[_AtLeastOne | None, count_meta("layers", 32)]
_BlockTokens: TypeAlias = Annotated[_AtLeastOne, count_meta("tokens", 16)]
_StepTokens: TypeAlias = Annotated[_AtLeastOne, count_meta("tokens", 2048)]
_Seqs: TypeAlias = Annotated[_AtLeastOne, count_meta("requests", 256)]
_ModelLen: TypeAlias = Annotated[_AtLeastOne, count_meta("tokens", 32768)]
_Lanes: TypeAlias = Annotated[_AtLeastOne, count_meta("lanes", 2)]
_ZoneTokens: TypeAlias = Annotated[_AtLeastOne | None, count_meta("tokens", 8192)]
_Switch: TypeAlias = Annotated[bool, Meta(description="true or false", examples=[False])]


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
    document = load_document(path, what="a simulation", example="configs/sim/quickstart.yaml")
    return read_sim_config(document, where=f"{path}: $", folder=Path(path).parent)


def read_sim_config(document: Any, *, where: str, folder: Path) -> SimConfig:
    """What such a file holds; paths in it are relative to `folder`.

    Raises:
        ConfigError: it does not say what it should.
    """
    top = where
    keys = read_keys(document, _TopKeys, where=top)
    engine = read_keys(keys.engine, _EngineKeys, where=f"{top}.engine")
    hardware = _hardware(engine, where=f"{top}.engine", folder=folder)
    host_memory_bytes = read_size(engine.host_memory, where=f"{top}.engine.host_memory")
    policy = read_policy(keys.policy, where=f"{top}.policy", folder=folder)
    workload, rates = read_workload(
        keys.workload, policy, max_model_len=engine.max_model_len, where=f"{top}.workload", folder=folder
    )
    _check_names(keys.policies, where=f"{top}.policies")
    check_distinct(keys.seeds, where=f"{top}.seeds")
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


def _hardware(keys: _EngineKeys, *, where: str, folder: Path) -> _Hardware:
    """Read the hardware from presets or from a profile: one of the two, and no key of the other."""
    if (keys.device is None) == (keys.profile is None):
        found = "neither device nor profile" if keys.device is None else "both device and profile"
        raise wrong(where, f"found {found}; expected one of them", "set device and model, or profile and num_layers")
    return _from_presets(keys, where=where) if keys.profile is None else _from_profile(keys, where=where, folder=folder)


def _from_presets(keys: _EngineKeys, *, where: str) -> _Hardware:
    _check_absent(keys, ("num_layers",), where=where, reason="only beside profile: presets know it")
    if keys.model is None:
        raise wrong(
            f"{where}.model", "found nothing; expected the model that runs on device", "set it to llama-2-7b, say"
        )
    assert keys.device is not None
    chosen = preset(keys.device, keys.model, keys.tensor_parallel or 1, where=where)
    given_bytes = read_size(keys.kv_memory, where=f"{where}.kv_memory")
    left_bytes = given_bytes or kv_memory_bytes(chosen.device, chosen.model, chosen.tensor_parallel, where=where)
    return _Hardware(chosen.profile, chosen.model.num_full_layers, left_bytes)


def _from_profile(keys: _EngineKeys, *, where: str, folder: Path) -> _Hardware:
    _check_absent(keys, ("model", "tensor_parallel"), where=where, reason="only beside device: a profile knows them")
    if keys.num_layers is None:
        raise wrong(f"{where}.num_layers", "found nothing; expected the model's layers", "set num_layers to 32, say")
    given_bytes = read_size(keys.kv_memory, where=f"{where}.kv_memory")
    if given_bytes is None:
        problem = "found nothing; expected the KV memory of all ranks, which a profile does not know"
        raise wrong(f"{where}.kv_memory", problem, "set kv_memory to 8GiB, say")
    assert keys.profile is not None
    profile = load_profile(folder / keys.profile)
    if not profile.kv_bytes_per_token:
        problem = f"found a profile without kv_bytes_per_token ({folder / keys.profile}); expected it above zero"
        raise wrong(f"{where}.profile", problem, "add it to the profile")
    return _Hardware(profile, keys.num_layers, given_bytes)


def _check_absent(keys: _EngineKeys, names: Sequence[str], *, where: str, reason: str) -> None:
    for name in names:
        if (value := getattr(keys, name)) is not None:
            raise wrong(f"{where}.{name}", f"found {show(value)}; expected {name} {reason}", f"remove {name}")


def read_size(value: str | int | None, *, where: str) -> int | None:
    """Bytes above zero, if any are given.

    Raises:
        ConfigError: they are no such size.
    """
    return None if value is None else above_zero(parse_bytes, value, where=where, example="8GiB")


def _check_names(names: Sequence[str], *, where: str) -> None:
    for i, name in enumerate(names):
        if name not in POLICIES:
            problem = f"found {show(name)}; expected one of {', '.join(POLICIES)}"
            raise wrong(f"{where}[{i}]", problem, did_you_mean(name, POLICIES) or "set one of them")
    check_distinct(names, where=where)
