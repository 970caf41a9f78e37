"""Requests share blocks, the last owner frees a block, and the oldest free block goes first."""

from __future__ import annotations

import random

import pytest

from nanovllm.runner.state import PAD_BLOCK
from nanovllm.schedule.blocks import BlockPool, chain_digest


def fill(pool: BlockPool, token_ids: list[int]) -> list[int]:
    """Allocate and publish the full blocks of a sequence, as a request does."""
    digests = pool.digests(token_ids)
    shared = pool.cached_prefix(digests)
    pool.share(shared)
    blocks = shared + pool.allocate(pool.num_blocks_for(len(token_ids)) - len(shared))
    for block, digest in zip(blocks, digests):
        pool.cache_block(block, digest)
    return blocks


def test_padding_block_is_never_handed_out() -> None:
    pool = BlockPool(5, 16)
    blocks = pool.allocate(4)
    assert sorted(blocks) == [1, 2, 3, 4] and PAD_BLOCK not in blocks
    assert pool.num_free == 0
    with pytest.raises(AssertionError):
        pool.allocate(1)


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_a_pool_without_a_usable_block_is_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"holds {num_blocks} block.*at least 2"):
        BlockPool(num_blocks, 16)


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (989, 62)]
)
def test_num_blocks_for(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(2, 16).num_blocks_for(num_tokens) == num_blocks


def test_digests_cover_full_blocks_only_and_continue() -> None:
    pool = BlockPool(2, 4)
    token_ids = list(range(11))
    digests = pool.digests(token_ids)
    assert (
        len(digests) == 2 == len(pool.digests(token_ids[:8]))
        and len(pool.digests(token_ids[:7])) == 1
    )
    assert pool.digests(token_ids, digests[:1]) == digests
    assert digests[1] == chain_digest(chain_digest(b"", [0, 1, 2, 3]), [4, 5, 6, 7])


def test_equal_blocks_after_different_prefixes_are_not_confused() -> None:
    pool = BlockPool(20, 4)
    first, second, same = [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]
    blocks = fill(pool, first + same)
    assert pool.cached_prefix(pool.digests(first + same)) == blocks
    assert pool.cached_prefix(pool.digests(second + same)) == []
    assert pool.cached_prefix(pool.digests(same)) == []
    assert pool.cached_prefix(pool.digests(same + same)) == []
    assert pool.cached_prefix(pool.digests(first + second)) == blocks[:1]


def test_token_ids_are_hashed_at_full_width() -> None:
    pool = BlockPool(8, 2)
    fill(pool, [1, 256])
    assert pool.cached_prefix(pool.digests([256, 1])) == []
    assert pool.cached_prefix(pool.digests([1 + 2**32, 256])) == []


def test_blocks_are_shared_until_the_last_owner_lets_go() -> None:
    pool = BlockPool(4, 4)
    token_ids = [1, 2, 3, 4]
    mine, yours = fill(pool, token_ids), fill(pool, token_ids)
    assert mine == yours and pool.num_free == 2
    pool.release(mine)
    assert pool.num_free == 2
    pool.release(yours)
    assert pool.num_free == 3
    with pytest.raises(AssertionError):
        pool.release(yours)


def test_free_blocks_keep_their_content_until_they_are_reused() -> None:
    pool = BlockPool(4, 4)
    blocks = fill(pool, [1, 2, 3, 4])
    digests = pool.digests([1, 2, 3, 4])
    pool.release(blocks)
    assert pool.cached_prefix(digests) == blocks
    assert pool.num_free == 3 and pool.num_free_without(blocks) == 2
    pool.share(blocks)
    assert pool.num_free == 2
    pool.release(blocks)
    pool.allocate(3)
    assert pool.cached_prefix(digests) == []


def test_blocks_without_content_are_reused_first_then_the_longest_unused() -> None:
    pool = BlockPool(6, 2)
    old, new = fill(pool, [1, 1]), fill(pool, [2, 2])
    plain = pool.allocate(1)
    pool.release(old)
    pool.release(new)
    pool.release(plain)
    assert pool.allocate(1) == plain
    pool.allocate(2)  # blocks that were never used
    assert pool.allocate(1) == old
    assert pool.allocate(1) == new


def test_the_end_of_a_chain_is_reused_before_its_beginning() -> None:
    pool = BlockPool(4, 2)
    chain = fill(pool, [1, 1, 2, 2, 3, 3])
    pool.release(chain)
    assert [pool.allocate(1)[0] for _ in range(3)] == chain[::-1]


def test_being_found_again_makes_a_block_young() -> None:
    pool = BlockPool(3, 2)
    first, second = fill(pool, [1, 1]), fill(pool, [2, 2])
    pool.release(first)
    pool.release(second)
    pool.release(fill(pool, [1, 1]))
    assert pool.allocate(1) == second


def test_of_two_blocks_with_the_same_content_the_first_is_found() -> None:
    pool = BlockPool(4, 2)
    (digest,) = pool.digests([7, 7])
    first, second = pool.allocate(1), pool.allocate(1)
    pool.cache_block(first[0], digest)
    pool.cache_block(second[0], digest)
    assert pool.cached_prefix([digest]) == first
    pool.release(second)
    pool.release(first)
    assert pool.allocate(1) == second, "a block without a digest is reused first"
    assert pool.cached_prefix([digest]) == first


def test_nothing_is_found_without_prefix_caching() -> None:
    pool = BlockPool(4, 2, enable_prefix_caching=False)
    fill(pool, [1, 1])
    assert pool.cached_prefix(pool.digests([1, 1])) == []


def test_reset_frees_and_forgets_everything() -> None:
    pool = BlockPool(4, 2)
    fill(pool, [1, 1, 2, 2])
    pool.reset()
    assert pool.num_free == 3 and pool.cached_prefix(pool.digests([1, 1])) == []


@pytest.mark.parametrize("seed", range(8))
def test_pages_never_overlap(seed: int) -> None:
    """Random requests with few distinct tokens share many prefixes. `content` models the device."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    pool = BlockPool(rng.choice([2, 7, 24]), block_size, enable_prefix_caching=rng.random() < 0.8)
    content: dict[int, tuple[int, ...]] = {}  # block → all tokens up to its end, once it is full
    owners: dict[int, tuple[list[int], list[int]]] = {}  # request → (tokens, blocks)
    for step in range(600):
        action = rng.random()
        if action < 0.45:  # a new request
            token_ids = [rng.randrange(2) for _ in range(rng.randrange(1, 6 * block_size))]
            digests = pool.digests(token_ids)
            shared = pool.cached_prefix(digests[: (len(token_ids) - 1) // block_size])
            for idx, block in enumerate(shared):
                assert content[block] == tuple(token_ids[: (idx + 1) * block_size])
            num_new = pool.num_blocks_for(len(token_ids)) - len(shared)
            if num_new > pool.num_free_without(shared):
                continue
            pool.share(shared)
            new = pool.allocate(num_new)
            held = {block for _, blocks in owners.values() for block in blocks} | set(shared)
            assert len(set(new)) == len(new) and not held & set(new), "handed out twice"
            blocks = shared + new
            for block in new:
                content.pop(block, None)
            for idx, digest in enumerate(digests):
                content[blocks[idx]] = tuple(token_ids[: (idx + 1) * block_size])
                pool.cache_block(blocks[idx], digest)
            owners[step] = (token_ids, blocks)
        elif action < 0.75 and owners:  # a request grows by a token
            token_ids, blocks = owners[rng.choice(list(owners))]
            if len(token_ids) == len(blocks) * block_size:
                if not pool.num_free:
                    continue
                (block,) = pool.allocate(1)
                assert all(block not in other for _, other in owners.values())
                content.pop(block, None)
                blocks.append(block)
            token_ids.append(rng.randrange(2))
            if len(token_ids) % block_size == 0:
                content[blocks[-1]] = tuple(token_ids)
                pool.cache_block(blocks[-1], pool.digests(token_ids)[-1])
        elif owners:
            pool.release(owners.pop(rng.choice(list(owners)))[1])
        held = [block for _, blocks in owners.values() for block in blocks]
        assert PAD_BLOCK not in held
        assert pool.num_free == pool.num_blocks - 1 - len(set(held))
        for block in set(held):
            assert pool._num_refs[block] == held.count(block)
            assert block not in pool._free
        # no request has overwritten a full block of another
        for token_ids, blocks in owners.values():
            for idx in range(len(token_ids) // block_size):
                assert content[blocks[idx]] == tuple(token_ids[: (idx + 1) * block_size])
        for digest, block in pool._by_digest.items():
            assert pool._digest_of[block] == digest
    for _, blocks in owners.values():
        pool.release(blocks)
    assert pool.num_free == pool.num_blocks - 1 and not any(pool._num_refs)
