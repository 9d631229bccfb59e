"""The ledger: any life of any requests, each plan carried out literally."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerkv.core.residency import Residency
from layerkv.core.runs import RunAllocator
from layerkv.core.segments import SegmentLayout
from layerkv.core.transfer import BlockRun, StepPlan
from layerkv.errors import CapacityError
from tests.fakes.tiny_ledger import (
    FETCHING,
    LAYERED,
    PARKED,
    POOL,
    RESIDENT,
    TOKENS,
    WAITING,
    ZONE,
    books,
    make_ledger,
    pairs,
)

Token = tuple[str, int]


@dataclass
class Life:
    """What the machine knows of one request. A shared prefix has the tokens of whoever computed it."""

    request_id: str
    num_prompt: int
    num_computed: int = 0
    table: list[int] = field(default_factory=list)
    prefix: list[Token] = field(default_factory=list)
    prefix_of: str | None = None

    def token(self, position: int) -> Token:
        return self.prefix[position] if position < len(self.prefix) else (self.request_id, position)


class Lives(RuleBasedStateMachine):
    """Carries every plan out literally, on blocks that are lists of tokens, and looks whether each token is there.

    The zone is poisoned between steps: what a step needs there it must load, and what it leaves there is lost.
    """

    @initialize(num_host_blocks=st.sampled_from((16, 12, 9, 3, 0)), keeps_copies=st.booleans())
    def begin(self, num_host_blocks: int, keeps_copies: bool) -> None:
        self.layout = SegmentLayout(segment_blocks=3, num_segments=num_host_blocks // 3)
        has_segments = num_host_blocks % 3 == 0 and num_host_blocks > 0
        self.ledger = make_ledger(num_host_blocks, self.layout if has_segments else None)
        self.withheld: set[int] = set()
        self.ledger.keeps_copies = keeps_copies
        self.pool = RunAllocator(1, POOL - 1)
        self.users: dict[int, int] = {}
        self.lives: dict[str, Life] = {}
        self.device: dict[int, list[Token | None]] = {b: [None] * TOKENS for b in range(POOL + ZONE)}
        self.host: dict[int, list[Token | None]] = {b: [None] * TOKENS for b in range(num_host_blocks)}
        self.num_arrived = 0
        self.leaving: dict[str, list[int]] = {}
        self.loading: dict[str, list[int]] = {}  # host blocks that are read, by request
        self.ahead: list[BlockRun] = []  # background stores that have not run: they do so as late as they may

    def among(self, *states: Residency) -> list[str]:
        return [request_id for request_id in self.lives if self.ledger.residency[request_id] in states]

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // TOKENS)

    def hold(self, request_id: str, new: list[int]) -> None:
        for block in new:
            if block < POOL:
                self.users[block] = self.users.get(block, 0) + 1
        self.lives[request_id].table += new

    def free(self, table: list[int]) -> None:
        self.ledger.zone.give_back(block for block in table if block >= POOL)
        for block in table:
            if block < POOL:
                self.users[block] -= 1
                if not self.users[block]:
                    del self.users[block]
                    self.pool.give_back([block])
        table.clear()

    @precondition(lambda self: len(self.lives) < 6)
    @rule(num_tokens=st.integers(1, 30), is_layered=st.booleans(), data=st.data())
    def arrive(self, num_tokens: int, is_layered: bool, data: st.DataObject) -> None:
        request_id = f"r{self.num_arrived}"
        self.num_arrived += 1
        self.ledger.add(request_id)
        self.lives[request_id] = Life(request_id, num_tokens)
        if is_layered:
            self.admit(request_id, data)

    @precondition(lambda self: self.unadmitted)
    @rule(data=st.data())
    def admit_later(self, data: st.DataObject) -> None:
        self.admit(data.draw(st.sampled_from(self.unadmitted)), data)

    @property
    def unadmitted(self) -> list[str]:
        return [r for r in self.among(WAITING) if not self.ledger.is_layered(r) and not self.lives[r].table]

    def admit(self, request_id: str, data: st.DataObject) -> None:
        life = self.lives[request_id]
        table_blocks = self.blocks(life.num_prompt)
        donors = [
            (donor, num_shared)
            for donor in self.among(RESIDENT)
            if (num_shared := min(self.lives[donor].num_computed, life.num_prompt - 1) // TOKENS) > 0
        ]
        donor, num_shared = data.draw(st.sampled_from([*donors, (None, 0)]))
        fits = table_blocks <= self.ledger.host.num_free and table_blocks - num_shared <= self.ledger.zone.num_available
        before = books(self.ledger)
        try:
            self.ledger.admit_layered(request_id, table_blocks=table_blocks, zone_blocks=table_blocks - num_shared)
        except CapacityError:
            assert not fits
            assert books(self.ledger) == before
            return
        assert fits
        if data.draw(st.integers(0, 7)) == 7:
            self.ledger.cancel_layered(request_id)
            assert books(self.ledger) == before
            return
        if donor is not None:
            life.prefix_of = donor
            life.prefix = [self.lives[donor].token(position) for position in range(num_shared * TOKENS)]
            self.hold(request_id, self.lives[donor].table[:num_shared])
            life.num_computed = num_shared * TOKENS

    @precondition(lambda self: self.among(WAITING, RESIDENT, LAYERED))
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        runnable = self.among(WAITING, RESIDENT, LAYERED)
        chosen = data.draw(st.lists(st.sampled_from(runnable), unique=True, min_size=1, max_size=3))
        rows: list[tuple[str, int]] = []
        for request_id in chosen:
            life = self.lives[request_id]
            left = life.num_prompt - life.num_computed
            num_tokens = data.draw(st.integers(1, left)) if left > 0 else 1
            if self.allocate(request_id, num_tokens):
                rows.append((request_id, num_tokens))
        plan = self.ledger.take_plan(sum(num_tokens for _, num_tokens in rows))
        self.carry_out(plan, rows)

    def allocate(self, request_id: str, num_tokens: int) -> bool:
        """As vLLM does: blocks for all tokens or none; then the ledger is told."""
        ledger, life = self.ledger, self.lives[request_id]
        missing = max(self.blocks(life.num_computed + num_tokens) - len(life.table), 0)
        if not ledger.is_layered(request_id):
            if missing > self.pool.num_free:
                return False
            self.hold(request_id, self.pool.take(missing))
            ledger.started(request_id)
            return True
        if not ledger.zone.can_take(request_id, missing):
            return False
        within_prompt = life.num_computed + num_tokens <= life.num_prompt
        if not within_prompt and ledger.host.num_free < missing:
            return False
        self.hold(request_id, ledger.zone.take(request_id, missing))
        ledger.started(request_id)
        ledger.step_layered(request_id, tuple(life.table), num_computed=life.num_computed, num_scheduled=num_tokens)
        return True

    def carry_out(self, plan: StepPlan, rows: list[tuple[str, int]]) -> None:
        assert plan.is_layered == any(self.ledger.is_layered(request_id) for request_id, _ in rows)
        if plan.settle:
            self.store(tuple(self.ahead))
            self.ahead = []
        self.ahead += plan.ahead
        self.store(plan.parks)
        for block in range(POOL, POOL + ZONE):
            self.device[block] = [("poison", 0)] * TOKENS
        assert all(block >= POOL for block in pairs(plan.stores + plan.loads))
        for block, host_block in pairs(plan.loads).items():
            self.device[block] = list(self.host[host_block])
        for request_id, num_tokens in rows:
            life = self.lives[request_id]
            for position in range(life.num_computed, life.num_computed + num_tokens):
                self.device[life.table[position // TOKENS]][position % TOKENS] = life.token(position)
            life.num_computed += num_tokens
            self.attend(request_id)
        self.store(plan.stores)
        for fetch in plan.fetches:
            for block, host_block in pairs(fetch.runs).items():
                assert block < POOL
                self.device[block] = list(self.host[host_block])
            self.loading[fetch.request_id] = list(pairs(fetch.runs).values())

    def store(self, runs: tuple[BlockRun, ...]) -> None:
        for run in runs:  # one device block may go to two hosts: two parked requests shared it
            for offset in range(run.num_blocks):
                self.host[run.host_block + offset] = list(self.device[run.device_block + offset])

    def attend(self, request_id: str) -> None:
        life = self.lives[request_id]
        for position in range(life.num_computed):
            found = self.device[life.table[position // TOKENS]][position % TOKENS]
            assert found == life.token(position), f"{request_id} finds {found} at token {position}"

    @precondition(lambda self: self.among(RESIDENT))
    @rule(most_blocks=st.sampled_from((None, 1, 3)), data=st.data())
    def store_ahead(self, most_blocks: int | None, data: st.DataObject) -> None:
        self.carry_out(self.ledger.take_plan(0), [])
        request_id = data.draw(st.sampled_from(self.among(RESIDENT)))
        life, before = self.lives[request_id], books(self.ledger)
        num_held = self.ledger.num_host_blocks_of(request_id)
        num_whole = life.num_computed // TOKENS
        if most_blocks is not None:
            num_whole = min(num_whole, num_held + most_blocks)
        try:
            num_stored = self.ledger.store_ahead(request_id, tuple(life.table), life.num_computed, most_blocks)
        except CapacityError:
            assert num_whole - num_held > self.ledger.host.num_free
            assert books(self.ledger) == before
            return
        assert num_stored == self.ledger.num_host_blocks_of(request_id) == max(num_whole, num_held)

    @precondition(lambda self: self.with_copies)
    @rule(data=st.data())
    def drop_ahead(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.with_copies))
        free, blocks = self.ledger.host.num_free, self.ledger.host_blocks_of(request_id)
        self.ledger.drop_ahead(request_id)
        assert self.ledger.host.num_free == free + sum(not self.is_withheld(block) for block in blocks)

    @precondition(lambda self: self.layout.num_segments > 1 and self.ledger.host.count % 3 == 0)
    @rule(data=st.data())
    def move_a_host_segment(self, data: st.DataObject) -> None:
        """Between steps. One that is empty loses its memory, behind all stores, and may come back."""
        segment, host = data.draw(st.integers(0, self.layout.num_segments - 1)), self.ledger.host
        if segment not in self.withheld:
            self.withheld.add(segment)
            host.withhold(segment)
            for request_id in self.ledger.copies_in({segment}, self.layout) if data.draw(st.booleans()) else ():
                self.ledger.drop_ahead(request_id)
            return
        if host.is_empty(segment):
            self.carry_out(self.ledger.take_plan(0), [])
            self.store(tuple(self.ahead))
            self.ahead = []
            for block in self.layout.blocks(segment):
                self.host[block] = [("unmapped", block)] * TOKENS
        self.withheld.remove(segment)
        host.restore(segment)

    def is_withheld(self, block: int) -> bool:
        return self.layout.segment_of(block) in self.withheld

    @property
    def with_copies(self) -> list[str]:
        return [r for r in self.among(RESIDENT) if self.ledger.num_host_blocks_of(r)]

    @property
    def parkable(self) -> list[str]:
        return [r for r in self.among(RESIDENT, LAYERED) if self.lives[r].num_computed]

    @precondition(lambda self: self.parkable)
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.parkable))
        life, before = self.lives[request_id], books(self.ledger)
        is_layered = self.ledger.is_layered(request_id)
        num_held = self.ledger.num_host_blocks_of(request_id)
        fits = is_layered or self.blocks(life.num_computed) - num_held <= self.ledger.host.num_free
        try:
            self.ledger.park(request_id, tuple(life.table), life.num_computed)
        except CapacityError:
            assert not fits
            assert books(self.ledger) == before
            return
        assert fits
        assert self.ledger.parked_tokens(request_id) == life.num_computed
        self.free(life.table)

    @property
    def fetchable(self) -> list[str]:
        return [r for r in self.among(PARKED) if self.blocks(self.lives[r].num_computed + 1) <= self.pool.num_free]

    @precondition(lambda self: self.fetchable)
    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.fetchable))
        life, shared = self.lives[request_id], []
        if life.prefix_of in self.among(RESIDENT):
            donor = self.lives[life.prefix_of]
            common = [donor.token(position) for position in range(len(life.prefix))] == life.prefix
            most = min(len(life.prefix), life.num_computed - 1, donor.num_computed) // TOKENS * common
            shared = donor.table[: data.draw(st.integers(0, most))]
        self.hold(request_id, shared)
        self.hold(request_id, self.pool.take(self.blocks(life.num_computed + 1) - len(shared)))
        self.ledger.fetch(request_id, tuple(life.table), len(shared) * TOKENS)

    @precondition(lambda self: self.loading)
    @rule()
    def report_a_fetch(self) -> None:
        request_id = next(iter(self.loading))
        del self.loading[request_id]
        self.ledger.complete_fetch(request_id)
        self.free(self.leaving.pop(request_id, []))
        if request_id in self.lives:
            self.attend(request_id)

    @precondition(lambda self: self.num_arrived > 2 and self.among(RESIDENT, LAYERED, PARKED))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Not while FETCHING: vLLM preempts only what runs (see the test on its own above)."""
        self.carry_out(self.ledger.take_plan(0), [])
        request_id = data.draw(st.sampled_from(self.among(RESIDENT, LAYERED, PARKED)))
        self.ledger.drop(request_id)
        life = self.lives[request_id]
        life.num_prompt = max(life.num_prompt, life.num_computed)
        life.num_computed, life.prefix_of, life.prefix = 0, None, []
        self.free(life.table)

    @precondition(lambda self: len(self.lives) > 2)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.carry_out(self.ledger.take_plan(0), [])  # requests leave between steps
        self.leave(data.draw(st.sampled_from(sorted(self.lives))))

    def leave(self, request_id: str) -> None:
        is_fetching = self.ledger.residency[request_id] is FETCHING
        self.ledger.finish(request_id)
        life = self.lives.pop(request_id)
        if is_fetching:
            self.leaving[request_id] = life.table
        else:
            self.free(life.table)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check()
        self.pool.check()
        tables = [life.table for life in self.lives.values()] + list(self.leaving.values())
        in_zone = [block for table in tables for block in table if block >= POOL]
        assert len(in_zone) == len(set(in_zone)) == self.ledger.zone.num_taken
        kept, copied = self.ledger.host_blocks_by_segment(self.layout)
        assert kept.total() + copied.total() == self.ledger.num_host_blocks_used
        assert copied.total() == self.ledger.num_copied_host_blocks
        being_read = [block for blocks in self.loading.values() for block in blocks]
        assert not any(self.ledger.host.is_free(block) for block in being_read)

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.carry_out(self.ledger.take_plan(0), [])
        for request_id in list(self.lives):
            self.leave(request_id)
            self.ledger.check()
        while self.loading:
            self.report_a_fetch()
        assert self.ledger.num_host_blocks_used == 0
        assert (self.ledger.zone.num_taken, self.ledger.zone.num_available) == (0, ZONE)
        assert self.pool.num_free == POOL - 1
        assert not any(self.ledger.residency.counts.values())
        assert not self.ledger.take_plan(0).ahead, "a store of nobody's blocks is still planned"
        assert self.ledger.is_idle


Lives.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


TestLives = Lives.TestCase
