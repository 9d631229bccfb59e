"""How answers end in a case whose requests do not say how long they get: its key `ends`.

Invariant: what a request's client does depends on the case and the seed alone; when its text contains a stop string
depends on the model, and is the same for every engine as long as greedy tokens are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from layerkv.sim.workload import WorkloadSpec
from layerkv.sim.workload_config import check_distinct

# One way of writing refusals for all of layerkv: these helpers are private to the package.
from layerkv.strict_yaml import read_keys, wrong

__all__ = ["Ends", "read_ends"]

MOST_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True)
class Ends:
    """Every request leaves `max_tokens` out.

    Attributes:
        stop: Strings that every request names: its answer ends at the first of them in its text.
        hang_up_share: Share of the clients, from 0 to 1, that leave in the middle, after the `output_tokens` of their
            class, unless the answer has ended by then.
    """

    stop: tuple[str, ...]
    hang_up_share: float


_StopString: TypeAlias = Annotated[str, Meta(min_length=1)]
_Stop: TypeAlias = Annotated[
    Annotated[list[_StopString], Meta(min_length=1, max_length=MOST_STOP_STRINGS)],
    Meta(description=f"a list of 1 to {MOST_STOP_STRINGS} strings, none of them empty", examples=[["\n\n"]]),
]
_Share: TypeAlias = Annotated[float, Meta(ge=0, le=1, description="a share from 0 to 1 of the clients", examples=[0.2])]


class _EndsKeys(msgspec.Struct, frozen=True):
    stop: _Stop
    hang_up: _Share = 0.0


def read_ends(raw: Any, workload: WorkloadSpec, *, where: str) -> Ends:
    """Ends such as ``{stop: ["END"], hang_up: 0.2}`` of requests such as those of `workload`.

    Raises:
        ConfigError: the mapping does not say what it should, or not together with the workload.
    """
    keys = read_keys(raw, _EndsKeys, where=where)
    check_distinct(keys.stop, where=f"{where}.stop")
    if workload.max_tokens_factor != 1:
        problem = "found ends beside max_tokens_factor; expected one of them, for with ends max_tokens is left out"
        raise wrong(where, problem, "remove one of them")
    return Ends(tuple(keys.stop), keys.hang_up)
