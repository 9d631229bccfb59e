"""The scheduler policy: who is parked, fetched, admitted or refused in a step, and how much prefill it does.

:func:`decide` is pure: same snapshot, same decision. It looks at the heads of the queues only, so its cost does not
grow with the number of waiting requests.

Lines form (:mod:`layerkv.scheduler.lines`). Prompts stand in line for *compute*, by TTFT deadline; those that
cannot be on time (Moore-Hodgson) behind those that can. Whoever can only go on in the pool, that is parked requests and
prompts that cannot run layered, stands in line for *pool blocks*: with ``fluid`` by when readers run dry
(:mod:`layerkv.scheduler.fluid`), else by the latest time to go on, those too late for their objectives behind those
that are not. Parked requests that outgrow the pool stand in a third line, for the *zone*
(:mod:`layerkv.scheduler.zone_turns`): prompts go before them there while they can wait.

Ranks (vLLM's request priorities) are served one after the other: while a request of better rank waits for room, worse
ranks get none of it, as in vLLM. They starve as long as better ones take everything; within a rank nobody does. There,
of those left behind in a line, the first and the one due first may be overtaken in ``max_overtakes`` steps; then nobody
passes it any more, and the room is left to drain for it: any single request fits an empty pool and an empty zone.
With ``fluid`` it need not wait for that: it takes the place of whoever has had a slice (:mod:`.rules.rotate`). Whatever
the order of claims, nobody is passed by one of its line and rank that is due later in more than ``k * max_overtakes``
steps, where ``k`` counts those of its rank that waited meanwhile and were due no later, itself included,
each time that it came to wait.
Prefill itself never stops for more than ``max_idle_steps`` steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.fluid import FluidOutlook
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.rules.exchange import exchange
from layerkv.scheduler.rules.give_way import give_way
from layerkv.scheduler.rules.keep_zone import keep_zone
from layerkv.scheduler.rules.leave_zone import leave_zone
from layerkv.scheduler.rules.relieve_pool import relieve_pool
from layerkv.scheduler.rules.rotate import rotate
from layerkv.scheduler.rules.serve_ranks import serve_ranks
from layerkv.scheduler.rules.share_zone import share_zone
from layerkv.scheduler.rules.store_ahead import store_ahead
from layerkv.scheduler.rules.take_turns import fill_slots, resume_all, resume_due
from layerkv.scheduler.rules.vacate import vacate
from layerkv.scheduler.rules.write_through import write_through
from layerkv.scheduler.snapshot import Decision, Snapshot

Rule = Callable[[Outlook, Draft], None]

FLUID: tuple[Rule, ...] = (
    give_way,
    leave_zone,
    vacate,
    relieve_pool,
    keep_zone,
    resume_due,
    partial(serve_ranks, make_room=rotate),
    share_zone,
    fill_slots,
    write_through,
)
SLO: tuple[Rule, ...] = (
    leave_zone,
    vacate,
    relieve_pool,
    keep_zone,
    resume_all,
    partial(serve_ranks, make_room=exchange),
    share_zone,
    store_ahead,
)
"""In the order in which they speak; ``serve_ranks`` has ``grant_claims``, the rule that makes room, and
``start_prompts`` speak for each rank. A later rule finds the room that earlier ones have left."""


def decide(snapshot: Snapshot, limits: PolicyLimits | None = None) -> Decision:
    """Choose what to park, fetch and admit before one engine step."""
    is_fluid = snapshot.policy == "fluid"
    now = (FluidOutlook if is_fluid else Outlook)(snapshot, limits or PolicyLimits())
    draft = Draft(now)
    for rule in FLUID if is_fluid else SLO:
        rule(now, draft)
    return draft.decision()
