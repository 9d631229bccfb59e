"""The ordering rules of the lane schedule, and the proof that breaking any of them would be seen.

Everything runs over fake engines that do as much harm as the engine contract permits (see `tests.fakes.stream_engine`),
and over the real CPU engine. A wrong order shows as wrong KV in some layer's attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerkv.core.residency import Residency
from layerkv.core.transfer import BlockRun, StepPlan
from layerkv.device.base import Direction, Event, TransferEngine
from layerkv.errors import CapacityError
from tests.cpu.device import scenarios
from tests.cpu.device.scenarios import SCENARIOS, Scenario
from tests.fakes.tiny_server import TinyServer
from tests.fakes.workers import ORDERS, Worker, make_worker, small_geometry

HOST_BLOCKS = 18
SHAPES = ((1, 1), (3, 1), (4, 2), (5, 2), (5, 3), (3, 3), (5, 1, 1), (6, 2, 2))
"""Layers, lanes, and retained layers if there are any."""


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{count}-{name}" for count, name in zip(shape, ("layers", "lanes", "retained"), strict=False))


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_layer_reads_right_kv_in_every_order_of_copies(scenario: Scenario, shape: tuple[int, ...]) -> None:
    for order in ORDERS:
        worker = make_worker(order, small_geometry(*shape), HOST_BLOCKS)
        server = worker.server(HOST_BLOCKS)
        scenario(server)
        assert server.model.num_checked > 0
        assert not server.failed


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_layer_reads_right_kv_with_the_cpu_engine(shape: tuple[int, ...]) -> None:
    for scenario in SCENARIOS:
        worker = make_worker("cpu", small_geometry(*shape), HOST_BLOCKS)
        server = worker.server(HOST_BLOCKS)
        scenario(server)
        assert server.model.num_checked > 0


# Mutants: the real schedule over an engine that is deaf to exactly one rule -----------------------------------------


class DeafEngine:
    """Forwards everything but the one `after` or the one wait that a rule asks for."""

    def __init__(self, engine: TransferEngine, rule: str, num_layers: int, lanes: int) -> None:
        self._engine, self._rule = engine, rule
        self._num_layers, self._lanes = num_layers, lanes
        self._kinds: dict[int, str] = {}
        self._kept: list[Event] = []  # so that no id is used twice
        self._is_between_steps = True
        self.num_ignored = 0
        self.plan = StepPlan()
        self.take_seconds, self.take_waited_s = engine.take_seconds, engine.take_waited_s
        self.wait_host, self.close = engine.wait_host, engine.close

    def record_compute(self) -> Event:
        return self._remember(self._engine.record_compute(), "compute")

    def submit(
        self,
        direction: Direction,
        layers: Sequence[int],
        runs: Sequence[BlockRun],
        *,
        after: Sequence[Event] = (),
        background: bool = False,
    ) -> Event:
        if direction is Direction.LOAD:
            kind = "fetch" if background else "hit" if runs is self.plan.hits else "load"
        else:
            kind = "ahead" if background else "park" if runs is self.plan.parks else "store"
        is_first_of_lane = kind == "load" and layers[0] < self._lanes
        if kind == "store":
            self._is_between_steps = layers[0] == self._num_layers - 1
        deaf_to = {
            ("1", "store"): {"compute"},
            ("1, for parks", "park"): {"compute"},
            ("2", "load"): set() if is_first_of_lane else {"store"},
            ("4, across steps, with loads", "load"): {"store"} if is_first_of_lane else set(),
            ("6", "fetch"): {"store", "park"},
            ("6, for compute", "fetch"): {"compute"},
            ("8, for stores", "hit"): {"store", "park", "ahead"},
            ("8, layered", "load"): {"ahead"},
            ("8, for compute", "hit"): {"compute"},
        }.get((self._rule, kind), set())
        heard = [event for event in after if self._kinds[id(event)] not in deaf_to]
        self.num_ignored += len(after) - len(heard)
        if self._rule == "2, while attention has ended" and kind == "load" and not is_first_of_lane:
            heard = [self._engine.record_compute()]
            self.num_ignored += 1
        event = self._engine.submit(direction, layers, runs, after=heard, background=background)
        return self._remember(event, kind)

    def wait_compute(self, event: Event) -> None:
        kind = self._kinds[id(event)]
        within_step = "4, across steps" if self._is_between_steps else "4"
        rule = self._rule.removesuffix(", for host blocks").removesuffix(", for prefixes")
        if rule == {"load": "3", "store": within_step, "park": "5", "ahead": "7", "hit": "8"}.get(kind):
            self.num_ignored += 1
        else:
            self._engine.wait_compute(event)

    def _remember(self, event: Event, kind: str) -> Event:
        self._kinds[id(event)] = kind
        self._kept.append(event)
        return event


MUTANTS = {
    "1": scenarios.whole_prompt_parked_and_fetched,
    "1, for parks": scenarios.parked_resident_overwritten_in_the_same_step,
    "2": scenarios.prompt_in_chunks_that_end_inside_blocks,
    "2, while attention has ended": scenarios.prompt_in_chunks_that_end_inside_blocks,
    "3": scenarios.prompt_in_chunks_that_end_inside_blocks,
    "4": scenarios.whole_prompt_parked_and_fetched,
    "4, across steps": scenarios.same_zone_blocks_in_the_next_step,
    "4, across steps, with loads": scenarios.chunks_of_one_over_the_zone_blocks_of_another,
    "5": scenarios.parked_prefix_overwritten_in_the_same_step,
    "6": scenarios.fetched_right_after_the_park,
    "6, for compute": scenarios.fetched_into_blocks_finished_in_the_same_step,
    "7": scenarios.stored_ahead_and_overwritten_in_the_step_that_parks,
    "7, for host blocks": scenarios.host_blocks_stored_ahead_given_to_others,
    "7, for prefixes": scenarios.prefix_overwritten_in_the_step_after_its_store,
    "8": scenarios.prefix_found_in_host_memory,
    "8, for stores": scenarios.prefix_found_in_the_step_that_stores_it,
    "8, for compute": scenarios.prefix_loaded_into_blocks_finished_in_the_same_step,
    "8, layered": scenarios.prefix_found_by_a_layered_prompt_in_the_step_that_stores_it,
}
LAYERED_PREFIX_MUTANTS = {
    "2": scenarios.prefix_found_by_a_layered_prompt,
    "2, while attention has ended": scenarios.prefix_found_by_a_layered_prompt,
    "3": scenarios.prefix_found_by_a_layered_prompt,
    "4, across steps, with loads": scenarios.prefix_loaded_over_zone_blocks_that_are_still_stored,
}


@pytest.mark.parametrize("shape", [(3, 1), (5, 2), (4, 3)], ids=shape_id)
@pytest.mark.parametrize("broken_rule", MUTANTS)
def test_breaking_a_rule_shows_as_wrong_kv(broken_rule: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="read wrong KV"):
        run_broken(MUTANTS[broken_rule], broken_rule, shape)


@pytest.mark.parametrize("shape", [(3, 1), (5, 2), (4, 3)], ids=shape_id)
@pytest.mark.parametrize("broken_rule", LAYERED_PREFIX_MUTANTS)
def test_breaking_a_rule_shows_where_a_layered_prompt_loads_a_prefix(broken_rule: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="read wrong KV"):
        run_broken(LAYERED_PREFIX_MUTANTS[broken_rule], broken_rule, shape)


@pytest.mark.parametrize("shape", [(5, 1, 1), (6, 2, 2)], ids=shape_id)
def test_a_prefix_is_loaded_into_layers_that_have_a_lane_for_themselves_too(shape: tuple[int, ...]) -> None:
    """In later steps they have it. Were it loaded as what was computed before is, they would not."""
    worker = make_worker(ORDERS[0], small_geometry(*shape), HOST_BLOCKS)
    server = worker.server(HOST_BLOCKS)
    take_plan = server.ledger.take_plan

    def as_if_computed(num_tokens: int) -> StepPlan:
        plan = take_plan(num_tokens)
        return plan._replace(loads=(*plan.loads, *plan.zone_hits), zone_hits=())

    server.ledger.take_plan = as_if_computed  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="read wrong KV"):
        scenarios.prefix_found_by_a_layered_prompt(server)


def listening(deaf: DeafEngine, worker: Worker) -> TinyServer:
    """A server whose plans the engine knows: by them it tells copies apart."""
    server = worker.server(HOST_BLOCKS, engine=deaf)
    take_plan = server.ledger.take_plan

    def noting(num_tokens: int) -> StepPlan:
        deaf.plan = take_plan(num_tokens)
        return deaf.plan

    server.ledger.take_plan = noting  # type: ignore[method-assign]
    return server


def run_broken(scenario: Scenario, rule: str, shape: tuple[int, ...]) -> None:
    for order in ORDERS:
        worker = make_worker(order, small_geometry(*shape), HOST_BLOCKS)
        deaf = DeafEngine(worker.engine, rule, *shape)
        scenario(listening(deaf, worker))
        assert deaf.num_ignored > 0, "the scenario never comes to where the rule matters"


def test_the_mutants_engine_itself_breaks_nothing() -> None:
    for scenario in MUTANTS.values():
        for order in ORDERS:
            worker = make_worker(order, small_geometry(5, 2), HOST_BLOCKS)
            scenario(listening(DeafEngine(worker.engine, "none", 5, 2), worker))


# Any life of any requests ---------------------------------------------------------------------------------------


class AnyLife(RuleBasedStateMachine):
    """Random decisions of a scheduler, random orders of copies; after each step books and blocks are checked."""

    @initialize(
        shape=st.sampled_from(SHAPES),
        seed=st.integers(0, 10_000),
        order=st.sampled_from((None, "slow", "compute-first", "fetches-first", "loads-first", "stores-then-loads")),
    )
    def begin(self, shape: tuple[int, ...], seed: int, order: str | None) -> None:
        worker = make_worker(order or f"random-{seed}", small_geometry(*shape), HOST_BLOCKS)
        self.server: TinyServer = worker.server(HOST_BLOCKS)
        self.server.keeps_fetched = seed % 2 == 0
        self.num_arrived = 0
        self.said: list[list[int]] = []

    def _in(self, *residencies: Residency) -> list[str]:
        table = self.server.ledger.residency
        return [request_id for request_id in self.server.requests if table[request_id] in residencies]

    @precondition(lambda self: len(self.server.requests) < 5)
    @rule(num_tokens=st.integers(1, 26), layered=st.booleans(), data=st.data())
    def arrive(self, num_tokens: int, layered: bool, data: st.DataObject) -> None:
        full = [
            (request_id, num_shared)
            for request_id in self._in(Residency.RESIDENT)
            if (num_shared := min(self.server.requests[request_id].num_computed, num_tokens - 1) // 4) > 0
        ]
        prefix_of, num_shared = data.draw(st.sampled_from([*full, (None, 0)]))
        request_id = f"r{self.num_arrived}"
        self.num_arrived += 1
        arrive = partial(self.server.arrive, prefix_of=prefix_of, num_shared=num_shared)
        try:
            arrive(request_id, num_tokens, layered=layered)
        except CapacityError:
            self.server.requests.pop(request_id)
            self.server.ledger.finish(request_id)

    @property
    def runnable(self) -> list[str]:
        return self._in(Residency.WAITING, Residency.RESIDENT, Residency.LAYERED)

    @precondition(lambda self: self.runnable)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        server = self.server
        chosen = data.draw(st.lists(st.sampled_from(self.runnable), unique=True, min_size=1, max_size=3))
        num_scheduled = {}
        pool, host, zone = server.pool.num_free, server.ledger.host.num_free, server.ledger.zone.num_available
        for request_id in chosen:
            request = server.requests[request_id]
            prompt_left = len(request.token_ids) - request.num_computed
            num_tokens = data.draw(st.integers(1, prompt_left)) if prompt_left > 0 else 1
            missing = server.blocks(request.num_computed + num_tokens) - len(request.block_ids)
            if server.ledger.is_layered(request_id):
                if not server.ledger.zone.can_take(request_id, max(missing, 0)):
                    continue
                if prompt_left <= 0 and missing > 0:  # streamed decode beyond the admitted prompt
                    host -= missing
                    zone -= missing
                    if host < 0 or zone < 0:
                        continue
            elif missing > 0:
                pool -= missing
                if pool < 0:
                    continue
            num_scheduled[request_id] = num_tokens
        try:
            server.step(**num_scheduled)
        except CapacityError:
            raise AssertionError("a step was refused after room for it had been checked") from None

    @property
    def parkable(self) -> list[str]:
        server = self.server
        return [
            request_id
            for request_id in self._in(Residency.LAYERED, Residency.RESIDENT)
            if (num_computed := server.requests[request_id].num_computed)
            and (server.ledger.is_layered(request_id) or server.blocks(num_computed) <= server.ledger.host.num_free)
        ]

    @precondition(lambda self: self.parkable)
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        self.server.park(data.draw(st.sampled_from(self.parkable)))

    @property
    def storable(self) -> list[str]:
        server = self.server
        return [
            request_id
            for request_id in self._in(Residency.RESIDENT)
            if server.requests[request_id].num_computed // 4 <= server.ledger.host.num_free
        ]

    @precondition(lambda self: self.storable)
    @rule(data=st.data())
    def store_ahead(self, data: st.DataObject) -> None:
        self.server.store_ahead(data.draw(st.sampled_from(self.storable)))
        self.server.step()  # one of each request in a step at most

    @property
    def fetchable(self) -> list[str]:
        server = self.server
        return [
            request_id
            for request_id in self._in(Residency.PARKED)
            if server.blocks(server.requests[request_id].num_computed + 1) <= server.pool.num_free
        ]

    @precondition(lambda self: self.fetchable)
    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        self.server.fetch(data.draw(st.sampled_from(self.fetchable)))

    @precondition(lambda self: len(self.server.requests) > 1)
    @rule(data=st.data(), keeps=st.booleans())
    def finish(self, data: st.DataObject, keeps: bool) -> None:
        self.server.step()  # parks and fetches are decided while a step is planned; requests leave between steps
        said = self.server.finish(data.draw(st.sampled_from(sorted(self.server.requests))), keeps=keeps)
        if keeps and said:
            self.said.append(said)

    @precondition(lambda self: self.said and len(self.server.requests) < 5)
    @rule(data=st.data(), num_new=st.integers(1, 9), layered=st.booleans())
    def next_turn(self, data: st.DataObject, num_new: int, layered: bool) -> None:
        server, said = self.server, data.draw(st.sampled_from(self.said[-4:]))
        if not layered and server.blocks(len(said) + num_new) > server.pool.num_free:
            return
        request_id = f"r{self.num_arrived}"
        self.num_arrived += 1
        try:
            server.arrive_again(request_id, said, len(said) + num_new, layered=layered)
        except CapacityError:
            assert layered
            server.requests.pop(request_id)
            server.ledger.finish(request_id)
            return
        left = len(said) + num_new - server.requests[request_id].num_computed
        server.step(**{request_id: data.draw(st.integers(1, left))})

    @rule()
    def new_weights(self) -> None:
        self.server.ledger.forget_prefixes()

    @rule(num_moves=st.integers(1, 40))
    def time_passes(self, num_moves: int) -> None:
        self.server.engine.advance(num_moves)
        self.server.poll()

    @precondition(lambda self: self._in(Residency.FETCHING))
    @rule()
    def fetches_end(self) -> None:
        for request_id in self._in(Residency.FETCHING):
            self.server.await_fetch(request_id)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "server"):
            self.server.check()

    def teardown(self) -> None:
        if hasattr(self, "server"):
            self.server.step()
            self.server.end()


AnyLife.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


class TestAnyLifeReadsRightKV(AnyLife.TestCase):
    """Named for the report."""
