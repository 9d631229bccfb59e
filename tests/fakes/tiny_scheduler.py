"""An engine without a model: the real policy and the real ledger, served as the adapter serves them, step by step.

It is vLLM's scheduler cut down to what decisions depend on: tokens, block tables, a pool, the zone, preemption by
recompute when a resident's next block is not there. No torch, no clock: a step takes as long as its tokens.

A step fails the test if the ledger refuses what the policy decided, if books do not add up, or if a fetched request is
parked again before it has made a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerkv.core.geometry import KVGeometry
from layerkv.core.ledger import KVLedger
from layerkv.core.residency import Residency
from layerkv.core.runs import RunAllocator
from layerkv.scheduler.policy import PolicyLimits, decide
from layerkv.scheduler.snapshot import (
    Decision,
    LayeredRequest,
    ParkedRequest,
    ResidentRequest,
    Snapshot,
    WaitingRequest,
)
from layerkv.scheduler.tracker import DeadlineQueue

BLOCK_TOKENS = 16
STEP_S = 0.01
PREFILL_S_PER_TOKEN = 1e-4


@dataclass(frozen=True)
class Job:
    """One request of a load."""

    name: str
    num_prompt: int
    num_output: int
    arrival_step: int = 0
    ttft_s: float = 1.0
    tpot_s: float = 0.05
    can_layer: bool = True


@dataclass(eq=False)
class _Running:
    job: Job
    arrival_s: float
    num_computed: int = 0
    num_made: int = 0
    first_token_s: float | None = None
    block_ids: list[int] = field(default_factory=list)
    since_step: int = 0
    ready_at_step: int = 0
    num_made_when_fetched: int = -1

    @property
    def num_tokens(self) -> int:
        return self.job.num_prompt + self.num_made

    @property
    def remaining(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        return self.num_made == 0 or self.remaining > 1

    def next_token_due_s(self, now_s: float) -> float:
        first_s = self.first_token_s if self.first_token_s is not None else now_s
        return first_s + self.job.tpot_s * max(self.num_made, 1)


class TinyScheduler:
    """Serves jobs. `served_at` has the step in which each got its first token, `finished_at` its last."""

    def __init__(
        self,
        jobs: Iterable[Job],
        *,
        pool_blocks: int = 20,
        zone_blocks: int = 8,
        num_host_blocks: int = 60,
        budget_tokens: int = 64,
        slots: int = 16,
        limits: PolicyLimits | None = None,
        **modes: Any,
    ) -> None:
        geometry = KVGeometry(
            num_layers=4,
            page_bytes=64,
            block_tokens=BLOCK_TOKENS,
            pool_blocks=pool_blocks + 1,
            zone_blocks=zone_blocks,
            lanes=1,
        )
        self.ledger = KVLedger(geometry, num_host_blocks)
        self.pool = RunAllocator(1, pool_blocks)
        self.modes = {"mode": "auto", "streamed_decode": False, "frees_are_deferred": False, **modes}
        self.limits = limits
        self.budget_tokens, self.slots = budget_tokens, slots
        self.to_come = sorted(jobs, key=lambda job: job.arrival_step)
        self.step, self.now_s = 0, 0.0
        self.of: dict[str, _Running] = {}
        self.running: list[_Running] = []
        self.waiting: DeadlineQueue[WaitingRequest] = DeadlineQueue()
        self.parked: DeadlineQueue[ParkedRequest] = DeadlineQueue()
        self.overtaken: dict[str, int] = {}
        self.served_at: dict[str, int] = {}
        self.finished_at: dict[str, int] = {}
        self.refused: list[str] = []
        self.num_recomputes = 0
        self._freed: list[int] = []

    def run(self, max_steps: int) -> None:
        """Serve until everybody has finished; who has not after `max_steps` starves."""
        while self.to_come or self.of:
            assert self.step < max_steps, f"still here after {max_steps} steps: {self.whereabouts()}"
            self.one_step()
        assert self.ledger.num_host_blocks_used == 0
        assert self.ledger.zone.num_available == self.ledger.zone.num_blocks
        assert self.pool.num_free == self.pool.count

    def whereabouts(self) -> dict[str, str]:
        """Where everybody is, for the message of a failed test."""
        return {name: self.ledger.residency[name].value for name in self.of}

    def one_step(self) -> Decision:
        """Arrivals, a decision, and what follows from it."""
        self._arrive()
        decision = decide(self.snapshot(), self.limits)
        self._apply(decision)
        num_prefilled = self._compute(decision)
        self._complete_fetches()
        self._give_back_freed()
        self.now_s += STEP_S + num_prefilled * PREFILL_S_PER_TOKEN
        self.step += 1
        self._check()
        return decision

    # What the policy sees ------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """As the adapter's: one pass over what runs."""
        ledger, layered, residents = self.ledger, [], []
        growth = reserved = decoding = prefilling = 0
        slack_s = float("inf")
        for r in self.running:
            new = min(r.remaining, self.budget_tokens) if r.is_prefilling else 1
            last_block = _blocks(r.num_computed + new)
            missing = max(last_block - len(r.block_ids), 0)
            if r.is_prefilling:
                prefilling += r.remaining
            else:
                decoding += 1
                due_s = r.next_token_due_s(self.now_s)
                slack_s = min(slack_s, due_s - self.now_s - STEP_S) if due_s >= self.now_s else slack_s
            if ledger.is_layered(r.job.name):
                in_zone = sum(block >= ledger.geometry.pool_blocks for block in r.block_ids)
                layered.append(
                    LayeredRequest(
                        r.job.name,
                        prefill_done=not r.is_prefilling,
                        num_blocks=_blocks(max(r.num_computed + 1, r.num_tokens)),
                        num_zone_blocks=in_zone,
                        needs_zone_block=missing > 0 and not r.is_prefilling,
                        needs_host_block=last_block > ledger.num_host_blocks_of(r.job.name),
                    )
                )
            else:
                growth += missing
                reserved += _blocks(r.num_tokens) - len(r.block_ids) if r.is_prefilling else 0
                residents.append(
                    ResidentRequest(
                        r.job.name,
                        r.next_token_due_s(self.now_s),
                        num_blocks=len(r.block_ids),
                        steps_resident=self.step - r.since_step,
                        can_park=r.job.can_layer and r.num_computed > 0,
                    )
                )
        return Snapshot(
            now_s=self.now_s,
            **self.modes,
            block_tokens=BLOCK_TOKENS,
            pool_blocks=self.pool.count,
            free_blocks=self.pool.num_free,
            growth_blocks=growth,
            reserved_blocks=max(reserved, 0),
            zone_blocks=ledger.zone.num_blocks,
            free_zone_blocks=ledger.zone.num_available,
            host_blocks=ledger.host.count,
            free_host_blocks=ledger.host.num_free,
            free_slots=self.slots - len(self.running) - len(self._fetching()),
            budget_tokens=self.budget_tokens,
            decode_tokens=decoding,
            prefilling_tokens=prefilling,
            decode_slack_s=slack_s,
            prefill_s_per_token=PREFILL_S_PER_TOKEN,
            # on their way into the pool is as good as in it: headroom is needed for them too
            num_resident=len(residents) + len(self._fetching()),
            waiting=list(self.waiting.views),
            parked=list(self.parked.views),
            resident=residents if growth > self.pool.num_free else (),
            layered=layered,
            overtaken=self.overtaken,
        )

    # What follows from a decision ----------------------------------------------------------------------------

    def _arrive(self) -> None:
        while self.to_come and self.to_come[0].arrival_step <= self.step:
            job = self.to_come.pop(0)
            self.of[job.name] = _Running(job, self.now_s)
            self.ledger.add(job.name)
            self._wait(self.of[job.name])

    def _wait(self, r: _Running) -> None:
        due_s = r.arrival_s + r.job.ttft_s if r.first_token_s is None else r.next_token_due_s(self.now_s)
        view = WaitingRequest(r.job.name, due_s, r.num_tokens, _blocks(r.num_tokens), can_layer=r.job.can_layer)
        self.waiting.add(view)

    def _apply(self, decision: Decision) -> None:
        if decision.overtaken is not None:
            self.overtaken[decision.overtaken] = self.overtaken.get(decision.overtaken, 0) + 1
        for name, _ in decision.refuse:
            self.refused.append(name)
            self.waiting.discard(name)
            self.ledger.finish(name)
            del self.of[name]
        for name in decision.park:
            self._park(self.of[name])
        for name in decision.fetch:
            self._fetch(self.of[name])
        for admission in decision.admit:
            r = self.of[admission.request_id]
            if admission.layered:
                blocks = _blocks(r.num_tokens)
                self.ledger.admit_layered(r.job.name, table_blocks=blocks, zone_blocks=admission.zone_blocks)
            else:
                assert _blocks(r.num_tokens) <= self.pool.num_free, "the pool was promised twice"

    def _park(self, r: _Running) -> None:
        name = r.job.name
        assert r.num_made > r.num_made_when_fetched, f"{name} is parked again before it made a token"
        self.ledger.park(name, tuple(r.block_ids), r.num_computed)
        self.running.remove(r)
        self._free(r)
        num_blocks = _blocks(max(r.num_computed + 1, r.num_tokens))
        self.parked.add(ParkedRequest(name, r.next_token_due_s(self.now_s), num_blocks))

    def _fetch(self, r: _Running) -> None:
        r.block_ids = self.pool.take(_blocks(max(r.num_computed + 1, r.num_tokens)))
        self.ledger.fetch(r.job.name, tuple(r.block_ids), 0)
        self.parked.discard(r.job.name)
        self.overtaken.pop(r.job.name, None)
        r.ready_at_step = self.step + 2

    def _compute(self, decision: Decision) -> int:
        decoding = [r for r in self.running if not r.is_prefilling]
        prefilling = [r for r in self.running if r.is_prefilling]
        starting = [self.of[admission.request_id] for admission in decision.admit]
        left = min(self.budget_tokens, max(len(decoding) + decision.prefill_tokens, 1))
        num_prefilled, computed = 0, []
        for r in [*decoding, *prefilling, *starting]:
            num_tokens = min(r.remaining, left)
            is_new = r in starting
            if self.ledger.residency[r.job.name] is Residency.WAITING and not is_new:
                continue  # preempted in this very step
            if num_tokens == 0 or not self._allocate(r, num_tokens):
                if is_new and self.ledger.is_layered(r.job.name):
                    self.ledger.cancel_layered(r.job.name)
                continue
            if is_new:
                self.waiting.discard(r.job.name)
                self.overtaken.pop(r.job.name, None)
                self.running.append(r)
                r.since_step = self.step
            left -= num_tokens
            num_prefilled += num_tokens if r.is_prefilling else 0
            computed.append((r, num_tokens))
        for r, num_tokens in computed:
            if r in self.running:
                self._advance(r, num_tokens)
        plan = self.ledger.take_plan(sum(num_tokens for _, num_tokens in computed))
        assert not plan.is_layered or plan.num_tokens
        return num_prefilled

    def _allocate(self, r: _Running, num_tokens: int) -> bool:
        ledger, name = self.ledger, r.job.name
        missing = max(_blocks(r.num_computed + num_tokens) - len(r.block_ids), 0)
        if ledger.is_layered(name):
            r.block_ids += ledger.zone.take(name, missing)
            ledger.started(name)
            ledger.step_layered(name, tuple(r.block_ids), num_computed=r.num_computed, num_scheduled=num_tokens)
            return True
        if r not in self.running and _blocks(r.num_tokens) > self.pool.num_free:
            return False  # vLLM starts a prompt only when all of it fits
        while missing > self.pool.num_free:
            last = next(other for other in reversed(self.running) if not ledger.is_layered(other.job.name))
            self._preempt(last)
            if last is r:
                return False
        r.block_ids += self.pool.take(missing)
        ledger.started(name)
        return True

    def _preempt(self, r: _Running) -> None:
        """Stock vLLM: the KV is given up and computed again."""
        self.num_recomputes += 1
        self.running.remove(r)
        self.ledger.drop(r.job.name)
        self.pool.give_back(r.block_ids)
        r.block_ids, r.num_computed = [], 0
        self._wait(r)

    def _advance(self, r: _Running, num_tokens: int) -> None:
        name = r.job.name
        r.num_computed += num_tokens
        if r.remaining:
            return
        r.num_made += 1
        if r.first_token_s is None:
            r.first_token_s = self.now_s
            self.served_at[name] = self.step
        if r.num_made == r.job.num_output:
            self.finished_at[name] = self.step
            self.running.remove(r)
            self._free(r)
            self.ledger.finish(name)
            del self.of[name]

    def _complete_fetches(self) -> None:
        for r in self._fetching():
            if r.ready_at_step <= self.step:
                self.ledger.complete_fetch(r.job.name)
                self.running.append(r)
                r.since_step, r.num_made_when_fetched = self.step, r.num_made

    def _fetching(self) -> Sequence[_Running]:
        return [r for name, r in self.of.items() if self.ledger.residency[name] is Residency.FETCHING]

    def _free(self, r: _Running) -> None:
        self._freed += r.block_ids
        r.block_ids = []
        if not self.modes["frees_are_deferred"]:
            self._give_back_freed()

    def _give_back_freed(self) -> None:
        first_zone_block = self.ledger.geometry.pool_blocks
        self.ledger.zone.give_back(block for block in self._freed if block >= first_zone_block)
        self.pool.give_back(block for block in self._freed if block < first_zone_block)
        self._freed = []

    def _check(self) -> None:
        self.ledger.check()
        held = [block for r in self.of.values() for block in r.block_ids]
        assert len(held) == len(set(held))
        assert len(held) == self.ledger.zone.num_taken + self.pool.count - self.pool.num_free


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)
