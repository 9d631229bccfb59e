"""The scheduler process's book of where every request's KV is, and the writer of the workers' step plans.

It knows block ids but touches no memory: vLLM owns the device's block tables, the workers own the bytes. Each
change here adds the copies it needs to the plan of the step being scheduled; :meth:`KVLedger.take_plan` hands
that plan out once per step. Host blocks and zone room are taken before anything else, so an operation either
happens as a whole or raises :class:`CapacityError` and changes nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from layerkv.core.groups import Tables, whole_blocks
from layerkv.core.host_copy import HostCopy
from layerkv.core.layered_steps import LayeredSteps
from layerkv.core.ledger_books import LedgerCounters
from layerkv.core.plan_draft import PlanDraft
from layerkv.core.residency import Residency
from layerkv.core.transfer import BlockRun, FetchPlan, StepPlan, merge_runs, num_blocks
from layerkv.errors import CapacityError

__all__ = ["KVLedger", "LedgerCounters"]


class KVLedger(LayeredSteps):
    """Residency, host blocks and zone room of all requests. Not thread-safe; one per scheduler.

    Lifetime of a host block: taken when a request is admitted layered, is stored ahead or is parked, given back when
    its fetch has been reported complete (unless copies are kept), when it gives way, or when the request leaves. A host
    block may be reused while a store into it is still under way, because stores run in the order in which they were
    planned, and a step that gives away what a background store may still write waits for that
    (``StepPlan.settle``); it is never reused while a load reads it. One that caches a
    prefix may be shared by the layered requests that begin with it, which never write it.

    What leaves with whole blocks and their hashes is kept as a cached prefix (:class:`HostTier`): its blocks count as
    free, and a later prompt that begins with it loads it instead of computing it.
    """

    # Admission -----------------------------------------------------------------------------------------------

    def add(self, request_id: str) -> None:
        """A request arrives."""
        self.residency.add(request_id)

    def admit_layered(
        self, request_id: str, *, table_blocks: int, zone_blocks: int, hashes: Sequence[Hashable] = ()
    ) -> None:
        """Admit a waiting request whose new blocks come from the zone.

        Args:
            request_id: The request.
            table_blocks: Host blocks that it needs. With one group that keeps all blocks, those of its whole prompt,
                prefix-cache hits included.
            zone_blocks: Blocks of the zone, in each group. With one, the rest of the former are hits in the pool.
            hashes: Of its blocks up to the one of its last token, which is computed: those of the zone's that host
                memory caches are shared, and no host block is taken for them.

        Raises:
            CapacityError: zone or host memory has no room; nothing changed.
        """
        self.zone.reserve(request_id, zone_blocks)
        try:
            if self.geometry.is_plain:
                copy = self._prefixes.reserve(table_blocks, hashes, table_blocks - zone_blocks)
            else:
                copy = HostCopy.empty(len(self.geometry.groups))
                copy.spare = self.host.take(table_blocks)
        except CapacityError:
            self.zone.end_reservation(request_id)
            raise
        self._copies[request_id] = copy
        self._layered.add(request_id)
        self.counters.layered_admissions += 1

    def readmit_layered(self, request_id: str, zone_blocks: int) -> None:
        """Promise zone blocks to a parked request that is to decode there; its host blocks it still has.

        Raises:
            CapacityError: the zone has no room; nothing changed.
        """
        assert self.residency[request_id] is Residency.PARKED
        self.zone.reserve(request_id, zone_blocks)
        self._layered.add(request_id)

    def cancel_layered(self, request_id: str) -> None:
        """Take back an admission that vLLM did not act on: the request never ran, or stays parked."""
        self._leave_zone(request_id)
        if self.residency[request_id] is Residency.PARKED:
            return
        assert self.residency[request_id] is Residency.WAITING
        self._release_host(request_id)
        self.counters.layered_admissions -= 1

    def started(self, request_id: str) -> None:
        """vLLM has given the request blocks for computing (its first chunk, a recompute, or a turn in the zone)."""
        state = self.residency[request_id]
        if state is Residency.PARKED and request_id in self._layered:
            self._copies[request_id].loads_prefix = True
        elif state is not Residency.WAITING:
            return
        self.residency.move(request_id, Residency.LAYERED if request_id in self._layered else Residency.RESIDENT)

    # Prefixes in host memory ---------------------------------------------------------------------------------

    def settle_prefix(self, request_id: str, hashes: Sequence[Hashable], num_local_blocks: int) -> int:
        """The engine is about to start a request admitted layered, and has found its first blocks on the device.

        Args:
            request_id: The request.
            hashes: Of its blocks up to the one of its last token, which is computed.
            num_local_blocks: Blocks found on the device.

        Returns:
            Blocks after those that it loads from host memory. 0 too if host memory has no room for a block that it was
            to share and is to write now: then it :meth:`lacks_host_blocks`.
        """
        copy = self._copies[request_id]
        try:
            return self._prefixes.settle(copy, hashes, num_local_blocks)
        except CapacityError:
            copy.is_short = True
            return 0

    def lacks_host_blocks(self, request_id: str) -> bool:
        """Whether a request admitted layered cannot start, because what it counted on in host memory has changed."""
        copy = self._copies.get(request_id)
        return copy is not None and copy.is_short

    def load_prefix(self, request_id: str, tables: Tables, hashes: Sequence[Hashable], blocks: range) -> None:
        """A waiting request starts with part of its prompt loaded, before this step's forward pass reads it.

        Args:
            request_id: A WAITING request, RESIDENT or LAYERED from now on. A layered one loads it layer by layer.
            tables: Its new block table, the only one.
            hashes: Of its blocks.
            blocks: Which blocks of the table are loaded, all of them found before in this step.
        """
        if request_id in self._layered:
            self._copies[request_id].loads_prefix = True
        else:
            self._prefixes.load(self._draft, tables[0], hashes, blocks)
            self.counters.loaded_blocks += len(blocks)
        self.counters.prefix_hit_blocks += len(blocks)
        self.started(request_id)

    def forget_prefixes(self) -> None:
        """No prefix is of use any more (new weights, or a load that failed), nor what is being loaded now."""
        self.host.forget_all()
        for request_id, copy in self._copies.items():
            if self.residency[request_id] is Residency.FETCHING:
                copy.is_trusted = False

    def drop_ahead(self, request_id: str) -> None:
        """What was stored ahead of a resident request is of no use; it goes on."""
        assert self.residency[request_id] is Residency.RESIDENT
        self._release_host(request_id)

    # Each step -----------------------------------------------------------------------------------------------

    def store_ahead(self, request_id: str, tables: Tables, num_computed: int, most_blocks: int | None = None) -> int:
        """Copy a resident request's whole blocks to host memory in the background, so that parking it is cheap.

        Whole blocks, of groups that keep all, are never written again, so the copy stays good while the request goes
        on. The blocks stay with the request until it is parked (then only the rest is stored) or leaves.

        Args:
            request_id: A RESIDENT request.
            tables: Its block tables.
            num_computed: Tokens whose KV its blocks hold.
            most_blocks: Blocks to copy at most; None is all.

        Returns:
            Blocks that host memory holds now, or will once the copy has ended.

        Raises:
            CapacityError: no room in host memory; nothing changed.
        """
        assert self.residency[request_id] is Residency.RESIDENT
        copy = self._copies.get(request_id)
        num_stored = 0 if copy is None else copy.num_blocks
        num_whole = whole_blocks(self.geometry.groups, num_computed)
        if most_blocks is not None:
            num_whole = min(num_whole, num_stored + most_blocks)
        if num_whole <= num_stored:
            return num_stored
        new = self.host.take(num_whole - num_stored)
        if copy is None:
            copy = self._copies[request_id] = HostCopy.empty(len(self.geometry.groups))
            copy.is_ahead = True
        assert request_id not in self._draft.ahead, f"{request_id} is stored ahead twice in one step"
        self.counters.stored_ahead_blocks += len(new)
        self.counters.stored_blocks += len(new)
        runs: tuple[BlockRun, ...] = ()
        for group, table, stored in zip(self.geometry.groups, tables, copy.tables, strict=True):
            if group.keeps_all:
                first, own = len(stored), new[: num_computed // group.block_tokens - len(stored)]
                runs += merge_runs(table[first : first + len(own)], own)
                stored += own
                del new[: len(own)]
        self._draft.ahead[request_id] = runs
        return num_whole

    def park(self, request_id: str, tables: Tables, num_computed: int, *, keeps_room: bool = False) -> None:
        """The request gives up its device blocks; its KV of ``num_computed`` tokens goes to, or is in, host memory.

        A layered request's zone blocks are in host memory already, so only its hits on the device are stored, but for
        those that it shares with the prefix cache there, and its states. Of a resident one, what was not stored ahead
        is stored now, before this step's forward pass. With ``keeps_room`` a layered one keeps the host blocks of
        tokens to come: it comes back to the zone, and would wait for ever if others like it had taken them.

        Raises:
            CapacityError: no room in host memory for a resident request, or for a layered one's state; nothing changed.
        """
        groups = self.geometry.groups
        layered = self.residency[request_id] is Residency.LAYERED
        copy = self._copies.get(request_id)
        num_missing = sum(
            [
                len(needed) if copy is None else copy.missing(index, needed)
                for index, needed in enumerate([group.needed(num_computed) for group in groups])
            ]
        )
        num_spare = 0 if copy is None else len(copy.spare)
        rest = self.host.take(max(num_missing - num_spare, 0))
        if copy is None:
            copy = HostCopy.empty(len(groups))
        elif not layered:
            self._draft.parks_now(request_id)
        copy.spare += rest
        self._copies[request_id] = copy
        copy.num_tokens, copy.is_ahead, copy.num_shared, copy.is_trusted = num_computed, False, 0, True
        num_stored = 0
        for index, (group, table) in enumerate(zip(groups, tables, strict=True)):
            needed = group.needed(num_computed)
            if layered:  # states are in the pool, as hits are
                in_pool = range(needed.start, min(self.geometry.num_leading_pool_blocks(table), needed.stop))
                self._use_spare(copy, index, needed)
                to_store = [e for e in in_pool if not self.host.num_sharers(copy.of(index, range(e, e + 1))[0])]
                if not keeps_room:
                    end = needed.stop - copy.firsts[index]
                    self.host.give_back(copy.tables[index][end:])
                    del copy.tables[index][end:]
            else:
                to_store = list(needed[len(copy.tables[index]) :])
                self._use_spare(copy, index, needed)
            first, own = copy.firsts[index], copy.tables[index]
            self._draft.parks += merge_runs([table[e] for e in to_store], [own[e - first] for e in to_store])
            num_stored += len(to_store)
        if layered:
            self._leave_zone(request_id)
        if copy.spare and not keeps_room:
            self.host.give_back(copy.spare)
            copy.spare = []
        self.residency.move(request_id, Residency.PARKED)
        self.counters.parks += 1
        self.counters.stored_blocks += num_stored

    def fetch(self, request_id: str, tables: Tables, num_local_tokens: int) -> None:
        """Load a parked request into its new pool blocks; the first ``num_local_tokens`` are there already.

        Args:
            request_id: A PARKED request.
            tables: Its new block tables, covering all parked tokens.
            num_local_tokens: Prefix-cache hits on the device, a multiple of all groups' block sizes.
        """
        copy = self._copies[request_id]
        runs: tuple[BlockRun, ...] = ()
        for index, (group, table) in enumerate(zip(self.geometry.groups, tables, strict=True)):
            needed = group.needed(copy.num_tokens)
            covered = range(max(num_local_tokens // group.block_tokens, needed.start), needed.stop)
            runs += merge_runs(table[covered.start : covered.stop], copy.of(index, covered))
        self._draft.fetches.append(FetchPlan(request_id, runs))
        self.residency.move(request_id, Residency.FETCHING)
        self.counters.fetches += 1
        self.counters.loaded_blocks += num_blocks(runs)

    def resume_without_fetch(self, request_id: str) -> None:
        """A parked request runs again with all its KV found in the device's prefix cache."""
        self._release_host(request_id)
        self.residency.move(request_id, Residency.RESIDENT)

    def complete_fetch(self, request_id: str, hashes: Sequence[Hashable] = ()) -> None:
        """All workers have reported the load complete, or failed: its host blocks are no longer read.

        With :attr:`keeps_copies` the request keeps its whole blocks there, unless it shares some of them; else their
        ``hashes`` keep them as a cached prefix.
        """
        if (orphan := self._orphans.pop(request_id, None)) is not None:
            self.host.give_back(orphan.blocks)
            return
        if self.residency.get(request_id) is Residency.FETCHING:
            copy = self._copies.pop(request_id)
            is_own = not any(map(self.host.num_sharers, copy.blocks))  # a copy that gives way frees all that it has
            if self.keeps_copies and copy.is_trusted and whole_blocks(self.geometry.groups, copy.num_tokens) and is_own:
                self._keep_whole_blocks(copy)
                self._copies[request_id] = copy
            else:
                self._prefixes.keep_copy(copy, hashes)
            self.residency.move(request_id, Residency.RESIDENT)

    def _keep_whole_blocks(self, copy: HostCopy) -> None:
        """A parked request's copy becomes that of a resident one: what is written on, or given back, is stored anew."""
        for index, group in enumerate(self.geometry.groups):
            num_kept = copy.num_tokens // group.block_tokens if group.keeps_all else 0
            self.host.give_back(copy.tables[index][num_kept:])
            del copy.tables[index][num_kept:]
            copy.firsts[index] = 0
        copy.num_tokens, copy.is_ahead = 0, True
        copy.num_shared = sum([self.host.num_sharers(block) > 0 for block in copy.blocks])

    def gave_out(self, block_ids: Sequence[int]) -> None:
        """vLLM has given these blocks to a request, which writes them from this step on."""
        if self._under_way or self._draft.prefixes:
            self._draft.gave_out(block_ids, self._under_way)

    def pass_idle_step(self) -> None:
        """A step is scheduled while :attr:`is_idle`: it has no plan, so nobody uses what was pinned for one."""
        self.host.unpin()
        self._draft.settle = self._under_way.pass_idle_step()

    def take_plan(self, num_tokens: int) -> StepPlan:
        """The copies planned since the last call, for the step that computes ``num_tokens``."""
        draft, self._draft = self._draft, PlanDraft()
        self.host.unpin()  # who takes blocks from now on writes them by later plans
        return draft.plan(num_tokens, self._under_way)

    # Leaving -------------------------------------------------------------------------------------------------

    def drop(self, request_id: str) -> None:
        """The request's KV is given up and will be computed again (vLLM preempted it, or its copy is invalid).

        Never while it is FETCHING: the load under way reads its host blocks.
        """
        if self.residency[request_id] is Residency.WAITING:
            return
        assert self.residency[request_id] is not Residency.FETCHING, f"{request_id} is dropped while it is loaded"
        self._leave_zone(request_id)
        self._release_host(request_id)
        self.residency.move(request_id, Residency.WAITING)
        self.counters.recomputes += 1

    def finish(
        self,
        request_id: str,
        *,
        hashes: Sequence[Hashable] = (),
        tables: Tables = (),
        num_computed: int = 0,
    ) -> None:
        """The request leaves for good, from any residency: finished, aborted or refused.

        Args:
            request_id: The request.
            hashes: Of its whole blocks, if they are to be kept as a cached prefix.
            tables: Its block tables, while vLLM has not freed them.
            num_computed: Tokens whose KV its blocks hold.
        """
        state = self.residency.get(request_id)
        if state is None:
            return
        self._leave_zone(request_id)
        if state is Residency.FETCHING:
            self._orphans[request_id] = self._copies.pop(request_id)
        elif state is Residency.PARKED:
            self._prefixes.keep_copy(self._copies.pop(request_id), hashes)
        elif state is Residency.RESIDENT:
            num_whole = min(num_computed // self.geometry.block_tokens, len(hashes))
            if (ahead := self._copies.pop(request_id, None)) is not None:
                self._leave_stores_ahead(request_id, ahead, tables)
            block_ids = tables[0] if tables else ()
            num_stored = self._prefixes.keep_resident(self._draft, ahead, hashes[:num_whole], block_ids)
            self.counters.prefix_stored_blocks += num_stored
            self.counters.stored_blocks += num_stored
        else:
            self._release_host(request_id)
        self.residency.remove(request_id)

    def _leave_zone(self, request_id: str) -> None:
        self._layered.discard(request_id)
        self.zone.end_reservation(request_id)

    def _leave_stores_ahead(self, request_id: str, ahead: HostCopy, tables: Tables) -> None:
        """The stores ahead of a request that ends may still be under way."""
        has_tables = bool(tables) and all(
            len(own) <= len(table) for own, table in zip(ahead.tables, tables, strict=True)
        )
        if request_id in self._draft.ahead or not has_tables:
            self._draft.parks_now(request_id)
            return
        for table, own in zip(tables, ahead.tables, strict=True):
            self._under_way.add(merge_runs(table[: len(own)], own))

    def _release_host(self, request_id: str) -> None:
        copy = self._copies.pop(request_id, None)
        if copy is not None:
            self.host.give_back(copy.blocks)
            self._draft.settle |= copy.is_ahead
            self._draft.ahead.pop(request_id, None)
