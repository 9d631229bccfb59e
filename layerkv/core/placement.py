"""Which models stand on which devices: Prism's placement by KV pressure (`layerkv place`, and the simulator).

A device's *pressure ratio* (Prism's KVPR, arXiv 2505.04021) is what its models ask of its memory over the KV memory
that they share: the higher it is, the longer they wait for each other. Models in falling order of pressure each go
where the ratio is lowest with them. Shards of one model never stand on the same device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from layerkv.errors import ConfigError
from layerkv.units import format_bytes


@dataclass(frozen=True, slots=True)
class Device:
    """A device by name, and the memory that weights and KV may take of it."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Tenant:
    """A model to place. What it takes is of all ranks together, and each has an even part of it.

    Attributes:
        name: The model, or one of its replicas.
        weight_bytes: Weights, and what else it takes for itself for good.
        floor_bytes: KV memory that it must be able to get.
        pressure: What it asks of KV memory, see :func:`layerkv.core.sharing.token_pressure`.
        ranks: Shards, each on a device of its own.
        model: Of whom it is a replica: two of one model never stand on one device. Itself if empty.
        shares: Whether it lends and borrows KV memory; if not, its floor is its own, and all it has.
    """

    name: str
    weight_bytes: int
    floor_bytes: int
    pressure: float
    ranks: int = 1
    model: str = ""
    shares: bool = True

    @property
    def needed_bytes(self) -> int:
        """What each of its devices must have."""
        return self.own_bytes + (self.rank_floor_bytes if self.shares else 0)

    @property
    def own_bytes(self) -> int:
        """What each of its devices can share with nobody."""
        return -(-self.weight_bytes // self.ranks) + (0 if self.shares else self.rank_floor_bytes)

    @property
    def rank_floor_bytes(self) -> int:
        """Its floor on each of its devices."""
        return -(-self.floor_bytes // self.ranks)

    @property
    def rank_pressure(self) -> float:
        """What it asks of the shared memory of each of its devices."""
        return self.pressure / self.ranks if self.shares else 0.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every model stands.

    Attributes:
        devices_of: Devices by model, one for each rank.
        tenants_on: Models by device, every device among them.
        shared_bytes: KV memory by device that its models share.
    """

    devices_of: Mapping[str, tuple[str, ...]]
    tenants_on: Mapping[str, tuple[Tenant, ...]]
    shared_bytes: Mapping[str, int]

    def pressure_ratio(self, device: str) -> float:
        """KVPR: what its models ask for, over the memory that they share; 0 without models."""
        return _ratio(sum(t.rank_pressure for t in self.tenants_on[device]), self.shared_bytes[device])


def place(devices: Sequence[Device], tenants: Iterable[Tenant]) -> Placement:
    """Place all models, or none.

    Greedy, in falling order of pressure; where that leaves one without a place, once more in falling order of size.
    A fleet that fits in some way may still be refused.

    Raises:
        ConfigError: a model has no place; says which, and how much is missing on the device that comes nearest.
    """
    models = list(tenants)
    by_pressure = sorted(models, key=lambda t: (-t.pressure, -t.needed_bytes, t.name))
    by_size = sorted(models, key=lambda t: (-t.needed_bytes, -t.pressure, t.name))
    try:
        return _place_in_order(devices, by_pressure)
    except ConfigError:
        return _place_in_order(devices, by_size)


def _place_in_order(devices: Sequence[Device], tenants: Sequence[Tenant]) -> Placement:
    on: dict[str, list[Tenant]] = {device.name: [] for device in devices}
    devices_of: dict[str, tuple[str, ...]] = {}
    for tenant in tenants:
        allowed = [d for d in devices if all(_model(other) != _model(tenant) for other in on[d.name])]
        fitting = [d for d in allowed if tenant.needed_bytes <= _free_bytes(d, on[d.name])]
        if len(fitting) < tenant.ranks:
            raise _no_place(tenant, devices, allowed, on, num_fitting=len(fitting))
        fitting.sort(key=lambda d: _ratio_with(d, on[d.name], tenant))  # stable: the first of equals
        for device in fitting[: tenant.ranks]:
            on[device.name].append(tenant)
        devices_of[tenant.name] = tuple(device.name for device in fitting[: tenant.ranks])
    return Placement(
        devices_of,
        {name: tuple(members) for name, members in on.items()},
        {device.name: device.num_bytes - sum(t.own_bytes for t in on[device.name]) for device in devices},
    )


def _model(tenant: Tenant) -> str:
    return tenant.model or tenant.name


def _free_bytes(device: Device, members: Sequence[Tenant]) -> int:
    return device.num_bytes - sum(member.needed_bytes for member in members)


def _ratio_with(device: Device, members: Sequence[Tenant], tenant: Tenant) -> float:
    everybody = (*members, tenant)
    shared = device.num_bytes - sum(member.own_bytes for member in everybody)
    return _ratio(sum(member.rank_pressure for member in everybody), shared)


def _ratio(pressure: float, shared_bytes: int) -> float:
    if not pressure:
        return 0.0
    return pressure / shared_bytes if shared_bytes > 0 else math.inf


def _no_place(
    tenant: Tenant,
    devices: Sequence[Device],
    allowed: Sequence[Device],
    on: Mapping[str, Sequence[Tenant]],
    *,
    num_fitting: int,
) -> ConfigError:
    needs = f"{format_bytes(tenant.needed_bytes)} on each of {tenant.ranks} device{'s' * (tenant.ranks > 1)}"
    what = f"{tenant.name}: does not fit: its weights and its floor of KV memory need {needs}"
    if len(allowed) < tenant.ranks:
        others = f" without another replica of {_model(tenant)}" if len(allowed) < len(devices) else ""
        return ConfigError(f"{what}, and there are {len(allowed)}{others}; add devices, or set fewer ranks or replicas")
    by_room = sorted(allowed, key=lambda d: -_free_bytes(d, on[d.name]))
    name = by_room[num_fitting].name
    free = _free_bytes(by_room[num_fitting], on[name])
    short = format_bytes(tenant.needed_bytes - free)
    return ConfigError(
        f"{what}; found {format_bytes(max(free, 0))} left on {name}, which is {short} short, "
        "beside models placed before; add a device, or set a smaller kv_floor, more ranks, or fewer models"
    )
