"""The blocks of the KV cache: their owners, and the full blocks that equal prefixes share."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


def chain_digest(previous: bytes, token_ids: Sequence[int], content: bytes = b"") -> bytes:
    """SHA-256 of the previous block's digest, a full block's token ids, and `content`: all other
    data that its keys and values depend on. Equal digests mean equal prefixes."""
    return hashlib.sha256(previous + array("q", token_ids).tobytes() + content).digest()


def chained_digests(
    token_ids: Sequence[int],
    block_size: int,
    known: Sequence[bytes] = (),
    *,
    root: bytes = b"",
    content: Callable[[int, int], bytes] = lambda start, end: b"",
) -> list[bytes]:
    """Chained digests of all full blocks of `token_ids`; `known` are the first of them.

    `root` begins the chain. The digest of the block at positions start … end − 1 includes
    `content(start, end)`.
    """
    digests = list(known)
    for start in range(len(digests) * block_size, len(token_ids) - block_size + 1, block_size):
        previous = digests[-1] if digests else root
        end = start + block_size
        digests.append(chain_digest(previous, token_ids[start:end], content(start, end)))
    return digests


class BlockPool:
    """Reference-counted blocks 1 … n − 1. Block 0 belongs to padding and is never allocated.

    A block without references keeps its content and digest until it is allocated again; the block
    that is unused for longest is allocated first. Until then a request with the same prefix can
    share it.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        if num_blocks < 2:
            raise ValueError(
                f"the cache holds {num_blocks} block(s) of {block_size} tokens: "
                "it needs at least 2, one of them for padding"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._num_refs: list[int]
        self._free: OrderedDict[int, None]
        self._by_digest: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self.reset()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def digests(
        self,
        token_ids: Sequence[int],
        known: Sequence[bytes] = (),
        *,
        root: bytes = b"",
        content: Callable[[int, int], bytes] = lambda start, end: b"",
    ) -> list[bytes]:
        """`chained_digests` for blocks of this pool."""
        return chained_digests(token_ids, self.block_size, known, root=root, content=content)

    def cached_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of a chain's longest cached prefix. `share` them before use."""
        blocks: list[int] = []
        for digest in digests if self.enable_prefix_caching else ():
            block = self._by_digest.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_without(self, blocks: Sequence[int]) -> int:
        """The number of blocks that `allocate` can give after `share(blocks)`."""
        return len(self._free) - sum(block in self._free for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add one reference to each of these cached blocks."""
        for block in blocks:
            self._num_refs[block] += 1
            self._free.pop(block, None)

    def allocate(self, num: int) -> list[int]:
        """`num` blocks with one reference each and undefined content; needs num <= `num_free`."""
        assert num <= len(self._free), (num, len(self._free))
        blocks = [self._free.popitem(last=False)[0] for _ in range(num)]
        for block in blocks:
            self._num_refs[block] = 1
            digest = self._digest_of.pop(block, None)
            if digest is not None:
                del self._by_digest[digest]
        return blocks

    def cache_block(self, block: int, digest: bytes) -> None:
        """Add a full block to the prefix cache. Of two equal blocks the first is used."""
        if (
            self.enable_prefix_caching
            and digest not in self._by_digest
            and block not in self._digest_of
        ):
            self._by_digest[digest] = block
            self._digest_of[block] = digest

    def reset(self) -> None:
        """Free all blocks and drop their content. Owners must drop their blocks."""
        self._num_refs = [0] * self.num_blocks
        self._free = OrderedDict((block, None) for block in range(1, self.num_blocks))
        self._by_digest.clear()
        self._digest_of.clear()

    def evict(self, blocks: Iterable[int] | None = None) -> None:
        """Remove these blocks, or all, from the prefix cache.

        Blocks stay with their owners.
        """
        for block in list(self._digest_of) if blocks is None else blocks:
            digest = self._digest_of.pop(block, None)
            if digest is not None:
                del self._by_digest[digest]

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block. The last blocks of a chain are reused first: more
        requests share its beginning."""
        for block in reversed(blocks):
            assert self._num_refs[block] > 0, block
            self._num_refs[block] -= 1
            if self._num_refs[block] == 0:
                self._free[block] = None
                if block not in self._digest_of:
                    self._free.move_to_end(block, last=False)
