"""What a listener has not been told yet of the prefixes that host memory caches.

Whoever is told everything, and plays back first what is gone and then what is new, knows exactly what is cached. Plain
data, a constant time per block, and never more entries than twice the blocks there are, however long nobody asks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable


class PrefixNews:
    """Hashes that are cached since the listener was last told, and hashes that it knows and that are gone."""

    def __init__(self) -> None:
        self._new: dict[Hashable, None] = {}
        self._gone: dict[Hashable, None] = {}

    def kept(self, block_hash: Hashable) -> None:
        """A block is cached under this hash from now on."""
        self._new[block_hash] = None  # if it is among those gone as well, the listener hears both

    def forgotten(self, block_hash: Hashable) -> None:
        """Nothing is cached under this hash any more."""
        if block_hash in self._new:
            del self._new[block_hash]
        else:
            self._gone[block_hash] = None

    def tell_again(self, cached: Iterable[Hashable]) -> None:
        """The listener may have dropped everything: it is told all that is cached, as gone and as new."""
        for block_hash in cached:
            if block_hash not in self._new:
                self._gone[block_hash] = None
                self._new[block_hash] = None

    def take(self) -> tuple[list[Hashable], list[Hashable]]:
        """What is gone and what is new since the last call; the first is to be played back first."""
        gone, new = list(self._gone), list(self._new)
        self._gone, self._new = {}, {}
        return gone, new
