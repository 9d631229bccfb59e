"""Small virtual engines for tests: the production controller, policy and ledger on a made-up model.

A step fails the test if the ledger refuses what the policy decided, if books do not add up, or if a fetched request is
parked again before it has made a token although nobody needed its room.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from layerkv.config import SloClass, SloPolicy
from layerkv.core.cost import CostProfile, Curve
from layerkv.core.geometry import KVGeometry
from layerkv.core.residency import Residency
from layerkv.scheduler.reasons import WAITS_FOR, End, Reason
from layerkv.sim.engine import EngineSetup, Live, SimRequest, VirtualEngine
from layerkv.sim.layered import LayeredEngine
from layerkv.sim.stock import StockEngine

BLOCK_TOKENS = 16
BLOCK_BYTES = 256
STEP_S = 0.01
PREFILL_S_PER_TOKEN = 1e-4
BLOCK_COPY_S = 5e-4


def profile(*, block_copy_s: float = BLOCK_COPY_S, **changes: Any) -> CostProfile:
    """A step takes 10 ms and 0.1 ms a prompt token; a copy 0.5 ms a block."""
    link = Curve([(BLOCK_BYTES, block_copy_s)])
    costs: dict[str, Any] = {
        "name": "made up",
        "step_s": STEP_S,
        "request_s": 0.0,
        "tokens": Curve([(1, PREFILL_S_PER_TOKEN)]),
        "decode_context": Curve([]),
        "pair_s": 0.0,
        "store": link,
        "load": link,
    }
    return CostProfile(**{**costs, **changes})


def setup(
    *,
    pool_blocks: int = 20,
    zone_blocks: int = 8,
    num_host_blocks: int = 60,
    budget_tokens: int = 64,
    slots: int = 16,
    frees_are_deferred: bool = False,
    stride: int = 1,
    long_contexts: bool = False,
    costs: CostProfile | None = None,
) -> EngineSetup:
    """An engine whose pool holds 320 tokens."""
    geometry = KVGeometry(
        num_layers=4,
        page_bytes=BLOCK_BYTES // 4,
        block_tokens=BLOCK_TOKENS,
        pool_blocks=pool_blocks + 1,  # and vLLM's null block
        zone_blocks=zone_blocks,
        lanes=1,
    )
    return EngineSetup(
        geometry,
        num_host_blocks,
        budget_tokens,
        slots,
        costs or profile(),
        frees_are_deferred,
        stride=stride,
        long_contexts=long_contexts,
    )


def job(
    name: str,
    /,
    num_prompt: int,
    num_output: int,
    arrival_s: float = 0.0,
    *,
    max_tokens: int | None = None,
    can_layer: bool = True,
    end: End = End.FINISHED,
    rank: int = 0,
    **slo: Any,
) -> SimRequest:
    """A request to serve; `slo` are its class's objectives."""
    objectives = {"name": "chat", "ttft_s": 1.0, "tpot_s": 0.05, **slo}
    return SimRequest(
        name,
        arrival_s,
        num_prompt,
        num_output,
        max_tokens or num_output,
        SloClass(**objectives),
        can_layer,
        end,
        rank,
    )


def policy(**changes: Any) -> SloPolicy:
    """What counts here of a policy is its switches: each request brings its class along."""
    return SloPolicy(classes={"chat": job("", 1, 1).slo}, default_class="chat", **changes)


class TinyScheduler(LayeredEngine):
    """Serves jobs with the production controller, and checks everything after every step."""

    def __init__(
        self,
        jobs: Iterable[SimRequest],
        *,
        mode: Any = "auto",
        slo: SloPolicy | None = None,
        limits: Any = None,
        is_measured: bool = True,
        keep_log: bool = False,
        **engine: Any,
    ) -> None:
        super().__init__(
            setup(**engine), jobs, slo or policy(), mode=mode, limits=limits, is_measured=is_measured, keep_log=keep_log
        )
        self._made_when_fetched: dict[str, int] = {}

    @property
    def first_tokens(self) -> dict[str, float]:
        """When the first token of each came out that has one."""
        waiting = {r: live.first_token_s for r, live in self.lives.items()}
        done = {outcome.request_id: outcome.first_token_s for outcome in self.outcomes}
        return {r: first_s for r, first_s in (waiting | done).items() if first_s is not None}

    @property
    def finished(self) -> dict[str, float]:
        """When the last token of each came out that has all."""
        return {r.request_id: r.finish_s for r in self.outcomes if r.finish_s is not None}

    def advance(self) -> None:
        super().advance()
        check_blocks(self, self.lives.values())
        self.ledger.check()
        self._check_lines()

    def check_is_empty(self) -> None:
        """Nobody is here, and nothing is kept of those who were."""
        assert not self.lives
        assert self.ledger.num_host_blocks_used == 0
        assert self.ledger.zone.num_available == self.ledger.zone.num_blocks
        assert len(self.free_ids) == self.geometry.pool_blocks - 1
        controller = self.controller
        books = (controller.tracked, controller.waiting.views, controller.num_parked)
        assert not any((*books, controller.overtaken))

    def _check_lines(self) -> None:
        """The controller's lines are who the ledger says they are."""
        of = {r: self.ledger.residency[r] for r in self.lives}
        assert {w.request_id for w in self.controller.waiting.views} == {
            r for r, state in of.items() if state is Residency.WAITING
        }
        parked = (*self.controller.parked.views, *self.controller.parked_long.views)
        assert {p.request_id for p in parked} == {r for r, state in of.items() if state is Residency.PARKED}
        assert set(self.controller.tracked) == set(self.lives)
        assert self.controller.come_blocks - self.controller.gone_blocks == sum(
            tracked.prompt_blocks for tracked in self.controller.tracked.values()
        )
        assert set(self.controller.waits.values()) <= WAITS_FOR.keys()
        running = [live for live in self.running if live.request_id not in self.controller.paused]
        assert len(running) + len(self._loading) <= self.setup.max_num_seqs

    def _park(self, live: Live) -> None:
        name = live.request_id
        if self.decision.reasons[name] is not Reason.MAKES_ROOM:
            assert live.num_made > self._made_when_fetched.get(name, -1), f"{name} is parked before it made a token"
        super()._park(live)

    def back_to_zone(self, live: Live) -> None:
        self._made_when_fetched[live.request_id] = live.num_made
        super().back_to_zone(live)

    def _fetch(self, live: Live) -> None:
        self._made_when_fetched[live.request_id] = live.num_made
        super()._fetch(live)


class TinyStock(StockEngine):
    """Serves jobs as stock vLLM does, and checks its blocks after every step."""

    def __init__(self, jobs: Iterable[SimRequest], *, watermark: float = 0.0, **engine: Any) -> None:
        super().__init__(setup(**{"zone_blocks": 0, **engine}), jobs, watermark=watermark)

    def advance(self) -> None:
        super().advance()
        check_blocks(self, self.running)


def check_blocks(engine: VirtualEngine, lives: Iterable[Live]) -> None:
    """Each block of pool and zone is either free or held by one request."""
    held = [block for live in lives for block in live.block_ids]
    is_zone_block = engine.geometry.is_zone_block
    pool = [*(block for block in held if not is_zone_block(block)), *engine.free_ids]
    assert sorted(pool) == list(range(1, engine.geometry.pool_blocks))
    zone = [block for block in held if is_zone_block(block)]
    assert len(zone) == len(set(zone))
    if isinstance(engine, LayeredEngine):
        assert len(zone) == engine.ledger.zone.num_taken
