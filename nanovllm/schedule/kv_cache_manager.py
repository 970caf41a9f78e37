"""Which blocks requests have: allocation, freed windows and shared prefixes.

A request has one block table for each group of layers (`CacheGroups`). Entries of blocks that the
group's window has left are PAD_BLOCK here. On the device they stay as they were: no query sees
their positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nanovllm.schedule.blocks import BlockPool
from nanovllm.schedule.cache_groups import CacheGroups
from nanovllm.schedule.plan import PAD_BLOCK, NewBlock
from nanovllm.schedule.request import Request
from nanovllm.schedule.snapshots import SnapshotPool

# A prompt's step ends early for a snapshot only if it feeds so many blocks.
MIN_SNAPSHOT_BLOCKS = 4


class KVCacheManager:
    """The blocks of all requests, from one pool."""

    def __init__(
        self,
        pool: BlockPool,
        groups: CacheGroups | None = None,
        snapshots: SnapshotPool | None = None,
    ) -> None:
        """Without `groups` all layers see all positions. Models with recurrent layers have
        `snapshots`: only a prefix with one can be shared."""
        self.pool, self.block_size = pool, pool.block_size
        self.groups = groups or CacheGroups((0,), pool.block_size, 1)
        self.snapshots = snapshots
        self.num_groups = len(self.groups.windows)
        self._windows = [(idx, size) for idx, size in enumerate(self.groups.windows) if size]
        self._unbounded = [idx for idx, size in enumerate(self.groups.windows) if not size]

    # requests ------------------------------------------------------------------------------------

    def admit(self, request: Request, num_tokens: int, num_others: int) -> bool:
        """Give a request cached blocks of its known tokens, and new ones for the others of
        `num_tokens`: with windows, for those of its first step.

        False, and nothing changes, if this would leave less than one block of each group for each
        of the `num_others` running requests: the new request would soon be preempted.
        """
        all_token_ids = request.all_token_ids
        digests = self._digests(request, all_token_ids)
        # the last token always runs, even if its block is cached: the step needs its logits
        usable = (
            []
            if request.needs_prompt_logits or request.no_sharing
            else digests[: (len(all_token_ids) - 1) // self.block_size]
        )
        tables = self.cached_prefix(usable)
        num_cached, whole = len(tables[0]), self.groups.num_blocks(num_tokens)
        held = whole
        if self._windows:
            first_seen = num_cached - self.groups.num_blocks(max(self.groups.windows) - 1)
            held = min(whole, max(0, first_seen) + self.groups.held_blocks)
        ends = [held if window else whole for window in self.groups.windows]
        shared = [block for table in tables for block in table if block != PAD_BLOCK]
        num_new = sum(ends) - num_cached * self.num_groups
        num_reserved = num_others * self.num_groups
        if num_others and num_new + num_reserved > self.pool.num_free_without(shared):
            return False
        self.pool.share(shared)
        for table, end in zip(tables, ends):
            table += self.pool.allocate(end - num_cached)
        if self.snapshots is not None and num_cached:
            request.snapshot = self.snapshots.pin(digests[num_cached - 1])
        request.blocks = tables
        request.block_digests = digests[:num_cached]
        request.num_computed = request.num_shared = num_cached * self.block_size
        return True

    def extend(self, request: Request, num_tokens: int, num_others: int, least: int = 1) -> int:
        """Give a request blocks for the next tokens of its prompt, and free those behind its
        windows. Returns for how many tokens there are blocks; fewer than `least` cannot run.

        It leaves a block of each group for each of `num_others` requests, unless `least` tokens
        have blocks only without that.
        """
        if not self._windows:
            return num_tokens
        self.trim(request, request.num_computed)
        end = request.num_computed + num_tokens
        num_before = len(request.blocks[self._windows[0][0]])
        num_wanted = self.groups.num_blocks(end)
        if end == request.num_known and self._unbounded:
            num_wanted = len(request.blocks[self._unbounded[0]])  # with what the device drafts
        num_more = num_wanted - num_before
        if num_more > 0:
            num_free, num_tables = self.pool.num_free, len(self._windows)
            must_have = num_more  # of the last tokens: with what the device drafts
            if least < num_tokens:
                must_have = self.groups.num_blocks(request.num_computed + least) - num_before
            spare = (num_free - num_others * self.num_groups) // num_tables
            if spare < must_have <= num_free // num_tables:
                spare = must_have
            num_more = min(num_more, max(0, spare))
            for group, _ in self._windows:
                for block in self.pool.allocate(num_more):
                    new = request.row, group, len(request.blocks[group]), block
                    request.new_blocks.append(new)
                    request.blocks[group].append(block)
        num_blocks = len(request.blocks[self._windows[0][0]])
        if num_blocks < num_wanted:  # all tables of a decoding request have one length
            end = min(end - 1, num_blocks * self.block_size)
        return end - request.num_computed

    def begin_step(self) -> None:
        """Let the requests of the next step find the snapshots that earlier steps make."""
        if self.snapshots is not None:
            self.snapshots.commit()

    def cut(self, request: Request, num_tokens: int) -> int:
        """How many of the next `num_tokens` tokens of a prompt to feed at once, so that the step
        ends where a snapshot is of use: at a block's end, the last one that others can share."""
        if self.snapshots is None or not self.snapshots.num_slots or request.no_sharing:
            return num_tokens
        start, end = request.num_computed, request.num_computed + num_tokens
        last = (request.num_known - 1) // self.block_size * self.block_size
        best = min(end // self.block_size * self.block_size, last)
        return num_tokens if best - start < MIN_SNAPSHOT_BLOCKS * self.block_size else best - start

    def take_snapshot(self, request: Request) -> int | None:
        """A slot for the state after the tokens computed so far; None for no snapshot. The blocks
        of these tokens are published."""
        num_blocks, offset = divmod(request.num_computed, self.block_size)
        if self.snapshots is None or offset or request.no_sharing:
            return None
        if not self.pool.enable_prefix_caching or len(request.block_digests) < num_blocks:
            return None
        return self.snapshots.take(request.block_digests[num_blocks - 1])

    def restored(self, request: Request) -> int | None:
        """The slot whose state the first step of a request begins with, which the next steps may
        overwrite; None for none."""
        slot, request.snapshot = request.snapshot, None
        if slot is not None and self.snapshots is not None:
            self.snapshots.unpin(slot)
        return slot

    def needs_blocks(self, request: Request) -> bool:
        """Whether a decoding request needs blocks for its next token: one of each group."""
        return request.num_computed == len(request.blocks[0]) * self.block_size

    def has_room(self, num_requests: int = 1) -> bool:
        """Whether there is a block of each group for so many requests."""
        return num_requests * self.num_groups <= self.pool.num_free

    def add_blocks(self, request: Request) -> list[NewBlock]:
        """Give a decoding request one more block of each group."""
        blocks = self.pool.allocate(self.num_groups)
        for table, block in zip(request.blocks, blocks):
            table.append(block)
        index = len(request.blocks[0]) - 1
        return [(request.row, group, index, block) for group, block in enumerate(blocks)]

    def add_ahead(self, request: Request, num_tokens: int) -> list[NewBlock]:
        """Give a decoding request blocks for `num_tokens` tokens, as far as there are some."""
        new: list[NewBlock] = []
        while len(request.blocks[0]) * self.block_size < num_tokens and self.has_room():
            new += self.add_blocks(request)
        return new

    def trim(self, request: Request, pos: int) -> None:
        """Free the blocks that no query from position `pos` on sees. Steps in flight may still
        read them, but they run before any step that reuses the blocks."""
        for group, window in self._windows:
            table = request.blocks[group]
            end = max(0, pos - window + 1) // self.block_size
            begin = end
            while begin and table[begin - 1] != PAD_BLOCK:
                begin -= 1
            self.pool.release(table[begin:end])
            table[begin:end] = [PAD_BLOCK] * (end - begin)

    def release(self, request: Request) -> None:
        """Take all blocks of a request."""
        for table in request.blocks:
            self.pool.release([block for block in table if block != PAD_BLOCK])
        self.restored(request)
        request.blocks, request.block_digests = [], []

    def reset(self) -> None:
        """Free all blocks and forget their content. Owners must drop their blocks."""
        self.pool.reset()
        if self.snapshots is not None:
            self.snapshots.reset()

    # shared prefixes -----------------------------------------------------------------------------

    def cached_prefix(self, digests: Sequence[bytes]) -> list[list[int]]:
        """The longest cached prefix of a chain, as block tables of equal lengths.

        Groups without a window need all its blocks, the others those of the last window − 1 tokens.
        With recurrent layers there must be a snapshot of its end. Share the blocks before use.
        """
        num = len(digests)
        found: list[list[int]] = [[] for _ in self.groups.windows]
        for group in self._unbounded:
            found[group] = self.pool.cached_prefix(self._of_group(digests[:num], group))
            num = len(found[group])
        num = self._shared_end(digests, num)
        for group in self._unbounded:
            del found[group][num:]
        for group, window in self._windows:
            begin = max(0, num - self.groups.num_blocks(window - 1))
            seen = self.pool.cached_prefix(self._of_group(digests[begin:num], group))
            found[group] = [PAD_BLOCK] * begin + seen
        return found

    def _shared_end(self, digests: Sequence[bytes], num: int) -> int:
        """How many of the first `num` blocks a request can begin after, at most."""
        while True:
            found = self._end_in_windows(digests, num)
            if self.snapshots is not None:
                found = self.snapshots.longest(digests, found)
            if found == num or not self._windows:
                return found
            num = found

    def _end_in_windows(self, digests: Sequence[bytes], num: int) -> int:
        """The length of the longest prefix of up to `num` blocks whose end is in all windows'
        caches."""
        is_whole = False
        while num and not is_whole:
            is_whole = True
            for group, window in self._windows:
                begin = max(0, num - self.groups.num_blocks(window - 1))
                for idx in range(num - 1, begin - 1, -1):
                    if not self.pool.cached_prefix(self._of_group(digests[idx : idx + 1], group)):
                        num, is_whole = idx, False
                        break
        return num

    def cache_blocks(self, request: Request, num_full: int) -> None:
        """Let later requests find the first `num_full` blocks of a request, which are full of known
        tokens."""
        num_published = len(request.block_digests)
        if num_full <= num_published:
            return
        all_token_ids = request.all_token_ids[: num_full * self.block_size]
        request.block_digests = self._digests(request, all_token_ids)
        for group, table in enumerate(request.blocks):
            digests = self._of_group(request.block_digests[num_published:], group)
            for block, digest in zip(table[num_published:num_full], digests):
                if block != PAD_BLOCK:
                    self.pool.cache_block(block, digest)

    def evict(self, requests: Iterable[Request] | None = None) -> None:
        """Let no request find the content of these requests' blocks, or of any, any more."""
        if requests is None:
            self.pool.evict()
            if self.snapshots is not None:
                self.snapshots.evict()
            return
        for request in requests:
            for table in request.blocks:
                self.pool.evict(table)
            if self.snapshots is not None:
                self.snapshots.evict(request.block_digests)

    @staticmethod
    def _of_group(digests: Sequence[bytes], group: int) -> Sequence[bytes]:
        """The names of a group's blocks: block 7 of one group holds other layers' keys than block 7
        of another."""
        return [digest + bytes((group,)) for digest in digests] if group else digests

    def _digests(self, request: Request, token_ids: Sequence[int]) -> list[bytes]:
        return self.pool.digests(
            token_ids, request.block_digests, root=request.cache_root, content=request.content
        )
