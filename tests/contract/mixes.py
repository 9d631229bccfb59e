"""Random loads on vLLM's real scheduler, queues, block pool and managers, with layerkv's scheduler and connector.

No model and no process: every token, and every block of KV that is kept, is checked by :mod:`tests.vllm.hand_engine`.
What is counted here says that the load did what its setting is there for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerkv.core.cost import Curve
from tests.fakes.tiny_scheduler import profile
from tests.vllm.checked_groups import GroupsEngine
from tests.vllm.engines_in_turn import prompt
from tests.vllm.hand_engine import HandEngine

BLOCK_BYTES = 6 * 2 * 16 * 2 * 64 * 4
FAILING_STEPS = 300
DRAFTS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2}}


@dataclass(frozen=True)
class Setting:
    """An engine, its load, and the least of each counter that all its mixes together must show."""

    least: dict[str, int]
    engine: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    num_requests: int = 14
    longest: int = 120
    most_tokens: int = 60
    fails: bool = False
    pauses: bool = False
    resets: bool = False
    kinds: tuple[str, ...] = ()


SETTINGS: dict[str, Setting] = {
    "a small pool": Setting({"parks": 1, "fetches": 1, "layered": 1}, {"pool_blocks": 30}),
    "scheduled ahead": Setting({"parks": 1, "fetches": 1, "layered": 1}, {"pool_blocks": 30, "ahead": True}),
    "a pause that drains": Setting({"parks": 1, "drained": 1}, {"pool_blocks": 30, "ahead": True}, pauses=True),
    "host memory too small": Setting({"recomputes": 1}, {"pool_blocks": 30, "host_blocks": 14, "ahead": True}),
    "failing fetches": Setting({"fetches": 1, "recomputes": 1}, {"pool_blocks": 30, "ahead": True}, fails=True),
    "resets": Setting({"parks": 1, "recomputes": 1}, {"pool_blocks": 30}, resets=True),
    "few slots": Setting({"paused": 1}, {"pool_blocks": 200, "max_num_seqs": 3, "ahead": True}),
    "shared prefixes": Setting({"hits": 1, "prefixes": 1}, {"pool_blocks": 30}, num_requests=20),
    "no host prefixes": Setting({"parks": 1}, {"pool_blocks": 30}, {"host_prefix_cache": False}),
    "one lane": Setting({"parks": 1, "layered": 1}, {"pool_blocks": 30, "ahead": True}, {"lanes": 1}),
    "layers of their own": Setting({"parks": 1, "layered": 1}, {"pool_blocks": 30}, {"retained_layers": 2}),
    "all layered": Setting({"layered": 1}, {"pool_blocks": 60}, {"compare": {"mode": "layered"}}),
    "longer than the pool": Setting(
        {"layered": 1, "came_back": 1}, {"pool_blocks": 8}, {"long_contexts": True}, num_requests=5, longest=190
    ),
    "drafts": Setting({"parks": 1, "fetches": 1, "layered": 1}, {"pool_blocks": 30, **DRAFTS}),
    "drafts ahead": Setting({"parks": 1, "fetches": 1, "layered": 1}, {"pool_blocks": 30, "ahead": True, **DRAFTS}),
    "drafts and failing fetches": Setting(
        {"fetches": 1, "recomputes": 1}, {"pool_blocks": 30, "ahead": True, **DRAFTS}, fails=True
    ),
    "drafts at few slots": Setting({"paused": 1}, {"pool_blocks": 200, "max_num_seqs": 3, "ahead": True, **DRAFTS}),
    "drafts of what is longer than the pool": Setting(
        {"layered": 1}, {"pool_blocks": 8, **DRAFTS}, {"long_contexts": True}, num_requests=5, longest=190
    ),
    "a pool that grows": Setting(
        {"grown": 1}, {}, {"kv_floor": f"{36 * BLOCK_BYTES}B", "kv_ceiling": f"{84 * BLOCK_BYTES}B"}
    ),
}

_GROUPS = {
    "full and window": ("full", "window"),
    "full, two windows, chunk": ("full", "window", "window", "chunk"),
    "blocks of two sizes": ("full", "wide"),
    "chunks alone": ("chunk",),
}
_STATES = {"states and full": ("state", "state", "full"), "window and state": ("window", "state")}
for _name, _kinds in {**_GROUPS, **_STATES}.items():
    _engine: dict[str, Any] = {
        "enable_prefix_caching": "state" not in _kinds,
        "pool_blocks": 16 * len(_kinds) - 13 * _kinds.count("state") + 4,
    }
    _layers, _ahead = {"parks": 1, "layered": 1}, {**_engine, "ahead": True}
    SETTINGS |= {
        f"{_name}, ahead": Setting(_layers, _ahead, kinds=_kinds),
        f"{_name}, failing fetches": Setting({"fetches": 1, "recomputes": 1}, _ahead, kinds=_kinds, fails=True),
    }
    if _name in ("full and window", "states and full"):
        SETTINGS |= {
            _name: Setting(_layers, _engine, kinds=_kinds),
            f"{_name}, resident": Setting({"parks": 1, "fetches": 1}, _engine, {"mode": "resident"}, kinds=_kinds),
            f"{_name}, resets": Setting({"parks": 1, "recomputes": 1}, _engine, kinds=_kinds, resets=True),
            f"{_name}, little host memory": Setting({"recomputes": 1}, {**_ahead, "host_blocks": 20}, kinds=_kinds),
        }
WEAKENED = (
    "a small pool",
    "scheduled ahead",
    "a pause that drains",
    "host memory too small",
    "shared prefixes",
    "states and full, ahead",
)
"""Settings under which a change of vLLM's must be noticed."""


