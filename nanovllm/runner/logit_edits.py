"""Edits of each request's logits: a bias, allowed tokens, bad words.

The edits are in tables with a row per row of the state, which the step itself updates. So a step
with edits needs no data from the host and can be captured. Bias, allowed tokens and bad words of
one token are one table that is added to the logits. Bad words of several tokens are compared with
the newest tokens of the output.

S rows of the state | R rows of a step | V vocabulary | N bad words of several tokens in a row
P tokens of a bad word before its last one, and newest output tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.platforms.base import Platform
from nanovllm.schedule.edit_limits import long_words
from nanovllm.schedule.plan import LogitEdits, RowEdits

MINUS_INF = float("-inf")
# Token ids are not negative. In `BadWords.prefix_SNP`, ANY equals every token and NEVER none. NONE
# stands for a token before the first one of the output.
ANY, NEVER, NONE = -1, -2, -3
# The smallest N and P of tables. Both double when they grow, so steps are rarely recaptured.
MIN_BAD_WORDS, MIN_CONTEXT = 8, 4


class BadWords(NamedTuple):
    """Bad words of several tokens. Rows without bad words have NEVER in all their prefixes."""

    prefix_SNP: Tensor  # int32: the tokens before the last one, right-aligned, with ANY on the left
    last_SN: Tensor  # int64: the last token
    newest_SP: Tensor  # int32: the newest tokens of the row's output


class EditTables:
    """Owns the tables. The first request with edits allocates them.

    `version` changes when a table moves: a step captured before that reads freed memory.
    """

    def __init__(self, platform: Platform, num_rows: int, vocab_size: int) -> None:
        """`num_rows` is S, with the row of padding."""
        self.version = 0
        self._platform, self._num_rows, self._vocab_size = platform, num_rows, vocab_size
        self._addend_SV: Tensor | None = None
        self._bad: BadWords | None = None
        self._edited: set[int] = set()  # rows whose tables may hold edits

    def reserve(self, edits: Sequence[LogitEdits]) -> None:
        """Allocate what rows with these edits need. Changes nothing if memory runs out."""
        addend_SV, bad = self._addend_SV, self._bad
        if addend_SV is None:
            shape = self._num_rows, self._vocab_size
            addend_SV = torch.zeros(shape, dtype=torch.float32, device=self._platform.device)
        num_words = max((len(long_words(one)) for one in edits), default=0)
        context = max((one.context_tokens for one in edits), default=0)
        old_shape = (0, 0) if bad is None else (bad.last_SN.shape[1], bad.newest_SP.shape[1])
        if num_words > old_shape[0] or context > old_shape[1]:
            bad = self._grown(num_words, context)
        if addend_SV is not self._addend_SV or bad is not self._bad:
            self._addend_SV, self._bad = addend_SV, bad
            self.version += 1

    def write(self, rows: Sequence[RowEdits]) -> None:
        """Set the edits of rows that now belong to requests with edits."""
        if not rows:
            return
        self.reserve([one.edits for one in rows])
        self._edited.update(one.row for one in rows)
        self._write_addends(rows)
        if self._bad is not None:
            row_R = self._platform.upload([one.row for one in rows], torch.int64)
            for table, values in zip(self._bad, _bad_arrays(rows, *self._bad.prefix_SNP.shape[1:])):
                table.index_copy_(0, row_R, self._platform.upload(values, table.dtype))

    def clear(self, rows: Iterable[int]) -> None:
        """Remove the edits of rows that now belong to other requests."""
        stale = self._edited.intersection(rows)
        if not stale:
            return
        row_R = self._platform.upload(sorted(stale), torch.int64)
        if self._addend_SV is not None:
            self._addend_SV.index_fill_(0, row_R, 0.0)
        if self._bad is not None:
            self._bad.prefix_SNP.index_fill_(0, row_R, NEVER)
        self._edited -= stale

    def edit(self, row_idx_R: Tensor, logits_RV: Tensor) -> Tensor:
        """New logits in fp32 with the rows' edits. Rows without edits keep their logits."""
        assert self._addend_SV is not None, "rows with edits have been written"
        edited_RV = self._addend_SV.index_select(0, row_idx_R).add_(logits_RV)
        if self._bad is not None:
            prefix_RNP, last_RN, newest_RP = (
                table.index_select(0, row_idx_R) for table in self._bad
            )
            is_next_RN = ((prefix_RNP == newest_RP.unsqueeze(1)) | (prefix_RNP == ANY)).all(-1)
            addend_RN = edited_RV.new_zeros(is_next_RN.shape).masked_fill_(is_next_RN, MINUS_INF)
            edited_RV.scatter_add_(1, last_RN, addend_RN)
        return edited_RV

    def append(self, row_idx_R: Tensor, token_R: Tensor) -> None:
        """Make token_R the newest tokens of the rows' outputs."""
        if self._bad is not None:
            newest_SP = self._bad.newest_SP
            kept_RP = newest_SP.index_select(0, row_idx_R)[:, 1:]
            new_R1 = token_R.unsqueeze(1).to(newest_SP.dtype)
            newest_SP.index_copy_(0, row_idx_R, torch.cat((kept_RP, new_R1), dim=1))

    def _write_addends(self, rows: Sequence[RowEdits]) -> None:
        assert self._addend_SV is not None
        upload, vocab_size = self._platform.upload, self._vocab_size
        # requests of one call share their list of allowed tokens, which can be as long as V
        sharing: dict[int, list[RowEdits]] = {}
        for one in rows:
            sharing.setdefault(id(one.edits.allowed), []).append(one)
        for group in sharing.values():
            allowed = group[0].edits.allowed
            base_V = self._addend_SV.new_full((vocab_size,), 0.0 if allowed is None else MINUS_INF)
            if allowed is not None:
                base_V.index_fill_(0, upload(allowed, torch.int64), 0.0)
            row_R = upload([one.row for one in group], torch.int64)
            self._addend_SV.index_copy_(0, row_R, base_V.expand(len(group), -1))
        places: list[int] = []
        values: list[float] = []
        for row, edits, _ in rows:
            bad = {word[0]: MINUS_INF for word in edits.bad if len(word) == 1}
            for addends in (edits.bias, bad):
                places += [row * vocab_size + token_id for token_id in addends]
                values += addends.values()
        if places:
            place_M, value_M = upload(places, torch.int64), upload(values, torch.float32)
            self._addend_SV.view(-1).index_add_(0, place_M, value_M)

    def _grown(self, num_words: int, context: int) -> BadWords:
        """Tables with room for `num_words` and `context` tokens, and the content of the current
        ones."""
        old, device = self._bad, self._platform.device
        if old is not None:
            num_words = max(num_words, old.last_SN.shape[1])
            context = max(context, old.newest_SP.shape[1])
        num_words = max(MIN_BAD_WORDS, _next_power_of_2(num_words))
        context = max(MIN_CONTEXT, _next_power_of_2(context))
        rows = self._num_rows
        new = BadWords(
            torch.full((rows, num_words, context), NEVER, dtype=torch.int32, device=device),
            torch.zeros((rows, num_words), dtype=torch.int64, device=device),
            torch.full((rows, context), NONE, dtype=torch.int32, device=device),
        )
        if old is not None:
            _, num_old, old_context = old.prefix_SNP.shape
            first = context - old_context
            new.prefix_SNP[:, :num_old, :first] = ANY
            new.prefix_SNP[:, :num_old, first:] = old.prefix_SNP
            new.last_SN[:, :num_old] = old.last_SN
            new.newest_SP[:, first:] = old.newest_SP
        return new


def _bad_arrays(
    rows: Sequence[RowEdits], num_words: int, context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The fields of `BadWords` for these rows."""
    prefix_RNP = np.full((len(rows), num_words, context), NEVER, np.int32)
    last_RN = np.zeros((len(rows), num_words), np.int64)
    newest_RP = np.full((len(rows), context), NONE, np.int32)
    for prefix_NP, last_N, newest_P, one in zip(prefix_RNP, last_RN, newest_RP, rows):
        for word_idx, word in enumerate(long_words(one.edits)):
            first = context - (len(word) - 1)
            prefix_NP[word_idx, :first] = ANY
            prefix_NP[word_idx, first:] = word[:-1]
            last_N[word_idx] = word[-1]
        newest = one.output_ids[-context:]
        newest_P[context - len(newest) :] = newest
    return prefix_RNP, last_RN, newest_RP


def _next_power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
