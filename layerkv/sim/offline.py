"""What somebody could keep fluid who knew the whole load beforehand: a bound from above, and a schedule that exists.

Both count requests, each once, whatever its weight. Between the two lies the best that any scheduler could do, in the
simulator's own terms; a request that is given up for the others costs nothing, as if it were served after them.

**The bound** (:func:`most_fluid`) holds for every schedule that decodes out of device memory (not for
``streamed_decode``). A fluid request has its prompt computed within TTFT and its last token by its reader's deadline
(arrival + TTFT + TPOT for each token after the first + what lag its class allows), so what it needs of the engine's
time it needs within these. Needs are reckoned low. A step of ``n`` tokens takes no less than ``fixed + n * each``, for
any line below the profile's curve, and what is fixed is shared by those that decode in it: their KV is in memory all
at once, so a decode whose KV takes a tenth of memory has at least a tenth of it to bear. Of several lines the one that
finds most counts. Into an interval fit only so many of the requests that lie in it; those beyond are not fluid in any
schedule, and disjoint intervals add up.

**The schedule** (:func:`offline_schedule`): of the requests in order of their deadlines, one too many has the largest
go (Moore and Hodgson), at several speeds; only those selected are served, by each of the simulated engines; the best
of these runs counts. A constructed schedule: a better one may exist.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from layerkv.core.cost import CostProfile, Curve
from layerkv.sim.config import SimConfig
from layerkv.sim.engine import SimRequest
from layerkv.sim.run import STRIDE, make_engine

NUM_BOUNDARIES = 24
"""Beginnings, and of each kind ends, of the intervals that are looked at: more find a lower bound, in more time. Not
measured: chosen by judgement."""
SPEEDS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2)
"""Of a stream's pace, at what it is tried to be served. Not measured: chosen by judgement."""
ENGINES = ("stock", "layerkv")


@dataclass(frozen=True, slots=True)
class Offline:
    """How many of ``requests`` requests can be fluid: at least ``schedule``, at most ``bound``."""

    requests: int
    schedule: int
    bound: int


class Need(NamedTuple):
    """The least that a fluid request takes, in seconds; of the engine's time by each of the same lines.

    Attributes:
        arrival_s: When it comes.
        first_due_s: When its prompt is to be computed.
        last_due_s: When all is to be over; infinite where no time per token was promised.
        prompt_s: The engine's time that its prompt takes,
        whole_s: and all of it takes.
        decode_s: Its decode steps, one after the other.
        decode_due_s: How much time these have from the first token on.
    """

    arrival_s: float
    first_due_s: float
    last_due_s: float
    prompt_s: tuple[float, ...]
    whole_s: tuple[float, ...]
    decode_s: float
    decode_due_s: float

    @property
    def is_possible(self) -> bool:
        """Whether it could be fluid if it were alone."""
        return max(self.prompt_s) <= self.first_due_s - self.arrival_s and self.decode_s <= self.decode_due_s


def offline(config: SimConfig, requests: Sequence[SimRequest], *, stride: int = STRIDE) -> Offline:
    """Both figures of one load."""
    needs = needs_of(config, requests)
    return Offline(len(requests), offline_schedule(config, requests, stride=stride), most_fluid(needs))


def needs_of(config: SimConfig, requests: Sequence[SimRequest]) -> list[Need]:
    """What each request takes, in the order given."""
    profile = config.profile
    memory_tokens = config.kv_memory_bytes / profile.kv_bytes_per_token
    lines = lines_below(profile, config.max_num_batched_tokens)
    context_s = _least_per_unit(profile.decode_context, memory_tokens)
    return [_need(request, profile, memory_tokens, lines, context_s) for request in requests]


def _need(
    request: SimRequest,
    profile: CostProfile,
    memory_tokens: float,
    lines: Sequence[tuple[float, float]],
    context_s: float,
) -> Need:
    slo, prompt, decodes = request.slo, request.prompt_tokens, request.output_tokens - 1
    # What decode i of 1..decodes reads, and holds: prompt + i tokens, over all of them.
    read = decodes * prompt + decodes * (decodes + 1) / 2
    attend_s = profile.request_s + profile.pair_s * prompt * (prompt + 1) / 2
    prompt_s = tuple(each_s * prompt + attend_s for _, each_s in lines)
    whole_s = tuple(
        begun_s + decodes * (each_s + profile.request_s) + (fixed_s / memory_tokens + context_s) * read
        for begun_s, (fixed_s, each_s) in zip(prompt_s, lines, strict=True)
    )
    decode_due_s = decodes * slo.tpot_s if decodes else 0.0
    if slo.has_reader:
        decode_due_s += slo.max_lag_s
    first_due_s = request.arrival_s + slo.ttft_s
    return Need(
        arrival_s=request.arrival_s,
        first_due_s=first_due_s,
        last_due_s=first_due_s + decode_due_s,
        prompt_s=prompt_s,
        whole_s=whole_s,
        decode_s=decodes * (profile.step_s + profile.request_s + profile.tokens(1)) + context_s * read,
        decode_due_s=decode_due_s,
    )


