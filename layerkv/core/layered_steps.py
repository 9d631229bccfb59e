"""What the zone's requests copy in each step, in a ledger's books."""

from __future__ import annotations

from layerkv.core.groups import Tables
from layerkv.core.host_copy import HostCopy
from layerkv.core.ledger_books import LedgerBooks
from layerkv.core.transfer import merge_runs, num_blocks


class LayeredSteps(LedgerBooks):
    """See the module; part of :class:`layerkv.core.ledger.KVLedger`."""

    def step_layered(
        self, request_id: str, tables: Tables, *, num_computed: int, num_scheduled: int, num_unsure: int = 0
    ) -> None:
        """A layered request computes ``num_scheduled`` tokens after ``num_computed`` in this step.

        Plans the store of every zone block written that later steps read, and the load of every zone block that holds
        earlier tokens which this one reads, or in its first step those of a cached prefix. The last earlier block may
        be both: it is loaded whole, written on, and stored whole. What no later step reads gives its host block back.
        The last ``num_unsure`` computed tokens are drafts that may be wrong, and are computed anew then.

        Raises:
            CapacityError: host memory has no room for a block beyond the admitted prompt (streamed decode).
        """
        copy, num_after = self._copies[request_id], num_computed + num_scheduled
        self._take_missing(copy, num_after)
        self._draft.uses_lanes = True
        left_behind: list[int] = []
        for index, (group, table) in enumerate(zip(self.geometry.groups, tables, strict=True)):
            if group.is_state:  # it never leaves the pool
                continue
            in_pool = self.geometry.num_leading_pool_blocks(table)
            before, after = group.needed(num_computed), group.needed(num_after)
            loaded = range(max(in_pool, before.start), before.stop)
            loads = merge_runs(table[loaded.start : loaded.stop], copy.of(index, loaded))
            dropped = [] if group.keeps_all else copy.drop_before(index, after.start)
            self._give_host_blocks(copy, index, after, dropped)
            left_behind += dropped
            written = range(max((num_computed - num_unsure) // group.block_tokens, in_pool, after.start), after.stop)
            stores = merge_runs(table[written.start : written.stop], copy.of(index, written))
            if copy.loads_prefix:
                self._draft.zone_hits += loads
            else:
                self._draft.loads += loads
            self._draft.stores += stores
            self.counters.loaded_blocks += num_blocks(loads)
            self.counters.stored_blocks += num_blocks(stores)
        copy.loads_prefix = False
        copy.spare += left_behind  # not before: rows of other groups store before this group's last rows have loaded

    def _take_missing(self, copy: HostCopy, num_tokens: int) -> None:
        """Take the host blocks that a layered request lacks to go on after so many tokens.

        Raises:
            CapacityError: there are not so many; nothing changed.
        """
        missing = -len(copy.spare)
        for index, group in enumerate(self.geometry.groups):
            needed = group.needed(num_tokens)
            lacking = copy.missing(index, needed)
            if not (group.keeps_all or group.is_state):  # it writes on into what it leaves behind, and no other does
                lacking = max(lacking - copy.num_before(index, needed.start), 0)
            missing += lacking  # a state's too: its park is to find the block that was promised
        if missing > 0:
            self.host.unpin()  # what the plan says of prefixes is done before its first layer is stored
            copy.spare += self.host.take(missing)

    def _use_spare(self, copy: HostCopy, group: int, entries: range) -> None:
        """Give these entries of a group's table host blocks, as far as they have none."""
        self._give_host_blocks(copy, group, entries, [])

    def _give_host_blocks(self, copy: HostCopy, group: int, entries: range, own: list[int]) -> None:
        """The same, of the group's ``own`` first, which are taken out of that list."""
        if (missing := copy.missing(group, entries)) > 0:
            if not copy.tables[group]:
                copy.firsts[group] = max(copy.firsts[group], entries.start)
            copy.tables[group] += own[:missing]
            rest = max(missing - len(own), 0)
            del own[:missing]
            copy.tables[group] += copy.spare[:rest]
            del copy.spare[:rest]
