"""How many pool blocks the running requests will come to hold, from what they hold and how long they will go on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate, count


class Forecast:
    """The pool's future if nobody else came in: each request grows by a token per step until its predicted end.

    Requests sorted by tokens left, most first; when the ``k``-th ends, those before it are still there, each grown by
    as many tokens. The pool's use peaks at one of these ends, so a newcomer fits if all of them stay within the pool
    with it. Building costs O(n log n); :meth:`fits` O(log n), but O(n) the first time and after a newcomer; the others
    O(n).
    """

    def __init__(self, pool_blocks: int, block_tokens: int, requests: Iterable[tuple[int, int]]) -> None:
        """Build it.

        Args:
            pool_blocks: Blocks that these requests and newcomers can hold together.
            block_tokens: Tokens of a block.
            requests: Of each its tokens left to make, and blocks held (or promised).
        """
        self._pool_blocks = pool_blocks
        self._block_tokens = block_tokens
        self._requests = sorted(requests, reverse=True)
        self._is_stale = True  # the index is built when a question needs it

    def fits(self, num_blocks: int, tokens_left: int) -> bool:
        """Whether a newcomer with ``num_blocks`` blocks and ``tokens_left`` to make would never be in want of any."""
        if self._is_stale:
            self._index()
        at = bisect_left(self._negated, -tokens_left)  # requests before `at` go on longer than the newcomer
        own_end = self._held[at] + num_blocks + (at + 1) * tokens_left / self._block_tokens
        return own_end <= self._pool_blocks and self._peak_from[at] + num_blocks <= self._pool_blocks

    def add(self, num_blocks: int, tokens_left: int) -> None:
        """Let a newcomer in."""
        at = bisect_left(self._requests, -tokens_left, key=lambda request: -request[0])
        self._requests.insert(at, (tokens_left, num_blocks))
        self._is_stale = True

    def shortage(self, num_steps: int, free_blocks: int) -> int:
        """Blocks that will be missing at worst within the next ``num_steps`` steps; 0 if none."""
        worst = 0
        freed = grown = 0.0
        num_left, last_end = len(self._requests), 0
        for tokens_left, num_blocks in reversed(self._requests):  # in order of their ends
            steps = min(tokens_left, num_steps)
            grown += num_left * (steps - last_end) / self._block_tokens
            worst = max(worst, int(grown - freed - free_blocks))
            if tokens_left >= num_steps:
                break
            last_end = tokens_left
            num_left -= 1
            freed += num_blocks + tokens_left / self._block_tokens
        return worst

    def steps_until_free(self, num_blocks: int, free_blocks: int) -> int | None:
        """Steps until so many blocks are free through ends alone; None if they never are."""
        freed = float(free_blocks)
        num_left, last_end = len(self._requests), 0
        for tokens_left, held in reversed(self._requests):
            freed -= num_left * (tokens_left - last_end) / self._block_tokens
            freed += held + tokens_left / self._block_tokens
            if freed >= num_blocks:
                return tokens_left
            num_left, last_end = num_left - 1, tokens_left
        return None

    def _index(self) -> None:
        tokens = self._block_tokens
        self._negated = [-left for left, _ in self._requests]
        self._held = [0, *accumulate(blocks for _, blocks in self._requests)]
        # what a newcomer that outlives each finds taken at its end, with as many tokens of its own by then
        use = [
            held + places * left / tokens
            for held, places, (left, _) in zip(self._held[1:], count(2), self._requests, strict=False)
        ]
        self._peak_from = [*accumulate(reversed(use), max)][::-1]
        self._peak_from.append(0.0)
        self._is_stale = False
