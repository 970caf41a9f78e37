"""A step's index arithmetic on a CPU: `step.cpp`, called through ctypes as in `library.py`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.kernels.cpu import build

_PER_ROW = "out_table out_seq_len out_q_start"
_DECODE_INPUTS = build.ArgumentStruct(
    "DecodeInputs",
    pointers=f"out_token out_pos out_slot {_PER_ROW} token pos rope_offset table row_idx",
    integers="num_rows num_blocks block_size",
)
_SPAN_INPUTS = build.ArgumentStruct(
    "SpanInputs",
    pointers=f"out_token out_pos out_slot {_PER_ROW} out_row out_num out_last "
    "token pos rope_offset table row_idx num_tokens given draft",
    integers="num_rows num_blocks num_tokens_all pad_row block_size num_drafts each",
)
_SAMPLING_INPUTS = build.ArgumentStruct(
    "SamplingInputs",
    pointers="out_temperature out_seed out_pos pos sampling seed row_idx num",
    integers="num_rows num_fields",
)
_ADVANCE = build.ArgumentStruct(
    "Advance", pointers="token pos row_idx new_token num", integers="num_rows pad_row"
)
_ACCEPT = build.ArgumentStruct(
    "Accept",
    pointers="out count token pos fed chosen num_tokens row_idx seed",
    integers="num_rows num_tokens_all pad_row num rate",
)
_NEXT_TOKENS = build.ArgumentStruct(
    "NextTokens",
    pointers="out last token pos row_idx fed seq_len q_start",
    integers="num_rows num_tokens_all pad_row",
)
_DRAFT_INPUTS = build.ArgumentStruct(
    "DraftInputs",
    pointers=f"out_token out_pos out_slot {_PER_ROW} out_row out_ahead "
    "token pos rope_offset table row_idx",
    integers="num_rows num_blocks num shift mask_id block_size last_pos",
)
_NGRAM_PROPOSE = build.ArgumentStruct(
    "NgramPropose",
    pointers="history draft token pos row_idx past",
    integers="num_rows num_positions num min_n max_n num_past",
)
COPY_ROWS = build.ArgumentStruct(
    "CopyRows", pointers="out x to from", integers="num num_bytes to_step from_step num_to num_from"
)
_STRUCTS = {
    "decode_inputs": _DECODE_INPUTS,
    "span_inputs": _SPAN_INPUTS,
    "sampling_inputs": _SAMPLING_INPUTS,
    "advance": _ADVANCE,
    "accept": _ACCEPT,
    "next_tokens": _NEXT_TOKENS,
    "draft_inputs": _DRAFT_INPUTS,
    "ngram_propose": _NGRAM_PROPOSE,
    "copy_rows": COPY_ROWS,
}


@functools.cache
def load() -> ctypes.CDLL:
    library = build.load(Path(__file__).with_suffix(".cpp"), tuple(_STRUCTS.values()))
    for name in _STRUCTS:
        function = getattr(library, f"nanovllm_{name}")
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    library.nanovllm_copy_rows.restype = ctypes.c_int64
    return library


def _per_row(row_idx_R: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for block_table_RP, seq_len_R and q_start."""
    num_rows = row_idx_R.shape[0]
    return (
        torch.empty((num_rows, num_blocks), dtype=torch.int32),
        torch.empty(num_rows, dtype=torch.int32),
        torch.empty(num_rows + 1, dtype=torch.int32),
    )


def decode_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    block_size: int,
) -> tuple[Tensor, ...]:
    """See `reference.step.decode_inputs`."""
    num_blocks = block_table_SP.shape[1]
    written = (*(torch.empty_like(row_idx_R) for _ in range(3)), *_per_row(row_idx_R, num_blocks))
    read = (token_S, pos_S, rope_offset_S, block_table_SP, row_idx_R)
    pointers = [tensor.data_ptr() for tensor in (*written, *read)]
    sizes = (row_idx_R.shape[0], num_blocks, block_size)
    load().nanovllm_decode_inputs(_DECODE_INPUTS.pack(*pointers, *sizes))
    return written


def span_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    num_tokens_R: Tensor,
    given_T: Tensor,
    block_size: int,
    draft_SK: Tensor | None = None,
    each: bool = False,
) -> tuple[Tensor, ...]:
    """See `reference.step.span_inputs`."""
    num_blocks = block_table_SP.shape[1]
    written = (
        *(torch.empty_like(given_T) for _ in range(3)),
        *_per_row(given_T if each else row_idx_R, num_blocks),
        *(torch.empty_like(given_T) for _ in range(2)),
        torch.empty_like(row_idx_R),
    )
    read = (token_S, pos_S, rope_offset_S, block_table_SP, row_idx_R, num_tokens_R, given_T)
    drafts = (0, 0) if draft_SK is None else (draft_SK.data_ptr(), draft_SK.shape[1])
    pointers = [*(tensor.data_ptr() for tensor in (*written, *read)), drafts[0]]
    sizes = (row_idx_R.shape[0], num_blocks, given_T.shape[0], pos_S.shape[0] - 1, block_size)
    load().nanovllm_span_inputs(_SPAN_INPUTS.pack(*pointers, *sizes, drafts[1], int(each)))
    return written


