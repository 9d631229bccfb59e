"""Fluid capacity: the highest rate at which nine of ten requests flow to their readers without a pause.

The rates of a search are rungs of one ladder, each 5 % above the one below, so that policies share them. From the
file's own rate it goes up, or down, in doublings until it lies between a rate that is fluid and one that is not, and
then halves that stretch. More load need not mean fewer fluid requests at every rung: what is found is a rate that is
fluid below one that is not, the first such by doublings. A rate above it may be fluid again; it is not looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from layerkv.sim.config import SimConfig
from layerkv.sim.run import STRIDE, make_engine, requests_of

SCHEMA = 1
FLUID_SHARE = 0.9
"""The share of requests that are fluid at a rate within capacity. Derived: the definition of fluid capacity."""
RUNGS_PER_DOUBLING = 14
"""Rates are so many to a doubling: 5 % apart. Not measured: chosen by judgement."""
MOST_DOUBLINGS = 6
"""How often the rate is doubled, and halved, in search of one within capacity and one beyond it. Not measured: chosen
by judgement."""
MOST_REQUESTS = 2000
"""Of a longer load, the first so many: a search is some seven runs for each policy and seed. Not measured: chosen by
judgement."""
CAPACITY_POLICIES = ("stock", "layerkv", "layerkv-slo", "oracle")


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a search found.

    Attributes:
        rates: Requests per second, by policy: the highest fluid rate; 0 where none was.
        is_at_top: Policies that were fluid at the highest rate that was tried: their capacity is that, or more.
        shares: The share of fluid requests that each policy had at each rate that it was tried at (median of seeds).
    """

    rates: dict[str, float]
    is_at_top: frozenset[str]
    shares: dict[float, dict[str, float]]


def num_requests_of(config: SimConfig) -> int:
    """Requests of each run of a search."""
    return min(config.workload.num_requests, MOST_REQUESTS)


def find_capacity(
    config: SimConfig,
    policies: Sequence[str] = CAPACITY_POLICIES,
    *,
    stride: int = STRIDE,
    on_run: Callable[[str, float], None] | None = None,
) -> Capacity:
    """Search each policy's capacity, beginning at the middle one of the file's rates.

    Args:
        config: The simulation; its own policies are left aside.
        policies: What to search for.
        stride: See ``EngineSetup.stride``.
        on_run: Told of each policy and rate before they are simulated.
    """
    config = replace(config, workload=replace(config.workload, num_requests=num_requests_of(config)))
    base = config.rates[len(config.rates) // 2]
    shares: dict[int, dict[str, float]] = {}
    found: dict[str, int | None] = {}
    for name in policies:

        def is_fluid(rung: int, name: str = name) -> bool:
            if name not in shares.setdefault(rung, {}):
                rate = rate_of(base, rung)
                if on_run is not None:
                    on_run(name, rate)
                shares[rung][name] = fluid_share(config, name, rate, stride=stride)
            return shares[rung][name] >= FLUID_SHARE

        found[name] = highest_rung(is_fluid)
    top = MOST_DOUBLINGS * RUNGS_PER_DOUBLING
    return Capacity(
        rates={name: 0.0 if rung is None else rate_of(base, rung) for name, rung in found.items()},
        is_at_top=frozenset(name for name, rung in found.items() if rung == top),
        shares={rate_of(base, rung): by_policy for rung, by_policy in sorted(shares.items())},
    )


def rate_of(base_per_s: float, rung: int) -> float:
    """The rate of a rung, to four digits: rung 0 is the file's own."""
    return float(f"{base_per_s * 2 ** (rung / RUNGS_PER_DOUBLING):.4g}") if rung else base_per_s


def highest_rung(is_fluid: Callable[[int], bool]) -> int | None:
    """A rung that is fluid below one that is not, or the highest; None if not even the lowest is. See the module."""
    low, high = 0, 0
    if is_fluid(0):
        while is_fluid(high := low + RUNGS_PER_DOUBLING):
            low = high
            if high == MOST_DOUBLINGS * RUNGS_PER_DOUBLING:
                return high
    else:
        while not is_fluid(low := high - RUNGS_PER_DOUBLING):
            high = low
            if low == -MOST_DOUBLINGS * RUNGS_PER_DOUBLING:
                return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_fluid(middle) else (low, middle)
    return low


def fluid_share(config: SimConfig, name: str, rate_per_s: float, *, stride: int = STRIDE) -> float:
    """The share of requests that are fluid at a rate: the median over the seeds."""
    shares = []
    for seed in config.seeds:
        outcome = make_engine(config, name, requests_of(config, rate_per_s, seed), stride=stride).run()
        shares.append(sum(request.is_fluid for request in outcome.requests) / max(len(outcome.requests), 1))
    return median(shares)


def capacity_report(config: SimConfig, found: Capacity) -> dict[str, Any]:
    """The search as JSON-ready data."""
    return {
        "schema": SCHEMA,
        "profile": config.profile.name,
        "fluid_share": FLUID_SHARE,
        "requests": num_requests_of(config),
        "seeds": list(config.seeds),
        "fluid_capacity_rps": found.rates,
        "at_highest_rate_tried": sorted(found.is_at_top),
        "rates": [{"rate": rate, "fluid": by_policy} for rate, by_policy in found.shares.items()],
    }
