"""How many blocks sequences need, where layers with windows free the blocks behind them."""

from __future__ import annotations

from dataclasses import dataclass

# A request with a window is admitted with blocks for so many tokens beside the window. Its prefill
# steps are longer while more blocks are free.
CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class CacheGroups:
    """The block tables of a row: one for each group of layers. All groups take blocks of one pool.

    windows: the newest positions that queries of each group see, themselves included; 0: all.
    step_tokens: the most tokens of a prefill step.
    """

    windows: tuple[int, ...]
    block_size: int
    step_tokens: int

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of one table that tokens fill."""
        return -(-num_tokens // self.block_size)

    @property
    def held_blocks(self) -> int:
        """The most blocks of one table with a window that a request needs for its next tokens."""
        chunk = min(self.step_tokens, CHUNK_TOKENS)
        return self.num_blocks(max(self.windows) - 1 + chunk) + 1

    def needed(self, num_tokens: int) -> int:
        """Blocks that a request with so many tokens needs at a time, in all its tables."""
        whole = self.num_blocks(num_tokens)
        return sum(min(whole, self.held_blocks) if window else whole for window in self.windows)

    def needed_for(self, start: int, end: int, num_tokens: int) -> int:
        """Blocks of a request with `num_tokens` tokens while one step has those from `start` to
        `end` − 1."""
        tables = (
            self.num_blocks(end) - max(0, start - window + 1) // self.block_size
            if window
            else self.num_blocks(num_tokens)
            for window in self.windows
        )
        return sum(tables)

    def longest(self, num_blocks: int, max_len: int) -> int:
        """The longest sequence of up to `max_len` tokens that `num_blocks` blocks suffice for."""
        if self.windows == (0,):
            return min(max_len, num_blocks * self.block_size)
        low, high = 0, max_len
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (low, middle - 1) if self.needed(middle) > num_blocks else (middle, high)
        return low

    def most_useful(self, num_rows: int, max_len: int) -> int:
        """The blocks that `num_rows` sequences of `max_len` tokens can use."""
        whole = self.num_blocks(max_len)
        total = 0
        for window in self.windows:
            behind = self.num_blocks(window - 1) + 2
            step = self.num_blocks(self.step_tokens)
            is_whole = not window or num_rows * whole <= num_rows * behind + step
            total += num_rows * whole if is_whole else num_rows * behind + step
        return total
