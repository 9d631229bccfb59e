"""Conversations, or clients in a closed loop, in place of single requests: a case's key `sessions`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from layerkv.sim.workload import Lengths, TraceArrivals, WorkloadSpec
from layerkv.sim.workload_config import read_lengths

# One way of writing refusals for all of layerkv: these helpers are private to the package.
from layerkv.strict_yaml import above_zero, read_keys, wrong
from layerkv.units import parse_seconds

__all__ = ["Sessions", "read_sessions"]


@dataclass(frozen=True, slots=True)
class Sessions:
    """Conversations: each turn's prompt is everything said before and new tokens of the user's.

    Without `history` it is new tokens alone: a closed loop of as many clients as there are sessions.

    Attributes:
        turns: How many turns a session has.
        think_s: Seconds from the end of an answer to the next turn.
        shared_prefix_tokens: Tokens that all sessions begin with, as a system prompt does (all turns, without).
        history: Whether a turn says again all that was said before it.
    """

    turns: Lengths
    think_s: float
    shared_prefix_tokens: int
    history: bool = True


_Lengths: TypeAlias = Annotated[
    dict[Any, Any],
    Meta(description="{fixed: 4}, {uniform: [2, 6]} or {lognormal: ..}", examples=[{"uniform": [2, 6]}]),
]
_Duration: TypeAlias = Annotated[
    str | int | float, Meta(description="a duration above zero such as 500ms", examples=["500ms"])
]
_Prefix: TypeAlias = Annotated[int, Meta(ge=0, description="a whole number of tokens, 0 or more", examples=[256])]

_Switch: TypeAlias = Annotated[bool, Meta(description="true or false", examples=[False])]


class _SessionKeys(msgspec.Struct, frozen=True):
    turns: _Lengths
    think: _Duration = "1s"
    shared_prefix_tokens: _Prefix = 0
    history: _Switch = True


def read_sessions(raw: Any, workload: WorkloadSpec, *, max_model_len: int, where: str) -> Sessions:
    """Sessions such as ``{turns: {fixed: 4}, think: 2s}`` of requests such as those of `workload`.

    Raises:
        ConfigError: the mapping does not say what it should, or not together with the workload.
    """
    keys = read_keys(raw, _SessionKeys, where=where)
    turns = read_lengths(keys.turns, where=f"{where}.turns")
    if workload.max_tokens_factor != 1:
        raise wrong(where, "found sessions beside max_tokens_factor; expected one of them", "remove one of them")
    if isinstance(workload.arrivals, TraceArrivals):
        raise wrong(where, "found sessions beside a trace; expected one of them", "remove sessions, or the trace")
    a_turn = max(mix.prompt_tokens.most + mix.output_tokens.most for mix in workload.classes)  # type: ignore[union-attr]
    longest = keys.shared_prefix_tokens + (turns.most if keys.history else 1) * a_turn
    if longest > max_model_len:
        problem = f"found sessions of up to {longest} tokens; expected at most max_model_len, {max_model_len}"
        raise wrong(where, problem, "set fewer turns or shorter lengths, or a larger max_model_len")
    think_s = above_zero(parse_seconds, keys.think, where=f"{where}.think", example="500ms")
    return Sessions(turns, think_s, keys.shared_prefix_tokens, keys.history)
