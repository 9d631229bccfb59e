"""The scheduler process's book of where every request's KV is, and the writer of the workers' step plans.

It knows block ids but touches no memory: vLLM owns the device's block tables, the workers own the bytes. Each
change here adds the copies it needs to the plan of the step being scheduled; :meth:`KVLedger.take_plan` hands
that plan out once per step. Host blocks and zone room are taken before anything else, so an operation either
happens as a whole or raises :class:`CapacityError` and changes nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from layerkv.core.host_tier import HostCopy
from layerkv.core.ledger_books import LedgerBooks, LedgerCounters
from layerkv.core.plan_draft import PlanDraft
from layerkv.core.residency import Residency
from layerkv.core.transfer import FetchPlan, StepPlan, merge_runs, num_blocks
from layerkv.errors import CapacityError

__all__ = ["KVLedger", "LedgerCounters"]


class KVLedger(LedgerBooks):
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
            table_blocks: Blocks of its whole prompt, prefix-cache hits included: all get a host block.
            zone_blocks: Those of them that come from the zone (the rest are hits in the pool).
            hashes: Of its blocks up to the one of its last token, which is computed: those of the zone's that host
                memory caches are shared, and no host block is taken for them.

        Raises:
            CapacityError: zone or host memory has no room; nothing changed.
        """
        self.zone.reserve(request_id, zone_blocks)
        try:
            self._copies[request_id] = self._prefixes.reserve(table_blocks, hashes, table_blocks - zone_blocks)
        except CapacityError:
            self.zone.end_reservation(request_id)
            raise
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

    def num_prefix_blocks(self, request_id: str, hashes: Sequence[Hashable], blocks: range) -> int:
        """Blocks of a waiting prompt that it can load instead of computing them, from the first of ``blocks`` on.

        Args:
            request_id: The request. Of one that has been admitted layered, :meth:`settle_prefix` knows.
            hashes: Of its blocks.
            blocks: From its hits in the device's prefix cache on, up to the block of its last token, which is computed.
        """
        if self.residency.get(request_id) is not Residency.WAITING or request_id in self._layered:
            return 0
        return self._prefixes.num_found(hashes, blocks)

    def num_held_prefix_blocks(self, hashes: Sequence[Hashable], blocks: range) -> int:
        """Of those blocks that a prompt can load, how many are no free host blocks: others share them."""
        return self._prefixes.num_held(hashes, blocks)

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

    def load_prefix(self, request_id: str, block_ids: Sequence[int], hashes: Sequence[Hashable], blocks: range) -> None:
        """A waiting request starts with part of its prompt loaded, before this step's forward pass reads it.

        Args:
            request_id: A WAITING request, RESIDENT or LAYERED from now on. A layered one loads it layer by layer.
            block_ids: Its new block table.
            hashes: Of its blocks.
            blocks: Which blocks of the table are loaded, all of them found before in this step.
        """
        if request_id in self._layered:
            self._copies[request_id].loads_prefix = True
        else:
            self._prefixes.load(self._draft, block_ids, hashes, blocks)
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

    def step_layered(
        self, request_id: str, block_ids: Sequence[int], *, num_computed: int, num_scheduled: int, num_unsure: int = 0
    ) -> None:
        """A layered request computes ``num_scheduled`` tokens after ``num_computed`` in this step.

        Plans the store of every zone block written and the load of every zone block that holds earlier tokens, or in
        its first step those of a cached prefix. The last earlier block may be both: it is loaded whole, written on, and
        stored whole. The last ``num_unsure`` computed tokens are drafts that may be wrong, and are computed anew then.

        Raises:
            CapacityError: host memory has no room for a block beyond the admitted prompt (streamed decode).
        """
        tokens = self.geometry.block_tokens
        copy = self._copies[request_id]
        last_block = (num_computed + num_scheduled - 1) // tokens
        if (missing := last_block + 1 - len(copy.blocks)) > 0:
            self.host.unpin()  # what the plan says of prefixes is done before its first layer is stored
            copy.blocks += self.host.take(missing)
        in_pool = self.geometry.num_leading_pool_blocks(block_ids)
        first_written = max((num_computed - num_unsure) // tokens, in_pool)
        loaded = slice(in_pool, -(-num_computed // tokens))
        written = slice(first_written, last_block + 1)
        loads = merge_runs(block_ids[loaded], copy.blocks[loaded])
        stores = merge_runs(block_ids[written], copy.blocks[written])
        if copy.loads_prefix:
            self._draft.zone_hits += loads
            copy.loads_prefix = False
        else:
            self._draft.loads += loads
        self._draft.stores += stores
        self.counters.loaded_blocks += num_blocks(loads)
        self.counters.stored_blocks += num_blocks(stores)

    def store_ahead(
        self, request_id: str, block_ids: Sequence[int], num_computed: int, most_blocks: int | None = None
    ) -> int:
        """Copy a resident request's whole blocks to host memory in the background, so that parking it is cheap.

        Whole blocks are never written again, so the copy stays good while the request goes on. The blocks stay with
        the request until it is parked (then only the rest is stored) or leaves.

        Args:
            request_id: A RESIDENT request.
            block_ids: Its block table.
            num_computed: Tokens whose KV its blocks hold.
            most_blocks: Blocks to copy at most; None is all.

        Returns:
            Leading blocks that host memory holds now, or will once the copy has ended.

        Raises:
            CapacityError: no room in host memory; nothing changed.
        """
        assert self.residency[request_id] is Residency.RESIDENT
        copy = self._copies.get(request_id)
        num_stored = 0 if copy is None else len(copy.blocks)
        num_whole = num_computed // self.geometry.block_tokens
        if most_blocks is not None:
            num_whole = min(num_whole, num_stored + most_blocks)
        if num_whole <= num_stored:
            return num_stored
        new = self.host.take(num_whole - num_stored)
        if copy is None:
            copy = self._copies[request_id] = HostCopy([], is_ahead=True)
        copy.blocks += new
        assert request_id not in self._draft.ahead, f"{request_id} is stored ahead twice in one step"
        self._draft.ahead[request_id] = merge_runs(block_ids[num_stored:num_whole], new)
        self.counters.stored_ahead_blocks += len(new)
        self.counters.stored_blocks += len(new)
        return num_whole

    def park(self, request_id: str, block_ids: Sequence[int], num_computed: int, *, keeps_room: bool = False) -> None:
        """The request gives up its device blocks; its KV of ``num_computed`` tokens goes to, or is in, host memory.

        A layered request's zone blocks are in host memory already, so only its hits on the device are stored, but for
        those that it shares with the prefix cache there. Of a resident one, what was not stored ahead is stored now,
        before this step's forward pass. With ``keeps_room`` a layered one keeps the host blocks of tokens to come: it
        comes back to the zone, and would wait for ever if others like it had taken them.

        Raises:
            CapacityError: no room in host memory for a resident request; nothing changed.
        """
        num_needed = -(-num_computed // self.geometry.block_tokens)
        layered = self.residency[request_id] is Residency.LAYERED
        if layered:
            copy = self._copies[request_id]
            in_pool = range(min(self.geometry.num_leading_pool_blocks(block_ids), num_needed))
            to_store = [place for place in in_pool if not self.host.num_sharers(copy.blocks[place])]
            if not keeps_room:
                self.host.give_back(copy.blocks[num_needed:])
                del copy.blocks[num_needed:]
            self._leave_zone(request_id)
        else:
            ahead = self._copies.get(request_id)
            num_stored = 0 if ahead is None else len(ahead.blocks)
            rest = self.host.take(num_needed - num_stored)
            copy = self._copies[request_id] = HostCopy([*(ahead.blocks if ahead else ()), *rest])
            to_store = list(range(num_stored, num_needed))
            if num_stored > 0:
                self._draft.parks_now(request_id)
        copy.num_tokens = num_computed
        self._draft.parks += merge_runs([block_ids[i] for i in to_store], [copy.blocks[i] for i in to_store])
        self.residency.move(request_id, Residency.PARKED)
        self.counters.parks += 1
        self.counters.stored_blocks += len(to_store)

    def fetch(self, request_id: str, block_ids: Sequence[int], num_local_tokens: int) -> None:
        """Load a parked request into its new pool blocks; the first ``num_local_tokens`` are there already.

        Args:
            request_id: A PARKED request.
            block_ids: Its new block table, covering all parked tokens.
            num_local_tokens: Prefix-cache hits on the device, a multiple of the block size.
        """
        copy = self._copies[request_id]
        covered = slice(num_local_tokens // self.geometry.block_tokens, len(copy.blocks))
        runs = merge_runs(block_ids[covered], copy.blocks[covered])
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
            num_whole = copy.num_tokens // self.geometry.block_tokens
            is_own = not any(map(self.host.num_sharers, copy.blocks))  # a copy that gives way frees all that it has
            if self.keeps_copies and copy.is_trusted and num_whole and is_own:
                self.host.give_back(copy.blocks[num_whole:])  # it is written on, and so stored anew
                kept = copy.blocks[:num_whole]
                num_shared = sum(self.host.num_sharers(block) > 0 for block in kept)
                self._copies[request_id] = HostCopy(kept, is_ahead=True, num_shared=num_shared)
            else:
                self._prefixes.keep_copy(copy, hashes)
            self.residency.move(request_id, Residency.RESIDENT)

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
        block_ids: Sequence[int] = (),
        num_computed: int = 0,
    ) -> None:
        """The request leaves for good, from any residency: finished, aborted or refused.

        Args:
            request_id: The request.
            hashes: Of its whole blocks, if they are to be kept as a cached prefix.
            block_ids: Its block table, while vLLM has not freed it.
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
                self._leave_stores_ahead(request_id, ahead, block_ids)
            num_stored = self._prefixes.keep_resident(self._draft, ahead, hashes[:num_whole], block_ids)
            self.counters.prefix_stored_blocks += num_stored
            self.counters.stored_blocks += num_stored
        else:
            self._release_host(request_id)
        self.residency.remove(request_id)

    def _leave_zone(self, request_id: str) -> None:
        self._layered.discard(request_id)
        self.zone.end_reservation(request_id)

    def _leave_stores_ahead(self, request_id: str, ahead: HostCopy, block_ids: Sequence[int]) -> None:
        """The stores ahead of a request that ends may still be under way."""
        if request_id in self._draft.ahead or len(block_ids) < len(ahead.blocks):
            self._draft.parks_now(request_id)
        else:
            self._under_way.add(merge_runs(block_ids[: len(ahead.blocks)], ahead.blocks))

    def _release_host(self, request_id: str) -> None:
        copy = self._copies.pop(request_id, None)
        if copy is not None:
            self.host.give_back(copy.blocks)
            self._draft.settle |= copy.is_ahead
            self._draft.ahead.pop(request_id, None)