def lines_below(profile: CostProfile, most_tokens: int) -> list[tuple[float, float]]:
    """Lines ``(fixed, each)``: a step of 1 to ``most_tokens`` tokens takes at least ``fixed + tokens * each`` seconds.

    One through the origin, and the edges of the curve's convex hull that do not begin below nothing.
    """
    sizes = sorted({1.0, float(most_tokens), *(x for x, _ in profile.tokens.points if 1 <= x <= most_tokens)})
    points = [(size, profile.step_s + profile.tokens(size)) for size in sizes]
    found = [(0.0, min(seconds / size for size, seconds in points)), (min(seconds for _, seconds in points), 0.0)]
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    for left, right in pairwise(hull):
        each_s = _slope(left, right)
        fixed_s = left[1] - each_s * left[0]
        if each_s > 0 and fixed_s > 0:
            found.append((fixed_s, each_s))
    return found


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def _least_per_unit(curve: Curve, most: float) -> float:
    """The least of ``curve(x) / x``: between two points it only grows or only falls."""
    return min(curve(x) / x for x in {1.0, most, *(x for x, _ in curve.points if 1 <= x <= most)})


def most_fluid(needs: Sequence[Need]) -> int:
    """How many of these requests can be fluid at most. See the module."""
    possible = sorted((need for need in needs if need.is_possible), key=lambda need: need.arrival_s)
    if not possible:
        return 0
    starts = _spread([need.arrival_s for need in possible])
    last_dues = [need.last_due_s for need in possible if need.last_due_s < math.inf]
    ends = sorted({*_spread(last_dues), *_spread([need.first_due_s for need in possible])})
    arrivals = [need.arrival_s for need in possible]
    too_many = [0]  # by each end: requests before it that are not fluid in any schedule
    for end_s in ends:
        most = too_many[-1]
        for start_s in starts:
            if start_s >= end_s:
                break
            inside = possible[bisect_left(arrivals, start_s) : bisect_right(arrivals, end_s)]
            before = too_many[bisect_right(ends, start_s)]
            most = max(most, before + _num_too_many(inside, start_s, end_s))
        too_many.append(most)
    return len(possible) - too_many[-1]


def _spread(times_s: Sequence[float]) -> list[float]:
    """Some of the times, evenly among them, the first and the last with them."""
    ordered = sorted(set(times_s))
    if len(ordered) <= NUM_BOUNDARIES:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (NUM_BOUNDARIES - 1))] for i in range(NUM_BOUNDARIES)]


def _num_too_many(inside: Sequence[Need], start_s: float, end_s: float) -> int:
    """Of those that come in an interval, how many do not fit into it."""
    sizes = [
        need.whole_s if need.last_due_s <= end_s else need.prompt_s for need in inside if need.first_due_s <= end_s
    ]
    return max((_num_over(by_line, end_s - start_s) for by_line in zip(*sizes, strict=True)), default=0)


def _num_over(sizes_s: Sequence[float], room_s: float) -> int:
    """How many have to go for the others to fit, the largest first."""
    over_s = math.fsum(sizes_s) - room_s * (1 + 1e-9)
    num = 0
    for size_s in sorted(sizes_s, reverse=True) if over_s > 0 else ():
        if over_s <= 0:
            break
        over_s -= size_s
        num += 1
    return num


def offline_schedule(config: SimConfig, requests: Sequence[SimRequest], *, stride: int = STRIDE) -> int:
    """How many requests are fluid in the best schedule found. See the module."""
    needs = needs_of(config, requests)
    selections = {tuple(range(len(requests)))}
    selections.update(tuple(select(needs, speed)) for speed in SPEEDS)
    best = 0
    for selected in sorted(selections, key=len, reverse=True):
        if len(selected) <= best:
            break
        for name in ENGINES:
            outcome = make_engine(config, name, [requests[i] for i in selected], stride=stride).run()
            best = max(best, sum(request.is_fluid for request in outcome.requests))
    return best


def select(needs: Sequence[Need], speed: float) -> list[int]:
    """Which requests an engine of that speed serves in time one after the other, as many as can be.

    Exact (Moore and Hodgson 1968) where all come at once; of those that come later, the ones of a busy stretch are
    weighed against each other. Returns indices into ``needs``.
    """
    kept: list[int] = []
    busy: list[tuple[float, int]] = []  # the largest first
    free_s = -math.inf
    order = sorted((i for i, need in enumerate(needs) if need.is_possible), key=lambda i: needs[i].last_due_s)
    for i in order:
        need = needs[i]
        if need.arrival_s > free_s:
            kept += (j for _, j in busy)
            busy, free_s = [], need.arrival_s
        size_s = max(need.whole_s) / speed
        heapq.heappush(busy, (-size_s, i))
        free_s += size_s
        if free_s > need.last_due_s:
            free_s += heapq.heappop(busy)[0]
    return sorted(kept + [j for _, j in busy])