class _Counts:
    """An engine of a setting, which counts what happens. Costs are known: a step takes 10 ms."""

    def __init__(self, model: Path, setting: Setting, **options: Any) -> None:
        link = Curve([(BLOCK_BYTES, 5e-4)])
        costs = model.parent / "costs.json"
        costs.write_text(profile(store=link, load=link, decode_context=Curve([(100_000, 1e-6)])).to_json())
        extra = {"cost_profile": str(costs), **setting.extra}
        super().__init__(model, extra_config=extra, **setting.engine, **options)
        self.counts = {"drained": 0, "paused": 0, "came_back": 0, "grown": 0}
        self.ledger.residency.listener = self._moved
        elastic = self.scheduler._elastic
        self._fails, self._num_steps = setting.fails, 0
        self._held_first = 0 if elastic is None else elastic.num_held

    def _moved(self, name: str, old: str, new: str) -> None:
        self.counts["came_back"] += (old, new) == ("parked", "layered")

    def schedule(self) -> Any:
        self._num_steps += 1
        self.fail_fetches = self._fails and self._num_steps % 3 == 0 and self._num_steps < FAILING_STEPS
        step = super().schedule()
        self.counts["paused"] += len(self.scheduler._controller.paused)
        if (elastic := self.scheduler._elastic) is not None:
            elastic.check()
            self.counts["grown"] = max(self.counts["grown"], elastic.num_held - self._held_first)
        return step

    def drain_paused(self) -> None:
        """A pause that lets end whoever has begun, and nobody else begin."""
        from vllm.v1.core.sched.interface import PauseState

        scheduler = self.scheduler
        has_begun = {request.request_id for request in (*scheduler.running, *scheduler.kv_holding_waiting)}
        without_token = {name for name, made in self.tokens.items() if not made}
        scheduler.set_pause_state(PauseState.PAUSED_NEW)
        num_parked = scheduler._controller.num_parked
        for _ in range(3_000):
            if not scheduler.get_num_unfinished_requests():
                break
            self.step()
        else:
            raise AssertionError("the pause does not end")
        assert not scheduler.running
        assert not scheduler._controller.num_parked
        assert {name for name in without_token if self.tokens[name]} <= has_begun
        self.counts["drained"] += num_parked
        scheduler.set_pause_state(PauseState.UNPAUSED)


class Mix(_Counts, HandEngine):
    """Of one KV-cache group."""


class GroupsMix(_Counts, GroupsEngine):
    """Of several."""


def run_mix(model: Path, setting: Setting, seed: int) -> dict[str, int]:
    """Serve one random load to its end; what happened."""
    choose = random.Random(seed)
    engine: Any = GroupsMix(model, setting, kinds=setting.kinds) if setting.kinds else Mix(model, setting)
    shared = prompt(64, seed=seed)
    for index in range(setting.num_requests):
        body = prompt(choose.randrange(8, setting.longest), seed=100 * seed + index)
        begins = shared if choose.random() < 0.4 and len(body) + len(shared) < setting.longest else []
        engine.add(f"r{index}", [*begins, *body], max_tokens=choose.randrange(2, setting.most_tokens))
        for _ in range(choose.choice((0, 0, 1, 4))):
            engine.step()
        if choose.random() < 0.1:
            engine.abort(f"r{choose.randrange(index + 1)}")
    for _ in range(20):
        engine.step()
    if setting.pauses:
        engine.drain_paused()
    if setting.resets:
        engine.drain()
        if not engine.ledger.num_fetching:
            assert engine.reset_prefix_cache(reset_running_requests=True)
    engine.run(6_000)
    counters = engine.ledger.counters
    return {
        **engine.counts,
        "parks": counters.parks,
        "fetches": counters.fetches,
        "layered": counters.layered_admissions,
        "recomputes": counters.recomputes,
        "hits": counters.prefix_hit_blocks,
        "prefixes": counters.prefix_stored_blocks,
    }
