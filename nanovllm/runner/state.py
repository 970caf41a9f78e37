"""The state on the device between steps, and the pure functions with which a step advances it.

S rows: one per running request, and a last row for padding, which stays at position 0 of block 0;
no request owns block 0. Each group of layers has a block table (`models.layer_state.PageGroups`).
R rows of a step | T tokens | K tokens a row | P blocks per row of a table | C past tokens
V vocabulary | F sampling fields | M positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.model import AdapterRows, Batch, Pages, States
from nanovllm.schedule.plan import PAD_BLOCK, SAMPLING_FIELDS

# Logits, temperatures, seeds and positions to tokens: `ops.sample`, or that of several ranks
Draw = Callable[..., Tensor]


class DeviceState(NamedTuple):
    token_S: Tensor  # newest token, not yet in the cache
    pos_S: Tensor  # position of the newest token; before the prompt's end, of the next chunk
    rope_offset_S: Tensor  # added to a position before the rotation
    block_tables: tuple[Tensor, ...]  # [S, P] of each group of layers
    sampling_SF: Tensor  # SAMPLING_FIELDS
    seed_S: Tensor
    adapter_S: Tensor | None = None  # 0: none. Only of models with adapters
    draft_SK: Tensor | None = None  # draft tokens after token_S; with a proposer on the device
    history_SM: Tensor | None = None  # int32, tokens up to token_S; if the proposer reads it
    past_C: Tensor | None = None  # int32, earlier answers (`ops.ngram_propose`); likewise

    @property
    def pad_row(self) -> int:
        return self.token_S.shape[0] - 1


class StatePlaces(NamedTuple):
    """The places that recurrent layers have for a row's states (`States`); 0: no such layers.

    With `each` a step keeps the states after each of its tokens, since the last may be rejected.
    """

    num: int = 0
    each: bool = False


class Span(NamedTuple):
    """The inputs of a step in which rows feed several tokens each. Padding rows feed none."""

    row_idx_R: Tensor
    num_tokens_R: Tensor
    token_T: Tensor  # row after row; plan.NEWEST and plan.DRAFT stand for tokens of the state


class SpanTokens(NamedTuple):
    """The tokens of a `Span`, as in `ops.span_inputs`: ids, rows of the state, numbers within the
    row from 1 on, and the index of each row's last token."""

    token_T: Tensor
    row_T: Tensor
    num_T: Tensor
    last_R: Tensor


def new_state(
    num_rows: int,
    blocks_per_row: int,
    device: torch.device,
    *,
    num_groups: int = 1,
    has_adapters: bool = False,
    num_drafts: int = 0,
    lookup_lens: tuple[int, int] = (0, 0),
) -> DeviceState:
    """`lookup_lens` are M of the history and C of the past, 0 for none."""
    history_len, past_len = lookup_lens
    rows = num_rows + 1

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(rows, *shape, dtype=dtype, device=device)

    sampling_SF = zeros(len(SAMPLING_FIELDS), dtype=torch.float32)
    sampling_SF.select(1, SAMPLING_FIELDS.index("repetition_penalty")).fill_(1)  # a divisor
    return DeviceState(
        token_S=zeros(),
        pos_S=zeros(),
        rope_offset_S=zeros(),
        block_tables=tuple(
            zeros(blocks_per_row, dtype=torch.int32).fill_(PAD_BLOCK) for _ in range(num_groups)
        ),
        sampling_SF=sampling_SF,
        seed_S=zeros(),
        adapter_S=zeros() if has_adapters else None,
        draft_SK=zeros(num_drafts) if num_drafts else None,
        history_SM=zeros(history_len, dtype=torch.int32) if history_len else None,
        past_C=torch.full((past_len,), -1, dtype=torch.int32, device=device) if past_len else None,
    )


def decode_batch(block_size: int, state: DeviceState, row_idx_R: Tensor) -> tuple[Tensor, Batch]:
    """The inputs of a decode step, from the state alone: each row's newest token and its place."""
    made = [
        ops.decode_inputs(*state[:3], table_SP, row_idx_R, block_size)
        for table_SP in state.block_tables
    ]
    token_R, *batch = made[0]
    others = tuple(Pages(*one[2:4]) for one in made[1:])
    return token_R, _with_adapters(Batch(*batch)._replace(others=others), state, row_idx_R)


