"""The configuration of a simulation of several models on one device (a YAML file).

What is wrong with it is one `ConfigError` of one line, as in :mod:`layerkv.sim.config`, whose parts it uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta

from layerkv.sim.config import SimConfig, read_sim_config, read_size
from layerkv.sim.workload_config import check_distinct, load_document
from layerkv.strict_yaml import did_you_mean, join_path, read_keys, show, wrong
from layerkv.units import format_bytes

ARMS: Final = ("static-stock", "on-demand-stock", "static", "on-demand", "shared-equal", "shared")
"""Ways to divide the memory, by name; those that end in ``-stock`` have engines that schedule as vLLM does."""

DEFAULT_ARMS: Final = ("static", "on-demand", "shared")


@dataclass(frozen=True, slots=True)
class SharedModel:
    """One of the models.

    Attributes:
        config: Its engine and load; its KV memory is what a static partition gives it.
        floor_bytes: What it gets whenever it needs that much; None is what its longest request needs.
        ceiling_bytes: More it does not use; None is all that there is.
        weight: Beside the others.
    """

    config: SimConfig
    floor_bytes: int | None = None
    ceiling_bytes: int | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SharingConfig:
    """A simulation of models that share a device, checked: one run for each arm and seed."""

    kv_memory_bytes: int
    models: dict[str, SharedModel]
    arms: tuple[str, ...] = DEFAULT_ARMS
    seeds: tuple[int, ...] = (0,)


_Version: TypeAlias = Annotated[int, Meta(ge=1, le=1, description="the number 1", examples=[1])]
_Memory: TypeAlias = Annotated[
    str | int, Meta(description="the KV memory of all models, such as 8GiB", examples=["8GiB"])
]
_Models: TypeAlias = Annotated[
    dict[str, Any],
    Meta(min_length=1, description="a mapping of at least one model, by name", examples=[{"chat": {"engine": {}}}]),
]
_Arms: TypeAlias = Annotated[
    list[str], Meta(min_length=1, description=f"a list of some of {', '.join(ARMS)}", examples=[list(DEFAULT_ARMS)])
]
_Seeds: TypeAlias = Annotated[
    list[Annotated[int, Meta(ge=0)]],
    Meta(min_length=1, description="a list of at least one whole number, 0 or more", examples=[[0]]),
]
_Policy: TypeAlias = Annotated[
    str | dict[Any, Any] | None,
    Meta(description="the path of an SLO policy file, or what stands in one", examples=["slo.yaml"]),
]
_Part: TypeAlias = Annotated[dict[Any, Any], Meta(description="a mapping, as in a simulation file", examples=[{}])]
_Size: TypeAlias = Annotated[str | int | None, Meta(description="a size above zero such as 2GiB", examples=["2GiB"])]
_Share: TypeAlias = Annotated[float, Meta(gt=0, le=1e9, description="a number above zero", examples=[1.0])]


class _TopKeys(msgspec.Struct, frozen=True):
    version: _Version
    kv_memory: _Memory
    models: _Models
    arms: _Arms = msgspec.field(default_factory=lambda: list(DEFAULT_ARMS))
    seeds: _Seeds = msgspec.field(default_factory=lambda: [0])
    policy: _Policy = None


class _ModelKeys(msgspec.Struct, frozen=True):
    engine: _Part
    workload: _Part
    policy: _Policy = None
    kv_floor: _Size = None
    kv_ceiling: _Size = None
    weight: _Share = 1.0
    static_share: _Share = 1.0


def is_sharing(document: Any) -> bool:
    """Whether a simulation file is one of these."""
    return isinstance(document, dict) and "models" in document


def load_sharing_config(path: str | Path) -> SharingConfig:
    """Read and check such a file; the paths in it are relative to its own folder.

    Raises:
        ConfigError: the file, or one that it names, does not say what it should.
    """
    top, folder = f"{path}: $", Path(path).parent
    document = load_document(path, what="a simulation", example="configs/sharing/two_models.yaml")
    keys = read_keys(document, _TopKeys, where=top)
    kv_memory = read_size(keys.kv_memory, where=f"{top}.kv_memory")
    assert kv_memory is not None
    for i, name in enumerate(keys.arms):
        if name not in ARMS:
            problem = f"found {show(name)}; expected one of {', '.join(ARMS)}"
            raise wrong(f"{top}.arms[{i}]", problem, did_you_mean(name, ARMS) or "set one of them")
    check_distinct(keys.arms, where=f"{top}.arms")
    check_distinct(keys.seeds, where=f"{top}.seeds")
    wheres = {name: join_path(f"{top}.models", name) for name in keys.models}
    models = {name: read_keys(raw, _ModelKeys, where=wheres[name]) for name, raw in keys.models.items()}
    shares = sum(model.static_share for model in models.values())
    return SharingConfig(
        kv_memory,
        {
            name: _model(
                model, int(kv_memory * model.static_share / shares), keys.policy, where=wheres[name], folder=folder
            )
            for name, model in models.items()
        },
        tuple(keys.arms),
        tuple(keys.seeds),
    )


def _model(
    keys: _ModelKeys, share_bytes: int, policy: str | dict[Any, Any] | None, *, where: str, folder: Path
) -> SharedModel:
    if "kv_memory" in keys.engine:
        found = show(keys.engine["kv_memory"])
        raise wrong(
            f"{where}.engine.kv_memory",
            f"found {found}; expected kv_memory at the top of the file, for all models",
            "remove it here; static_share says how much of it a static partition gives this one",
        )
    document = {
        "version": 1,
        "engine": {**keys.engine, "kv_memory": share_bytes},
        "workload": keys.workload,
        "policy": policy if keys.policy is None else keys.policy,
    }
    config = read_sim_config(document, where=where, folder=folder)
    if len(config.rates) > 1:
        problem = f"found {len(config.rates)} rates; expected one for each model"
        raise wrong(f"{where}.workload.rates", problem, f"set rates to [{config.rates[0]:g}], say")
    floor = read_size(keys.kv_floor, where=f"{where}.kv_floor")
    ceiling = read_size(keys.kv_ceiling, where=f"{where}.kv_ceiling")
    if floor is not None and ceiling is not None and ceiling < floor:
        problem = f"found {show(keys.kv_ceiling)}; expected at least kv_floor, {format_bytes(floor)}"
        raise wrong(f"{where}.kv_ceiling", problem, "set a larger kv_ceiling, or a smaller kv_floor")
    return SharedModel(replace(config, policies=("layerkv",)), floor, ceiling, keys.weight)
