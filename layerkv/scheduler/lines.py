"""The order of the two lines, for compute and for pool blocks, and who is overtaken in one.

Rank goes before everything: in either line a request comes before all of worse rank. Within a rank deadlines decide,
those that cannot be on time behind those that can; a request that was overtaken too often comes first.

A *start* is a prompt's admission, or a fetch. A request is *overtaken* in a step that starts somebody of its line and
rank who is due later, and not itself. :func:`overtaken_in` charges each step in which that happens to anybody to the
one of those left behind who is due first, and whoever was charged ``max_overtakes`` times is passed by nobody.
Deadlines do not move while a request waits, so the one charged is due no later than the one overtaken: a request is
overtaken in at most ``k * max_overtakes`` steps, where ``k`` counts those of its rank that waited meanwhile and were
due no later, itself included. A step may start several. Whoever is due earlier passes it at any time; no newcomer is
once its deadline has passed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from math import inf

from layerkv.scheduler.snapshot import ParkedRequest, WaitingRequest

Claim = ParkedRequest | WaitingRequest


def turn_of(claim: Claim, *, is_overdue: bool, is_late: bool) -> tuple[int, bool, bool, float]:
    """The place of a request in its line: by rank; overdue ones first, in order of deadline; then those on time.

    Args:
        claim: The request.
        is_overdue: Whether it was overtaken too often.
        is_late: Whether it cannot keep its objective any more.
    """
    return claim.rank, not is_overdue, is_late and not is_overdue, claim.deadline_s


def by_rank(
    claims: Sequence[Claim], prompts: Sequence[WaitingRequest]
) -> Iterator[tuple[Sequence[Claim], Sequence[WaitingRequest]]]:
    """Both lines cut into ranks, the best first. Both must be in order; nearly always there is one rank."""
    ends = [line[at].rank for line in (claims, prompts) if line for at in (0, -1)]
    if not ends:
        return
    if min(ends) == max(ends):
        yield claims, prompts
        return
    ranks: dict[int, tuple[list[Claim], list[WaitingRequest]]] = {
        rank: ([], []) for rank in sorted({view.rank for view in chain(claims, prompts)})
    }
    for claim in claims:
        ranks[claim.rank][0].append(claim)
    for prompt in prompts:
        ranks[prompt.rank][1].append(prompt)
    yield from ranks.values()


def overtaken_in(line: Sequence[Claim], started: Collection[str]) -> Iterator[str]:
    """Who was overtaken in a step: of those left behind the one due first, and the first in line.

    Args:
        line: Those of one rank that wait in one line, in order of their turns.
        started: Whom the step starts, of these and others.
    """
    first: str | None = None
    first_is_passed = False
    due: Claim | None = None
    latest_s = -inf
    for claim in line:
        if claim.request_id in started:
            first_is_passed |= first is not None
            latest_s = max(latest_s, claim.deadline_s)
            continue
        if first is None:
            first = claim.request_id
        if due is None or (claim.deadline_s, claim.request_id) < (due.deadline_s, due.request_id):
            due = claim
    if first is not None and first_is_passed:
        yield first
    if due is not None and due.deadline_s < latest_s and not (first_is_passed and due.request_id == first):
        yield due.request_id