def span_batch(
    block_size: int, state: DeviceState, span: Span, each: bool = False
) -> tuple[SpanTokens, Batch]:
    """The tokens of a span and their places. Rows continue at their positions in the state. With
    `each` every token is a row of the batch."""
    made = [
        ops.span_inputs(*state[:3], table_SP, *span, block_size, state.draft_SK, each)
        for table_SP in state.block_tables
    ]
    token_T, *places, row_T, num_T, last_R = made[0]
    tokens = SpanTokens(token_T, row_T, num_T, last_R)
    batch = Batch(*places)._replace(others=tuple(Pages(*one[2:4]) for one in made[1:]))
    return tokens, _with_adapters(batch, state, row_T, last_R)


def _with_adapters(
    batch: Batch, state: DeviceState, row_T: Tensor, last_R: Tensor | None = None
) -> Batch:
    """A batch with the adapters of its tokens, and of those that the last layer keeps."""
    if state.adapter_S is None:
        return batch
    adapter_T = state.adapter_S.index_select(0, row_T)
    kept = None if last_R is None else grouped(adapter_T.index_select(0, last_R))
    return batch._replace(adapters=grouped(adapter_T), kept_adapters=kept)


def grouped(adapter_T: Tensor) -> AdapterRows:
    """The adapters of tokens, as kernels read them."""
    return AdapterRows(adapter_T, *ops.adapter_tiles(adapter_T))


def decode_states(num_places: int, state: DeviceState, row_idx_R: Tensor) -> States:
    """Where the states are in a decode step."""
    pos_R, first_R = state.pos_S[row_idx_R], row_idx_R * num_places
    return States(_before(num_places, first_R, pos_R), pos_R == 0, first_R + pos_R % num_places)


def span_states(places: StatePlaces, state: DeviceState, span: Span, tokens: SpanTokens) -> States:
    """Where the states are in a span."""
    pos_R, first_R = state.pos_S[span.row_idx_R], span.row_idx_R * places.num
    from_R = _before(places.num, first_R, pos_R)
    if not places.each:
        end_R = pos_R + span.num_tokens_R
        return States(from_R, pos_R == 0, _before(places.num, first_R, end_R))
    end_T = state.pos_S[tokens.row_T] + tokens.num_T
    to_T = _before(places.num, tokens.row_T * places.num, end_T)
    return States(from_R, pos_R == 0, None, to_T)


def _before(num_places: int, first: Tensor, pos: Tensor) -> Tensor:
    """The place of the state before position `pos`, of rows whose places begin at `first`."""
    return first + (pos + (num_places - 1)) % num_places


def choose(
    state: DeviceState,
    row_idx_R: Tensor,
    logits_RV: Tensor,
    num_R: Tensor | None = None,
    draw: Draw = ops.sample,
) -> Tensor:
    """Choose token_R, at positions pos + num_R (+ 1 without num_R), by temperature and noise."""
    inputs = ops.sampling_inputs(state.pos_S, state.sampling_SF, state.seed_S, row_idx_R, num_R)
    return draw(logits_RV, *inputs)


def advance(
    state: DeviceState, row_idx_R: Tensor, token_R: Tensor, num_R: Tensor | None = None
) -> None:
    """Make token_R the newest tokens of rows that have fed num_R tokens (1 without num_R)."""
    ops.advance(state.token_S, state.pos_S, row_idx_R, token_R, num_R)


def choose_and_advance(
    state: DeviceState,
    row_idx_R: Tensor,
    logits_RV: Tensor,
    num_R: Tensor | None = None,
    draw: Draw = ops.sample,
) -> Tensor:
    """Choose token_R by temperature alone and write it to the state."""
    token_R = choose(state, row_idx_R, logits_RV, num_R, draw)
    advance(state, row_idx_R, token_R, num_R)
    return token_R


def accept_and_advance(
    num: int,
    state: DeviceState,
    span: Span,
    tokens: SpanTokens,
    chosen_T: Tensor,
    rate: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.accept`: (token_RK, count_R), K = `num`, and the state after it. With `rate` this share
    of the drafts is accepted at random."""
    rows = span.num_tokens_R, span.row_idx_R, state.token_S, state.pos_S
    random = () if rate is None else (state.seed_S, round(rate * 2**31))
    token_RK, count_R = ops.accept(tokens.token_T, chosen_T, *rows, num, *random)
    return token_RK, count_R


def choose_and_accept(
    num: int,
    rate: float | None,
    state: DeviceState,
    span: Span,
    tokens: SpanTokens,
    logits_TV: Tensor,
    draw: Draw = ops.sample,
) -> tuple[Tensor, Tensor]:
    """`accept_and_advance` with tokens that are chosen by temperature alone."""
    chosen_T = choose(state, tokens.row_T, logits_TV, tokens.num_T, draw)
    return accept_and_advance(num, state, span, tokens, chosen_T, rate)