def sampling_inputs(
    pos_S: Tensor,
    sampling_SF: Tensor,
    seed_S: Tensor,
    row_idx_R: Tensor,
    num_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.step.sampling_inputs`."""
    num_rows, num_fields = row_idx_R.shape[0], sampling_SF.shape[1]
    written = (torch.empty(num_rows), torch.empty_like(row_idx_R), torch.empty_like(row_idx_R))
    pointers = [tensor.data_ptr() for tensor in (*written, pos_S, sampling_SF, seed_S, row_idx_R)]
    pointers.append(0 if num_R is None else num_R.data_ptr())
    load().nanovllm_sampling_inputs(_SAMPLING_INPUTS.pack(*pointers, num_rows, num_fields))
    return written


def advance(
    token_S: Tensor, pos_S: Tensor, row_idx_R: Tensor, token_R: Tensor, num_R: Tensor | None = None
) -> None:
    """See `reference.step.advance`."""
    pointers = [tensor.data_ptr() for tensor in (token_S, pos_S, row_idx_R, token_R)]
    pointers.append(0 if num_R is None else num_R.data_ptr())
    load().nanovllm_advance(_ADVANCE.pack(*pointers, row_idx_R.shape[0], token_S.shape[0] - 1))


def accept(
    token_T: Tensor,
    chosen_T: Tensor,
    num_tokens_R: Tensor,
    row_idx_R: Tensor,
    token_S: Tensor,
    pos_S: Tensor,
    num: int,
    seed_S: Tensor | None = None,
    rate: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `reference.drafts.accept`."""
    num_rows = row_idx_R.shape[0]
    token_RK, count_R = token_T.new_empty((num_rows, num)), torch.empty_like(row_idx_R)
    tensors = (token_RK, count_R, token_S, pos_S, token_T, chosen_T, num_tokens_R, row_idx_R)
    pointers = [one.data_ptr() for one in tensors]
    pointers.append(0 if seed_S is None else seed_S.data_ptr())
    sizes = (num_rows, token_T.shape[0], token_S.shape[0] - 1, num, rate)
    load().nanovllm_accept(_ACCEPT.pack(*pointers, *sizes))
    return token_RK, count_R


def next_tokens(
    token_S: Tensor,
    pos_S: Tensor,
    row_idx_R: Tensor,
    fed_T: Tensor,
    seq_len_R: Tensor,
    q_start: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.drafts.next_tokens`."""
    next_T, last_R = torch.empty_like(fed_T), torch.empty_like(row_idx_R)
    tensors = (next_T, last_R, token_S, pos_S, row_idx_R, fed_T, seq_len_R, q_start)
    sizes = (row_idx_R.shape[0], fed_T.shape[0], token_S.shape[0] - 1)
    pointers = [one.data_ptr() for one in tensors]
    load().nanovllm_next_tokens(_NEXT_TOKENS.pack(*pointers, *sizes))
    return next_T, last_R


def draft_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    num: int,
    shift: int,
    mask_id: int,
    block_size: int,
    last_pos: int,
) -> tuple[Tensor, ...]:
    """See `reference.drafts.draft_inputs`."""
    row_X = row_idx_R.new_empty(row_idx_R.shape[0] * num)
    num_blocks = block_table_SP.shape[1]
    written = (
        *(torch.empty_like(row_X) for _ in range(3)),
        *_per_row(row_X, num_blocks),
        row_X,
        torch.empty_like(row_X),
    )
    read = (token_S, pos_S, rope_offset_S, block_table_SP, row_idx_R)
    pointers = [one.data_ptr() for one in (*written, *read)]
    sizes = (row_idx_R.shape[0], num_blocks, num, shift, mask_id, block_size, last_pos)
    load().nanovllm_draft_inputs(_DRAFT_INPUTS.pack(*pointers, *sizes))
    return written


def ngram_propose(
    history_SM: Tensor,
    draft_SK: Tensor,
    token_S: Tensor,
    pos_S: Tensor,
    row_idx_R: Tensor,
    min_n: int,
    max_n: int,
    past_C: Tensor | None = None,
) -> None:
    """See `reference.step.ngram_propose`."""
    tensors = (history_SM, draft_SK, token_S, pos_S, row_idx_R)
    past = (0, 0) if past_C is None else (past_C.data_ptr(), past_C.shape[0])
    pointers = [*(tensor.data_ptr() for tensor in tensors), past[0]]
    sizes = (row_idx_R.shape[0], history_SM.shape[1], draft_SK.shape[1], min_n, max_n, past[1])
    load().nanovllm_ngram_propose(_NGRAM_PROPOSE.pack(*pointers, *sizes))


_ALL = (
    decode_inputs, span_inputs, sampling_inputs, advance, accept, next_tokens, draft_inputs,
    ngram_propose,
)  # fmt: skip
KERNELS = {kernel.__name__: kernel for kernel in _ALL}


def register() -> None:
    """Make these the ops' CPU kernels; compiles or loads the library. Later calls do nothing."""
    load()
    ops.register_kernels("CPU", KERNELS)
