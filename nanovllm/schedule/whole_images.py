"""The limits of images whose tokens see all of it: no step has a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.schedule.cache_groups import CacheGroups
from nanovllm.schedule.request import MMSpan


@dataclass(frozen=True)
class WholeImages:
    """Says whether a request's images can be computed.

    num_blocks: those that requests can have. num_drafts: tokens that the device drafts after a
    prompt.
    """

    groups: CacheGroups
    num_blocks: int
    num_drafts: int = 0

    def check(self, contents: Sequence[MMSpan], num_prompt: int, max_output: int) -> None:
        """Raises ValueError for an image that no step can have, even if no other request runs."""
        longest, limit = max((one.num for one in contents), default=0), self.groups.step_tokens
        if longest > limit:
            raise ValueError(
                f"an image has {longest} tokens, and max_num_batched_tokens is {limit}: tokens "
                "that see the whole image need it in one step"
            )
        num_tokens = num_prompt + max_output  # a preempted request has blocks for its answer too
        for one in contents:
            end = one.start + one.num
            if end == num_prompt:
                end = min(end + self.num_drafts, num_tokens)
            needed = self.groups.needed_for(one.start, end, num_tokens)
            if needed > self.num_blocks:
                raise ValueError(
                    f"an image of {one.num} tokens from position {one.start} on needs {needed} "
                    f"blocks of the cache in a request of {num_tokens} tokens with its answer, and "
                    f"the cache has {self.num_blocks}: lower max_tokens, or raise "
                    "num_kvcache_blocks"
                )
