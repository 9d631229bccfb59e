"""The order of the two lines, for compute and for pool blocks, and who is overtaken in one.

Rank goes before everything: in either line a request comes before all of worse rank. Within a rank deadlines decide,
those that cannot be on time behind those that can; a request that was overtaken too often comes first.

A *start* is a prompt's admission, or a fetch. A request is *overtaken* in a step that starts somebody of its line and
rank who is due later, and not itself. :func:`overtaken_in` charges each step in which that happens to anybody to the
one of those left behind who is due first, and whoever was charged ``max_overtakes`` times is passed by nobody.
Deadlines do not move while a request waits, so the one charged is due no later than the one overtaken: a request is
overtaken in at most ``k * max_overtakes`` steps, where ``k`` counts those of its rank that waited meanwhile and were
due no later, itself included, each time that it came to wait. A step may start several. Whoever is due earlier passes
it at any time; no newcomer is once its deadline has passed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from math import inf
from typing import TypeVar

from layerkv.scheduler.snapshot import ParkedRequest, WaitingRequest

Claim = ParkedRequest | WaitingRequest

View = TypeVar("View", bound=Claim)


def in_order(
    line: Sequence[View], *, late: Collection[str], late_before_s: float, overdue: Collection[str]
) -> list[View]:
    """A line in order of turns: by rank; then who is overdue, by deadline; then who is on time; then the late.

    Args:
        line: Who stands in it.
        late: Those who cannot keep their objectives,
        late_before_s: and whoever is due before that is late too.
        overdue: Those who were overtaken too often.
    """

    def turn(claim: View) -> tuple[int, bool, float]:
        return claim.rank, claim.request_id in late or claim.deadline_s < late_before_s, claim.deadline_s

    def turn_of_some(claim: View) -> tuple[int, bool, bool, float]:
        request_id, deadline_s = claim.request_id, claim.deadline_s
        if request_id in overdue:
            return claim.rank, False, False, deadline_s
        return claim.rank, True, request_id in late or deadline_s < late_before_s, deadline_s

    return sorted(line, key=turn_of_some if overdue else turn)


def by_rank(
    claims: Sequence[Claim], prompts: Sequence[WaitingRequest]
) -> list[tuple[Sequence[Claim], Sequence[WaitingRequest]]]:
    """Both lines cut into ranks, the best first. Both must be in order; nearly always there is one rank."""
    ends = [line[at].rank for line in (claims, prompts) if line for at in (0, -1)]
    if not ends:
        return []
    if min(ends) == max(ends):
        return [(claims, prompts)]
    ranks: dict[int, tuple[list[Claim], list[WaitingRequest]]] = {
        rank: ([], []) for rank in sorted({view.rank for view in chain(claims, prompts)})
    }
    for claim in claims:
        ranks[claim.rank][0].append(claim)
    for prompt in prompts:
        ranks[prompt.rank][1].append(prompt)
    return list(ranks.values())


def overtaken_in(line: Sequence[Claim], started: Collection[str]) -> Iterator[str]:
    """Who was overtaken in a step: of those left behind the one due first, and the first in line.

    Args:
        line: Those of one rank that wait in one line, in order of their turns.
        started: Whom the step starts, of these and others.
    """
    first: str | None = None
    first_is_passed = False
    due: str | None = None
    due_s, latest_s = inf, -inf
    for claim in line:
        request_id, deadline_s = claim.request_id, claim.deadline_s
        if request_id in started:
            first_is_passed |= first is not None
            latest_s = max(latest_s, deadline_s)
            continue
        if first is None:
            first = request_id
        if deadline_s < due_s:
            due, due_s = request_id, deadline_s
    if first is not None and first_is_passed:
        yield first
    if due is not None and due_s < latest_s and not (first_is_passed and due == first):
        yield due
