"""The virtual engine: what vLLM's scheduler and executor do with requests and blocks, on a virtual clock.

A step takes as long as a cost profile says. What the two engines of this module share is here: arrivals, computing,
finishing, the clock. How they choose what to compute is theirs: :mod:`layerkv.sim.stock` is vLLM's own scheduling,
:mod:`layerkv.sim.layered` the production controller and ledger. Not modelled: prefix caching, speculation, LoRA.

Steps in which nothing is decided are taken together: ``k`` decode steps with the same requests are one pass of this
code, up to the next arrival, finish, fetch or shortage of blocks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from layerkv.config import SloClass
from layerkv.core.cost import CostProfile, CostView, StepWork, chunk_pairs
from layerkv.core.geometry import KVGeometry
from layerkv.figures import StreamTally
from layerkv.scheduler.reasons import End
from layerkv.sim.outcome import GapHistogram, RequestOutcome, SimOutcome


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request to serve. ``output_tokens`` is what it will make; the scheduler knows only ``max_tokens``.

    It ends by itself, or, with another ``end``, by a stop string that the engine does not know of, say.
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    slo: SloClass
    can_layer: bool = True
    end: End = End.FINISHED
    rank: int = 0


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """A virtual engine: vLLM's limits and our geometry.

    Attributes:
        geometry: Pool and zone. Stock vLLM has the zone's memory too: give it a geometry without one.
        num_host_blocks: Host memory.
        max_num_batched_tokens: Tokens of a step.
        max_num_seqs: Requests that run together.
        profile: What steps and copies cost, in truth.
        frees_are_deferred: Whether blocks given up come back only after the next step (asynchronous scheduling).
        long_contexts: Whether requests may be longer than the pool: they decode in the zone.
        stride: Steps that may pass between decisions while requests wait and nothing changes; with 1
            a decision stands as long as in production.
    """

    geometry: KVGeometry
    num_host_blocks: int
    max_num_batched_tokens: int
    max_num_seqs: int
    profile: CostProfile
    frees_are_deferred: bool = False
    stride: int = 1
    long_contexts: bool = False


@dataclass(slots=True, eq=False)
class Live:
    """A request under way."""

    request: SimRequest
    request_id: str = field(init=False)
    prompt_tokens: int = field(init=False)
    num_computed: int = 0
    num_made: int = 0
    block_ids: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    last_token_s: float = 0.0
    longest_gap_s: float = 0.0
    num_parks: int = 0
    num_recomputes: int = 0
    tally: StreamTally = field(init=False)

    def __post_init__(self) -> None:
        self.tally = StreamTally(self.request.slo, self.request.arrival_s)
        # Asked for millions of times in a run.
        self.request_id, self.prompt_tokens = self.request.request_id, self.request.prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return self.prompt_tokens + self.num_made

    @property
    def remaining(self) -> int:
        """Tokens without KV."""
        return self.prompt_tokens + self.num_made - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """Whether more than its newest token is to be computed."""
        return self.num_made == 0 or self.prompt_tokens + self.num_made - self.num_computed > 1


Scheduled = list[tuple[Live, int]]


class VirtualEngine(ABC):
    """See the module. Subclasses schedule; :meth:`run` serves a whole load."""

    def __init__(self, setup: EngineSetup, requests: Iterable[SimRequest]) -> None:
        self.setup = setup
        self.geometry = setup.geometry
        self.truth = CostView(setup.profile)
        self.now_s = 0.0
        self.step = 0
        self.running: list[Live] = []
        self.free_ids = list(range(setup.geometry.pool_blocks - 1, 0, -1))  # id 0 is vLLM's null block
        self.to_come = deque(sorted(requests, key=lambda request: request.arrival_s))
        self.num_under_way = 0
        self.outcomes: list[RequestOutcome] = []
        self.gaps = GapHistogram()
        self.num_with_kv = 0
        """Tokens computed so far, prompts' and outputs'."""
        self.horizon_s = math.inf
        """Nothing goes on beyond that in one go, where others share the device (:mod:`layerkv.sim.sharing`)."""
        self.slowdown = 1
        """How many engines compute at once: each step takes so many times its cost."""
        self._freed: list[int] = []
        self._pool_goal = setup.geometry.pool_blocks - 1
        self._withheld: list[int] = []  # pool blocks without memory

    # What subclasses do -------------------------------------------------------------------------------------------

    @abstractmethod
    def arrive(self, live: Live) -> None:
        """A request has come in."""

    @abstractmethod
    def schedule(self) -> Scheduled:
        """Choose what to compute in the next step, and allocate blocks for it."""

    @abstractmethod
    def left(self, live: Live) -> None:
        """A request has made its last token and left the running ones; its blocks are to be freed."""

    def copies(self) -> tuple[int, int, int, bool]:
        """What the step copies: bytes stored and loaded layer by layer, stored before it; and if it is layered."""
        return 0, 0, 0, False

    def made_tokens(self, live: Live, at_s: float, num_tokens: int, every_s: float) -> None:  # noqa: B027 (may do nothing)
        """A request has made tokens, the first at ``at_s`` and one more each ``every_s``."""

    def stepped(self, work: StepWork, seconds: float, firsts: Sequence[Live]) -> None:  # noqa: B027 (may do nothing)
        """A step (or several alike, each of which took so long) has ended; ``firsts`` made their first token."""

    def has_acted(self) -> bool:
        """Whether scheduling changed anything though it chose nothing to compute: then it is due again at once."""
        return False

    def most_repeats(self) -> int:
        """Steps after which a decision is due although nothing has changed."""
        return 1 << 30

    def next_event_s(self) -> float:
        """When something other than an arrival or a token will change what can be scheduled."""
        return math.inf

    # The clock ----------------------------------------------------------------------------------------------------

    def run(self, max_steps: int = 1 << 60) -> SimOutcome:
        """Serve everything; raises AssertionError if that takes more than ``max_steps``."""
        while self.to_come or self.num_under_way:
            assert self.step < max_steps, f"still {self.num_under_way} requests under way after {max_steps} steps"
            self.advance()
        return self.whole_outcome()

    def whole_outcome(self) -> SimOutcome:
        """What the whole load came to, its requests in order of arrival."""
        self.outcomes.sort(key=lambda outcome: outcome.arrival_s)
        return self.outcome()

    def outcome(self) -> SimOutcome:
        """What the load came to."""
        return SimOutcome(self.outcomes, self.gaps, self.now_s, self.step)

    def advance(self) -> None:
        """One step, or several alike, or a wait for something to do."""
        self.take_arrivals()
        scheduled = self.schedule()
        if scheduled:
            self._execute(scheduled)
            return
        has_acted = bool(self._freed) or self.has_acted()
        self._give_back_freed()
        self.step += 1
        _, _, before, _ = self.copies()
        self.now_s += self.setup.profile.store(before) if before else 0.0
        if has_acted:
            return
        next_s = self._next_s()
        assert next_s < math.inf, f"{self.num_under_way} requests under way and nothing to wait for"
        self.now_s = max(self.now_s, next_s)

    def take_arrivals(self) -> None:
        """Whoever has come by now is under way."""
        while self.to_come and self.to_come[0].arrival_s <= self.now_s:
            self.num_under_way += 1
            self.arrive(Live(self.to_come.popleft()))

    def _next_s(self) -> float:
        arrival_s = self.to_come[0].arrival_s if self.to_come else math.inf
        return min(arrival_s, self.next_event_s(), self.horizon_s)

    def _execute(self, scheduled: Scheduled) -> None:
        stored, loaded, before, is_layered = self.copies()
        work = _work(scheduled, stored, loaded, is_layered=is_layered)
        seconds = self._step_s(work)
        repeats = 1
        if not work.prefill_tokens and not is_layered:
            repeats = self._repeats(scheduled, work, seconds)
            if repeats > 1:
                seconds = self._mean_step_s(work, repeats)
        begun_s = self.now_s
        self.now_s += seconds * repeats + (self.setup.profile.store(before) if before else 0.0)
        self.step += repeats
        firsts = self._make_tokens(scheduled, repeats, begun_s, seconds)
        self._give_back_freed()
        self.stepped(work, seconds, firsts)

    def _mean_step_s(self, work: StepWork, repeats: int) -> float:
        """Seconds of a step, over so many that each read a token more per request than the one before."""
        return self._step_s(work._replace(decode_context=work.decode_context + work.num_decodes * (repeats - 1) // 2))

    def _step_s(self, work: StepWork) -> float:
        return self.truth.step_s(work) * self.slowdown

    def _repeats(self, scheduled: Scheduled, work: StepWork, seconds: float) -> int:
        """How many steps like this one, which takes so long, follow each other before anything else can happen."""
        most = min(self.most_repeats(), min(live.request.output_tokens - live.num_made for live, _ in scheduled))
        most = min(most, max(len(self.free_ids) // len(scheduled), 0) * self.geometry.block_tokens or 1)
        if most <= 1:
            return 1
        if (next_s := self._next_s()) < math.inf:
            left_s = next_s - self.now_s
            if left_s < most * seconds:
                most = max(math.ceil(left_s / seconds), 1)
            # Later steps take longer than this one: find the first that ends behind the event.
            if most > 1 and most * (longest_s := self._mean_step_s(work, most)) > left_s:
                fewest = max(math.ceil(left_s / longest_s), 1)
                most = next(k for k in range(fewest, most + 1) if k * self._mean_step_s(work, k) >= left_s)
        for live, _ in scheduled if most > 1 else ():
            self.hold(live, live.num_computed + most)
        return most

    def _make_tokens(self, scheduled: Scheduled, repeats: int, begun_s: float, seconds: float) -> list[Live]:
        firsts: list[Live] = []
        now_s = self.now_s
        first_gap_end_s = now_s - (repeats - 1) * seconds
        steady = 0
        for live, num_tokens in scheduled:
            live.num_computed += num_tokens + repeats - 1
            self.num_with_kv += num_tokens + repeats - 1
            if live.num_tokens + repeats - 1 > live.num_computed:
                continue  # a chunk that was not its last
            if live.first_token_s is None:
                live.first_token_s = now_s
                firsts.append(live)
            elif live.last_token_s == begun_s:
                steady += 1
                live.longest_gap_s = max(live.longest_gap_s, first_gap_end_s - begun_s)
            else:
                gap_s = first_gap_end_s - live.last_token_s
                self.gaps.add(gap_s)
                live.longest_gap_s = max(live.longest_gap_s, gap_s)
            live.last_token_s = now_s
            live.num_made += repeats
            live.tally.add(first_gap_end_s, repeats, seconds)
            self.made_tokens(live, first_gap_end_s, repeats, seconds)
            if live.num_made >= live.request.output_tokens:
                self._finish(live)
        if steady:
            self.gaps.add(first_gap_end_s - begun_s, steady)
        if repeats > 1:
            self.gaps.add(seconds, (repeats - 1) * len(scheduled))
        return firsts

    def _finish(self, live: Live) -> None:
        self.running.remove(live)
        self.left(live)
        self.end(live, self.now_s)

    def end(self, live: Live, finish_s: float | None) -> None:
        """Record a request that is over."""
        self.num_under_way -= 1
        self.outcomes.append(
            RequestOutcome(
                live.request_id,
                live.request.slo,
                live.request.arrival_s,
                live.request.prompt_tokens,
                live.num_made,
                live.first_token_s,
                finish_s,
                live.tally,
                live.longest_gap_s,
                live.num_parks,
                live.num_recomputes,
            )
        )

    # Blocks -------------------------------------------------------------------------------------------------------

    def blocks(self, num_tokens: int) -> int:
        """Blocks of so many tokens."""
        return -(-num_tokens // self.geometry.block_tokens)

    def hold(self, live: Live, num_tokens: int) -> bool:
        """Give a request pool blocks for so many tokens; False, and nothing is given, if there are not enough."""
        missing = self.blocks(num_tokens) - len(live.block_ids)
        if missing <= 0:
            return True
        if missing > len(self.free_ids):
            return False
        live.block_ids += self.free_ids[-missing:]
        del self.free_ids[-missing:]
        return True

    def free(self, live: Live) -> None:
        """Take a request's blocks away; with deferred frees others get them only after the next step."""
        self._freed += live.block_ids
        live.block_ids = []
        if not self.setup.frees_are_deferred:
            self._give_back_freed()

    def give_back_zone(self, block_ids: list[int]) -> None:  # noqa: B027 (stock has no zone)
        """Zone blocks are free again."""

    def _give_back_freed(self) -> None:
        if not self._freed:
            return
        is_zone_block = self.geometry.is_zone_block
        self.free_ids += [block for block in self._freed if not is_zone_block(block)]
        self.give_back_zone([block for block in self._freed if is_zone_block(block)])
        self._freed = []
        if self.num_to_leave:
            self._withhold()

    # Memory that comes and goes -----------------------------------------------------------------------------------

    @property
    def num_in_service(self) -> int:
        """Pool blocks with memory, without vLLM's null block."""
        return self.geometry.pool_blocks - 1 - len(self._withheld)

    @property
    def num_used(self) -> int:
        """Pool blocks in use."""
        return self.num_in_service - len(self.free_ids)

    @property
    def num_to_leave(self) -> int:
        """Pool blocks that are to lose their memory and are in use."""
        return max(self.num_in_service - self._pool_goal, 0)

    def resize(self, pool_blocks: int) -> None:
        """So many pool blocks, beside the null block, shall have memory: those in use lose it as they come free."""
        self._pool_goal = min(pool_blocks, self.geometry.pool_blocks - 1)
        if (missing := self._pool_goal - self.num_in_service) > 0:
            self.free_ids += self._withheld[-missing:]
            del self._withheld[-missing:]
        self._withhold()

    def _withhold(self) -> None:
        if (count := min(self.num_to_leave, len(self.free_ids))) > 0:
            self._withheld += self.free_ids[-count:]
            del self.free_ids[-count:]

    @abstractmethod
    def num_needed(self) -> int:
        """Pool blocks that those under way need: those that run, wait or are parked."""

    def num_that_could_leave(self) -> int:
        """Of the blocks in use, those that could be given up without losing anything."""
        return 0


def _work(scheduled: Scheduled, stored: int, loaded: int, *, is_layered: bool) -> StepWork:
    num_decodes = context = prefill = num_prefills = 0
    pairs = 0.0
    for live, num_tokens in scheduled:
        if num_tokens == 1 and not live.is_prefilling:
            num_decodes += 1
            context += live.num_computed + 1
        else:
            prefill += num_tokens
            num_prefills += 1
            pairs += chunk_pairs(num_tokens, live.num_computed)
    return StepWork(num_decodes, context, prefill, pairs, num_prefills, stored, loaded, is_layered)
