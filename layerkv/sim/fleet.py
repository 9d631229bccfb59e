"""How many devices a fleet of models needs: each model its own, a static partition, or sharing behind brokers.

Every device is simulated step by step as in :mod:`layerkv.sim.sharing`, apart from all others. Models stand where
:func:`layerkv.core.placement.place` puts them for their mean rates, for the whole run: none is moved, started or ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from layerkv.core.placement import Device, Tenant, place
from layerkv.core.sharing import token_pressure
from layerkv.errors import ConfigError
from layerkv.sim.config import SimConfig
from layerkv.sim.engine import SimRequest
from layerkv.sim.outcome import SimOutcome
from layerkv.sim.run import requests_of
from layerkv.sim.sharing_config import SharedModel, SharingConfig
from layerkv.sim.sharing_run import run_arm, together

ATTAINMENT = 0.99
"""Share of requests that must meet their objectives. Derived: Prism's (arXiv 2505.04021)."""


@dataclass(frozen=True, slots=True)
class LongTail:
    """Models alike but for their rates.

    Attributes:
        config: Each of them, and its load.
        loads: Requests by model.
        rates: Requests per second by model.
        device_bytes: What a device has for weights and KV memory.
        own_bytes: What each model takes for itself.
    """

    config: SimConfig
    loads: Mapping[str, Sequence[SimRequest]]
    rates: Mapping[str, float]
    device_bytes: int
    own_bytes: int

    @property
    def num_requests(self) -> int:
        """Of all models."""
        return sum(map(len, self.loads.values()))


def zipf_rates(num_models: int, rate_per_s: float, exponent: float) -> list[float]:
    """The rates of models whose k-th has ``1 / k ** exponent`` of the first one's."""
    parts = [1 / k**exponent for k in range(1, num_models + 1)]
    return [rate_per_s * part / sum(parts) for part in parts]


def long_tail(
    config: SimConfig,
    *,
    num_models: int,
    exponent: float,
    duration_s: float,
    seed: int,
    device_bytes: int,
    own_bytes: int,
) -> LongTail:
    """Models whose rates add up to the configuration's, each with arrivals and lengths of a seed of its own."""
    rates = zipf_rates(num_models, config.rates[0], exponent)
    digits = len(str(num_models - 1))
    names = [f"m{i:0{digits}d}" for i in range(num_models)]
    loads = {}
    for i, (name, rate) in enumerate(zip(names, rates, strict=True)):
        enough = replace(config.workload, num_requests=ceil(2 * rate * duration_s) + 20)
        drawn = requests_of(replace(config, workload=enough), rate, seed * num_models + i)
        loads[name] = [request for request in drawn if request.arrival_s < duration_s]
    return LongTail(config, loads, dict(zip(names, rates, strict=True)), device_bytes, own_bytes)


def dedicated(fleet: LongTail, arm: str) -> tuple[int, SimOutcome]:
    """Each model has a device, and those whose requests miss most another one, until enough are met."""
    replicas = dict.fromkeys(fleet.loads, 1)
    outcomes = {name: _alone(fleet, name, 1, arm) for name in fleet.loads}
    while True:
        outcome = together(list(outcomes.values()))
        misses = {name: sum(not r.met_slo for r in each.requests) for name, each in outcomes.items()}
        if 1 - sum(misses.values()) / fleet.num_requests >= ATTAINMENT:
            return sum(replicas.values()), outcome
        worst = max(misses, key=lambda name: misses[name])
        replicas[worst] += 1
        outcomes[worst] = _alone(fleet, worst, replicas[worst], arm)


def _alone(fleet: LongTail, name: str, replicas: int, arm: str) -> SimOutcome:
    room = fleet.device_bytes - fleet.own_bytes
    parts = [fleet.loads[name][i::replicas] for i in range(replicas)]
    config = SharingConfig(room, {name: SharedModel(replace(fleet.config, kv_memory_bytes=room))})
    return together([run_arm(config, arm, 0, {name: part}).outcomes[name] for part in parts])


def on_devices(fleet: LongTail, num_devices: int, arm: str) -> SimOutcome | None:
    """All models on so many devices; None if they do not fit."""
    tenants = [_tenant(fleet, name) for name in fleet.loads]
    devices = [Device(f"gpu{i}", fleet.device_bytes) for i in range(num_devices)]
    try:
        placement = place(devices, tenants)
    except ConfigError:
        return None
    outcomes: list[SimOutcome] = []
    for device in devices:
        members = placement.tenants_on[device.name]
        if not members:
            continue
        room = placement.shared_bytes[device.name]
        config = SharingConfig(
            room,
            {
                tenant.name: SharedModel(replace(fleet.config, kv_memory_bytes=share))
                for tenant, share in zip(members, _static_shares(members, room), strict=True)
            },
        )
        loads = {tenant.name: fleet.loads[tenant.name] for tenant in members}
        outcomes += run_arm(config, arm, 0, loads).outcomes.values()
    return together(outcomes)


def fewest_devices(
    fleet: LongTail, arm: str, low: int, high: int, *, on_run: Callable[[str, int, SimOutcome | None], None]
) -> tuple[int | None, SimOutcome | None]:
    """The fewest devices from ``low`` to ``high`` with which enough requests are met, by bisection: more devices are
    taken to be no worse. None, and the outcome of the most, if those are too few."""
    best, found = None, None
    while low <= high:
        middle = (low + high) // 2 if best is not None or found is not None else high
        outcome = on_devices(fleet, middle, arm)
        on_run(arm, middle, outcome)
        if outcome is not None and attainment(outcome) >= ATTAINMENT:
            best, found, high = middle, outcome, middle - 1
        elif found is None:
            return None, outcome
        else:
            low = middle + 1
    return best, found


def attainment(outcome: SimOutcome) -> float:
    """The share of requests that met their objectives."""
    return sum(r.met_slo for r in outcome.requests) / max(len(outcome.requests), 1)


def _tenant(fleet: LongTail, name: str) -> Tenant:
    config, load = fleet.config, fleet.loads[name]
    slo = config.policy.classes[config.policy.default_class]
    token_bytes = config.profile.kv_bytes_per_token
    tokens = sum(r.prompt_tokens + r.output_tokens for r in load) / max(len(load), 1)
    pressure = token_pressure(fleet.rates[name] * tokens, token_bytes, slo.tpot_s)
    return Tenant(name, fleet.own_bytes, _floor_bytes(config), pressure)


def _floor_bytes(config: SimConfig) -> int:
    """The longest request, in whole blocks and with room for the rest of a segment, and a zone of default size."""
    return ceil(1.25 * config.max_model_len) * config.profile.kv_bytes_per_token


def _static_shares(members: Sequence[Tenant], room: int) -> list[int]:
    """Floors, and the rest by pressure."""
    rest = room - sum(tenant.floor_bytes for tenant in members)
    pressure = sum(tenant.pressure for tenant in members)
    return [tenant.floor_bytes + int(rest * tenant.pressure / pressure) for tenant in members]
