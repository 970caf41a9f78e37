"""Schemas of what begins and ends a step: inputs from the state, sampling, draft tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.schemas.registry import define


def _decode_inputs_fake(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    table_SP: Tensor,
    row_idx_R: Tensor,
    block_size: int,
) -> tuple[Tensor, ...]:
    rows = row_idx_R.shape[0]
    return (
        *(row_idx_R.new_empty(rows) for _ in range(3)),
        table_SP.new_empty((rows, table_SP.shape[1])),
        row_idx_R.new_empty(rows, dtype=torch.int32),
        row_idx_R.new_empty(rows + 1, dtype=torch.int32),
    )


def _span_inputs_fake(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    table_SP: Tensor,
    row_idx_R: Tensor,
    num_tokens_R: Tensor,
    given_T: Tensor,
    block_size: int,
    draft_SK: Tensor | None = None,
    each: bool = False,
) -> tuple[Tensor, ...]:
    _, _, _, *per_row = _decode_inputs_fake(
        token_S, pos_S, rope_offset_S, table_SP, given_T if each else row_idx_R, block_size
    )
    return (
        *(torch.empty_like(given_T) for _ in range(3)),
        *per_row,
        *(torch.empty_like(given_T) for _ in range(2)),
        torch.empty_like(row_idx_R),
    )


decode_inputs = define(
    "decode_inputs(Tensor token, Tensor pos, Tensor rope_offset, Tensor block_table, "
    "Tensor row_idx, int block_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.step.decode_inputs,
    _decode_inputs_fake,
)
span_inputs = define(
    "span_inputs(Tensor token, Tensor pos, Tensor rope_offset, Tensor block_table, Tensor row_idx, "
    "Tensor num_tokens, Tensor given, int block_size, Tensor? draft=None, "
    "bool each=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.step.span_inputs,
    _span_inputs_fake,
)
store_state = define(
    "store_state(Tensor x, Tensor(a!) state, Tensor index) -> ()",
    reference.step.store_state,
    lambda x, state, index: None,
)
sampling_inputs = define(
    "sampling_inputs(Tensor pos, Tensor sampling, Tensor seed, Tensor row_idx, Tensor? num=None) "
    "-> (Tensor, Tensor, Tensor)",
    reference.step.sampling_inputs,
    lambda pos, sampling, seed, row_idx, num=None: (
        sampling.new_empty(row_idx.shape[0]),
        row_idx.new_empty(row_idx.shape[0]),
        row_idx.new_empty(row_idx.shape[0]),
    ),
)
advance = define(
    "advance(Tensor(a!) token, Tensor(b!) pos, Tensor row_idx, Tensor new_token, Tensor? num=None) "
    "-> ()",
    reference.step.advance,
    lambda token, pos, row_idx, new_token, num=None: None,
)
sample = define(
    "sample(Tensor logits, Tensor temperature, Tensor seed, Tensor pos) -> Tensor",
    reference.sample.sample,
    lambda logits, temperature, seed, pos: logits.new_empty(logits.shape[0], dtype=torch.int64),
)
apply_top_k_top_p = define(
    "apply_top_k_top_p(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, "
    "Tensor min_p) -> Tensor",
    reference.sample.apply_top_k_top_p,
    lambda logits, temperature, top_k, top_p, min_p: torch.empty_like(logits),
)
apply_token_bitmask = define(
    "apply_token_bitmask(Tensor logits, Tensor allowed, Tensor row) -> Tensor",
    reference.sample.apply_token_bitmask,
    lambda logits, allowed, row: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


def _draft_inputs_fake(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    table_SP: Tensor,
    row_idx_R: Tensor,
    num: int,
    *rest: int,
) -> tuple[Tensor, ...]:
    row_X = row_idx_R.new_empty(row_idx_R.shape[0] * num)
    made = _decode_inputs_fake(token_S, pos_S, rope_offset_S, table_SP, row_X, 0)
    return (*made, row_X, torch.empty_like(row_X))


draft_inputs = define(
    "draft_inputs(Tensor token, Tensor pos, Tensor rope_offset, Tensor block_table, "
    "Tensor row_idx, int num, int shift, int mask_id, int block_size, int last_pos) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.drafts.draft_inputs,
    _draft_inputs_fake,
)
accept = define(
    "accept(Tensor fed, Tensor chosen, Tensor num_tokens, Tensor row_idx, Tensor(a!) token, "
    "Tensor(b!) pos, int num, Tensor? seed=None, int rate=0) -> (Tensor, Tensor)",
    reference.drafts.accept,
    lambda fed, chosen, num_tokens, row_idx, token, pos, num, *rest: (
        fed.new_empty((num_tokens.shape[0], num)),
        fed.new_empty(num_tokens.shape[0]),
    ),
)
next_tokens = define(
    "next_tokens(Tensor token, Tensor pos, Tensor row_idx, Tensor fed, Tensor seq_len, "
    "Tensor q_start) -> (Tensor, Tensor)",
    reference.drafts.next_tokens,
    lambda token, pos, row_idx, fed, *rest: (torch.empty_like(fed), torch.empty_like(row_idx)),
)
sample_of = define(
    "sample_of(Tensor logits, Tensor token, int vocab_size, Tensor temperature, Tensor seed, "
    "Tensor pos) -> Tensor",
    reference.drafts.sample_of,
    lambda logits, token, *rest: token.new_empty(logits.shape[0]),
)
ngram_propose = define(
    "ngram_propose(Tensor(a!) history, Tensor(b!) draft, Tensor token, Tensor pos, "
    "Tensor row_idx, int min_n, int max_n, Tensor? past=None) -> ()",
    reference.step.ngram_propose,
    lambda history, draft, token, pos, row_idx, min_n, max_n, past=None: None,
)
