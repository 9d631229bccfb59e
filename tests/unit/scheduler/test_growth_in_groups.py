"""What running requests need of the pool where windows and chunks give blocks back while they go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from layerkv.core.groups import Group
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.engine import Running
from layerkv.scheduler.running import look
from layerkv.scheduler.snapshot import Load
from tests.fakes.tiny_controller import SHAPE, engine
from tests.fakes.tiny_scheduler import policy, profile

FULL = Group(16, num_layers=2)
WINDOW, CHUNK = Group(16, 2, window=40), Group(16, 2, chunk=48)


def load_of(running: Running, group: Group, *, soon_steps: int = 0, **changes: Any) -> Load:
    """What one look at a request finds that has blocks in a group that keeps all and in this one."""
    shape = replace(SHAPE, block_tokens=8, groups=(FULL, group), zone_block_tokens=16)
    books = Controller(policy(), shape, profile(), is_measured=True)
    return look(books, engine(running, **changes), 10.0, soon_steps)[0]


@pytest.mark.parametrize(
    ("group", "held", "comes_back"),
    [
        (WINDOW, 8 + 7, 4),  # token 64 still reads the second block of its window, token 128 the sixth
        (CHUNK, 8 + 5, 3),  # those of tokens 48 and 96
    ],
)
def test_what_a_chunk_in_flight_reads_comes_back_only_after_it(group: Group, held: int, comes_back: int) -> None:
    """Of 256 tokens 128 are computed, the last 64 of them in flight: blocks behind its first token are still read."""
    prompt = Running("p", 256, 128, 0, True, held, num_in_flight=64)
    growth = load_of(prompt, group, steps_ahead=1, budget_tokens=64).growth_blocks
    assert growth == 4 + 4, "in each group"
    ended = prompt._replace(num_in_flight=0)
    assert load_of(ended, group, budget_tokens=64).growth_blocks == growth - comes_back


def test_the_first_token_after_a_chunk_in_flight_finds_no_more_room_than_that_leaves() -> None:
    decode = Running("d", 129, 128, 0, False, 8 + 7, num_in_flight=64)
    assert load_of(decode, WINDOW, steps_ahead=1).growth_blocks == 2
    assert load_of(decode._replace(num_in_flight=1), WINDOW, steps_ahead=1).growth_blocks == 0


def test_what_is_needed_soon_is_counted_on_from_there() -> None:
    decode = Running("d", 127, 126, 0, False, 8 + 3)
    load = load_of(decode, WINDOW, soon_steps=4)
    assert (load.growth_blocks, load.soon_blocks) == (0, 2)
