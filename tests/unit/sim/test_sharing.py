"""Several virtual engines on one device: the ledger's rule, memory that moves, and files that describe them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from layerkv.cli import main
from layerkv.config import SloClass, SloPolicy
from layerkv.core.cost import CostProfile, Curve
from layerkv.core.geometry import KVGeometry
from layerkv.errors import ConfigError
from layerkv.sim.config import load_sim_config
from layerkv.sim.engine import EngineSetup, SimRequest, VirtualEngine
from layerkv.sim.fleet import attainment, dedicated, fewest_devices, long_tail, on_devices, zipf_rates
from layerkv.sim.layered import LayeredEngine
from layerkv.sim.sharing import Brokered, FirstCome, Member, Memory, SharedDevice, StaticPartition
from layerkv.sim.sharing_config import ARMS, load_sharing_config
from layerkv.sim.sharing_run import ALL_MODELS, sharing_report, simulate_sharing
from layerkv.sim.stock import StockEngine

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1)
POLICY = SloPolicy(classes={"chat": CHAT}, default_class="chat")
BLOCK_BYTES = 4096
PROFILE = CostProfile(
    name="by hand",
    step_s=0.01,
    request_s=0.0,
    tokens=Curve([(1000, 0.1)]),
    decode_context=Curve([]),
    pair_s=0.0,
    store=Curve([(BLOCK_BYTES, 0.0001)]),
    load=Curve([(BLOCK_BYTES, 0.0001)]),
)
FLOOR, SEGMENT = 16, 4


def member(
    name: str, requests: list[SimRequest], *, pool: int, stock: bool = False, host: int = 1000, weight: float = 1.0
) -> Member:
    """An engine of at most so many blocks of 16 tokens."""
    geometry = KVGeometry(4, BLOCK_BYTES // 4, 16, pool_blocks=pool + 1, zone_blocks=0 if stock else 20, lanes=2)
    setup = EngineSetup(geometry, host, 512, 64, PROFILE)
    engine: VirtualEngine = (
        StockEngine(setup, requests) if stock else LayeredEngine(setup, requests, POLICY, least_pool=FLOOR)
    )
    return Member(name, engine, SEGMENT, FLOOR * BLOCK_BYTES, pool * BLOCK_BYTES, 0.1, weight)


def load(seed: int, num: int = 30, rate: float = 4.0, *, start_s: float = 0.0) -> list[SimRequest]:
    rng, at, found = Random(seed), start_s, []
    for i in range(num):
        at += rng.expovariate(rate)
        output = rng.randint(2, 60)
        found.append(SimRequest(f"r{i:03d}", at, rng.randint(10, 180), output, output, CHAT))
    return found


class Watched:
    """A division that looks after every look at what is held; whether anybody ever got less than before."""

    def __init__(self, memory: Memory, members: list[Member], capacity: int) -> None:
        self._memory, self._members, self._capacity = memory, members, capacity
        self.num_gave, self.most_bytes = 0, 0

    def look(self, member: Member, now_s: float) -> None:
        before = member.held_bytes
        self._memory.look(member, now_s)
        held = sum(each.held_bytes for each in self._members)
        assert held <= self._capacity
        self.num_gave += member.held_bytes < before
        self.most_bytes = max(self.most_bytes, held)
        for each in self._members:
            engine = each.engine
            ids = [*engine.free_ids, *engine._withheld]
            assert len(ids) == len(set(ids)), "a block is in one place"
            assert engine.num_used >= 0
        if isinstance(self._memory, Brokered):
            self._memory.ledger.check()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 3),
    st.integers(3 * FLOOR + 1, 80),
    st.sampled_from(["equal", "kvpr", "first"]),
)
def test_what_is_held_never_exceeds_the_memory_and_everybody_is_served(
    seed: int, num_engines: int, pool: int, division: str
) -> None:
    loads = {f"m{i}": load(seed + i, 12) for i in range(num_engines)}
    members = [
        member(name, requests, pool=pool, host=Random(seed).choice([20, 1000])) for name, requests in loads.items()
    ]
    capacity = pool * BLOCK_BYTES
    memory: Memory = (
        FirstCome(members, capacity)
        if division == "first"
        else Brokered(members, capacity, is_weighted=division == "kvpr")
    )
    watched = Watched(memory, members, capacity)
    outcomes = SharedDevice(members, watched).run()
    for each in members:
        done = outcomes[each.name].requests
        assert [r.output_tokens for r in done] == [r.output_tokens for r in loads[each.name]]
        assert each.engine.num_used == 0


def bursts(*, stock: bool = False) -> list[Member]:
    """One whose decodes fill the memory, and a burst of another that comes later."""
    long = [SimRequest(f"l{i}", 0.01 * i, 60, 180, 180, CHAT) for i in range(6)]
    burst = [SimRequest(f"s{i}", 2.0 + 0.01 * i, 100, 40, 40, CHAT) for i in range(6)]
    return [member("donor", long, pool=80, stock=stock), member("burst", burst, pool=80, stock=stock)]


def test_a_donor_parks_for_a_burst_and_recomputes_nothing() -> None:
    members = bursts()
    memory = Watched(Brokered(members, 80 * BLOCK_BYTES), members, 80 * BLOCK_BYTES)
    shared = SharedDevice(members, memory).run()
    assert memory.num_gave
    assert memory.most_bytes > 70 * BLOCK_BYTES
    assert shared["donor"].parks > 0
    assert shared["donor"].preemptions == 0


def test_stock_engines_share_first_come() -> None:
    members = bursts(stock=True)
    outcomes = SharedDevice(members, FirstCome(members, 80 * BLOCK_BYTES)).run()
    assert {name: len(outcome.requests) for name, outcome in outcomes.items()} == {"donor": 6, "burst": 6}


def test_engines_that_compute_at_once_take_turns() -> None:
    """Alone, a decode step takes 10.1 ms."""
    request = [SimRequest("r", 0.0, 16, 41, 41, CHAT)]
    alone, two = ([member(name, request, pool=40) for name in names] for names in ("a", "ab"))
    (once,) = SharedDevice(alone, StaticPartition()).run().values()
    for outcome in SharedDevice(two, StaticPartition()).run().values():
        assert outcome.end_s == pytest.approx(2 * once.end_s, rel=0.1)


def test_a_pool_gives_free_blocks_at_once_and_others_as_they_come_free() -> None:
    engine = member("a", [SimRequest("r", 0.0, 160, 20, 20, CHAT)], pool=40).engine
    engine.advance()
    used = engine.num_used
    assert used == 10
    engine.resize(4)
    assert (engine.num_in_service, engine.num_to_leave, engine.free_ids) == (10, 6, [])
    engine.resize(12)
    assert (engine.num_in_service, engine.num_to_leave, len(engine.free_ids)) == (12, 0, 2)
    engine.resize(FLOOR)
    while engine.num_under_way:
        engine.advance()
    engine.resize(0)
    assert engine.num_in_service == 0


def test_an_engine_that_is_idle_keeps_one_segment() -> None:
    """Its need falls after it has been remembered for a while."""
    members = [member("early", load(0, 5), pool=80), member("late", load(1, 20, start_s=6.0), pool=80)]
    SharedDevice(members, Brokered(members, 80 * BLOCK_BYTES)).run()
    assert members[0].peak_bytes > SEGMENT * BLOCK_BYTES
    assert members[0].held_bytes == SEGMENT * BLOCK_BYTES


# Files ------------------------------------------------------------------------------------------------------------


def two_models(**changes: Any) -> dict[str, Any]:
    model = {
        "engine": {"device": "L20", "model": "llama-3.1-8b", "host_memory": "8GiB", "max_model_len": 1024},
        "workload": {
            "requests": 20,
            "rates": [2.0],
            "classes": [{"prompt_tokens": {"uniform": [50, 500]}, "output_tokens": {"uniform": [10, 60]}}],
        },
    }
    document: dict[str, Any] = {
        "version": 1,
        "kv_memory": "2GiB",
        "models": {"a": model, "b": model},
        "arms": list(ARMS),
    }
    return {**document, **changes}


def written(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "sharing.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_every_arm_serves_the_same_requests_of_every_model(tmp_path: Path) -> None:
    config = load_sharing_config(written(tmp_path, two_models(seeds=[0, 1])))
    report = sharing_report(config, simulate_sharing(config))
    assert list(report["arms"]) == list(ARMS)
    assert len(report["runs"]) == 2 * len(ARMS)
    for by_model in report["arms"].values():
        assert list(by_model) == ["a", "b", ALL_MODELS]
        assert by_model[ALL_MODELS]["requests"] == 40
        assert by_model["a"]["kv_peak_bytes"] <= 2 << 30


def test_the_command_knows_such_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, two_models(arms=["static", "shared"]))
    out = tmp_path / "out.json"
    assert main(["simulate", str(path), "--json", str(out)]) == 0
    assert "all models" in capsys.readouterr().out
    assert out.is_file()
    assert main(["simulate", str(path), "--capacity"]) == 2
    assert "--capacity: found it with a file of several models" in capsys.readouterr().err


A = "$.models.a"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("", {"arms": ["statik"]}, "$.arms[0]: found 'statik'; expected one of static-stock"),
        ("", {"kv_memory": 0}, "$.kv_memory: found 0; expected more than zero"),
        ("", {"model": {}}, "$.model: found an unknown key; expected one of version, kv_memory, models"),
        ("", {"models": {}}, "$.models: found {} (dict); expected a mapping of at least one model"),
        ("engine", {"kv_memory": "1GiB"}, f"{A}.engine.kv_memory: found '1GiB'; expected kv_memory at the top"),
        ("engine", {"device": "L2"}, f"{A}.engine.device: found 'L2'"),
        ("workload", {"rates": [1, 2]}, f"{A}.workload.rates: found 2 rates; expected one"),
        ("a", {"kv_floor": "1GiB", "kv_ceiling": "1MiB"}, f"{A}.kv_ceiling: found '1MiB'; expected at least kv_floor"),
        ("a", {"share": 1}, f"{A}.share: found an unknown key"),
        ("a", {"kv_floor": "1MiB"}, "models.a.kv_floor: found 1MiB; expected at least"),
        ("a", {"kv_floor": "3GiB"}, "kv_memory: found room for"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, part: str, change: dict[str, Any], message: str) -> None:
    document = yaml.safe_load(yaml.safe_dump(two_models()))  # so that a and b are not the same object
    where = document if not part else document["models"]["a"] if part == "a" else document["models"]["a"][part]
    where.update(change)
    with pytest.raises(ConfigError) as caught:
        simulate_sharing(load_sharing_config(written(tmp_path, document)))
    assert message in str(caught.value)


# A fleet ----------------------------------------------------------------------------------------------------------


def test_a_long_tail_needs_fewer_devices_shared_than_dedicated() -> None:
    config = load_sim_config(Path(__file__).parents[3] / "configs/sim/long_tail_8b_h100.yaml")
    config = replace(config, rates=(8.0,))
    fleet = long_tail(
        config,
        num_models=6,
        exponent=1.0,
        duration_s=10.0,
        seed=1,
        device_bytes=60 << 30,
        own_bytes=17 << 30,
    )
    assert zipf_rates(2, 3.0, 1.0) == [2.0, 1.0]
    assert [len(requests) > 0 for requests in fleet.loads.values()] == [True] * 6
    alone, outcome = dedicated(fleet, "static")
    assert alone >= 6
    assert attainment(outcome) >= 0.99
    tried: list[int] = []
    fewest, found = fewest_devices(fleet, "shared", 1, 6, on_run=lambda arm, num, outcome: tried.append(num))
    assert fewest is not None
    assert found is not None
    assert 2 <= fewest < 6, "three models' weights fill a device"
    assert found.figures()["requests"] == fleet.num_requests
    assert on_devices(fleet, 1, "shared") is None, "weights do not fit"
    assert tried[0] == 6


SHIPPED = sorted((Path(__file__).parents[3] / "configs/sharing").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_of_models_loads(path: Path) -> None:
    assert len(load_sharing_config(path).models) > 1
